"""Mamba-2 against its definition in numpy and transformers' layer, and what it
promises as a recurrence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.attention import Context
from architectures.parts.recurrent import mamba2
from configs import base
from configs import sharding as tables
from tests.architectures.deltanet_test import GREEDY, decoded
from tests.helpers import models
from tests.training import step_test
from training import generate, runs
from training.costs import flops, totals
from training.distributed import devices
from training.step import parameter_roles

SIZES = dict(heads=4, head_dim=5, groups=2, state=6)
MAMBA = dict(mixer='mamba2', mamba2=SIZES)
HYBRID = dict(num_layers=4, mamba2=SIZES, pattern='mamba,whole',
              kinds=dict(mamba=dict(mixer='mamba2'), whole={}))
LIMITS = dict(least_step=0.01, most_step=0.03)  # some steps are beyond each


def make(dtype='float32', **changes):
  return models.make('llama', dtype=dtype, **MAMBA | changes)


def layer_of(dtype='float32', **changes):
  """Returns (layer, its parameters)."""
  module, params = make(dtype, num_layers=1, mamba2=SIZES | changes)
  p = params['decoder']['layers']['block_0']['attention']
  return mamba2.Mamba2(module.config, None), jax.tree.map(lambda x: x[0], p)


def applied(layer, p, x_BLD):
  return layer.apply({'params': p}, x_BLD,
                     Context(jnp.arange(x_BLD.shape[1])[None]), None)[0]


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
  layer, p = layer_of(**changes)
  x_BLD = jax.random.normal(jax.random.key(3), (2, 9, 32))
  p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  want = np.stack([_definition(p64, np.asarray(x, np.float64),
                               layer.config.mamba2) for x in x_BLD])
  got = jax.jit(lambda p, x: applied(layer, p, x))(p, x_BLD)
  np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


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
  layer, p = layer_of(dtype, heads=4, head_dim=16, **LIMITS)
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
    y = applied(layer, p, x).astype(jnp.float32)
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


# In bfloat16 the forward pass itself is 2e-2 away from that in float32.
@pytest.mark.parametrize('dtype, rtol', [
    ('float32', 1e-5), pytest.param('bfloat16', 6e-2, marks=pytest.mark.slow)])
def test_decoding_token_by_token_is_the_forward_pass(dtype, rtol):
  module, params = make(dtype)
  tokens = models.tokens(2, 12)
  whole = models.logits(module, params, tokens)
  # The prompt may be shorter than the convolutions are wide.
  for first in (6, 2):
    models.close(whole, decoded(module, params, tokens, first), rtol)


@pytest.mark.parametrize('fields', [
    MAMBA, pytest.param(HYBRID, marks=[pytest.mark.slow, pytest.mark.long])],
                         ids=['alone', 'hybrid'])
def test_packed_documents_are_those_apart(fields):
  """Neither the state nor the convolutions see over the end of one."""
  module, params = models.make('llama', **fields)
  a, b = models.tokens(1, 7, seed=4), models.tokens(1, 9, seed=5)
  apply = jax.jit(lambda t, how: models.logits(module, params, t, **how))
  packed = apply(jnp.concatenate([a, b], 1), dict(
      positions_BL=jnp.concatenate([jnp.arange(7), jnp.arange(9)])[None],
      segment_ids_BL=jnp.array([[1] * 7 + [2] * 9])))
  models.close(jnp.concatenate([apply(a, {}), apply(b, {})], 1), packed)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    MAMBA, pytest.param(HYBRID, marks=pytest.mark.long)],
                         ids=['alone', 'hybrid'])
def test_prompts_of_several_lengths_go_on_as_each_would_alone(fields):
  """Their padding is no part of a state."""
  module, params = models.make('llama', **fields)
  prompts, lengths = models.tokens(2, 7), jnp.array([3, 7])
  write = lambda rows, lengths: generate.generate(
      module, params, rows, lengths, jax.random.key(0), max_new_tokens=4,
      sampling=GREEDY)
  both = write(prompts, lengths)
  alone = [write(prompts[i:i + 1, :n], jnp.array([n]))
           for i, n in enumerate((3, 7))]
  np.testing.assert_array_equal(both, jnp.concatenate(alone))


@pytest.mark.slow
@pytest.mark.long
def test_hybrids_scan_their_period_and_decode():
  module, params = models.make('llama', **HYBRID)
  other, _ = models.make('llama', **HYBRID, scan_layers=False)
  tokens = models.tokens(2, 12)
  logits = jax.jit(lambda p: models.logits(module, p, tokens))(params)
  models.close(logits, models.logits(other, params, tokens), 2e-5)
  models.close(logits, decoded(module, params, tokens), 2e-5)


def test_a_state_has_one_size_and_is_float32():
  c = architectures.resolve(models.config('llama', dtype='bfloat16', **MAMBA))
  for length in (7, 1000):
    cache, = architectures.init_cache(c, 3, length)
    assert cache.state_BHKU.shape == (2, 3, 4, 6, 5)
    assert cache.state_BHKU.dtype == jnp.float32
    assert cache.query_BWJK.shape == cache.key_BWJK.shape == (2, 3, 3, 2, 6)
    assert cache.value_BWHU.shape == (2, 3, 3, 4, 5)
  config = base.base()
  config.model = models.config('llama', dtype='bfloat16', **MAMBA)
  figures = totals.count(config, 16)
  assert figures['kv_cache_bytes_per_token'] == 0
  assert figures['state_bytes_per_row'] == 2 * (
      4 * 4 * 6 * 5 + 2 * 3 * (2 * 2 * 6 + 4 * 5))


def test_flops_are_those_of_the_products():
  c = models.config('llama', **MAMBA)
  D, F, N, L, V = 32, 48, 2, 16, models.VOCAB
  J, H, K, U, W = 2, 4, 6, 5, 4
  weights = N * (D * (2 * J * K + 2 * H * U + H) + H * U * D
                 + W * (2 * J * K + H * U) + 3 * D * F) + D * V
  found = flops.forward_flops(c, L)
  assert found['weights'] == 2 * weights * L
  # A row of one piece: its weights, what they weigh; then the state's two.
  half = L * (L + 1) / 2
  assert found['attention'] == pytest.approx(
      2 * N * (J * K * half + H * U * half + 2 * H * K * U * L))
  found = flops.decode_flops(c, L)
  assert found['weights'] == 2 * weights
  assert found['attention'] == 2 * N * 2 * H * K * U
  assert found == flops.decode_flops(c, 30)  # whatever came before


def test_sizes_that_are_left_open_follow_from_attentions():
  c = architectures.resolve(models.config('llama', mixer='mamba2'))
  assert c.num_heads * c.head_dim == c.d_model
  assert (c.mamba2.heads, c.mamba2.head_dim) == (2 * c.num_heads, c.head_dim)


def test_numbers_of_heads_and_filters_are_vectors():
  """No weight decay, and no matrices for muP and Muon."""
  module, _ = make()
  found = parameter_roles(module)['decoder']['layers']['block_0']['attention']
  assert {name for name, role in found.items() if role.matrix} == {
      'value', 'key', 'query', 'output_gate', 'step', 'out'}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('groups', [1, 2])
def test_sharded_equals_single_device(groups, capfd):
  c = step_test.config(data__document_mask=True)
  c.model = models.config('llama', **HYBRID | dict(
      num_layers=2, mamba2=dict(SIZES, groups=groups)))
  c.model.num_kv_heads = 4
  single = step_test.train(c, step_test.one_device())
  c.mesh.update(tables.PRESETS['fsdp_tp'])
  run, state, metrics = step_test.train(c)
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err
  models.close(single[1].params, state.params, rtol=1e-4)
  models.close(single[2], metrics, rtol=1e-4)
  p = run.shardings.params['decoder']['layers']['block_0']['attention']
  assert p['value'].spec == jax.P(None, 'fsdp', 'tensor', None)
  assert p['key'].spec == jax.P(
      None, 'fsdp', 'tensor' if groups > 1 else None, None)
  assert p['decay_scale'].spec == jax.P(None, 'tensor')


def test_mup_is_the_standard_form_at_its_base():
  tokens = models.tokens()
  found = [models.logits(*make(parametrization=name, mup_base_width=base),
                         tokens) for name, base in (('standard', 0),
                                                    ('mup', 32))]
  models.close(*found, 1e-6)


@pytest.mark.parametrize('system, changes, sentence', [
    ('t5', {}, 'is an encoder-decoder: choose attention'),
    ('bert', {}, 'is an encoder: choose attention'),
    ('llama', dict(attention='banded', sliding_window=4), 'has no window'),
    ('llama', dict(position='relative'), 'has no scores for the bias'),
    ('llama', dict(mamba2=dict(groups=3)), 'groups is 3, which does not divide '
     'model.mamba2.heads 4'),
    ('llama', dict(mamba2=dict(groups=0)), 'groups is 0: it must be > 0'),
    ('llama', dict(mamba2=dict(conv=0)), 'conv is 0: it must be >= 1'),
    ('llama', dict(mamba2=dict(norm_over='head')), 'choose from group, all'),
    ('llama', dict(mamba2=dict(least_step=0.2, most_step=0.1)),
     'least_step is 0.2, above model.mamba2.most_step 0.1'),
    ('llama', dict(lora=dict(rank=2, targets='kv_up')), "'kv_up', a product"),
])
def test_what_cannot_be_is_refused(system, changes, sentence):
  changes = dict(changes, mamba2=SIZES | changes.get('mamba2', {}))
  with pytest.raises(ValueError, match=sentence):
    architectures.resolve(models.config(system, **MAMBA | changes))


def test_what_a_run_of_it_cannot_be_is_refused():
  module, params = make()
  c = module.config
  shape = dict.fromkeys(tables.MESH_AXES, 1)
  with pytest.raises(ValueError, match='rows stay on one device'):
    devices.check_mesh(c, 8, 1, shape | dict(context=2))
  with pytest.raises(ValueError, match='not divide model.mamba2.groups'):
    devices.check_mesh(c, 8, 1, shape | dict(tensor=4))
  one = dataclasses.replace(c, mamba2=dataclasses.replace(c.mamba2, groups=1))
  devices.check_mesh(one, 8, 1, shape | dict(tensor=4))
  with pytest.raises(ValueError, match='not divide model.mamba2.heads'):
    devices.check_mesh(one, 8, 1, shape | dict(tensor=8))
  with pytest.raises(ValueError, match='reads a row in one direction'):
    runs._check_objective('prefix', module)
  with pytest.raises(ValueError, match='no attention weights to show'):
    module.apply({'params': params}, models.tokens(), keep_attention=True)
