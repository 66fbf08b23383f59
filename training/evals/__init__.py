"""What eval.py can measure of a checkpoint: one record a task, in TASKS.

To add the task NAME, write a file in tasks/ with its record in a table TASKS;
`Task` says what a record holds. eval.py and the sweeps take the names of the
tasks and their flags from this table.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import fnmatch
import sys
import types
from typing import Any, NamedTuple

from absl import flags
from etils import epath
import jax

from common import lazy
from common.errors import RequestError, one_of, require, short
from training import objectives, parameters, progress, runs
from training.distributed import devices
from training.evals import tasks
from training.objectives import Config
from training.objectives import pipeline
from training.workdir import checkpoints, metrics, provenance, run_config
from training.workdir import storage

flags.disclaim_key_flags()  # what is defined here belongs to who calls

# Fields that no evaluation reads: `model` stands resolved beside them.
UNREAD = ('seed', 'init_', 'model.', 'optim.', 'checkpoint.', 'log.')
# Of a run's folder: what each item scored when it was evaluated last as it
# trained (items.py).
ITEMS = 'items.json'


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A run's checkpoint and what was asked about it.

  Attributes:
    run: the run's config, model and mesh; its params are `params`.
    step: the checkpoint's step.
    tokenizer: the run's.
    options: eval.py's flags by name; those that are missing have their default.
    workdir: the run's folder; pictures go there.
    programs: what was compiled, by what it is of; see `program`.
    what: which parameters these are, where the checkpoint has several, or
      where they are of several checkpoints; else ''.
    shown: what the task's own `shown` returned.
  """
  run: Any
  params: Any
  step: int
  tokenizer: Any
  options: Any
  workdir: epath.Path
  programs: dict
  what: str = ''
  shown: Any = None

  def held_out(self) -> list[pipeline.Loader]:
    """Returns the loaders of what is held out; see pipeline.held_out."""
    config = self.run.config
    return pipeline.held_out(
        config, self.tokenizer,
        *devices.batch_shard(self.run.place, config.data.batch_size))

  def program(self, function: Callable, *of):
    """Returns jax.jit of a function, or the same of an earlier run of this
    process that differs in nothing that an evaluation reads: so that the seeds
    of a sweep's point compile once.

    Args:
      function: of arrays.
      of: which of the run's functions it is: hashable.
    """
    flat = run_config.flatten(self.run.config)
    key = (*of, self.run.model, *(
        (name, value) for name, value in flat.items()
        if not name.startswith(UNREAD)))
    return self.programs.setdefault(key, jax.jit(function))

  def results(self, step: Callable, loader: pipeline.Loader, doing: str
              ) -> Iterator[Any]:
    """Yields step(params, batch) of each batch of a loader, on the host;
    `doing` is for who watches."""
    for batch in progress.each(loader.iterate(), doing, loader.num_batches):
      yield jax.device_get(step(self.params, self.run.put(batch)))


class Flag(NamedTuple):
  """A flag of eval.py.

  Attributes:
    name: without the dashes.
    default: a bool, int, float or string, which is also the flag's type.
    help: a sentence for --help.
    least, most: of a number; None: no bound.
    asks: whether to set the flag asks for its task, too, unless a task that
      was named reads it.
    needs: a flag of the same task, without which it is not read; '': none.
  """
  name: str
  default: bool | int | float | str
  help: str
  least: float | None = None
  most: float | None = None
  asks: bool = False
  needs: str = ''

  def define(self, default: Any, text: str) -> None:
    """Defines the flag with a default, and a sentence for --help."""
    kinds: dict[type, Callable] = {
        bool: flags.DEFINE_bool, int: flags.DEFINE_integer,
        float: flags.DEFINE_float, str: flags.DEFINE_string}
    kinds[type(self.default)](self.name, default, text, **(
        {} if self.least is None else
        dict(lower_bound=self.least, upper_bound=self.most)))


class Task(NamedTuple):
  """Something that can be measured of a checkpoint.

  Attributes:
    help: what it reports, for --help.
    run: returns figures: a dict of numbers, lists and strings, which go into
      --json after they have been printed for a reader; `items` is that of
      items.py.
    unfit: config -> why such a run has nothing to measure; '': it has.
    check: (options, config) -> None; raises RequestError for options that
      cannot be honoured, and where this machine lacks something. The config is
      None where no flag of the task is set.
    shown: lays out the texts that the options give the model; raises
      RequestError for one that it cannot take. Called before any task is done.
    file: that it writes into the run's folder; '': none.
    flags: those that it reads.
    figures: the names of its numbers, as patterns of fnmatch; None: they are
      not known before it is done.
    argument: the flag, a text, that NAME:TEXT sets where a task is named; '':
      the task is named without one.
    held_out: whether it reads what is held out, which --text replaces.
    beside: of a task whose own figures may be called PART/FIGURE, the groups of
      figures that are not its own; None: no group's are.
  """
  help: str
  run: Callable[[Evaluation], dict[str, Any]]
  unfit: Callable[[Config], str] = lambda config: ''
  check: Callable[[Any, Any], None] = lambda options, config: None
  shown: Callable[[Evaluation], Any] = lambda evaluation: None
  file: str = ''
  flags: tuple[Flag, ...] = ()
  figures: tuple[str, ...] | None = None
  argument: str = ''
  held_out: bool = True
  beside: tuple[str, ...] | None = None


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
  base, colon, argument = name.partition(':')
  one_of(where, base, TASKS)
  row = TASKS[base]
  takes = f'{base}:NAME' if row.argument else base
  require(not colon or bool(row.argument and argument),
          f'{where} has {name!r}: write {takes}')
  return row


