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
from typing import Any, NamedTuple
import zlib

from etils import epath

from architectures.parts import flat
from common.errors import EnvironmentFailure, RequestError, require, short
from tools.compare import spec
from training import plugins, runs
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
  {_checksum('time, plan, folder, point, seed')})""".split(';\n')
# SQLite's codes for a file that is none of its own, or that it cannot read.
_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def add_workdir_arguments(parser) -> None:
  """Adds WORKDIR, or --workdir WORKDIR, to a program that looks at one."""
  parser.add_argument('where', nargs='?', default='', metavar='WORKDIR',
                      help='of a sweep or a study')
  parser.add_argument('--workdir', default='', help='the same')


def parse_workdir(args) -> str:
  """Returns the workdir that a command line names in one of both ways."""
  require(bool(args.where) != bool(args.workdir), 'say once which workdir: '
          'WORKDIR, or --workdir=WORKDIR')
  return args.where or args.workdir


def is_study(workdir) -> bool:
  return (pathlib.Path(workdir) / 'study.json').exists()


def check_workdir(workdir, marker: str = 'sweep.json') -> None:
  """Raises RequestError where no sweep, nor what `marker` tells of, can be
  kept: before anything is run."""
  require('://' not in str(workdir), f'--workdir is {str(workdir)!r}: a ledger '
          'needs a folder of this machine, or one that is mounted')
  storage.check_folder_is_writable(workdir)
  storage.refuse_folder_of_run(workdir, '--workdir', marker)


def align_columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
  """Returns the lines of a table for a terminal.

  Args:
    rows: the cells, those of the headings first.
    left: how many columns are words, and stand to the left; the others are
      figures.
  """
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for row in rows:
    cells = []
    for place, (cell, width) in enumerate(zip(row, widths)):
      is_word = place < left
      cells.append(cell.ljust(width) if is_word else cell.rjust(width))
    lines.append('  '.join(cells).rstrip())
  return lines


def run_folder(workdir, point: str, seed: int) -> pathlib.Path:
  return pathlib.Path(workdir) / 'points' / point / f'seed-{seed}'


def save_with_checksum(path: pathlib.Path, tree: dict) -> None:
  """Writes JSON with a checksum of what it holds, whole or not at all; several
  runners may write at once."""
  checked = tree | {'checksum': json_checksum(tree)}
  text = json.dumps(checked, indent=1, allow_nan=False)
  storage.write_file(epath.Path(path), text)


def load_with_checksum(path: pathlib.Path) -> dict:
  """Returns what `save_checked` wrote; RequestError where it is damaged."""
  tree = storage.parse_json_object(path.read_bytes(), str(path))
  require(
      tree.pop('checksum', '') == json_checksum(tree), f'{path} is damaged: '
      'it is not as it was written; put it back')
  return tree


def json_checksum(tree: Any) -> str:
  """Returns a hash of what can be written as JSON."""
  text = json.dumps(tree, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_sweep_description(workdir) -> dict:
  """Returns what sweep.json holds; RequestError where there is none."""
  path = pathlib.Path(workdir) / 'sweep.json'
  require(path.is_file(), f'{path} is missing: no sweep was checked or run in '
          'this workdir')
  description = load_with_checksum(path)
  plugins.restore_declared_parts(description.get('files', {}))
  return description


def save_sweep_description(workdir, description: dict) -> None:
  """Writes sweep.json, which keeps the points and seeds that it had before.

  Raises:
    RequestError: where it is of another sweep.
  """
  path = pathlib.Path(workdir) / 'sweep.json'
  if path.exists():
    description = _joined(workdir, load_with_checksum(path), description)
  save_with_checksum(path, description)


def _joined(workdir, old: dict, new: dict) -> dict:
  """Returns a description with the points and seeds that an older one of the
  same sweep has beside it.

  Raises:
    RequestError: where they are of different sweeps.
  """
  # Sources that only one of both has seen do not differ.
  sources = old['sources'] | new['sources']
  fixed_before = _fixed(old)
  fixed_before['sources'] = new['sources'] | old['sources']
  fixed_now = _fixed(new, old['points'])
  fixed_now['sources'] = sources
  different = differing_names(fixed_before, fixed_now)
  require(not different, f'{workdir} holds another sweep, which differs in '
          f'{", ".join(different)}: take another --workdir')

  # The points of the new one, each with the seeds of both, and the others.
  left = {row['name']: row for row in old['points']}
  points = []
  for row in new['points']:
    before = left.pop(row['name'], row)
    seeds = {*before['seeds'], *row['seeds']}
    points.append(row | {'seeds': sorted(seeds)})
  points += left.values()
  return new | {'points': points, 'sources': sources}


def _fixed(description: dict, points: Sequence[dict] = ()) -> dict:
  """Returns the part of a description that no later one may change.

  Args:
    description: the description.
    points: the points whose changes are a part of it; (): all of its own.
  """
  names = [row['name'] for row in points or description['points']]
  changes = {}
  for row in description['points']:
    if row['name'] in names:
      changes[row['name']] = row['changes']
  fixed: dict[str, Any] = {'points': changes}
  for name in ('base', 'match', 'match_field', 'base_config'):
    fixed[name] = description.get(name)
  # Whether a study goes on with other files, its plan says (plan.adopted).
  if not description.get('plan'):
    fixed['files'] = description.get('files')
  return fixed


def differing_names(old: dict, new: dict) -> list[str]:
  """Returns the dotted names at which two trees of JSON differ."""
  before, after = _flat(old), _flat(new)
  different = []
  for name in {**before, **after}:
    is_in_both = name in before and name in after
    if not is_in_both or before[name] != after[name]:
      different.append(name)
  return different


def _flat(tree: dict) -> dict:
  """Returns a tree by dotted names, as it is once it was written as JSON."""
  return run_config.flatten(json.loads(json.dumps(tree)))


def point_row(description: dict, point: str) -> dict:
  """Returns what sweep.json says of a point; RequestError where it has none,
  which a ledger of another sweep may name."""
  rows = [row for row in description['points'] if row['name'] == point]
  require(rows, f'sweep.json has no point {point!r}, which the ledger has: '
          'they are of different sweeps')
  return rows[0]


def config_of_run(description: dict, point: str, seed: int):
  """Returns the config of a run as sweep.json has it, whatever the sweep's
  file says by now."""
  base = run_config.config_from_json(description['base_config'])
  row = point_row(description, point)
  return spec.changed(base, {**row['changes'], 'seed': seed},
                      f'point {point!r}')


def fields_unlike_sweep(description: dict, workdir, point: str, seed: int
                        ) -> list[str]:
  """Returns the fields in which the run on disk is not the sweep's.

  Raises:
    ValueError: where its config.json is missing or damaged.
  """
  wanted = config_of_run(description, point, seed)
  on_disk = run_config.load_config(run_folder(workdir, point, seed))
  different = differing_names(on_disk.to_dict(), wanted.to_dict())
  if not different:
    return []
  # A run's config.json does not hold what its model does not read.
  unread = flat.unread(runs.resolve_model_without_tokenizer(wanted))
  return [name for name in different
          if name.removeprefix('model.') not in unread]


def why_not_of_sweep(description: dict, workdir, point: str, seed: int) -> str:
  """Returns why what lies in a run's folder is not that run, or ''."""
  folder = run_folder(workdir, point, seed)
  try:
    wrong = fields_unlike_sweep(description, workdir, point, seed)
  except RequestError as error:
    return str(error)
  if not wrong:
    return ''
  return (f'{folder} holds a run of another config than sweep.json says, in '
          f'{", ".join(wrong)}: move it away, and --retry; '
          f'{description["file"]} may have changed since the sweep began')


