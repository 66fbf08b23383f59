"""Gated DeltaNet against its definition in numpy and transformers' layer. What
it shares with all recurrences is in recurrent_laws_test.py."""

import jax
import numpy as np
import pytest

import architectures
from tests.helpers import models, recurrences


def _definition(p, x_LD, *, decay=True, negative=False, eps=1e-5):
  """One row in float64, a head and a token at a time."""
  silu = lambda x: x / (1 + np.exp(-x))
  L, H = len(x_LD), p['value'].shape[1]
  def convolved(name):
    x, w = np.einsum('ld,dhk->lhk', x_LD, p[name]), p[f'{name}_conv']
    y = np.zeros(x.shape)
    for at in range(L):
      for back in range(min(len(w), at + 1)):
        y[at] += w[len(w) - 1 - back] * x[at - back]
    return silu(y)
  q, k, v = map(convolved, ('query', 'key', 'value'))
  unit = lambda x: x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)
  q, k = unit(q) / np.sqrt(q.shape[-1]), unit(k)
  rate = (1 + negative) / (1 + np.exp(-x_LD @ p['rate']))
  a = np.ones((L, H)) if not decay else np.exp(-np.exp(p['decay_scale']) * (
      np.log1p(np.exp(x_LD @ p['decay'] + p['decay_bias']))))
  y_LD = np.zeros(x_LD.shape)
  for h in range(H):
    j = h // (H // q.shape[1])
    S = np.zeros((v.shape[2], k.shape[2]))  # as the paper has it, [U, K]
    for t in range(L):
      outer = rate[t, h] * np.outer(k[t, j], k[t, j])
      S = a[t, h] * S @ (np.eye(len(outer)) - outer) + (
          rate[t, h] * np.outer(v[t, h], k[t, j]))
      o = S @ q[t, j]
      o = o / np.sqrt(np.square(o).mean() + eps) * p['out_norm']['scale']
      z = np.einsum('d,du->u', x_LD[t], p['output_gate'][:, h])
      y_LD[t] += (o * silu(z)) @ p['out'][h]
  return y_LD


@pytest.mark.parametrize('changes', [
    {}, dict(negative=True, conv=1, key_heads=4), dict(decay=False)],
                         ids=['gated', 'negative', 'deltanet'])
def test_a_layer_equals_its_definition(changes):
  layer, p = recurrences.layer_of('deltanet', **changes)
  x_BLD = jax.random.normal(jax.random.key(3), (2, 9, 32))
  p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  said = {k: v for k, v in changes.items() if k in ('decay', 'negative')}
  want = np.stack([_definition(p64, np.asarray(x, np.float64), **said)
                   for x in x_BLD])
  got = jax.jit(lambda p, x: recurrences.applied(layer, p, x)[0])(p, x_BLD)
  np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize('changes, sentence', [
    (dict(key_heads=3), 'which does not divide'),
    (dict(conv=0), 'conv is 0: it must be >= 1'),
])
def test_what_cannot_be_is_refused(changes, sentence):
  with pytest.raises(ValueError, match=sentence):
    architectures.resolve(models.config(
        'llama', **recurrences.fields('deltanet', **changes)))