def run(name: str, evaluation: Evaluation) -> dict[str, Any]:
  """Returns the figures of the task `name`."""
  return task(name).run(_ready(name, evaluation))


def _ready(name: str, evaluation: Evaluation) -> Evaluation:
  """Returns what the task `name` is given."""
  ready = dataclasses.replace(
      evaluation, options=_options(name, evaluation.options))
  return dataclasses.replace(ready, shown=task(name).shown(ready))


def _options(name: str, values: Any) -> types.SimpleNamespace:
  """Returns the flags that a task reads, with the argument of its name."""
  row = task(name)
  options = {flag.name: getattr(values, flag.name, flag.default)
             for flag in row.flags}
  if ':' in name:
    options[row.argument] = name.partition(':')[2]
  return types.SimpleNamespace(**options)


def readers(flag: str) -> dict[str, Flag]:
  """Returns what a flag is to each task that reads it."""
  return {name: one for name, row in TASKS.items() for one in row.flags
          if one.name == flag}


def define_flags() -> None:
  """Defines the flags of all tasks; one that several read is defined once."""
  for name in dict.fromkeys(
      flag.name for row in TASKS.values() for flag in row.flags):
    read_by = readers(name)
    texts: dict[str, list[str]] = {}
    flag = next(iter(read_by.values()))
    for reader, one in read_by.items():
      texts.setdefault(one.help, []).append(reader)
    flag.define(flag.default, ' '.join(
        f'{", ".join(names)}: {text}' for text, names in texts.items()))


def described() -> str:
  """Returns what each task reports, in a sentence for --help."""
  return '; '.join(f'{name}: {row.help}' for name, row in TASKS.items())


def asked_for(names: Sequence[str], values: flags.FlagValues, text: str = ''
              ) -> list[str]:
  """Returns the tasks of --tasks, and those that another flag asks for: one
  that no task of --tasks reads.

  Args:
    names: of --tasks.
    values: the flags by name.
    text: --text.

  Raises:
    RequestError: for a name that is no task's, for no task at all, and for a
      flag, or a --text, that nothing reads.
  """
  read = {flag.name for name in names for flag in task(name).flags}
  names = list(dict.fromkeys([*names, *(
      name for name, row in TASKS.items() for flag in row.flags
      if flag.asks and flag.name not in read and values[flag.name].present)]))
  require(bool(names), "--tasks is '', so nothing is evaluated: choose from "
          f'{", ".join(TASKS)}')
  read = {flag.name for name in names for flag in task(name).flags}
  every = {flag.name: flag for row in TASKS.values() for flag in row.flags}
  for name, flag in every.items():
    require(name in read or not values[name].present, f'--{name} is read by '
            f'{", ".join(readers(name))} alone: add it to --tasks')
    require(not (flag.needs and values[name].present)
            or values[flag.needs].value != every[flag.needs].default,
            f'--{name} is read beside --{flag.needs} alone, which is '
            f'{flag.needs and values[flag.needs].value!r}')
  require(not text or any(task(name).held_out for name in names), '--text is '
          f'{short(text)}, which {", ".join(names)} would not read: leave it '
          'out, or add a task that does to --tasks')
  return names


def check_task(name: str, options: Any, config: Config,
               where: str = '--tasks') -> None:
  """Raises RequestError where a task cannot be done of a run.

  Args:
    name: the task's.
    options: eval.py's flags by name; None: none can be set.
    config: the run's.
    where: what it was asked for in.
  """
  row = task(name, where)
  reason = row.unfit(config)
  require(not reason, f'{reason}: leave {name} out of {where}, and any flag '
          'that asks for it')
  if options is None:
    check_without_flags(name, where)
  else:
    row.check(_options(name, options), config)


def check_without_flags(name: str, where: str) -> Task:
  """Returns the task `name`; RequestError where it cannot do without a flag.

  Args:
    name: the task's.
    where: what it was asked for in, where no flag can be set.
  """
  row = task(name, where)
  try:
    row.check(_options(name, None), None)
  except RequestError as error:
    raise RequestError(f'{where} has {name!r}, which cannot be done there: '
                       f'{error}') from error
  return row


