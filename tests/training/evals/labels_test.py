"""The task `labels`: each record's own answer, and figures by formulas that are
written out here."""

import json
import types

import jax
import numpy as np
import pytest

from tests.helpers import evaluations
from training import objectives
from training.data import labelled
from training.measures import classes

pytest.importorskip('sklearn')


def _view(targets, labels=('a', 'b', 'c')):
  records = [labelled.Record((f'text {i}',), 'x', f'f, line {i},', ('text',))
             for i in range(len(targets))]
  return types.SimpleNamespace(
      labels=labels, records=records,
      items=[types.SimpleNamespace(target=target) for target in targets])


def _mcc(right, found, count):
  """Gorodkin 2004, equation 8, from the confusion matrix C_kl."""
  C = np.zeros((count, count))
  np.add.at(C, (right, found), 1)
  t, p, s = C.sum(1), C.sum(0), C.sum()
  return (np.trace(C) * s - t @ p) / np.sqrt((s**2 - p @ p) * (s**2 - t @ t))


@pytest.mark.parametrize('count', [2, 3])
def test_figures_are_those_of_their_formulas(count):
  rng = np.random.default_rng(count)
  right, scores = rng.integers(0, count, 40), rng.normal(size=(40, count))
  found = scores.argmax(1)
  measured = classes.of_scores(_view(right, tuple('abc'[:count])), [*scores])
  figures, f1 = measured.figures, []
  for k in range(count):
    hits = ((found == k) & (right == k)).sum()
    f1.append(2 * hits / ((found == k).sum() + (right == k).sum()))
    row = figures['by_label'][k]
    assert row['f1'] == pytest.approx(f1[k])
    assert row['precision'] == pytest.approx(hits / (found == k).sum())
    assert row['recall'] == pytest.approx(hits / row['rows'])
  assert figures['f1_macro'] == pytest.approx(np.mean(f1))
  assert figures['f1'] == pytest.approx(f1[1] if count == 2 else np.mean(f1))
  assert figures['accuracy'] == pytest.approx((found == right).mean())
  assert figures['mcc'] == pytest.approx(_mcc(right, found, count))
  assert np.trace(figures['confusion']) == (found == right).sum()
  row = json.loads(measured.files[''].splitlines()[7])
  assert row['predicted'] == 'abc'[found[7]]
  assert sum(row['probabilities'].values()) == pytest.approx(1)


def test_correlations_are_those_of_their_formulas():
  rng = np.random.default_rng(0)
  right = rng.normal(size=30)
  found = right + rng.normal(size=30)
  figures = classes.of_numbers(_view(right), [*found[:, None]]).figures
  rank = lambda x: np.argsort(np.argsort(x))
  assert figures['pearson'] == pytest.approx(np.corrcoef(right, found)[0, 1])
  assert figures['spearman'] == pytest.approx(
      np.corrcoef(rank(right), rank(found))[0, 1])
  assert figures['mean_squared_error'] == pytest.approx(
      np.mean((right - found) ** 2))
  constant = classes.of_numbers(_view(right), [np.zeros(1)] * 30)
  assert np.isnan(constant.figures['pearson'])
  assert "  Pearson's correlation  n/a" in constant.lines


def test_a_text_that_is_no_label_is_never_right():
  figures = classes.of_texts(None, [
      ('yes', 'yes', True), (' no', 'no', False), ('perhaps', 'yes', False),
      ('no', 'yes', False)]).figures
  assert figures['accuracy'] == 0.5
  assert figures['labels'] == ['no', 'yes', classes.NONE]
  assert figures['f1'] == pytest.approx(2 * 1 / (1 + 3))
  numbers = classes.of_texts(None, [
      (text, target, text == target) for text, target in (
          ('9', '9'), ('10', '10'), ('10', '9'))]).figures
  assert numbers['labels'] == ['9', '10']  # as a classifier's are
  assert numbers['f1'] == pytest.approx(2 * 1 / (1 + 2))
  with pytest.raises(ValueError, match="one label, 'yes'"):
    classes.of_texts(None, [('no', 'yes', False)])


@pytest.fixture(name='source')
def _source(tmp_path):
  rows = [f'{"ab" * (1 + i * 5 % 11)}{"c" * i}\t{i % 3}\n' for i in range(14)]
  (tmp_path / 'a.tsv').write_text(''.join(rows))
  return f'labelled:{tmp_path}/a.tsv'


def _config(source, system, objective):
  c = evaluations.config(system, objective, num_layers=1)
  c.data.update(source=source, eval_source=source, length=32, length_buckets=4)
  return objectives.with_labels(c)


@pytest.mark.parametrize('system, objective', [
    ('bert', 'classification'), ('gpt', 'regression')])
def test_each_record_has_the_answer_to_itself(source, system, objective,
                                              tmp_path):
  """In the file's order, from batches of several lengths, the last one filled
  up: each is what the model says of that text alone."""
  evaluation = evaluations.make(_config(source, system, objective),
                                predictions=str(tmp_path / 'p.jsonl'))
  figures = evaluations.run('labels', evaluation)
  told = [json.loads(line) for line in
          (tmp_path / 'p.jsonl').read_text().splitlines()]
  assert figures['rows'] == len(told) == 14
  tokenizer, module = evaluation.tokenizer, evaluation.run.module
  first, after = ((tokenizer.cls_id, tokenizer.sep_id) if system == 'bert'
                  else (tokenizer.separator_id,) * 2)
  for i, row in enumerate(told):
    assert row['where'].endswith(f'line {i + 1}') and row['label'] == f'{i % 3}'
    ids = tokenizer.encode(row['texts'][0])[:30]
    score_1U = module.apply({'params': evaluation.params}, np.concatenate(
        [[first], ids, [after]])[None]).extra['scores']
    if objective == 'regression':
      assert row['predicted'] == pytest.approx(float(score_1U[0, 0]), rel=1e-4)
    else:
      np.testing.assert_allclose(list(row['probabilities'].values()),
                                 jax.nn.softmax(score_1U[0]), rtol=1e-4)
  loss = evaluations.run('loss', evaluation)
  same = ('accuracy' if system == 'bert' else 'mean_absolute_error')
  assert figures[same] == pytest.approx(loss[same], rel=1e-5)
