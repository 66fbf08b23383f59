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
  """The tasks of a run, or of a group of runs; see `of`.

  Args:
    run: the run; of a group, one of its runs alone.
    tokenizer: the tokenizer of the run.

  Raises:
    RequestError: where several processes train.
  """

  def __init__(self, run: runs.Run, tokenizer: Tokenizer):
    """Reads eval.tasks, which one process alone can do."""
    self._names = evals.parse_task_names(run.config.eval.tasks)
    self._run = run
    self._tokenizer = tokenizer
    self._programs: dict = {}
    if self._names and jax.process_count() > 1:
      raise RequestError(
          f'eval.tasks is {run.config.eval.tasks!r}, which is for training in '
          f'one process, and there are {jax.process_count()}: leave it empty, '
          'and evaluate the checkpoints by eval.py')

  def list_figure_names(self, task: str, params: Any, workdir: epath.Path,
            stop: Callable[[], bool]) -> list[str] | None:
    """Returns the names of the figures of one of the tasks, as `of` does it;
    None where they are known without, and were compared with the config."""
    if evals.get_task(task).figure_names is not None:
      return None
    results = self.run_for_member(params, 0, workdir, stop, [task])
    if results is None:  # stopped
      return None
    return list(results.figures)

  def run_for_member(self, params: Any, n: int, workdir: epath.Path,
         stop: Callable[[],
                        bool], names: Sequence[str] = ()) -> TaskResults | None:
    """Does the tasks for one member.

    Args:
      params: the parameters of the member.
      n: the step that they are of.
      workdir: the folder of the member, where pictures go.
      stop: asked again and again, whether to leave it at that.
      names: the names of the tasks; default: all.

    Returns:
      None: stopped.
    """
    evaluation = Evaluation(
        run=self._run, params=params, step=n, tokenizer=self._tokenizer,
        options=None, workdir=workdir, programs=self._programs)
    results = TaskResults(figures={}, lines=[])
    items = {}
    for name in names or self._names:
      # The task, whose lines are kept.
      printed = io.StringIO()
      try:
        with (self._run.context(), progress.stop_work_of_run(stop),
              contextlib.redirect_stdout(printed)):
          figures = evals.run_task(name, evaluation)
      except progress.WorkStopped:
        return None

      # Its figures, and a line for a reader.
      results.figures.update(flatten_numbers(figures, name))
      if 'items' in figures:
        items[name] = {'items': figures['items']}
      line = _summarize_figures(name, figures) or printed.getvalue().rstrip()
      results.lines.append(line)
    if items:
      evals.write_figures(workdir / evals.ITEMS_FILE, {'step': n} | items)
    return results


def _summarize_figures(task: str, figures: Mapping[str, Any]) -> str:
  """Returns the fractions among the figures of a task, and not its counts, in a
  line; '': there are none."""
  shown = []
  for name, value in figures.items():
    is_number = isinstance(value, numbers.Real)
    if is_number and not isinstance(value, numbers.Integral):
      shown.append(f'{name.replace("_", " ")} {held_out.format_figure(value)}')
  if not shown:
    return ''
  return f'{task}: {"  ".join(shown)}'


def flatten_numbers(figures: Mapping[str, Any], prefix: str) -> dict[str,
                                                                     float]:
  """Returns the numbers among figures, also of groups: {'labels/f1': 0.5}."""
  flat = {}
  for name, value in figures.items():
    if isinstance(value, Mapping):
      flat |= flatten_numbers(value, f'{prefix}/{name}')
    elif isinstance(value, numbers.Real):
      flat[f'{prefix}/{name}'] = value
  return flat
