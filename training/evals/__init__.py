"""The tasks that eval.py can do with a checkpoint: an object each, in TASKS.

To add the task NAME, write a file in tasks/ with a subclass of `Task`, and an
object of it in a table TASKS. eval.py and the sweeps take the names of the
tasks and their flags from this table.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import fnmatch
import sys
import types
from typing import Any, NamedTuple

from absl import flags
from etils import epath
import jax

from common.errors import RequestError, check_choice, require, shorten
from training import objectives, parameters, plugins, progress, runs
from training.distributed import devices
from training.evals import tasks
from training.objectives import Config
from training.objectives import pipeline
from training.workdir import checkpoints, metrics, provenance, run_config
from training.workdir import storage

flags.disclaim_key_flags()  # what is defined here belongs to who calls

# The file of a run's folder that says what each item scored in the last
# evaluation of its training (items.py).
ITEMS_FILE = 'items.json'


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A run's checkpoint, and what was asked about it.

  Attributes:
    run: the run's config, model and mesh; its params are `params`.
    params: the parameters that are evaluated.
    step: the step of training that the parameters are of.
    tokenizer: the tokenizer of the run.
    options: the flags of eval.py by name; a flag that is missing has its
      default.
    workdir: the run's folder; pictures go there.
    programs: the compiled functions by their keys; `jit_once` reads and fills
      it.
    which_parameters: which of a checkpoint's several parameters these are, or
      of which checkpoints they are the mean; '': the checkpoint has no others.
    prepared: what `Task.prepare` returned for the task that is done.
  """
  run: Any
  params: Any
  step: int
  tokenizer: Any
  options: Any
  workdir: epath.Path
  programs: dict
  which_parameters: str = ''
  prepared: Any = None

  def held_out_loaders(self) -> list[pipeline.Loader]:
    """Returns the loaders of the held-out data, one for each source; in a run
    of several processes each one loads its part of the batches."""
    config = self.run.config
    index, count = devices.batch_slice_of_process(
        self.run.batch_sharding, config.data.batch_size)
    return pipeline.make_evaluation_loaders(config, tokenizer=self.tokenizer,
                                            process_index=index,
                                            process_count=count)

  def jit_once(self, function: Callable, *key: Hashable) -> Callable:
    """Returns jax.jit(function), or the function that an earlier run of this
    process has compiled if it computes the same.

    For instance, runs that differ only in their seed have the same evaluation,
    so it is compiled only for the first of them.

    Args:
      function: a function of arrays.
      *key: what distinguishes this function from others that are compiled for
        the run, such as the name of the task.
    """
    # Find the compiled function by `key`, the config of the model, and all
    # fields of the run's config that might change the computation. An
    # evaluation does not depend on those in TYPE_OF_TRACED_FIELD, such as the
    # learning rate.
    fields = []
    for name, value in run_config.flatten(self.run.config).items():
      if name not in runs.TYPE_OF_TRACED_FIELD:
        fields.append((name, value))
    whole_key = (*key, self.run.model, *fields)
    return self.programs.setdefault(whole_key, jax.jit(function))

  def run_on_batches(self, step: Callable, loader: pipeline.Loader,
                     task_name: str) -> Iterator[Any]:
    """Applies a function to each batch of a loader, and yields the results as
    numpy arrays. A progress bar shows how far it is.

    Args:
      step: a jitted function of the parameters and a batch.
      loader: the loader of the batches.
      task_name: the words for the progress bar.
    """
    for batch in progress.show_items(loader.iterate(), text=task_name,
                                     total=loader.num_batches):
      yield jax.device_get(step(self.params, self.run.put(batch)))


