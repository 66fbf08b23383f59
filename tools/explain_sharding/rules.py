"""Why each dimension of an array is sharded as it is, or is not."""

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple, Optional

from architectures.parts import sharding
from configs import sharding as tables


class Dimension(NamedTuple):
  """One dimension of an array.

  Attributes:
    size: of the whole array.
    axis: its logical axis; None: it has none.
    rule: the mesh axes that the rule for it names.
    mesh: those that it lies on, of more than one device.
    why: why it is not sharded, or not over all that the rule names; or ''.
  """
  size: int
  axis: Optional[str]
  rule: tuple[str, ...]
  mesh: tuple[str, ...]
  why: str


def explain(shape: Sequence[int], axes: Sequence[Optional[str]],
            mesh: Mapping[str, int], rules: str) -> list[Dimension]:
  """Returns a Dimension for each of `shape`.

  Rules are tried from the top of the table, as flax does, so that a mesh axis
  goes to the dimension whose rule stands first, not to the first dimension. A
  rule that names a mesh axis which is taken is passed over as a whole; a later
  rule for the same logical axis may apply instead.

  Args:
    shape: of the array.
    axes: its logical axes, one a dimension; shorter: the rest have none.
    mesh: the size of each mesh axis.
    rules: a name of configs.sharding.RULES.
  """
  axes = tuple(axes) + (None,) * (len(shape) - len(axes))
  table, taken, placed, held = dict(tables.RULES[rules]), {}, {}, {}
  for axis, wanted in tables.RULES[rules]:
    if axis not in axes or axes.index(axis) in placed:
      continue
    i = axes.index(axis)
    busy = [name for name in wanted if name in taken]
    if busy:
      held[i] = (f'{busy[0]} already shards dimension {taken[busy[0]]} '
                 f'({axes[taken[busy[0]]]})')
      continue
    placed[i] = wanted
    taken |= dict.fromkeys(wanted, i)
  found = []
  for i, (size, axis) in enumerate(zip(shape, axes)):
    wanted = placed.get(i, table[axis] if axis else ())
    on, why = _on(placed.get(i, ()), size, mesh)
    if axis is None:
      why = 'it has no logical axis'
    elif not wanted:
      why = f'the rule for {axis} names no mesh axis'
    elif i in held:
      why = f'{held[i]}; {why}' if why else held[i]
    found.append(Dimension(size, axis, tuple(wanted), on, why))
  return found


def _on(wanted, size: int, mesh) -> tuple[tuple[str, ...], str]:
  """Returns the mesh axes of more than one device, and what is missing."""
  real = tuple(name for name in wanted if mesh[name] > 1)
  on = sharding.that_divide(real, size, mesh)
  alone = ', '.join(name for name in wanted if mesh[name] == 1)
  if on != real:
    count = math.prod(mesh[name] for name in real)
    return on, (f'{size:,} does not divide over the {count} devices of '
                f'{" x ".join(real)}')
  why = f'{alone} has one device' if alone else ''
  return on, why


def spec(found: Sequence[Dimension]) -> str:
  """Returns the PartitionSpec as it is written, axes of one device left out."""
  parts = [d.mesh[0] if len(d.mesh) == 1 else d.mesh or None for d in found]
  while parts and parts[-1] is None:
    parts.pop()
  return f'P({", ".join(map(repr, parts))})'


def shards(found: Sequence[Dimension], mesh: Mapping[str, int]) -> int:
  """Returns into how many shards the array is cut."""
  return math.prod(mesh[name] for d in found for name in d.mesh)


def row(name: str, found: Sequence[Dimension], itemsize: int,
        mesh: Mapping[str, int]) -> dict:
  """Returns the report of one array, as JSON holds it."""
  whole = math.prod(d.size for d in found) * itemsize
  return dict(
      name=name, shape=[d.size for d in found], axes=[d.axis for d in found],
      spec=spec(found), bytes=whole,
      bytes_per_device=whole // shards(found, mesh),
      dimensions=[dict(d._asdict(), rule=list(d.rule), mesh=list(d.mesh))
                  for d in found])
