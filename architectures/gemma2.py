"""Gemma 2: a decoder with a norm before and after each part, and layers that
see a window and the whole text in turn (Gemma Team 2024, section 2).

  x_0 = E[tokens] sqrt(D)
  a   = x + n(Attention(n(x)))      n(x) = x / rms(x) * (1 + offset)
  x'  = a + n(W_down (gelu(W_gate m) * W_up m)),  m = n(a)
  scores = 50 tanh(q k / (50 s)),  logits = 30 tanh(n(x_N) E^T / 30)

s is sqrt(K), but in 27B sqrt(D / H). The first layer of two sees 4,096 tokens.
"""

from typing import Any

from architectures import llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.skeletons import Decoder
from common.errors import require


class Gemma2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      norm='rmsnorm_1p', block='sandwich', attention_softcap=50.0,
      pattern='local,global',
      kinds={'local': dict(window=128), 'global': dict(window=0)},
      ffn='geglu_tanh', tie_embeddings=True, embed_scale=0.0,
      logits_softcap=30.0)


def read_layers(reader: hf.Reader, fields: dict, every: int, **of_kinds: Any
                ) -> dict:
  """Returns the kinds of layer; without layer_types, the last of every so many
  sees all. `of_kinds` are further arguments of layer_types.read."""
  layers = fields['num_layers']
  types = layer_types.listed(reader, layers, lambda n: (n + 1) % every)
  window = reader('sliding_window', 4096)
  return layer_types.read(types, layers, window, **of_kinds)


def read_scales(reader: hf.Reader, softcap: float = 30.0) -> dict:
  """Returns the factor on the scores of Gemma 2 and 3, and the bound of their
  logits."""
  return dict(
      attention_scale=reader('query_pre_attn_scalar', 256) ** -0.5,
      logits_softcap=cap(reader, 'final_logit_softcapping', softcap))


def cap(reader: hf.Reader, name: str, default: float) -> float:
  """Returns a bound, of which null says that there is none."""
  reader.passes(name)
  if reader.is_null(name):
    return 0.0
  if not reader.has(name):
    return default
  bound = reader(name, default)
  require(bound > 0, f'config.json has {name} {bound}: it must be > 0, or null')
  return bound


def write_scales(c: ModelConfig) -> dict:
  """Returns the fields of a config.json that `read_scales` reads."""
  return dict(query_pre_attn_scalar=round(c.attention_scale ** -2),
              final_logit_softcapping=c.logits_softcap or None)


def names(norm: str = 'offset') -> tuple[hf.Row, ...]:
  """Returns the rows; `norm` is our parameter of a norm."""
  theirs = {'attention_norm': 'input_layernorm',
            'attention_out_norm': 'post_attention_layernorm',
            'ffn_norm': 'pre_feedforward_layernorm',
            'ffn_out_norm': 'post_feedforward_layernorm'}
  norms = [(f'{ours}/{norm}', 'D', f'{name}.weight', 'D')
           for ours, name in theirs.items()]
  network = hf.under('ffn', 'mlp', *llama.FFN)
  layers = llama.layers(*norms, *llama.attention(), *network)
  return *llama.ends(norm), *layers


class HF(llama.Family):
  model_type = 'gemma2'
  architecture = 'Gemma2ForCausalLM'
  names = names()
  fields = hf.fields(
      hidden_size=2304, num_hidden_layers=26, num_attention_heads=8,
      num_key_value_heads=4, head_dim=256, intermediate_size=9216,
      vocab_size=256000, max_position_embeddings=8192, rms_norm_eps=1e-6,
      attention_bias=False, tie_word_embeddings=True) | {
          'ffn': ('hidden_activation', 'gelu_pytorch_tanh', hf.GATED)}
  only = dict(use_bidirectional_attention=False)
  heads = hf.heads(
      'Gemma2', tokens='score', only=('sequence', 'tokens'))

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    softcap = cap(reader, 'attn_logit_softcapping', 50.0)
    ours = read_layers(reader, fields, every=2)
    ours |= read_scales(reader)
    ours |= super().read(reader, fields)
    return ours | dict(attention_softcap=softcap)

  def write(self, c: ModelConfig) -> dict:
    return write_scales(c) | layer_types.write(c) | super().write(c) | dict(
        attn_logit_softcapping=c.attention_softcap or None)

  def check(self, c: ModelConfig) -> None:
    hf.check_heads(c)
