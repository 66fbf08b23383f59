"""What the kinds of layer of a model may not say together.

A kind is a dict of model.kinds (configs/kinds.py has its fields), and
`ModelConfig.of_kind` the config of its layers.
"""

from collections.abc import Iterator
import contextlib

from architectures.parts import positions
from architectures.parts.config import LayerKind, ModelConfig
from configs import kinds
from configs.errors import RequestError, require


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
  """Says of which kind of layer a RequestError is."""
  try:
    yield
  except RequestError as error:
    raise RequestError(f'model.kinds.{name}: {error}') from error


def check_kinds(c: ModelConfig) -> None:
  """Raises RequestError for a pattern that names what is not there, kinds that
  it does not name, and layers that it does not divide."""
  there = ', '.join(c.kinds) or 'none'
  for field in ('pattern', 'prefix', 'suffix'):
    for name in kinds.split(getattr(c, field)):
      require(name in c.kinds, f'model.{field} names the kind of layer '
              f'{name!r}, which model.kinds does not have: there are {there}')
  unused = [name for name in c.kinds if name not in c.kinds_used]
  require(not unused, f'model.kinds has {", ".join(unused)}, which no layer '
          f'is: model.pattern is {c.pattern!r}, model.prefix {c.prefix!r} and '
          f'model.suffix {c.suffix!r}')
  apart = {field: len(kinds.split(getattr(c, field)))
           for field in ('prefix', 'suffix')}
  period = len(c.layer_pattern())
  for field in ('num_layers', 'num_decoder_layers'):
    layers = getattr(c, field)
    rest = layers - sum(apart.values())
    require(rest > 0 and rest % period == 0, f'model.{field} is {layers}'
            + ''.join(f', {n} of them of model.{name} {getattr(c, name)!r}'
                      for name, n in apart.items() if n)
            + f': the rest must be a multiple of the {period} layers of '
            f'model.pattern {c.pattern!r}')
  for name in c.kinds_used:
    if name:
      _check_position(c, name)
  sections = c.sections(c.num_layers)
  for section in sections:
    _check_sharing(c, section.kinds, sections[0].kinds)


def _check_sharing(c: ModelConfig, layers: tuple[LayerKind, ...],
                   prefix: tuple[LayerKind, ...]) -> None:
  """Raises RequestError for a layer that is to read another's keys and values,
  where none before it has any, or they are not as its own would be."""
  for kind in layers:
    own = c.of_kind(kind.name)
    if not own.kv_sharing:
      continue
    who = f'model.kinds.{kind.name}.kv_sharing' if kind.name else (
        'model.kv_sharing')
    require(own.mixer == 'attention', f'{who} is True, which mixer '
            f'{own.mixer!r} does not read: it is for layers of attention')
    require(kind.source is not None, f'{who} is True, but no layer before it, '
            'in its period of model.pattern or in model.prefix, or in '
            'model.suffix if it is there, is one of attention that sees as '
            'many keys and has keys and values of its own: put one there, by a '
            'kind of layer with kv_sharing=False')
    source = kind.source if kind.source is not None else 0
    lender = c.of_kind((layers if source >= 0 else prefix)[source].name)
    for field in ('num_kv_heads', 'head_dim', 'position', 'rope'):
      mine, theirs = getattr(own, field), getattr(lender, field)
      require(mine == theirs, f'{who} is True, but model.{field} of the layer '
              f'is {mine!r}, and {theirs!r} of the layer whose keys and values '
              'it reads: choose one for both')


def _check_position(c: ModelConfig, name: str) -> None:
  """Raises RequestError for an encoding that a layer cannot have alone."""
  own = c.of_kind(name)
  if own.position not in positions.POSITIONS:
    return  # refused with the choices, where all names are
  if own.position != c.position:
    row = positions.of(own)
    alone = [key for key, row in positions.POSITIONS.items()
             if not (row.embed or row.stack_bias)]
    require(not (row.embed or row.stack_bias),
            f'model.kinds.{name}.position is {own.position!r}, which is no '
            'encoding of one layer: set it as model.position, or choose from '
            f'{", ".join(alone)}')
  require(own.num_heads == c.num_heads or not positions.of(own).stack_bias,
          f'model.kinds.{name}.num_heads is {own.num_heads}, and the bias of '
          f'model.position {own.position!r}, which all layers share, is of '
          f'{c.num_heads} heads')


def experts_every(c: ModelConfig) -> int:
  """Returns n of a model in which the last of every n layers has experts.

  Raises:
    RequestError: where other layers have them.
  """
  moe = [kind.ffn == 'moe' for kind in c.layer_kinds(
      max(c.num_layers, c.num_decoder_layers))]
  n = moe.index(True) + 1 if True in moe else 0
  require(n and all(x == (i % n == n - 1) for i, x in enumerate(moe)),
          f'model.pattern {c.pattern!r} has experts in layers that this '
          'config.json cannot name: it knows the last of every n layers')
  return n
