"""Reads the file of a sweep, such as those of configs/sweeps/.

It holds `get_config()`, which returns the base, a config, and by which train.py
reads the file; and `sweep(add)`, which calls add(name, **{'model.norm':
'rmsnorm', ...}) for each point, or add.system('llama') for one that is another
system. SEEDS (how many, 3 if it says nothing) and TASKS (evaluations that each
run owes once trained) may stand beside them. A constant of the file itself
begins with an underscore.
"""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import dataclasses
import pathlib
import re
from typing import Any

import ml_collections

from architectures.parts import flat
from common.errors import RequestError, suggest_name, require, shorten
from common.fields import check_argument_types, check_type
from configs import base as fields
from training import cli, evals, plugins
from training.workdir import run_config

# The constants that the file of a sweep may hold, and those by which a file is
# known to be that of a study.
CONSTANTS_OF_SWEEP = ('SEEDS', 'TASKS')
CONSTANTS_OF_STUDY = ('SIZES', 'EFFECT')
DEFAULT_NUM_SEEDS, MAX_SEEDS = 3, 10_000
# The name of the point that changes nothing, where the file gives it none.
DEFAULT_BASE_NAME = 'base'
# Fields by which a batch is made: points that differ in one share no batches.
FIELDS_OF_BATCHES = ('data.', 'objective', 'span.', 'probe.')
# The costs that matching makes equal, and the field that it solves by default.
MATCHABLE_COSTS = ('params', 'active_params', 'flops_per_token')
DEFAULT_MATCH_FIELD = 'model.d_ff'


