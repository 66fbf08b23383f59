"""Routers: which experts see a token, and with what weight. Pure functions.

A router turns float32 logits [T, E] into `Routing`: a flat list of A
assignments of a token to an expert. Where a token chooses (every router but
expert choice), it has X choices, A = T * X, and assignment a is choice a % X of
token a // X.

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
               `move_bias_against_load` moves (DeepSeek-V3, 2024, equations 12
               to 16).
sigmoid_plain  the same without router_bias, and so without groups (Llama 4).
softmax_bias   sigmoid with the scores softmax(logits) (LongCat-Flash: Meituan
               2025, arXiv 2509.01322).
sqrt_softplus  sigmoid with the scores sqrt(log(1 + exp(logits))) (DeepSeek-V4).
sinkhorn       in training, the X best of the logits balanced over tokens and
               experts by Sinkhorn's iteration; in evaluation, of the logits
               (BASE: Lewis et al. 2021; S-BASE: Clark et al. 2022). So in
               training, a choice depends on later tokens of the group too.
hash           a fixed hash of the token id (Roller et al. 2021). No router
               weight, hence no loss.
hash_scored    experts as those of hash, which weigh as those of sqrt_softplus
               (the first layers of DeepSeek-V4). They stand in a table of the
               layer, experts_of, which no training moves.
uniform        tokens dealt in turn, in perfect balance: for benchmarks.

With X = 1 a gate is never normalised: it would be 1 and teach nothing.
gate_scale multiplies all gates afterwards (DeepSeek-V2, its code's
routed_scaling_factor).

topk and the routers with a bias can be limited to some groups of experts. Where
each group lies on a node, a token then crosses to top_groups nodes at most. The
experts stand in expert_groups equal groups, of which a token has the top_groups
best to choose from. A group is as good as

topk       its best expert (DeepSeek-V2, 2024, section 2.2.2: with a group on
           each device; group_limited_greedy in its code).
the others its two best experts together, by score + router_bias (DeepSeek-V3,
           2024, section 2.1.2, as its code has it: noaux_tc. The paper's number
           is top_k / top_groups, which is 2 there).

An entry of ROUTERS is all that there is of one. Below it is what a routing
costs, and how it fares.
"""

from collections.abc import Callable
import dataclasses
import fractions
import functools
import math
from typing import NamedTuple, Optional

from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts.config import ModelConfig
from architectures.parts.layers import hash_uint32
from architectures.parts.context import Report
from architectures.parts.sharding import Scale
from common.errors import RequestError, require
from common.fields import field, FUNCTION, RECIPE, REGULARISATION, Effect
from common.fields import RUN, SAFE, SAME, SHAPES, SIZE, ReadIf

SINKHORN_STEPS = 8
SCORE_OF_PADDING = -1e30  # finite, so that a difference of two is no NaN


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """The experts of ffn moe, and their router."""
  num_experts: int = field(8, 'The number of experts of a layer.', above=0,
                           resume=SHAPES)
  top_k: int = field(
      2, 'The number of experts of a token (with expert_choice: on average).',
      above=0, resume=FUNCTION)
  router: str = field('topk', 'Which experts see a token.', of_layers=True)
  logit_bias: bool = field(False, "A bias of the router's logits.")
  router_dim: int = field(
      0, 'The features of the state of a router, of which an MLP makes the '
      'logits; 0: they are a product of its input.', resume=SHAPES)
  router_memory: bool = field(
      True, "Whether the state of the layer before's router, times a learned "
      "factor, is added to the router's.", of_layers=True)
  expert_groups: int = field(
      1, 'The number of groups of experts, of which a token goes to the '
      'top_groups best; 1: there are none.', above=0, resume=FUNCTION)
  top_groups: int = field(
      1, 'The number of groups that a token may go to.', above=0,
      resume=FUNCTION)
  ffn: str = field(
      'gelu', 'The network of an expert, and of the dense layers between.')
  d_ff: int = field(
      0, 'The hidden units of one expert; derived: model.d_ff.', resume=SHAPES)
  latent_dim: int = field(
      0, 'The features that experts read and return, between two products; 0: '
      'd_model.', resume=SHAPES)
  shared_experts: int = field(
      0, 'The width of a dense network beside the experts, in widths of an '
      'expert; 0: there is none.')
  zero_experts: int = field(
      0, 'The number of experts that return what they read, which a token may '
      'choose too.', resume=SHAPES)
  zero_experts_skip: bool = field(
      False, 'Whether these experts return nothing instead.', resume=FUNCTION)
  shared_gate: bool = field(
      False, "Whether a sigmoid of the layer's input multiplies the output of "
      'the shared experts.')
  dispatch: str = field(
      'auto', 'How tokens reach their experts. auto: sorted where a capacity '
      'pads little, else dropless.', resume=FUNCTION, about=RUN)
  grouped_kernel: str = field(
      'auto', 'The product of dropless. auto: megablox on TPU, else xla.',
      resume=SAME, about=RUN)
  capacity_factor: float = field(
      0.0, 'The room of an expert in training, over an even load; 0: dropless.',
      least=0, resume=FUNCTION, about=RECIPE)
  eval_capacity_factor: float = field(
      0.0, 'The room of an expert in evaluation, likewise.', least=0,
      resume=Effect(SAFE, 'only evaluation'), about=RECIPE)
  normalize_gates: bool = field(
      True, 'Whether the gates of a token sum to 1, by most routers, from '
      'top_k 2 on.', resume=FUNCTION)
  gate_inputs: bool = field(
      False, 'Whether the gate multiplies the input of an expert, and not its '
      'output, with top_k 1.', resume=FUNCTION)
  gate_scale: float = field(
      1.0, 'The factor of the gates, normalised or not.', above=0,
      resume=FUNCTION)
  jitter: float = field(
      0.0, "The number j, where the router's input is multiplied by "
      'uniform(1 - j, 1 + j) in training.', least=0, below=1,
      resume=REGULARISATION, about=RECIPE)
  logit_noise: float = field(
      0.0, "The standard deviation of the noise on the router's logits in "
      'training.', least=0, resume=REGULARISATION, about=RECIPE)
  balance_loss: str = field(
      'switch', 'The loss that asks for even load.', resume=REGULARISATION,
      about=RECIPE)
  balance_weight: float = field(
      0.01, 'The weight of the balance loss.', least=0, resume=REGULARISATION,
      about=RECIPE)
  z_loss_weight: float = field(
      0.0, "The weight of the mean of log(Z)^2 of the router's logits.",
      least=0, resume=REGULARISATION, about=RECIPE)
  expert_dropout: float = field(
      0.0, "The dropout of the experts' hidden units.", least=0, below=1,
      resume=REGULARISATION, about=RECIPE)
  group_size: int = field(
      0, 'The number of tokens that share capacity; 0: all of a batch.',
      resume=FUNCTION, about=RECIPE)
  bias_rate: float = field(
      0.001, 'How far a step moves router_bias.', least=0,
      resume=REGULARISATION, about=RECIPE)

  mup_base_experts: int = field(
      0, "The num_experts of muP's base; derived: as many.", resume=FUNCTION,
      about=SIZE)
  mup_base_top_k: int = field(
      0, "The top_k of muP's base; derived: as many.", resume=FUNCTION,
      about=SIZE)
  mup_base_d_ff: int = field(
      0, "The d_ff of an expert of muP's base; derived: it grew as d_model "
      'did.', resume=FUNCTION, about=SIZE)

  @property
  def all_experts(self) -> int:
    """The number of experts that a token may choose from."""
    return self.num_experts + self.zero_experts

  def derived(self, config: ModelConfig) -> 'MoEConfig':
    """Returns the fields, with the sizes that are left open filled in."""
    return dataclasses.replace(self, d_ff=self.d_ff or config.d_ff)

  def scale(self, config: ModelConfig, is_down: bool = False) -> Scale:
    """Returns how a parameter of the experts or of the router differs from that
    of muP's base, by the rules of training/optim/mup.py.

    Args:
      config: the config of the model.
      is_down: whether it is the second matrix of the experts' networks.
    """
    mlp = config.widening
    if self.mup_base_d_ff:
      mlp = self.d_ff / self.mup_base_d_ff
    stddev = 1.0
    if is_down and self.mup_base_top_k:
      stddev = math.sqrt(self.top_k / self.mup_base_top_k)
    gradient = 1.0
    if self.mup_base_experts:
      gradient = self.num_experts / self.mup_base_experts
    return Scale(mlp=mlp, stddev=stddev, gradient=gradient)

  def conditions_of_reading(self, config: ModelConfig) -> dict[str, ReadIf]:
    """Returns the fields of this group that have no effect as the config
    stands. A field that a user sets without effect is refused by this list.

    Args:
      config: the config of the model.

    Returns:
      {field without effect: the other field that switches it off, and the
      condition under which it would be read}.
    """
    router, conditions = router_of(self), {}
    if config.parametrization != 'mup':
      for name in ('mup_base_experts', 'mup_base_top_k', 'mup_base_d_ff'):
        conditions[name] = ReadIf('parametrization', 'is mup')
    # The router and its experts.
    if self.expert_groups == 1:
      conditions['top_groups'] = ReadIf('moe.expert_groups', 'is not 1')
    if router.experts_choose or not router.has_logits or router.has_table:
      conditions['zero_experts'] = ReadIf(
          'moe.router', 'is not expert_choice or hash or hash_scored or '
          'uniform')
    if not self.shared_experts:
      conditions['shared_gate'] = ReadIf('moe.shared_experts', 'is set')
    if not self.zero_experts:
      conditions['zero_experts_skip'] = ReadIf('moe.zero_experts', 'is set')
    if not self.router_dim:
      conditions['router_memory'] = ReadIf('moe.router_dim', 'is set')
    # How the experts are computed. Groups of tokens share a capacity, so they
    # matter where there is one in training or evaluation.
    if self.dispatch not in ('auto', 'dropless'):
      conditions['grouped_kernel'] = ReadIf(
          'moe.dispatch', 'is auto or dropless')
    room = max(self.capacity_factor, self.eval_capacity_factor)
    if not router.competes_in_groups and room == 0:
      conditions['group_size'] = ReadIf(
          'moe.capacity_factor', 'is set, or model.moe.eval_capacity_factor, '
          'or model.moe.router chooses within groups')
    return conditions


