"""check: every point validated and counted before anything runs."""

import argparse
from collections.abc import Collection
import json
import pathlib
import subprocess
import sys

from configs.errors import EnvironmentFailure, RequestError, require
from tools.compare import commands, cost, layout, matching, spec, systems
from tools.compare import ledger as ledger_lib
from training import progress


# Fields by which a batch is made: points that differ in one share no batches.
BATCHES = ('data.', 'objective', 'span.', 'probe.')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_sweep_arguments(parser)
  parser.add_argument('--workdir', default='', help='write sweep.json here')
  parser.add_argument('--topology', default='', help='compile each point for '
                      'it through tools.plan, as v5e:4x4')
  parser.add_argument('--json', action='store_true', help='print JSON')


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
  """What `check` and `run` alike are told of the sweep."""
  parser.add_argument('file', help='of configs/sweeps/')
  parser.add_argument('--seeds', type=int, default=0,
                      help='how many: 0, 1, ...; default: the file\'s, or 3')
  parser.add_argument('--match', default='', choices=('', *matching.WHAT),
                      help='give every point the base\'s cost')
  parser.add_argument('--match_field', default='', help='the field that is '
                      f'solved for it; default: {matching.FIELD}')
  parser.add_argument('--devices', type=int, default=0, help='to lay a run '
                      'over; default: as few as its mesh allows')


def main(args) -> int:
  if args.workdir:
    layout.try_folder(args.workdir)
  description = describe(args, args.workdir)
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


def describe(args, workdir: str = '') -> dict:
  """Returns the description of the sweep that sweep.json holds.

  Args:
    args: as add_sweep_arguments defines them.
    workdir: of the sweep, which may have begun there.

  Raises:
    ValueError: for the first bad point.
  """
  from training.workdir import run_config
  cost.off_devices()
  sweep = spec.read_sweep_file(args.file, args.seeds)
  systems.refuse_names_alone(sweep, _held(workdir))
  field = args.match_field or matching.FIELD
  if args.match_field and not args.match:
    raise RequestError(f'--match_field is {args.match_field}, but nothing is '
                       f'matched: pass --match, of {", ".join(matching.WHAT)}')
  if args.match:
    sweep = matching.match(sweep, args.match, field,
                           lambda config: cost.figure(config, args.match))
  base = cost.of(sweep.base)
  description = {
      'name': sweep.name, 'file': sweep.file, 'match': sweep.match,
      'match_field': field if args.match else '',
      'base': sweep.base_name,
      'base_config': run_config.to_json(sweep.base),
      'paired': not any(key.startswith(BATCHES) for point in sweep.points
                        for key in point.changes),
      'points': [_row(sweep, point, base, args.devices)
                 for point in progress.each(sweep.points, 'points checked')]}
  _check_differences(sweep, description)
  return description


def _held(workdir: str) -> set[str]:
  """Returns the names of the points that a workdir has already."""
  if not workdir or not (pathlib.Path(workdir) / 'sweep.json').is_file():
    return set()
  return {row['name'] for row in layout.load_description(workdir)['points']}


def _row(sweep, point, base: cost.Cost, devices: int) -> dict:
  from architectures.parts import tables
  from training import limits, runs
  config = sweep.config(point)
  try:
    model = runs.resolve_alone(config)
    limits.refuse_unread_of(point.changes, config, model)
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
      'follows': _follows(point, figures, base, tables.unread(model)),
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


def _check_differences(sweep, description: dict) -> None:
  """Raises ValueError where a point, as its runs will get it out of JSON, is
  not what the file made of it, or differs from the base in a key that it did
  not declare: mistakes of this program alone. What a declared change makes of
  fields that were left open is no such difference: `follows` tells it."""
  from training.workdir import run_config
  base = run_config.flatten(run_config.from_json(description['base_config']))
  description = json.loads(json.dumps(description))
  for made, point in zip(sweep.points, description['points'], strict=True):
    config = run_config.flatten(
        layout.config(description, point['name'], base['seed']))
    made = run_config.flatten(sweep.config(made))
    undeclared = [
        key for key in config if config[key] != made.get(key) or (
            config[key] != base.get(key)
            and not spec.sets(point['changes'], key))]
    if undeclared:
      raise RequestError(f'point {point["name"]!r} differs from the base in '
                         f'{", ".join(undeclared)}, which it does not declare')


def save(workdir, description: dict) -> None:
  """Writes sweep.json; points may be added to one that is there, not changed.

  Raises:
    ValueError: where the workdir holds another sweep.
  """
  # Another `run` may add to it at the same time: one after the other.
  with ledger_lib.Ledger(workdir) as ledger, ledger.transaction():
    _merge(workdir, description)
    layout.save_description(workdir, description)


def _merge(workdir, description: dict) -> None:
  """Adds to the description the seeds that sweep.json has beyond it."""
  if (pathlib.Path(workdir) / 'sweep.json').exists():
    old = layout.load_description(workdir)
    for key in ('base', 'base_config', 'match', 'match_field'):
      _same(workdir, key, old[key], description[key])
    points = {point['name']: point for point in description['points']}
    for point in old['points']:
      name = point['name']
      if name not in points:
        raise RequestError(f'{workdir} holds a point {name!r}, which the sweep '
                           'no longer has: take another --workdir')
      _same(workdir, f'point {name!r}', point['changes'],
            points[name]['changes'])
      points[name]['seeds'] = sorted({*point['seeds'],
                                      *points[name]['seeds']})


def _same(workdir, what: str, old, new) -> None:
  new = json.loads(json.dumps(new))  # as the old: lists for tuples
  if old == new:
    return
  if what == 'base_config':
    from training.workdir import run_config
    old, new = run_config.flatten_dict(old), run_config.flatten_dict(new)
    what = 'the base, in ' + ', '.join(
        key for key in {**old, **new} if old.get(key) != new.get(key))
    told = 'differs'
  else:
    told = f'was {old!r} and is {new!r}'
  raise RequestError(f'{workdir} holds another sweep: {what} {told}; take '
                     'another --workdir')


def _plan(description: dict, point: dict, topology: str) -> dict:
  """Returns what tools.plan says of a point."""
  command = [sys.executable, '-m', 'tools.plan', '--json',
             f'--topology={topology}', '--config', description['file'],
             *commands.flags(point['changes'])]
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
  rows = [[heading for heading, _ in COLUMNS]]
  rows += [[cell(point, base) for _, cell in COLUMNS] for point in points]
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = ['  '.join(
      [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
      for row in rows]
  lines += ['', f'differences from {base["name"]}:']
  lines += [f'  {point["name"].ljust(widths[0])}  '
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