def codes_of_runs(workdir, description: Mapping[str, Any]) -> list[str]:
  """Returns the different codes that trained the runs of a sweep, as far as
  they are known."""
  starts = []
  for row in description['points']:
    for seed in row['seeds']:
      # A config that is damaged is reported where the run is looked at.
      with contextlib.suppress(RequestError):
        starts += run_config.load_starts(run_folder(workdir, row['name'], seed))
  return provenance.list_codes(starts)


def plan_hashes_of_runs(workdir) -> set[str]:
  """Returns the hashes of the plans by which the runs of a folder were started;
  '' is of a run that no study started."""
  starts: list[dict] = []
  for folder in pathlib.Path(workdir).glob('points/*/seed-*'):
    # A config that is damaged is reported where the run is looked at.
    with contextlib.suppress(RequestError):
      starts += run_config.load_starts(folder)
  plans = set()
  for start in starts:
    hash, _, _ = str(start.get('plan', '')).partition(' ')
    plans.add(hash)
  return plans


def describe_changed_code(codes: list[str]) -> str:
  """Says that the code of a sweep changed in the middle of it."""
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
  """Returns whether the run took its last step and saved it, and did not end
  there after too many bad ones; `train` is config.train of the run."""
  last = None
  for row in read_metrics(folder, 'train'):
    if row['step'] == train.steps:
      last = row
  is_saved = (folder / 'checkpoints' / str(train.steps)).is_dir()
  if last is None or not is_saved:
    return False
  return last.get('bad_in_row', -1) < train.max_bad_steps


