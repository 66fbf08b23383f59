"""Qwen3.5, of text: three layers of Gated DeltaNet to one of gated attention,
and a dense network in each (Qwen Team 2026, "Qwen3.5: Towards Native Multimodal
Agents").

  a  = x + DeltaNet(n(x))                     in three layers of four
  a  = x + W_o (Attention(q, k, W_v m) * sigmoid(W_g m)),  m = n(x)
       q, k = n(W_q m), n(W_k m)              each head by itself; a quarter of
                                              its features turns
  x' = a + W_down (silu(W_gate m) * W_up m),  m = n(a)
  n(x) = x / rms(x) * (1 + offset)

That is architectures/qwen3_next.py without experts; its products stand apart in
a file. Of text, all three axes of its rotary positions (mrope) are one. The
published folders also hold what reads images, and a module that predicts a
second token: transformers' Qwen3_5ForCausalLM reads one and writes it without.
"""

from architectures import llama, qwen3_next
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder


class Qwen35(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  ARCH = 'qwen3_5'
  PARTS = qwen3_next.HYBRID_PARTS


class HF(llama.Family):
  model_type = 'qwen3_5_text'
  architecture = 'Qwen3_5ForCausalLM'
  names = qwen3_next.BASE_ROWS
  fields = hf.fields_with_defaults(
      hidden_size=4096, num_hidden_layers=32, num_attention_heads=16,
      num_key_value_heads=4, head_dim=256, intermediate_size=12288,
      vocab_size=248320, max_position_embeddings=32768, rms_norm_eps=1e-6,
      attention_bias=False, tie_word_embeddings=False
  ) | qwen3_next.DELTANET_FIELDS | {'ffn': qwen3_next.SWIGLU_FIELD}
  only = dict(attn_output_gate=True, output_gate_type='swish')
  optional = qwen3_next.HF.optional
  heads = hf.task_heads('Qwen3_5Text', only=('sequence',))

  def rows_of_layer(self, layer: ModelConfig) -> tuple[hf.Row, ...]:
    """Returns table rows that name the Hugging Face tensor of each parameter of
    a layer's gated DeltaNet, or of its attention."""
    if layer.mixer != 'deltanet':
      return qwen3_next.attention_rows(layer)
    return hf.prefix_rows(
        'attention', 'linear_attn',
        ('query|key|value', 'DJK|DJK|DHU', 'in_proj_qkv.weight', 'JK+JK+HU D'),
        ('output_gate', 'DHU', 'in_proj_z.weight', 'HU D'),
        ('rate', 'DH', 'in_proj_b.weight', 'H D'),
        ('decay', 'DH', 'in_proj_a.weight', 'H D'), *qwen3_next.STATE_ROWS)

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
    reader.require_values(decoder_sparse_step=1, mlp_only_layers=[])
    model_fields = layer_types.read_recurrent_layers(
        reader, layers=fields['num_layers'], mixer='deltanet')
    model_fields['rope'] = rope_fields.read_rope(
        reader, fraction=('partial_rotary_factor', 0.25),
        unread=('mrope_section',))
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
    types = layer_types.write_recurrent_layers(config)['layer_types']
    rope = rope_fields.write_rope(config, whole_heads=False)
    return dict(layer_types=types, rope_parameters=rope)

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    layer_types.check_has_attention(config)
