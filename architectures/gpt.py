"""GPT: a decoder that predicts the next token (Radford et al. 2018, 2019;
Brown et al. 2020).

  x_0 = E[tokens] + P[0..L-1]
  a   = x + Attention(LayerNorm(x))       causal: a token sees no later one
  x'  = a + W2 gelu(W1 LayerNorm(a))      gelu by its tanh approximation
  logits = LayerNorm(x_N) E^T             the embedding, tied

GPT-3 is GPT-2 with attention that alternates between dense and locally banded
layers (section 2.1): `model.attention='global,banded'`. The paper does not
give the band's width; configs/gpt.py says which is taken.

Residual projections start smaller by 1/sqrt(2N) (GPT-2, section 2.3).
"""

from architectures.parts import hf as common
from architectures.parts.skeletons import Decoder


class GPT(Decoder):
  """tokens [B, L] -> Output; see Decoder."""


HF_MODEL = 'gpt2', 'GPT2LMHeadModel'
HF_SPELLINGS = (('transformer.', ''),)
HF_TIED = {'lm_head.weight': 'transformer.wte.weight'}
HF_IGNORED = (r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias',)  # causal masks
HF_NAMES = (
    ('embed/tokens', 'VD', 'transformer.wte.weight', 'V D'),
    ('embed/positions', 'LD', 'transformer.wpe.weight', 'L D'),
    ('decoder/layers/attention_norm/scale', 'D',
     'transformer.h.{n}.ln_1.weight', 'D'),
    ('decoder/layers/attention_norm/bias', 'D',
     'transformer.h.{n}.ln_1.bias', 'D'),
    ('decoder/layers/attention/query|key|value', 'DHK',
     'transformer.h.{n}.attn.c_attn.weight', 'D 3HK'),
    ('decoder/layers/attention/query_bias|key_bias|value_bias', 'HK',
     'transformer.h.{n}.attn.c_attn.bias', '3HK'),
    ('decoder/layers/attention/out', 'HKD',
     'transformer.h.{n}.attn.c_proj.weight', 'HK D'),
    ('decoder/layers/attention/out_bias', 'D',
     'transformer.h.{n}.attn.c_proj.bias', 'D'),
    ('decoder/layers/ffn_norm/scale', 'D', 'transformer.h.{n}.ln_2.weight',
     'D'),
    ('decoder/layers/ffn_norm/bias', 'D', 'transformer.h.{n}.ln_2.bias', 'D'),
    ('decoder/layers/ffn/up', 'DF', 'transformer.h.{n}.mlp.c_fc.weight',
     'D F'),
    ('decoder/layers/ffn/up_bias', 'F', 'transformer.h.{n}.mlp.c_fc.bias',
     'F'),
    ('decoder/layers/ffn/down', 'FD', 'transformer.h.{n}.mlp.c_proj.weight',
     'F D'),
    ('decoder/layers/ffn/down_bias', 'D', 'transformer.h.{n}.mlp.c_proj.bias',
     'D'),
    ('decoder/final_norm/scale', 'D', 'transformer.ln_f.weight', 'D'),
    ('decoder/final_norm/bias', 'D', 'transformer.ln_f.bias', 'D'),
    ('head/kernel', 'DV', 'lm_head.weight', 'V D'),
)


def from_hf_config(hf) -> dict:
  """Returns the fields of config.model that a gpt2 config.json gives."""
  hf.must(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
          add_cross_attention=False)
  hf.passes('reorder_and_upcast_attn')  # ours always takes it in float32
  d_model = hf('n_embd', 768)
  return dict(
      d_model=d_model, num_layers=hf('n_layer', 12),
      num_heads=hf('n_head', 12), d_ff=hf('n_inner', 4 * d_model),
      vocab_size=hf('vocab_size', 50257), max_len=hf('n_positions', 1024),
      norm_eps=hf('layer_norm_epsilon', 1e-5),
      ffn=hf.choose('activation_function', 'gelu_new', common.FFNS),
      tie_embeddings=hf('tie_word_embeddings', True))


def to_hf_config(c) -> dict:
  """Returns what a gpt2 config.json says of the config `c`."""
  return dict(
      n_embd=c.d_model, n_layer=c.num_layers, n_head=c.num_heads,
      n_inner=c.d_ff, vocab_size=c.vocab_size, n_positions=c.max_len,
      layer_norm_epsilon=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
      activation_function=common.theirs(common.FFNS, c.ffn))
