"""OPT: GPT with ReLU, whose positions are counted from 2 (Zhang et al. 2022,
arXiv 2205.01068, section 2).

  x_0 = E[tokens] + P[2..L+1]             rows 0 and 1 are never read
  a   = x + Attention(LayerNorm(x))
  x'  = a + W2 relu(W1 LayerNorm(a))
  logits = LayerNorm(x_N) E^T

The 350M model is another: its norms stand on sums, and its embedding is
narrower than its layers.
"""

from architectures import gpt, transformer
from architectures.parts import hf
from architectures.parts.skeletons import Decoder


class OPT(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = gpt.GPT.PARTS | dict(ffn='relu', learned=dict(offset=2))


class HF(hf.HuggingFace):
  model_type = 'opt'
  architecture = 'OPTForCausalLM'
  names = (
      ('embed/tokens', 'VD', 'model.decoder.embed_tokens.weight', 'V D'),
      ('embed/positions', 'LD', 'model.decoder.embed_positions.weight',
       'L D'),
      *hf.prefix_rows(
          'decoder/layers', 'model.decoder.layers.{n}',
          *hf.norm_rows('attention_norm', 'self_attn_layer_norm'),
          *transformer.attention_rows('attention', 'self_attn'),
          *hf.norm_rows('ffn_norm', 'final_layer_norm'),
          *hf.dense_rows('ffn/up', 'DF', 'fc1', 'F D'),
          *hf.dense_rows('ffn/down', 'FD', 'fc2', 'D F')),
      *hf.norm_rows('decoder/final_norm', 'model.decoder.final_layer_norm'),
      ('head/kernel', 'DV', 'lm_head.weight', 'V D'))
  fields = hf.fields_with_defaults(
      hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
      vocab_size=50272, max_position_embeddings=2048,
      tie_word_embeddings=True) | {
          'd_ff': ('ffn_dim', 3072),
          'ffn': ('activation_function', 'relu', hf.FFN_OF_ACTIVATION)}
  only = dict(do_layer_norm_before=True, enable_bias=True,
              layer_norm_elementwise_affine=True,
              _remove_final_layer_norm=False)
  # They are of training alone.
  fields_without_effect = ('layerdrop', 'init_std')
  tied = {'lm_head.weight': 'model.decoder.embed_tokens.weight'}
  spellings = (('model.decoder.', 'decoder.'), ('model.decoder.', ''))

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
    # Embeddings of another width than the layers (OPT-350M) are not known here.
    if not reader.is_null('word_embed_proj_dim'):
      reader.require_values(word_embed_proj_dim=fields['d_model'])
    # Two rows of the table stand before that of position 0, as in fairseq.
    return dict(learned=dict(offset=2))
