"""Tables that layers look up against their definitions in numpy, and what they
cost. transformers' layers are compared with in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import lookup, paths
from architectures.parts.context import Context
from tests.helpers import models
from training import runs
from training.costs import flops, totals
from tests.training.optim.optimizers_test import optim

NGRAMS = dict(rows=40, heads=2, size=4, pad_token=3)
IDS = np.array([[1] * 5 + [2] * 7, [1] * 12])


def _places(c, tokens_BL):
  """In int64, which no product leaves; token by token. No n-gram reaches over a
  3."""
  a, by = (np.array(x) for x in (lookup.hash_multipliers(c.vocab_size, 3),
                                 lookup.first_primes(40, 4)))
  places = np.zeros((*tokens_BL.shape, 4), np.int64)
  for b, at in np.ndindex(tokens_BL.shape):
    t = [tokens_BL[b, at - i] if i <= at and IDS[b, at - i] == IDS[b, at]
         and 3 not in tokens_BL[b, at - i:at] else 3 for i in range(3)]
    two = t[0] * a[0] ^ t[1] * a[1]
    both = np.array([two, two, two ^ t[2] * a[2], two ^ t[2] * a[2]])
    places[b, at] = both % by + np.cumsum((0, *by[:-1]))
  return places


def _normed(c, p):
  return lambda x, name: p[name]['scale'] * x / np.sqrt(
      np.square(x).mean(-1, keepdims=True) + c.norm_eps)


@pytest.mark.parametrize('streams', [(), (2,)])
def test_engram_is_its_definition(streams):
  """Streams have keys, norms and convolutions of their own."""
  assert lookup.first_primes(40, 4) == (41, 43, 47, 53)
  module, params = models.make_model(
      'llama', memory='engram', ngrams=NGRAMS | dict(stops=True), **dict(
          residual='hyper', streams=dict(count=2)) if streams else {})
  c = dataclasses.replace(module.config, vocab_size=2**31 - 1)
  draw = np.random.default_rng(0)
  p = jax.tree.map(lambda x: np.asarray(x[0], np.float64),
                   params['decoder']['layers']['block_0']['memory'])
  tokens_BL = draw.integers(0, 2**31 - 1, (2, 12))
  tokens_BL[:, 8] = 3
  x_BLD = draw.standard_normal((2, 12, *streams, c.d_model))
  ctx = Context(jnp.arange(12)[None], jnp.asarray(IDS),
                tokens_BL=jnp.asarray(tokens_BL, jnp.int32))
  ours, _ = jax.jit(lambda p, x_BLD: lookup.Engram(c).apply(
      {'params': p}, x_BLD, ctx, None))(p, x_BLD.astype(np.float32))
  places = _places(c, tokens_BL)
  assert places.max() < len(p['table']) == 256 and len(np.unique(places)) > 60
  n = _normed(c, p)
  e_BLU = p['table'][places].reshape(2, 12, -1)
  g_BL = (n((e_BLU @ p['key']).reshape(x_BLD.shape), 'key_norm')
          * n(x_BLD, 'query_norm')).sum(-1)
  g_BL = np.sign(g_BL) * np.sqrt(np.abs(g_BL) / np.sqrt(c.d_model))
  value_BLD = (e_BLU @ p['value']).reshape(2, 12, *(1 for _ in streams), -1)
  v_BLD = value_BLD / (1 + np.exp(-g_BL))[..., None]
  y_BLD, m_BLD = np.zeros_like(v_BLD), n(v_BLD, 'conv_norm')
  for b, at, i in np.ndindex(2, 12, 4):
    seen = at - 3 * (3 - i)
    if seen >= 0 and IDS[b, seen] == IDS[b, at]:
      y_BLD[b, at] += p['conv'][i].reshape(*streams, -1) * m_BLD[b, seen]
  models.assert_trees_close(ours, v_BLD + y_BLD / (1 + np.exp(-y_BLD)))


def test_per_layer_is_its_definition():
  module, params = models.make_model('llama', memory='per_layer')
  c, draw = module.config, np.random.default_rng(0)
  p = jax.tree.map(lambda x: np.asarray(x[0], np.float64),
                   params['decoder']['layers']['block_0']['memory'])
  scale_S = draw.uniform(0.5, 2, c.d_model // 8)
  x_BLD, x0_BLD = draw.standard_normal((2, 2, 5, c.d_model))
  tokens_BL = np.asarray(models.random_tokens(2, 5))
  ctx = Context(jnp.arange(5)[None], tokens_BL=tokens_BL,
                embedded_BLD=jnp.asarray(x0_BLD, jnp.float32),
                row_scale_S=jnp.asarray(scale_S, jnp.float32))
  ours = jax.jit(lambda p, x_BLD: lookup.PerLayer(c).apply(
      {'params': p}, x_BLD, ctx))(p, x_BLD.astype(np.float32))
  n, z_BLS = _normed(c, p), x_BLD @ p['gate']
  in_BLS = x0_BLD @ p['input'] / np.sqrt(c.d_model)
  in_BLS /= np.sqrt((in_BLS ** 2).mean(-1, keepdims=True) + c.norm_eps)
  gelu_BLS = z_BLS / 2 * (1 + np.tanh(
      np.sqrt(2 / np.pi) * (z_BLS + 0.044715 * z_BLS ** 3)))
  e_BLS = (scale_S * in_BLS
           + np.sqrt(c.d_model // 8) * p['table'][tokens_BL]) / np.sqrt(2)
  models.assert_trees_close(ours, n((gelu_BLS * e_BLS) @ p['out'], 'out_norm'))


@pytest.mark.parametrize('streams', [(), (2,)])
def test_smear_is_its_definition(streams):
  """All streams have the gate of the first one."""
  c = models.make_model('llama', memory='smear', smear=dict(features=5))[
      0].config
  draw = np.random.default_rng(0)
  x_BLD = draw.standard_normal((2, 12, *streams, c.d_model))
  p = dict(gate=draw.standard_normal(5), scale=np.array(0.7))
  ctx = Context(jnp.arange(12)[None], jnp.asarray(IDS))
  ours, _ = lookup.Smear(c).apply(
      {'params': p}, x_BLD.astype(np.float32), ctx, None)
  theirs = np.zeros_like(x_BLD)
  for b, at in np.ndindex(2, 12):
    if at and IDS[b, at - 1] == IDS[b, at]:
      gate = 0.7 / (1 + np.exp(-x_BLD[b, at].reshape(-1)[:5] @ p['gate']))
      theirs[b, at] = gate * x_BLD[b, at - 1]
  models.assert_trees_close(ours, theirs)


def test_tables_are_told_apart_from_what_multiplies():
  """They cost no FLOPs, a token uses the rows that it reads, and they learn at
  a rate of their own without decay."""
  model = models.small_config('llama', memory='engram', ngrams=NGRAMS)
  module = architectures.build(model)
  more = architectures.resolve(dict(
      model.to_dict(), ngrams=dict(NGRAMS, rows=4000)))
  assert flops.forward_flops(module.config, 8) == flops.forward_flops(more, 8)
  total, active = totals.count_parameters(module.config)
  larger, as_active = totals.count_parameters(more)
  assert as_active == active == total - 2 * (256 - 4) * 4
  assert larger > total + 2 * 4 * 3900 * 4
  shares = paths.flatten_by_path(
      runs.parameter_shares(module, optim(table_rate=5.0)))
  assert {path: x for path, x in shares.items() if x != 1} == {
      'decoder/layers/block_0/memory/table': 5}


@pytest.mark.parametrize('memory', [
    name for name in lookup.MEMORIES if name != lookup.NAME_OF_NO_MEMORY])
def test_a_memory_reads_the_tokens_before_a_step(memory):
  """Word by word with a cache, each memory gives what it gives a whole row."""
  module, params = models.make_model(
      'llama', num_layers=1, memory=memory, ngrams=dict(rows=40, size=4),
      per_layer=dict(size=4))
  tokens_BL = models.random_tokens(length=8)
  whole = jax.jit(lambda params: models.logits(module, params, tokens_BL))(
      params)
  stepped = models.decode_with_cache(module, params, tokens_BL, first=3)
  models.assert_trees_close(whole, stepped, 1e-4)
