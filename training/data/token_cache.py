"""The token cache: each source is tokenised once, then read from disk.

An entry is a folder of tokens (tokens.py), named by a hash of the documents'
content and of the tokenizer, so it is never stale, and is shared by all runs,
whatever their split, length or seed. A build that was killed goes on where it
was. Of several processes that want the same entry, on hosts that share the
folder, one reads the text and the others wait: file locks see to it (where a
file system has none, all build, and all write the same). A manifest remembers
(path, size, mtime) of a source's files and their content hash: while they
match, the text is not read again.
"""

from collections.abc import Iterable, Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

from etils import epath

from configs.errors import EnvironmentFailure, RequestError, require
from training.data import tokenising, tokens
from training.data.sources import Source
from training.data.tokenizers import Tokenizer
from training.workdir import storage


def default_dir() -> pathlib.Path:
  """Returns $ARCHETYPE_CACHE, else ~/.cache/archetype."""
  return pathlib.Path(os.environ.get('ARCHETYPE_CACHE')
                      or '~/.cache/archetype').expanduser()


def folder(cache_dir: str) -> pathlib.Path:
  """Returns where the entries lie; '' stands for default_dir()."""
  require('://' not in cache_dir, f'data.cache_dir is {cache_dir!r}: it must '
          'be a folder on disk')
  try:
    return (pathlib.Path(cache_dir).expanduser() if cache_dir
            else default_dir())
  except RuntimeError as error:  # ~ of a user who has no home
    raise RequestError(f'data.cache_dir is {cache_dir!r}: {error}') from error


def check_cache_dir(cache_dir: str) -> None:
  """Raises RequestError where no entry can be written; one that has entries is
  not tried, since all that a run needs may be there."""
  if not os.path.isdir(folder(cache_dir) / 'tokens'):
    storage.try_folder(folder(cache_dir), 'data.cache_dir')


def cached(source: Source, tokenizer: Tokenizer, cache_dir: str, every: int
           ) -> tokens.Tokens:
  """Returns the tokens of a source, which is tokenised if no entry has them.

  Args:
    source: see sources.parse.
    tokenizer: see tokenizers.load.
    cache_dir: '' is default_dir().
    every: data.holdout_every.

  Raises:
    ValueError: if a document cannot be read, naming the file and line.
  """
  root, stats = folder(cache_dir), _stat(source.files)
  manifest = root / 'manifests' / f'{_name(source)}.json'
  content_ = _remembered(manifest, stats)
  path = root / 'tokens' / _key(content_, tokenizer)
  if content_ is None or not (path / tokens.INDEX).exists():
    storage.try_folder(root, 'data.cache_dir')
    with _one_at_a_time(root, source):
      content_ = _remembered(manifest, stats)
      if content_ is None:
        content_ = source.digest()
        with _writing(manifest):
          manifest.parent.mkdir(parents=True, exist_ok=True)
          tokenising.put(manifest, json.dumps(
              {'files': stats, 'content': content_}).encode())
      path = root / 'tokens' / _key(content_, tokenizer)
      if not (path / tokens.INDEX).exists():
        with _writing(path):
          path.mkdir(parents=True, exist_ok=True)
        _build(source, content_, tokenizer, every, stats, epath.Path(path))
  return tokens.Tokens(tokens.load(str(path), source.name))


def content(source: Source, cache_dir: str = '') -> str:
  """Returns the hash of the content of a source's files, which are read unless
  a manifest remembers it."""
  manifest = folder(cache_dir) / 'manifests' / f'{_name(source)}.json'
  return _remembered(manifest, _stat(source.files)) or source.digest()


def _name(source: Source) -> str:
  return tokens.digest([source.reader, source.content, source.files])


def _key(content_: str | None, tokenizer: Tokenizer) -> str:
  return tokens.digest([tokens.FORMAT, content_, tokenizer.fingerprint])


@contextlib.contextmanager
def _one_at_a_time(root: pathlib.Path, source: Source) -> Iterator[None]:
  """Lets one process at a time read the text of a source. The lock ends with
  the process that holds it, however that ends."""
  locks = root / 'locks'
  with _writing(locks):
    locks.mkdir(parents=True, exist_ok=True)
    file = open(locks / _name(source), 'w')
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      print(f'warning: {root} has no file locks ({error.strerror}): every '
            f'process reads {source.name}', file=sys.stderr)
    yield


def _remembered(manifest: pathlib.Path, stats: Any) -> str | None:
  """Returns the hash of the content, if the manifest's files are as now."""
  try:
    kept = json.loads(manifest.read_text())
    return kept['content'] if kept['files'] == stats else None
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None  # None yet, or one that a killed machine left torn.


def _writing(path: pathlib.Path):
  """Around what writes to the cache, and not around what reads the text: of
  that, an error says more by itself."""
  return storage.writing(
      path, lambda: 'the tokens are kept there: make room, or name another '
      'folder with --config.data.cache_dir')


def _build(source: Source, content_: str, tokenizer: Tokenizer, every: int,
           stats: Any, path: epath.Path) -> None:
  """Tokenises the source into `path`, which has an index once it is whole."""
  started = time.monotonic()
  planned = tokenising.plan(source, every)._replace(digest=content_)
  begun = tokenising.begin(path, planned, tokenizer)
  count = len(planned.parts)
  for i, done in enumerate(tokenising.finished(path, count)):
    if not done:
      tokenising.shard(path, i, planned.parts[i], tokenizer, begun['dtype'],
                       plain=False)
  if _stat(source.files) != stats:
    shutil.rmtree(path, ignore_errors=True)
    raise EnvironmentFailure(
        f'data source {source.name!r} changed while it was being read: '
        'start again when its files are complete')
  shards = [each for each in tokenising.finished(path, count) if each]
  total = sum(each['tokens'] for each in shards)
  require(total > 0, f'data source {source.name!r} is empty: its text has no '
          'tokens')
  tokenising.index(path, begun, shards, every)
  print(f'tokenised {source.name}: {total:,} tokens in '
        f'{time.monotonic() - started:.1f} s, kept in {path}', file=sys.stderr)


def _stat(files: Iterable[str]) -> list[list]:
  stats = [(path, os.stat(path)) for path in files]
  return [[path, s.st_size, s.st_mtime_ns] for path, s in stats]
