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

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import errno
import fcntl
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
import uuid
from typing import Any

from etils import epath

from common.errors import EnvironmentFailure, RequestError, require, short

# In the folder of a run.
CONFIG_FILE = 'config.json'
CHECKPOINTS_FOLDER = 'checkpoints'
MOST_BYTES_READ_WHOLE = 1 << 30  # the most bytes of a file that is read whole
DERIVED_KEY = 'derived'  # a field of a run's config.json, and of no other
# The name of a file that is not whole yet begins so.
_PARTIAL_FILE_PREFIX = '.writing-'
_STALE_SECONDS = 24 * 3600


def check_folder_name(text: str | os.PathLike, name: str = '--workdir') -> None:
  """Raises RequestError for what is neither on disk nor in a bucket, and
  cannot be."""
  usable = re.fullmatch(
      r'(?s)(gs://[^/]+/+[^/]|(?!.*://))[^\0\ud800-\udc7f]*', str(text))
  require(usable is not None, f'{name} is {str(text)!r}: choose a folder on '
          'disk, or a bucket as gs://BUCKET/NAME')


def checked_path(text: str | os.PathLike,
                 name: str = '--workdir') -> epath.Path:
  """Returns a folder or file, which need not be there, as a path.

  Args:
    text: a path on disk, or gs://BUCKET/NAME.
    name: the flag or field that holds it, for what is refused.
  """
  check_folder_name(text, name)
  if is_in_bucket(text):
    require(importlib.util.find_spec('gcsfs') is not None, f'{name} is '
            f"{str(text)!r}, and gcsfs is not installed: run pip install -e "
            "'.[gcs]', or choose a folder on disk")
    # Listings are cached, else, and other processes write into the bucket; so
    # does TensorStore in this one.
    import fsspec
    fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False
  return epath.Path(text)


def is_in_bucket(text: str | os.PathLike) -> bool:
  """Whether a path is that of a bucket, and not on disk."""
  return '://' in str(text)


def file_size(file: epath.Path) -> int:
  """Returns how many bytes a file has. On disk epath's stat() would look up the
  name of its owner, which a container or a shared folder may not know."""
  if is_in_bucket(file):
    return file.stat().length
  return os.stat(file).st_size


def write_file(file: epath.Path, data: str | bytes) -> None:
  """Writes a file whole or not at all, see `whole`."""
  if isinstance(data, str):
    data = data.encode()
  with write_atomically(file) as write_:
    write_(data)


def write_json(file: epath.Path | None, tree: Any) -> None:
  """Writes what JSON can hold to a file that a flag names; None: it names none.
  """
  if file is not None:
    write_file(file, json.dumps(tree, indent=1) + '\n')


def write_picture(file: epath.Path, figure: Any) -> None:
  """Writes a drawing of matplotlib in the format that the ending of the file's
  name names: .png, .svg or .pdf."""
  write_file(file, render_picture(figure, file.suffix[1:], 150))


def render_picture(figure: Any, kind: str, dpi: int) -> bytes:
  """Returns a drawing of matplotlib as a file of a kind holds it, without the
  time at which it was drawn."""
  metadata = {'svg': {'Date': None}, 'pdf': {'CreationDate': None}}
  file = io.BytesIO()
  figure.savefig(file, format=kind, dpi=dpi, metadata=metadata.get(kind))
  return file.getvalue()


@contextlib.contextmanager
def write_atomically(target: epath.Path) -> Iterator[Callable[[bytes], None]]:
  """Gives write(data) of a file that is there once the block has ended, and
  never a part of it, whoever else writes it too. What killed processes left in
  its folder of what they were writing is removed.

  Raises:
    EnvironmentFailure: where it cannot be written. What the block itself
      raises passes through.
  """
  # On disk it is written under another name, and moved to its place.
  on_disk = not is_in_bucket(target)
  partial = target
  with explain_write_failures(target):
    target.parent.mkdir(parents=True, exist_ok=True)
    if on_disk:
      _remove_abandoned_files(target.parent)
      unique = f'{host_name()}-{os.getpid()}-{uuid.uuid4().hex}'
      partial = target.with_name(f'{_PARTIAL_FILE_PREFIX}{unique}')
    file = partial.open('wb')

  def write_(data: bytes) -> None:
    with explain_write_failures(target):
      file.write(data)

  try:
    yield write_
    with explain_write_failures(target):
      if on_disk:
        file.flush()
        os.fsync(file.fileno())  # or a crash may leave it empty
      file.close()
      if on_disk:
        partial.replace(target)
  finally:
    with contextlib.suppress(OSError):  # after the one that was told
      file.close()
    if on_disk:
      partial.unlink(missing_ok=True)


