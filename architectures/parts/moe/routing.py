"""Routers: which experts see a token, and with what weight. Pure functions.

A router turns float32 logits [T, E] into `Routing`: a flat list of A
assignments of a token to an expert. Where a token chooses (every router but
expert choice), A = T * X and assignment a is choice a % X of token a // X.

topk           softmax, the X best (Shazeer et al. 2017). normalize_gates makes
               the gates of a token sum to 1, which is the softmax taken after
               the choice (Mixtral); off, the softmax before it (Switch).
switch         X = 1, gate = probability (Fedus et al. 2021).
gshard         X = 2, gates sum to 1; in training the second expert is kept
               with probability min(1, 2 p2 / (p1 + p2)) (Lepikhin et al. 2020).
expert_choice  an expert takes its ceil(S X / E) best tokens of a group, scaled
               by the capacity factor if any (Zhou et al. 2022). What a token
               gets depends on later tokens: not for decoders that generate.
sigmoid        scores sigmoid(logits); the X best of score + router_bias, which
               `step_bias` moves against the load (DeepSeek-V3, 2024, equations
               12 to 16).
sinkhorn       in training, the X best of the logits balanced over tokens and
               experts by Sinkhorn's iteration; in evaluation, of the logits
               (BASE: Lewis et al. 2021; S-BASE: Clark et al. 2022). So in
               training, a choice depends on later tokens of the group too.
hash           a fixed hash of the token id (Roller et al. 2021). No router
               weight, hence no loss.
uniform        tokens dealt in turn, in perfect balance: for benchmarks.

With X = 1 a gate is never normalised: it would be 1 and teach nothing.
gate_scale multiplies all gates afterwards (DeepSeek-V2, its code's
routed_scaling_factor).

topk and sigmoid can be limited to some groups of experts. Where each group lies
on a node, a token then crosses to top_groups nodes at most. The experts stand
in expert_groups equal groups, of which a token has the top_groups best to
choose from. A group is as good as

topk       its best expert (DeepSeek-V2, 2024, section 2.2.2: with a group on
           each device; group_limited_greedy in its code).
sigmoid    its two best experts together, by score + router_bias (DeepSeek-V3,
           2024, section 2.1.2, as its code has it: noaux_tc. The paper's number
           is top_k / top_groups, which is 2 there).

An entry of ROUTERS, at the end of this file, is all that there is of one.
"""

from collections.abc import Callable
import dataclasses
import fractions
import math
from typing import Optional

from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts.config import ModelConfig
from architectures.parts.dropout import mix
from architectures.parts.moe.config import MoEConfig
from configs.errors import require

SINKHORN_STEPS = 8
NOWHERE = -1e30


@struct.dataclass
class Inputs:
  """What a router may look at; T tokens in `groups` groups of a sequence."""
  logits_TE: Optional[jax.Array]
  valid_T: jax.Array  # bool: padding takes no expert
  tokens_T: Optional[jax.Array] = None  # ids, for hash
  bias_E: Optional[jax.Array] = None  # for sigmoid
  key: Optional[jax.Array] = None  # None: deterministic
  groups: int = struct.field(pytree_node=False, default=1)
  train: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Routing:
  """Assignments in the order of their tokens; gate 0 and expert E: nowhere.

  Attributes:
    expert_A: int32, the expert; E where the assignment is void.
    gate_A: float32, the weight of its output.
    token_A: int32, the token.
    probs_TE: float32, the router's belief, which the losses and the panel
      read; the choice itself where there is no router weight.
    choices: X where tokens choose, whose assignments stand together; 0 where
      the experts choose.
  """
  expert_A: jax.Array
  gate_A: jax.Array
  token_A: jax.Array
  probs_TE: jax.Array
  choices: int = struct.field(pytree_node=False, default=0)

  @property
  def experts_choose(self) -> bool:
    return self.choices == 0


