"""OLMo 3: OLMo 2 whose layers see a window, but every fourth (OLMo Team 2025b,
section 3.2).

  q, k = RMSNorm(W_q x), RMSNorm(W_k x)   over all heads, then turned
  a    = x + RMSNorm(Attention(x))        three layers of four: the last 4,096
  x'   = a + RMSNorm(W_down (silu(W_gate a) * W_up a))
  logits = RMSNorm(x_N) W                 a matrix of its own; no bias anywhere

For 65,536 tokens, YaRN stretches the positions of the layers that see all
alone.
"""

from architectures import llama
from architectures import olmo2
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder


class OLMo3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = olmo2.OLMo2.PARTS | dict(
      pattern='local,local,local,global',
      kinds={'local': dict(window=64), 'global': dict(window=0)})


def _read(reader: hf.Reader, fields: dict) -> dict:
  # Outside of rope_parameters, transformers takes it for one kind alone.
  reader.must(rope_theta=5e5)
  local, whole = rope_fields.read_by_kind(
      reader, (layer_types.WINDOW, ('rope_theta', 5e5)),
      (layer_types.WHOLE, ('rope_theta', 5e5)))
  layers = fields['num_layers']
  reader.passes('layer_types')
  types = reader.listed('layer_types') if reader.has('layer_types') else [
      layer_types.WINDOW if (n + 1) % 4 else layer_types.WHOLE
      for n in range(layers)]
  window = (0 if reader.is_null('sliding_window') else
            reader('sliding_window', 4096))
  own = {} if local == whole else {layer_types.WINDOW: dict(rope=local)}
  return dict(rope=whole) | layer_types.read(types, layers, window, own)


def _write(c: ModelConfig) -> dict:
  return layer_types.write(c) | dict(
      rope_parameters=rope_fields.write_by_kind(c))


HF = hf.HuggingFace(
    'olmo3', 'Olmo3ForCausalLM', names=olmo2.NAMES, fields=olmo2.HF.fields,
    read=_read, write=_write, tied=llama.HF.tied, spellings=llama.HF.spellings,
    ignored=llama.HF.ignored,
    heads={'sequence': hf.TaskHead('Olmo3ForSequenceClassification', 'score')})
