"""What a page says of its system in the Hugging Face format, in one record.

A page ends with `HF = HuggingFace(...)`; of a page, training/weights.py and
training/hf/ read that record and nothing else. A system that transformers does
not have has no `HF`. tests/architectures/pages_test.py checks every record.
parts/hf_rope.py has what a config.json says of rotary positions.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence
import itertools
import math
import re
from typing import Any, NamedTuple

import numpy as np

from architectures.parts.config import ModelConfig
from configs.errors import RequestError, require

# The path of a parameter, its axes, the name of the tensor in a file, its axes.
Row = tuple[str, str, str, str]
Reader = Any  # of a config.json: training/hf/config.py, a room above
MASKED_WORDS = 'head of masked words'  # a name in `HuggingFace.optional`


class TaskHead(NamedTuple):
  """How a model with the head of a task stands in a Hugging Face folder.

  Attributes:
    architecture: of config.json, the name of transformers' class.
    name: of the module that holds the head.
    prefix: (what the other names begin with, what they begin with here).
  """
  architecture: str
  name: str
  prefix: tuple[str, str] = ('', '')

  def rows(self, names: Iterable[Row]) -> tuple[Row, ...]:
    """Returns the rows `names` as they stand here, and those of the head."""
    usual, here = self.prefix
    return (*((ours, axes, here + theirs.removeprefix(usual)
               if theirs.startswith(usual) else theirs, their_axes)
              for ours, axes, theirs, their_axes in names),
            ('task/kernel', 'DU', f'{self.name}.weight', 'U D'),
            ('task/bias', 'U', f'{self.name}.bias', 'U'))


class HuggingFace(NamedTuple):
  """How a system's config and weights stand in a Hugging Face folder.

  A row of `names` is (our path, our axes, their name, their axes):

    ('decoder/layers/attention/query', 'DHK',
     'model.layers.{n}.self_attn.q_proj.weight', 'HK D')

  Axes are letters of the legend, or U where it has none, of which only the
  order and the grouping count: a blank ends a dimension of theirs, and HK is
  one dimension of size H*K. {n} is the layer, counted through the blocks of
  the period. {e} is an expert, axis E of ours. 'query|key|value' are several
  parameters of ours in one tensor of theirs, along its axis 3 (1 is a dimension
  of theirs that ours has not); with the axes
  'DHK|DJK|DJK' and 'HK+JK+JK D' they follow one another in it, each of its own
  size. A row is passed over where the model has no such parameter with as many
  axes, so that a dense and an expert ffn/up may both have one.

  The import starts from the system's PARTS, then reads `fields`, then `read`;
  the export writes `fields`, then `write`.

  Attributes:
    model_type: of config.json, which tells whose weights a folder holds.
    architecture: of config.json, the name of transformers' class.
    names: the rows, or a function of the ModelConfig that returns them.
    fields: {field of config.model: (field of config.json, default)}, or with
      {their word: ours} as a third item. Of 'a|b' the import takes the first
      that is there, and the export writes the last. A default is what
      transformers takes where the field is missing; it may be a function of
      the fields that were read before it.
    only: {field of config.json: the one value that is known here}.
    unread: fields of config.json that do not change what is computed.
    read: (the Reader, the fields that were read) -> further fields of ours.
    write: ModelConfig -> further fields of config.json.
    tied: {tensor: the tensor whose values it must have}.
    spellings: (part of a name, what some files have in its place).
    ignored: patterns of the names of tensors that hold no weights.
    fixed: token ids that an export writes as `write` has them, whatever the
      tokenizer of the run says.
    heads: those that transformers has for tasks, by model.head.
    of_files: the names of a folder's tensors -> fields of ours that these tell,
      and not its config.json.
    optional: {what it is called: the pattern of its tensors' names} of what
      only a pre-training needs: a folder may lack it as a whole, and what it
      has of it without a place in the model is passed over; both are told.
    bare: (transformers' class of the stack without any head, what its names
      leave out); MASKED_WORDS is among `optional` then.
  """
  model_type: str
  architecture: str
  names: Sequence[Row] | Callable[[ModelConfig], Sequence[Row]]
  fields: Mapping[str, tuple]
  only: Mapping[str, Any] = {}
  unread: Sequence[str] = ()
  read: Callable[[Reader, dict], dict] = lambda hf, fields: {}
  write: Callable[[ModelConfig], dict] = lambda c: {}
  tied: Mapping[str, str] = {}
  spellings: Sequence[tuple[str, str]] = ()
  ignored: Sequence[str] = ()
  fixed: Sequence[str] = ()
  heads: Mapping[str, TaskHead] = {}
  of_files: Callable[[Collection[str]], dict] = lambda names: {}
  optional: Mapping[str, str] = {}
  bare: tuple[str, str] | None = None

  def rows(self, c: ModelConfig) -> Sequence[Row]:
    """Returns the rows of `names` for the config `c`, and of its head."""
    rows = self.names(c) if callable(self.names) else self.names
    return self.heads[c.head].rows(rows) if c.head in self.heads else rows

  def bare_rows(self, c: ModelConfig) -> Sequence[Row]:
    """Returns the rows of the stack without its head."""
    require(self.bare is not None, f'model.arch {c.arch!r} is not exported '
            'without its head: its page names no class of transformers for it')
    prefix = self.bare[1]
    rows = self.names(c) if callable(self.names) else self.names
    return [(ours, axes, theirs.removeprefix(prefix), their_axes)
            for ours, axes, theirs, their_axes in rows
            if theirs.startswith(prefix)]

  def spellings_of(self, c: ModelConfig) -> Sequence[tuple[str, str]]:
    """Returns `spellings`, and the usual names where the head of `c` has other
    ones."""
    usual, here = self.heads.get(c.head, TaskHead('', '')).prefix
    return (*(((here, usual),) if here else ()), *self.spellings)


def heads(system: str, sequence: str = 'score', tokens: str = 'classifier',
          span: tuple[str, str] = ('', '')) -> dict[str, TaskHead]:
  """Returns the heads that a system has in transformers.

  Args:
    system: what the names of its classes begin with.
    sequence, tokens: the names of the modules that score a row, and tokens.
    span: the `prefix` of the model that answers questions.
  """
  return {
      'sequence': TaskHead(f'{system}ForSequenceClassification', sequence),
      'tokens': TaskHead(f'{system}ForTokenClassification', tokens),
      'span': TaskHead(f'{system}ForQuestionAnswering', 'qa_outputs', span)}


def under(ours: str, theirs: str, *rows: Row) -> tuple[Row, ...]:
  """Returns the rows with a folder of ours and a prefix of theirs before each.
  """
  return tuple((f'{ours}/{row[0]}', row[1], f'{theirs}.{row[2]}', row[3])
               for row in rows)


def norm(ours: str, theirs: str) -> tuple[Row, Row]:
  """Returns the rows of a LayerNorm's scale and bias."""
  return ((f'{ours}/scale', 'D', f'{theirs}.weight', 'D'),
          (f'{ours}/bias', 'D', f'{theirs}.bias', 'D'))


def dense(ours: str, axes: str, theirs: str, their_axes: str
          ) -> tuple[Row, Row]:
  """Returns the rows of a matrix and of its bias, which has the axes of the
  output: the last ones of ours."""
  out = next(dim for dim in their_axes.split()
             if axes.endswith(re.sub(r'\d', '', dim)))
  experts = 'E' if '{e}' in theirs else ''
  biases = '|'.join(f'{name}_bias' for name in ours.split('|'))
  return ((ours, axes, f'{theirs}.weight', their_axes),
          (biases, experts + re.sub(r'\d', '', out), f'{theirs}.bias', out))


# hidden_act: our ffn. Where two names mean one function, export takes the
# first. gelu_fast and gelu_new are the same tanh approximation.
FFNS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
        'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu', 'silu': 'silu',
        'swish': 'silu', 'relu2': 'relu2'}
