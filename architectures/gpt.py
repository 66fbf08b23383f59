"""GPT: a decoder that predicts the next token (Radford et al. 2018, 2019;
Brown et al. 2020).

  x_0 = E[tokens] + P[0..L-1]
  a   = x + Attention(LayerNorm(x))       causal: a token sees no later one
  x'  = a + W2 gelu(W1 LayerNorm(a))      gelu by its tanh approximation
  logits = LayerNorm(x_N) E^T             the embedding, tied

GPT-3 is GPT-2 with attention that alternates between dense and locally banded
layers (section 2.1): `model.pattern='global,banded'`. The paper does not give
the band's width; configs/gpt.py says which is taken.

Residual projections start smaller by 1/sqrt(2N) (GPT-2, section 2.3).
"""

from architectures.parts import hf
from architectures.parts.skeletons import Decoder


class GPT(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='learned', norm='layernorm', block='pre_norm',
               attention='global', ffn='gelu_tanh', tie_embeddings=True)


class HF(hf.HuggingFace):
  model_type = 'gpt2'
  architecture = 'GPT2LMHeadModel'
  names = (
      ('embed/tokens', 'VD', 'transformer.wte.weight', 'V D'),
      ('embed/positions', 'LD', 'transformer.wpe.weight', 'L D'),
      *hf.prefix_rows(
          'decoder/layers', 'transformer.h.{n}',
          *hf.norm_rows('attention_norm', 'ln_1'),
          *hf.dense_rows('attention/query|key|value', 'DHK', 'attn.c_attn',
                         'D 3HK'),
          *hf.dense_rows('attention/out', 'HKD', 'attn.c_proj', 'HK D'),
          *hf.norm_rows('ffn_norm', 'ln_2'),
          *hf.dense_rows('ffn/up', 'DF', 'mlp.c_fc', 'D F'),
          *hf.dense_rows('ffn/down', 'FD', 'mlp.c_proj', 'F D')),
      *hf.norm_rows('decoder/final_norm', 'transformer.ln_f'),
      ('head/kernel', 'DV', 'lm_head.weight', 'V D'))
  fields = {
      'd_model': ('n_embd', 768),
      'num_layers': ('n_layer', 12),
      'num_heads': ('n_head', 12),
      'd_ff': ('n_inner', lambda fields: 4 * fields['d_model']),
      'max_len': ('n_positions', 1024),
      'ffn': ('activation_function', 'gelu_new',
              hf.FFN_OF_ACTIVATION)} | hf.fields_with_defaults(
          vocab_size=50257, layer_norm_epsilon=1e-5,
          tie_word_embeddings=True)
  only = dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
              add_cross_attention=False)
  # Ours always takes it in float32.
  fields_without_effect = ('reorder_and_upcast_attn',)
  tied = {'lm_head.weight': 'transformer.wte.weight'}
  spellings = (('transformer.', ''),)
  # Causal masks.
  ignored = (r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias',)
  heads = hf.task_heads('GPT2')
