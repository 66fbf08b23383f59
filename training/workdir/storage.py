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

from common.errors import EnvironmentFailure, RequestError, require, shorten

# In the folder of a run.
CONFIG_FILE = 'config.json'
CHECKPOINTS_FOLDER = 'checkpoints'
MOST_BYTES_READ_WHOLE = 1 << 30  # the most bytes of a file that is read whole
DERIVED_KEY = 'derived'  # a field of a run's config.json, and of no other
# The name of a file that is not whole yet begins so.
_PARTIAL_FILE_PREFIX = '.writing-'
_STALE_SECONDS = 24 * 3600


def check_folder_name(text: str | os.PathLike, name: str = '--workdir') -> None:
  """Checks that a text can be the name of a folder on disk, or in a bucket as
  gs://BUCKET/NAME. The folder is not looked up.

  Args:
    text: the name of the folder.
    name: the flag or field that holds it, for the message.

  Raises:
    RequestError: for a text that cannot be such a name.
  """
  # The pattern is either gs://BUCKET/ and the first character of a name, or a
  # path without '://'; then any characters but NUL, which file systems refuse,
  # and the surrogates from d800 to dc7f, which cannot be encoded. (Python
  # writes bytes that are not UTF-8 as the surrogates from dc80 on.) (?s) lets a
  # dot match a line break.
  usable = re.fullmatch(
      r'(?s)(gs://[^/]+/+[^/]|(?!.*://))[^\0\ud800-\udc7f]*', str(text))
  require(usable is not None, f'{name} is {str(text)!r}: choose a folder on '
          'disk, or a bucket as gs://BUCKET/NAME')


def checked_path(text: str | os.PathLike, name: str = '--workdir'
                 ) -> epath.Path:
  """Checks the name of a folder or file and returns it as a path. It need not
  exist.

  Args:
    text: a path on disk, or gs://BUCKET/NAME.
    name: the flag or field that holds it, for the message.

  Raises:
    RequestError: for a text that cannot be a name, and for a bucket if gcsfs,
      which reads buckets, is not installed.
  """
  check_folder_name(text, name)
  if is_in_bucket(text):
    require(importlib.util.find_spec('gcsfs') is not None, f'{name} is '
            f"{str(text)!r}, and gcsfs is not installed: run pip install -e "
            "'.[gcs]', or choose a folder on disk")
    # fsspec must not cache the listings of folders: other processes write to
    # the bucket, and so does TensorStore in this one.
    import fsspec
    fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False
  return epath.Path(text)


def is_in_bucket(text: str | os.PathLike) -> bool:
  """Whether a path is that of a bucket, as gs://BUCKET/NAME, and not on
  disk."""
  return '://' in str(text)


def file_size(file: epath.Path) -> int:
  """Returns how many bytes a file has. (On disk, epath's stat() would look up
  the name of its owner, which a container or a shared folder may not know.)"""
  if is_in_bucket(file):
    return file.stat().length
  return os.stat(file).st_size


def write_file(file: epath.Path, data: str | bytes) -> None:
  """Writes a file whole or not at all; see `write_atomically`."""
  if isinstance(data, str):
    data = data.encode()
  with write_atomically(file) as write_bytes:
    write_bytes(data)


def write_json(file: epath.Path | None, tree: Any) -> None:
  """Writes numbers, texts, lists and dicts to a file as JSON; does nothing
  where `file` is None, as for a flag that names no file."""
  if file is not None:
    write_file(file, json.dumps(tree, indent=1) + '\n')


def write_picture(file: epath.Path, figure: Any) -> None:
  """Writes a figure of matplotlib in the format that the ending of the file's
  name names: .png, .svg or .pdf."""
  write_file(file, render_picture(figure, file_format=file.suffix[1:], dpi=150))


def render_picture(figure: Any, file_format: str, dpi: int) -> bytes:
  """Renders a figure as the bytes of a picture file. The time of drawing is
  left out of the file, so that equal figures give equal bytes.

  Args:
    figure: a figure of Matplotlib.
    file_format: the format of the file: png, svg or pdf.
    dpi: the dots per inch.
  """
  metadata = {'svg': {'Date': None}, 'pdf': {'CreationDate': None}}
  file = io.BytesIO()
  figure.savefig(file, format=file_format, dpi=dpi,
                 metadata=metadata.get(file_format))
  return file.getvalue()


