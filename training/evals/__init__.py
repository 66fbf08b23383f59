"""What eval.py can measure of a checkpoint: one record a task, in TASKS.

To add the task NAME, write a file in tasks/ with its record in a table TASKS;
task.py says what a record holds. eval.py and the sweeps take the names of the
tasks and their flags from this table.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import fnmatch
import types
from typing import Any

from absl import flags
from etils import epath
import ml_collections

from configs import lazy
from configs.errors import RequestError, one_of, require, short
from training.evals import tasks
from training.evals.task import Evaluation, Task
from training.workdir import storage

flags.disclaim_key_flags()  # what is defined here belongs to who calls

TASKS: Mapping[str, Task] = lazy.Lazy(
    tasks.__name__, tasks.__path__, lambda file: file.TASKS)


def task(name: str, where: str = '--tasks') -> Task:
  """Returns the task of a name, which may be NAME:ARGUMENT.

  Args:
    name: what was asked for.
    where: what it was asked for in.

  Raises:
    RequestError: where there is no such task, or it takes no argument.
  """
  own, colon, argument = name.partition(':')
  one_of(where, own, TASKS)
  row = TASKS[own]
  takes = f'{own}:NAME' if row.argument else own
  require(not colon or bool(row.argument and argument),
          f'{where} has {name!r}: write {takes}')
  return row


def run(name: str, evaluation: Evaluation) -> dict[str, Any]:
  """Returns the figures of the task `name`."""
  row = task(name)
  return row.run(dataclasses.replace(
      evaluation, options=_options(row, name, evaluation.options)))


def _options(row: Task, name: str, values: Any) -> types.SimpleNamespace:
  """Returns the flags that a task reads, with the argument of its name."""
  options = types.SimpleNamespace(
      **{flag.name: getattr(values, flag.name) for flag in row.flags})
  if ':' in name:
    setattr(options, row.argument, name.partition(':')[2])
  return options


def define_flags() -> None:
  """Defines the flags of all tasks; one that several read is defined once."""
  define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer,
            float: flags.DEFINE_float, str: flags.DEFINE_string}
  for name in {flag.name: None for row in TASKS.values() for flag in row.flags}:
    read_by = {own: flag for own, row in TASKS.items() for flag in row.flags
               if flag.name == name}
    flag = next(iter(read_by.values()))
    bounds = {} if flag.least is None else dict(
        lower_bound=flag.least, upper_bound=flag.most)
    texts = {other.help: ', '.join(own for own, one in read_by.items()
                                   if one.help == other.help)
             for other in read_by.values()}
    define[type(flag.default)](name, flag.default, ' '.join(
        f'{names}: {text}' for text, names in texts.items()), **bounds)


def defaults() -> types.SimpleNamespace:
  """Returns the options of a request that sets no flag of a task."""
  return types.SimpleNamespace(**{
      flag.name: flag.default for row in TASKS.values() for flag in row.flags})


def described() -> str:
  """Returns what each task reports, in a sentence for --help."""
  return '; '.join(f'{name}: {row.help}' for name, row in TASKS.items())


def asked_for(names: Sequence[str], values: flags.FlagValues
              ) -> dict[str, str]:
  """Returns the tasks of --tasks, and those that another flag asks for: one
  that no task of --tasks reads; each with the flag that asked for it.

  Raises:
    RequestError: for a name that is no task's, for no task at all, and for a
      flag of a task that is not done.
  """
  read = {flag.name for name in names for flag in task(name).flags}
  asked = dict.fromkeys(names, 'tasks')
  for name, row in TASKS.items():
    for flag in row.flags:
      if flag.asks and flag.name not in read and values[flag.name].present:
        asked.setdefault(name, flag.name)
  require(bool(asked), "--tasks is '', so nothing is evaluated: choose from "
          f'{", ".join(TASKS)}')
  read = {flag.name for name in asked for flag in task(name).flags}
  for row in TASKS.values():
    for flag in row.flags:
      readers = [name for name, other in TASKS.items()
                 if flag.name in (one.name for one in other.flags)]
      require(flag.name in read or not values[flag.name].present,
              f'--{flag.name} is read by {", ".join(readers)} alone: add it to '
              '--tasks')
  for name in asked:
    argument = ':' in name and task(name).argument
    require(not argument or not values[argument].present, f'--{argument} is '
            f'beside --tasks={name}, which says the same: leave one of them '
            'out')
  return asked


def check_text(text: str, names: Collection[str]) -> None:
  """Raises RequestError for a --text that none of the tasks reads."""
  readers = [name for name, row in TASKS.items() if row.held_out]
  require(not text or any(task(name).held_out for name in names), '--text is '
          f'{short(text)}, which {", ".join(names)} would not read: leave it '
          f'out, or add a task that does to --tasks, of {", ".join(readers)}')


def check_task(name: str, options: Any, config: ml_collections.ConfigDict,
               workdir: epath.Path, asked_by: str = 'tasks') -> None:
  """Raises RequestError where a task cannot be done of a run.

  Args:
    name: the task's.
    options: eval.py's flags by name.
    config: the run's.
    workdir: the run's folder.
    asked_by: the flag that asked for it.
  """
  row = task(name)
  reason = row.unfit(config)
  require(not reason, f'{reason}: leave {name} out of --tasks'
          if asked_by == 'tasks' else f'--{asked_by} asks for the task {name}, '
          f'and {reason}: leave --{asked_by} out, or add another task that '
          'reads it to --tasks')
  own = _options(row, name, options)
  row.check(own)
  row.fits(config, own)
  if row.file:
    storage.try_file(workdir / row.file, '--workdir')


def listed(names: str | Sequence[str]) -> list[str]:
  """Returns the tasks that a comma-separated text, or its parts, names.

  After NAME:ARGUMENT, what is no name of a task is a further argument:
  lm_eval:A,B is lm_eval:A and lm_eval:B, and lm_eval:A,loss ends with our
  loss, even if lm_eval has a task of that name.
  """
  parts = names.split(',') if isinstance(names, str) else names
  found: list[str] = []
  for part in filter(None, map(str.strip, parts)):
    own, colon, _ = found[-1].partition(':') if found else ('', '', '')
    known = part.partition(':')[0] in TASKS
    found.append(part if known or not colon else f'{own}:{part}')
  return found


def check_without_flags(name: str, where: str) -> Task:
  """Returns the task `name`; RequestError where it cannot do without a flag.

  Args:
    name: the task's.
    where: what it was asked for in, where no flag can be set.
  """
  row = task(name, where)
  try:
    row.check(_options(row, name, defaults()))
  except RequestError as error:
    raise RequestError(f'{where} has {name!r}, which cannot be done there: '
                       f'{error}') from error
  return row


def check_in_training(config: ml_collections.ConfigDict) -> None:
  """Raises RequestError for what eval.tasks and eval.best ask of a run and
  cannot get. An eval.best of a task whose figures are known only when it is
  done is tried before the first step."""
  names = listed(config.eval.tasks)
  every = config.eval.tasks_every_steps
  require(bool(names) or not every, f'eval.tasks_every_steps is {every}, but '
          'eval.tasks names nothing to evaluate: set it, or leave '
          'eval.tasks_every_steps at 0')
  twice = {name for name in names if names.count(name) > 1}
  require(not twice, f'eval.tasks names {", ".join(sorted(twice))} twice')
  for name in names:
    reason = check_without_flags(name, 'eval.tasks').unfit(config)
    require(not reason, f'{reason}: leave {name} out of eval.tasks')
  name, is_task, figure = config.eval.best.partition('/')
  known = task(name, 'eval.best').figures(config) if is_task else None
  require(known is None or any(fnmatch.fnmatchcase(figure, pattern)
                               for pattern in known),
          f'eval.best is {config.eval.best!r}, but the figures of task {name} '
          f'are {", ".join(known or ()) or "none"}')
