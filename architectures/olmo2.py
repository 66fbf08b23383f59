"""OLMo 2: LLaMA with norms on what is added, and on queries and keys (OLMo Team
2025, section 3.1).

  q, k = RMSNorm(W_q x), RMSNorm(W_k x)   over all heads, then turned
  a    = x + RMSNorm(Attention(x))
  x'   = a + RMSNorm(W_down (silu(W_gate a) * W_up a))
  logits = RMSNorm(x_N) W                 a matrix of its own; no bias anywhere

Nothing is normalised before attention or the network.
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts.skeletons import Decoder


class OLMo2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(block='out_norm', qk_norm=True,
                                   qk_norm_over='projection')


# Those of OLMo 3 and Olmo Hybrid too.
BASE_ROWS = llama.embedding_and_head_rows() + llama.layer_rows(
    *hf.prefix_rows('ffn', 'mlp', *llama.FFN_ROWS),
    ('attention_out_norm/scale', 'D', 'post_attention_layernorm.weight', 'D'),
    ('ffn_out_norm/scale', 'D', 'post_feedforward_layernorm.weight', 'D'))
ATTENTION_ROWS = (*llama.attention_rows(), *llama.head_norm_rows('U'))


class HF(llama.Family):
  model_type = 'olmo2'
  architecture = 'Olmo2ForCausalLM'
  names = BASE_ROWS + llama.layer_rows(*ATTENTION_ROWS)
  fields = hf.drop_entries(llama.HF.fields,
                           'ffn_bias') | hf.fields_with_defaults(
      vocab_size=50304, rms_norm_eps=1e-5)
  heads = hf.task_heads('Olmo2', only=('sequence',))