def _remove_abandoned_files(folder: epath.Path) -> None:
  """Removes the files that `whole` began to write and whose process is gone.
  Those of other machines, or under names of another form, are removed once
  nothing was written to them for a day."""
  beginning = re.escape(f'{_PARTIAL_FILE_PREFIX}{host_name()}')
  name = re.compile(f'{beginning}-([0-9]{{1,9}})-.*')
  for left in pathlib.Path(folder).glob(f'{_PARTIAL_FILE_PREFIX}*'):
    # A file may have been moved to its place by now.
    with contextlib.suppress(OSError):
      ours = name.fullmatch(left.name)
      is_gone = ours is not None and not is_process_alive(int(ours[1]))
      age = time.time() - left.stat().st_mtime
      if not is_gone and age <= _STALE_SECONDS:
        continue
      if left.is_dir():
        shutil.rmtree(left)
      else:
        left.unlink()


def host_name() -> str:
  """Returns a name of this machine, and of the space of its process numbers if
  it has several."""
  spaces = '/proc/self/ns/pid'  # on Linux
  space = 0
  if os.path.exists(spaces):
    space = os.stat(spaces).st_ino
  return f'{socket.gethostname()}.{space}'


def is_process_alive(pid: int) -> bool:
  """Whether a process of this machine runs."""
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True  # it is another user's
  return True


def read_small(file: epath.Path) -> bytes:
  """Returns the bytes of a file that is small, as a JSON file is.

  Raises:
    RequestError: for a device or a pipe, which may have no end, and for more
      than MOST_SMALL bytes.
  """
  if is_in_bucket(file):
    return file.read_bytes()
  status = os.stat(file)
  require(stat.S_ISREG(status.st_mode), f'{file} is no file that can be read '
          'to its end, but a folder, a device or a pipe')
  require(status.st_size <= MOST_BYTES_READ_WHOLE,
          f'{file} has {status.st_size:,} bytes, '
          f'and such a file has at most {MOST_BYTES_READ_WHOLE:,}')
  with open(file, 'rb') as opened:
    return opened.read(status.st_size)


def read_json(file: epath.Path, fields: Mapping[str, Any] = {}
              ) -> dict[str, Any]:
  """Returns the object that a file of JSON holds; see `parse`."""
  return parse_json_object(read_small(file), str(file), fields)


def parse_json_object(text: str | bytes, who: str,
                      fields: Mapping[str, Any] = {}
                      ) -> dict[str, Any]:
  """Returns the object that JSON text holds.

  Args:
    text: the text of a whole file, or of a line.
    who: the file, as the subject of a sentence.
    fields: the types of fields that must be there, by name.

  Raises:
    RequestError: where it is no JSON, no object, or a field is another.
  """
  try:
    tree = json.loads(text)
  except (ValueError, RecursionError) as error:  # of UTF-8, or of JSON
    raise RequestError(f'{who} is damaged, and is no JSON: {error}') from error
  require(isinstance(tree, dict), f'{who} is damaged: it is {short(tree)}, and '
          'must be an object')
  for name, kind in fields.items():
    require(isinstance(tree.get(name), kind), f'{who} is damaged: its {name!r} '
            f'is {short(tree.get(name))}')
  return tree


# Before any work.


def check_folder_is_writable(folder: str | os.PathLike,
                             name: str = '--workdir') -> None:
  """Raises RequestError unless files can be written in a folder that is named,
  or where it would be made; nothing is made. A bucket is not tried.

  Args:
    folder: a folder on disk, or in a bucket.
    name: the flag or field that holds it.
  """
  require(str(folder) != '', f"{name} is '': name a folder")
  if is_in_bucket(folder):
    return
  try:
    # The first folder above it that is there.
    nearest = pathlib.Path(folder).absolute()
    while not nearest.exists():
      nearest = nearest.parent
    tempfile.TemporaryFile(dir=nearest).close()
  except OSError as error:
    raise RequestError(f'{name} is {str(folder)!r}, where nothing can be '
                       f'written: {error.strerror}') from error


