"""A run's folder, on disk or in a bucket (gs://), behind one kind of path.

A bucket knows whole objects: nothing is appended to one, and none is seen half
written. So what grows (metrics.jsonl, TensorBoard's and the profiler's files)
is written on disk, and copied into the bucket from time to time. The arrays of
checkpoints go there without a detour, by TensorStore.

A failure to write is told apart from a bug and said in one sentence. A disk
that is full, a folder that was deleted, a bucket that refuses: Python raises an
OSError, which may not name the file; TensorStore, which writes the arrays of
checkpoints, a ValueError, with the number of the operating system's error in
its text.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import types
from typing import TextIO

from etils import epath

from configs.errors import EnvironmentFailure, RequestError, require

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
  with writing(file):
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
          f'{name} is {str(folder)!r}, which holds a training run: choose '
          'another folder')


def refuse_others(folder: str | os.PathLike, name: str) -> None:
  """Raises RequestError where a run would write over the config.json of
  something else, such as Hugging Face's weights; `name` is the flag's."""
  file = path(folder, name) / CONFIG
  require(not file.exists() or has_config(folder), f'{name} is '
          f'{str(folder)!r}, whose {CONFIG} is not that of a run (a Hugging '
          f'Face folder has one, too): take another {name}')


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
    raise RequestError(f'{name} is {str(path)!r}, where nothing can be '
                       f'written: {reason}') from error
  except ValueError as error:
    if isinstance(error, RequestError):
      raise
    raise RequestError(f'{name} is {str(path)!r}, which is no path: '
                       f'{error}') from error  # a NUL in it


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
      with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with file.open('rb') as source, target.open('wb') as sink:
          shutil.copyfileobj(source, sink, 2**20)
      self._sent[file] = state


# How TensorStore begins a refusal of a bucket (the codes of absl::Status).
_STATUS = re.compile(
    r'(ABORTED|DEADLINE_EXCEEDED|NOT_FOUND|PERMISSION_DENIED'
    r'|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE): (.*)')
# What a bucket is written through beside TensorStore; their errors have no
# common base.
_CLIENTS = ('aiohttp', 'gcsfs')
_WORDS = {'NOT_FOUND': 'what was written of it is gone'}
_OS_ERROR = re.compile(r"\[os_error_code='(\d+)'")


def again() -> str:
  return 'once that is mended, the same command goes on'


@contextlib.contextmanager
def writing(what: str, then: Callable[[], str] = again) -> Iterator[None]:
  """Around what writes: a failure of the environment becomes a sentence.

  Args:
    what: the file, or words for it; it follows 'cannot write'.
    then: returns how to go on; called after a failure.

  Raises:
    EnvironmentFailure: instead of an error whose reason lies outside of the
      program. Every other error passes through as it is.
  """
  try:
    yield
  except (EnvironmentFailure, RequestError):
    raise
  except Exception as error:  # those of TensorStore have many types
    why = reason(error)
    if not why:
      raise
    raise EnvironmentFailure(f'cannot write {what}: {why}; {then()}') from error


def reason(error: BaseException) -> str:
  """Returns what of the environment an error comes from; '': it does not."""
  chain = []
  while error is not None:
    chain.append(error)
    error = error.__cause__ or error.__context__
  # What TensorStore met comes first: Orbax, which cleans up after it, may have
  # met more.
  reasons = [*map(_of_tensorstore, chain), *map(_of_python, chain)]
  return next(filter(None, reasons), '')


def _of_tensorstore(error: BaseException) -> str:
  text = str(error).split('\n')[0]
  number = _OS_ERROR.search(text)
  if number:
    return os.strerror(int(number[1]))
  status = isinstance(error, ValueError) and _STATUS.match(text)
  if status:
    return _WORDS.get(status[1]) or status[2].split(' [')[0][:300]
  return ''


def _of_python(error: BaseException) -> str:
  text = str(error).split('\n')[0]
  if isinstance(error, OSError):
    return error.strerror or text or type(error).__name__
  if type(error).__module__.partition('.')[0] in _CLIENTS:
    return f'{type(error).__name__}: {text}'
  return ''


class File:
  """A file that grows while a run goes on: each write is on disk, or raises
  EnvironmentFailure. It notices that the file was deleted, since writes then
  succeed and are lost."""

  def __init__(self, path: epath.Path, then: Callable[[], str] = again):
    self._path, self._then = pathlib.Path(path), then
    with writing(path, then):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._file = self._path.open('ab', buffering=0)

  def write(self, data: bytes) -> None:
    with writing(self._path, self._then):
      left = memoryview(data)
      while left:
        left = left[self._file.write(left):]
      if os.fstat(self._file.fileno()).st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, 'it was deleted in mid-run')

  def flush(self) -> None:
    """Nothing: there is no buffer."""

  def close(self) -> None:
    with writing(self._path, self._then):
      os.fsync(self._file.fileno())
      self._file.close()

  def __enter__(self) -> 'File':
    return self

  def __exit__(self, kind: type[BaseException] | None,
               error: BaseException | None,
               traceback: types.TracebackType | None):
    if error is None:
      self.close()
    else:
      self._file.close()


# What a file system says that has none, as Lustre mounted without flock.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

_held = []  # open files, whose locks end with the process, however it ends


def lock(workdir: epath.Path, primary: bool = True) -> None:
  """Locks the workdir for this process, until it ends.

  In a bucket nothing can be locked, and nothing is done. A file system without
  locks is warned of.

  Args:
    workdir: of the run.
    primary: whether this is process 0, the only one of a run that locks.

  Raises:
    ValueError: where another run has it.
  """
  if primary and '://' not in str(workdir):
    _held.append(_locked(workdir))


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
  """Locks the workdir as `lock` does, until the context ends: for a process
  that trains in several."""
  if '://' in str(workdir):
    yield
    return
  with _locked(workdir):
    yield


def _locked(workdir: epath.Path) -> TextIO:
  """Returns the open file whose lock ends when it is closed."""
  path = pathlib.Path(workdir) / 'lock'
  path.parent.mkdir(parents=True, exist_ok=True)
  file = path.open('w')
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    free = True
  except BlockingIOError:
    free = False
    file.close()
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    free = True
    print(f'warning: {workdir} has no file locks ({error.strerror}): nothing '
          'keeps a second process from training in it', file=sys.stderr)
  require(free, f'another process trains in {workdir}: wait until it has '
          'ended, or take another --workdir')
  return file
