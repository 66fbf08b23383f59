"""run: freezes the plan of a study, and goes through its phases."""

import argparse
import pathlib
import shlex
import sys
import time

from configs.errors import RequestError, one_of, require
from tools.compare import costs, freeze, phases, results, show, trainer
from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans
from tools.compare import layout
from training import limits

REPORT = 'report'
LAUNCHERS = ('local', 'slurm')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('file', help='of configs/studies/')
  parser.add_argument('--workdir', required=True, help='of the whole study')
  parser.add_argument('--until', default=REPORT, help='the last phase: '
                      f'{", ".join(("freeze", *plans.PHASES, REPORT))} '
                      '(%(default)s)')
  show.add_machine_arguments(parser)
  parser.add_argument('--amend', default='', metavar='REASON', help='go on '
                      'with a plan that was changed; the reason is reported')
  parser.add_argument('--anyway', action='store_true', help='go on although '
                      'the noise is too large for EFFECT; this is reported')
  parser.add_argument('--retry', action='store_true',
                      help='take up again what failed')
  parser.add_argument('--launcher', default='local',
                      help=f'of {", ".join(LAUNCHERS)} (%(default)s)')
  parser.add_argument('--jobs', type=int, default=1, help='of slurm: runners '
                      'in the array (%(default)s)')
  parser.add_argument('--slurm', default='', help='of slurm: what submitit is '
                      'told, as slurm_partition=gpu,timeout_min=60')


def main(args) -> int:
  one_of('--until', args.until, ('freeze', *plans.PHASES, REPORT))
  one_of('--launcher', args.launcher, LAUNCHERS)
  show.check_machine_arguments(args)
  limits.number('--jobs', args.jobs, (('>=', 1), ('<=', 100_000)))
  for flag, unset in ('jobs', 1), ('slurm', ''):
    require(args.launcher == 'slurm' or getattr(args, flag) == unset,
            f'--{flag} is for --launcher=slurm, and --launcher is '
            f'{args.launcher}: leave it out')
  try_folder(args.workdir)
  frozen = adopted(args.workdir, freeze.freeze(args.file, args.workdir),
                   args.amend)
  print(show.described(frozen), flush=True)
  if args.launcher == 'slurm':
    return _submit(args)
  if args.until == 'freeze':
    return 0
  return go(args.workdir, frozen, trainer.Trainer(
      args.workdir, frozen, args.parallel, args.group, args.retry), args)


def go(workdir, frozen: frozen_lib.Frozen, own: phases.Trainer, args) -> int:
  """Goes through the phases with a trainer.

  Args:
    workdir: of the study.
    frozen: its plan, as it stands in study.json.
    own: trains the runs.
    args: until, anyway, group and parallel, as add_arguments defines them.
  """
  each = costs.of(frozen, args.group, costs.known(workdir, frozen))
  planned = {cost.phase: cost.runs for cost in each}

  def after(found: phases.Found) -> None:
    if args.anyway and not found.announced.enough:
      _note(workdir, frozen, found.announced.sentence)
    results.write(workdir, frozen, found, planned)
    print(_told(found), flush=True)
    if found.finished == list(plans.PHASES[:1]) and None in [
        cost.seconds for cost in each]:  # their time is known by now
      print(costs.table(costs.of(frozen, args.group, costs.known(
          workdir, frozen))[1:], args.parallel), flush=True)

  until = plans.PHASES[-1] if args.until == REPORT else args.until
  print(costs.table(each, args.parallel), flush=True)
  try:
    phases.run(frozen, own, until, args.anyway or _noted(frozen), after)
  except trainer.Stopped:
    print('stopped: the same command goes on')
    return 0
  if args.until == REPORT:
    from tools.compare import study_report
    page, *_ = study_report.write(workdir)
    print(f'report: {page}', flush=True)
  return 0


_ANYWAY = 'The study went on although it was too weak for what it wants.'


def _noted(frozen: frozen_lib.Frozen) -> bool:
  """Whether it was told to go on with the plan as it is now."""
  since = max((own['time'] for own in frozen.amendments), default=0.0)
  return any(note['told'].startswith(_ANYWAY) and note['time'] >= since
             for note in frozen.notes)


def _note(workdir, frozen: frozen_lib.Frozen, sentence: str) -> None:
  """Notes in the plan, once, that it went on; before anything more is run, so
  that a study which is killed later tells it too."""
  if not _noted(frozen):
    frozen.notes.append({'time': time.time(), 'told': f'{_ANYWAY} {sentence}'})
    save(workdir, frozen)


