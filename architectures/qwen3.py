"""Qwen3, dense: Qwen2 without biases, and with a norm of each head of queries
and keys (Qwen Team 2025, section 2).

  q_h = RMSNorm(W_q,h n), k_h = RMSNorm(W_k,h n),  n = RMSNorm(x), then turned
  a   = x + W_o Attention(q, k, W_v n)
  x'  = a + W_down (silu(W_gate m) * W_up m),  m = RMSNorm(a)
  logits = RMSNorm(x_N) W                 W = E^T up to 4B

A head has 128 features, whatever the width is.
"""

from architectures import llama, qwen2
from architectures.parts import hf
from architectures.parts.skeletons import Decoder


class Qwen3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(qk_norm=True, qk_norm_over='head')


class HF(qwen2.HF):
  model_type = 'qwen3'
  architecture = 'Qwen3ForCausalLM'
  names = llama.HF.names + llama.layer_rows(*llama.head_norm_rows())
  fields = qwen2.FIELDS | hf.fields_with_defaults(head_dim=128,
                                                  attention_bias=False)
  only = {}
  heads = hf.task_heads('Qwen3', tokens='score', span=llama.SPAN_PREFIXES)
