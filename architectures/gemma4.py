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
turns: rope.proportional. What E2B, E4B and 26B-A4B have beside this is refused.
"""

from collections.abc import Collection

from architectures import gemma2, gemma3, llama
from architectures.parts import hf
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder
from common.errors import require, shorten

SLIDING, FULL = layer_types.SLIDING_ATTENTION, layer_types.FULL_ATTENTION
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
  sizes = dict(head_dim=reader('global_head_dim', 512),
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


class HF(gemma2.HF):
  model_type = 'gemma4_text'
  architecture = 'Gemma4ForCausalLM'
  names = gemma2.decoder_rows('scale') + llama.layer_rows(
      *llama.head_norm_rows(), ('layer_scale', 'U', 'layer_scalar', 'U'))
  fields = gemma2.HF.fields | hf.fields_with_defaults(
      num_hidden_layers=30, vocab_size=262144,
      max_position_embeddings=131072)
  only = dict(enable_moe_block=False, num_kv_shared_layers=0,
              rope_scaling=None, rope_theta=None,
              use_bidirectional_attention='vision')  # causal for text
  fields_without_effect = (
      'use_double_wide_mlp', 'vocab_size_per_layer_input', 'num_experts',
      'top_k_experts', 'moe_intermediate_size')
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
    input_size = reader.read_count('hidden_size_per_layer_input', 256)
    require(input_size == 0, 'config.json has hidden_size_per_layer_input '
            f'{input_size}, as Gemma 4 E2B and E4B have: only 0 is known here')
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
    # The last layer sees all keys. Where all do, they have the same heads.
    global_layer = layers[-1]
    local_layer = global_layer
    if SLIDING in types:
      local_layer = layers[types.index(SLIDING)]
    per_layer_config = {}
    for n, layer_type in enumerate(types):
      if layer_type == FULL:
        per_layer_config[str(n)] = dict(
            head_dim=global_layer.head_dim,
            num_key_value_heads=global_layer.num_kv_heads)
    return layer_types.write_attention_types(config) | dict(
        hidden_size_per_layer_input=0, head_dim=local_layer.head_dim,
        num_key_value_heads=local_layer.num_kv_heads,
        attention_k_eq_v=global_layer.part(AttentionConfig).keys_as_values,
        per_layer_config=per_layer_config,
        final_logit_softcapping=config.logits_softcap or None,
        rope_parameters=rope_fields.write_rope_of_layer_kinds(config))

  def check(self, config: ModelConfig) -> None:
    """Accepts all heads, where Gemma 2 refuses some."""
