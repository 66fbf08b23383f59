"""OLMo 3: OLMo 2 whose layers see a window, but every fourth (OLMo Team 2025b,
section 3.2).

  q, k = RMSNorm(W_q x), RMSNorm(W_k x)   over all heads, then turned
  a    = x + RMSNorm(Attention(x))        three layers of four: the last 4,096
  x'   = a + RMSNorm(W_down (silu(W_gate a) * W_up a))
  logits = RMSNorm(x_N) W                 a matrix of its own; no bias anywhere

For 65,536 tokens, YaRN stretches the positions of the layers that see all
alone.
"""

from architectures import olmo2
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder


class OLMo3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = olmo2.OLMo2.PARTS | dict(
      pattern='local,local,local,global',
      kinds={'local': dict(window=64), 'global': dict(window=0)})


class HF(olmo2.HF):
  model_type = 'olmo3'
  architecture = 'Olmo3ForCausalLM'
  heads = hf.heads('Olmo3', only=('sequence',))

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    # Outside of rope_parameters, transformers takes it for one kind alone.
    reader.must(rope_theta=5e5)
    local, whole = rope_fields.read_by_kind(
        reader, (layer_types.WINDOW, ('rope_theta', 5e5)),
        (layer_types.WHOLE, ('rope_theta', 5e5)))
    of_kinds = {}
    if local != whole:
      of_kinds[layer_types.WINDOW] = dict(rope=local)
    layers = fields['num_layers']
    types = layer_types.listed(reader, layers, lambda n: (n + 1) % 4)
    window = layer_types.window(reader)
    # Where all layers have a window, theirs are the positions of the model.
    return dict(rope=whole) | layer_types.read(types, layers, window, of_kinds)

  def write(self, c: ModelConfig) -> dict:
    return layer_types.write(c) | dict(
        rope_parameters=rope_fields.write_by_kind(c))
