"""Optimisers by name, each one chain: clip, direction, decay, rate.

    g = clip(gradient);  u = direction(g);  p = p - lr_t * (u + decay * p)

The learning rate of a parameter is a share of lr_t (shares.py), 0 where it is
frozen.
Weight decay is decoupled and multiplied by the learning rate for every one of
them (Loshchilov and Hutter 2019, as in optax and PyTorch), on the parameters
that optim.decay_mask selects; where it is empty, on matrices that are no
embeddings. Moments are kept and updates are computed in
float32, whatever model.param_dtype is; a parameter is rounded once, when the
update is added. A field of config.optim that the chosen optimiser does not
read has to stay at its default: setting it is refused. An entry of OPTIMIZERS
is all that there is of one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from architectures.parts.roles import Role
from configs.errors import one_of, require
from training import paths
from training.optim import (adafactor, normuon, orthogonal, schedules,
                            shares, soap, trees)


def _adamw(optim: ml_collections.ConfigDict, roles: Any):
  """Adam (Kingma and Ba 2015), with the decay decoupled."""
  del roles
  return optax.scale_by_adam(optim.b1, optim.b2, optim.eps)


def _adafactor(optim: ml_collections.ConfigDict, roles: Any):
  """Shazeer and Stern 2018, without momentum; lr is relative to a matrix's
  own root mean square, as T5 and PaLM use it."""
  del optim
  return optax.chain(adafactor.scale_by_factored_rms(roles),
                     adafactor.clip_by_rms(roles),
                     adafactor.scale_by_parameter_rms(roles))


def _lion(optim: ml_collections.ConfigDict, roles: Any):
  """Chen et al. 2023: the sign of an interpolated momentum."""
  del roles
  return optax.scale_by_lion(optim.b1, optim.b2)


def _muon(optim: ml_collections.ConfigDict, roles: Any):
  """Jordan et al. 2024: orthogonalised momentum for the hidden matrices.

  Embeddings, the head, routers, norms and biases go by Adam (b1, b2, eps).
  Updates are scaled to 0.2 root mean square a matrix, Adam's usual size, so
  that one optim.lr serves both (Liu et al. 2025, section 2.2).
  `optim.momentum` is Muon's; 0.95 is its authors' choice.
  """
  def scale(axes: Any, u: jax.Array):
    return 0.2 * max(axes.sizes(u.shape)) ** 0.5 * u

  muon = optax.chain(
      orthogonal.scale_by_muon(roles, optim.momentum),
      optax.stateless(lambda updates, _: trees.over(roles, scale, updates)))
  return _with_adam(optim, roles, 'muon', muon, _is_hidden)


def _normuon(optim: ml_collections.ConfigDict, roles: Any):
  """Li et al. 2025: Muon with steps of one size for all neurons of a matrix.

  `optim.momentum` and `optim.b2` are its own; 0.95 is its authors' choice for
  both. What is no hidden matrix goes by Adam, as with Muon.
  """
  return _with_adam(optim, roles, 'normuon', normuon.scale_by_normuon(
      roles, optim.momentum, optim.b2), _is_hidden)


def _soap(optim: ml_collections.ConfigDict, roles: Any):
  """Vyas et al. 2024: Adam in the eigenbasis of Shampoo, for all matrices,
  the embedding and the head too; vectors go by Adam."""
  return _with_adam(optim, roles, 'soap', soap.scale_by_soap(
      roles, optim.b1, optim.b2, optim.eps, optim.precondition_every,
      optim.precondition_max), lambda role: role.matrix)


def _is_hidden(role: Role) -> bool:
  return role.matrix and role.kind == 'hidden'


def _with_adam(optim: ml_collections.ConfigDict, roles: Any, name: str,
               direction: optax.GradientTransformation,
               chosen: Callable[[Role], bool]) -> optax.GradientTransformation:
  """Returns a direction of the parameters that are chosen by their role, which
  has `name` in the state, and Adam of the others."""
  labels = jax.tree.map(lambda role: name if chosen(role) else 'adam', roles)
  return optax.partition({name: direction, 'adam': _adamw(optim, roles)},
                         labels)


def _sgd(optim: ml_collections.ConfigDict, roles: Any):
  """Momentum as Sutskever et al. 2013 without Nesterov's look ahead."""
  del roles
  return optax.trace(optim.momentum) if optim.momentum else optax.identity()


class Optimizer(NamedTuple):
  """One optimiser.

  Attributes:
    direction: (config.optim, roles) -> a transformation of gradients.
    reads: the fields of config.optim that it reads and others may not; another
      one set is refused, not ignored.
  """
  direction: Callable[..., optax.GradientTransformation]
  reads: tuple[str, ...] = ()


OPTIMIZERS = {
    'adamw': Optimizer(_adamw, ('b1', 'b2', 'eps')),
    'adafactor': Optimizer(_adafactor),
    'lion': Optimizer(_lion, ('b1', 'b2')),
    'muon': Optimizer(_muon, ('b1', 'b2', 'eps', 'momentum')),
    'normuon': Optimizer(_normuon, ('b1', 'b2', 'eps', 'momentum')),
    'soap': Optimizer(_soap, ('b1', 'b2', 'eps', 'precondition_every',
                              'precondition_max')),
    'sgd': Optimizer(_sgd, ('momentum',)),
}


