"""Mamba-2 against its definition in numpy and transformers' layer. What it
shares with all recurrences is in recurrent_laws_test.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.recurrent import vectors
from configs import sharding as tables
from tests.helpers import models
from tests.helpers.recurrences import applied, fields, layer_of
from training.distributed import devices

LIMITS = dict(least_step=0.01, most_step=0.03)  # some steps are beyond each


def _definition(p, u_LD, m, eps=1e-5):
  """One row in float64, a head and a token at a time."""
  silu = lambda x: x / (1 + np.exp(-x))
  def convolved(name):
    x, w = np.einsum('ld,dhk->lhk', u_LD, p[name]), p[f'{name}_conv']
    y = np.zeros(x.shape) + p.get(f'{name}_conv_bias', 0)
    for at in range(len(x)):
      for back in range(min(len(w), at + 1)):
        y[at] += w[len(w) - 1 - back] * x[at - back]
    return silu(y)
  x, B, C = map(convolved, ('value', 'key', 'query'))
  dt = np.log1p(np.exp(u_LD @ p['step'] + p['step_bias']))
  dt = np.clip(dt, m.least_step, m.most_step or np.inf)
  y = np.zeros(x.shape)
  for h in range(m.heads):
    j, S = h // (m.heads // m.groups), np.zeros((m.head_dim, m.state))
    for t in range(len(x)):  # as the paper has it, [U, K]
      S = S * np.exp(-dt[t, h] * np.exp(p['decay_scale'][h])) + (
          dt[t, h] * np.outer(x[t, h], B[t, j]))
      y[t, h] = S @ C[t, j] + p['skip'][h] * x[t, h]
  y = y * silu(np.einsum('ld,dhk->lhk', u_LD, p['output_gate']))
  for part in np.split(y, m.groups if m.norm_over == 'group' else 1, 1):
    part /= np.sqrt(np.square(part).mean((1, 2), keepdims=True) + eps)
  return np.einsum('lhk,hkd->ld', y * p['out_norm_scale'], p['out'])


@pytest.mark.parametrize('changes', [
    {}, dict(LIMITS, norm_over='all', conv=1, conv_bias=False)],
                         ids=['published', 'bounded'])
def test_a_layer_equals_its_definition(changes):
  layer, p = layer_of('mamba2', **changes)
  x_BLD = jax.random.normal(jax.random.key(3), (2, 9, 32))
  p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  want = np.stack([_definition(p64, np.asarray(x, np.float64),
                               layer.config.mamba2) for x in x_BLD])
  got = jax.jit(lambda p, x: applied(layer, p, x)[0])(p, x_BLD)
  np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


def test_features_are_weighted_as_by_a_product():
  """And so are the gradients, which are written out."""
  x_LHU, w_HU, d_LHU = (jax.random.normal(jax.random.key(i), shape)
                        for i, shape in enumerate([(5, 2, 3), (2, 3),
                                                   (5, 2, 3)]))
  by_hand = jax.vjp(vectors.weighted, x_LHU, w_HU)
  derived = jax.vjp(jnp.multiply, x_LHU, w_HU[None])
  models.close(by_hand[0], derived[0])
  models.close(by_hand[1](d_LHU), (derived[1](d_LHU)[0],
                                   derived[1](d_LHU)[1][0]))


def test_sizes_that_are_left_open_follow_from_attentions():
  c = architectures.resolve(models.config('llama', mixer='mamba2'))
  assert c.num_heads * c.head_dim == c.d_model
  assert (c.mamba2.heads, c.mamba2.head_dim) == (2 * c.num_heads, c.head_dim)


@pytest.mark.parametrize('changes, sentence', [
    (dict(groups=3), 'groups is 3, which does not divide model.mamba2.heads 4'),
    (dict(groups=0), 'groups is 0: it must be > 0'),
    (dict(conv=0), 'conv is 0: it must be >= 1'),
    (dict(norm_over='head'), 'choose from group, all'),
    (dict(least_step=0.2, most_step=0.1),
     'least_step is 0.2, above model.mamba2.most_step 0.1'),
])
def test_what_cannot_be_is_refused(changes, sentence):
  with pytest.raises(ValueError, match=sentence):
    architectures.resolve(models.config(
        'llama', **fields('mamba2', **changes)))


def test_groups_that_a_mesh_does_not_divide_are_refused():
  c = architectures.resolve(models.config('llama', **fields('mamba2')))
  shape = dict.fromkeys(tables.MESH_AXES, 1)
  with pytest.raises(ValueError, match='not divide model.mamba2.groups'):
    devices.check_mesh(c, 8, 1, shape | dict(tensor=4))
  one = dataclasses.replace(c, mamba2=dataclasses.replace(c.mamba2, groups=1))
  devices.check_mesh(one, 8, 1, shape | dict(tensor=4))
  with pytest.raises(ValueError, match='not divide model.mamba2.heads'):
    devices.check_mesh(one, 8, 1, shape | dict(tensor=8))
