"""muP: the standard form at the base, and by shape the rules at every width."""


import dataclasses

from configs import base
import flax.linen as nn
import jax
import numpy as np
import pytest

import architectures
from tests.helpers import models
from training import preflight, runs
from architectures.parts import paths, sharding
from training.runs import abstract_params, parameter_roles
from training.optim import mup, optimizers

BASE = 32  # models.small_config's d_model


def built(system, width=BASE, **changes):
  wider = width // BASE
  return architectures.build(models.small_config(
      system, d_model=width, d_ff=48 * wider, moe=dict(d_ff=24 * wider),
      **changes))


def scaled(system, width=BASE, **changes):
  return built(system, width, parametrization='mup', mup_base_width=BASE,
               **changes)


def flat(module):
  return paths.flatten_by_path(nn.meta.unbox(abstract_params(module)))


@pytest.mark.slow
@pytest.mark.parametrize('system', models.mark_long_except(
    ('mixtral',), ('gpt', 'mixtral', 'bert', 't5')))
def test_at_the_base_all_is_as_in_the_standard_form(system):
  plain, ours = built(system), scaled(system)
  key, tokens = jax.random.key(0), models.random_tokens()
  def logits(module):
    def run(key):
      variables = module.init(key, tokens)
      return variables, module.apply(variables, tokens).logits
    return jax.jit(run)(key)
  jax.tree.map(np.testing.assert_array_equal, logits(plain), logits(ours))
  roles = parameter_roles(ours)
  for name in mup.RULES:
    for is_hyperball in (False, True):
      rates = mup.learning_rate_factors(ours.config, name, roles, is_hyperball)
      assert set(jax.tree.leaves(rates)) == {1.0}


def test_a_wider_model_is_born_as_table_8_has_it():
  narrow, wide = (paths.flatten_by_path(nn.meta.unbox(jax.jit(scaled(
      'gpt', width, tie_embeddings=False).init)(
          jax.random.key(0), models.random_tokens())['params']))
                  for width in (BASE, 4 * BASE))
  for name, want in {'decoder/layers/block_0/ffn/down': 0.5,
                     'head/kernel': 1.0}.items():
    assert np.std(wide[name]) / np.std(narrow[name]) == pytest.approx(
        want, rel=0.1), name


def test_factors_of_products_are_those_of_the_base():
  def factors(width, **changes):
    c = architectures.resolve(models.small_config(
        'gpt', d_model=width, embed_scale=0.0, logits_scale=0.0, **changes))
    return c.embed_scale, c.logits_scale, c.attention_scale
  base = factors(BASE)
  mup_fields = dict(parametrization='mup', mup_base_width=BASE)
  assert factors(4 * BASE, **mup_fields) == base
  assert base == pytest.approx((BASE ** 0.5, BASE ** -0.5, (BASE / 4) ** -0.5))
  assert factors(4 * BASE)[:2] == pytest.approx((2 * base[0], base[1] / 2))


# Every part of a decoder that has parameters of its own.
PARTS = dict(qk_norm=True, attention_sinks=True, logits_bias=True,
             attention_gate='headwise', value_residual=True,
             attention_exclusive='learned', learned_log_scale=True,
             forget_gate=True, dynamic_conv=2,
             value_embedding=True, attention_conv=3, branch_conv=3,
             position='relative', attention_bias=True, ffn_bias=True)


def _systems_and_parts():
  """Returns each system as it is, and systems with further parts. Those parts
  are the same in all systems of attention, so most of these are marked long."""
  cases = [(system, {}) for system in models.SYSTEMS_WITH_MUP]
  cases.append(('gpt', PARTS | dict(qk_norm_over='projection',
                                    attention_gate='elementwise')))
  cases += [('bert', dict(next_sentence=True)), ('t5', {})]
  cases += [('gpt', dict(residual=name)) for name in ('hyper', 'mhc')]
  if 'mamba2' in models.SYSTEMS_WITH_MUP:
    cases.append(('mamba2', dict(mamba2=dict(groups=2))))
  for system in models.SYSTEMS_WITH_MUP:
    marks = []
    if system not in ('gpt', 'mixtral'):
      marks.append(pytest.mark.long)
    if models.mixers_of(system) == {'attention'}:
      cases.append(pytest.param(system, PARTS, marks=marks))
  return cases


