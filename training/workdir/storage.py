"""A run's folder, on disk or in a bucket (gs://), behind one kind of path.

A bucket knows whole objects: nothing is appended to one, and none is seen half
written. So what grows (metrics.jsonl, TensorBoard's and the profiler's files)
is written on disk, and copied into the bucket from time to time. The arrays of
checkpoints go there without a detour, by TensorStore.
"""

import contextlib
import errno
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time

from etils import epath

from configs.errors import RequestError, require
from training.workdir import writing

CONFIG, CHECKPOINTS = 'config.json', 'checkpoints'  # of a run, in its folder
DERIVED = 'derived'  # in a run's config.json, and in no other


def check_folder(text: str | os.PathLike, name: str = '--workdir') -> None:
  """Raises ValueError for what is neither a folder on disk nor in a bucket."""
  scheme, remote, rest = str(text).partition('://')
  require(not remote or scheme == 'gs', f'{name} is {str(text)!r}, of which '
          f'{scheme}:// is not known: choose a folder on disk, or a bucket as '
          'gs://BUCKET/NAME')
  bucket, _, folder = rest.partition('/')
  require(not remote or bucket and folder.strip('/'), f'{name} is '
          f'{str(text)!r}, which names no folder of a bucket: write '
          'gs://BUCKET/NAME')


def path(text: str | os.PathLike, name: str = '--workdir') -> epath.Path:
  """Returns a folder or file, which need not be there, as a path.

  Args:
    text: a path on disk, or gs://BUCKET/NAME.
    name: of the flag or field that holds it, for what is refused.
  """
  check_folder(text, name)
  if in_bucket(text):
    require(importlib.util.find_spec('gcsfs') is not None, f'{name} is '
            f"{str(text)!r}, and gcsfs is not installed: run pip install -e "
            "'.[gcs]', or choose a folder on disk")
    _see_what_others_write()
  return epath.Path(text)


def in_bucket(text: str | os.PathLike) -> bool:
  return '://' in str(text)


def _see_what_others_write() -> None:
  """Listings are cached, else, and other processes write into the bucket; so
  does TensorStore in this one."""
  import fsspec
  fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False


def write(file: epath.Path, text: str) -> None:
  """Writes a file whole or not at all.

  Raises:
    EnvironmentFailure: where it cannot be written.
  """
  with writing.to(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    if in_bucket(file):
      file.write_text(text)
      return
    partial = _partial(file)
    with partial.open('w') as stream:
      stream.write(text)
      stream.flush()
      os.fsync(stream.fileno())  # or a crash may leave it empty
    partial.replace(file)


def sweep(folder: str | os.PathLike, pattern: str, seconds: float) -> None:
  """Removes what killed processes left of what they were writing on disk.

  Args:
    folder: where it lies.
    pattern: of the names of what is being written: files, or folders of files.
    seconds: for which nothing was written to it. While a file grows, the time
      of its folder stays.
  """
  for left in pathlib.Path(folder).glob(pattern):
    try:
      newest = max(path.stat().st_mtime for path in (left, *left.glob('*')))
      if time.time() - newest <= seconds:
        continue
    except FileNotFoundError:  # it was moved to its place, or swept
      continue
    if left.is_dir():
      shutil.rmtree(left, ignore_errors=True)
    else:
      left.unlink(missing_ok=True)


# What is wrong with the machine, and not with the name that was given.
OF_THE_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT,
    errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EBUSY, errno.EAGAIN)


def try_folder(folder: epath.Path, name: str = '--workdir') -> None:
  """Raises RequestError unless files can be written in a folder, which need not
  be there and is not made. A bucket is not tried.

  Args:
    folder: on disk, or in a bucket.
    name: of the flag or field that holds it.

  Raises:
    OSError: where the machine is at fault: a full disk, too many open files.
  """
  if in_bucket(folder):
    return
  with _refusing(folder, name):
    _try_writing(pathlib.Path(folder))


def try_file(file: epath.Path, name: str) -> None:
  """Raises RequestError unless a file can be written, or written anew. The
  rest is as in try_folder."""
  if in_bucket(file):
    return
  file = pathlib.Path(file)
  with _refusing(file, name):
    _try_writing(file.parent)
    for path in (file, _partial(file)):
      require(not _is_there(path) or path.is_file(),
              f'{name} is {str(file)!r}, but {path} is there and is no file')


def refuse_run(folder: str | os.PathLike, name: str, own: str = '') -> None:
  """Raises RequestError for the folder of a training run.

  Args:
    folder: of what is no run itself, and would write among its files.
    name: of the flag that holds it.
    own: a file that says that it was written there before, and may go on; '':
      there is none.
  """
  folder = epath.Path(folder)
  require(bool(own) and (folder / own).exists() or not (
      (folder / CHECKPOINTS).exists() or has_config(folder)),
          f'{name} is {_shown(folder)}, which holds a training run: choose '
          'another folder')


