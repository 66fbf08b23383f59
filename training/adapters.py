"""Low-rank adapters beside the weights that they adapt: apart, and merged.

W + (alpha / rank) A B is a weight like any other, by which the model without
adapters computes the same function (Hu et al. 2021, section 4.1), to the
rounding of a sum that is added up in another order.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import architectures
from architectures.parts import checks, linear
from architectures.parts.config import LoraConfig, ModelConfig
from configs import base
from training import paths
from training.workdir import checkpoints


def plain(model: ModelConfig) -> ModelConfig:
  """Returns the same model without adapters."""
  return dataclasses.replace(model, lora=LoraConfig(**base.base().model.lora))


def same(one: ModelConfig, other: ModelConfig) -> bool:
  """Whether two models have the same adapters, or none."""
  fields = lambda c: (c.lora.rank, c.lora.rank and (c.lora.scale, *(
      name for name in checks.products(c) if linear.adapted(c, name))))
  return fields(one) == fields(other)


def is_adapter(path: str) -> bool:
  """Whether the parameter at `path` is A or B of an adapter."""
  return path.endswith((linear.LORA_A, linear.LORA_B))


def without(params: Any) -> Any:
  """Returns the parameters that are no adapters."""
  return checkpoints.nest({path: x for path, x in paths.flatten(params).items()
                         if not is_adapter(path)})


def beside(params: Any, others: Any) -> Any:
  """Returns `params` with the adapters of `others` beside them."""
  return checkpoints.nest(paths.flatten(params) | {
      path: x for path, x in paths.flatten(others).items()
      if is_adapter(path)})


def merge(module: nn.Module, params: Any) -> tuple[nn.Module, Any]:
  """Returns (module, parameters) of the same function without adapters.

  The sum is made in float32 and rounded once to the type of the weight.

  Args:
    module: the model, with adapters or without.
    params: its parameters.
  """
  c = module.config
  if not c.lora.rank:
    return module, params
  flat = paths.flatten(nn.meta.unbox(params))
  merged = {path: _merged(path, x, flat, c.lora.scale)
            for path, x in flat.items() if not is_adapter(path)}
  return architectures.build(plain(c)), checkpoints.nest(merged)


def _merged(path: str, w: jax.Array, flat: Mapping[str, jax.Array],
            scale: float) -> jax.Array:
  if path + linear.LORA_A not in flat:
    return w
  a, b = (jnp.asarray(flat[path + name], jnp.float32)
          for name in (linear.LORA_A, linear.LORA_B))
  layers = a.ndim + b.ndim - 2 - w.ndim  # axes in front of the inputs
  lead, rank = w.shape[:layers], a.shape[-1]
  inputs = math.prod(a.shape[layers:-1])
  product = jnp.matmul(a.reshape(*lead, inputs, rank),
                       b.reshape(*lead, rank, -1),
                       precision=jax.lax.Precision.HIGHEST)
  return (jnp.asarray(w, jnp.float32) + scale * product.reshape(w.shape)
          ).astype(w.dtype)
