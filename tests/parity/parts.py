"""Parts that no system here has, beside the layer of transformers that has
them: the gate on attention's heads, in Qwen3-Next's attention, and mHC, in
DeepSeek-V4's, which divides the columns and rows of the transposed matrix, and
so gets the same one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import streams
from architectures.parts.attention.multi_head import Attention
from architectures.parts.config import LayerKind
from architectures.parts.context import Context
from configs import base
from tests.parity import compare

D, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 32, 4, 2, 8, 12
STREAMS = 3


def attention_gate() -> list[compare.Finding]:
  """Compares the outputs of one layer, and the gradients of its input and of
  its weights, which are drawn from a fixed seed."""
  draw = np.random.default_rng(0)
  x, d = (draw.standard_normal((2, LENGTH, D)).astype(np.float32)
          for _ in range(2))
  theirs, weights = _qwen3_next(x, d)
  q_DHK = weights['q_proj'].T.reshape(D, HEADS, 2 * HEAD_DIM)
  params = dict(
      query=q_DHK[..., :HEAD_DIM], output_gate=q_DHK[..., HEAD_DIM:],
      key=weights['k_proj'].T.reshape(D, KV_HEADS, HEAD_DIM),
      value=weights['v_proj'].T.reshape(D, KV_HEADS, HEAD_DIM),
      out=weights['o_proj'].T.reshape(HEADS, HEAD_DIM, D),
      **{f'{name}_norm': {'offset': weights[f'{name[0]}_norm']}
         for name in ('query', 'key')})
  model = base.base().model
  model.update(d_model=D, num_heads=HEADS, num_kv_heads=KV_HEADS,
               head_dim=HEAD_DIM, vocab_size=2, max_len=LENGTH,
               position='rope', norm='rmsnorm_1p', norm_eps=1e-6,
               qk_norm=True, attention_bias=False,
               attention_gate='elementwise')
  model.rope.fraction = 0.5
  module = Attention(architectures.resolve(model), LayerKind('global', 'gelu'))

  def run(params, x):
    ctx = Context(jnp.arange(LENGTH)[None], length=LENGTH)
    return module.apply({'params': params}, x, ctx, None)[0]

  y, vjp = jax.vjp(run, params, x)
  grads, dx = vjp(d)
  ours = dict(output=y, x=dx, gate=grads['output_gate'], out=grads['out'])
  theirs['gate'] = theirs.pop('q_proj').T.reshape(
      D, HEADS, 2 * HEAD_DIM)[..., HEAD_DIM:]
  theirs['out'] = theirs.pop('o_proj').T.reshape(HEADS, HEAD_DIM, D)
  return [compare.Finding(
      name, compare.error(ours[name], theirs[name]),
      compare.LIMITS['output' if name == 'output' else 'grads'])
          for name in ours]


def _qwen3_next(x: np.ndarray, d: np.ndarray) -> tuple[dict, dict]:
  """Returns the output and gradients of transformers' layer, and its weights
  by name."""
  import torch
  from transformers.models.qwen3_next import configuration_qwen3_next as fields
  from transformers.models.qwen3_next import modeling_qwen3_next as modeling
  config = fields.Qwen3NextConfig(
      hidden_size=D, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
      head_dim=HEAD_DIM, max_position_embeddings=LENGTH, rms_norm_eps=1e-6,
      attention_bias=False, rope_parameters=dict(
          rope_type='default', rope_theta=1e4, partial_rotary_factor=0.5),
      attn_implementation='eager')
  torch.manual_seed(0)
  layer = modeling.Qwen3NextAttention(config, 0)
  for weight in layer.parameters():
    torch.nn.init.normal_(weight, std=0.3)
  x_BLD = torch.tensor(x, requires_grad=True)
  turns = modeling.Qwen3NextRotaryEmbedding(config)(
      x_BLD, torch.arange(LENGTH)[None])
  mask = torch.full((LENGTH, LENGTH), -1e30).triu(1)[None, None]
  y_BLD, _ = layer(x_BLD, turns, mask)
  y_BLD.backward(torch.tensor(d))
  named = {name.removesuffix('.weight'): weight
           for name, weight in layer.named_parameters()}
  found = {name: named[name].grad.numpy() for name in ('q_proj', 'o_proj')}
  return ({'output': y_BLD.detach().numpy(), 'x': x_BLD.grad.numpy()} | found,
          {name: weight.detach().numpy() for name, weight in named.items()})


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
  module = streams.Branch(c)

  def run(params, x, y):
    def through(module, x):
      read, add = module(streams.Streams(x, jnp.int32(1), 4))
      return read, add(y).x_BLUD
    return nn.apply(through, module)({'params': params}, x)

  born = nn.meta.unbox(module.init(
      jax.random.key(0), streams.Streams(x, jnp.int32(1), 4)))['params']
  at_first = jax.jit(lambda: streams.fresh(STREAMS, jnp.int32(1)))()
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
