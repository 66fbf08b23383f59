"""Span corruption and sequence to sequence: what goes in comes out, rates,
purity in (seed, index), pairs from files and from plain text, refusals."""

import json
import types

import numpy as np
import pytest

from tests.helpers import data_files as files
from training import generate
from training import objectives
from training.objectives import pipeline
from training.data import labelled
from training.data import tokenizers
from training.evals.tasks import writing
from training.objectives import causal, seq2seq

TOKENIZER = tokenizers.load('bytes')
END, START = TOKENIZER.separator_id, objectives.padding_id(TOKENIZER)


def _window(n=64, seed=0, length=64):
  ids = np.random.default_rng(seed).integers(0, 256, length + 1)
  return causal.Window(ids.astype(np.int32), n)


def _text(row):
  """Puts the spans back where the sentinels stand."""
  source = row['tokens'][row['segment_ids'] > 0]
  target = row['targets'][row['weights'] > 0]
  assert source[-1] == target[-1] == END
  sentinels = set(TOKENIZER.sentinel_ids)
  filled, key = {}, None
  for i in target[:-1]:
    if i in sentinels:
      key = i
      filled[key] = []
    else:
      filled[key].append(i)
  return [t for i in source[:-1] for t in (filled.pop(i) if i in sentinels
                                           else [i])], filled


@pytest.mark.parametrize('n', (64, 65, 40, 7, 2))
def test_a_corrupted_window_holds_the_text(n):
  window = _window(n)
  for seed in range(20):
    row = files.make_batch_row(
        objectives.OBJECTIVES['span'], window, np.random.default_rng(seed),
        files.make_run_config('', 'span'), TOKENIZER)
    text, left = _text(row)
    np.testing.assert_array_equal(text, window.tokens[:min(n, 64)])
    assert not left
    assert row['decoder_tokens'][0] == START
    real = row['weights'] > 0
    np.testing.assert_array_equal(row['decoder_tokens'][1:][real[1:]],
                                  row['targets'][:-1][real[1:]])


def test_the_papers_sentence():
  ids = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
  cut = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 0], bool)
  source, target = seq2seq.replace_by_sentinels(ids, cut, np.array([90, 91,
                                                                    92]))
  assert source.tolist() == [1, 2, 90, 5, 6, 7, 8, 91, 10]
  assert target.tolist() == [90, 3, 4, 91, 9, 92]
  cut = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 1], bool)
  assert seq2seq.replace_by_sentinels(
      ids, cut, np.array([90, 91, 92]))[1].tolist() == [90, 3, 4, 91, 9, 10]


@pytest.mark.parametrize('kind', ('tsv', 'jsonl'))
def test_pairs_of_a_file(kind, tmp_path):
  texts = [('ein Haus', 'a house'), ('zwei', 'two'), ('x' * 80, 'y' * 80)]
  path = tmp_path / f'train.{kind}'
  path.write_text('\n'.join(
      '\t'.join(pair) if kind == 'tsv' else json.dumps(
          dict(zip(labelled.PAIR, pair))) for pair in texts) + '\n')
  config = files.make_run_config(f'parallel:{path}', 'seq2seq', batch_size=8,
                                 eval_source=f'parallel:{path}')
  loader, = pipeline.make_evaluation_loaders(config, TOKENIZER)
  batch = loader.batch(0)
  assert loader.num_windows == 3 and loader.num_bytes == 7 + 3 + 80
  assert loader.num_tokens == 90 + 3
  pairs = set()
  for i in range(3):
    source = batch['tokens'][i][batch['segment_ids'][i] > 0]
    target = batch['targets'][i][batch['weights'][i] > 0]
    for ids in (source, target):
      assert ids[-1] == END or len(ids) == 64
    pairs.add((TOKENIZER.decode(source), TOKENIZER.decode(target)))
  assert pairs == {(s[:64], t[:64]) for s, t in texts}
  assert not batch['weights'][3:].any()


