"""layout: what a sweep's folder holds, and the commands that a run takes.

sweep.json says which points the sweep has, and with which seeds. ledger.sqlite
has the state of each run:

    pending -> running -> done, or failed with its error

A run is done once it is trained and has the evaluations that it owes; one that
is stopped is pending again, and goes on from what lies on disk. A runner claims
runs by a single UPDATE ... WHERE state, so two never share one. A runner that
died gives its claims back when another looks: on its own host once its process
is gone, on others once its heartbeat, a number, has stood still while the other
looked on: clocks of two hosts are never compared. The journal is SQLite's
default: write-ahead logging does not work on network folders.

Each row has a checksum. A ledger that is not as it was written is set aside,
and written anew from sweep.json and the folders of the runs.
"""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shlex
import sqlite3
import sys
import time
from typing import Any, NamedTuple, Self
import zlib

from etils import epath

from architectures.parts import flat
from common.errors import EnvironmentFailure, RequestError, require, shorten
from tools.compare import spec
from training import evals, plugins, runs
from training.workdir import metrics as metrics_lib
from training.workdir import provenance, run_config, storage

PENDING, RUNNING, DONE, FAILED = 'pending', 'running', 'done', 'failed'
STATES = (PENDING, RUNNING, DONE, FAILED)
BUSY_SECONDS = 60  # how long a writer waits for the others
BEAT_SECONDS = 10  # between two heartbeats, and two looks at those of others
LOOKS_UNTIL_DEAD = 12  # at a heartbeat that stands still


def _checksum(columns: str) -> str:
  """Returns the column with the checksum of others, which SQLite computes for
  each row that it writes, and compares in an integrity check."""
  return (f'checksum INTEGER AS (crc32({columns})) STORED '
          f'CHECK (checksum = crc32({columns}))')


SWEEP_TABLES = f"""\
CREATE TABLE runs (
  id INTEGER PRIMARY KEY,
  point TEXT NOT NULL,
  seed INTEGER NOT NULL,
  tasks TEXT NOT NULL,
  state TEXT NOT NULL DEFAULT 'pending',
  runner TEXT NOT NULL DEFAULT '',
  alone INTEGER NOT NULL DEFAULT 0,
  error TEXT NOT NULL DEFAULT '',
  {_checksum('point, seed, tasks, state, runner, alone, error')},
  UNIQUE (point, seed));
CREATE TABLE runners (
  name TEXT PRIMARY KEY,
  host TEXT NOT NULL,
  pid INTEGER NOT NULL,
  beats INTEGER NOT NULL DEFAULT 0,
  {_checksum('name, host, pid, beats')})""".split(';\n')
STUDY_TABLES = f"""\
CREATE TABLE plans (
  id INTEGER PRIMARY KEY,
  time REAL NOT NULL,
  hash TEXT NOT NULL,
  tree TEXT NOT NULL,
  {_checksum('time, hash, tree')});
CREATE TABLE begun (
  id INTEGER PRIMARY KEY,
  time REAL NOT NULL,
  plan TEXT NOT NULL,
  folder TEXT NOT NULL,
  point TEXT NOT NULL,
  seed INTEGER NOT NULL,
  {_checksum('time, plan, folder, point, seed')});
CREATE TABLE ended (
  id INTEGER PRIMARY KEY,
  time REAL NOT NULL,
  folder TEXT NOT NULL,
  point TEXT NOT NULL,
  seed INTEGER NOT NULL,
  hash TEXT NOT NULL,
  {_checksum('time, folder, point, seed, hash')})""".split(';\n')
