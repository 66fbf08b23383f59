"""What is said of a config that differs from that of the run in a workdir."""

from collections.abc import Callable
from typing import Any

from etils import epath

from configs.errors import RequestError
from training.workdir import restoring, step_folders
from training.workdir.change_kinds import INCOMPATIBLE, SAFE
from training.workdir.run_config import MISSING, Change


def refuse(changes: list[Change], allow_config_change: bool,
           some_fit: Callable[[], bool] = lambda: False,
           workdir: epath.Path | None = None):
  """Raises ValueError where changes need --allow_config_change and lack it.

  Args:
    changes: from the run's config.
    allow_config_change: whether the flag is there.
    some_fit: whether a new run could take some of its parameters.
    workdir: that of the run.
  """
  grave = [change for change in changes if change.kind != SAFE]
  if grave and not allow_config_change:
    raise RequestError(
        'the config differs from that of the run in this workdir in fields '
        f'that matter:\n{table(changes)}\n'
        + (way_on(changes, some_fit) or _other_ways(workdir)))


def _other_ways(workdir: epath.Path | None) -> str:
  if workdir and _is_import(workdir):
    return (f'Pass --allow_config_change to train the weights in {workdir}. '
            'Another --workdir starts from random parameters, unless '
            f'--config.init_from={workdir} is added')
  return 'Take another --workdir, or pass --allow_config_change to go on'


def way_on(changes: list[Change], some_fit: Callable[[], bool]) -> str:
  """Says what there is to do where a run cannot go on with `changes`, by their
  kinds; '' where none is incompatible. `some_fit` is as for refuse_changes."""
  names = [c.name for c in changes if c.kind == INCOMPATIBLE]
  if not names:
    return ''
  sentence = (f'Take another --workdir: a run cannot go on with another '
              f'{", ".join(names)}')
  return sentence + (
      '. To begin a new run with those parameters of this one whose names and '
      'shapes match, pass --config.init_from=WORKDIR and '
      '--config.init_partial=True' if some_fit() else '')


def _is_import(workdir: epath.Path) -> bool:
  """Whether a workdir holds weights that no run in it has trained."""
  folder = restoring.directory(workdir)
  return step_folders.finished(folder) == [0] and restoring.parameters_alone(
      restoring.arrays(folder, 0))


def table(changes: list[Change]) -> str:
  """Renders changes for a terminal: field, old, new, class, why."""
  rows = [('field', 'old', 'new', 'class', 'why')]
  rows += [(c.name, _short(c.old), _short(c.new), c.kind, c.why)
           for c in changes]
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join(
      '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
      for row in rows)


def _short(value: Any) -> str:
  text = value if value is MISSING else repr(value)
  return text if len(text) <= 32 else text[:29] + '...'
