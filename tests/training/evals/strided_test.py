"""Perplexity with a stride, against a loop over the tokens."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from tests.helpers import evaluations, models
from training.evals.tasks import loss
from training.objectives import record

TEXT = 'What is sown is reaped ,\n and what is not is not .\n' * 2


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('text')
  (folder / 'a.txt').write_text(TEXT)
  (folder / 'b.txt').write_text('Ä short one')
  return folder


@pytest.fixture(scope='module')
def evaluation(folder):
  c = evaluations.config('gpt', 'causal', max_len=16, num_layers=1)
  c.data.eval_source = f'text:{folder}/*.txt'
  return evaluations.make(c)


def _figures(evaluation, **options):
  made = evaluations.flags(**options)
  return evaluations.run('loss', dataclasses.replace(evaluation, options=made))


@pytest.mark.slow
@pytest.mark.parametrize('stride', [5, 15])
def test_each_token_is_predicted_once_from_enough(evaluation, folder, stride):
  """Ten lines that read the documents a token at a time."""
  found = _figures(evaluation, stride=stride)
  length = evaluation.run.config.data.length
  first, contexts, targets = evaluation.tokenizer.separator_id, [], []
  for name in 'ab':
    ids = [first, *(folder / f'{name}.txt').read_bytes()]
    for i in range(1, len(ids)):
      # The first window that reaches the token.
      start = max(0, math.ceil((i + 1 - length) / stride)) * stride
      assert i - start >= min(length - stride, i)
      contexts.append(ids[start:i])
      targets.append(ids[i])
  tokens_BL, lengths_B = record.padded(contexts)
  logits_BLV = np.asarray(models.logits(
      evaluation.run.module, evaluation.params, tokens_BL))
  rows = np.arange(len(targets))
  last_BV = jax.nn.log_softmax(logits_BLV[rows, lengths_B - 1])
  nats, count = -float(last_BV[rows, targets].sum()), len(targets)
  assert found['tokens'] == count
  assert found['loss'] == pytest.approx(nats / count, rel=1e-5)
  words = 13 * 2 + 4 + 3  # of the lines, their ends, and the short one
  assert found['words'] == words
  assert found['word_perplexity'] == pytest.approx(
      math.exp(nats / words), rel=1e-4)
  assert found['bits_per_byte'] == pytest.approx(
      nats / math.log(2) / count, rel=1e-5)


def test_wikitext_is_written_as_it_was():
  assert loss.DETOKENIZE['wikitext'](
      ' = Robert = \n \n He had a 1 @,@ 000 @-@ word role ( in " The Bill " ) '
      ", didn 't he ? \n") == (
          ' = Robert =\n\nHe had a 1,000-word role (in "The Bill"), '
          "didn 't he?\n")
