"""Attention and a layer of experts alone, forward and backward, for gpu.py."""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import sharding
from architectures.parts.attention import kernels
from architectures.parts.attention import xla
from architectures.parts.context import Context
from architectures.parts.moe.layer import MoE
from benchmarks import timing
from training.costs import totals

ROUNDS = 5


def card() -> tuple[str, str]:
  """Returns the platform of JAX's device, and what it is."""
  device = jax.devices()[0]
  return device.platform, device.device_kind


def attention(config: Any) -> Iterator[dict[str, Any]]:
  """Yields a row for each kernel of this platform, at the shapes of a config:
  of causal attention, and its gradient with respect to all three inputs."""
  c = totals.resolved(config)
  B, L = config.data.batch_size, config.data.length
  args = [jax.random.normal(key, (B, L, heads, c.head_dim), c.compute_dtype)
          for key, heads in zip(
              jax.random.split(jax.random.key(0), 3),
              (c.num_heads, c.num_kv_heads, c.num_kv_heads))]
  mask, here = kernels.Mask(causal=True), sharding.platform()
  seen_BLM = jnp.tril(jnp.ones((L, L), bool))[None]

  def loss(name: str, *qkv: jax.Array) -> jax.Array:
    if name == 'xla':
      out = xla.attend(*qkv, mask_BLM=seen_BLM, scale=c.head_dim ** -0.5,
                       causal=True)
    else:
      out = kernels.KERNELS[name].run(
          *qkv, mask, seen_BLM, scale=c.head_dim ** -0.5, softcap=0.0,
          sink_H=None)
    return jnp.square(out.astype(jnp.float32)).sum()

  for name in ('xla', *kernels.KERNELS):
    if name != 'xla' and kernels.KERNELS[name].platform != here:
      continue
    if name != 'xla' and (why := kernels.refusal(name, c, mask, L, L, here)):
      yield dict(way=name, error=f'{name} is refused, {why}')
      continue
    yield dict(way=name) | _timed(
        jax.grad(lambda *x, name=name: loss(name, *x), (0, 1, 2)), *args)


def experts(config: Any, moe: Mapping[str, Any] | None = None,
            compiler: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Returns the row of a layer of experts, its router and dispatch included.

  Args:
    config: of a run.
    moe: fields of config.model.moe that choose a way to multiply.
    compiler: options of XLA's that do.
  """
  config.model.moe.update(dict(
      grouped_kernel='auto', dispatch='auto', capacity_factor=0.0,
      eval_capacity_factor=0.0) | dict(moe or {}))
  c = totals.resolved(config)
  B, L = config.data.batch_size, config.data.length
  x_BLD = jax.random.normal(jax.random.key(0), (B, L, c.d_model),
                            c.compute_dtype)
  ctx = Context(jnp.arange(L)[None], length=L)
  module = MoE(c)
  params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(1), x_BLD, ctx))

  def loss(params: Any, x_BLD: jax.Array) -> jax.Array:
    y_BLD, _ = module.apply(params, x_BLD, ctx)
    return jnp.square(y_BLD.astype(jnp.float32)).mean()

  return _timed(jax.grad(loss, (0, 1)), params, x_BLD, compiler=compiler)


def _timed(function: Any, *args: Any,
           compiler: Mapping[str, Any] | None = None) -> dict[str, Any]:
  compiled = jax.jit(function).lower(*args).compile(
      compiler_options=dict(compiler) if compiler else None)
  return timing.turns({'': lambda: jax.block_until_ready(compiled(*args))},
                      ROUNDS)['']
