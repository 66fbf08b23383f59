"""Attention weights that a model gives when it is asked for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts.attention import xla
from tests.helpers import models

VARIANTS = {
    'rope, grouped heads': ('llama', dict(num_kv_heads=2)),
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
