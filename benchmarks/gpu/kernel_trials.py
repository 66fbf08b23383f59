"""Attention and products of experts alone, forward and backward."""

from collections.abc import Iterator, Mapping
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import sharding
from architectures.parts.attention import kernels
from architectures.parts.attention import xla
from architectures.parts.context import Context
from architectures.parts.moe.layer import MoE
from benchmarks.gpu import timing
from training.costs import totals

BACKWARD = 2  # how many times the forward's FLOPs a backward pass takes


def attention(config: Any, seconds: float) -> Iterator[dict[str, Any]]:
  """Yields a row for each kernel of this platform, at the shapes of a config:
  of causal attention, and its gradient with respect to all three inputs."""
  c = totals.resolved(config)
  B, L = config.data.batch_size, config.data.length
  shapes = [(B, L, heads, c.head_dim)
            for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
  args = [jax.random.normal(key, shape, c.compute_dtype) for key, shape in zip(
      jax.random.split(jax.random.key(0), 3), shapes)]
  mask = kernels.Mask(causal=True)
  seen_BLM = jnp.tril(jnp.ones((L, L), bool))[None]
  shown = L * (L + 1) // 2
  work = (1 + BACKWARD) * 2 * 2 * B * c.num_heads * c.head_dim * shown
  here = sharding.platform()
  for name in ('xla', *kernels.KERNELS):
    if name != 'xla' and kernels.KERNELS[name].platform not in (here, 'gpu'):
      continue  # another platform's
    row = dict(part='attention', way=name)
    try:
      why = kernels.refusal(name, c, mask, L, L, here)
      if why:
        yield row | dict(error=f'{name} is refused, {why}')
        continue
      yield row | _timed(jax.grad(lambda *x, name=name: _weigh(
          name, x, mask, seen_BLM, c.head_dim ** -0.5), (0, 1, 2)), args, work,
          seconds)
    except Exception as error:
      yield row | dict(error=timing.sentence(error))


def _weigh(name: str, args: Any, mask: kernels.Mask, seen_BLM: jax.Array,
           scale: float) -> jax.Array:
  if name == 'xla':
    out = xla.attend(*args, mask_BLM=seen_BLM, scale=scale, causal=True)
  else:
    out = kernels.KERNELS[name].run(*args, mask, seen_BLM, scale=scale,
                                    softcap=0.0, sink_H=None)
  return jnp.square(out.astype(jnp.float32)).sum()


def experts(config: Any, way: Mapping[str, Any], seconds: float
            ) -> dict[str, Any]:
  """Returns the row of a layer of experts, its router and dispatch included.
  The FLOPs are those of the experts that each token chooses."""
  config.model.moe.update(
      dict(grouped_kernel='auto', dispatch='auto', capacity_factor=0.0,
           eval_capacity_factor=0.0) | way.get('moe', {}))
  c = totals.resolved(config)
  B, L = config.data.batch_size, config.data.length
  x_BLD = jax.random.normal(jax.random.key(0), (B, L, c.d_model),
                            c.compute_dtype)
  ctx = Context(jnp.arange(L)[None], length=L)
  module = MoE(c)
  params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(1), x_BLD, ctx))

  def loss(params: Any, x_BLD: jax.Array):
    y_BLD, _ = module.apply(params, x_BLD, ctx)
    return jnp.square(y_BLD.astype(jnp.float32)).mean()

  products = 3  # up, gate and down
  work = (1 + BACKWARD) * 2 * math.prod(
      (B, L, c.moe.top_k, products, c.d_model, c.moe.d_ff))
  return _timed(jax.grad(loss, (0, 1)), (params, x_BLD), work, seconds,
                way.get('compiler'))


def _timed(function: Any, args: Any, work: float, seconds: float,
           compiler: Mapping[str, Any] | None = None) -> dict[str, Any]:
  compiled = jax.jit(function).lower(*args).compile(
      compiler_options=dict(compiler) if compiler else None)
  found = timing.windows(lambda: compiled(*args), jax.block_until_ready,
                         seconds)
  return found | dict(flops_per_s=work / found['step_s'])
