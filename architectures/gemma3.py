"""Gemma 3, of text: Gemma 2 with norms of queries and keys in place of bounds
on scores, and five layers with a window for each that sees the whole text
(Gemma Team 2025, section 2).

  a   = x + n(Attention(n(x)))      q and k with a norm of each head
  x'  = a + n(W_down (gelu(W_gate m) * W_up m)),  m = n(a)
  n(x) = x / rms(x) * (1 + offset)

Positions turn by theta 10,000 in a window and 1,000,000 in the whole text,
where they are stretched by 8 for 128K tokens (4B to 27B).
"""

from architectures import gemma2, llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder


class Gemma3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      norm='rmsnorm_1p', block='sandwich', qk_norm=True, pattern='local,global',
      kinds={'local': dict(window=128, rope=dict(theta=1e4)),
             'global': dict(window=0)},
      ffn='geglu_tanh', tie_embeddings=True, embed_scale=0.0)


class HF(gemma2.HF):
  model_type = 'gemma3_text'
  architecture = 'Gemma3ForCausalLM'
  names = gemma2.decoder_rows() + llama.layer_rows(
      *llama.head_norm_rows(norm='offset'))
  fields = gemma2.HF.fields | hf.fields_with_defaults(
      vocab_size=262208, max_position_embeddings=131072)
  # A bound on scores is a field that transformers has and does not read.
  only = gemma2.HF.only | dict(attn_logit_softcapping=None)
  heads = hf.task_heads('Gemma3Text', only=('sequence',))

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
    local_rope, global_rope = rope_fields.read_rope_of_layer_kinds(
        reader, (layer_types.SLIDING_ATTENTION, ('rope_local_base_freq', 1e4)),
        (layer_types.FULL_ATTENTION, ('rope_theta', 1e6)))
    model_fields = gemma2.read_scales(reader, softcap=0.0)
    model_fields['rope'] = global_rope
    # Where all layers have a window, theirs are the positions of the model.
    model_fields |= gemma2.read_alternating_layers(
        reader, fields=fields, interval=reader('sliding_window_pattern', 6),
        kind_fields={layer_types.SLIDING_ATTENTION: dict(rope=local_rope)})
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
    config_json = gemma2.write_scales(config)
    config_json |= layer_types.write_attention_types(config)
    rope = rope_fields.write_rope_of_layer_kinds(config)
    config_json['rope_parameters'] = rope
    return config_json