@struct.dataclass
class RouterInputs:
  """The inputs of a router: T tokens in routing groups.

  Attributes:
    logits_TE: the logits; None where a router has no weight.
    valid_T: bool; padding takes no expert.
    expert_TX: the experts by the tokens' ids, for routers that hash.
    bias_E: the bias on the choice, for routers with one.
    key: the key that a router draws with; None: it is deterministic.
    groups: how many groups the tokens are in, one after another.
    train: whether this is training.
  """
  logits_TE: Optional[jax.Array]
  valid_T: jax.Array
  expert_TX: Optional[jax.Array] = None
  bias_E: Optional[jax.Array] = None
  key: Optional[jax.Array] = None
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


def _indices_of_best_experts(scores_TE: jax.Array, choices: int) -> jax.Array:
  """Finds the experts with the best scores for each token.

  They are found one by one and not by `lax.top_k`, because XLA would gather the
  operand of the latter on every device of a mesh.

  The suffixes name axes: T tokens, E experts.

  Args:
    scores_TE: the scores.
    choices: X, how many experts a token gets.

  Returns:
    The indices of the experts, best first, int32 [T, X]. Of equal scores the
    first wins.
  """
  # Find the best expert of each token, and hide it from the next search. A
  # choice has no gradient.
  scores_TE = jax.lax.stop_gradient(scores_TE)
  experts_1E = jnp.arange(scores_TE.shape[1])[None]
  chosen = []
  for _ in range(choices):
    best_T = jnp.argmax(scores_TE, 1)
    chosen.append(best_T)
    is_best_TE = experts_1E == best_T[:, None]
    scores_TE = jnp.where(is_best_TE, -jnp.inf, scores_TE)
  return jnp.stack(chosen, 1)


# How many tokens an expert takes of a group, and which.


def expert_capacity(factor: float, tokens: int, choices: int, experts: int
                    ) -> int:
  """Returns the capacity of an expert, how many tokens of a routing group it
  takes at most (Switch Transformer, equation 3, for X choices of a token):

    capacity = max(1, ceil(factor S X / E))

  S X / E is the load of each expert if all have the same.

  Args:
    factor: the capacity factor, how much room an expert has relative to an even
      load.
    tokens: S, the number of tokens of a group.
    choices: X, how many experts a token chooses.
    experts: E, the number of experts.
  """
  # The factor is read as it is written: 1.1 is 11/10, and not the binary number
  # a hair above it, which could round the capacity up by one.
  exact_factor = fractions.Fraction(str(factor))
  even_load = fractions.Fraction(tokens * choices, experts)
  return max(1, math.ceil(exact_factor * even_load))


def rank_among_equal_keys(key_A: jax.Array, keys: int) -> jax.Array:
  """Counts for each number in a list how many earlier numbers equal it. For
  example [3, 5, 3, 3] gives [0, 0, 1, 2].

  Args:
    key_A: A numbers from 0 to keys - 1.
    keys: U, how many different numbers there may be.

  Returns:
    The counts, int [A].
  """
  # A stable sort puts equal keys together and keeps their order. The rank of an
  # entry is its place there, less the place where its key starts.
  order_A = jnp.argsort(key_A, stable=True)
  start_U = jnp.searchsorted(key_A[order_A], jnp.arange(keys))
  rank_A = jnp.arange(key_A.shape[0]) - start_U[key_A[order_A]]
  return jnp.zeros_like(rank_A).at[order_A].set(rank_A, unique_indices=True)


def void_over_capacity(
    expert_A: jax.Array, *, choices: int, groups: int, slots: int,
    experts: int, earlier: Optional[Callable] = None) -> jax.Array:
  """Makes void the assignments (pairs of a token and its expert) that exceed
  the capacity of the expert. First choices are served before second ones, and
  among equal choices earlier tokens before later ones.

  The suffixes name axes: A assignments, G routing groups, X choices of a token,
  E experts and one more for void assignments.

  Args:
    expert_A: the expert of each assignment, those of a token one after another;
      E where it is void already.
    choices: X, how many assignments a token has.
    groups: G, the number of routing groups, each of the same number of tokens.
    slots: the capacity of an expert in a group.
    experts: E, the number of experts.
    earlier: where a group extends over several devices, a function that maps
      this device's counts [1, X, E + 1] to the sums over the devices before it
      and over all devices of the group; None: each group is on one device.

  Returns:
    expert_A, with E for the assignments that exceed the capacity.
  """
  # Each triple (group, choice, expert) has one number, its key. Expert E stands
  # for the void assignments.
  A, num_bins = expert_A.shape[0], experts + 1
  num_keys = groups * choices * num_bins

  # Count the assignments of each key.
  index_A = jnp.arange(A)
  group_A = index_A // (A // groups)
  group_and_choice_A = group_A * choices + index_A % choices
  key_A = group_and_choice_A * num_bins + expert_A
  count_GXE = jnp.bincount(key_A, length=num_keys).reshape(
      groups, choices, num_bins)

  # The slot of an assignment is how many are served before it by its expert, in
  # its group: those of all earlier choices, those of its own choice on earlier
  # devices, and those of its own choice of earlier tokens (its rank).
  if earlier is None:
    before_GXE, total_GXE = jnp.zeros_like(count_GXE), count_GXE
  else:
    before_GXE, total_GXE = earlier(count_GXE)
  first_slot_GXE = before_GXE + jnp.cumsum(total_GXE, 1) - total_GXE
  rank_A = rank_among_equal_keys(key_A, num_keys)
  slot_A = rank_A + first_slot_GXE.reshape(-1)[key_A]
  return jnp.where(slot_A < slots, expert_A, experts)


