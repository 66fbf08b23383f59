"""What leaves for models of other frameworks, and what comes back of them."""

import json
import sys

import numpy as np
import pytest

from common.errors import RequestError
from configs import base
from tests.helpers import sweep_folder, study_folder
from tools import batches
from tools.compare import comparison, report, tables
from training.data import tokenizers
from training.objectives import pipeline
from training.workdir import run_config

SEEDS = (0, 1, 2)


def test_the_batches_are_those_of_the_run(tmp_path, monkeypatch):
  (tmp_path / 'a.txt').write_text('All the words of a text. ' * 99)
  config = base.base()
  config.data.update(source=f'text:{tmp_path}/a.txt', length=16, batch_size=2,
                     cache_dir=str(tmp_path), document_mask=True)
  config.train.steps, config.eval.batches = 5, 2
  run_config.save_config(tmp_path / 'run', config, {'model.vocab_size': 384})
  monkeypatch.setattr(batches, 'STEPS', 3)
  monkeypatch.setattr(sys, 'argv', ['batches', str(tmp_path / 'run'),
                                    f'--out={tmp_path / "out"}'])
  assert batches.main() == 0
  folder, tokenizer = tmp_path / 'out/run', tokenizers.load('bytes')
  train = pipeline.make_training_loader(config, tokenizer)
  for first, steps in ((0, 3), (3, 2)):
    arrays = np.load(folder / f'train-{first}.npz')
    assert set(arrays) == set(train.batch(0)) >= {
        'tokens', 'targets', 'weights', 'segment_ids', 'positions'}
    for name in arrays:
      assert len(arrays[name]) == steps
      np.testing.assert_array_equal(
          arrays[name][-1], train.batch(first + steps - 1)[name])
  assert np.load(folder / 'held_out-0.npz')['tokens'].shape == (2, 2, 16)
  about = json.loads((folder / 'about.json').read_text())
  assert (about['vocab_size'], about['steps']) == (384, 5)


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sweep')
  sweep_folder.write(folder, sweep_folder.POINTS[:2])
  return folder


def _rows(folder, *lines, head='variant,seed,loss'):
  file = folder / 'losses.csv'
  file.write_text('\n'.join([head, *lines, '']))
  return str(file)


def test_a_variant_of_a_csv_is_paired_with_the_base(sweep, tmp_path):
  finals = comparison.load_comparison(sweep).values(
      'confirm', 'base', '', comparison.load_comparison(sweep).plan.primary)
  file = _rows(tmp_path, *(f'gru,{seed},{step},{loss}' for seed in SEEDS
                           for step, loss in ((100, 9.0), (
                               sweep_folder.STEPS,
                               finals[seed] + 0.3 + 0.001 * seed))),
               head='variant,seed,step,loss')
  c = comparison.load_comparison(sweep, file)
  row = next(row for row in c.verdicts() if row['variant'] == 'gru')
  assert row['effect'] == pytest.approx(0.301) and row['n'] == 3
  assert row['verdict'] == 'worse'
  costs = next(row for row in tables.cost_table(c).rows
               if row['variant'].text == 'gru')
  assert costs['parameters'].text == 'n/a'
  assert 'NaN' not in json.dumps(report.report_as_json(c)['points'])
  assert any(path.suffix == '.svg' for path in report.write_report(c))


@pytest.mark.parametrize('lines, sentence', [
    (['base,0,1.0'], "a variant of the name 'base'"),
    (['gru,0,high'], 'gru/seed-0 has no seed or no loss'),
    (['gru,,1.0'], 'gru has no seed or no loss'),
    (['gru,0,1.0', 'gru,0,2.0'], 'or has them twice'),
    (['gru,x,1.0'], 'cannot be read')])
def test_rows_that_are_none_are_refused(sweep, tmp_path, lines, sentence):
  with pytest.raises(RequestError, match=sentence):
    comparison.load_comparison(sweep, _rows(tmp_path, *lines))
  with pytest.raises(RequestError, match='has no runs that are known'):
    comparison.load_comparison(
        sweep, _rows(tmp_path, 'gru,1', head='variant,loss'))


def test_a_study_takes_no_rows(tmp_path):
  study_folder.write(tmp_path, study_folder.plan())
  with pytest.raises(RequestError, match='--rows is of a sweep'):
    comparison.load_comparison(tmp_path, 'losses.csv')
