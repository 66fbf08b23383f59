"""BLOOM: a decoder without position embeddings, whose attention scores fall
with distance (Scao et al. 2022, section 3.2; ALiBi: Press et al. 2022).

  x_0 = LayerNorm(E[tokens])              for stability
  a   = x + Attention(LayerNorm(x))       scores - slope_h * distance
  x'  = a + W2 gelu(W1 LayerNorm(a))      gelu by its tanh approximation
  logits = LayerNorm(x_N) E^T

Their fused matrix holds query, key and value head by head, as GPT-NeoX's.
"""

from architectures.parts import hf
from architectures.parts.skeletons import Decoder


class BLOOM(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='alibi', norm='layernorm', embed_norm=True,
               block='pre_norm', attention='global', ffn='gelu_tanh',
               tie_embeddings=True)


HF = hf.HuggingFace(
    'bloom', 'BloomForCausalLM',
    names=(
        ('embed/tokens', 'VD', 'transformer.word_embeddings.weight', 'V D'),
        *hf.norm('embed/norm', 'transformer.word_embeddings_layernorm'),
        *hf.under(
            'decoder/layers', 'transformer.h.{n}',
            *hf.norm('attention_norm', 'input_layernorm'),
            *hf.dense('attention/query|key|value', 'DHK',
                      'self_attention.query_key_value', 'H3K D'),
            *hf.dense('attention/out', 'HKD', 'self_attention.dense', 'D HK'),
            *hf.norm('ffn_norm', 'post_attention_layernorm'),
            *hf.dense('ffn/up', 'DF', 'mlp.dense_h_to_4h', 'F D'),
            *hf.dense('ffn/down', 'FD', 'mlp.dense_4h_to_h', 'D F')),
        *hf.norm('decoder/final_norm', 'transformer.ln_f'),
        ('head/kernel', 'DV', 'lm_head.weight', 'V D')),
    fields={  # of two names for one thing, transformers follows the first
        'd_model': ('n_embed|hidden_size', 64),
        'num_layers': ('num_hidden_layers|n_layer', 2),
        'num_heads': ('num_attention_heads|n_head', 8),
        'vocab_size': ('vocab_size', 250880),
        'max_len': ('seq_length', 2048),
        'norm_eps': ('layer_norm_epsilon', 1e-5),
        'tie_embeddings': ('tie_word_embeddings', True)},
    only=dict(apply_residual_connection_post_layernorm=False),
    # How it was computed; the result is one.
    unread=('slow_but_exact', 'offset_alibi', 'skip_bias_add',
            'skip_bias_add_qkv', 'attention_softmax_in_fp32',
            'bias_dropout_fusion', 'masked_softmax_fusion'),
    tied={'lm_head.weight': 'transformer.word_embeddings.weight'},
    spellings=(('transformer.', ''),), heads=hf.heads('Bloom'))
