"""Which layers attend to a window, as layer_types of a config.json says it."""

from collections.abc import Mapping, Sequence
from typing import Any

from architectures.parts import attention
from architectures.parts.config import ModelConfig
from configs.errors import require, short

WINDOW, WHOLE = 'sliding_attention', 'full_attention'
NAMES = {WINDOW: 'local', WHOLE: 'global'}  # our kinds of layer


def read(types: Sequence[str], layers: int, window: int,
         own: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
  """Returns the fields of config.model for layer_types.

  Args:
    types: of each layer.
    layers: how many there are.
    window: sliding_window of the config.json; 0: none.
    own: further fields of a kind, by its type.
  """
  require(len(types) == layers and all(
      isinstance(t, str) and t in NAMES for t in types),
          f'config.json has layer_types {short(types)}: it must have one for '
          f'each of {layers} layers, of {", ".join(NAMES)}')
  require(window > 0 or WINDOW not in types, 'config.json has layers of '
          f'{WINDOW} in layer_types, but no sliding_window')
  own = own or {}
  if len(set(types)) == 1:
    local = types[0] == WINDOW
    return dict(attention='banded' if local else 'global', prefix='',
                pattern='', kinds={}, sliding_window=window if local else 0,
                **own.get(types[0], {}))
  first, period = shortest(types)
  name = lambda some: ','.join(NAMES[t] for t in some)
  return dict(
      attention='global', sliding_window=0, prefix=name(types[:first]),
      pattern=name(types[first:first + period]),
      kinds={NAMES[t]: dict(window=window if t == WINDOW else 0,
                            **own.get(t, {})) for t in NAMES})


def shortest(types: Sequence[str]) -> tuple[int, int]:
  """Returns after how many layers the rest repeats, and the period, which are
  the fewest together."""
  return min(
      ((first, period) for first in range(len(types))
       for period in range(1, len(types) - first + 1)
       if (len(types) - first) % period == 0 and all(
           types[n] == types[n - period]
           for n in range(first + period, len(types)))),
      key=lambda two: (sum(two), two))


def write(c: ModelConfig) -> dict[str, Any]:
  """Returns layer_types and, where a layer has one, sliding_window."""
  layers = [c.of_kind(kind.name) for kind in c.layer_kinds(c.num_layers)]
  types = [type_of(layer) for layer in layers]
  windows = {layer.sliding_window for layer, t in zip(layers, types)
             if t == WINDOW}
  require(len(windows) < 2, f'model.pattern {c.pattern!r} has windows of '
          f'{", ".join(map(str, sorted(windows)))} keys: a config.json has one')
  return dict(layer_types=types) | (
      dict(sliding_window=windows.pop()) if windows else {})


def type_of(c: ModelConfig) -> str:
  """Returns their type of the layers of `c`, which are all alike."""
  return WINDOW if attention.KINDS[c.attention].window else WHOLE
