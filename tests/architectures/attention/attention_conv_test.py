"""Short convolutions of queries, keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.attention.multi_head import Attention
from configs import sharding as tables
from configs.errors import RequestError
from tests.architectures.parts_test import (
    D, KIND, born, context, normal, resolved)
from tests.helpers import models, numpy_attention
from tests.training import step_test
from training import generate
from training.costs import flops, totals
from training.distributed import devices

CONV = dict(attention_conv=3, num_kv_heads=2)


def convolved(x_BLHK, w_WHK):
  """Convolves in numpy: a token sees itself and the two tokens before it."""
  padded = np.pad(x_BLHK, ((0, 0), (2, 0), (0, 0), (0, 0)))
  L = x_BLHK.shape[1]
  return sum(padded[:, i:i + L] * w_WHK[i] for i in range(3))


def test_a_layer_convolves_what_it_projects():
  module = Attention(resolved(position='none', **CONV), KIND)
  x = normal(0, 2, 6, D)
  params = born(module, x, context(), None)
  p = numpy_attention.float64(params)
  q, k, v = (convolved(numpy_attention.project(p, name, np.asarray(x)),
                       p[f'{name}_conv']) for name in ('query', 'key', 'value'))
  want = numpy_attention.out(p, numpy_attention.heads(
      q, k, v, module.config.score_scale))
  got, cache = module.apply({'params': params}, x, context(), None)
  assert cache is None
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    dict(), pytest.param(dict(
        num_layers=4, pattern='own,reads', qk_norm=True, value_residual=True,
        kinds=dict(own={}, reads=dict(kv_sharing=True)),
        block='parallel'), marks=pytest.mark.long)], ids=str)
def test_decoding_and_packing_are_the_forward_pass(fields):
  module, params = models.make('llama', **CONV, **fields)
  tokens = models.tokens(2, 9)
  run = jax.jit(lambda t, **o: module.apply({'params': params}, t, **o).hidden)
  whole, found = run(tokens), []
  cache = architectures.init_cache(module.config, 2, 9)
  step = jax.jit(lambda t, cache, at: module.apply(
      {'params': params}, t, cache=cache, positions_BL=at))
  for first, last in ((0, 4), (4, 5), (5, 6), (6, 9)):
    out = step(tokens[:, first:last], cache, jnp.arange(first, last)[None])
    cache, found = out.cache, [*found, out.hidden]
  models.close(jnp.concatenate(found, 1), whole, rtol=1e-4)
  ids = jnp.array([[1] * 4 + [2] * 5] * 2)
  places = jnp.array([[*range(4), *range(5)]] * 2)
  packed = run(tokens, segment_ids_BL=ids, positions_BL=places)
  models.close(packed, jnp.concatenate(
      [run(tokens[:, :4]), run(tokens[:, 4:])], 1), rtol=1e-4)


@pytest.mark.long
def test_prompts_of_two_lengths_go_on_as_each_would_alone():
  module, params = models.make('llama', **CONV)
  tokens, lengths = models.tokens(2, 6), jnp.array([6, 3])
  greedy = lambda t, n: np.asarray(generate.generate(
      module, params, t, n, jax.random.key(0), max_new_tokens=5,
      sampling=generate.Sampling(temperature=0)))
  both = greedy(tokens, lengths)
  assert (both[1] == greedy(tokens[1:, :3], lengths[1:])[0]).all()
  assert (both[0] == greedy(tokens[:1], lengths[:1])[0]).all()


def test_what_it_keeps_and_multiplies():
  c, plain = (architectures.resolve(models.config('llama', **CONV | fields))
              for fields in ({}, dict(attention_conv=0)))
  assert totals.parameters(c)[0] - totals.parameters(plain)[0] == (
      2 * 3 * (4 + 2 + 2) * 8)  # layers, tokens, heads, features
  more = {'attention': 0, 'weights': 2 * 2 * 16 * 3 * (4 + 2 + 2) * 8}
  whole, rest = (flops.forward_flops(x, 16) for x in (c, plain))
  assert {name: whole[name] - rest[name] for name in whole} == more
  assert totals._state_bytes(c) == 2 * 2 * (4 + 2 + 2) * 8 * 4
  assert totals._cache_bytes(c) == totals._cache_bytes(plain)


@pytest.mark.parametrize('system, fields, words', [
    ('bert', {}, 'model.arch .* is an encoder: set it'),
    ('t5', {}, 'is an encoder-decoder: set it to 0'),
    ('llama', dict(mixer='latent'), 'attention_conv 3 has no meaning'),
])
def test_what_cannot_be_convolved_is_refused(system, fields, words):
  with pytest.raises(RequestError, match=words):
    architectures.resolve(models.config(system, attention_conv=3, **fields))


def test_rows_stay_on_one_device():
  c = architectures.resolve(models.config('llama', **CONV))
  with pytest.raises(RequestError, match='keep each row on one device'):
    devices.check_mesh(
        c, 8, 1, dict.fromkeys(tables.MESH_AXES, 1) | dict(context=2))


@pytest.mark.long
def test_several_devices_are_one():
  c = step_test.config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  c.model = models.config('llama', vocab_size=64, **CONV)
  _, state, metrics = step_test.train(c, steps=1)
  _, alone, other = step_test.train(c, step_test.one_device(), steps=1)
  models.close(alone.params, state.params, rtol=1e-4)
  assert metrics[0]['loss'] == pytest.approx(other[0]['loss'], rel=1e-4)
