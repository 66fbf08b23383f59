"""Where the parameters of a model stand in the tensors of a Hugging Face
folder.

A page (the module of a system) has a table whose rows name a parameter of ours
with its axes, and a tensor of theirs with its axes. Axes are written in a small
language, of which this file knows all:

  'HK D'           two dimensions, of the sizes H * K and D. Each letter is an
                   axis of the legend in README.md.
  'D 3HK'          the second dimension has three parameters one after another,
                   where the row names three: 3 is the axis of their number.
  'HK 1 W'         a dimension of size 1, which the parameter does not have.
  'HK+JK+JK D'     the first dimension has three pieces one after another, each
                   of its own size, one for each of three parameters.
  'J(RK+K+K) D'    it has J groups, and in each group these three pieces. R is
                   H / J, so that the query's axes J and R are H together.
  'J=2(R+R) D'     the same, with the size of J in the row.
  'V NS'           the second dimension has the parameters of all N layers one
                   after another; the name of the tensor has no {n}.

For example, the row

  ('attention/query|key', 'DHK|DJK', 'attn.qk.weight', 'HK+JK D')

with H = 4, J = 2, K = 3 and D = 8 stands for a tensor [18, 8]: `query`
[8, 4, 3] is its first 12 rows, transposed and reshaped, and `key` [8, 2, 3] the
other 6.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import re

import numpy as np

from architectures.parts.hf import Row
from common.errors import RequestError
from common.kinds import SECTIONS

AXIS_OF_LAYERS = 'N'  # of a tensor that holds the parameters of all layers
# The folder of one block in our path of a row, or that of all layers.
_LAYER_FOLDER = re.compile(
    rf'/(?:{"|".join(SECTIONS)})/block_\d+/|/layers/')


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a Hugging Face folder, and the parameters of ours that it has.

  Attributes:
    name: the name of the tensor.
    axes: the axes of the tensor, such as 'D 3HK', 'HK+JK+JK D' or
      'J(RK+K+K) D'; the head of this file says what they mean.
    paths: the paths of our parameters; several where the tensor is fused.
    ours: the axes of each parameter, without those that `indices` pick from.
    indices: for each of `paths`, the leading indices in it (layer, expert).
    sizes: the size of each axis, by its letter.
  """
  name: str
  axes: str
  paths: tuple[str, ...]
  ours: tuple[str, ...]
  indices: tuple[tuple[int, ...], ...]
  sizes: dict[str, int]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the tensor."""
    shape = []
    for text in self.axes.split():
      dimension = _Dimension.parse(text)
      size_of_group = sum(self._size(piece) for piece in dimension.pieces)
      shape.append(self._size(dimension.groups) * size_of_group)
    return tuple(shape)

  def read_parameter(self, cut: Callable[[tuple[slice, ...]], np.ndarray],
                     number: int, ranges: Mapping[str, tuple[int, int]]
                     ) -> np.ndarray:
    """Reads a part of one of our parameters out of the tensor, which may hold
    several parameters, transposed and reshaped.

    Args:
      cut: a function that returns a slice of the tensor, such as one that reads
        a file; it is asked for the smallest slice that holds the wanted part.
      number: the number of the parameter in `paths`.
      ranges: (start, stop) of the wanted part along each axis of the parameter,
        by letter.

    Returns:
      An array with the axes of the parameter, ours[number].
    """
    axes, positions = self._find_parameter(number, ranges)
    # Find the smallest slice of the tensor, the positions of the wanted part in
    # it, and the shape of this part with one dimension for each axis.
    slices, indices = [], []
    shape: list[int] = []
    for positions_in_dimension in positions:
      first = int(positions_in_dimension.min())
      last = int(positions_in_dimension.max())
      slices.append(slice(first, last + 1))
      indices.append(_as_index(positions_in_dimension - first))
      shape += positions_in_dimension.shape
    part = cut(tuple(slices))[tuple(indices)].reshape(shape)

    # Bring the axes to the order of the parameter. The reshape above has split
    # each dimension of the tensor into the axes that it joins.
    order = [axes.index(axis) for axis in self.ours[number]]
    return part.transpose(order)

  def join_parameters(self, parameters: Sequence[np.ndarray]) -> np.ndarray:
    """Makes the tensor of our parameters. This is the inverse of
    `read_parameter`.

    Args:
      parameters: an array for each of `paths`, with the axes that `ours` names.

    Returns:
      The tensor, as a Hugging Face file has it.
    """
    tensor = np.empty(self.shape, parameters[0].dtype)
    for number, x in enumerate(parameters):
      # Find where the whole parameter stands in the tensor.
      our_axes = self.ours[number]
      ranges = {axis: (0, size) for axis, size in zip(our_axes, x.shape)}
      axes, positions = self._find_parameter(number, ranges)

      # Bring its axes to the order of the tensor, and join them as the tensor
      # does.
      order = [our_axes.index(axis) for axis in axes]
      shape = [positions_in_dimension.size
               for positions_in_dimension in positions]
      indices = [_as_index(positions_in_dimension)
                 for positions_in_dimension in positions]
      tensor[tuple(indices)] = x.transpose(order).reshape(shape)
    return tensor

  def _find_parameter(self, number: int, ranges: Mapping[str, tuple[int, int]]
                      ) -> tuple[str, list[np.ndarray]]:
    """Finds where in the tensor a part of one of our parameters stands.

    Args:
      number: the number of the parameter in `paths`.
      ranges: (start, stop) of the part along each of the parameter's axes, by
        letter.

    Returns:
      The axes of the parameter in the order of the tensor, and for each
      dimension of the tensor the positions in it of the part: an array with one
      dimension for each axis of the parameter that the dimension has.
    """
    # For each dimension of the tensor, find the positions of the whole
    # parameter, and pick the wanted range of them along each axis.
    all_axes, positions = '', []
    for text in self.axes.split():
      dimension = _Dimension.parse(text)
      axes, positions_by_axis = self._positions_of_piece(
          dimension, dimension.piece_of_parameter(number))
      axes, positions_by_axis = self._pick_parameter(
          axes, positions_by_axis, number)

      # Heads that the tensor orders as J groups of R heads are our H heads.
      if 'JR' in axes:
        first = axes.index('JR')
        shape = positions_by_axis.shape
        positions_by_axis = positions_by_axis.reshape(
            *shape[:first], -1, *shape[first + 2:])
        axes = axes.replace('JR', 'H')
      cuts = [slice(*ranges[axis]) for axis in axes]
      positions.append(positions_by_axis[tuple(cuts)])
      all_axes += axes
    return all_axes, positions

  def _positions_of_piece(self, dimension: '_Dimension', piece: int
                          ) -> tuple[str, np.ndarray]:
    """Finds one piece of a dimension of the tensor, where several parameters
    stand one after another in each of its groups.

    In 'J(RK+K+K)', for example, there are J groups of three pieces.

    Args:
      dimension: the dimension.
      piece: the number of the piece, from 0 on.

    Returns:
      The axes of the piece, those of the groups first, such as 'JRK'; and its
      positions in the dimension, an array with these axes.
    """
    # In each group, the piece stands behind those before it.
    sizes = [self._size(axes) for axes in dimension.pieces]
    starts_of_groups = np.arange(self._size(dimension.groups)) * sum(sizes)
    starts_of_pieces = starts_of_groups + sum(sizes[:piece])
    positions = starts_of_pieces[:, None] + np.arange(sizes[piece])[None]
    axes = dimension.groups + dimension.pieces[piece]
    return axes, positions.reshape([self.sizes[axis] for axis in axes])

  def _pick_parameter(self, axes: str, positions: np.ndarray, number: int
                      ) -> tuple[str, np.ndarray]:
    """Picks one parameter where a dimension of the tensor has several along an
    axis that is written as a digit, such as 3 in 'D 3HK', or as N.

    The digit that is the number of parameters, and N, the number of layers, is
    the axis along which they lie one after another. The digit 1 is a dimension
    that no parameter has.

    Args:
      axes: the axes of a piece.
      positions: its positions in a dimension of the tensor, by these axes.
      number: the number of the parameter in `paths`.

    Returns:
      The axes without digits, and the positions of the parameter by these.
    """
    # All of a lettered axis is kept, and of one that is a digit or N one index:
    # that of the parameter, or the only one.
    axes_of_parameters = str(len(self.paths)), AXIS_OF_LAYERS
    indices: list[int | slice] = []
    letters = ''
    for axis in axes:
      if axis in axes_of_parameters:
        indices.append(number)
      elif axis.isdigit():
        indices.append(0)
      else:
        indices.append(slice(None))
        letters += axis
    return letters, positions[tuple(indices)]

  def _size(self, axes: str) -> int:
    """Returns the size of axes that are one dimension."""
    size = 1
    for axis in axes:
      size *= self.sizes[axis]
    return size


@dataclasses.dataclass(frozen=True)
class _Dimension:
  """One dimension of a tensor, as a row writes it.

  Attributes:
    groups: the axes of the groups, such as 'J' of 'J(RK+K+K)'; '' if there is
      one group.
    pieces: the axes of each piece of a group, such as ('RK', 'K', 'K').
  """
  groups: str
  pieces: tuple[str, ...]

  @classmethod
  def parse(cls, text: str) -> '_Dimension':
    """Returns the dimension that a text such as 'HK' or 'J(RK+K)' means."""
    groups, parenthesis, pieces = text.rpartition('(')
    if parenthesis:
      pieces = pieces.removesuffix(')')
    return cls(groups=groups, pieces=tuple(pieces.split('+')))

  def piece_of_parameter(self, number: int) -> int:
    """Returns the number of the piece that holds a parameter: its own, or the
    only one, which all parameters share."""
    if len(self.pieces) == 1:
      return 0
    return number


def _as_index(positions: np.ndarray) -> slice | np.ndarray:
  """Returns an index of ascending positions in a dimension: a slice, which is
  faster, where their steps are equal, else the positions."""
  positions = positions.ravel()
  step = 1
  if positions.size > 1:
    step = int(positions[1] - positions[0])
  even = slice(int(positions[0]), int(positions[-1]) + 1, step)
  if np.array_equal(positions, np.arange(even.start, even.stop, step)):
    return even
  return positions


def map_tensors(rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]
                ) -> list[Tensor]:
  """Lists the tensors of the Hugging Face files of a model, each with our
  parameters that it holds.

  Args:
    rows: rows of four strings: the path and the axes of our parameter, and the
      name and the axes of its tensor.
    shapes: the shapes of our parameters, by path.

  Returns:
    The tensors.

  Raises:
    RequestError: if a parameter has no row.
  """
  # A parameter that no row names would be lost in an export, and missing after
  # an import.
  tensors: list[Tensor] = []
  paths_with_row: set[str] = set()
  for match in match_rows(rows, shapes):
    tensors += _tensors_of_match(match, shapes)
    paths_with_row.update(match.paths)
  paths_without_row = sorted(set(shapes) - paths_with_row)
  if paths_without_row:
    raise RequestError(
        f'no Hugging Face name for {", ".join(paths_without_row)}: this '
        'combination of parts is none that transformers has under this '
        'architecture')
  return tensors


def count_tensors(rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]
                  ) -> int:
  """Returns how many tensors `map_tensors` returns, without making them."""
  count = 0
  for match in match_rows(rows, shapes):
    count += len(match.layers) * len(match.experts)
  return count


@dataclasses.dataclass(frozen=True)
class RowMatch:
  """A row of a page, with parameters of one block of the model that it names.

  Attributes:
    row: the row of the page.
    paths: the paths of our parameters.
    layers: the numbers of the layers with a tensor each; (None,) where the
      parameter stands outside of the layers.
    experts: the numbers of the experts with a tensor each; (None,) where one
      tensor holds all, or there are none.
    layer_indices: for each of `paths`, its layer's index in the stacked
      parameter, where one tensor holds all layers; () elsewhere.
  """
  row: Row
  paths: tuple[str, ...]
  layers: Sequence[int | None]
  experts: Sequence[int | None]
  layer_indices: tuple[int, ...] = ()


def _tensors_of_match(match: RowMatch, shapes: Mapping[str, tuple[int, ...]]
                      ) -> list[Tensor]:
  """Lists the tensors that one row of the table of names stands for. There is
  one for each layer and each expert, since a Hugging Face file does not stack
  them.

  Args:
    match: the row, our parameters that it names, and the numbers of the layers
      and the experts. None stands in place of a number if there are no layers
      or experts.
    shapes: the shapes of our parameters, by path.
  """
  _, our_axes, name, their_axes = match.row
  axes_of_each = axes_of_parameters(our_axes, len(match.paths))

  # Find the sizes of the axes. The row may give some of them, as in J=2.
  sizes = {}
  for axis, size in re.findall(r'(\w)=(\d+)', their_axes):
    sizes[axis] = int(size)
  their_axes = re.sub(r'=\d+', '', their_axes)
  # Other sizes follow from our shapes, which have an axis of layers in front
  # that `axes` leave out.
  for axes, path in zip(axes_of_each, match.paths):
    sizes |= zip(axes, shapes[path][-len(axes):])
  # R is how many heads of queries share a head of keys.
  if 'R' in their_axes:
    sizes['R'] = sizes['H'] // sizes['J']
  # A digit stands for its value.
  num_parameters = len(match.paths)
  sizes['1'] = 1
  sizes[str(num_parameters)] = num_parameters
  sizes[AXIS_OF_LAYERS] = num_parameters

  # A tensor for each layer and each expert, which picks its index in the
  # stacked parameters.
  if '{e}' in name:
    axes_of_each = tuple(axes.replace('E', '') for axes in axes_of_each)
  tensors = []
  for row_of_layer, layer in enumerate(match.layers):
    stack = ''
    if '{h}' in name:  # the layers of each of two stacks count from 0
      half, layer = divmod(row_of_layer, len(match.layers) // 2)
      stack = 'LH'[half]
    for expert in match.experts:
      index: tuple[int, ...] = ()
      if layer is not None:
        index += (row_of_layer,)
      if expert is not None:
        index += (expert,)
      indices = (index,) * num_parameters
      if match.layer_indices:
        indices = tuple((i,) for i in match.layer_indices)
      tensors.append(Tensor(
          name=name.format(n=layer, m=layer, e=expert, h=stack),
          axes=their_axes, paths=match.paths, ours=axes_of_each,
          indices=indices, sizes=sizes))
  return tensors


def axes_of_parameters(axes: str, num_parameters: int) -> tuple[str, ...]:
  """Returns our axes of each parameter of a row, such as ('DHK', 'DJK').

  Args:
    axes: the second item of the row, 'DHK|DJK', or 'DHK' if all are alike.
    num_parameters: the number of parameters that the row names.
  """
  axes_of_each = tuple(axes.split('|'))
  if len(axes_of_each) == num_parameters:
    return axes_of_each
  return axes_of_each * num_parameters


def match_rows(rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]
               ) -> Iterator[RowMatch]:
  """Finds our parameters that the rows of a table of tensors' names stand for.

  Our layers follow a repeated pattern. The parameters of its layer i are
  stacked over the repetitions in one folder, block_i, which is called a block.

  Args:
    rows: rows of four strings: the path and the axes of our parameter, and the
      name and the axes of its tensor. A path with '/layers/' stands for every
      block, and one with '/block_2/' for that block.
    shapes: the shapes of our parameters, by path.

  Yields:
    A RowMatch for each row and each block that has its parameters.
  """
  for row in rows:
    our_path, _, name, their_axes = row
    # A parameter outside of the layers.
    layer_folder = _LAYER_FOLDER.search(our_path)
    if layer_folder is None:
      match = _match_row(row, our_path=our_path, shapes=shapes, layers=None)
      if match is not None:
        yield match
      continue

    # A parameter of all layers, or of one block of the period.
    folder = layer_folder[0]
    stack, _, path_in_layer = our_path.partition(folder)
    counts_networks = '{m}' in name
    matches = []
    for block in _blocks_of_stack(stack, shapes, counts_networks):
      if folder not in ('/layers/', f'/{block.folder}/'):
        continue
      # In files that count a layer's network as the next layer, {m}, its
      # number is one more.
      first = block.first
      if counts_networks and '/ffn' in our_path:
        first += 1
      layers = range(first, first + block.step * block.count, block.step)
      path = f'{stack}/{block.folder}/{path_in_layer}'
      match = _match_row(row, our_path=path, shapes=shapes, layers=layers)
      if match is not None:
        matches.append(match)
    if matches and AXIS_OF_LAYERS in their_axes:
      matches = [_join_layers(matches)]
    yield from matches


def _join_layers(matches: Sequence[RowMatch]) -> RowMatch:
  """Joins the matches of a row whose tensor holds the parameters of all layers,
  one match for each block, to a single one.

  Args:
    matches: the matches; each has one path, with the numbers of its layers.
  """
  # The path and the index of each layer, by the layer's number.
  places = {}
  for match in matches:
    for index, layer in enumerate(match.layers):
      places[layer] = match.paths[0], index
  in_order = [places[layer] for layer in sorted(places)]
  return RowMatch(
      row=matches[0].row, paths=tuple(path for path, _ in in_order),
      layers=(None,), experts=(None,),
      layer_indices=tuple(index for _, index in in_order))


def _match_row(row: Row, our_path: str, shapes: Mapping[str, tuple[int, ...]],
               layers: range | None) -> RowMatch | None:
  """Finds our parameters that a row of the table of tensors' names stands for
  in one block, the folder in which layers are stacked.

  Args:
    row: four strings: our path and axes, and the tensor's name and axes.
    our_path: the path of the row in the block. It may still end with several
      names, as in 'decoder/layers/block_0/attention/query|key'.
    shapes: the shapes of our parameters, by path.
    layers: the numbers of the layers of the block; None: the parameter stands
      outside of the layers.

  Returns:
    The match; None where the model has no such parameter with as many axes, so
    that a dense and an expert network may both have a row for one path.
  """
  _, our_axes, tensor_name, _ = row
  folder, _, names = our_path.rpartition('/')
  paths = []
  for name in names.split('|'):
    path = f'{folder}/{name}'
    paths.append(path.lstrip('/'))

  # Look at the first parameter: does the model have it, with as many axes?
  shape = shapes.get(paths[0])
  axes = axes_of_parameters(our_axes, len(paths))[0]
  # Parameters of layers are stacked over the N layers of the block.
  if layers is not None:
    axes = 'N' + axes
  if shape is None or len(shape) != len(axes):
    return None
  layer_numbers: Sequence[int | None] = (None,)
  if layers is not None:
    layer_numbers = layers
  expert_numbers: Sequence[int | None] = (None,)
  if '{e}' in tensor_name:
    expert_numbers = range(shape[axes.index('E')])
  return RowMatch(row=row, paths=tuple(paths), layers=layer_numbers,
                  experts=expert_numbers)


@dataclasses.dataclass(frozen=True)
class _Block:
  """One block of the period of layers that a scan repeats.

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


