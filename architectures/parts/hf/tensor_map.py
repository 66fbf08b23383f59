"""The tensors of a Hugging Face folder, and the places of ours that each fills,
by the rows of a page's record (parts/hf has their form)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from architectures.parts.hf import Row
from common.errors import RequestError
from common.kinds import SECTIONS

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
        holds what is wanted.
      which: of `paths`.
      ranges: (start, stop) of our axes, by letter.
    """
    letters, places = self._places(which, ranges)
    x = cut(tuple(slice(int(at.min()), int(at.max()) + 1) for at in places))
    x = x[tuple(_index(at - at.min()) for at in places)]
    x = x.reshape(sum((at.shape for at in places), ()))
    return x.transpose([letters.index(a) for a in self.ours[which]])

  def join(self, ours: Sequence[np.ndarray]) -> np.ndarray:
    """Returns theirs, made of one array for each of `paths`."""
    joined = np.empty(self.shape, ours[0].dtype)
    for which, x in enumerate(ours):
      axes = self.ours[which]
      letters, places = self._places(
          which, {a: (0, n) for a, n in zip(axes, x.shape)})
      joined[tuple(map(_index, places))] = x.transpose(
          [axes.index(a) for a in letters]).reshape([at.size for at in places])
    return joined

  def _places(self, which: int, ranges: Mapping[str, tuple[int, int]]
              ) -> tuple[str, list[np.ndarray]]:
    """Returns where paths[which] stands in each dimension of theirs, by those
    of our axes that it has, which are cut to `ranges`; and these axes."""
    letters, places = '', []
    for lead, pieces in map(_pieces, self.axes.split()):
      sizes, mine = [*map(self._size, pieces)], which % len(pieces)
      axes = lead + pieces[mine]
      at = (np.arange(self._size(lead))[:, None] * sum(sizes)
            + sum(sizes[:mine]) + np.arange(sizes[mine])[None])
      at = at.reshape([self.sizes[a] for a in axes])
      at = at[tuple((which if a == str(len(self.paths)) else 0)
                    if a.isdigit() else slice(None) for a in axes)]
      axes = ''.join(a for a in axes if not a.isdigit())
      if 'JR' in axes:  # theirs orders our heads by groups
        first = axes.index('JR')
        at = at.reshape(*at.shape[:first], -1, *at.shape[first + 2:])
        axes = axes.replace('JR', 'H')
      places.append(at[tuple(slice(*ranges[a]) for a in axes)])
      letters += axes
    return letters, places

  def _size(self, axes: str) -> int:
    return math.prod(self.sizes[a] for a in axes)


def _index(at: np.ndarray) -> slice | np.ndarray:
  """Returns what indexes a dimension at these places, which ascend: a slice,
  which is faster, where their steps are equal."""
  at = at.ravel()
  even = range(at[0], at[-1] + 1, at[1] - at[0] if at.size > 1 else 1)
  return slice(even.start, even.stop, even.step) if np.array_equal(
      at, even) else at


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
