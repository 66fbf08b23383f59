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
are no embeddings. With optim.decay_time it is derived from a time scale.

Moments are kept and updates are computed in float32, whatever model.param_dtype
is; a parameter is rounded once, when the update is added.

A field of config.optim that the chosen optimiser or schedule does not read has
to stay at its default: setting it is refused. To add an optimiser or a
schedule, write its function, and its entry in OPTIMIZERS or SCHEDULES.
"""

from collections.abc import Callable, Mapping
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from architectures.parts import paths
from architectures.parts.sharding import Role
from common.errors import check_choice, require
from configs import base as base_config
from training.optim import hyperball, matrices, shares
from training.optim.soap import scale_by_soap


Optim = ml_collections.ConfigDict  # config.optim
Transformation = optax.GradientTransformation


# Optimisers: each returns the direction of a step, before the learning rate and
# the decay. Its arguments are config.optim, and a tree with the Role of each
# parameter, which says which of its axes are inputs of a product.


def adamw(optim: Optim, roles: Any) -> Transformation:
  """Returns the direction of Adam (Kingma and Ba 2015), whose weight decay is
  decoupled."""
  del roles
  return optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)


def ademamix(optim: Optim, roles: Any) -> Transformation:
  """Returns the direction of AdEMAMix (Pagliardini et al. 2024, arXiv
  2409.03137), whose momentum is that of Adam plus `alpha` times one that decays
  by b3 and so remembers thousands of steps; both are constant."""
  del roles
  return optax.contrib.scale_by_ademamix(
      b1=optim.b1, b2=optim.b2, b3=optim.b3, alpha=optim.alpha, eps=optim.eps)


def adafactor(optim: Optim, roles: Any) -> Transformation:
  """Returns the direction of Adafactor (Shazeer and Stern 2018) without
  momentum; lr is relative to a matrix's own root mean square, as T5 and PaLM
  use it."""
  del optim
  return matrices.scale_by_adafactor(roles)


def lion(optim: Optim, roles: Any) -> Transformation:
  """Returns the direction of Lion (Chen et al. 2023): the sign of an
  interpolated momentum."""
  del roles
  return optax.scale_by_lion(b1=optim.b1, b2=optim.b2)


def muon(optim: Optim, roles: Any) -> Transformation:
  """Builds Muon (Jordan et al. 2024), whose update of a hidden matrix is its
  orthogonalised momentum. Embeddings, the head, routers, norms and biases are
  trained by Adam.

  A matrix's update is scaled to 0.2 root mean square, which is usual for Adam,
  so that one learning rate serves both (Liu et al. 2025, section 2.2).

  Args:
    optim: config.optim. Its `momentum` is Muon's; the authors chose 0.95.
    roles: the Role of each parameter (what it is used for, and along which
      axes), as a tree.
  """
  direction = matrices.scale_by_muon(roles, optim.momentum)
  return _combine_with_adam(optim, roles=roles, direction=direction,
                            is_chosen=_is_hidden)


def normuon(optim: Optim, roles: Any) -> Transformation:
  """Returns the direction of NorMuon (Li et al. 2025): Muon with steps of one
  size for all neurons of a matrix. optim.momentum and optim.b2 are its own;
  0.95 is its authors' choice for both."""
  direction = matrices.scale_by_normuon(roles, optim.momentum, optim.b2)
  return _combine_with_adam(optim, roles=roles, direction=direction,
                            is_chosen=_is_hidden)


def soap(optim: Optim, roles: Any) -> Transformation:
  """Returns the direction of SOAP (Vyas et al. 2024): Adam in the eigenbasis of
  Shampoo, for all matrices, the embedding and the head too; vectors go by Adam.
  """
  direction = scale_by_soap(
      roles, b1=optim.b1, b2=optim.b2, eps=optim.eps,
      basis_every=optim.precondition_every, max_side=optim.precondition_max)
  return _combine_with_adam(optim, roles=roles, direction=direction,
                            is_chosen=_is_matrix)


def sgd(optim: Optim, roles: Any) -> Transformation:
  """Returns the direction of gradient descent with momentum (Sutskever et al.
  2013), without Nesterov's look ahead."""
  del roles
  if optim.momentum:
    return optax.trace(optim.momentum)
  return optax.identity()


def _is_matrix(role: Role) -> bool:
  return role.is_matrix


def _is_hidden(role: Role) -> bool:
  return role.is_hidden_matrix


