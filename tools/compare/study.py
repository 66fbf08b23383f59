"""A study as `check` and `run` go through it: the frozen plan, its phases, and
what they cost."""

from collections.abc import Callable
import json
import pathlib
import time

from configs.errors import one_of, require
from tools.compare import costs, freeze, layout, phases, results, trainer
from tools.compare import frozen as frozen_lib
from tools.compare import ledger as ledger_lib
from tools.compare import plan as plans
from tools.compare import decide, measures, statistics, tuning

REPORT = 'report'


def check(args) -> int:
  """Prints the plan of a study's file and the costs of its phases."""
  require(not (args.time and args.workdir), f'--workdir is {args.workdir!r}, '
          'and --time is set: hours come from one of them, so leave the other '
          'out')
  if args.workdir:
    frozen_lib.load(args.workdir)
  frozen = freeze.freeze(args.file)
  times = (costs.timed(frozen, args.parallel, args.group) if args.time else
           costs.known(args.workdir, frozen) if args.workdir else None)
  each = costs.of(frozen, args.group, times)
  if args.json:
    print(json.dumps({'study': frozen_lib.to_json(frozen), 'phases': [
        cost._asdict() for cost in each]}, indent=2))
    return 0
  hours = (f'A program takes {times.program:.1f} s beside its steps; hours are '
           f'of {args.parallel} processes at once.' if times else
           'Hours are not known: --time trains the base for some steps, and '
           '--workdir takes them from what has run.')
  print(described(frozen), costs.table(each, args.parallel), hours, sep='\n\n')
  return 0


def run(args, submit: Callable[..., None]) -> int:
  """Freezes the plan of a study's file, and goes through its phases.

  Args:
    args: of `run`, as its add_arguments defines them.
    submit: (args, jobs, further words) submits runners to SLURM.
  """
  one_of('--until', args.until, ('freeze', *plans.PHASES, REPORT))
  layout.try_folder(args.workdir, 'study.json')
  frozen = adopted(args.workdir, freeze.freeze(args.file),
                   args.amend)
  print(described(frozen), flush=True)
  if args.launcher == 'slurm':
    again = [f'--until={args.until}', *['--anyway'] * args.anyway,
             *['--retry'] * args.retry]
    submit(args, args.jobs or 1, again)
    return 0
  if args.until == 'freeze':
    return 0
  return go(args.workdir, frozen, trainer.Trainer(
      args.workdir, frozen, args.parallel, args.group, args.retry), args)


def described(frozen: frozen_lib.Frozen) -> str:
  """Returns what a plan says, in some lines."""
  plan = frozen.plan
  lines = [f'study {plan.name}, plan {frozen.hash}'
           + f': {plan.question}' * bool(plan.question),
           f'base: {plan.base}; variants: {", ".join(plan.variants)}']
  for size in plan.sizes:
    row = frozen.point(plan.base, size, plans.TEXT)
    lines.append(f'size {size}: {row["params"]:,} parameters, '
                 f'{row["flops_per_token"]:,.0f} FLOPs a token')
  if plan.match:
    lines.append(f'matched: {plan.match}, by {plan.match_field}')
  wanted = f'; an effect of {measures.amount(frozen, plan.effect)} is wanted'
  lines += [f'measure {m.name}: {m.figure} of {m.workload}, '
            f'{measures.said(frozen, m, "in ", ", ")}{m.better} is better'
            + wanted * (m == plan.primary) for m in plan.measures]
  tuned = '; '.join(f'{name} of {", ".join(f"{v:g}" for v in values)}'
                    for name, values in plan.tuning.fields.items())
  lines.append(f'tuned at {", ".join(plan.tuned_sizes)}: {tuned}, by '
               f'{tuning.kind(plan.tuning)}; {tuning.edges(plan.tuning)}')
  lines.append(f'seeds: {plan.seeds.noise} of noise, {plan.seeds.tune} of '
               f'tuning, {plan.seeds.screen} of screening, '
               f'{plan.seeds.confirm} of confirmation')
  lines.append(f'screening: false discovery rate {plan.q:g} '
               f'(Benjamini-Hochberg); confirmation: family-wise error '
               f'{plan.alpha:g} (Holm); power {plan.power:.0%}')
  few = {size: n for size in plan.sizes
         if (n := decide.evaluations(frozen, size)) < statistics.MIN_POINTS}
  if few:
    told = ', '.join(f'{n} at {size}' for size, n in few.items())
    lines.append('speed-ups will be n/a: runs of the confirmation have too few '
                 f'evaluations after warm-up ({told}; '
                 f'{statistics.MIN_POINTS} needed; see eval.every_steps)')
  return '\n'.join(lines)


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


def save(workdir, frozen: frozen_lib.Frozen) -> None:
  layout.save(pathlib.Path(workdir) / 'study.json', frozen_lib.to_json(frozen))


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
  if not layout.is_study(workdir):
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
  require(bool(reason), f'{workdir} was planned otherwise: '
          f'{", ".join(changed[:8])}'
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
      row.state in ledger_lib.ENDED for row in results.rows(workdir, phase))]
