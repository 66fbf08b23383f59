"""Queries, keys and values: what they are normalised over, and their biases
apart from that of the output."""

import jax
import numpy as np
import pytest

from architectures.parts.attention.multi_head import Attention, QK_NORMS
from tests.architectures.parts_test import (
    D, KIND, attend, born, context, normal, resolved)
from tests.helpers import models
from tests.training import step_test


@pytest.mark.parametrize('cross', [False, True])
@pytest.mark.parametrize('norm', ['rmsnorm', 'layernorm'])
@pytest.mark.parametrize('over', QK_NORMS)
def test_qk_norm_is_over_a_head_or_the_whole_projection(over, norm, cross):
  """Against NumPy in float64, with grouped keys and scales that differ."""
  x, memory = normal(0, 2, 6, D), normal(1, 2, 6, D)
  c = resolved(qk_norm=True, qk_norm_over=over, norm=norm, num_kv_heads=2)
  module = Attention(c, KIND, cross=cross)
  ctx = context(memory_BMD=memory)
  params = born(module, x, ctx, None)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

  def heads(name, x):
    y_BLHK = np.einsum('bld,dhk->blhk', x, p[name]) + p[f'{name}_bias']
    if name == 'value':
      return y_BLHK
    axes, n = (-1 if over == 'head' else (-2, -1)), p[f'{name}_norm']
    if norm == 'layernorm':
      y_BLHK = y_BLHK - y_BLHK.mean(axes, keepdims=True)
    y_BLHK = y_BLHK / np.sqrt(
        (y_BLHK ** 2).mean(axes, keepdims=True) + c.norm_eps)
    shape = (-1, y_BLHK.shape[-1])  # of a head, or of each
    y_BLHK = y_BLHK * n['scale'].reshape(shape)
    return y_BLHK + (n['bias'].reshape(shape) if 'bias' in n else 0)

  seen = memory if cross else x
  q, k, v = (heads(name, a) for name, a in (
      ('query', x), ('key', seen), ('value', seen)))
  k, v = np.repeat(k, 2, 2), np.repeat(v, 2, 2)
  weights = np.exp(np.einsum('blhk,bmhk->bhlm', q, k) * c.score_scale)
  if not cross:
    weights = np.tril(weights)
  weights /= weights.sum(-1, keepdims=True)
  want = np.einsum('bhlm,bmhk,hkd->bld', weights, v, p['out']) + p['out_bias']
  got = module.apply({'params': params}, x, ctx, None)[0]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_output_of_attention_may_have_no_bias_of_its_own():
  x = normal(0, 2, 6, D)
  params = born(Attention(resolved(), KIND), x, context(), None)
  assert params.keys() >= {'query_bias', 'key_bias', 'value_bias', 'out_bias'}
  other = born(Attention(resolved(attention_out_bias=False), KIND), x,
               context(), None)
  assert params.keys() - other.keys() == {'out_bias'}
  np.testing.assert_array_equal(
      attend(other, x, {n: params[n] for n in other}, attention_out_bias=False),
      attend(params, x, {'out_bias': 0 * params['out_bias']}))
  plain = born(Attention(resolved(attention_bias=False), KIND), x, context(),
               None)
  assert not [name for name in plain if name.endswith('bias')]


@pytest.mark.long
@pytest.mark.slow
def test_a_norm_over_heads_on_several_devices_is_that_on_one():
  """Its mean is of heads that lie on two devices."""
  c = step_test.config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  c.model = models.config('llama', block='out_norm', qk_norm=True,
                          qk_norm_over='projection', num_kv_heads=2)
  _, state, metrics = step_test.train(c, steps=1)
  _, alone, other = step_test.train(c, step_test.one_device(), steps=1)
  models.close(alone.params, state.params, rtol=1e-4)
  assert metrics[0]['loss'] == pytest.approx(other[0]['loss'], rel=1e-4)