@contextlib.contextmanager
def write_atomically(target: epath.Path) -> Iterator[Callable[[bytes], None]]:
  """Gives the `with` block a function write(data) for a file that appears once
  the block has ended, and never in part, whoever else writes it too. Files that
  killed processes left half written in the same folder are removed.

  Args:
    target: the file.

  Yields:
    The function write(data), which appends bytes to the file.

  Raises:
    EnvironmentFailure: where it cannot be written. What the block itself
      raises passes through.
  """
  # On disk it is written under another name, and moved to its place. An object
  # in a bucket appears only when it is whole.
  is_on_disk = not is_in_bucket(target)
  partial_file = target
  with explain_write_failures(target):
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_on_disk:
      _remove_abandoned_files(target.parent)
      unique = f'{host_name()}-{os.getpid()}-{uuid.uuid4().hex}'
      partial_file = target.with_name(f'{_PARTIAL_FILE_PREFIX}{unique}')
    file = partial_file.open('wb')

  def write_bytes(data: bytes) -> None:
    with explain_write_failures(target):
      file.write(data)

  # The block writes; then the file is moved to its place.
  try:
    yield write_bytes
    with explain_write_failures(target):
      if is_on_disk:
        file.flush()
        os.fsync(file.fileno())  # or a crash may leave it empty
      file.close()
      if is_on_disk:
        partial_file.replace(target)
  finally:
    # After a success the file is closed and moved already, and nothing happens
    # here. After a failure this may fail too, and the first one is raised.
    with contextlib.suppress(OSError):
      file.close()
    if is_on_disk:
      partial_file.unlink(missing_ok=True)


def _remove_abandoned_files(folder: epath.Path) -> None:
  """Removes the unfinished files of processes that have ended while
  `write_atomically` was writing them.

  Whether a process still runs is only known on this machine. Files of other
  machines are removed when nothing has been written to them for a day.

  Args:
    folder: the folder that may hold such files.
  """
  # The name of an unfinished file has the machine and the number of the
  # process.
  prefix = re.escape(f'{_PARTIAL_FILE_PREFIX}{host_name()}')
  name_of_this_host = re.compile(f'{prefix}-([0-9]{{1,9}})-.*')
  for file in pathlib.Path(folder).glob(f'{_PARTIAL_FILE_PREFIX}*'):
    # Another process may finish or remove the file at any moment.
    with contextlib.suppress(OSError):
      match = name_of_this_host.fullmatch(file.name)
      has_ended = match is not None and not is_process_alive(int(match[1]))
      age = time.time() - file.stat().st_mtime
      if not has_ended and age <= _STALE_SECONDS:
        continue
      if file.is_dir():
        shutil.rmtree(file)
      else:
        file.unlink()


def host_name() -> str:
  """Returns a name of this machine that processes share only where their
  process numbers mean the same: on Linux with the number of the PID namespace,
  of which each container may have its own."""
  namespace_file = '/proc/self/ns/pid'  # on Linux
  namespace = 0
  if os.path.exists(namespace_file):
    namespace = os.stat(namespace_file).st_ino
  return f'{socket.gethostname()}.{namespace}'


def is_process_alive(pid: int) -> bool:
  """Whether a process with this number runs on this machine."""
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True  # it is another user's
  return True


def read_small(file: epath.Path) -> bytes:
  """Reads a whole file that is expected to be small, such as a JSON file.

  Args:
    file: the file, on disk or in a bucket.

  Raises:
    RequestError: for a device or a pipe, which may have no end, and for a file
      of more than MOST_BYTES_READ_WHOLE bytes.
  """
  if is_in_bucket(file):
    return file.read_bytes()
  status = os.stat(file)
  require(stat.S_ISREG(status.st_mode), f'{file} is no file that can be read '
          'to its end, but a folder, a device or a pipe')
  require(status.st_size <= MOST_BYTES_READ_WHOLE,
          f'{file} has {status.st_size:,} bytes, and such a file has at most '
          f'{MOST_BYTES_READ_WHOLE:,}')
  with open(file, 'rb') as opened:
    return opened.read(status.st_size)


def read_json(file: epath.Path, fields: Mapping[str, Any] = {}
              ) -> dict[str, Any]:
  """Returns the JSON object that a file holds; the arguments and errors are
  those of `parse_json_object`."""
  return parse_json_object(read_small(file), subject=str(file), fields=fields)


def parse_json_object(text: str | bytes, subject: str,
                      fields: Mapping[str, Any] = {}) -> dict[str, Any]:
  """Parses JSON text that must be an object, and checks some of its fields.

  Args:
    text: the text, of a whole file or of a line.
    subject: the name of the file, with which a message begins.
    fields: {name: type} of the fields that must be there.

  Raises:
    RequestError: for a text that is no JSON or no object, and for a field that
      is missing or of another type.
  """
  try:
    tree = json.loads(text)
  except (ValueError, RecursionError) as error:  # of UTF-8, or of JSON
    raise RequestError(
        f'{subject} is damaged, and is no JSON: {error}') from error
  require(isinstance(tree, dict), f'{subject} is damaged: it is '
          f'{shorten(tree)}, and must be an object')
  for name, field_type in fields.items():
    require(isinstance(tree.get(name), field_type),
            f'{subject} is damaged: its {name!r} is {shorten(tree.get(name))}')
  return tree


