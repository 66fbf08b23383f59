"""The task `labels`: each record's own answer, whatever the batch, figures by
formulas that are written out here, and the files of predictions."""

import csv
import dataclasses
import json
import re
import types

import jax
import numpy as np
import pytest
from scipy import special

from common.errors import RequestError
from tests.helpers import evaluations
from tests.helpers import data_files as files
from training import objectives
from training.data import labelled, records, tokenizers
from training.evals import answers, predicting
from training.evals.tasks import labels
from training.objectives import pipeline, seq2seq

pytest.importorskip('sklearn')
pytest.importorskip('seqeval')


def _view(targets, names=('a', 'b', 'c')):
  rows = [labelled.Record((f'text {i}',), 'x', f'f, line {i},', ('text',))
          for i in range(len(targets))]
  return types.SimpleNamespace(
      labels=names, records=rows, bare=False,
      items=[types.SimpleNamespace(target=target) for target in targets])


@pytest.mark.parametrize('count', [2, 3])
def test_figures_are_those_of_their_formulas(count):
  rng = np.random.default_rng(count)
  right, scores = rng.integers(0, count, 40), rng.normal(size=(40, count))
  ours = scores.argmax(1)
  measured = labels.measure_labels(_view(right, tuple('abc'[:count])),
                                   [*scores])
  figures, f1 = measured.figures, []
  for k in range(count):
    hits = ((ours == k) & (right == k)).sum()
    f1.append(2 * hits / ((ours == k).sum() + (right == k).sum()))
    row = figures['by_label'][k]
    assert row['f1'] == pytest.approx(f1[k])
    assert row['precision'] == pytest.approx(hits / (ours == k).sum())
    assert row['recall'] == pytest.approx(hits / row['rows'])
  assert figures['f1_macro'] == pytest.approx(np.mean(f1))
  assert figures['f1'] == pytest.approx(f1[1] if count == 2 else np.mean(f1))
  assert figures['accuracy'] == pytest.approx((ours == right).mean())
  assert np.trace(figures['confusion']) == (ours == right).sum()
  row = json.loads(measured.files[''].splitlines()[7])
  assert row['predicted'] == 'abc'[ours[7]]
  assert sum(row['probabilities'].values()) == pytest.approx(1)


def test_correlations_are_those_of_their_formulas():
  rng = np.random.default_rng(0)
  right = rng.normal(size=30)
  ours = right + rng.normal(size=30)
  figures = labels.measure_numbers(_view(right), [*ours[:, None]]).figures
  assert figures['pearson'] == pytest.approx(np.corrcoef(right, ours)[0, 1])
  assert figures['mean_squared_error'] == pytest.approx(
      np.mean((right - ours) ** 2))
  constant = labels.measure_numbers(_view(right), [np.zeros(1)] * 30)
  assert np.isnan(constant.figures['pearson'])


def _of_texts(written):
  view = [seq2seq.Pair(np.frombuffer(b'text', np.uint8), None, True)
          for _ in written]
  return labels.measure_written_labels(view, written, types.SimpleNamespace(
      tokenizer=tokenizers.load('bytes')))


def test_a_text_that_is_no_label_is_never_right():
  measured = _of_texts([
      ('yes', 'yes', True), (' no', 'no', False), ('perhaps', 'yes', False),
      ('no', 'yes', False)])
  figures = measured.figures
  assert json.loads(measured.files[''].splitlines()[2]) == {
      'texts': ['text'], 'label': 'yes', 'predicted': 'perhaps'}
  assert figures['accuracy'] == 0.5
  assert figures['labels'] == ['no', 'yes', labels.NO_LABEL]
  assert figures['f1'] == pytest.approx(2 * 1 / (1 + 3))
  # What is printed has a row for each label, and none for what is no label.
  rows = {line.split()[0]: line.split()[1:] for line in measured.lines
          if line.strip()}
  assert rows['macro'] == ['avg', '0.7500', '0.6667', '0.5833', '4']
  assert not {'perhaps', labels.NO_LABEL} & set(rows)
  numbers = _of_texts([
      (text, target, text == target) for text, target in (
          ('9', '9'), ('10', '10'), ('10', '9'))]).figures
  assert numbers['labels'] == ['9', '10']  # as a classifier's are


