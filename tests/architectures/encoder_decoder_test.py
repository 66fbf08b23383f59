"""Laws of every encoder-decoder: causality, no leak of padding, decode =
forward, scan = loop, remat = plain, sharded = single; published sizes."""


import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import positions
from tests.helpers import models
from training import generate

DROPLESS = dict(capacity_factor=0.0, eval_capacity_factor=0.0, num_experts=4)


def _make(system, **changes):
  changes = dict(moe=DROPLESS, head_dim=8) | changes
  return models.make(system, **changes)


def _apply(module, params, source, target, **kwargs):
  return module.apply({'params': params}, source, target, **kwargs)


@pytest.mark.slow
def test_causality_and_padding_by_gradient():
  module, params = _make('t5')
  ids = jnp.array([[1, 1, 1, 1, 0, 0]])
  def hidden(table):  # each token its own row: the gradient tells them apart
    p = params | {'embed': {'tokens': table}}
    return _apply(module, p, jnp.arange(6)[None], 6 + jnp.arange(5)[None],
                  segment_ids_BM=ids).hidden[0].sum(-1)
  grads = jax.jit(jax.jacrev(hidden))(params['embed']['tokens'])
  seen = np.abs(grads[:, :11]).sum(-1) > 0
  picture = [''.join('x' if s else '.' for s in row) for row in seen]
  assert picture == ['xxxx..x....', 'xxxx..xx...', 'xxxx..xxx..',
                     'xxxx..xxxx.', 'xxxx..xxxxx']


@pytest.mark.slow
def test_generation_equals_asking_again_for_each_token():
  module, params = _make('transformer')
  source, lengths = models.tokens(2, 9), jnp.array([9, 6])
  ids = (jnp.arange(9)[None] < lengths[:, None]).astype(jnp.int32)
  start = jnp.full((2, 1), 5)
  new = generate.generate(
      module, params, start, jnp.ones(2, jnp.int32), jax.random.key(0),
      max_new_tokens=6, sampling=generate.Sampling(temperature=0),
      source_BM=source, source_lengths_B=lengths)
  best = jax.jit(lambda target: _apply(
      module, params, source, target, segment_ids_BM=ids).logits.argmax(-1))
  target = jnp.pad(start, ((0, 0), (0, 6)))
  for i in range(6):
    target = target.at[:, i + 1].set(best(target)[:, i])
  np.testing.assert_array_equal(new, target[:, 1:])


@pytest.mark.slow
def test_the_memory_is_projected_once():
  """With a filled cache, no product has the memory's features in it."""
  module, params = _make('t5')
  memory, _ = module.apply({'params': params}, models.tokens(2, 11),
                           method='encode')
  cache = architectures.init_cache(module.config, 2, 4)
  first = lambda m: _apply(module, params, None, models.tokens(2, 1),
                           memory=m, cache=cache)
  filled = first(memory).cache
  again = jax.make_jaxpr(lambda cache: _apply(
      module, params, None, models.tokens(2, 1), cache=cache,
      decoder_positions_BL=jnp.ones((2, 1), jnp.int32)).logits)(filled)
  assert 'f32[2,11,32]' in str(jax.make_jaxpr(first)(memory))
  assert 'f32[2,11,32]' not in str(again)
  with pytest.raises(ValueError, match='attends to a memory'):
    _apply(module, params, None, models.tokens(2, 1), cache=cache)


def test_layouts_of_sinusoids():
  where = jnp.arange(7)
  paper = positions.sinusoid(where, 16)
  halves = positions.sinusoid(where, 16, 'halves')
  order = np.concatenate([np.arange(0, 16, 2), np.arange(1, 16, 2)])
  np.testing.assert_allclose(paper[:, order], halves)
  np.testing.assert_allclose(paper[3, 2], np.sin(3 / 10000 ** (2 / 16)),
                             rtol=1e-5)
  fairseq = positions.sinusoid(where, 16, 'fairseq')
  np.testing.assert_allclose(fairseq[1, :8], np.sin(
      3 * 10000.0 ** (-np.arange(8) / 7)), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_t5_is_born_with_scores_of_variance_one():
  """Unscaled scores: the query's weights are smaller by sqrt(head_dim)."""
  module = architectures.build(models.config('t5', d_model=256, head_dim=64))
  params = nn.meta.unbox(
      jax.jit(module.init)(jax.random.key(0), models.tokens()))
  attention = params['params']['encoder']['layers']['block_0']['attention']
  assert abs(float(attention['query'].std()) * 16 * 8 - 1) < 0.02
  assert abs(float(attention['key'].std()) * 16 - 1) < 0.02
