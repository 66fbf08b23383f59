"""Tasks of lm_eval, EleutherAI's evaluation harness, on a run.

Their names are those of lm_eval (`lm_eval ls tasks`), of the folder
--lm_eval_tasks, and of ../lm_eval_tasks, whose tasks read files of a folder of
the user's. The datasets of lm_eval's own tasks come from the Hugging Face hub,
or with HF_DATASETS_OFFLINE=1 from its cache on disk.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import traceback
from typing import Any

from common.errors import EnvironmentFailure, RequestError, require
from common.errors import suggest_name
from training.evals import Evaluation, Flag, Task, items, scoring
from training.objectives import Config

# The folder of the tasks that are ours, as files of lm_eval.
OWN_TASKS_FOLDER = pathlib.Path(__file__).parents[1] / 'lm_eval_tasks'
# How often a figure is resampled for its standard error. That of a mean needs
# no resampling.
NUM_BOOTSTRAPS = 100
# The packages whose code may run in a task of lm_eval: its own, and ours.
KNOWN_PACKAGES = ('common', 'configs', 'lm_eval', 'training')


class LMEval(Task):
  """Evaluates a run by tasks of lm_eval.

  If one task is asked for, its figures have their own names; if several are, or
  a group of tasks, they are named TASK/FIGURE. The names are those of lm_eval,
  without the name of a filter that does nothing: 'acc,none' becomes acc, and
  'exact_match,strict' becomes exact_match (strict).
  """

  help = 'tasks of lm_eval, named as lm_eval:NAME'
  reads_held_out = False
  argument_flag = 'lm_eval'
  other_groups = ('stderr', 'examples', 'items')
  flags = (
      Flag(name='lm_eval', default='', help='The tasks, NAME,NAME.',
           requests_task=True),
      Flag(name='lm_eval_tasks', default='',
           help='A folder of further task files (YAML).'),
      Flag(name='lm_eval_data', default='',
           help='The folder that blimp_files and cloze_files read; empty: '
           '$ARCHETYPE_DATA.'),
      Flag(name='lm_eval_limit', default=0,
           help='So many examples of each task; 0: all.', least=0,
           most=2**31 - 1),
      Flag(name='lm_eval_fewshot', default=-1,
           help='Examples before each question; -1: as the task says.',
           least=-1, most=1000),
  )

  def why_unfit(self, config: Config) -> str:
    return scoring.why_not_scorable(config)

  def check(self, options: Any, config: Any) -> None:
    """Checks that the tasks exist, and that their files can be loaded.

    Args:
      options: the flags of this task.
      config: the config of the run, which is not read.

    Raises:
      RequestError: for a task that does not exist or cannot be loaded, or if
        the package lm_eval is not installed.
    """
    # Check the flags, and that the package is installed.
    names = _parse_names(options)
    require(bool(names), 'task lm_eval is told what to evaluate: '
            '--tasks=lm_eval:NAME, or --tasks=lm_eval --lm_eval=NAME,NAME')
    require(importlib.util.find_spec('lm_eval') is not None, 'task lm_eval '
            "needs the package lm_eval: pip install -e '.[lm-eval]'")
    folder = options.lm_eval_tasks
    require(not folder or os.path.isdir(folder), '--lm_eval_tasks is '
            f'{folder!r}, which is no folder')

    # Check that the tasks exist. If none is lm_eval's own, all of their files
    # are on this machine, and they are loaded as a check.
    with report_failures(', '.join(names)):
      manager = _choose_task_manager(options)
      for name in names:
        require(name in manager.all_tasks, f'lm_eval has no task {name!r}: '
                '`lm_eval ls tasks` lists its own, and blimp_files and '
                'cloze_files are here.' + suggest_name(name, manager.all_tasks))
      without_own = _make_task_manager(folder, options.lm_eval_data,
                                       without_own=True)
      if manager is without_own:
        manager.load(names)

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Evaluates the run by tasks of lm_eval, and prints their figures.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      The figures by name; and in `stderr` their standard errors, in `examples`
      the number of examples of each task, and in `items` the scores of each
      item, such as a question.
    """
    asked_tasks = _parse_names(evaluation.options)
    results = _run_lm_eval(evaluation, asked_tasks)

    # Sort the results into figures, their standard errors, and the scores of
    # each item. If one task was asked for, its name is left out.
    figures: dict[str, float] = {}
    errors: dict[str, float] = {}
    records: dict[str, dict] = {}
    for task, figures_of_task in results['results'].items():
      prefix = '' if asked_tasks == [task] else f'{task}/'
      for full_name, value in figures_of_task.items():
        if not isinstance(value, float):
          continue
        # lm_eval calls the error of 'acc,none' 'acc_stderr,none'.
        name = prefix + items.shorten_figure_name(
            full_name.replace('_stderr', ''))
        if '_stderr' in full_name:
          errors[name] = value
        else:
          figures[name] = value
      records_of_task = items.record_lm_eval_samples(
          figures_of_task, _samples_of_task(results, task))
      for name, record in records_of_task.items():
        records[prefix + name] = record

    # Print a line for each figure, with its standard error if lm_eval has one.
    for name, value in figures.items():
      line = f'  {name:<40} {value:>10.4f}'
      if name in errors:
        line += f' ± {errors[name]:.4f}'
      print(line)
    num_examples = {}
    for task, counts in results['n-samples'].items():
      num_examples[task] = counts['effective']
    return figures | {
        'stderr': errors, 'examples': num_examples, 'items': records}


