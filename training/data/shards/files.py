"""Files of a folder of shards, on disk or in a bucket."""

import functools
import os
from typing import Any

from etils import epath

from configs.errors import EnvironmentFailure
from training.workdir import storage


def read(folder: epath.Path, name: str, start: int, end: int) -> bytes:
  """Returns the bytes start to end of a file; past its end there are none.

  Raises:
    EnvironmentFailure: where it cannot be read.
  """
  path = f'{folder}/{name}'
  try:
    if storage.in_bucket(path):
      return _bucket().cat_file(path, start=start, end=end)
    with open(path, 'rb', buffering=0) as file:
      return os.pread(file.fileno(), end - start, start)
  except FileNotFoundError as error:
    raise missing(path) from error
  except Exception as error:  # those of a bucket's client have many types
    why = storage.reason(error)
    if not why:
      raise
    raise EnvironmentFailure(
        f'{path} cannot be read: {why}; once that is mended, the same command '
        'goes on') from error


def sizes(folder: epath.Path, ending: str) -> dict[str, int]:
  """Returns the bytes of each file of a folder whose name ends so."""
  if storage.in_bucket(folder):
    rows = _bucket().ls(str(folder), detail=True)
    return {row['name'].rpartition('/')[2]: int(row['size'] or 0)
            for row in rows if row['name'].endswith(ending)}
  with os.scandir(folder) as rows:
    return {row.name: row.stat().st_size for row in rows
            if row.name.endswith(ending)}


def missing(path: str) -> EnvironmentFailure:
  return EnvironmentFailure(
      f'{path} is missing: the command of tools.tokenize that made the folder '
      'makes it again, and tokenises nothing else')


def damaged(path: str, why: str) -> EnvironmentFailure:
  return EnvironmentFailure(
      f'{path} is damaged ({why}): delete it, and the command of '
      'tools.tokenize that made the folder makes it again')


@functools.cache
def _bucket() -> Any:
  import fsspec
  storage.path('gs://bucket/folder', 'data.source')  # sees what others write
  return fsspec.filesystem('gs')