GATED = {'silu': 'swiglu', 'gelu': 'geglu', 'gelu_new': 'geglu_tanh',
         'gelu_pytorch_tanh': 'geglu_tanh', 'relu': 'reglu'}


def theirs(choices: Mapping[str, str], ours: str, field: str) -> str:
  """Returns the first of their words for `ours`, the value of model.`field`.

  Raises:
    RequestError: where they have none.
  """
  words = [word for word, value in choices.items() if value == ours]
  known = ', '.join(dict.fromkeys(choices.values()))
  require(words, f'model.{field} is {ours!r}, which has no counterpart in this '
          f'config.json: choose from {known}')
  return words[0]


class Tensor(NamedTuple):
  """One tensor of theirs, and the places of ours that it fills.

  Attributes:
    name: theirs.
    axes: theirs, such as 'D 3HK' or 'HK+JK+JK D'.
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
    return tuple(sum(map(self._size, dim.split('+')))
                 for dim in self.axes.split())

  def part(self, cut: Callable[[tuple[slice, ...]], np.ndarray], which: int,
           ranges: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """Returns what theirs holds for paths[which], by our axes.

    Args:
      cut: returns a slice of theirs; as little is asked for as one slice can.
      which: of `paths`.
      ranges: (start, stop) of our axes, by letter.
    """
    wanted = {**ranges, '1': (0, 1),
              str(len(self.paths)): (which, which + 1)}
    slices, shapes, indices = zip(*(
        self._narrow(dim, which, wanted) for dim in self.axes.split()))
    x = cut(slices).reshape(sum(shapes, ()))[sum(indices, ())]
    letters = ''.join(self._dims(which))
    fused = [a for a in letters if a.isdigit()]
    x = x.transpose([letters.index(a) for a in (*self.ours[which], *fused)])
    return x[..., 0] if fused else x

  def _narrow(self, dim: str, which: int, ranges: Mapping[str, tuple[int, int]]
              ) -> tuple[slice, tuple[int, ...], tuple[slice, ...]]:
    """Returns the shortest slice of a dimension of theirs that holds `ranges`
    of its axes, the shape of that slice by axis, and what to take of it.

    The slice can be narrow in the axes of a single index and in the one after
    them; of the axes that follow it holds all.
    """
    before = 0
    if '+' in dim:
      pieces = dim.split('+')
      before, dim = sum(map(self._size, pieces[:which])), pieces[which]
    several = (i for i, a in enumerate(dim) if ranges[a][1] - ranges[a][0] != 1)
    end = next(several, len(dim) - 1) + 1
    narrow, whole = dim[:end], dim[end:]
    first = int(np.ravel_multi_index([ranges[a][0] for a in narrow],
                                     [self.sizes[a] for a in narrow]))
    spans = tuple(ranges[a][1] - ranges[a][0] for a in narrow)
    size = self._size(whole)
    return (slice(before + first * size, before + (first + spans[-1]) * size),
            spans + tuple(self.sizes[a] for a in whole),
            (slice(None),) * end + tuple(slice(*ranges[a]) for a in whole))

  def join(self, ours: Sequence[np.ndarray]) -> np.ndarray:
    """Returns theirs, made of one array for each of `paths`."""
    parts = []
    for which, x in enumerate(ours):
      plain = [a for a in ''.join(self._dims(which)) if not a.isdigit()]
      parts.append(x.transpose([self.ours[which].index(a) for a in plain]))
    dims = self.axes.split()
    if '+' in self.axes:
      x = np.concatenate(
          [x.reshape([self._size(dim) for dim in self._dims(which)])
           for which, x in enumerate(parts)],
          next(i for i, dim in enumerate(dims) if '+' in dim))
    else:
      fused = [i for i, a in enumerate(''.join(dims)) if a.isdigit()]
      x = np.stack(parts, fused[0]) if fused else parts[0]
    return np.ascontiguousarray(x.reshape(self.shape))

  def _dims(self, which: int) -> list[str]:
    """The axes in each dimension of theirs, where paths[which] stands."""
    return [dim.split('+')[which] if '+' in dim else dim
            for dim in self.axes.split()]

  def _size(self, axes: str) -> int:
    return math.prod(self.sizes[a] for a in axes)


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
    sizes = {a: n for one, path in zip(each, paths)
             for a, n in zip(one, shapes[path][-len(one):])}
    inner = tuple(one.replace('E', '') if '{e}' in theirs else one
                  for one in each)
    for (row, n), e in itertools.product(enumerate(layers), experts):
      index = (() if n is None else (row,)) + (() if e is None else (e,))
      tensors.append(Tensor(theirs.format(n=n, e=e), their_axes, paths, inner,
                            index, sizes | {'1': 1, str(len(paths)): len(paths)}
                            ))
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
    stack, stacked, _ = ours.partition('/layers/')
    for place, first, period in _blocks(
        stack, shapes) if stacked else (('', 0, 0),):
      paths = tuple(
          f'{folder}/{name}'.lstrip('/').replace('/layers/', f'/{place}/')
          for name in names.split('|'))
      shape, axes = shapes.get(paths[0], ()), axes_of(row[1], len(paths))[0]
      if len(shape) == len(axes) + bool(stacked):
        yield (row, paths,
               range(first, first + period * shape[0], period) if stacked
               else (None,),
               range(shape[bool(stacked) + axes.index('E')])
               if '{e}' in theirs else (None,))


def _blocks(stack: str, shapes: Mapping[str, tuple[int, ...]]):
  """Yields where each block stands, its first layer, the step to the next."""
  blocks = {section: len({path.split('/')[2] for path in shapes
                          if path.startswith(f'{stack}/{section}/')})
            for section in ('prefix', 'layers')}
  for n in range(blocks['prefix']):
    yield f'prefix/block_{n}', n, 1
  for n in range(blocks['layers']):
    yield f'layers/block_{n}', blocks['prefix'] + n, blocks['layers']
