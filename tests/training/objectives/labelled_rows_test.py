"""Texts to labels and numbers: how a row is laid out, to which length a batch
is padded, and which loss it has."""

import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import base
from training import objectives
from training.data import tokenizers
from training.objectives import pipeline

BYTES = tokenizers.load('bytes')
CLS, SEP, END, PAD = (BYTES.special_ids[x] for x in ('cls', 'sep', 'eos',
                                                     'pad'))


@pytest.fixture(name='source')
def _source(tmp_path):
  """A hundred texts of 1 to 60 letters, whose label is their last letter."""
  rng = np.random.default_rng(0)
  rows = [f'{"ab"[i % 2] * int(n)}\t{"ab"[i % 2]}\n' for i, n in enumerate(
      rng.integers(1, 20, 96))] + ['a' * 50 + '\ta\n'] * 4
  (tmp_path / 'a.tsv').write_text(''.join(rows))
  return f'labelled:{tmp_path}/a.tsv'


def config(source, objective='classification', arch='bert', **fields):
  c = base.base()
  c.objective, c.model.arch = objective, arch
  c.data.update(dict(source=source, length=64, batch_size=4,
                     holdout_every=0) | fields)
  return c


def _rows(tmp_path, arch, text, **fields):
  (tmp_path / 'one.tsv').write_text(text)
  c = config(f'labelled:{tmp_path}/one.tsv', arch=arch, batch_size=2,
             length=8, **fields)
  batch = pipeline.training_loader(c, BYTES).batch(0)
  order = np.argsort(batch['targets'])
  return {key: value[order].tolist() for key, value in batch.items()}


def test_rows_are_laid_out_as_pictured(tmp_path):
  a, b, c = map(ord, 'abc')
  text = _rows(tmp_path, 'bert', 'ab\tx\nc\ty\n')
  assert text == dict(
      tokens=[[CLS, a, b, SEP] + [PAD] * 4, [CLS, c, SEP] + [PAD] * 5],
      types=[[0] * 8] * 2, segment_ids=[[1] * 4 + [0] * 4, [1] * 3 + [0] * 5],
      targets=[0, 1], weights=[1, 1])
  pair = _rows(tmp_path, 'bert', 'a\tbc\tx\nabcabc\tb\ty\n')
  assert pair['tokens'] == [[CLS, a, SEP, b, c, SEP, PAD, PAD],
                            [CLS, a, b, c, a, SEP, b, SEP]]
  assert pair['types'] == [[0, 0, 0, 1, 1, 1, 0, 0], [0] * 6 + [1] * 2]
  decoder = _rows(tmp_path, 'gpt', 'a\tbc\tx\nabcabc\tb\ty\n')
  assert decoder['tokens'] == [[END, a, END, b, c, END, PAD, PAD],
                               [END, a, b, c, a, END, b, END]]
  assert decoder['segment_ids'] == pair['segment_ids']
  assert 'types' not in decoder


def test_a_batch_is_as_long_as_its_longest_row_needs(source):
  loader = pipeline.training_loader(config(source), BYTES)
  seen = set()
  for n in range(100):
    tokens = loader.batch(n)['tokens']
    longest = int((tokens != PAD).sum(1).max())
    assert tokens.shape[1] == -(-longest // 8) * 8
    seen.add(tokens.shape[1])
  assert len(seen) > 2 and 56 in seen
  whole = pipeline.training_loader(config(source, length_buckets=1), BYTES)
  assert {whole.batch(n)['tokens'].shape for n in range(9)} == {(4, 64)}
  for n in range(9):  # padding is all that differs
    size = loader.batch(n)['tokens'].shape[1]
    for key, value in whole.batch(n).items():
      kept = value[:, :size] if value.ndim > 1 else value
      np.testing.assert_array_equal(kept, loader.batch(n)[key])


def test_any_number_of_processes_has_batches_of_one_shape(source):
  c = config(source, batch_size=8)
  whole = pipeline.training_loader(c, BYTES)
  parts = [pipeline.training_loader(c, BYTES, i, 4) for i in range(4)]
  for n in (0, 1, 7, 30):
    rows = [part.batch(n) for part in parts]
    for key, value in whole.batch(n).items():
      np.testing.assert_array_equal(
          np.concatenate([row[key] for row in rows]), value)


def _figures(objective, scores, batch, **train):
  record = objectives.OBJECTIVES[objective]
  c = ml_collections.ConfigDict(dict(
      model=dict(mtp_depth=0), train=dict(label_smoothing=0.0) | train))
  output = types.SimpleNamespace(
      extra=dict(scores=jnp.asarray(scores, jnp.float32)))
  batch = {key: jnp.asarray(value) for key, value in batch.items()}
  return record, output, batch, c


@pytest.mark.parametrize('smooth', [0.0, 0.2])
def test_the_loss_is_torchs_weighted_cross_entropy(smooth):
  """sum(w l) / sum(w), as torch.nn.CrossEntropyLoss(weight) has it; and by
  numpy, the smoothed targets written out."""
  rng = np.random.default_rng(0)
  scores, targets = rng.normal(size=(6, 3)) * 3, np.array([0, 1, 2, 2, 1, 0])
  weights = np.array([1, 2, 0.5, 0.5, 2, 0], np.float32)  # the last is padding
  record, output, batch, c = _figures(
      'classification', scores, dict(targets=targets, weights=weights),
      label_smoothing=smooth)
  figures = record.means(record.figures(output, batch, c))
  p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
  q = np.eye(3)[targets] * (1 - smooth) + smooth / 3
  losses = -(q * np.log(p)).sum(1)
  np.testing.assert_allclose(
      figures['loss'], (weights * losses).sum() / weights.sum(), rtol=1e-5)
  np.testing.assert_allclose(  # of the five rows that are there, each once
      figures['accuracy'], (scores.argmax(1) == targets)[:5].mean(), rtol=1e-6)


def test_the_loss_of_a_number_is_its_squared_error():
  scores = np.array([[1.0], [3.0], [9.0]])
  record, output, batch, c = _figures(
      'regression', scores, dict(targets=np.float32([2, 0, 0]),
                                 weights=np.float32([1, 1, 0])))
  figures = record.means(record.figures(output, batch, c))
  assert figures['loss'] == 5 and figures['mean_absolute_error'] == 2


def test_micro_batches_add_up():
  rng = np.random.default_rng(1)
  scores, targets = rng.normal(size=(8, 2)), rng.integers(0, 2, 8)
  weights = rng.random(8).astype(np.float32)
  record, output, batch, c = _figures(
      'classification', scores, dict(targets=targets, weights=weights))

  def loss(scores_BU, rows, whole):
    output.extra['scores'] = scores_BU[rows]
    part = {key: value[rows] for key, value in batch.items()}
    return record.loss(output, part, c, whole)[0]

  scores_BU, all_rows = output.extra['scores'], np.arange(8)
  whole = record.weights(batch)
  together = jax.grad(loss)(scores_BU, all_rows, whole)
  apart = sum(jax.grad(loss)(scores_BU, all_rows[i::2], whole)
              for i in range(2))
  np.testing.assert_allclose(together, apart, atol=1e-6)