def _combine_with_adam(optim: Optim, roles: Any, direction: Transformation,
                       is_chosen: Callable[[Role], bool]) -> Transformation:
  """Returns an optimiser that trains the chosen parameters by `direction`, and
  all others by Adam.

  Args:
    optim: config.optim.
    roles: the Role of each parameter (what it is used for, and along which
      axes), as a tree.
    direction: the optimiser of the chosen parameters.
    is_chosen: returns whether the parameter with a given Role is chosen.
  """
  def name_optimizer(role: Role) -> str:
    if is_chosen(role):
      return optim.name
    return 'adam'

  return optax.partition(
      {optim.name: direction, 'adam': adamw(optim, roles)},
      jax.tree.map(name_optimizer, roles))


# Schedules: each returns the learning rate at update t of `steps`, as a share
# of optim.lr and without the warm-up.


def cosine(t: jax.Array, steps: int, optim: Optim) -> jax.Array:
  """Returns the cosine schedule (Loshchilov and Hutter 2017, equation 5),
  without restarts: from 1 at the end of the warm-up to final_fraction."""
  low = optim.final_fraction
  progress = _progress(t, optim.warmup_steps, steps)
  return low + (1 - low) * 0.5 * (1 + jnp.cos(math.pi * progress))


def linear(t: jax.Array, steps: int, optim: Optim) -> jax.Array:
  """Returns a line from 1 at the end of the warm-up to final_fraction."""
  progress = _progress(t, optim.warmup_steps, steps)
  return 1 - (1 - optim.final_fraction) * progress


def rsqrt(t: jax.Array, steps: int, optim: Optim) -> jax.Array:
  """Returns 1 / sqrt(t), scaled to 1 where the warm-up ends (Vaswani et al.
  2017)."""
  del steps
  return jnp.minimum(1.0, jnp.sqrt(jnp.maximum(optim.warmup_steps, 1) / t))


def wsd(t: jax.Array, steps: int, optim: Optim) -> jax.Array:
  """Returns the warm-up, stable, decay schedule (Hu et al. 2024): 1, and a line
  to final_fraction over the last share of the run, decay_fraction."""
  start = steps - round(optim.decay_fraction * steps)
  return 1 - (1 - optim.final_fraction) * _progress(t, start, steps)


def constant(t: jax.Array, steps: int, optim: Optim) -> jax.Array:
  """Returns 1 at every update."""
  del steps, optim
  return jnp.ones_like(t)


def _progress(t: jax.Array, start: float, end: float) -> jax.Array:
  """Returns how far t is from start to end, in [0, 1]."""
  return jnp.clip((t - start) / jnp.maximum(end - start, 1), 0.0, 1.0)


class Entry(NamedTuple):
  """One optimiser or schedule that optim.name or optim.schedule may choose.

  Attributes:
    make: its function, one of those above.
    reads: the fields of config.optim that it reads and others may not; another
      one that is set is refused, not ignored.
  """
  make: Callable[..., Any]
  reads: tuple[str, ...] = ()


OPTIMIZERS = {
    'adamw': Entry(adamw, ('b1', 'b2', 'eps')),
    'ademamix': Entry(ademamix, ('b1', 'b2', 'b3', 'alpha', 'eps')),
    'adafactor': Entry(adafactor),
    'lion': Entry(lion, ('b1', 'b2')),
    'muon': Entry(muon, ('b1', 'b2', 'eps', 'momentum')),
    'normuon': Entry(normuon, ('b1', 'b2', 'eps', 'momentum')),
    'soap': Entry(soap, ('b1', 'b2', 'eps', 'precondition_every',
                         'precondition_max')),
    'sgd': Entry(sgd, ('momentum',)),
}
SCHEDULES = {
    'cosine': Entry(cosine, ('final_fraction', 'decay_steps')),
    'linear': Entry(linear, ('final_fraction', 'decay_steps')),
    'rsqrt': Entry(rsqrt),
    'wsd': Entry(wsd, ('final_fraction', 'decay_fraction')),
    'constant': Entry(constant),
}


def learning_rate(optim: Optim, steps: int) -> optax.Schedule:
  """Returns the learning rate, warm-up included, as a function of the number of
  updates that have been done:

    rate of update t = 1, 2, ... = lr * min(shape(t), t / warmup_steps),

  with the shape of the schedule, such as a cosine that falls from 1 to 0.

  Args:
    optim: config.optim. Its lr and warmup_steps may be traced values, as when
      several runs train as one program.
    steps: the number of steps of the run.
  """
  schedule_shape = SCHEDULES[optim.schedule].make
  last_step = optim.decay_steps or steps

  def schedule(count: jax.Array):
    t = jnp.asarray(count, jnp.float32) + 1
    # Without a warm-up this is 1 or more, and has no effect on the minimum.
    warmup = t / jnp.maximum(optim.warmup_steps, 1)
    shape = schedule_shape(t, last_step, optim)
    return optim.lr * jnp.minimum(shape, warmup)

  return schedule


