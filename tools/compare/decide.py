"""What a study may say of its runs: pure functions of a plan and outcomes.

Differences are paired: seed s of a variant and of the base have the same data
in the same order, so what the seed does to both cancels. Tests are Student's
over the seeds. How often this errs, tests/tools/compare/simulate_test.py
measures on studies whose truth is known; three rules are as they are because
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
from typing import Any

import numpy as np

from tools.compare import power, statistics
from tools.compare.plan import AGAIN, TEXT, Measure, Outcome, Plan

BETTER, WORSE, NONE_SHOWN = 'better', 'worse', 'no difference shown'
DISAGREE, UNSTABLE = 'sizes disagree', 'unstable'
VERDICTS = (BETTER, WORSE, NONE_SHOWN, DISAGREE, UNSTABLE)
ALL = 'all sizes'  # the size of a row about the mean over sizes


@dataclasses.dataclass(frozen=True)
class Noise:
  """How far base and base-again stand apart, and what a test can find then.

  Attributes:
    size: of the plan, or ALL: the mean over sizes, which the confirmation
      tests.
    measure: its name.
    phase: whose test the last five figures are of: 'screen' or 'confirm'.
    pairs: that both ended, at all sizes of the row.
    sd, sd_low, sd_high: of the paired differences, or of their means over the
      sizes, with its interval.
    df: degrees of freedom of sd.
    diverged, runs: of the base's runs of this row.
    seeds: that the phase has.
    level: at which the test must find, as if all variants but one were like
      the base: alpha / variants, or q / variants; in the confirmation of a
      secondary measure alpha / (variants * secondary measures), since these
      are corrected together.
    smallest_effect: the smallest effect that is found with the power that the
      plan asks for.
    seeds_needed: for the effect that the plan wants; None for a measure that
      is not the primary one, and where 10,000 do not do.
    power: with which that effect is found; None likewise.
  """
  size: str
  measure: str
  phase: str
  pairs: int
  sd: float | None
  sd_low: float | None
  sd_high: float | None
  df: int
  diverged: int
  runs: int
  seeds: int
  level: float
  smallest_effect: float | None
  seeds_needed: int | None
  power: float | None


@dataclasses.dataclass(frozen=True)
class Announced:
  """What the whole study can find, said before it is run.

  Attributes:
    effect: that the plan wants.
    wanted: the power that the plan wants.
    screen, confirm: the power of either phase for this effect.
    power: of both together: the product. Both hang on the same noise, which
      is an estimate, so it is rather more.
    enough: whether that is as much as the plan wants.
    sentence: all this, for a reader.
  """
  effect: float
  wanted: float
  screen: float
  confirm: float
  power: float
  enough: bool
  sentence: str


@dataclasses.dataclass(frozen=True)
class Screened:
  """A variant at the smallest size.

  Attributes:
    n: pairs of seeds that both ended.
    p: Student's, over these pairs; q: corrected by Benjamini-Hochberg.
    diverged, base_diverged, runs: of `runs` runs each.
    unstable: more of its runs diverged than the plan allows.
    passed: q is at most the plan's, and it is not unstable.
  """
  variant: str
  measure: str
  effect: float | None
  low: float | None
  high: float | None
  n: int
  p: float | None
  q: float | None
  diverged: int
  base_diverged: int
  runs: int
  unstable: bool
  passed: bool


@dataclasses.dataclass(frozen=True)
class Effect:
  """A variant at one size: over the pairs of seeds that both ended."""
  size: str
  mean: float | None
  low: float | None
  high: float | None
  n: int
  p: float | None


@dataclasses.dataclass(frozen=True)
class SpeedUp:
  """How many times what the variant spends the base needs to the same loss.

  Attributes:
    by: 'flops' or 'seconds'.
    factor, low, high: geometric mean over seeds; low and high are None for
      fewer than 3.
    fit_error: rms of the fitted curves, in nats: a factor of losses that
      differ by less says nothing.
  """
  size: str
  by: str
  factor: float | None
  low: float | None
  high: float | None
  n: int
  fit_error: float | None


@dataclasses.dataclass(frozen=True)
class Trend:
  """By how much the effect grows for ten times the parameters of the base."""
  slope: float | None
  low: float | None
  high: float | None
  n: int
  p: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A variant at all sizes, on fresh seeds.

  Attributes:
    measure, primary: the verdict of the study is on the primary measure.
    effect, low, high: mean over sizes of the paired differences, over the n
      seeds whose runs of both ended at all sizes.
    p, p_holm: Student's over these seeds; corrected over the variants, and for
      measures that are not primary over all of these together.
    sizes: each size by itself.
    same_direction: whether the means of all sizes have one sign.
    counted: the effect where a run that diverged counts as guessing.
    diverged, base_diverged, runs: of `runs` runs each.
    rate_low, rate_high: Clopper and Pearson's interval of the share that
      diverges.
    p_diverged: that it diverges more often than the base by chance (exact
      McNemar, one-sided, Holm over the variants).
    verdict: of VERDICTS.
    speed_ups, trend: of the primary measure.
  """
  variant: str
  measure: str
  primary: bool
  effect: float | None
  low: float | None
  high: float | None
  n: int
  p: float | None
  p_holm: float | None
  sizes: list[Effect]
  same_direction: bool
  counted: float | None
  diverged: int
  base_diverged: int
  runs: int
  rate_low: float
  rate_high: float
  p_diverged: float
  verdict: str
  trend: Trend | None
  speed_ups: list[SpeedUp]


