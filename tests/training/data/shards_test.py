"""Tokens in shards: the same batches as from the text itself, and a memory that
does not grow with them."""

import json
import pathlib
import pickle

import numpy as np
import pytest

from tests.helpers.shards import BYTES, assert_same, config_of, loaders, spec_of
from tests.helpers.shards import tokenize
from training.data import holdout, pipeline, sources, token_cache
from training.data.shards import files, finish, pages, reader, records
from training.data.shards import folder as folders

EOS = BYTES.eos_id
array_record = pytest.importorskip('array_record.python.array_record_module')


# Equal to the token cache.


@pytest.mark.parametrize('fields', [
    {}, {'part': 'first'}, {'eval_source': True, 'part': 'second'},
    {'objective': 'mlm'}, *(pytest.param(x, marks=pytest.mark.long) for x in (
        {'part': 'second'}, {'eval_source': True}, {'length': 1500},
        {'holdout_every': 5, 'eval_source': True, 'part': 'first'},
        {'objective': 'span'}, {'objective': 'seq2seq'},
        {'objective': 'prefix'}, {'document_mask': True}))], ids=str)
def test_batches_are_those_of_the_token_cache(fields, corpus, shards):
  own = fields.get('eval_source')
  theirs, ours = fields.copy(), fields.copy()
  if own:
    theirs['eval_source'], ours['eval_source'] = (
        spec_of(corpus), f'tokens:{shards}')
  assert_same(
      loaders(config_of(corpus, shards.parent, f'tokens:{shards}', **ours)),
      loaders(config_of(corpus, shards.parent, **theirs)))


def test_every_token_stands_where_the_cache_has_it(corpus, shards):
  """All windows, in order, of each of the sets that a run may read."""
  (_, source), = sources.parse(spec_of(corpus))
  cache = token_cache.cached_tokens(source, BYTES, str(shards.parent), 1)
  index = folders.load(str(shards), 'it')
  assert len(index.shards) > 3
  ids = np.arange(len(cache))
  for every in (4, 3):
    tokenize(corpus, shards, f'--holdout_every={every}')
    for held in (None, True, False):
      for part in ('', 'first', 'second') if held is not False else ('',):
        kept = ids if held is None else ids[
            holdout.held_out(ids, every) == held]
        kept = kept[holdout.PARTS[part]]
        stream = np.concatenate([[EOS], *(
            [*cache.document(i), EOS] for i in kept)])
        found = reader.Split(index, every, pages.of_set(every, held, part), EOS)
        assert found.documents == len(kept)
        assert found.num_tokens == len(stream) - 1
        assert found.num_bytes == sum(cache.num_bytes[i] for i in kept)
        for first in range(0, len(stream), 1111):
          row = np.full(1112, EOS, np.int32)
          found.fill(row, first)
          expected = stream[first:first + 1112]
          np.testing.assert_array_equal(row[:len(expected)], expected)


def test_a_mixture_has_shards_and_text(corpus, shards):
  mixed = '0.7*{},0.3*text:' + str(corpus) + '/*.jsonl'
  ours, theirs = (config_of(corpus, shards.parent, mixed.format(name))
                  for name in (f'tokens:{shards}', spec_of(corpus)))
  assert_same(loaders(ours), loaders(theirs))


def test_each_process_reads_its_rows_alone(corpus, shards):
  config = config_of(corpus, shards.parent, f'tokens:{shards}')
  whole = pipeline.training_loader(config, BYTES).batch(5)
  parts = [pipeline.training_loader(config, BYTES, i, 3) for i in range(3)]
  before = [files.read]
  looked = []
  files.read = lambda *args: looked.append(args) or before[0](*args)
  try:
    rows = [part.batch(5) for part in parts]
  finally:
    files.read, = before
  for key in whole:
    np.testing.assert_array_equal(
        whole[key], np.concatenate([row[key] for row in rows]))
  chunks = [args for args in looked if args[1].endswith(folders.SHARD)]
  # Of each of the six rows a record, or two where it crosses their bound.
  assert 6 <= len(chunks) <= 12 and len({args[1:] for args in chunks}) > 4
  assert all(end - start < 2 * 512 + 600 for *_, start, end in chunks)


# The layout, and what a process keeps of it.


def test_a_flipped_byte_of_a_record_is_seen():
  record = records.Record(7, np.array([0, 3, 3, 9]),
                          np.arange(9, dtype='<u2') * 7001)
  data = records.encode(record)
  found = records.decode(data, np.dtype('<u2'))
  assert found.document == 7 and found.ends.tolist() == [0, 3, 3, 9]
  assert found.tokens.tolist() == record.tokens.tolist()
  for at in range(len(data)):
    spoilt = bytearray(data)
    spoilt[at] ^= 1
    with pytest.raises(ValueError, match='checksum'):
      records.decode(bytes(spoilt), np.dtype('<u2'))


