"""NorMuon (Li et al. 2025, arXiv 2510.05491): Muon whose neurons take steps of
one size.

Of each matrix W with the gradient G, momentum b and second decay b2
(algorithm 1, with the Nesterov step of its authors' code):

    M = b M + (1 - b) G
    O = orthogonalised (1 - b) G + b M, by five Newton-Schulz iterations
    v = b2 v + (1 - b2) mean over the inputs of O * O,   one number a neuron
    U = O / (sqrt(v) + 1e-10)
    step = 0.2 sqrt(rows columns) / |U|_F * U

A neuron is one output of the product. Layers and experts that share an array
are matrices of their own, and several axes of inputs, or of outputs, such as
heads, are one side.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from training.optim import orthogonal, trees

_EPS = 1e-10  # beside the root of v
_SIZE = 0.2  # the root mean square of a step, Adam's usual one


class NorMuonState(NamedTuple):
  """The momentum, and v with the axes of the inputs at size 1."""
  momentum: optax.Params
  neurons: optax.Params


def scale_by_normuon(roles: Any, beta: float, b2: float
                     ) -> optax.GradientTransformation:
  """Returns the direction of NorMuon.

  Args:
    roles: the Role of each parameter, as a tree; where optax.partition leaves
      out a parameter, its role is not read.
    beta: b, of the momentum.
    b2: of the neurons.
  """
  def init(params: Any):
    return NorMuonState(
        optax.tree.zeros_like(params),
        trees.over_paths(roles, lambda role, x: trees.zeros_without(
            x, role.split(x.ndim).inputs), params))

  def update(grads: Any, state: Any, params: Any = None):
    del params
    momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g,
                            state.momentum, grads)
    ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g,
                         momentum, grads)
    whole = orthogonal.factors(roles, ahead)
    neurons = trees.over(
        roles, lambda axes, o, v: b2 * v + (1 - b2) * jnp.mean(
            jnp.square(o), axis=axes.inputs, keepdims=True),
        whole, state.neurons)

    def even(axes: Any, o: jax.Array, v: jax.Array):
      u, sides = o / (jnp.sqrt(v) + _EPS), axes.inputs + axes.outputs
      mean = jnp.mean(jnp.square(u), axis=sides, keepdims=True)
      return _SIZE * u * jax.lax.rsqrt(mean + _EPS ** 2)

    return (trees.over(roles, even, whole, neurons),
            NorMuonState(momentum, neurons))

  return optax.GradientTransformation(init, update)