def load_evaluation(folder: pathlib.Path) -> dict:
  """Returns what a run's eval.json holds, which was written in one piece; {}
  where there is none.

  Raises:
    RequestError: where it is damaged.
  """
  path = folder / 'eval.json'
  if not path.is_file():
    return {}
  who = f'{path} (which can be removed: the evaluation is then done again)'
  return storage.parse_json_object(path.read_bytes(), who)


def is_evaluated(folder: pathlib.Path, tasks: Iterable[str]) -> bool:
  """Returns whether eval.json holds every task."""
  return set(tasks) <= load_evaluation(folder).keys()


def append_to_log(folder: pathlib.Path, line: str) -> None:
  """Adds a line to what a run printed."""
  with storage.GrowingFile(folder / 'log.txt') as file:
    file.write(f'{line}\n'.encode())


def read_error_of_log(folder: pathlib.Path) -> str:
  """Returns the sentence that a failed run's log gives, or ends with."""
  text = (folder / 'log.txt').read_text(errors='replace')
  last_command = text.rpartition('\n$ ')[2]
  lines = [line.strip() for line in last_command.splitlines()]
  lines = [line for line in lines if line]
  errors = [line for line in lines if line.startswith('error: ')]
  return (errors or lines)[-1].removeprefix('error: ')


def train_command(description: dict, workdir, point: str, seed: int
                  ) -> list[str]:
  """Returns the words that train one run, from `train.py` on."""
  folder = run_folder(workdir, point, seed)
  words = ['train.py', '--config', description['file'],
           '--workdir', str(folder)]
  changes = point_row(description, point)['changes'] | {'seed': seed}
  for key, value in changes.items():
    words.append(f'--config.{key}={spec.tuples(value)}')
  return words


def group_command(workdir, runs: Iterable[tuple[str, int]], tasks: str = ''
                  ) -> list[str]:
  """Returns the words that train several runs as one program, or that do in
  one process what they owe."""
  names = ','.join(f'{point}/{seed}' for point, seed in runs)
  return ['-m', 'tools.compare.local', '--workdir', str(workdir),
          f'--runs={names}', f'--evaluate={tasks}']


def shell_command_of_run(description: dict, workdir, run) -> str:
  """Returns one line for a shell: all that a run still needs."""
  commands = [train_command(description, workdir, run.point, run.seed)]
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
  def owes(self) -> list[str]:
    return self.tasks.split(',') if self.tasks else []


