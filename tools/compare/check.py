"""check: every point validated and counted before anything runs; of a study,
its phases and what they cost."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

from architectures.parts import flat
from common.errors import require
from common.fields import check_number
from tools.compare import cost, layout, spec
from training import plugins, progress, runs
from training.costs import systems
from training.workdir import run_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_file_arguments(parser)
  parser.add_argument('--workdir', default='', help='write sweep.json here; of '
                      'a study that has run in part: take the hours from it')
  add_flag_of_kind(parser, 'sweep', '--time', action='store_true',
                   help='time a few steps of each point on this machine')
  add_flag_of_kind(
      parser, 'sweep', '--json', action='store_true', help='print JSON')


def add_flag_of_kind(parser: argparse.ArgumentParser, whose: str, flag: str,
                     **how: Any) -> None:
  """Adds a flag that only the file of a sweep is read with, or only that of a
  study; `check_arguments` refuses it beside the other kind of file.

  Args:
    parser: the parser of a command.
    whose: 'sweep' or 'study'.
    flag: the name of the flag.
    **how: the keywords of `add_argument`.
  """
  how['help'] = f'of a {whose}: {how["help"]}'
  action = parser.add_argument(flag, **how)
  defaults = parser.get_default(whose) or {}
  parser.set_defaults(**{whose: defaults | {action.dest: action.default}})


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds what `check` and `run` alike are told of a file and of the machine."""
  parser.add_argument('file', help='of configs/sweeps/ or configs/studies/')
  add_flag_of_kind(parser, 'sweep', '--seeds', type=int, default=0,
                   help="how many: 0, 1, ...; default: the file's, or 3")
  add_flag_of_kind(
      parser, 'sweep', '--match', default='',
      choices=('', *spec.MATCHABLE_COSTS),
      help="give every point the base's cost")
  add_flag_of_kind(
      parser, 'sweep', '--match_field', default='',
      help='the field that is solved for it; default: '
      f'{spec.DEFAULT_MATCH_FIELD}')
  parser.add_argument('--parallel', type=int, default=1,
                      help='processes at once (%(default)s)')
  parser.add_argument('--group', type=int, default=8, help='how many runs that '
                      'differ in numbers alone train as one program at most; '
                      '1: each as its own (%(default)s)')


def check_arguments(args) -> bool:
  """Raises RequestError for numbers that cannot be and for flags that the file
  is not read with; returns whether it is a study's."""
  check_number('--parallel', args.parallel, (('>=', 1), ('<=', 512)))
  check_number('--group', args.group, (('>=', 1), ('<=', 100_000)))
  is_study = spec.is_study(args.file)
  whose = 'sweep' if is_study else 'study'
  for flag, default in getattr(args, whose, {}).items():
    require(getattr(args, flag) == default, f'--{flag} is of a {whose}, and '
            f'{args.file} is none: leave it out')
  return is_study


def main(args) -> int:
  if check_arguments(args):
    from tools.compare import study
    return study.check(args)
  if args.workdir:
    layout.check_workdir(args.workdir)
  description = describe_sweep(args)
  if args.workdir:  # only once all is well
    with layout.Ledger(args.workdir) as ledger, ledger.transaction():
      layout.save_sweep_description(args.workdir, description)
  if args.time:
    for row in progress.show_items(description['points'], 'points timed'):
      row['seconds'] = _seconds(description, row)
  if args.json:
    print(json.dumps(description, indent=2))
  else:
    print(render_cost_table(description))
  return 0


def describe_sweep(args) -> dict:
  """Returns the description of the sweep that sweep.json holds.

  Args:
    args: the arguments that add_file_arguments defines.

  Raises:
    RequestError: for the first bad point.
  """
  cost.keep_off_accelerators()
  sweep = spec.read_sweep_file(args.file, args.seeds)
  require(bool(args.match) or not args.match_field, f'--match_field is '
          f'{args.match_field}, but nothing is matched: pass --match, of '
          f'{", ".join(spec.MATCHABLE_COSTS)}')
  match_field = ''
  if args.match:
    match_field = args.match_field or spec.DEFAULT_MATCH_FIELD
    sweep = cost.match_costs(sweep, args.match, match_field)

  # Points that make their batches otherwise share none.
  paired = True
  for point in sweep.points:
    for key in point.changes:
      if key.startswith(spec.FIELDS_OF_BATCHES):
        paired = False
  sources = cost.hash_data_of_configs(map(sweep.config_of_point, sweep.points))
  points = []
  for point in progress.show_items(sweep.points, 'points checked'):
    points.append(_row(sweep, point))
  return {
      'name': sweep.name,
      'file': sweep.file,
      'match': args.match,
      'match_field': match_field,
      'base': sweep.base_name,
      'base_config': sweep.base.to_dict(),
      'paired': paired,
      'sources': sources,
      'files': dict(plugins.text_of_loaded_file),
      'points': points}


def _seconds(description: dict, row: dict) -> float:
  """Returns how long a run of a point takes here, by a dry run of it.

  Raises:
    RequestError: where that failed, with its last line.
  """
  words = layout.train_command(
      description=description, workdir=tempfile.gettempdir(),
      point=row['name'], seed=row['seeds'][0])
  ran = subprocess.run([sys.executable, *words, '--dry_run'],
                       capture_output=True, text=True)
  seconds = re.search(r'^about ([\d,]+) s in all', ran.stdout, re.M)
  last_line = ran.stderr.strip().rpartition('\n')[2]
  require(ran.returncode == 0 and seconds is not None, f'point {row["name"]!r} '
          f'cannot be timed: {last_line}')
  return float(seconds[1].replace(',', ''))


