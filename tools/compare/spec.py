"""What a file of configs/sweeps/ or configs/studies/ describes.

A sweep's file holds `base()`, which returns a config; `get_config`, another
name of it, by which train.py reads it; and `sweep(add)`, which calls
add(name, **{'model.norm': 'rmsnorm', ...}) for each point, or
add.system('llama') for one that is another system. SEEDS (how many, 3 if it
says nothing) and TASKS (evaluations that each run owes once trained) may stand
beside them.

A study's file holds `base()` and `sweep(add)` too; `SIZES`, the changes of each
size by its name, smallest first; and `EFFECT`, the smallest difference of the
first measure that is wanted. The rest has defaults: see `STUDY`.

A constant of the file itself begins with an underscore.
"""

from collections.abc import Collection, Mapping
import dataclasses
import difflib
import itertools
import os
import pathlib
import re
from typing import Any

import ml_collections

from architectures.parts import tables
from configs.errors import RequestError, one_of, require, short
from tools.compare import measures as measures_lib
from tools.compare import plan as plans
from tools.compare import statistics
from training import config_files, evals, limits

CONSTANTS = ('SEEDS', 'TASKS')  # that a sweep's file may hold
SEEDS = 3
MOST_SEEDS = 10_000
BASE = 'base'  # what the point that changes nothing is called by default
# Fields by which a batch is made: points that differ in one share no batches.
BATCHES = ('data.', 'objective', 'span.', 'probe.')
# What matching makes equal, and the field that it solves by default.
MATCH = ('params', 'active_params', 'flops_per_token')
MATCH_FIELD = 'model.d_ff'

# What a study's file may hold, with its default; None: it must.
STUDY: dict[str, Any] = {
    'QUESTION': '',
    'SIZES': None,
    'EFFECT': None,
    # The runs that measures come from, with the fields in which they leave the
    # base: 'text', and probes by their names.
    'WORKLOADS': {plans.TEXT: {}},
    # Of each {'workload', 'figure', 'better', 'name', 'chance'}; derived: the
    # loss of the text, and the accuracy of each probe.
    'MEASURES': (),
    'SEEDS': {'noise': 5, 'tune': 1, 'screen': 5, 'confirm': 5},
    # 'fields': the values of each that are tried; derived: half of the base's
    # learning rate, the rate, and twice the rate.
    'TUNING': {},
    'ALPHA': 0.05, 'Q': 0.05, 'POWER': 0.8, 'UNSTABLE': 0.1,
    'MATCH': '', 'MATCH_FIELD': MATCH_FIELD,
}
# How the constants are written that have no default to tell it.
_MUST = {'SIZES': "SIZES = {'s': {'model.d_model': 32}, ...}, smallest first",
         'EFFECT': 'EFFECT = 0.02, the smallest difference in the first '
                   'measure that is worth finding'}
_TYPES = {'SIZES': (dict,), 'EFFECT': (int, float), 'MEASURES': (tuple, list)}
_WORDS = {dict: 'dictionary', str: 'text', int: 'number', float: 'number',
          tuple: 'tuple of dictionaries'}
LEAST_SIZES = 3
LEAST_SEEDS = {'noise': 3, 'tune': 1, 'screen': statistics.MIN_SEEDS,
               'confirm': statistics.MIN_SEEDS}
# Fields that are the study's own.
_OWN = ('seed', 'init_seed', 'eval.part')
# Fields by which a run sees other data, or more of it, than the base's.
_DATA = (*BATCHES, 'train.steps', 'train.grad_accumulation', 'eval.')


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
  """A base and the points that change it."""
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


@dataclasses.dataclass(frozen=True)
class Study:
  """What a study's file says, checked as far as the file alone can be.

  Attributes:
    file: its path.
    sweep: the base and its variants.
    given: the constants, by the names of STUDY.
    sizes, workloads: the changes of each, by name.
    seeds, tuning: as the plan has them.
    measures: what MEASURES says, completed, without `chance`s.
  """
  file: str
  sweep: Sweep
  given: Mapping[str, Any]
  sizes: Mapping[str, dict]
  workloads: Mapping[str, dict]
  seeds: plans.Seeds
  tuning: plans.Tuning
  measures: list[dict]