def _best(scores_TE: jax.Array, choices: int) -> jax.Array:
  """The indices of the best experts, int32 [T, X].

  Not by `lax.top_k`: on a mesh XLA gathers its operand on every device.
  """
  scores_TE, chosen = jax.lax.stop_gradient(scores_TE), []
  experts_1E = jnp.arange(scores_TE.shape[1])[None]
  for _ in range(choices):
    chosen.append(jnp.argmax(scores_TE, 1))
    scores_TE = jnp.where(experts_1E == chosen[-1][:, None], -jnp.inf,
                          scores_TE)
  return jnp.stack(chosen, 1)


# How many tokens an expert takes of a group, and which.


def capacity(factor: float, tokens: int, choices: int, experts: int) -> int:
  """Tokens an expert takes of a group: ceil(factor * S * X / E), of the factor
  as it is written: 1.1 is 11/10, and not the binary number a hair above."""
  return max(1, math.ceil(
      fractions.Fraction(str(factor)) * tokens * choices / experts))


def ranks(key_A: jax.Array, keys: int) -> jax.Array:
  """How many earlier entries of key_A (each < keys) equal this one."""
  order_A = jnp.argsort(key_A, stable=True)
  start_U = jnp.searchsorted(key_A[order_A], jnp.arange(keys))
  rank_A = jnp.arange(key_A.shape[0]) - start_U[key_A[order_A]]
  return jnp.zeros_like(rank_A).at[order_A].set(rank_A, unique_indices=True)


def within_capacity(expert_A: jax.Array, *, choices: int, groups: int,
                    slots: int, experts: int,
                    earlier: Optional[Callable] = None) -> jax.Array:
  """Voids what exceeds the capacity: first choices first, then by position.

  Args:
    expert_A: G groups of S tokens of X choices.
    choices: X.
    groups: G.
    slots: the capacity of an expert in a group.
    experts: E.
    earlier: where the group goes on in other shards: (what they hold of each
      (choice, expert) before this shard, what all hold), from [X, E] counts.

  Returns:
    expert_A, E where there was no room.
  """
  A, bins = expert_A.shape[0], experts + 1
  index_A = jnp.arange(A)
  row_A = index_A // (A // groups) * choices + index_A % choices
  key_A = row_A * bins + expert_A
  count_GXE = jnp.bincount(key_A, length=groups * choices * bins).reshape(
      groups, choices, bins)
  if earlier is None:
    before_GXE, total_GXE = jnp.zeros_like(count_GXE), count_GXE
  else:
    before_GXE, total_GXE = earlier(count_GXE)
  base_GXE = before_GXE + jnp.cumsum(total_GXE, 1) - total_GXE
  slot_A = ranks(key_A, groups * choices * bins) + base_GXE.reshape(-1)[key_A]
  return jnp.where(slot_A < slots, expert_A, experts)


# Groups of experts.


