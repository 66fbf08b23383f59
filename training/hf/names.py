"""Name tables: where a parameter of ours stands in a Hugging Face file.

A page's HF_NAMES has rows (ours, our axes, theirs, their axes):

  ('decoder/layers/attention/query', 'DHK',
   'model.layers.{n}.self_attn.q_proj.weight', 'HK D')

Axes are letters of the legend, only their order and grouping count: a blank
ends a dimension of theirs, and HK is one of size H*K. {n} is the layer,
counted through the blocks of the period. {e} is an expert: axis E of ours.
'query|key|value' are several of ours in one of theirs, along its axis 3 (or
2). A row holds for parameters of as many axes, so that a dense and an expert
ffn/up may both have one.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np

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
    slices, shape, rest = [], [], []
    for dim in self.axes.split():
      start, size, narrow = 0, math.prod(self.sizes[a] for a in dim), True
      for a in dim:
        first, last = (which, which + 1) if a.isdigit() else ranges[a]
        if narrow:  # each axis before has one index: the slice narrows on
          size //= self.sizes[a]
          start += first * size
          shape.append(last - first)
          rest.append(slice(None))
          narrow = last - first == 1
          stop = start + (last - first) * size
        else:
          shape.append(self.sizes[a])
          rest.append(slice(first, last))
      slices.append(slice(start, stop))
    x = cut(tuple(slices)).reshape(shape)[tuple(rest)]
    letters = self.axes.replace(' ', '')
    x = x.squeeze(tuple(i for i, a in enumerate(letters) if a.isdigit()))
    plain = ''.join(a for a in letters if not a.isdigit())
    return x.transpose([plain.index(a) for a in self.ours])

  def join(self, ours: Sequence[np.ndarray]) -> np.ndarray:
    """Returns theirs, made of one array for each of `paths`."""
    letters = self.axes.replace(' ', '')
    plain = ''.join(a for a in letters if not a.isdigit())
    parts = [x.transpose([self.ours.index(a) for a in plain]) for x in ours]
    fused = [i for i, a in enumerate(letters) if a.isdigit()]
    x = np.stack(parts, fused[0]) if fused else parts[0]
    return np.ascontiguousarray(x.reshape(self.shape))


def rows(page, config) -> Sequence[tuple[str, str, str, str]]:
  """Returns a page's table: HF_NAMES, or hf_names(config) where it varies."""
  return page.hf_names(config) if hasattr(page, 'hf_names') else page.HF_NAMES


def expand(rows: Sequence[tuple[str, str, str, str]],
           shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
  """Returns every tensor of theirs for parameters of these shapes, by path.

  Raises:
    ValueError: naming the parameters for which the table has no row.
  """
  tensors = []
  for (ours, axes, theirs, their_axes), placed, layer, block in _placed(
      rows, shapes):
    tensors += _one(axes, theirs, their_axes, placed, shapes[placed[0]], layer,
                    block, _period(_paths(ours)[0], shapes))
  covered = {path for tensor in tensors for path in tensor.paths}
  if bare := sorted(set(shapes) - covered):
    raise RequestError(
        f'no Hugging Face name for {", ".join(bare)}: this combination of '
        'parts is none that transformers has under this architecture')
  return tensors


def count(rows: Sequence[tuple[str, str, str, str]],
          shapes: Mapping[str, tuple[int, ...]]) -> int:
  """Returns how many tensors `expand` has, without making them."""
  return sum(
      (shapes[placed[0]][0] if layer is not None else 1)
      * (shapes[placed[0]][axes.index('E') + (layer is not None)]
         if '{e}' in theirs else 1)
      for (_, axes, theirs, _), placed, layer, _ in _placed(rows, shapes))


def _placed(rows, shapes):
  """Yields (row, paths, first layer or None, block) for each row of the table
  and each block of the period in which it has a parameter."""
  for row in rows:
    paths = _paths(row[0])
    for layer, block in _layers(paths[0], shapes):
      placed = tuple(p.replace('/layers/', f'/layers/block_{block}/')
                     for p in paths)
      shape = shapes.get(placed[0])
      if shape is not None and len(shape) == len(row[1]) + (layer is not None):
        yield row, placed, layer, block


def _one(axes, theirs, their_axes, paths, shape, layer, block, period):
  """Yields the tensors of one row in one block of the period."""
  shape = list(shape)
  rows = shape.pop(0) if layer is not None else 1
  sizes = dict(zip(axes, shape)) | {str(len(paths)): len(paths)}
  experts = range(sizes['E']) if '{e}' in theirs else (None,)
  inner = axes.replace('E', '') if '{e}' in theirs else axes
  for row in range(rows):
    for e in experts:
      index = ((row,) if layer is not None else ()) + (
          (e,) if e is not None else ())
      yield Tensor(theirs.format(n=row * period + block, e=e), their_axes,
                   paths, inner, index, sizes)


def _paths(ours: str) -> tuple[str, ...]:
  """'a/query|key' -> ('a/query', 'a/key')."""
  folder, _, names = ours.rpartition('/')
  return tuple(f'{folder}/{name}'.lstrip('/') for name in names.split('|'))


def _layers(path: str, shapes):
  """Returns (first layer, block) for each block of the path's stack."""
  if '/layers/' not in path:
    return [(None, 0)]
  return [(block, block) for block in range(_period(path, shapes))]


def _period(path: str, shapes) -> int:
  stack = path.partition('/layers/')[0] + '/layers/block_'
  blocks = {p[len(stack):].partition('/')[0] for p in shapes
            if p.startswith(stack)}
  return len(blocks)