def _told(found: phases.Found) -> str:
  """Returns what the last phase found, in some lines."""
  phase = found.finished[-1]
  own = [x for x in found.outcomes if x.phase == phase]
  bad = sum(x.diverged for x in own)
  lines = [f'{phase}: {len(own)} runs' + f', {bad} diverged' * bool(bad)]
  if phase == 'noise':
    lines.append(found.announced.sentence)
  for row in found.tuned if phase == 'tune' else ():
    edge = f' (at the edge: {", ".join(row.at_edge)})' if row.at_edge else ''
    values = ', '.join(f'{name}={value:g}'
                       for name, value in row.changes.items())
    lines.append(f'  {row.workload} {row.size} {row.variant}: {values}{edge}')
  for row in found.screen if phase == 'screen' else ():
    q = 'unknown' if row.q is None else f'{row.q:.3g}'
    lines.append(f'  {row.variant}: {_effect(row)}, q {q}: '
                 + ('goes on' if row.passed else 'stays behind'))
  for row in found.confirm if phase == 'confirm' else ():
    p = 'unknown' if row.p_holm is None else f'{row.p_holm:.3g}'
    lines.append(f'  {row.variant}, {row.measure}: {_effect(row)}, corrected '
                 f'p {p}: {row.verdict}')
  return '\n'.join(lines)


def _effect(row) -> str:
  if row.effect is None:
    return 'no effect known'
  ends = '' if row.low is None else f' [{row.low:+.4f}, {row.high:+.4f}]'
  return f'{row.effect:+.4f}{ends}'


def try_folder(workdir) -> None:
  require('://' not in str(workdir), f'--workdir is {str(workdir)!r}: the '
          'ledgers of a study need a folder of this machine, or one that is '
          'mounted')
  layout.try_folder(pathlib.Path(workdir), 'study.json')


def save(workdir, frozen: frozen_lib.Frozen) -> None:
  results.save(pathlib.Path(workdir) / 'study.json',
               frozen_lib.to_json(frozen))


def adopted(workdir, frozen: frozen_lib.Frozen, reason: str
            ) -> frozen_lib.Frozen:
  """Returns the plan that goes on in a workdir, and writes it there.

  Args:
    workdir: of the study.
    frozen: of the file as it is now.
    reason: why it was changed, where it was.

  Raises:
    RequestError: where it was changed, and no reason is given; or a reason is
      given, and it was not.
  """
  if not (pathlib.Path(workdir) / 'study.json').exists():
    require(not reason, f'--amend is {reason!r}, but {workdir} has no plan yet '
            'that could have been changed: leave it out')
    save(workdir, frozen)
    return frozen
  old = frozen_lib.load(workdir)
  changed = frozen_lib.changed(old, frozen)
  require(bool(changed) or not reason, f'--amend is {reason!r}, but the plan '
          'is the one that was frozen: leave it out')
  if not changed:
    return old
  if not reason:
    raise RequestError(
        f'{workdir} was planned otherwise: {", ".join(changed[:8])}'
        + (f' and {len(changed) - 8} more' if changed[8:] else '')
        + ' changed since. Take another --workdir, or give the reason by '
        '--amend=REASON, which the report will tell')
  frozen.amendments = [*old.amendments, {
      'reason': reason, 'time': time.time(), 'before': old.hash,
      'changed': changed, 'seen': _seen(workdir)}]
  frozen.notes = old.notes
  save(workdir, frozen)
  return frozen


def _seen(workdir) -> list[str]:
  """Returns the phases of which any run has ended, decided or not: whoever
  wants to can look at it."""
  return [phase for phase in plans.PHASES if any(
      row.state in trainer.ENDED for row in results.rows(workdir, phase))]


def _submit(args) -> int:
  from tools.compare import slurm
  words = [sys.executable, '-m', 'tools.study', 'run', args.file, '--workdir',
           str(args.workdir), f'--until={args.until}',
           f'--parallel={args.parallel}', f'--group={args.group}']
  words += ['--anyway'] * args.anyway + ['--retry'] * args.retry
  print('each job of the array:', shlex.join(words))
  slurm.submit(words, pathlib.Path(args.workdir) / 'slurm', args.jobs,
               args.slurm)
  return 0
