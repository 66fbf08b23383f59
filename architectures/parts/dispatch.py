"""Where the experts are computed: here, on this device."""

from typing import Optional

import jax

from architectures.parts import routing
from architectures.parts.config import MoEConfig
from architectures.parts.experts import Dropout, WAYS, Weights


def way(m: MoEConfig, factor: float) -> str:
  """The way of `auto`: a batch of padded experts, or groups without a bound."""
  if m.dispatch != 'auto':
    return m.dispatch
  return 'sorted' if factor else 'dropless'


def experts(m: MoEConfig, x_TD: jax.Array, routed: routing.Routing, w: Weights,
            groups: int, dropout: Optional[Dropout], *, train: bool):
  """Returns (y_TD, kept_A: the assignments that found room)."""
  factor = m.capacity_factor if train else m.eval_capacity_factor
  T, E = x_TD.shape[0], m.num_experts
  if routed.choices and factor:
    slots = routing.capacity(factor, T // groups, routed.choices, E)
    routed = routed.replace(expert_A=routing.limit(
        routed.expert_A, choices=routed.choices, groups=groups, slots=slots,
        experts=E))
    slots = min(T, groups * slots)
  elif routed.choices:
    slots = T
  else:
    slots = routed.expert_A.shape[0] // E
  y_TD = WAYS[way(m, factor)](x_TD, routed, w, m.ffn, slots, dropout)
  return y_TD, routed.expert_A < E


def expert_shards() -> int:
  """Over how many devices the experts are spread."""
  return 1
