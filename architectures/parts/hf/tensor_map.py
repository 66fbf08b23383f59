"""The tensors of a Hugging Face folder, and the places of ours that each fills,
by the rows of its page (parts/hf has their form)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import re

import numpy as np

from architectures.parts.hf import Row
from common.errors import RequestError
from common.kinds import SECTIONS

# A row of one block, or of all layers.
_OF_LAYERS = re.compile(rf'/(?:{"|".join(SECTIONS)})/block_\d+/|/layers/')


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of theirs, and the places of ours that it fills.

  Attributes:
    name: the name of the tensor.
    axes: the axes of the tensor, such as 'D 3HK', 'HK+JK+JK D' or
      'J(RK+K+K) D'.
    paths: the paths of our parameters; several where the tensor is fused.
    ours: the axes of each parameter, without those that `index` picks from.
    index: the leading indices in each of `paths` (layer, expert).
    sizes: the size of each axis, by its letter.
  """
  name: str
  axes: str
  paths: tuple[str, ...]
  ours: tuple[str, ...]
  index: tuple[int, ...]
  sizes: dict[str, int]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the tensor."""
    shape = []
    for dim in self.axes.split():
      groups, pieces = _pieces(dim)
      size = 0
      for piece in pieces:
        size += self._size(piece)
      shape.append(self._size(groups) * size)
    return tuple(shape)

  def part(self, cut: Callable[[tuple[slice, ...]], np.ndarray], which: int,
           ranges: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """Returns what the tensor holds for paths[which], by our axes.

    Args:
      cut: a function that returns a slice of the tensor; it is asked for the
        smallest slice that holds the wanted part.
      which: the number of the path in `paths`.
      ranges: (start, stop) of our axes, by letter.
    """
    letters, places = self._places(which, ranges)
    # The smallest block of the tensor, the wanted part of that, and the shape
    # of this part with one dimension for each of our axes.
    limits, inside = [], []
    shape: list[int] = []
    for at in places:
      first, last = int(at.min()), int(at.max())
      limits.append(slice(first, last + 1))
      inside.append(_index(at - first))
      shape += at.shape
    block = cut(tuple(limits))
    wanted = block[tuple(inside)].reshape(shape)
    order = [letters.index(axis) for axis in self.ours[which]]
    return wanted.transpose(order)

  def join(self, ours: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the tensor, made of one array for each of `paths`."""
    joined = np.empty(self.shape, ours[0].dtype)
    for which, x in enumerate(ours):
      # Our axes in the order of the tensor's, and joined as it joins them.
      axes = self.ours[which]
      whole = {axis: (0, size) for axis, size in zip(axes, x.shape)}
      letters, places = self._places(which, whole)
      order = [axes.index(letter) for letter in letters]
      sizes = [at.size for at in places]
      into = [_index(at) for at in places]
      joined[tuple(into)] = x.transpose(order).reshape(sizes)
    return joined

  def _places(self, which: int, ranges: Mapping[str, tuple[int, int]]
              ) -> tuple[str, list[np.ndarray]]:
    """Returns where paths[which] stands in the tensor.

    Args:
      which: the number of the path in `paths`.
      ranges: (start, stop) of our axes, by letter.

    Returns:
      Our axes in the order of the tensor's dimensions, and for each dimension
      the positions in it, an array whose dimensions are those of our axes that
      the dimension has, cut to `ranges`.
    """
    letters, places = '', []
    for dim in self.axes.split():
      groups, pieces = _pieces(dim)
      axes, at = self._positions(groups, pieces, which % len(pieces))

      # A digit is a number of parameters, of which this is one.
      several = str(len(self.paths))
      picks: list[int | slice] = []
      kept = ''
      for axis in axes:
        if not axis.isdigit():
          picks.append(slice(None))
          kept += axis
        elif axis == several:
          picks.append(which)
        else:
          picks.append(0)
      at, axes = at[tuple(picks)], kept

      # Our heads H, where theirs are ordered by groups J of R heads.
      if 'JR' in axes:
        first = axes.index('JR')
        at = at.reshape(*at.shape[:first], -1, *at.shape[first + 2:])
        axes = axes.replace('JR', 'H')
      cuts = [slice(*ranges[axis]) for axis in axes]
      places.append(at[tuple(cuts)])
      letters += axes
    return letters, places

  def _positions(self, groups: str, pieces: Sequence[str], which: int
                 ) -> tuple[str, np.ndarray]:
    """Returns the axes of one piece of a dimension, and its positions there.

    Args:
      groups: the axes of the groups, in each of which all pieces stand.
      pieces: the axes of the pieces that follow one another in a group.
      which: the number of the piece.
    """
    sizes = [self._size(piece) for piece in pieces]
    starts = np.arange(self._size(groups)) * sum(sizes) + sum(sizes[:which])
    at = starts[:, None] + np.arange(sizes[which])[None]
    axes = groups + pieces[which]
    return axes, at.reshape([self.sizes[axis] for axis in axes])

  def _size(self, axes: str) -> int:
    """Returns the size of axes that are one dimension."""
    size = 1
    for axis in axes:
      size *= self.sizes[axis]
    return size


