"""Model FLOPs of the published systems by closed formulas: the oracle of what
training/costs/flops.py counts in the traced program.

A product of [a, b] and [b, c] is 2abc. A causal query at position i attends to
its i + 1 keys, a banded one to its window. A token counts with the experts that
its router chooses.
"""

import architectures
from architectures.parts.moe import routing

GATED = ('reglu', 'geglu', 'geglu_tanh', 'swiglu', 'swiglu_clamped')


def forward_flops(model, length: int, decoder_length: int = 0) -> dict:
  """Returns the FLOPs of a forward pass over one sequence, by part."""
  c = architectures.resolve(model)
  if decoder_length:
    return _sum(
        _stack(c, c.layer_kinds(c.num_layers, causal=False), length),
        _stack(c, c.layer_kinds(c.num_decoder_layers, cross=True),
               decoder_length, length),
        {'head': _head(c, decoder_length)})
  head = _head(c, length)
  causal = architectures.stack(c) == 'decoder'
  if not causal:  # the transform, the pooler, and the next sentence
    head += 2.0 * c.d_model * (c.d_model * length
                               + c.next_sentence * (c.d_model + 2))
  return _sum(_stack(c, c.layer_kinds(c.num_layers, causal=causal), length),
              {'head': head})


def decode_flops(model, keys: int, memory: int = 0) -> dict:
  """Returns the FLOPs of one token that sees `keys` keys, itself included."""
  c = architectures.resolve(model)
  layers = c.num_decoder_layers if memory else c.num_layers
  parts = [{'head': _head(c, 1)}]
  for kind in c.layer_kinds(layers, cross=bool(memory)):
    of = c.of_kind(kind.name)
    seen = min(keys, of.sliding_window) if of.attention == 'banded' else keys
    parts += [_attention(of, 1, 1, seen), _ffn(of, kind, 1)]
    if memory:
      parts.append(_attention(of, 1, 0, memory))
  return _sum(*parts)


def _mean_keys(kind, window, length):
  reach = min(window, length) if kind.attention == 'banded' else length
  one_way = (reach * (reach + 1) / 2 + (length - reach) * reach) / length
  return one_way if kind.causal else 2 * one_way - 1


def _stack(c, kinds, length, memory=0):
  parts = []
  for kind in kinds:
    of = c.of_kind(kind.name)
    keys = _mean_keys(kind, of.sliding_window, length)
    parts += [_attention(of, length, length, keys), _ffn(of, kind, length)]
    if kind.cross:
      parts.append(_attention(of, length, memory, memory))
  return _sum(*parts)


def _attention(c, queries, sources, keys):
  """`queries` tokens look at `keys` keys each, projected from `sources`."""
  heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  gates = {'none': 0, 'headwise': c.num_heads, 'elementwise': heads}
  # What reads the keys of another layer has none to make of its own input.
  sources *= not (c.kv_sharing and queries == sources)
  return {
      'projections': 4.0 * c.d_model * (heads * queries + kv_heads * sources)
                     + 2.0 * c.d_model * queries * (
                         gates[c.attention_gate]
                         + c.value_embedding * c.num_kv_heads),
      'attention': 4.0 * heads * queries * keys,
  }


def _ffn(c, kind, tokens):
  if kind.ffn == 'none':
    return {}
  if kind.ffn != 'moe':
    return {'ffn': tokens * _dense(kind.ffn, c.d_model, c.d_ff)}
  m = c.moe
  chosen = m.top_k
  if m.router == 'expert_choice':  # as many as the experts take
    chosen = min(m.top_k * (m.capacity_factor or 1.0), m.num_experts)
  has_weight = routing.of(m).logits
  return {
      'experts': tokens * (chosen + m.shared_experts) * _dense(
          m.ffn, c.d_model, m.d_ff),
      'router': 2.0 * tokens * c.d_model * m.num_experts * has_weight,
  }


def _dense(kind, d_model, d_ff):
  return 2.0 * (3 if kind in GATED else 2) * d_model * d_ff


def _head(c, tokens):
  return 2.0 * tokens * c.d_model * c.vocab_size


def _sum(*parts):
  total = {}
  for part in parts:
    for name, value in part.items():
      total[name] = total.get(name, 0.0) + value
  return total
