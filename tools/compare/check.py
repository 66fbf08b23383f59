"""check: every point validated and counted before anything runs; of a study,
its phases and what they cost."""

import argparse
from collections.abc import Collection
import json
import pathlib
import subprocess
import sys

from configs.errors import EnvironmentFailure, RequestError, require
from tools.compare import cost, layout, spec
from tools.compare import ledger as ledger_lib
from training import limits, progress

# What only a sweep's file is read with, or only a study's; with its default.
_OF_A_SWEEP = {'seeds': 0, 'match': '', 'match_field': '', 'devices': 0,
               'topology': ''}
_OF_A_STUDY = {'time': False, 'until': 'report', 'amend': '', 'anyway': False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_file_arguments(parser)
  parser.add_argument('--workdir', default='', help='write sweep.json here; of '
                      'a study that has run in part: take the hours from it')
  parser.add_argument('--topology', default='', help='of a sweep: compile each '
                      'point for it through tools.plan, as v5e:4x4')
  parser.add_argument('--time', action='store_true', help='of a study: train '
                      'the base for some steps at each size, to say the hours')
  parser.add_argument('--json', action='store_true', help='print JSON')


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
  """What `check` and `run` alike are told of a file and of the machine."""
  parser.add_argument('file', help='of configs/sweeps/ or configs/studies/')
  parser.add_argument('--seeds', type=int, default=0, help='of a sweep, how '
                      'many: 0, 1, ...; default: the file\'s, or 3')
  parser.add_argument('--match', default='', choices=('', *spec.MATCH),
                      help='of a sweep: give every point the base\'s cost')
  parser.add_argument('--match_field', default='', help='the field that is '
                      f'solved for it; default: {spec.MATCH_FIELD}')
  parser.add_argument('--devices', type=int, default=0, help='of a sweep: to '
                      'lay a run over; default: as few as its mesh allows')
  parser.add_argument('--parallel', type=int, default=1,
                      help='processes at once (%(default)s)')
  parser.add_argument('--group', type=int, default=8, help='how many runs that '
                      'differ in numbers alone train as one program at most; '
                      '1: each as its own (%(default)s)')


def check_arguments(args) -> bool:
  """Raises RequestError for numbers that cannot be and for flags that the file
  is not read with; returns whether it is a study's."""
  for name, most in (('parallel', 512), ('group', 100_000)):
    limits.number(f'--{name}', getattr(args, name), (('>=', 1), ('<=', most)))
  study = spec.is_study(args.file)
  others, kind = (_OF_A_SWEEP, 'sweep') if study else (_OF_A_STUDY, 'study')
  for flag, unset in others.items():
    require(getattr(args, flag, unset) == unset, f'--{flag} is of a {kind}, '
            f'and {args.file} is none: leave it out')
  return study


def main(args) -> int:
  if check_arguments(args):
    from tools.compare import study
    return study.check(args)
  if args.workdir:
    layout.try_folder(args.workdir)
  description = describe(args)
  points = description['points']
  plans = ([_plan(description, point, args.topology) for point in points]
           if args.topology else [])
  if args.workdir:  # only once all is well; the plans are not kept
    save(args.workdir, description)
  for point, plan in zip(points, plans):
    point['plan'] = plan
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
  from training.workdir import run_config
  cost.off_devices()
  sweep = spec.read_sweep_file(args.file, args.seeds)
  spec.refuse_names_alone(sweep)
  field = args.match_field or spec.MATCH_FIELD
  require(bool(args.match) or not args.match_field, f'--match_field is '
          f'{args.match_field}, but nothing is matched: pass --match, of '
          f'{", ".join(spec.MATCH)}')
  if args.match:
    sweep = cost.match(sweep, args.match, field)
  base = cost.of(sweep.base)
  return {
      'name': sweep.name, 'file': sweep.file, 'match': sweep.match,
      'match_field': field if args.match else '',
      'base': sweep.base_name,
      'base_config': run_config.to_json(sweep.base),
      'paired': not any(key.startswith(spec.BATCHES) for point in sweep.points
                        for key in point.changes),
      'points': [_row(sweep, point, base, args.devices)
                 for point in progress.each(sweep.points, 'points checked')]}


def _row(sweep, point, base: cost.Cost, devices: int) -> dict:
  from architectures.parts import tables
  from training import runs
  config = sweep.config(point)
  try:
    cost.check(config, point.changes)
    unread = tables.unread(runs.resolve_alone(config))
    figures = cost.of(config)
    nbytes = cost.bytes_per_device(config, devices)
    require(bool(config.eval.every_steps or config.eval.tasks
                 or sweep.owed(point)), 'eval.every_steps is 0 and no task is '
            'done, so there would be nothing to compare: set it, to '
            'train.steps for one held-out loss after the last step, or name '
            'a task in TASKS')
  except RequestError as error:
    raise RequestError(f'point {point.name!r}: {error}') from error
  return {
      'name': point.name, 'changes': dict(point.changes),
      'matched': list(point.matched),
      'follows': _follows(point, figures, base, unread),
      'params': figures.params, 'active_params': figures.active_params,
      'flops_per_token': figures.flops_per_token, 'tokens': figures.tokens,
      'bytes_per_device': nbytes['peak'], 'bytes_by_part': nbytes,
      'seeds': list(sweep.seeds), 'tasks': list(sweep.owed(point))}


def _follows(point, figures: cost.Cost, base: cost.Cost,
             unread: Collection[str]) -> dict:
  """Model fields that were left open and that a change resolves otherwise,
  without those that the point's model does not read (`unread`):
  {key: [of the base, of the point]}."""
  return {key: [base.model.get(key, ''), value]
          for key, value in figures.model.items()
          if value != base.model.get(key, '')
          and not spec.sets(point.changes, key)
          and key.removeprefix('model.') not in unread}


def save(workdir, description: dict) -> None:
  """Writes sweep.json; points and seeds may be added to one that is there.

  Raises:
    RequestError: where the workdir holds another sweep.
  """
  # Another `run` may add to it at the same time: one after the other.
  with ledger_lib.Ledger(workdir) as ledger, ledger.transaction():
    if (pathlib.Path(workdir) / 'sweep.json').exists():
      old = layout.load_description(workdir)
      told = layout.unlike(old, description)
      names = {row['name'] for row in description['points']}
      told += [f'point {row["name"]!r} is gone' for row in old['points']
               if row['name'] not in names]
      require(not told, f'{workdir} holds another sweep: {"; ".join(told)}; '
              'take another --workdir')
      description = layout.merged(old, description)
    layout.save_description(workdir, description)


def _plan(description: dict, point: dict, topology: str) -> dict:
  """Returns what tools.plan says of a point."""
  command = [sys.executable, '-m', 'tools.plan', '--json',
             f'--topology={topology}', '--config', description['file'],
             *layout.flags(point['changes'])]
  result = subprocess.run(command, capture_output=True, text=True)
  if result.returncode:
    said = result.stderr.strip().splitlines() or ['it said nothing']
    kind = RequestError if result.returncode == 2 else EnvironmentFailure
    raise kind(f'point {point["name"]!r}, tools.plan: '
               f'{said[-1].removeprefix("error: ")}')
  return json.loads(result.stdout[result.stdout.index('{'):])


COLUMNS = (
    ('point', lambda p, base: p['name']),
    ('params', lambda p, base: f'{p["params"]:,}'),
    ('vs base', lambda p, base: _ratio(p, base, 'params')),
    ('active', lambda p, base: f'{p["active_params"]:,}'),
    ('vs base', lambda p, base: _ratio(p, base, 'active_params')),
    ('FLOPs/token', lambda p, base: f'{p["flops_per_token"]:,.0f}'),
    ('vs base', lambda p, base: _ratio(p, base, 'flops_per_token')),
    ('tokens', lambda p, base: f'{p["tokens"]:,}'),
    ('FLOPs', lambda p, base: f'{p["tokens"] * p["flops_per_token"]:.3g}'),
    ('est. MiB/device', lambda p, base:
     f'{p["bytes_per_device"] / 2**20:,.1f}'),
)


def table(description: dict) -> str:
  """Costs of all points, then how each differs from the base."""
  points = description['points']
  base = next(p for p in points if p['name'] == description['base'])
  lines = layout.columns([
      [heading for heading, _ in COLUMNS],
      *([cell(point, base) for _, cell in COLUMNS] for point in points)])
  width = max(len(point['name']) for point in points)
  lines += ['', f'differences from {base["name"]}:']
  lines += [f'  {point["name"].ljust(width)}  '
            f'{_differences(description, point)}'
            for point in points if point is not base]
  seeds = points[0]['seeds']
  lines += ['', f'{len(points)} points, {len(seeds)} seed'
            f'{"s" * (len(seeds) != 1)} each: '
            f'{sum(len(p["seeds"]) for p in points)} runs',
            'est. MiB/device is of one run: runs that train as one program '
            'need it each, up to --group of them on a device']
  if not description['paired']:
    lines.append('warning: points differ in data.*, objective, span.* or '
                 'probe.*, so a seed does not give all of them the same '
                 'batches')
  if held_out := layout.held_out_note(point['changes'] for point in points):
    lines.append(f'warning: {held_out}')
  lines += [f'{point["name"]}: {said}' for point in points
            for said in [_unlike(description, point)] if said]
  for point in points:
    if 'plan' in point:
      lines.append(f'{point["name"]}: {_plan_line(point["plan"])}')
  return '\n'.join(lines)


def _ratio(point, base, figure: str) -> str:
  return f'{point[figure] / base[figure] - 1:+.2%}'


def _differences(description, point) -> str:
  from training.workdir import run_config
  base = run_config.flatten_dict(description['base_config'])
  told = [f'{key}={_short(value)}' + ' (matched)' * (key in point['matched'])
          for key, value in point['changes'].items()
          if key not in base or value != base[key]]  # a new kind of layer
  told += [f'so {key} {_short(old)} -> {_short(new)}'
           for key, (old, new) in point['follows'].items()]
  return ', '.join(told)


def _unlike(description, point) -> str:
  """Says of a point that sets model.arch where it is not that system."""
  from training.costs import systems as published
  from training.costs import totals
  if 'model.arch' not in point['changes']:
    return ''
  config = layout.config(description, point['name'],
                         description['base_config']['seed'])
  return published.line(totals.resolved(config))


def _short(value) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def _plan_line(plan: dict) -> str:
  """What tools.plan found, in a line; --json has all of it."""
  told = [f'fits {plan["topology"]}']
  for program in plan['programs']:
    memory = program['memory']
    peak, hbm = memory['peak'] / 2**30, memory['hbm'] / 2**30
    told.append(f'{program["program"]} peaks at {peak:.2f} of {hbm:.2f} GiB a '
                'device' + ', by estimate' * program['estimate'])
  return ', '.join(told)
