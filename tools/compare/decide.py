"""What a study may say of its runs: pure functions of a plan and outcomes.

Differences are paired: seed s of a variant and of the base have the same data
in the same order, so what the seed does to both cancels. Tests are Student's
over the seeds. How often this errs, `python -m tools.study simulate` measures
(docs/studies.md, "Can it be believed?"); three rules are as they are because
of it:

- A run that diverged is no figure of a mean, but a result of its own. Counted
  at what guessing gives, it is an outlier a hundred times the spread: an
  interval then holds the truth far less often than it says, and a variant as
  stable as the base is hardly ever found to be better. So effects are over
  seeds whose runs ended, `counted` is told beside them, and a variant of which
  more runs diverged than the plan allows, or significantly more than of the
  base, is 'unstable', whatever its effect.
- Sizes need not agree by significance, only by the sign of their means. That
  too fails by chance where an effect is small, so the power that is announced
  counts it in.
- Power is announced for a standard deviation that is an estimate: power.py.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math

import numpy as np

from tools.compare import findings, power, speed
from tools.compare.findings import ALL
from tools.compare.plan import AGAIN, Measure, Outcome, Plan
from tools.compare import statistics

Runs = Mapping[tuple[str, str, str], Mapping[int, Outcome]]


def of_phase(outcomes: Iterable[Outcome], phase: str) -> Runs:
  """Returns {(variant, size, workload): {seed: outcome}}."""
  found: dict[tuple[str, str, str], dict[int, Outcome]] = {}
  for x in outcomes:
    if x.phase == phase:
      found.setdefault((x.variant, x.size, x.workload), {})[x.seed] = x
  return found


def noise(plan: Plan, outcomes: Iterable[Outcome]) -> list[findings.Noise]:
  """Returns, for each measure, a row for each size, one for the screening, and
  one for the confirmation, which is over the mean of the sizes.

  The last is measured as it is tested, by the seeds' means over the sizes: to
  take the sizes for independent would give it more degrees of freedom, and
  promise far too much where they are not.
  """
  runs = of_phase(outcomes, 'noise')
  found = []
  for measure in plan.measures:
    both = {size: _both(runs, AGAIN, plan.base, size, measure.workload)
            for size in plan.sizes}
    lost = [x.diverged for pairs in both.values()
            for pair in pairs.values() for x in pair]
    rate = sum(lost) / len(lost) if lost else 0.0
    for name, phase, sizes in (
        *((size, 'confirm', (size,)) for size in plan.sizes),
        (plan.sizes[0], 'screen', plan.sizes[:1]),
        (ALL, 'confirm', plan.sizes)):
      found.append(_noise_row(plan, measure, name, phase,
                              [both[size] for size in sizes], rate))
  return found


def _noise_row(plan: Plan, measure: Measure, name: str, phase: str, sizes,
               rate: float) -> findings.Noise:
  share = plan.alpha if phase == 'confirm' else plan.q
  level = share / _tests(plan, measure, phase)
  seeds = getattr(plan.seeds, phase)
  by_seed = _differences_by_seed(sizes, measure)
  lost = [x.diverged for pairs in sizes for pair in pairs.values()
          for x in pair]
  row = findings.Noise(
      name, measure.name, phase, len(by_seed), None, None, None,
      max(len(by_seed) - 1, 0), sum(lost), len(lost), seeds, level, None, None,
      None)
  if len(by_seed) < 2:
    return row
  from scipy.stats import chi2
  sd = float(np.std(_means(by_seed), ddof=1))
  low, high = (sd * math.sqrt(row.df / chi2.isf(tail, row.df))
               for tail in (0.025, 0.975))
  test = dict(sd=sd, sds=np.std(list(by_seed.values()), axis=0, ddof=1),
              df=row.df, level=level, rate=rate, limit=plan.unstable)
  primary = measure == plan.primary
  return dataclasses.replace(
      row, sd=sd, sd_low=low, sd_high=high,
      smallest_effect=power.smallest_effect(plan.power, seeds=seeds, **test),
      seeds_needed=power.seeds_needed(plan.effect, plan.power, **test)
      if primary else None,
      power=power.power(plan.effect, seeds=seeds, **test) if primary else None)


def _tests(plan: Plan, measure: Measure, phase: str) -> int:
  """Returns how many tests may be corrected together with one of a measure:
  as `confirm` has them where all variants pass the screening."""
  secondary = phase == 'confirm' and measure != plan.primary
  return len(plan.variants) * (len(plan.measures) - 1 if secondary else 1)


def announce(plan: Plan, rows: Sequence[findings.Noise]
             ) -> findings.Announced:
  """Returns what the study can find, of the rows of `noise`."""
  own = {row.phase: row for row in rows if row.measure == plan.primary.name
         and (row.phase == 'screen' or row.size == ALL)}
  screen, confirm = (own[phase].power or 0.0 for phase in (
      'screen', 'confirm'))
  both = screen * confirm
  enough = both >= plan.power
  told = (f'An effect of {plan.effect:g} in {plan.primary.name} is found with '
          f'a probability of {math.floor(100 * both)}% or more: it passes the '
          f'screening ({plan.seeds.screen} seeds) in {screen:.0%} of such '
          f'studies, and the confirmation ({plan.seeds.confirm} seeds) in '
          f'{confirm:.0%}.')
  if not enough:
    told += (f' That is less than the {plan.power:.0%} that the plan wants: '
             + '; '.join(_wanted(plan, own[phase])
                         for phase in ('screen', 'confirm')) + '.')
  return findings.Announced(plan.effect, plan.power, screen, confirm, both,
                            enough, told)


def _wanted(plan: Plan, row: findings.Noise) -> str:
  if row.sd is None:
    return f'fewer than 2 pairs of the base ended for the {row.phase}ing'
  needs = (f'{row.seeds_needed} seeds' if row.seeds_needed else
           f'more than {power.MOST_SEEDS:,} seeds')
  phase = 'screening' if row.phase == 'screen' else 'confirmation'
  return f'{plan.power:.0%} in the {phase} alone takes {needs}'


def screen(plan: Plan, outcomes: Iterable[Outcome]) -> list[findings.Screened]:
  """Returns each variant's row at the smallest size."""
  runs, measure = of_phase(outcomes, 'screen'), plan.primary
  told = []
  for variant in plan.variants:
    pairs = _both(runs, variant, plan.base, plan.sizes[0], measure.workload)
    values = _differences(pairs, measure)
    told.append((variant, pairs, values, statistics.p_value(values)))
  # A test that could not be done is a member of the family all the same.
  qs = statistics.corrected([1.0 if p is None else p for *_, p in told],
                            'fdr_bh')
  found = []
  for (variant, pairs, values, p), q in zip(told, qs):
    ours, base, unstable = _stability(plan, [pairs])
    mean, low, high = _interval(values)
    found.append(findings.Screened(
        variant, measure.name, mean, low, high, len(values), p,
        None if p is None else q, ours, base, len(pairs), unstable,
        p is not None and q <= plan.q and not unstable))
  return found


