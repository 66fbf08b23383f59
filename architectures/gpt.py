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

from architectures.parts.skeletons import Decoder


class GPT(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