def derive_weight_decay(optim: Optim, steps: int) -> float | jax.Array:
  """Returns the factor of the weight decay, by which and by the learning rate a
  parameter is multiplied and subtracted at each step.

  A parameter that decays is an exponential moving average of its updates, over
  the last tau = 1 / (lr * weight_decay) steps (Wang and Aitchison 2024, arXiv
  2405.13698, section 3). With optim.decay_time, tau is this share of the run at
  the highest learning rate, and

    weight_decay = 1 / (lr * decay_time * steps).

  Args:
    optim: config.optim. Its lr and weight_decay may be traced values.
    steps: train.steps.
  """
  if not optim.decay_time:
    return optim.weight_decay
  return 1 / (optim.lr * optim.decay_time * steps)


def check_optim(optim: Optim) -> None:
  """Checks that the fields of config.optim, each of which is in its range, also
  fit each other. A field counts as set if it differs from the default of
  configs/base.py.

  Args:
    optim: config.optim, the fields of the optimiser.

  Raises:
    RequestError: for an unknown optimiser or schedule, a field that is set and
      not read, and values that contradict each other.
  """
  defaults = base_config.base().optim
  _check_fields('name', table=OPTIMIZERS, optim=optim, defaults=defaults)
  _check_fields('schedule', table=SCHEDULES, optim=optim, defaults=defaults)
  # The learning rate must not stop falling before the warm-up has ended. With
  # decay_steps 0 it falls until the last step of the run.
  require(optim.decay_steps == 0 or optim.decay_steps > optim.warmup_steps,
          f'optim.decay_steps is {optim.decay_steps} and optim.warmup_steps '
          f'{optim.warmup_steps}: choose more than these, or 0 for train.steps')
  # The decay is given as a factor or as a time, which needs a rate.
  if optim.decay_time:
    require(optim.weight_decay == 0,
            f'optim.decay_time is {optim.decay_time} and optim.weight_decay '
            f'{optim.weight_decay}, which is derived from it: set one of them '
            'to 0')
    require(optim.lr > 0,
            f'optim.decay_time is {optim.decay_time} and optim.lr '
            f'{optim.lr}, at which nothing decays: choose more than 0')
  # Each pair has a pattern of parameter paths, and whether these decay.
  for entry in optim.decay_mask:
    is_pair = isinstance(entry, tuple | list) and len(entry) == 2
    require(is_pair and entry[1] in (0, 1),
            f'optim.decay_mask is {optim.decay_mask!r}: it must be pairs of '
            '(pattern, 1 or 0), 1 for what decays')


def _check_fields(selector: str, table: Mapping[str, Entry], optim: Optim,
                  defaults: Optim) -> None:
  """Checks that a name is in a table of choices, and that no field is set which
  this choice does not read.

  Args:
    selector: the field of config.optim that has the name: 'name' of the
      optimiser, or 'schedule'.
    table: the choices by name, OPTIMIZERS or SCHEDULES; each lists the fields
      that it reads.
    optim: config.optim.
    defaults: config.optim at its defaults.

  Raises:
    RequestError: for an unknown name, and for a field that is set and not read.
  """
  choice = optim[selector]
  check_choice(f'optim.{selector}', choice, table)
  # The choices that read each field, by the name of the field.
  readers: dict[str, list[str]] = {}
  for name, entry in table.items():
    for field in entry.reads:
      readers.setdefault(field, []).append(name)

  # A field that the choice does not read keeps its default.
  for field in sorted(readers):
    is_default = optim[field] == defaults[field]
    require(choice in readers[field] or is_default,
            f'optim.{field} is {optim[field]}, which optim.{selector} '
            f'{choice!r} does not read (it is read by '
            f'{", ".join(readers[field])}): leave it at {defaults[field]}, or '
            'choose one of these')


