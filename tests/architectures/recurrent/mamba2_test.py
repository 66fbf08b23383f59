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
from tests.architectures.recurrent.recurrent_laws_test import trained_alike
from tests.helpers import models
from tests.helpers.recurrences import applied, fields, layer_of
from training.distributed import devices
from training.step import parameter_roles

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


@pytest.mark.slow
@pytest.mark.parametrize('dtype, most', [('float32', 1e-5),
                                         ('bfloat16', 4e-2)])
def test_a_layer_equals_that_of_transformers(dtype, most):
  """Outputs and gradients, on the same weights, of its torch code: its chunks
  of 32, where a row has two pieces here."""
  torch = pytest.importorskip('torch')
  theirs_lib = pytest.importorskip(
      'transformers.models.mamba2.modeling_mamba2')
  from transformers import Mamba2Config
  layer, p = layer_of('mamba2', dtype, head_dim=16, **LIMITS)
  theirs = theirs_lib.Mamba2Mixer(Mamba2Config(
      hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16,
      n_groups=2, state_size=6, conv_kernel=4, chunk_size=32,
      layer_norm_epsilon=layer.config.norm_eps,
      time_step_limit=(LIMITS['least_step'], LIMITS['most_step'])), 0)
  flat = lambda x: x.reshape(len(x), -1)
  names = 'value', 'key', 'query'
  joined = jnp.concatenate([flat(p[name]) for name in (
      'output_gate', *names, 'step')], -1)
  filters = jnp.concatenate([flat(p[f'{name}_conv']) for name in names], -1)
  put = lambda tensor, x: tensor.data.copy_(torch.tensor(np.asarray(x)))
  put(theirs.in_proj.weight, joined.T)
  put(theirs.conv1d.weight, filters.T[:, None])
  put(theirs.conv1d.bias, jnp.concatenate([
      p[f'{name}_conv_bias'].reshape(-1) for name in names]))
  put(theirs.dt_bias, p['step_bias'])
  put(theirs.A_log, p['decay_scale'])
  put(theirs.D, p['skip'])
  put(theirs.norm.weight, p['out_norm_scale'].reshape(-1))
  put(theirs.out_proj.weight, p['out'].reshape(-1, 32).T)
  rng = np.random.default_rng(0)
  x, weigh = (rng.normal(size=(2, 100, 32)).astype(np.float32)
              for _ in range(2))
  kind = getattr(torch, dtype)
  theirs = theirs.to(kind)
  given = torch.tensor(x, dtype=kind, requires_grad=True)
  out = theirs(given)
  (out.float() * torch.tensor(weigh)).sum().backward()
  want = [y.detach().float().numpy() for y in (
      out, given.grad, theirs.out_proj.weight.grad.T, theirs.A_log.grad,
      theirs.D.grad, theirs.conv1d.weight.grad[:, 0].T,
      theirs.in_proj.weight.grad.T)]

  def loss(p, x):
    y = applied(layer, p, x)[0].astype(jnp.float32)
    return (y * weigh).sum(), y
  (_, y), (dp, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
      p, jnp.asarray(x, layer.config.compute_dtype))
  got = [y, dx.astype(jnp.float32), dp['out'].reshape(-1, 32),
         dp['decay_scale'], dp['skip'],
         jnp.concatenate([flat(dp[f'{name}_conv']) for name in names], -1),
         jnp.concatenate([flat(dp[name]) for name in (
             'output_gate', *names, 'step')], -1)]
  for ours, other in zip(got, want):
    error = np.abs(ours - other).max() / np.abs(other).max()
    assert error < most, error


def test_sizes_that_are_left_open_follow_from_attentions():
  c = architectures.resolve(models.config('llama', mixer='mamba2'))
  assert c.num_heads * c.head_dim == c.d_model
  assert (c.mamba2.heads, c.mamba2.head_dim) == (2 * c.num_heads, c.head_dim)


def test_numbers_of_heads_and_filters_are_vectors():
  """No weight decay, and no matrices for muP and Muon."""
  module = architectures.build(models.config('llama', **fields('mamba2')))
  found = parameter_roles(module)['decoder']['layers']['block_0']['attention']
  assert {name for name, role in found.items() if role.matrix} == {
      'value', 'key', 'query', 'output_gate', 'step', 'out'}


@pytest.mark.slow
@pytest.mark.long
def test_one_group_is_whole_on_every_device(capfd):
  specs = trained_alike('mamba2', capfd, groups=1)
  assert specs['value'] == jax.P(None, ('fsdp', 'expert'), 'tensor', None)
  assert specs['key'] == jax.P(None, ('fsdp', 'expert'), None, None)


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