def _evaluation(system, objective, source, length=32, **options):
  c = evaluations.make_config(system, objective, num_layers=1, max_len=length)
  c.data.update(source=source, eval_source=source, length=length)
  return evaluations.make_evaluation(objectives.fill_in_labels(c), **options)


@pytest.mark.parametrize('system, objective', [
    ('bert', 'classification'),
    pytest.param('gpt', 'regression', marks=pytest.mark.long)])
def test_each_record_has_the_answer_to_itself(system, objective, tmp_path):
  """In the file's order, from batches of several lengths, the last one filled
  up: each is what the model says of that text alone."""
  lines = [f'{chr(97 + i) * (3, 28, 9, 17)[i * 5 % 7 % 4]}\t{i % 3}\n'
           for i in range(14)]
  (tmp_path / 'a.tsv').write_text(''.join(lines))
  evaluation = _evaluation(system, objective, f'labelled:{tmp_path}/a.tsv',
                           predictions=str(tmp_path / 'p.jsonl'))
  figures = evaluations.run_and_check_task('labels', evaluation)
  rows = [json.loads(line) for line in
          (tmp_path / 'p.jsonl').read_text().splitlines()]
  assert figures['rows'] == len(rows) == 14
  tokenizer, module = evaluation.tokenizer, evaluation.run.module
  first, after = ((tokenizer.cls_id, tokenizer.sep_id) if system == 'bert'
                  else (tokenizer.separator_id,) * 2)
  alone = jax.jit(lambda tokens_1L: module.apply(
      {'params': evaluation.params}, tokens_1L).extra['scores'])
  for i, row in enumerate(rows):
    assert row['where'].endswith(f'line {i + 1}') and row['label'] == f'{i % 3}'
    ids = tokenizer.encode(row['texts'][0])[:30]
    score_1U = np.asarray(alone(np.concatenate([[first], ids, [after]])[None]))
    if objective == 'regression':
      assert row['predicted'] == pytest.approx(
          float(score_1U[0, 0]), rel=1e-4, abs=1e-6)
    else:
      np.testing.assert_allclose(list(row['probabilities'].values()),
                                 jax.nn.softmax(score_1U[0]), rtol=1e-4)
  loss = evaluations.run_and_check_task('loss', evaluation)
  same = ('accuracy' if system == 'bert' else 'mean_absolute_error')
  assert figures[same] == pytest.approx(loss[same], rel=1e-5)


def test_entities_are_measured_and_written(tmp_path):
  source = f'conll:{files.write_conll(tmp_path / "a.conll")}'
  evaluation = _evaluation('bert', 'token_classification', source, 64,
                           predictions=str(tmp_path / 'out.conll'))
  figures = evaluations.run_and_check_task('labels', evaluation)
  assert {'f1', 'strict_f1', 'accuracy', 'types'} <= figures.keys()
  rows = [line.split(' ') for line in
          (tmp_path / 'out.conll').read_text().splitlines() if line]
  assert [row[:2] for row in rows] == [
      line.split('\t') for line in
      (tmp_path / 'a.conll').read_text().splitlines() if line]
  assert figures['accuracy'] == pytest.approx(
      sum(a == b for _, a, b in rows) / len(rows))
  # Scores are those of each row alone, in rows of the full length.
  config = evaluation.run.config
  loader, = pipeline.make_evaluation_loaders(config, evaluation.tokenizer,
                                             in_order=True)
  with evaluation.run.context():
    scores = labels.compute_scores(evaluation, loader)
  record, (view,) = objectives.find_objective(config), loader.views
  assert len(scores) == len(view) > config.data.batch_size
  apply = jax.jit(lambda batch: record.apply(
      evaluation.run.module, evaluation.params, batch).extra['scores'])
  for item, scores_of in zip(view.items, scores):
    row = files.make_batch_row(record, item, None, config, evaluation.tokenizer)
    expected = apply({key: np.asarray(x)[None] for key, x in row.items()})[0]
    size = record.length(item)
    np.testing.assert_allclose(scores_of[:size], expected[:size], atol=1e-5)


