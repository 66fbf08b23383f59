"""GPT-4 as it is rumoured to be. OpenAI has published nothing of its wiring
(OpenAI 2023, section 2: "no further details"); all here is hearsay.

  GPT, whose feed-forward network is one of 16, two for each token:
  x' = a + sum over the 2 chosen experts of gate_e * FFN_e(LayerNorm(a))

The architecture is named `gpt4-rumoured` wherever it is printed. The figures,
and what contradicts itself in them, stand in configs/gpt4.py. There is no
reference to be equal to.
"""

from architectures import gpt
from architectures.parts.skeletons import Decoder


class RumouredGPT4(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  ARCH = 'gpt4-rumoured'
  PARTS = gpt.GPT.PARTS | dict(
      ffn='moe', moe=dict(router='topk', top_k=2, ffn='gelu_tanh'))
