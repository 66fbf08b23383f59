"""Speed-ups at each size, and how an effect goes with size."""

from collections.abc import Mapping, Sequence
import math

from tools.compare import findings
from tools.compare import frozen as frozen_lib
from tools.compare.plan import TEXT, Outcome, Plan
from tools.compare import statistics

BY = ('flops', 'seconds')


def trend(plan: Plan, runs, by_seed: Mapping[int, Sequence[float]]
          ) -> findings.Trend | None:
  """Returns the slope of the effect over log10 of the base's parameters.

  Each seed gives a slope by least squares over its own sizes, and the interval
  is Student's over the seeds: it holds whatever the noise of each size is.

  Args:
    plan: of the study.
    runs: of the confirmation, as decide.of_phase has them.
    by_seed: the differences at each size.
  """
  own = [runs.get((plan.base, size, plan.primary.workload), {})
         for size in plan.sizes]
  if not all(own):
    return None
  logs = [math.log10(next(iter(x.values())).params) for x in own]
  centre = sum(logs) / len(logs)
  square = sum((x - centre) ** 2 for x in logs)
  if not square or not by_seed:
    return None
  slopes = [sum((x - centre) * d for x, d in zip(logs, values)) / square
            for values in by_seed.values()]
  found = statistics.interval(slopes)
  return findings.Trend(found.mean, found.low, found.high, found.seeds,
                        statistics.p_value(slopes))


def speed_ups(plan: Plan, runs, variant: str) -> list[findings.SpeedUp]:
  """Returns the speed-up of a variant at each size, by FLOPs and by time, of
  the curves of held-out loss on text; none where no curves were kept.

  For each seed, the base's spending over the variant's to the same loss, read
  from a saturating power law of each curve (statistics.speed_up); a factor
  that one of the seeds does not give is given for none, since the seeds that
  give one are those that went well.
  """
  found = []
  for size in plan.sizes:
    ours, base = (runs.get((name, size, TEXT), {})
                  for name in (variant, plan.base))
    pairs = [(ours[s], base[s]) for s in sorted(ours.keys() & base.keys())
             if not (ours[s].diverged or base[s].diverged)]
    if any(x.curve for pair in pairs for x in pair):
      found += [_speed_up(size, by, pairs) for by in BY]
  return found


def evaluations(frozen: frozen_lib.Frozen, size: str) -> int:
  """Returns how many evaluations after warm-up a run of the confirmation has on
  text: those that a law is fitted to. Of the variant that has the fewest."""
  plan, found = frozen.plan, []
  for variant in (plan.base, *plan.variants):
    changes = frozen.point(variant, size, TEXT)['changes']
    steps, every, warmup = (
        changes.get(f'{group}.{name}', frozen.base_config[group][name])
        for group, name in (('train', 'steps'), ('eval', 'every_steps'),
                            ('optim', 'warmup_steps')))
    found.append(sum(n >= warmup for n in {*range(every, steps, every), steps}))
  return min(found)


def _speed_up(size: str, by: str, pairs) -> findings.SpeedUp:
  laws = [tuple(_law(x, by) for x in pair) for pair in pairs]
  ratios = [statistics.speed_up(*pair) for pair in laws]
  if None in ratios:
    return findings.SpeedUp(size, by, None, None, None, len(pairs), None)
  x = statistics.over_seeds(ratios)
  error = max(law.rms for pair in laws for law in pair)
  return findings.SpeedUp(size, by, x.mean, x.low, x.high, x.seeds, error)


def _law(outcome: Outcome, by: str) -> statistics.PowerLaw | None:
  """Fits a curve from where the learning rate had reached its height."""
  curve = outcome.curve
  if not curve:
    return None
  loss = curve['loss']
  rows = zip(curve[by], loss, curve.get('warm', [True] * len(loss)),
             strict=True)
  known = [(math.nan if x is None else x, y) for x, y, warm in rows if warm]
  return statistics.power_law(*zip(*known)) if known else None