def load(workdir: epath.Path, names: Sequence[str], options: Any, *,
         step: int | str | checkpoints.Mean | None, text: str = '',
         programs: dict | None = None, live: bool = False, passes: int = 0
         ) -> Evaluation:
  """Returns a run's checkpoint as tasks are given it, when it has been checked
  that they can be done; arguments and errors are those of `evaluate`."""
  config = runs.for_this_machine(runs.config_of(workdir))
  if passes:
    require(config.model.loop != 'none', f'--passes is {passes}, and '
            f"{workdir} has model.loop 'none': its layers are run once; leave "
            'the flag out')
    config.model.loops.update(passes=passes, gradient_passes=0)
  if text:
    config.data.eval_source = text
    config.eval.part = ''  # all of it
  for name in names:
    check_task(name, options, config)
    if file := task(name).file:
      storage.try_file(workdir / file, '--workdir')
  tokenizer = runs.tokenizer_of(workdir, config)
  if not text:
    # A task that reads no data is done where they are not there.
    with contextlib.suppress(RequestError, OSError):
      for line in provenance.check_data(
          run_config.starts(workdir), pipeline.of_sources(config, tokenizer),
          allowed=True):
        print(f'warning: {line}', file=sys.stderr)
  model, _ = runs.resolve(config, tokenizer)
  built = runs.build(config, model)
  restored = parameters.of_run(built, workdir, step, live)
  return Evaluation(built, restored.state, restored.step, tokenizer, options,
                    workdir, {} if programs is None else programs,
                    restored.what)


def evaluate(workdir: epath.Path, names: Sequence[str], options: Any,
             **how: Any) -> dict[str, Any]:
  """Returns the figures of each task, and prints them for a reader.

  Args:
    workdir: the run's folder.
    names: the tasks, as TASKS has them.
    options: values of the flags of define_flags.
    **how: of `load`.
      step: which checkpoint; 'best'; several, for their mean; None: the newest.
      text: what to evaluate on, as data.source; '': what the run holds out.
      programs: what earlier evaluations of this process compiled; it is added
        to.
      live: with optim.ema, evaluate the parameters and not their average.
      passes: of layers that loop; 0: as many as in training.

  Raises:
    RequestError: where a task cannot be done of this run.
  """
  evaluation = load(workdir, names, options, **how)
  figures: dict[str, Any] = {'step': evaluation.step}
  if evaluation.what:
    figures['parameters'] = evaluation.what
  if passes := how.get('passes', 0):
    trained = runs.config_of(workdir).model.loops.passes
    figures['passes'] = dict(evaluated=passes, trained=trained)
    print(f'evaluated with {passes} passes of the layers that loop, trained '
          f'with {trained}')
  with evaluation.run.context():
    ready = {name: _ready(name, evaluation) for name in names}
    for name in names:
      figures[name] = task(name).run(ready[name])
  return figures


def write(file: epath.Path | None, figures: dict[str, Any]) -> None:
  """Writes what `evaluate` returned, in one piece, if there is a file; what is
  not finite is null."""
  storage.write_json(file, metrics.plain(figures))


def listed(names: str | Sequence[str]) -> list[str]:
  """Returns the tasks that a comma-separated text, or its parts, names.

  After NAME:ARGUMENT, what is no name of a task is a further argument:
  lm_eval:A,B is lm_eval:A and lm_eval:B, and lm_eval:A,loss ends with our
  loss, even if lm_eval has a task of that name.
  """
  parts = names.split(',') if isinstance(names, str) else names
  tasks_: list[str] = []
  for part in filter(None, map(str.strip, parts)):
    last, colon, _ = tasks_[-1].partition(':') if tasks_ else ('', '', '')
    known = part.partition(':')[0] in TASKS
    tasks_.append(part if known or not colon else f'{last}:{part}')
  return tasks_


def check_in_training(config: Config) -> None:
  """Raises RequestError for what eval.tasks and eval.best ask of a run and
  cannot get. An eval.best of a task whose figures are known only when it is
  done is tried before the first step."""
  names = listed(config.eval.tasks)
  every = config.eval.tasks_every_steps
  require(bool(names) or not every, f'eval.tasks_every_steps is {every}, but '
          'eval.tasks names nothing to evaluate: set it, or leave '
          'eval.tasks_every_steps at 0')
  require(len({*names}) == len(names), f'eval.tasks is {config.eval.tasks!r}: '
          'name each task once')
  for name in names:
    check_task(name, None, config, 'eval.tasks')
  name, is_task, figure = config.eval.best.partition('/')
  known = task(name, 'eval.best').figures if is_task else None
  require(known is None or any(fnmatch.fnmatchcase(figure, pattern)
                               for pattern in known),
          f'eval.best is {config.eval.best!r}, but the figures of task {name} '
          f'are {", ".join(known or ()) or "none"}')


def without(has: Callable[[Any], Any], words: str) -> Callable[[Config], str]:
  """Returns an `unfit` for tasks that not every objective allows.

  Args:
    has: whether the record of a run's objective has what the task needs.
    words: what an objective without it does not do, or does not have.
  """
  def unfit(config: Config) -> str:
    return '' if has(objectives.of(config)) else (
        f'objective {config.objective!r} {words}')
  return unfit