class Add:
  """What `sweep(add)` of a file is given: add(name, **changes) adds a point,
  and add.system(arch) one that is another system."""

  def __init__(self, file: str, base: ml_collections.ConfigDict):
    self._file, self._base = file, base
    self.points: dict[str, Point] = {}

  def __call__(self, name: str, **changes: Any) -> None:
    require(isinstance(name, str)
            and re.fullmatch(r'[\w=+-][\w.=+-]*', name) is not None,
            f'{self._file}: a point is called {name!r}: choose letters, digits '
            'and . _ = + - alone, since it names a folder')
    require(name not in self.points,
            f'{self._file}: two points are called {name!r}')
    require('seed' not in changes, f'{self._file}: point {name!r} sets seed: '
            'every point has the same seeds, those of SEEDS or --seeds')
    self.points[name] = Point(name, changes)

  def system(self, arch: str, size: str = 'tiny', name: str = '',
             **changes: Any) -> None:
    """Adds the base as another system: the fields of its model that
    configs/ARCH.py has otherwise, but for its sizes
    (training/costs/systems.py).

    Args:
      arch: the system, as model.arch names it.
      size: of configs/ARCH.py: whose parts are taken, and the sizes of what the
        base has no part for, such as experts.
      name: of the point; default: arch.
      **changes: by dotted key, made after these.
    """
    from training.costs import systems
    name = name or str(arch)
    try:
      found = systems.changes(self._base, arch, size)
    except RequestError as error:
      raise RequestError(f'{self._file}: point {name!r}: {error}') from error
    self(name, **{**found, **changes})


def is_study(file: str) -> bool:
  """Whether a file describes a study, and not a sweep alone."""
  return any(hasattr(_module(file), name) for name in _MUST)


def read_sweep_file(file: str, seeds: int = 0,
                    known: Collection[str] = CONSTANTS) -> Sweep:
  """Reads a sweep's file; the point that changes nothing is added if missing.

  Args:
    file: its path.
    seeds: how many; 0: the file's SEEDS.
    known: the constants that it may hold, of a study more than CONSTANTS.

  Raises:
    RequestError: for what no sweep can be made of.
  """
  module = _module(file)
  check_constants(file, module, known, 'a sweep')
  base, again = (config_files.call(file, module.base) for _ in range(2))
  config_files.check_config_fields(base, f'{file}: base()')
  require(again.to_json_best_effort() == base.to_json_best_effort(),
          f'{file}: base() returns another config each time it is called, so '
          'no two points would share it')
  add = Add(file, base)
  config_files.call(file, module.sweep, add)
  tasks = getattr(module, 'TASKS', ())
  require(isinstance(tasks, tuple | list),
          f'{file}: TASKS is {tasks!r}: write a tuple of names')
  for task in tasks:
    require(isinstance(task, str) and ',' not in task, f'{file}: TASKS has '
            f'{task!r}: write each task as a text of its own')
    evals.check_without_flags(task, f'{file}: TASKS')
  seeds = seeds or getattr(module, 'SEEDS', SEEDS)
  require(type(seeds) is int and 1 <= seeds <= MOST_SEEDS, f'SEEDS or --seeds '
          f'is {seeds!r}: choose a whole number from 1 to {MOST_SEEDS:,}')
  return _with_base(Sweep(
      pathlib.Path(file).stem, file, base.lock(), tuple(add.points.values()),
      '', tuple(range(seeds)), tuple(tasks)))


