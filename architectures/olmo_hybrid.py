"""Olmo Hybrid: OLMo 3 with Gated DeltaNet in three layers of four (Ai2 2026,
"Olmo Hybrid").

  a  = x + DeltaNet(n(x)),  x' = a + SwiGLU(n(a))     in three layers of four
  a  = x + n(Attention(x)), x' = a + n(SwiGLU(a))     in the fourth, as OLMo 3
       q, k = n(W_q x), n(W_k x)     over all heads, then turned
  logits = n(x_N) W                  n is RMSNorm; no bias anywhere

parts/recurrent/linear_attention.py has the recurrence, whose rates go up to 2,
and whose norm has an epsilon of its own. The released weights, for longer
texts, turn nothing.
"""

from architectures import llama, olmo2, phi3, qwen3_next
from architectures.parts import blocks, hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder
from common.errors import require

LAYER_KINDS = dict(linear=dict(mixer='deltanet', block='pre_norm'), full={})


class OlmoHybrid(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = olmo2.OLMo2.PARTS | dict(
      pattern='linear,linear,linear,full', kinds=LAYER_KINDS,
      deltanet=dict(negative=True))


DELTANET_ROWS = hf.prefix_rows(
    'attention', 'linear_attn',
    ('query', 'DJK', 'q_proj.weight', 'JK D'),
    ('key', 'DJK', 'k_proj.weight', 'JK D'),
    ('value', 'DHU', 'v_proj.weight', 'HU D'),
    ('query_conv', 'WJK', 'q_conv1d.weight', 'JK 1 W'),
    ('key_conv', 'WJK', 'k_conv1d.weight', 'JK 1 W'),
    ('value_conv', 'WHU', 'v_conv1d.weight', 'HU 1 W'),
    ('output_gate', 'DHU', 'g_proj.weight', 'HU D'),
    ('rate', 'DH', 'b_proj.weight', 'H D'),
    ('decay', 'DH', 'a_proj.weight', 'H D'), *qwen3_next.STATE_ROWS[1:3],
    ('out_norm/scale', 'U', 'o_norm.weight', 'U'),
    ('out', 'HUD', 'o_proj.weight', 'D HU'))
BASE_ROWS = olmo2.BASE_ROWS + llama.layer_rows(
    ('attention_norm/scale', 'D', 'attention_layer_norm.weight', 'D'),
    ('ffn_norm/scale', 'D', 'feedforward_layer_norm.weight', 'D'))


def _default_key_dim(fields: dict) -> int:
  """Returns linear_key_head_dim where a config.json does not say."""
  return int(0.75 * fields['d_model'] / fields['deltanet.key_heads'])


class HF(llama.Family):
  model_type = 'olmo_hybrid'
  architecture = 'OlmoHybridForCausalLM'
  names = BASE_ROWS
  fields = olmo2.HF.fields | hf.fields_with_defaults(
      hidden_size=3840, num_attention_heads=30, vocab_size=100352,
      max_position_embeddings=65536, rms_norm_eps=1e-6,
      linear_num_key_heads=hf.default_num_kv_heads,
      linear_num_value_heads=hf.default_num_kv_heads,
      linear_key_head_dim=_default_key_dim,
      linear_value_head_dim=lambda fields: 2 * fields['deltanet.key_dim'],
      linear_conv_kernel_dim=4) | {
          'ffn': qwen3_next.SWIGLU_FIELD,
          'deltanet.negative': ('linear_allow_neg_eigval', True)}
  # How weights are drawn.
  fields_without_effect = (
      'linear_a_log_min', 'linear_a_log_max', 'linear_dt_min',
      'linear_dt_max', 'linear_dt_init_floor')
  # transformers writes it so in the layers that attend, too.
  spellings = (*llama.HF.spellings, ('post_attention_layernorm',
                                     'feedforward_layer_norm'))

  def rows_of_layer(self, layer: ModelConfig) -> tuple[hf.Row, ...]:
    """Returns table rows that name the Hugging Face tensor of each parameter of
    a layer's gated DeltaNet, or of its attention."""
    if layer.mixer == 'deltanet':
      return DELTANET_ROWS
    return olmo2.ATTENTION_ROWS

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
    # The order of the layers.
    num_layers = fields['num_layers']
    layer_types.check_number_of_layers('num_hidden_layers', num_layers)
    types = layer_types.read_entry_of_each_layer(
        reader, field='layer_types', layers=num_layers,
        words=layer_types.KIND_OF_MIXER)
    kind_names = [layer_types.KIND_OF_MIXER[layer_type] for layer_type in types]
    if not types:
      kind_names = [
          'full' if n % 4 == 3 else 'linear' for n in range(num_layers)]
      if 'full' not in kind_names:
        kind_names[-1] = 'full'

    # Positions, which a theta of null takes away.
    rope = rope_fields.read_rope(reader)
    rope_parameters = reader('rope_parameters', {})
    if rope_parameters:
      has_positions = rope_parameters.get('rope_theta', 1) is not None
    else:
      has_positions = not reader.is_null('rope_theta')
    model_fields = layer_types.pattern_and_kinds(kind_names, LAYER_KINDS)
    model_fields['deltanet'] = dict(norm_eps=1e-5)
    if has_positions:
      model_fields['rope'] = rope
    else:
      model_fields['position'] = 'none'
    return model_fields

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    rope = dict(rope_type='default', rope_theta=None)
    if config.position != 'none':
      rope = rope_fields.write_rope(config)
    types = layer_types.write_recurrent_layers(config)['layer_types']
    return dict(
        layer_types=types, rope_parameters=rope,
        # Nulls. Left out, transformers takes the ids of special tokens from
        # the published vocabulary, which may lie outside of ours.
        **dict.fromkeys(phi3.TOKEN_ID_FIELDS))

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    layer_types.check_has_attention(config)
    require(blocks.has_layers_with_state(config),
            'all layers attend: transformers runs an '
            'olmo_hybrid with some recurrences only')
