"""Low-rank adapters: x W + (alpha / rank) x A B, by NumPy; everything else is
frozen; merged, they are the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import linear
from configs import sharding as tables
from configs.errors import RequestError
from tests.helpers import models
from tests.training import step_test
from architectures.parts import paths
from training.hf import weights
from training.costs import flops, totals
from training.optim import mup
from training.runs import make_train_step, parameter_roles

RANK = 3
ALL = dict(rank=RANK, alpha=6.0, targets=linear.ALL)


def logits(module, params, tokens_BL, **kwargs):
  if architectures.stack(module.config) == 'encoder-decoder':
    kwargs['decoder_tokens_BL'] = tokens_BL[:, ::-1]
  return models.logits(module, params, tokens_BL, **kwargs)


@pytest.fixture(scope='module')
def made():
  """(module, params) with an adapter of every product, B off zero."""
  return models.make('llama', lora=ALL, attention_gate='headwise')


@pytest.mark.slow
def test_merged_by_numpy_it_is_the_same_function(made):
  """W + 2 A B of each adapted weight, in float64, in the model without."""
  module, params = made
  flat = {path: np.asarray(x, np.float64)
          for path, x in paths.flatten(params).items()}
  adapted = [path.removesuffix('_lora_a') for path in flat
             if path.endswith('_lora_a')]
  assert {path.split('/')[-1] for path in adapted} == {
      'query', 'key', 'value', 'out', 'output_gate', 'up', 'gate', 'down'}
  for path in adapted:
    a, b = flat.pop(f'{path}_lora_a'), flat.pop(f'{path}_lora_b')
    assert a.shape[-1] == b.shape[1] == RANK
    for layer, w in enumerate(flat[path]):
      w += 2 * np.tensordot(a[layer], b[layer], 1)
  plain = architectures.build(weights.without_adapters(module.config))
  merged = jax.tree_util.tree_map_with_path(
      lambda key, _: jnp.asarray(flat[paths.join(key)], jnp.float32),
      weights.without(params))
  tokens_BL = models.tokens()
  with_adapters = logits(module, params, tokens_BL)
  models.close(with_adapters, logits(plain, merged, tokens_BL), rtol=2e-5)
  # As far away as the adapters are, and `merge` gives what NumPy gives.
  without = logits(plain, weights.without(params), tokens_BL)
  assert np.abs(without - with_adapters).max() > 0.1
  also, params = weights.merge(module, params)
  assert also == plain
  models.close(merged, params, rtol=1e-6)


def test_a_new_adapter_changes_nothing_and_is_drawn_as_by_its_authors():
  module = architectures.build(models.config(lora=ALL))
  params = jax.tree.map(
      lambda x: x.value, jax.jit(module.init)(
          jax.random.key(0), models.tokens())['params'],
      is_leaf=lambda x: hasattr(x, 'value'))
  flat = paths.flatten(params)
  assert not any(x.any() for path, x in flat.items() if path.endswith('_b'))
  for name, fan_in in (('attention/query', 32), ('attention/out', 32),
                       ('ffn/down', 48)):
    a = flat[f'decoder/layers/block_0/{name}_lora_a']
    assert 0.95 < np.abs(a).max() * fan_in ** 0.5 <= 1, name
    assert np.std(a) * fan_in ** 0.5 == pytest.approx(3 ** -0.5, rel=0.1)
  plain = architectures.build(weights.without_adapters(module.config))
  np.testing.assert_array_equal(
      models.logits(module, params, models.tokens()),
      models.logits(plain, weights.without(params), models.tokens()))


def lora_run(mesh=None, **changes):
  c = step_test.config(model__lora=ALL, optim__name='adamw', **changes)
  return step_test.train(c, mesh or step_test.one_device())


@pytest.fixture(scope='module')
def trained():
  return lora_run()


def test_a_step_changes_the_adapters_alone(trained):
  run, state, _ = trained
  before = paths.flatten(jax.device_get(run.new_state().params))
  for path, x in paths.flatten(state.params).items():
    assert np.array_equal(x, before[path]) != weights.is_adapter(path), path
  sizes = {path: x.size for path, x in before.items()
           if weights.is_adapter(path)}
  # Adam's two moments of the adapters, a counter each of Adam and the rate.
  assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == (
      2 * sum(sizes.values()) + 2)
  figures = totals.count(run.config, model=run.model)
  assert figures['trained_parameters'] == sum(sizes.values())
  assert figures['optimizer_bytes'] == 4 * (2 * sum(sizes.values()) + 2)


@pytest.mark.slow
def test_sharded_equals_a_single_device(trained):
  c = step_test.config(model__lora=ALL, optim__name='adamw')
  c.mesh.update(tables.PRESETS['fsdp_tp'])
  _, state, seen = step_test.train(c)
  models.close(trained[1].params, state.params, rtol=2e-3)  # Adam's rounding
  models.close(trained[2], seen, rtol=1e-4)


def test_no_gradient_of_a_frozen_weight_is_computed(trained):
  """The FLOPs of the step's program: forward, and in the backward pass twice
  the adapters and attention, but once the frozen products."""
  run = trained[0]
  with run.context():
    program = jax.make_jaxpr(make_train_step(run.module, run.tx, run.config))(
        run.abstract, {k: jnp.asarray(v) for k, v in step_test.batch().items()})
  work = flops.count(program, flops.Place('cpu'))
  tokens = step_test.BATCH * step_test.LENGTH
  whole = tokens * flops.training_flops_per_token(run.model, step_test.LENGTH)
  forward = flops.forward_flops(run.model, step_test.LENGTH)
  assert 3 * step_test.BATCH * sum(forward.values()) > 1.3 * whole
  # Attention multiplies masked pairs too, and no gradient goes below the first
  # layer's adapters.
  assert work.flops == pytest.approx(whole, rel=0.12)


def test_mup_has_rates_for_the_adapters():
  """B's inputs and A's outputs are no width (Hayou et al. 2024, LoRA+: at
  large width B learns at a rate of its own, 1, and A at 1 / width)."""
  module, _ = models.make(lora=ALL, parametrization='mup', mup_base_width=16,
                          d_ff=96)
  rates = paths.flatten(mup.rates(module.config, 'adamw',
                                  parameter_roles(module)))
  layer = 'decoder/layers/block_0/attention/query'
  assert rates[layer] == rates[f'{layer}_lora_a'] == 0.5
  assert rates[f'{layer}_lora_b'] == 1


def test_dropout_is_of_what_an_adapter_is_given():
  module, params = models.make(lora=dict(ALL, dropout=1 - 1e-7))
  tokens = models.tokens()
  key = dict(deterministic=False, rngs={'dropout': jax.random.key(0)})
  plain = architectures.build(weights.without_adapters(module.config))
  np.testing.assert_allclose(
      models.logits(module, params, tokens, **key),
      models.logits(plain, weights.without(params), tokens), rtol=1e-5,
      atol=1e-5)


@pytest.mark.parametrize('system, targets, words', [
    ('gpt', 'query,gate', "has 'gate', a product that no layer of this model"),
    ('mixtral', 'up', "has 'up', a product that no layer .* query, key, value, "
     'out, all-linear'),
    ('gpt', 'q_proj', "unknown model.lora.targets 'q_proj'")])
def test_a_target_that_no_layer_has_is_refused(system, targets, words):
  with pytest.raises(RequestError, match=words):
    models.make(system, lora=dict(rank=2, targets=targets))