def test_answers_are_measured_and_written(tmp_path):
  source = f'squad:{files.write_squad(tmp_path / "a.json")}'
  evaluation = _evaluation(
      'bert', 'question_answering', source, 64, n_best=3, null_threshold=1e6,
      predictions=str(tmp_path / 'out.json'))
  figures = evaluations.run_and_check_task('labels', evaluation)
  main, best, null = (json.loads((tmp_path / f'out{kind}.json').read_text())
                      for kind in ('', '.nbest', '.null_odds'))
  assert list(main) == list(best) == list(null) == ['0-0', '0-1', '0-2', '1-0']
  for name, answer in main.items():
    assert answer == best[name][0]['text']
    assert answer in files.CONTEXTS[int(name[0])] and len(best[name]) == 3
    assert sum(row['probability'] for row in best[name]) == pytest.approx(1)
  assert figures['total'] == 4 and figures['NoAns_exact'] == 0
  evaluation.options.null_threshold = -1e6
  none = evaluations.run_and_check_task('labels', evaluation)
  assert none['NoAns_exact'] == 100 and none['exact'] == 25


@pytest.mark.parametrize('objective, num_labels', [
    ('classification', 3), ('token_classification', 4), ('regression', 1),
    ('question_answering', 0)])
def test_a_model_has_a_score_for_each_label_and_one_for_a_number(
    objective, num_labels, tmp_path):
  sources = files.write_sources_with_and_without_labels(tmp_path)
  source, _ = sources[objective]
  config = evaluations.make_config('bert', objective)
  config.data.update(source=source, eval_source=source)
  config = objectives.fill_in_labels(config)
  found = objectives.find_objective(config).num_labels(config)
  assert found == num_labels == (len(config.data.labels) or num_labels)


@pytest.mark.parametrize('objective', [
    'classification', 'token_classification', 'question_answering', 'regression'
])
def test_rows_without_labels_get_the_predictions_of_those_with(
    objective, tmp_path):
  """And no measures. The table has what the other files have."""
  sources = files.write_sources_with_and_without_labels(tmp_path)
  source, bare = sources[objective]
  evaluation = _evaluation('bert', objective, source, 64, null_threshold=0.0,
                           predictions=str(tmp_path / 'right.csv'))
  figures = evaluations.run_and_check_task('labels', evaluation)
  config = evaluation.run.config.copy_and_resolve_references()
  config.data.eval_source = bare
  evaluation = dataclasses.replace(
      evaluation, run=dataclasses.replace(evaluation.run, config=config))
  evaluation.options.predictions = str(tmp_path / 'out.csv')
  counts = evaluations.run_and_check_task('labels', evaluation)
  assert counts.keys() <= {'rows', 'words', 'sentences', 'without_tokens',
                           'total'}
  assert all(figures[name] == value for name, value in counts.items())
  right, out = (list(csv.DictReader((tmp_path / name).open(newline='')))
                for name in ('right.csv', 'out.csv'))
  assert len(out) > 3 and 'label' not in out[0]
  same = out[0].keys() - {'where'}
  assert [{name: row[name] for name in same} for row in right] == [
      {name: row[name] for name in same} for row in out]
  evaluation.options.predictions = ''
  with pytest.raises(RequestError, match='pass --predictions=FILE'):
    evaluations.run_and_check_task('labels', evaluation)


# Worked out by hand by the rules of evaluate-v2.0.py.
@pytest.mark.parametrize('answer, right, exact, f1', [
    ('The  U.S. Army!', ['us army'], 1, 1),
    ('an apple a day', ['Apple-day'], 0, 0),  # appleday is one word
    ('the red red car', ['red car', 'blue'], 0, 4 / 5),
    ('red car', ['the red red car'], 0, 4 / 5),
    ('Anna', ['an a the', 'Anna'], 1, 1),  # articles are whole words
    ('', [], 1, 1), ('x', [], 0, 0), ('', ['x'], 0, 0),
    # Where nothing is left of any right answer, nothing is right; where of some
    # there is, those are.
    ('The', ['a.'], 1, 1), ('', ['a', 'the.'], 1, 1), ('x', ['a', '!'], 0, 0),
    ('The', ['a.', 'x'], 0, 0), ('x', ['a.', 'x'], 1, 1),
    ('a b b c', ['b b d', 'b c'], 0, 4 / 5)])