# Groups of experts.


def _hide_all_but_best_groups(moe: MoEConfig, scores_TE: jax.Array, *,
                              experts_added: int) -> jax.Array:
  """Limits the choice of each token to its best groups of experts: the scores
  of all other experts become -inf (DeepSeek-V3).

  The suffixes name axes: T tokens, E experts, G groups of experts, U experts of
  a group.

  Args:
    moe: the config, with the number of groups (expert_groups) and how many of
      them a token may choose from (top_groups).
    scores_TE: the scores by which tokens choose experts.
    experts_added: how many of a group's best scores are added to make the score
      of the group, 1 or 2.

  Returns:
    The scores, [T, E], with -inf for hidden experts.
  """
  if moe.expert_groups <= moe.top_groups:
    return scores_TE

  # The score of each group.
  shape = (scores_TE.shape[0], moe.expert_groups, -1)
  scores_TGU = jax.lax.stop_gradient(scores_TE).reshape(shape)
  group_score_TG = scores_TGU.max(-1)
  if experts_added == 2:
    # The second best: the best after the best one is hidden.
    index_U = jnp.arange(scores_TGU.shape[-1])[None, None]
    is_best_TGU = index_U == scores_TGU.argmax(-1)[..., None]
    others_TGU = jnp.where(is_best_TGU, -jnp.inf, scores_TGU)
    group_score_TG = group_score_TG + others_TGU.max(-1)

  # The experts of the best groups keep their scores.
  is_kept_TG = _rank_groups(group_score_TG) < moe.top_groups
  kept_TGU = jnp.where(
      is_kept_TG[..., None], scores_TE.reshape(shape), -jnp.inf)
  return kept_TGU.reshape(scores_TE.shape)


def _rank_groups(score_TG: jax.Array) -> jax.Array:
  """Ranks groups of experts by their scores, for each token: the rank of a
  group is how many other groups are better. So the best has rank 0. Of equal
  scores the first is better.

  All pairs of groups are compared, because XLA would gather the operand of a
  sort on every device of a mesh.

  Args:
    score_TG: the scores, [T tokens, G groups].

  Returns:
    The ranks, int [T, G].
  """
  # In [T, G, G], the last axis is that of the other groups.
  index_G = jnp.arange(score_TG.shape[1])
  own_TG1 = score_TG[:, :, None]
  other_T1G = score_TG[:, None]
  is_earlier_1GG = (index_G[None] < index_G[:, None])[None]
  is_better_TGG = (other_T1G > own_TG1) | (
      (other_T1G == own_TG1) & is_earlier_1GG)
  return is_better_TGG.sum(-1)


def _routing_of_choices(expert_TX: jax.Array, gate_TX: jax.Array,
                        probs_TE: jax.Array, valid_T: jax.Array) -> Routing:
  """Collects what tokens have chosen as a flat list of assignments, pairs of a
  token and an expert that it goes to. Those of padding are made void.

  The suffixes name axes: T tokens, X choices of a token, E experts, A = T X
  assignments.

  Args:
    expert_TX: the experts that each token chose; E where it chose none.
    gate_TX: the gates, by which the experts' outputs are weighed.
    probs_TE: the router's probabilities of all experts.
    valid_T: bool, whether a token is no padding.

  Returns:
    The assignments. Those of a token stand one after another.
  """
  T, X = expert_TX.shape
  E = probs_TE.shape[1]
  # Experts have the numbers 0 ... E - 1. An assignment to the number E is void,
  # and its gate is 0.
  expert_TX = jnp.where(valid_T[:, None], expert_TX, E)
  gate_TX = jnp.where(expert_TX < E, gate_TX, 0.0)
  token_TX = jnp.broadcast_to(jnp.arange(T)[:, None], (T, X))
  return Routing(
      expert_A=expert_TX.reshape(-1).astype(jnp.int32),
      gate_A=gate_TX.reshape(-1),
      token_A=token_TX.reshape(-1).astype(jnp.int32),
      probs_TE=probs_TE, choices=X)


def _scores_of_chosen(scores_TE: jax.Array, expert_TX: jax.Array) -> jax.Array:
  """Returns the scores of the chosen experts, [T, X]."""
  return jnp.take_along_axis(scores_TE, expert_TX, 1)


def normalize_gates(gate_TX: jax.Array) -> jax.Array:
  """Returns gates that sum to 1 for each token; a token's only gate is left as
  it is."""
  if gate_TX.shape[1] == 1:
    return gate_TX
  return gate_TX / (gate_TX.sum(1, keepdims=True) + 1e-20)


def route_topk(moe: MoEConfig, x: RouterInputs) -> Routing:
  """Routes each token to the X best experts of its best groups, weighed by the
  softmax of all logits (Shazeer et al. 2017)."""
  ranked_TE = _hide_all_but_best_groups(moe, x.logits_TE, experts_added=1)
  return _weigh_by_softmax(moe, x,
                           _indices_of_best_experts(ranked_TE, moe.top_k))


def route_switch(moe: MoEConfig, x: RouterInputs) -> Routing:
  """Routes each token to its best expert, weighed by its probability (Switch:
  Fedus et al. 2021, equation 2)."""
  return _weigh_by_softmax(moe, x, _indices_of_best_experts(x.logits_TE, 1))


def route_gshard(moe: MoEConfig, x: RouterInputs) -> Routing:
  """Routes each token to its two best experts (GShard: Lepikhin et al. 2020,
  algorithm 1). In training the second one is kept only with the probability
  min(1, 2 p2 / (p1 + p2)), where p1 and p2 are the probabilities of the two.

  The suffixes name axes: T tokens, E experts, X = 2 choices of a token.

  Args:
    moe: the config of the mixture of experts.
    x: the inputs of the router. In training it has a key to draw with.

  Returns:
    The assignments of tokens to experts, and their gates.
  """
  # The gates are normalised before the draw, so that a token that loses its
  # second expert keeps the gate p1 / (p1 + p2) of its first.
  probs_TE = jax.nn.softmax(x.logits_TE, -1)
  expert_TX = _indices_of_best_experts(x.logits_TE, 2)
  gate_TX = normalize_gates(_scores_of_chosen(probs_TE, expert_TX))

  # Draw which second choices are kept. One that is dropped gets the number
  # after all experts, which stands for none. The sum of both gates is 1, so
  # 2 p2 / (p1 + p2) is 2 gate_TX[:, 1].
  if x.key is not None:
    draw_T = jax.random.uniform(x.key, gate_TX.shape[:1])
    keeps_T = 2 * gate_TX[:, 1] > draw_T
    second_T = jnp.where(keeps_T, expert_TX[:, 1], moe.all_experts)
    expert_TX = jnp.stack([expert_TX[:, 0], second_T], 1)
  return _routing_of_choices(
      expert_TX, gate_TX=gate_TX, probs_TE=probs_TE, valid_T=x.valid_T)


