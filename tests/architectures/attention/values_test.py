"""What is mixed into the values of self-attention: those of the first layer,
and a table of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.attention.multi_head import Attention
from configs.errors import RequestError
from tests.architectures.parts_test import (
    D, KIND, born, context, normal, resolved)
from tests.helpers import models, numpy_attention
from tests.training import step_test
from training import paths

BOTH = dict(value_residual=True, value_embedding=True)
# One layer before two periods; tables of tokens in two layers of five.
MIXED = dict(value_residual=True, num_layers=5, prefix='plain',
             pattern='embedded,plain', num_kv_heads=2,
             kinds=dict(plain={}, embedded=dict(value_embedding=True)))


def by_numpy(c, params, tokens):
  """What the layers of a pre-norm decoder without positions, biases and
  parameters of norms return."""
  p = numpy_attention.float64(params)
  n = lambda x: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.norm_eps)
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  rows = [(p['decoder']['prefix']['block_0'], 0)] + [
      (p['decoder']['layers'][f'block_{block}'], row)
      for row in range(2) for block in range(2)]
  x, first = p['embed']['tokens'][tokens], None
  for block, row in rows:
    layer = jax.tree.map(lambda a, row=row: a[row], block)
    a, h = layer['attention'], n(x)
    q, k, v = (numpy_attention.project(a, name, h)
               for name in ('query', 'key', 'value'))
    first = v if first is None else first
    v = (1 - a['value_residual']) * v + a['value_residual'] * first
    if 'value_embedding' in a:
      gate = 2 * sigmoid(h @ a['value_gate'])
      v = v + gate[..., None] * a['value_embedding'][tokens]
    x = x + numpy_attention.out(a, numpy_attention.heads(
        q, k, v, c.score_scale))
    x = x + np.maximum(n(x) @ layer['ffn']['up'], 0) @ layer['ffn']['down']
  return n(x)


@pytest.mark.slow
def test_values_are_mixed_as_published():
  """Against NumPy in float64: the forward pass, and a cache's single tokens."""
  module, params = models.make(
      'llama', position='none', norm='rmsnorm_plain', ffn='relu', **MIXED)
  names = [path for path in paths.flatten(params) if 'value_emb' in path]
  assert names == ['decoder/layers/block_0/attention/value_embedding']
  tokens = models.tokens(2, 6)
  want = by_numpy(module.config, params, tokens)
  run = jax.jit(lambda p, t: module.apply({'params': p}, t).hidden)
  np.testing.assert_allclose(run(params, tokens), want, rtol=1e-4, atol=1e-4)
  cache, found = architectures.init_cache(module.config, 2, 6), []
  step = jax.jit(lambda p, t, cache, i: module.apply(
      {'params': p}, t, cache=cache, positions_BL=i[None, None]))
  for i in range(6):
    out = step(params, tokens[:, i:i + 1], cache, jnp.array(i))
    cache, found = out.cache, [*found, out.hidden]
  np.testing.assert_allclose(np.concatenate(found, 1), want, rtol=1e-4,
                             atol=1e-4)


def test_a_new_model_mixes_halves_and_adds_the_table_once():
  x, tokens = normal(0, 2, 6, D), models.tokens(2, 6)
  module = Attention(resolved(**BOTH), KIND)
  new = jax.jit(module.init)(jax.random.key(0), x, context(tokens_BL=tokens),
                             None)['params']
  assert new['value_residual'].value == 0.5
  assert not new['value_gate'].value.any()
  # The first layer mixes its values with themselves.
  params = born(module, x, context(tokens_BL=tokens), None)
  run = lambda share: module.apply(
      {'params': params | dict(value_residual=jnp.array(share))}, x,
      context(tokens_BL=tokens), None)[0]
  np.testing.assert_allclose(run(0.9), run(0.1), rtol=1e-4, atol=1e-5)


def test_a_wider_model_divides_the_gate_of_a_head():
  """In muP, by how many times as wide it is."""
  x, ctx = normal(0, 2, 6, D), context(tokens_BL=models.tokens(2, 6))
  base, wider = (Attention(resolved(
      value_embedding=True, parametrization='mup', mup_base_width=width,
      mup_base_head_dim=8), KIND) for width in (D, D // 2))
  params = born(base, x, ctx, None)
  twice = params | dict(value_gate=2 * params['value_gate'])
  run = lambda module, params: module.apply({'params': params}, x, ctx, None)[0]
  np.testing.assert_allclose(run(wider, twice), run(base, params), rtol=1e-5,
                             atol=1e-6)


@pytest.mark.parametrize('fields, words', [
    (dict(value_residual=True, mixer='latent'),
     'value_residual True has no meaning with model.mixer'),
    (dict(value_embedding=True, mixer='latent'),
     'value_embedding True has no meaning with model.mixer'),
    (dict(value_residual=True, pattern='a,b', kinds=dict(
        a=dict(num_kv_heads=2), b={})), 'choose one size'),
])
def test_values_that_cannot_be_mixed_are_refused(fields, words):
  with pytest.raises(RequestError, match=words):
    architectures.resolve(models.config('gpt', **fields))


@pytest.mark.long
@pytest.mark.slow
def test_the_other_ways_to_compute_it_are_the_same():
  """Unrolled, and computed again in the backward pass, with gradients."""
  tokens, found = models.tokens(), []
  for changes in (dict(), dict(scan_layers=False, remat='full')):
    module, params = models.make('llama', **MIXED, **changes)
    loss = lambda p, module=module: jnp.square(
        models.logits(module, p, tokens)).mean()
    found.append(jax.jit(jax.value_and_grad(loss))(params))
  models.close(*found, rtol=3e-5)


@pytest.mark.long
def test_values_mixed_on_several_devices_are_those_on_one():
  """Rows of the tables lie on two devices, and heads on two."""
  c = step_test.config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  c.model = models.config('llama', num_kv_heads=2, vocab_size=64, **BOTH)
  _, state, metrics = step_test.train(c, steps=1)
  _, alone, other = step_test.train(c, step_test.one_device(), steps=1)
  models.close(alone.params, state.params, rtol=1e-4)
  assert metrics[0]['loss'] == pytest.approx(other[0]['loss'], rel=1e-4)
