"""status: how far each point of a sweep is, as a table that keeps itself up to
date on a terminal, and as plain text elsewhere; or each phase of a study."""

import argparse
import collections
import contextlib
import json
import sys
import time

from tools.compare import layout, statistics, tables
from tools.compare import ledger as ledger_lib

SECONDS = 2  # between two looks
HEADINGS = ('point', 'runs', 'trained', 'held-out loss', 'vs base',
            'corrected p')  # by Holm over the points, as in a report


def add_arguments(parser: argparse.ArgumentParser) -> None:
  layout.add_workdir(parser)
  parser.add_argument('--once', action='store_true',
                      help='print the table once, and leave')
  parser.add_argument('--json', action='store_true',
                      help='print every run as JSON, and leave')


def main(args) -> int:
  workdir = layout.workdir_of(args)
  if layout.is_study(workdir):
    return _study(workdir, args.json)
  description = layout.load_description(workdir)
  with ledger_lib.Ledger(workdir) as ledger:
    if args.json:
      print(json.dumps(figures(description, workdir, ledger.runs()), indent=2))
    elif args.once or not sys.stdout.isatty():
      print(plain(description, workdir, ledger.runs()))
    else:
      with contextlib.suppress(KeyboardInterrupt):
        _live(description, workdir, ledger)
  return 0


def _study(workdir, as_json: bool) -> int:
  from tools.compare import costs, results
  from tools.compare import frozen as frozen_lib
  frozen = frozen_lib.load(workdir)
  phases = []
  for cost in costs.of(frozen, 1, None):
    runs = results.rows(workdir, cost.phase)
    phases.append({
        'phase': cost.phase, 'planned': cost.runs, 'told': states(runs),
        'states': dict(collections.Counter(run.state for run in runs)),
        'failed': _failed(runs)})
  if as_json:
    print(json.dumps({'study': frozen.plan.name, 'plan': frozen.hash,
                      'phases': phases}, indent=2))
    return 0
  print(f'study {frozen.plan.name}, plan {frozen.hash}')
  for row in phases:
    print(f'{row["phase"]:<8} {row["told"] or "not begun"}, '
          f'{row["planned"]} planned at most')
    for line in row['failed']:
      print(f'  {line}')
  return 0


def figures(description: dict, workdir, runs: list) -> dict:
  """Returns the table, and every run as the ledger has it."""
  return {'sweep': description['name'], 'file': description['file'],
          'points': [dict(zip(HEADINGS, row)) for row in rows(
              description, workdir, runs)],
          'runs': [run._asdict() for run in runs]}


def rows(description: dict, workdir, runs: list) -> list[tuple[str, ...]]:
  """Returns a row of HEADINGS for each point, the base first."""
  by_point = collections.defaultdict(list)
  for run in runs:
    by_point[run.point].append(run)
  points = sorted(description['points'],
                  key=lambda p: p['name'] != description['base'])
  finals: dict[str, dict[int, float]] = {}
  table = []
  for point in points:
    shares, losses = [], {}
    steps = layout.config(description, point['name'], 0).train.steps
    for run in by_point[point['name']]:
      folder = layout.run_folder(workdir, run.point, run.seed)
      trained = layout.metrics(folder, 'train')
      shares.append(trained[-1]['step'] / steps if trained else 0.0)
      held_out = [row for row in layout.metrics(folder, 'eval')
                  if row['step'] == steps and row.get('loss') is not None]
      if held_out:
        losses[run.seed] = held_out[-1]['loss']
    finals[point['name']] = losses
    # Paired: each seed against the base's same seed.
    apart = statistics.differences(losses, finals[description['base']])
    table.append((
        point['name'], states(by_point[point['name']]),
        f'{_mean(shares):.0%}' if shares else '',
        f'{_mean(losses.values()):.4f}' if losses else '',
        f'{_mean(apart):+.4f}' if apart and len(table) else ''))
  base = finals.pop(description['base'])
  tests = statistics.beside_the_base(list(finals.values()), base)
  return [(*row, '' if p is None else tables.p_value(p).text)
          for row, (_, p) in zip(table, [(None, None), *tests])]


def states(runs: list) -> str:
  """Returns '2 done, 1 running'."""
  counts = collections.Counter(run.state for run in runs)
  return ', '.join(f'{counts[state]} {state}'
                   for state in reversed(ledger_lib.STATES) if counts[state])


def _failed(runs: list) -> list[str]:
  return [f'{run.point}, seed {run.seed}: {run.error}' for run in runs
          if run.state == ledger_lib.FAILED]


def footer(runs: list) -> list[str]:
  """All runs in one line, and why some failed."""
  return [f'{len(runs)} runs: {states(runs)}{_left(runs)}',
          *(f'failed: {line}' for line in _failed(runs))]


def plain(description: dict, workdir, runs: list) -> str:
  table = [HEADINGS, *rows(description, workdir, runs)]
  return '\n'.join([*layout.columns(table, left=2), '', *footer(runs)])


def _live(description: dict, workdir, ledger) -> None:
  """Redraws the table until no run is waiting or under way."""
  from rich import live, table, text

  def draw(runs):
    grid = table.Table(title=f'{description["name"]}  {workdir}',
                       caption=text.Text('\n'.join(footer(runs))),
                       caption_justify='left')
    for i, heading in enumerate(HEADINGS):
      grid.add_column(heading, justify='left' if i < 2 else 'right')
    for row in rows(description, workdir, runs):
      grid.add_row(*row)
    return grid

  runs = ledger.runs()
  with live.Live(draw(runs), auto_refresh=False,
                 vertical_overflow='visible') as screen:
    while not all(run.state in ledger_lib.ENDED for run in runs):
      time.sleep(SECONDS)
      runs = ledger.runs()
      screen.update(draw(runs), refresh=True)


def _left(runs: list) -> str:
  """Returns ', about 12 min left', by the runs that are done."""
  took = [run.seconds for run in runs
          if run.state == ledger_lib.DONE and run.seconds]
  left = [run for run in runs if run.state not in ledger_lib.ENDED]
  runners = sum(run.state == ledger_lib.RUNNING for run in runs)
  if not (took and left and runners):
    return ''
  minutes = _mean(took) * len(left) / runners / 60
  return f', about {minutes:.0f} min left'


def _mean(values) -> float:
  values = list(values)
  return sum(values) / len(values)