# The files of a run that have its figures, by which verdicts are computed.
FILES_OF_FIGURES = ('metrics.jsonl', 'eval.json', evals.ITEMS_FILE)
# SQLite's codes for a file that is none of its own, or that it cannot read.
_CODES_OF_DAMAGE = {
    sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def add_workdir_arguments(parser) -> None:
  """Adds WORKDIR, or --workdir WORKDIR, to a program that looks at one."""
  parser.add_argument('where', nargs='?', default='', metavar='WORKDIR',
                      help='of a sweep or a study')
  parser.add_argument('--workdir', default='', help='the same')


def parse_workdir(args) -> str:
  """Returns the workdir of a command line, which names it in one of two ways.

  Raises:
    RequestError: where it names none, or both.
  """
  require(bool(args.where) != bool(args.workdir), 'say once which workdir: '
          'WORKDIR, or --workdir=WORKDIR')
  return args.where or args.workdir


def is_study(workdir) -> bool:
  """Returns whether a folder holds a study, and not a sweep."""
  return (pathlib.Path(workdir) / 'study.json').exists()


def check_workdir(workdir, marker: str = 'sweep.json') -> None:
  """Raises RequestError where no sweep, nor what `marker` tells of, can be
  kept: before anything is run."""
  require('://' not in str(workdir), f'--workdir is {str(workdir)!r}: a ledger '
          'needs a folder of this machine, or one that is mounted')
  storage.check_folder_is_writable(workdir)
  storage.refuse_folder_of_run(workdir, '--workdir', marker)


def align_columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
  """Returns the lines of a table for a terminal, whose columns are padded to
  the width of their longest cell.

  Args:
    rows: the cells of each row. The first row has the headings.
    left: the number of columns with words, which come first and are aligned to
      the left. The others have numbers, and are aligned to the right.
  """
  # A column is as wide as its longest cell, the heading included.
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for row in rows:
    cells = []
    for i, (cell, width) in enumerate(zip(row, widths)):
      is_word = i < left
      cells.append(cell.ljust(width) if is_word else cell.rjust(width))
    lines.append('  '.join(cells).rstrip())
  return lines


def run_folder(workdir, point: str, seed: int) -> pathlib.Path:
  """Returns the folder of the run of a point with a seed."""
  return pathlib.Path(workdir) / 'points' / point / f'seed-{seed}'


def save_with_checksum(path: pathlib.Path, tree: dict) -> None:
  """Writes JSON with a checksum of what it holds, whole or not at all; several
  runners may write at once."""
  storage.write_file(epath.Path(path), format_with_checksum(tree))


def format_with_checksum(tree: dict) -> bytes:
  """Returns JSON with a checksum of what it holds, as the content of a file."""
  checked = tree | {'checksum': json_checksum(tree)}
  return json.dumps(checked, indent=1, allow_nan=False).encode()


def load_with_checksum(path: pathlib.Path) -> dict:
  """Returns what `save_with_checksum` wrote.

  Raises:
    RequestError: where the file is damaged.
  """
  tree = storage.parse_json_object(path.read_bytes(), str(path))
  require(
      tree.pop('checksum', '') == json_checksum(tree), f'{path} is damaged: '
      'it is not as it was written; put it back')
  return tree


def json_checksum(tree: Any) -> str:
  """Returns a hash of what can be written as JSON: 16 digits of its SHA-256."""
  text = json.dumps(tree, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_sweep_description(workdir) -> dict:
  """Reads sweep.json: the points of a sweep (its variants of the config) with
  their changes, costs and seeds, and the config of its base.

  If the sweep declared parts of its own, such as a new layer, they are
  registered as a side effect, so that its configs can be built.

  Args:
    workdir: the folder of the sweep.

  Raises:
    RequestError: if the file is missing or damaged.
  """
  path = pathlib.Path(workdir) / 'sweep.json'
  require(path.is_file(), f'{path} is missing: no sweep was checked or run in '
          'this workdir')
  description = load_with_checksum(path)
  plugins.restore_declared_parts(description.get('files', {}))
  return description


def save_sweep_description(workdir, description: dict) -> None:
  """Writes sweep.json. The points and seeds that it had before are kept, so a
  sweep only grows.

  Args:
    workdir: the folder of the sweep.
    description: what sweep.json is to hold.

  Raises:
    RequestError: where sweep.json is of another sweep.
  """
  path = pathlib.Path(workdir) / 'sweep.json'
  if path.exists():
    description = _merge_descriptions(
        workdir, load_with_checksum(path), description)
  save_with_checksum(path, description)


def _merge_descriptions(workdir, old: dict, new: dict) -> dict:
  """Merges two descriptions of the same sweep, so that it never loses points
  (variants of the config) or seeds.

  Args:
    workdir: the folder of the sweep, for messages.
    old: the contents of sweep.json.
    new: the new description.

  Returns:
    The new description, with the points and seeds of the old one added.

  Raises:
    RequestError: if they describe different sweeps.
  """
  # Compare what must not change. New points may be added, so only points that
  # the old one has are compared.
  fixed_before = _fixed_part(old)
  fixed_now = _fixed_part(new, old['points'])
  # A source (the hash of some data) that only one of the two has is no
  # difference, so each gets the sources that it lacks from the other. Of a
  # source that both have, the right operand of | wins, and each keeps its own.
  sources = old['sources'] | new['sources']
  fixed_before['sources'] = new['sources'] | old['sources']
  fixed_now['sources'] = sources
  differing = differing_names(fixed_before, fixed_now)
  require(not differing, f'{workdir} holds another sweep, which differs in '
          f'{", ".join(differing)}: take another --workdir')

  # List the new points, each with the seeds of both descriptions, and then the
  # old points that are left after the loop. A point without an old one counts
  # as its own old one.
  old_point_by_name = {point['name']: point for point in old['points']}
  points = []
  for point in new['points']:
    old_point = old_point_by_name.pop(point['name'], point)
    seeds = {*old_point['seeds'], *point['seeds']}
    points.append(point | {'seeds': sorted(seeds)})
  points += old_point_by_name.values()
  return new | {'points': points, 'sources': sources}


def _fixed_part(description: dict, points: Sequence[dict] = ()) -> dict:
  """Returns the part of a sweep's description that must stay the same as long
  as the sweep goes on: the changes of its points, its base, and its files.

  Args:
    description: the description.
    points: the points whose changes are returned, as far as the description has
      them; (): all of its points.
  """
  names = [point['name'] for point in points or description['points']]
  changes_by_name = {}
  for point in description['points']:
    if point['name'] in names:
      changes_by_name[point['name']] = point['changes']
  fixed: dict[str, Any] = {'points': changes_by_name}
  for key in ('base', 'match', 'match_field', 'base_config'):
    fixed[key] = description.get(key)
  # The files that define the sweep. Those of a study may change: its plan says
  # whether it goes on with them (plan.adopt_plan).
  if not description.get('plan'):
    fixed['files'] = description.get('files')
  return fixed


def differing_names(old: dict, new: dict) -> list[str]:
  """Returns the dotted names at which two trees of JSON differ."""
  before, after = _flatten_as_json(old), _flatten_as_json(new)
  different = []
  for name in {**before, **after}:
    is_in_both = name in before and name in after
    if not is_in_both or before[name] != after[name]:
      different.append(name)
  return different


def _flatten_as_json(tree: dict) -> dict:
  """Returns a tree by dotted names, as it is once it was written as JSON."""
  return run_config.flatten(json.loads(json.dumps(tree)))


def point_row(description: dict, point: str) -> dict:
  """Returns the entry of a point (a variant of the config) in the description
  of a sweep.

  Args:
    description: the contents of sweep.json.
    point: the name of the point.

  Raises:
    RequestError: if there is no such point. The ledger, a database beside the
      file, may be that of another sweep and name it.
  """
  for row in description['points']:
    if row['name'] == point:
      return row
  raise RequestError(
      f'sweep.json has no point {point!r}, which the ledger has: '
      'they are of different sweeps')


def config_of_run(description: dict, point: str, seed: int):
  """Returns the config of a run as sweep.json has it, whatever the sweep's
  file says by now."""
  base = run_config.config_from_json(description['base_config'])
  row = point_row(description, point)
  return spec.apply_changes(base, {**row['changes'], 'seed': seed},
                            f'point {point!r}')


def fields_unlike_sweep(description: dict, workdir, point: str, seed: int
                        ) -> list[str]:
  """Returns the dotted names of the fields in which the config of a run on disk
  differs from what its sweep says.

  Args:
    description: the contents of sweep.json.
    workdir: the folder of the sweep.
    point: the name of the point (a variant of the config) that was trained.
    seed: the seed of the run.

  Raises:
    ValueError: if the run's config.json is missing or damaged.
  """
  config = config_of_run(description, point, seed)
  config_on_disk = run_config.load_config(run_folder(workdir, point, seed))
  different = differing_names(config_on_disk.to_dict(), config.to_dict())
  if not different:
    return []

  # config.json does not have the fields that the model does not read, such as
  # the number of experts of a model without any. Leave these out. To find them
  # is slow, so equal configs have returned before.
  unread = flat.fields_that_are_unread(
      runs.resolve_model_without_tokenizer(config))
  return [name for name in different
          if name.removeprefix('model.') not in unread]


def why_not_of_sweep(description: dict, workdir, point: str, seed: int) -> str:
  """Returns the reason why the folder of a run holds another run than the sweep
  says, or '' if it holds the right one.

  Args:
    description: the contents of sweep.json.
    workdir: the folder of the sweep.
    point: the name of the point (a variant of the config) that was trained.
    seed: the seed of the run.
  """
  folder = run_folder(workdir, point, seed)
  try:
    different = fields_unlike_sweep(description, workdir=workdir, point=point,
                                    seed=seed)
  # A config that cannot be read is not that of the run either.
  except RequestError as error:
    return str(error)
  if not different:
    return ''
  return (f'{folder} holds a run of another config than sweep.json says, in '
          f'{", ".join(different)}: move it away, and --retry; '
          f'{description["file"]} may have changed since the sweep began')


def starts_of_runs(folders: Iterable[pathlib.Path]) -> list[dict[str, Any]]:
  """Returns what the runs in some folders remember of each of their starts
  (run_config.load_starts), as far as they have begun."""
  starts: list[dict[str, Any]] = []
  for folder in folders:
    # A config that is damaged is reported where the run is looked at.
    with contextlib.suppress(RequestError):
      starts += run_config.load_starts(folder)
  return starts


def codes_of_runs(workdir, description: Mapping[str, Any]) -> list[str]:
  """Returns the different versions of the code (commits and changes) that
  trained the runs of a sweep, as far as they are known."""
  folders = []
  for row in description['points']:
    folders += [run_folder(workdir, row['name'], seed) for seed in row['seeds']]
  return provenance.list_codes(starts_of_runs(folders))


def devices_of_run(folder: pathlib.Path) -> list[str]:
  """Returns the kinds of devices that trained a run, each as 'N of the kind
  KIND', from the lines 'devices: ...' of its log. [] if it has no log.

  Args:
    folder: the folder of the run.
  """
  log = folder / 'log.txt'
  if not log.is_file():
    return []
  # A dict as an ordered set: a run that was resumed on the same devices has
  # several equal lines.
  kinds: dict[str, None] = {}
  for line in log.read_text(errors='replace').splitlines():
    name, colon, devices = line.partition(': ')
    if colon and name.strip() == 'devices':
      # The line is 'devices: N of the kind KIND, mesh ...'.
      kind, _, _ = devices.partition(', mesh')
      kinds[kind] = None
  return list(kinds)


def plan_hashes_of_runs(workdir) -> set[str]:
  """Returns the hashes of the study plans by which the runs in a folder were
  started. '' is among them if a run was started by no study.

  Args:
    workdir: the folder of a phase of a study.
  """
  # A run has a record for each time that it was started or resumed.
  hashes = set()
  for start in starts_of_runs(pathlib.Path(workdir).glob('points/*/seed-*')):
    # A record has the plan as 'HASH DATE'.
    hash, _, _ = str(start.get('plan', '')).partition(' ')
    hashes.add(hash)
  return hashes


def describe_changed_code(codes: Sequence[str]) -> str:
  """Returns the warning that the code changed in the middle of a sweep, with
  the different versions of it."""
  return ('The code changed in the middle of this sweep, so that its runs may '
          f'not be compared: {"; ".join(codes)}.')


def read_metrics(folder: pathlib.Path, split: str) -> list[dict]:
  """Returns the lines of a run's metrics.jsonl of one split, as far as they
  are whole."""
  path = folder / 'metrics.jsonl'
  if not path.is_file():
    return []
  rows = metrics_lib.read_metrics(path)
  return [row for row in rows if row['split'] == split]


def is_trained(folder: pathlib.Path, train) -> bool:
  """Returns whether a run is trained: it took its last step and saved it, and
  did not give up there because of too many bad gradients in a row.

  Args:
    folder: the folder of the run.
    train: config.train of the run.
  """
  # Find the last row of the last step. A run that was resumed may have several.
  last_row = None
  for row in read_metrics(folder, 'train'):
    if row['step'] == train.steps:
      last_row = row
  is_saved = (folder / 'checkpoints' / str(train.steps)).is_dir()
  if last_row is None or not is_saved:
    return False

  # A run that gave up has saved its last step too. If no number of bad steps is
  # recorded, -1 is below any limit.
  return last_row.get('bad_in_row', -1) < train.max_bad_steps


def hash_figures(folder: pathlib.Path) -> str:
  """Returns a hash of the figures that a run has left in its folder: 16 digits
  of the SHA-256 of their files, of which any may be missing."""
  digest = hashlib.sha256()
  for name in FILES_OF_FIGURES:
    path = folder / name
    if path.is_file():
      content = path.read_bytes()
      digest.update(f'{name} {len(content)}\n'.encode() + content)
  return digest.hexdigest()[:16]


def load_evaluation(folder: pathlib.Path) -> dict:
  """Reads the results of the evaluations of a run from its eval.json, {task:
  figures}. Returns {} if there is no such file.

  Args:
    folder: the folder of the run.

  Raises:
    RequestError: if the file is damaged. It is written in one piece, so an
      interrupted run cannot be the reason.
  """
  path = folder / 'eval.json'
  if not path.is_file():
    return {}
  subject = f'{path} (which can be removed: the evaluation is then done again)'
  return storage.parse_json_object(path.read_bytes(), subject)


def is_evaluated(folder: pathlib.Path, tasks: Iterable[str]) -> bool:
  """Returns whether the eval.json of a run has the results of every task."""
  return set(tasks) <= load_evaluation(folder).keys()


def append_to_log(folder: pathlib.Path, line: str) -> None:
  """Adds a line to the log of a run, which holds what it printed."""
  with storage.GrowingFile(folder / 'log.txt') as file:
    file.write(f'{line}\n'.encode())


def read_error_of_log(folder: pathlib.Path) -> str:
  """Returns why a run failed: the first line of its last command in its log
  that begins with 'error: ', or else the last line."""
  text = (folder / 'log.txt').read_text(errors='replace')
  text_of_last_command = text.rpartition('\n$ ')[2]
  lines = [line.strip() for line in text_of_last_command.splitlines()]
  lines = [line for line in lines if line]
  errors = [line for line in lines if line.startswith('error: ')]
  return (errors or lines)[-1].removeprefix('error: ')


def train_command(description: dict, workdir, point: str, seed: int
                  ) -> list[str]:
  """Returns the words of the command that trains one run of a sweep, from
  `train.py` on.

  Args:
    description: the contents of sweep.json.
    workdir: the folder of the sweep.
    point: the name of the point (a variant of the config) to train.
    seed: the seed of the run.
  """
  folder = run_folder(workdir, point, seed)
  command = ['train.py', '--config', description['file'],
             '--workdir', str(folder)]
  # The file has the config of the base; the changes of the point are overrides.
  changes = point_row(description, point)['changes'] | {'seed': seed}
  for field, value in changes.items():
    # JSON has turned tuples into lists, but the config needs tuples.
    command.append(f'--config.{field}={run_config.lists_to_tuples(value)}')
  return command


def group_command(workdir, runs: Iterable[tuple[str, int]], tasks: str = ''
                  ) -> list[str]:
  """Returns the words of the command that trains several runs as one program,
  or that evaluates them in one process.

  Args:
    workdir: the folder of the sweep.
    runs: the point and the seed of each run.
    tasks: the evaluations to do, as 'TASK,TASK'; '': the runs are trained.
  """
  names = ','.join(f'{point}/{seed}' for point, seed in runs)
  return ['-m', 'tools.compare.local', '--workdir', str(workdir),
          f'--runs={names}', f'--evaluate={tasks}']


def shell_command_of_run(description: dict, workdir, run: 'Run') -> str:
  """Returns one line for a shell that trains a run and does the evaluations
  that it owes."""
  commands = [train_command(description, workdir=workdir, point=run.point,
                            seed=run.seed)]
  if run.tasks:
    folder = run_folder(workdir, run.point, run.seed)
    commands.append(['eval.py', '--workdir', str(folder),
                     f'--tasks={run.tasks}',
                     '--json', str(folder / 'eval.json')])
  return ' && '.join(shlex.join(['python', *words]) for words in commands)


class Run(NamedTuple):
  """One row of the ledger: a point with one seed.

  Attributes:
    id: the number of the row.
    point: the name of the point.
    seed: the seed.
    tasks: the evaluations that it owes once trained, as 'TASK,TASK'.
    state: one of STATES.
    runner: the name of the runner that holds it; '': none does.
    alone: 1 if it trains beside no other, since a program that held it and
      others ended in an error; else 0.
    error: why it failed.
  """
  id: int
  point: str
  seed: int
  tasks: str
  state: str
  runner: str
  alone: int
  error: str

  @property
  def owed_tasks(self) -> list[str]:
    """The evaluations that the run owes once it is trained."""
    return self.tasks.split(',') if self.tasks else []


class Ledger:
  """The database of a sweep, WORKDIR/ledger.sqlite: which runs there are, their
  states, and which runner (a process that trains them) holds which.

  It is opened, or made, and is a context that closes it. A file that is damaged
  is set aside with a warning, and written anew.

  Attributes:
    has_doubtful_runners: whether a runner that holds runs has shown no sign of
      life since `free_runs_of_dead_runners` saw it first.
    file_name: the name of the file.
    tables: the statements that make its tables.
    note_on_rewritten: what a new file has in place of one that was damaged.
    note_on_unusable: what to do about one that cannot be used.
  """
  file_name, tables = 'ledger.sqlite', SWEEP_TABLES
  note_on_rewritten = ('written anew from the folders of the runs; what had '
                       'failed is taken up again')
  note_on_unusable = ('run the sweep again; what is done is known by what lies '
                      'on disk')

  def __init__(self, workdir):
    """Opens the database of a folder, and makes it if there is none.

    Args:
      workdir: the folder of the sweep or the study.
    """
    self._path = pathlib.Path(workdir) / self.file_name
    self._heartbeat_of_runner: dict[str, _Heartbeat] = {}
    self.has_doubtful_runners = False
    self._path.parent.mkdir(parents=True, exist_ok=True)

    # Open the database. If the file is damaged, it is set aside and made anew.
    # Only one process at a time may do that, or a second one would set the new
    # file aside. The lock is released when its file is closed.
    lock = self._path.with_suffix('.lock')
    with storage.explain_write_failures(lock), lock.open('w') as file:
      fcntl.lockf(file, fcntl.LOCK_EX)
      damage = self._connect()
      if damage:
        self._set_file_aside(damage)
        self._connect()

    # If a sweep has no runs in the database, it was lost or is new. Then its
    # rows are written from what lies on disk.
    is_of_sweep = (self._path.parent / 'sweep.json').is_file()
    if is_of_sweep and not self._select('SELECT id FROM runs LIMIT 1'):
      reconcile_ledger(workdir, self)

  def _set_file_aside(self, damage: str) -> None:
    """Renames the file, which is damaged, and prints a warning."""
    self._connection.close()
    aside = self._path.with_name(f'{self._path.name}.aside-{time.time_ns()}')
    self._path.rename(aside)
    print(f'warning: {self._path} is damaged ({shorten(damage)}): it is set '
          f'aside as {aside.name}, and {self.note_on_rewritten}',
          file=sys.stderr)

  def _connect(self) -> str:
    """Connects to the file of the database, makes its tables where it has none,
    and checks it.

    Returns:
      What is wrong with the file; '': nothing is.

    Raises:
      EnvironmentFailure: where the file cannot be used for another reason than
        damage, as where it may not be read.
    """
    with self._explaining_errors():
      # Each statement is a transaction of its own (isolation_level=None).
      self._connection = sqlite3.connect(
          self._path, timeout=BUSY_SECONDS, isolation_level=None)
      self._connection.create_function(
          'crc32', -1, _crc32, deterministic=True)
      # A damaged file shows at the first reading, or in SQLite's own check.
      # crc32 is a function that the statements of the tables use.
      try:
        rows = self._connection.execute(
            "SELECT sql FROM sqlite_schema WHERE type = 'table'").fetchall()
        verdict, = self._connection.execute(
            'PRAGMA integrity_check(1)').fetchone()
      # SQLite's own sentence may have a name that is no UTF-8.
      except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # The last byte of an extended error code is its kind.
        code = getattr(error, 'sqlite_errorcode', sqlite3.SQLITE_ERROR)
        if code & 0xff not in _CODES_OF_DAMAGE:
          raise
        return str(error)
    if verdict != 'ok':
      return verdict

    # A new file has no tables yet. Those of a whole one are compared by the
    # statements that made them.
    tables_of_file = [sql for sql, in rows]
    if not tables_of_file:
      for statement in self.tables:
        self._change(statement)
    elif tables_of_file != self.tables:
      return 'its tables are others'
    return ''

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error):
    self._connection.close()

  def _select(self, statement: str, *values) -> list[tuple]:
    """Executes a statement; returns the rows that it gives."""
    with self._explaining_errors():
      return self._connection.execute(statement, values).fetchall()

  def _change(self, statement: str, *values) -> int:
    """Executes a statement; returns how many rows it changed."""
    with self._explaining_errors():
      return self._connection.execute(statement, values).rowcount

  @contextlib.contextmanager
  def transaction(self):
    """Lets all statements inside happen at once, or none, and one such
    transaction at a time."""
    self._change('BEGIN IMMEDIATE')
    try:
      yield
      self._change('COMMIT')
    finally:
      if self._connection.in_transaction:  # an error came before its end
        self._change('ROLLBACK')

  @contextlib.contextmanager
  def _explaining_errors(self):
    """Turns errors of SQLite inside into an EnvironmentFailure that says what
    to do."""
    try:
      yield
    except sqlite3.ProgrammingError:
      raise  # a mistake of ours
    except sqlite3.DatabaseError as error:
      raise EnvironmentFailure(
          f'{self._path} cannot be used ({error}): '
          f'{self.note_on_unusable}') from error

  def add_runs(self, rows: Iterable[tuple[str, int, Sequence[str]]]) -> None:
    """Adds runs that the ledger does not have, and the evaluations that they
    owe. A run that is done and owes another one now is pending again.

    Args:
      rows: the name of the point, the seed and the names of the owed tasks of
        each run.
    """
    with self.transaction():
      for point, seed, task_names in rows:
        # The first statement does nothing for a run that there is. The second
        # one does nothing where its tasks are as they were; other tasks replace
        # them, and a run that was done goes on with them.
        tasks = ','.join(task_names)
        self._change(
            'INSERT OR IGNORE INTO runs (point, seed, tasks) VALUES (?, ?, ?)',
            point, seed, tasks)
        self._change(
            'UPDATE runs SET tasks = ?, state = CASE WHEN state = ? AND ? '
            'THEN ? ELSE state END WHERE point = ? AND seed = ? '
            'AND tasks != ?',
            tasks, DONE, bool(tasks), PENDING, point, seed, tasks)

  def runs(self, *states: str) -> list[Run]:
    """Returns the runs in some states, by seed and then in the order in which
    they were added.

    Args:
      *states: the states; none: all of them.
    """
    # The columns of the table have the names of the fields of Run. Without an
    # argument, runs of all states are wanted.
    columns = ', '.join(Run._fields)
    rows = self._select(f'SELECT {columns} FROM runs ORDER BY seed, id')
    wanted_states = states or STATES
    runs = []
    for row in rows:
      run = Run._make(row)
      if run.state in wanted_states:
        runs.append(run)
    return runs

  def register_runner(self) -> str:
    """Adds this process as a runner, which may claim runs; returns its name."""
    name = f'{storage.host_name()}:{os.getpid()}:{time.time_ns()}'
    self._change('INSERT INTO runners (name, host, pid) VALUES (?, ?, ?)',
                 name, storage.host_name(), os.getpid())
    return name

  def claim_runs(self, ids: Sequence[int], runner: str) -> list[int]:
    """Takes pending runs for a runner (a process that trains them), as far as
    no other runner has taken them yet.

    Args:
      ids: the numbers of the runs.
      runner: the name of the runner, as `register_runner` returned it.

    Returns:
      The numbers of those that it has now, in rising order.
    """
    # One statement is atomic: of two runners that claim a run at once, the
    # second finds it no longer pending.
    claimed = self._select(
        "UPDATE runs SET state = ?, runner = ?, error = '' WHERE state = ? "
        f'AND id IN ({_placeholders(ids)}) RETURNING id',
        RUNNING, runner, PENDING, *ids)
    return sorted(id for id, in claimed)

  def settle_run(self, id: int, runner: str, state: str, error: str = '',
                 alone: bool = False) -> bool:
    """Writes how a claimed run ended, and gives it up.

    Args:
      id: the number of the run.
      runner: the name of the runner that claimed it.
      state: the state that it goes into.
      error: why it failed.
      alone: whether it trains beside no other from now on. This is never taken
        back.

    Returns:
      Whether the runner still had the run. False: it was taken for dead, and
      nothing is written.
    """
    return self._change(
        "UPDATE runs SET state = ?, error = ?, runner = '', "
        'alone = max(alone, ?) WHERE id = ? AND runner = ?',
        state, error, alone, id, runner) == 1

  def set_state_of_unclaimed(self, run: Run, state: str, error: str = ''
                             ) -> None:
    """Moves a run into another state, unless a runner has changed it since it
    was read."""
    self._change(
        'UPDATE runs SET state = ?, error = ? WHERE id = ? AND state = ?',
        state, error, run.id, run.state)

  def retry_failed_runs(self) -> None:
    """Makes the runs that failed pending again."""
    self._change("UPDATE runs SET state = ?, error = '' WHERE state = ?",
                 PENDING, FAILED)

  def record_heartbeat(self, runner: str) -> set[int]:
    """Records that a runner lives; returns the numbers of the runs that it
    still holds."""
    self._change('UPDATE runners SET beats = beats + 1 WHERE name = ?', runner)
    rows = self._select('SELECT id FROM runs WHERE runner = ?', runner)
    return {id for id, in rows}

  def free_runs_of_dead_runners(self) -> list[str]:
    """Makes the runs that dead runners hold pending again, so that others may
    claim them. To be called every BEAT_SECONDS.

    A runner (a process that trains runs) is dead once its process is gone, if
    it is of this host; or once its heartbeat, a number that it raises, has
    stood still for LOOKS_UNTIL_DEAD calls. Heartbeats are counted, since clocks
    of hosts differ.

    Returns:
      'POINT, seed S' of each run.
    """
    runners_with_runs = self._select(
        'SELECT name, host, pid, beats FROM runners WHERE name IN '
        '(SELECT runner FROM runs WHERE state = ?)', RUNNING)

    # This look tells of each runner that holds runs: its heartbeat is new
    # to us, stands still or has risen. Runners that hold none any more are
    # forgotten.
    heartbeat_of_runner, dead_runners = {}, []
    for name, host, pid, beats in runners_with_runs:
      heartbeat = self._heartbeat_of_runner.get(name)
      if heartbeat is None:
        heartbeat = _Heartbeat(first=beats, last=beats, looks=0)
      elif beats == heartbeat.last:
        heartbeat = heartbeat._replace(looks=heartbeat.looks + 1)
      else:
        heartbeat = heartbeat._replace(last=beats, looks=0)
      is_gone = (host == storage.host_name()
                 and not storage.is_process_alive(pid))
      if is_gone or heartbeat.looks >= LOOKS_UNTIL_DEAD:
        dead_runners.append(name)
      else:
        heartbeat_of_runner[name] = heartbeat
    self._heartbeat_of_runner = heartbeat_of_runner
    # A runner that has not beaten since the first look may be dead or alive.
    self.has_doubtful_runners = any(
        heartbeat.first == heartbeat.last
        for heartbeat in heartbeat_of_runner.values())

    # Only runs that they still hold in this moment: one may have ended since.
    freed = self._select(
        "UPDATE runs SET state = ?, runner = '' WHERE state = ? AND runner IN "
        f'({_placeholders(dead_runners)}) RETURNING point, seed',
        PENDING, RUNNING, *dead_runners)
    return [f'{point}, seed {seed}' for point, seed in freed]


class _Heartbeat(NamedTuple):
  """The heartbeats of a runner (numbers that rise as long as it lives) that
  another runner has seen.

  Attributes:
    first: the heartbeat at the first look.
    last: that at the last look.
    looks: how many looks it has stood still since.
  """
  first: int
  last: int
  looks: int


def _placeholders(values: Sequence) -> str:
  """Returns a placeholder of SQL for each of some values: '?, ?, ?'."""
  return ', '.join('?' * len(values))


class StudyLedger(Ledger):
  """The database of a study, WORKDIR/study.sqlite: every plan that it had, each
  run that began in a new folder, and the hash of the figures of each that
  ended. Rows are only ever added."""
  file_name, tables = 'study.sqlite', STUDY_TABLES
  note_on_rewritten = ('begun anew; the plan is that of study.json, and the '
                       'report counts the runs whose beginning is no longer '
                       'known')
  note_on_unusable = 'run the study again; its runs have ledgers of their own'

  def add_plan(self, hash: str, tree: Any) -> None:
    """Adds a plan, as a tree of JSON, with its hash."""
    self._change('INSERT INTO plans (time, hash, tree) VALUES (?, ?, ?)',
                 time.time(), hash, json.dumps(tree))

  def last_plan(self) -> Any:
    """Returns the tree of the last plan; None where there is none."""
    rows = self._select('SELECT tree FROM plans ORDER BY id DESC LIMIT 1')
    return json.loads(rows[0][0]) if rows else None

  def add_begun_runs(self, plan: str, runs: Iterable[tuple[str, str, int]]
                     ) -> None:
    """Adds runs that begin in a new folder, so that one which is deleted and
    trained again shows as begun twice.

    Args:
      plan: the hash of the plan that they are of.
      runs: the name of the folder of the phase, the point (a variant of the
        config at a size on a workload) and the seed of each.
    """
    for folder, point, seed in runs:
      self._change('INSERT INTO begun (time, plan, folder, point, seed) '
                   'VALUES (?, ?, ?, ?, ?)',
                   time.time(), plan, folder, point, seed)

  def begun_runs(self) -> list[tuple[str, str, int]]:
    """Returns the folder of the phase, the point and the seed of each run that
    began, in order."""
    return self._select('SELECT folder, point, seed FROM begun ORDER BY id')

  def add_ended_run(self, folder: str, point: str, seed: int, hash: str
                    ) -> None:
    """Adds a run that has ended.

    Args:
      folder: the name of the folder of its phase.
      point: its point (a variant of the config at a size on a workload).
      seed: its seed.
      hash: the hash of its figures (hash_figures).
    """
    self._change('INSERT INTO ended (time, folder, point, seed, hash) '
                 'VALUES (?, ?, ?, ?, ?)',
                 time.time(), folder, point, seed, hash)

  def hash_of_ended_runs(self) -> dict[tuple[str, str, int], str]:
    """Returns the hash of the figures of each run when it ended last, by the
    folder of its phase, its point and its seed."""
    rows = self._select(
        'SELECT folder, point, seed, hash FROM ended ORDER BY id')
    return {(folder, point, seed): hash for folder, point, seed, hash in rows}


def load_ledger_runs(workdir) -> list[Run]:
  """Returns the runs that the ledger of a sweep has."""
  with Ledger(workdir) as ledger:
    return ledger.runs()


def _crc32(*values: Any) -> int:
  """Returns the CRC-32 of some columns of a row."""
  return zlib.crc32(repr(values).encode())


def begin_sweep(workdir, ledger: Ledger, description: dict) -> dict:
  """Writes sweep.json, and brings the ledger of the sweep (the database of its
  runs) up to it and to what lies on disk.

  It waits until it is known of every runner that holds runs whether it lives,
  and frees the runs of those that do not.

  Args:
    workdir: the folder of the sweep.
    ledger: its ledger.
    description: what sweep.json is to hold.

  Returns:
    What sweep.json holds: also the points and seeds that it had before.

  Raises:
    RequestError: where the workdir holds another sweep.
  """
  # Write sweep.json. Another process may add to the sweep at the same time, so
  # the transaction of the ledger serves as a lock of the file.
  with ledger.transaction():
    save_sweep_description(workdir, description)

  # Free the runs of runners (processes that train) which were killed. Whether
  # a runner lives is known once its heartbeat was seen to rise, or to stand
  # still for several looks.
  ledger.free_runs_of_dead_runners()
  if ledger.has_doubtful_runners:
    print('waiting for a sign of life of those who hold runs', file=sys.stderr)
  while ledger.has_doubtful_runners:
    time.sleep(BEAT_SECONDS)
    ledger.free_runs_of_dead_runners()
  return reconcile_ledger(workdir, ledger)


def reconcile_ledger(workdir, ledger: Ledger) -> dict:
  """Brings the ledger of a sweep (the database of its runs) up to what lies on
  disk.

  Runs that sweep.json has and the ledger has not are added. A run becomes done
  where it is so on disk and the ledger has not seen it, as after a command that
  a user ran by hand, or where the ledger was lost; failed, where it was trained
  there by another config; and pending again, where it was done and is gone.

  Args:
    workdir: the folder of the sweep.
    ledger: its ledger.

  Returns:
    What sweep.json holds.
  """
  # The runs that the ledger has not; add_runs leaves out the others.
  rows = []
  for point in load_sweep_description(workdir)['points']:
    for seed in point['seeds']:
      rows.append((point['name'], seed, point['tasks']))
  ledger.add_runs(rows)

  # The runs whose state is another one on disk. sweep.json is read again after
  # the ledger, so that it has all points of these runs.
  runs = ledger.runs(PENDING, DONE)
  description = load_sweep_description(workdir)
  for run in runs:
    folder = run_folder(workdir, run.point, run.seed)
    if run.state == DONE:
      if not (folder / 'config.json').exists():
        print(f'the run in {folder} is gone: it is trained anew',
              file=sys.stderr)
        ledger.set_state_of_unclaimed(run, PENDING)
      continue
    # A pending run that is trained needs no training: it is of this sweep and
    # done, or it is not and has failed. One that still owes evaluations stays
    # pending.
    train = config_of_run(description, run.point, run.seed).train
    if not is_trained(folder, train):
      continue
    error = why_not_of_sweep(description, workdir=workdir, point=run.point,
                             seed=run.seed)
    if error:
      ledger.set_state_of_unclaimed(run, FAILED, error)
    elif is_evaluated(folder, run.owed_tasks):
      ledger.set_state_of_unclaimed(run, DONE)
  return description
