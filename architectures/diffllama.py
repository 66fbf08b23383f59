"""DiffLlama: LLaMA whose heads attend in pairs, by the difference of what the
two weigh (Ye et al. 2024, "Differential Transformer", arXiv 2410.05258; in
transformers by a developer of the community).

  a   = x + W_o (1 - l) n((A_1 - lambda A_2) [v_1, v_2])    of RMSNorm(x)
  l   = 0.8 - 0.6 exp(-0.3 n)                       in layer n = 0, 1, ...
  x'  = a + W_down (silu(W_gate m) * W_up m),       m = RMSNorm(a)
  logits = RMSNorm(x_N) W

parts/attention/multi_head.py has lambda and n. As each layer has its own l, it
is a kind of its own, and no layers are scanned.
"""

import math
from typing import Any

from architectures import llama
from architectures.parts import hf
from architectures.parts.hf import layer_types
from architectures.parts.skeletons import Decoder


def by_depth(layers: int) -> dict[str, Any]:
  """Returns the kinds of so many layers, and their order."""
  kinds = {f'layer_{n}': dict(attention_difference=share(n))
           for n in range(layers)}
  return dict(pattern=','.join(kinds), prefix='', suffix='', kinds=kinds)


def share(layer: int) -> float:
  """Returns l."""
  return 0.8 - 0.6 * math.exp(-0.3 * layer)


class DiffLlama(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | by_depth(4)


class HF(llama.HF):
  model_type = 'diffllama'
  architecture = 'DiffLlamaForCausalLM'
  names = llama.HF.names + llama.layers(*(
      (f'attention/difference_{ours}', 'K', f'self_attn.lambda_{theirs}', 'K')
      for ours, theirs in (('a1', 'q1'), ('b1', 'k1'), ('a2', 'q2'),
                           ('b2', 'k2'))))
  fields = hf.without(llama.HF.fields, 'ffn_bias') | hf.fields(
      hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
      intermediate_size=8192, rms_norm_eps=1e-5)
  only = {}
  unread = ('lambda_std_dev',)  # It says how weights are drawn.
  heads = hf.heads('DiffLlama', tokens='score', span=llama.SPAN)

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    layer_types.check_number('num_hidden_layers', fields['num_layers'])
    return super().read(reader, fields) | by_depth(fields['num_layers'])
