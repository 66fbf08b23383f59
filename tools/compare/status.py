"""status: how far each point of a sweep is, or each phase of a study."""

import argparse
import collections
import json

from tools.compare import layout

HEADINGS = ('point', 'runs', 'trained', 'held-out loss', 'vs base')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  layout.add_workdir(parser)
  parser.add_argument('--json', action='store_true',
                      help='print every run as JSON')


def main(args) -> int:
  workdir = layout.workdir_of(args)
  if layout.is_study(workdir):
    return _study(workdir, args.json)
  description = layout.load_description(workdir)
  runs = layout.ledger_runs(workdir)
  if args.json:
    print(json.dumps({
        'sweep': description['name'], 'points': [
            dict(zip(HEADINGS, row)) for row in rows(
                description, workdir, runs)],
        'runs': [run._asdict() for run in runs]}, indent=2))
  else:
    table = [HEADINGS, *rows(description, workdir, runs)]
    print(*layout.columns(table, left=2), '',
          f'{len(runs)} runs: {states(runs)}',
          *(f'failed: {line}' for line in failed(runs)), sep='\n')
  return 0


def _study(workdir, as_json: bool) -> int:
  from tools.compare import plan, results
  frozen = plan.load(workdir)
  phases = [(cost, [run for folder in results.folders(workdir, cost.phase)
                    for run in layout.ledger_runs(folder)])
            for cost in results.costs(frozen, 1, None)]
  if as_json:
    print(json.dumps({
        'study': frozen.plan.name, 'plan': frozen.hash, 'phases': [
            {'phase': cost.phase, 'planned': cost.runs,
             'states': collections.Counter(run.state for run in runs),
             'failed': failed(runs)} for cost, runs in phases]}, indent=2))
    return 0
  print(f'study {frozen.plan.name}, plan {frozen.hash}, frozen on '
        f'{plan.date(frozen.time)}')
  width = max(len(cost.phase) for cost, _ in phases)
  for cost, runs in phases:
    print(f'{cost.phase:<{width}} {states(runs) or "not begun"}, {cost.runs} '
          'planned at most')
    for line in failed(runs):
      print(' ' * width, f'failed: {line}')
  return 0


def rows(description: dict, workdir, runs: list) -> list[tuple[str, ...]]:
  """Returns a row for each point, the base first: its states, how much of it
  is trained, its mean held-out loss, and that minus the base's, seed by seed.
  """
  by_point = collections.defaultdict(list)
  for run in runs:
    by_point[run.point].append(run)
  base: dict[int, float] = {}
  table = []
  for point in sorted(description['points'],
                      key=lambda p: p['name'] != description['base']):
    name, shares, losses = point['name'], [], {}
    steps = layout.config(description, name, 0).train.steps
    for run in by_point[name]:
      folder = layout.run_folder(workdir, run.point, run.seed)
      trained = layout.metrics(folder, 'train')
      shares.append(trained[-1]['step'] / steps if trained else 0.0)
      for row in layout.metrics(folder, 'eval'):
        if row['step'] == steps and row.get('loss') is not None:
          losses[run.seed] = row['loss']
    apart = [loss - base[seed] for seed, loss in losses.items() if seed in base]
    base = base if table else losses
    table.append((name, states(by_point[name]), _mean(shares, '.0%'),
                  _mean(losses.values(), '.4f'), _mean(apart, '+.4f')))
  return table


def states(runs: list) -> str:
  """Returns '2 done, 1 running'."""
  counts = collections.Counter(run.state for run in runs)
  return ', '.join(f'{counts[state]} {state}'
                   for state in reversed(layout.STATES) if counts[state])


def failed(runs: list) -> list[str]:
  return [f'{run.point}, seed {run.seed}: {run.error}' for run in runs
          if run.state == layout.FAILED]


def _mean(values, form: str) -> str:
  values = list(values)
  return format(sum(values) / len(values), form) if values else ''
