"""Recurrences against their definitions in numpy, in float64. What they share
is in recurrent_laws_test.py; short convolutions, and what transformers has of
Mamba-2, are compared with its recordings (tests/training/hf/parity_test.py)."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import blocks, flat
from architectures.parts.context import Context
from architectures.parts.recurrent.mamba2 import Mamba2Config
from common.fields import FUNCTION
from configs import sharding as tables
from tests.helpers import models
from tests.helpers.recurrences import apply_layer, changes_with_mixer
from tests.helpers.recurrences import make_layer, MIXERS_WITH_STATE
from tests.helpers.recurrences import settings_of_mixer, small_sizes
from training.distributed import devices
from training.runs import abstract_params

SIGMOID = lambda x: 1 / (1 + np.exp(-x))
SILU = lambda x: x * SIGMOID(x)
SOFTPLUS = lambda x: np.log1p(np.exp(x))


def _read(p, name, x_LD, alone=lambda x: x):
  """[H, L, K]: a product, and the convolution and the SiLU if there is one; or
  else `alone` of the product."""
  x_HLK = np.einsum('ld,dhk->hlk', x_LD, p[name])
  if f'{name}_conv' not in p:
    return alone(x_HLK)
  w = p[f'{name}_conv']
  y_HLK = np.zeros(x_HLK.shape)
  for at, back in np.ndindex(len(x_LD), len(w)):
    if back <= at:
      y_HLK[:, at] += w[len(w) - 1 - back] * x_HLK[:, at - back]
  return SILU(y_HLK)


def _low_rank(p, name, x_LD):
  return np.einsum('lu,uhk->hlk', x_LD @ p[f'{name}_down'], p[f'{name}_up'])


def _normed(p, o_HLU, gate_HLU, eps=1e-5):
  o_HLU = o_HLU / np.sqrt(np.square(o_HLU).mean(-1, keepdims=True) + eps)
  return np.einsum('hlu,hud->ld', o_HLU * p['out_norm']['scale'] * gate_HLU,
                   p['out'])


def _silu_gate(p, x_LD):
  return SILU(np.einsum('ld,dhk->hlk', x_LD, p['output_gate']))


def _preconditioner(p, x_LD, k_JLK, m):
  """M of the authors' naive.py, a token at a time, or ones."""
  M, C = np.ones(k_JLK.shape), np.zeros(k_JLK[:, 0].shape)
  for t in range(len(x_LD) if 'curvature_rate' in p else 0):
    if 'curvature_decay' in p:
      C = C * np.exp(-np.exp(p['curvature_decay_scale']) * SOFTPLUS(
          x_LD[t] @ p['curvature_decay'] + p['curvature_decay_bias']))[:, None]
    C = C + SIGMOID(x_LD[t] @ p['curvature_rate'])[:, None] * k_JLK[:, t] ** 2
    r = np.log(C + 1e-6) - p['curvature_center'][:, None]
    M[:, t] = np.exp(-np.log(m.precondition) * r / (1 + np.abs(r)))
  return M


