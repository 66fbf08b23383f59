"""The coordinate check tells muP from the standard form."""


import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import archetype
import architectures
from tests.helpers import forked, models
from tools import coord_check
from training import runs

WIDTHS = [32, 128]


# With 3 seeds, a slope of 0.06 was once 0.154.
@pytest.fixture(scope='module', params=[
    system for system in models.SYSTEMS_WITH_MUP
    if models.mixers_of(system) == {'attention'}])
def rows(request):
  setting = coord_check.TrainingSetting('adamw', 2e-3, 8)
  return {name: coord_check.measure_growth(
      request.param, name, WIDTHS, [coord_check.NUM_LAYERS], setting, 6)
          for name in ('standard', 'mup')}


@pytest.mark.slow
@pytest.mark.long
def test_flat_in_mup_and_growing_in_the_standard_form(rows):
  words = {name: [coord_check.describe_slope(slope) for slope in row['slopes']]
           for name, row in rows.items()}
  assert rows['mup']['outputs'][:2] == ['block 0', 'block 1']
  # A small slope adds up over blocks; a pattern may want more than two.
  deeper = words['mup'][2:-1]
  assert set(words['mup'][:2] + words['mup'][-1:]) == {'flat'}, rows['mup'][
      'slopes']
  assert set(deeper) <= {'flat', 'unclear'}, rows['mup']['slopes']
  # A branch that ends in a norm adds no more at one width than at another.
  c = coord_check.config_at_width(rows['mup']['system'], 'mup', 32, 32,
                                  coord_check.TrainingSetting('adamw', 1.0, 1))
  ends_in_a_norm = c.model.block in ('sandwich', 'out_norm')
  grows = words['standard'][-1:] if ends_in_a_norm else words['standard']
  assert set(grows) == {'growing'}, rows['standard']['slopes']
  # At the base the two are one.
  np.testing.assert_allclose(rows['mup']['sizes'][0],
                             rows['standard']['sizes'][0], rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('optimizer, lr, hyperball, widths, depths', [
    ('muon', 3e-3, False, [64, 128, 256], [2]),
    ('adamw', 0.01, True, [32, 128], [2]), ('muon', 0.01, True, [32, 128], [2]),
    ('adamw', 1e-3, False, [32], [2, 4, 8]),
    ('muon', 3e-3, False, [32], [2, 4, 8]),
    ('sgd', 0.03, False, [32], [2, 4, 8])])
def test_optimizers_are_flat_over_width_and_depth(
    optimizer, lr, hyperball, widths, depths):
  setting = coord_check.TrainingSetting(optimizer, lr, 6, hyperball=hyperball)
  row = coord_check.measure_growth('gpt', 'mup', widths, depths, setting, 4)
  steepest = np.abs(row['slopes']).max()
  assert steepest <= coord_check.MAX_FLAT_SLOPE, row['slopes']


@pytest.mark.long
@pytest.mark.parametrize('optimizer, lr, what_grows', [
    ('muon', 0.01, 'alone'), ('adamw', 0.01, 'grain'),
    ('muon', 0.01, 'active'), ('muon', 0.01, 'grain')])
def test_optimizers_are_flat_over_experts(optimizer, lr, what_grows):
  setting = coord_check.TrainingSetting(
      optimizer, lr, 6, experts_grow=what_grows)
  row = coord_check.measure_growth(
      'gpt4', 'mup', [32], [2], setting, 1, experts=[4, 16])
  steepest = np.abs(row['slopes']).max()
  assert steepest <= coord_check.MAX_FLAT_SLOPE, row['slopes']


@pytest.mark.long
@pytest.mark.parametrize('system', ['bert', 'transformer'])
def test_encoders_and_encoder_decoders_are_flat(system):
  """Of every layer and the logits, after six steps on one batch, whose targets
  are the next bytes."""
  text_BL = np.frombuffer(coord_check.TEXT.encode(), np.uint8)[
      :4 * 33].reshape(4, 33).astype(np.int32)
  sizes = []
  for width in WIDTHS:
    setting = coord_check.TrainingSetting('adamw', 4e-3, 6)
    config = coord_check.config_at_width(system, 'mup', width, 32, setting)
    if system == 'transformer':
      config.model.num_decoder_layers = 2
    module = architectures.build(config.model)
    tx = runs.build_optimizer(module, config.optim, 6)

    def output(params, module=module, keep=False):
      return module.apply({'params': params}, text_BL[:, :-1], keep_layers=keep)

    def loss(params, output=output):
      log_p = jax.nn.log_softmax(output(params).logits)
      return -jnp.take_along_axis(log_p, text_BL[:, 1:, None], -1).mean()

    def train(key, module=module, tx=tx, config=config, output=output,
              loss=loss):
      def step(state, _):
        params, opt_state = state
        updates, opt_state = tx.update(
            jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None
      first = runs.init_state(module, tx, key=key, optim=config.optim)
      (params, _), _ = jax.lax.scan(
          step, (first.params, first.opt_state), length=6)
      after = output(params, keep=True)
      layers = jnp.stack([*after.aux['layers']])
      return jnp.append(jnp.abs(layers).mean((1, 2, 3)),
                        jnp.abs(after.logits).mean())

    keys = jax.random.split(jax.random.key(1), 2)
    sizes.append(jax.jit(lambda keys, train=train: jax.vmap(train)(
        keys).mean(0))(keys))
  slopes = np.log2(np.divide(*reversed(sizes))) / np.log2(
      WIDTHS[1] / WIDTHS[0])
  assert np.abs(slopes).max() <= coord_check.MAX_FLAT_SLOPE, slopes


def test_the_outputs_of_all_blocks_and_no_other_are_measured():
  config = coord_check.config_at_width(
      'gpt', 'standard', 32, 32, coord_check.TrainingSetting('adamw', 1e-3, 1))
  before, after = coord_check.mean_sizes_of_outputs(config, steps=1, seeds=1)
  module = architectures.build(config.model)
  tx = runs.build_optimizer(module, config.optim, 1)
  state = jax.jit(lambda key: runs.init_state(
      module, tx, key=key, optim=config.optim))(
          jax.random.split(jax.random.key(1), 1)[0])
  length = coord_check.LENGTH
  tokens_BL = np.frombuffer(coord_check.TEXT.encode(), np.uint8)[
      :coord_check.BATCH * (length + 1)].reshape(-1, length + 1)[:, :-1]
  states = np.asarray(archetype.Model(module, state.params).hidden_states(
      tokens_BL.astype(np.int32)))
  np.testing.assert_allclose(before[:-1], np.abs(states[1:]).mean((1, 2, 3)),
                             rtol=1e-5)
  assert (before != after).all()


@pytest.mark.parametrize('flag, word', [
    ('--widths=16,a', '--widths is 16,a: give two numbers or more, each'),
    ('--depths=2', '--depths is 2: give two numbers or more, each once'),
    ('--depths=2,4', '256,512: give one number, beside several of --depths'),
    ('--experts=4,6', '--experts has 6 and begins with 4: choose multiples'),
    ('--experts=4,8', 'one number, beside several of --depths or --experts'),
    ('--systems=gpt,deepseek_v2', "'latent', for whose ranks"),
])
def test_a_wrong_request_is_one_sentence(flag, word):
  result = forked.run('-m', 'tools.coord_check', flag)
  assert result.returncode == 2 and word in result.stderr
