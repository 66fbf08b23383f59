"""Optimisers and learning-rate schedules by name.

    g = clip(gradient);  u = direction(g);  p = p - lr_t * (u + decay * p)

The learning rate of a parameter is a share of lr_t (shares.py), 0 where it is
frozen. At update t (the first is t = 1) of T,

    lr_t = lr * min(t / warmup_steps, shape(t)),

which stays at shape(T) from there on. The shape is 1 until the warm-up ends, so
the two parts meet. Cosine, linear and wsd arrive at final_fraction at t = T,
cosine and linear at t = decay_steps where that is set.

Weight decay is decoupled and multiplied by the learning rate for every
optimiser (Loshchilov and Hutter 2019, as in optax and PyTorch), on the
parameters that optim.decay_mask selects; where it is empty, on matrices that
are no embeddings. Moments are kept and updates are computed in float32,
whatever model.param_dtype is; a parameter is rounded once, when the update is
added. A field of config.optim that the chosen optimiser or schedule does not
read has to stay at its default: setting it is refused. An entry of OPTIMIZERS
or SCHEDULES is all that there is of one.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from architectures.parts import paths
from architectures.parts.sharding import Role
from common.errors import one_of, require
from configs import base as base_config
from training.optim import matrices, shares, soap


class Entry(NamedTuple):
  """One optimiser or schedule.

  Attributes:
    make: of an optimiser, (config.optim, roles) -> a transformation of
      gradients; of a schedule, (updates done + 1, T, config.optim) -> the share
      of optim.lr.
    reads: the fields of config.optim that it reads and others may not; another
      one set is refused, not ignored.
  """
  make: Callable[..., Any]
  reads: tuple[str, ...] = ()


def _is_hidden(role: Role) -> bool:
  return role.matrix and role.kind == 'hidden'


def _adam(optim: ml_collections.ConfigDict) -> optax.GradientTransformation:
  return optax.scale_by_adam(optim.b1, optim.b2, optim.eps)


def _with_adam(optim: ml_collections.ConfigDict, roles: Any,
               direction: optax.GradientTransformation,
               chosen: Callable[[Role], bool] = _is_hidden
               ) -> optax.GradientTransformation:
  """Returns a direction of the parameters that are chosen by their role, and
  Adam of the others."""
  return optax.partition(
      {optim.name: direction, 'adam': _adam(optim)}, jax.tree.map(
          lambda role: optim.name if chosen(role) else 'adam', roles))


_ADAM = ('b1', 'b2', 'eps')
OPTIMIZERS = {
    # Kingma and Ba 2015, with the decay decoupled.
    'adamw': Entry(lambda optim, roles: _adam(optim), _ADAM),
    # Shazeer and Stern 2018, without momentum; lr is relative to a matrix's own
    # root mean square, as T5 and PaLM use it.
    'adafactor': Entry(
        lambda optim, roles: matrices.scale_by_adafactor(roles)),
    # Chen et al. 2023: the sign of an interpolated momentum.
    'lion': Entry(lambda optim, roles: optax.scale_by_lion(optim.b1, optim.b2),
                  ('b1', 'b2')),
    # Jordan et al. 2024: orthogonalised momentum for the hidden matrices.
    # Embeddings, the head, routers, norms and biases go by Adam. Updates are
    # scaled to 0.2 root mean square a matrix, Adam's usual size, so that one
    # optim.lr serves both (Liu et al. 2025, section 2.2). optim.momentum is
    # Muon's; 0.95 is its authors' choice.
    'muon': Entry(
        lambda optim, roles: _with_adam(optim, roles, matrices.scale_by_muon(
            roles, optim.momentum)), (*_ADAM, 'momentum')),
    # Li et al. 2025: Muon with steps of one size for all neurons of a matrix.
    # optim.momentum and optim.b2 are its own; 0.95 is its authors' choice for
    # both.
    'normuon': Entry(
        lambda optim, roles: _with_adam(optim, roles, matrices.scale_by_normuon(
            roles, optim.momentum, optim.b2)), (*_ADAM, 'momentum')),
    # Vyas et al. 2024: Adam in the eigenbasis of Shampoo, for all matrices, the
    # embedding and the head too; vectors go by Adam.
    'soap': Entry(
        lambda optim, roles: _with_adam(optim, roles, soap.scale_by_soap(
            roles, optim.b1, optim.b2, optim.eps, optim.precondition_every,
            optim.precondition_max), lambda role: role.matrix),
        (*_ADAM, 'precondition_every', 'precondition_max')),
    # Momentum as Sutskever et al. 2013 without Nesterov's look ahead.
    'sgd': Entry(lambda optim, roles: optax.trace(optim.momentum)
                 if optim.momentum else optax.identity(), ('momentum',)),
}


def _progress(t: jax.Array, start: float, end: float):
  """How far t is from start to end, in [0, 1]."""
  return jnp.clip((t - start) / jnp.maximum(end - start, 1), 0.0, 1.0)


def _cosine(t: jax.Array, steps: int, optim: ml_collections.ConfigDict):
  low = optim.final_fraction
  progress = _progress(t, optim.warmup_steps, steps)
  return low + (1 - low) * 0.5 * (1 + jnp.cos(math.pi * progress))


def _linear(t: jax.Array, steps: int, optim: ml_collections.ConfigDict):
  progress = _progress(t, optim.warmup_steps, steps)
  return 1 - (1 - optim.final_fraction) * progress


def _wsd(t: jax.Array, steps: int, optim: ml_collections.ConfigDict):
  start = steps - round(optim.decay_fraction * steps)
  return 1 - (1 - optim.final_fraction) * _progress(t, start, steps)


SCHEDULES = {
    # SGDR (Loshchilov and Hutter 2017, equation 5), without restarts.
    'cosine': Entry(_cosine, ('final_fraction', 'decay_steps')),
    'linear': Entry(_linear, ('final_fraction', 'decay_steps')),
    # 1 / sqrt(t), scaled to 1 where the warm-up ends (Vaswani et al. 2017).
    'rsqrt': Entry(lambda t, steps, optim: jnp.minimum(
        1.0, jnp.sqrt(jnp.maximum(optim.warmup_steps, 1) / t))),
    # Warm-up, stable, decay (Hu et al. 2024): linear over the last share.
    'wsd': Entry(_wsd, ('final_fraction', 'decay_fraction')),
    'constant': Entry(lambda t, steps, optim: jnp.ones_like(t)),
}


def rate(optim: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates done.
  optim.lr and optim.warmup_steps may be traced, as where several runs train as
  one program (training/vectorised.py).

  Args:
    optim: config.optim.
    steps: T, the run's train.steps.
  """
  shape = SCHEDULES[optim.schedule].make
  steps = optim.decay_steps or steps

  def schedule(count: jax.Array):
    t = jnp.asarray(count, jnp.float32) + 1
    warm = t / jnp.maximum(optim.warmup_steps, 1)  # never < 1 without one
    return optim.lr * jnp.minimum(shape(t, steps, optim), warm)

  return schedule


