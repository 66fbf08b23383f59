"""Which code a run was started with, and by which command."""

from collections.abc import Iterable
import functools
import hashlib
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def this_start() -> dict[str, str | None]:
  """Returns what config.json remembers of a start of a run:

  commit: of this code; None where it lies in no git repository of its own, as
    when it is installed, or git is not there.
  diff: a hash of what differs from the commit: changes, and Python files that
    are in no commit; '' for nothing, and None where there is no commit.
  command: the command line.
  """
  return {**_code(ROOT), 'command': shlex.join(sys.argv)}


@functools.cache  # what is edited later is not what runs
def _code(root: pathlib.Path) -> dict[str, str | None]:
  commit = _git(root, 'rev-parse', 'HEAD') if (root / '.git').exists() else None
  if commit is None:
    return dict(commit=None, diff=None)
  diff = _git(root, 'diff', '--binary', 'HEAD')
  new = _git(root, 'ls-files', '-z', '--others', '--exclude-standard', '*.py')
  if diff is None or new is None:
    return dict(commit=None, diff=None)
  digest = hashlib.sha256(diff)
  names = [name for name in new.decode().split('\0') if name]
  for name in names:
    digest.update(name.encode() + b'\0' + (root / name).read_bytes())
  return dict(commit=commit.decode().strip(),
              diff=digest.hexdigest()[:16] if diff or names else '')


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
