"""Which code a run was started with, by which command, and on which data."""

from collections.abc import Iterable, Mapping
import functools
import hashlib
import os
import pathlib
import shlex
import subprocess
import sys
from typing import Any

from configs.errors import require
from training.workdir import schema

ROOT = pathlib.Path(__file__).parents[2]
_START = {'commit': (str, type(None)), 'diff': (str, type(None)),
          'command': str}
_DATA = schema.Each(str, '(?s).*')  # in a start that knows it


def this_start(data: Mapping[str, str] | None = None) -> dict[str, Any]:
  """Returns what config.json remembers of a start of a run:

  commit: of this code; None where it lies in no git repository of its own, as
    when it is installed, or git is not there.
  diff: a hash of what differs from the commit: changes, and Python files that
    are in no commit; '' for nothing, and None where there is no commit.
  command: the command line.
  data: what was given, a hash of what each source holds, by its name
    (pipeline.contents); there only if it was given.
  """
  return {**_code(ROOT), 'command': shlex.join(sys.argv),
          **({} if data is None else {'data': dict(data)})}


def check_shape(starts: Any, who: str) -> None:
  """Raises RequestError for what are no starts out of config.json."""
  starts = list(starts) if isinstance(starts, tuple) else starts
  schema.check_shape(starts, [_START], who)
  for start in starts:
    schema.check_shape(start.get('data', {}), _DATA, f'{who}: data')


@functools.cache  # what is edited later is not what runs
def _code(root: pathlib.Path) -> dict[str, str | None]:
  commit = _git(root, 'rev-parse', 'HEAD') if (root / '.git').exists() else None
  if commit is None:
    return dict(commit=None, diff=None)
  diff = _git(root, 'diff', '--binary', 'HEAD')
  new = _git(root, 'ls-files', '-z', '--others', '--exclude-standard', '*.py')
  if diff is None or new is None:
    return dict(commit=None, diff=None)
  found = [(name, _held(root / os.fsdecode(name)))
           for name in new.split(b'\0') if name]
  files = [(name, held) for name, held in found if held is not None]
  digest = hashlib.sha256(diff)
  for name, held in files:
    digest.update(name + b'\0' + held)
  return dict(commit=commit.decode().strip(),
              diff=digest.hexdigest()[:16] if diff or files else '')


def _held(file: pathlib.Path) -> bytes | None:
  """Returns what a file holds: b'' where it cannot be read, and None where it
  is gone, or is a link to nothing, as the one by which Emacs locks a file."""
  try:
    return file.read_bytes()
  except FileNotFoundError:
    return None
  except OSError:
    return b''


def _git(root: pathlib.Path, *words: str) -> bytes | None:
  """Returns what git prints; None where it fails or is not there."""
  try:
    return subprocess.run(['git', '-C', str(root), *words], check=True,
                          capture_output=True).stdout
  except (OSError, subprocess.CalledProcessError):
    return None


def codes(starts: Iterable) -> list[str]:
  """Returns the different codes of some starts, as far as they are known, each
  as a commit and the hash of what differed from it, in order."""
  found = {}
  for one in starts:
    if one['commit'] is not None:
      changed = f' with changes {one["diff"]}' if one['diff'] else ''
      found[f'commit {one["commit"][:12]}{changed}'] = None
  return list(found)


def changes(starts: Iterable) -> list[str]:
  """Returns a line where the code that runs now is not that of the last start,
  as far as both are known."""
  old, new = codes(list(starts)[-1:]), codes([this_start()])
  if not old or not new or old == new:
    return []
  return [f'the code has changed since this run was last started: {old[0]} -> '
          f'{new[0]}']


def check_data(starts: Iterable, data: Mapping[str, str], allowed: bool
               ) -> list[str]:
  """Returns a line for each source that no longer holds what it held at the
  last start of which that is known.

  Args:
    starts: of the run.
    data: what the sources hold now, as in `this_start`.
    allowed: whether the run may go on with other data.

  Raises:
    RequestError: where there is such a source and it may not.
  """
  known = [start['data'] for start in starts if 'data' in start]
  before = known[-1] if known else {}
  lines = [f'the data have changed since this run was last started: what '
           f'{name!r} holds is not the same' for name in data
           if data[name] != before.get(name, data[name])]
  require(allowed or not lines, '\n'.join(lines) + '\nPut the files back, '
          'take another --workdir, or pass --allow_config_change to go on with '
          'other batches')
  return lines