def _of_best_groups(m: MoEConfig, scores_TE: jax.Array, *, best: int
                    ) -> jax.Array:
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
  device of a mesh (see `_best`)."""
  at_G = jnp.arange(score_TG.shape[1])
  one, other = score_TG[:, :, None], score_TG[:, None]
  earlier_GG = (at_G[None] < at_G[:, None])[None]
  return ((other > one) | ((other == one) & earlier_GG)).sum(-1)


def _check_groups(m: MoEConfig) -> None:
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


def _routing(expert_TX: jax.Array, gate_TX: jax.Array, probs_TE: jax.Array,
             valid_T: jax.Array) -> Routing:
  T, X = expert_TX.shape
  E = probs_TE.shape[1]
  expert_TX = jnp.where(valid_T[:, None], expert_TX, E)
  gate_TX = jnp.where(expert_TX < E, gate_TX, 0.0)
  token_TX = jnp.broadcast_to(jnp.arange(T)[:, None], (T, X))
  return Routing(expert_TX.reshape(-1).astype(jnp.int32), gate_TX.reshape(-1),
                 token_TX.reshape(-1).astype(jnp.int32), probs_TE, X)


def _chosen(scores_TE: jax.Array, expert_TX: jax.Array):
  return jnp.take_along_axis(scores_TE, expert_TX, 1)


def normalize(gate_TX: jax.Array) -> jax.Array:
  """Makes the gates of a token sum to 1, unless it has but one."""
  if gate_TX.shape[1] == 1:
    return gate_TX
  return gate_TX / (gate_TX.sum(1, keepdims=True) + 1e-20)


def topk(m: MoEConfig, x: Inputs) -> Routing:
  probs_TE = jax.nn.softmax(x.logits_TE, -1)
  expert_TX = _best(_of_best_groups(m, x.logits_TE, best=1), m.top_k)
  gate_TX = _chosen(probs_TE, expert_TX)
  if m.normalize_gates:
    gate_TX = normalize(gate_TX)
  return _routing(expert_TX, gate_TX, probs_TE, x.valid_T)


def switch(m: MoEConfig, x: Inputs) -> Routing:
  del m  # one choice, its gate the probability
  probs_TE = jax.nn.softmax(x.logits_TE, -1)
  expert_TX = _best(x.logits_TE, 1)
  return _routing(expert_TX, _chosen(probs_TE, expert_TX), probs_TE, x.valid_T)


def gshard(m: MoEConfig, x: Inputs) -> Routing:
  probs_TE = jax.nn.softmax(x.logits_TE, -1)
  expert_TX = _best(x.logits_TE, 2)
  gate_TX = normalize(_chosen(probs_TE, expert_TX))
  if x.key is not None:
    draw_T = jax.random.uniform(x.key, gate_TX.shape[:1])
    second_T = jnp.where(2 * gate_TX[:, 1] > draw_T, expert_TX[:, 1],
                         m.num_experts)
    expert_TX = jnp.stack([expert_TX[:, 0], second_T], 1)
  return _routing(expert_TX, gate_TX, probs_TE, x.valid_T)


def sigmoid(m: MoEConfig, x: Inputs) -> Routing:
  scores_TE = jax.nn.sigmoid(x.logits_TE)
  bias_E = jax.lax.stop_gradient(x.bias_E)
  expert_TX = _best(_of_best_groups(m, scores_TE + bias_E[None], best=2),
                    m.top_k)
  gate_TX = _chosen(scores_TE, expert_TX)
  if m.normalize_gates:
    gate_TX = normalize(gate_TX)
  probs_TE = scores_TE / scores_TE.sum(-1, keepdims=True)
  return _routing(expert_TX, gate_TX, probs_TE, x.valid_T)


def best_scores(m: MoEConfig, logits_TE: jax.Array, valid_T: jax.Array
                ) -> jax.Array:
  """Returns the experts that the scores alone would choose, as expert_A: by
  neither the bias nor the groups of experts."""
  expert_TX = jnp.where(valid_T[:, None], _best(logits_TE, m.top_k),
                        m.num_experts)
  return expert_TX.reshape(-1).astype(jnp.int32)


def balanced(logits_TE: jax.Array, valid_T: jax.Array) -> jax.Array:
  """Sinkhorn: log of the matrix near exp(logits) whose rows sum to 1 and whose
  columns share the tokens evenly; padding weighs nothing."""
  E = logits_TE.shape[1]
  weight_T1 = jnp.where(valid_T, 0.0, NOWHERE)[:, None]
  share = jnp.log(jnp.maximum(valid_T.sum(), 1) / E)
  def step(_: jax.Array, log_TE: jax.Array):
    log_TE += share - jax.nn.logsumexp(log_TE + weight_T1, 0, keepdims=True)
    return log_TE - jax.nn.logsumexp(log_TE, 1, keepdims=True)
  return jax.lax.fori_loop(0, SINKHORN_STEPS, step,
                           jax.lax.stop_gradient(logits_TE))


def sinkhorn(m: MoEConfig, x: Inputs) -> Routing:
  probs_TE = jax.nn.softmax(x.logits_TE, -1)
  scores_TE = x.logits_TE
  if x.train:
    shape = (x.groups, -1, m.num_experts)
    scores_TE = jax.vmap(balanced)(
        scores_TE.reshape(shape), x.valid_T.reshape(shape[:2])
    ).reshape(scores_TE.shape)
  expert_TX = _best(scores_TE, m.top_k)
  gate_TX = _chosen(probs_TE, expert_TX)
  if m.normalize_gates:
    gate_TX = normalize(gate_TX)
  return _routing(expert_TX, gate_TX, probs_TE, x.valid_T)


def expert_choice(m: MoEConfig, x: Inputs) -> Routing:
  T, E = x.logits_TE.shape
  G, S = x.groups, T // x.groups
  factor = (m.capacity_factor if x.train else m.eval_capacity_factor) or 1.0
  taken = min(S, capacity(factor, S, m.top_k, E))
  probs_TE = jax.nn.softmax(x.logits_TE, -1)
  score_GES = jnp.where(x.valid_T[:, None], probs_TE, NOWHERE).reshape(
      G, S, E).swapaxes(1, 2)
  token_GEC = jnp.argsort(jax.lax.stop_gradient(-score_GES))[..., :taken]
  gate_GEC = jnp.take_along_axis(score_GES, token_GEC, 2)
  expert_GEC = jnp.broadcast_to(jnp.arange(E)[None, :, None], token_GEC.shape)
  expert_GEC = jnp.where(gate_GEC > 0, expert_GEC, E)
  gate_GEC = jnp.maximum(gate_GEC, 0.0)
  token_GEC = token_GEC + S * jnp.arange(G)[:, None, None]
  return Routing(expert_GEC.reshape(-1).astype(jnp.int32),
                 gate_GEC.reshape(-1),
                 token_GEC.reshape(-1).astype(jnp.int32), probs_TE)


def _fixed(m: MoEConfig, first_T: jax.Array, stride: int, valid_T: jax.Array
           ) -> Routing:
  """Experts first, first + stride, ...; each with gate 1 / X."""
  E, X = m.num_experts, m.top_k
  expert_TX = (first_T[:, None] + stride * jnp.arange(X)[None]) % E
  probs_TE = jax.nn.one_hot(expert_TX, E).mean(1)
  return _routing(expert_TX, jnp.full(expert_TX.shape, 1 / X), probs_TE,
                  valid_T)


def hash_(m: MoEConfig, x: Inputs) -> Routing:
  spread_T = mix(x.tokens_T.astype(jnp.uint32) + jnp.uint32(1))
  first_T = (spread_T % m.num_experts).astype(jnp.int32)
  return _fixed(m, first_T, 1, x.valid_T)


def uniform(m: MoEConfig, x: Inputs) -> Routing:
  first_T = jnp.arange(x.valid_T.shape[0]) * m.top_k % m.num_experts
  return _fixed(m, first_T, 1, x.valid_T)


def step_bias(bias_NE: jax.Array, load_NE: jax.Array, rate: float | jax.Array
              ) -> jax.Array:
  """Moves a bias by `rate` towards the experts with too little load.

  b_i += rate * sign(mean load - load_i) (Wang et al. 2024, algorithm 1).
  """
  return bias_NE + rate * jnp.sign(1 / bias_NE.shape[-1] - load_NE)


LEARNED = ('moe.jitter', 'moe.logit_noise', 'moe.logit_bias',
           'moe.balance_loss', 'moe.z_loss_weight')


@dataclasses.dataclass(frozen=True)
class Router:
  """One way to assign tokens to experts.

  Attributes:
    assign: (config.moe, Inputs) -> Routing.
    logits: whether it has a weight, and so logits and losses of them.
    fields: of config.model that only some routers read; those of LEARNED are
      read by every router with logits.
    top_k: how many experts a token has, where no other number is possible.
    draws: whether it draws in training: Inputs.key.
    hashes: whether it reads the tokens' ids: Inputs.tokens_T.
    bias: (bias_NE, load_NE, rate) -> bias_NE, how a step moves a bias on the
      choice, Inputs.bias_E, against the load; None: it has none.
    groups: whether tokens of one group compete even without a capacity.
    experts_choose: whether experts choose tokens. Which they take depends on
      later tokens, so no decoder may have it, and how many is their capacity.
    counts_first: whether only a token's first choice counts for `switch`, the
      balance loss.
    whole: whether the gates of a token sum to 1, whatever normalize_gates says.
    wanted: (config.moe, logits_TE, valid_T) -> the experts that `sequence`, the
      balance loss, counts; None: those that were chosen.
  """
  assign: Callable[[MoEConfig, Inputs], Routing]
  logits: bool = True
  own_fields: tuple[str, ...] = ()
  top_k: int = 0
  draws: bool = False
  hashes: bool = False
  bias: Optional[Callable] = None
  groups: bool = False
  experts_choose: bool = False
  counts_first: bool = False
  whole: bool = False
  wanted: Optional[Callable] = None

  @property
  def fields(self) -> tuple[str, ...]:
    return self.own_fields + (LEARNED if self.logits else ())


def of(m: MoEConfig) -> Router:
  """Returns the router of a mixture."""
  return ROUTERS[m.router]


def route(m: MoEConfig, x: Inputs) -> Routing:
  """Returns what the router of a mixture does, its gates scaled."""
  routed = of(m).assign(m, x)
  return routed if m.gate_scale == 1 else routed.replace(
      gate_A=m.gate_scale * routed.gate_A)


def check_router(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what the chosen router cannot do.

  Args:
    c: the model, with experts.
    stack: what architectures.stack returns.
  """
  m, router = c.moe, of(c.moe)
  require(not router.experts_choose or stack == 'encoder',
          f'model.moe.router {m.router} has no meaning in the decoder of '
          f'model.arch {c.arch}: which tokens an expert takes depends on later '
          'ones, which a prediction must not see; choose another router, or an '
          'encoder')
  require(router.top_k in (0, m.top_k),
          f'model.moe.top_k is {m.top_k}, but model.moe.router {m.router} '
          f'chooses {router.top_k}: set it to {router.top_k}, or choose router '
          'topk')
  if 'moe.expert_groups' in router.own_fields:
    _check_groups(m)
  for name in ('capacity_factor', 'eval_capacity_factor'):
    require(m.dispatch != 'sorted' or router.experts_choose
            or getattr(m, name) > 0,
            f'model.moe.{name} is 0, but model.moe.dispatch sorted pads every '
            'expert to its capacity: set it, or choose dispatch dropless')


