"""Mistral 7B: LLaMA with grouped heads, whose layers see a window (Jiang et al.
2023, section 2).

  a   = x + Attention(RMSNorm(x))         a query sees the last 4,096 keys
  x'  = a + W_down (silu(W_gate n) * W_up n),  n = RMSNorm(a)
  logits = RMSNorm(x_N) W                 a matrix of its own; no bias anywhere

What stands n windows back still reaches a token through n layers. From version
0.2 on there is no window: `model.attention=global`.
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder


class Mistral(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', norm='rmsnorm', block='pre_norm',
               attention='banded', attention_bias=False,
               ffn='swiglu', ffn_bias=False, tie_embeddings=False)


def _read(reader: hf.Reader, fields: dict) -> dict:
  # Left out, it is 4096; null, there is none.
  window = (0 if reader.is_null('sliding_window') else
            reader('sliding_window', 4096))
  return dict(rope=rope_fields.read(reader), sliding_window=window,
              attention='banded' if window else 'global')


def _write(c: ModelConfig) -> dict:
  banded = c.attention == 'banded'
  return dict(rope_parameters=rope_fields.write(c),
              sliding_window=c.sliding_window if banded else None)


# LLaMA's, but those of biases, which transformers does not read here.
FIELDS = {name: row for name, row in llama.HF.fields.items()
          if name not in ('attention_bias', 'ffn_bias')}

HF = hf.HuggingFace(
    'mistral', 'MistralForCausalLM', names=llama.HF.names,
    fields=FIELDS | {
        'num_kv_heads': ('num_key_value_heads', 8),
        'd_ff': ('intermediate_size', 14336),
        'max_len': ('max_position_embeddings', 131072)},
    read=_read, write=_write, tied=llama.HF.tied, spellings=llama.HF.spellings,
    ignored=llama.HF.ignored, heads=hf.heads('Mistral', tokens='score'))
