"""check: every point validated and counted before anything runs; of a study,
its phases and what they cost."""

import argparse
import json
import re
import subprocess
import sys
import tempfile

from architectures.parts import flat
from common.errors import require
from common.fields import check_number
from tools.compare import cost, layout, spec
from training import plugins, progress, runs
from training.costs import systems
from training.workdir import run_config

# What only a sweep's file is read with, or only a study's.
_OF_A_SWEEP = ('seeds', 'match', 'match_field', 'time')
_OF_A_STUDY = ('amend', 'anyway')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_file_arguments(parser)
  parser.add_argument('--workdir', default='', help='write sweep.json here; of '
                      'a study that has run in part: take the hours from it')
  parser.add_argument('--time', action='store_true', help='of a sweep: time a '
                      'few steps of each point on this machine')
  parser.add_argument('--json', action='store_true', help='of a sweep: print '
                      'JSON')


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
  """What `check` and `run` alike are told of a file and of the machine."""
  parser.add_argument('file', help='of configs/sweeps/ or configs/studies/')
  parser.add_argument('--seeds', type=int, default=0, help='of a sweep, how '
                      'many: 0, 1, ...; default: the file\'s, or 3')
  parser.add_argument('--match', default='', choices=('', *spec.MATCH),
                      help='of a sweep: give every point the base\'s cost')
  parser.add_argument('--match_field', default='', help='the field that is '
                      f'solved for it; default: {spec.MATCH_FIELD}')
  parser.add_argument('--parallel', type=int, default=1,
                      help='processes at once (%(default)s)')
  parser.add_argument('--group', type=int, default=8, help='how many runs that '
                      'differ in numbers alone train as one program at most; '
                      '1: each as its own (%(default)s)')


def check_arguments(args) -> bool:
  """Raises RequestError for numbers that cannot be and for flags that the file
  is not read with; returns whether it is a study's."""
  for name, most in (('parallel', 512), ('group', 100_000)):
    check_number(f'--{name}', getattr(args, name), (('>=', 1), ('<=', most)))
  study = spec.is_study(args.file)
  for flag in _OF_A_SWEEP if study else _OF_A_STUDY:
    require(not getattr(args, flag, None), f'--{flag} is of a '
            f'{"sweep" if study else "study"}, and {args.file} is none: leave '
            'it out')
  return study


def main(args) -> int:
  if check_arguments(args):
    from tools.compare import study
    return study.check(args)
  if args.workdir:
    layout.try_folder(args.workdir)
  description = describe(args)
  if args.workdir:  # only once all is well
    with layout.Ledger(args.workdir) as ledger, ledger.transaction():
      layout.save_description(args.workdir, description)
  if args.time:
    for row in progress.each(description['points'], 'points timed'):
      row['seconds'] = _seconds(description, row)
  print(json.dumps(description, indent=2) if args.json
        else table(description))
  return 0


def describe(args) -> dict:
  """Returns the description of the sweep that sweep.json holds.

  Args:
    args: as add_file_arguments defines them.

  Raises:
    RequestError: for the first bad point.
  """
  cost.off_devices()
  sweep = spec.read_sweep_file(args.file, args.seeds)
  field = args.match_field or spec.MATCH_FIELD
  require(bool(args.match) or not args.match_field, f'--match_field is '
          f'{args.match_field}, but nothing is matched: pass --match, of '
          f'{", ".join(spec.MATCH)}')
  if args.match:
    sweep = cost.match(sweep, args.match, field)
  return {
      'name': sweep.name, 'file': sweep.file, 'match': args.match,
      'match_field': field if args.match else '',
      'base': sweep.base_name,
      'base_config': sweep.base.to_dict(),
      'paired': not any(key.startswith(spec.BATCHES) for point in sweep.points
                        for key in point.changes),
      'sources': cost.contents(map(sweep.config, sweep.points)),
      'files': dict(plugins.loaded),
      'points': [_row(sweep, point)
                 for point in progress.each(sweep.points, 'points checked')]}


