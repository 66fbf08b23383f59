"""Residual streams: hyper-connections, mHC and attention residuals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import blocks, stack, streams
from architectures.parts.context import Context
from tests.architectures.parts_test import D, born, normal, resolved
from tests.helpers import models, numpy_attention
from tests.training import step_test
from training import runs
from training.costs import flops, totals

N = 3
KINDS = {'hyper': dict(residual='hyper', streams=dict(count=N)),
         'static': dict(residual='hyper', streams=dict(count=N, dynamic=False)),
         'mhc': dict(residual='mhc', streams=dict(count=N)),
         'gated': dict(residual='gated', streams=dict(count=N, rank=5)),
         'balanced': dict(residual='balanced'),
         'affine': dict(residual='affine'),
         'embedding': dict(residual='embedding'),
         'attention': dict(residual='attention'),
         'blocks': dict(residual='attention', streams=dict(block_size=3))}


def new(module, *inputs):
  """Returns new parameters, with noise on all that a plain model has too."""
  params = nn.meta.unbox(jax.jit(module.init)(
      jax.random.key(0), *inputs)['params'])

  def moved(path, x):
    of_streams = any('_streams' in str(key) for key in path)
    return x if of_streams else (
        np.asarray(x) + 0.1 * np.asarray(normal(1, *x.shape)))
  return jax.tree_util.tree_map_with_path(moved, params)


def without(params):
  return {name: without(x) if isinstance(x, dict) else x
          for name, x in params.items() if not name.endswith('_streams')}


@pytest.mark.slow
@pytest.mark.parametrize('kind', [
    'mhc', pytest.param('blocks', marks=pytest.mark.long)])
def test_a_new_model_is_the_plain_one(kind):
  module, plain = (architectures.build(models.small_config(
      'llama', norm_eps=1e-12, num_layers=3, **more))
                   for more in (KINDS[kind], {}))
  tokens = models.random_tokens()
  params = new(module, tokens)
  logits = lambda m, p: jax.jit(lambda p: models.logits(m, p, tokens))(p)
  models.assert_trees_close(logits(module, params),
                            logits(plain, without(params)), 2e-5)


def branch_of(c, x, k, y_of):
  """Returns the streams after branch k of `streams.Branch`, with random
  parameters, and these parameters."""
  module, given = streams.Branch(c), streams.Streams(x, jnp.int32(k), 5)
  params = born(module, given)

  def run(module, x):
    read, weights = module(x)
    return streams.add_to_streams(c, x, y_of(read), weights)
  after = jax.jit(nn.apply(run, module))({'params': params}, given)
  assert after.branch == k + 1
  return after, params


@pytest.mark.parametrize('kind', ['hyper', 'static', 'mhc', 'gated'])
def test_streams_are_mixed_as_published(kind):
  """Compares one branch, y = 3 x, with the equations in float64."""
  norm = 'rmsnorm_1p' if kind == 'gated' else 'rmsnorm_plain'
  c = resolved('llama', norm=norm, **KINDS[kind])
  x, k = normal(0, 2, 4, N, D), 4
  got, params = branch_of(c, x, k, lambda x: 3 * x)
  p, x = numpy_attention.float64(params), np.asarray(x, np.float64)
  n = lambda x: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.norm_eps)
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  logit = lambda p: np.log(p / (1 - p))
  want, turn = np.zeros_like(x), np.eye(N)[k % N]
  for place in np.ndindex(2, 4):
    h = x[place]  # [streams, features]
    if kind == 'mhc':
      z = n(h.reshape(-1)) @ p['dynamic'].reshape(N * D, -1)
      s, first = p['dynamic_scale'], logit(np.where(turn, 0.75, 0.125))
      read = sigmoid(s[0] * z[:N] + first + p['read'])
      write = 2 * sigmoid(s[1] * z[N:2 * N] + p['write'])
      m = np.exp(s[2] * z[2 * N:].reshape(N, N) + p['mix'])
      for _ in range(20):
        m = m / m.sum(1, keepdims=True)
        m = m / m.sum(0, keepdims=True)
      mixed = m.T @ h
    elif kind == 'gated':
      x_n = n(h) * (1 + p['norm']['offset'])
      z = np.einsum('ud,udr->r', x_n, p['down']) / N
      gates = sigmoid(np.einsum('r,rud->ud', z * sigmoid(z), p['up']))
      write = 2 * sigmoid(np.einsum('ud,udv->v', x_n, p['write']) / N)
      want[place] = h + np.outer(write, 3 * (gates * x_n).mean(0))
      continue
    else:
      read, write, mix = turn + p['read'], p['write'], p['mix']
      if kind == 'hyper':
        z = np.tanh(n(h) @ p['dynamic'])
        s = p['dynamic_scale']
        read, write = read + s[0] * z[:, 0], write + s[1] * z[:, 1]
        mix = mix + s[0] * z[:, 2:]
      mixed = mix.T @ h
    want[place] = mixed + np.outer(write, 3 * (read @ h))
  np.testing.assert_allclose(got.x_BLUD, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('kind', ['balanced', 'affine', 'embedding'])
def test_sums_are_learned_as_published(kind):
  """Compares one branch, y = 3 x, with the equations in float64."""
  c = resolved('llama', **KINDS[kind])
  x = normal(0, 2, 4, 1 + (kind == 'embedding'), D)
  got, params = branch_of(c, x, 4, lambda x: 3 * x)
  p, x = numpy_attention.float64(params), np.asarray(x, np.float64)
  want, first = x.copy(), x[:, :, 0]
  if kind == 'balanced':
    g = 1 / (1 + np.exp(-p['gate'] / 0.3))
    want[:, :, 0] = first * (np.sqrt(np.maximum(1 - g ** 2, 1e-3)) + 3 * g)
  elif kind == 'affine':
    want[:, :, 0] = p['stream_scale'] * (first + p['stream_bias']) + (
        p['branch_scale'] * (3 * first + p['branch_bias']))
  else:
    want[:, :, 0] = 4 * (p['stream'] * first + p['embedding'] * x[:, :, 1])
  np.testing.assert_allclose(got.x_BLUD, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('size', [1, 3])
def test_branches_attend_to_those_before_them(size):
  """Compares five branches, each of which returns the sine of what it reads,
  and the end, with NumPy in float64, which keeps a list of all outputs."""
  c = resolved('llama', residual='attention', streams=dict(block_size=size))
  e, total = normal(0, 2, 4, D), 5
  x, outputs = streams.begin_streams(c, e, total), []
  rms = lambda x: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.norm_eps)

  def want(params):
    p = numpy_attention.float64(params)
    v = [np.asarray(e, np.float64), *(
        sum(outputs[i:i + size]) for i in range(0, len(outputs), size))]
    score = [rms(a) * p['scale'] @ p['query'][:, 0] for a in v]
    weights = np.exp(score) / np.exp(score).sum(0)
    return sum(w[..., None] * a for w, a in zip(weights, v))

  for k in range(total):
    x, params = branch_of(c, x.x_BLUD, k, jnp.sin)
    outputs.append(np.sin(want(params)))
  module = blocks.EndOfResidual(c)
  params = born(module, x)
  np.testing.assert_allclose(module.apply({'params': params}, x), want(params),
                             rtol=1e-4, atol=1e-5)


def test_mixing_neither_adds_nor_takes():
  """Sinkhorn's matrix is doubly stochastic; gradients of large logits are
  finite."""
  sinkhorn = jax.jit(streams.sinkhorn, static_argnums=1)
  m = np.asarray(sinkhorn(2 * np.asarray(normal(0, 5, 1, N, N)), 50))
  np.testing.assert_allclose(m.sum(-2), 1, atol=1e-5)
  np.testing.assert_allclose(m.sum(-1), 1, atol=1e-3)
  one = np.asarray(sinkhorn(2 * np.asarray(normal(0, 1, 1, N, N)), 2))
  np.testing.assert_allclose(one.sum(-2), 1, atol=1e-5)
  assert np.abs(one.sum(-1) - 1).max() > 1e-3
  grad = jax.jit(jax.grad(lambda z: streams.sinkhorn(z, 20)[..., 0, 0].sum()))(
      100 * np.asarray(normal(1, 1, 1, N, N)))
  assert np.isfinite(grad).all()


@pytest.mark.parametrize('num_layers', [4, 5])
def test_a_skip_ends_where_as_many_layers_are_left(num_layers):
  """Compares all layers with a loop over them that keeps their results."""
  module, params = models.make_model('llama', skips=True, num_layers=num_layers)
  c, tokens, stacked = module.config, models.random_tokens(), params['decoder']
  layers = jax.jit(lambda p: module.apply(
      {'params': p}, tokens, keep_layers=True).aux['layers'])(params)
  layer = stack.Period(c, c.layer_kinds(1))
  run = jax.jit(lambda p, x: layer.apply(
      {'params': p}, (x, stack.PassedOn()), None,
      Context(jnp.arange(tokens.shape[1])[None]), {})[0][0])
  x, results = layers[0], []
  assert stacked['skip_streams'].shape == (num_layers // 2,)
  for n in range(num_layers):
    if n >= num_layers - num_layers // 2:
      n_before = num_layers - 1 - n
      x = x + stacked['skip_streams'][n_before] * results[n_before]
    x = run(jax.tree.map(lambda w, n=n: w[n], stacked['layers']), x)
    results.append(x)
  models.assert_trees_close(layers[1:], jnp.stack(results), rtol=1e-4)


@pytest.mark.parametrize('kind', ['hyper', 'blocks'])
def test_what_streams_cost(kind):
  """Compares parameters, FLOPs and what a layer keeps with counts by hand."""
  N_layers = 4
  c = step_test.config()
  c.model = models.small_config('llama', num_layers=N_layers, **KINDS[kind])
  plain = c.copy_and_resolve_references()
  plain.model.residual = 'plain'
  costs, plain_costs = (totals.count_costs(x, 16) for x in (c, plain))
  each, ends = {'hyper': (N + N + N * N + D * (N + 2) + 2 + D, 0),
                'blocks': (2 * D, 2 * D)}[kind]
  assert costs['by_part']['streams'] == each * 2 * N_layers + ends
  assert costs['parameters'] - plain_costs['parameters'] == (
      costs['by_part']['streams'])
  # The slots that the branches of blocks, and the end, attend to are added.
  more = {'hyper': 8 * (2 * D * (N + N * N + N) + 2 * N * D * (N + 2)),
          'blocks': 4 * D * (1 + 2 + 2 + 2 + 3 + 3 + 3 + 4 + 4)}[kind]
  models_ = [runs.resolve_model_without_tokenizer(x) for x in (c, plain)]
  a, b = (sum(flops.forward_flops(m, 16).values()) / 16 for m in models_)
  assert a - b == pytest.approx(more)
