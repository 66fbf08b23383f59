"""Tasks of lm_eval, EleutherAI's evaluation harness, on a run.

Their names are those of lm_eval (`lm_eval ls tasks`), of the folder
--lm_eval_tasks, and of ../lm_eval_tasks, whose tasks read files of a folder of
the user's. The datasets of lm_eval's own tasks come from the Hugging Face hub,
or with HF_DATASETS_OFFLINE=1 from its cache on disk.
"""

from collections.abc import Iterator
import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import traceback
from typing import Any

from common.errors import EnvironmentFailure, RequestError, hint, require
from training.evals import Evaluation, Flag, Task, items, scoring

OWN = pathlib.Path(__file__).parents[1] / 'lm_eval_tasks'
# Of what is resampled for a standard error; means have one without.
BOOTSTRAPS = 100


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Prints a line for each figure, and returns them: of one task as they are
  called, of several as TASK/FIGURE, those of the parts of a group likewise.

  Their names are lm_eval's without the name of a filter that does nothing:
  'acc,none' is acc, and 'exact_match,strict' is exact_match (strict)."""
  from training.evals import harness
  options = evaluation.options
  names = _names(options)
  with failures(', '.join(names)):
    from lm_eval import evaluator
    results = evaluator.simple_evaluate(
        harness.Model(evaluation), tasks=names,
        limit=options.lm_eval_limit or None,
        num_fewshot=None if options.lm_eval_fewshot < 0
        else options.lm_eval_fewshot, task_manager=_manager(options),
        bootstrap_iters=BOOTSTRAPS, log_samples=True, random_seed=None,
        numpy_random_seed=None, torch_random_seed=None)
  figures: dict[str, float] = {}
  errors: dict[str, float] = {}
  records: dict[str, dict] = {}

  def samples(task: str) -> list[dict]:
    return results['samples'].get(task) or [
        row for part in results['group_subtasks'].get(task, ())
        for row in samples(part)]

  for task, row in results['results'].items():
    before = '' if names == [task] else f'{task}/'
    for name, value in row.items():
      if isinstance(value, float):
        into = errors if '_stderr' in name else figures
        into[before + items.called(name.replace('_stderr', ''))] = value
    records |= {before + name: record for name, record in items.of_samples(
        row, samples(task)).items()}
  for name, value in figures.items():
    print(f'  {name:<40} {value:>10.4f}'
          + (f' ± {errors[name]:.4f}' if name in errors else ''))
  return figures | {'stderr': errors, 'examples': {
      task: n['effective'] for task, n in results['n-samples'].items()},
                    'items': records}


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
  """Around lm_eval's work on `what`: says what it fails at in a sentence."""
  os.environ.setdefault('TQDM_DISABLE', '1')  # of lm_eval; ours is its bar
  # It resamples in forks of the process, which may stand still: a fork has
  # one of JAX's threads, and the locks of them all.
  os.environ['DISABLE_MULTIPROC'] = '1'
  logging.getLogger('lm_eval').setLevel(logging.ERROR)
  try:
    yield
  except (ConnectionError, FileNotFoundError) as error:
    first = str(error).strip().partition('\n')[0]
    raise EnvironmentFailure(f'lm_eval cannot load the data of {what}: {first}'
                             ) from error
  except Exception as error:
    # What its own code, or what that calls, refuses: ours is a bug.
    rooms = [frame.f_globals.get('__name__', '').partition('.')[0]
             for frame, _ in traceback.walk_tb(error.__traceback__)]
    theirs = [x for x in rooms if x in (
        'common', 'configs', 'lm_eval', 'training')]
    if theirs[-1] != 'lm_eval':
      raise
    reason = ' '.join(str(error).split()) or 'no message'
    raise RequestError(f'lm_eval refuses {what}: {type(error).__name__}: '
                       f'{reason}') from error


def _names(options: Any) -> list[str]:
  return [name.strip() for name in options.lm_eval.split(',') if name.strip()]


def _manager(options: Any) -> Any:
  """Returns lm_eval's list of tasks: of ours and those of a folder, and where
  one of --lm_eval is none of these, of its own thousands, too."""
  places = options.lm_eval_tasks, options.lm_eval_data
  manager = _listed(*places, True)
  return (manager if {*_names(options)} <= {*manager.all_tasks}
          else _listed(*places, False))


@functools.lru_cache(maxsize=8)
def _listed(folder: str, data: str, alone: bool) -> Any:
  from lm_eval import tasks
  return tasks.TaskManager(
      include_path=[str(OWN), *([folder] if folder else [])],
      include_defaults=not alone, metadata={'folder': data})


def check(options: Any, config: Any) -> None:
  """Raises RequestError where a task is not there, or its files are not."""
  names = _names(options)
  require(bool(names), 'task lm_eval is told what to evaluate: '
          '--tasks=lm_eval:NAME, or --tasks=lm_eval --lm_eval=NAME,NAME')
  require(importlib.util.find_spec('lm_eval') is not None, "task lm_eval needs "
          "the package lm_eval: pip install -e '.[lm-eval]'")
  folder = options.lm_eval_tasks
  require(not folder or os.path.isdir(folder), '--lm_eval_tasks is '
          f'{folder!r}, which is no folder')
  with failures(', '.join(names)):
    manager = _manager(options)
    for name in names:
      require(name in manager.all_tasks, f'lm_eval has no task {name!r}: '
              '`lm_eval ls tasks` lists its own, and blimp_files and '
              'cloze_files are here.' + hint(name, manager.all_tasks))
    if manager is _listed(folder, options.lm_eval_data, True):
      manager.load(names)  # whose files are on this machine


TASKS = {'lm_eval': Task(
    'tasks of lm_eval, named as lm_eval:NAME', run, scoring.unfit, check=check,
    held_out=False,
    flags=(
        Flag('lm_eval', '', 'The tasks, NAME,NAME.', asks=True),
        Flag('lm_eval_tasks', '', 'A folder of further task files (YAML).'),
        Flag('lm_eval_data', '', 'The folder that blimp_files and cloze_files '
             'read; empty: $ARCHETYPE_DATA.'),
        Flag('lm_eval_limit', 0, 'So many examples of each task; 0: all.', 0,
             2**31 - 1),
        Flag('lm_eval_fewshot', -1, 'Examples before each question; -1: as the '
             'task says.', -1, 1000)),
    argument='lm_eval', beside=('stderr', 'examples', 'items'))}