class Ledger:
  """Opens or makes WORKDIR/ledger.sqlite; a context that closes it. A file that
  is damaged is set aside, which is said, and written anew.

  Attributes:
    doubtful: whether a runner that holds runs has shown no sign of life since
      `recover` saw it first.
    anew: what a new file has in place of one that was damaged.
    again: what to do about one that cannot be used.
  """
  file, schema = 'ledger.sqlite', SWEEP_TABLES
  anew = ('written anew from the folders of the runs; what had failed is taken '
          'up again')
  again = 'run the sweep again; what is done is known by what lies on disk'

  def __init__(self, workdir):
    self._path = pathlib.Path(workdir) / self.file
    self._watched: dict[str, _Heartbeat] = {}
    self.doubtful = False
    self._path.parent.mkdir(parents=True, exist_ok=True)

    # One process at a time looks whether the file is whole.
    lock = self._path.with_suffix('.lock')
    with storage.explain_write_failures(lock), lock.open('w') as file:
      fcntl.lockf(file, fcntl.LOCK_EX)
      damage = self._open()
      if damage:
        self._set_aside(damage)
        self._open()

    # One that was deleted or emptied was made anew, and has no runs.
    is_of_sweep = (self._path.parent / 'sweep.json').is_file()
    if is_of_sweep and not self._rows('SELECT id FROM runs LIMIT 1'):
      reconcile_ledger(workdir, self)

  def _set_aside(self, damage: str) -> None:
    """Renames the file, which is damaged, and says so."""
    self._connection.close()
    aside = self._path.with_name(f'{self._path.name}.aside-{time.time_ns()}')
    self._path.rename(aside)
    print(f'warning: {self._path} is damaged ({short(damage)}): it is set '
          f'aside as {aside.name}, and {self.anew}', file=sys.stderr)

  def _open(self) -> str:
    """Connects to the file, and makes its tables where it has none; returns
    what is wrong with it, or ''."""
    with self._failing():  # each statement is a transaction of its own
      self._connection = sqlite3.connect(
          self._path, timeout=BUSY_SECONDS, isolation_level=None)
      self._connection.create_function(
          'crc32', -1, _crc32, deterministic=True)
      try:
        rows = self._connection.execute(
            "SELECT sql FROM sqlite_schema WHERE type = 'table'").fetchall()
        wrong, = self._connection.execute(
            'PRAGMA integrity_check(1)').fetchone()
      # SQLite's own sentence may have a name that is no UTF-8.
      except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # The last byte of a code is its kind.
        code = getattr(error, 'sqlite_errorcode', sqlite3.SQLITE_ERROR)
        if code & 0xff not in _DAMAGE:
          raise
        return str(error)
    if wrong != 'ok':
      return wrong
    tables = [sql for sql, in rows]
    if not tables:
      for statement in self.schema:
        self._change(statement)
    elif tables != self.schema:
      return 'its tables are others'
    return ''

  def __enter__(self) -> 'Ledger':
    return self

  def __exit__(self, *error):
    self._connection.close()

  def _rows(self, statement: str, *values) -> list[tuple]:
    """Executes a statement; returns the rows that it gives."""
    with self._failing():
      return self._connection.execute(statement, values).fetchall()

  def _change(self, statement: str, *values) -> int:
    """Executes a statement; returns how many rows it changed."""
    with self._failing():
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
  def _failing(self):
    """Makes a sentence of SQLite's errors."""
    try:
      yield
    except sqlite3.ProgrammingError:
      raise  # a mistake of ours
    except sqlite3.DatabaseError as error:
      raise EnvironmentFailure(
          f'{self._path} cannot be used ({error}): {self.again}') from error

  def add(self, rows: Iterable[tuple[str, int, Sequence[str]]]) -> None:
    """Adds (point, seed, tasks) where missing; a run that is done and owes a
    task which it did not owe before is pending again."""
    with self.transaction():
      for point, seed, names in rows:
        tasks = ','.join(names)
        self._change(
            'INSERT OR IGNORE INTO runs (point, seed, tasks) VALUES (?, ?, ?)',
            point, seed, tasks)
        self._change(
            'UPDATE runs SET tasks = ?, state = CASE WHEN state = ? AND ? '
            'THEN ? ELSE state END WHERE point = ? AND seed = ? '
            'AND tasks != ?',
            tasks, DONE, bool(tasks), PENDING, point, seed, tasks)

  def runs(self, *states: str) -> list[Run]:
    """Returns the runs in some states, or all, by seed and then in file order.
    """
    columns = ', '.join(Run._fields)
    rows = self._rows(f'SELECT {columns} FROM runs ORDER BY seed, id')
    wanted = states or STATES
    runs = []
    for row in rows:
      run = Run._make(row)
      if run.state in wanted:
        runs.append(run)
    return runs

  def register(self) -> str:
    """Adds this process as a runner; returns its name."""
    name = f'{storage.host_name()}:{os.getpid()}:{time.time_ns()}'
    self._change('INSERT INTO runners (name, host, pid) VALUES (?, ?, ?)',
                 name, storage.host_name(), os.getpid())
    return name

  def claim(self, ids: Sequence[int], runner: str) -> list[int]:
    """Takes those runs of `ids` that are still pending, for a runner as
    `register` named it; returns them."""
    claimed = self._rows(
        "UPDATE runs SET state = ?, runner = ?, error = '' WHERE state = ? "
        f'AND id IN ({_places(ids)}) RETURNING id',
        RUNNING, runner, PENDING, *ids)
    return sorted(id for id, in claimed)

  def settle(self, id: int, runner: str, state: str, error: str = '',
             alone: bool = False) -> bool:
    """Writes how a claimed run ended; False if the claim was lost meanwhile.

    Args:
      id: the number of the run.
      runner: the name of the runner that claimed it.
      state: the state that it goes into.
      error: why it failed.
      alone: whether it trains beside no other from now on.
    """
    return self._change(
        "UPDATE runs SET state = ?, error = ?, runner = '', "
        'alone = max(alone, ?) WHERE id = ? AND runner = ?',
        state, error, alone, id, runner) == 1

  def adopt(self, run: Run, state: str, error: str = '') -> None:
    """Moves a run that nobody has claimed meanwhile into another state."""
    self._change(
        'UPDATE runs SET state = ?, error = ? WHERE id = ? AND state = ?',
        state, error, run.id, run.state)

  def retry(self) -> None:
    """Makes what failed pending again."""
    self._change("UPDATE runs SET state = ?, error = '' WHERE state = ?",
                 PENDING, FAILED)

  def beat(self, runner: str) -> set[int]:
    """Says that the runner lives; returns the runs that are still its own."""
    self._change('UPDATE runners SET beats = beats + 1 WHERE name = ?', runner)
    rows = self._rows('SELECT id FROM runs WHERE runner = ?', runner)
    return {id for id, in rows}

  def recover(self) -> list[str]:
    """Frees what dead runners hold; returns 'point, seed S' of each run.

    To be called every BEAT_SECONDS. A runner is dead once its process is gone,
    if it is of this host; or once its heartbeat stood still for STALE_LOOKS.
    """
    holders = self._rows(
        'SELECT name, host, pid, beats FROM runners WHERE name IN '
        '(SELECT runner FROM runs WHERE state = ?)', RUNNING)

    # The runners whose heartbeat stands still, or whose process is gone.
    watched, dead = {}, []
    for name, host, pid, beats in holders:
      heartbeat = self._watched.get(name)
      if heartbeat is None:
        heartbeat = _Heartbeat(first=beats, last=beats, looks=0)
      elif beats == heartbeat.last:
        heartbeat = heartbeat._replace(looks=heartbeat.looks + 1)
      else:
        heartbeat = heartbeat._replace(last=beats, looks=0)
      is_gone = (host == storage.host_name()
                 and not storage.is_process_alive(pid))
      if is_gone or heartbeat.looks >= LOOKS_UNTIL_DEAD:
        dead.append(name)
      else:
        watched[name] = heartbeat
    self._watched = watched
    self.doubtful = any(heartbeat.first == heartbeat.last
                        for heartbeat in watched.values())

    freed = self._rows(
        "UPDATE runs SET state = ?, runner = '' WHERE state = ? AND runner IN "
        f'({_places(dead)}) RETURNING point, seed', PENDING, RUNNING, *dead)
    return [f'{point}, seed {seed}' for point, seed in freed]


