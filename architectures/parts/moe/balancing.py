"""The bias on a router's choice, which a step moves and no gradient does."""

from typing import Any

import jax

from architectures.parts.config import ModelConfig
from architectures.parts.moe import routing


def update(c: ModelConfig, params: dict[str, Any], load_NE: jax.Array, applied):
  """Returns params with each router_bias moved against its load, by the rule of
  the model's router; as they are, where it has none.

  The training step calls it after the optimiser, whose gradient of a bias is
  zero.

  Args:
    c: the model.
    params: its parameters, arrays without boxes.
    load_NE: health['load_E'], by layer with experts; an encoder's first.
    applied: 0 in a step to leave out, else 1.
  """
  move = c.ffn == 'moe' and routing.of(c.moe).bias
  if not move:
    return params
  params, first = dict(params), 0
  for stack in ('encoder', 'decoder'):
    layers = dict(params.get(stack, {}).get('layers', {}))
    blocks = [f'block_{i}' for i in range(len(layers))]
    blocks = [b for b in blocks if 'router_bias' in layers[b].get('ffn', {})]
    for i, name in enumerate(blocks):
      bias_NE = layers[name]['ffn']['router_bias']
      rows = first + i + len(blocks) * jax.numpy.arange(bias_NE.shape[0])
      new_NE = move(bias_NE, load_NE[rows], applied * c.moe.bias_rate)
      layers[name] = layers[name] | {
          'ffn': layers[name]['ffn'] | {'router_bias': new_NE}}
    if blocks:
      first += len(blocks) * bias_NE.shape[0]
      params[stack] = params[stack] | {'layers': layers}
  return params
