"""Which layers attend to a window, and which have a recurrence in place of
attention, as layer_types of a config.json says it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from architectures.parts import hf
from architectures.parts.attention import kernels
from architectures.parts.config import ModelConfig
from common import kinds as layer_kinds
from common.errors import require, short

WINDOW, WHOLE = 'sliding_attention', 'full_attention'
NAMES = {WINDOW: 'local', WHOLE: 'global'}  # our kinds of layer
LINEAR = 'linear_attention'
MIXERS = {LINEAR: 'linear', WHOLE: 'full'}  # our kinds, where some are that
MOST = 2**12  # layers


def read(types: Sequence[str], layers: int, window: int,
         kind_fields: Mapping[str, Mapping[str, Any]] | None = None
         ) -> dict[str, Any]:
  """Returns the fields of config.model for layer_types.

  Args:
    types: of each layer.
    layers: how many there are.
    window: sliding_window of the config.json; 0: none.
    kind_fields: further fields of a kind, by its type.
  """
  require(len(types) == layers and all(
      isinstance(t, str) and t in NAMES for t in types),
          f'config.json has layer_types {short(types)}: it must have one for '
          f'each of {layers} layers, of {", ".join(NAMES)}')
  require(window > 0 or WINDOW not in types, 'config.json has layers of '
          f'{WINDOW} in layer_types, but no sliding_window')
  kind_fields = kind_fields or {}
  if len(set(types)) == 1:
    local = types[0] == WINDOW
    return dict(attention='banded' if local else 'global', prefix='',
                pattern='', suffix='', kinds={},
                sliding_window=window if local else 0,
                **kind_fields.get(types[0], {}))
  return dict(
      shortest([NAMES[t] for t in types]), attention='global', sliding_window=0,
      kinds={NAMES[t]: dict(window=window if t == WINDOW else 0,
                            **kind_fields.get(t, {})) for t in NAMES})


def listed(reader: hf.Reader, layers: int, windowed: Callable[[int], bool]
           ) -> list[str]:
  """Returns layer_types, or what each layer is by its number where there are
  none."""
  reader.passes('layer_types')
  return reader.listed('layer_types') if reader.has('layer_types') else [
      WINDOW if windowed(n) else WHOLE for n in range(layers)]


def window(reader: hf.Reader) -> int:
  """Returns sliding_window: left out it is 4096; null, there is none."""
  return (0 if reader.is_null('sliding_window') else
          reader('sliding_window', 4096))


def shortest(names: Sequence[str]) -> dict[str, str]:
  """Returns model.prefix, model.pattern and model.suffix that give the kinds of
  these layers in this order and name the fewest together, the suffix kinds of
  the pattern alone. Of those that name as many, it is the one with the
  shortest suffix and then the shortest prefix."""
  candidates = []
  for first in range(len(names)):
    for period in range(1, len(names) - first + 1):
      end = first + period
      while names[end:end + period] == names[first:first + period]:
        end += period
      if set(names[end:]) <= set(names[first:first + period]):
        last = len(names) - end
        candidates.append((first + period + last, last, first, period))
  _, last, first, period = min(candidates)
  return {field: ','.join(some) for field, some in (
      ('prefix', names[:first]), ('pattern', names[first:first + period]),
      ('suffix', names[len(names) - last:]))}


def named(names: Sequence[str], kinds: Mapping[str, Mapping[str, Any]]
          ) -> dict[str, Any]:
  """Returns the order of layers of these kinds, and what each kind is."""
  return dict(shortest(names), kinds={
      name: kinds[name] for name in dict.fromkeys(names)})


def turned(reader: hf.Reader, layers: int) -> list[int]:
  """Returns no_rope_layers: for each layer 1, or 0 where it has no positions,
  as the last of every no_rope_layer_interval where they are not listed."""
  every = reader('no_rope_layer_interval', 4)
  listed = reader.listed('no_rope_layers') or [
      int((n + 1) % every > 0) for n in range(layers)]
  require(len(listed) == layers and all(
      type(x) is int and x in (0, 1) for x in listed),
          f'config.json has no_rope_layers {short(listed)}: it must have a 1, '
          f'or 0 for no positions, for each of {layers} layers')
  return listed


def write(c: ModelConfig) -> dict[str, Any]:
  """Returns layer_types and, where a layer has one, sliding_window."""
  layers = c.layers(c.num_layers)
  types = [type_of(layer) for layer in layers]
  windows = {layer.sliding_window for layer, t in zip(layers, types)
             if t == WINDOW}
  return dict(layer_types=types) | (
      dict(sliding_window=windows.pop()) if windows else {})


def type_of(c: ModelConfig) -> str:
  """Returns their type of the layers of `c`, which are all alike."""
  return WINDOW if kernels.RULES[c.attention].window else WHOLE


def read_mixers(reader: hf.Reader, layers: int, mixer: str) -> dict[str, Any]:
  """Returns the order and the kinds of layer of a model in which some are a
  recurrence, and some may have a dense network in place of experts.

  Args:
    reader: the reader of the config.json.
    layers: how many layers there are.
    mixer: model.mixer of the recurrence.
  """
  check_number('num_hidden_layers', layers)
  every = reader('full_attention_interval', 4)
  types = each(reader, 'layer_types', layers, MIXERS) or [
      LINEAR if (n + 1) % every else WHOLE for n in range(layers)]
  sparse, dense = reader('decoder_sparse_step', 1), reader.listed(
      'mlp_only_layers')
  return mixed(types, [n in dense or (n + 1) % sparse > 0
                       for n in range(layers)], mixer)


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


def check_number(field: str, layers: int) -> None:
  """Raises RequestError for a field of a config.json that asks for more layers
  than a model may have, before they are listed."""
  require(layers <= MOST, f'config.json has {field} {layers}: a model has at '
          f'most {MOST} layers')


def each(reader: hf.Reader, field: str, layers: int, words: Collection[str]
         ) -> list[str]:
  """Returns what a field of a config.json says of each layer, in these words;
  an empty list if there is no such field."""
  entries = reader.listed(field)
  require(not reader.has(field) or len(entries) == layers and all(
      isinstance(word, str) and word in words for word in entries),
          f'config.json has {field} {short(entries)}: it must have an entry '
          f'for each of {layers} layers, one of {", ".join(words)}')
  return entries


def check_attention(c: ModelConfig) -> None:
  """Raises RequestError for a model without a layer of attention."""
  require(any(layer.mixer == 'attention' for layer in c.distinct_layers),
          'all layers are recurrences or short convolutions: transformers runs '
          f'a {c.arch} with some layers of attention only')


def mixed(types: Sequence[str], dense: Sequence[bool], mixer: str
          ) -> dict[str, Any]:
  """Returns the order and the kinds of layer of a model.

  Args:
    types: the type of each layer, a key of MIXERS.
    dense: whether each layer has a dense network in place of experts.
    mixer: model.mixer of the recurrence.
  """
  names, kinds = [], {}
  for word, plain in zip(types, dense, strict=True):
    names.append(MIXERS[word] + '_dense' * plain)
    kinds[names[-1]] = (dict(mixer=mixer) if word == LINEAR else {}) | (
        dict(ffn=layer_kinds.DENSE) if plain else {})
  return dict(shortest(names), kinds=kinds)


def write_mixers(c: ModelConfig) -> dict[str, Any]:
  """Returns layer_types, and mlp_only_layers."""
  layers = c.layers(c.num_layers)
  return dict(
      layer_types=[WHOLE if layer.mixer == 'attention' else LINEAR
                   for layer in layers],
      decoder_sparse_step=1, mlp_only_layers=[
          n for n, layer in enumerate(layers) if layer.ffn != 'moe'])
