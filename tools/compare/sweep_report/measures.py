"""What the tasks found, point by point: those that a run owed once it was
trained, or did in its training (eval.tasks)."""

from collections.abc import Mapping
from typing import Any

from tools.compare.pages.tables import Cell, Table
from tools.compare import statistics
from tools.compare.sweep_report.curves import Point, Run, Sweep
from tools.compare.sweep_report.tables import difference, mean_cell
from training import evals


def of_run(run: Run) -> dict[str, float]:
  """Returns the fractions that tasks found of a run after its last step, as
  TASK/FIGURE; counts, groups of figures and curves are left out."""
  found = {}
  for row in run.rows:
    if row['split'] == 'eval' and row['step'] == run.config['train.steps']:
      tasks = evals.listed(run.config['eval.tasks'])
      found |= {name: value for name, value in row.items()
                if type(value) is float
                and any(_is_own(task, name) for task in tasks)}
  for task, figures in run.evaluations.items():
    if isinstance(figures, Mapping):
      found |= {f'{task}/{name}': value for name, value in figures.items()
                if type(value) is float}
  return found


def _is_own(task: str, name: str) -> bool:
  """Whether a name of metrics.jsonl is one of a task's own figures, and not of
  a group of them, whose names are joined there by a slash, too."""
  if name.rpartition('/')[0] == task:
    return True
  row = evals.TASKS.get(task.partition(':')[0])  # None: of another version
  beside = row and row.beside
  return beside is not None and name.startswith(f'{task}/') and (
      name[len(task) + 1:].partition('/')[0] not in beside)


def of_point(point: Point) -> dict[str, dict[int, float]]:
  """Returns {figure: {seed: value}} of the seeds that have it."""
  found: dict[str, dict[int, float]] = {}
  for seed, run in point.runs.items():
    for name, value in of_run(run).items():
      found.setdefault(name, {})[seed] = value
  return found


def table(sweep: Sweep) -> Table:
  """Each figure and its difference from the base; no rows where there are no
  figures. Whether more is better, the figure's name says to who reads it."""
  by_point = {point.name: of_point(point) for point in sweep.points}
  names = list(dict.fromkeys(
      name for found in by_point.values() for name in found))
  columns = [('variant', 'name of the point')]
  for name in names:
    columns += [
        (name, 'after the last step: mean over seeds, and their standard '
         'deviation; of two seeds, from one to the other'),
        (f'{name}, minus base', 'mean over paired seeds, and its 95 % '
         'interval; of two pairs, from one to the other')]
  base = by_point[sweep.base.name]
  rows = []
  for point in sweep.points:
    cells = [Cell(point.name, point.name)]
    for name in names:
      values = by_point[point.name].get(name, {})
      cells.append(mean_cell(list(values.values())))
      apart = statistics.paired(values, base.get(name, {}))
      cells.append(Cell('base', 0.0) if point is sweep.base
                   else difference(apart))
    rows.append(cells)
  return Table(columns, rows if names else [])


def lines(sweep: Sweep) -> Table:
  """The same for a terminal, which is narrow: a line for each figure of each
  point."""
  wide = table(sweep)
  rows = [(Cell(wide.columns[i][0]), row[0], row[i], row[i + 1])
          for i in range(1, len(wide.columns), 2) for row in wide.rows]
  return Table(tuple((name, '') for name in (
      'what the tasks found', 'variant', 'mean', 'minus base')), rows)


def record(sweep: Sweep, point: Point) -> dict[str, Any]:
  """Returns the figures of a point for a sheet: means, and differences from
  the base with their intervals; None where not known."""
  names = dict.fromkeys(
      name for p in sweep.points for name in of_point(p))
  ours, base = of_point(point), of_point(sweep.base)
  found: dict[str, Any] = {}
  for name in names:
    values = ours.get(name, {})
    apart = statistics.paired(values, base.get(name, {}))
    found[name] = statistics.interval(
        list(values.values())).mean if values else None
    found[f'{name}_difference'] = apart.mean if apart else None
    found[f'{name}_low'] = apart.low if apart else None
    found[f'{name}_high'] = apart.high if apart else None
  return found
