"""A sweep as its file describes it: a base, and points that change it.

A file of configs/sweeps/ holds `base()`, which returns a config; `get_config`,
another name of it, by which train.py reads it; and `sweep(add)`, which calls
add(name, **{'model.norm': 'rmsnorm', ...}) for each point, or
add.system('llama') for one that is another system. SEEDS (how many, 3
if it says nothing) and TASKS (evaluations that each run owes once trained)
may stand beside them. A constant of the file itself begins with an underscore.
"""

from collections.abc import Collection, Mapping
import dataclasses
import difflib
import os
import pathlib
import re
from typing import Any

import ml_collections

from architectures.parts import tables
from configs.errors import RequestError, require
from tools.compare import systems
from training import config_files, evals

CONSTANTS = ('SEEDS', 'TASKS')  # that a file may hold
SEEDS = 3
MOST_SEEDS = 10_000
BASE = 'base'  # what the point that changes nothing is called by default


@dataclasses.dataclass(frozen=True)
class Point:
  """A variant: its name, and the config keys in which it leaves the base.

  Attributes:
    name: also its folder's.
    changes: values by dotted key.
    matched: of `changes`, the keys that were solved for and not declared.
  """
  name: str
  changes: Mapping[str, Any]
  matched: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a file of configs/sweeps/ describes."""
  name: str
  file: str
  base: ml_collections.ConfigDict
  points: tuple[Point, ...]
  base_name: str
  seeds: tuple[int, ...]
  tasks: tuple[str, ...]
  match: str = ''

  def config(self, point: Point, seed: int | None = None
             ) -> ml_collections.ConfigDict:
    """Returns the locked config of a point, with its seed where one is given.
    """
    changes = dict(point.changes)
    if seed is not None:
      changes['seed'] = seed
    return changed(self.base, changes, f'point {point.name!r}')

  def owed(self, point: Point) -> tuple[str, ...]:
    """The evaluations that a run of `point` owes once it is trained: those of
    TASKS that measure something of it."""
    config = self.config(point)
    return tuple(task for task in self.tasks
                 if not evals.task(task).unfit(config))


def read_sweep_file(file: str, seeds: int = 0,
                    known: Collection[str] = CONSTANTS) -> Sweep:
  """Reads a sweep's file; the point that changes nothing is added if missing.

  Args:
    file: its path.
    seeds: how many; 0: the file's SEEDS.
    known: the constants that it may hold, of a study more than CONSTANTS.

  Raises:
    ValueError: for what no sweep can be made of.
  """
  module = _module(file)
  check_constants(file, module, known, 'a sweep')
  base, again = (config_files.call(file, module.base) for _ in range(2))
  config_files.check_config_fields(base, f'{file}: base()')
  if again.to_json_best_effort() != base.to_json_best_effort():
    raise RequestError(f'{file}: base() returns another config each time it is '
                       'called, so no two points would share it')
  points: dict[str, Point] = {}

  def add(name: str, **changes):
    if not isinstance(name, str) or not re.fullmatch(
        r'[\w=+-][\w.=+-]*', name):
      raise RequestError(f'{file}: a point is called {name!r}: choose letters, '
                         'digits and . _ = + - alone, since it names a folder')
    if name in points:
      raise RequestError(f'{file}: two points are called {name!r}')
    if 'seed' in changes:
      raise RequestError(f'{file}: point {name!r} sets seed: every point has '
                         'the same seeds, those of SEEDS or --seeds')
    points[name] = Point(name, changes)

  config_files.call(file, module.sweep, systems.Add(add, base, file))
  tasks = getattr(module, 'TASKS', ())
  if not isinstance(tasks, tuple | list):
    raise RequestError(f'{file}: TASKS is {tasks!r}: write a tuple of names')
  for task in tasks:
    require(isinstance(task, str) and ',' not in task, f'{file}: TASKS has '
            f'{task!r}: write each task as a text of its own')
    evals.check_without_flags(task, f'{file}: TASKS')
  seeds = seeds or getattr(module, 'SEEDS', SEEDS)
  if type(seeds) is not int or not 1 <= seeds <= MOST_SEEDS:
    raise RequestError(f'SEEDS or --seeds is {seeds!r}: choose a whole number '
                       f'from 1 to {MOST_SEEDS:,}')
  sweep = Sweep(pathlib.Path(file).stem, file, base.lock(),
                tuple(points.values()), '', tuple(range(seeds)), tuple(tasks))
  return _with_base(sweep)


def check_constants(file: str, module: Any, known: Collection[str],
                    reader: str) -> None:
  """Raises RequestError for a constant of a user's file that nothing reads,
  such as one that is misspelt.

  Args:
    file: its path.
    module: what it defines.
    known: the constants that are read.
    reader: what reads them.
  """
  for name in vars(module):
    if name.isupper() and not name.startswith('_') and name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f' Did you mean {near[0]}?' if near else ''
      raise RequestError(f'{file} has {name}, which {reader} does not read: '
                         f'call it _{name} if it is the file\'s own.{hint}')


def changed(base: ml_collections.ConfigDict, changes: Mapping[str, Any],
            who: str) -> ml_collections.ConfigDict:
  """Returns a locked copy of `base` with `changes` made; ValueError, naming
  `who` wants it, for a key that is not there or a value of another type."""
  config = base.copy_and_resolve_references()
  for key, value in changes.items():
    if _set_kinds(config, key, value, who):
      continue
    *parents, last = key.split('.')
    at, old = None, config
    for part in [*parents, last]:
      if not hasattr(old, 'keys') or part not in old:
        keys = _keys(base)
        near = difflib.get_close_matches(key, keys, n=1)
        hint = f': did you mean {near[0]!r}?' if near else ''
        raise RequestError(
            f'{who} sets {key!r}, which is no config field{hint}')
      at, old = old, old[part]
    if hasattr(old, 'keys'):
      raise RequestError(f'{who} sets {key!r}, a group of fields: set '
                         f'{key}.{next(iter(old))} and so on')
    if isinstance(old, float) and type(value) is int:
      value = float(value)
    value = tuples(value)
    if type(value) is not type(old):
      raise RequestError(
          f'{who} sets {key} to {value!r}, a {type(value).__name__}: it holds '
          f'{old!r}, a {type(old).__name__}')
    at[last] = value
  return config.lock()


def sets(changes: Mapping[str, Any], key: str) -> bool:
  """Whether changes set a field, by its own name or with all kinds of layer.
  """
  return key in changes or (
      key.startswith('model.kinds.') and 'model.kinds' in changes)


def _set_kinds(config: ml_collections.ConfigDict, key: str, value: Any,
               who: str) -> bool:
  """Sets all kinds of layer where `key` says so, and makes room for a field of
  one; returns whether that was all."""
  if key == 'model.kinds' and isinstance(value, Mapping):
    value = tuples(value)
    tables.check_kinds(value, f'{who}: model.kinds')
    config.model.kinds = ml_collections.ConfigDict(value)
    return True
  if found := re.fullmatch(r'model\.kinds\.(\w+)\.([\w.]+)', key):
    config_files.declare(config.model, *found.groups())
  return False


def tuples(value):
  """Sequences in a config are tuples; JSON, where changes stand, has lists."""
  if isinstance(value, Mapping):  # kinds of layer
    return {name: tuples(x) for name, x in value.items()}
  return (tuple(map(tuples, value)) if isinstance(value, list | tuple)
          else value)


def hashable(value):
  """Returns a value of a config or of JSON as a key of a dict: equal values
  have equal keys."""
  if isinstance(value, Mapping):
    return frozenset((name, hashable(x)) for name, x in value.items())
  return (tuple(map(hashable, value)) if isinstance(value, list | tuple)
          else value)


def _keys(config, prefix: str = '') -> list[str]:
  keys = []
  for name, value in config.items():
    keys += (_keys(value, f'{prefix}{name}.') if hasattr(value, 'keys')
             else [prefix + name])
  return keys


def _module(file: str):
  path = pathlib.Path(file)
  if not os.path.isfile(path):  # which is False for a name that is too long
    files = sorted(str(p) for p in pathlib.Path('configs/sweeps').glob('*.py')
                   if p.stem not in ('__init__', 'helpers'))
    raise RequestError(f'no sweep {file!r}: choose from {", ".join(files)}, or '
                       'write one')
  module = config_files.run(file)
  for name, line in (('base', 'def base(): ...'),
                     ('sweep', 'def sweep(add): ...'),
                     ('get_config', 'get_config = base')):
    if not callable(getattr(module, name, None)):
      raise RequestError(f'{file} has no {name}: add `{line}`')
  return module


def _with_base(sweep: Sweep) -> Sweep:
  """Finds the point that equals the base, or puts one before the others."""
  plain = sweep.base.to_dict()
  seen: list[tuple[dict, str]] = []
  base_name = ''
  for point in sweep.points:
    config = sweep.config(point).to_dict()
    if config == plain:
      base_name = base_name or point.name
    same = next((name for other, name in seen if other == config), '')
    if same:
      raise RequestError(f'{sweep.file}: points {same!r} and {point.name!r} '
                         'are the same config')
    seen.append((config, point.name))
  points = sweep.points
  if not base_name:
    if BASE in (point.name for point in points):
      raise RequestError(f'{sweep.file}: the point called {BASE!r} changes the '
                         'base: call it otherwise')
    base_name, points = BASE, (Point(BASE, {}), *points)
  if len(points) < 2:
    raise RequestError(f'{sweep.file}: sweep(add) adds nothing but the base')
  return dataclasses.replace(sweep, points=points, base_name=base_name)