def test_scores_by_the_official_rules(answer, right, exact, f1):
  assert answers.score_answer(answer, right) == pytest.approx((exact, f1))


@pytest.mark.parametrize('may_be_null', [False, True])
def test_the_best_stretches_are_the_best_of_all(may_be_null):
  """Against loops over all windows and pairs of tokens."""
  context = ' '.join(f'w{i}' for i in range(30))
  places = np.array([m.span() for m in re.finditer(r'\S+', context)])
  higher = 0
  for seed in range(20):
    rng = np.random.default_rng(seed)
    windows = [answers.ContextWindow(rng.normal(size=e - f),
                                     rng.normal(size=e - f),
                                     places[f:e], float(rng.normal(4, 2)))
               for f, e in records.cut_into_windows(len(places), 12, 5)]
    best = lambda null, threshold=0.0, windows=windows: answers.choose_answer(
        context, windows, most_tokens=4, count=10, may_be_null=null,
        threshold=threshold)
    scores = {}
    for w in windows:
      for i in range(len(w.starts_T)):
        for j in range(i, min(i + 4, len(w.ends_T))):
          text = context[w.characters_T2[i, 0]:w.characters_T2[j, 1]]
          scores[text] = max(scores.get(text, -99), w.starts_T[i] + w.ends_T[j])
    answer, order = best(may_be_null), sorted(scores, key=scores.get)[:-11:-1]
    assert [text for text, _, _ in answer.spans] == order
    for text, first, score in answer.spans:
      assert context[first:first + len(text)] == text
      assert score == pytest.approx(scores[text])
    gap = min(w.null for w in windows) - scores[order[0]]
    assert answer.null_minus_best == pytest.approx(gap)
    higher += gap > 0
    assert answer.text == ('' if may_be_null and gap > 0 else order[0])
    assert best(may_be_null, gap + 1e-6).text == order[0]
    p = special.softmax([*(span.score for span in answer.spans),
                         min(w.null for w in windows)])
    assert predicting.predict_answer(answer).probability == pytest.approx(
        p[0] if answer.text else p[-1])
    assert best(True, gap - 1e-6).text == ''
  assert 0 < higher < 20


def test_space_and_a_character_of_several_tokens_take_no_place_of_others():
  """A space scores the most, and the two tokens of one letter come next."""
  scores_T = np.array([9., 5, 5, 1])
  window = answers.ContextWindow(
      starts_T=scores_T, ends_T=scores_T,
      characters_T2=np.array([(0, 1), (1, 2), (1, 2), (2, 3)]), null=0.0)
  for count in (1, 2):
    answer = answers.choose_answer(' äb', [window], most_tokens=1,
                                   count=count, may_be_null=False)
    assert answer.spans == [('ä', 1, 10.0), ('b', 2, 2.0)][:count]


RIGHT = [['B-per', 'I-per', 'O', 'B-loc'], ['O', 'B-loc', 'I-loc', 'B-loc']]


def test_entities_are_found_where_type_and_ends_are_right():
  tags = [['B-per', 'I-per', 'O', 'B-per'],  # one right, one of a wrong type
          ['O', 'B-loc', 'O', 'B-loc']]  # one too short, one right
  figures, _ = labels.measure_entities(RIGHT, tags)
  assert (figures['precision'], figures['recall'], figures['f1']) == (.5,) * 3
  assert figures['entities'] == 4 and figures['strict_f1'] == 0.5
  assert figures['types']['loc'] == dict(
      precision=1 / 2, recall=pytest.approx(1 / 3), f1=pytest.approx(2 / 5),
      entities=3)
  # conlleval's rule, which is the default, takes I after O as a beginning.
  tags = [['I-per', 'I-per', 'O', 'B-loc'], RIGHT[1]]
  figures, _ = labels.measure_entities(RIGHT, tags)
  assert figures['f1'] == 1
  assert (figures['strict_precision'], figures['strict_recall']) == (1, 3 / 4)


def test_many_labels_are_not_printed_one_by_one():
  rows = [(str(i), str(i), True) for i in range(labels.MOST_PRINTED_LABELS + 1)]
  assert _of_texts(rows).lines[-1] == '  41 labels, whose figures --json writes'
  assert len(_of_texts(rows).figures['by_label']) == 41