# Before any work.


def check_folder_is_writable(folder: str | os.PathLike, name: str = '--workdir'
                             ) -> None:
  """Checks that files can be written in a folder; if the folder does not exist,
  that it can be made. Nothing is left behind. A folder in a bucket is not
  checked.

  Args:
    folder: a folder on disk, or in a bucket.
    name: the flag or field that holds it, for the message.

  Raises:
    RequestError: for a folder in which nothing can be written.
  """
  require(str(folder) != '', f"{name} is '': name a folder")
  if is_in_bucket(folder):
    return
  try:
    # Write a temporary file into the nearest folder above it that exists.
    existing_folder = pathlib.Path(folder).absolute()
    while not existing_folder.exists():
      existing_folder = existing_folder.parent
    tempfile.TemporaryFile(dir=existing_folder).close()
  except OSError as error:
    raise RequestError(f'{name} is {str(folder)!r}, where nothing can be '
                       f'written: {error.strerror}') from error


def check_file_is_writable(file: str | os.PathLike, name: str) -> None:
  """Raises RequestError unless a file can be written, or replaced; `name` is
  the flag that holds it. A bucket is not tried."""
  if is_in_bucket(file):
    return
  require(not os.path.isdir(file), f'{name} is {str(file)!r}, which is a '
          'folder')
  check_folder_is_writable(pathlib.Path(file).parent, name)


def checked_output_file(text: str, name: str) -> epath.Path | None:
  """Checks that a program can write to the file that the user names, before any
  work is done, and returns its path.

  Args:
    text: the value of the flag; '': the user wants no such file.
    name: the flag, for the message.

  Returns:
    The path; None if the user wants no such file.

  Raises:
    RequestError: for a file that cannot be written.
  """
  if not text:
    return None
  check_file_is_writable(text, name)
  return checked_path(text, name)


def refuse_folder_of_run(folder: str | os.PathLike, name: str, marker: str = ''
                         ) -> None:
  """Refuses the folder of a training run as the output folder of another
  program, which would mix its files with those of the run.

  Args:
    folder: the folder to which the program writes.
    name: the flag that holds it, for the message.
    marker: the name of a file that the program writes into its folders. A
      folder that has it is not refused, as the program may continue there; '':
      there is no such file.

  Raises:
    RequestError: for the folder of a run.
  """
  folder = checked_path(folder, name)
  if marker and (folder / marker).exists():
    return
  if has_checkpoints(folder) or has_config(folder):
    raise RequestError(f'{name} is {str(folder)!r}, which holds a training '
                       'run: choose another folder')


def refuse_folder_of_others(folder: str | os.PathLike, name: str) -> None:
  """Refuses a folder for a training run in which something else lies: a sweep,
  a study, or weights in the Hugging Face format, whose config.json the run
  would overwrite.

  Args:
    folder: the folder of the run.
    name: the flag that holds it, for the message.

  Raises:
    RequestError: for such a folder.
  """
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
  """Whether a folder holds a run that has begun to train."""
  return (folder / CHECKPOINTS_FOLDER).exists()


def has_config(folder: str | os.PathLike) -> bool:
  """Whether a folder has a config.json that a run of this project wrote."""
  return DERIVED_KEY in _names_in_config_json(folder)


def is_hugging_face(folder: str | os.PathLike) -> bool:
  """Whether a folder has a config.json of weights in the Hugging Face
  format."""
  return 'model_type' in _names_in_config_json(folder)


def _names_in_config_json(folder: str | os.PathLike) -> Collection[str]:
  """Returns the names of the top-level fields in a folder's config.json; ()
  where there is none, or one that cannot be read."""
  try:
    tree = json.loads(read_small(epath.Path(folder) / CONFIG_FILE))
  except (OSError, ValueError, RecursionError):
    return ()
  return tree if isinstance(tree, dict) else ()


