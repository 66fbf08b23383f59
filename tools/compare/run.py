"""run: trains what the ledger says is not done, of a sweep all of its runs, of
a study one phase after the other (study.py)."""

import argparse
import pathlib
import shlex
import sys

from common.errors import STOPPED, check_choice, require
from common.fields import check_number
from tools.compare import check, layout, local, phases, plan, slurm, status
from training import cli, progress

LAUNCHERS = ('local', 'slurm', 'print')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of the command `run`, which trains a sweep or a study.
  """
  # Arguments that `check` has too, and those of sweeps and studies alike.
  check.add_file_arguments(parser)
  parser.add_argument('--workdir', required=True,
                      help='of the whole sweep or study')
  parser.add_argument('--launcher', default='local',
                      help=f'of {", ".join(LAUNCHERS)} (%(default)s); print: '
                      'of a sweep')
  parser.add_argument('--retry', default=False, help='take up again what '
                      'failed', action=argparse.BooleanOptionalAction)
  parser.add_argument('--milestones', action='store_true', help='print no more '
                      'than that it began, the time that is left when a tenth '
                      'is done, how it ended, and the verdicts')
  parser.add_argument('--jobs', type=int, default=0, help='of slurm: how many '
                      'runners; default: one a run that waits, 1 of a study')
  parser.add_argument('--slurm', default='', help='of slurm: what submitit '
                      'is told, as slurm_partition=gpu,timeout_min=60')

  # Arguments of studies alone.
  check.add_flag_of_kind(
      parser, 'study', '--until', default=plan.REPORT,
      help=f'its last phase, of freeze, {", ".join(phases.PHASES)}, '
      f'{plan.REPORT} (%(default)s)')
  check.add_flag_of_kind(
      parser, 'study', '--amend', default='', metavar='REASON',
      help='go on with a plan that was changed; the reason is '
      'reported')
  check.add_flag_of_kind(
      parser, 'study', '--anyway', action='store_true',
      help='go on although the noise is too large for EFFECT; this '
      'is reported')


def main(args) -> int:
  require(not args.milestones or args.launcher == 'local',
          f'--milestones is of --launcher=local, which is {args.launcher}')
  with progress.print_milestones_only(args.milestones):
    return run_sweep_or_study(args)


def run_sweep_or_study(args) -> int:
  """Trains the runs of a sweep or a study that are not done yet, and prints how
  they went. Returns the exit code.

  Args:
    args: the arguments that `add_arguments` defines.
  """
  # Check the arguments.
  is_study = check.check_arguments(args)
  _check_launcher(args, is_study)

  # A study runs its phases itself.
  if is_study:
    from tools.compare import study
    return study.run(args, submit)

  # Check every point of the sweep before anything is trained.
  layout.check_workdir(args.workdir)
  description = check.describe_sweep(args)
  if args.match and not args.milestones:
    print(check.render_cost_table(description), file=sys.stderr)

  # Enter the runs into the ledger (the database of their states), and train
  # those that wait, or print or submit commands that do.
  with layout.Ledger(args.workdir) as ledger:
    if args.retry:
      ledger.retry_failed_runs()
    description = layout.begin_sweep(args.workdir, ledger, description)
    waiting = ledger.runs(layout.PENDING)
    if args.launcher == 'print':
      for run in waiting:
        print(layout.shell_command_of_run(description, args.workdir, run))
    elif args.launcher == 'slurm' and waiting:
      submit(args, args.jobs or len(waiting))
    elif args.launcher == 'local':
      local.Runner(args.workdir, ledger=ledger, parallel=args.parallel,
                   group=args.group).run()
    code = _summary(args, ledger.runs(), description)
  if not code and args.milestones:
    from tools.compare import comparison
    comparison.load_comparison(args.workdir).print_milestones()
  return code


def _check_launcher(args, is_study: bool) -> None:
  """Raises RequestError for an unknown launcher, and for flags that are not of
  the one that was chosen."""
  launchers = ('local', 'slurm') if is_study else LAUNCHERS
  check_choice('--launcher', args.launcher, launchers)
  check_number('--jobs', args.jobs, (('>=', 0), ('<=', 100_000)))
  for flag in ('jobs', 'slurm'):
    require(args.launcher == 'slurm' or not getattr(args, flag), f'--{flag} is '
            f'of --launcher=slurm, which is {args.launcher}: leave it out')


def submit(args, jobs: int) -> None:
  """Submits an array of jobs to SLURM. Each repeats this command with
  --launcher=local, and they share the runs of the sweep through its ledger, the
  database of runs.

  Args:
    args: the arguments of the command.
    jobs: the number of jobs.
  """
  # Leave out the words of this command that are not meant for the jobs.
  of_this_command = cli.Parser(add_help=False)
  for flag in ('--launcher', '--jobs', '--slurm', '--amend'):
    of_this_command.add_argument(flag)
  of_this_command.add_argument('--retry', action=argparse.BooleanOptionalAction)
  _, words_for_jobs = of_this_command.parse_known_args(sys.argv[1:])
  words = [sys.executable, '-m', 'tools.compare', *words_for_jobs,
           '--launcher=local']
  print('each job of the array:', shlex.join(words))
  slurm.submit([words] * jobs, folder=pathlib.Path(args.workdir) / 'slurm',
               options=args.slurm, name='compare')


def _summary(args, runs: list[layout.Run], description: dict) -> int:
  """Prints how the runs of a sweep went, to the standard error, because
  --launcher=print writes commands to the standard output.

  Args:
    args: the arguments of the command.
    runs: all runs of the sweep's ledger.
    description: the contents of sweep.json.

  Returns:
    The exit code: 1 if a run failed, STOPPED if runs are left that were to be
    trained here, and otherwise 0.
  """
  codes = layout.codes_of_runs(args.workdir, description)
  failed = status.failed(runs)
  lines = [f'{args.workdir}: {status.states(runs)}']
  if len(codes) > 1:
    lines.append(f'warning: {layout.describe_changed_code(codes)}')
  lines += [f'failed: {line}' for line in failed]
  if failed:
    lines.append('--retry takes up again what failed')
  print('\n'.join(lines), file=sys.stderr)
  if failed:
    return 1
  owed = any(run.state in (layout.PENDING, layout.RUNNING) for run in runs)
  return STOPPED if owed and args.launcher == 'local' else 0
