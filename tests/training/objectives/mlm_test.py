"""Masked words with next sentences, and prefixes: their rows, what is drawn of
a text, and their losses."""

import itertools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from tests.helpers import data_files as files
from tests.helpers import models
from training import objectives
from training.objectives import causal
from training.objectives import pipeline
from training.objectives import mlm

BYTES = files.BYTES


@pytest.fixture(name='texts')
def _texts(tmp_path, monkeypatch):
  return files.write_texts_of_letters(tmp_path, monkeypatch)


def test_pairs_are_laid_out_as_bert_has_them(texts):
  config = files.make_run_config(texts, 'mlm_nsp')
  loader = pipeline.make_training_loader(config, BYTES)
  batches = [loader.batch(n) for n in range(20)]
  tokens = np.concatenate([b['targets'] for b in batches])
  types = np.concatenate([b['types'] for b in batches])
  weights = np.concatenate([b['weights'] for b in batches])
  real = np.concatenate([b['segment_ids'] for b in batches]) == 1
  assert (tokens[:, 0] == BYTES.cls_id).all()
  for row, kind, weight, mask in zip(tokens, types, weights, real):
    seps = np.flatnonzero(row == BYTES.sep_id)
    assert len(seps) == 2 and mask.sum() == seps[1] + 1
    assert weight.any() and not weight[[0, *seps]].any()
    assert (kind[:seps[0] + 1] == 0).all()
    assert (kind[seps[0] + 1:seps[1] + 1] == 1).all()
    assert (kind[~mask] == 0).all()
    assert (row[~mask] == BYTES.special('pad')).all()


@pytest.mark.parametrize('objective', ['mlm_nsp', 'mlm_sop'])
def test_the_second_text_is_what_its_target_says(texts, objective):
  """Each document has a letter of its own. 0: both texts are one stretch of a
  document. 1: of next sentences the second is from another document, from each
  of the others as often; of their order, it stood before the first."""
  config = files.make_run_config(texts, objective, batch_size=50)
  loader = pipeline.make_training_loader(config, BYTES)
  documents = {letter: ' '.join(letter * (1 + (i + j) % 5) for j in range(300))
               for i, letter in enumerate('abcdef')}
  targets, distances = [], []
  for n in range(20):
    batch = loader.batch(n)
    for row, target in zip(batch['targets'], batch['nsp_targets']):
      middle, end = np.flatnonzero(row == BYTES.sep_id)
      first = bytes(row[1:middle].tolist()).decode()
      second = bytes(row[middle + 1:end].tolist()).decode()
      at, to = first.strip()[:1], second.strip()[:1]
      targets.append(target)
      if target == 0:
        assert first + second in documents[at or to]
      elif objective == 'mlm_sop':
        assert second + first in documents[at or to]
      elif at and to:
        assert second in documents[to]
        distances.append((ord(to) - ord(at)) % 6)
  assert abs(np.mean(targets) - 0.5) < 5 * (0.25 / len(targets)) ** 0.5
  if objective == 'mlm_nsp':
    shares = np.bincount(distances, minlength=6) / len(distances)
    assert shares[0] == 0
    np.testing.assert_allclose(shares[1:], 0.2, atol=5 * (
        0.16 / len(distances)) ** 0.5)


def test_a_prefix_ends_at_any_place_and_all_after_it_is_predicted():
  """A prefix of n tokens sees itself: the first that it has not seen is the one
  at place n, the target of place n - 1."""
  config, L = files.make_run_config('', 'prefix', 12), 12
  sizes = []
  for seed in range(400):
    window = causal.Window(np.arange(L + 1, dtype=np.int32), 10)
    row = causal.Prefix().example(
        window, np.random.default_rng(seed), config, BYTES)
    n = int(row['prefix'])
    sizes.append(n)
    predicted = row['targets'][row['weights'] != 0]
    assert predicted.tolist() == list(range(n, 10))
    assert row['valid'].tolist() == [1] * 9 + [0] * 3
  counts = np.bincount(sizes, minlength=L)
  assert counts[0] == 0 and len(counts) == L
  assert (counts[1:] > 0.4 * 400 / (L - 1)).all()