@dataclasses.dataclass(frozen=True)
class Point:
  """One variant of a sweep: its name, and what it changes in the base config.

  Attributes:
    name: the name, which is also its folder's.
    changes: values by dotted key.
    matched: the keys of `changes` that were solved for and not declared.
  """
  name: str
  changes: Mapping[str, Any]
  matched: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The description of a sweep: a base config, and the variants of it that are
  trained, each of which is called a point.

  Attributes:
    name: the name of the file, without its ending.
    file: the path of the file.
    base: the config of the base.
    points: the points, the base among them.
    base_name: the name of the point that is the base.
    seeds: the seeds that every point has.
    tasks: the evaluations of TASKS.
  """
  name: str
  file: str
  base: ml_collections.ConfigDict
  points: tuple[Point, ...]
  base_name: str
  seeds: tuple[int, ...]
  tasks: tuple[str, ...]

  def config_of_point(self, point: Point) -> ml_collections.ConfigDict:
    """Returns the locked config of a point, but for its seed."""
    return apply_changes(self.base, point.changes, f'point {point.name!r}')

  def tasks_of_point(self, point: Point) -> tuple[str, ...]:
    """Returns the evaluations that each run of a point gets once it is trained:
    those of TASKS that can measure its model."""
    config = self.config_of_point(point)
    fitting_tasks = []
    for task in self.tasks:
      if not evals.get_task(task).why_unfit(config):
        fitting_tasks.append(task)
    return tuple(fitting_tasks)


class PointCollector:
  """Collects the points of a sweep; it is the argument `add` with which the
  function `sweep(add)` of a sweep's file is called.

  add(name, **changes) adds a variant, and add.system(arch) adds one that is
  another system, such as 'llama'.
  """

  def __init__(self, file: str, base: ml_collections.ConfigDict):
    self._file, self._base = file, base
    self.points: dict[str, Point] = {}

  @check_argument_types
  def __call__(self, name: str, **changes: Any) -> None:
    """Adds a point, which is a variant of the sweep's base config.

    Args:
      name: the name of the point, which also becomes the name of a folder.
      **changes: the fields of the config that it changes, by dotted name.

    Raises:
      RequestError: for a name that is in use or cannot be one, and for a field
        that must be the same for all points.
    """
    is_name = re.fullmatch(r'[^\W_][\w.=+-]*', name) is not None
    require(is_name, f'{self._file}: a point is called {shorten(name)}: begin '
            'with a letter or a digit, and go on with these and . _ = + - '
            'alone, since it names a folder and stands in tables and commands')
    require(name not in self.points,
            f'{self._file}: two points are called {name!r}')
    for field in ('seed', 'eval.part', 'eval.batches'):
      require(field not in changes, f'{self._file}: point {name!r} sets '
              f'{field}: every point has the same seeds, those of SEEDS or '
              '--seeds, and is evaluated on the same text')
    self.points[name] = Point(name=name, changes=changes)

  @check_argument_types
  def system(self, arch: str, size: str = 'tiny', name: str = '',
             **changes: Any) -> None:
    """Adds a point with the architecture of another system, such as 'llama', at
    the sizes of the base. It takes all fields of configs/ARCH.py that are not
    sizes (training/costs/systems.py).

    Args:
      arch: the system, as model.arch names it.
      size: the size of configs/ARCH.py whose fields are taken. It also gives
        the sizes of parts that the base does not have, such as experts.
      name: the name of the point; '' stands for arch.
      **changes: further fields to change, by dotted name. They win.
    """
    from training.costs import systems
    name = name or arch
    with prefix_errors(f'{self._file}: point {name!r}'):
      of_system = systems.changes_to_system(self._base, arch, size)
    self(name, **{**of_system, **changes})


@contextlib.contextmanager
def prefix_errors(subject: str) -> Iterator[None]:
  """Puts words before the message of a RequestError that is raised inside."""
  try:
    yield
  except RequestError as error:
    raise RequestError(f'{subject}: {error}') from error


def is_study(file: str) -> bool:
  """Returns whether a file describes a study, and not a sweep alone."""
  return any(hasattr(load_sweep_module(file), name)
             for name in CONSTANTS_OF_STUDY)


def read_sweep_file(file: str, seeds: int = 0,
                    known: Collection[str] = CONSTANTS_OF_SWEEP) -> Sweep:
  """Reads the file of a sweep. A point that changes nothing is added, as the
  base of all comparisons, where the file has none.

  Args:
    file: the path of the file.
    seeds: how many seeds each point has; 0: the file's SEEDS.
    known: the constants that the file may hold; that of a study may hold more.

  Raises:
    RequestError: for a file that describes no sweep.
  """
  file = path_of_sweep_file(file)
  module = load_sweep_module(file)
  # A constant that nothing reads may be a misspelt one.
  for name in vars(module):
    is_read = name in known or name in plugins.MODULE_OF_TABLE
    require(not name.isupper() or name.startswith('_') or is_read,
            f'{file} has {name}, which is not read: call it _{name} if it is '
            f'the file\'s own.{suggest_name(name, [*known])}')

  # The base and the points.
  base = plugins.call_user_function(file, module.get_config)
  plugins.check_config(base, f'{file}: get_config()')
  add = PointCollector(file, base)
  plugins.call_user_function(file, module.sweep, add)

  # The constants beside them.
  tasks = getattr(module, 'TASKS', ())
  require(isinstance(tasks, tuple | list),
          f'{file}: TASKS is {tasks!r}: write a tuple of names')
  for task in tasks:
    evals.check_task_without_flags(task, f'{file}: TASKS')
  if not seeds and known is CONSTANTS_OF_SWEEP:
    seeds = getattr(module, 'SEEDS', DEFAULT_NUM_SEEDS)
  require(type(seeds) is int and 1 <= seeds <= MAX_SEEDS, f'SEEDS or --seeds '
          f'is {seeds!r}: choose a whole number from 1 to {MAX_SEEDS:,}')
  return _include_base(Sweep(
      name=pathlib.Path(file).stem,
      file=file,
      base=base.lock(),
      points=tuple(add.points.values()),
      base_name='',
      seeds=tuple(range(seeds)),
      tasks=tuple(tasks)))


def apply_changes(base: ml_collections.ConfigDict, changes: Mapping[str, Any],
                  subject: str) -> ml_collections.ConfigDict:
  """Returns a locked copy of a config in which some fields are changed.

  Args:
    base: the config, which stays as it is.
    changes: the new values by dotted name, such as {'model.norm': 'rmsnorm'}.
    subject: the name of what sets these values, with which a message begins.

  Raises:
    RequestError: for a name that is no field, or a value of another type.
  """
  # Set one field after the other. A field must be declared before it is set.
  config = base.copy_and_resolve_references()
  for name, value in changes.items():
    # A value that was read from JSON has lists, where the config needs tuples.
    value = run_config.lists_to_tuples(value)
    leaf = cli.declare_field(config, name)
    # The kinds of layers are set as a whole, a dict of the fields of each.
    if name == 'model.kinds':
      flat.check_kinds(value, f'{subject}: model.kinds')
      value = ml_collections.ConfigDict(value)
    elif leaf is None:
      raise RequestError(f'{subject} sets {name!r}, which is no config field.'
                         f'{suggest_name(name, fields.SENTENCES)}')
    else:
      check_type(value, leaf.default, f'{subject}: {name}')
    config.update_from_flattened_dict({name: value})
  return config.lock()


def path_of_sweep_file(file: str) -> str:
  """Returns the path of the file of a sweep or a study that a user names; see
  plugins.find_config_file."""
  return plugins.find_config_file(file, 'file', ('sweeps', 'studies'))


def load_sweep_module(file: str):
  """Returns the module that a sweep's or a study's file is."""
  file = path_of_sweep_file(file)
  module = plugins.run_user_file(file)
  for name, given in ('get_config', ''), ('sweep', 'add'):
    require(callable(getattr(module, name, None)),
            f'{file} has no {name}: add `def {name}({given}): ...`')
  return module


def _include_base(sweep: Sweep) -> Sweep:
  """Makes sure that one point of a sweep is the base, with which the others are
  compared: the point that changes nothing, or a new one before the others.

  Args:
    sweep: the sweep as its file adds the points (variants of the config).

  Raises:
    RequestError: if the sweep has nothing but the base, or two points that
      train the same model in the same way.
  """
  # Find or add the base.
  points = list(sweep.points)
  base = _point_equal_to_base(sweep)
  if base is None:
    require(DEFAULT_BASE_NAME not in [point.name for point in points],
            f'{sweep.file}: the '
            f'point called {DEFAULT_BASE_NAME!r} changes the base: call it '
            'otherwise')
    base = Point(name=DEFAULT_BASE_NAME, changes={})
    points.insert(0, base)
  require(len(points) > 1,
          f'{sweep.file}: sweep(add) adds nothing but the base')

  # Refuse two points that train the same. Each is compared with all before it.
  trained_before: list[tuple[str, Any]] = []
  for point in points:
    trained_model = _trained_model(sweep.config_of_point(point))
    for name, other_model in trained_before:
      require(other_model != trained_model,
              f'{sweep.file}: points {name!r} and '
              f'{point.name!r} train the same; model.arch alone is a name, '
              'which changes no part of a model: write add.system(ARCH), which '
              'sets the parts of a system')
    trained_before.append((point.name, trained_model))
  return dataclasses.replace(sweep, points=tuple(points), base_name=base.name)


def _point_equal_to_base(sweep: Sweep) -> Point | None:
  """Returns the first point that equals the base; None where none does."""
  base = sweep.base.to_dict()
  for point in sweep.points:
    if sweep.config_of_point(point).to_dict() == base:
      return point
  return None


def _trained_model(config: ml_collections.ConfigDict) -> tuple[dict, dict]:
  """Returns everything that decides what a config trains, so that two configs
  can be compared: if they train the same, the results are equal. The name of
  the system (model.arch) alone changes nothing, and is left out.

  Args:
    config: the config of a run.

  Returns:
    The config as nested dicts, without model.arch; and the values that the
    system's module in architectures/ defines besides its name and parts, such
    as the scorer of an encoder.
  """
  import architectures
  tree = config.to_dict()
  page = architectures.systems().get(tree['model'].pop('arch'))
  page_values = {}
  for name in dir(page):
    if not name.startswith('_') and name not in ('PARTS', 'ARCH'):
      page_values[name] = getattr(page, name)
  return tree, page_values
