"""Qwen2 and Qwen2.5: LLaMA with grouped heads, and with biases of queries, keys
and values alone (Yang et al. 2024, section 2.2; Qwen Team 2024, section 2).

  q, k, v = W_q n + b_q, W_k n + b_k, W_v n + b_v,  n = RMSNorm(x)
  a   = x + W_o Attention(q, k, v)        q and k turned by their position
  x'  = a + W_down (silu(W_gate m) * W_up m),  m = RMSNorm(a)
  logits = RMSNorm(x_N) W                 W = E^T in the smaller sizes

A config.json may give the layers from max_window_layers on a window, or say it
layer by layer; no published one does.
"""

from typing import Any

from architectures import llama
from architectures import mistral
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder


class Qwen2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', norm='rmsnorm', block='pre_norm',
               attention='global', attention_bias=True,
               attention_out_bias=False, ffn='swiglu', ffn_bias=False,
               tie_embeddings=False)


def read(reader: hf.Reader, fields: dict) -> dict[str, Any]:
  """Returns the fields that Qwen2 and Qwen3 do not name one by one."""
  layers = fields['num_layers']
  window = (0 if reader.is_null('sliding_window') else
            reader('sliding_window', 4096))
  window *= reader('use_sliding_window', False)
  first = reader('max_window_layers', 28)
  reader.passes('layer_types')
  types = reader.listed('layer_types') if reader.has('layer_types') else [
      layer_types.WINDOW if window and n >= first else layer_types.WHOLE
      for n in range(layers)]
  found = dict(rope=rope_fields.read(reader)) | layer_types.read(
      types, layers, window)
  if reader.is_null('num_key_value_heads'):  # left out, there are 32
    found['num_kv_heads'] = fields['num_heads']
  return found


def write(c: ModelConfig) -> dict[str, Any]:
  """Returns the same for a config.json."""
  tree = layer_types.write(c)
  windows = [n for n, word in enumerate(tree['layer_types'])
             if word == layer_types.WINDOW]
  return tree | dict(rope_parameters=rope_fields.write(c),
                     use_sliding_window=bool(windows),
                     max_window_layers=min(windows, default=c.num_layers))


FIELDS = mistral.FIELDS | {
    'num_kv_heads': ('num_key_value_heads', 32),
    'd_ff': ('intermediate_size', 22016),
    'vocab_size': ('vocab_size', 151936),
    'max_len': ('max_position_embeddings', 32768)}

HF = hf.HuggingFace(
    'qwen2', 'Qwen2ForCausalLM',
    names=tuple(row for row in llama.HF.names
                if row[0] != 'decoder/layers/attention/out_bias'),
    fields=FIELDS,
    # Published files say so; transformers reads it in Qwen2-VL alone.
    only=dict(use_mrope=False),
    read=read, write=write, tied=llama.HF.tied,
    spellings=llama.HF.spellings, ignored=llama.HF.ignored,
    heads=hf.heads('Qwen2', tokens='score', span=('model.', 'transformer.')))