def whole_gates(m: MoEConfig) -> bool:
  """Returns whether the gates of each token sum to 1."""
  router = of(m)
  return m.gate_scale == 1 and (router.whole or not router.experts_choose and (
      m.normalize_gates and m.top_k > 1))


def active_experts(m: MoEConfig) -> float:
  """Returns how many of the routed experts a token goes through, in the mean.
  """
  if of(m).experts_choose:  # as many as the experts take
    return min(m.top_k * (m.capacity_factor or 1.0), m.num_experts)
  return m.top_k


NORMALIZES = ('moe.normalize_gates',)
GROUPS = ('moe.expert_groups', 'moe.top_groups')

ROUTERS = {
    'topk': Router(topk, own_fields=(*NORMALIZES, *GROUPS)),
    # Of one choice; the flag is accepted, and changes nothing.
    'switch': Router(switch, own_fields=NORMALIZES, top_k=1),
    'gshard': Router(gshard, top_k=2, draws=True, counts_first=True,
                     whole=True),
    # The flag is accepted, and changes nothing.
    'expert_choice': Router(expert_choice, own_fields=NORMALIZES, groups=True,
                            experts_choose=True),
    'sigmoid': Router(sigmoid, own_fields=(
        *NORMALIZES, *GROUPS, 'moe.bias_rate'), bias=step_bias,
                      wanted=best_scores),
    'sinkhorn': Router(sinkhorn, own_fields=NORMALIZES, groups=True),
    'hash': Router(hash_, logits=False, hashes=True, whole=True),
    'uniform': Router(uniform, logits=False, whole=True),
}