def read_study_file(file: str) -> Study:
  """Reads a study's file; RequestError for what no study can be made of."""
  given = _constants(file, _module(file))
  sweep = read_sweep_file(file, seeds=1, known=STUDY)
  sizes = _groups(file, 'SIZES', given['SIZES'])
  require(len(sizes) >= LEAST_SIZES, f'{file}: SIZES has {len(sizes)} of them: '
          f'a study has at least {LEAST_SIZES}, since a verdict must agree '
          'over sizes')
  workloads = _groups(file, 'WORKLOADS', given['WORKLOADS'])
  require(next(iter(workloads), '') == plans.TEXT, f'{file}: WORKLOADS begins '
          f'with {next(iter(workloads), "nothing")!r}: begin it with '
          f'{plans.TEXT!r}, which probes stand beside')
  tuning = _tuning(file, given['TUNING'], sweep.base)
  _check_overlaps(file, sweep, sizes, workloads, tuning.fields)
  measures = given['MEASURES'] or [
      {'workload': name, 'figure': 'loss' if name == plans.TEXT else 'accuracy'}
      for name in workloads]
  return Study(file, sweep, given, sizes, workloads,
               _seeds(file, given['SEEDS']), tuning,
               measures_lib.completed(measures, workloads, file))


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
  if not os.path.isfile(file):  # which is False for a name that is too long
    files = sorted(str(path) for folder in ('sweeps', 'studies')
                   for path in pathlib.Path('configs', folder).glob('*.py')
                   if path.stem not in ('__init__', 'helpers'))
    raise RequestError(f'no file {file!r}: choose from {", ".join(files)}, or '
                       'write one')
  module = config_files.run(file)
  for name, line in (('base', 'def base(): ...'),
                     ('sweep', 'def sweep(add): ...'),
                     ('get_config', 'get_config = base')):
    require(callable(getattr(module, name, None)),
            f'{file} has no {name}: add `{line}`')
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
    require(not same, f'{sweep.file}: points {same!r} and {point.name!r} are '
            'the same config')
    seen.append((config, point.name))
  points = sweep.points
  if not base_name:
    require(BASE not in (point.name for point in points), f'{sweep.file}: the '
            f'point called {BASE!r} changes the base: call it otherwise')
    base_name, points = BASE, (Point(BASE, {}), *points)
  require(len(points) > 1,
          f'{sweep.file}: sweep(add) adds nothing but the base')
  return dataclasses.replace(sweep, points=points, base_name=base_name)


def refuse_names_alone(sweep: Sweep) -> None:
  """Raises RequestError for a point that another one equals in all but
  model.arch, which is a name and changes no part."""
  seen: list[tuple[str, ml_collections.ConfigDict]] = []
  for point in sorted(sweep.points, key=lambda p: p.name != sweep.base_name):
    config = sweep.config(point)
    for other, its in seen:
      arch, theirs = config.model.arch, its.model.arch
      require(arch == theirs or not _same(config, its),
              f'{sweep.file}: points {other!r} and {point.name!r} differ in '
              f'model.arch alone, {theirs!r} and {arch!r}, which is a name and '
              'changes no part of a model, so their runs would be the same: '
              f'write add.system({arch!r}), which sets the parts of that '
              'system, or set model.norm, model.position and so on too')
    seen.append((point.name, config))


def _same(one: ml_collections.ConfigDict, other: ml_collections.ConfigDict
          ) -> bool:
  """Whether two configs build and train the same, whatever their systems are
  called."""
  import architectures
  pages = [architectures.systems().get(config.model.arch)
           for config in (one, other)]
  # Pages of encoders have more than parts, such as what scores a row.
  more = [{name: getattr(page, name) for name in dir(page)
           if not name.startswith('_') and name not in ('PARTS', 'ARCH')}
          for page in pages]
  renamed = changed(other, {'model.arch': one.model.arch}, 'it')
  return more[0] == more[1] and renamed.to_dict() == one.to_dict()


def _constants(file: str, module: Any) -> dict[str, Any]:
  """Returns the constants of a study's file by the names of STUDY."""
  require(not hasattr(module, 'TASKS'), f'{file} has TASKS: a study evaluates '
          'what its MEASURES need, as TASK/FIGURE')
  check_constants(file, module, STUDY, 'a study')
  found = {}
  for name, default in STUDY.items():
    found[name] = value = getattr(module, name, default)
    require(value is not None,
            f'{file} has no {name}: add {_MUST.get(name, "")}')
    types = _TYPES.get(name, (int, float) if type(default) is float
                       else (type(default),))
    require(type(value) in types, f'{file}: {name} is {short(value)}, a '
            f'{type(value).__name__}: write a {_WORDS[types[0]]}')
  for name, most in (('EFFECT', 1e30), ('ALPHA', 1), ('Q', 1), ('POWER', 1)):
    require(0 < found[name] < most, f'{file}: {name} is {found[name]}: it must '
            f'be above 0' + (' and below 1' if most == 1 else ''))
  require(0 <= found['UNSTABLE'] <= 1, f'{file}: UNSTABLE is '
          f'{found["UNSTABLE"]}: it is a share, from 0 to 1')
  one_of('MATCH', found['MATCH'], ('', *MATCH))
  require(bool(found['MATCH']) or found['MATCH_FIELD'] == MATCH_FIELD,
          f'{file}: MATCH_FIELD is {found["MATCH_FIELD"]}, but MATCH is empty: '
          f'set it to one of {", ".join(MATCH)}')
  return found


