"""Name tables: where a parameter of ours stands in a Hugging Face file.

The rows of a page, as architectures/parts/hf.py describes them, become one
Tensor for each tensor of the files, which cuts our parameters out of theirs
and joins them again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import itertools
import math
from typing import NamedTuple

import numpy as np

from architectures.parts.hf import Row
from configs.errors import RequestError


class Tensor(NamedTuple):
  """One tensor of theirs, and the places of ours that it fills.

  Attributes:
    name: theirs.
    axes: theirs, such as 'D 3HK'.
    paths: of ours; several where it is fused.
    ours: the axes of each, without those that `index` picks from.
    index: the leading indices in each of `paths` (layer, expert).
    sizes: of the axes, by letter.
  """
  name: str
  axes: str
  paths: tuple[str, ...]
  ours: str
  index: tuple[int, ...]
  sizes: dict[str, int]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of theirs."""
    return tuple(math.prod(self.sizes[a] for a in dim)
                 for dim in self.axes.split())

  def part(self, cut: Callable[[tuple[slice, ...]], np.ndarray], which: int,
           ranges: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """Returns what theirs holds for paths[which], by our axes.

    Args:
      cut: returns a slice of theirs; as little is asked for as one slice can.
      which: of `paths`.
      ranges: (start, stop) of our axes, by letter.
    """
    wanted = {**ranges, str(len(self.paths)): (which, which + 1)}
    slices, shapes, indices = zip(*(
        self._narrow(dim, wanted) for dim in self.axes.split()))
    x = cut(slices).reshape(sum(shapes, ()))[sum(indices, ())]
    letters = self.axes.replace(' ', '')
    fused = [a for a in letters if a.isdigit()]
    x = x.transpose([letters.index(a) for a in (*self.ours, *fused)])
    return x[..., 0] if fused else x

  def _narrow(self, dim: str, ranges: Mapping[str, tuple[int, int]]
              ) -> tuple[slice, tuple[int, ...], tuple[slice, ...]]:
    """Returns the shortest slice of a dimension of theirs that holds `ranges`
    of its axes, the shape of that slice by axis, and what to take of it.

    The slice can be narrow in the axes of a single index and in the one after
    them; of the axes that follow it holds all.
    """
    several = (i for i, a in enumerate(dim) if ranges[a][1] - ranges[a][0] != 1)
    end = next(several, len(dim) - 1) + 1
    narrow, whole = dim[:end], dim[end:]
    first = int(np.ravel_multi_index([ranges[a][0] for a in narrow],
                                     [self.sizes[a] for a in narrow]))
    spans = tuple(ranges[a][1] - ranges[a][0] for a in narrow)
    size = math.prod(self.sizes[a] for a in whole)
    return (slice(first * size, (first + spans[-1]) * size),
            spans + tuple(self.sizes[a] for a in whole),
            (slice(None),) * end + tuple(slice(*ranges[a]) for a in whole))

  def join(self, ours: Sequence[np.ndarray]) -> np.ndarray:
    """Returns theirs, made of one array for each of `paths`."""
    letters = self.axes.replace(' ', '')
    plain = ''.join(a for a in letters if not a.isdigit())
    parts = [x.transpose([self.ours.index(a) for a in plain]) for x in ours]
    fused = [i for i, a in enumerate(letters) if a.isdigit()]
    x = np.stack(parts, fused[0]) if fused else parts[0]
    return np.ascontiguousarray(x.reshape(self.shape))


def expand(rows: Sequence[Row],
           shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
  """Returns every tensor of theirs for parameters of these shapes, by path.

  Raises:
    RequestError: naming the parameters for which the table has no row.
  """
  tensors = []
  for (_, axes, theirs, their_axes), paths, layers, experts in places(
      rows, shapes):
    sizes = dict(zip(axes, shapes[paths[0]][-len(axes):]))
    inner = axes.replace('E', '') if '{e}' in theirs else axes
    for (row, n), e in itertools.product(enumerate(layers), experts):
      index = (() if n is None else (row,)) + (() if e is None else (e,))
      tensors.append(Tensor(theirs.format(n=n, e=e), their_axes, paths, inner,
                            index, sizes | {str(len(paths)): len(paths)}))
  covered = {path for tensor in tensors for path in tensor.paths}
  if bare := sorted(set(shapes) - covered):
    raise RequestError(
        f'no Hugging Face name for {", ".join(bare)}: this combination of '
        'parts is none that transformers has under this architecture')
  return tensors


def count(rows: Sequence[Row],
          shapes: Mapping[str, tuple[int, ...]]) -> int:
  """Returns how many tensors `expand` has, without making them."""
  return sum(len(layers) * len(experts)
             for *_, layers, experts in places(rows, shapes))


def places(rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]
           ) -> Iterator[tuple[Row, tuple[str, ...], Sequence, Sequence]]:
  """Yields (row, our paths, layers, experts) for each row of the table and
  each block of the period in which it has a parameter: which layers and which
  experts have a tensor each, or (None,) where one tensor holds all."""
  for row in rows:
    ours, axes, theirs, _ = row
    folder, _, names = ours.rpartition('/')
    stack, stacked, _ = ours.partition('/layers/')
    period = len({path.split('/')[2] for path in shapes
                  if path.startswith(f'{stack}/layers/')}) if stacked else 1
    for block in range(period):
      paths = tuple(
          f'{folder}/{name}'.lstrip('/').replace(
              '/layers/', f'/layers/block_{block}/')
          for name in names.split('|'))
      shape = shapes.get(paths[0], ())
      if len(shape) == len(axes) + bool(stacked):
        yield (row, paths,
               range(block, block + period * shape[0], period) if stacked
               else (None,),
               range(shape[bool(stacked) + axes.index('E')])
               if '{e}' in theirs else (None,))
