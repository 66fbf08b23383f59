"""mHC, which no system here has, beside DeepSeek-V4's in transformers, which
divides the columns and rows of the transposed matrix, and so gets the same
one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import blocks
from configs import base
from tests.parity import compare

D, LENGTH, STREAMS = 32, 12, 3


def mhc() -> list[compare.Finding]:
  """Compares what a branch reads, the streams after it, and the gradients, with
  weights drawn from a fixed seed."""
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  x, y, d_read, d_next = (normal(1, LENGTH, STREAMS, D), normal(1, LENGTH, D),
                          normal(1, LENGTH, D), normal(1, LENGTH, STREAMS, D))
  rows = STREAMS * (STREAMS + 2)
  fn, bias, scale = 0.3 * normal(rows, STREAMS * D), normal(rows), normal(3)
  model = base.base().model
  model.update(d_model=D, vocab_size=2, max_len=LENGTH, residual='mhc',
               norm_eps=1e-6)
  model.streams.count = STREAMS
  c = architectures.resolve(model)
  module = blocks.Branch(c)

  def run(params, x, y):
    def through(module, x):
      read, add = module(blocks.Streams(x, jnp.int32(1), 4))
      return read, add(y).x_BLUD
    return nn.apply(through, module)({'params': params}, x)

  born = nn.meta.unbox(module.init(
      jax.random.key(0), blocks.Streams(x, jnp.int32(1), 4)))['params']
  at_first = jax.jit(lambda: blocks.fresh(STREAMS, jnp.int32(1)))()
  params = born | dict(
      dynamic=_transposed(fn).T.reshape(STREAMS, D, rows), dynamic_scale=scale,
      read=bias[:STREAMS] - np.asarray(at_first),
      write=bias[STREAMS:2 * STREAMS],
      mix=bias[2 * STREAMS:].reshape(STREAMS, STREAMS).T)
  (read, after), vjp = jax.vjp(run, params, x, y)
  grads, dx, dy = vjp((d_read, d_next))
  ours = dict(output=read, streams=after, x=dx, y=dy,
              scale=grads['dynamic_scale'],
              dynamic=_transposed(grads['dynamic'].reshape(-1, rows).T))
  theirs = _deepseek_v4(x, y, d_read, d_next, fn, bias, scale)
  return [compare.Finding(
      name, compare.error(ours[name], theirs[name]),
      compare.LIMITS['output' if name in ('output', 'streams') else 'grads'])
          for name in ours]


def _transposed(fn):
  """Returns their rows with those of the matrix in the order of ours."""
  order = np.arange(STREAMS * (STREAMS + 2))
  mix = order[2 * STREAMS:].reshape(STREAMS, STREAMS)
  return fn[np.concatenate([order[:2 * STREAMS], mix.T.reshape(-1)])]


def _deepseek_v4(x, y, d_read, d_next, fn, bias, scale) -> dict:
  """Returns the outputs and gradients of transformers' module."""
  import torch
  from transformers.models import deepseek_v4
  modeling = deepseek_v4.modeling_deepseek_v4
  config = deepseek_v4.DeepseekV4Config(
      hidden_size=D, hc_mult=STREAMS, hc_sinkhorn_iters=20, hc_eps=0.0,
      rms_norm_eps=1e-6)
  module = modeling.DeepseekV4HyperConnection(config)
  with torch.no_grad():
    for ours, weight in ((fn, module.fn), (bias, module.base),
                         (scale, module.scale)):
      weight.copy_(torch.tensor(ours))
  x, y = (torch.tensor(a, requires_grad=True) for a in (x, y))
  post, comb, read = module(x)
  after = post.unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(
      comb.transpose(-1, -2), x)
  torch.autograd.backward((read, after), (torch.tensor(d_read),
                                          torch.tensor(d_next)))
  found = dict(output=read, streams=after, x=x.grad, y=y.grad,
               scale=module.scale.grad, dynamic=module.fn.grad)
  return {name: a.detach().numpy() for name, a in found.items()}