def route_by_scores(score: Callable[[jax.Array], jax.Array], moe: MoEConfig,
                    x: RouterInputs) -> Routing:
  """Routes each token to the experts that are best by score + bias, and weighs
  them by their scores alone (DeepSeek-V3, 2024, equations 12 to 16):

    s = score(logits),   chosen = the moe.top_k experts with the best s + bias
    gate = s of a chosen expert, or with moe.normalize_gates that over the sum
           of s of the chosen ones

  The suffixes name axes: T tokens, E experts, X choices of a token.

  Args:
    score: the function that makes scores of logits, such as a sigmoid.
    moe: the config of the mixture of experts.
    x: the inputs of the router. Its bias_E is None for a router without a bias,
      which does not limit tokens to groups of experts either.

  Returns:
    The assignments of tokens to experts, and their gates.
  """
  # Choose by s + bias. The bias balances the load of the experts. It is moved
  # by hand (`move_bias_against_load`), so it must have no gradient, and it must
  # not enter the gates.
  scores_TE = score(x.logits_TE)
  ranked_TE = scores_TE
  if x.bias_E is not None:
    bias_E = jax.lax.stop_gradient(x.bias_E)
    ranked_TE = _hide_all_but_best_groups(
        moe, scores_TE + bias_E[None], experts_added=2)
  expert_TX = _indices_of_best_experts(ranked_TE, moe.top_k)
  return _weigh_by_scores(moe, x, expert_TX=expert_TX, scores_TE=scores_TE)


def _weigh_by_softmax(moe: MoEConfig, x: RouterInputs, expert_TX: jax.Array
                      ) -> Routing:
  """Returns the routing to these experts, weighed by the softmax of the logits.
  """
  probs_TE = jax.nn.softmax(x.logits_TE, -1)
  return _weigh_chosen(moe, x, expert_TX=expert_TX, scores_TE=probs_TE,
                       probs_TE=probs_TE)


def _weigh_by_scores(moe: MoEConfig, x: RouterInputs, expert_TX: jax.Array,
                     scores_TE: jax.Array) -> Routing:
  """Returns the routing to these experts, weighed by scores that each expert
  has by itself; the router's probabilities are their shares of the sum."""
  probs_TE = scores_TE / scores_TE.sum(-1, keepdims=True)
  return _weigh_chosen(moe, x, expert_TX=expert_TX, scores_TE=scores_TE,
                       probs_TE=probs_TE)


def _weigh_chosen(moe: MoEConfig, x: RouterInputs, expert_TX: jax.Array,
                  scores_TE: jax.Array, probs_TE: jax.Array) -> Routing:
  """Routes tokens to the experts that they chose. The gate g of a chosen expert
  i follows from the scores s of the chosen ones:

    g_i = s_i,   or with moe.normalize_gates   g_i = s_i / (sum of chosen s_j)

  The suffixes name axes: T tokens, X choices of a token, E experts.

  Args:
    moe: the config of the mixture of experts.
    x: the inputs of the router, which say which tokens are padding.
    expert_TX: the experts that each token chose.
    scores_TE: the scores of all experts.
    probs_TE: the router's probabilities, which the balance losses read.

  Returns:
    The assignments of tokens to experts, and their gates.
  """
  gate_TX = _scores_of_chosen(scores_TE, expert_TX)
  if moe.normalize_gates:
    gate_TX = normalize_gates(gate_TX)
  return _routing_of_choices(
      expert_TX, gate_TX=gate_TX, probs_TE=probs_TE, valid_T=x.valid_T)


def sqrt_softplus(logits_TE: jax.Array) -> jax.Array:
  """Returns sqrt(log(1 + exp(logits))), the scores of DeepSeek-V4."""
  softplus_TE = jax.nn.softplus(logits_TE)
  return jnp.sqrt(jnp.maximum(softplus_TE, 1e-30))  # at 0 it has no slope


def experts_of_best_scores(moe: MoEConfig, logits_TE: jax.Array,
                           valid_T: jax.Array) -> jax.Array:
  """Returns the experts that the scores alone would choose, as expert_A:
  neither the bias nor the groups of experts count (DeepSeek-V3, equation 18).
  """
  best_TX = _indices_of_best_experts(logits_TE, moe.top_k)
  expert_TX = jnp.where(valid_T[:, None], best_TX, moe.all_experts)
  return expert_TX.reshape(-1).astype(jnp.int32)


def balance_logits(logits_TE: jax.Array, valid_T: jax.Array) -> jax.Array:
  """Balances a router's logits over the experts by Sinkhorn's iteration (Clark
  et al. 2022). The rows and columns of exp(logits) are scaled in turn, until
  the row of each token sums to 1 and the columns of all experts have the same
  sum.

  The suffixes name axes: T tokens, E experts.

  Args:
    logits_TE: the logits.
    valid_T: bool, whether a token is no padding. Padding counts nowhere.

  Returns:
    The logarithm of the scaled matrix, float32 [T, E], without a gradient.
  """
  # Everything is computed with logarithms, where scaling is adding. Each column
  # is to have the sum of tokens / experts. Padding enters these sums with the
  # weight exp(SCORE_OF_PADDING), which is 0.
  E = logits_TE.shape[1]
  log_weight_T1 = jnp.where(valid_T, 0.0, SCORE_OF_PADDING)[:, None]
  log_tokens_of_expert = jnp.log(jnp.maximum(valid_T.sum(), 1) / E)

  def scale_columns_and_rows(_: jax.Array, log_TE: jax.Array) -> jax.Array:
    """Returns the matrix with its columns scaled, then its rows."""
    log_TE += log_tokens_of_expert - jax.nn.logsumexp(
        log_TE + log_weight_T1, 0, keepdims=True)
    return log_TE - jax.nn.logsumexp(log_TE, 1, keepdims=True)

  return jax.lax.fori_loop(
      0, SINKHORN_STEPS, body_fun=scale_columns_and_rows,
      init_val=jax.lax.stop_gradient(logits_TE))


def route_sinkhorn(moe: MoEConfig, x: RouterInputs) -> Routing:
  """Routes each token to its best experts by the logits, and weighs them by the
  softmax of the logits. In training, tokens choose by logits that are balanced
  within each routing group (BASE: Lewis et al. 2021; S-BASE: Clark et al.
  2022).

  The suffixes name axes: T tokens, E experts, G groups of S tokens.
  """
  scores_TE = x.logits_TE
  if x.train:
    logits_GSE = scores_TE.reshape(x.groups, -1, moe.all_experts)
    valid_GS = x.valid_T.reshape(x.groups, -1)
    balanced_GSE = jax.vmap(balance_logits)(logits_GSE, valid_GS)
    scores_TE = balanced_GSE.reshape(scores_TE.shape)
  return _weigh_by_softmax(moe, x,
                           _indices_of_best_experts(scores_TE, moe.top_k))


