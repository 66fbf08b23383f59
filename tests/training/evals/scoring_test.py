"""Log-probabilities of tokens, against the softmax of each text alone."""

import dataclasses

import jax
import numpy as np
import pytest

from architectures.parts import positions
from tests.helpers import evaluations, models
from training import runs
from training.evals import scoring, trees
from training.evals.scoring import Question

SMALL = dict(d_model=16, num_layers=1, num_heads=2, num_kv_heads=0, d_ff=24,
             head_dim=0, max_len=12)


def _questions(seed=1, count=14, most=12):
  """Some share their first tokens, some are the beginning of others."""
  rng = np.random.default_rng(seed)
  stem = rng.integers(0, 256, most + 1)
  found = []
  for i in range(count):
    ids = rng.integers(0, 256, int(rng.integers(2, most + 2)))
    if i % 3:
      shared = int(rng.integers(1, len(ids)))
      ids[:shared] = stem[:shared]
    found.append(Question(ids.astype(np.int32),
                          int(rng.integers(1, len(ids)))))
  return found


def _alone(evaluation, questions, prefix):
  """The same by a softmax over the vocabulary at every place of every text."""
  tokens_BL = np.zeros((len(questions), SMALL['max_len']), np.int32)
  for row, question in zip(tokens_BL, questions):
    row[:len(question.tokens) - 1] = question.tokens[:-1]
  known_B = np.array([len(q.tokens) - q.scored for q in questions])
  logits_BLV = np.asarray(jax.jit(lambda params: models.logits(
      evaluation.run.module, params, tokens_BL,
      **dict(prefix_B=known_B) if prefix else {}))(evaluation.params))
  for question, logits_LV in zip(questions, logits_BLV):
    targets = question.tokens[1:]
    logits_LV = logits_LV[:len(targets)]
    log_p = jax.nn.log_softmax(logits_LV)[np.arange(len(targets)), targets]
    greedy = np.argmax(logits_LV, -1) == targets
    yield log_p[-question.scored:], greedy[-question.scored:]


def _answers(evaluation, questions):
  with evaluation.run.context():
    return scoring.answer(questions, evaluation, 'scoring')


@pytest.mark.slow
@pytest.mark.parametrize('system, objective', [
    ('gpt', 'causal'),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        ('llama', 'prefix'), ('llama', 'causal'), ('bloom', 'causal'))),
    pytest.param('mixtral', 'causal', marks=pytest.mark.long)])
def test_each_answer_is_that_of_its_text_alone(system, objective):
  """Of a prefix LM the tokens that are known see each other; of experts with a
  capacity none takes another text's room."""
  moe = dict(moe=dict(
      num_experts=4, d_ff=24, dispatch='sorted', capacity_factor=0.5,
      eval_capacity_factor=0.5)) if system == 'mixtral' else {}
  evaluation = evaluations.make(evaluations.config(
      system, objective, **SMALL, **moe))
  questions = _questions()
  (shape, _), *_ = scoring.batches(
      questions, 12, 1, SMALL['d_model'], objective == 'prefix')
  assert shape.trees == (objective != 'prefix')
  found = _answers(evaluation, questions)
  if system == 'mixtral':  # whose own forward pass drops tokens
    evaluation = evaluations.make(evaluations.config(
        system, objective, **SMALL, moe=dict(num_experts=4, d_ff=24)))
  for answer, (log_p, greedy) in zip(found, _alone(
      evaluation, questions, objective == 'prefix'), strict=True):
    np.testing.assert_allclose(answer.log_probs, log_p, atol=2e-5)
    np.testing.assert_array_equal(answer.greedy, greedy)


@pytest.mark.slow
def test_several_devices_answer_as_one():
  """Whose rows are cut over data and fsdp, and the vocabulary over tensor."""
  c = evaluations.config('gpt', 'causal', **SMALL)
  one = evaluations.make(c)
  c.mesh.update(fsdp=2, tensor=2)
  run = runs.build(c, one.run.model)
  assert run.mesh.size == 8
  several = dataclasses.replace(
      one, run=run, programs={}, params=jax.device_put(
          jax.device_get(one.params), run.shardings.params))
  questions = _questions()
  for ours, theirs in zip(*(
      _answers(each, questions) for each in (several, one)), strict=True):
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=2e-5)
    np.testing.assert_array_equal(ours.greedy, theirs.greedy)


def _texts(*texts):
  return [Question(np.array([*text, 99], np.int32), len(text))
          for text in texts]


