"""The field layer_types of a config.json: which layers attend to a window, and
which have a recurrence in place of attention."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from architectures.parts import hf
from architectures.parts.attention import kernels
from architectures.parts.config import ModelConfig
from common import kinds as layer_kinds
from common.errors import require, shorten

SLIDING_ATTENTION, FULL_ATTENTION = 'sliding_attention', 'full_attention'
LINEAR_ATTENTION = 'linear_attention'
# Our kind of layer by its entry of layer_types, in a system whose layers attend
# to a window or to all keys.
KIND_OF_ATTENTION = {SLIDING_ATTENTION: 'local', FULL_ATTENTION: 'global'}
# Our kind of layer by its entry, in a system where some are recurrences.
KIND_OF_MIXER = {LINEAR_ATTENTION: 'linear', FULL_ATTENTION: 'full'}
# A config.json may ask for no more, as each layer is listed.
MOST_LAYERS = 2**12


def fields_of_attention_types(
    types: Sequence[str], layers: int, window: int,
    kind_fields: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
  """Returns the fields of our config.model that say which layers attend to a
  sliding window, and which to all keys.

  Args:
    types: the entry of a config.json's layer_types for each layer:
      'sliding_attention' or 'full_attention'.
    layers: the number of layers.
    window: sliding_window of the config.json, in tokens; 0: none.
    kind_fields: further fields of the layers of one type, by this type.

  Returns:
    The fields `attention` and `sliding_window`; the order of the layers
    (`prefix`, `pattern`, `suffix`); and `kinds`, what each kind of layer is,
    which is {} where all layers are alike.

  Raises:
    RequestError: for types that are no list of known ones, and for layers with
      a window where there is none.
  """
  require(len(types) == layers and _are_words(types, KIND_OF_ATTENTION),
          f'config.json has layer_types {shorten(types)}: it must have one for '
          f'each of {layers} layers, of {", ".join(KIND_OF_ATTENTION)}')
  require(window > 0 or SLIDING_ATTENTION not in types,
          'config.json has layers of '
          f'{SLIDING_ATTENTION} in layer_types, but no sliding_window')
  further: dict[str, Mapping[str, Any]] = {SLIDING_ATTENTION: {},
                                           FULL_ATTENTION: {}}
  further |= kind_fields or {}

  # Layers that are all alike.
  if len(set(types)) == 1:
    model_fields: dict[str, Any] = dict(prefix='', pattern='', suffix='',
                                        kinds={})
    if types[0] == SLIDING_ATTENTION:
      model_fields |= dict(attention='banded', sliding_window=window)
    else:
      model_fields |= dict(attention='global', sliding_window=0)
    model_fields |= further[types[0]]
    return model_fields

  # Layers of two kinds.
  kinds = {'local': {'window': window, **further[SLIDING_ATTENTION]},
           'global': {'window': 0, **further[FULL_ATTENTION]}}
  kind_names = [KIND_OF_ATTENTION[layer_type] for layer_type in types]
  return shortest_pattern(kind_names) | dict(
      attention='global', sliding_window=0, kinds=kinds)


def _are_words(entries: Sequence[Any], words: Collection[str]) -> bool:
  """Returns whether each entry of a list is one of these words."""
  for entry in entries:
    if not isinstance(entry, str) or entry not in words:
      return False
  return True


def read_attention_types(reader: hf.Reader, layers: int,
                         has_window: Callable[[int], Any]) -> list[str]:
  """Reads from a Hugging Face config.json which layers attend to a sliding
  window, and which to all keys.

  Args:
    reader: the fields of the config.json.
    layers: the number of layers.
    has_window: a function that says whether layer n (from 0 on) has a window.
      It is used if the file does not list the types of the layers.

  Returns:
    The type of each layer, such as 'sliding_attention'. It may be unknown:
    callers check it.
  """
  # This marks the field as known, even if it is missing or null.
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
  """Returns sliding_window of a config.json: 4096 where it is left out, and 0,
  for no window, where it is null."""
  if reader.is_null('sliding_window'):
    return 0
  return reader('sliding_window', 4096)


class Division(NamedTuple):
  """A way to divide layers into a prefix, repeats of a pattern, and a suffix.
  The better one of two compares as less: min() compares the number of names
  first, then the suffix, and then the prefix.

  Attributes:
    num_names: how many layers the prefix, the pattern and the suffix name.
    suffix: the length of the suffix.
    prefix: the length of the prefix.
    period: the length of the pattern.
  """
  num_names: int
  suffix: int
  prefix: int
  period: int


def shortest_pattern(names: Sequence[str]) -> dict[str, str]:
  """Finds the shortest repeating pattern in the order of a model's layers.

  The layers are divided into a prefix, a pattern that is repeated one or more
  times, and a suffix that has only kinds of layer of the pattern. The best
  division names the fewest layers in all; among equals, it has the shortest
  suffix, and then the shortest prefix. For example, a, b, c, b, c is divided
  into the prefix a and the pattern b, c.

  Args:
    names: the kind of each layer, in order.

  Returns:
    The fields `prefix`, `pattern` and `suffix` of config.model, each as names
    with commas between.
  """
  # The kind of each layer as a number, and each kind's last layer.
  kinds = sorted(set(names))
  kind_of_layer = np.array([kinds.index(name) for name in names])
  num_layers = len(names)
  next_of_kind = [_indices_of_next_true(kind_of_layer == kind)
                  for kind in range(len(kinds))]  # from each layer on
  last_of_kind = [np.flatnonzero(kind_of_layer == kind)[-1]
                  for kind in range(len(kinds))]

  # Try each length of the pattern, with all lengths of the prefix at once.
  best = Division(num_names=num_layers + 1, suffix=0, prefix=0, period=0)
  for period in range(1, num_layers + 1):
    if period > best.num_names:
      break  # a longer pattern alone names more layers than the best division
    prefix_lengths = np.arange(num_layers - period + 1)
    # The pattern repeats as often as it fits; what follows is the suffix.
    differs = kind_of_layer[:num_layers - period] != kind_of_layer[period:]
    equal_layers = _indices_of_next_true(differs) - prefix_lengths
    ends = prefix_lengths + period + equal_layers // period * period
    suffix_lengths = num_layers - ends

    # The suffix may have no kind of layer that the pattern lacks.
    is_allowed = np.ones(len(prefix_lengths), bool)
    for next_layers, last in zip(next_of_kind, last_of_kind):
      is_in_pattern = next_layers[prefix_lengths] < prefix_lengths + period
      is_allowed &= is_in_pattern | (ends > last)
    if not is_allowed.any():
      continue

    # argmin returns the first of several, which has the shortest prefix.
    num_names = prefix_lengths + period + suffix_lengths
    rank = num_names * (num_layers + 1) + suffix_lengths
    prefix = int(np.where(is_allowed, rank, rank.max() + 1).argmin())
    suffix = int(suffix_lengths[prefix])
    division = Division(num_names=prefix + period + suffix, suffix=suffix,
                        prefix=prefix, period=period)
    best = min(best, division)

  end_of_pattern = best.prefix + best.period
  return dict(prefix=','.join(names[:best.prefix]),
              pattern=','.join(names[best.prefix:end_of_pattern]),
              suffix=','.join(names[num_layers - best.suffix:]))


def _indices_of_next_true(flags: np.ndarray) -> np.ndarray:
  """Returns, for each index of an array of truth values [n], and for its end,
  the first index from there on that is true, [n + 1]. Where none is true, this
  is n."""
  length = len(flags)
  indices = np.append(np.where(flags, np.arange(length), length), length)
  return np.minimum.accumulate(indices[::-1])[::-1]


def pattern_and_kinds(names: Sequence[str],
                      kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the fields of config.model that say in which order its kinds of
  layer stand, and how each kind differs from the model's own fields.

  Args:
    names: the name of each layer's kind, in order.
    kinds: {name of a kind: the fields that it overrides}. It may have more
      kinds than occur in `names`.

  Returns:
    The fields `prefix`, `pattern`, `suffix` and `kinds`.
  """
  used_kinds = {name: kinds[name] for name in dict.fromkeys(names)}
  return shortest_pattern(names) | dict(kinds=used_kinds)


