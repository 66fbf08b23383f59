"""Points that are to be other systems: by all of their parts, or by name alone.
"""

from collections.abc import Callable, Collection
import dataclasses
from typing import Any

import ml_collections

from configs.errors import RequestError, require


class Add:
  """What `sweep(add)` of a file is given: add(name, **changes) adds a point,
  and add.system(arch) one that is another system."""

  def __init__(self, add: Callable[..., None], base: ml_collections.ConfigDict,
               file: str):
    self._add, self._base, self._file = add, base, file

  def __call__(self, name: str, **changes: Any) -> None:
    self._add(name, **changes)

  def system(self, arch: str, size: str = 'tiny', name: str = '',
             **changes: Any) -> None:
    """Adds the base as another system: the fields of its model that
    configs/ARCH.py has otherwise, but for its sizes
    (training/costs/systems.py).

    Args:
      arch: the system, as model.arch names it.
      size: of configs/ARCH.py: whose parts are taken, and the sizes of what the
        base has no part for, such as experts.
      name: of the point; default: arch.
      **changes: by dotted key, made after these.
    """
    from training.costs import systems
    name = name or str(arch)
    try:
      found = systems.changes(self._base, arch, size)
    except RequestError as error:
      raise RequestError(f'{self._file}: point {name!r}: {error}') from error
    self._add(name, **{**found, **changes})


def refuse_names_alone(sweep: Any, held: Collection[str] = ()) -> None:
  """Raises RequestError for a point that another one equals in all but
  model.arch, which is a name and changes no part.

  Args:
    sweep: as spec.read_sweep_file reads it.
    held: names of points that a workdir has already: its runs go on.
  """
  configs = {point.name: sweep.config(point) for point in sweep.points}
  base = configs.pop(sweep.base_name)
  seen = [(sweep.base_name, base)]
  for name, config in configs.items():
    for other, its in seen:
      arch, theirs = config.model.arch, its.model.arch
      require(arch == theirs or name in held or not _same(config, its),
              f'{sweep.file}: points {other!r} and {name!r} differ in '
              f'model.arch alone, {theirs!r} and {arch!r}, which is a name and '
              'changes no part of a model, so their runs would be the same: '
              f'write add.system({arch!r}), which sets the parts of that '
              'system, or set model.norm, model.position and so on too')
    seen.append((name, config))


def _same(one: ml_collections.ConfigDict, other: ml_collections.ConfigDict
          ) -> bool:
  """Whether two configs build and train the same, whatever their systems are
  called."""
  import architectures
  from training.costs import totals
  rest = [{key: value for key, value in config.to_dict().items()
           if key != 'model'} for config in (one, other)]
  if rest[0] != rest[1] or not {one.model.arch, other.model.arch} <= set(
      architectures.systems()):
    return False
  # Pages of encoders have more than parts, such as what scores a row.
  pages = [architectures.systems()[config.model.arch]
           for config in (one, other)]
  more = [{name: getattr(page, name) for name in dir(page)
           if not name.startswith('_') and name not in ('PARTS', 'ARCH')}
          for page in pages]
  if more[0] != more[1]:
    return False
  try:
    models = [totals.resolved(config) for config in (one, other)]
  except RequestError:  # which is refused where each point is checked
    return False
  return dataclasses.replace(models[0], arch=models[1].arch) == models[1]