class _Heartbeat(NamedTuple):
  """The heartbeats of a runner that another one has seen.

  Attributes:
    first: the heartbeat at the first look.
    last: that at the last look.
    looks: how many looks it has stood still since.
  """
  first: int
  last: int
  looks: int


def _places(values: Sequence) -> str:
  """Returns the places of some values in a statement: '?, ?, ?'."""
  return ', '.join('?' * len(values))


class StudyLedger(Ledger):
  """WORKDIR/study.sqlite: every plan that a study had, and each run that began
  in a new folder. Rows are only ever added."""
  file, schema = 'study.sqlite', STUDY_TABLES
  anew = ('begun anew; the plan is that of study.json, and the report counts '
          'the runs whose beginning is no longer known')
  again = 'run the study again; its runs have ledgers of their own'

  def add_plan(self, hash: str, tree: Any) -> None:
    self._change('INSERT INTO plans (time, hash, tree) VALUES (?, ?, ?)',
                 time.time(), hash, json.dumps(tree))

  def plan(self) -> Any:
    """Returns the tree of the last plan; None where there is none."""
    rows = self._rows('SELECT tree FROM plans ORDER BY id DESC LIMIT 1')
    return json.loads(rows[0][0]) if rows else None

  def add_begun(self, plan: str, runs: Iterable[tuple[str, str, int]]) -> None:
    """Adds (folder of a phase, point, seed) of runs that begin anew."""
    for run in runs:
      self._change('INSERT INTO begun (time, plan, folder, point, seed) '
                   'VALUES (?, ?, ?, ?, ?)', time.time(), plan, *run)

  def begun(self) -> list[tuple[str, str, int]]:
    """Returns what `add_begun` was given, in order."""
    return self._rows('SELECT folder, point, seed FROM begun ORDER BY id')