BY = ('flops', 'seconds')  # speed-ups
Runs = Mapping[tuple[str, str, str], Mapping[int, Outcome]]


def of_phase(outcomes: Iterable[Outcome], phase: str) -> Runs:
  """Returns {(variant, size, workload): {seed: outcome}}."""
  found: dict[tuple[str, str, str], dict[int, Outcome]] = {}
  for x in outcomes:
    if x.phase == phase:
      found.setdefault((x.variant, x.size, x.workload), {})[x.seed] = x
  return found


def noise(plan: Plan, outcomes: Iterable[Outcome]) -> list[Noise]:
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
               rate: float) -> Noise:
  share = plan.alpha if phase == 'confirm' else plan.q
  level = share / _tests(plan, measure, phase)
  seeds = getattr(plan.seeds, phase)
  by_seed = _differences_by_seed(sizes, measure)
  lost = [x.diverged for pairs in sizes for pair in pairs.values()
          for x in pair]
  row = Noise(
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


def announce(plan: Plan, rows: Sequence[Noise]
             ) -> Announced:
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
  return Announced(plan.effect, plan.power, screen, confirm, both,
                            enough, told)


def _wanted(plan: Plan, row: Noise) -> str:
  if row.sd is None:
    return f'fewer than 2 pairs of the base ended for the {row.phase}ing'
  needs = (f'{row.seeds_needed} seeds' if row.seeds_needed else
           f'more than {power.MOST_SEEDS:,} seeds')
  phase = 'screening' if row.phase == 'screen' else 'confirmation'
  return f'{plan.power:.0%} in the {phase} alone takes {needs}'


def screen(plan: Plan, outcomes: Iterable[Outcome]) -> list[Screened]:
  """Returns each variant's row at the smallest size."""
  runs, measure = of_phase(outcomes, 'screen'), plan.primary
  told = []
  for variant in plan.variants:
    pairs = _both(runs, variant, plan.base, plan.sizes[0], measure.workload)
    values = _differences(pairs, measure)
    told.append((variant, pairs, values, statistics.p_value(values)))
  # A test that could not be done is a member of the family all the same.
  qs = statistics.corrected([1.0 if p is None else p for *_, p in told],
                            'bh')
  found = []
  for (variant, pairs, values, p), q in zip(told, qs):
    ours, base, unstable = _stability(plan, [pairs])
    mean, low, high = _interval(values)
    found.append(Screened(
        variant, measure.name, mean, low, high, len(values), p,
        None if p is None else q, ours, base, len(pairs), unstable,
        p is not None and q <= plan.q and not unstable))
  return found


def confirm(plan: Plan, outcomes: Iterable[Outcome]) -> list[Verdict]:
  """Returns the verdict on each variant that was run in the confirmation, for
  the primary measure; then rows for the other measures."""
  runs = of_phase(outcomes, 'confirm')
  ran = {variant for variant, *_ in runs}
  variants = [variant for variant in plan.variants if variant in ran]
  primary = _family(plan, runs, [(v, plan.primary) for v in variants])
  return primary + _family(plan, runs, [
      (v, measure) for measure in plan.measures[1:] for v in variants
      if any(key[::2] == (v, measure.workload) for key in runs)])


def _family(plan: Plan, runs: Runs, members) -> list[Verdict]:
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
             ) -> Verdict:
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
    word = UNSTABLE
  elif p is None or p_holm > plan.alpha:
    word = NONE_SHOWN
  elif not one_way:
    word = DISAGREE
  else:
    word = BETTER if mean * measure.sign > 0 else WORSE
  rates = _share(ours, runs_each)
  by_seed = _differences_by_seed(pairs, measure)
  return Verdict(
      variant, measure.name, primary, mean, low, high, len(values), p,
      None if p is None else p_holm, sizes, one_way, _counted(pairs, measure),
      ours, base, runs_each, *rates, p_diverged, word,
      _trend(plan, runs, by_seed) if primary else None,
      _speed_ups(plan, runs, variant) if primary else [])


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
  from scipy.stats import binomtest
  if not runs:
    return 0.0, 1.0
  found = binomtest(count, runs).proportion_ci()  # Clopper and Pearson's
  return float(found.low), float(found.high)


