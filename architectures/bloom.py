"""BLOOM: a decoder without position embeddings, whose attention scores fall
with distance (Scao et al. 2022, section 3.2; ALiBi: Press et al. 2022).

  x_0 = LayerNorm(E[tokens])              for stability
  a   = x + Attention(LayerNorm(x))       scores - slope_h * distance
  x'  = a + W2 gelu(W1 LayerNorm(a))      gelu by its tanh approximation
  logits = LayerNorm(x_N) E^T

Their fused matrix holds query, key and value head by head, as GPT-NeoX's.
"""

from architectures import gpt_neox
from architectures.parts import hf
from architectures.parts.skeletons import Decoder


class BLOOM(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='alibi', norm='layernorm', embed_norm=True,
               block='pre_norm', attention='global', ffn='gelu_tanh',
               tie_embeddings=True)


class HF(hf.HuggingFace):
  model_type = 'bloom'
  architecture = 'BloomForCausalLM'
  names = (
      ('embed/tokens', 'VD', 'transformer.word_embeddings.weight', 'V D'),
      *hf.norm_rows('embed/norm', 'transformer.word_embeddings_layernorm'),
      *gpt_neox.layer_rows('transformer.h.{n}', 'self_attention'),
      *hf.norm_rows('decoder/final_norm', 'transformer.ln_f'),
      ('head/kernel', 'DV', 'lm_head.weight', 'V D'))
  fields = hf.fields_with_defaults(
      vocab_size=250880, layer_norm_epsilon=1e-5, tie_word_embeddings=True
  ) | {  # of two names for one thing, transformers follows the first
      'd_model': ('n_embed|hidden_size', 64),
      'num_layers': ('num_hidden_layers|n_layer', 2),
      'num_heads': ('num_attention_heads|n_head', 8),
      'max_len': ('seq_length', 2048)}
  only = dict(apply_residual_connection_post_layernorm=False)
  # How it was computed; the result is one.
  fields_without_effect = ('slow_but_exact',)
  tied = {'lm_head.weight': 'transformer.word_embeddings.weight'}
  spellings = (('transformer.', ''),)
  heads = hf.task_heads('Bloom')
