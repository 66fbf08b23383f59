"""What is drawn of a text, row by row: masks, second texts, prefixes, and the
stretches that pairs are cut from."""

import itertools

import numpy as np
import pytest

from tests.helpers import letters
from training.objectives import pipeline
from training.objectives import mlm

BYTES = letters.BYTES


@pytest.fixture(name='texts')
def _texts(tmp_path, monkeypatch):
  return letters.write(tmp_path, monkeypatch)


@pytest.mark.parametrize('objective', ['mlm', 'mlm_nsp'])
def test_no_part_of_a_rows_frame_is_masked(texts, objective):
  """[CLS], the [SEP] between two texts and at the end, the separators of
  documents, and padding."""
  frame = (BYTES.cls_id, BYTES.sep_id, BYTES.pad_id, BYTES.separator_id)
  config = letters.config(texts, objective, mask_rate=0.9)
  loader, ends = pipeline.training_loader(config, BYTES), 0
  for batch in map(loader.batch, range(20)):
    ends += (batch['targets'] == BYTES.separator_id).sum()
    held = np.isin(batch['targets'], frame)
    assert held.any(1).all() and not batch['weights'][held].any()
    np.testing.assert_array_equal(batch['tokens'][held],
                                  batch['targets'][held])
    told = batch['weights'] == 1
    assert (batch['tokens'][~told] == batch['targets'][~told]).all()
  assert bool(ends) == (objective == 'mlm')


@pytest.mark.parametrize('objective', ['mlm', 'mlm_nsp', 'prefix', 'span',
                                       'masked_diffusion'])
def test_each_draw_of_a_row_is_a_new_one(texts, objective):
  """The masks of one text differ from epoch to epoch and from seed to seed."""
  shown = {}  # of each text: (seed, all that its row holds), each time
  for seed in (0, 1):
    config = letters.config(texts, objective, batch_size=1)
    config.seed = seed
    loader = pipeline.training_loader(config, BYTES)
    for n in range(2 * loader.num_windows):
      text, row = loader._dataset[n].tokens.tobytes(), loader.batch(n)
      whole = b''.join(row[key].tobytes() for key in sorted(row))
      shown.setdefault(text, []).append((seed, whole))
  for within_a_seed in (True, False):
    alike = [a == b for rows in shown.values()
             for (s, a), (t, b) in itertools.combinations(rows, 2)
             if (s == t) == within_a_seed]
    assert len(alike) >= loader.num_windows and np.mean(alike) < 0.1


@pytest.mark.parametrize('whole_words', [False, True])
def test_every_token_is_told_as_often_as_any_other(whole_words):
  ids, special = np.array([*b'ab cde f gh ijkl m no pq'], np.int32), np.zeros(
      24, bool)
  told = np.mean([
      mlm.mask(ids, special, np.random.default_rng(seed), BYTES, rate=0.25,
                   whole_words=whole_words)[1] for seed in range(3000)], 0)
  spread = 0.04 if whole_words else 5 * (0.25 * 0.75 / 3000) ** 0.5
  assert np.ptp(told) < 2 * spread, told


def test_the_masks_of_an_evaluation_do_not_go_by_the_seed(texts):
  def batch(seed):
    config = letters.config(texts, 'mlm', eval_source=texts)
    config.seed = seed
    return pipeline.held_out(config, BYTES)[0].batch(0)
  for key, value in batch(0).items():
    np.testing.assert_array_equal(value, batch(1)[key])


def test_the_padding_of_a_prefix_row_is_not_predicted(texts):
  config = letters.config(texts, 'prefix', eval_source=texts, batch_size=1)
  loader, = pipeline.held_out(config, BYTES)
  short = 0
  for batch in loader.iterate():
    assert (batch['weights'] <= batch['valid']).all()
    short += not batch['valid'].all()
  assert short