def route_expert_choice(moe: MoEConfig, x: RouterInputs) -> Routing:
  """Lets each expert choose its best tokens in each routing group, and weighs
  them by the router's probabilities (expert choice: Zhou et al. 2022).

  The suffixes name axes: T tokens, E experts, G groups of S tokens, C tokens
  that an expert chooses.

  Args:
    moe: the config of the mixture of experts.
    x: the inputs of the router.

  Returns:
    The assignments, in the order of groups, then experts, then tokens from the
    best one on. A token may have any number of them.
  """
  # An expert chooses as many tokens as its capacity allows. A capacity factor
  # of 0 stands for an even load here, since experts must choose some number.
  T, E = x.logits_TE.shape
  G, S = x.groups, T // x.groups
  factor = moe.eval_capacity_factor
  if x.train:
    factor = moe.capacity_factor
  if not factor:
    factor = 1.0
  capacity = expert_capacity(factor, tokens=S, choices=moe.top_k, experts=E)
  C = min(S, capacity)

  # The best tokens of each expert, in the order of their probabilities.
  probs_TE = jax.nn.softmax(x.logits_TE, -1)
  score_TE = jnp.where(x.valid_T[:, None], probs_TE, SCORE_OF_PADDING)
  score_GES = score_TE.reshape(G, S, E).swapaxes(1, 2)
  order_GES = jnp.argsort(jax.lax.stop_gradient(-score_GES))
  token_GEC = order_GES[..., :C]
  gate_GEC = jnp.take_along_axis(score_GES, token_GEC, 2)

  # An expert that runs out of tokens chooses padding. This is made void by the
  # number E, which stands for no expert.
  expert_GEC = jnp.broadcast_to(jnp.arange(E)[None, :, None], token_GEC.shape)
  expert_GEC = jnp.where(gate_GEC > 0, expert_GEC, E)
  gate_GEC = jnp.maximum(gate_GEC, 0.0)

  # Number the tokens over all groups, and no longer within their own.
  token_GEC = token_GEC + S * jnp.arange(G)[:, None, None]
  return Routing(
      expert_A=expert_GEC.reshape(-1).astype(jnp.int32),
      gate_A=gate_GEC.reshape(-1),
      token_A=token_GEC.reshape(-1).astype(jnp.int32), probs_TE=probs_TE)


def _consecutive_experts(moe: MoEConfig, first_T: jax.Array) -> jax.Array:
  """Returns the X experts of each token, [T, X]: its first one and those that
  follow it by number."""
  return (first_T[:, None] + jnp.arange(moe.top_k)[None]) % moe.num_experts


def _weigh_equally(moe: MoEConfig, expert_TX: jax.Array, valid_T: jax.Array
                   ) -> Routing:
  """Returns the routing to these experts, each with gate 1 / X."""
  probs_TE = jax.nn.one_hot(expert_TX, moe.num_experts).mean(1)
  gate_TX = jnp.full(expert_TX.shape, 1 / moe.top_k)
  return _routing_of_choices(
      expert_TX, gate_TX=gate_TX, probs_TE=probs_TE, valid_T=valid_T)


def experts_of_token_ids(moe: MoEConfig, tokens_T: jax.Array) -> jax.Array:
  """Returns the experts that a fixed hash gives token ids, [T, X]."""
  spread_T = hash_uint32(tokens_T.astype(jnp.uint32) + jnp.uint32(1))
  first_T = (spread_T % moe.num_experts).astype(jnp.int32)
  return _consecutive_experts(moe, first_T)


def route_hashed(moe: MoEConfig, x: RouterInputs) -> Routing:
  """Routes each token to the experts of its id (Roller et al. 2021)."""
  return _weigh_equally(moe, x.expert_TX, x.valid_T)


def route_hashed_by_scores(moe: MoEConfig, x: RouterInputs) -> Routing:
  """Routes each token to the experts of its id, weighed by their scores
  (DeepSeek-V4)."""
  scores_TE = sqrt_softplus(x.logits_TE)
  return _weigh_by_scores(moe, x, expert_TX=x.expert_TX, scores_TE=scores_TE)


def route_uniformly(moe: MoEConfig, x: RouterInputs) -> Routing:
  """Deals the tokens out to the experts in turn, in perfect balance."""
  first_T = jnp.arange(x.valid_T.shape[0]) * moe.top_k % moe.num_experts
  return _weigh_equally(moe, _consecutive_experts(moe, first_T), x.valid_T)


def move_bias_against_load(bias_NE: jax.Array, load_NE: jax.Array,
                           rate: float | jax.Array) -> jax.Array:
  """Returns a router's bias, moved by `rate` towards the experts with too
  little load (Wang et al. 2024, algorithm 1):

    b_i' = b_i + rate * sign(mean load - load_i)
  """
  return bias_NE + rate * jnp.sign(1 / bias_NE.shape[-1] - load_NE)


class Router(NamedTuple):
  """One way to assign tokens to experts.

  Attributes:
    assign: (config.moe, RouterInputs) -> Routing.
    fields: the fields of config.model that only some routers read.
    has_logits: whether it has a weight, and so logits and losses of them.
    top_k: how many experts a token has, where no other number is possible.
    draws: whether it draws in training: RouterInputs.key.
    hashes: whether the tokens' ids alone choose, RouterInputs.expert_TX, so
      that no loss asks for even load.
    has_table: whether their experts stand in a table of the layer.
    has_bias: whether a bias stands on the choice, RouterInputs.bias_E, which
      `move_bias_against_load` moves.
    competes_in_groups: whether tokens of one group compete even without a
      capacity.
    experts_choose: whether experts choose tokens. Which they take depends on
      later tokens, so no decoder may have it, and how many is their capacity.
    counts_first: whether only a token's first choice counts for `switch`, the
      balance loss.
    has_whole_gates: whether the gates of a token sum to 1, whatever
      normalize_gates says.
    wanted_experts: (config.moe, logits_TE, valid_T) -> the experts that
      `sequence`, the balance loss, counts; None: those that were chosen.
  """
  assign: Callable[[MoEConfig, RouterInputs], Routing]
  fields: tuple[str, ...] = ()
  has_logits: bool = True
  top_k: int = 0
  draws: bool = False
  hashes: bool = False
  has_table: bool = False
  has_bias: bool = False
  competes_in_groups: bool = False
  experts_choose: bool = False
  counts_first: bool = False
  has_whole_gates: bool = False
  wanted_experts: Optional[Callable] = None


def router_of(moe: MoEConfig) -> Router:
  """Returns the entry of ROUTERS that the config of a mixture names."""
  return ROUTERS[moe.router]


def route_tokens(moe: MoEConfig, x: RouterInputs) -> Routing:
  """Returns the routing of tokens by the router that the config names, with its
  gates multiplied by moe.gate_scale."""
  routed = router_of(moe).assign(moe, x)
  if moe.gate_scale == 1:
    return routed
  return routed.replace(gate_A=moe.gate_scale * routed.gate_A)


