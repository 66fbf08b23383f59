"""What a routing costs and how it fares: auxiliary losses, the health panel.

With f_i the share of assignments that expert i gets, P_i the mean of the
router's probability for it and I_i = P_i / sum P the normalised importance:

switch      E sum_i f_i P_i     (Fedus et al. 2021, equation 4; GShard counts
            first choices only, in f). 1 in perfect balance, whatever X is;
            Hugging Face's Mixtral counts X times this.
importance  E sum_i I_i^2       (Shazeer et al. 2017's CV^2, plus 1).
sequence    the mean over sequences of the first, taken of each by itself
            (DeepSeek-V3, 2024, equations 17 to 20, the mean over sequences).
            f counts the experts that the scores alone would choose, without
            the bias and the groups of the sigmoid router (equation 18).
router z    mean_t logsumexp(logits_t)^2   (ST-MoE: Zoph et al. 2022).

Means run over all tokens but padding of what goes through the model at once:
a value does not depend on groups or on shards. With `train.grad_accumulation`
that is a micro-batch, and the step takes the mean of theirs, weighted by their
tokens: a balance loss, no mean over tokens itself, then asks each micro-batch
to be even.

An entry of BALANCE_LOSSES, at the end of this file, is all that there is of a
balance loss.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp

from architectures.parts.moe import routing as routers
from architectures.parts.moe.config import MoEConfig
from architectures.parts.moe.routing import Routing
from configs.errors import require


class Balance(NamedTuple):
  """A loss that asks for even load.

  Attributes:
    loss: (expert_A, mean_probs_E) -> scalar; None: there is none.
    metric: what the panel calls it.
    fields: of config.model that it reads.
    by_sequence: whether it is taken of each sequence (a row of the batch), and
      the mean over them. It is computed only where it is chosen.
  """
  loss: Optional[Callable[[jax.Array, jax.Array], jax.Array]] = None
  metric: str = ''
  fields: tuple[str, ...] = ()
  by_sequence: bool = False


def counts(expert_A: jax.Array, experts: int) -> jax.Array:
  """Assignments of each expert, float32 [E]; void ones count nowhere."""
  return (expert_A[:, None] == jnp.arange(experts)[None]).sum(0).astype(
      jnp.float32)


def share(x_E: jax.Array) -> jax.Array:
  """x / sum x, or zeros."""
  total = x_E.sum()
  return x_E / jnp.where(total > 0, total, 1.0)


def switch_loss(expert_A: jax.Array, mean_probs_E: jax.Array) -> jax.Array:
  E = mean_probs_E.shape[0]
  return E * (share(counts(expert_A, E)) * mean_probs_E).sum()


def importance_loss(mean_probs_E: jax.Array) -> jax.Array:
  return mean_probs_E.shape[0] * jnp.square(share(mean_probs_E)).sum()


def of_each_sequence(loss: Callable, expert_A: jax.Array, probs_TE: jax.Array,
                     valid_T: jax.Array, rows: int) -> jax.Array:
  """Returns the mean of a balance loss over the sequences that are not all
  padding; within one, padding counts nowhere."""
  valid_BL = valid_T.reshape(rows, -1)
  probs_BLE = probs_TE.reshape(*valid_BL.shape, -1) * valid_BL[..., None]
  count_B = valid_BL.sum(1)
  each_B = jax.vmap(loss)(
      expert_A.reshape(rows, -1),
      probs_BLE.sum(1) / jnp.maximum(count_B, 1)[:, None])
  return ((each_B * (count_B > 0)).sum()
          / jnp.maximum((count_B > 0).sum(), 1))


def entropy(p: jax.Array) -> jax.Array:
  """Over the last axis, as a fraction of its maximum."""
  size = p.shape[-1]
  h = -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1)
  return h / jnp.log(size) if size > 1 else jnp.ones_like(h)


def report(m: MoEConfig, routing: Routing, logits_TE: Optional[jax.Array],
           valid_T: jax.Array, kept_A: jax.Array, shards: int, rows: int
           ) -> dict:
  """Returns {'losses': weighted terms, 'health': the panel of one layer}.

  Args:
    m: the config.
    routing: what the router chose.
    logits_TE: its logits, or None where it has none.
    valid_T: which tokens are no padding.
    kept_A: bool, the assignments that found room.
    shards: over how many devices the experts are spread.
    rows: how many sequences the tokens are.

  The panel: `dropped`, the share of assignments without room; `unserved`, of
  tokens that no expert serves; `load_E`, the share of assignments (before any
  is dropped) by expert; its `load_max` over mean, `load_entropy` (1: even) and
  share of experts `unused`; the router's `confidence` (mean of the highest
  probability) and `router_entropy` (1: undecided); `shard_imbalance`, the
  largest load of a shard over the mean; and each loss, raw.
  """
  E = m.num_experts
  weight_T = valid_T / jnp.maximum(valid_T.sum(), 1).astype(jnp.float32)
  mean = lambda x_T: (x_T * weight_T).sum()
  probs_TE = routing.probs_TE
  mean_probs_E = (probs_TE * weight_T[:, None]).sum(0)
  load_E = jax.lax.stop_gradient(share(counts(routing.expert_A, E)))
  router = routers.of(m)
  counted_A = (routing.expert_A[::routing.choices] if router.counts_first
               else routing.expert_A)
  raw = {name: row.loss(counted_A, mean_probs_E)
         for name, row in BALANCE_LOSSES.items()
         if row.loss and not row.by_sequence}
  chosen = BALANCE_LOSSES[m.balance_loss]
  if chosen.by_sequence:
    wanted_A = (router.wanted(m, logits_TE, valid_T) if router.wanted
                else counted_A)
    raw[m.balance_loss] = of_each_sequence(chosen.loss, wanted_A, probs_TE,
                                           valid_T, rows)
  z = (jnp.zeros(()) if logits_TE is None else
       mean(jnp.square(jax.nn.logsumexp(logits_TE, -1))))
  losses = {}
  if router.logits:
    if m.balance_loss in raw:
      losses['balance'] = m.balance_weight * raw[m.balance_loss]
    if m.z_loss_weight:
      losses['router_z'] = m.z_loss_weight * z
  assigned = (routing.expert_A < E).sum()
  health = dict(
      dropped=1 - kept_A.sum() / jnp.maximum(assigned, 1),
      unserved=mean(_served(routing, kept_A, valid_T.shape[0]) == 0),
      load_E=load_E,
      load_max=E * load_E.max(),
      load_entropy=entropy(load_E),
      unused=(load_E == 0).mean(),
      confidence=mean(probs_TE.max(-1)),
      router_entropy=mean(entropy(probs_TE)),
      shard_imbalance=shards * load_E.reshape(shards, -1).sum(1).max(),
      z_loss=z,
      **{BALANCE_LOSSES[name].metric: x for name, x in raw.items()},
  )
  health = {name: jax.lax.stop_gradient(jnp.asarray(x, jnp.float32))
            for name, x in health.items()}
  return {'losses': losses, 'health': health}


def _served(routing: Routing, kept_A: jax.Array, tokens: int) -> jax.Array:
  """How many experts each token was served by, [T]."""
  if routing.choices:
    return kept_A.reshape(tokens, -1).sum(1)
  return jnp.zeros(tokens, jnp.int32).at[routing.token_A].add(
      kept_A.astype(jnp.int32))


def window(load_WNE: jax.Array, tokens_W: jax.Array) -> dict:
  """The panel over a window of steps: {name: [N] by layer}.

  Args:
    load_WNE: `load_E` of each step and layer.
    tokens_W: how much each step counts.
  """
  share_W = tokens_W / tokens_W.sum()
  load_NE = jnp.einsum('WNE,W->NE', load_WNE, share_W)
  return dict(
      load_max=load_NE.shape[1] * load_NE.max(1) / load_NE.sum(1),
      unused=(load_NE == 0).mean(1),
      load_entropy=entropy(load_NE / load_NE.sum(1, keepdims=True)),
  )


def check_balance(m: MoEConfig) -> None:
  """Raises RequestError for a balance loss that the router has no use for."""
  require(not (BALANCE_LOSSES[m.balance_loss].by_sequence
               and routers.of(m).experts_choose),
          f'model.moe.balance_loss is {m.balance_loss}, which is of what the '
          f'tokens of a sequence choose, and with model.moe.router {m.router} '
          'they do not: choose none')


BALANCE_LOSSES = {
    'switch': Balance(switch_loss, 'balance_loss', ('moe.balance_weight',)),
    'importance': Balance(
        lambda expert_A, mean_probs_E: importance_loss(mean_probs_E),
        'importance_loss', ('moe.balance_weight',)),
    'sequence': Balance(switch_loss, 'sequence_loss', ('moe.balance_weight',),
                        by_sequence=True),
    'none': Balance(),
}
