"""Normalisation over the feature axis, computed in float32.

LayerNorm (Ba et al. 2016): y = (x - mean) / sqrt(var + eps) * scale + bias.
Without the bias it is layernorm_no_bias (MPT, ModernBERT).
RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * scale.
The last two agree on centred input. Two more forms of RMSNorm:
rmsnorm_1p     x / sqrt(mean(x^2) + eps) * (1 + offset), offset 0 at first: what
               decays it, or rounds it, draws the factor to 1 (Gemma)
rmsnorm_plain  x / sqrt(mean(x^2) + eps), without parameters
"""

from collections.abc import Callable
import functools
from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts.config import ModelConfig
from architectures.parts.sharding import Role, declare


def layernorm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None,
              eps: float) -> jax.Array:
  """[..., D] -> [..., D], with zero mean and unit variance before scale."""
  x32 = x.astype(jnp.float32)
  mean = x32.mean(-1, keepdims=True)
  centred = x32 - mean
  var = jnp.square(centred).mean(-1, keepdims=True)
  return _affine(centred * jax.lax.rsqrt(var + eps), scale_D, bias_D, x.dtype)


def rmsnorm(x: jax.Array, scale_D: Optional[jax.Array],
            eps: float) -> jax.Array:
  """[..., D] -> [..., D], with unit mean square before scale."""
  x32 = x.astype(jnp.float32)
  mean_square = jnp.square(x32).mean(-1, keepdims=True)
  return _affine(x32 * jax.lax.rsqrt(mean_square + eps), scale_D, None, x.dtype)


def _affine(y: jax.Array, scale_D: Optional[jax.Array],
            bias_D: Optional[jax.Array], dtype: jax.typing.DTypeLike):
  ones = (1,) * (y.ndim - 1)
  if scale_D is not None:
    y = y * scale_D.astype(jnp.float32).reshape(*ones, -1)
  if bias_D is not None:
    y = y + bias_D.astype(jnp.float32).reshape(*ones, -1)
  return y.astype(dtype)


# The gradient computes a norm, or an activation, again: cheaper than to keep
# what it computes on its way.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


class Norm(nn.Module):
  """[..., D] -> [..., D]; `axis` is the logical axis of its parameters."""
  config: ModelConfig
  axis: str = 'embed'

  def vector(self, name: str, init: Callable, x: jax.Array) -> jax.Array:
    """Declares a parameter for each feature."""
    return declare(self, name, init, x.shape[-1:], Role((self.axis,)))


class WithEpsilon(Norm):
  """A norm that reads model.norm_eps."""
  fields = ('norm_eps',)


class LayerNorm(WithEpsilon):

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.vector('scale', nn.initializers.ones, x)
    bias_D = self.vector('bias', nn.initializers.zeros, x)
    return recomputed(layernorm)(x, scale_D, bias_D, self.config.norm_eps)


class LayerNormNoBias(WithEpsilon):

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.vector('scale', nn.initializers.ones, x)
    return recomputed(layernorm)(x, scale_D, None, self.config.norm_eps)


class RMSNorm(WithEpsilon):

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.vector('scale', nn.initializers.ones, x)
    return recomputed(rmsnorm)(x, scale_D, self.config.norm_eps)


class RMSNorm1P(WithEpsilon):

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    offset_D = self.vector('offset', nn.initializers.zeros, x)
    return recomputed(rmsnorm)(x, 1.0 + offset_D.astype(jnp.float32),
                               self.config.norm_eps)


class PlainRMSNorm(WithEpsilon):

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return recomputed(lambda x: rmsnorm(x, None, self.config.norm_eps))(x)


# A norm is a module. `settings`: the group of fields of config.model, a
# dataclass, that it alone reads; `fields`: others that not every norm reads.
NORMS = {
    'layernorm': LayerNorm,
    'layernorm_no_bias': LayerNormNoBias,
    'rmsnorm': RMSNorm,
    'rmsnorm_1p': RMSNorm1P,
    'rmsnorm_plain': PlainRMSNorm,
}


def norm(config: ModelConfig, name: str, axis: str = 'embed') -> nn.Module:
  """The config's norm, as a module whose parameters stand under `name`."""
  return NORMS[config.norm](config, axis, name=name)
