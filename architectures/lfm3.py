"""LFM3, dense: LFM2 with longer convolutions, a window in half of the layers
that attend, gates, and norms before and after each part (Liquid AI 2026, as
transformers has it).

  a  = x + n(ShortConv(n(x)))             in half of the layers, over 7 tokens
  a  = x + n(W_o (sigmoid(W_g m)_h Attention_h(q, k, W_v m)))
       q, k = n(W_q m), n(W_k m)          in the others, m = n(x)
  x' = a + n(W_down (silu(W_gate m) * W_up m)),  m = n(a)
  logits = n(x_N) E^T                     n is RMSNorm; no bias anywhere

Positions turn by theta 10,000 in a window of 256 tokens, and by 1,000,000 where
all are seen, where the first half of a head's pairs turns: rope.proportional.
"""

from architectures import lfm2, llama, phi3
from architectures.lfm2 import SHORT_CONVOLUTION
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder
from common.errors import require

# Our kind of layer by the entry of layer_types in a config.json.
KIND_OF_LAYER_TYPE = layer_types.KIND_OF_ATTENTION | {
    SHORT_CONVOLUTION: SHORT_CONVOLUTION}
# The positions where a config.json does not say.
LOCAL_ROPE = dict(theta=1e4, fraction=1.0, proportional=False)
GLOBAL_ROPE = dict(theta=1e6, fraction=0.5, proportional=True)


def _layer_kinds(window: int, rope: dict) -> dict:
  """Returns model.kinds, the fields of each kind of layer.

  Args:
    window: the number of keys that a layer with a window sees.
    rope: the fields of model.rope in layers with a window.
  """
  return {SHORT_CONVOLUTION: dict(mixer='short_conv'), 'global': dict(window=0),
          'local': dict(window=window, rope=rope)}


class LFM3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = lfm2.LFM2.PARTS | dict(
      block='sandwich', attention_gate='headwise', short_conv=dict(kernel=7),
      rope=GLOBAL_ROPE, pattern='local,conv,global,conv',
      kinds=_layer_kinds(128, LOCAL_ROPE))


def _default_layer_type(n: int) -> str:
  """Returns the type of layer n where a config.json does not say."""
  if n == 0 or n % 2 == 1:
    return SHORT_CONVOLUTION
  if n % 4 == 2:
    return layer_types.FULL_ATTENTION
  return layer_types.SLIDING_ATTENTION


class HF(lfm2.HF):
  model_type = 'lfm3'
  architecture = 'Lfm3ForCausalLM'
  names = lfm2.decoder_rows('o_proj', 'norm') + llama.layer_rows(
      ('attention_out_norm/scale', 'D', 'post_operator_norm.weight', 'D'),
      ('ffn_out_norm/scale', 'D', 'post_ffn_norm.weight', 'D'),
      ('attention/output_gate', 'DH', 'self_attn.gate_proj.weight', 'H D'))
  fields = lfm2.HF.fields | hf.fields_with_defaults(
      hidden_size=2048, num_hidden_layers=24, num_attention_heads=16,
      num_key_value_heads=4, head_dim=128, intermediate_size=7680,
      vocab_size=128000, tie_word_embeddings=True) | {
          'short_conv.kernel': ('conv_L_cache', 7),
          'block': ('use_sandwich_norm', True,
                    {True: 'sandwich', False: 'pre_norm'}),
          'attention_gate': ('use_attention_gate', True,
                             {True: 'headwise', False: 'none'})}
  only = dict(rope_scaling=None)

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
    num_layers = fields['num_layers']
    layer_types.check_number_of_layers('num_hidden_layers', num_layers)
    types = layer_types.read_entry_of_each_layer(reader, field='layer_types',
                                                 layers=num_layers,
                                                 words=KIND_OF_LAYER_TYPE)
    if not types:
      types = [_default_layer_type(n) for n in range(num_layers)]
    has_window = not reader.is_null('sliding_window')
    require(has_window or layer_types.SLIDING_ATTENTION not in types,
            f'config.json has layers of {layer_types.SLIDING_ATTENTION} in '
            'layer_types, but no sliding_window')
    window = reader('sliding_window', 256)

    # The positions of layers with a window, and of those that see all keys.
    local_rope, global_rope = LOCAL_ROPE, GLOBAL_ROPE
    if reader.has('rope_parameters'):
      local_rope, global_rope = rope_fields.read_rope_of_layer_kinds(
          reader, (layer_types.SLIDING_ATTENTION, ('rope_theta', 1e6)),
          (layer_types.FULL_ATTENTION, ('rope_theta', 1e6)))

    # The order of the layers, by our names of their kinds, and what each kind
    # is.
    kind_names = [KIND_OF_LAYER_TYPE[layer_type] for layer_type in types]
    model_fields = layer_types.pattern_and_kinds(
        kind_names, _layer_kinds(window, local_rope))
    return model_fields | dict(rope=global_rope)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    # The type of each layer: a convolution, or attention with or without a
    # sliding window.
    types = []
    for layer in config.layers(config.num_layers):
      if layer.mixer == 'short_conv':
        types.append(SHORT_CONVOLUTION)
      else:
        types.append(layer_types.attention_type(layer))
    # write_attention_types gives the window. It also gives types, but knows no
    # convolutions. So its fields come first, and ours replace the types.
    config_json = layer_types.write_attention_types(config)
    config_json['layer_types'] = types
    config_json['rope_parameters'] = (
        rope_fields.write_rope_of_layer_kinds(config))
    # The ids of special tokens are null. Where they are left out, transformers
    # takes those of the published vocabulary, which may lie outside of ours.
    for field_name in phi3.TOKEN_ID_FIELDS:
      config_json[field_name] = None
    return config_json
