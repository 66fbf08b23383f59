"""GPT-NeoX: attention and feed-forward side by side (Black et al. 2022,
section 2.1; Pythia: Biderman et al. 2023).

  x' = x + Attention(LayerNorm_1(x)) + FFN(LayerNorm_2(x))
  logits = LayerNorm(x_N) W

Rotary positions turn the first quarter of each head (`model.rope.fraction`).
Their fused matrix holds query, key and value head by head.
"""

from architectures.parts import hf as common
from architectures.parts.skeletons import Decoder


class GPTNeoX(Decoder):
  """tokens [B, L] -> Output; see Decoder."""


HF_MODEL = 'gpt_neox', 'GPTNeoXForCausalLM'
HF_SPELLINGS = (('gpt_neox.', ''),)
HF_TIED = {'embed_out.weight': 'gpt_neox.embed_in.weight'}
HF_IGNORED = (r'.*\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)',)
HF_NAMES = (
    ('embed/tokens', 'VD', 'gpt_neox.embed_in.weight', 'V D'),
    ('decoder/layers/attention_norm/scale', 'D',
     'gpt_neox.layers.{n}.input_layernorm.weight', 'D'),
    ('decoder/layers/attention_norm/bias', 'D',
     'gpt_neox.layers.{n}.input_layernorm.bias', 'D'),
    ('decoder/layers/attention/query|key|value', 'DHK',
     'gpt_neox.layers.{n}.attention.query_key_value.weight', 'H3K D'),
    ('decoder/layers/attention/query_bias|key_bias|value_bias', 'HK',
     'gpt_neox.layers.{n}.attention.query_key_value.bias', 'H3K'),
    ('decoder/layers/attention/out', 'HKD',
     'gpt_neox.layers.{n}.attention.dense.weight', 'D HK'),
    ('decoder/layers/attention/out_bias', 'D',
     'gpt_neox.layers.{n}.attention.dense.bias', 'D'),
    ('decoder/layers/ffn_norm/scale', 'D',
     'gpt_neox.layers.{n}.post_attention_layernorm.weight', 'D'),
    ('decoder/layers/ffn_norm/bias', 'D',
     'gpt_neox.layers.{n}.post_attention_layernorm.bias', 'D'),
    ('decoder/layers/ffn/up', 'DF',
     'gpt_neox.layers.{n}.mlp.dense_h_to_4h.weight', 'F D'),
    ('decoder/layers/ffn/up_bias', 'F',
     'gpt_neox.layers.{n}.mlp.dense_h_to_4h.bias', 'F'),
    ('decoder/layers/ffn/down', 'FD',
     'gpt_neox.layers.{n}.mlp.dense_4h_to_h.weight', 'D F'),
    ('decoder/layers/ffn/down_bias', 'D',
     'gpt_neox.layers.{n}.mlp.dense_4h_to_h.bias', 'D'),
    ('decoder/final_norm/scale', 'D', 'gpt_neox.final_layer_norm.weight', 'D'),
    ('decoder/final_norm/bias', 'D', 'gpt_neox.final_layer_norm.bias', 'D'),
    ('head/kernel', 'DV', 'embed_out.weight', 'V D'),
)


def from_hf_config(hf) -> dict:
  """Returns the fields of config.model that a gpt_neox config.json gives."""
  hf.must(attention_bias=True)
  hf.passes('is_decoder')  # it has no other way to be
  parallel = hf('use_parallel_residual', True)
  rope = common.read_rope(hf, theta=('rotary_emb_base', 10000.0),
                          fraction=('rotary_pct', 0.25))
  # Some versions wrote both under other names as well, which none reads.
  hf.must(rope_theta=rope['theta'], partial_rotary_factor=rope['fraction'])
  return dict(
      d_model=hf('hidden_size', 6144), num_layers=hf('num_hidden_layers', 44),
      num_heads=hf('num_attention_heads', 64),
      d_ff=hf('intermediate_size', 24576),
      vocab_size=hf('vocab_size', 50432),
      max_len=hf('max_position_embeddings', 2048),
      norm_eps=hf('layer_norm_eps', 1e-5), position='rope',
      rope=rope,
      ffn=hf.choose('hidden_act', 'gelu', common.FFNS),
      block='parallel' if parallel else 'pre_norm',
      tie_embeddings=hf('tie_word_embeddings', False))


def to_hf_config(c) -> dict:
  """Returns what a gpt_neox config.json says of the config `c`."""
  rope = common.write_rope(c, whole_heads=False)
  return dict(
      hidden_size=c.d_model, num_hidden_layers=c.num_layers,
      num_attention_heads=c.num_heads, intermediate_size=c.d_ff,
      vocab_size=c.vocab_size, max_position_embeddings=c.max_len,
      layer_norm_eps=c.norm_eps, rope_parameters=rope,
      hidden_act=common.theirs(common.FFNS, c.ffn),
      use_parallel_residual=c.block == 'parallel',
      tie_word_embeddings=c.tie_embeddings)