def test_a_row_of_texts_by_hand():
  """The picture of training/evals/trees.py."""
  a, b, c, d, e, f, g = range(7)
  questions = _texts((a, f), (a, b, c), (g,), (a, b, d, e))
  order = trees.ordered(questions, range(4))
  assert order == ([1, 3, 0, 2], [3, 4, 2, 1], [0, 2, 1, 0])
  row = trees.row(questions, order, (0, 4))
  assert row.tokens.tolist() == [a, b, c, d, e, f, g]
  assert row.positions.tolist() == [0, 1, 2, 2, 3, 1, 0]
  assert row.reach.tolist() == [6, 5, 3, 5, 5, 6, 7]
  assert row.questions == order.questions
  assert row.places.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 5, 6]
  assert row.targets.tolist() == [b, c, 99, b, d, e, 99, f, 99, 99]
  assert trees.filled(order, 5) == [(0, 2), (2, 4)]
  assert trees.whole_texts(order) == [(0, 1), (1, 2), (2, 3), (3, 4)]
  beginnings = trees.ordered(_texts((a, b, c), (a,), (a, b), (b,)), range(4))
  assert beginnings.questions == [1, 2, 0, 3]
  assert trees.whole_texts(beginnings) == [(0, 3), (3, 4)]


@pytest.mark.parametrize('room', [13, 40, 10_000])
def test_a_token_is_seen_by_those_that_follow_it_in_a_text(room):
  questions = _questions(count=40)
  order = trees.ordered(questions, range(40))
  told = []
  for span in trees.filled(order, room):
    row = trees.row(questions, order, span)
    assert len(row.tokens) <= room
    at = 0
    for i in row.questions:
      scored = questions[i].scored
      last = row.places[at + scored - 1]
      at_L = np.arange(len(row.tokens))
      seen = (at_L <= last) & (last < row.reach)
      np.testing.assert_array_equal(row.tokens[seen], questions[i].tokens[:-1])
      np.testing.assert_array_equal(
          row.positions[seen], np.arange(len(questions[i].tokens) - 1))
      np.testing.assert_array_equal(
          row.targets[at:at + scored], questions[i].tokens[-scored:])
      at += scored
      told.append(i)
  assert sorted(told) == list(range(40))


def _answered(found, questions):
  rows = [row for _, parts in found for part in parts for row in part]
  assert sorted(i for row in rows for i in row.questions) == list(
      range(len(questions)))
  for shape, parts in found:
    assert len(parts) == shape.shards and shape.rows % shape.shards == 0
    for part in parts:
      assert len(part) <= shape.rows // shape.shards
      assert sum(len(row.places) for row in part) <= shape.places
      assert all(len(row.tokens) <= shape.length for row in part)


def test_few_shapes_are_compiled_whatever_the_lengths():
  questions = _questions(count=900, most=200)
  for shards in (1, 3):
    found = list(scoring.batches(questions, 200, shards, 64, False))
    _answered(found, questions)
    shapes = {shape for shape, _ in found}
    assert len(shapes) == len({shape[1:] for shape in shapes}) <= 12
    assert all(shape.rows <= scoring.TOKENS // shape.length + shards
               for shape in shapes)
  found = list(scoring.batches(questions, 200, 1, 64, True))
  _answered(found, questions)
  assert all(len(row.questions) == 1 for _, parts in found
             for part in parts for row in part)
  assert {shape.length for shape, _ in found} == {
      8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 200}


def test_a_row_of_texts_is_no_longer_than_the_model_takes():
  rng = np.random.default_rng(0)
  context = rng.integers(0, 256, 90)
  endings = _texts(*([*context, *rng.integers(0, 256, 10)] for _ in range(20)))
  for reach in (100, 128, 150):
    found = list(scoring.batches(endings, 100, 1, 256, False, reach))
    _answered(found, endings)
    assert all(shape.length <= reach for shape, _ in found)
    assert any(shape.trees for shape, _ in found) == (reach > 127)


@pytest.mark.long
def test_texts_are_turned_as_each_alone():
  """By dynamic positions, which a longer row turns otherwise."""
  evaluation = evaluations.make(evaluations.config(
      'llama', 'causal', **SMALL | dict(max_len=24), rope=dict(
          scaling='dynamic', factor=4.0, original_len=10)))
  assert positions.lengths_apart(evaluation.run.model) == (10,)
  questions = [Question(q.tokens[:n], 1) for n, q in zip(
      (5, 9, 11, 12, 15), _questions(count=5, most=15))]
  questions = [q for q in questions if len(q.tokens) > 1]
  for question, answer in zip(questions, _answers(evaluation, questions)):
    tokens = question.tokens[None, :-1]
    logits_V = np.asarray(models.logits(
        evaluation.run.module, evaluation.params, tokens))[0, -1]
    np.testing.assert_allclose(
        answer.log_probs, jax.nn.log_softmax(logits_V)[question.tokens[-1:]],
        rtol=1e-5)


def test_texts_share_a_row_where_that_is_less_work():
  """Endings of one context do; windows of a long text do not."""
  rng = np.random.default_rng(0)
  context = rng.integers(0, 256, 90)
  endings = _texts(*([*context, *rng.integers(0, 256, 10)] for _ in range(20)))
  (shape, (chosen,)), = scoring.batches(endings, 512, 1, 256, False)
  assert shape.trees and shape.length == 192
  assert [len(row.tokens) for row in chosen] == [90 + 10 * 10] * 2
  windows = _texts(*(rng.integers(0, 256, 512) for _ in range(4)))
  (shape, (chosen,)), = scoring.batches(windows, 512, 1, 256, False)
  assert not shape.trees and shape.length == 512 and len(chosen) == 4