def _blocks_of_stack(stack: str, shapes: Mapping[str, tuple[int, ...]],
                     counts_networks: bool) -> Iterator[_Block]:
  """Finds the blocks of the encoder or the decoder, and which layers of a
  Hugging Face file each block holds.

  Our layers follow a repeated pattern. A block is a folder with the parameters
  of one layer of the pattern, stacked over its repetitions.

  Args:
    stack: the folder of the stack, 'encoder' or 'decoder'.
    shapes: the shapes of our parameters, by path.
    counts_networks: whether the file counts the feed-forward network of a layer
      as a layer of its own.

  Yields:
    Each block, with the number of its first layer in the file, the step to its
    next layer, and the number of its layers.
  """
  num_layers_before = 0
  for section in SECTIONS:
    # Collect the blocks of this section (the prefix, the repeated pattern or
    # the suffix). All have the same number of layers.
    block_names, layers_of_a_block = set(), 0
    for path, shape in shapes.items():
      if path.startswith(f'{stack}/{section}/'):
        block_names.add(path.split('/')[2])
        layers_of_a_block = shape[0]
    if not block_names:
      continue

    # The number of layers that the file counts for a layer of each block.
    folders = [f'{section}/block_{i}' for i in range(len(block_names))]
    num_hf_layers = []
    for folder in folders:
      has_network = f'{stack}/{folder}/ffn_norm/scale' in shapes
      if counts_networks and has_network:
        num_hf_layers.append(2)
      else:
        num_hf_layers.append(1)
    step = sum(num_hf_layers)
    for i, folder in enumerate(folders):
      yield _Block(
          folder=folder, first=num_layers_before + sum(num_hf_layers[:i]),
          step=step, count=layers_of_a_block)
    num_layers_before += step * layers_of_a_block
