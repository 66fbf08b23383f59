"""Data: tokenised once, packed without loss, in an order fixed by the seed."""

import itertools
import sys

import grain
import numpy as np
import pytest

from common.errors import RequestError
from configs import base
from training import preflight
from training.data import tokenizers
from training.objectives import pipeline

BYTES = tokenizers.load('bytes')
EOS = BYTES.eos_id
OPENED = []  # The files that this process opens.
sys.addaudithook(
    lambda event, args: event == 'open' and OPENED.append(str(args[0])))


def text_of(i, size):
  return ''.join(chr(97 + (7 * i + k * k) % 26) for k in range(size))


@pytest.fixture
def folder(tmp_path):
  """A folder of 12 documents of 20 to 130 bytes, and an empty cache."""
  (tmp_path / 'a').mkdir()
  for i in range(12):
    (tmp_path / 'a' / f'{i:02}.txt').write_text(text_of(i, 20 + 10 * i))
  return tmp_path


def config_of(folder, **fields):
  config = base.base()
  config.seed = fields.pop('seed', 0)
  config.eval.part = fields.pop('part', '')
  config.data.update(dict(
      source=f'text:{folder}/a/*.txt', cache_dir=str(folder / 'cache'),
      length=16, batch_size=8, holdout_every=4) | fields)
  return config


def load(folder, split='train', index=0, count=1, **fields):
  config = config_of(folder, **fields)
  if split == 'train':
    return pipeline.make_training_loader(config, BYTES, index, count)
  loader, = pipeline.make_evaluation_loaders(config, BYTES, index, count)
  return loader


def stream(numbers):
  """EOS, document, EOS, ... document, EOS, by hand."""
  ids = [EOS]
  for i in numbers:
    ids += [*text_of(i, 20 + 10 * i).encode(), EOS]
  return ids


def windows(batches):
  """Each row's tokens and last target, as one tuple."""
  return [(*row, last[-1]) for batch in batches
          for row, last in zip(batch['tokens'].tolist(),
                               batch['targets'].tolist())]


def same(one, two):
  assert one.keys() == two.keys()
  for key in one:
    np.testing.assert_array_equal(one[key], two[key])


def test_second_start_reads_no_text(folder):
  def texts_opened():
    return {name for name in OPENED if name.startswith(str(folder / 'a'))}

  OPENED.clear()
  load(folder).batch(0)
  assert len(texts_opened()) == 12
  OPENED.clear()
  load(folder).batch(0)
  load(folder, 'eval').batch(0)
  assert OPENED and not texts_opened()


# Packing.


def test_windows_hold_the_stream_each_token_a_target_once(folder):
  train = stream(i for i in range(12) if i % 4)
  loader = load(folder)
  assert loader.num_tokens == len(train) - 1
  assert loader.num_windows == (len(train) - 1) // 16
  expected = [tuple(train[16 * i:16 * i + 17])
              for i in range(loader.num_windows)]
  batches = [loader.batch(n) for n in range(loader.num_batches)]
  assert sorted(windows(batches)[:loader.num_windows]) == sorted(expected)
  assert all((batch['weights'] == 1).all() for batch in batches)
  np.testing.assert_array_equal(batches[0]['tokens'][:, 1:],
                                batches[0]['targets'][:, :-1])


