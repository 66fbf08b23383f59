"""eval.py --tasks=probe: intervals, what is measured, and the counts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gpt
from training import evals, runs
from training.data import probes, tokenizers
from training.evals.tasks import probe as probe_task
from training.evals.task import Evaluation


def test_levels_of_training_then_longer_rows():
  settings = probes.Settings(41, tuple(range(1, 21)), 16, 100, 100)
  found = list(probe_task.cells(settings, grows=True))
  assert [cell.level for cell in found] == [1, 5, 9, 12, 16, 20, 40, 80]
  assert [cell.length for cell in found][-3:] == [41, 82, 164]
  fixed = list(probe_task.cells(settings._replace(levels=(3,)), grows=False))
  assert [tuple(cell) for cell in fixed] == [
      (3, 41, 1), (3, 82, 2), (3, 164, 4)]
  alone = probe_task.cells(settings, grows=False, longer=False)
  assert [cell.beyond for cell in alone] == [1] * 6


def _config(name, length=24, **fields):
  config = gpt.get_config('tiny').copy_and_resolve_references()
  config.objective, config.data.source = 'probe', f'probe:{name}'
  config.data.length = length
  config.probe.update(fields)
  return config


def test_a_constant_answer_is_not_chosen_on_what_it_is_scored_on():
  """Of 60 answers that are alike, one stands in 2.1 % of these rows."""
  config = _config('a5', levels=(1,))
  rows = probes.Rows(probes.of(config), probes.settings(config)._replace(
      held_out=probe_task.CONSTANT_ROWS), 'eval', 0)
  counts = np.bincount([row.targets[row.asked][0] for row in rows])
  assert counts.max() / probe_task.CONSTANT_ROWS > 1 / 60 + 0.003
  assert probe_task.constant(config) == pytest.approx(1 / 60, abs=0.003)


def test_counts_are_those_of_numpy():
  """A model whose answer is the token itself, or 0 at every third place."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 5, (6, 9))
  asked = rng.random((6, 9)) < 0.4
  asked[5] = False  # padding
  targets = np.where(rng.random((6, 9)) < 0.8, tokens, (tokens + 1) % 5)
  answers = np.where(np.arange(9) % 3 == 0, 0, tokens)

  class Own:
    def apply(self, module, params, batch):
      hidden = jax.nn.one_hot(jnp.asarray(answers), 5)
      from architectures.parts import heads
      return types.SimpleNamespace(
          hidden=hidden, head=heads.Head(jnp.eye(5)))

  found = probe_task._counts(None, Own())({}, dict(
      tokens=tokens, targets=jnp.asarray(targets),
      weights=jnp.asarray(asked, jnp.float32)))
  right = (answers == targets)
  rows = asked.any(1)
  assert found.tolist() == [
      (right & asked).sum(), asked.sum(),
      sum(right[i][asked[i]].all() for i in np.flatnonzero(rows)), rows.sum(),
      (asked.sum(1) ** 2).sum()]


@pytest.fixture(scope='module')
def evaluation(tmp_path_factory):
  config = gpt.get_config('tiny')
  config.update_from_flattened_dict({
      'objective': 'probe', 'data.source': 'probe:parity', 'data.length': 9,
      'probe.levels': (4, 8), 'data.batch_size': 16, 'model.num_layers': 1,
      'model.d_model': 16, 'model.position': 'none', 'model.d_ff': 16})
  tokenizer = tokenizers.load('bytes')
  model, _ = runs.resolve(config, tokenizer)
  run = runs.build(config, model)
  with run.context():
    yield Evaluation(run, run.new_state().params, 0, tokenizer,
                     evals.defaults(), tmp_path_factory.mktemp('run'), {})


@pytest.mark.slow  # it compiles a model
def test_figures_of_a_run_add_up(evaluation, capsys):
  evaluation.options.probe_rows = 40
  with evaluation.run.context():
    found = evals.run('probe', evaluation)
  assert [(row['level'], row['length'], row['answers'], row['rows'])
          for row in found['table']] == [
      (4, 9, 160, 40), (8, 9, 320, 40), (16, 18, 640, 40), (32, 36, 1280, 40)]
  assert set(found['level']) == {'4', '8'} and set(found['beyond']) == {
      '2x', '4x'}
  assert found['accuracy'] == np.mean(list(found['level'].values()))
  assert all(row['accuracy_95'][0] <= row['accuracy'] <= row['accuracy_95'][1]
             for row in found['table'])
  assert 'whether the ones so far are odd' in capsys.readouterr().out