def check_optim(optim: ml_collections.ConfigDict) -> None:
  """Raises ValueError for fields of config.optim that are in their ranges, and
  do not fit each other. A field counts as set where it differs from the default
  of configs/base.py."""
  defaults = base_config.base().optim
  for selector, table in (('name', OPTIMIZERS), ('schedule', SCHEDULES)):
    choice = optim[selector]
    one_of(f'optim.{selector}', choice, table)
    for field in sorted({f for row in table.values() for f in row.reads}):
      readers = ', '.join(n for n, row in table.items() if field in row.reads)
      require(field in table[choice].reads or optim[field] == defaults[field],
              f'optim.{field} is {optim[field]}, which optim.{selector} '
              f'{choice!r} does not read (it is read by {readers}): leave it '
              f'at {defaults[field]}, or choose one of these')
  require(optim.decay_steps == 0 or optim.decay_steps > optim.warmup_steps,
          f'optim.decay_steps is {optim.decay_steps} and optim.warmup_steps '
          f'{optim.warmup_steps}: choose more than these, or 0 for train.steps')
  require(all(isinstance(row, tuple | list) and len(row) == 2
              and row[1] in (0, 1) for row in optim.decay_mask),
          f'optim.decay_mask is {optim.decay_mask!r}: it must be pairs of '
          '(pattern, 1 or 0), 1 for what decays')


