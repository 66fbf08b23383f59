"""A run's folder, on disk or in a bucket (gs://), behind one kind of path.

A bucket knows whole objects: nothing is appended to one, and none is seen half
written. So what grows (metrics.jsonl, TensorBoard's and the profiler's files)
is written on disk, and copied into the bucket from time to time. The arrays of
checkpoints go there without a detour, by TensorStore.
"""

import importlib.util
import pathlib
import shutil
import tempfile

from etils import epath

from configs.errors import require



def check(text, name: str = '--workdir') -> None:
  """Raises ValueError for what is neither a folder on disk nor in a bucket."""
  scheme, remote, rest = str(text).partition('://')
  require(not remote or scheme == 'gs', f'{name} is {str(text)!r}, of which '
          f'{scheme}:// is not known: choose a folder on disk, or a bucket as '
          'gs://BUCKET/NAME')
  bucket, _, folder = rest.partition('/')
  require(not remote or bucket and folder.strip('/'), f'{name} is '
          f'{str(text)!r}, which names no folder of a bucket: write '
          'gs://BUCKET/NAME')


def path(text, name: str = '--workdir') -> epath.Path:
  """Returns a folder or file, which need not be there, as a path.

  Args:
    text: a path on disk, or gs://BUCKET/NAME.
    name: of the flag or field that holds it, for what is refused.
  """
  check(text, name)
  if in_bucket(text):
    require(importlib.util.find_spec('gcsfs') is not None, f'{name} is '
            f"{str(text)!r}, and gcsfs is not installed: run pip install -e "
            "'.[gcs]', or choose a folder on disk")
    _see_what_others_write()
  return epath.Path(text)


def in_bucket(text) -> bool:
  return '://' in str(text)


def _see_what_others_write() -> None:
  """Listings are cached, else, and other processes write into the bucket; so
  does TensorStore in this one."""
  import fsspec
  fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False


def write(file: epath.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  file.parent.mkdir(parents=True, exist_ok=True)
  if in_bucket(file):
    file.write_text(text)
    return
  partial = file.with_name(file.name + '.partial')
  partial.write_text(text)
  partial.replace(file)


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
      target.parent.mkdir(parents=True, exist_ok=True)
      with file.open('rb') as source, target.open('wb') as sink:
        shutil.copyfileobj(source, sink, 2**20)
      self._sent[file] = state
