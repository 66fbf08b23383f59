"""LFM3, dense: LFM2 with longer convolutions, a window in half of the layers
that attend, gates, and norms before and after each part (Liquid AI 2026, as
transformers has it).

  a  = x + n(ShortConv(n(x)))             in half of the layers, over 7 tokens
  a  = x + n(W_o (sigmoid(W_g m)_h Attention_h(q, k, W_v m)))
       q, k = n(W_q m), n(W_k m)          in the others, m = n(x)
  x' = a + n(W_down (silu(W_gate m) * W_up m)),  m = n(a)
  logits = n(x_N) E^T                     n is RMSNorm; no bias anywhere

Positions turn by theta 10,000 in a window of 256 tokens, and by 1,000,000 where
all are seen, where the first half of a head's pairs turns: rope.proportional.
"""

from architectures import lfm2, llama, phi3
from architectures.lfm2 import CONV
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder
from common.errors import require

NAMES = layer_types.NAMES | {CONV: CONV}  # our kinds of layer
ROPES = {layer_types.WINDOW: dict(theta=1e4, fraction=1.0, proportional=False),
         layer_types.WHOLE: dict(theta=1e6, fraction=0.5, proportional=True)}


def _kinds(window: int, rope: dict) -> dict:
  """Returns model.kinds, by the positions of layers with a window."""
  return {CONV: dict(mixer='short_conv'), 'global': dict(window=0),
          'local': dict(window=window, rope=rope)}


class LFM3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = lfm2.LFM2.PARTS | dict(
      block='sandwich', attention_gate='headwise', short_conv=dict(kernel=7),
      rope=ROPES[layer_types.WHOLE], pattern='local,conv,global,conv',
      kinds=_kinds(128, ROPES[layer_types.WINDOW]))


def _usual_type(n: int) -> str:
  """Returns the type of layer n where a config.json does not say."""
  if n == 0 or n % 2 == 1:
    return CONV
  return layer_types.WHOLE if n % 4 == 2 else layer_types.WINDOW

class HF(lfm2.HF):
  model_type = 'lfm3'
  architecture = 'Lfm3ForCausalLM'
  names = lfm2.names('o_proj', 'norm') + llama.layers(
      ('attention_out_norm/scale', 'D', 'post_operator_norm.weight', 'D'),
      ('ffn_out_norm/scale', 'D', 'post_ffn_norm.weight', 'D'),
      ('attention/output_gate', 'DH', 'self_attn.gate_proj.weight', 'H D'))
  fields = lfm2.HF.fields | hf.fields(
      hidden_size=2048, num_hidden_layers=24, num_attention_heads=16,
      num_key_value_heads=4, head_dim=128, intermediate_size=7680,
      vocab_size=128000, tie_word_embeddings=True) | {
          'short_conv.kernel': ('conv_L_cache', 7),
          'block': ('use_sandwich_norm', True,
                    {True: 'sandwich', False: 'pre_norm'}),
          'attention_gate': ('use_attention_gate', True,
                             {True: 'headwise', False: 'none'})}
  only = dict(rope_scaling=None)

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    layers = fields['num_layers']
    layer_types.check_number('num_hidden_layers', layers)
    types = layer_types.each(reader, 'layer_types', layers, NAMES)
    if not types:
      types = [_usual_type(n) for n in range(layers)]
    has_window = not reader.is_null('sliding_window')
    require(has_window or layer_types.WINDOW not in types, 'config.json has '
            f'layers of {layer_types.WINDOW} in layer_types, but no '
            'sliding_window')
    window = reader('sliding_window', 256)
    local, whole = ROPES[layer_types.WINDOW], ROPES[layer_types.WHOLE]
    if reader.has('rope_parameters'):
      local, whole = rope_fields.read_by_kind(
          reader, (layer_types.WINDOW, ('rope_theta', 1e6)),
          (layer_types.WHOLE, ('rope_theta', 1e6)))
    names = [NAMES[word] for word in types]
    return layer_types.named(names, _kinds(window, local)) | dict(rope=whole)

  def write(self, c: ModelConfig) -> dict:
    types = [CONV if layer.mixer == 'short_conv' else layer_types.type_of(layer)
             for layer in c.layers(c.num_layers)]
    return layer_types.write(c) | dict(
        layer_types=types, rope_parameters=rope_fields.write_by_kind(c),
        **dict.fromkeys(phi3.IDS))
