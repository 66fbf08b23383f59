"""The tasks of eval.tasks, done on the live parameters of a run.

What eval.py measures of a checkpoint is measured of the parameters as they
are after a step, in the process that trains: the seeds of a group have one
compiled program. Nothing that training draws or keeps is touched.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import io
import numbers
from typing import Any, NamedTuple

from etils import epath
import jax

from common.errors import RequestError
from training import evals, progress, runs
from training.data.tokenizers import Tokenizer
from training.evals import Evaluation, held_out


class TaskResults(NamedTuple):
  """The results of the tasks of a run.

  Attributes:
    figures: every number, as TASK/FIGURE.
    lines: a line for each task, for a reader; or what the task printed, where
      it has no figure to put into a line, as `samples` has none.
  """
  figures: dict[str, float]
  lines: list[str]


class TasksInTraining:
  """The tasks of eval.tasks, for a run or for the runs of a group that train
  together.

  Args:
    run: the run; of a group, one of its runs alone.
    tokenizer: the tokenizer of the run.

  Raises:
    RequestError: where several processes train.
  """

  def __init__(self, run: runs.Run, tokenizer: Tokenizer):
    """Reads eval.tasks, which one process alone can do."""
    self._task_names = evals.parse_task_names(run.config.eval.tasks)
    self._run = run
    self._tokenizer = tokenizer
    self._programs: dict = {}
    if self._task_names and jax.process_count() > 1:
      raise RequestError(
          f'eval.tasks is {run.config.eval.tasks!r}, which is for training in '
          f'one process, and there are {jax.process_count()}: leave it empty, '
          'and evaluate the checkpoints by eval.py')

  def list_figure_names(self, task: str, params: Any, workdir: epath.Path,
                        stop: Callable[[], bool]) -> list[str] | None:
    """Finds the names of the figures of a task by doing it once.

    Args:
      task: the name of the task.
      params: the parameters of the run.
      workdir: the folder of the run.
      stop: called again and again: returns whether to stop there.

    Returns:
      The names; None if the task was stopped, or declares its figures, which
      have been checked already.
    """
    if evals.get_task(task).figure_names is not None:
      return None
    results = self.run_for_member(params, n=0, workdir=workdir, stop=stop,
                                  names=[task])
    if results is None:  # stopped
      return None
    return list(results.figures)

  def run_for_member(self, params: Any, n: int, workdir: epath.Path,
                     stop: Callable[[], bool], names: Sequence[str] = ()
                     ) -> TaskResults | None:
    """Does the evaluation tasks for one run, which may be one of several that
    train as one program. The scores of single items, such as questions, are
    written to a file in the run's folder.

    Args:
      params: the parameters of the run.
      n: the step after which the run has these parameters.
      workdir: the folder of the run, where pictures go.
      stop: called again and again: returns whether to stop there.
      names: the names of the tasks; (): all of eval.tasks.

    Returns:
      The figures of all tasks, and a line for the user about each; None if they
      were stopped.
    """
    evaluation = Evaluation(
        run=self._run, params=params, step=n, tokenizer=self._tokenizer,
        options=None, workdir=workdir, programs=self._programs)
    results = TaskResults(figures={}, lines=[])
    items_by_task = {}
    for name in names or self._task_names:
      # Do the task. What it prints is collected, as it must not disturb the log
      # of the training. A task may take long, so a signal stops it at once.
      printed = io.StringIO()
      try:
        with (self._run.context(), progress.stop_work_of_run(stop),
              contextlib.redirect_stdout(printed)):
          figures = evals.run_task(name, evaluation)
      except progress.WorkStopped:
        return None

      # Keep its figures, and a line for the user. If it has no figure for the
      # line, that is what it has printed.
      results.figures.update(flatten_numbers(figures, name))
      if 'items' in figures:
        items_by_task[name] = {'items': figures['items']}
      line = _summarize_figures(name, figures) or printed.getvalue().rstrip()
      results.lines.append(line)
    if items_by_task:
      evals.write_figures(workdir / evals.ITEMS_FILE,
                          {'step': n} | items_by_task)
    return results


def _summarize_figures(task: str, figures: Mapping[str, Any]) -> str:
  """Summarises the figures of an evaluation task in one line for the user. It
  has the figures that are fractions, and not the counts.

  Args:
    task: the name of the task.
    figures: {name: figure}, some of which may not be numbers.

  Returns:
    The line; '' if there is no such figure.
  """
  texts = []
  for name, value in figures.items():
    is_number = isinstance(value, numbers.Real)
    if is_number and not isinstance(value, numbers.Integral):
      words = name.replace('_', ' ')
      texts.append(f'{words} {held_out.format_figure(value)}')
  if not texts:
    return ''
  return f'{task}: {"  ".join(texts)}'


def flatten_numbers(figures: Mapping[str, Any], prefix: str
                    ) -> dict[str, float]:
  """Returns the numbers among figures and their groups, by their path: with the
  prefix 'labels', {'f1': 0.5} becomes {'labels/f1': 0.5}."""
  flat = {}
  for name, value in figures.items():
    if isinstance(value, Mapping):
      flat |= flatten_numbers(value, f'{prefix}/{name}')
    elif isinstance(value, numbers.Real):
      flat[f'{prefix}/{name}'] = value
  return flat
