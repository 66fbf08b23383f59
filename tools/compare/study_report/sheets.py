"""results.csv, every estimate in full, and runs.csv, every run."""

from collections.abc import Iterator
import csv
import io
import json
from typing import Any

from tools.compare import findings
from tools.compare.study_report.record import Record

ESTIMATES = ('phase', 'variant', 'measure', 'size', 'effect', 'low', 'high',
             'n', 'p', 'p_corrected', 'correction', 'verdict', 'diverged',
             'base_diverged', 'runs')
RUNS = ('phase', 'variant', 'size', 'workload', 'seed', 'measure', 'value',
        'diverged', 'loss', 'flops', 'seconds', 'params', 'changes')


def estimates(record: Record) -> str:
  """Returns a line for each effect, speed-up and trend."""
  return _sheet(ESTIMATES, _estimates(record))


def _estimates(record: Record) -> Iterator[dict[str, Any]]:
  for row in record.results['screen']:
    yield _kept(row) | dict(
        phase='screen', size=record.plan.sizes[0], p_corrected=row['q'],
        correction='Benjamini-Hochberg',
        verdict='passed' if row['passed'] else 'stopped')
  for row in record.results['confirm']:
    yield _kept(row) | dict(
        phase='confirm', size=findings.ALL, p_corrected=row['p_holm'],
        correction='Holm')
    of = dict(phase='confirm', variant=row['variant'])
    for own in row['sizes']:
      yield _kept(own) | of | dict(measure=row['measure'], effect=own['mean'])
    for own in row['speed_ups']:
      yield _kept(own) | of | dict(measure=f'speed-up by {own["by"]}',
                                   effect=own['factor'])
    if row['trend']:
      yield _kept(row['trend']) | of | dict(
          measure=f'trend of {row["measure"]}', size=findings.ALL,
          effect=row['trend']['slope'])


def _kept(row) -> dict[str, Any]:
  return {name: row[name] for name in ESTIMATES if name in row}


def runs(record: Record) -> str:
  """Returns a line for each measure of each run."""
  return _sheet(RUNS, (
      {name: getattr(run, name) for name in RUNS if hasattr(run, name)}
      | dict(measure=measure, value=value,
             changes=json.dumps(run.changes, sort_keys=True))
      for run in record.outcomes for measure, value in run.values.items()))


def _sheet(columns, rows) -> str:
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()
