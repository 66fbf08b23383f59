"""A source: documents in a fixed order, whatever they come from."""

from collections.abc import Callable, Iterator
from concurrent import futures
import dataclasses
import hashlib
import importlib
import json
from typing import Any

from configs.errors import RequestError
from training.data import labelled, texts

Document = str | list[tuple[str, str]]


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
    tokens: the folder of its tokens, where these are all that there is
      (training/data/shards); `content` is of that.
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
  tokens: str = ''

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


def of_labelled(source: Source) -> Source:
  """Returns a source of texts with labels."""
  return dataclasses.replace(source, records=labelled.KIND,
                             as_document=labelled.Record.written)


def checked(text: str, where: str) -> str:
  """Returns the text of a field; None (a null) is an empty document."""
  return '' if text is None else texts.checked(text, where)


def missing(where: str, field: str, fields: Any) -> RequestError:
  """Returns the error of a record without a field."""
  return RequestError(
      f'{where} has no field {field!r}: it has {", ".join(fields)}.')


def imported(module: str, name: str, extra: str) -> Any:
  """Returns a module; RequestError: of a package that is not installed."""
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
