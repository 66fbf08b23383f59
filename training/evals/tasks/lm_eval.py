"""Tasks of lm_eval, EleutherAI's evaluation harness, on a run.

Their names are those of lm_eval (`lm_eval ls tasks`), of the folder
--lm_eval_tasks, and of ../lm_eval_tasks, whose tasks read files of a folder of
the user's. The datasets of lm_eval's own tasks come from the Hugging Face hub,
or with HF_DATASETS_OFFLINE=1 from its cache on disk.
"""

from collections.abc import Mapping
import difflib
import functools
import importlib.util
import os
import pathlib
from typing import Any

import ml_collections

from configs.errors import EnvironmentFailure, RequestError, require
from training.evals.task import Evaluation, Flag, Task

OWN = pathlib.Path(__file__).parents[1] / 'lm_eval_tasks'
# Of what is resampled for a standard error; means have one without.
BOOTSTRAPS = 100


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Prints a line for each figure, and returns them: of one task as they are
  called, of several as TASK/FIGURE, those of the parts of a group likewise."""
  from training.evals import harness
  options = evaluation.options
  names = _names(options)
  limit = options.lm_eval_limit or None
  with _told(names):
    from lm_eval import evaluator
    found = evaluator.simple_evaluate(
        harness.Model(evaluation), tasks=names, limit=limit,
        num_fewshot=None if options.lm_eval_fewshot < 0
        else options.lm_eval_fewshot,
        task_manager=_manager(*_places(options), _has_own(options)),
        bootstrap_iters=BOOTSTRAPS, log_samples=False, random_seed=None,
        numpy_random_seed=None, torch_random_seed=None)
  figures: dict[str, Any] = {}
  errors: dict[str, float] = {}
  for name, row in found['results'].items():
    own = '' if names == [name] else f'{name}/'
    plain, error = _plain(row)
    figures |= {own + figure: value for figure, value in plain.items()}
    errors |= {own + figure: value for figure, value in error.items()}
  counts = {name: n['effective'] for name, n in found['n-samples'].items()}
  for figure, value in figures.items():
    print(f'  {figure:<40} {value:>10.4f}'
          + (f' ± {errors[figure]:.4f}' if figure in errors else ''))
  return figures | {'stderr': errors, 'examples': counts}


def _plain(row: Mapping[str, Any]
           ) -> tuple[dict[str, float], dict[str, float]]:
  """Returns lm_eval's figures and their standard errors, without the name of a
  filter that does nothing: 'acc,none' is acc, and 'exact_match,strict' is
  exact_match (strict)."""
  figures: dict[str, float] = {}
  errors: dict[str, float] = {}
  for name, value in row.items():
    figure, _, kind = name.partition(',')
    if isinstance(value, float):
      into = errors if figure.endswith('_stderr') else figures
      figure = figure.removesuffix('_stderr')
      into[figure if kind in ('', 'none') else f'{figure} ({kind})'] = value
  return figures, errors


class _told:
  """Around lm_eval's work: says what it fails at in a sentence."""

  def __init__(self, names: list[str]):
    self._names = ', '.join(names)

  def __enter__(self):
    import logging
    os.environ.setdefault('TQDM_DISABLE', '1')  # of lm_eval; ours is its bar
    # It resamples in forks of the process, which may stand still: a fork has
    # one of JAX's threads, and the locks of them all.
    os.environ['DISABLE_MULTIPROC'] = '1'
    logging.getLogger('lm_eval').setLevel(logging.ERROR)

  def __exit__(self, kind, error, trace):
    if error is None or isinstance(error, RequestError | EnvironmentFailure):
      return
    if isinstance(error, ConnectionError | FileNotFoundError):
      first = str(error).strip().partition('\n')[0]
      raise EnvironmentFailure(
          f'lm_eval cannot load the data of {self._names}: {first}') from error


def _names(options: Any) -> list[str]:
  return [name.strip() for name in options.lm_eval.split(',') if name.strip()]


def _places(options: Any) -> tuple[str, str]:
  return options.lm_eval_tasks, options.lm_eval_data


@functools.lru_cache(maxsize=8)
def _manager(folder: str, data: str, own: bool):
  """Returns lm_eval's list of tasks.

  Args:
    folder: with further tasks; '': none.
    data: the folder that those of training/evals/lm_eval_tasks read.
    own: whether these and `folder` are all; lm_eval's thousands of files take
      some seconds to list.
  """
  from lm_eval import tasks
  return tasks.TaskManager(
      include_path=[str(OWN), *([folder] if folder else [])],
      include_defaults=not own, metadata={'folder': data})


def _has_own(options: Any) -> bool:
  """Whether no task of lm_eval itself is asked for."""
  known = _manager(*_places(options), True).all_tasks
  return all(name in known for name in _names(options))


def check(options: Any) -> None:
  """Raises RequestError where a task is not there, or its files are not."""
  names = _names(options)
  require(bool(names), 'task lm_eval is told what to evaluate: '
          '--tasks=lm_eval:NAME, or --tasks=lm_eval --lm_eval=NAME,NAME')
  require(importlib.util.find_spec('lm_eval') is not None, "task lm_eval needs "
          "the package lm_eval: pip install -e '.[lm-eval]'")
  folder = options.lm_eval_tasks
  require(not folder or os.path.isdir(folder), '--lm_eval_tasks is '
          f'{folder!r}, which is no folder')
  with _told(names):
    if _has_own(options):
      _manager(*_places(options), True).load(names)
      return
    known = _manager(*_places(options), False).all_tasks
  for name in names:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f' Did you mean {", ".join(near)}?' if near else ''
    require(name in known, f'lm_eval has no task {name!r}: `lm_eval ls tasks` '
            f'lists its own, and blimp_files and cloze_files are here.{hint}')


def _unfit(config: ml_collections.ConfigDict) -> str:
  from training.evals import scoring
  return scoring.unfit(config)


TASKS = {'lm_eval': Task(
    'tasks of lm_eval, named as lm_eval:NAME', run, _unfit, check=check,
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
    argument='lm_eval', beside=('stderr', 'examples'))}