@pytest.mark.parametrize('count', [1, 2])
@pytest.mark.parametrize('length', [7, 16, 1000, 'all'])
def test_eval_counts_every_held_out_token_once(folder, count, length):
  held_out = stream([0, 4, 8])[1:]
  length = len(held_out) if length == 'all' else length
  loaders = [load(folder, 'eval', p, count, length=length)
             for p in range(count)]
  targets = []
  for loader in loaders:
    batches = list(loader.iterate())
    assert len(batches) == loader.num_batches == -(-loader.num_windows // 8)
    every = loader.num_batches
    assert [loader.first(n) for n in (0, 1, every, every + 1)] == [
        every, 1, every, every]
    for batch in batches:
      assert batch['tokens'].shape == (8 // count, length)
      targets += batch['targets'][batch['weights'] > 0].tolist()
  assert sorted(targets) == sorted(held_out)
  assert loader.num_windows == -(-len(held_out) // length)
  assert loader.num_tokens == len(held_out)
  assert loader.num_bytes == len(held_out) - 3
  assert loader.bytes_per_token == (len(held_out) - 3) / len(held_out)


def test_eval_source_leaves_nothing_held_out(folder):
  (folder / 'other.txt').write_text('other words')
  other = f'text:{folder}/other.txt'
  assert load(folder, eval_source=other).num_tokens == len(
      stream(range(12))) - 1
  batch = load(folder, 'eval', eval_source=other, batch_size=1).batch(0)
  assert BYTES.decode(batch['tokens'][0]) == 'other words'
  assert batch['weights'][0].tolist() == [1] * 12 + [0] * 4


def test_of_a_single_file_the_tail_is_held_out(folder):
  text = text_of(3, 59) + 'é'
  (folder / 'one.txt').write_text(text)
  one = dict(source=f'text:{folder}/one.txt', batch_size=1, length=8)
  for every, tail in (4, 15), (7, 9), (60, 1):
    train, held_out = (load(folder, split, holdout_every=every, **one)
                       for split in ('train', 'eval'))
    assert held_out.num_bytes == tail + 1
    assert train.num_bytes + held_out.num_bytes == 61
    targets = [t for batch in held_out.iterate() for t in batch['targets'][
        batch['weights'] > 0].tolist()]
    assert sorted(targets) == sorted([*text[-tail:].encode(), EOS])
    whole = [EOS, *text[:-tail].encode(), EOS]
    assert sorted(windows([train.batch(n) for n in range(train.num_batches)])
                  ) == sorted(tuple(whole[i:i + 9]) for i in range(
                      0, len(whole) - 8, 8))
  assert load(folder, eval_source=one['source'], **one).num_bytes == 61


def test_a_half_of_what_is_held_out_is_evaluated_on(folder):
  one = dict(length=1000, batch_size=1)
  for part, numbers in (('first', [0, 8]), ('second', [4])):
    row = load(folder, 'eval', part=part, **one).batch(0)
    whole = stream(numbers)
    assert row['targets'][0][row['weights'][0] > 0].tolist() == whole[1:]
    same(load(folder).batch(0), load(folder, part=part).batch(0))
  with pytest.raises(ValueError, match='none for eval with eval.part=second'):
    load(folder, 'eval', part='second', holdout_every=12)


def test_the_tail_of_a_single_file_has_two_halves(folder):
  text = text_of(3, 60)
  (folder / 'one.txt').write_text(text)
  one = dict(source=f'text:{folder}/one.txt', batch_size=1, length=100)
  for part, half in (('first', text[45:52]), ('second', text[52:])):
    row = load(folder, 'eval', part=part, **one).batch(0)
    assert BYTES.decode(row['targets'][0][row['weights'][0] > 0][:-1]) == half
    one_row = dict(one, length=8)
    same(load(folder, **one_row).batch(0),
         load(folder, part=part, **one_row).batch(0))


def test_document_mask_as_a_picture(folder):
  (folder / 'a' / '01.txt').write_text('abc')
  (folder / 'a' / '02.txt').write_text('de')
  (folder / 'a' / '03.txt').write_text('fghij')
  loader = load(folder, length=7, batch_size=1, document_mask=True)
  rows = [loader.batch(n) for n in range(loader.num_windows)]
  shown = {}
  for row in rows:
    tokens, segments, positions = (
        row[key][0].tolist() for key in ('tokens', 'segment_ids', 'positions'))
    text = ''.join('|' if i == EOS else chr(i) for i in tokens)
    shown[text] = (''.join(map(str, segments)), ''.join(map(str, positions)))
  assert shown['|abc|de'] == ('2222333', '0123012')
  assert shown['|fghij|'] == ('2222223', '0123450')
  assert {'segment_ids', 'positions'} & load(folder).batch(0).keys() == set()


# Order.


@pytest.mark.parametrize('split, count', [('train', 8), ('eval', 2)])
def test_global_batch_is_the_same_on_any_number_of_processes(
    folder, split, count):
  alone = load(folder, split)
  shares = [load(folder, split, p, count) for p in range(count)]
  for n in range(alone.num_batches):
    parts = [share.batch(n) for share in shares]
    assert all(len(part['tokens']) == 8 // count for part in parts)
    same(alone.batch(n), {key: np.concatenate([part[key] for part in parts])
                          for key in parts[0]})


def test_a_process_loads_only_its_rows(folder, monkeypatch):
  loader = load(folder, index=1, count=4)
  read = []
  monkeypatch.setattr(loader, '_dataset', type('Spy', (), {
      '__getitem__': lambda _, g, real=loader._dataset: (
          read.append(g), real[g])[1]})())
  loader.batch(5)
  assert read == [5 * 8 + 2, 5 * 8 + 3]


def test_each_window_once_an_epoch_in_another_order(folder):
  loader = load(folder, batch_size=1)
  size = loader.num_windows
  seen = windows(loader.batch(n) for n in range(3 * size))
  epochs = [tuple(seen[e * size:(e + 1) * size]) for e in range(3)]
  assert len(set(epochs)) == 3
  assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
  assert len(set(epochs[0])) == size
  # A seed's second epoch is not the next seed's first.
  other = load(folder, batch_size=1, seed=1)
  assert tuple(windows(other.batch(n) for n in range(size))) not in epochs


def test_order_stays_from_version_to_version(folder):
  """A run that is resumed after an upgrade must see the same batches."""
  loader = load(folder)
  train = stream(i for i in range(12) if i % 4)
  place = {tuple(train[16 * i:16 * i + 17]): i
           for i in range(loader.num_windows)}
  assert [[place[w] for w in windows([loader.batch(n)])] for n in (0, 9)] == [
      [18, 35, 16, 7, 20, 13, 24, 0], [20, 44, 39, 29, 23, 7, 0, 11]]


@pytest.mark.parametrize('start', [0, 1, 13])
def test_iterating_from_n_is_batch_n_onwards(folder, start):
  loader = load(folder)
  batches = list(itertools.islice(loader.iterate(start), 12))
  assert len(batches) == 12
  for n, batch in enumerate(batches, start):
    same(batch, loader.batch(n))
  assert len(list(loader.iterate(start, start + 3))) == 3
  assert not list(loader.iterate(start, start))


def test_a_mixture_has_the_order_that_grain_gives_its_items(folder):
  for name, letters in ('b', 'xyz'), ('c', 'uvw'):
    (folder / name).mkdir()
    for i, letter in enumerate(letters):
      (folder / name / f'{i}.txt').write_text(letter * (90 + i))
  weights = 0.7, 0.2, 0.1
  loader = load(folder, source=','.join(
      f'{weight}*text:{folder}/{name}/*.txt'
      for weight, name in zip(weights, 'abc')), seed=3)
  seeds = np.random.SeedSequence(3).generate_state(3)
  items = grain.MapDataset.mix([
      grain.MapDataset.source(view).shuffle(seed=int(seed)).repeat()
      for view, seed in zip(loader.views, seeds)], weights)
  for n in range(40):
    for i, row in enumerate(loader.batch(n)['tokens']):
      np.testing.assert_array_equal(row, items[8 * n + i].tokens[:-1])


# Refusals.


@pytest.mark.parametrize('fields, message', [
    (dict(length=5000), r'has 729 training tokens, fewer than .*length=5000'),
    (dict(holdout_every=0, split='eval'),
     'has 12 document.s., of which data.holdout_every=0 leaves none for eval'),
    (dict(holdout_every=1), 'data.holdout_every=1 leaves none for train'),
])
def test_what_cannot_be_loaded_is_refused(folder, fields, message):
  with pytest.raises(ValueError, match=message):
    load(folder, **fields)


# Batches that grow.


@pytest.mark.parametrize('text', ['', '3:2', '1:1,4:2,6:3'])
def test_rows_are_counted_as_they_come(text):
  sizes = pipeline.parse_ramp(text, 5)
  stages = [tuple(map(int, stage.split(':'))) for stage in
            filter(None, text.split(','))] + [(99, 5)]
  total = 0
  for n in range(12):
    assert sizes.rows_before(n) == total
    assert sizes.rows(n) == next(rows for until, rows in stages if n < until)
    total += sizes.rows(n)
  np.testing.assert_array_equal(sizes.rows_before(np.arange(12)),
                                [int(sizes.rows_before(n)) for n in range(12)])


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


def test_the_order_of_the_rows_is_that_without_a_ramp(folder):
  """Also where two processes take halves of each batch."""
  grown = dict(batch_size=8, batch_ramp='2:2,5:4')
  plain, whole = load(folder, batch_size=1), load(folder, **grown)
  halves = [load(folder, index=i, count=2, **grown) for i in range(2)]
  g = 0
  for n in range(7):
    batch = whole.batch(n)['tokens']
    assert len(batch) == (2, 2, 4, 4, 4, 8, 8)[n]
    np.testing.assert_array_equal(batch, np.concatenate(
        [half.batch(n)['tokens'] for half in halves]))
    for row in batch:
      np.testing.assert_array_equal(row, plain.batch(g)['tokens'][0])
      g += 1
  assert len(load(folder, 'eval', **grown).batch(0)['tokens']) == 8


def test_a_ramp_is_scaled_with_the_steps_of_a_run():
  scaled = pipeline.scale_ramp
  assert scaled('100:8,300:16', 1000, 500) == '50:8,150:16'
  assert scaled('1:2,3:4,100:8', 400, 4) == '1:8'  # no batch has 2 or 4
  assert scaled('99:4', 100, 50) == '49:4'  # still ends before the run
