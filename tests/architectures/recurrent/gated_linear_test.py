"""KDA, GLA and RetNet's retention against their definitions in numpy and, KDA,
transformers' layer. What they share with all recurrences is in
recurrent_laws_test.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import mixers
from architectures.parts.context import Context
from configs import sharding as tables
from tests.helpers import models
from tests.helpers.recurrences import applied, fields, layer_of
from training.distributed import devices

SIGMOID = lambda x: 1 / (1 + np.exp(-x))
SILU = lambda x: x * SIGMOID(x)
SOFTPLUS = lambda x: np.log1p(np.exp(x))


def _read(p, name, x_LD):
  """[H, L, K]: a product, and the convolution and the SiLU if there is one."""
  x_HLK = np.einsum('ld,dhk->hlk', x_LD, p[name])
  if f'{name}_conv' not in p:
    return x_HLK
  y_HLK, w = np.zeros(x_HLK.shape), p[f'{name}_conv']
  for at, back in np.ndindex(len(x_LD), len(w)):
    if back <= at:
      y_HLK[:, at] += w[len(w) - 1 - back] * x_HLK[:, at - back]
  return SILU(y_HLK)


def _low_rank(p, name, x_LD):
  return np.einsum('lu,uhk->hlk', x_LD @ p[f'{name}_down'], p[f'{name}_up'])


def _kda(p, x_LD, negative=False):
  """Token by token, as the paper has it (equation 1)."""
  unit = lambda x: x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)
  q, k, v = (_read(p, name, x_LD) for name in ('query', 'key', 'value'))
  q, k = (np.repeat(unit(x), len(v) // len(x), 0) for x in (q, k))
  rate = (1 + negative) * SIGMOID(x_LD @ p['rate']).T
  a = np.exp(-np.exp(p['decay_scale'])[:, None, None] * SOFTPLUS(
      _low_rank(p, 'decay', x_LD) + p['decay_bias'][:, None]))
  o = np.zeros(v.shape)
  for h in range(len(v)):
    S = np.zeros((k.shape[2], v.shape[2]))
    for t in range(len(x_LD)):
      S = (np.eye(len(S)) - rate[h, t] * np.outer(k[h, t], k[h, t])) @ (
          np.diag(a[h, t]) @ S) + rate[h, t] * np.outer(k[h, t], v[h, t])
      o[h, t] = S.T @ q[h, t] / np.sqrt(len(S))
  return o, SIGMOID(_low_rank(p, 'gate', x_LD))


def _gla(p, x_LD, temperature=16.0):
  """In the paper's parallel form (section 4.2), in float64, where quotients of
  cumulative decays are still numbers."""
  q, k, v = (_read(p, name, x_LD) for name in ('query', 'key', 'value'))
  a = SIGMOID(_low_rank(p, 'decay', x_LD) + p['decay_bias'][:, None]) ** (
      1 / temperature)
  upto = np.cumprod(a, 1)
  scores = np.tril((q * upto) @ np.swapaxes(k / upto, 1, 2))
  return scores @ v / np.sqrt(q.shape[2]), SILU(_read(
      {'gate': p['output_gate']}, 'gate', x_LD))


def _retnet(p, x_LD, theta=10000.0, turn=True):
  """In the paper's parallel form (equation 5): (Q K^T * D) V."""
  q, k, v = (_read(p, name, x_LD) for name in ('query', 'key', 'value'))
  L, K = len(x_LD), q.shape[2]
  if turn:
    angles = np.arange(L)[:, None] * theta ** (-np.arange(0, K, 2) / K)
    q, k = (_as_pairs(_pairs(x) * np.exp(1j * angles)) for x in (q, k))
  apart = np.arange(L)[:, None] - np.arange(L)
  decay = [np.tril((1 - 2.0 ** (-5 - h)) ** np.maximum(apart, 0))
           for h in range(len(v))]
  return (q @ np.swapaxes(k, 1, 2) * decay) @ v / np.sqrt(K), SILU(_read(
      {'gate': p['output_gate']}, 'gate', x_LD))


def _pairs(x):  # feature i is paired with i + K / 2
  half = x.shape[-1] // 2
  return x[..., :half] + 1j * x[..., half:]


def _as_pairs(z):
  return np.concatenate([z.real, z.imag], -1)


DEFINITIONS = {'kda': _kda, 'gla': _gla, 'retnet': _retnet}