def refuse_others(folder: str | os.PathLike, name: str) -> None:
  """Raises RequestError where a run would write over the config.json of
  something else, such as Hugging Face's weights, and warns of other files that
  it would write beside; `name` is the flag's."""
  file = path(folder, name) / CONFIG
  require(not file.exists() or has_config(folder), f'{name} is '
          f'{_shown(folder)}, whose {CONFIG} is not that of a run (a Hugging '
          f'Face folder has one, too): take another {name}')
  if not file.exists() and (others := _others(file.parent)):
    more = f' and {len(others) - 1} more' if len(others) > 1 else ''
    print(f'warning: {name} is {_shown(folder)}, which is not empty and holds '
          f'no run: the run is written beside {others[0]}{more}',
          file=sys.stderr)


# What may be in the folder of a run before it begins: what it writes itself,
# and what starts it or shows its output.
_OF_RUNS = re.compile(
    rf'{CONFIG}.*|{CHECKPOINTS}|metrics\.jsonl|lock|logs?|log\.txt|tensorboard'
    r'|wandb|profile|tokenizer|generation\.json|.*\.(log|err|out|sh|sbatch)'
    r'|\..*')


def _others(folder: epath.Path) -> list[str]:
  """Returns the names in a folder that are of no run."""
  if not folder.is_dir():
    return []
  return sorted(path.name for path in folder.iterdir()
                if not _OF_RUNS.fullmatch(path.name))


def has_config(folder: str | os.PathLike) -> bool:
  """Whether there is a config.json in a folder, and it is that of a run."""
  file = epath.Path(folder) / CONFIG
  if not file.is_file():
    return False
  try:
    tree = json.loads(file.read_bytes())
  except (ValueError, RecursionError):
    return False
  return isinstance(tree, dict) and DERIVED in tree


def output(text: str, name: str) -> epath.Path | None:
  """Returns the file that a flag names, once it is known that it can be
  written; None where the flag is ''."""
  if not text:
    return None
  file = path(text, name)
  try_file(file, name)
  return file


def _try_writing(folder: pathlib.Path) -> None:
  """Writes in a folder, or where it would be made. Nothing stays, and no folder
  is made, so that all processes of a run may try at once."""
  nearest = folder.absolute()
  while not _is_there(nearest):
    nearest = nearest.parent
  with tempfile.TemporaryFile(dir=nearest):
    pass


def _is_there(path: pathlib.Path) -> bool:
  """Whether there is something, even a broken link; other than in
  os.path.lexists, a name that is too long is an error."""
  try:
    path.lstat()
    return True
  except FileNotFoundError:
    return False


@contextlib.contextmanager
def _refusing(path: epath.Path, name: str):
  """Turns an error about a path into a sentence with its name and flag."""
  try:
    yield
  except OSError as error:
    if error.errno in OF_THE_MACHINE:
      raise
    reason = (error.strerror or str(error)).lower()
    raise RequestError(f'{name} is {_shown(path)}, where nothing can be '
                       f'written: {reason}') from error
  except ValueError as error:
    if isinstance(error, RequestError):
      raise
    raise RequestError(f'{name} is {_shown(path)}, which is no path: '
                       f'{error}') from error  # a NUL in it


def _shown(path: epath.Path) -> str:
  text = repr(str(path))
  return text if len(text) <= 240 else text[:100] + '...'


def _partial(file: epath.Path):
  return file.with_name(file.name + '.partial')


class Uploads:
  """Files that grow, and belong into a folder that may be in a bucket.

  Attributes:
    local: the folder to write them to; that on disk itself, if it is there.
  """

  def __init__(self, folder: epath.Path):
    self._folder = folder
    self._sent = {}  # by file: what it was like
    self.local = folder
    if in_bucket(folder):
      self._temporary = tempfile.TemporaryDirectory(prefix='archetype-')
      self.local = epath.Path(self._temporary.name)

  def fetch(self, name: str) -> None:
    """Brings a file from the bucket, to be gone on with."""
    if in_bucket(self._folder) and (self._folder / name).exists():
      (self.local / name).write_bytes((self._folder / name).read_bytes())

  def push(self) -> None:
    """Copies into the bucket what has changed since the last time."""
    if not in_bucket(self._folder):
      return
    for file in sorted(pathlib.Path(self.local).rglob('*')):
      if not file.is_file():
        continue
      state = file.stat().st_size, file.stat().st_mtime_ns
      if self._sent.get(file) == state:
        continue
      target = self._folder / str(file.relative_to(self.local))
      with writing.to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with file.open('rb') as source, target.open('wb') as sink:
          shutil.copyfileobj(source, sink, 2**20)
      self._sent[file] = state