def _delta(p, x_LD, m):
  """Token by token, as the papers have it, of DeltaNet, DeltaProduct, KDA and
  Gated DeltaNet 2: each step of a token has a key, a value and a rate in a
  head, or gates of their features."""
  unit = lambda x: x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)
  q, k, v = (_read(p, name, x_LD, SILU) for name in ('query', 'key', 'value'))
  H, n = m.value_heads, m.householders
  by_step = lambda x: x.reshape(len(x) // n, n, *x.shape[1:])
  q = np.repeat(unit(q), H // len(q), 0)
  k = np.repeat(by_step(unit(k)), H // m.key_heads, 0)
  v = by_step(v)
  if 'rate' in p:
    erase = write = by_step(SIGMOID(x_LD @ p['rate']).T)[..., None]
  else:
    erase, write = (by_step(SIGMOID(np.einsum('ld,dhk->hlk', x_LD, p[name])))
                    for name in ('erase', 'write'))
    erase = np.repeat(erase, H // m.key_heads, 0)
  erase = (1 + m.negative) * erase
  write = erase if 'rate' in p else write
  log_a = np.zeros((H, len(x_LD), 1))
  if 'decay_down' in p:
    log_a = -np.exp(p['decay_scale'])[:, None, None] * SOFTPLUS(
        _low_rank(p, 'decay', x_LD) + p['decay_bias'][:, None])
  elif m.decay:
    log_a = (-np.exp(p['decay_scale']) * SOFTPLUS(
        x_LD @ p['decay'] + p['decay_bias'])).T[..., None]
  o = np.zeros((H, len(x_LD), v.shape[3]))
  multipliers = _preconditioner(p, x_LD, k[::H // m.key_heads, 0], m)
  for h in range(H):
    S = np.zeros((k.shape[3], v.shape[3]))
    for t in range(len(x_LD)):
      S = np.exp(log_a[h, t])[:, None] * S
      for i in range(n):
        key, written = k[h, i, t], k[h, i, t] * multipliers[h // (
            H // m.key_heads), t]
        S = (np.eye(len(S)) - np.outer(written, erase[h, i, t] * key)) @ S
        S = S + np.outer(written, write[h, i, t] * v[h, i, t])
      o[h, t] = S.T @ q[h, t] / np.sqrt(len(S))
  if 'output_gate' not in p:
    return _normed(p, o, SIGMOID(_low_rank(p, 'gate', x_LD)))
  z = np.einsum('ld,dhk->hlk', x_LD, p['output_gate'])
  return _normed(p, o, dict(silu=SILU, sigmoid=SIGMOID)[m.gate](z), m.norm_eps)


def _comba(p, x_LD, m):
  """Equation 5 of the paper, a head and a token at a time."""
  unit = lambda x: x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)
  q, k, v = (_read(p, name, x_LD, SILU) for name in ('query', 'key', 'value'))
  H, b = m.value_heads, (1 + m.negative) * SIGMOID(x_LD @ p['rate'])
  a = np.exp(-np.exp(p['decay_scale']) * SOFTPLUS(
      x_LD @ p['decay'] + p['decay_bias']))
  o = np.zeros(v.shape)
  for h in range(H):
    j, S = h // (H // m.key_heads), np.zeros((m.key_dim, m.value_dim))
    for t, key in enumerate(unit(k[j])):
      feedback = SIGMOID(p['feedback'][j]) * b[t, h]
      S = (a[t, h] * np.eye(len(S)) - feedback * np.outer(key, key)) @ S
      S += b[t, h] * np.outer(key, v[h, t])
      o[h, t] = S.T @ (unit(q[j, t]) - p['correction'][j] * key)
  return _normed(p, o / np.sqrt(m.key_dim), SIGMOID(np.einsum(
      'ld,dhk->hlk', x_LD, p['output_gate'])))


def _mesa(p, x_LD, m):
  """The optimal solution of each token, by an inverse."""
  unit = lambda x: x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)
  q, k = (unit(_read(p, name, x_LD, SILU)) for name in ('query', 'key'))
  v = _read(p, 'value', x_LD)
  a, b = (SIGMOID(x_LD @ p[name] + p[f'{name}_bias'])
          for name in ('decay', 'rate'))
  o, ridge = np.zeros(v.shape), 0.25 + SOFTPLUS(p['ridge'])
  for h in range(m.heads):
    H, G = np.zeros((m.key_dim, m.key_dim)), np.zeros((m.key_dim, m.value_dim))
    for t in range(len(x_LD)):
      H = a[t, h] * H + b[t, h] * np.outer(k[h, t], k[h, t])
      G = a[t, h] * G + b[t, h] * np.outer(k[h, t], v[h, t])
      o[h, t] = G.T @ np.linalg.solve(H + np.diag(ridge[h]), q[h, t])
  return _normed(p, o, np.ones(1))


def _gla(p, x_LD, m):
  """In the paper's parallel form (section 4.2), in float64, where quotients of
  cumulative decays are still numbers."""
  q, k, v = (_read(p, name, x_LD) for name in ('query', 'key', 'value'))
  a = SIGMOID(_low_rank(p, 'decay', x_LD) + p['decay_bias'][:, None]) ** (
      1 / m.temperature)
  upto = np.cumprod(a, 1)
  scores = np.tril((q * upto) @ np.swapaxes(k / upto, 1, 2))
  return _normed(p, scores @ v / np.sqrt(q.shape[2]), _silu_gate(p, x_LD))


def _retnet(p, x_LD, m, theta=10000.0, turn=True):
  """In the paper's parallel form (equation 5): (Q K^T * D) V."""
  del m
  q, k, v = (_read(p, name, x_LD) for name in ('query', 'key', 'value'))
  L, K = len(x_LD), q.shape[2]
  if turn:  # feature i is paired with i + K / 2
    turns = np.exp(1j * np.arange(L)[:, None] * theta ** (
        -np.arange(0, K, 2) / K))
    q, k = ((x[..., :K // 2] + 1j * x[..., K // 2:]) * turns for x in (q, k))
    q, k = (np.concatenate([z.real, z.imag], -1) for z in (q, k))
  apart = np.arange(L)[:, None] - np.arange(L)
  decay = [np.tril((1 - 2.0 ** (-5 - h)) ** np.maximum(apart, 0))
           for h in range(len(v))]
  return _normed(p, (q @ np.swapaxes(k, 1, 2) * decay) @ v / np.sqrt(K),
                 _silu_gate(p, x_LD))


def _mamba2(p, u_LD, m, eps=1e-5):
  """A head and a token at a time."""
  x, B, C = (_read(p, name, u_LD) for name in ('value', 'key', 'query'))
  dt = SOFTPLUS(u_LD @ p['step'] + p['step_bias'])
  dt = np.clip(dt, m.least_step, m.most_step or np.inf)
  y = np.zeros(x.shape)
  for h in range(m.heads):
    j, S = h // (m.heads // m.groups), np.zeros((m.head_dim, m.state))
    for t in range(len(u_LD)):  # as the paper has it, [U, K]
      S = S * np.exp(-dt[t, h] * np.exp(p['decay_scale'][h])) + (
          dt[t, h] * np.outer(x[h, t], B[j, t]))
      y[h, t] = S @ C[j, t] + p['skip'][h] * x[h, t]
  y *= _silu_gate(p, u_LD)
  for part in np.split(y, m.groups if m.norm_over == 'group' else 1):
    part /= np.sqrt(np.square(part).mean((0, 2), keepdims=True) + eps)
  return np.einsum('hlk,hk,hkd->ld', y, p['out_norm_scale'], p['out'])


def _mamba3(p, u_LD, m, eps=1e-5):
  """A head and a token at a time, with a state of complex numbers: the first
  features turn in pairs, and the rest decay alone."""
  x, B, C = (_read(p, name, u_LD) for name in ('value', 'key', 'query'))
  unit = lambda x: x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)
  dt = SOFTPLUS(u_LD @ p['step'] + p['step_bias'])
  share = SIGMOID(u_LD @ p['share'])
  rate = np.maximum(SOFTPLUS(u_LD @ p['decay']), 1e-4)
  angle = np.pi * np.tanh(u_LD @ p['angle']) if m.turned else u_LD[:, :0]
  y, A = np.zeros(x.shape), angle.shape[1]

  def paired(name, x_K, h):  # the complex features of a head
    x_K = x_K * p[f'{name}_norm']['scale'] + p[f'{name}_bias'][h]
    return np.concatenate([x_K[:A] + 1j * x_K[A:2 * A], x_K[2 * A:]])

  for h in range(m.heads):
    j, S, Bx = h // (m.heads // m.groups), 0, 0
    for t in range(len(u_LD)):
      b, c = paired('key', unit(B[j, t]), h), paired('query', unit(C[j, t]), h)
      turn = np.exp(-1j * dt[t, h] * angle[t])
      a = np.exp(-dt[t, h] * rate[t, h]) * np.concatenate(
          [turn, np.ones(len(b) - A)])[:, None]
      S = a * S + (1 - share[t, h]) * dt[t, h] * a * Bx
      Bx = np.outer(b, x[h, t])
      S = S + share[t, h] * dt[t, h] * Bx
      y[h, t] = (S.T @ c.conj()).real + p['skip'][h] * x[h, t]
  return np.einsum('hlk,hkd->ld', y * _silu_gate(p, u_LD), p['out'])


def _mamba(p, u_LD, m):
  """A token at a time, of all features."""
  x, z = u_LD @ p['value'], u_LD @ p['output_gate']
  before = np.concatenate([np.zeros((m.conv - 1, x.shape[1])), x])
  x = SILU(p.get('conv_bias', 0) + sum(
      w * before[i:i + len(x)] for i, w in enumerate(p['conv'])))
  dt = SOFTPLUS(x @ p['step_down'] @ p['step_up'] + p['step_bias'])
  B, C, A = x @ p['key'], x @ p['query'], -np.exp(p['decay_scale'])
  y, h = np.zeros(x.shape), np.zeros(A.shape)
  for t in range(len(x)):
    h = np.exp(dt[t][:, None] * A) * h + np.outer(dt[t] * x[t], B[t])
    y[t] = h @ C[t] + p['skip'] * x[t]
  return (y * SILU(z)) @ p['out']


def _rwkv7(p, x_LD, m, eps=1e-5):
  """As the paper has it, whose state is transposed: [U, K]."""
  before_LD = np.concatenate([np.zeros_like(x_LD[:1]), x_LD[:-1]])
  xr, xw, xk, xv, xa, xg = (
      x_LD + (before_LD - x_LD) * share for share in p['shift_conv'])
  r, k, v = (np.einsum('ld,dhk->lhk', x, p[name]) for x, name in (
      (xr, 'query'), (xk, 'key'), (xv, 'value')))
  up = lambda name, y_LU: np.einsum('lu,uhk->lhk', y_LU, p[f'{name}_up'])
  w = np.exp(-np.exp(-0.5) * SIGMOID(
      p['decay_bias'] + up('decay', np.tanh(xw @ p['decay_down']))))
  a = SIGMOID(p['rate_bias'] + up('rate', xa @ p['rate_down']))
  g = up('gate', SIGMOID(xg @ p['gate_down']))
  kappa = k * p['removal_scale']
  kappa /= np.sqrt(np.square(kappa).sum(-1, keepdims=True) + 1e-6)
  k = k * (1 + p['boost_scale'] * (a - 1))
  o = np.zeros(v.shape)
  for h in range(m.heads):
    S = np.zeros((m.value_dim, m.key_dim))
    for t in range(len(x_LD)):
      S = S @ (np.diag(w[t, h]) - np.outer(
          kappa[t, h], a[t, h] * kappa[t, h])) + np.outer(v[t, h], k[t, h])
      o[t, h] = S @ r[t, h]
  o = (o - o.mean(-1, keepdims=True)) / np.sqrt(
      o.var(-1, keepdims=True) + m.value_dim * eps)
  o = o * p['out_norm_scale'] + p['out_norm_bias']
  o += (r * p['bonus_scale'] * k).sum(-1, keepdims=True) * v
  return np.einsum('lhu,hud->ld', o * g, p['out'])


DEFINITIONS = {'deltanet': _delta, 'kda': _delta, 'gdn2': _delta,
               'comba': _comba, 'mesa': _mesa, 'gla': _gla, 'retnet': _retnet,
               'mamba2': _mamba2, 'rwkv7': _rwkv7, 'mamba': _mamba,
               'mamba3': _mamba3}


@pytest.mark.parametrize('mixer, sizes', [
    ('deltanet', {}), ('deltanet', dict(negative=True, conv=1, key_heads=4)),
    ('deltanet', dict(conv=0)),
    ('deltanet', dict(decay=False, gate='sigmoid', norm_eps=0.01)),
    ('deltanet', dict(householders=3, negative=True)),
    ('deltanet', dict(precondition=1.5)), ('kda', dict(precondition=2.0)),
    ('deltanet', dict(precondition=1.5, decay=False, conv=0)),
    ('comba', {}), ('comba', dict(conv=0, negative=True)),
    ('kda', {}), ('kda', dict(negative=True, conv=0, key_heads=4)),
    ('gdn2', {}), ('gdn2', dict(negative=True, conv=0, key_heads=4)),
    ('gla', {}), ('gla', dict(conv=3, temperature=2.0)), ('retnet', {}),
    ('mesa', {}), ('mesa', dict(conv=0)), ('rwkv7', {}), ('mamba', {}),
    ('mamba', dict(conv=1, conv_bias=False, rank=5)),
    ('mamba3', {}), ('mamba3', dict(turned=1.0, groups=4)),
    ('mamba3', dict(turned=0.0)),
    ('mamba2', dict(least_step=0.01, most_step=0.03,  # some are beyond each
                    norm_over='all', conv=1, conv_bias=False))])
def test_a_layer_equals_its_definition(mixer, sizes):
  layer, p = make_layer(mixer, **sizes)
  # The second row is so small that what is added to its squares counts.
  x_BLD = jax.random.normal(jax.random.key(3), (2, 9, 32)) * jnp.array(
      [1, 0.01])[:, None, None]
  p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  for x_LD, got in zip(x_BLD, jax.jit(lambda p, x: apply_layer(layer, p, x)[0])(
      p, x_BLD)):
    want = DEFINITIONS[mixer](p64, np.asarray(x_LD, np.float64),
                              settings_of_mixer(layer.config, mixer))
    np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


def test_a_complex_state_follows_parity():
  """By weights set by hand: each bit 1 turns by pi what the first token wrote,
  which no state with positive eigenvalues does (Grazzi et al. 2024)."""
  layer, p = make_layer('mamba3')
  begins, bit, always, L = 0, 1, 2, 700
  x_LD = np.zeros((L, 32), np.float32)
  x_LD[0, begins], x_LD[:, always] = 1, 1
  x_LD[1:, bit] = np.random.default_rng(0).integers(0, 2, L - 1)
  p = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), p)
  p['step_bias'] += np.log(np.e - 1)  # a step of 1
  p['angle'][bit], p['share'][always], p['decay'][always] = 20, 20, -20
  p['key_bias'][:, 0] = p['query_bias'][:, 0] = 1  # of a pair that turns
  p['value'][begins], p['output_gate'][always], p['out'][..., 0] = 1, 1, 1
  got = jax.jit(lambda p, x: apply_layer(layer, p, x)[0])(p, x_LD[None])[0, :,
                                                                         0]
  want = (-1.0) ** np.cumsum(x_LD[:, bit]) * np.exp(-1e-4 * np.arange(L))
  np.testing.assert_allclose(got, want * 4 * 5 * SILU(1.0), rtol=1e-4)


def test_retention_turns_only_by_rotary_positions():
  layer, p = make_layer('retnet')
  layer = layer.clone(config=architectures.resolve(models.small_config(
      'llama', position='none', num_layers=1, **changes_with_mixer('retnet'))))
  x_LD = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
  want = _retnet(jax.tree.map(lambda x: np.asarray(x, np.float64), p), x_LD,
                 None, turn=False)
  got = jax.jit(lambda p, x: apply_layer(layer, p, x)[0])(p, x_LD[None])[0]
  np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


def first_parameters(mixer, **sizes):
  """Returns the parameters that a layer of a mixer begins with."""
  c = architectures.resolve(models.small_config(
      'llama', mixer=mixer, **{mixer: sizes}))
  layer = blocks.MIXERS[mixer].module(c, None)
  return nn.meta.unbox(jax.jit(layer.init)(
      jax.random.key(0), jnp.zeros((1, 2, 32)),
      Context(jnp.arange(2)[None]), None))['params']


@pytest.mark.parametrize('mixer, least', [
    ('kda', 1.0), pytest.param('deltanet', 0.01, marks=pytest.mark.long)])
def test_decays_are_born_as_in_the_authors_programs(mixer, least):
  p = first_parameters(mixer, key_heads=128, key_dim=8)
  scale = np.exp(p['decay_scale'])
  assert least <= scale.min() < least + 1 and 15 < scale.max() <= 16
  first = np.log1p(np.exp(p['decay_bias']))
  assert 0.00099 < first.min() and first.max() < 0.1001
  assert np.median(first) == pytest.approx(0.01, rel=0.5)


def test_rwkv7_is_born_as_in_the_authors_program():
  """As half way up its layers: train_temp/src/model.py of RWKV-LM, x_r to x_g,
  w0, a0, k_k, k_a and r_k."""
  p = first_parameters('rwkv7', heads=4, key_dim=8)
  n = np.arange(32)
  linear, zigzag = n / 31 - 0.5, (n % 8 - 3.5) / 3.5
  zigzag *= np.abs(zigzag)
  powers = 0.5 * np.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])
  for name, want in dict(
      shift_conv=1 - (n / 32) ** powers[:, None],
      decay_bias=6 * (n / 31) ** (1 + 0.5 ** 0.3) - 5.5 + 2.5 * zigzag,
      rate_bias=-0.19 + 0.3 * zigzag + 0.4 * linear,
      removal_scale=0.71 - 0.1 * linear, boost_scale=1.02 + 0 * n,
      bonus_scale=-0.04 + 0 * n).items():
    np.testing.assert_allclose(p[name].reshape(want.shape), want, atol=1e-5)


def program_of(config) -> str:
  """Returns the traced program of a model, numbers included, without the
  addresses of functions."""
  module = architectures.build(config)
  program = jax.make_jaxpr(lambda params, tokens: module.apply(
      {'params': params}, tokens).logits)(
          nn.meta.unbox(abstract_params(module)), models.random_tokens())
  return re.sub('0x[0-9a-f]+', '', str(program))


@pytest.mark.parametrize('mixer', [
    name for name, mixer in blocks.MIXERS.items() if mixer.settings])
def test_a_field_that_is_said_to_change_the_function_changes_the_program(mixer):
  sizes = {mixer: small_sizes(mixer)} if mixer in MIXERS_WITH_STATE else {}
  c = architectures.resolve(models.small_config(
      'llama', num_layers=1, mixer=mixer, **sizes))
  group, unread = settings_of_mixer(c, mixer), flat.fields_that_are_unread(c)
  program = program_of(c)
  assert program == program_of(c)
  for field in dataclasses.fields(group):
    rule, value = field.metadata.get('rule'), getattr(group, field.name)
    names = {field.name, f'{mixer}.{field.name}'}
    if rule is None or rule.resume is not FUNCTION or names & unread.keys():
      continue
    other = next((x for x in rule.choices or () if x != value), None)
    if other is None:
      other = not value if isinstance(value, bool) else value + 1
    changed = c.with_part(type(group), **{field.name: other})
    assert program_of(changed) != program, field.name


@pytest.mark.parametrize('mixer', [
    name for name, mixer in blocks.MIXERS.items() if mixer.settings])
def test_a_size_that_is_left_open_is_what_its_field_says(mixer):
  """'derived: 2 head_dim', say, of the same group or of the model."""
  c = architectures.resolve(models.small_config(
      'llama', mixer=mixer, d_model=48, num_heads=4, head_dim=10))
  group = settings_of_mixer(c, mixer)
  for field in dataclasses.fields(group):
    _, _, text = getattr(field.metadata.get('rule'), 'doc', '').partition(
        'derived: ')
    formula = re.fullmatch(r'(?:(\d+) )?(\w+)(?: / (\d+))?\.?', text)
    if formula:
      times, name, parts = formula.groups('1')
      size, base = getattr(group, field.name), getattr(c, name, 7)
      if hasattr(group, name) and name != field.name:  # it may be any other
        base = 7
        size = getattr(dataclasses.replace(
            group, **{name: base, field.name: 0}).derived(c), field.name)
      assert size == int(times) * base / int(parts), field.name


def test_tokens_of_zeros_have_a_gradient():
  """A vector without a direction has no length to be divided by."""
  layer, p = make_layer('kda')
  grads = jax.jit(jax.grad(lambda p, x: apply_layer(layer, p, x)[0].sum(),
                           (0, 1)))(
      p, jnp.zeros((1, 3, 32)))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize('changes, sentence', [
    (changes_with_mixer('kda', key_heads=3),
     'key_heads is 3, which does not divide'),
    (changes_with_mixer('deltanet', householders=2, precondition=1.5),
     'choose 1 for one of the two'),
    (changes_with_mixer('mamba2', groups=3),
     'groups is 3, which does not divide'),
    (changes_with_mixer('mamba3', groups=3),
     'groups is 3, which does not divide'),
    (changes_with_mixer('mamba3', turned=0.3),
     'less than a pair of model.mamba3.state 6'),
    (changes_with_mixer('retnet', key_dim=5), 'turn pairs, so it must be even'),
    (dict(changes_with_mixer('retnet'), rope=dict(scaling='dynamic', factor=2.0,
                                                  original_len=8)),
     "scaling 'dynamic' turns by the length of the row"),
    (dict(changes_with_mixer('kda'), parametrization='mup', mup_base_width=32,
          mup_base_head_dim=4), 'times as wide as at the base'),
    (dict(changes_with_mixer('rwkv7'), parametrization='mup',
          mup_base_width=32),
     "is 'mup', which says nothing of its shares"),
    (changes_with_mixer('mamba2', least_step=0.2, most_step=0.1),
     'least_step is 0.2'),
])
def test_what_cannot_be_is_refused(changes, sentence):
  with pytest.raises(ValueError, match=sentence):
    architectures.resolve(models.small_config('llama', **changes))


def test_heads_that_no_layer_has_need_not_divide_the_width():
  config = models.small_config('llama', **changes_with_mixer('mamba'),
                               d_model=30, head_dim=0)
  assert architectures.resolve(config).d_model == 30
  with pytest.raises(ValueError, match='which does not divide model.d_model'):
    architectures.resolve(dict(config, mixer='retnet'))


def test_groups_that_a_mesh_does_not_divide_are_refused():
  c = architectures.resolve(models.small_config('llama',
                                                **changes_with_mixer('mamba2')))
  shape = dict.fromkeys(tables.MESH_AXES, 1)
  with pytest.raises(ValueError, match='not divide model.mamba2.groups'):
    devices.check_mesh(c, shape | dict(tensor=4))
  one = c.with_part(Mamba2Config, groups=1)
  devices.check_mesh(one, shape | dict(tensor=4))
  with pytest.raises(ValueError, match='not divide model.mamba2.heads'):
    devices.check_mesh(one, shape | dict(tensor=8))


def test_a_mesh_that_does_not_divide_a_kind_of_layer_names_the_kind():
  kinds = dict(narrow=dict(num_kv_heads=2), usual={})
  c = architectures.resolve(models.small_config(
      'llama', num_heads=4, num_kv_heads=4, pattern='narrow,usual',
      kinds=kinds))
  shape = dict.fromkeys(tables.MESH_AXES, 1)
  for size, sentence in ((3, 'model.num_heads 4: choose from 1, 2, 4'),
                         (4, 'model.kinds.narrow.num_kv_heads 2')):
    with pytest.raises(ValueError, match=sentence):
      devices.check_mesh(c, shape | dict(tensor=size))