class Flag(NamedTuple):
  """A command-line flag of eval.py that some tasks read.

  Attributes:
    name: its name, without the dashes.
    default: a bool, int, float or string, which is also the flag's type.
    help: a sentence for --help.
    least, most: the bounds of a number; None: no bound.
    requests_task: whether setting the flag adds its task to --tasks, unless a
      task that was named there reads the flag.
    needed_flag: another flag of the same task, which has to be set for this one
      to have an effect; '': none.
  """
  name: str
  default: bool | int | float | str
  help: str
  least: float | None = None
  most: float | None = None
  requests_task: bool = False
  needed_flag: str = ''

  def define(self, default: Any, text: str) -> None:
    """Defines the flag in absl, with a default and a sentence for --help.

    Args:
      default: the value of the flag where it is not given.
      text: the sentence for --help.
    """
    # absl has a function for each type. Those for numbers take bounds.
    define_by_type: dict[type, Callable] = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    bounds = {}
    if self.least is not None:
      bounds = dict(lower_bound=self.least, upper_bound=self.most)
    define_flag = define_by_type[type(self.default)]
    define_flag(self.name, default, text, **bounds)


class Task:
  """Something that can be measured of a checkpoint.

  A subclass sets `help` and defines `run`, and overrides whatever else differs
  from the defaults here.

  Attributes:
    help: what the task reports, for --help.
    file: the file that it writes into the run's folder; '': none.
    flags: the flags that it reads.
    figure_names: the names of its numbers, as patterns of fnmatch; None: they
      are not known before the task is done.
    argument_flag: the flag that TEXT sets where the task is named NAME:TEXT;
      '': the name takes no argument.
    reads_held_out: whether it reads the held-out data, which --text replaces.
    other_groups: for a task with figures called PART/FIGURE, the groups that
      have such names and are no parts of it, such as its standard errors;
      None: it has no parts, so that every group is another one.
    why_not_allowed: what an objective for which `allows_objective` is False
      does not do or have, as the end of a sentence.
  """
  help: str = ''
  file: str = ''
  flags: tuple[Flag, ...] = ()
  figure_names: tuple[str, ...] | None = None
  argument_flag: str = ''
  reads_held_out: bool = True
  other_groups: tuple[str, ...] | None = None
  why_not_allowed: str = ''

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Measures the checkpoint, and prints the figures for a reader.

    Returns:
      The figures for --json: numbers, lists and strings by name. `items` among
      them holds the scores of single items, as items.py records them.
    """
    raise NotImplementedError

  def allows_objective(self, objective: objectives.Objective) -> bool:
    """Returns whether an objective of training gives the task what it needs."""
    return True

  def why_unfit(self, config: Config) -> str:
    """Returns why a run with this config has nothing to measure; '': it has."""
    if self.allows_objective(objectives.find_objective(config)):
      return ''
    return f'objective {config.objective!r} {self.why_not_allowed}'

  def check(self, options: Any, config: Any) -> None:
    """Checks that the task can do what its flags ask.

    Args:
      options: the values of the task's flags, by name.
      config: the config of the run; None: the run is not known yet, and no flag
        is set.

    Raises:
      RequestError: where the flags ask for something that cannot be done, or
        this machine lacks a package or file.
    """

  def prepare(self, evaluation: Evaluation) -> Any:
    """Returns the texts that the flags give the model, as the model reads
    them. All tasks are prepared before the first one is done.

    Raises:
      RequestError: for a text that the model cannot take.
    """


TASKS: Mapping[str, Task] = plugins.LazyTable(
    tasks.__name__, path=tasks.__path__, read=lambda file: file.TASKS)


def get_task(name: str, location: str = '--tasks') -> Task:
  """Returns the evaluation task with a given name.

  Args:
    name: the name that the user has written, NAME or NAME:ARGUMENT. The
      argument is read elsewhere (_options_of_task).
    location: the flag or config field that names the task, for the message.

  Raises:
    RequestError: where there is no such task, or it takes no argument.
  """
  base_name, colon, argument = name.partition(':')
  check_choice(location, value=base_name, choices=TASKS)
  task = TASKS[base_name]
  if colon and not task.argument_flag:
    raise RequestError(f'{location} has {name!r}: write {base_name}')
  if colon and not argument:
    raise RequestError(f'{location} has {name!r}: write {base_name}:NAME')
  return task


def run_task(name: str, evaluation: Evaluation) -> dict[str, Any]:
  """Does one task with a checkpoint, and returns its figures."""
  return get_task(name).run(_prepare_evaluation(name, evaluation))


def _prepare_evaluation(name: str, evaluation: Evaluation) -> Evaluation:
  """Returns the evaluation with the options that one task reads, and with the
  texts that these options give the model."""
  with_options = dataclasses.replace(
      evaluation, options=_options_of_task(name, evaluation.options))
  prepared = get_task(name).prepare(with_options)
  return dataclasses.replace(with_options, prepared=prepared)


def _options_of_task(name: str, values: Any) -> types.SimpleNamespace:
  """Collects the values of the flags that a task reads.

  Args:
    name: NAME or NAME:ARGUMENT of the task. The argument is the value of one of
      its flags.
    values: the flags of eval.py, as attributes. A missing one has its default,
      so None means that no flag is set.

  Returns:
    An object with an attribute for each flag of the task.
  """
  task = get_task(name)
  options = {}
  for flag in task.flags:
    options[flag.name] = getattr(values, flag.name, flag.default)
  if ':' in name:
    options[task.argument_flag] = name.partition(':')[2]
  return types.SimpleNamespace(**options)


def find_tasks_reading_flag(flag_name: str) -> dict[str, Flag]:
  """Returns {name of task: its flag} for each task that reads a flag; the
  tasks may give the flag different sentences for --help."""
  flag_by_task = {}
  for task_name, task in TASKS.items():
    for flag in task.flags:
      if flag.name == flag_name:
        flag_by_task[task_name] = flag
  return flag_by_task


def define_flags() -> None:
  """Defines the flags of all tasks; one that several read is defined once."""
  for flag_name in _flags_of_tasks(TASKS):
    flag_by_task = find_tasks_reading_flag(flag_name)

    # Tasks to which the flag means the same share a sentence.
    tasks_by_sentence: dict[str, list[str]] = {}
    for task_name, flag in flag_by_task.items():
      tasks_by_sentence.setdefault(flag.help, []).append(task_name)
    help_parts = []
    for sentence, task_names in tasks_by_sentence.items():
      help_parts.append(f'{", ".join(task_names)}: {sentence}')

    first_flag = next(iter(flag_by_task.values()))
    first_flag.define(first_flag.default, ' '.join(help_parts))


def describe_tasks() -> str:
  """Returns what each task reports, in a sentence for --help."""
  return '; '.join(f'{name}: {task.help}' for name, task in TASKS.items())


def _flags_of_tasks(task_names: Iterable[str]) -> dict[str, Flag]:
  """Returns the flags that some tasks read, by name."""
  flag_by_name = {}
  for task_name in task_names:
    for flag in get_task(task_name).flags:
      flag_by_name[flag.name] = flag
  return flag_by_name


def choose_tasks(names: Sequence[str], values: flags.FlagValues, text: str = ''
                 ) -> list[str]:
  """Chooses which evaluation tasks to do: those of the flag --tasks, and those
  that other flags request. For instance --prompt requests the task that reads
  it, unless a task of --tasks does so already.

  Args:
    names: the tasks of --tasks.
    values: the flags of eval.py by name.
    text: the value of --text, the text to evaluate on.

  Returns:
    The names of the tasks, each once, those of --tasks first.

  Raises:
    RequestError: for an unknown task, for no task at all, and for a flag (or
      --text) that none of the tasks reads.
  """
  # Add a task if one of its flags requests it, is set, and is not read by a
  # task of --tasks.
  flags_read = _flags_of_tasks(names)
  chosen = list(dict.fromkeys(names))
  for task_name, task in TASKS.items():
    for flag in task.flags:
      if not flag.requests_task or flag.name in flags_read:
        continue
      if values[flag.name].present and task_name not in chosen:
        chosen.append(task_name)

  # Refuse whatever would have no effect. Each flag that is set, and --text,
  # must be read by one of the tasks.
  if not chosen:
    raise RequestError("--tasks is '', so nothing is evaluated: choose from "
                       f'{", ".join(TASKS)}')
  _check_set_flags_are_read(chosen, values)
  if text and not any(get_task(name).reads_held_out for name in chosen):
    raise RequestError(
        f'--text is {shorten(text)}, which {", ".join(chosen)} would not read: '
        'leave it out, or add a task that does to --tasks')
  return chosen


def _check_set_flags_are_read(task_names: Sequence[str],
                              values: flags.FlagValues) -> None:
  """Checks that each flag that is set has an effect on the chosen tasks.

  Args:
    task_names: the names of the chosen tasks.
    values: the flags by name.

  Raises:
    RequestError: for a flag that no chosen task reads, or that has an effect
      only beside another one, which has its default.
  """
  flags_read = _flags_of_tasks(task_names)
  all_flags = _flags_of_tasks(TASKS)
  for name, flag in all_flags.items():
    if not values[name].present:
      continue
    if name not in flags_read:
      readers = ', '.join(find_tasks_reading_flag(name))
      raise RequestError(f'--{name} is read by {readers} alone: add it to '
                         '--tasks')
    # Some flags have an effect only where another one is set, too.
    if not flag.needed_flag:
      continue
    needed_value = values[flag.needed_flag].value
    if needed_value == all_flags[flag.needed_flag].default:
      raise RequestError(f'--{name} is read beside --{flag.needed_flag} alone, '
                         f'which is {needed_value!r}')


def check_task(name: str, options: Any, config: Config,
               location: str = '--tasks') -> None:
  """Checks that an evaluation task can be done with a run.

  Args:
    name: the name of the task.
    options: the flags of eval.py, as attributes; None: the task is named where
      no flag can be set.
    config: the config of the run.
    location: the flag or config field that names the task, for the message.

  Raises:
    RequestError: where the task cannot be done.
  """
  task = get_task(name, location)
  reason = task.why_unfit(config)
  require(not reason, f'{reason}: leave {name} out of {location}, and any flag '
          'that asks for it')
  if options is None:
    check_task_without_flags(name, location)
  else:
    task.check(_options_of_task(name, options), config)


def check_task_without_flags(name: str, location: str) -> Task:
  """Checks an evaluation task that is named where no flag can be set, such as
  in the config of a run.

  Args:
    name: the name of the task.
    location: the config field that names it, for the message.

  Returns:
    The task.

  Raises:
    RequestError: where the task needs a flag.
  """
  # A task that needs a flag refuses its defaults. Its message is about flags,
  # so put a sentence about the config before it.
  task = get_task(name, location)
  try:
    task.check(_options_of_task(name, None), None)
  except RequestError as error:
    raise RequestError(f'{location} has {name!r}, which cannot be done there: '
                       f'{error}') from error
  return task


def load_evaluation(workdir: epath.Path, names: Sequence[str], options: Any, *,
                    step: int | str | checkpoints.MeanOfSteps | None,
                    text: str = '',
                    programs: dict | None = None, live: bool = False,
                    passes: int = 0) -> Evaluation:
  """Returns a run's checkpoint as tasks are given it, after a check that the
  tasks can be done.

  The arguments and errors are those of `evaluate_run`.
  """
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

  # The tasks, and the files that they will write.
  for name in names:
    check_task(name, options=options, config=config)
    file = get_task(name).file
    if file:
      storage.check_file_is_writable(workdir / file, '--workdir')

  # Warn where the data have changed since training. A task that reads no data
  # is done even where they are no longer there.
  tokenizer = runs.load_run_tokenizer(workdir, config)
  if not text:
    with contextlib.suppress(RequestError, OSError):
      changes = provenance.check_data(
          run_config.load_starts(workdir),
          data=pipeline.digest_sources(config, tokenizer),
          allowed=True)
      for line in changes:
        print(f'warning: {line}', file=sys.stderr)

  # The model and its parameters.
  model, _ = runs.resolve_model(config, tokenizer)
  run = runs.build(config, model)
  restored = parameters.read_parameters_of_run(
      run, workdir=workdir, step=step, live=live)
  if programs is None:
    programs = {}
  return Evaluation(
      run=run, params=restored.state, step=restored.step,
      tokenizer=tokenizer, options=options, workdir=workdir, programs=programs,
      which_parameters=restored.which_parameters)


def evaluate_run(workdir: epath.Path, names: Sequence[str], options: Any,
                 **loading: Any) -> dict[str, Any]:
  """Does some evaluation tasks with a checkpoint of a run, and prints their
  figures.

  Args:
    workdir: the folder of the run.
    names: the names of the tasks.
    options: the values of the tasks' flags, as attributes.
    **loading: the keyword arguments of `load_evaluation`: step, which
      checkpoint ('best', several for the mean of their parameters, None for the
      newest); text, what to evaluate on, written as data.source ('' for what
      the run holds out); programs, what earlier evaluations of this process
      have compiled; live, whether to evaluate the parameters and not their
      moving average; passes, the number of passes of layers that loop (0 as in
      training).

  Returns:
    {name of the task: its figures}, and 'step', the step of the checkpoint.

  Raises:
    RequestError: where a task cannot be done with this run.
  """
  evaluation = load_evaluation(workdir, names=names, options=options, **loading)
  figures: dict[str, Any] = {'step': evaluation.step}
  if evaluation.which_parameters:
    figures['parameters'] = evaluation.which_parameters

  # Layers that loop may be evaluated with more passes than in training.
  passes = loading.get('passes', 0)
  if passes:
    trained_passes = runs.load_run_config(workdir).model.loops.passes
    figures['passes'] = dict(evaluated=passes, trained=trained_passes)
    print(f'evaluated with {passes} passes of the layers that loop, trained '
          f'with {trained_passes}')

  # Prepare all tasks before the first one is done. A task that cannot be done
  # is then refused at once.
  with evaluation.run.context():
    prepared = {name: _prepare_evaluation(name, evaluation) for name in names}
    for name in names:
      figures[name] = get_task(name).run(prepared[name])
  return figures


def write_figures(file: epath.Path | None, figures: dict[str, Any]) -> None:
  """Writes the figures of `evaluate_run` as one JSON file, where a file is
  given; a number that is not finite becomes null."""
  storage.write_json(file, metrics.as_json_value(figures))


def parse_task_names(names: str | Sequence[str]) -> list[str]:
  """Splits a list of tasks, such as 'loss,lm_eval:A,B', into their names.

  After NAME:ARGUMENT, each word that is not the name of a task is a further
  argument: lm_eval:A,B means lm_eval:A and lm_eval:B. In lm_eval:A,loss the
  last one is our task `loss`, even if lm_eval has a task of that name.

  Args:
    names: a text with commas, or a list of the parts between commas.

  Returns:
    NAME or NAME:ARGUMENT of each task. Whether it exists is not checked.
  """
  if isinstance(names, str):
    names = names.split(',')
  task_names: list[str] = []
  for text in names:
    text = text.strip()
    if not text:
      continue
    is_task = text.partition(':')[0] in TASKS
    # If this is no task, and the one before it has an argument, it is another
    # argument of that task.
    if task_names and not is_task:
      task_before, colon, _ = task_names[-1].partition(':')
      if colon:
        text = f'{task_before}:{text}'
    task_names.append(text)
  return task_names


def check_tasks_in_training(config: Config) -> None:
  """Checks the evaluation tasks that a run is to do during training
  (eval.tasks), and the figure by which its best checkpoint is chosen
  (eval.best).

  A task may not declare the names of its figures. Then eval.best is checked
  elsewhere, by doing the task before the first step.

  Args:
    config: the config of the run.

  Raises:
    RequestError: for a task that cannot be done with the run, and for a figure
      that no task has.
  """
  # Check the tasks.
  names = parse_task_names(config.eval.tasks)
  steps_between = config.eval.tasks_every_steps
  if steps_between and not names:
    raise RequestError(
        f'eval.tasks_every_steps is {steps_between}, but eval.tasks names '
        'nothing to evaluate: set it, or leave eval.tasks_every_steps at 0')
  require(len({*names}) == len(names), f'eval.tasks is {config.eval.tasks!r}: '
          'name each task once')
  for name in names:
    check_task(name, options=None, config=config, location='eval.tasks')

  # Check eval.best if it is a figure of a task, TASK/FIGURE. A figure of the
  # held-out data, such as `loss`, is checked elsewhere.
  task_name, slash, figure = config.eval.best.partition('/')
  if not slash:
    return
  patterns = get_task(task_name, 'eval.best').figure_names
  if patterns is None:
    return
  for pattern in patterns:
    if fnmatch.fnmatchcase(figure, pattern):
      return
  raise RequestError(
      f'eval.best is {config.eval.best!r}, but the figures of task '
      f'{task_name} are {", ".join(patterns) or "none"}')
