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
# The folders in which a new file changes the program, even if nothing else was
# edited: a new system, for example. A new config or a user's own file elsewhere
# does not: a run records its config, and the parts that it takes from files.
FOLDERS_OF_PROGRAM = ('architectures', 'common', 'tools', 'training')
# A variable in the environment of a study's runs.
PLAN_VARIABLE = 'ARCHETYPE_PLAN'


def describe_this_start(data: Mapping[str, str] | None = None) -> dict[str,
                                                                       Any]:
  """Describes with which code and data a run is started now, for its
  config.json.

  Args:
    data: a hash of the content of each data source and of the tokenizer, by
      name (pipeline.digest_contents computes them); None: they are not
      recorded.

  Returns:
    A dict with these keys.
    commit: the commit of this code; None if the code is in no git repository of
      its own (it may be installed), or git is missing.
    diff: a hash of all changes since the commit and of the program's Python
      files in no commit; '' if there are none, None without a commit.
    command: the command line.
    data: the argument `data`, if it is given.
    files: a short hash of each file of the user's own code that was loaded, by
      path; only if there is one.
    plan: the hash of a study's plan, and when it was frozen; only for a run
      that a study trains.
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
  """Returns the commit of the code in a folder, and a hash of all changes since
  the commit.

  Args:
    root: the folder of the code.

  Returns:
    {'commit': ..., 'diff': ...}. `diff` is '' if nothing has changed. Both are
    None if the folder is no git repository.
  """
  unknown = dict(commit=None, diff=None)

  def run_git(*words: str) -> bytes:
    return subprocess.run(['git', '-C', str(root), *words], check=True,
                          capture_output=True).stdout

  # The code may have been installed without its history.
  if not (root / '.git').exists():
    return unknown
  # Read the commit, the changes of files in git, and the names of new files.
  try:
    commit = run_git('rev-parse', 'HEAD').decode().strip()
    changes = run_git('diff', '--binary', 'HEAD')
    # A star stands for folders too.
    patterns = [f'{folder}/*.py' for folder in FOLDERS_OF_PROGRAM]
    new_files = run_git(
        'ls-files', '-z', '--others', '--exclude-standard', '--', *patterns)
  except (OSError, subprocess.CalledProcessError):
    return unknown

  # Count the program's new Python files among the changes. With -z, each name
  # ends with a NUL.
  for name in new_files.split(b'\0')[:-1]:
    changes += name + b'\0'
    file = root / os.fsdecode(name)
    if file.is_file():
      changes += file.read_bytes()
  if not changes:
    return dict(commit=commit, diff='')
  return dict(commit=commit, diff=hashlib.sha256(changes).hexdigest()[:16])


def list_codes(starts: Iterable) -> list[str]:
  """Lists the versions of the code with which a run was started, without
  repetitions. A version is described by its commit, the hash of the changes
  since then, and the user's own files that were loaded.

  Args:
    starts: the records of the run's starts, oldest first, each as
      describe_this_start returns it.
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
    # List a version once, and none if the code has no commit or files.
    code = ' with '.join(parts)
    if code and code not in codes:
      codes.append(code)
  return codes


def list_code_changes(starts: Iterable) -> list[str]:
  """Tells whether the code has changed since a run was last started.

  Args:
    starts: the records of the run's starts, oldest first, each as
      describe_this_start returns it.

  Returns:
    A list of one line for the user; [] if the code is the same, or if either
    version is not known.
  """
  last_start = list(starts)[-1:]
  old_codes = list_codes(last_start)
  new_codes = list_codes([describe_this_start()])
  if not old_codes or not new_codes or old_codes == new_codes:
    return []
  return ['the code has changed since this run was last started: '
          f'{old_codes[0]} -> {new_codes[0]}']


def last_known_data(starts: Iterable) -> dict[str, str]:
  """Returns the hashes of a run's data sources and tokenizer, from the last of
  its starts that recorded them.

  Args:
    starts: the records of the run's starts, oldest first, each as
      describe_this_start returns it.

  Returns:
    {name: hash}; {} if no start recorded them.
  """
  hash_of_source: dict[str, str] = {}
  for start in starts:
    hash_of_source = start.get('data', hash_of_source)
  return hash_of_source


def check_data(starts: Iterable, data: Mapping[str, str], allowed: bool
               ) -> list[str]:
  """Checks that the data sources and the tokenizer of a run are the same as
  when it was last started.

  Args:
    starts: the records of the run's starts, oldest first, each as
      describe_this_start returns it.
    data: {name: hash} of the data sources and the tokenizer now.
    allowed: whether the run may be resumed with other data.

  Returns:
    A line for the user about each that has changed.

  Raises:
    RequestError: where one has changed and that is not allowed.
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