def check_router(config: ModelConfig, stack: str) -> None:
  """Checks that the router which the config names can do what the config asks
  for.

  Args:
    config: the config of a model with experts.
    stack: the kind of stack: 'encoder', 'decoder' or 'encoder-decoder'.

  Raises:
    RequestError: for the first of the conditions below that does not hold.
  """
  moe = config.part(MoEConfig)
  router = router_of(moe)
  # The model around the experts, and the experts of a token.
  if router.experts_choose and stack != 'encoder':
    raise RequestError(
        f'model.moe.router {moe.router} has no meaning in the decoder of '
        f'model.arch {config.arch}: which tokens an expert takes depends on '
        'later ones, which a prediction must not see; choose another router, '
        'or an encoder')

  _check_experts_of_token(moe, router)
  _check_mup_base(moe)
  choices = layers.networks_without_learned_numbers()
  require(moe.ffn in choices, f'model.moe.ffn is {moe.ffn!r}, whose activation '
          'is learned, which that of experts is not: choose it from '
          f'{", ".join(choices)}')
  for name in ('latent_dim', 'router_dim'):
    if getattr(moe, name) and config.parametrization == 'mup':
      raise RequestError(
          f'model.moe.{name} is {getattr(moe, name)}, for which '
          "model.parametrization 'mup' has no rule: choose standard")

  # The balance loss, and the capacity.
  if router.experts_choose and BALANCE_LOSSES[moe.balance_loss].by_sequence:
    raise RequestError(
        f'model.moe.balance_loss is {moe.balance_loss}, which is of what the '
        f'tokens of a sequence choose, and with model.moe.router {moe.router} '
        'they do not: choose none')
  least_factor = min(moe.capacity_factor, moe.eval_capacity_factor)
  bounded = router.experts_choose or least_factor > 0
  if moe.dispatch == 'sorted' and not bounded:
    raise RequestError(
        'model.moe.dispatch sorted pads every expert to its capacity: set '
        'model.moe.capacity_factor and model.moe.eval_capacity_factor, or '
        'choose dispatch dropless')


def _check_experts_of_token(moe: MoEConfig, router: Router) -> None:
  """Checks top_k, the number of experts that each token goes to.

  Args:
    moe: the config of the mixture of experts.
    router: the router that the config names.

  Raises:
    RequestError: if the router, the gates or the number of experts do not allow
      this top_k.
  """
  # A router whose number of experts is fixed has it as its top_k, others 0.
  require(router.top_k in (0, moe.top_k),
          f'model.moe.top_k is {moe.top_k}, but model.moe.router {moe.router} '
          f'chooses {router.top_k}: set it to {router.top_k}, or choose router '
          'topk')
  # The input can be multiplied by a gate only if the token has no other.
  if moe.gate_inputs and (moe.top_k != 1 or router.experts_choose):
    raise RequestError(
        f'model.moe.gate_inputs is True and model.moe.top_k {moe.top_k}, and a '
        'token has one input for all of its experts: set top_k to 1, or '
        'gate_inputs to False')
  if moe.top_k > moe.all_experts:
    most = f'model.moe.num_experts {moe.num_experts}'
    if moe.zero_experts:
      most += f' + model.moe.zero_experts {moe.zero_experts}'
    raise RequestError(f'model.moe.top_k is {moe.top_k}: choose 1 to {most}')
  if 'moe.expert_groups' in router.fields:
    _check_expert_groups(moe, router)


def _check_mup_base(moe: MoEConfig) -> None:
  """Checks that muP has rules over the number of experts, and over that of the
  experts of a token, for all parts of a mixture.

  Args:
    moe: the config of the mixture, which has a base of other numbers or none.

  Raises:
    RequestError: for gates whose sum depends on these numbers, zero experts,
      whose number does too, and a bias that moves by steps of one size beside
      scores that fall with the number of experts.
  """
  bases = (('num_experts', 'mup_base_experts'), ('top_k', 'mup_base_top_k'))
  for name, base_name in bases:
    number, base = getattr(moe, name), getattr(moe, base_name)
    if base in (0, number):
      continue
    request = (f'model.moe.{name} is {number} and model.moe.{base_name} {base}'
               ', between which muP has no rule for ')
    base_top_k = moe.mup_base_top_k or moe.top_k
    for top_k in (moe.top_k, base_top_k):
      unscaled = dataclasses.replace(moe, top_k=top_k, gate_scale=1.0)
      require(has_whole_gates(unscaled), f'{request}gates that do not sum to '
              '1: choose a router and moe.normalize_gates with which they do, '
              'and 2 or more for top_k and its base')
    require(not moe.zero_experts, f'{request}model.moe.zero_experts '
            f'{moe.zero_experts}: set it to 0')
    has_falling_scores = moe.router == 'softmax_bias'
    require(name == 'top_k' or not has_falling_scores,
            f"{request}model.moe.router 'softmax_bias', whose scores fall with "
            'the number of experts while the steps of its bias do not: choose '
            'sigmoid')


def _check_expert_groups(moe: MoEConfig, router: Router) -> None:
  """Checks the groups of experts. A token may choose experts only from its
  top_groups best groups (DeepSeek-V3).

  Args:
    moe: the config of the mixture of experts.
    router: the router that the config names.

  Raises:
    RequestError: if the number of groups does not divide that of the experts,
      or a token's groups have fewer experts than it chooses.
  """
  E, groups, kept = moe.all_experts, moe.expert_groups, moe.top_groups
  if groups == 1:
    return
  # A token chooses top_k experts of its `kept` best groups, which have
  # E / groups experts each.
  divides_experts = E % groups == 0 and kept <= groups
  has_enough_experts = moe.top_k <= kept * E // groups
  # A router with a bias scores a group by the sum of its two best experts.
  has_two_experts = E > groups or not router.has_bias
  require(divides_experts and has_enough_experts and has_two_experts,
          f'model.moe.expert_groups is {groups}, model.moe.top_groups {kept} '
          f'and model.moe.top_k {moe.top_k}: of {E} experts choose groups that '
          'divide them, as many of these at most, and as many experts as they '
          'have at most; a router with a bias needs two experts of a group')


def void_zero_experts(moe: MoEConfig, routed: Routing) -> Routing:
  """Returns the routing without its assignments to zero experts: these return
  their input and compute nothing, so the dispatch must not see them.

  The suffixes name axes: A assignments (pairs of a token and its expert), T
  tokens, E experts.
  """
  if not moe.zero_experts:
    return routed
  # Zero experts have the numbers after the E others, and E is no expert.
  E = moe.num_experts
  return routed.replace(
      expert_A=jnp.minimum(routed.expert_A, E),
      gate_A=jnp.where(routed.expert_A < E, routed.gate_A, 0.0),
      probs_TE=routed.probs_TE[:, :E])


def find_zero_experts(moe: MoEConfig, routed: Routing
                      ) -> tuple[jax.Array, jax.Array]:
  """Finds the assignments to zero experts, which return their input unchanged
  and need no computation.

  The suffixes name axes: A assignments (pairs of a token and its expert), T
  tokens.

  Args:
    moe: the config of the mixture of experts.
    routed: the assignments of the tokens, and their gates.

  Returns:
    Whether an assignment goes to a zero expert, bool [A]; and the sum of the
    gates of such assignments for each token, [T], which multiplies the token.
  """
  # Zero experts have the numbers from num_experts to all_experts - 1. The
  # number all_experts stands for a void assignment.
  is_zero_A = (routed.expert_A >= moe.num_experts) & (
      routed.expert_A < moe.all_experts)
  gate_A = jnp.where(is_zero_A, routed.gate_A, 0.0)
  gate_T = gate_A.reshape(-1, routed.choices).sum(1)
  return is_zero_A, gate_T


def has_whole_gates(moe: MoEConfig) -> bool:
  """Returns whether the gates of each token sum to 1."""
  router = router_of(moe)
  if moe.gate_scale != 1:
    return False
  if router.has_whole_gates:
    return True
  return not router.experts_choose and moe.normalize_gates and moe.top_k > 1


def mean_active_experts(moe: MoEConfig) -> float:
  """Returns how many of the routed experts a token goes through, in the mean.

  Args:
    moe: the config of the mixture of experts.
  """
  # Experts that choose take as many tokens as their capacity allows. A capacity
  # factor of 0 stands for an even load, as in `route_expert_choice`.
  if router_of(moe).experts_choose:
    capacity_factor = 1.0
    if moe.capacity_factor:
      capacity_factor = moe.capacity_factor
    return min(moe.top_k * capacity_factor, moe.num_experts)
  # A token chooses top_k of all experts, of which the zero experts are none of
  # the routed ones.
  return moe.top_k * moe.num_experts / moe.all_experts


