"""The chunked cross-entropy: its value, its gradients, and what it holds."""

import itertools
import math
import re
import types

from configs import base
from configs import sharding as tables
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts import sharding
from architectures.parts.heads import Head
from tests.helpers import models
from training import objectives
from training.objectives import losses
from training.distributed import devices

B, L, D, V = 8, 12, 16, 50


class TwoTerms(objectives.Objective):
  """The means of two numbers, by weights of their own."""
  main, terms = 'a', ('a', 'b')

  def figures(self, output, batch, config):
    return {name: objectives.Mean(
        (batch[name] * batch[f'{name}_weights']).sum(),
        batch[f'{name}_weights'].sum()) for name in self.terms}

  def weights(self, batch):
    return {name: batch[f'{name}_weights'].sum() for name in self.terms}


def test_the_terms_of_micro_batches_add_up_to_the_sum_of_two_means():
  random = np.random.default_rng(0)
  batch = {name: random.uniform(1, 2, size=8) for name in (
      'a', 'a_weights', 'b', 'b_weights')}
  objective, config = TwoTerms(), base.base()
  whole = objective.weights(batch)
  total = 0
  for rows in (slice(0, 3), slice(3, 8)):
    share, _ = objective.loss(
        None, {name: x[rows] for name, x in batch.items()}, config, whole)
    total += share
  expected = sum(np.average(batch[name], weights=batch[f'{name}_weights'])
                 for name in ('a', 'b'))
  assert total / whole['a'] == pytest.approx(expected)


def make(seed=0, *, vocab=V, bias=True, scale=1.0, softcap=0.0, length=L,
         dtype=jnp.float32):
  """Returns (hidden, head, targets, weights), a third of the weights 0."""
  keys = jax.random.split(jax.random.key(seed), 5)
  hidden_BLD = jax.random.normal(keys[0], (B, length, D)).astype(dtype)
  head = Head(jax.random.normal(keys[1], (D, vocab)),
              jax.random.normal(keys[2], (vocab,)) if bias else None,
              scale, softcap)
  targets_BL = jax.random.randint(keys[3], (B, length), 0, vocab)
  weights_BL = jax.random.choice(
      keys[4], jnp.array([0.0, 0.5, 1.0]), (B, length))
  return hidden_BLD, head, targets_BL, weights_BL


def oracle(hidden_BLD, head, targets_BL, weights_BL, z_loss=0.0,
           label_smoothing=0.0):
  """The equations in numpy's float64, all logits at once: the loss, and its
  gradients in the hidden states, the kernel and the bias."""
  x, w, bias, weights = (
      np.zeros(V) if a is None else np.asarray(a, np.float64)
      for a in (hidden_BLD, head.kernel_DV, head.bias_V, weights_BL))
  bare = head.scale * (x @ w + bias)
  cap = head.softcap
  logits = cap * np.tanh(bare / cap) if cap else bare
  top = logits.max(-1, keepdims=True)
  log_z = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
  q = ((1 - label_smoothing) * np.eye(w.shape[1])[np.asarray(targets_BL)]
       + label_smoothing / w.shape[1])
  loss = (log_z - (q * logits).sum(-1, keepdims=True)
          + z_loss * log_z ** 2)[..., 0]
  d = (1 + 2 * z_loss * log_z) * np.exp(logits - log_z) - q
  d = d * weights[..., None] * head.scale
  if cap:
    d = d * (1 - (logits / cap) ** 2)
  return {
      'sum': (weights * loss).sum(), 'loss': loss,
      'correct': logits.argmax(-1) == np.asarray(targets_BL),
      'z_loss': (weights * z_loss * log_z[..., 0] ** 2).sum(),
      'hidden': d @ w.T, 'kernel': np.einsum('bld,blv->dv', x, d),
      'bias': d.sum((0, 1)), 'weights': loss}


OPTIONS = {
    'plain': ({}, {}),
    'z_loss': ({}, dict(z_loss=0.1)),
    'smoothing': ({}, dict(label_smoothing=0.2)),
    'scale': (dict(scale=0.3), {}),
    'softcap': (dict(softcap=2.0), {}),
    'no_bias': (dict(bias=False), {}),
    'all': (dict(scale=0.7, softcap=3.0),
            dict(z_loss=0.01, label_smoothing=0.1)),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', models.mark_long_except(
    [('all', 0), ('all', 40), *((name, 8) for name in OPTIONS)],
    # In one chunk; of a position each; uneven.
    list(itertools.product(OPTIONS, (0, 8, 40)))), ids=str)
