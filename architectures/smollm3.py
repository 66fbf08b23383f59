"""SmolLM3: LLaMA with grouped heads, and with no positions in every fourth
layer (Hugging Face 2025, "SmolLM3: smol, multilingual, long-context reasoner";
layers without positions: Yang et al. 2025, arXiv 2501.18795).

  q, k = W_q n, W_k n,  n = RMSNorm(x)    turned, but in every fourth layer
  a    = x + W_o Attention(q, k, W_v n)
  x'   = a + W_down (silu(W_gate m) * W_up m),  m = RMSNorm(a)
  logits = RMSNorm(x_N) E^T               tied; no bias anywhere

The layers without positions know them by the causal mask and the layers below.
A config.json names them one by one (no_rope_layers, 0) or says that each n-th
is one, and may give layers a window; the published one does not.
"""

from architectures import llama, phi3
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder


class SmolLM3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      pattern='rope,rope,rope,nope', tie_embeddings=True,
      kinds={'rope': {}, 'nope': dict(position='none')})


def _layers(types: list[str], turned: list[int], window: int) -> dict:
  """Returns the kinds of layer.

  Args:
    types: layer_types of the config.json.
    turned: no_rope_layers, 1 for each layer that has positions.
    window: how many tokens the layers with a window see.
  """
  plain = layer_types.read(types, len(turned), window)
  if len(set(turned)) == 1:
    return plain | dict(position='rope' if turned[0] else 'none')
  names, kinds = [], {}
  for word, has_positions in zip(types, turned):
    name, kind = 'rope', {}
    if not has_positions:
      name = 'nope'
      kind['position'] = 'none'
    if word == layer_types.WINDOW:
      name += '_local'
      kind['window'] = window
    elif layer_types.WINDOW in types:
      kind['window'] = 0
    names.append(name)
    kinds[name] = kind
  return layer_types.shortest(names) | dict(
      position='rope', attention='global', sliding_window=0, kinds=kinds)


class HF(llama.Family):
  model_type = 'smollm3'
  architecture = 'SmolLM3ForCausalLM'
  names = llama.HF.names
  fields = llama.HF.fields | hf.fields(
      hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
      num_key_value_heads=4, vocab_size=128256, max_position_embeddings=32768,
      tie_word_embeddings=True)
  heads = hf.heads('SmolLM3', tokens='score', span=llama.SPAN)

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    layers = fields['num_layers']
    turned = layer_types.turned(reader, layers)
    window = 0
    if reader.has('sliding_window'):
      window = reader('sliding_window', 4096)
    if not reader('use_sliding_window', False):
      window = 0
    types = layer_types.listed(
        reader, layers, lambda n: window and not turned[n])
    ours = _layers(types, turned, window)
    if reader.is_null('num_key_value_heads'):  # left out, there are 4
      ours['num_kv_heads'] = fields['num_heads']
    ours['rope'] = rope_fields.read(reader, theta=('rope_theta', 2e6))
    return ours

  def write(self, c: ModelConfig) -> dict:
    layers = c.layers(c.num_layers)
    turned = [layer for layer in layers if layer.position == 'rope']
    # Where no layer is turned, it says how one would be.
    rope = rope_fields.write(turned[0] if turned else c)
    tree = layer_types.write(c)
    return tree | dict(
        # Left out, they are those of a vocabulary of 128,256.
        **dict.fromkeys(phi3.IDS),
        rope_parameters=rope,
        no_rope_layers=[int(layer.position == 'rope') for layer in layers],
        use_sliding_window=layer_types.WINDOW in tree['layer_types'])
