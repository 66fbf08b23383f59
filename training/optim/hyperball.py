"""Hyperball optimisation: matrices that keep the norm that they began with
(Wen et al. 2025, "Fantastic Pretraining Optimizers 2.1: Hyperball").

With the direction u_t of an optimiser such as Adam or Muon, a hidden matrix W
with the Frobenius norm R at first becomes

    W_(t+1) = R normalise(W_t - lr_t R normalise(u_t)),
    normalise(X) = X / |X|_F.

So lr_t is the step as a share of the matrix, at every width. Weight decay,
which would only change the norm, does not apply to these matrices. Embeddings,
the head, routers, norms and biases are trained as without it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from architectures.parts.sharding import Axes, Role


class HyperballState(NamedTuple):
  """The norms of the matrices, and the state of the optimiser below.

  Attributes:
    norms: R of each hidden matrix, with the axes of a matrix at size 1;
      optax.MaskedNode for other parameters.
    inner: the state of the optimiser.
  """
  norms: Any
  inner: Any


def normalize_steps(roles: Any) -> optax.GradientTransformation:
  """Returns the transformation that divides the step of each hidden matrix by
  its norm, u / |u|_F.

  Args:
    roles: the Role of each parameter, as a tree.
  """
  def normalize(axes: Axes, step: jax.Array) -> jax.Array:
    # The least norm keeps a step of zeros at zero.
    return step / jnp.maximum(_frobenius_norm(axes, step), 1e-30)

  def update(steps: Any, params: Any) -> Any:
    del params
    return _map_over_hidden_matrices(roles, normalize, steps)

  return optax.stateless(update)


def keep_norms(tx: optax.GradientTransformation, roles: Any
               ) -> optax.GradientTransformation:
  """Returns an optimiser that takes the steps of another one on spheres: each
  hidden matrix keeps the Frobenius norm that it began with (see the head of
  this file). Other parameters take the steps as they are.

  Args:
    tx: the other optimiser, whose step of a hidden matrix is -lr u / |u|_F.
    roles: the Role of each parameter, as a tree.
  """
  def init(params: Any) -> HyperballState:
    """Returns the state before the first step, with the norms to be kept."""
    norms = _map_over_hidden_matrices(
        roles, _frobenius_norm, params, otherwise=_no_norm)
    return HyperballState(norms=norms, inner=tx.init(params))

  def update(grads: Any, state: HyperballState, params: Any
             ) -> tuple[Any, HyperballState]:
    """Returns the steps of all parameters, and the new state."""
    steps, inner = tx.update(grads, state.inner, params)
    steps = _map_over_hidden_matrices(
        roles, _step_on_sphere, steps, state.norms, params)
    return steps, state._replace(inner=inner)

  return optax.GradientTransformation(init, update)


def _step_on_sphere(axes: Axes, step: jax.Array, norm: jax.Array,
                    param: jax.Array) -> jax.Array:
  """Returns the step of a hidden matrix W that ends on its sphere, the matrices
  with the norm R:

    R normalise(W + R step) - W,    normalise(X) = X / |X|_F

  Args:
    axes: which axes of the parameter make up a matrix.
    step: the step of the optimiser below, -lr normalise(u).
    norm: R of each matrix, whose axes have size 1.
    param: W.
  """
  moved = param + norm * step
  length = jnp.maximum(_frobenius_norm(axes, moved), 1e-30)
  projected = moved * (norm / length)
  # A matrix that was 0 at first has no sphere. It takes the step as it is.
  return jnp.where(norm > 0, projected - param, step)


def _frobenius_norm(axes: Axes, x: jax.Array) -> jax.Array:
  """Returns the norm of each matrix of a parameter, with its axes at size 1."""
  matrix_axes = axes.inputs + axes.outputs
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=matrix_axes, keepdims=True))


def _no_norm(x: jax.Array) -> optax.MaskedNode:
  """Returns what stands for the norm of a parameter that does not keep it."""
  del x
  return optax.MaskedNode()


def _identity(x: Any) -> Any:
  return x


def _map_over_hidden_matrices(
    roles: Any, fn: Callable[..., Any], tree: Any, *trees: Any,
    otherwise: Callable[[Any], Any] = _identity) -> Any:
  """Applies a function to each hidden matrix of a model.

  Args:
    roles: the Role of each parameter, as a tree.
    fn: a function of the Axes of a parameter, and of its leaf in each tree.
    tree: a tree with a leaf for each parameter.
    *trees: further trees.
    otherwise: the function of the leaf of `tree` of any other parameter.
  """
  def apply_to_parameter(role: Role, x: Any, *more: Any) -> Any:
    if not role.is_hidden_matrix:
      return otherwise(x)
    return fn(role.split(x.ndim), x, *more)

  return jax.tree.map(apply_to_parameter, roles, tree, *trees)