def test_fifteen_percent_are_told_eighty_ten_ten(texts):
  rng = np.random.default_rng(0)
  ids = rng.integers(97, 123, 20000).astype(np.int32)
  special = np.zeros(len(ids), bool)
  special[:1000] = True
  config = files.make_run_config('', 'mlm')
  config.model.vocab_size = 200  # fewer than the tokenizer has
  row = mlm._mask_row(ids, special, rng, config, BYTES)
  masked, chosen = row['tokens'], row['weights']
  drawn = masked[(masked != ids) & (masked != BYTES.mask_id)]
  assert set(drawn) <= {*range(200)} and len(set(drawn)) > 100
  assert not chosen[:1000].any() and chosen.sum() == round(0.15 * 19000)
  assert (masked[~chosen] == ids[~chosen]).all()
  shares = [(masked[chosen] == BYTES.mask_id).mean(),
            (masked[chosen] == ids[chosen]).mean()]
  np.testing.assert_allclose(shares, [0.8, 0.1], atol=0.02)


def _rows(texts, split='train', **changes):
  config = files.make_run_config(texts, 'mlm', **changes)
  loader = (pipeline.make_training_loader(config, BYTES) if split == 'train'
            else pipeline.make_evaluation_loaders(config, BYTES)[0])
  return [{key: x[b] for key, x in loader.batch(n).items()}
          for n in range(loader.num_batches) for b in range(4)]


def test_masked_rows_are_full_of_text(texts):
  rows = _rows(texts, eval_source=texts, split='eval')
  text = np.concatenate([
      row['targets'][row['segment_ids'] == 1][1:-1] for row in rows
      if row['weights'].any()])
  # Each document stands there once, whole, and its end is never asked for.
  assert sorted(np.bincount(text[text < 256])[list(b'abcdef')]) == sorted(
      sum(1 + (i + j) % 5 for j in range(300)) for i in range(6))
  for row in rows:
    real = row['segment_ids'] == 1
    if not real.any():  # what fills up the last batch
      continue
    assert row['targets'][0] == BYTES.cls_id
    assert row['targets'][real][-1] == BYTES.sep_id
    assert not row['weights'][(row['targets'] >= 256) | ~real].any()
  rows = [row for row in rows if row['weights'].any()]  # not the padding
  full = [row for row in rows if (row['segment_ids'] == 1).all()]
  assert len(full) >= len(rows) - 1
  assert {row['weights'].sum() for row in full} <= {8, 9}  # 15 % of 59 to 62


def test_masked_documents_are_kept_apart(texts):
  rows = _rows(texts, document_mask=True)
  mixed = [row for row in rows if row['segment_ids'].max() > 1]
  assert mixed
  for row in mixed:
    starts = row['targets'] == BYTES.separator_id
    np.testing.assert_array_equal(
        row['segment_ids'], 1 + np.cumsum(starts))
    assert not row['positions'][starts].any()
    assert (np.diff(row['positions'])[~starts[1:]] == 1).all()
  assert 'positions' not in _rows(texts)[0]
  # The mark at the end begins no document where it also stands between them.
  marks = types.SimpleNamespace(cls_id=1, sep_id=2, separator_id=2)
  ids, is_special, segments = mlm.frame_text(
      causal.Window(np.array([2, 5, 2, 6, 7]), 5),
      files.make_run_config(texts, 'mlm', document_mask=True), marks)
  assert ids.tolist() == [1, 5, 2, 6, 7, 2]
  assert is_special.tolist() == [True, False, True, False, False, True]
  assert segments['segment_ids'].tolist() == [1, 1, 2, 2, 2, 2]


def test_whole_words_are_masked_whole():
  text = 'some plain words of unequal length, and a few more of them'
  ids = BYTES.encode(text)
  special = np.zeros(len(ids), bool)
  _, chosen = mlm.mask_tokens(ids, special, np.random.default_rng(1), BYTES,
                              rate=0.3, whole_words=True)
  assert 0 < chosen.sum() < len(ids)
  place = 0
  for word in text.split(' '):
    letters = chosen[place:place + len(word)]
    assert letters.all() or not letters.any(), word
    place += len(word) + 1


