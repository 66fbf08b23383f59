"""BLOOM: a decoder without position embeddings, whose attention scores fall
with distance (Scao et al. 2022, section 3.2; ALiBi: Press et al. 2022).

  x_0 = LayerNorm(E[tokens])              for stability
  a   = x + Attention(LayerNorm(x))       scores - slope_h * distance
  x'  = a + W2 gelu(W1 LayerNorm(a))      gelu by its tanh approximation
  logits = LayerNorm(x_N) E^T

Their fused matrix holds query, key and value head by head, as GPT-NeoX's.
"""

from architectures.parts.skeletons import Decoder


class BLOOM(Decoder):
  """tokens [B, L] -> Output; see Decoder."""


HF_MODEL = 'bloom', 'BloomForCausalLM'
HF_SPELLINGS = (('transformer.', ''),)
HF_TIED = {'lm_head.weight': 'transformer.word_embeddings.weight'}
HF_IGNORED = ()
HF_NAMES = (
    ('embed/tokens', 'VD', 'transformer.word_embeddings.weight', 'V D'),
    ('embed/norm/scale', 'D', 'transformer.word_embeddings_layernorm.weight',
     'D'),
    ('embed/norm/bias', 'D', 'transformer.word_embeddings_layernorm.bias',
     'D'),
    ('decoder/layers/attention_norm/scale', 'D',
     'transformer.h.{n}.input_layernorm.weight', 'D'),
    ('decoder/layers/attention_norm/bias', 'D',
     'transformer.h.{n}.input_layernorm.bias', 'D'),
    ('decoder/layers/attention/query|key|value', 'DHK',
     'transformer.h.{n}.self_attention.query_key_value.weight', 'H3K D'),
    ('decoder/layers/attention/query_bias|key_bias|value_bias', 'HK',
     'transformer.h.{n}.self_attention.query_key_value.bias', 'H3K'),
    ('decoder/layers/attention/out', 'HKD',
     'transformer.h.{n}.self_attention.dense.weight', 'D HK'),
    ('decoder/layers/attention/out_bias', 'D',
     'transformer.h.{n}.self_attention.dense.bias', 'D'),
    ('decoder/layers/ffn_norm/scale', 'D',
     'transformer.h.{n}.post_attention_layernorm.weight', 'D'),
    ('decoder/layers/ffn_norm/bias', 'D',
     'transformer.h.{n}.post_attention_layernorm.bias', 'D'),
    ('decoder/layers/ffn/up', 'DF',
     'transformer.h.{n}.mlp.dense_h_to_4h.weight', 'F D'),
    ('decoder/layers/ffn/up_bias', 'F',
     'transformer.h.{n}.mlp.dense_h_to_4h.bias', 'F'),
    ('decoder/layers/ffn/down', 'FD',
     'transformer.h.{n}.mlp.dense_4h_to_h.weight', 'D F'),
    ('decoder/layers/ffn/down_bias', 'D',
     'transformer.h.{n}.mlp.dense_4h_to_h.bias', 'D'),
    ('decoder/final_norm/scale', 'D', 'transformer.ln_f.weight', 'D'),
    ('decoder/final_norm/bias', 'D', 'transformer.ln_f.bias', 'D'),
    ('head/kernel', 'DV', 'lm_head.weight', 'V D'),
)


def from_hf_config(hf) -> dict:
  """Returns the fields of config.model that a bloom config.json gives."""
  hf.must(apply_residual_connection_post_layernorm=False)
  # How it was computed; the result is one.
  hf.passes('slow_but_exact', 'offset_alibi', 'skip_bias_add',
            'skip_bias_add_qkv', 'attention_softmax_in_fp32',
            'bias_dropout_fusion', 'masked_softmax_fusion')
  # Of two names for one thing, the first here is the one that transformers
  # follows where both are given.
  return dict(
      d_model=hf('n_embed', hf('hidden_size', 64)),
      num_layers=hf('num_hidden_layers', hf('n_layer', 2)),
      num_heads=hf('num_attention_heads', hf('n_head', 8)),
      vocab_size=hf('vocab_size', 250880), max_len=hf('seq_length', 2048),
      norm_eps=hf('layer_norm_epsilon', 1e-5), embed_norm=True,
      position='alibi', ffn='gelu_tanh',
      tie_embeddings=hf('tie_word_embeddings', True))


def to_hf_config(c) -> dict:
  """Returns what a bloom config.json says of the config `c`."""
  return dict(
      hidden_size=c.d_model, n_layer=c.num_layers, n_head=c.num_heads,
      vocab_size=c.vocab_size, seq_length=c.max_len,
      layer_norm_epsilon=c.norm_eps, tie_word_embeddings=c.tie_embeddings)
