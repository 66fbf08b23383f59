"""Weights, biases and the one matrix product that every part uses."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import sharding
from architectures.parts.config import ModelConfig


def weight(module: nn.Module, name: str, shape: tuple[int, ...],
           axes: tuple[str, ...], *, in_axes: tuple[int, ...] = (0,),
           batch_axes: tuple[int, ...] = (), residual: bool = False,
           gain: float = 1.0):
  """Declares a weight of `module` by the config's initialisation.

  Args:
    module: the module, with a `config`.
    name: the parameter's name.
    shape: its shape.
    axes: its logical axes, one a dimension.
    in_axes: the dimensions that a product sums over (the fan-in).
    batch_axes: dimensions that hold separate matrices (experts).
    residual: whether the product is added to the residual stream.
    gain: of the standard deviation, with fan_in.
  """
  config = module.config
  return module.param(
      name, sharding.init(_initializer(config, in_axes, batch_axes, residual,
                                       len(shape), gain), *axes),
      shape, config.param_dtype)


def _initializer(config: ModelConfig, in_axes, batch_axes, residual, ndim,
                 gain):
  """normal: N(0, stddev); scaled_normal: and residual products by
  1 / sqrt(2N) (GPT-2, section 2.3); fan_in: truncated, variance
  init_scale / fan_in (Switch, section 2.4)."""
  if config.init == 'fan_in':
    out_axes = tuple(i for i in range(ndim)
                     if i not in in_axes and i not in batch_axes)
    return nn.initializers.variance_scaling(
        config.init_scale * gain ** 2, 'fan_in', 'truncated_normal',
        in_axis=in_axes, out_axis=out_axes, batch_axis=batch_axes)
  stddev = config.init_stddev
  if config.init == 'scaled_normal' and residual:
    stddev /= (2 * config.num_layers) ** 0.5
  return nn.initializers.normal(stddev)


def bias(module: nn.Module, name: str, shape: tuple[int, ...],
         axes: tuple[str, ...]):
  """Declares a bias of `module`, born zero."""
  return module.param(name, sharding.init(nn.initializers.zeros, *axes), shape,
                      module.config.param_dtype)


def einsum(spec: str, x: jax.Array, w: jax.Array, dtype,
           out_dtype=None) -> jax.Array:
  """A product in the compute dtype, which adds up in float32.

  On CPU bfloat16 operands are widened to float32, which holds them exactly:
  XLA multiplies bfloat16 slowly there, and some products not at all.

  Args:
    spec: as of jnp.einsum, for two operands.
    x: activations.
    w: a weight, or activations.
    dtype: what both are rounded to before the product.
    out_dtype: of the result; default: dtype.
  """
  x, w, out_dtype = x.astype(dtype), w.astype(dtype), out_dtype or dtype

  def multiply(x, w):
    return jnp.einsum(spec, x, w, preferred_element_type=out_dtype)

  def widened(x, w):
    return jnp.einsum(spec, x.astype(jnp.float32),
                      w.astype(jnp.float32)).astype(out_dtype)

  if jnp.dtype(dtype) == jnp.float32:
    return multiply(x, w)
  return jax.lax.platform_dependent(x, w, cpu=widened, default=multiply)


def add_bias(x: jax.Array, b: jax.Array) -> jax.Array:
  """x[..., *b.shape] + b, in x's dtype."""
  return x + b.astype(x.dtype).reshape((1,) * (x.ndim - b.ndim) + b.shape)