@pytest.mark.slow
def test_bert_is_judged_by_both_its_tasks():
  """By hand: words are a mean over the masked ones, the other over rows, of
  which the last is padding; the rows have 3, 1 and 2 words masked."""
  module, params = models.make_model('bert')
  tokens = np.asarray(models.random_tokens(4, 8))
  words = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 0), (2, 5)]
  batch = dict(tokens=tokens, targets=tokens, types=np.zeros((4, 8), int),
               segment_ids=np.repeat([[1], [1], [1], [0]], 8, 1),
               weights=np.zeros((4, 8), np.float32),
               nsp_targets=np.array([0, 1, 1, 0]))
  batch['weights'][tuple(zip(*words))] = 1
  config = base.base()
  config.data.mask_rate = 3 / 8
  objective = objectives.OBJECTIVES['mlm_nsp']
  alone = objectives.OBJECTIVES['mlm']

  @jax.jit
  def judge(params, batch):
    output = objective.apply(module, params, batch)
    return (objective.loss(output, batch, config),
            alone.figures(output, batch, config), output.logits,
            output.extra['nsp_logits'])

  (share, figures), of_words, all_logits, logits = jax.device_get(
      judge(params, batch))
  values = objective.means(figures)
  nll = -np.asarray(jax.nn.log_softmax(all_logits))
  words_loss = np.mean([nll[b, i, tokens[b, i]] for b, i in words])
  nsp = -np.asarray(jax.nn.log_softmax(logits))
  nsp = np.mean([nsp[0, 0], nsp[1, 1], nsp[2, 1]])
  right = np.mean([logits[0, 0] > logits[0, 1], logits[1, 1] > logits[1, 0],
                   logits[2, 1] > logits[2, 0]])
  accuracy = np.mean([all_logits[b, i].argmax() == tokens[b, i]
                      for b, i in words])
  for name, value in dict(loss=words_loss + nsp,
                          mlm_loss=words_loss, nsp_loss=nsp,
                          nsp_accuracy=right, mlm_accuracy=accuracy).items():
    np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(share, 6 * (words_loss + nsp), rtol=1e-5)
  words = alone.means(of_words)
  assert words == {'loss': values['mlm_loss'],
                   'accuracy': values['mlm_accuracy']}


def _chosen(rate, whole_words=False):
  """A loss of four rows of 16 tokens, of which `rate` are chosen, and what it
  is given."""
  module, params = models.make_model('bert', num_layers=1)
  tokens, weights = models.random_tokens(4, 16), np.zeros((4, 16), np.float32)
  for row, chosen in zip(weights, ([2, 5, 9, 15], [15], [0, 7, 15], [])):
    row[chosen] = 1.0
  batch = dict(tokens=tokens, targets=tokens[:, ::-1], weights=weights,
               types=np.zeros((4, 16), int),
               segment_ids=np.ones((4, 16), int))
  config = base.base()
  config.data.update(mask_rate=rate, whole_words=whole_words)
  objective = objectives.OBJECTIVES['mlm']

  def loss(params):
    output = objective.apply(module, params, batch)
    return objective.loss(output, batch, config)
  return loss, params


def test_the_head_reads_what_is_to_be_predicted_alone():
  """The loss, its figures and gradients are those of a head that reads every
  place, which costs four times the products of the vocabulary."""
  (one, params), (every, _) = _chosen(0.25), _chosen(1.0)
  cost = {}
  for name, loss in ('one', one), ('every', every):
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(
        params).compile()
    cost[name] = compiled(params), compiled.cost_analysis()['flops']
  chex.assert_trees_all_close(cost['one'][0], cost['every'][0], rtol=1e-5,
                              atol=2e-6)
  D, V = params['embed']['tokens'].shape[::-1]
  saved = cost['every'][1] - cost['one'][1]
  assert saved > 3 * 2 * (4 * 12) * D * V  # 12 of 16 places, three products


def test_a_prefix_sees_itself_whole_and_nothing_later():
  module, params = models.make_model('gpt')
  tokens = np.asarray(models.random_tokens(1, 8))
  logits = jax.jit(lambda place, new: models.logits(
      module, params, jnp.asarray(tokens).at[0, place].set(new),
      prefix_B=jnp.array([4]))[0])
  plain = np.asarray(logits(0, tokens[0, 0]))
  inside, after = (np.asarray(logits(place, (tokens[0, place] + 1) % 60))
                   != plain for place in (3, 5))
  assert inside.any(1).tolist() == [True] * 8
  assert after.any(1).tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize('objective', ['mlm', 'mlm_nsp', 'prefix', 'span',
                                       'masked_diffusion'])
def test_each_draw_of_a_row_is_a_new_one(texts, objective):
  """The masks of one text differ from epoch to epoch and from seed to seed."""
  shown = {}  # of each text: (seed, all that its row holds), each time
  for seed in (0, 1):
    config = files.make_run_config(texts, objective, batch_size=1)
    config.seed = seed
    loader = pipeline.make_training_loader(config, BYTES)
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
  means = np.mean([mlm.mask_tokens(ids, special, np.random.default_rng(seed),
                                   BYTES, rate=0.25, whole_words=whole_words)[1]
                   for seed in range(3000)], 0)
  spread = 0.04 if whole_words else 5 * (0.25 * 0.75 / 3000) ** 0.5
  assert np.ptp(means) < 2 * spread, means
