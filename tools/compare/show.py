"""plan: the phases of a study with their costs, before anything is run."""

import argparse
import json

from configs.errors import require
from tools.compare import costs, decide, freeze, measures, tuning
from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans
from tools.compare import statistics
from training import limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('file', help='of configs/studies/')
  add_machine_arguments(parser)
  parser.add_argument('--time', action='store_true', help='train the base for '
                      'some steps at each size, to say the hours')
  parser.add_argument('--workdir', default='', help='of a study that has run '
                      'in part: take the hours from its runs')
  parser.add_argument('--json', action='store_true', help='print JSON')


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--parallel', type=int, default=1,
                      help='processes at once (%(default)s)')
  parser.add_argument('--group', type=int, default=8, help='how many runs one '
                      'program holds at most (%(default)s)')


def check_machine_arguments(args) -> None:
  for name, most in (('parallel', 512), ('group', 100_000)):
    limits.number(f'--{name}', getattr(args, name), (('>=', 1), ('<=', most)))


def main(args) -> int:
  check_machine_arguments(args)
  require(not (args.time and args.workdir), f'--workdir is {args.workdir!r}, '
          'and --time is set: hours come from one of them, so leave the other '
          'out')
  if args.workdir:
    frozen_lib.load(args.workdir)
  frozen = freeze.freeze(args.file, args.workdir)
  times = (costs.timed(frozen, args.parallel, args.group) if args.time else
           costs.known(args.workdir, frozen) if args.workdir else None)
  each = costs.of(frozen, args.group, times)
  if args.json:
    print(json.dumps({'study': frozen_lib.to_json(frozen), 'phases': [
        cost._asdict() for cost in each]}, indent=2))
    return 0
  print(described(frozen))
  print()
  print(costs.table(each, args.parallel))
  if times:
    print(f'\nA program takes {times.program:.1f} s beside its steps; hours '
          f'are of {args.parallel} processes at once.')
  else:
    print('\nHours are not known: --time trains the base for some steps, and '
          '--workdir takes them from what has run.')
  return 0


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
