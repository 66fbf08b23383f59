"""What eval.py can measure of a checkpoint: one record a task, in TASKS.

To add the task NAME, write tasks/NAME.py with its record, TASK; task.py says
what a record holds. eval.py and the sweeps take the names of the tasks and
their flags from this table.
"""

from collections.abc import Sequence
import importlib
import importlib.util
import pkgutil
from typing import Any

from absl import flags
from etils import epath
import ml_collections

from configs.errors import one_of, require
from training.evals import tasks
from training.evals.task import Task
from training.workdir import storage

flags.disclaim_key_flags()  # what is defined here belongs to who calls

TASKS: dict[str, Task] = {
    file.name: importlib.import_module(f'{tasks.__name__}.{file.name}').TASK
    for file in pkgutil.iter_modules(tasks.__path__)}


def task(name: str) -> Task:
  """Returns the task `name`; RequestError where there is none."""
  one_of('--tasks', name, TASKS)
  return TASKS[name]


def define_flags() -> None:
  """Defines the flags of all tasks."""
  define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer,
            float: flags.DEFINE_float, str: flags.DEFINE_string}
  for name, row in TASKS.items():
    for flag in row.flags:
      bounds = {} if flag.least is None else dict(
          lower_bound=flag.least, upper_bound=flag.most)
      define[type(flag.default)](
          flag.name, flag.default, f'{name}: {flag.help}', **bounds)


def described() -> str:
  """Returns what each task reports, in a sentence for --help."""
  return '; '.join(f'{name}: {row.help}' for name, row in TASKS.items())


def asked_for(names: Sequence[str], values: flags.FlagValues) -> list[str]:
  """Returns the tasks of --tasks, and those that another flag asks for.

  Raises:
    RequestError: for a name that is no task's.
  """
  asked = [name for name, row in TASKS.items() if name not in names and any(
      flag.asks and values[flag.name].present for flag in row.flags)]
  for name in names:
    task(name)
  return [*names, *asked]


def check_task(name: str, options: Any, config: ml_collections.ConfigDict,
               workdir: epath.Path) -> None:
  """Raises RequestError where a task cannot be done of a run.

  Args:
    name: the task's.
    options: eval.py's flags by name.
    config: the run's.
    workdir: the run's folder.
  """
  row = task(name)
  reason = row.unfit(config)
  require(not reason, f'{reason}: leave {name} out of --tasks')
  row.check(options)
  if row.picture:
    require(importlib.util.find_spec('matplotlib') is not None, 'the picture '
            "needs matplotlib: pip install -e '.[plot]'")
    storage.try_file(workdir / row.picture, '--workdir')