def confirm(plan: Plan, outcomes: Iterable[Outcome]) -> list[findings.Verdict]:
  """Returns the verdict on each variant that was run in the confirmation, for
  the primary measure; then rows for the other measures."""
  runs = of_phase(outcomes, 'confirm')
  ran = {variant for variant, *_ in runs}
  variants = [variant for variant in plan.variants if variant in ran]
  primary = _family(plan, runs, [(v, plan.primary) for v in variants])
  return primary + _family(plan, runs, [
      (v, measure) for measure in plan.measures[1:] for v in variants
      if any(key[::2] == (v, measure.workload) for key in runs)])


def _family(plan: Plan, runs: Runs, members) -> list[findings.Verdict]:
  """Tests that are corrected together."""
  both = [[_both(runs, variant, plan.base, size, measure.workload)
           for size in plan.sizes] for variant, measure in members]
  whole = [_means(_differences_by_seed(pairs, measure))
           for pairs, (_, measure) in zip(both, members)]
  ps = [statistics.p_value(values) for values in whole]
  holm = statistics.corrected([1.0 if p is None else p for p in ps])
  more = statistics.corrected([_more_diverge(pairs) for pairs in both])
  return [_verdict(plan, runs, *row) for row in zip(
      members, both, whole, ps, holm, more)]