def check_optim(optim: ml_collections.ConfigDict) -> None:
  """Raises ValueError for fields of config.optim that are in their ranges, and
  do not fit each other."""
  one_of('optim.name', optim.name, OPTIMIZERS)
  schedules.check_schedule(optim)
  require(all(isinstance(row, tuple | list) and len(row) == 2
              for row in optim.decay_mask),
          f'optim.decay_mask is {optim.decay_mask!r}: it must be pairs of '
          '(pattern, 1 or 0)')
  for pattern, value in optim.decay_mask:
    require(value in (0, 1), f'optim.decay_mask has {value!r} for '
            f'{pattern!r}: choose 1 (decays) or 0 (does not)')
  schedules.refuse_unread(optim, 'name', OPTIMIZERS)


def make(optim: ml_collections.ConfigDict, steps: int, roles: Any,
         rates: Any = None, parts: Any = None) -> optax.GradientTransformation:
  """Builds the optimiser of a run, whose config.optim was checked; lr,
  warmup_steps and weight_decay may be traced, as where several runs train as
  one (training/vectorised.py).

  Args:
    optim: config.optim.
    steps: train.steps, the length of the schedule.
    roles: the Role of each parameter, as a tree (training/step.py).
    rates: what each parameter's learning rate is multiplied by, its decay
      apart (training/optim/mup.py); None: 1.
    parts: what its learning rate is multiplied by, its decay included
      (training/optim/shares.py); None: 1.
  """
  return shares.of_trained(parts, lambda keep: _chain(
      optim, steps, keep(roles), None if rates is None else keep(rates),
      None if parts is None else keep(parts)))


def _chain(optim: ml_collections.ConfigDict, steps: int, roles: Any,
           rates: Any, parts: Any) -> optax.GradientTransformation:
  decays = (paths.match(optim.decay_mask, roles, 'optim.decay_mask')
            if optim.decay_mask else jax.tree.map(
                lambda role: role.matrix and role.kind != 'embedding', roles))
  # All four always stand in the chain, so that the state's tree does not
  # depend on numbers that a resumed run may change.
  return in_float32(optax.chain(
      clip_by_global_norm(optim.clip_norm) if optim.clip_norm
      else optax.identity(),
      with_rates(OPTIMIZERS[optim.name].direction(optim, roles), rates),
      add_decay(optim.weight_decay, decays),
      with_rates(optax.scale_by_learning_rate(schedules.rate(optim, steps)),
                 parts)))


def in_float32(tx: optax.GradientTransformation
               ) -> optax.GradientTransformation:
  """Gives `tx` the gradients and the parameters in float32.

  In bfloat16 a second moment with b2 = 0.999 would never fall: a thousandth
  of it is less than half of its last digit.
  """

  def cast(tree: Any):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

  def init(params: Any):
    return tx.init(cast(params))

  def update(grads: Any, state: Any, params: Any):
    return tx.update(cast(grads), state, cast(params))

  return optax.GradientTransformation(init, update)


def with_rates(tx: optax.GradientTransformation, rates: Any
               ) -> optax.GradientTransformation:
  """Multiplies the updates of `tx` by the leaves of `rates`. Its state stays
  as it is: a checkpoint is one whether there are rates or not."""
  if rates is None:
    return tx

  def update(grads: Any, state: Any, params: Any = None):
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(lambda u, rate: u * rate, updates, rates), state

  return optax.GradientTransformation(tx.init, update)


def add_decay(weight_decay: float | jax.Array, decays: Any
              ) -> optax.GradientTransformation:
  """Adds weight_decay * p to the updates of the parameters that `decays`
  selects. optax's own, given a mask, has another tree of states."""

  def add(updates: Any, params: Any):
    return jax.tree.map(lambda u, p, decay: u + weight_decay * p
                        if decay else u, updates, params, decays)

  return optax.stateless(add)


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

  def skip(grads: Any, state: Any, params: Any):
    del grads
    return params, state

  return jax.lax.cond(ok, apply, skip, grads, state, params)


def opt_state_shardings(tx: optax.GradientTransformation, params: Any,
                        shardings: Any):
  """Returns the sharding of each leaf of tx.init(params), as one tree.

  A moment lies where its parameter lies. Along an axis of another size, as
  those that a factored moment has summed away, it is whole, and so are
  counters.

  Args:
    tx: the optimiser.
    params: the parameters' shapes, unboxed.
    shardings: a NamedSharding for each parameter.
  """
  mesh = jax.tree.leaves(shardings)[0].mesh
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  masked = lambda x: isinstance(x, optax.MaskedNode)

  def place(leaf: Any, param: Any, sharding: Any):
    if masked(leaf):
      return leaf
    spec = tuple(sharding.spec) + (None,) * (param.ndim - len(sharding.spec))
    spec = [axis if size == of_param else None for size, of_param, axis in zip(
        leaf.shape, param.shape, spec, strict=True)]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

  return optax.tree_utils.tree_map_params(
      tx, place, jax.eval_shape(tx.init, params), params, shardings,
      transform_non_params=lambda _: whole, is_leaf=masked)
