"""The tensors of a Hugging Face folder, and the places of ours that each fills,
by the rows of a page's record (parts/hf has their form)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from architectures.parts.hf import Row
from configs.errors import RequestError, require
from configs.kinds import SECTIONS

# A row of one block, or of all layers.
_OF_LAYERS = re.compile(rf'/(?:{"|".join(SECTIONS)})/block_\d+/|/layers/')


class Tensor(NamedTuple):
  """One tensor of theirs, and the places of ours that it fills.

  Attributes:
    name: theirs.
    axes: theirs, such as 'D 3HK', 'HK+JK+JK D' or 'J(RK+K+K) D'.
    paths: of ours; several where it is fused.
    ours: the axes of each, without those that `index` picks from.
    index: the leading indices in each of `paths` (layer, expert).
    sizes: of the axes, by letter.
  """
  name: str
  axes: str
  paths: tuple[str, ...]
  ours: tuple[str, ...]
  index: tuple[int, ...]
  sizes: dict[str, int]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of theirs."""
    return tuple(self._size(lead) * sum(map(self._size, pieces))
                 for lead, pieces in map(_pieces, self.axes.split()))

  def part(self, cut: Callable[[tuple[slice, ...]], np.ndarray], which: int,
           ranges: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """Returns what theirs holds for paths[which], by our axes.

    Args:
      cut: returns a slice of theirs; the slice asked for is the smallest that
        holds what is wanted, or whole groups of heads.
      which: of `paths`.
      ranges: (start, stop) of our axes, by letter.
    """
    wanted = {'1': (0, 1), **ranges,
              str(len(self.paths)): (which, which + 1)}
    if self._grouped(which):  # the groups that the heads are in
      (first, last), R = ranges['H'], self.sizes['R']
      wanted |= dict(J=(first // R, -(-last // R)), R=(0, R))
    slices, shapes, indices, taken = zip(*(
        self._narrow(dim, which, wanted) for dim in self.axes.split()))
    x = cut(slices).reshape(sum(shapes, ()))[sum(indices, ())]
    x = x.reshape(sum(taken, ()))
    letters = ''.join(self._dims(which))
    fused = [i for i, a in enumerate(letters) if a.isdigit()]
    x = x.transpose([*map(letters.index, self._split(which)), *fused])
    x = x.reshape(x.shape[:x.ndim - len(fused)])
    if not self._grouped(which):
      return x
    at, first = self.ours[which].index('H'), ranges['H'][0] % R
    x = x.reshape(*x.shape[:at], -1, *x.shape[at + 2:])
    return x[(slice(None),) * at + (slice(
        first, first + ranges['H'][1] - ranges['H'][0]),)]

  def _narrow(self, dim: str, which: int, ranges: Mapping[str, tuple[int, int]]
              ) -> tuple[slice, tuple[int, ...], tuple[slice, ...],
                         tuple[int, ...]]:
    """Returns the shortest slice of a dimension of theirs that holds `ranges`
    of its axes, the shape of that slice by axis, what to take of it, and the
    shape of that by axis.

    The slice can be narrow in the axes of a single index and in the one after
    them; of the axes that follow it holds all.
    """
    lead, pieces = _pieces(dim)
    before = 0
    if len(pieces) > 1:
      before, dim = sum(map(self._size, pieces[:which])), pieces[which]
    count = lambda axes: tuple(ranges[a][1] - ranges[a][0] for a in axes)
    if lead:  # the groups; of each, the part that is ours
      (first, last), = (ranges[a] for a in lead)
      size = sum(map(self._size, pieces))
      require(all(count(a)[0] == self.sizes[a] for a in dim),
              f'{self.name} is read by whole heads')
      return (slice(first * size, last * size), (last - first, size),
              (slice(None), slice(before, before + self._size(dim))),
              count(lead + dim))
    several = (i for i, a in enumerate(dim) if ranges[a][1] - ranges[a][0] != 1)
    end = next(several, len(dim) - 1) + 1
    narrow, whole = dim[:end], dim[end:]
    start = int(np.ravel_multi_index([ranges[a][0] for a in narrow],
                                     [self.sizes[a] for a in narrow]))
    size = self._size(whole)
    return (slice(before + start * size,
                  before + (start + count(narrow)[-1]) * size),
            count(narrow) + tuple(self.sizes[a] for a in whole),
            (slice(None),) * end + tuple(slice(*ranges[a]) for a in whole),
            count(dim))

  def join(self, ours: Sequence[np.ndarray]) -> np.ndarray:
    """Returns theirs, made of one array for each of `paths`."""
    parts = []
    for which, x in enumerate(ours):
      mine = self._split(which)
      x = x.reshape([self.sizes[a] for a in mine])
      plain = [a for a in ''.join(self._dims(which)) if not a.isdigit()]
      parts.append(x.transpose([mine.index(a) for a in plain]))
    dims = self.axes.split()
    if '+' in self.axes:
      at = next(i for i, dim in enumerate(dims) if '+' in dim)
      lead, _ = _pieces(dims[at])
      shapes = [[self._size(dim.removeprefix(lead) if i == at else dim)
                 for i, dim in enumerate(self._dims(which))]
                for which in range(len(parts))]
      x = np.concatenate(
          [x.reshape([*shape[:at], self._size(lead), *shape[at:]])
           for x, shape in zip(parts, shapes)], at + 1)
    else:
      fused = [i for i, a in enumerate(''.join(dims)) if a.isdigit()]
      x = np.stack(parts, fused[0]) if fused else parts[0]
    return np.ascontiguousarray(x.reshape(self.shape))

  def _grouped(self, which: int) -> bool:
    """Whether theirs orders the heads of paths[which] by groups of R."""
    return 'R' in self.axes and 'H' in self.ours[which]

  def _split(self, which: int) -> str:
    """Our axes of paths[which], with H as J and R where theirs has groups."""
    ours = self.ours[which]
    return ours.replace('H', 'JR') if self._grouped(which) else ours

  def _dims(self, which: int) -> list[str]:
    """The axes in each dimension of theirs, where paths[which] stands."""
    return [lead + (pieces[which] if len(pieces) > 1 else pieces[0])
            for lead, pieces in map(_pieces, self.axes.split())]

  def _size(self, axes: str) -> int:
    return math.prod(self.sizes[a] for a in axes)


def _pieces(dim: str) -> tuple[str, list[str]]:
  """Returns the axis of groups, if any, and the pieces that follow one another
  within a group."""
  lead, grouped, rest = dim.rpartition('(')
  return lead, (rest.removesuffix(')') if grouped else dim).split('+')


def expand(rows: Sequence[Row],
           shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
  """Returns every tensor of theirs for parameters of these shapes, by path.

  Raises:
    RequestError: naming the parameters for which the table has no row.
  """
  tensors = []
  for (_, axes, theirs, their_axes), paths, layers, experts in places(
      rows, shapes):
    each = axes_of(axes, len(paths))
    sizes = {a: int(n) for a, n in re.findall(r'(\w)=(\d+)', their_axes)}
    their_axes = re.sub(r'=\d+', '', their_axes)
    sizes |= {a: n for one, path in zip(each, paths)
              for a, n in zip(one, shapes[path][-len(one):])}
    if 'R' in their_axes:
      sizes['R'] = sizes['H'] // sizes['J']
    inner = tuple(one.replace('E', '') if '{e}' in theirs else one
                  for one in each)
    for (row, n), e in itertools.product(enumerate(layers), experts):
      index = (() if n is None else (row,)) + (() if e is None else (e,))
      tensors.append(Tensor(theirs.format(n=n, m=n, e=e), their_axes, paths,
                            inner, index,
                            sizes | {'1': 1, str(len(paths)): len(paths)}))
  covered = {path for tensor in tensors for path in tensor.paths}
  if bare := sorted(set(shapes) - covered):
    raise RequestError(
        f'no Hugging Face name for {", ".join(bare)}: this combination of '
        'parts is none that transformers has under this architecture')
  return tensors


def axes_of(axes: str, paths: int) -> tuple[str, ...]:
  """Returns our axes of each of so many paths, of a row's second item."""
  each = tuple(axes.split('|'))
  return each if len(each) == paths else each * paths


def count(rows: Sequence[Row],
          shapes: Mapping[str, tuple[int, ...]]) -> int:
  """Returns how many tensors `expand` has, without making them."""
  return sum(len(layers) * len(experts)
             for *_, layers, experts in places(rows, shapes))


def places(rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]
           ) -> Iterator[tuple[Row, tuple[str, ...], Sequence, Sequence]]:
  """Yields (row, our paths, layers, experts) for each row and each block that
  has its parameter: those with a tensor each; (None,) where one holds all."""
  for row in rows:
    ours, _, theirs, _ = row
    folder, _, names = ours.rpartition('/')
    layers = _OF_LAYERS.search(ours)
    where = layers[0] if layers else ''
    for place, first, period in _blocks(
        ours.partition(where)[0], shapes, '{m}' in theirs
    ) if where else (('', 0, 0),):
      if where not in ('', '/layers/', f'/{place}/'):
        continue
      paths = tuple(
          f'{folder}/{name}'.lstrip('/').replace('/layers/', f'/{place}/')
          if where == '/layers/' else f'{folder}/{name}'.lstrip('/')
          for name in names.split('|'))
      shape, axes = shapes.get(paths[0]), axes_of(row[1], len(paths))[0]
      if shape is not None and len(shape) == len(axes) + bool(where):
        first += '{m}' in theirs and '/ffn' in ours
        yield (row, paths,
               range(first, first + period * shape[0], period) if where
               else (None,),
               range(shape[bool(where) + axes.index('E')])
               if '{e}' in theirs else (None,))


def _blocks(stack: str, shapes: Mapping[str, tuple[int, ...]],
            parts: bool = False):
  """Yields where each block stands, its first layer, the step to the next. With
  `parts`, a layer with a feed-forward network counts as two."""
  before = 0
  for section in SECTIONS:
    periods = {path.split('/')[2]: shape[0] for path, shape in shapes.items()
               if path.startswith(f'{stack}/{section}/')}
    blocks = [f'{section}/block_{n}' for n in range(len(periods))]
    sizes = [1 + (parts and f'{stack}/{block}/ffn_norm/scale' in shapes)
             for block in blocks]
    for n, block in enumerate(blocks):
      yield block, before + sum(sizes[:n]), sum(sizes)
    before += sum(sizes) * next(iter(periods.values()), 0)