def test_a_target_shows_what_it_is_and_no_more():
  tokenizer = types.SimpleNamespace(special_ids={'pad': 9}, separator_id=3)
  row = files.make_batch_row(
      objectives.OBJECTIVES['seq2seq'],
      seq2seq.Pair(np.array([7, 8]), np.array([4, 5, 6]), whole=False), None,
      files.make_run_config('', 'seq2seq', 4, target_length=5), tokenizer)
  shown = {name: x.tolist() for name, x in row.items()}
  assert shown == dict(
      tokens=[7, 8, 9, 9], segment_ids=[1, 1, 0, 0],
      decoder_tokens=[9, 4, 5, 9, 9], decoder_segment_ids=[1, 1, 1, 0, 0],
      targets=[4, 5, 6, 9, 9], weights=[1, 1, 1, 0, 0])


def test_a_window_of_text_is_a_source_and_then_its_target(tmp_path):
  text = ''.join(map(chr, range(33, 120)))
  (tmp_path / 'a.txt').write_text(text)
  config = files.make_run_config(f'text:{tmp_path}/a.txt', 'seq2seq', 5,
                                 target_length=3, cache_dir=str(tmp_path))
  batch = pipeline.make_training_loader(config, TOKENIZER).batch(0)
  for source, target in zip(batch['tokens'], batch['targets']):
    window = TOKENIZER.decode(np.concatenate([source, target]))
    assert len(window) == 8 and window in text


def test_translation_counts_pairs_and_reads_to_the_end(monkeypatch):
  batch = dict(
      tokens=np.zeros((3, 4), np.int32), segment_ids=np.ones((3, 4), np.int32),
      decoder_tokens=np.full((3, 4), START, np.int32),
      targets=np.array([[65, 66, END, START]] * 3),
      weights=np.array([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]))
  written = np.array([[65, 66, END, END], [65, 67, END, END], [1, 1, 1, 1]])
  monkeypatch.setattr(generate, 'generate',
                      lambda *args, **kwargs: written)
  assert writing.write_targets_of_batch(None, None, batch, TOKENIZER) == [
      ('AB', 'AB', True), ('AC', 'AB', False)]


@pytest.mark.parametrize('n, arch', [(64, 'bart'), (40, 't5'), (2, 'bart')])
def test_denoising_masks_spans_of_the_whole_text(n, arch):
  """Of a text in order, what is shown beside the masks is a part of it."""
  window, mask = _window(n), TOKENIZER.mask_id
  config = files.make_run_config('', 'denoising')
  config.model.arch = arch
  config.span.update(noise_density=0.3, permuted=0.0)
  masks = []
  for seed in range(20):
    row = files.make_batch_row(
        objectives.OBJECTIVES['denoising'], window,
        np.random.default_rng(seed), config, TOKENIZER)
    *text, end = row['targets'][row['weights'] > 0]
    assert (text, end) == (window.tokens[:min(n, 63)].tolist(), END)
    assert row['decoder_tokens'][0] == (END if arch == 'bart' else START)
    *source, end = row['tokens'][row['segment_ids'] > 0].tolist()
    rest = iter(text)
    assert end == END and all(x in rest for x in source if x != mask)
    size = len(text)
    assert len(source) - source.count(mask) == size - max(1, round(0.3 * size))
    masks.append(source.count(mask))
  assert n < 64 or 6 < np.mean(masks) < 8  # of 19 tokens, 3 each


@pytest.mark.parametrize('share, count', [
    (1.0, 24), (0.3, 7), (0.25, 1)])  # all, two at most, and one of the four
def test_sentences_change_places_whole(share, count):
  text = b'One. Two two! Three? Four'
  ids = np.frombuffer(text, np.uint8).astype(np.int32)
  is_end = seq2seq._find_sentence_ends(TOKENIZER)
  assert {*np.flatnonzero(is_end)} == {*b'.!?', END}
  ends = is_end[ids]
  seen = {bytes(seq2seq.permute_sentences(
      ids, ends, share, np.random.default_rng(seed)).astype(np.uint8))
          for seed in range(200)}
  assert len(seen) == count and text in seen
  assert (b' Four Three?One. Two two!' in seen) == (share == 1)