def _seconds(description: dict, row: dict) -> float:
  """Returns how long a run of a point takes here, by a dry run of it.

  Raises:
    RequestError: where that failed, with its last line.
  """
  words = layout.train_command(description, tempfile.gettempdir(), row['name'],
                               row['seeds'][0])
  ran = subprocess.run([sys.executable, *words, '--dry_run'],
                       capture_output=True, text=True)
  seconds = re.search(r'^about ([\d,]+) s in all', ran.stdout, re.M)
  require(ran.returncode == 0 and seconds is not None, f'point {row["name"]!r} '
          f'cannot be timed: {ran.stderr.strip().rpartition(chr(10))[2]}')
  return float(seconds[1].replace(',', ''))


def _row(sweep: spec.Sweep, point: spec.Point) -> dict:
  config = sweep.config(point)
  with spec.naming(f'point {point.name!r}'):
    cost.check(config, point.changes)
    figures = cost.of(config)
    require(bool(config.eval.every_steps or config.eval.tasks
                 or sweep.owed(point)), 'eval.every_steps is 0 and no task is '
            'done, so there would be nothing to compare: set it, to '
            'train.steps for one held-out loss after the last step, or name '
            'a task in TASKS')
  model = cost.resolved(config)
  before, after = (run_config.flatten({'model': flat.as_dict(of)})
                   for of in (cost.resolved(sweep.base), model))
  # Model fields that were left open and that a change resolves otherwise.
  aside = {*point.changes, *(f'model.{name}' for name in flat.unread(model))}
  follows = {key: [before.get(key, ''), value] for key, value in after.items()
             if value != before.get(key, '') and key not in aside
             and not ('model.kinds' in aside and key.startswith('model.kinds.')
                      )}
  return {
      'name': point.name, 'changes': dict(point.changes),
      'matched': list(point.matched), 'follows': follows,
      'unlike': systems.line(runs.resolve_alone(config))
                if 'model.arch' in point.changes else '',
      **figures._asdict(), 'seeds': list(sweep.seeds),
      'tasks': list(sweep.owed(point))}


def table(description: dict) -> str:
  """Costs of all points, then how each differs from the base."""
  points = description['points']
  base = next(p for p in points if p['name'] == description['base'])
  ratio = lambda point, figure: f'{point[figure] / base[figure] - 1:+.2%}'
  lines = layout.columns([
      ('point', 'params', 'vs base', 'active', 'vs base', 'FLOPs/token',
       'vs base', 'tokens', 'FLOPs'),
      *((p['name'], f'{p["params"]:,}', ratio(p, 'params'),
         f'{p["active_params"]:,}', ratio(p, 'active_params'),
         f'{p["flops_per_token"]:,.0f}', ratio(p, 'flops_per_token'),
         f'{p["tokens"]:,}', f'{p["tokens"] * p["flops_per_token"]:.3g}')
        for p in points)])
  width = max(len(point['name']) for point in points)
  lines += ['', f'differences from {base["name"]}:']
  lines += [f'  {point["name"].ljust(width)}  '
            f'{_differences(description, point)}'
            for point in points if point is not base]
  lines += ['', f'{len(points)} points, {len(points[0]["seeds"])} seeds each: '
            f'{sum(len(p["seeds"]) for p in points)} runs']
  if 'seconds' in points[0]:
    total = sum(p['seconds'] * len(p['seeds']) for p in points)
    lines += ['a run here takes ' + ', '.join(
        f'{progress.clock(p["seconds"])} ({p["name"]})' for p in points),
              f'all runs, one after another: some {progress.clock(total)}; as '
              'one program or beside others (--parallel) they take less']
  if not description['paired']:
    lines.append('warning: points differ in data.*, objective, span.* or '
                 'probe.*, so a seed does not give all of them the same '
                 'batches')
  lines += [f'{point["name"]}: {point["unlike"]}' for point in points
            if point['unlike']]
  return '\n'.join(lines)


def _differences(description: dict, point: dict) -> str:
  base = run_config.flatten(description['base_config'])
  changes = [f'{key}={_short(value)}' + ' (matched)' * (key in point['matched'])
             for key, value in point['changes'].items()
             if key not in base or value != base[key]]  # a new kind of layer
  return ', '.join([*changes, *(
      f'so {key} {_short(old)} -> {_short(new)}'
      for key, (old, new) in point['follows'].items())])


def _short(value) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)
