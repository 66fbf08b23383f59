"""What is done once when all shards are there: the index, and what is held out.

A document's number in the source, by which it is held out, is only known when
the documents of all shards before its own are counted.
"""

from concurrent import futures
import importlib.metadata
import io
import json
import threading
from typing import Any

from etils import epath
import numpy as np

from training.data.shards import files
from training.data.shards import folder as folders
from training.data.shards import pages, records, write
from training.workdir import storage

THREADS = 8
PACKAGES = ('archetype', 'array_record', 'numpy', 'tokenizers')

# numpy parses the header of an array with `ast`, which fails in Python 3.11 if
# several threads do so at the same time ("AST constructor recursion depth
# mismatch").
PARSE = threading.Lock()


def index(folder: epath.Path, begun: dict[str, Any],
          shards: list[dict[str, Any]]) -> None:
  """Writes index.json.

  Args:
    folder: of the shards.
    begun: what begun.json holds.
    shards: what the .json of each holds, in order.
  """
  total = {key: sum(shard[key] for shard in shards)
           for key in ('documents', 'tokens', 'bytes')}
  described = begun | total | dict(versions=_versions(), shards=shards)
  described.pop('holdout_every', None)  # of the first command alone
  with storage.writing(folder / folders.INDEX):
    write.put(folder / folders.INDEX, json.dumps(described, indent=1).encode())


def has_split(folder: epath.Path, shards: list[dict[str, Any]], every: int
              ) -> bool:
  """Returns whether all files of a split are there, none of them cut short."""
  name = folders.split_name(every)
  if not (folder / f'{name}.json').exists():
    return False
  try:
    found = files.sizes(folder / name, '.marks')
  except FileNotFoundError:
    return False
  return all(found.get(f'{shard["name"]}.marks') == pages.place(
      shard['records'], None)[1] for shard in shards)


def split(folder: epath.Path, shards: list[dict[str, Any]], every: int) -> None:
  """Writes what data.holdout_every = `every` holds out. A thread keeps the
  numbers of the documents of one shard.

  Raises:
    EnvironmentFailure: for a shard's table that is missing or damaged.
  """
  name = folders.split_name(every)
  firsts = np.cumsum([0] + [shard['documents'] for shard in shards])
  with storage.writing(folder / name):
    (folder / name).mkdir(parents=True, exist_ok=True)

  def one(i: int) -> list[list[int]]:
    sizes, num_bytes, places = _table(folder, shards[i])
    kinds = pages.classes(int(firsts[i]) + np.arange(len(sizes)), every)
    own = folder / name / f'{folders.number(i)}.marks'
    with storage.writing(own):
      write.put(own, pages.encode(np.concatenate(
          [table(sizes, kinds, len(places)), places], axis=1)))
    return [np.bincount(kinds, weights, pages.CLASSES).astype(int).tolist()
            for weights in (np.ones(len(sizes)), sizes, num_bytes)]

  with futures.ThreadPoolExecutor(THREADS) as pool:
    rows = list(pool.map(one, range(len(shards))))
  with storage.writing(folder / f'{name}.json'):
    write.put(folder / f'{name}.json', json.dumps(
        {'every': every, 'shards': rows}).encode())


def table(sizes: np.ndarray, kinds: np.ndarray, count: int) -> np.ndarray:
  """Returns for each record how many tokens of each class come before it.

  A document counts with the separator behind it, which stands where it ends.

  Args:
    sizes: int64 [N], the tokens of each document of a shard.
    kinds: int64 [N], their classes.
    count: of records.

  Returns:
    int64 [count, CLASSES].
  """
  R = records.RECORD_TOKENS
  ends = np.cumsum(sizes)
  # Of each record, how many documents ended before it (see records.Pending),
  # and how much it has in the records before of the one that goes on.
  ended = np.searchsorted(np.maximum(ends - 1, 0) // R, np.arange(count))
  begins = np.concatenate([[0], ends])[ended]
  going_on = np.append(kinds, -1)[ended]
  return np.stack([
      np.concatenate([[0], np.cumsum((sizes + 1) * (kinds == c))])[ended]
      + np.where(going_on == c, np.arange(count) * R - begins, 0)
      for c in range(pages.CLASSES)], axis=1)


def _table(folder: epath.Path, shard: dict[str, Any]
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns a shard's .npz: tokens and bytes of documents, and the places of
  records."""
  path = folder / f'{shard["name"]}.npz'
  try:
    data = path.read_bytes()
    with PARSE:
      found = np.load(io.BytesIO(data))
      sizes, num_bytes, places = (
          found[key] for key in ('sizes', 'bytes', 'places'))
  except FileNotFoundError as error:
    raise files.missing(str(path)) from error
  except Exception as error:  # of zipfile and of numpy, many kinds
    raise files.damaged(str(path), 'it is no table') from error
  if len(sizes) != shard['documents'] or sizes.sum() != shard['tokens']:
    raise files.damaged(str(path), 'it is of another shard')
  return sizes, num_bytes, places


def _versions() -> dict[str, str]:
  found = {}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