def read_layers_with_rope(reader: hf.Reader, layers: int) -> list[int]:
  """Reads from a Hugging Face config.json which layers have rotary positions
  (RoPE). The field is called no_rope_layers, but its entries mean the opposite:
  1 is a layer with positions.

  Without the field, the last of every no_rope_layer_interval layers has no
  positions.

  Args:
    reader: the fields of the config.json.
    layers: the number of layers.

  Returns:
    For each layer, 1 if its queries and keys are rotated by their positions,
    and 0 if not.

  Raises:
    RequestError: if there is not one entry for each layer, or one is not 0 or
      1.
  """
  interval = reader('no_rope_layer_interval', 4)
  entries = reader.read_list('no_rope_layers')
  if not entries:
    entries = [1] * layers
    for last in range(interval - 1, layers, interval):
      entries[last] = 0
  are_known = all(type(entry) is int and entry in (0, 1) for entry in entries)
  require(are_known and len(entries) == layers,
          f'config.json has no_rope_layers {shorten(entries)}: it must have a '
          f'1, or 0 for no positions, for each of {layers} layers')
  return entries


def write_attention_types(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields layer_types and, where a layer has a window,
  sliding_window of the config.json of a model."""
  types, config_json = [], {}
  for layer in config.layers(config.num_layers):
    types.append(attention_type(layer))
    if types[-1] == SLIDING_ATTENTION:
      config_json['sliding_window'] = layer.sliding_window
  return {'layer_types': types, **config_json}


def attention_type(config: ModelConfig) -> str:
  """Returns the entry of layer_types for a layer with this config: whether it
  attends to a window."""
  if kernels.RULES[config.attention].window:
    return SLIDING_ATTENTION
  return FULL_ATTENTION


def read_recurrent_layers(reader: hf.Reader, layers: int, mixer: str
                          ) -> dict[str, Any]:
  """Reads from a Hugging Face config.json which layers of a hybrid model are a
  recurrence (the others are attention), and which have a dense network in place
  of experts.

  Args:
    reader: the fields of the config.json.
    layers: the number of layers.
    mixer: our name of the recurrence, the value of model.mixer.

  Returns:
    The fields of config.model that say this: the order of the layers, and
    `kinds`, how each kind of layer differs from the model's own fields.
  """
  check_number_of_layers('num_hidden_layers', layers)
  # If the types are not listed, the last of every few layers is attention.
  interval = reader('full_attention_interval', 4)
  types = read_entry_of_each_layer(
      reader, field='layer_types', layers=layers, words=KIND_OF_MIXER)
  if not types:
    types = [LINEAR_ATTENTION] * layers
    for last in range(interval - 1, layers, interval):
      types[last] = FULL_ATTENTION

  # The last of every few layers has experts, unless it is listed as dense.
  expert_interval = reader('decoder_sparse_step', 1)
  dense_layers = reader.read_list('mlp_only_layers')
  is_dense = []
  for n in range(layers):
    is_last = (n + 1) % expert_interval == 0
    is_dense.append(n in dense_layers or not is_last)
  return fields_of_recurrent_layers(types, is_dense, mixer)


def interval_of_expert_layers(config: ModelConfig) -> int:
  """Returns the number n such that the last of every n layers has experts, as
  some config.json of Hugging Face write it.

  Args:
    config: our config of the model.

  Raises:
    RequestError: if no layer has experts, or if the layers with experts have
      another order.
  """
  layers = max(config.num_layers, config.num_decoder_layers)
  has_experts = [kind.ffn == 'moe' for kind in config.layer_kinds(layers)]
  wrong = (
      f'model.pattern {config.pattern!r} has experts in layers that this '
      'config.json cannot name: it knows the last of every n layers')
  require(any(has_experts), wrong)
  interval = has_experts.index(True) + 1
  expected = [n % interval == interval - 1 for n in range(len(has_experts))]
  require(has_experts == expected, wrong)
  return interval


def check_number_of_layers(field: str, layers: int) -> None:
  """Raises RequestError for a field of a config.json that asks for more layers
  than a model may have, before they are listed."""
  require(layers <= MOST_LAYERS,
          f'config.json has {field} {layers}: a model has at '
          f'most {MOST_LAYERS} layers')


def read_entry_of_each_layer(reader: hf.Reader, field: str, layers: int,
                             words: Collection[str]) -> list[str]:
  """Reads a field of a Hugging Face config.json that has a word for each layer.

  Args:
    reader: the fields of the config.json.
    field: the name of the field, such as 'layer_types'.
    layers: the number of layers.
    words: the words that are known.

  Returns:
    The words in the order of the layers; [] if there is no such field.

  Raises:
    RequestError: if there is not one entry for each layer, or one is unknown.
  """
  entries = reader.read_list(field)
  if not reader.has(field):
    return entries
  require(len(entries) == layers and _are_words(entries, words),
          f'config.json has {field} {shorten(entries)}: it must have an entry '
          f'for each of {layers} layers, one of {", ".join(words)}')
  return entries


def check_has_attention(config: ModelConfig) -> None:
  """Raises RequestError for a model without a layer of attention."""
  require(any(layer.mixer == 'attention' for layer in config.distinct_layers),
          'all layers are recurrences or short convolutions: transformers runs '
          f'a {config.arch} with some layers of attention only')


def fields_of_recurrent_layers(types: Sequence[str], is_dense: Sequence[bool],
                               mixer: str) -> dict[str, Any]:
  """Returns the fields of config.model that describe the layers of a hybrid of
  attention and a recurrence.

  Args:
    types: the type of each layer: 'linear_attention', which is the recurrence,
      or 'full_attention'.
    is_dense: for each layer, whether it has a dense network in place of
      experts.
    mixer: our name of the recurrence, the value of model.mixer.

  Returns:
    The order of the layers, and `kinds`, how each kind of layer differs from
    the model's own fields.
  """
  # There is a kind for each combination of the two that occurs.
  kind_names, kinds = [], {}
  for layer_type, has_dense_network in zip(types, is_dense, strict=True):
    name, kind = KIND_OF_MIXER[layer_type], {}
    if layer_type == LINEAR_ATTENTION:
      kind['mixer'] = mixer
    if has_dense_network:
      name += '_dense'
      kind['ffn'] = layer_kinds.DENSE_NETWORK
    kind_names.append(name)
    kinds[name] = kind
  return shortest_pattern(kind_names) | dict(kinds=kinds)


def write_recurrent_layers(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields of a Hugging Face config.json that say which layers of a
  hybrid model are a recurrence, and which have a dense network in place of
  experts. This is the inverse of `read_recurrent_layers`.

  Args:
    config: our config of the model.
  """
  # The file says "every n-th layer has experts, except the listed ones". All
  # layers without experts are listed, so n is always 1.
  types, dense_layers = [], []
  for n, layer in enumerate(config.layers(config.num_layers)):
    if layer.mixer == 'attention':
      types.append(FULL_ATTENTION)
    else:
      types.append(LINEAR_ATTENTION)
    if layer.ffn != 'moe':
      dense_layers.append(n)
  return dict(layer_types=types, decoder_sparse_step=1,
              mlp_only_layers=dense_layers)
