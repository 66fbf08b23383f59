"""eval.py --tasks=labels of words and of questions: each row by itself,
whatever the batch, and the files of predictions."""

import json

import jax
import numpy as np
import pytest

from tests.helpers import evaluations
from tests.helpers import labelled_files as files
from training import objectives
from training.objectives import pipeline
from training.evals.tasks import labels

pytest.importorskip('seqeval')
KINDS = ('token_classification', 'question_answering')


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  folder = tmp_path_factory.mktemp('labels')
  return {'token_classification': f'conll:{files.conll(folder / "a.conll")}',
          'question_answering': f'squad:{files.squad(folder / "a.json")}'}


def _evaluation(sources, objective, **options):
  config = evaluations.config('bert', objective, max_len=64, num_layers=1)
  config.data.update(source=sources[objective], length=64,
                     eval_source=sources[objective])
  return evaluations.make(objectives.with_labels(config), **options)


@pytest.mark.parametrize('objective', KINDS)
def test_scores_are_those_of_each_row_alone(objective, sources):
  """Which are scored here one by one, in rows of the full length."""
  evaluation = _evaluation(sources, objective)
  config = evaluation.run.config
  loader, = pipeline.held_out(config, evaluation.tokenizer, in_order=True)
  view, = loader.views
  with evaluation.run.context():
    found = labels.scores(evaluation, loader)
  record = objectives.of(config)
  apply = jax.jit(lambda batch: record.apply(
      evaluation.run.module, evaluation.params, batch).extra['scores'])
  assert len(found) == len(view) > config.data.batch_size
  for item, own in zip(view.items, found):
    row = files.row(record, item, None, config, evaluation.tokenizer)
    expected = apply({key: np.asarray(x)[None] for key, x in row.items()})[0]
    size = record.length(item)
    np.testing.assert_allclose(own[:size], expected[:size], atol=1e-5)


def test_entities_are_measured_and_written(sources, tmp_path, capsys):
  out = tmp_path / 'out.conll'
  found = evaluations.run('labels', _evaluation(
      sources, 'token_classification', predictions=str(out)))
  assert {'f1', 'strict_f1', 'accuracy', 'types'} <= found.keys()
  rows = [line.split(' ') for line in out.read_text().splitlines() if line]
  source = open(sources['token_classification'].partition(':')[2]).read()
  assert [row[:2] for row in rows] == [
      line.split('\t') for line in source.splitlines() if line]
  right = sum(a == b for _, a, b in rows) / len(rows)
  assert found['accuracy'] == pytest.approx(right)
  told = capsys.readouterr().out
  assert f'  accuracy         {right:.4f}' in told and 'strict' in told


def test_answers_are_measured_and_written(sources, tmp_path):
  out = tmp_path / 'out.json'
  found = evaluations.run('labels', _evaluation(
      sources, 'question_answering', predictions=str(out), n_best=3,
      null_threshold=1e6))
  answers = json.loads(out.read_text())
  best = json.loads((tmp_path / 'out.nbest.json').read_text())
  null = json.loads((tmp_path / 'out.null_odds.json').read_text())
  assert list(answers) == list(best) == list(null) == ['0-0', '0-1', '0-2',
                                                       '1-0']
  for name, answer in answers.items():
    assert answer == best[name][0]['text']
    assert answer in files.CONTEXTS[int(name[0])] and len(best[name]) == 3
    assert sum(row['probability'] for row in best[name]) == pytest.approx(1)
  assert found['total'] == 4 and found['NoAns_exact'] == 0
  none = evaluations.run('labels', _evaluation(
      sources, 'question_answering', null_threshold=-1e6))
  assert none['NoAns_exact'] == 100 and none['exact'] == 25
