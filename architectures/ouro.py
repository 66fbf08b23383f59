"""Ouro: LLaMA with four norms a layer, whose layers all run four times (Zhu et
al. 2025, arXiv 2510.25741, "Scaling Latent Reasoning via Looped Language
Models").

  s_0 = E[tokens]
  s_t = RMSNorm(layers(s_(t-1)))      t = 1 ... loops.passes, the same weights
  a   = x + RMSNorm(Attention(RMSNorm(x)))
  x'  = a + RMSNorm(W_down (silu(W_gate n) * W_up n)),   n = RMSNorm(a)
  logits = s_T W                      a matrix of its own; no bias anywhere

The norm between two passes is the final one. Each pass has its own keys and
values. The gate that says after each pass whether to end, and the loss over all
passes that trains it, are loops.exit_gate=True; without it the loss is of the
last pass, which the published models also use at their threshold of 1.
transformers has no such class, so weights are not read.
"""

from architectures import llama
from architectures.parts.skeletons import Decoder


class Ouro(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      block='sandwich', loop='plain', loops=dict(boundary='norm'))
