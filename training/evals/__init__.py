"""The tasks that eval.py can do with a checkpoint: an object each, in TASKS.

To add the task NAME, write a file in tasks/ with a subclass of `Task`, and an
object of it in a table TASKS. eval.py and the sweeps take the names of the
tasks and their flags from this table.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

# The file of a run's folder that says what each item scored in the last
# evaluation of its training (items.py).
ITEMS = 'items.json'


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A run's checkpoint and what was asked about it.

  Attributes:
    run: the run's config, model and mesh; its params are `params`.
    params: the parameters that are evaluated.
    step: the checkpoint's step.
    tokenizer: the tokenizer of the run.
    options: eval.py's flags by name; those that are missing have their default.
    workdir: the run's folder; pictures go there.
    programs: compiled programs, by what they compute; see `program`.
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
    index, count = devices.batch_shard(self.run.place, config.data.batch_size)
    return pipeline.held_out(config, tokenizer=self.tokenizer,
                             process_index=index, process_count=count)

  def program(self, function: Callable, *of):
    """Returns jax.jit of a function, or the program of an earlier run of this
    process that differs in nothing that an evaluation reads: so that the seeds
    of a sweep's point compile once.

    Args:
      function: a function of arrays.
      of: which of the run's functions it is: hashable.
    """
    read = []
    for name, value in run_config.flatten(self.run.config).items():
      if name not in runs.TYPE_OF_TRACED_FIELD:
        read.append((name, value))
    key = (*of, self.run.model, *read)
    return self.programs.setdefault(key, jax.jit(function))

  def results(self, step: Callable, loader: pipeline.Loader, doing: str
              ) -> Iterator[Any]:
    """Yields step(params, batch) of each batch of a loader, on the host;
    `doing` is for who watches."""
    for batch in progress.show_items(loader.iterate(), doing,
                                     loader.num_batches):
      yield jax.device_get(step(self.params, self.run.put(batch)))


class Flag(NamedTuple):
  """A flag of eval.py.

  Attributes:
    name: its name, without the dashes.
    default: a bool, int, float or string, which is also the flag's type.
    help: a sentence for --help.
    least, most: the bounds of a number; None: no bound.
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
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    bounds = {}
    if self.least is not None:
      bounds = dict(lower_bound=self.least, upper_bound=self.most)
    kinds[type(self.default)](self.name, default, text, **bounds)


