"""Attention weights that a model gives when it is asked for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.attention import xla
from tests.helpers import models

VARIANTS = {
    'gpt': ('gpt', {}),
    'rope, grouped heads': ('llama', dict(num_kv_heads=2)),
    'alibi': ('bloom', {}),
    'relative, banded': ('gpt', dict(
        position='relative', attention='banded,global', sliding_window=4)),
    'experts': ('mixtral', {}),
}


def _weights(module, params, tokens_BL, **inputs):
  return jax.jit(lambda params: module.apply(
      {'params': params}, tokens_BL, keep_attention=True, **inputs
      ).aux['attention'])(params)


@pytest.mark.parametrize('name', VARIANTS)
def test_rows_sum_to_one_and_hidden_keys_weigh_nothing(name):
  system, changes = VARIANTS[name]
  module, params = models.make(system, **changes)
  tokens_BL = models.tokens(2, 10)
  ids_BL = jnp.asarray([[1] * 6 + [2] * 4, [1] * 8 + [0] * 2])
  w_NBHLM = np.asarray(_weights(module, params, tokens_BL,
                                segment_ids_BL=ids_BL))
  assert w_NBHLM.shape == (2, 2, 4, 10, 10) and w_NBHLM.dtype == np.float32
  np.testing.assert_allclose(w_NBHLM.sum(-1), 1, atol=1e-6)
  query, key = np.arange(10)[:, None], np.arange(10)[None]
  ids = np.asarray(ids_BL)
  for n in range(2):
    seen_BLM = (key <= query) & (ids[:, :, None] == ids[:, None])
    if 'banded' in name and n == 0:
      seen_BLM &= query - key < 4
    hidden = ~np.broadcast_to(seen_BLM[:, None], w_NBHLM[n].shape)
    assert (w_NBHLM[n][hidden] == 0).all()
    assert (w_NBHLM[n][~hidden] > 0).all()


def test_equal_a_softmax_in_float64():
  random = np.random.RandomState(0)
  q, k = random.randn(2, 5, 6, 8), random.randn(2, 7, 3, 8)
  bias, sink = random.randn(1, 6, 5, 7), random.randn(6)
  mask = random.rand(2, 5, 7) < 0.7
  mask[..., 0] = True
  found = xla.weights(
      *(jnp.asarray(x, jnp.float32) for x in (q, k)), scale=0.3,
      mask_BLM=jnp.asarray(mask), bias_BHLM=jnp.asarray(bias, jnp.float32),
      softcap=2.0, sink_H=jnp.asarray(sink, jnp.float32))
  scores = 0.3 * np.einsum('blhk,bmhk->bhlm', q, k.repeat(2, 2))
  scores = 2 * np.tanh(scores / 2) + bias
  e = np.exp(scores) * mask[:, None]
  expected = e / (e.sum(-1, keepdims=True)
                  + np.exp(sink)[None, :, None, None])
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_are_what_the_first_layer_of_gpt_weighs_with():
  """Worked out in numpy from the parameters and the layer's input."""
  module, params = models.make('gpt')
  tokens_BL = models.tokens(2, 9)
  aux = module.apply({'params': params}, tokens_BL, keep_attention=True,
                     keep_layers=True).aux
  block = jax.tree.map(lambda x: np.asarray(x[0], np.float64),
                       params['decoder']['layers']['block_0'])
  x = np.asarray(aux['layers'][0], np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + module.config.norm_eps)
  x = x * block['attention_norm']['scale'] + block['attention_norm']['bias']
  a = block['attention']
  q = np.einsum('bld,dhk->bhlk', x, a['query']) + a['query_bias'][:, None]
  k = np.einsum('bld,dhk->bhlk', x, a['key']) + a['key_bias'][:, None]
  scores = q @ k.swapaxes(2, 3) / np.sqrt(module.config.head_dim)
  e = np.tril(np.exp(scores))
  np.testing.assert_allclose(aux['attention'][0],
                             e / e.sum(-1, keepdims=True), atol=2e-6)


@pytest.mark.long
def test_are_the_same_unrolled_and_rematerialised_and_change_no_output():
  module, params = models.make('gpt', num_layers=4,
                               attention='global,banded', sliding_window=3)
  tokens_BL = models.tokens(2, 8)
  first, plain = (jax.jit(lambda params, keep=keep: module.apply(
      {'params': params}, tokens_BL, keep_attention=keep))(params)
                  for keep in (True, False))
  assert first.aux['attention'].shape == (4, 2, 4, 8, 8)
  assert first.cache is None
  far = [bool((w_BHLM[..., 7, :5] > 0).any())
         for w_BHLM in first.aux['attention']]
  assert far == [True, False, True, False]  # the second of a period is banded
  np.testing.assert_array_equal(first.hidden, plain.hidden)
  for change in (dict(scan_layers=False), dict(remat='full')):
    other, _ = models.make('gpt', num_layers=4, attention='global,banded',
                           sliding_window=3, **change)
    np.testing.assert_allclose(_weights(other, params, tokens_BL),
                               first.aux['attention'], atol=1e-6)


@pytest.mark.slow
def test_of_an_encoder_decoder():
  module, params = models.make('t5')
  source_BM, target_BL = models.tokens(2, 9), models.tokens(2, 6, seed=2)
  ids_BM = jnp.asarray([[1] * 9, [1] * 5 + [0] * 4])
  aux = jax.jit(lambda params: module.apply(
      {'params': params}, source_BM, target_BL, segment_ids_BM=ids_BM,
      keep_attention=True).aux)(params)
  encoder, decoder = aux['attention'][:2], aux['attention'][2:]
  cross = aux['cross_attention']
  assert encoder[0].shape == (2, 4, 9, 9) and decoder[0].shape == (2, 4, 6, 6)
  assert cross.shape == (2, 2, 4, 6, 9)
  assert (np.asarray(cross)[:, 1, :, :, 5:] == 0).all()
  np.testing.assert_allclose(np.asarray(cross).sum(-1), 1, atol=1e-6)
  assert (np.triu(np.asarray(decoder[0]), 1) == 0).all()
  assert (np.asarray(encoder[0])[0] > 0).all()


@pytest.mark.long
def test_of_a_step_with_a_cache_are_the_last_row():
  module, params = models.make('gpt')
  tokens_BL = models.tokens(2, 6)
  cache = architectures.init_cache(module.config, 2, 8)
  output = module.apply({'params': params}, tokens_BL[:, :5], cache=cache)
  step = module.apply({'params': params}, tokens_BL[:, 5:],
                      positions_BL=jnp.full((2, 1), 5), cache=output.cache,
                      keep_attention=True)
  assert jax.tree.structure(step.cache) == jax.tree.structure(cache)
  whole = _weights(module, params, tokens_BL)
  np.testing.assert_allclose(step.aux['attention'][..., 0, :6],
                             whole[..., 5, :], atol=1e-6)
  assert (step.aux['attention'][..., 6:] == 0).all()


def test_cost_nothing_where_nobody_asks():
  """No array [B, H, L, M] leaves the scan over the layers."""
  module, params = models.make('gpt')
  tokens_BL = models.tokens(3, 11)

  def shapes_from_scans(**inputs):
    jaxpr = jax.make_jaxpr(lambda p: module.apply(
        {'params': p}, tokens_BL, **inputs).logits)(params)
    return [v.aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == 'scan'
            for v in eqn.outvars]

  assert (2, 3, 4, 11, 11) in shapes_from_scans(keep_attention=True)
  assert shapes_from_scans() == [(3, 11, 32)]
