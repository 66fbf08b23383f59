"""run: trains what the ledger says is not done, of a sweep all of its runs, of
a study one phase after the other (study.py)."""

import argparse
import collections
import pathlib
import shlex
import sys

from configs.errors import one_of, require
from tools.compare import check, layout, local, plan, slurm
from tools.compare import ledger as ledger_lib
from training import limits

LAUNCHERS = ('local', 'slurm', 'print')
REPORT = 'report'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  check.add_file_arguments(parser)
  parser.add_argument('--workdir', required=True,
                      help='of the whole sweep or study')
  parser.add_argument('--launcher', default='local',
                      help=f'of {", ".join(LAUNCHERS)} (%(default)s)')
  parser.add_argument('--retry', action='store_true',
                      help='take up again what failed')
  parser.add_argument('--jobs', type=int, default=0, help='of slurm: how many '
                      'runners; default: one a run that waits, 1 of a study')
  parser.add_argument('--slurm', default='', help='of slurm: what submitit '
                      'is told, as slurm_partition=gpu,timeout_min=60')
  parser.add_argument('--until', default=REPORT, help='of a study: its last '
                      f'phase, of {", ".join(("freeze", *plan.PHASES, REPORT))}'
                      ' (%(default)s)')
  parser.add_argument('--amend', default='', metavar='REASON', help='of a '
                      'study: go on with a plan that was changed; the reason '
                      'is reported')
  parser.add_argument('--anyway', action='store_true', help='of a study: go on '
                      'although the noise is too large for EFFECT; this is '
                      'reported')


def main(args) -> int:
  is_study = check.check_arguments(args)
  one_of('--launcher', args.launcher, LAUNCHERS[:2] if is_study else LAUNCHERS)
  limits.number('--jobs', args.jobs, (('>=', 0), ('<=', 100_000)))
  for flag, unset, launchers in (
      ('jobs', 0, LAUNCHERS[1:2]), ('slurm', '', LAUNCHERS[1:2]),
      ('parallel', 1, LAUNCHERS[:2]), ('group', 8, LAUNCHERS[:2])):
    require(args.launcher in launchers or getattr(args, flag) == unset,
            f'--{flag} is for --launcher={" or ".join(launchers)}, and '
            f'--launcher is {args.launcher}: leave it out')
  if is_study:
    from tools.compare import study
    return study.run(args, submit)
  layout.try_folder(args.workdir)
  description = check.describe(args)
  if args.match:
    print(check.table(description), file=sys.stderr)
  check.save(args.workdir, description)
  with ledger_lib.Ledger(args.workdir) as ledger:
    rows = [(seed, point) for point in description['points']
            for seed in point['seeds']]
    ledger.add((point['name'], seed, point['tasks']) for seed, point in sorted(
        rows, key=lambda row: row[0]))  # all points of a seed, then the next
    if args.retry:
      for run in ledger.runs(ledger_lib.FAILED):
        ledger.adopt(run.id, ledger_lib.FAILED, ledger_lib.PENDING)
    local.enter(args.workdir, ledger)
    waiting = ledger.runs(ledger_lib.PENDING)
    if args.launcher == 'print':
      for run in waiting:
        print(layout.shell_line(description, args.workdir, run))
    elif args.launcher == 'slurm' and waiting:
      submit(args, args.jobs or len(waiting))
    elif args.launcher == 'local' and not local.Runner(
        description, args.workdir, ledger, args.parallel, args.group).run():
      print('stopped: the same command goes on')
      return 0
    return _summary(args, ledger)


def submit(args, jobs: int, again: tuple[str, ...] = ()) -> None:
  """Submits an array of runners on one ledger, each of which does what this
  command would do here.

  Args:
    args: of this command, as add_arguments defines them.
    jobs: how many.
    again: what each is told beside what `check` is told.
  """
  ours = argparse.ArgumentParser()
  check.add_file_arguments(ours)
  flags = [f'--{name}={getattr(args, name)}' for name, unset in vars(
      ours.parse_args([''])).items()
           if name != 'file' and getattr(args, name) != unset]
  words = [sys.executable, '-m', 'tools.compare', 'run', args.file,
           f'--workdir={args.workdir}', *flags, *again]
  print('each job of the array:', shlex.join(words))
  slurm.submit([words] * jobs, pathlib.Path(args.workdir) / 'slurm',
               args.slurm, 'compare')


def _summary(args, ledger) -> int:
  """Prints the states of all runs, not to stdout where that holds commands."""
  runs = ledger.runs()
  counts = collections.Counter(run.state for run in runs)
  ran = [(run.point, run.seed) for run in runs]
  codes = layout.codes(args.workdir, ran)
  data = layout.changed_data(args.workdir, ran)
  failed = [run for run in runs if run.state == ledger_lib.FAILED]
  held = sorted({run.runner for run in runs if run.runner})
  lines = [f'{args.workdir}: ' + ', '.join(
      f'{counts[state]} {state}' for state in ledger_lib.STATES
      if counts[state])]
  lines += [f'warning: {layout.codes_note(codes)}'] * (len(codes) > 1)
  lines += [f'warning: {layout.data_note(data)}'] * bool(data)
  lines += [f'failed: {run.point}, seed {run.seed}: {run.error}'
            for run in failed]
  lines += ['--retry takes up again what failed'] * bool(failed)
  lines += [f'other runners are at work: {", ".join(held)}; the same command '
            'takes up what they leave'] * bool(held)
  print('\n'.join(lines), file=sys.stderr)
  return 1 if failed else 0
