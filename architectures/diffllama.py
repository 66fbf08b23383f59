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


def kinds_by_depth(layers: int) -> dict[str, Any]:
  """Returns the kinds and the order of `layers` layers, each of which subtracts
  another share of its second attention."""
  kinds = {}
  for n in range(layers):
    kinds[f'layer_{n}'] = dict(attention_difference=initial_lambda(n))
  return dict(pattern=','.join(kinds), prefix='', suffix='', kinds=kinds)


def initial_lambda(layer: int) -> float:
  """Returns l, the share of the second attention that layer `layer` subtracts
  at first: 0.8 - 0.6 exp(-0.3 layer)."""
  return 0.8 - 0.6 * math.exp(-0.3 * layer)


class DiffLlama(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | kinds_by_depth(4)


class HF(llama.HF):
  model_type = 'diffllama'
  architecture = 'DiffLlamaForCausalLM'
  names = llama.HF.names + llama.layer_rows(
      ('attention/difference_a1', 'K', 'self_attn.lambda_q1', 'K'),
      ('attention/difference_b1', 'K', 'self_attn.lambda_k1', 'K'),
      ('attention/difference_a2', 'K', 'self_attn.lambda_q2', 'K'),
      ('attention/difference_b2', 'K', 'self_attn.lambda_k2', 'K'))
  fields = hf.drop_entries(llama.HF.fields, 'ffn_bias') | (
      hf.fields_with_defaults(
          hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
          intermediate_size=8192, rms_norm_eps=1e-5))
  only = {}
  fields_without_effect = ('lambda_std_dev',)  # It says how weights are drawn.
  heads = hf.task_heads('DiffLlama', tokens='score', span=llama.SPAN_PREFIXES)

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    """Translates a Hugging Face config.json to fields of our config.model.
    Fields that only have another name there have been looked up before.

    Args:
      reader: the fields of the file. `reader(name, default)` returns a field's
        value, or the default if the file lacks it, and marks it as read. A file
        is refused if a field that may matter was never read; `ignore_fields`
        marks fields that do not matter.
      fields: the fields of config.model that have been looked up.

    Returns:
      Further fields of config.model, by name. Groups, such as rope, are dicts.
      They replace fields of the same name in `fields`.
    """
    layer_types.check_number_of_layers('num_hidden_layers',
                                       fields['num_layers'])
    model_fields = super().read(reader, fields)  # LLaMA's: rotary positions
    model_fields |= kinds_by_depth(fields['num_layers'])
    return model_fields