def _row(sweep: spec.Sweep, point: spec.Point) -> dict:
  """Returns what sweep.json says of a point, once it is checked."""
  config = sweep.config_of_point(point)
  with spec.prefix_errors(f'point {point.name!r}'):
    cost.check_config_of_point(config, point.changes)
    figures = cost.cost_of_run(config)
    tasks = sweep.tasks_of_point(point)
    has_figures = config.eval.every_steps or config.eval.tasks or tasks
    require(bool(has_figures),
            'eval.every_steps is 0 and no task is '
            'done, so there would be nothing to compare: set it, to '
            'train.steps for one held-out loss after the last step, or name '
            'a task in TASKS')
  unlike = ''
  if 'model.arch' in point.changes:
    unlike = systems.line(runs.resolve_model_without_tokenizer(config))
  return {
      'name': point.name,
      'changes': dict(point.changes),
      'matched': list(point.matched),
      'follows': _follows(sweep, point, config),
      'unlike': unlike,
      **figures._asdict(),
      'seeds': list(sweep.seeds),
      'tasks': list(tasks)}


def _follows(sweep: spec.Sweep, point: spec.Point, config
             ) -> dict[str, list]:
  """Returns the fields of the model that were left open and that a point
  resolves otherwise than the base, with both values."""
  base, model = cost.resolve_model(sweep.base), cost.resolve_model(config)
  written = run_config.flatten(config.to_dict())
  # A part that the base does not have is, in the base, as its config says.
  before = run_config.flatten(sweep.base.to_dict())
  before |= run_config.flatten({'model': flat.to_dict(base)})
  after = run_config.flatten({'model': flat.to_dict(model)})
  aside = {*point.changes}
  for name in flat.fields_that_are_unread(model):
    aside.add(f'model.{name}')
  follows = {}
  for key, value in after.items():
    is_of_kinds = 'model.kinds' in aside and key.startswith('model.kinds.')
    if key in aside or is_of_kinds or written.get(key) == value:
      continue
    old = before.get(key, '')
    if value != old:
      follows[key] = [old, value]
  return follows


def render_cost_table(description: dict) -> str:
  """Returns the costs of all points, then how each differs from the base."""
  points = description['points']
  base = layout.point_row(description, description['base'])
  rows = [('point', 'params', 'vs base', 'active', 'vs base', 'FLOPs/token',
           'vs base', 'tokens', 'FLOPs')]
  for point in points:
    flops = point['tokens'] * point['flops_per_token']
    rows.append((
        point['name'],
        f'{point["params"]:,}', _ratio(point, base, 'params'),
        f'{point["active_params"]:,}', _ratio(point, base, 'active_params'),
        f'{point["flops_per_token"]:,.0f}',
        _ratio(point, base, 'flops_per_token'),
        f'{point["tokens"]:,}', f'{flops:.3g}'))
  lines = layout.align_columns(rows)

  # The changes of each point.
  lines += ['', f'differences from {base["name"]}:']
  width = max(len(point['name']) for point in points)
  for point in points:
    if point is not base:
      changes = _differences(description, point)
      lines.append(f'  {point["name"].ljust(width)}  {changes}')

  # The number of runs, and how long they take.
  number = sum(len(point['seeds']) for point in points)
  lines += ['', f'{len(points)} points, {len(points[0]["seeds"])} seeds each: '
            f'{number} runs']
  if 'seconds' in points[0]:
    total = sum(point['seconds'] * len(point['seeds']) for point in points)
    times = []
    for point in points:
      seconds = progress.format_seconds(point['seconds'])
      times.append(f'{seconds} ({point["name"]})')
    each = ', '.join(times)
    lines += [f'a run here takes {each}',
              'all runs, one after another: some '
              f'{progress.format_seconds(total)}; as one program or beside '
              'others (--parallel) they take less']

  # Points that are compared with reserve.
  if not description['paired']:
    lines.append('warning: points differ in data.*, objective, span.* or '
                 'probe.*, so a seed does not give all of them the same '
                 'batches')
  for point in points:
    if point['unlike']:
      lines.append(f'{point["name"]}: {point["unlike"]}')
  return '\n'.join(lines)


def _ratio(point: dict, base: dict, figure: str) -> str:
  """Returns how far a figure of a point is from the base's."""
  return f'{point[figure] / base[figure] - 1:+.2%}'


def _differences(description: dict, point: dict) -> str:
  """Returns what a point changes, and what follows of it."""
  base = run_config.flatten(description['base_config'])
  changes = []
  for key, value in point['changes'].items():
    if key in base and value == base[key]:  # a new kind of layer is not there
      continue
    change = f'{key}={_short(value)}'
    if key in point['matched']:
      change += ' (matched)'
    changes.append(change)
  for key, (old, new) in point['follows'].items():
    changes.append(f'so {key} {_short(old)} -> {_short(new)}')
  return ', '.join(changes)


def _short(value) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)
