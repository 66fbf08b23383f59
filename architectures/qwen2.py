"""Qwen2 and Qwen2.5: LLaMA with grouped heads, and with biases of queries, keys
and values alone (Yang et al. 2024, section 2.2; Qwen Team 2024, section 2).

  q, k, v = W_q n + b_q, W_k n + b_k, W_v n + b_v,  n = RMSNorm(x)
  a   = x + W_o Attention(q, k, v)        q and k turned by their position
  x'  = a + W_down (silu(W_gate m) * W_up m),  m = RMSNorm(a)
  logits = RMSNorm(x_N) W                 W = E^T in the smaller sizes

A config.json may give the layers from max_window_layers on a window, or say it
layer by layer; no published one does.
"""

from architectures import llama, mistral
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.skeletons import Decoder


class Qwen2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(attention_bias=True,
                                   attention_out_bias=False)


FIELDS = mistral.FIELDS | hf.fields(
    num_key_value_heads=32, intermediate_size=22016, vocab_size=151936,
    max_position_embeddings=32768)


class HF(llama.Family):
  model_type = 'qwen2'
  architecture = 'Qwen2ForCausalLM'
  names = tuple(row for row in llama.HF.names
                if row[0] != 'decoder/layers/attention/out_bias')
  fields = FIELDS
  # Published files say so; transformers reads it in Qwen2-VL alone.
  only = dict(use_mrope=False)
  heads = hf.heads('Qwen2', tokens='score', span=llama.SPAN)

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    layers = fields['num_layers']
    first = reader.count('max_window_layers', 28)
    window = layer_types.window(reader)
    if not reader('use_sliding_window', False):
      window = 0
    types = layer_types.listed(reader, layers, lambda n: window and n >= first)
    ours = super().read(reader, fields)
    ours |= layer_types.read(types, layers, window)
    if reader.is_null('num_key_value_heads'):  # left out, there are 32
      ours['num_kv_heads'] = fields['num_heads']
    return ours

  def write(self, c: ModelConfig) -> dict:
    tree = layer_types.write(c)
    windows = [n for n, word in enumerate(tree['layer_types'])
               if word == layer_types.WINDOW]
    return tree | super().write(c) | dict(
        use_sliding_window=bool(windows),
        max_window_layers=min(windows, default=c.num_layers))
