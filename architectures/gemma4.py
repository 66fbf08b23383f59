"""Gemma 4, dense and of text: Gemma 3 with larger heads where the whole text
is seen, whose values are their keys (Google 2026, as transformers has it).

  a   = x + n(W_o Attention(q, k, v))     scores times 1, m = n(x)
        q, k = n(W_q m), n(W_k m)         each head by itself, then turned
        v = W_v m / rms(W_v m)            in a window
        v = W_k m / rms(W_k m)            in the sixth layer, which sees all
  x'  = s (a + n(W_down (gelu(W_gate m') * W_up m'))),  m' = n(a)
  logits = 30 tanh(n(x_N) E^T / 30)       x_0 = E[tokens] sqrt(D)

n is RMSNorm and s a number of each layer. Positions turn by theta 10,000 in a
window, and by 1,000,000 in the whole text, where a quarter of a head's pairs
turns: rope.proportional. What E2B, E4B and 26B-A4B have beside this is refused.
"""

from architectures import gemma2, gemma3, llama
from architectures.parts import hf
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder
from common.errors import require, short

LOCAL, WHOLE = layer_types.WINDOW, layer_types.WHOLE
ROPES = {LOCAL: dict(theta=1e4, fraction=1.0, proportional=False),
         WHOLE: dict(theta=1e6, fraction=0.25, proportional=True)}


class Gemma4(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = gemma3.Gemma3.PARTS | dict(
      norm='rmsnorm', attention_scale=1.0, value_norm=True, layer_scale=True,
      logits_softcap=30.0, rope=ROPES[WHOLE],
      kinds={'local': dict(window=128, rope=ROPES[LOCAL]),
             'global': dict(window=0, keys_as_values=True)})


def _read(reader: hf.Reader, fields: dict) -> dict:
  rows = reader.count('hidden_size_per_layer_input', 256)
  require(rows == 0, f'config.json has hidden_size_per_layer_input {rows}, as '
          'Gemma 4 E2B and E4B have: only 0 is known here')
  layers, ropes = fields['num_layers'], ROPES
  types = [*layer_types.listed(reader, layers, lambda n: (n + 1) % 6)[:-1],
           WHOLE]  # the last one, whatever the file says
  if reader.has('rope_parameters'):
    ropes = dict(zip(ROPES, rope_fields.read_by_kind(
        reader, *((word, ('rope_theta', 1e4)) for word in ROPES))))
  return layer_types.read(
      types, layers, reader('sliding_window', 512), kind_fields={
          LOCAL: dict(rope=ropes[LOCAL]), WHOLE: _heads(reader, types, fields)
      }) | dict(rope=ropes[WHOLE], logits_softcap=gemma2.cap(
          reader, 'final_logit_softcapping', 0.0))


def _heads(reader: hf.Reader, types: list[str], fields: dict) -> dict:
  """Returns the heads of layers that see all: transformers writes those of each
  such layer, and published files have them once."""
  same, heads = reader('attention_k_eq_v', False), fields['num_kv_heads']
  several = reader('num_global_key_value_heads', heads)
  once = dict(head_dim=reader('global_head_dim', 512),
              num_key_value_heads=several if same else heads)
  each = reader('per_layer_config', {})
  numbers = [str(n) for n, word in enumerate(types) if word == WHOLE]
  entries = [each.get(number, {}) for number in numbers]
  require(not each or each.keys() == set(numbers) and all(
      isinstance(entry, dict) and entry == entries[0]
      and entry.keys() <= once.keys() and all(
          type(x) is int and x > 0 for x in entry.values())
      for entry in entries), f'config.json has per_layer_config {short(each)}: '
          f'it must have the same {" and ".join(once)} for each layer of '
          f'{WHOLE}, and nothing else')
  if each:
    once = dict(head_dim=fields['head_dim'], num_key_value_heads=heads) | (
        entries[0])
  return dict(keys_as_values=same, head_dim=once['head_dim'],
              num_kv_heads=once['num_key_value_heads'])


def _write(c: ModelConfig) -> dict:
  layers = c.layers(c.num_layers)
  whole = layers[-1]
  local = next((layer for layer in layers
                if layer_types.type_of(layer) == LOCAL), whole)
  return layer_types.write(c) | dict(
      hidden_size_per_layer_input=0, head_dim=local.head_dim,
      num_key_value_heads=local.num_kv_heads,
      attention_k_eq_v=whole.part(AttentionConfig).keys_as_values,
      per_layer_config={
          str(n): dict(head_dim=whole.head_dim,
                       num_key_value_heads=whole.num_kv_heads)
          for n, layer in enumerate(layers)
          if layer_types.type_of(layer) == WHOLE},
      final_logit_softcapping=c.logits_softcap or None,
      rope_parameters=rope_fields.write_by_kind(c))


HF = gemma2.HF._replace(
    model_type='gemma4_text', architecture='Gemma4ForCausalLM',
    names=gemma2.names('scale') + llama.layers(
        *llama.head_norms(), ('layer_scale', 'U', 'layer_scalar', 'U')),
    fields=gemma2.HF.fields | hf.fields(
        num_hidden_layers=30, vocab_size=262144,
        max_position_embeddings=131072),
    only=dict(enable_moe_block=False, num_kv_shared_layers=0,
              rope_scaling=None, rope_theta=None,
              use_bidirectional_attention='vision'),  # causal for text
    unread=('use_double_wide_mlp', 'vocab_size_per_layer_input', 'num_experts',
            'top_k_experts', 'moe_intermediate_size'),
    read=_read, write=_write, check=lambda c: None, heads={})
