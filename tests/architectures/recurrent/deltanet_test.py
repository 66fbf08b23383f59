"""Gated DeltaNet against its definition in numpy and transformers' layer. What
it shares with all recurrences is in recurrent_laws_test.py."""

import jax
import numpy as np
import pytest

import architectures
from configs import sharding as tables
from tests.helpers import models, recorded_deltanet, recurrences
from tests.training import step_test


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


def test_a_layer_equals_that_of_qwen3_next():
  """Outputs and all gradients, on the same weights, of transformers' torch
  code, as they are recorded: its chunks of 64, where a row has two pieces
  here."""
  found, want = recorded_deltanet.ours(), recorded_deltanet.recorded()
  assert found.keys() == want.keys() and len(want) == 15
  errors = {name: recorded_deltanet.error(found[name], x)
            for name, x in want.items()}
  assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
def test_a_layer_equals_that_of_qwen3_next_live():
  """In bfloat16 it is as near to the layer in float32 as transformers' is: the
  recurrence of this one multiplies the roundings of both by more than 10."""
  pytest.importorskip('torch')
  pytest.importorskip('transformers.models.qwen3_next.modeling_qwen3_next')
  want, rounded = map(recorded_deltanet.theirs, ('float32', 'bfloat16'))
  for dtype in ('float32', 'bfloat16'):
    found = recorded_deltanet.ours(dtype)
    for name, x in want.items():
      most = 1e-5 if dtype == 'float32' else 1.5 * recorded_deltanet.error(
          rounded[name], x)
      assert recorded_deltanet.error(found[name], x) < most, (dtype, name)
  for name, x in recorded_deltanet.recorded().items():  # is of this release
    assert recorded_deltanet.error(x, want[name]) < 1e-6, name


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('preset', ['ep', 'tp', 'ep_fsdp_tp'])
def test_a_hybrid_with_experts_is_the_same_on_a_mesh(preset, capfd):
  """Qwen3-Next: gated attention, and a shared expert that has a gate."""
  c = step_test.config()
  c.model = models.config(
      'qwen3_next', num_kv_heads=4, moe=dict(num_experts=8, top_k=3),
      deltanet=dict(key_heads=4, value_heads=8, key_dim=6, value_dim=5),
      pattern='linear,full', kinds=dict(
          linear=dict(mixer='deltanet'), full={}))
  single = step_test.train(c, step_test.one_device())
  c.mesh.update(tables.PRESETS[preset])
  _, state, metrics = step_test.train(c)
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err
  models.close(single[1].params, state.params, rtol=1e-4)
  for one, other in zip(single[2], metrics, strict=True):
    models.close(*({name: x for name, x in found.items()
                    if name != 'health/shard_imbalance'}  # it is of the mesh
                   for found in (one, other)), rtol=1e-4)


@pytest.mark.parametrize('changes, sentence', [
    (dict(key_heads=3), 'which does not divide'),
    (dict(conv=0), 'conv is 0: it must be >= 1'),
])
def test_what_cannot_be_is_refused(changes, sentence):
  with pytest.raises(ValueError, match=sentence):
    architectures.resolve(models.config(
        'llama', **recurrences.fields('deltanet', **changes)))