def check_file_is_writable(file: str | os.PathLike, name: str) -> None:
  """Raises RequestError unless a file can be written, or written anew."""
  if is_in_bucket(file):
    return
  require(not os.path.isdir(file), f'{name} is {str(file)!r}, which is a '
          'folder')
  check_folder_is_writable(pathlib.Path(file).parent, name)


def checked_output_file(text: str, name: str) -> epath.Path | None:
  """Returns the file that a flag names, once it is known that it can be
  written; None where the flag is ''."""
  if not text:
    return None
  check_file_is_writable(text, name)
  return checked_path(text, name)


def refuse_folder_of_run(folder: str | os.PathLike, name: str,
                         marker: str = '') -> None:
  """Raises RequestError for the folder of a training run.

  Args:
    folder: the folder of something that is no run itself, and would write among
      its files.
    name: the flag that holds it.
    marker: a file that says that it was written there before, and may go on;
      '': there is none.
  """
  folder = checked_path(folder, name)
  if marker and (folder / marker).exists():
    return
  if has_checkpoints(folder) or has_config(folder):
    raise RequestError(f'{name} is {str(folder)!r}, which holds a training '
                       'run: choose another folder')


def refuse_folder_of_others(folder: str | os.PathLike, name: str) -> None:
  """Raises RequestError where a run would write among the files of a sweep or
  a study, or over the config.json of something else, such as Hugging Face's
  weights; `name` is the flag's."""
  folder = checked_path(folder, name)
  for marker in ('sweep.json', 'study.json'):
    require(not (folder / marker).exists(),
            f'{name} is {str(folder)!r}, which holds a '
            f'{marker.removesuffix(".json")} ({marker}): choose another folder')
  if (folder / CONFIG_FILE).exists() and not has_config(folder):
    raise RequestError(
        f'{name} is {str(folder)!r}, whose {CONFIG_FILE} is not that of a run '
        f'(a Hugging Face folder has one, too): take another {name}')


def has_checkpoints(folder: epath.Path) -> bool:
  """Whether a folder is that of a run which has begun to train."""
  return (folder / CHECKPOINTS_FOLDER).exists()


def has_config(folder: str | os.PathLike) -> bool:
  """Whether there is a config.json in a folder, and it is that of a run."""
  return DERIVED_KEY in _names_in_config_json(folder)


def is_hugging_face(folder: str | os.PathLike) -> bool:
  """Whether there is a config.json in a folder, and it is that of Hugging
  Face's weights."""
  return 'model_type' in _names_in_config_json(folder)


def _names_in_config_json(folder: str | os.PathLike) -> Collection[str]:
  """Returns the names of the fields in a folder's config.json; (): none."""
  try:
    tree = json.loads(read_small(epath.Path(folder) / CONFIG_FILE))
  except (OSError, ValueError, RecursionError):
    return ()
  return tree if isinstance(tree, dict) else ()


def lock_workdir(workdir: str | os.PathLike, primary: bool = True
                 ) -> contextlib.AbstractContextManager:
  """Locks the workdir for this process, while the context lasts.

  In a bucket nothing can be locked, and nothing is done. A file system without
  locks is warned of.

  Args:
    workdir: the folder of the run.
    primary: whether this is process 0, the only one of a run that locks.

  Raises:
    RequestError: where another run has it.
  """
  if not primary or is_in_bucket(workdir):
    return contextlib.nullcontext()
  lock = pathlib.Path(workdir) / 'lock'
  lock.parent.mkdir(parents=True, exist_ok=True)
  file = lock.open('w')
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.close()
    raise RequestError(f'another process trains in {workdir}: wait until it '
                       'has ended, or take another --workdir') from error
  except OSError as error:  # as Lustre mounted without flock
    print(f'warning: {workdir} has no file locks ({error.strerror}): nothing '
          'keeps a second process from training in it', file=sys.stderr)
  return file


# Files that grow.


