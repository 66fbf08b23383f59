"""Attention to what an indexer chooses, against its definition in numpy: the
choice, the loss that teaches it, and that nothing else is taught by it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.attention import indexer, kernels, multi_head
from architectures.parts.attention.indexer import IndexerConfig
from architectures.parts.config import LayerKind
from architectures.parts.context import Context
from common.errors import RequestError
from tests.helpers import models
from training.costs import flops

INDEXED = dict(attention='indexed', indexer=dict(top_k=3, heads=3, head_dim=12))
BLOCKS = INDEXED['indexer'] | dict(top_k=4, block=2)
LATENT = dict(mixer='latent', latent=dict(
    q_rank=12, kv_rank=10, nope_dim=6, rope_dim=4, v_dim=5))


def _numpy_layer(p, x_LD, heads, top_k, block):
  """Returns what a layer adds, and its indexer's loss, for one row."""
  def turn(x_LK, dim, step=1):
    y = np.array(x_LK)
    for at in range(len(x_LK)):
      for i in range(dim // 2):
        a, b = x_LK[at, i], x_LK[at, i + dim // 2]
        angle = step * at * 10000.0 ** (-2 * i / dim)
        y[at, i] = a * np.cos(angle) - b * np.sin(angle)
        y[at, i + dim // 2] = b * np.cos(angle) + a * np.sin(angle)
    return y
  i, L, size = p['indexer'], len(x_LD), max(block, 1)
  k, q, w = (x_LD @ i['key'], x_LD @ np.moveaxis(i['query'], 1, 0),
             np.full((L, 3), np.sqrt(3)))
  if block:
    rms = lambda x, name: x / np.sqrt(np.square(x).mean(-1, keepdims=True)
                                      + 1e-5) * i[name]['scale']
    k = k[:L - L % size].reshape(-1, size, 12).mean(1)
    k, q = turn(rms(k, 'key_norm'), 8, size), rms(q, 'query_norm')
  else:
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(
        k.var(-1, keepdims=True) + 1e-6)
    k = turn(k * i['key_norm']['scale'] + i['key_norm']['bias'], 8)
    w = x_LD @ i['weights']
  index = sum(w[:, h, None] * np.maximum(turn(q[h], 8) @ k.T, 0)
              for h in range(3)) / np.sqrt(3 * k.shape[1])
  seen, scored = np.zeros((2, L, L), bool)
  for at in range(L):
    whole = (at + 1) // size  # blocks, of which the best are chosen
    best = sorted(range(whole), key=lambda m, at=at: (-index[at, m], m))
    for m in best[:top_k // size]:
      seen[at, m * size:(m + 1) * size] = True
    scored[at] = seen[at]
    seen[at, whole * size:at + 1] = True
  index = np.pad(np.repeat(index, size, 1), ((0, 0), (0, L % size)))
  softmax = lambda z, seen=seen: np.exp(z) * seen / np.maximum(
      (np.exp(z) * seen).sum(-1)[:, None], 1e-300)
  weights = [softmax(turn(x_LD @ p['query'][:, h], 8) @ turn(
      x_LD @ p['key'][:, h // 2], 8).T / np.sqrt(8)) for h in range(heads)]
  mean = sum(weights) / heads
  mean = mean * scored / np.maximum((mean * scored).sum(-1)[:, None], 1e-300)
  ratio = np.where(scored, mean, 1) / np.where(
      scored, softmax(index, scored), 1)
  return (sum(w @ (x_LD @ p['value'][:, h // 2]) @ p['out'][h]
              for h, w in enumerate(weights)),
          (mean * np.log(ratio)).sum(-1).mean())


@pytest.mark.parametrize('counted', [
    [[1, 1, 1], [1, 0, 1]], [[0, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]],
                         ids=['several', 'one', 'none'])
def test_the_divergence_is_a_mean_over_the_tokens_that_count(counted):
  """Of targets that sum to less than 1, as where a sink has a share, some of
  them 0, beside a softmax over the keys that are seen."""
  random, ids = np.random.default_rng(0), np.array(counted)
  seen = np.tril(np.ones((2, 3, 3), bool))
  target = random.random((2, 3, 3)) * seen
  target[0, 2, 1] = 0
  target *= 0.7 / target.sum(-1, keepdims=True)
  scores = random.normal(size=(2, 3, 3))
  nats = []
  for b, i in zip(*np.nonzero(ids)):
    p = target[b, i, :i + 1] / 0.7
    q = np.exp(scores[b, i, :i + 1])
    q /= q.sum()
    nats.append(sum(x * np.log(x / y) for x, y in zip(p, q) if x))
  ctx = types.SimpleNamespace(real_tokens=lambda *shape: ids.astype(np.float32))
  np.testing.assert_allclose(indexer.divergence(
      *(jnp.asarray(x, jnp.float32) for x in (target, scores)), seen, ctx),
                             np.mean(nats) if nats else 0, rtol=1e-5)


@pytest.mark.parametrize('top_k, block', [(3, 0), (0, 0), (4, 2), (0, 2)])
def test_a_layer_equals_its_definition(top_k, block):
  """And its indexer's loss, which teaches the indexer alone: it has no gradient
  in anything else, nor has what the layer adds one in the indexer."""
  module, params = models.make_model('llama', num_layers=1, num_kv_heads=2, **(
      INDEXED | dict(indexer=INDEXED['indexer'] | dict(
          top_k=top_k, block=block))))
  layer = multi_head.SelfAttention(
      module.config, module.config.layer_kinds(1)[0])
  p = jax.tree.map(lambda x: x[0],
                   params['decoder']['layers']['block_0']['attention'])
  x_BLD = np.random.default_rng(3).normal(size=(2, 9, 32)).astype(np.float32)
  ctx = Context(jnp.arange(9)[None], deterministic=False)

  @jax.jit
  def run(p, x_BLD):
    def apply(p, x_BLD):
      y_BLD, _, report = layer.apply({'params': p}, x_BLD, ctx, None)
      return jnp.square(y_BLD).sum(), report.losses['indexer'], y_BLD
    grads = [jax.grad(lambda *args, i=i: apply(*args)[i], (0, 1))(p, x_BLD)
             for i in range(2)]
    return apply(p, x_BLD)[1:], grads

  (loss, y_BLD), grads = run(p, x_BLD)
  p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  want, losses = zip(*(_numpy_layer(p64, x, 4, top_k or 9, block)
                       for x in x_BLD))
  models.assert_trees_close(y_BLD, np.float32(want), 3e-5)
  assert loss == pytest.approx(np.mean(losses), rel=1e-4)
  for moves, (of_p, of_x) in enumerate(grads):
    taught = jax.tree.map(lambda x: bool(np.abs(x).max() > 0), of_p)
    assert set(jax.tree.leaves(taught.pop('indexer'))) == {bool(moves)}
    assert set(jax.tree.leaves(taught)) == {not moves}
    assert (np.abs(of_x).max() > 0) == (not moves)


@pytest.mark.parametrize('changes', [{}, LATENT, dict(indexer=BLOCKS)])
def test_all_keys_equal_dense_attention(changes):
  """Exactly, with top_k at the length or at 0."""
  changes = INDEXED | changes
  module, params = models.make_model('llama', num_layers=1, **changes)
  tokens = models.random_tokens(1, 9, seed=5)

  def variant(top_k):
    return architectures.build(architectures.resolve(models.small_config(
        'llama', num_layers=1, **(changes | dict(
            indexer=changes['indexer'] | dict(top_k=top_k))))))

  dense = architectures.build(architectures.resolve(models.small_config(
      'llama', num_layers=1, **{name: x for name, x in changes.items()
                                if name not in INDEXED})))

  @jax.jit
  def run(params):
    without = jax.tree_util.tree_map(lambda x: x, params)
    without['decoder']['layers']['block_0']['attention'].pop('indexer')
    return [models.logits(variant(n), params, tokens) for n in (0, 10)] + [
        models.logits(dense, without, tokens),
        models.logits(module, params, tokens)]

  *same, few = run(params)
  for logits in same:
    np.testing.assert_array_equal(logits, same[-1])
  assert not np.allclose(few, same[-1], atol=1e-3)


@pytest.mark.parametrize('changes', [
    {}, LATENT, dict(indexer=BLOCKS), LATENT | dict(indexer=BLOCKS)])
def test_decoding_with_gathered_keys_equals_the_whole(changes, monkeypatch):
  module, params = models.make_model('llama', num_layers=1, **INDEXED | changes)
  tokens = models.random_tokens(2, 12)
  gathered = []
  monkeypatch.setattr(indexer, 'should_copy_chosen_keys', lambda top_k, shape: (
      shape[1] == 1 and not gathered.append(shape)))
  models.assert_trees_close(models.logits(module, params, tokens),
                            models.decode_with_cache(module, params, tokens, 6))
  assert gathered == [(2, 1, 12)]


def test_of_equal_scores_the_first_keys_are_chosen():
  scores_BLM = jnp.array(np.random.default_rng(0).integers(0, 3, (2, 6, 6)),
                         jnp.float32)
  seen_BLM = jnp.tril(jnp.ones((1, 6, 6), bool))
  best_BLM = indexer.mask_of_best(scores_BLM, seen_BLM, 3)
  for b in range(2):
    for at in range(6):
      order = np.argsort(-scores_BLM[b, at, :at + 1], stable=True)
      np.testing.assert_array_equal(np.flatnonzero(best_BLM[b, at]),
                                    np.sort(order[:3]))


@pytest.mark.parametrize('top_k, block', [(0, 0), (3, 0), (20, 0), (4, 2)])
def test_what_is_seen_is_counted(top_k, block):
  c = architectures.resolve(models.small_config('llama', **INDEXED | dict(
      indexer=dict(top_k=top_k, block=block))))
  kind, top, size = LayerKind('indexed', 'gelu'), top_k or 9, block or 1
  of = lambda n: min(top, n - n % size) + n % size
  one = sum(of(at + 1) for at in range(9))
  assert kernels.count_useful_pairs(kind, c, 9, 9) == (one, 81, one)
  assert kernels.count_useful_pairs(kind, c, 9, 9, prefix=True) == (
      sum(of(max(at + 1, n)) for n in range(1, 9) for at in range(9)),
      8 * 81, 8 * 9 * of(9))


@pytest.mark.parametrize('prompt, scored, seen', [
    (False, 16 * 17 / 2, 16 * 3 - 3), (True, 16 * 16, 16 * 3)])
def test_each_key_that_may_be_seen_is_scored(prompt, scored, seen):
  c = architectures.resolve(models.small_config('llama', **INDEXED | dict(
      indexer=dict(top_k=3))))
  index = c.part(IndexerConfig)
  # A score is a product of heads, weighed, and a seen key has a score and a
  # value.
  assert flops.forward_flops(c, 16, prompt=prompt)['attention'] == (
      c.num_layers * (2 * index.heads * (index.head_dim + 1) * scored
                      + 4 * c.d_model * seen))


@pytest.mark.parametrize('changes, words', [
    (dict(kv_sharing=True), 'kv_sharing is True'),
    (dict(head_dim=16), 'turn 16 features'),
    (dict(indexer=dict(top_k=3, block=2)), 'block is 2'),
    (dict(parametrization='mup', mup_base_width=32), 'no rule')])
def test_what_it_cannot_be_is_refused(changes, words):
  with pytest.raises(RequestError, match=words):
    architectures.resolve(models.small_config('llama', **INDEXED | changes))
