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

from common.errors import require
from training import evals, progress, runs
from training.data.tokenizers import Tokenizer
from training.evals import Evaluation, held_out


class Results(NamedTuple):
  """What the tasks of a run have found.

  Attributes:
    figures: every number, as TASK/FIGURE.
    lines: for a reader: a line for each task; or of one without a figure to put
      into a line, such as `samples`, what it printed.
  """
  figures: dict[str, float]
  lines: list[str]


class Tasks:
  """The tasks of a run, or of a group of runs; see `of`.

  Args:
    run: the run; of a group, one of its runs alone.
    tokenizer: its own.

  Raises:
    RequestError: where several processes train.
  """

  def __init__(self, run: runs.Run, tokenizer: Tokenizer):
    self._names = evals.listed(run.config.eval.tasks)
    self._run, self._tokenizer = run, tokenizer
    self._programs: dict = {}
    require(not self._names or jax.process_count() == 1, 'eval.tasks is '
            f'{run.config.eval.tasks!r}, which is for training in one process, '
            f'and there are {jax.process_count()}: leave it empty, and '
            'evaluate the checkpoints by eval.py')

  def names(self, task: str, params: Any, workdir: epath.Path,
            stop: Callable[[], bool]) -> list[str] | None:
    """Returns the names of the figures of one of the tasks, as `of` does it;
    None where they are known without, and were compared with the config."""
    if evals.task(task).figures is not None:
      return None
    results = self.of(params, 0, workdir, stop, [task])
    return results and list(results.figures)

  def of(self, params: Any, n: int, workdir: epath.Path,
         stop: Callable[[], bool], names: Sequence[str] = ()) -> Results | None:
    """Does the tasks for one member.

    Args:
      params: the member's.
      n: the step that they are of.
      workdir: the member's, where pictures go.
      stop: asked again and again, whether to leave it at that.
      names: of the tasks; default: all.

    Returns:
      None: stopped.
    """
    evaluation = Evaluation(self._run, params, n, self._tokenizer, None,
                            workdir, self._programs)
    results, items = Results({}, []), {}
    for name in names or self._names:
      printed = io.StringIO()
      try:
        with self._run.context(), progress.inside_a_run(
            stop), contextlib.redirect_stdout(printed):
          figures = evals.run(name, evaluation)
      except progress.Stopped:
        return None
      results.figures.update(numbers_of(figures, name))
      if 'items' in figures:
        items[name] = {'items': figures['items']}
      # The fractions, not the counts.
      fractions = [f'{key.replace("_", " ")} {held_out.shown(value)}'
                   for key, value in figures.items()
                   if isinstance(value, numbers.Real)
                   and not isinstance(value, numbers.Integral)]
      results.lines.append(f'{name}: {"  ".join(fractions)}' if fractions
                           else printed.getvalue().rstrip())
    if items:
      evals.write(workdir / evals.ITEMS, {'step': n} | items)
    return results


def numbers_of(figures: Mapping[str, Any], prefix: str) -> dict[str, float]:
  """Returns the numbers among figures, also of groups: {'labels/f1': 0.5}."""
  flat = {}
  for name, value in figures.items():
    if isinstance(value, Mapping):
      flat |= numbers_of(value, f'{prefix}/{name}')
    elif isinstance(value, numbers.Real):
      flat[f'{prefix}/{name}'] = value
  return flat