def _index(at: np.ndarray) -> slice | np.ndarray:
  """Returns the index of these places in a dimension, which ascend: a slice,
  which is faster, where their steps are equal."""
  at = at.ravel()
  step = 1
  if at.size > 1:
    step = int(at[1] - at[0])
  even = slice(int(at[0]), int(at[-1]) + 1, step)
  if np.array_equal(at, np.arange(even.start, even.stop, step)):
    return even
  return at


def _pieces(dim: str) -> tuple[str, list[str]]:
  """Returns the axes of groups, '' if there are none, and the pieces that
  follow one another within a group."""
  groups, is_grouped, rest = dim.rpartition('(')
  if is_grouped:
    rest = rest.removesuffix(')')
  return groups, rest.split('+')


def expand(rows: Sequence[Row],
           shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
  """Returns every tensor of theirs for parameters of these shapes, by path.

  Raises:
    RequestError: naming the parameters for which the table has no row.
  """
  tensors: list[Tensor] = []
  covered: set[str] = set()
  for place in places(rows, shapes):
    tensors += _tensors_of(place, shapes)
    covered.update(place.paths)
  bare = sorted(set(shapes) - covered)
  if bare:
    raise RequestError(
        f'no Hugging Face name for {", ".join(bare)}: this combination of '
        'parts is none that transformers has under this architecture')
  return tensors


def _tensors_of(place: 'Place', shapes: Mapping[str, tuple[int, ...]]
                ) -> list[Tensor]:
  """Returns the tensors of one place, by its layers and experts."""
  _, axes, theirs, their_axes = place.row
  each = axes_of(axes, len(place.paths))

  # The sizes of the axes, of which the row may give some, as in J=2.
  sizes = {}
  for axis, size in re.findall(r'(\w)=(\d+)', their_axes):
    sizes[axis] = int(size)
  their_axes = re.sub(r'=\d+', '', their_axes)
  for letters, path in zip(each, place.paths):
    sizes |= zip(letters, shapes[path][-len(letters):])
  if 'R' in their_axes:
    sizes['R'] = sizes['H'] // sizes['J']
  several = len(place.paths)
  sizes['1'] = 1
  sizes[str(several)] = several

  # A tensor for each layer and each expert.
  inner = each
  if '{e}' in theirs:
    inner = tuple(letters.replace('E', '') for letters in each)
  tensors = []
  for row, layer in enumerate(place.layers):
    for expert in place.experts:
      index: tuple[int, ...] = ()
      if layer is not None:
        index += (row,)
      if expert is not None:
        index += (expert,)
      tensors.append(Tensor(
          name=theirs.format(n=layer, m=layer, e=expert), axes=their_axes,
          paths=place.paths, ours=inner, index=index, sizes=sizes))
  return tensors


def axes_of(axes: str, paths: int) -> tuple[str, ...]:
  """Returns our axes of each of so many paths, by a row's second item."""
  each = tuple(axes.split('|'))
  if len(each) == paths:
    return each
  return each * paths


def count(rows: Sequence[Row],
          shapes: Mapping[str, tuple[int, ...]]) -> int:
  """Returns how many tensors `expand` has, without making them."""
  total = 0
  for place in places(rows, shapes):
    total += len(place.layers) * len(place.experts)
  return total


@dataclasses.dataclass(frozen=True)
class Place:
  """A row, and a block of ours that has its parameter.

  Attributes:
    row: the row of the page.
    paths: the paths of our parameters.
    layers: the numbers of the layers with a tensor each; (None,) where the
      parameter is of no layer.
    experts: the numbers of the experts with a tensor each; (None,) where one
      tensor holds all, or there are none.
  """
  row: Row
  paths: tuple[str, ...]
  layers: Sequence[int | None]
  experts: Sequence[int | None]


def places(rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]
           ) -> Iterator[Place]:
  """Yields a Place for each row and each block that has its parameter.

  Args:
    rows: the rows of a page.
    shapes: the shapes of our parameters, by path.
  """
  for row in rows:
    ours, _, theirs, _ = row
    in_layers = _OF_LAYERS.search(ours)
    if in_layers is None:  # a parameter beside the layers
      place = _place(row, ours, shapes, layers=None)
      if place is not None:
        yield place
      continue
    where = in_layers[0]  # '/layers/', or the folder of one block
    stack, _, inner = ours.partition(where)
    by_part = '{m}' in theirs
    for block in _blocks(stack, shapes, by_part):
      if where not in ('/layers/', f'/{block.folder}/'):
        continue
      first = block.first
      if by_part and '/ffn' in ours:
        first += 1
      layers = range(first, first + block.step * block.count, block.step)
      path = f'{stack}/{block.folder}/{inner}'
      place = _place(row, path, shapes, layers)
      if place is not None:
        yield place


