"""Datasets of the Hugging Face hub, or local folders of such: loaded whole, or
streamed file by file."""

from collections.abc import Iterator
import hashlib
import json
from typing import Any

from configs.errors import EnvironmentFailure, RequestError, require
from training.data import conll, labelled, squad
from training.data.source import Source, checked, imported, missing
from training.data.source import of_labelled


def source(name: str, rest: str) -> Source:
  """Returns a dataset as a source; it is downloaded, where it is not here.

  Args:
    name: of the source, for messages.
    rest: NAME[:CONFIG[:SPLIT[:FIELDS]]].
  """
  field = _named(rest)[3]
  fields = labelled.fields_of(name, field) if '+' in field else (field,)
  dataset = _load(name, rest)
  for each in fields:
    if each not in dataset.column_names:
      raise missing(name, each, dataset.column_names)

  reader = 'hf:' + ':'.join(_named(rest))
  # Datasets fingerprints a split by its cached files, built once per content.
  content = dataset._fingerprint
  if fields == squad.FIELDS:
    return Source(name, reader, (), squad.reader_of_rows(name, dataset),
                  content=content, records=squad.KIND)
  if len(fields) > 1 and hasattr(dataset.features[fields[0]], 'feature'):
    return Source(name, reader, (), conll.reader_of_rows(name, fields, dataset),
                  content=content, records=conll.KIND)
  if len(fields) > 1:
    return of_labelled(Source(
        name, reader, (), labelled.reader_of_rows(name, fields, dataset),
        content=content))
  return Source(name, reader, (), _texts(name, dataset, field),
                content=content)


def streamed(name: str, rest: str, most: int) -> tuple[str, list[Source]]:
  """Returns what names the files of a dataset, and sources of neighbouring
  files each, in order; nothing is downloaded before it is read.

  Args:
    name: of the source, for messages.
    rest: NAME[:CONFIG[:SPLIT[:FIELD]]].
    most: at most so many sources.
  """
  field = _named(rest)[3]
  require('+' not in field, f'data source {name!r} names several fields, and '
          'is no plain text')
  dataset = _load(name, rest, streaming=True)
  if dataset.column_names and field not in dataset.column_names:
    raise missing(name, field, dataset.column_names)
  count = min(dataset.num_shards, most)
  # On the hub these addresses hold the commit.
  files = getattr(dataset._ex_iterable, 'kwargs', {}).get('base_files', [])
  reader = 'hf:' + ':'.join(_named(rest))
  content = hashlib.blake2b(json.dumps(
      [reader, dataset.num_shards, list(map(str, files))]).encode(),
      digest_size=16).hexdigest()
  return content, [
      Source(name, reader, (), _texts(
          f'{name}, part {i} of {count}',
          dataset.shard(count, i, contiguous=True), field), content=content)
      for i in range(count)]


def _named(rest: str) -> list[str]:
  """Returns the name, the config, the split and the field of a dataset."""
  name, config, split, field = (rest.split(':') + [''] * 3)[:4]
  return [name, config, split or 'train', field or 'text']


def _load(name: str, rest: str, **options: Any) -> Any:
  datasets = imported('datasets', name, 'hf')
  dataset, config, split, _ = _named(rest)
  try:
    return datasets.load_dataset(dataset, config or None, split=split,
                                 **options)
  except Exception as error:  # Whatever the network or the hub raises.
    first = str(error).strip().partition('\n')[0].rstrip('.')
    kind = (EnvironmentFailure if isinstance(
        error, (ConnectionError, TimeoutError)) else RequestError)
    raise kind(f'data source {name!r} cannot be loaded: {first}.') from error


def _texts(name: str, dataset: Any, field: str) -> Any:
  """Returns what reads the texts of a dataset."""
  def read(_: str) -> Iterator[str]:
    for row, record in enumerate(dataset.select_columns([field]), 1):
      yield checked(record[field], f'{name}, row {row}, field {field!r},')
  return read