def _groups(file: str, name: str, value: Mapping) -> dict[str, dict]:
  """Checks {name: {field: value}}."""
  for key, fields in value.items():
    require(isinstance(key, str) and re.fullmatch(r'[\w=+-]+', key) is not None,
            f'{file}: {name} has {key!r}: choose letters, digits and _ = + - '
            'alone, since it names a folder')
    require(isinstance(fields, Mapping), f'{file}: {name}[{key!r}] is '
            f'{short(fields)}: write the fields that it changes, as '
            "{'model.d_model': 64}")
  return {key: dict(fields) for key, fields in value.items()}


def _check_overlaps(file: str, sweep: Sweep, sizes, workloads, tuned) -> None:
  """Raises RequestError for a field that two would set, or by which variants
  would not see the same data."""
  points = {point.name: point.changes for point in sweep.points}
  require(plans.AGAIN not in points, f'{file}: a variant is called '
          f'{plans.AGAIN!r}, which is what the study calls its base with other '
          'first parameters: call it otherwise')
  for name in ('init_seed', 'eval.part'):
    value = limits.get(sweep.base, name)
    require(not value, f'{file}: base() sets {name} to {value!r}, which the '
            'study sets itself: leave it out')
  named = {'size': sizes, 'workload': workloads, 'variant': points}
  owners = [('the study itself', _OWN), ('TUNING', tuned), *(
      (f'{kind} {name!r}', own) for kind, group in named.items()
      for name, own in group.items())]
  for who, fields in owners:
    for field in fields if who.startswith(('TUNING', 'variant')) else ():
      require(not field.startswith(_DATA) or field in _OWN,
              f'{file}: {who} sets {field}: every variant of a study has the '
              'same data and as many steps as the base, or no difference would '
              'be its own')
  for (who, fields), (other, others) in itertools.combinations(owners, 2):
    for field in fields if who.split()[0] != other.split()[0] else ():
      # Variants may be the base with other first parameters.
      twin = field == 'init_seed' and other.startswith('variant')
      require(field not in others or twin, f'{file}: {who} and {other} both '
              f'set {field}: leave it to {who}')


def _seeds(file: str, given: Mapping) -> plans.Seeds:
  """Returns SEEDS, those that it leaves out at their defaults."""
  for phase in given:
    one_of('phase of SEEDS', phase, plans.PHASES)
  found = {**STUDY['SEEDS'], **given}
  for phase, number in found.items():
    least = LEAST_SEEDS[phase]
    require(type(number) is int and least <= number <= plans.Seeds.APART,
            f'{file}: SEEDS has {number!r} for {phase}: it must be a whole '
            f'number from {least} to {plans.Seeds.APART:,}' + (
                ', since fewer say nothing about noise' if least > 1 else ''))
  return plans.Seeds(**found)


def _tuning(file: str, given: Mapping, base) -> plans.Tuning:
  """Returns TUNING; `base` is the base's config."""
  for name in given:
    one_of('entry of TUNING', name, ('fields', 'keep', 'rungs', 'extend'))
  lr = base.optim.lr
  fields = given.get('fields', {'optim.lr': (lr / 2, lr, 2 * lr)})
  require(isinstance(fields, Mapping) and bool(fields)
          and all(isinstance(name, str) for name in fields), f'{file}: TUNING '
          f"has {short(fields)} as fields: write {{'optim.lr': (1e-3, 2e-3)}}")
  found = plans.Tuning(**{**given, 'fields': {
      name: tuple(values) if isinstance(values, tuple | list) else (values,)
      for name, values in fields.items()}})
  for name, values in found.fields.items():
    who = f'{file}: TUNING of {name}'
    for value in values:
      changed(base, {name: value}, who)
      require(type(value) in (int, float) and value > 0, f'{who} has '
              f'{value!r}: what is tuned is a number above 0')
    require(len(values) > 1 and list(values) == sorted(set(values)),
            f'{who} is {values}: write two values or more, rising')
  require(type(found.rungs) is int and 1 <= found.rungs <= 10
          and type(found.extend) is int and 0 <= found.extend <= 10
          and type(found.keep) is float and 0 < found.keep < 1,
          f'{file}: TUNING has keep={found.keep!r}, rungs={found.rungs!r}, '
          f'extend={found.extend!r}: keep is a share between 0 and 1, rungs '
          'from 1 to 10, extend from 0 to 10')
  return found