def make_optimizer(optim: Optim, steps: int, roles: Any,
                   rate_multipliers: Any = None, rate_shares: Any = None,
                   gradient_factors: Any = None) -> Transformation:
  """Builds the optimiser of a run: clipping, the direction, weight decay and
  the learning rate.

  config.optim was checked; its lr, warmup_steps and weight_decay may be traced,
  as where several runs train as one (training/vectorised.py). The optimiser
  takes whole trees, or those that shares.keep_trained returns, and gives
  updates like the latter.

  Args:
    optim: config.optim.
    steps: train.steps, the length of the schedule.
    roles: the Role of each parameter, as a tree (training/runs.py).
    rate_multipliers: what each parameter's learning rate is multiplied by, its
      weight decay left as it is (training/optim/mup.py); None: 1.
    rate_shares: what its learning rate is multiplied by, its weight decay
      included (training/optim/shares.py); None: 1.
    gradient_factors: what its clipped gradient is multiplied by
      (training/optim/mup.py); None: 1.
  """
  def keep_trained(tree: Any) -> Any:
    """Removes frozen parameters from a tree, which may be missing (None)."""
    if tree is None:
      return None
    return shares.keep_trained(rate_shares, tree)

  # The four steps of an update: clip the gradients, make a direction of them,
  # add the weight decay, and multiply by the learning rate.
  roles = keep_trained(roles)
  clip = optax.identity()
  if optim.clip_norm:
    clip = clip_by_global_norm(optim.clip_norm)
  direction = OPTIMIZERS[optim.name].make(optim, roles)
  if optim.hyperball:
    direction = optax.chain(direction, hyperball.normalize_steps(roles))
  direction = _multiply_gradients(direction, keep_trained(gradient_factors))
  add_decay = _add_weight_decay(
      derive_weight_decay(optim, steps), _decay_mask(optim, roles),
      is_cautious=optim.cautious_decay)
  scale_by_rate = optax.scale_by_learning_rate(learning_rate(optim, steps))
  # All four always stand in the chain, so that the state's tree does not
  # depend on numbers that a resumed run may change.
  tx = optax.chain(
      clip,
      _multiply_updates(direction, keep_trained(rate_multipliers)),
      add_decay,
      _multiply_updates(scale_by_rate, keep_trained(rate_shares)))
  if optim.hyperball:
    tx = hyperball.keep_norms(tx, roles)

  def cast_to_float32(tree: Any) -> Any:
    """Returns a tree in float32. In bfloat16 a second moment with b2 = 0.999
    would never fall: a thousandth of it is less than half of its last digit.
    """
    return jax.tree.map(lambda x: x.astype(jnp.float32), keep_trained(tree))

  def init(params: Any):
    return tx.init(cast_to_float32(params))

  def update(grads: Any, state: Any, params: Any):
    return tx.update(cast_to_float32(grads), state, cast_to_float32(params))

  return Transformation(init, update)


def _decay_mask(optim: Optim, roles: Any) -> Any:
  """Returns whether weight decay applies to each parameter, as a tree: by
  optim.decay_mask, or else to all matrices that are no embeddings. Matrices
  that keep their norm (optim.hyperball) do not decay.

  Args:
    optim: config.optim.
    roles: the Role of each parameter, as a tree.
  """
  def decays_by_default(role: Role) -> bool:
    return role.is_matrix and role.kind != 'embedding'

  def decays_beside_hyperball(role: Role, is_decayed: bool) -> bool:
    return is_decayed and not role.is_hidden_matrix

  if optim.decay_mask:
    mask = paths.map_by_pattern(optim.decay_mask, roles, 'optim.decay_mask')
  else:
    mask = jax.tree.map(decays_by_default, roles)
  if optim.hyperball:
    mask = jax.tree.map(decays_beside_hyperball, roles, mask)
  return mask


def _multiply_updates(tx: Transformation, factors: Any) -> Transformation:
  """Returns an optimiser whose updates are those of another one, each
  multiplied by a factor. It has the same state, so a checkpoint does not depend
  on whether there are factors.

  Args:
    tx: the other optimiser.
    factors: the factor of each parameter, as a tree; None: all are 1.
  """
  if factors is None:
    return tx

  def update(grads: Any, state: Any, params: Any = None):
    updates, state = tx.update(grads, state, params)
    multiplied = jax.tree.map(operator.mul, updates, factors)
    return multiplied, state

  return Transformation(tx.init, update)


def _multiply_gradients(tx: Transformation, factors: Any) -> Transformation:
  """Returns an optimiser that is given the gradients, each multiplied by a
  factor, and has the same state.

  Args:
    tx: the optimiser.
    factors: the factor of each parameter, as a tree; None: all are 1.
  """
  if factors is None:
    return tx

  def update(grads: Any, state: Any, params: Any = None):
    multiplied = jax.tree.map(operator.mul, grads, factors)
    return tx.update(multiplied, state, params)

  return Transformation(tx.init, update)


