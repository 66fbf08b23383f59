"""A failure to write, told apart from a bug and said in one sentence.

A disk that is full, a folder that was deleted, a bucket that refuses: Python
raises an OSError, which may not name the file; TensorStore, which writes the
arrays of checkpoints, a ValueError, with the number of the operating system's
error in its text.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import os
import pathlib
import re
import types

from etils import epath

from configs.errors import EnvironmentFailure, RequestError

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
def to(what: str, then: Callable[[], str] = again) -> Iterator[None]:
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
    with to(path, then):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._file = self._path.open('ab', buffering=0)

  def write(self, data: bytes) -> None:
    with to(self._path, self._then):
      left = memoryview(data)
      while left:
        left = left[self._file.write(left):]
      if os.fstat(self._file.fileno()).st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, 'it was deleted in mid-run')

  def flush(self) -> None:
    """Nothing: there is no buffer."""

  def close(self) -> None:
    with to(self._path, self._then):
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