class GrowingFile:
  """A file that grows while a run goes on: each write is on disk, or raises
  EnvironmentFailure. It notices that the file was deleted, since writes then
  succeed and are lost."""

  def __init__(self, path: str | os.PathLike):
    self._path = pathlib.Path(path)
    with explain_write_failures(path):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._file = self._path.open('ab', buffering=0)

  def write(self, data: bytes) -> None:
    with explain_write_failures(self._path):
      left = memoryview(data)
      while left:
        written = self._file.write(left)
        left = left[written:]
      if os.fstat(self._file.fileno()).st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, 'it was deleted in mid-run')

  def flush(self) -> None:
    """Does nothing: there is no buffer."""

  def close(self) -> None:
    with explain_write_failures(self._path), self._file:
      os.fsync(self._file.fileno())

  def __enter__(self) -> 'GrowingFile':
    return self

  def __exit__(self, *error) -> None:
    self.close()


class BucketUploads:
  """Files that grow, and belong into a folder that may be in a bucket.

  Attributes:
    local: the folder to write them to; that on disk itself, if it is there.
  """

  def __init__(self, folder: epath.Path):
    self._folder = folder
    # By file: its size and time when it was copied last.
    self._sent: dict[pathlib.Path, tuple[int, int]] = {}
    self.local = folder
    if is_in_bucket(folder):
      self._temporary = tempfile.TemporaryDirectory(prefix='archetype-')
      self.local = epath.Path(self._temporary.name)

  def fetch(self, name: str) -> None:
    """Brings a file from the bucket, to be gone on with."""
    if is_in_bucket(self._folder) and (self._folder / name).exists():
      (self.local / name).write_bytes((self._folder / name).read_bytes())

  def push(self) -> None:
    """Copies into the bucket what has changed since the last time."""
    if not is_in_bucket(self._folder):
      return
    for file in pathlib.Path(self.local).rglob('*'):
      # Size and time tell whether a file was copied as it is now.
      status = file.stat()
      state = status.st_size, status.st_mtime_ns
      if file.is_dir() or self._sent.get(file) == state:
        continue
      target = self._folder / str(file.relative_to(self.local))
      with explain_write_failures(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with file.open('rb') as source, target.open('wb') as sink:
          shutil.copyfileobj(source, sink, 2**20)
      self._sent[file] = state


# Refusals of the environment.

# The beginning of TensorStore's text where a bucket refuses (the codes of
# absl::Status).
_REFUSAL_OF_BUCKET = re.compile(
    r'(?:ABORTED|DEADLINE_EXCEEDED|NOT_FOUND|PERMISSION_DENIED'
    r'|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE): (.*)')
# The packages through which a bucket is written beside TensorStore; their
# errors have no common base.
_BUCKET_CLIENTS = ('aiohttp', 'gcsfs')


@contextlib.contextmanager
def explain_write_failures(what: str | os.PathLike) -> Iterator[None]:
  """Turns a failure of the environment into a sentence, while the `with` block
  writes.

  Args:
    what: the file, or words for it; it follows 'cannot write'.

  Raises:
    EnvironmentFailure: instead of an error whose reason lies outside of the
      program. Every other error passes through as it is.
  """
  try:
    yield
  except (EnvironmentFailure, RequestError):
    raise
  except Exception as error:  # those of TensorStore have many types
    why = environment_reason(error)
    if not why:
      raise
    raise EnvironmentFailure(f'cannot write {what}: {why}; once that is '
                             'mended, the same command goes on') from error


def environment_reason(error: BaseException | None) -> str:
  """Returns the reason of an error that the environment caused; '': the
  environment did not cause it."""
  chain = []
  while error is not None:
    chain.append(error)
    error = error.__cause__ or error.__context__

  # The failure that TensorStore met comes first: Orbax, which cleans up after
  # it, may have met more.
  for one in chain:
    text = str(one).split('\n')[0]
    number = re.search(r"\[os_error_code='(\d+)'", text)
    if number:
      return os.strerror(int(number[1]))
    status = _REFUSAL_OF_BUCKET.match(text)
    if status and isinstance(one, ValueError):
      return status[1].split(' [')[0][:300]
  for one in chain:
    if isinstance(one, OSError):
      return one.strerror or str(one) or type(one).__name__
    if type(one).__module__.partition('.')[0] in _BUCKET_CLIENTS:
      return f'{type(one).__name__}: {one}'
  return ''
