"""Labels of words and answers to questions: how a row is laid out, which loss
it has, and that its scores hang on nothing but the row."""

import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import architectures
from tests.helpers import labelled_files as files
from tests.helpers import models
from training import objectives
from training.data import records, tokenizers
from training.objectives import labelled

BYTES = tokenizers.load('bytes')
CLS, SEP, END, PAD = (BYTES.special_ids[x] for x in ('cls', 'sep', 'eos',
                                                     'pad'))


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """The two sources by objective."""
  folder = tmp_path_factory.mktemp('labelled')
  return {'token_classification': f'conll:{files.conll(folder / "a.conll")}',
          'question_answering': f'squad:{files.squad(folder / "a.json")}'}


def _config(sources, objective, arch='bert', length=64):
  config = files.config(sources[objective], 'bytes', objective, length=length,
                        stride=16)
  config.model.arch = arch
  return objectives.with_labels(config)


def _rows(sources, objective, arch='bert', length=64):
  config = _config(sources, objective, arch, length)
  record = objectives.of(config)
  view = record.view(files.corpus(config))
  return record, config, [
      files.row(record, item, None, config, BYTES) for item in view.items], view


def test_words_are_laid_out_as_pictured(tmp_path):
  (tmp_path / 'a').write_text('ab\tB-x\nc\tO\n')
  config = files.config(f'conll:{tmp_path}/a', 'bytes', 'token_classification',
                        length=8)
  for arch, before, after in ('bert', CLS, SEP), ('gpt', END, END):
    config.model.arch = arch
    record = objectives.of(config)
    item, = records.Sentences(files.corpus(config)).items
    row = {key: value.tolist() for key, value in files.row(
        record, item, None, config, BYTES).items()}
    assert row == dict(
        tokens=[before, *b'ab c', after, PAD, PAD],
        segment_ids=[1] * 6 + [0] * 2, labels=[0, 0, 0, 0, 1, 0, 0, 0],
        weights=[0, 1, 0, 0, 1, 0, 0, 0])
    assert record.length(item) == 6


def test_questions_are_laid_out_as_pictured(sources):
  record, config, rows, view = _rows(sources, 'question_answering', length=128)
  asked, context = b'How many gulls?', files.CONTEXTS[0].encode()
  row, first = rows[0], 2 + len(asked)
  size = first + len(context) + 1
  assert row['tokens'].tolist() == [
      CLS, *asked, SEP, *context, SEP] + [PAD] * (128 - size)
  assert row['types'].tolist() == [0] * first + [1] * (size - first) + [0] * (
      128 - size)
  assert bytes(row['tokens'][row['starts']:row['ends'] + 1].tolist()) == b'308'
  assert record.length(view.items[0]) == size
  assert rows[2]['starts'] == rows[2]['ends'] == 0 and rows[2]['weights'] == 1
  _, _, short, _ = _rows(sources, 'question_answering', length=64)
  shown = [row for row in short if row['starts'] or row['ends']]
  assert 3 <= len(shown) < len(short)  # the others do not show the answer


def _figures(objective, scores, batch, smooth=0.0):
  record = objectives.OBJECTIVES[objective]
  config = ml_collections.ConfigDict(dict(train=dict(label_smoothing=smooth)))
  output = types.SimpleNamespace(
      extra=dict(scores=jnp.asarray(scores, jnp.float32)))
  batch = {key: jnp.asarray(value) for key, value in batch.items()}
  figures = record.means(record.figures(output, batch, config))
  return {key: float(value) for key, value in figures.items()}


@pytest.mark.parametrize('smooth', [0.0, 0.2])
def test_the_loss_of_labels_is_the_mean_over_those_that_count(smooth):
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(3, 5, 4)) * 3
  labels, weights = rng.integers(0, 4, (3, 5)), rng.integers(0, 2, (3, 5))
  figures = _figures('token_classification', scores,
                     dict(labels=labels, weights=weights.astype(np.float32)),
                     smooth)
  losses, right = [], []
  for b in range(3):
    for t in range(5):
      if weights[b, t]:
        p = np.exp(scores[b, t]) / np.exp(scores[b, t]).sum()
        q = np.full(4, smooth / 4)
        q[labels[b, t]] += 1 - smooth
        losses.append(-q @ np.log(p))
        right.append(scores[b, t].argmax() == labels[b, t])
  assert figures['loss'] == pytest.approx(np.mean(losses), rel=1e-5)
  assert figures['accuracy'] == pytest.approx(np.mean(right))


def test_the_loss_of_an_answer_is_that_of_both_ends_without_padding():
  rng = np.random.default_rng(0)
  scores, sizes = rng.normal(size=(3, 6, 2)) * 3, [4, 6, 5]
  starts, ends = np.array([1, 0, 2]), np.array([3, 0, 2])
  segments = (np.arange(6) < np.array(sizes)[:, None]).astype(np.int32)
  scores[1, 0] = 99  # this one is right, at both ends
  batch = dict(starts=starts, ends=ends, segment_ids=segments,
               weights=np.float32([1, 1, 0]))
  figures = _figures('question_answering', scores, batch)
  losses = []
  for b in range(2):
    for side, place in enumerate((starts[b], ends[b])):
      own = scores[b, :sizes[b], side]
      losses.append(np.log(np.exp(own - own.max()).sum()) + own.max()
                    - own[place])
  assert figures['loss'] == pytest.approx(np.mean(losses), rel=1e-5)
  assert figures['accuracy'] == 1 / 2
  scores[0, 4:] += 1000  # what a model says of padding changes nothing
  assert _figures('question_answering', scores, batch) == figures


def _model(record, arch, labels):
  return models.make(arch, num_layers=1, vocab_size=384, max_len=128,
                     head=record.head, num_labels=labels)


@pytest.mark.parametrize('objective, arch', [
    ('token_classification', 'bert'), ('question_answering', 'gpt')])
def test_scores_hang_on_nothing_but_the_row(objective, arch, sources):
  """Not on the rows beside it, on their order, or on padding."""
  record, config, rows, view = _rows(sources, objective, arch, 64)
  longer = config.copy_and_resolve_references()
  longer.data.length = 72
  padded = [files.row(record, item, None, longer, BYTES) for item in view.items]
  module, params = _model(record, arch, len(config.data.labels))
  apply = jax.jit(lambda batch: record.apply(
      module, params, batch).extra['scores'])

  def scores(chosen):
    found = apply({key: np.stack([row[key] for row in chosen])
                   for key in chosen[0]})
    return [x[:size] for x, size in zip(np.asarray(found), (
        (row['segment_ids'] != 0).sum() for row in chosen))]

  few, more = rows[:3], padded[:3]
  expected = scores(few)
  for found in (scores(few[::-1])[::-1], scores(more),
                [scores([row] * 3)[0] for row in few]):
    for a, b in zip(expected, found):
      np.testing.assert_allclose(a, b, atol=2e-6)


def test_the_null_token_is_the_one_that_has_seen_all(sources):
  for arch in 'bert', 'gpt':
    _, config, rows, view = _rows(sources, 'question_answering', arch, 128)
    item = view.items[2]
    size = int((rows[2]['segment_ids'] != 0).sum())
    place = labelled.null_place(
        item, architectures.systems()[arch].STACK)
    assert place == rows[2]['starts'] == (0 if arch == 'bert' else size - 1)