def definition(mixer, p, x_LD, eps=1e-5, **said):
  """One row in float64."""
  o, gate = DEFINITIONS[mixer](p, x_LD, **said)
  o /= np.sqrt(np.square(o).mean(-1, keepdims=True) + eps)
  return np.einsum('hlu,hud->ld', o * p['out_norm']['scale'] * gate, p['out'])


@pytest.mark.parametrize('mixer, sizes, said', [
    ('kda', {}, {}),
    ('kda', dict(negative=True, conv=0, key_heads=4), dict(negative=True)),
    ('gla', {}, {}), ('gla', dict(conv=3, temperature=2.0),
                      dict(temperature=2.0)),
    ('retnet', {}, {})])
def test_a_layer_equals_its_definition(mixer, sizes, said):
  layer, p = layer_of(mixer, **sizes)
  # The second row is so small that what is added to its squares counts.
  x_BLD = jax.random.normal(jax.random.key(3), (2, 9, 32)) * jnp.array(
      [1, 0.01])[:, None, None]
  p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  for x_LD, got in zip(x_BLD, jax.jit(lambda p, x: applied(layer, p, x)[0])(
      p, x_BLD)):
    want = definition(mixer, p64, np.asarray(x_LD, np.float64), **said)
    np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize('mixer, least', [('deltanet', 0.01), ('kda', 1.0)])
def test_decays_are_born_as_in_the_authors_programs(mixer, least):
  c = architectures.resolve(models.config(
      'llama', mixer=mixer, **{mixer: dict(key_heads=128, key_dim=8)}))
  layer = mixers.MIXERS[mixer].module(c, None)
  p = nn.meta.unbox(jax.jit(layer.init)(
      jax.random.key(0), jnp.zeros((1, 2, 32)),
      Context(jnp.arange(2)[None]), None))['params']
  scale = np.exp(p['decay_scale'])
  assert least <= scale.min() < least + 1 and 15 < scale.max() <= 16
  first = np.log1p(np.exp(p['decay_bias']))
  assert 0.00099 < first.min() and first.max() < 0.1001
  assert np.median(first) == pytest.approx(0.01, rel=0.5)


def test_tokens_of_zeros_have_a_gradient():
  """A vector without a direction has no length to be divided by."""
  layer, p = layer_of('kda')
  grads = jax.jit(jax.grad(lambda p, x: applied(layer, p, x)[0].sum(), (0, 1)))(
      p, jnp.zeros((1, 3, 32)))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_retention_turns_only_by_rotary_positions():
  layer, p = layer_of('retnet')
  layer = layer.clone(config=architectures.resolve(models.config(
      'llama', position='none', num_layers=1, **fields('retnet'))))
  x_LD = np.random.default_rng(0).normal(size=(9, 32))
  want = definition('retnet', jax.tree.map(
      lambda x: np.asarray(x, np.float64), p), x_LD, turn=False)
  got = applied(layer, p, jnp.asarray(x_LD[None], jnp.float32))[0][0]
  np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize('changes, sentence', [
    (fields('kda', key_heads=3), 'key_heads is 3, which does not divide'),
    (fields('gla', rank=0), 'model.gla.rank is 0: it must be >= 1'),
    (fields('gla', temperature=0.0), 'temperature is 0.0: it must be > 0'),
    (fields('retnet', key_dim=5), 'turn pairs, so it must be even'),
    (dict(fields('retnet'), position='alibi'), 'has no scores for the bias'),
    (dict(fields('retnet'), rope=dict(scaling='dynamic', factor=2.0,
                                      original_len=8)),
     "scaling 'dynamic' turns by the length of the row"),
    (dict(fields('kda'), lora=dict(rank=2, targets='output_gate')),
     "'output_gate', a product"),
    (dict(fields('kda'), parametrization='mup', mup_base_width=32,
          mup_base_head_dim=4), 'times as wide as at the base'),
])
def test_what_cannot_be_is_refused(changes, sentence):
  with pytest.raises(ValueError, match=sentence):
    architectures.resolve(models.config('llama', **changes))


def test_heads_that_a_mesh_does_not_divide_are_refused():
  c = architectures.resolve(models.config(
      'llama', num_kv_heads=4, **fields('gla', heads=2)))
  with pytest.raises(ValueError, match='does not divide model.gla.heads 2'):
    devices.check_mesh(c, 8, 1, dict.fromkeys(tables.MESH_AXES, 1)
                       | dict(tensor=4))