def test_value_and_gradients_equal_the_equations(case):
  (of_head, options), chunk = OPTIONS[case[0]], case[1]
  hidden, head, targets, weights = make(**of_head)
  expected = oracle(hidden, head, targets, weights, **options)

  def loss(hidden, head, weights):
    return losses.cross_entropy(hidden, head, targets, weights, chunk=chunk,
                                **options)

  @jax.jit
  def both(*args):
    return (jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*args),
            loss(*args))

  ((value, sums), (d_hidden, d_head, d_weights)), (plain, plain_sums) = both(
      hidden, head, weights)
  np.testing.assert_allclose(value, expected['sum'], rtol=1e-5)
  np.testing.assert_allclose(plain, expected['sum'], rtol=1e-5)
  assert sums.keys() == plain_sums.keys()
  np.testing.assert_allclose(sums['weight'], np.sum(weights))
  np.testing.assert_allclose(
      sums['accuracy'], (expected['correct'] * weights).sum())
  if 'z_loss' in options:
    np.testing.assert_allclose(sums['z_loss'], expected['z_loss'], rtol=1e-5)
  near = dict(rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(d_hidden, expected['hidden'], **near)
  np.testing.assert_allclose(d_head.kernel_DV, expected['kernel'], **near)
  np.testing.assert_allclose(d_weights, expected['weights'], **near)
  if head.bias_V is not None:
    np.testing.assert_allclose(d_head.bias_V, expected['bias'], **near)


@pytest.mark.parametrize('chunk', [0, 40])
def test_token_losses_equal_the_equations(chunk):
  hidden, head, targets, weights = make(scale=0.7, softcap=3.0)
  tokens = losses.token_losses(hidden, head, targets, chunk=chunk)
  expected = oracle(hidden, head, targets, weights)
  np.testing.assert_allclose(tokens.loss, expected['loss'], rtol=1e-5)
  np.testing.assert_array_equal(tokens.correct, expected['correct'])


@pytest.mark.parametrize('chunk', [8, B * L])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_tied_kernel_has_the_gradient_of_its_table(dtype, chunk):
  """In one chunk too, where XLA sees the product and its transpose at once."""
  hidden, head, targets, weights = make(dtype=dtype)
  table_VD = head.kernel_DV.T

  def loss(table_VD, hidden_BLD):
    tied = head.replace(kernel_DV=table_VD.T)
    return losses.cross_entropy(hidden_BLD, tied, targets, weights,
                                chunk=chunk)[0]

  rounded = head.replace(kernel_DV=head.kernel_DV.astype(dtype))
  expected = oracle(hidden, rounded, targets, weights)['kernel'].T
  got = jax.jit(jax.grad(loss))(table_VD, hidden)
  error = np.abs(np.asarray(got, np.float64) - expected)
  share = 1e-5 if dtype == jnp.float32 else 0.01
  assert error.max() < share * np.abs(expected).max()


def test_large_logits_stay_finite_and_nan_shows():
  hidden, head, targets, weights = make(scale=1e4)
  value, grads = jax.value_and_grad(
      lambda x: losses.cross_entropy(x, head, targets, weights)[0])(hidden)
  assert np.isfinite(value) and np.isfinite(grads).all()
  value, _ = losses.cross_entropy(hidden.at[0, 0, 0].set(jnp.nan), head,
                                  targets, jnp.ones_like(weights))
  assert np.isnan(value)


@pytest.mark.parametrize('vocab', [50, 4096, 16384, 131072])
def test_logits_of_64_mebibytes_or_of_512_tokens_are_there_at_once(vocab):
  """Where no size is asked for; and no fewer than half of these."""
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  settings = losses._choose_settings(shape(4, 8192, D), Head(shape(D, vocab)),
                                     0, 0, 0)
  most = max(512, 2**26 // (4 * vocab))
  assert 4 * settings.positions <= most
  assert 4 * settings.positions > most / 2 or settings.positions == 8192


@pytest.mark.parametrize('differentiate', [False, True])
def test_no_array_of_all_logits_is_held(differentiate):
  vocab, length, chunk = 512, 64, 32  # 8 x 4 positions at once
  hidden, head, targets, weights = make(vocab=vocab, length=length)

  def loss(hidden, head):
    return losses.cross_entropy(
        hidden, head, targets, weights, chunk=chunk)[0]

  fn = jax.grad(loss, (0, 1)) if differentiate else loss
  sizes = [math.prod(v.aval.shape)
           for e in models.list_equations(jax.make_jaxpr(fn)(hidden,
                                                             head).jaxpr)
           for v in e.outvars]
  assert max(sizes) == chunk * vocab
  stats = jax.jit(fn).lower(hidden, head).compile().memory_analysis()
  all_logits = 4 * B * length * vocab
  assert stats.temp_size_in_bytes < all_logits / 2


def on_mesh(name, fn, args):
  """Runs fn(hidden, head, targets, weights) sharded; returns (its results,
  the program's text)."""
  mesh = devices.make_mesh(tables.PRESETS[name])
  hidden, head, targets, weights = args
  with jax.set_mesh(mesh), sharding.install_rules(
      tables.RULES['default']):
    def put(x, *axes):
      spec = nn.logical_to_mesh_axes(axes)
      return jax.device_put(x, jax.NamedSharding(mesh, spec))
    head = head.replace(kernel_DV=put(head.kernel_DV, 'embed', 'vocab'),
                        bias_V=put(head.bias_V, 'vocab'))
    compiled = jax.jit(fn).lower(
        put(hidden, 'batch', None, None), head, put(targets, 'batch', None),
        put(weights, 'batch', None)).compile()
    return compiled(put(hidden, 'batch', None, None), head,
                    put(targets, 'batch', None),
                    put(weights, 'batch', None)), compiled.as_text()


def collectives(text):
  """Yields (kind, whether inside the loop over chunks, the shapes' sizes)."""
  entry = False
  for line in text.splitlines():
    if line and not line.startswith(' '):
      entry = line.startswith('ENTRY')
    match = re.search(r'= (.*?) (all-gather|all-reduce|reduce-scatter|'
                      r'all-to-all|collective-permute)(-start)?\(', line)
    if match:
      yield match[2], not entry, [
          math.prod(int(n) for n in dims.split(',') if n)
          for dims in re.findall(r'\[([\d,]*)\]', match[1])]


@pytest.mark.parametrize('name', models.mark_long_except(
    ('fsdp', 'tp', 'cp_fsdp_tp', 'ep_fsdp_tp'), tables.PRESETS))
def test_sharded_equals_one_device_and_gathers_no_batch(name):
  args = make(vocab=96)
  shards = 8 // tables.PRESETS[name]['tensor']

  def grads(hidden, head, targets, weights):
    return jax.value_and_grad(
        lambda x, h: losses.cross_entropy(
            x, h, targets, weights, z_loss=0.1, label_smoothing=0.1,
            chunk=3 * B // shards), (0, 1), has_aux=True)(hidden, head)

  got, text = on_mesh(name, grads, args)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(grads)(*args))):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
  chunk_hidden = 3 * B // shards * D
  whole_kernel = D * 96 // tables.PRESETS[name]['tensor']
  for kind, in_loop, sizes in collectives(text):
    if in_loop:  # the vocabulary's shards agree; the kernel stays where it is
      assert kind == 'all-reduce' and tables.PRESETS[name]['tensor'] > 1
      assert max(sizes) <= chunk_hidden < whole_kernel
    elif kind == 'all-gather':  # the kernel, in two steps over all or two axes
      fsdp, expert = (tables.PRESETS[name][axis] for axis in ('fsdp', 'expert'))
      assert fsdp * expert > 1
      rest = 4 if fsdp == 8 else fsdp if expert > 1 else 1
      assert sizes in ([whole_kernel], [whole_kernel // rest])


def test_each_depth_predicts_the_tokens_of_its_own_document():
  """Equations 24 and 25 of DeepSeek-V3 by loops, of three depths over packed
  documents of 5, 1, 2 and 4 tokens: depth k at place i predicts what the loss
  predicts at place i + k, where that is of the same document."""
  depths, random = 3, np.random.default_rng(0)
  _, head, targets, weights = make()
  hidden = random.normal(size=(depths, B, L, D)).astype(np.float32)
  ids = np.repeat([1, 2, 3, 4], [5, 1, 2, 4])
  config = base.base()
  config.model.mtp_depth = depths
  config.train.update(mtp_weight=0.3, z_loss=0.1, label_smoothing=0.2)
  for segments in (None, np.tile(ids, (B, 1))):
    batch = dict(targets=targets, weights=weights)
    if segments is not None:
      batch['segment_ids'] = jnp.asarray(segments)
    output = types.SimpleNamespace(extra={'mtp': [*hidden]}, head=head)
    figures = jax.jit(
        lambda batch, output=output: objectives.multi_token_figures(
            output, batch, config.train))(batch)
    totals = []
    for k in range(1, depths + 1):
      ahead, counts = np.zeros((2, B, L))
      for i in range(L - k):
        if segments is None or ids[i] == ids[i + k]:
          ahead[:, i], counts[:, i] = targets[:, i + k], weights[:, i + k]
      want = oracle(hidden[k - 1], head, ahead.astype(int), counts, 0.1, 0.2)
      loss, right = figures[f'mtp_{k}_loss'], figures[f'mtp_{k}_accuracy']
      assert loss.total == pytest.approx(want['sum'], rel=1e-5)
      assert loss.weight == right.weight == pytest.approx(counts.sum())
      assert right.total == pytest.approx((counts * want['correct']).sum())
      totals.append(want['sum'])
    assert len(figures) == 2 * depths
    assert objectives.multi_token_loss(figures, config) == pytest.approx(
        0.3 / depths * sum(totals), rel=1e-5)
  assert objectives.multi_token_loss({}, config) == 0
