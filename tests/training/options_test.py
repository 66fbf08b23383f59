"""Fields that few runs set, read back where they take effect: each case gives
fields other values than their defaults, and compares with what these mean."""

from unittest import mock

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from architectures.parts.heads import Head
from architectures.parts.sharding import Role
from architectures.parts.skeletons import Output
from configs import base
from tests.helpers import data_files as files
from training import objectives
from training.objectives import causal, pipeline
from training.optim import matrices, optimizers, soap

MATRIX = Role(('embed', 'mlp'), (0,))
VECTOR = Role(('embed',))

# The optimiser.

# The fields that each optimiser reads, all with other values than the defaults.
ADAM = {'b1': 0.6, 'b2': 0.7, 'eps': 0.5}
FIELDS = {
    'adamw': ADAM,
    'ademamix': ADAM | {'b3': 0.8, 'alpha': 3.0},
    'lion': {'b1': 0.6, 'b2': 0.3},
    'muon': ADAM | {'momentum': 0.5},
    'normuon': ADAM | {'momentum': 0.5},
    'soap': ADAM | {'precondition_every': 1, 'precondition_max': 4},
    'sgd': {'momentum': 0.5}}
# The same numbers by the arguments of the directions, which other tests compare
# with the equations and with published code.
ADAM_DIRECTION = optax.scale_by_adam(b1=0.6, b2=0.7, eps=0.5)
DIRECTIONS = {
    'adamw': ADAM_DIRECTION,
    'ademamix': optax.contrib.scale_by_ademamix(
        b1=0.6, b2=0.7, b3=0.8, alpha=3.0, eps=0.5),
    'lion': optax.scale_by_lion(b1=0.6, b2=0.3),
    'muon': matrices.scale_by_muon({'x': MATRIX}, beta=0.5),
    'normuon': matrices.scale_by_normuon({'x': MATRIX}, beta=0.5, b2=0.7),
    'soap': soap.scale_by_soap(
        {'x': MATRIX}, b1=0.6, b2=0.7, eps=0.5, basis_every=1, max_side=4),
    'sgd': optax.trace(0.5)}
TRAINED_APART = ('muon', 'normuon', 'soap')  # their vectors are Adam's


def _optim(**fields):
  """Returns config.optim of an optimiser whose rate is 0.1 at every step."""
  config = base.base().optim
  config.update(dict(lr=0.1, warmup_steps=0, schedule='constant', clip_norm=0.0,
                     weight_decay=0.0) | fields)
  optimizers.check_optim(config)
  return config


def _steps(transformation, gradients):
  """Returns the updates of a transformation, one for each gradient."""
  state = transformation.init(gradients[0])
  steps = []
  for gradient in gradients:
    step, state = transformation.update(gradient, state, gradients[0])
    steps.append(step)
  return steps


def test_every_field_of_an_optimizer_has_a_case_below():
  reads = {name: {*entry.reads} for name, entry in optimizers.OPTIMIZERS.items()
           if entry.reads}
  assert reads == {name: {*fields} for name, fields in FIELDS.items()}


@pytest.mark.parametrize('name', FIELDS)
def test_an_optimizer_has_the_numbers_of_its_config(name):
  """For a matrix of two unlike sides and a vector, by four gradients."""
  random = np.random.default_rng(0)
  gradients = {
      'matrix': jnp.float32(random.normal(size=(4, 5, 3))),
      'vector': jnp.float32(random.normal(size=(4, 3)))}
  roles = {'matrix': MATRIX, 'vector': VECTOR}
  transformation = optimizers.make_optimizer(
      _optim(name=name, **FIELDS[name]), 10, roles)
  steps = _steps(transformation, [
      {key: values[i] for key, values in gradients.items()} for i in range(4)])
  for key, values in gradients.items():
    direction = DIRECTIONS[name]
    if key == 'vector' and name in TRAINED_APART:
      direction = ADAM_DIRECTION
    wanted = _steps(direction, [{'x': value} for value in values])
    for step, other in zip(steps, wanted):
      np.testing.assert_allclose(step[key], -0.1 * other['x'], rtol=1e-5,
                                 atol=1e-7, err_msg=key)