def _place(row: Row, ours: str, shapes: Mapping[str, tuple[int, ...]],
           layers: range | None) -> Place | None:
  """Returns the place of a row; None where the model has no such parameter with
  as many axes.

  Args:
    row: the row of the page.
    ours: the path of the row in one block, still with several names at its end.
    shapes: the shapes of our parameters, by path.
    layers: the numbers of the layers of the block; None: the parameter is of
      no layer.
  """
  _, our_axes, theirs, _ = row
  folder, _, names = ours.rpartition('/')
  paths = []
  for name in names.split('|'):
    path = f'{folder}/{name}'
    paths.append(path.lstrip('/'))

  # The first parameter tells whether the model has them, and how many experts.
  shape = shapes.get(paths[0])
  axes = axes_of(our_axes, len(paths))[0]
  if layers is not None:
    axes = 'N' + axes
  if shape is None or len(shape) != len(axes):
    return None
  numbers: Sequence[int | None] = (None,)
  if layers is not None:
    numbers = layers
  experts: Sequence[int | None] = (None,)
  if '{e}' in theirs:
    experts = range(shape[axes.index('E')])
  return Place(row=row, paths=tuple(paths), layers=numbers, experts=experts)


@dataclasses.dataclass(frozen=True)
class _Block:
  """One block of the period of a section of a stack.

  Attributes:
    folder: the folder of its parameters in the stack.
    first: the number of its first layer.
    step: the distance between the numbers of two of its layers.
    count: the number of its layers.
  """
  folder: str
  first: int
  step: int
  count: int


def _blocks(stack: str, shapes: Mapping[str, tuple[int, ...]],
            by_part: bool) -> Iterator[_Block]:
  """Yields the blocks of a stack.

  Args:
    stack: the folder of the stack.
    shapes: the shapes of our parameters, by path.
    by_part: whether a layer with a feed-forward network counts as two.
  """
  before = 0
  for section in SECTIONS:
    # The blocks of the section, which have as many layers each.
    names, count = set(), 0
    for path, shape in shapes.items():
      if path.startswith(f'{stack}/{section}/'):
        names.add(path.split('/')[2])
        count = shape[0]
    if not names:
      continue

    # How many layers of theirs a layer of each block is.
    folders = [f'{section}/block_{n}' for n in range(len(names))]
    sizes = []
    for folder in folders:
      has_network = f'{stack}/{folder}/ffn_norm/scale' in shapes
      if by_part and has_network:
        sizes.append(2)
      else:
        sizes.append(1)
    step = sum(sizes)
    for n, folder in enumerate(folders):
      yield _Block(folder=folder, first=before + sum(sizes[:n]), step=step,
                   count=count)
    before += step * count