def _verdict(plan, runs, member, pairs, values, p, p_holm, p_diverged
             ) -> findings.Verdict:
  variant, measure = member
  primary = measure == plan.primary
  sizes = [_effect(size, _differences(own, measure))
           for size, own in zip(plan.sizes, pairs)]
  mean, low, high = _interval(values)
  one_way = None not in [x.mean for x in sizes] and len(
      {math.copysign(1, x.mean) for x in sizes}) == 1
  ours, base, unstable = _stability(plan, pairs)
  runs_each = sum(map(len, pairs))
  unstable = unstable or p_diverged <= plan.alpha
  if unstable:
    word = findings.UNSTABLE
  elif p is None or p_holm > plan.alpha:
    word = findings.NONE_SHOWN
  elif not one_way:
    word = findings.DISAGREE
  else:
    word = findings.BETTER if mean * measure.sign > 0 else findings.WORSE
  rates = _share(ours, runs_each)
  by_seed = _differences_by_seed(pairs, measure)
  return findings.Verdict(
      variant, measure.name, primary, mean, low, high, len(values), p,
      None if p is None else p_holm, sizes, one_way, _counted(pairs, measure),
      ours, base, runs_each, *rates, p_diverged, word,
      speed.trend(plan, runs, by_seed) if primary else None,
      speed.speed_ups(plan, runs, variant) if primary else [])


def _both(runs: Runs, variant: str, base: str, size: str, workload: str
          ) -> dict[int, tuple[Outcome, Outcome]]:
  """Returns the outcomes of the seeds that both have."""
  ours = runs.get((variant, size, workload), {})
  theirs = runs.get((base, size, workload), {})
  return {seed: (ours[seed], theirs[seed])
          for seed in sorted(ours.keys() & theirs.keys())}


def _difference(pair: tuple[Outcome, Outcome], measure: Measure) -> float:
  ours, base = pair
  return ours.values[measure.name] - base.values[measure.name]


def _differences(pairs, measure: Measure) -> list[float]:
  """Of the pairs that both ended."""
  return [_difference(pair, measure) for pair in pairs.values()
          if not any(x.diverged for x in pair)]


def _differences_by_seed(sizes, measure: Measure) -> dict[int, list[float]]:
  """Returns the differences at each size, of the seeds whose runs ended at all
  sizes: a mean over other sizes would be another figure."""
  seeds = sorted(set.intersection(*(set(pairs) for pairs in sizes)))
  return {seed: [_difference(pairs[seed], measure) for pairs in sizes]
          for seed in seeds
          if not any(x.diverged for pairs in sizes for x in pairs[seed])}


def _means(by_seed: Mapping[int, list[float]]) -> list[float]:
  return [sum(values) / len(values) for values in by_seed.values()]


def _counted(sizes, measure: Measure) -> float | None:
  """The mean over sizes where a run that diverged has the value of guessing,
  as its outcome says."""
  if not all(sizes):
    return None
  return sum(sum(_difference(pair, measure) for pair in pairs.values())
             / len(pairs) for pairs in sizes) / len(sizes)


def _stability(plan: Plan, sizes) -> tuple[int, int, bool]:
  """Returns how many runs of the variant and the base diverged, and whether
  that is more of the variant's than the plan allows."""
  pairs = [pair for own in sizes for pair in own.values()]
  ours, base = (sum(pair[i].diverged for pair in pairs) for i in (0, 1))
  return ours, base, ours > plan.unstable * len(pairs)


def _more_diverge(sizes) -> float:
  """McNemar's exact test, of one side: of the pairs of which one run diverged,
  the variant's is it no more often than the base's."""
  pairs = [pair for own in sizes for pair in own.values()]
  ours, base = (sum(a.diverged > b.diverged for a, b in (
      pair[::order] for pair in pairs)) for order in (1, -1))
  if not ours:
    return 1.0
  from scipy.stats import binomtest
  return float(binomtest(ours, ours + base, alternative='greater').pvalue)


def _share(count: int, runs: int) -> tuple[float, float]:
  from statsmodels.stats.proportion import proportion_confint
  low, high = proportion_confint(count, runs, 0.05, method='beta') if (
      runs) else (0.0, 1.0)
  return float(low), float(high)


def _effect(size: str, values: Sequence[float]) -> findings.Effect:
  return findings.Effect(size, *_interval(values), len(values),
                         statistics.p_value(values))


def _interval(values: Sequence[float]
              ) -> tuple[float | None, float | None, float | None]:
  if not values:
    return None, None, None
  found = statistics.interval(values)
  return found.mean, found.low, found.high
