"""run: trains what the ledger says is not done, through one of LAUNCHERS."""

import argparse
import collections
import pathlib
import shlex
import sys

from configs.errors import RequestError, one_of, require
from tools.compare import check, commands, layout
from tools.compare import ledger as ledger_lib
from training import limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
  check.add_sweep_arguments(parser)
  parser.add_argument('--workdir', required=True, help='of the whole sweep')
  parser.add_argument('--launcher', default='local',
                      help=f'of {", ".join(LAUNCHERS)} (%(default)s)')
  parser.add_argument('--parallel', type=int, default=1,
                      help='processes at once, of local (%(default)s)')
  parser.add_argument('--vectorised', action='store_true', default=True,
                      help='train runs that differ only in numbers as one '
                      'program (default)')
  parser.add_argument('--novectorised', dest='vectorised',
                      action='store_false', help='each as its own')
  parser.add_argument('--group', type=int, default=8, help='how many runs one '
                      'such program holds at most (%(default)s)')
  parser.add_argument('--retry', action='store_true',
                      help='take up again what failed')
  parser.add_argument('--jobs', type=int, default=0, help='of slurm: '
                      'how many runners; default: one a run that waits')
  parser.add_argument('--slurm', default='', help='of slurm: what submitit '
                      'is told, as slurm_partition=gpu,timeout_min=60')


def main(args) -> int:
  one_of('--launcher', args.launcher, LAUNCHERS)
  for name, least, most in (('parallel', 1, 512), ('group', 1, 100_000),
                            ('jobs', 0, 100_000)):
    limits.number(f'--{name}', getattr(args, name),
                  (('>=', least), ('<=', most)))
  for flag, (unset, readers) in READERS.items():
    require(args.launcher in readers or getattr(args, flag) == unset,
            f'--{flag} is for --launcher={" or ".join(readers)}, and '
            f'--launcher is {args.launcher}: leave it out')
  layout.try_folder(args.workdir)
  description = check.describe(args, args.workdir)
  if args.match:
    print(check.table(description), file=sys.stderr)
  check.save(args.workdir, description)
  with ledger_lib.Ledger(args.workdir) as ledger:
    ledger.add((point['name'], seed, point['tasks'])
               for seed in _seeds(description)
               for point in description['points'] if seed in point['seeds'])
    ledger.recover()
    if args.retry:
      for run in ledger.runs(ledger_lib.FAILED):
        ledger.adopt(run.id, ledger_lib.FAILED, ledger_lib.PENDING)
    adopt(args.workdir, ledger)
    if not LAUNCHERS[args.launcher](args, description, ledger):
      print('stopped: the same command goes on')
      return 0
    return _summary(args, ledger)


def adopt(workdir, ledger) -> None:
  """Marks as trained or done what is so on disk and the ledger has not seen:
  runs of a printed command, or of a ledger that was lost; as failed, what was
  trained there by another config; and as owed, what was done before a task of
  it was added."""
  waiting = ledger.runs(ledger_lib.PENDING)
  # Read later than the ledger, it has all of these points.
  description = layout.load_description(workdir)
  for run in waiting:
    folder = layout.run_folder(workdir, run.point, run.seed)
    config = layout.config(description, run.point, run.seed)
    if layout.is_trained(folder, config.train):
      error = _stranger(description, workdir, run)
      ledger.adopt(run.id, ledger_lib.PENDING,
                   ledger_lib.FAILED if error else ledger_lib.OWED, error)
  for old, new in ((ledger_lib.OWED, ledger_lib.DONE),
                   (ledger_lib.DONE, ledger_lib.OWED)):
    for run in ledger.runs(old):
      folder = layout.run_folder(workdir, run.point, run.seed)
      tasks = run.tasks.split(',') if run.tasks else []
      if layout.is_evaluated(folder, tasks) == (new == ledger_lib.DONE):
        ledger.adopt(run.id, old, new)


def _stranger(description: dict, workdir, run) -> str:
  """Returns why what was trained in a run's folder is not that run, or ''."""
  try:
    wrong = layout.differing(description, workdir, run.point, run.seed)
  except RequestError as error:
    return str(error)
  return '' if not wrong else (
      f'{layout.run_folder(workdir, run.point, run.seed)} holds a run of '
      f'another config than sweep.json says, in {", ".join(wrong)}: move it '
      'away, and --retry')


def _local(args, description, ledger) -> bool:
  from tools.compare import local
  return local.Runner(description, args.workdir, ledger, args.parallel,
                      args.group if args.vectorised else 1).run()


def _print(args, description, ledger) -> bool:
  for state in (ledger_lib.PENDING, ledger_lib.OWED):
    for run in ledger.runs(state):
      print(commands.line(description, args.workdir, run))
  return True


def _slurm(args, description, ledger) -> bool:
  from tools.compare import slurm
  waiting = len(ledger.runs(ledger_lib.PENDING) + ledger.runs(ledger_lib.OWED))
  if waiting:
    folder = pathlib.Path(args.workdir) / 'slurm'
    words = [sys.executable, '-m', 'tools.sweep', *_as_local(sys.argv[1:])]
    print('each job of the array:', shlex.join(words))
    slurm.submit(words, folder, args.jobs or waiting, args.slurm)
  return True


def _as_local(words: list[str]) -> list[str]:
  """The command line of a runner in a job: ours, without what submits it."""
  kept, skip = [], False
  for word in words:
    flag = word.split('=')[0] in ('--launcher', '--jobs', '--slurm', '--retry')
    if not (skip or flag):
      kept.append(word)
    skip = flag and '=' not in word and word != '--retry'
  return kept


# flag: (its default, the launchers that read it), of those that not all do.
READERS = {'parallel': (1, ('local', 'slurm')),
           'group': (8, ('local', 'slurm')),
           'jobs': (0, ('slurm',)), 'slurm': ('', ('slurm',))}
# name: (args, description, ledger) -> whether it was not stopped half-way.
LAUNCHERS = {'local': _local, 'slurm': _slurm, 'print': _print}


def _seeds(description: dict) -> list[int]:
  return sorted({seed for point in description['points']
                 for seed in point['seeds']})


def _summary(args, ledger) -> int:
  """Prints the states of all runs, not to stdout where that holds commands."""
  runs = ledger.runs()
  counts = collections.Counter(run.state for run in runs)
  told = ', '.join(f'{counts[state]} {state}' for state in ledger_lib.STATES
                   if counts[state])
  print(f'{args.workdir}: {told}', file=sys.stderr)
  ran = [(run.point, run.seed) for run in runs]
  codes = layout.codes(args.workdir, ran)
  if len(codes) > 1:
    print(f'warning: {layout.codes_note(codes)}', file=sys.stderr)
  if data := layout.changed_data(args.workdir, ran):
    print(f'warning: {layout.data_note(data)}', file=sys.stderr)
  failed = [run for run in runs if run.state == ledger_lib.FAILED]
  for run in failed:
    print(f'failed: {run.point}, seed {run.seed}: {run.error}',
          file=sys.stderr)
  if failed:
    print('--retry takes up again what failed', file=sys.stderr)
  held = [run for run in runs if run.runner]
  if held:
    print(f'{len(held)} runs are with other runners: '
          + ', '.join(sorted({run.runner for run in held}))
          + '; the same command takes up what they leave', file=sys.stderr)
  return 1 if failed else 0
