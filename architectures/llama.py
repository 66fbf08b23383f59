"""LLaMA: a decoder of RMSNorm, rotary positions and SwiGLU (Touvron et al.
2023a, section 2.2), with grouped heads from LLaMA 2 70B on (2023b; Llama 3:
Dubey et al. 2024).

  x_0 = E[tokens]
  a   = x + Attention(RMSNorm(x))         q and k turned by their position
  x'  = a + W_down (silu(W_gate n) * W_up n),  n = RMSNorm(a)
  logits = RMSNorm(x_N) W                 a matrix of its own; no bias anywhere

Longer contexts: `model.rope.scaling` linear, ntk, llama3 or yarn, by
`model.rope.factor`.
"""

from architectures.parts import hf as common
from architectures.parts.skeletons import Decoder
from configs.errors import require


class LLaMA(Decoder):
  """tokens [B, L] -> Output; see Decoder."""


HF_MODEL = 'llama', 'LlamaForCausalLM'
HF_SPELLINGS = (('model.', ''),)
HF_TIED = {'lm_head.weight': 'model.embed_tokens.weight'}
HF_IGNORED = (r'.*\.rotary_emb\.inv_freq',)
HF_ATTENTION = (
    ('embed/tokens', 'VD', 'model.embed_tokens.weight', 'V D'),
    ('decoder/layers/attention_norm/scale', 'D',
     'model.layers.{n}.input_layernorm.weight', 'D'),
    ('decoder/layers/attention/query', 'DHK',
     'model.layers.{n}.self_attn.q_proj.weight', 'HK D'),
    ('decoder/layers/attention/query_bias', 'HK',
     'model.layers.{n}.self_attn.q_proj.bias', 'HK'),
    ('decoder/layers/attention/key', 'DJK',
     'model.layers.{n}.self_attn.k_proj.weight', 'JK D'),
    ('decoder/layers/attention/key_bias', 'JK',
     'model.layers.{n}.self_attn.k_proj.bias', 'JK'),
    ('decoder/layers/attention/value', 'DJK',
     'model.layers.{n}.self_attn.v_proj.weight', 'JK D'),
    ('decoder/layers/attention/value_bias', 'JK',
     'model.layers.{n}.self_attn.v_proj.bias', 'JK'),
    ('decoder/layers/attention/out', 'HKD',
     'model.layers.{n}.self_attn.o_proj.weight', 'D HK'),
    ('decoder/layers/attention/out_bias', 'D',
     'model.layers.{n}.self_attn.o_proj.bias', 'D'),
    ('decoder/layers/ffn_norm/scale', 'D',
     'model.layers.{n}.post_attention_layernorm.weight', 'D'),
    ('decoder/final_norm/scale', 'D', 'model.norm.weight', 'D'),
    ('head/kernel', 'DV', 'lm_head.weight', 'V D'),
)
HF_NAMES = HF_ATTENTION + (
    ('decoder/layers/ffn/gate', 'DF', 'model.layers.{n}.mlp.gate_proj.weight',
     'F D'),
    ('decoder/layers/ffn/gate_bias', 'F',
     'model.layers.{n}.mlp.gate_proj.bias', 'F'),
    ('decoder/layers/ffn/up', 'DF', 'model.layers.{n}.mlp.up_proj.weight',
     'F D'),
    ('decoder/layers/ffn/up_bias', 'F', 'model.layers.{n}.mlp.up_proj.bias',
     'F'),
    ('decoder/layers/ffn/down', 'FD', 'model.layers.{n}.mlp.down_proj.weight',
     'D F'),
    ('decoder/layers/ffn/down_bias', 'D',
     'model.layers.{n}.mlp.down_proj.bias', 'D'),
)


def from_hf_config(hf) -> dict:
  """Returns the fields of config.model that a llama config.json gives."""
  hf.must(rope_interleaved=False)
  hf.passes('is_llama_config')  # of SmolLM2
  heads = hf('num_attention_heads', 32)
  d_model = hf('hidden_size', 4096)
  return dict(
      d_model=d_model, num_layers=hf('num_hidden_layers', 32),
      num_heads=heads, num_kv_heads=hf('num_key_value_heads', heads),
      head_dim=hf('head_dim', d_model // heads),
      d_ff=hf('intermediate_size', 11008),
      vocab_size=hf('vocab_size', 32000),
      max_len=hf('max_position_embeddings', 2048), norm='rmsnorm',
      norm_eps=hf('rms_norm_eps', 1e-6), position='rope',
      rope=common.read_rope(hf),
      ffn=hf.choose('hidden_act', 'silu', common.GATED),
      attention_bias=hf('attention_bias', False),
      ffn_bias=hf('mlp_bias', False),
      tie_embeddings=hf('tie_word_embeddings', False))


def to_hf_config(c) -> dict:
  """Returns what a llama config.json says of the config `c`."""
  require(c.d_model % c.num_heads == 0,
          f'model.num_heads is {c.num_heads}, which does not divide '
          f'model.d_model {c.d_model}: transformers refuses such a llama')
  return dict(
      hidden_size=c.d_model, num_hidden_layers=c.num_layers,
      num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
      head_dim=c.head_dim, intermediate_size=c.d_ff, vocab_size=c.vocab_size,
      max_position_embeddings=c.max_len, rms_norm_eps=c.norm_eps,
      rope_parameters=common.write_rope(c),
      hidden_act=common.theirs(common.GATED, c.ffn),
      attention_bias=c.attention_bias, mlp_bias=c.ffn_bias,
      tie_word_embeddings=c.tie_embeddings)