def test_the_first_pattern_that_matches_says_whether_a_parameter_decays():
  optim = _optim(
      name='sgd', momentum=0.0, weight_decay=0.5,
      decay_mask=(('.*/bias', 1), ('first/.*', 0), ('.*', 1)))
  roles = {layer: {'kernel': MATRIX, 'bias': VECTOR}
           for layer in ('first', 'second')}
  shapes = {'kernel': (2, 2), 'bias': (2,)}
  params = {layer: {key: jnp.ones(shape) for key, shape in shapes.items()}
            for layer in roles}
  transformation = optimizers.make_optimizer(optim, 10, roles)
  updates, _ = transformation.update(
      jax.tree.map(jnp.zeros_like, params), transformation.init(params), params)
  largest = jax.tree.map(lambda x: round(float(abs(x).max()), 6), updates)
  assert largest == {'first': {'kernel': 0, 'bias': 0.05},
                     'second': {'kernel': 0.05, 'bias': 0.05}}


# The loss.


def _loss_config():
  """Returns a config with all terms of the loss of tokens."""
  config = base.base()
  config.train.update(z_loss=0.1, label_smoothing=0.2)
  config.model.loops.exit_entropy = 0.3
  return config


def _tokens():
  """Returns three logits for each of two passes, two rows and four places, and
  a batch of their targets and weights."""
  random = np.random.default_rng(0)
  logits_TBLV = 2 * random.normal(size=(2, 2, 4, 3))
  batch = {'targets': random.integers(0, 3, (2, 4)),
           'weights': np.array([[1, 1, 0.5, 0], [0, 1, 1, 1]])}
  return logits_TBLV, {key: jnp.asarray(x) for key, x in batch.items()}


def _token_losses(logits, targets):
  """Returns log Z - q l + 0.1 (log Z)^2 by its definition, where 0.2 of the
  targets q is spread over three tokens."""
  log_z = np.log(np.exp(logits).sum(-1))
  q = 0.8 * np.eye(3)[targets] + 0.2 / 3
  return log_z - (q * logits).sum(-1) + 0.1 * log_z ** 2


def test_the_loss_of_tokens_has_the_terms_of_the_config():
  logits_TBLV, batch = _tokens()
  logits = logits_TBLV[0]
  output = Output(hidden=jnp.float32(logits), head=Head(jnp.eye(3)))
  figures = objectives.token_loss_figures(output, batch, _loss_config())
  weights = np.asarray(batch['weights'])
  losses = _token_losses(logits, np.asarray(batch['targets']))
  assert figures['loss'].total == pytest.approx((weights * losses).sum())
  assert figures['loss'].weight == weights.sum()
  log_z = np.log(np.exp(logits).sum(-1))
  assert figures['z_loss'].total == pytest.approx(
      (weights * 0.1 * log_z ** 2).sum())


def test_the_loss_of_exits_has_the_terms_of_the_config():
  """The loss of each pass by the probability of leaving after it, and minus
  0.3 times the entropy of these (Ouro: Zhu et al. 2025, section 3)."""
  logits_TBLV, batch = _tokens()
  first_BL = np.linspace(0.1, 0.8, 8).reshape(2, 4)
  p_TBL = np.stack([first_BL, 1 - first_BL])
  output = Output(
      hidden=jnp.float32(logits_TBLV[-1]), head=Head(jnp.eye(3)),
      extra={'exits': (jnp.float32(logits_TBLV), jnp.float32(np.log(p_TBL)))})
  figures = objectives.token_loss_figures(output, batch, _loss_config())
  weights = np.asarray(batch['weights'])
  losses_TBL = _token_losses(logits_TBLV, np.asarray(batch['targets']))
  entropy = -(p_TBL * np.log(p_TBL)).sum(0)
  wanted = (p_TBL * losses_TBL).sum(0) - 0.3 * entropy
  assert figures['loss'].total == pytest.approx((weights * wanted).sum())
  passes = p_TBL[0] + 2 * p_TBL[1]
  assert figures['exit_pass'].total == pytest.approx((weights * passes).sum())