# The fields of config.model that routers read: those with logits, those whose
# logits have losses, those whose gates may be normalised, and those that may be
# limited to some groups of experts.
FIELDS_OF_LOGITS = ('moe.jitter', 'moe.logit_noise', 'moe.logit_bias',
                    'moe.router_dim', 'moe.router_memory')
FIELDS_OF_LEARNED = (
    *FIELDS_OF_LOGITS, 'moe.balance_loss', 'moe.z_loss_weight')
FIELDS_OF_NORMALIZED = (*FIELDS_OF_LEARNED, 'moe.normalize_gates')
FIELDS_OF_GROUPED = (
    *FIELDS_OF_NORMALIZED, 'moe.expert_groups', 'moe.top_groups')
# The router that chooses by a sigmoid of each logit, and a bias.
SIGMOID_ROUTER = Router(
    assign=functools.partial(route_by_scores, jax.nn.sigmoid),
    fields=(*FIELDS_OF_GROUPED, 'moe.bias_rate'), has_bias=True,
    wanted_experts=experts_of_best_scores)

ROUTERS = {
    'topk': Router(assign=route_topk, fields=FIELDS_OF_GROUPED),
    # It has one choice; normalize_gates is accepted, and changes nothing.
    'switch': Router(assign=route_switch, fields=FIELDS_OF_NORMALIZED, top_k=1),
    'gshard': Router(
        assign=route_gshard, fields=FIELDS_OF_LEARNED, top_k=2, draws=True,
        counts_first=True, has_whole_gates=True),
    # normalize_gates is accepted, and changes nothing.
    'expert_choice': Router(
        assign=route_expert_choice, fields=FIELDS_OF_NORMALIZED,
        competes_in_groups=True, experts_choose=True),
    'sigmoid': SIGMOID_ROUTER,
    'sigmoid_plain': Router(
        assign=SIGMOID_ROUTER.assign, fields=FIELDS_OF_NORMALIZED),
    'softmax_bias': SIGMOID_ROUTER._replace(
        assign=functools.partial(route_by_scores, jax.nn.softmax)),
    'sqrt_softplus': SIGMOID_ROUTER._replace(
        assign=functools.partial(route_by_scores, sqrt_softplus)),
    'sinkhorn': Router(assign=route_sinkhorn, fields=FIELDS_OF_NORMALIZED,
                       competes_in_groups=True),
    'hash': Router(assign=route_hashed, has_logits=False, hashes=True,
                   has_whole_gates=True),
    'hash_scored': Router(
        assign=route_hashed_by_scores,
        fields=(*FIELDS_OF_LOGITS, 'moe.normalize_gates'), hashes=True,
        has_table=True),
    'uniform': Router(assign=route_uniformly, has_logits=False,
                      has_whole_gates=True),
}


# The cost of a routing and how it fares: auxiliary losses, the health panel.
#
# With f_i the share of assignments that expert i gets, P_i the mean of the
# router's probability for it and I_i = P_i / sum P the normalised importance:
#
# switch      E sum_i f_i P_i     (Fedus et al. 2021, equation 4; GShard counts
#             first choices only, in f). 1 in perfect balance, whatever X is;
#             Hugging Face's Mixtral counts X times this.
# importance  E sum_i I_i^2       (Shazeer et al. 2017's CV^2, plus 1).
# sequence    the mean over sequences of the first, taken of each by itself
#             (DeepSeek-V3, 2024, equations 17 to 20, the mean over sequences).
#             f counts the experts that the scores alone would choose, without
#             the bias and the groups of the router (equation 18).
# router z    mean_t logsumexp(logits_t)^2   (ST-MoE: Zoph et al. 2022).
#
# Means run over all tokens but padding of what goes through the model at once:
# a value does not depend on groups or on shards. With `train.grad_accumulation`
# that is a micro-batch, and the step takes the mean of theirs, weighted by
# their tokens: a balance loss, no mean over tokens itself, then asks each
# micro-batch to be even.
#
# An entry of BALANCE_LOSSES is all that there is of one.


class BalanceLoss(NamedTuple):
  """A loss that asks for even load.

  Attributes:
    loss: (expert_A, mean_probs_E) -> scalar; None: there is none.
    metric: what the panel calls it.
    fields: the fields of config.model that it reads.
    by_sequence: whether it is taken of each sequence (a row of the batch), and
      the mean over them. It is computed only where it is chosen.
  """
  loss: Optional[Callable[[jax.Array, jax.Array], jax.Array]] = None
  metric: str = ''
  fields: tuple[str, ...] = ('moe.balance_weight',)
  by_sequence: bool = False


def count_assignments(expert_A: jax.Array, experts: int) -> jax.Array:
  """Returns the number of assignments of each expert, float32 [E]; void ones
  count nowhere."""
  is_expert_AE = expert_A[:, None] == jnp.arange(experts)[None]
  return is_expert_AE.sum(0).astype(jnp.float32)


def share_of_sum(x_E: jax.Array) -> jax.Array:
  """Returns each number's share of the sum, x / sum x; zeros where the sum is
  0."""
  total = x_E.sum()
  return x_E / jnp.where(total > 0, total, 1.0)


def switch_loss(expert_A: jax.Array, mean_probs_E: jax.Array) -> jax.Array:
  """Returns E sum_i f_i P_i (Fedus et al. 2021, equation 4)."""
  E = mean_probs_E.shape[0]
  share_E = share_of_sum(count_assignments(expert_A, E))
  return E * (share_E * mean_probs_E).sum()


def importance_loss(expert_A: jax.Array, mean_probs_E: jax.Array) -> jax.Array:
  """Returns E sum_i I_i^2 (Shazeer et al. 2017: CV^2, plus 1)."""
  del expert_A
  E = mean_probs_E.shape[0]
  return E * jnp.square(share_of_sum(mean_probs_E)).sum()


def mean_over_sequences(
    loss: Callable, expert_A: jax.Array, probs_TE: jax.Array,
    valid_T: jax.Array, rows: int) -> jax.Array:
  """Computes a balance loss for each sequence by itself, and returns the mean
  over the sequences. Padding counts nowhere, and a sequence that is all padding
  does not enter the mean.

  The suffixes name axes: A assignments (pairs of a token and its expert), T
  tokens, E experts, B sequences of L tokens.

  Args:
    loss: the loss of one sequence, (expert_A, mean_probs_E) -> scalar.
    expert_A: the expert of each assignment that counts, in the order of the
      tokens; E for a void one.
    probs_TE: the router's probabilities.
    valid_T: bool, which tokens are no padding.
    rows: B, the number of sequences.
  """
  # Sort tokens and assignments by sequence, and average the probabilities.
  valid_BL = valid_T.reshape(rows, -1)
  probs_BLE = probs_TE.reshape(*valid_BL.shape, -1) * valid_BL[..., None]
  count_B = valid_BL.sum(1)
  expert_BA = expert_A.reshape(rows, -1)
  mean_probs_BE = probs_BLE.sum(1) / jnp.maximum(count_B, 1)[:, None]
  # The loss of each sequence, and the mean over those that have tokens.
  loss_B = jax.vmap(loss)(expert_BA, mean_probs_BE)
  has_tokens_B = count_B > 0
  total = jnp.where(has_tokens_B, loss_B, 0.0).sum()
  return total / jnp.maximum(has_tokens_B.sum(), 1)


