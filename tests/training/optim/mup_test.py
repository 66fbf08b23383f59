"""muP: the standard form at the base, and by shape the rules at every width."""


from configs import base
import flax.linen as nn
import jax
import numpy as np
import pytest

import architectures
from tests.helpers import models
from training import preflight
from architectures.parts import paths
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
    ('mixtral',), ('gpt', 'mixtral')))
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
  for name in mup.FACTOR_OF_OPTIMIZER:
    rates = mup.learning_rate_factors(ours.config, name, roles)
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


@pytest.mark.parametrize('system, parts', [
    (system, parts) for system in models.SYSTEMS_WITH_MUP for parts in (
        dict(), *[PARTS] * (models.mixers_of(system) == {'attention'}),
        *[PARTS | dict(qk_norm_over='projection',
                       attention_gate='elementwise')] * (system == 'gpt'),
        *[dict(mamba2=dict(groups=2))] * (system == 'mamba2'))])
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
  for name in mup.FACTOR_OF_OPTIMIZER:
    trees[name] = paths.flatten_by_path(
        mup.learning_rate_factors(wide.config, name, roles))
  for path, x in large.items():
    widths = [b // a for a, b in zip(small[path].shape, x.shape) if a != b]
    assert set(widths) <= {r} and len(widths) <= 2
    adam, sgd = {0: (1, 1), 1: (1, r), 2: (1 / r, 1)}[len(widths)]
    if path == 'head/bias':  # behind the multiplier of the logits
      adam, sgd = r, r * r
    got = [trees[name][path] for name in ('adamw', 'lion', 'sgd')]
    assert got == [adam, adam, sgd], path


def test_what_does_not_grow_with_the_width_is_divided_by_it():
  """Of a model four times as wide as the base, which is the standard form with
  such products a quarter as large."""
  parts = PARTS | dict(moe=dict(shared_experts=1, shared_gate=True))
  plain = architectures.build(models.small_config('mixtral', **parts))
  ours = architectures.build(models.small_config(
      'mixtral', parametrization='mup', mup_base_width=BASE // 4,
      mup_base_head_dim=8, **parts))
  params = models.draw_parameters(nn.meta.unbox(abstract_params(plain)))
  wide = jax.tree.map(lambda role, x: 4 * x if role.kind == 'logits' else x,
                      parameter_roles(ours), params)
  tokens = models.random_tokens()
  def logits(module, params):
    return jax.jit(lambda p: module.apply({'params': p}, tokens).logits)(params)
  np.testing.assert_allclose(logits(plain, params), logits(ours, wide),
                             rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', sorted(
    optimizers.OPTIMIZERS.keys() - mup.FACTOR_OF_OPTIMIZER.keys()))
def test_an_optimizer_without_rules_is_refused(name):
  c = base.base()
  c.model.update(parametrization='mup', mup_base_width=64)
  c.optim.name = name
  with pytest.raises(ValueError, match=f"'{name}': choose from adamw, lion"):
    preflight.check_config(c)