# The rows of batches.


@pytest.mark.parametrize('objective, arch, num_special', [
    ('mlm', 'bert', 2), ('mlm_nsp', 'bert', 3), ('mlm_sop', 'albert', 3),
    ('replaced_tokens', 'electra', 2)])
def test_as_many_tokens_are_masked_as_the_rate_says(
    objective, arch, num_special, tmp_path, monkeypatch):
  """Of a full row of 33 tokens, but for the special ones."""
  texts = files.write_texts_of_letters(tmp_path, monkeypatch)
  config = files.make_run_config(texts, objective, length=33, arch=arch,
                                 mask_rate=0.5)
  batch = pipeline.make_training_loader(config, files.BYTES).batch(0)
  sizes = (batch['segment_ids'] != 0).sum(1)
  assert (sizes == 33).all()
  assert batch['weights'].sum(1).tolist() == [
      round(0.5 * (33 - num_special))] * 4


@pytest.mark.parametrize('mean', [2.0, 12.0])
def test_the_spans_of_denoising_have_the_mean_length(mean):
  """Spans of Poisson's lengths are drawn until they have the 32 tokens that are
  cut out of 64. These are 32 / mean + 1 / 2 spans in the mean, as the last one
  goes mean / 2 tokens too far, with a deviation of sqrt(32) / mean."""
  config = files.make_run_config('', 'denoising', length=65, arch='bart')
  config.span.update(noise_density=0.5, mean_length=mean)
  window = causal.Window(np.arange(65, dtype=np.int32), 64)
  numbers = []
  for seed in range(200):
    row = files.make_batch_row(
        objectives.OBJECTIVES['denoising'], window,
        np.random.default_rng(seed), config, files.BYTES)
    numbers.append((row['tokens'] == files.BYTES.mask_id).sum())
  deviation_of_mean = 32 ** 0.5 / mean / 200 ** 0.5
  assert np.mean(numbers) == pytest.approx(32 / mean + 0.5,
                                           abs=4 * deviation_of_mean)


@pytest.mark.parametrize('threads, prepared', [
    (1, pipeline.NUM_PREPARED_BATCHES), (9, 9)])
def test_any_number_of_threads_makes_the_same_batches(
    threads, prepared, tmp_path, monkeypatch):
  texts = files.write_texts_of_letters(tmp_path, monkeypatch)
  config = files.make_run_config(texts, 'causal', length=16, threads=threads)
  loader = pipeline.make_training_loader(config, files.BYTES)
  options = mock.Mock(wraps=grain.ReadOptions)
  monkeypatch.setattr(grain, 'ReadOptions', options)
  batches = list(loader.iterate(3, 15))
  options.assert_called_once_with(num_threads=threads,
                                  prefetch_buffer_size=prepared)
  assert len(batches) == 12
  for n, batch in enumerate(batches, 3):
    np.testing.assert_array_equal(batch['tokens'], loader.batch(n)['tokens'])


def test_the_halves_of_held_out_records_are_taken_in_turn(tmp_path):
  """Every second of twelve records is held out, and the halves have the first,
  third and fifth of these, and the others."""
  lines = [f'text {i}\t{i // 2 % 2}\n' for i in range(12)]
  (tmp_path / 'a.tsv').write_text(''.join(lines))
  config = files.make_run_config(
      f'labelled:{tmp_path}/a.tsv', 'classification', arch='bert',
      holdout_every=2)
  held_out = {}
  for part in ('', 'first', 'second'):
    config.eval.part = part
    loader, = pipeline.make_evaluation_loaders(config, files.BYTES)
    view, = loader.views
    held_out[part] = [record.texts for record in view.records]
  assert held_out[''] == [(f'text {i}',) for i in range(0, 12, 2)]
  assert held_out['first'] == held_out[''][::2]
  assert held_out['second'] == held_out[''][1::2]