def entropy(p: jax.Array) -> jax.Array:
  """Returns the entropy over the last axis, as a fraction of its maximum."""
  size = p.shape[-1]
  h = -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1)
  if size == 1:
    return jnp.ones_like(h)
  return h / jnp.log(size)


def report_routing(
    moe: MoEConfig, routed: Routing, logits_TE: Optional[jax.Array],
    valid_T: jax.Array, kept_A: jax.Array, shards: int, rows: int) -> Report:
  """Returns the weighted losses of one layer, and its panel as `health`.

  Args:
    moe: the config.
    routed: what the router chose.
    logits_TE: the router's logits; None where it has none.
    valid_T: bool, the tokens that are no padding.
    kept_A: bool, the assignments that found room.
    shards: the number of devices that the experts are spread over.
    rows: the number of sequences that the tokens are.

  The panel: `dropped`, the share of assignments without room; `unserved`, of
  tokens that no expert serves; `load_E`, the share of assignments (before any
  is dropped) by expert; its `load_max` over mean, `load_entropy` (1: even) and
  share of experts `unused`; the router's `confidence` (mean of the highest
  probability) and `router_entropy` (1: undecided); `shard_imbalance`, the
  largest load of a shard over the mean; and each loss, raw.
  """
  E, router = moe.all_experts, router_of(moe)
  probs_TE = routed.probs_TE
  weight_T = valid_T / jnp.maximum(valid_T.sum(), 1).astype(jnp.float32)

  def mean_over_tokens(x_T: jax.Array) -> jax.Array:
    """Returns the mean over the tokens that are no padding."""
    return (x_T * weight_T).sum()

  # The losses.
  mean_probs_E = (probs_TE * weight_T[:, None]).sum(0)
  load_E = share_of_sum(count_assignments(routed.expert_A, E))
  load_E = jax.lax.stop_gradient(load_E)
  balance_losses = _balance_losses(
      moe, routed=routed, logits_TE=logits_TE, valid_T=valid_T,
      mean_probs_E=mean_probs_E, rows=rows)
  z = jnp.zeros(())
  if logits_TE is not None:
    z = mean_over_tokens(jnp.square(jax.nn.logsumexp(logits_TE, -1)))
  losses = {}
  if router.has_logits and not router.hashes:
    if moe.balance_loss in balance_losses:
      losses['balance'] = moe.balance_weight * balance_losses[moe.balance_loss]
    if moe.z_loss_weight:
      losses['router_z'] = moe.z_loss_weight * z

  # The panel. The share that found no room is of the assignments that are not
  # void; a shard's load is that of its experts.
  assigned = (routed.expert_A < E).sum()
  dropped = 1 - kept_A.sum() / jnp.maximum(assigned, 1)
  served_T = _count_serving_experts(routed, kept_A, valid_T.shape[0])
  panel = dict(
      dropped=dropped,
      unserved=mean_over_tokens(served_T == 0),
      load_E=load_E,
      load_max=E * load_E.max(),
      load_entropy=entropy(load_E),
      unused=(load_E == 0).mean(),
      confidence=mean_over_tokens(probs_TE.max(-1)),
      router_entropy=mean_over_tokens(entropy(probs_TE)))
  shard_loads = load_E[:moe.num_experts].reshape(shards, -1).sum(1)
  panel['shard_imbalance'] = shards * shard_loads.max()
  panel['z_loss'] = z
  for name, loss in balance_losses.items():
    panel[BALANCE_LOSSES[name].metric] = loss
  # No figure of the panel has a gradient.
  health = {}
  for name, figure in panel.items():
    health[name] = jax.lax.stop_gradient(jnp.asarray(figure, jnp.float32))
  return Report(losses=losses, health=health)


def _balance_losses(moe: MoEConfig, routed: Routing, *,
                    logits_TE: Optional[jax.Array], valid_T: jax.Array,
                    mean_probs_E: jax.Array, rows: int) -> dict[str, jax.Array]:
  """Computes the losses that ask for an even load of the experts. Those over
  all tokens are always computed; one over each sequence only if the config
  chooses it.

  The suffixes name axes: T tokens, E experts, A assignments (pairs of a token
  and its expert).

  Args:
    moe: the config of the mixture of experts.
    routed: the assignments of the tokens to experts.
    logits_TE: the router's logits; None if it has none.
    valid_T: bool, the tokens that are no padding.
    mean_probs_E: the mean of the router's probabilities over these tokens.
    rows: how many sequences the tokens are, one after another.

  Returns:
    The losses, {name: scalar}.
  """
  # The assignments that count: all, or the first choices. Those of a token
  # stand one after another, so every `choices`-th is a first choice.
  router = router_of(moe)
  counted_A = routed.expert_A
  if router.counts_first:
    counted_A = routed.expert_A[::routed.choices]

  # The losses over all tokens. They are reported whichever loss is chosen.
  losses = {}
  for name, balance in BALANCE_LOSSES.items():
    if balance.loss is not None and not balance.by_sequence:
      losses[name] = balance.loss(counted_A, mean_probs_E)

  # The loss over each sequence. Some routers would choose other experts by
  # their scores alone, and the loss counts these.
  chosen = BALANCE_LOSSES[moe.balance_loss]
  if chosen.by_sequence:
    wanted_A = counted_A
    if router.wanted_experts is not None:
      wanted_A = router.wanted_experts(moe, logits_TE, valid_T)
    losses[moe.balance_loss] = mean_over_sequences(
        chosen.loss, expert_A=wanted_A, probs_TE=routed.probs_TE,
        valid_T=valid_T, rows=rows)
  return losses


def _count_serving_experts(routed: Routing, kept_A: jax.Array, tokens: int
                           ) -> jax.Array:
  """Returns how many experts served each token, [T]; kept_A are the assignments
  that found room."""
  if not routed.experts_choose:
    return kept_A.reshape(tokens, -1).sum(1)
  zeros_T = jnp.zeros(tokens, jnp.int32)
  return zeros_T.at[routed.token_A].add(kept_A.astype(jnp.int32))


def summarize_window(load_WNE: jax.Array, tokens_W: jax.Array) -> dict:
  """Summarises how evenly the experts of each layer were loaded over the last W
  training steps.

  The suffixes name axes: W steps, N layers, E experts.

  Args:
    load_WNE: which share of the tokens' assignments each expert got.
    tokens_W: the weight of each step, such as the number of its tokens.

  Returns:
    A dict of arrays [N]:
      load_max: the largest load of an expert, divided by the mean load.
      unused: the share of experts without any load.
      load_entropy: the entropy of the loads as a fraction of its maximum, which
        is 1 if they are even.
  """
  # The mean load over the steps, weighed by their tokens.
  share_W = tokens_W / tokens_W.sum()
  load_NE = jnp.einsum('WNE,W->NE', load_WNE, share_W)
  return dict(
      load_max=load_NE.shape[1] * load_NE.max(1) / load_NE.sum(1),
      unused=(load_NE == 0).mean(1),
      load_entropy=entropy(load_NE / load_NE.sum(1, keepdims=True)),
  )


BALANCE_LOSSES = {
    'switch': BalanceLoss(switch_loss, 'balance_loss'),
    'importance': BalanceLoss(importance_loss, 'importance_loss'),
    'sequence': BalanceLoss(switch_loss, 'sequence_loss', by_sequence=True),
    'none': BalanceLoss(fields=()),
}
