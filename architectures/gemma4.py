"""Gemma 4, dense and of text: Gemma 3 with larger heads where the whole text
is seen, whose values are their keys (Google 2026, as transformers has it).

  a   = x + n(W_o Attention(q, k, v))     scores times 1, m = n(x)
        q, k = n(W_q m), n(W_k m)         each head by itself, then turned
        v = W_v m / rms(W_v m)            in a window
        v = W_k m / rms(W_k m)            in the sixth layer, which sees all
  x'  = s (a + n(W_down (gelu(W_gate m') * W_up m'))),  m' = n(a)
  logits = 30 tanh(n(x_N) E^T / 30)       x_0 = E[tokens] sqrt(D)

n is RMSNorm and s a number of each layer. Positions turn by theta 10,000 in a
window, and by 1,000,000 in the whole text, where a quarter of a head's pairs
turns: rope.proportional.

E2B and E4B add a row of a table for each layer, by the token, to what a layer
returns: `per_layer` in parts/lookup.py. Their values are made apart, and their
last layers read the keys and values of the last layer of their type that has
its own. What 26B-A4B has beside this is refused.
"""

from collections.abc import Collection

from architectures import gemma2, gemma3, llama
from architectures.parts import hf
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.lookup import PerLayerConfig, ROWS_ARE_MULTIPLE_OF
from architectures.parts.skeletons import Decoder
from common.errors import require, shorten

SLIDING, FULL = layer_types.SLIDING_ATTENTION, layer_types.FULL_ATTENTION
# transformers' defaults, where a config.json lacks the field: the width of the
# tables by the token, their rows (the published vocabulary), and the size of
# the heads of layers that attend to all keys.
DEFAULT_SIZE_OF_TABLES = 256
DEFAULT_ROWS_OF_TABLES = 262144
DEFAULT_GLOBAL_HEAD_DIM = 512
# The end of the name of a kind of layer without keys of its own.
SHARED = '_shared'
ROPE_OF_LAYER_TYPE = {SLIDING: dict(theta=1e4, fraction=1.0,
                                    proportional=False),
                      FULL: dict(theta=1e6, fraction=0.25, proportional=True)}