class Task:
  """Something that can be measured of a checkpoint.

  A subclass has `help` and `run`, and of all else what differs from here.

  Attributes:
    help: what it reports, for --help.
    file: the file that it writes into the run's folder; '': none.
    flags: the flags that it reads.
    figures: the names of its numbers, as patterns of fnmatch; None: they are
      not known before it is done.
    argument: the flag, a text, that NAME:TEXT sets where a task is named; '':
      the task is named without one.
    held_out: whether it reads what is held out, which --text replaces.
    beside: where the task's own figures may be called PART/FIGURE, the groups
      of figures that are not its own; None: no group's are.
    lacks: what an objective for which `allows` is False does not do, or does
      not have.
  """
  help: str = ''
  file: str = ''
  flags: tuple[Flag, ...] = ()
  figures: tuple[str, ...] | None = None
  argument: str = ''
  held_out: bool = True
  beside: tuple[str, ...] | None = None
  lacks: str = ''

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Returns figures: a dict of numbers, lists and strings, which go into
    --json after they have been printed for a reader. `items` among them holds
    the records of items.py."""
    raise NotImplementedError

  def allows(self, objective: objectives.Objective) -> bool:
    """Returns whether the objective of a run has what the task needs."""
    return True

  def unfit(self, config: Config) -> str:
    """Returns why such a run has nothing to measure; '': it has."""
    if self.allows(objectives.of(config)):
      return ''
    return f'objective {config.objective!r} {self.lacks}'

  def check(self, options: Any, config: Any) -> None:
    """Checks that the options can be honoured.

    Args:
      options: the flags of the task, by name.
      config: the config of the run; None where no flag of the task is set.

    Raises:
      RequestError: where they cannot, or this machine lacks something.
    """

  def shown(self, evaluation: Evaluation) -> Any:
    """Returns the texts that the options give the model, as it reads them; it
    is called before any task is done.

    Raises:
      RequestError: for a text that the model cannot take.
    """


TASKS: Mapping[str, Task] = lazy.LazyTable(
    tasks.__name__, tasks.__path__, lambda file: file.TASKS)


def task(name: str, where: str = '--tasks') -> Task:
  """Returns the task of a name, which may be NAME:ARGUMENT.

  Args:
    name: the name that was asked for.
    where: the flag or field that it was asked for in.

  Raises:
    RequestError: where there is no such task, or it takes no argument.
  """
  base, colon, argument = name.partition(':')
  one_of(where, base, TASKS)
  row = TASKS[base]
  if colon and not row.argument:
    raise RequestError(f'{where} has {name!r}: write {base}')
  if colon and not argument:
    raise RequestError(f'{where} has {name!r}: write {base}:NAME')
  return row


def run(name: str, evaluation: Evaluation) -> dict[str, Any]:
  """Returns the figures of the task `name`."""
  return task(name).run(_ready(name, evaluation))


def _ready(name: str, evaluation: Evaluation) -> Evaluation:
  """Returns the evaluation with the options of the task `name`, and the texts
  that they give the model."""
  ready = dataclasses.replace(
      evaluation, options=_options(name, evaluation.options))
  return dataclasses.replace(ready, shown=task(name).shown(ready))


def _options(name: str, values: Any) -> types.SimpleNamespace:
  """Returns the flags that a task reads, with the argument of its name."""
  row = task(name)
  options = {}
  for flag in row.flags:
    options[flag.name] = getattr(values, flag.name, flag.default)
  if ':' in name:
    options[row.argument] = name.partition(':')[2]
  return types.SimpleNamespace(**options)


def readers(flag: str) -> dict[str, Flag]:
  """Returns what a flag is to each task that reads it."""
  read_by = {}
  for name, row in TASKS.items():
    for one in row.flags:
      if one.name == flag:
        read_by[name] = one
  return read_by


def define_flags() -> None:
  """Defines the flags of all tasks; one that several read is defined once."""
  for name in _flags_of(TASKS):
    read_by = readers(name)

    # Tasks to which the flag means the same share a sentence.
    texts: dict[str, list[str]] = {}
    for reader, flag in read_by.items():
      texts.setdefault(flag.help, []).append(reader)
    sentences = []
    for text, names in texts.items():
      sentences.append(f'{", ".join(names)}: {text}')

    first = next(iter(read_by.values()))
    first.define(first.default, ' '.join(sentences))


def described() -> str:
  """Returns what each task reports, in a sentence for --help."""
  return '; '.join(f'{name}: {row.help}' for name, row in TASKS.items())


def _flags_of(names: Iterable[str]) -> dict[str, Flag]:
  """Returns the flags that some tasks read, by name."""
  read = {}
  for name in names:
    for flag in task(name).flags:
      read[flag.name] = flag
  return read


def asked_for(names: Sequence[str], values: flags.FlagValues, text: str = ''
              ) -> list[str]:
  """Returns the tasks of --tasks, and those that another flag asks for: one
  that no task of --tasks reads.

  Args:
    names: the tasks of --tasks.
    values: the flags by name.
    text: the value of --text.

  Raises:
    RequestError: for a name that is no task's, for no task at all, and for a
      flag, or a --text, that nothing reads.
  """
  # Flags that no task of --tasks reads ask for their tasks.
  read = _flags_of(names)
  asked = list(dict.fromkeys(names))
  for name, row in TASKS.items():
    for flag in row.flags:
      asks = flag.asks and flag.name not in read and values[flag.name].present
      if asks and name not in asked:
        asked.append(name)

  # All that was asked for is read.
  if not asked:
    raise RequestError("--tasks is '', so nothing is evaluated: choose from "
                       f'{", ".join(TASKS)}')
  _check_read(asked, values)
  if text and not any(task(name).held_out for name in asked):
    raise RequestError(
        f'--text is {short(text)}, which {", ".join(asked)} would not read: '
        'leave it out, or add a task that does to --tasks')
  return asked


def _check_read(names: Sequence[str], values: flags.FlagValues) -> None:
  """Raises RequestError for a flag that is set and that no task reads."""
  read = _flags_of(names)
  every = _flags_of(TASKS)
  for name, flag in every.items():
    if not values[name].present:
      continue
    if name not in read:
      raise RequestError(f'--{name} is read by {", ".join(readers(name))} '
                         'alone: add it to --tasks')
    # Some flags mean something only beside another one.
    if not flag.needs:
      continue
    needed = values[flag.needs].value
    if needed == every[flag.needs].default:
      raise RequestError(f'--{name} is read beside --{flag.needs} alone, which '
                         f'is {needed!r}')


def check_task(name: str, options: Any, config: Config,
               where: str = '--tasks') -> None:
  """Raises RequestError where a task cannot be done of a run.

  Args:
    name: the name of the task.
    options: eval.py's flags by name; None: none can be set.
    config: the config of the run.
    where: the flag or field that the task was asked for in.
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
    name: the name of the task.
    where: the field that the task was asked for in, where no flag can be set.
  """
  row = task(name, where)
  try:
    row.check(_options(name, None), None)
  except RequestError as error:
    raise RequestError(f'{where} has {name!r}, which cannot be done there: '
                       f'{error}') from error
  return row


def load(workdir: epath.Path, names: Sequence[str], options: Any, *,
         step: int | str | checkpoints.MeanOfSteps | None, text: str = '',
         programs: dict | None = None, live: bool = False, passes: int = 0
         ) -> Evaluation:
  """Returns a run's checkpoint as tasks are given it, when it has been checked
  that they can be done; arguments and errors are those of `evaluate`."""
  # The config of the run, with what was asked for.
  config = runs.fit_mesh_to_this_machine(runs.load_run_config(workdir))
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
      storage.check_file_is_writable(workdir / file, '--workdir')

  # A task that reads no data is done where they are not there.
  tokenizer = runs.load_run_tokenizer(workdir, config)
  if not text:
    with contextlib.suppress(RequestError, OSError):
      changes = provenance.check_data(
          run_config.load_starts(workdir),
          pipeline.of_sources(config, tokenizer),
          allowed=True)
      for line in changes:
        print(f'warning: {line}', file=sys.stderr)

  # The model and its parameters.
  model, _ = runs.resolve_model(config, tokenizer)
  built = runs.build(config, model)
  restored = parameters.read_parameters_of_run(built, workdir=workdir,
                                               step=step, live=live)
  if programs is None:
    programs = {}
  return Evaluation(
      run=built, params=restored.state, step=restored.step,
      tokenizer=tokenizer, options=options, workdir=workdir, programs=programs,
      what=restored.what)


def evaluate(workdir: epath.Path, names: Sequence[str], options: Any,
             **how: Any) -> dict[str, Any]:
  """Returns the figures of each task, and prints them for a reader.

  Args:
    workdir: the run's folder.
    names: the tasks, as TASKS has them.
    options: values of the flags of define_flags.
    **how: the keywords of `load`.
      step: which checkpoint; 'best'; several, for their mean; None: the newest.
      text: what to evaluate on, as data.source; '': what the run holds out.
      programs: what earlier evaluations of this process compiled; it is added
        to.
      live: with optim.ema, evaluate the parameters and not their average.
      passes: the passes of layers that loop; 0: as many as in training.

  Raises:
    RequestError: where a task cannot be done of this run.
  """
  evaluation = load(workdir, names=names, options=options, **how)
  figures: dict[str, Any] = {'step': evaluation.step}
  if evaluation.what:
    figures['parameters'] = evaluation.what
  # Layers that loop may be evaluated with more passes than in training.
  if passes := how.get('passes', 0):
    trained = runs.load_run_config(workdir).model.loops.passes
    figures['passes'] = dict(evaluated=passes, trained=trained)
    print(f'evaluated with {passes} passes of the layers that loop, trained '
          f'with {trained}')
  # All tasks are prepared before the first one takes its time.
  with evaluation.run.context():
    ready = {name: _ready(name, evaluation) for name in names}
    for name in names:
      figures[name] = task(name).run(ready[name])
  return figures


def write(file: epath.Path | None, figures: dict[str, Any]) -> None:
  """Writes what `evaluate` returned, in one piece, if there is a file; what is
  not finite is null."""
  storage.write_json(file, metrics.as_json_value(figures))


def listed(names: str | Sequence[str]) -> list[str]:
  """Returns the tasks that a comma-separated text, or its parts, names.

  After NAME:ARGUMENT, what is no name of a task is a further argument:
  lm_eval:A,B is lm_eval:A and lm_eval:B, and lm_eval:A,loss ends with our
  loss, even if lm_eval has a task of that name.
  """
  if isinstance(names, str):
    names = names.split(',')
  named: list[str] = []
  for part in names:
    part = part.strip()
    if not part:
      continue
    known = part.partition(':')[0] in TASKS
    # This belongs to the task before it, if that takes arguments.
    if named and not known:
      last, colon, _ = named[-1].partition(':')
      if colon:
        part = f'{last}:{part}'
    named.append(part)
  return named


def check_in_training(config: Config) -> None:
  """Raises RequestError for what eval.tasks and eval.best ask of a run and
  cannot get. An eval.best of a task whose figures are known only when it is
  done is tried before the first step."""
  # The tasks.
  names = listed(config.eval.tasks)
  every = config.eval.tasks_every_steps
  if every and not names:
    raise RequestError(
        f'eval.tasks_every_steps is {every}, but eval.tasks names nothing to '
        'evaluate: set it, or leave eval.tasks_every_steps at 0')
  require(len({*names}) == len(names), f'eval.tasks is {config.eval.tasks!r}: '
          'name each task once')
  for name in names:
    check_task(name, options=None, config=config, where='eval.tasks')

  # The figure that the best checkpoint is chosen by.
  name, is_task, figure = config.eval.best.partition('/')
  if not is_task:
    return
  # Some tasks know their figures only once they are done.
  known = task(name, 'eval.best').figures
  if known is None:
    return
  for pattern in known:
    if fnmatch.fnmatchcase(figure, pattern):
      return
  raise RequestError(
      f'eval.best is {config.eval.best!r}, but the figures of task {name} are '
      f'{", ".join(known) or "none"}')
