"""Runs a program with gs:// in a folder of this machine.

  python -m tests.helpers.bucket FOLDER PROGRAM [words]

PROGRAM is a file or a module. gs://NAME/... is FOLDER/NAME/..., for fsspec
(through which etils goes) and for TensorStore (which writes the arrays). As in
a bucket, folders need not be made, and nothing is appended to a file.
"""

import importlib.machinery
import runpy
import sys
import types

import fsspec
from fsspec.implementations import dirfs
from fsspec.implementations import local


class Bucket(dirfs.DirFileSystem):
  """What gcsfs is to fsspec."""
  protocol = ('gs', 'gcs')
  folder = ''

  def __init__(self, **options):
    assert not options.pop('use_listings_cache')
    super().__init__(self.folder, local.LocalFileSystem(auto_mkdir=True))

  @classmethod
  def _strip_protocol(cls, path):
    if isinstance(path, list):
      return [cls._strip_protocol(p) for p in path]
    return path.removeprefix('gs://').rstrip('/')

  def open(self, path, mode='rb', **options):
    assert 'a' not in mode and '+' not in mode, f'{path} in mode {mode}'
    return super().open(self._strip_protocol(path), mode, **options)

  def _join(self, path):
    return super()._join(self._strip_protocol(path))


def install(folder: str) -> None:
  from orbax.checkpoint._src.path import gcs_utils
  gcsfs = types.ModuleType('gcsfs')
  gcsfs.__spec__ = importlib.machinery.ModuleSpec('gcsfs', None)
  sys.modules['gcsfs'] = gcsfs
  Bucket.folder = folder
  fsspec.register_implementation('gs', Bucket, clobber=True)
  fsspec.register_implementation('gcs', Bucket, clobber=True)
  gcs_utils.get_bucket = lambda name: object()
  gcs_utils.get_kvstore_for_gcs = lambda path: dict(
      driver='file', path=f'{folder}/{path.removeprefix("gs://")}')


def main():
  _, folder, program, *words = sys.argv
  install(folder)
  sys.argv = [program, *words]
  if program.endswith('.py'):
    runpy.run_path(program, run_name='__main__')
  else:
    runpy.run_module(program, run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
