"""Log-probabilities of tokens, against the softmax of each text alone."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers import evaluations, models
from training import runs
from training.evals import scoring
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
    ('gpt', 'causal'), ('llama', 'prefix'), ('mixtral', 'causal')])
def test_each_answer_is_that_of_its_text_alone(system, objective):
  """Of a prefix LM the tokens that are known see each other; of experts with a
  capacity none takes another text's room."""
  moe = dict(moe=dict(
      num_experts=4, d_ff=24, dispatch='sorted', capacity_factor=0.5,
      eval_capacity_factor=0.5)) if system == 'mixtral' else {}
  evaluation = evaluations.make(evaluations.config(
      system, objective, **SMALL, **moe))
  questions = _questions()
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


@pytest.mark.parametrize('shards', [1, 3])
def test_few_shapes_are_compiled_whatever_the_lengths(shards):
  questions = _questions(count=900, most=200)
  questions += [Question(np.append(q.tokens[:-1], np.int32(7)), 1)
                for q in questions]
  found = list(scoring.batches(questions, 200, shards))
  assert sorted(i for _, parts in found for part in parts for row in part
                for i in row) == list(range(len(questions)))
  for shape, parts in found:
    assert len(parts) == shape.shards and shape.rows % shape.shards == 0
    assert shape.rows <= scoring.TOKENS // shape.length + shards
    for part in parts:
      assert len(part) <= shape.rows // shape.shards
      for row in part:  # of questions about one text
        assert len(row) > 1 and len({
            questions[i].tokens[:-1].tobytes() for i in row}) == 1
        assert len(questions[row[0]].tokens) - 1 <= shape.length
  shapes = {shape for shape, _ in found}
  assert {shape.length for shape in shapes} == {
      8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 200}
  assert len(shapes) == 11