def test_records_are_found_where_array_record_has_them(tmp_path):
  rng = np.random.default_rng(0)
  written = [rng.bytes(int(n)) for n in rng.integers(0, 40_000, 40)]
  path = str(tmp_path / 'a')
  writer = array_record.ArrayRecordWriter(path, records.OPTIONS)
  for data in written:
    writer.write(data)
  writer.close()
  data = pathlib.Path(path).read_bytes()
  places = records.places(data)
  found = [records.of_chunk(data[at:at + size], at) for at, size in places]
  assert found == written
  assert array_record.ArrayRecordReader(path).read_all() == written


@pytest.mark.parametrize('sizes', [
    [0], [512], [512, 0, 0, 512], [0, 0, 513], [5, 507, 0, 1], [1536, 3],
    [1, 2, 3, 2000, 0, 4, 511]])
def test_the_table_counts_what_the_records_hold(sizes, monkeypatch):
  monkeypatch.setattr(records, 'RECORD_TOKENS', 512)
  sizes = np.array(sizes)
  pending, tokens = records.Pending(np.dtype('<u2')), np.arange(sizes.sum())
  cut = len(sizes) // 2
  found = [
      *pending.add(tokens[:sizes[:cut].sum()].astype('<u2'), sizes[:cut]),
      *pending.add(tokens[sizes[:cut].sum():].astype('<u2'), sizes[cut:]),
      *pending.rest()]
  assert np.concatenate([r.tokens for r in found]).tolist() == tokens.tolist()
  kinds = pages.classes(5 + np.arange(len(sizes)), 3)
  before = np.zeros(pages.CLASSES, int)
  for row, record in zip(finish.table(sizes, kinds, len(found)), found):
    assert row.tolist() == before.tolist()
    for i, end in enumerate(record.ends):
      low = record.ends[i - 1] if i else 0
      before[kinds[record.document + i]] += end - low + 1
    rest = len(record.tokens) - (record.ends[-1] if len(record.ends) else 0)
    if rest:
      before[kinds[record.document + len(record.ends)]] += rest
  assert before.sum() == sizes.sum() + len(sizes)


def test_a_cache_keeps_no_more_than_it_may():
  cache, made = pages.Cache(100, len), []
  for i in (0, 1, 2, 0, 3, 1):
    cache.get(i, lambda i=i: made.append(i) or bytes(40))
  assert cache.bytes == 80 and made == [0, 1, 2, 0, 3, 1]
  assert cache.get(3, None) == bytes(40)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
  """Of 10^12 tokens, as sparse files: what a process keeps, and that each look
  reads two pieces of the table and one record."""
  shards, tokens = 7_451, 1 << 27
  count = tokens // records.RECORD_TOKENS
  per_document = 1024
  documents = tokens // per_document
  rows = [dict(name=folders.number(i), documents=documents, tokens=tokens,
               bytes=4 * tokens, records=count, size=1, digest='')
          for i in range(shards)]
  index = folders.Index(tmp_path, dict(
      dtype='uint16', documents=shards * documents, tokens=shards * tokens,
      shards=rows), '')
  (tmp_path / 'split-0').mkdir()
  sizes = np.full(documents, per_document)
  kinds = pages.classes(np.arange(documents), 0)
  ends = np.arange(1, 9) * per_document
  chunk = 20_000  # where each record's chunk begins, were they that far apart
  places = np.stack([np.arange(count) * chunk, np.full(count, chunk)], 1)
  marks = pages.encode(np.concatenate(
      [finish.table(sizes, kinds, count), places], axis=1))
  for i in (0, 4000, shards - 1):
    (tmp_path / 'split-0' / f'{folders.number(i)}.marks').write_bytes(marks)
  per_class = [documents // 2, documents // 2, 0, 0]
  totals = [per_class, [n * per_document for n in per_class],
            [4 * n * per_document for n in per_class]]
  (tmp_path / 'split-0.json').write_text(json.dumps(
      {'every': 0, 'shards': [totals] * shards}))
  split = reader.Split(index, 0, pages.of_set(0, None), EOS)
  assert split.num_tokens == shards * (tokens + documents) > 10 ** 12
  assert len(pickle.dumps(split)) < 400_000  # all that it keeps but its caches
  looks, length = [], 2048

  def read(folder, name, start, end):
    looks.append(name)
    if name.endswith('.marks'):
      return real(folder, name, start, end)
    number = start // chunk  # a record, whose tokens are its own number's
    record = records.Record(number * 8, ends, np.full(
        records.RECORD_TOKENS, number, '<u2'))
    return records.encode(record)

  real, of_chunk = files.read, records.of_chunk
  files.read, records.of_chunk = read, lambda data, at: data
  try:
    rng = np.random.default_rng(0)
    for i in (0, 4000, shards - 1):
      for place in rng.integers(0, tokens + documents - 2 * length, 40):
        looks.clear()
        row = np.full(length, EOS, np.int32)
        split.fill(row, 1 + i * (tokens + documents) + int(place))
        stream = np.arange(place, place + length)
        expected = np.where(
            stream % (per_document + 1) == per_document, EOS,
            stream // (per_document + 1) // 8)
        np.testing.assert_array_equal(row, expected)
        assert len(looks) <= 5  # the root, two pages and two records
  finally:
    files.read, records.of_chunk = real, of_chunk
  kept = split._pages.bytes + split._read.bytes
  assert kept < reader.PAGES_BYTES + reader.RECORDS_BYTES
