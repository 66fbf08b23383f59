"""Attention's written-out gradient against JAX's own of a plain softmax."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts import layers
from architectures.parts.attention import kernels
from tests.helpers import models

B, L, J, R, K = 2, 8, 2, 3, 4
DROPOUT = 0.3


# Every two values of a softcap, sinks and a key of dropout, once together.
PAIRS = ((0.0, False, None), (1.5, True, None), (1.5, False, 1),
         (0.0, True, 1))


def _plain(q, k, v, *, mask, bias, sink, softcap, key):
  """The definition, in the order of the equation."""
  k, v = (jnp.repeat(x, R, 2) for x in (k, v))
  s = 0.5 * jnp.einsum('blhk,bmhk->bhlm', q, k)
  if softcap:
    s = softcap * jnp.tanh(s / softcap)
  s = jnp.where(mask[:, None], s + bias, -jnp.inf)
  if sink is not None:
    s = jnp.concatenate(
        [s, jnp.broadcast_to(sink[None, :, None, None], (*s.shape[:3], 1))], -1)
  p = jax.nn.softmax(s, -1)[..., :k.shape[1]]
  if key is not None:
    p = layers.apply_dropout(p.reshape(B, J, R, L, L), DROPOUT,
                             jax.random.fold_in(key, 0)).reshape(p.shape)
  return jnp.einsum('bhlm,bmhk->blhk', p, v)


def _inputs(length=L):
  shapes = ((B, length, J * R, K), (B, length, J, K), (B, length, J, K),
            (1, J * R, length, length), (J * R,), (B, length, J * R, K))
  random = np.random.default_rng(0)
  return [jax.device_put((2 * random.normal(size=shape)).astype(np.float32))
          for shape in shapes]


@pytest.mark.parametrize('softcap, sinks, key', [
    pytest.param(*case, marks=[] if case in PAIRS else pytest.mark.long)
    for case in itertools.product((0.0, 1.5), (False, True), (None, 1))])
def test_values_and_gradients_are_those_of_the_definition(softcap, sinks, key):
  q, k, v, bias, sink, weight = _inputs()
  mask = jnp.tril(jnp.ones((B, L, L), bool)).at[1, :, 5:].set(False)
  key = None if key is None else jax.random.key(key)

  def ours(q, k, v, bias, sink):
    o = kernels.attend(
        q, k, v, scale=0.5, mask_BLM=mask, bias_BHLM=bias, softcap=softcap,
        sink_H=sink if sinks else None, dropout=DROPOUT, key=key)
    return (weight * o).sum(), o

  def theirs(q, k, v, bias, sink):
    o = _plain(q, k, v, mask=mask, bias=bias, softcap=softcap,
               sink=sink if sinks else None, key=key)
    return (weight * o).sum(), o

  got, want = (
      jax.jit(jax.grad(f, argnums=(0, 1, 2, 3, 4), has_aux=True))(
          q, k, v, bias, sink) for f in (ours, theirs))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@functools.partial(jax.jit, static_argnames=('causal', 'window'))
def _in_blocks(q, k, v, bias, sink, weight, mask, **kwargs):
  def loss(q, k, v, bias, sink):
    o = kernels.attend(q, k, v, scale=0.5, mask_BLM=mask, bias_BHLM=bias,
                       sink_H=sink, **kwargs)
    return (weight * o).sum(), o
  return jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)(
      q, k, v, bias, sink)


@pytest.mark.parametrize('window', [0, 1, 9, 100])
def test_blocks_of_a_causal_mask_are_the_whole(window, monkeypatch):
  monkeypatch.setattr(kernels, 'LEAST_QUERIES_OF_A_BLOCK', 1)
  q, k, v, bias, sink, weight = _inputs(length=22)  # not a multiple
  distance = jnp.arange(22)[None, :, None] - jnp.arange(22)[None, None]
  mask = (distance >= 0) & (distance < (window or 22))
  args = q, k, v, bias, sink, weight, mask
  got, want = _in_blocks(*args, causal=True, window=window), _in_blocks(*args)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_row_that_sees_nothing_is_finite_and_so_is_its_gradient():
  q, k, v, *_ = _inputs()
  mask = jnp.zeros((B, L, L), bool)
  f = lambda *x: kernels.attend(*x, scale=0.5, mask_BLM=mask)
  o, grads = jax.jit(lambda *x: (lambda o, vjp: (o, vjp(o)))(*jax.vjp(f, *x)))(
      q, k, v)
  np.testing.assert_allclose(o, np.broadcast_to(np.repeat(
      np.asarray(v), R, 2).mean(1, keepdims=True), o.shape),
                             rtol=1e-5, atol=1e-6)
  assert all(np.isfinite(g).all() for g in grads)


# Attention weights that a model gives when it is asked for them.


def test_equal_a_softmax_in_float64():
  random = np.random.RandomState(0)
  q, k = random.randn(2, 5, 6, 8), random.randn(2, 7, 3, 8)
  bias, sink = random.randn(1, 6, 5, 7), random.randn(6)
  mask = random.rand(2, 5, 7) < 0.7
  mask[..., 0] = True
  weights = jax.jit(functools.partial(
      kernels.attention_weights, scale=0.3, softcap=2.0))(
      *(x.astype(np.float32) for x in (q, k)), mask_BLM=mask,
      bias_BHLM=bias.astype(np.float32), sink_H=sink.astype(np.float32))
  scores = 0.3 * np.einsum('blhk,bmhk->bhlm', q, k.repeat(2, 2))
  scores = 2 * np.tanh(scores / 2) + bias
  e = np.exp(scores) * mask[:, None]
  expected = e / (e.sum(-1, keepdims=True)
                  + np.exp(sink)[None, :, None, None])
  np.testing.assert_allclose(weights, expected, atol=1e-6)


@pytest.mark.slow
def test_of_an_encoder_decoder():
  module, params = models.make_model('t5')
  source_BM, target_BL = models.random_tokens(2, 9), models.random_tokens(2, 6,
                                                                          seed=2)
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