def make(optim: ml_collections.ConfigDict, steps: int, roles: Any,
         rates: Any = None, parts: Any = None) -> optax.GradientTransformation:
  """Builds the optimiser of a run, whose config.optim was checked; lr,
  warmup_steps and weight_decay may be traced, as where several runs train as
  one (training/vectorised.py). It takes whole trees, or those that
  shares.trained returns, and gives updates like the latter.

  Args:
    optim: config.optim.
    steps: train.steps, the length of the schedule.
    roles: the Role of each parameter, as a tree (training/runs.py).
    rates: what each parameter's learning rate is multiplied by, its decay
      apart (training/optim/mup.py); None: 1.
    parts: what its learning rate is multiplied by, its decay included
      (training/optim/shares.py); None: 1.
  """
  keep = lambda tree: None if tree is None else shares.trained(parts, tree)
  roles = keep(roles)
  decays = (paths.match(optim.decay_mask, roles, 'optim.decay_mask')
            if optim.decay_mask else jax.tree.map(
                lambda role: role.matrix and role.kind != 'embedding', roles))
  # All four always stand in the chain, so that the state's tree does not
  # depend on numbers that a resumed run may change.
  tx = optax.chain(
      clip_by_global_norm(optim.clip_norm) if optim.clip_norm
      else optax.identity(),
      _with_rates(OPTIMIZERS[optim.name].make(optim, roles), keep(rates)),
      _add_decay(optim.weight_decay, decays),
      _with_rates(optax.scale_by_learning_rate(rate(optim, steps)),
                  keep(parts)))

  def cast(tree: Any):
    """In bfloat16 a second moment with b2 = 0.999 would never fall: a
    thousandth of it is less than half of its last digit."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), keep(tree))

  return optax.GradientTransformation(
      lambda params: tx.init(cast(params)),
      lambda grads, state, params: tx.update(cast(grads), state, cast(params)))


def _with_rates(tx: optax.GradientTransformation, rates: Any
                ) -> optax.GradientTransformation:
  """Multiplies the updates of `tx` by the leaves of `rates`. Its state stays
  as it is: a checkpoint is one whether there are rates or not."""
  if rates is None:
    return tx

  def update(grads: Any, state: Any, params: Any = None):
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(lambda u, rate: u * rate, updates, rates), state

  return optax.GradientTransformation(tx.init, update)


def _add_decay(weight_decay: float | jax.Array, decays: Any
               ) -> optax.GradientTransformation:
  """Adds weight_decay * p to the updates of the parameters that `decays`
  selects. optax's own, given a mask, has another tree of states."""
  return optax.stateless(lambda updates, params: jax.tree.map(
      lambda u, p, decay: u + weight_decay * p if decay else u,
      updates, params, decays))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
  """Scales all gradients so that their joint norm is at most `limit`.

  optax's own selects between whole arrays, which on CPU keeps XLA from fusing
  the clip into the update: 84 ms against 30 ms at 35M parameters with AdamW.
  """

  def clip(updates: Any, _: Any):
    scale = jnp.minimum(1.0, limit / optax.tree.norm(updates))
    return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates)

  return optax.stateless(clip)


def update_if(ok: jax.Array, tx: optax.GradientTransformation, grads: Any,
              state: Any, params: Any):
  """Returns (params, state) after one update; unchanged unless `ok`.

  A branch, not a select: on CPU jnp.where over parameters and state costs six
  times the update itself (190 ms against 30 ms at 35M parameters).
  """

  def apply(grads: Any, state: Any, params: Any):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  skip = lambda grads, state, params: (params, state)
  return jax.lax.cond(ok, apply, skip, grads, state, params)


def opt_state_shardings(tx: optax.GradientTransformation, params: Any,
                        shardings: Any):
  """Returns the sharding of each leaf of tx.init(params), as one tree.

  A moment, whose path in the state ends with that of its parameter, lies where
  the parameter lies. Along an axis of another size, as those that a factored
  moment has summed away, it is whole, and so are counters.

  Args:
    tx: the optimiser.
    params: the parameters' shapes, unboxed.
    shardings: a NamedSharding for each parameter.
  """
  placed = {path: (x.shape, sharding) for (path, x), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings),
      strict=True)}
  mesh = jax.tree.leaves(shardings)[0].mesh

  def place(path: tuple, leaf: Any):
    ends = (path[i:] for i in range(len(path)))
    shape, sharding = next(
        (placed[end] for end in ends if end in placed), ((), None))
    spec = [] if sharding is None else [
        axis if size == whole else None for size, whole, axis in zip(
            leaf.shape, shape, (*sharding.spec, *(None,) * leaf.ndim))]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(
      place, jax.eval_shape(tx.init, params))