class Gemma4(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = gemma3.Gemma3.PARTS | dict(
      norm='rmsnorm', attention_scale=1.0, value_norm=True, layer_scale=True,
      logits_softcap=30.0, rope=ROPE_OF_LAYER_TYPE[FULL],
      kinds={'local': dict(window=128, rope=ROPE_OF_LAYER_TYPE[SLIDING]),
             'global': dict(window=0, keys_as_values=True)})


def _read_heads(reader: hf.Reader, types: list[str], fields: dict) -> dict:
  """Reads the number and the size of the heads in the layers that attend to all
  keys. transformers writes them for each such layer, published files once.

  Args:
    reader: the reader of the Hugging Face config.json.
    types: for each layer 'sliding_attention' or 'full_attention'.
    fields: the fields of our config.model that were looked up before, with the
      heads of the layers with a window.

  Returns:
    The fields that the kind of these layers has of its own: `keys_as_values`,
    `head_dim` and `num_kv_heads`.

  Raises:
    RequestError: for layers that differ in these sizes.
  """
  # The form that published files have.
  keys_as_values = reader('attention_k_eq_v', False)
  num_kv_heads = fields['num_kv_heads']
  num_global_kv_heads = reader('num_global_key_value_heads', num_kv_heads)
  sizes = dict(head_dim=reader('global_head_dim',
                               DEFAULT_GLOBAL_HEAD_DIM),
               num_key_value_heads=num_kv_heads)
  if keys_as_values:
    sizes['num_key_value_heads'] = num_global_kv_heads

  # The form that transformers writes, which goes before the other.
  per_layer_config = reader('per_layer_config', {})
  if per_layer_config:
    numbers = []
    for n, layer_type in enumerate(types):
      if layer_type == FULL:
        numbers.append(n)
    sizes_of_each = _find_sizes_of_each(per_layer_config, numbers=numbers,
                                        known_names=sizes.keys())
    require(sizes_of_each is not None, f'config.json has per_layer_config '
            f'{shorten(per_layer_config)}: it must have the same '
            f'{" and ".join(sizes)} for each layer of {FULL}, and nothing else')
    sizes = dict(head_dim=fields['head_dim'], num_key_value_heads=num_kv_heads)
    sizes |= sizes_of_each
  return dict(keys_as_values=keys_as_values, head_dim=sizes['head_dim'],
              num_kv_heads=sizes['num_key_value_heads'])


def _read_tables(reader: hf.Reader, vocab_size: int) -> dict:
  """Reads the fields of the tables that each layer looks up by the token.

  Args:
    reader: the reader of the Hugging Face config.json.
    vocab_size: the number of tokens, for which a table must have a row each.

  Returns:
    Fields of our config.model: `memory`, and where there are tables `per_layer`
    with their width.

  Raises:
    RequestError: for tables with another number of rows than tokens.
  """
  # A size of 0 says that there are no tables. Both fields are read in any case,
  # so that neither is refused as unknown.
  size = reader.read_count('hidden_size_per_layer_input',
                           DEFAULT_SIZE_OF_TABLES)
  num_rows = reader('vocab_size_per_layer_input', DEFAULT_ROWS_OF_TABLES)
  if not size:
    return dict(memory='none')
  require(num_rows == vocab_size, 'config.json has vocab_size_per_layer_input '
          f'{num_rows} and vocab_size {vocab_size}: only tables with a row for '
          'each token are known here')
  return dict(memory='per_layer', per_layer=dict(size=size))


def _share_keys(types: list[str], num_shared: int, d_ff: int,
                kinds: dict[str, dict]) -> dict:
  """Returns the fields of config.model for layers of which the last ones read
  the keys and values of earlier layers.

  Args:
    types: for each layer 'sliding_attention' or 'full_attention'.
    num_shared: how many of the last layers have no keys of their own.
    d_ff: the hidden units of the networks of these layers.
    kinds: the fields of a layer with keys of its own, by its type.

  Returns:
    `prefix`, the layers with keys of their own; `pattern`, the shortest one of
    the others; `suffix`, which is empty; and `kinds`.

  Raises:
    RequestError: if no layer lends its keys to those of one type.
  """
  # A layer without keys reads those of an earlier layer of its type.
  first = len(types) - num_shared
  missing = set(types[first:]) - set(types[:first])
  require(not missing, f'config.json has num_kv_shared_layers {num_shared}, '
          f'but no earlier layer of {" and ".join(sorted(missing))} lends its '
          'keys')

  # The kinds of layer: two of each type, with keys and without. Only those that
  # some layer has are kept, in the order of the layers.
  names = [layer_types.KIND_OF_ATTENTION[layer_type] for layer_type in types]
  own_names = names[:first]
  shared_names = [name + SHARED for name in names[first:]]
  all_kinds = {}
  for layer_type, name in layer_types.KIND_OF_ATTENTION.items():
    kind = kinds[layer_type]
    all_kinds[name] = kind
    all_kinds[name + SHARED] = hf.drop_entries(kind, 'keys_as_values') | dict(
        kv_sharing=True, d_ff=d_ff)
  used_names = dict.fromkeys((*own_names, *shared_names))
  used = {name: all_kinds[name] for name in used_names}

  # The shortest pattern that divides the layers without keys.
  period = 1
  while (num_shared % period or shared_names
         != shared_names[:period] * (num_shared // period)):
    period += 1
  return dict(prefix=','.join(own_names), suffix='', kinds=used,
              pattern=','.join(shared_names[:period]))


def _count_shared(config: ModelConfig) -> tuple[int, bool]:
  """Counts the layers that read the keys and values of earlier ones. In
  transformers these are the last layers, and their networks may be twice as
  wide as those of the others, all of them or none.

  Args:
    config: the model.

  Returns:
    How many of the last layers share keys, and whether the networks of these
    layers are twice as wide.

  Raises:
    RequestError: for other layers that do, or networks of another width.
  """
  layers = config.layers(config.num_layers)
  num_shared = sum(layer.shares_keys for layer in layers)
  first = config.num_layers - num_shared
  require(not any(layer.shares_keys for layer in layers[:first]),
          f'model.pattern {config.pattern!r} has layers with keys of their own '
          'after one with kv_sharing, which transformers does not run')
  widths = {layer.d_ff for layer in layers[first:]} or {config.d_ff}
  require(widths in ({config.d_ff}, {2 * config.d_ff}),
          f'model.d_ff is {sorted(widths)} in layers with kv_sharing: '
          f'transformers knows {config.d_ff} and twice as many')
  return num_shared, widths != {config.d_ff}


def _find_sizes_of_each(per_layer_config: dict, numbers: list[int],
                        known_names: Collection[str]) -> dict[str, int] | None:
  """Returns the sizes that some layers of a Hugging Face config.json have in
  common, where it lists them layer by layer.

  Args:
    per_layer_config: a field of the file: the sizes by the layer's number.
    numbers: the numbers of the layers that it must have, and no others.
    known_names: the names of the sizes.

  Returns:
    The sizes by name; None where layers differ, or something else stands there.
  """
  # The right layers, of which transformers writes 5 as 05 where there are ten
  # or more; known sizes, the same in all layers, and whole numbers.
  if not all(number.isdecimal() for number in per_layer_config):
    return None
  if sorted(int(number) for number in per_layer_config) != numbers:
    return None
  sizes = next(iter(per_layer_config.values()))
  if not isinstance(sizes, dict) or not sizes.keys() <= known_names:
    return None
  if any(entry != sizes for entry in per_layer_config.values()):
    return None
  if not all(type(size) is int and size > 0 for size in sizes.values()):
    return None
  return sizes


# Each layer has a table and a matrix of its own, which theirs has in one.
PER_LAYER_ROWS = (
    ('decoder/memory_norm/scale', 'S', 'model.per_layer_projection_norm.weight',
     'S'),
    ('decoder/layers/memory/table', 'VS', 'model.embed_tokens_per_layer.weight',
     'V NS'),
    ('decoder/layers/memory/input', 'DS',
     'model.per_layer_model_projection.weight', 'NS D'),
    *llama.layer_rows(
        ('memory/gate', 'DS', 'per_layer_input_gate.weight', 'S D'),
        ('memory/out', 'SD', 'per_layer_projection.weight', 'D S'),
        ('memory/out_norm/scale', 'D', 'post_per_layer_input_norm.weight',
         'D')))


class HF(gemma2.HF):
  model_type = 'gemma4_text'
  architecture = 'Gemma4ForCausalLM'
  names = gemma2.decoder_rows('scale') + PER_LAYER_ROWS + llama.layer_rows(
      *llama.head_norm_rows(), ('layer_scale', 'U', 'layer_scalar', 'U'))
  fields = gemma2.HF.fields | hf.fields_with_defaults(
      num_hidden_layers=30, vocab_size=262144,
      max_position_embeddings=131072)
  only = dict(enable_moe_block=False, rope_scaling=None, rope_theta=None,
              use_bidirectional_attention='vision')  # causal for text
  fields_without_effect = (
      'num_experts', 'top_k_experts', 'moe_intermediate_size')
  heads = {}

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    """Translates a Hugging Face config.json to fields of our config.model.
    Fields that only have another name there have been looked up before.

    Args:
      reader: the fields of the file. `reader(name, default)` returns a field's
        value, or the default if the file lacks it, and marks it as read. A file
        is refused if a field that may matter was never read; `ignore_fields`
        marks fields that do not matter.
      fields: the fields of config.model that have been looked up.

    Returns:
      Further fields of config.model, by name. Groups, such as rope, are dicts.
      They replace fields of the same name in `fields`.
    """
    # Which layers see all keys; the last one does whatever the file says.
    num_layers = fields['num_layers']
    types = layer_types.read_attention_types(
        reader, layers=num_layers, has_window=lambda n: (n + 1) % 6)
    types = [*types[:-1], FULL]

    # The positions and the heads of each kind of layer.
    local_rope = ROPE_OF_LAYER_TYPE[SLIDING]
    global_rope = ROPE_OF_LAYER_TYPE[FULL]
    if reader.has('rope_parameters'):
      local_rope, global_rope = rope_fields.read_rope_of_layer_kinds(
          reader, (SLIDING, ('rope_theta', 1e4)), (FULL, ('rope_theta', 1e4)))
    kind_fields = {SLIDING: dict(rope=local_rope),
                   FULL: _read_heads(reader, types=types, fields=fields)}
    window = reader('sliding_window', 512)
    softcap = gemma2.read_softcap(reader, 'final_logit_softcapping',
                                  default=0.0)
    model_fields = layer_types.fields_of_attention_types(
        types, layers=num_layers, window=window, kind_fields=kind_fields)

    # The last layers may have no keys, and all may read tables of the tokens.
    num_shared = reader.read_count('num_kv_shared_layers', 0)
    is_double_wide = reader('use_double_wide_mlp', False)
    require(num_shared < num_layers, 'config.json has num_kv_shared_layers '
            f'{num_shared}, which must be less than the {num_layers} layers')
    if num_shared:
      d_ff = fields['d_ff']
      if is_double_wide:
        d_ff *= 2
      windows = {SLIDING: dict(window=window), FULL: dict(window=0)}
      kinds = {layer_type: windows[layer_type] | kind_fields[layer_type]
               for layer_type in windows}
      model_fields = dict(attention='global', sliding_window=0) | _share_keys(
          types, num_shared=num_shared, d_ff=d_ff, kinds=kinds)
    model_fields |= _read_tables(reader, vocab_size=fields['vocab_size'])
    return model_fields | dict(rope=global_rope, logits_softcap=softcap)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    layers = config.layers(config.num_layers)
    types = [layer_types.attention_type(layer) for layer in layers]
    # The first layer of a type has keys. The last layer sees all keys; where
    # all do, they have the same heads.
    global_layer = layers[types.index(types[-1])]
    local_layer = global_layer
    if SLIDING in types:
      local_layer = layers[types.index(SLIDING)]
    per_layer_config = {}
    for n, layer_type in enumerate(types):
      if layer_type == FULL:
        per_layer_config[str(n)] = dict(
            head_dim=global_layer.head_dim,
            num_key_value_heads=global_layer.num_kv_heads)
    num_shared, is_double_wide = _count_shared(config)
    size_of_rows = 0
    if config.memory == 'per_layer':
      size_of_rows = config.part(PerLayerConfig).size
    return layer_types.write_attention_types(config) | dict(
        hidden_size_per_layer_input=size_of_rows,
        vocab_size_per_layer_input=config.vocab_size,
        num_kv_shared_layers=num_shared, use_double_wide_mlp=is_double_wide,
        head_dim=local_layer.head_dim,
        num_key_value_heads=local_layer.num_kv_heads,
        attention_k_eq_v=global_layer.part(AttentionConfig).keys_as_values,
        per_layer_config=per_layer_config,
        final_logit_softcapping=config.logits_softcap or None,
        rope_parameters=rope_fields.write_rope_of_layer_kinds(config))

  def check(self, config: ModelConfig) -> None:
    """Checks that transformers can run a model as a Gemma 4. Unlike Gemma 2's,
    this check accepts all heads.

    Args:
      config: the model.

    Raises:
      RequestError: for tables whose rows are not those of the tokens, or whose
        gate has another activation than the networks, as transformers has one
        activation for both; and for layers that read the keys of others in a
        model without tables.
    """
    if config.memory == 'per_layer':
      require(config.vocab_size % ROWS_ARE_MULTIPLE_OF == 0,
              f'model.vocab_size is {config.vocab_size}: with model.memory '
              'per_layer, tables are read and written whose rows are a '
              f'multiple of {ROWS_ARE_MULTIPLE_OF}')
      require(config.ffn == 'geglu_tanh', f'model.ffn is {config.ffn!r}, whose '
              'activation transformers has in the gates of model.memory '
              'per_layer too, where it is gelu_tanh here: choose geglu_tanh')
      return
    require(not any(layer.shares_keys for layer in config.distinct_layers),
            'transformers does not run a gemma4 whose layers read the keys of '
            "others (kv_sharing) without model.memory 'per_layer'")

  def ignored_in(self, config: ModelConfig) -> tuple[str, ...]:
    """Returns the tensors of a weight file that are passed over.

    Published files hold projections and norms of keys and values for all
    layers. A layer that reads the keys and values of another one does not use
    its own.

    Args:
      config: the model.

    Returns:
      Regular expressions of the names of these tensors.
    """
    patterns = list(self.ignored)
    for n, layer in enumerate(config.layers(config.num_layers)):
      if layer.shares_keys:
        patterns.append(
            rf'model\.layers\.{n}\.self_attn\.(k|v)_(proj|norm)\.weight')
    return tuple(patterns)
