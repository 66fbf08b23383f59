"""The code that a run was started with, its command, and its data."""

from collections.abc import Iterable, Mapping
import functools
import hashlib
import os
import pathlib
import shlex
import subprocess
import sys
from typing import Any

from common.errors import RequestError
from training import plugins

CODE_FOLDER = pathlib.Path(__file__).parents[2]
# A variable in the environment of a study's runs.
PLAN_VARIABLE = 'ARCHETYPE_PLAN'


def describe_this_start(data: Mapping[str, str] | None = None) -> dict[str,
                                                                       Any]:
  """Returns what config.json remembers of this start of a run, as a dict:
  commit: the commit of this code; None where it lies in no git repository of
    its own, as when it is installed, or git is not there.
  diff: a hash of what differs from the commit: changes, and Python files that
    are in no commit; '' for nothing, and None where there is no commit.
  command: the command line.
  data: a hash of what each source and the tokenizer hold, by their names
    (pipeline.digest_contents); there only if `data` was given.
  files: a short hash of each file from outside the tree, by its path; there
    only if there is one.
  plan: the hash of the study's plan, and when it was frozen; there only for a
    run that a study trains.
  """
  start: dict[str, Any] = {**_describe_code(CODE_FOLDER),
                           'command': shlex.join(sys.argv)}
  if data is not None:
    start['data'] = dict(data)
  if plugins.text_of_loaded_file:
    start['files'] = plugins.hash_loaded_files()
  plan = os.environ.get(PLAN_VARIABLE, '')
  if plan:
    start['plan'] = plan
  return start


@functools.cache  # what is edited later is not what runs
def _describe_code(root: pathlib.Path) -> dict[str, str | None]:
  """Returns the commit of the code in a folder, and a hash of what differs from
  the commit ('' for nothing), as {'commit': ..., 'diff': ...}; None for both
  where the folder is no git repository.

  Args:
    root: the folder of the code.
  """
  unknown = dict(commit=None, diff=None)

  def run_git(*words: str) -> bytes:
    return subprocess.run(['git', '-C', str(root), *words], check=True,
                          capture_output=True).stdout

  # The code may have been installed without its history.
  if not (root / '.git').exists():
    return unknown
  # The commit, and all changes of files that git knows.
  try:
    commit = run_git('rev-parse', 'HEAD').decode().strip()
    changes = run_git('diff', '--binary', 'HEAD')
    new_files = run_git(
        'ls-files', '-z', '--others', '--exclude-standard', '*.py')
  except (OSError, subprocess.CalledProcessError):
    return unknown

  # Files that git does not know yet are changes, too.
  for name in new_files.split(b'\0')[:-1]:
    changes += name + b'\0'
    file = root / os.fsdecode(name)
    if file.is_file():
      changes += file.read_bytes()
  if not changes:
    return dict(commit=commit, diff='')
  return dict(commit=commit, diff=hashlib.sha256(changes).hexdigest()[:16])


def list_codes(starts: Iterable) -> list[str]:
  """Returns the different versions of the code with which a run was started, in
  order, as far as they are known: each as its commit, the hash of what differed
  from it, and the files from outside the tree.

  Args:
    starts: the records of the run's starts, as describe_this_start returns
      them, the first start first.
  """
  codes = []
  for start in starts:
    parts = []
    if start['commit'] is not None:
      parts.append(f'commit {start["commit"][:12]}')
    if start['diff']:
      parts.append(f'changes {start["diff"]}')
    for file, digest in start.get('files', {}).items():
      parts.append(f'{file} {digest}')
    # Most starts of a run have the same code.
    code = ' with '.join(parts)
    if code and code not in codes:
      codes.append(code)
  return codes


def list_code_changes(starts: Iterable) -> list[str]:
  """Returns a line where the code that runs now differs from that of the last
  start of a run, as far as both are known; else [].

  Args:
    starts: the records of the run's starts, as describe_this_start returns
      them, the first start first.
  """
  last_start = list(starts)[-1:]
  old_codes = list_codes(last_start)
  new_codes = list_codes([describe_this_start()])
  if not old_codes or not new_codes or old_codes == new_codes:
    return []
  return ['the code has changed since this run was last started: '
          f'{old_codes[0]} -> {new_codes[0]}']


def last_known_data(starts: Iterable) -> dict[str, str]:
  """Returns the hashes of a run's sources and tokenizer, by their names, at the
  last of its starts that knows them; {} where none does.

  Args:
    starts: the records of the run's starts, as describe_this_start returns
      them, the first start first.
  """
  hash_of_source: dict[str, str] = {}
  for start in starts:
    hash_of_source = start.get('data', hash_of_source)
  return hash_of_source


def check_data(starts: Iterable, data: Mapping[str, str], allowed: bool
               ) -> list[str]:
  """Returns a line for each source of data, or tokenizer, that no longer holds
  what it held when the run was last started.

  Args:
    starts: the records of the run's starts, as describe_this_start returns
      them, the first start first.
    data: the hashes of what the sources and the tokenizer hold now.
    allowed: whether the run may go on with other data.

  Raises:
    RequestError: where there is such a source and it may not.
  """
  old_data = last_known_data(starts)
  lines = []
  for name, new_hash in data.items():
    if name in old_data and new_hash != old_data[name]:
      lines.append('the data have changed since this run was last started: '
                   f'what {name!r} holds is not the same')
  if lines and not allowed:
    raise RequestError(
        '\n'.join(lines) + '\nPut the files back, take another --workdir, or '
        'pass --allow_config_change to go on with other batches')
  return lines