def lock_workdir(workdir: str | os.PathLike, primary: bool = True
                 ) -> contextlib.AbstractContextManager:
  """Locks the folder of a run for this process, so that no second process
  trains in it. The lock ends with the `with` block of the result.

  In a bucket nothing can be locked, and nothing is done. On a file system
  without locks a warning is printed.

  Args:
    workdir: the folder of the run.
    primary: whether this is process 0, the only one of a run that locks.

  Returns:
    A context manager, whose end unlocks the folder.

  Raises:
    RequestError: if another process has locked the folder.
  """
  if not primary or is_in_bucket(workdir):
    return contextlib.nullcontext()
  # LOCK_NB refuses at once instead of waiting. The system releases the lock of
  # a process that was killed.
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
  # The file is a context manager, which closes it at the end. That unlocks it.
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
    """Writes bytes at the end of the file.

    Raises:
      EnvironmentFailure: if they cannot be written, or the file was deleted.
    """
    with explain_write_failures(self._path):
      # A write may take a part of the bytes only.
      unwritten = memoryview(data)
      while unwritten:
        written = self._file.write(unwritten)
        unwritten = unwritten[written:]
      # A deleted file has no name (link) left.
      num_links = os.fstat(self._file.fileno()).st_nlink
      if num_links == 0:
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
  """Files that grow, of a folder that may be in a bucket: they are written in a
  folder on disk, and copied into the bucket from time to time.

  Attributes:
    local: the folder to write them to; the folder itself, where it is on disk.
  """

  def __init__(self, folder: epath.Path):
    """Makes the local folder, if the files are to lie in a bucket.

    Args:
      folder: the folder where the files are to lie in the end.
    """
    self._folder = folder
    # The size and the time of each file when it was copied last.
    self._sent: dict[pathlib.Path, tuple[int, int]] = {}
    self.local = folder
    if is_in_bucket(folder):
      self._temporary = tempfile.TemporaryDirectory(prefix='archetype-')
      self.local = epath.Path(self._temporary.name)

  def fetch(self, name: str) -> None:
    """Copies a file from the bucket to the local folder, to append to it."""
    if is_in_bucket(self._folder) and (self._folder / name).exists():
      (self.local / name).write_bytes((self._folder / name).read_bytes())

  def push(self) -> None:
    """Copies to the bucket the local files that have changed since the last
    call. Nothing is done if the run's folder is on disk.
    """
    if not is_in_bucket(self._folder):
      return
    for file in pathlib.Path(self.local).rglob('*'):
      # A file has changed if its size or its time of writing has.
      status = file.stat()
      size_and_time = status.st_size, status.st_mtime_ns
      if file.is_dir() or self._sent.get(file) == size_and_time:
        continue
      target = self._folder / str(file.relative_to(self.local))
      with explain_write_failures(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with file.open('rb') as source, target.open('wb') as sink:
          shutil.copyfileobj(source, sink, 2**20)
      self._sent[file] = size_and_time


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
def explain_write_failures(words_for_file: str | os.PathLike) -> Iterator[None]:
  """Turns errors of the environment, such as a full disk, into an
  EnvironmentFailure with one sentence for the user. It is a context manager,
  around code that writes.

  Args:
    words_for_file: the file, or words for it; the message begins 'cannot write'
      and these words.

  Raises:
    EnvironmentFailure: in place of an error that the environment has caused.
      All other errors pass through as they are.
  """
  try:
    yield
  except (EnvironmentFailure, RequestError):
    raise
  except Exception as error:  # those of TensorStore have many types
    reason = environment_reason(error)
    if not reason:
      raise
    raise EnvironmentFailure(
        f'cannot write {words_for_file}: {reason}; once that is mended, the '
        'same command goes on') from error


def environment_reason(error: BaseException | None) -> str:
  """Says in a few words why the environment has caused an error, for instance
  'No space left on device'.

  Args:
    error: the error; the errors from which it was raised are searched too.

  Returns:
    The reason; '' for an error that the environment has not caused.
  """
  # List the error and its causes, the last one raised first.
  chain = []
  while error is not None:
    chain.append(error)
    error = error.__cause__ or error.__context__

  # Look for an error of TensorStore before any other. Orbax cleans up after it,
  # and may have failed at that too, which would be the wrong reason.
  for cause in chain:
    text = str(cause).split('\n')[0]
    os_error_code = re.search(r"\[os_error_code='(\d+)'", text)
    if os_error_code:
      return os.strerror(int(os_error_code[1]))
    refusal = _REFUSAL_OF_BUCKET.match(text)
    if refusal and isinstance(cause, ValueError):
      return refusal[1].split(' [')[0][:300]

  # Look for Python's own errors, and for those of packages that write to a
  # bucket.
  for cause in chain:
    if isinstance(cause, OSError):
      return cause.strerror or str(cause) or type(cause).__name__
    if type(cause).__module__.partition('.')[0] in _BUCKET_CLIENTS:
      return f'{type(cause).__name__}: {cause}'
  return ''
