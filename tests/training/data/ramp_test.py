"""Batches that grow: each row once, tokens counted, shapes bounded."""


import numpy as np
import pytest

from configs import base
from configs.errors import RequestError
from tests.training import vectorised_test as group
from training import preflight
from training.data import ramp, tokenizers
from training.objectives import pipeline

texts = group.texts


@pytest.mark.parametrize('text', ['', '3:2', '1:1,4:2,6:3'])
def test_rows_are_counted_as_they_come(text):
  sizes = ramp.parse(text, 5)
  stages = [tuple(map(int, stage.split(':'))) for stage in
            filter(None, text.split(','))] + [(99, 5)]
  total = 0
  for n in range(12):
    assert sizes.before(n) == total
    assert sizes.rows(n) == next(rows for until, rows in stages if n < until)
    total += sizes.rows(n)
  np.testing.assert_array_equal(sizes.before(np.arange(12)),
                                [int(sizes.before(n)) for n in range(12)])


@pytest.mark.parametrize('text, words', [
    ('8', "write STEP:ROWS"), ('3:2,', 'write STEP:ROWS'),
    ('3:2,3:4', 'must rise'), ('3:4,5:4', 'must rise'), ('0:4', 'must rise'),
    ('3:32', 'less than data.batch_size 32'), ('1000:8', 'must end before'),
    (','.join(f'{i}:{i}' for i in range(1, 17)), 'at most 15')])
def test_what_is_no_ramp_is_refused(text, words):
  c = base.base()
  c.data.batch_ramp = text
  with pytest.raises(RequestError, match=words):
    preflight.check_config(c)


def grown(texts, **fields):
  return group.config(texts, data__batch_size=8,
                      data__batch_ramp='2:2,5:4', **fields)


def test_the_order_of_the_rows_is_that_without_a_ramp(texts):
  """Also where two processes take halves of each batch."""
  tokenizer = tokenizers.load('bytes')
  plain = pipeline.training_loader(
      group.config(texts, data__batch_size=1), tokenizer)
  whole = pipeline.training_loader(grown(texts), tokenizer)
  halves = [pipeline.training_loader(grown(texts), tokenizer, i, 2)
            for i in range(2)]
  g = 0
  for n in range(7):
    batch = whole.batch(n)['tokens']
    assert len(batch) == (2, 2, 4, 4, 4, 8, 8)[n]
    np.testing.assert_array_equal(batch, np.concatenate(
        [half.batch(n)['tokens'] for half in halves]))
    for row in batch:
      np.testing.assert_array_equal(row, plain.batch(g)['tokens'][0])
      g += 1
  held_out, = pipeline.held_out(grown(texts), tokenizer)
  assert len(held_out.batch(0)['tokens']) == 8


def test_a_ramp_is_scaled_with_the_steps_of_a_run():
  assert ramp.scaled('100:8,300:16', 1000, 500) == '50:8,150:16'
  assert ramp.scaled('1:2,3:4,100:8', 400, 4) == '1:8'  # no batch has 2 or 4
  assert ramp.scaled('99:4', 100, 50) == '49:4'  # still ends before the run
