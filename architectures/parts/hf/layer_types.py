"""The field layer_types of a config.json: which layers attend to a window, and
which have a recurrence in place of attention."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from architectures.parts import hf
from architectures.parts.attention import kernels
from architectures.parts.config import ModelConfig
from common import kinds as layer_kinds
from common.errors import require, short

SLIDING_ATTENTION, FULL_ATTENTION = 'sliding_attention', 'full_attention'
# our kinds of layer
KIND_OF_ATTENTION = {SLIDING_ATTENTION: 'local', FULL_ATTENTION: 'global'}
LINEAR_ATTENTION = 'linear_attention'
# our kinds, where some are that
KIND_OF_MIXER = {LINEAR_ATTENTION: 'linear', FULL_ATTENTION: 'full'}
MOST_LAYERS = 2**12  # layers


def fields_of_attention_types(types: Sequence[str], layers: int, window: int,
                              kind_fields: Mapping[
                                  str, Mapping[str, Any]] | None = None
         ) -> dict[str, Any]:
  """Returns the fields of config.model for layer_types.

  Args:
    types: the type of each layer.
    layers: the number of layers.
    window: sliding_window of the config.json; 0: none.
    kind_fields: further fields of a kind, by its type.
  """
  require(len(types) == layers and _are_words(types, KIND_OF_ATTENTION),
          f'config.json has layer_types {short(types)}: it must have one for '
          f'each of {layers} layers, of {", ".join(KIND_OF_ATTENTION)}')
  require(window > 0 or SLIDING_ATTENTION not in types,
          'config.json has layers of '
          f'{SLIDING_ATTENTION} in layer_types, but no sliding_window')
  further: dict[str, Mapping[str, Any]] = {SLIDING_ATTENTION: {},
                                           FULL_ATTENTION: {}}
  further |= kind_fields or {}

  # Layers that are all alike.
  if len(set(types)) == 1:
    ours: dict[str, Any] = dict(prefix='', pattern='', suffix='', kinds={})
    if types[0] == SLIDING_ATTENTION:
      ours |= dict(attention='banded', sliding_window=window)
    else:
      ours |= dict(attention='global', sliding_window=0)
    ours |= further[types[0]]
    return ours

  # Layers of two kinds.
  kinds = {'local': {'window': window, **further[SLIDING_ATTENTION]},
           'global': {'window': 0, **further[FULL_ATTENTION]}}
  names = [KIND_OF_ATTENTION[word] for word in types]
  return shortest_pattern(names) | dict(
      attention='global', sliding_window=0, kinds=kinds)


def _are_words(entries: Sequence[Any], words: Collection[str]) -> bool:
  """Returns whether each entry of a list is one of these words."""
  for entry in entries:
    if not isinstance(entry, str) or entry not in words:
      return False
  return True


def read_attention_types(reader: hf.Reader, layers: int,
                         has_window: Callable[[int], Any]
           ) -> list[str]:
  """Returns layer_types, or what each layer is by its number where there are
  none.

  Args:
    reader: the reader of the config.json.
    layers: the number of layers.
    has_window: a function of the number of a layer, whose result is true for
      one with a window; it is asked where there are no layer_types.
  """
  reader.ignore_fields('layer_types')
  if reader.has('layer_types'):
    return reader.read_list('layer_types')
  types = []
  for n in range(layers):
    if has_window(n):
      types.append(SLIDING_ATTENTION)
    else:
      types.append(FULL_ATTENTION)
  return types


def read_sliding_window(reader: hf.Reader) -> int:
  """Returns sliding_window: left out it is 4096; null, there is none."""
  if reader.is_null('sliding_window'):
    return 0
  return reader('sliding_window', 4096)


def shortest_pattern(names: Sequence[str]) -> dict[str, str]:
  """Returns model.prefix, model.pattern and model.suffix for layers.

  Among those that give the kinds of these layers in this order, whose suffix
  has kinds of the pattern alone, they name the fewest layers together; among
  those that name as many, they have the shortest suffix and then the shortest
  prefix.

  Args:
    names: the kind of each layer.
  """
  # Each candidate: the names that it has, and the lengths of its suffix, its
  # prefix and its period.
  candidates = []
  for first in range(len(names)):
    for period in range(1, len(names) - first + 1):
      pattern = names[first:first + period]
      end = first + period
      while names[end:end + period] == pattern:
        end += period
      if set(names[end:]) <= set(pattern):
        last = len(names) - end
        candidates.append((first + period + last, last, first, period))
  _, last, first, period = min(candidates)
  return dict(prefix=','.join(names[:first]),
              pattern=','.join(names[first:first + period]),
              suffix=','.join(names[len(names) - last:]))


def pattern_and_kinds(names: Sequence[str],
                      kinds: Mapping[str, Mapping[str, Any]]
          ) -> dict[str, Any]:
  """Returns the order of layers of these kinds, and what each kind is."""
  used = {name: kinds[name] for name in dict.fromkeys(names)}
  return shortest_pattern(names) | dict(kinds=used)


def read_layers_with_rope(reader: hf.Reader, layers: int) -> list[int]:
  """Returns no_rope_layers: for each layer 1, or 0 where it has no positions.
  Where they are not listed, the last of every no_rope_layer_interval layers has
  none."""
  every = reader('no_rope_layer_interval', 4)
  entries = reader.read_list('no_rope_layers')
  if not entries:
    entries = [1] * layers
    for last in range(every - 1, layers, every):
      entries[last] = 0
  known = all(type(entry) is int and entry in (0, 1) for entry in entries)
  require(known and len(entries) == layers,
          f'config.json has no_rope_layers {short(entries)}: it must have a 1, '
          f'or 0 for no positions, for each of {layers} layers')
  return entries


def write_attention_types(config: ModelConfig) -> dict[str, Any]:
  """Returns layer_types and, where a layer has one, sliding_window."""
  types, tree = [], {}
  for layer in config.layers(config.num_layers):
    types.append(attention_type(layer))
    if types[-1] == SLIDING_ATTENTION:
      tree['sliding_window'] = layer.sliding_window
  return {'layer_types': types, **tree}


def attention_type(config: ModelConfig) -> str:
  """Returns the entry of layer_types for the layers of `config`, which are all
  alike."""
  if kernels.RULES[config.attention].window:
    return SLIDING_ATTENTION
  return FULL_ATTENTION


def read_recurrent_layers(reader: hf.Reader, layers: int,
                          mixer: str) -> dict[str, Any]:
  """Returns the order and the kinds of layer of a model in which some are a
  recurrence, and some may have a dense network in place of experts.

  Args:
    reader: the reader of the config.json.
    layers: the number of layers.
    mixer: model.mixer of the recurrence.
  """
  check_number_of_layers('num_hidden_layers', layers)
  # Where the types are not listed, the last of every few layers is attention.
  every = reader('full_attention_interval', 4)
  types = read_entry_of_each_layer(reader, 'layer_types', layers=layers,
                                   words=KIND_OF_MIXER)
  if not types:
    types = [LINEAR_ATTENTION] * layers
    for last in range(every - 1, layers, every):
      types[last] = FULL_ATTENTION

  # The last of every few layers has experts, unless it is listed as dense.
  step = reader('decoder_sparse_step', 1)
  listed_dense = reader.read_list('mlp_only_layers')
  dense = []
  for n in range(layers):
    is_last = (n + 1) % step == 0
    dense.append(n in listed_dense or not is_last)
  return fields_of_recurrent_layers(types, dense, mixer)


def interval_of_expert_layers(config: ModelConfig) -> int:
  """Returns n of a model in which the last of every n layers has experts.

  Raises:
    RequestError: where other layers have them.
  """
  layers = max(config.num_layers, config.num_decoder_layers)
  moe = [kind.ffn == 'moe' for kind in config.layer_kinds(layers)]
  wrong = (
      f'model.pattern {config.pattern!r} has experts in layers that this '
      'config.json cannot name: it knows the last of every n layers')
  require(any(moe), wrong)
  every = moe.index(True) + 1
  known = [i % every == every - 1 for i in range(len(moe))]
  require(moe == known, wrong)
  return every


def check_number_of_layers(field: str, layers: int) -> None:
  """Raises RequestError for a field of a config.json that asks for more layers
  than a model may have, before they are listed."""
  require(layers <= MOST_LAYERS,
          f'config.json has {field} {layers}: a model has at '
          f'most {MOST_LAYERS} layers')


def read_entry_of_each_layer(reader: hf.Reader, field: str, layers: int,
                             words: Collection[str]
         ) -> list[str]:
  """Returns what a field of a config.json says of each layer, in these words;
  an empty list if there is no such field."""
  entries = reader.read_list(field)
  if not reader.has(field):
    return entries
  require(len(entries) == layers and _are_words(entries, words),
          f'config.json has {field} {short(entries)}: it must have an entry '
          f'for each of {layers} layers, one of {", ".join(words)}')
  return entries


def check_has_attention(config: ModelConfig) -> None:
  """Raises RequestError for a model without a layer of attention."""
  require(any(layer.mixer == 'attention' for layer in config.distinct_layers),
          'all layers are recurrences or short convolutions: transformers runs '
          f'a {config.arch} with some layers of attention only')


def fields_of_recurrent_layers(types: Sequence[str], dense: Sequence[bool],
                               mixer: str
          ) -> dict[str, Any]:
  """Returns the order and the kinds of layer of a model.

  Args:
    types: the type of each layer, a key of MIXERS.
    dense: whether each layer has a dense network in place of experts.
    mixer: model.mixer of the recurrence.
  """
  names, kinds = [], {}
  for word, is_dense in zip(types, dense, strict=True):
    name, kind = KIND_OF_MIXER[word], {}
    if word == LINEAR_ATTENTION:
      kind['mixer'] = mixer
    if is_dense:
      name += '_dense'
      kind['ffn'] = layer_kinds.DENSE_NETWORK
    names.append(name)
    kinds[name] = kind
  return shortest_pattern(names) | dict(kinds=kinds)


def write_recurrent_layers(config: ModelConfig) -> dict[str, Any]:
  """Returns layer_types, and mlp_only_layers."""
  types, dense = [], []
  for n, layer in enumerate(config.layers(config.num_layers)):
    types.append(
        FULL_ATTENTION if layer.mixer == 'attention' else LINEAR_ATTENTION)
    if layer.ffn != 'moe':
      dense.append(n)
  return dict(layer_types=types, decoder_sparse_step=1, mlp_only_layers=dense)