def _effect(size: str, values: Sequence[float]) -> Effect:
  return Effect(size, *_interval(values), len(values),
                         statistics.p_value(values))


def _interval(values: Sequence[float]
              ) -> tuple[float | None, float | None, float | None]:
  if not values:
    return None, None, None
  found = statistics.interval(values)
  return found.mean, found.low, found.high

def _trend(plan: Plan, runs, by_seed: Mapping[int, Sequence[float]]
           ) -> Trend | None:
  """Returns the slope of the effect over log10 of the base's parameters.

  Each seed gives a slope by least squares over its own sizes, and the interval
  is Student's over the seeds: it holds whatever the noise of each size is.

  Args:
    plan: of the study.
    runs: of the confirmation, as of_phase has them.
    by_seed: the differences at each size.
  """
  own = [runs.get((plan.base, size, plan.primary.workload), {})
         for size in plan.sizes]
  if not all(own) or not by_seed:
    return None
  logs = [math.log10(next(iter(x.values())).params) for x in own]
  if len(set(logs)) < 2:
    return None
  slopes = np.polyfit(logs, np.array([*by_seed.values()]).T, 1)[0]
  found = statistics.interval(slopes)
  return Trend(found.mean, found.low, found.high, found.seeds,
               statistics.p_value(slopes))


def _speed_ups(plan: Plan, runs, variant: str) -> list[SpeedUp]:
  """Returns the speed-up of a variant at each size, by FLOPs and by time, of
  the curves of held-out loss on text; none where no curves were kept.

  For each seed, the base's spending over the variant's to the same loss, read
  from a saturating power law of each curve (statistics.speed_up).
  """
  found = []
  for size in plan.sizes:
    pairs = [pair for pair in _both(runs, variant, plan.base, size, TEXT
                                    ).values()
             if not any(x.diverged for x in pair)]
    if any(x.curve for pair in pairs for x in pair):
      found += [_speed_up(size, by, pairs) for by in BY]
  return found


def _speed_up(size: str, by: str, pairs) -> SpeedUp:
  x, error = statistics.over_seeds(
      [tuple(_law(run, by) for run in pair) for pair in pairs])
  ends = (x.mean, x.low, x.high) if x else (None,) * 3
  return SpeedUp(size, by, *ends, len(pairs), error)


def _law(outcome: Outcome, by: str) -> statistics.PowerLaw | None:
  """Fits a curve from where the learning rate had reached its height."""
  curve = outcome.curve
  if not curve:
    return None
  warm = curve.get('warm', [True] * len(curve['loss']))
  known = [(math.nan if x is None else x, y) for x, y, is_warm in zip(
      curve[by], curve['loss'], warm, strict=True) if is_warm]
  return statistics.power_law(*zip(*known)) if known else None


def evaluations(frozen: Any, size: str) -> int:
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
