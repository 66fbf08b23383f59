"""check: every point validated and counted before anything runs; of a study,
its phases and what they cost."""

import argparse
from collections.abc import Sequence
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
  """Adds the arguments of `python -m tools.compare check` to its parser."""
  add_file_arguments(parser)
  parser.add_argument('--workdir', default='', help='write sweep.json here; of '
                      'a study that has run in part: take the hours from it')
  add_flag_of_kind(parser, 'sweep', '--time', action='store_true',
                   help='time a few steps of each point on this machine')
  add_flag_of_kind(parser, 'sweep', '--json', action='store_true',
                   help='print JSON')


def add_flag_of_kind(parser: argparse.ArgumentParser, kind: str, flag: str,
                     **options: Any) -> None:
  """Adds a flag that has a meaning only for a sweep's file, or only for a
  study's. `check_arguments` refuses it with a file of the other kind.

  Args:
    parser: the parser of a command.
    kind: 'sweep' or 'study'.
    flag: the name of the flag.
    **options: the keywords of `add_argument`.
  """
  options['help'] = f'of a {kind}: {options["help"]}'
  action = parser.add_argument(flag, **options)
  # The parsed arguments get an attribute `sweep` or `study` with the defaults
  # of that kind's flags. A flag with another value was set by the user.
  default_by_flag = parser.get_default(kind) or {}
  parser.set_defaults(
      **{kind: default_by_flag | {action.dest: action.default}})


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments that the commands `check` and `run` share: a file of a
  sweep or a study, and how many runs are trained at once.

  Args:
    parser: the parser of one of these commands.
  """
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
  """Checks the arguments of `add_file_arguments`, and returns whether the file
  is that of a study, and not that of a sweep.

  Args:
    args: the parsed arguments: `file`, `parallel`, `group`, the flags of each
      kind of file, and under 'sweep' and 'study' the defaults of these flags.

  Raises:
    RequestError: for a number out of its range, and for a flag that belongs to
      the other kind of file.
  """
  check_number('--parallel', args.parallel, (('>=', 1), ('<=', 512)))
  check_number('--group', args.group, (('>=', 1), ('<=', 100_000)))
  is_study = spec.is_study(args.file)
  # `add_flag_of_kind` has kept the defaults of the flags of each kind.
  other_kind = 'sweep' if is_study else 'study'
  for flag, default in getattr(args, other_kind, {}).items():
    require(getattr(args, flag) == default, f'--{flag} is of a {other_kind}, '
            f'and {args.file} is none: leave it out')
  return is_study


def main(args) -> int:
  """Checks every point of a sweep (a variant of its config), or the plan of a
  study, and prints what the runs cost. Returns the exit code.

  Args:
    args: the arguments of the command `check`.

  Raises:
    RequestError: for the first point that cannot be trained.
  """
  if check_arguments(args):
    from tools.compare import study
    return study.check(args)

  # The description is saved only after all points were checked.
  if args.workdir:
    layout.check_workdir(args.workdir)
  description = describe_sweep(args)
  if args.workdir:
    with layout.Ledger(args.workdir) as ledger, ledger.transaction():
      layout.save_sweep_description(args.workdir, description)

  # Print the costs, with --time also the seconds of a run on this machine.
  if args.time:
    for point in progress.show_items(description['points'], 'points timed'):
      point['seconds'] = _seconds_of_run(description, point)
  if args.json:
    print(json.dumps(description, indent=2))
  else:
    print(render_cost_table(description))
  return 0


def describe_sweep(args) -> dict:
  """Reads a sweep's file, checks each of its points (variants of the config),
  and returns the contents of sweep.json: the points with their changes and
  costs, and the config of the base.

  Args:
    args: the arguments that add_file_arguments defines.

  Raises:
    RequestError: for the first bad point.
  """
  # Read the file. With --match, one field of each point is set so that the
  # point costs what the base costs.
  cost.keep_off_accelerators()
  sweep = spec.read_sweep_file(args.file, args.seeds)
  require(bool(args.match) or not args.match_field, f'--match_field is '
          f'{args.match_field}, but nothing is matched: pass --match, of '
          f'{", ".join(spec.MATCHABLE_COSTS)}')
  match_field = ''
  if args.match:
    match_field = args.match_field or spec.DEFAULT_MATCH_FIELD
    sweep = cost.match_costs(sweep, args.match, match_field)

  # Runs of one seed are pairs if they see the same batches, which they do
  # unless a point changes how batches are made.
  is_paired = True
  for point in sweep.points:
    for field in point.changes:
      if field.startswith(spec.FIELDS_OF_BATCHES):
        is_paired = False

  # Check and describe each point.
  sources = cost.hash_data_of_configs(map(sweep.config_of_point, sweep.points))
  points = []
  for point in progress.show_items(sweep.points, 'points checked'):
    points.append(_describe_point(sweep, point))
  return {
      'name': sweep.name,
      'file': sweep.file,
      'match': args.match,
      'match_field': match_field,
      'base': sweep.base_name,
      'base_config': sweep.base.to_dict(),
      'paired': is_paired,
      'sources': sources,
      'files': dict(plugins.text_of_loaded_file),
      'points': points}


def _seconds_of_run(description: dict, point: dict) -> float:
  """Estimates how many seconds a run of a sweep takes on this machine. A
  process with --dry_run times a few steps and prints its estimate.

  Args:
    description: the contents of sweep.json.
    point: the entry there of the point (a variant of the config).

  Raises:
    RequestError: if the dry run failed; the message has its last line.
  """
  # All seeds take as long. A dry run writes nothing into its workdir.
  words = layout.train_command(
      description=description, workdir=tempfile.gettempdir(),
      point=point['name'], seed=point['seeds'][0])
  process = subprocess.run([sys.executable, *words, '--dry_run'],
                           capture_output=True, text=True)
  estimate = re.search(r'^about ([\d,]+) s in all', process.stdout, re.M)
  last_line = process.stderr.strip().rpartition('\n')[2]
  require(process.returncode == 0 and estimate is not None,
          f'point {point["name"]!r} cannot be timed: {last_line}')
  return float(estimate[1].replace(',', ''))


def _describe_point(sweep: spec.Sweep, point: spec.Point) -> dict:
  """Checks the config of a point of a sweep, and returns the entry of the point
  in sweep.json: what it changes, what it costs, and which runs it has.

  Args:
    sweep: the sweep.
    point: the point, which is a variant of the sweep's base config.

  Raises:
    RequestError: if it cannot be trained, or gives nothing to compare.
  """
  # Every error in here is about this point, and begins with its name.
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

  # A point of another architecture may differ from the published model.
  unlike = ''
  if 'model.arch' in point.changes:
    model = runs.resolve_model_without_tokenizer(config)
    unlike = systems.describe_differences(model)
  return {
      'name': point.name,
      'changes': dict(point.changes),
      'matched': list(point.matched),
      'follows': _derived_changes(sweep, point, config),
      'unlike': unlike,
      **figures._asdict(),
      'seeds': list(sweep.seeds),
      'tasks': list(tasks)}


def _derived_changes(sweep: spec.Sweep, point: spec.Point, config
                     ) -> dict[str, list]:
  """Returns the fields of the model that a point does not set itself, and that
  differ from the base as a result of what it sets. For example, a d_ff of 0 is
  derived from d_model, so a point that sets d_model changes d_ff too.

  Args:
    sweep: the sweep.
    point: the point, which is a variant of the sweep's base config.
    config: the config of the point.

  Returns:
    [value of the base, value of the point] by the dotted name of the field.
  """
  # The values as they are written in the config, and as they are derived. A
  # part of a model that the base does not have keeps its written values.
  base_model, model = cost.resolve_model(sweep.base), cost.resolve_model(config)
  written_values = run_config.flatten(config.to_dict())
  base_values = run_config.flatten(sweep.base.to_dict())
  base_values |= run_config.flatten({'model': flat.to_dict(base_model)})
  point_values = run_config.flatten({'model': flat.to_dict(model)})

  # Leave out the fields that the point sets itself, and those that its model
  # does not read.
  left_out = {*point.changes}
  for name in flat.fields_that_are_unread(model):
    left_out.add(f'model.{name}')
  derived = {}
  for field, value in point_values.items():
    is_of_layer_kinds = ('model.kinds' in left_out
                         and field.startswith('model.kinds.'))
    is_written = written_values.get(field) == value
    if field in left_out or is_of_layer_kinds or is_written:
      continue
    base_value = base_values.get(field, '')
    if value != base_value:
      derived[field] = [base_value, value]
  return derived


def render_cost_table(description: dict) -> str:
  """Returns the text that `check` prints of a sweep: the costs of all points,
  how each differs from the base, and what the runs take.

  Args:
    description: what sweep.json holds; points may have their 'seconds', too.
  """
  points = description['points']
  base = layout.point_row(description, description['base'])
  rows = [('point', 'params', 'vs base', 'active', 'vs base', 'FLOPs/token',
           'vs base', 'tokens', 'FLOPs')]
  for point in points:
    flops = point['tokens'] * point['flops_per_token']
    rows.append((
        point['name'],
        f'{point["params"]:,}', _share_above_base(point, base, 'params'),
        f'{point["active_params"]:,}',
        _share_above_base(point, base, 'active_params'),
        f'{point["flops_per_token"]:,.0f}',
        _share_above_base(point, base, 'flops_per_token'),
        f'{point["tokens"]:,}', f'{flops:.3g}'))
  lines = layout.align_columns(rows)

  # The changes of each point.
  lines += ['', f'differences from {base["name"]}:']
  width = max(len(point['name']) for point in points)
  for point in points:
    if point is not base:
      changes = _describe_changes(description, point)
      lines.append(f'  {point["name"].ljust(width)}  {changes}')

  # The number of runs, and how long they take.
  num_runs = sum(len(point['seeds']) for point in points)
  num_seeds = len(points[0]['seeds'])
  lines += ['', f'{len(points)} points, {num_seeds} seeds each: '
            f'{num_runs} runs']
  if 'seconds' in points[0]:
    lines += _describe_times(points)

  # Points that are compared with reserve.
  if not description['paired']:
    lines.append('warning: points differ in data.*, objective, span.* or '
                 'probe.*, so a seed does not give all of them the same '
                 'batches')
  for point in points:
    if point['unlike']:
      lines.append(f'{point["name"]}: {point["unlike"]}')
  return '\n'.join(lines)


def _describe_times(points: Sequence[dict]) -> list[str]:
  """Returns two lines for a terminal: the time of a run of each point, and the
  time of all runs.

  Args:
    points: the entries of the points in sweep.json, with the estimated
      'seconds' of a run and the 'seeds' of their runs.
  """
  total_seconds = sum(point['seconds'] * len(point['seeds'])
                      for point in points)
  times = ', '.join(
      f'{progress.format_seconds(point["seconds"])} ({point["name"]})'
      for point in points)
  return [f'a run here takes {times}',
          'all runs, one after another: some '
          f'{progress.format_seconds(total_seconds)}; as '
          'one program or beside others (--parallel) they take less']


def _share_above_base(point: dict, base: dict, figure: str) -> str:
  """Returns by which share a figure of a point is above the base's, as '+1.5%'.
  """
  return f'{point[figure] / base[figure] - 1:+.2%}'


def _describe_changes(description: dict, point: dict) -> str:
  """Describes the changes of a point (a variant of a sweep's base config), and
  the derived fields that follow from them, such as 'model.d_model=64, so
  model.d_ff 512 -> 256'.

  Args:
    description: the contents of sweep.json.
    point: the entry of the point there.
  """
  # The fields that it sets to another value.
  base_values = run_config.flatten(description['base_config'])
  changes = []
  for field, value in point['changes'].items():
    # A new kind of layer is not in the base.
    if field in base_values and value == base_values[field]:
      continue
    change = f'{field}={_format_value(value)}'
    if field in point['matched']:
      change += ' (matched)'
    changes.append(change)

  # The fields that follow from these.
  for field, (base_value, value) in point['follows'].items():
    changes.append(
        f'so {field} {_format_value(base_value)} -> {_format_value(value)}')
  return ', '.join(changes)


def _format_value(value) -> str:
  """Returns a value of a config, with six digits where it is a fraction."""
  return f'{value:g}' if isinstance(value, float) else str(value)
