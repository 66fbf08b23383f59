"""Routing that is limited to some groups of experts.

Where each group of experts lies on a node, a token then crosses to top_groups
nodes at most. The experts stand in expert_groups equal groups, of which a token
has the top_groups best to choose from. A group is as good as

topk       its best expert (DeepSeek-V2, 2024, section 2.2.2: with a group on
           each device; group_limited_greedy in its code).
sigmoid    its two best experts together, by score + router_bias (DeepSeek-V3,
           2024, section 2.1.2, as its code has it: noaux_tc. The paper's number
           is top_k / top_groups, which is 2 there).
"""

import jax
import jax.numpy as jnp

from architectures.parts.moe.config import MoEConfig
from configs.errors import require


def limit(m: MoEConfig, scores_TE: jax.Array, *, best: int) -> jax.Array:
  """Returns the scores to choose by: -inf outside of a token's groups.

  Args:
    m: the config.
    scores_TE: of the experts.
    best: so many experts of a group are added up to its own score: 1 or 2.
  """
  if m.expert_groups <= m.top_groups:
    return scores_TE
  shape = (scores_TE.shape[0], m.expert_groups, -1)
  each_TGU = jax.lax.stop_gradient(scores_TE).reshape(shape)
  kept_TG = _places(_score(each_TGU, best)) < m.top_groups
  return jnp.where(kept_TG[..., None], scores_TE.reshape(shape),
                   -jnp.inf).reshape(scores_TE.shape)


def _score(each_TGU: jax.Array, best: int) -> jax.Array:
  """Returns the sum of the one or two best of each group, [T, G]."""
  first_TG = each_TGU.max(-1)
  if best == 1:
    return first_TG
  at_U = jnp.arange(each_TGU.shape[-1])[None, None]
  others_TGU = jnp.where(at_U == each_TGU.argmax(-1)[..., None], -jnp.inf,
                         each_TGU)
  return first_TG + others_TGU.max(-1)


def _places(score_TG: jax.Array) -> jax.Array:
  """Returns the place of each group among those of its token, the best first;
  of equal ones the first is better. Not by sorting, which XLA does on one
  device of a mesh (routing.py)."""
  at_G = jnp.arange(score_TG.shape[1])
  one, other = score_TG[:, :, None], score_TG[:, None]
  earlier_GG = (at_G[None] < at_G[:, None])[None]
  return ((other > one) | ((other == one) & earlier_GG)).sum(-1)


def check(m: MoEConfig) -> None:
  """Raises RequestError for groups that cannot be chosen from."""
  E, groups, kept = m.num_experts, m.expert_groups, m.top_groups
  if groups == 1:
    return
  require(E % groups == 0, f'model.moe.expert_groups is {groups}, which does '
          f'not divide model.moe.num_experts {E}: choose a divisor')
  require(kept <= groups, f'model.moe.top_groups is {kept}: choose at most '
          f'model.moe.expert_groups {groups}')
  require(m.top_k <= kept * E // groups, f'model.moe.top_k is {m.top_k}, but '
          f'the {kept} groups of model.moe.top_groups have '
          f'{kept * E // groups} experts: choose fewer, or more groups')
  require(E // groups > 1 or m.router != 'sigmoid',
          f'model.moe.expert_groups is {groups}, of one expert each, and the '
          'router sigmoid adds up the two best of a group: choose fewer groups')