def load_ledger_runs(workdir) -> list[Run]:
  """Returns what the ledger of a sweep holds."""
  with Ledger(workdir) as ledger:
    return ledger.runs()


def _crc32(*values: Any) -> int:
  return zlib.crc32(repr(values).encode())


def begin_sweep(workdir, ledger, description: dict) -> dict:
  """Writes sweep.json and brings the ledger up to it and to what lies on disk
  (`reconcile`), once it is known of every runner that holds runs whether it
  lives. Returns what sweep.json holds.

  Raises:
    RequestError: where the workdir holds another sweep.
  """
  with ledger.transaction():  # another one may add to it at the same time
    save_sweep_description(workdir, description)
  ledger.recover()
  if ledger.doubtful:
    print('waiting for a sign of life of those who hold runs', file=sys.stderr)
  while ledger.doubtful:
    time.sleep(BEAT_SECONDS)
    ledger.recover()
  return reconcile_ledger(workdir, ledger)


def reconcile_ledger(workdir, ledger) -> dict:
  """Brings the ledger of a sweep up to what lies on disk; returns what
  sweep.json holds.

  Runs that sweep.json has and the ledger has not are added. A run is marked as
  done where it is so on disk and the ledger has not seen it: it is of a printed
  command, or of a ledger that was lost; as failed, where it was trained there
  by another config; and as pending again, where it was done and is gone.
  """
  # The runs that the ledger has not.
  rows = []
  for point in load_sweep_description(workdir)['points']:
    for seed in point['seeds']:
      rows.append((point['name'], seed, point['tasks']))
  rows.sort(key=lambda row: row[1])  # all points of a seed, then the next
  ledger.add(rows)

  # The runs whose state is another one on disk.
  runs = ledger.runs(PENDING, DONE)
  description = load_sweep_description(workdir)  # it has all of these points
  for run in runs:
    folder = run_folder(workdir, run.point, run.seed)
    if run.state == DONE:
      if not (folder / 'config.json').exists():
        print(f'the run in {folder} is gone: it is trained anew',
              file=sys.stderr)
        ledger.adopt(run, PENDING)
      continue
    if not is_trained(
        folder, config_of_run(description, run.point, run.seed).train):
      continue
    error = why_not_of_sweep(description, workdir, run.point, run.seed)
    if error:
      ledger.adopt(run, FAILED, error)
    elif is_evaluated(folder, run.owes):
      ledger.adopt(run, DONE)
  return description
