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

from collections.abc import Collection

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


def _heads(reader: hf.Reader, types: list[str], fields: dict) -> dict:
  """Returns the heads of layers that see all: transformers writes those of each
  such layer, and published files have them once."""
  # The form that published files have.
  same, kv_heads = reader('attention_k_eq_v', False), fields['num_kv_heads']
  shared_heads = reader('num_global_key_value_heads', kv_heads)
  heads = dict(head_dim=reader('global_head_dim', 512),
               num_key_value_heads=shared_heads if same else kv_heads)

  # The form that transformers writes.
  each = reader('per_layer_config', {})
  if each:
    numbers = [str(n) for n, word in enumerate(types) if word == WHOLE]
    entry = _only_entry(each, numbers, heads.keys())
    require(entry is not None, f'config.json has per_layer_config '
            f'{short(each)}: it must have the same {" and ".join(heads)} for '
            f'each layer of {WHOLE}, and nothing else')
    heads = dict(head_dim=fields['head_dim'], num_key_value_heads=kv_heads)
    heads |= entry
  return dict(keys_as_values=same, head_dim=heads['head_dim'],
              num_kv_heads=heads['num_key_value_heads'])


def _only_entry(each: dict, numbers: list[str], known: Collection[str]
                ) -> dict[str, int] | None:
  """Returns the sizes that a per_layer_config has for every layer.

  Args:
    each: the per_layer_config.
    numbers: the numbers of the layers that it must have, and no others.
    known: the names of the sizes.

  Returns:
    The sizes; None where layers differ, or something else stands there.
  """
  if each.keys() != set(numbers):
    return None
  entry = each[numbers[0]]
  if not isinstance(entry, dict) or not entry.keys() <= known:
    return None
  if any(other != entry for other in each.values()):
    return None
  if not all(type(size) is int and size > 0 for size in entry.values()):
    return None
  return entry


class HF(gemma2.HF):
  model_type = 'gemma4_text'
  architecture = 'Gemma4ForCausalLM'
  names = gemma2.names('scale') + llama.layers(
      *llama.head_norms(), ('layer_scale', 'U', 'layer_scalar', 'U'))
  fields = gemma2.HF.fields | hf.fields(
      num_hidden_layers=30, vocab_size=262144,
      max_position_embeddings=131072)
  only = dict(enable_moe_block=False, num_kv_shared_layers=0,
              rope_scaling=None, rope_theta=None,
              use_bidirectional_attention='vision')  # causal for text
  unread = ('use_double_wide_mlp', 'vocab_size_per_layer_input', 'num_experts',
            'top_k_experts', 'moe_intermediate_size')
  heads = {}

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    rows = reader.count('hidden_size_per_layer_input', 256)
    require(rows == 0, 'config.json has hidden_size_per_layer_input '
            f'{rows}, as Gemma 4 E2B and E4B have: only 0 is known here')
    layers = fields['num_layers']
    types = layer_types.listed(reader, layers, lambda n: (n + 1) % 6)
    types = [*types[:-1], WHOLE]  # the last one, whatever the file says
    local, whole = ROPES[LOCAL], ROPES[WHOLE]
    if reader.has('rope_parameters'):
      local, whole = rope_fields.read_by_kind(
          reader, (LOCAL, ('rope_theta', 1e4)), (WHOLE, ('rope_theta', 1e4)))
    kind_fields = {LOCAL: dict(rope=local),
                   WHOLE: _heads(reader, types, fields)}
    window = reader('sliding_window', 512)
    softcap = gemma2.cap(reader, 'final_logit_softcapping', 0.0)
    return layer_types.read(types, layers, window, kind_fields) | dict(
        rope=whole, logits_softcap=softcap)

  def write(self, c: ModelConfig) -> dict:
    layers = c.layers(c.num_layers)
    types = [layer_types.type_of(layer) for layer in layers]
    whole = layers[-1]
    local = layers[types.index(LOCAL)] if LOCAL in types else whole
    heads = dict(head_dim=whole.head_dim,
                 num_key_value_heads=whole.num_kv_heads)
    per_layer = {str(n): dict(heads) for n, word in enumerate(types)
                 if word == WHOLE}
    return layer_types.write(c) | dict(
        hidden_size_per_layer_input=0, head_dim=local.head_dim,
        num_key_value_heads=local.num_kv_heads,
        attention_k_eq_v=whole.part(AttentionConfig).keys_as_values,
        per_layer_config=per_layer,
        final_logit_softcapping=c.logits_softcap or None,
        rope_parameters=rope_fields.write_by_kind(c))

  def check(self, c: ModelConfig) -> None:
    """Accepts all heads, where Gemma 2 refuses some."""