@pytest.mark.parametrize('system, parts', _systems_and_parts())
def test_rates_agree_with_the_shapes(system, parts):
  """Which axes are widths is seen by comparing two models, as the authors'
  package does; table 8 goes by how many of them a parameter has."""
  if system in ('gpt4', 'mixtral') and parts:
    parts = parts | dict(moe=dict(router='sigmoid', shared_experts=1,
                                  shared_gate=True))
  r = 4
  moe = parts.get('moe', {}) if parts else {}
  parts = {k: v for k, v in parts.items() if k != 'moe'}
  # A size is 0 where it follows from the width.
  given = models.small_config(system)
  def make(width):
    sizes = {field: given.deltanet[field] * width // BASE
             for field in ('key_dim', 'value_dim')}
    c = models.small_config(system, d_model=width, deltanet=sizes,
                            head_dim=given.head_dim * width // BASE,
                            d_ff=48 * width // BASE,
                            parametrization='mup', mup_base_width=BASE,
                            moe=dict(moe, d_ff=24 * width // BASE), **parts)
    return architectures.build(c)
  narrow, wide = make(BASE), make(BASE * r)
  small, large, roles = flat(narrow), flat(wide), parameter_roles(wide)
  trees = {}
  for name in mup.RULES:
    trees[name] = paths.flatten_by_path(
        mup.learning_rate_factors(wide.config, name, roles))
  for path, x in large.items():
    widths = [b // a for a, b in zip(small[path].shape, x.shape) if a != b]
    assert set(widths) <= {r} and len(widths) <= 2
    adam, sgd = {0: (1, 1), 1: (1, r), 2: (1 / r, 1)}[len(widths)]
    if path in ('head/bias', 'nsp_bias'):  # behind the multiplier of logits
      adam, sgd = r, r * r
    got = [trees[name][path] for name in ('adamw', 'lion', 'sgd')]
    assert got == [adam, adam, sgd], path


@pytest.mark.parametrize('system, parts', [
    ('mixtral', PARTS | dict(moe=dict(shared_experts=1, shared_gate=True))),
    ('bert', dict(next_sentence=True, tie_embeddings=False))])
def test_what_does_not_grow_with_the_width_is_divided_by_it(system, parts):
  """Of a model four times as wide as the base, which is the standard form with
  such products a quarter as large."""
  plain = architectures.build(models.small_config(system, **parts))
  ours = architectures.build(models.small_config(
      system, parametrization='mup', mup_base_width=BASE // 4,
      mup_base_head_dim=8, **parts))
  params = models.draw_parameters(nn.meta.unbox(abstract_params(plain)))
  wide = jax.tree.map(lambda role, x: 4 * x if role.kind == 'logits' else x,
                      parameter_roles(ours), params)
  tokens = models.random_tokens()
  def logits(module, params):
    output = jax.jit(lambda p: module.apply({'params': p}, tokens))(params)
    answers = output.extra.get('nsp_logits', np.zeros(1))
    return np.append(output.logits, answers)
  np.testing.assert_allclose(logits(plain, params), logits(ours, wide),
                             rtol=1e-4, atol=1e-4)


# Optimisers whose steps have equal singular values where the gradient has many;
# the steps of the others have a rank of 1 where the gradient has it.
FLAT = ('muon', 'normuon')


@pytest.mark.parametrize('name, is_hyperball', [
    *[(name, False) for name in sorted(mup.RULES.keys() - {'soap'})],
    *[(name, True) for name in ('adamw', 'lion', 'muon', 'normuon')]])
@pytest.mark.parametrize('shapes', [
    ('embed', 'mlp', 64, 64), ('mlp', 'embed', 96, 32), (None, 'embed', 8, 32)])
def test_a_step_has_the_spectral_norm_of_the_condition(
    name, is_hyperball, shapes):
  """|step|_2 follows sqrt(outputs / inputs) (arXiv 2310.17813, condition 1)."""
  inputs, outputs, num_inputs, num_outputs = shapes
  axes = inputs, outputs
  role = sharding.Role(axes=axes, inputs=(0,))
  if name == 'sgd' and inputs is None:
    pytest.skip('its gradient is not that of this model')
  optim = base.base().optim
  optim.update(name=name, lr=1e-4, warmup_steps=0, schedule='constant',
               weight_decay=0.0, clip_norm=0.0, hyperball=is_hyperball)
  config = dataclasses.replace(
      scaled('gpt', BASE).config, d_model=4 * BASE, head_dim=32)
  rng = np.random.default_rng(0)

  def norm_of_step(grown_inputs, grown_outputs, factor):
    shape = num_inputs * grown_inputs, num_outputs * grown_outputs
    if name in FLAT:
      grad = rng.normal(size=shape)
    else:
      grad = np.outer(*(rng.choice([-1.0, 1.0], size=n) for n in shape))
    # A backward pass sums over as many outputs more, each as much smaller.
    grad /= grown_outputs
    param = rng.normal(size=shape) * shape[0] ** -0.5
    tx = optimizers.make_optimizer(optim, 1, {'w': role}, {'w': factor})
    params = {'w': jax.numpy.asarray(param, 'float32')}
    step, _ = tx.update({'w': jax.numpy.asarray(grad)}, tx.init(params), params)
    return np.linalg.norm(step['w'], 2)

  factor = mup.learning_rate_factors(
      config, name, {'w': role}, is_hyperball)['w']
  grown = [4 if axis else 1 for axis in axes]
  narrow, wide = norm_of_step(1, 1, 1.0), norm_of_step(*grown, factor)
  assert wide / narrow == pytest.approx((grown[1] / grown[0]) ** 0.5, rel=0.1)


def deepened(**changes):
  """A model twice as wide and with three times as many layers as its base."""
  return scaled('gpt', 2 * BASE, num_layers=6, mup_base_depth=2, **changes)


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_a_step_has_the_epsilon_and_the_rate_of_the_depth(name):
  """CompleteP, arXiv 2505.01618, table 1: Adam's epsilon is divided by width
  and, in the layers, by depth; its rates do not know the depth. SGD's rates
  make up for gradients that fall with the depth."""
  module = deepened()
  optim = base.base().optim
  eps, lr, gradient = 1e-2, 0.1, 3e-3
  optim.update(name=name, lr=lr, warmup_steps=0, schedule='constant',
               weight_decay=0.0, clip_norm=0.0)
  if name == 'adamw':
    optim.eps = eps
  else:
    optim.momentum = 0.0
  tx = runs.build_optimizer(module, optim, 1)
  shapes = sharding.parameter_shapes(module)
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  grads = jax.tree.map(lambda x: gradient * x, params)
  steps, _ = tx.update(grads, tx.init(params), params)
  rates = paths.flatten_by_path(mup.learning_rate_factors(
      module.config, name, parameter_roles(module)))
  for path, step in paths.flatten_by_path(steps).items():
    depth = 3 if path.startswith('decoder/layers/') else 1
    want = gradient * depth
    if name == 'adamw':
      want = gradient / (gradient + eps / 2 / depth)
    np.testing.assert_allclose(step, -lr * rates[path] * want, rtol=1e-4,
                               err_msg=path)


def test_branches_are_divided_by_the_depth_and_not_born_smaller():
  deep, shallow = deepened(), scaled('gpt', 2 * BASE, num_layers=2)
  born = [jax.jit(module.init)(jax.random.key(0), models.random_tokens())
          for module in (deep, shallow)]
  deviations = [float(np.std(paths.flatten_by_path(nn.meta.unbox(x['params']))[
      'decoder/layers/block_0/ffn/down'])) for x in born]
  assert deviations[0] == pytest.approx(deviations[1], rel=0.1)
  # Layers that add a third each are layers of a model with that factor.
  plain = scaled('gpt', 2 * BASE, num_layers=6, residual_scale=1 / 3)
  params = nn.meta.unbox(born[0])
  logits = [jax.jit(module.apply)(params, models.random_tokens()).logits
            for module in (deep, plain)]
  np.testing.assert_allclose(*logits, rtol=1e-6)


@pytest.mark.parametrize('changes, word', [
    (dict(layer_scale=True), 'layer_scale is True, for which model.mup_base'),
    (dict(mtp_depth=1), 'mtp_depth is 1, for which model.mup_base_depth has'),
    (dict(block='post_norm'), 'no equation for model.mup_base_depth 2'),
    (dict(skips=True), 'skips is True, for which model.mup_base_depth')])
def test_what_has_no_rule_over_depth_is_refused(changes, word):
  with pytest.raises(ValueError, match=word):
    deepened(**changes)


@pytest.mark.parametrize('system, changes, word', [
    ('albert', dict(embed_dim=16), 'embed_dim is 16, a width of its own, for'),
    ('electra', dict(head='replaced'), 'generator has widths of its own, for'),
    ('t5', dict(num_layers=2, num_decoder_layers=4, mup_base_depth=2),
     'num_decoder_layers is 4, and model.mup_base_depth has a rule for stacks'),
    ('deepseek_v3', {}, "'latent', for whose ranks model.parametrization"),
    ('mamba', {}, 'which says nothing of its steps and states: choose')])
def test_a_model_without_rules_is_refused_with_the_part(system, changes, word):
  with pytest.raises(ValueError, match=word):
    scaled(system, **changes)


def test_an_optimizer_without_rules_is_refused(monkeypatch):
  c = base.base()
  c.model.update(parametrization='mup', mup_base_width=64)
  entry = optimizers.OPTIMIZERS['sgd']
  monkeypatch.setitem(optimizers.OPTIMIZERS, 'own', entry)
  c.optim.update(name='own')
  with pytest.raises(ValueError, match="'own': choose from adamw, ademamix"):
    preflight.check_config(c)