def _run_lm_eval(evaluation: Evaluation, tasks: Sequence[str]
                 ) -> dict[str, Any]:
  """Evaluates a run by lm_eval (EleutherAI's lm-evaluation-harness).

  Args:
    evaluation: the evaluation of the run, with the flags of this task.
    tasks: the names of lm_eval's tasks.

  Returns:
    The results as lm_eval returns them.
  """
  # lm_eval is an optional package, and slow to import.
  from training.evals import harness
  options = evaluation.options
  # None leaves the number of examples before a question to the task.
  num_fewshot = options.lm_eval_fewshot
  if num_fewshot < 0:
    num_fewshot = None

  # None for a seed leaves the random generators of the process alone.
  with report_failures(', '.join(tasks)):
    from lm_eval import evaluator
    return evaluator.simple_evaluate(
        harness.Model(evaluation), tasks=tasks,
        limit=options.lm_eval_limit or None, num_fewshot=num_fewshot,
        task_manager=_choose_task_manager(options),
        bootstrap_iters=NUM_BOOTSTRAPS, log_samples=True, random_seed=None,
        numpy_random_seed=None, torch_random_seed=None)


def _samples_of_task(results: Mapping[str, Any], task: str) -> list[dict]:
  """Returns the samples that lm_eval has logged of a task. A group of tasks has
  no samples itself; its samples are those of all of its tasks.

  Args:
    results: the results of lm_eval.
    task: the name of the task or group.
  """
  samples = results['samples'].get(task)
  if samples:
    return samples
  samples = []
  for task_of_group in results['group_subtasks'].get(task, ()):
    samples += _samples_of_task(results, task_of_group)
  return samples


@contextlib.contextmanager
def report_failures(task_names: str) -> Iterator[None]:
  """Within a `with` block, turns failures of lm_eval into errors with one
  sentence for the user.

  Args:
    task_names: the names of the tasks that lm_eval works on, for the message.

  Raises:
    EnvironmentFailure: if lm_eval cannot load the data.
    RequestError: if lm_eval refuses the request.
  """
  # Turn off lm_eval's progress bars, as there are our own.
  os.environ.setdefault('TQDM_DISABLE', '1')
  # Keep lm_eval from computing bootstraps in forks of this process. These might
  # wait for ever: a fork has the locks of all of JAX's threads, but only one
  # thread.
  os.environ['DISABLE_MULTIPROC'] = '1'
  logging.getLogger('lm_eval').setLevel(logging.ERROR)

  # Errors that lm_eval's code has not raised are bugs of ours, and pass
  # through.
  try:
    yield
  except (ConnectionError, FileNotFoundError) as error:
    first_line = str(error).strip().partition('\n')[0]
    raise EnvironmentFailure(f'lm_eval cannot load the data of {task_names}: '
                             f'{first_line}') from error
  except Exception as error:
    if _package_that_raised(error) != 'lm_eval':
      raise
    reason = ' '.join(str(error).split()) or 'no message'
    raise RequestError(f'lm_eval refuses {task_names}: {type(error).__name__}: '
                       f'{reason}') from error


def _package_that_raised(error: Exception) -> str:
  """Finds out whose code has raised an error: a package of KNOWN_PACKAGES, or
  one that it has called.

  An error of lm_eval's own code means a wrong request, and one of ours a bug.

  Args:
    error: the error, with its traceback.

  Returns:
    The name of the package; '' if none of them was involved.
  """
  # The innermost frame of a known package decides, which is the last one here.
  package_that_raised = ''
  for frame, _ in traceback.walk_tb(error.__traceback__):
    package = frame.f_globals.get('__name__', '').partition('.')[0]
    if package in KNOWN_PACKAGES:
      package_that_raised = package
  return package_that_raised


def _parse_names(options: Any) -> list[str]:
  """Returns the names of the tasks that the flag --lm_eval lists."""
  names = [name.strip() for name in options.lm_eval.split(',')]
  return [name for name in names if name]


def _choose_task_manager(options: Any) -> Any:
  """Returns lm_eval's manager of tasks, which lists and loads them.

  It has our tasks and those of --lm_eval_tasks. If --lm_eval names any other,
  it also has lm_eval's own thousands of tasks.

  Args:
    options: the flags of this task.
  """
  folder = options.lm_eval_tasks
  data_folder = options.lm_eval_data
  manager = _make_task_manager(folder, data_folder, without_own=True)
  if {*_parse_names(options)} <= {*manager.all_tasks}:
    return manager
  return _make_task_manager(folder, data_folder, without_own=False)


@functools.lru_cache(maxsize=8)
def _make_task_manager(folder: str, data_folder: str, without_own: bool) -> Any:
  """Returns lm_eval's manager of tasks, which lists and loads them.

  Args:
    folder: a folder of further task files; '': none.
    data_folder: the folder that blimp_files and cloze_files read.
    without_own: whether lm_eval's own tasks are left out, which are slow to
      list.
  """
  from lm_eval import tasks
  paths = [str(OWN_TASKS_FOLDER)]
  if folder:
    paths.append(folder)
  return tasks.TaskManager(
      include_path=paths, include_defaults=not without_own,
      metadata={'folder': data_folder})


TASKS = {'lm_eval': LMEval()}