def _add_weight_decay(weight_decay: float | jax.Array, mask: Any,
                      is_cautious: bool) -> Transformation:
  """Returns an optax transformation that adds weight_decay * p to the update of
  each parameter p that decays. Cautious decay (Chen et al. 2025, arXiv
  2510.12402, algorithm 1) leaves out the numbers of p that the step makes
  larger: it multiplies the decay by [u * p >= 0], with the direction u.

  It is used instead of optax.add_decayed_weights, whose state has another tree
  structure when a mask is given. Checkpoints would depend on the mask.

  Args:
    weight_decay: the factor, a number or a traced scalar.
    mask: whether each parameter decays, as a tree.
    is_cautious: whether the decay is cautious.
  """
  def decay_parameter(update: jax.Array, param: jax.Array, is_decayed: bool):
    """Returns the update of one parameter with its decay."""
    if not is_decayed:
      return update
    decay = weight_decay * param
    if is_cautious:
      decay = jnp.where(update * param >= 0, decay, 0.0)
    return update + decay

  def decay_tree(updates: Any, params: Any):
    return jax.tree.map(decay_parameter, updates, params, mask)

  return optax.stateless(decay_tree)


def clip_by_global_norm(limit: float) -> Transformation:
  """Returns an optax transformation that scales all gradients by one factor, so
  that their joint norm is at most `limit`.

  It is used instead of optax.clip_by_global_norm, which selects between whole
  arrays. On CPU that keeps XLA from fusing the clipping with the update: 84 ms
  against 30 ms at 35M parameters with AdamW.

  Args:
    limit: the largest norm.
  """
  def clip(updates: Any, params: Any):
    del params
    # The scale is 1 where the norm is below the limit already.
    scale = jnp.minimum(1.0, limit / optax.tree.norm(updates))

    def scale_update(update: jax.Array) -> jax.Array:
      return update * scale.astype(update.dtype)

    return jax.tree.map(scale_update, updates)

  return optax.stateless(clip)


def update_if(ok: jax.Array, tx: Transformation, grads: Any,
              state: Any, params: Any):
  """Updates the parameters with an optimiser, but only if `ok` is true.

  It is a branch (jax.lax.cond) and not a select: on CPU, jnp.where over all
  parameters and the state takes six times as long as the update itself (190 ms
  against 30 ms at 35M parameters).

  Args:
    ok: whether to update, a boolean scalar on the device.
    tx: the optimiser.
    grads: the gradients.
    state: the state of the optimiser.
    params: the parameters that are trained.

  Returns:
    The parameters and the state of the optimiser, updated or as they were.
  """

  def apply_update(grads: Any, state: Any, params: Any):
    """Returns the parameters and the state after the update."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  def skip_update(grads: Any, state: Any, params: Any):
    """Returns the parameters and the state as they are."""
    del grads
    return params, state

  return jax.lax.cond(ok, apply_update, skip_update, grads, state, params)


def opt_state_shardings(tx: Transformation, params: Any,
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
  # Parameters are found by their path, a tuple of keys, since the state has
  # other trees than the parameters around and beside its moments.
  mesh = jax.tree.leaves(shardings)[0].mesh
  leaves = jax.tree_util.tree_leaves_with_path(params)
  shape_and_spec = {}  # of each parameter, by its path
  for (path, x), sharding in zip(leaves, jax.tree.leaves(shardings),
                                 strict=True):
    shape_and_spec[path] = x.shape, sharding.spec

  def shard_leaf(path: tuple, leaf: Any):
    """Returns the sharding of one array of the optimiser's state: along each
    axis that it has in common with its parameter, that of the parameter."""
    # The path of such an array ends with the path of its parameter. Without a
    # parameter, as for a count of steps, the empty shape below ends the last
    # loop at once, and the array is whole on every device.
    parameter_shape = ()
    parameter_spec = ()
    for i in range(len(path)):
      if path[i:] in shape_and_spec:
        parameter_shape, parameter_spec = shape_and_spec[path[i:]]
        break
    # A sharding may name fewer axes than there are; the others are whole, which
    # None stands for. So is an axis of another size, such as a mean over it.
    mesh_axes = (*parameter_spec, *(None,) * leaf.ndim)
    leaf_axes = []
    for size, parameter_size, mesh_axis in zip(leaf.shape, parameter_shape,
                                               mesh_axes):
      if size != parameter_size:
        mesh_axis = None
      leaf_axes.append(mesh_axis)
    return jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*leaf_axes))

  return jax.tree_util.tree_map_with_path(
      shard_leaf, jax.eval_shape(tx.init, params))
