"""Model FLOPs by formula: what a forward pass must multiply, and no more.

A product of [a, b] and [b, c] is 2abc. Only products count. A causal query at
position i attends to its i + 1 keys, a banded one to its window, so attention
is counted as the mask has it, and the work that an implementation wastes on
masked keys, padding, idle expert slots or recomputation lowers utilisation
(MFU, Chowdhery et al. 2022, appendix B; theirs counts all keys). A token
counts with the experts that its router chooses, whether or not they have room.
A backward pass costs twice the forward: the gradient of both factors.
"""

import architectures
from architectures.parts import routing
from architectures.parts.config import DENSE_FFNS, LayerKind, MoEConfig
from configs.errors import one_of, require

# What an architecture stacks: decoder (causal), encoder, or both.
STACKS = {
    'gpt': 'decoder',
    'gpt_neox': 'decoder',
    'bloom': 'decoder',
    'llama': 'decoder',
    'mixtral': 'decoder',
    'gpt4-rumoured': 'decoder',
    'bert': 'encoder',
    'transformer': 'encoder-decoder',
    't5': 'encoder-decoder',
    'switch': 'encoder-decoder',
    'gshard': 'encoder-decoder',
}


def forward_flops(model, length: int,
                  decoder_length: int = 0) -> dict[str, float]:
  """Returns the FLOPs of a forward pass over one sequence, by part.

  Args:
    model: config.model, or the frozen ModelConfig.
    length: tokens; of the encoder, for an encoder-decoder.
    decoder_length: tokens of the decoder, for an encoder-decoder.
  """
  c = architectures.resolve(model)
  one_of('model.arch', c.arch, STACKS)
  stacks = STACKS[c.arch]
  require((stacks == 'encoder-decoder') == bool(decoder_length),
          f'decoder_length is {decoder_length} for model.arch {c.arch!r}: an '
          'encoder-decoder needs it, and nothing else has it')
  if stacks == 'encoder-decoder':
    return _sum(
        _stack(c, c.layer_pattern(causal=False), c.num_layers, length),
        _stack(c, c.layer_pattern(cross=True), c.num_decoder_layers,
               decoder_length, length),
        {'head': _head(c, decoder_length)})
  causal = stacks == 'decoder'
  head = _head(c, length)
  if c.arch == 'bert':  # the transform, the pooler, and the next sentence
    head += 2.0 * c.d_model * (c.d_model * (length + 1) + 2)
  return _sum(_stack(c, c.layer_pattern(causal=causal), c.num_layers, length),
              {'head': head})


def forward_flops_per_token(model, length: int,
                            decoder_length: int = 0) -> float:
  """Returns the mean over a sequence's tokens, both sides counted."""
  total = sum(forward_flops(model, length, decoder_length).values())
  return total / (length + decoder_length)


def training_flops_per_token(model, length: int,
                             decoder_length: int = 0) -> float:
  """Forward and backward: three times the forward pass."""
  return 3 * forward_flops_per_token(model, length, decoder_length)


def decode_flops(model, keys: int, memory: int = 0) -> dict[str, float]:
  """Returns the FLOPs of one token that sees `keys` keys, itself included.

  Args:
    model: config.model, of a system with a decoder.
    keys: its position plus one.
    memory: tokens of the encoder, whose keys and values are kept.
  """
  c = architectures.resolve(model)
  one_of('model.arch', c.arch, STACKS)
  require(STACKS[c.arch] != 'encoder', f'model.arch {c.arch!r} has no decoder')
  cross = STACKS[c.arch] == 'encoder-decoder'
  require(cross == bool(memory), f'memory is {memory} for model.arch '
          f'{c.arch!r}: an encoder-decoder needs it, and nothing else has it')
  layers = c.num_decoder_layers if cross else c.num_layers
  parts = [{'head': _head(c, 1)}]
  for kind in _layers(c.layer_pattern(cross=cross), layers):
    seen = min(keys, c.sliding_window) if kind.attention == 'banded' else keys
    parts += [_attention(c, 1, 1, seen), _ffn(c, kind, 1)]
    if cross:
      parts.append(_attention(c, 1, 0, memory))
  return _sum(*parts)


def mean_keys(kind: LayerKind, window: int, length: int) -> float:
  """Returns how many keys a query sees, in the mean over a sequence."""
  reach = min(window, length) if kind.attention == 'banded' else length
  # Of the i + 1 keys up to its own a query sees `reach` at most; so in both
  # directions, its own once.
  one_way = (reach * (reach + 1) / 2 + (length - reach) * reach) / length
  return one_way if kind.causal else 2 * one_way - 1


def _stack(c, pattern, num_layers, length, memory=0):
  parts = []
  for kind in _layers(pattern, num_layers):
    keys = mean_keys(kind, c.sliding_window, length)
    parts += [_attention(c, length, length, keys), _ffn(c, kind, length)]
    if kind.cross:
      parts.append(_attention(c, length, memory, memory))
  return _sum(*parts)


def _layers(pattern, num_layers):
  return pattern * (num_layers // len(pattern))


def _attention(c, queries, sources, keys):
  """`queries` tokens look at `keys` keys each, projected from `sources`."""
  heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  return {
      'projections': 4.0 * c.d_model * (heads * queries + kv_heads * sources),
      'attention': 4.0 * heads * queries * keys,
  }


def _ffn(c, kind, tokens):
  if kind.ffn != 'moe':
    return {'ffn': tokens * _dense(kind.ffn, c.d_model, c.d_ff)}
  m = c.moe
  active = active_experts(m) + m.shared_experts
  _, has_weight = routing.ROUTERS[m.router]
  return {
      'experts': tokens * active * _dense(m.ffn, c.d_model, m.d_ff),
      'router': 2.0 * tokens * c.d_model * m.num_experts * has_weight,
  }


def active_experts(m: MoEConfig) -> float:
  """Returns how many of the routed experts a token goes through, in the mean.
  """
  if m.router == 'expert_choice':  # as many as the experts take
    return min(m.top_k * (m.capacity_factor or 1.0), m.num_experts)
  return m.top_k


def _dense(kind, d_model, d_ff):
  one_of('model.ffn', kind, DENSE_FFNS)
  matrices = 3 if kind in ('geglu', 'geglu_tanh', 'swiglu') else 2
  return 2.0 * matrices * d_model * d_ff


def _head(c, tokens):
  return 2.0 * tokens * c.d_model * c.vocab_size


def _sum(*parts):
  """Adds dicts key by key."""
  total = {}
  for part in parts:
    for name, value in part.items():
      total[name] = total.get(name, 0.0) + value
  return total
