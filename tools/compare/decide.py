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
  seeds whose runs ended, and a variant of which more runs diverged than the
  plan allows, or significantly more than of the base, is 'unstable', whatever
  its effect.
- Sizes need not agree by significance, only by the sign of their means. That
  too fails by chance where an effect is small, so the power that is announced
  counts it in.
- Power is announced for a standard deviation that is an estimate:
  statistics.py.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from tools.compare import statistics
from tools.compare.plan import AGAIN, Measure, Outcome, Plan

BETTER, WORSE, NONE_SHOWN = 'better', 'worse', 'no difference shown'
DISAGREE, UNSTABLE = 'sizes disagree', 'unstable'
VERDICTS = (BETTER, WORSE, NONE_SHOWN, DISAGREE, UNSTABLE)
NO_NOISE = 'noise unknown'  # of a sweep, with too few seeds for any verdict
PASSED, STOPPED = 'passed', 'stopped at the screen'
STOPPED_UNSTABLE = f'{STOPPED}: unstable'
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
    sd: of the paired differences, or of their means over the sizes.
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
  seeds: int
  level: float
  smallest_effect: float | None = None
  seeds_needed: int | None = None
  power: float | None = None


class Announced(NamedTuple):
  """What the whole study can find, said before it is run.

  Attributes:
    power: of the screening and the confirmation together: the product. Both
      hang on the same noise, which is an estimate, so it is rather more.
    enough: whether that is as much as the plan wants.
    sentence: all this, for a reader.
  """
  power: float
  enough: bool
  sentence: str


class Effect(NamedTuple):
  """A mean over the pairs of seeds that both ended, and Student's p of it."""
  size: str
  effect: float | None
  low: float | None
  high: float | None
  n: int
  p: float | None


class SpeedUp(NamedTuple):
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
  fit_error: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A variant beside the base: at the smallest size in the screening, at all
  sizes in the confirmation.

  Attributes:
    effect, low, high: mean over sizes of the paired differences, over the n
      seeds whose runs of both ended at all sizes.
    p, p_corrected: Student's over these seeds; corrected over the variants, by
      Benjamini-Hochberg in the screening and by Holm in the confirmation, and
      for measures that are not primary over all of these together.
    sizes: each size by itself.
    diverged, base_diverged, runs: of `runs` runs each.
    p_diverged: that it diverges more often than the base by chance (exact
      McNemar, one-sided, Holm over the variants).
    verdict: of VERDICTS; in the screening PASSED, STOPPED or STOPPED_UNSTABLE.
    trend: by how much the effect grows for ten times the parameters of the
      base; of the primary measure in the confirmation, as are speed_ups.
    text: half of the effect's 95 % interval over the documents of what is held
      out, if they are known: what another text of the kind may change.
  """
  variant: str
  measure: str
  effect: float | None
  low: float | None
  high: float | None
  n: int
  p: float | None
  p_corrected: float | None
  sizes: list[Effect]
  diverged: int
  base_diverged: int
  runs: int
  p_diverged: float
  verdict: str
  trend: Effect | None = None
  speed_ups: list[SpeedUp] = dataclasses.field(default_factory=list)
  text: float | None = None


BY = ('flops', 'seconds')  # speed-ups
Outcomes = Iterable[Outcome]
Runs = Mapping[tuple[str, str, str], Mapping[int, Outcome]]


def of_phase(outcomes: Outcomes, phase: str) -> Runs:
  """Returns {(variant, size, workload): {seed: outcome}}."""
  by_point: dict[tuple[str, str, str], dict[int, Outcome]] = {}
  for x in outcomes:
    if x.phase == phase:
      by_point.setdefault((x.variant, x.size, x.workload), {})[x.seed] = x
  return by_point


def noise(plan: Plan, outcomes: Outcomes, phase='noise') -> list[Noise]:
  """Returns, for each measure, a row for each size, one for the screening, and
  one for the confirmation, which is over the mean of the sizes.

  The last is measured as it is tested, by the seeds' means over the sizes: to
  take the sizes for independent would give it more degrees of freedom, and
  promise far too much where they are not.
  """
  runs = of_phase(outcomes, phase)
  rows = []
  for measure in plan.measures:
    both = {size: _both(runs, AGAIN, plan.base, size, measure)
            for size in plan.sizes}
    lost = [x.diverged for pairs in both.values()
            for pair in pairs.values() for x in pair]
    rate = sum(lost) / len(lost) if lost else 0.0
    for name, phase, sizes in (
        *((size, 'confirm', (size,)) for size in plan.sizes),
        (plan.sizes[0], 'screen', plan.sizes[:1]),
        (ALL, 'confirm', plan.sizes)):
      rows.append(_noise_row(plan, measure, name, phase,
                              [both[size] for size in sizes], rate))
  return rows


def _noise_row(plan: Plan, measure: Measure, name: str, phase: str, sizes,
               rate: float) -> Noise:
  share = plan.alpha if phase == 'confirm' else plan.q
  # Tests that are corrected together where all variants pass the screening.
  tests = len(plan.variants)
  if phase == 'confirm' and measure != plan.primary:
    tests *= len(plan.measures) - 1
  level, seeds = share / tests, plan.seeds[phase]
  by_seed = _differences_by_seed(sizes, measure)
  row = Noise(name, measure.name, phase, len(by_seed), None, seeds, level)
  if len(by_seed) < 2:
    return row
  sd = float(np.std(_means(by_seed), ddof=1))
  test = dict(sd=sd, sds=np.std(list(by_seed.values()), axis=0, ddof=1),
              df=len(by_seed) - 1, level=level, rate=rate, limit=plan.unstable)
  row = dataclasses.replace(row, sd=sd, smallest_effect=(
      statistics.smallest_effect(plan.power, seeds=seeds, **test)))
  if measure != plan.primary:
    return row
  return dataclasses.replace(
      row, power=statistics.power(plan.effect, seeds=seeds, **test),
      seeds_needed=statistics.seeds_needed(plan.effect, plan.power, **test))


def announce(plan: Plan, rows: Sequence[Noise]) -> Announced:
  """Returns what the study can find, of the rows of `noise`."""
  by_phase = {row.phase: row for row in rows
              if row.measure == plan.primary.name
              and (row.phase == 'screen' or row.size == ALL)}
  screen, confirm = (by_phase[phase].power or 0.0 for phase in (
      'screen', 'confirm'))
  both = screen * confirm
  enough = both >= plan.power
  sentence = (f'An effect of {plan.effect:g} in {plan.primary.name} is found '
              f'with a probability of {math.floor(100 * both)}% or more: it '
              f'passes the screening ({plan.seeds["screen"]} seeds) in '
              f'{screen:.0%} of such studies, and the confirmation '
              f'({plan.seeds["confirm"]} seeds) in {confirm:.0%}.')
  if not enough:
    needs = '; '.join(_wanted(plan, by_phase[phase])
                      for phase in ('screen', 'confirm'))
    sentence += (f' That is less than the {plan.power:.0%} that the plan '
                 f'wants: {needs}.')
  return Announced(both, enough, sentence)


def _wanted(plan: Plan, row: Noise) -> str:
  if row.sd is None:
    return f'fewer than 2 pairs of the base ended for the {row.phase}ing'
  needs = (f'{row.seeds_needed} seeds' if row.seeds_needed else
           f'more than {statistics.MOST_SEEDS:,} seeds')
  phase = 'screening' if row.phase == 'screen' else 'confirmation'
  return f'{plan.power:.0%} in the {phase} alone takes {needs}'


def screen(plan: Plan, outcomes: Outcomes, phase='screen') -> list[Verdict]:
  """Returns each variant's row at the smallest size."""
  runs = of_phase(outcomes, phase)
  rows = _family(plan, runs, [(v, plan.primary) for v in plan.variants],
                 plan.sizes[:1], 'bh')
  return [dataclasses.replace(row, verdict=(
      STOPPED_UNSTABLE if _too_many(plan, row.diverged, row.runs) else PASSED
      if row.p is not None and row.p_corrected <= plan.q else STOPPED))
          for row in rows]


def confirm(plan: Plan, outcomes: Outcomes, phase='confirm') -> list[Verdict]:
  """Returns the verdict on each variant that was run in the confirmation, for
  the primary measure; then rows for the other measures."""
  runs = of_phase(outcomes, phase)
  ran = {variant for variant, *_ in runs}
  variants = [variant for variant in plan.variants if variant in ran]
  primary = _family(plan, runs, [(v, plan.primary) for v in variants],
                    plan.sizes)
  return [dataclasses.replace(
      row, trend=_trend(plan, runs, row.variant),
      speed_ups=_speed_ups(plan, runs, row.variant),
      text=_text(plan, runs, row.variant))
          for row in primary] + _family(plan, runs, [
              (v, measure) for measure in plan.measures[1:] for v in variants
              if any(_both(runs, v, plan.base, size, measure)
                     for size in plan.sizes)], plan.sizes)


def sweep(plan: Plan, outcomes: Outcomes) -> list[Verdict]:
  """Returns the rows of a sweep, whose runs count as a confirmation: so its
  words follow the corrected p, too."""
  return [dataclasses.replace(row, verdict=NO_NOISE)
          if row.n < statistics.MIN_SEEDS else row
          for row in confirm(plan, outcomes)]


def _family(plan: Plan, runs: Runs, members, sizes: Sequence[str],
            method: str = 'holm') -> list[Verdict]:
  """Tests of (variant, measure) that are corrected together."""
  both = [[_both(runs, variant, plan.base, size, measure) for size in sizes]
          for variant, measure in members]
  effects = [_effect(ALL, _means(_differences_by_seed(pairs, measure)))
             for pairs, (_, measure) in zip(both, members)]
  ps = statistics.corrected([test.p for test in effects], method)
  more = statistics.corrected([_more_diverge(pairs) for pairs in both])
  return [_verdict(plan, sizes, *row)
          for row in zip(members, both, effects, ps, more)]


def _verdict(plan, sizes, member, pairs, effect: Effect, p_corrected,
             p_diverged) -> Verdict:
  variant, measure = member
  each = [_effect(size, _means(_differences_by_seed([part], measure)))
          for size, part in zip(sizes, pairs)]
  every = [pair for part in pairs for pair in part.values()]
  ours, base = (sum(pair[i].diverged for pair in every) for i in (0, 1))
  if _too_many(plan, ours, len(every)) or p_diverged <= plan.alpha:
    word = UNSTABLE
  elif effect.p is None or p_corrected > plan.alpha:
    word = NONE_SHOWN
  elif len({part.effect > 0 for part in each}) > 1:
    word = DISAGREE
  else:
    word = BETTER if effect.effect * measure.sign > 0 else WORSE
  return Verdict(variant, measure.name, *effect[1:], p_corrected, each, ours,
                 base, len(every), p_diverged, word)


def _too_many(plan: Plan, diverged: int, runs: int) -> bool:
  """Whether more of the runs diverged than the plan allows. The quotient is the
  double that the share is, as a product with it need not be: 29 of 100 are no
  more than 0.29, and yet more than 0.29 * 100."""
  return diverged / max(runs, 1) > plan.unstable


def _both(runs: Runs, variant: str, base: str, size: str, measure: Measure
          ) -> dict[int, tuple[Outcome, Outcome]]:
  """Returns the outcomes of the seeds of which both have the measure."""
  ours, theirs = (
      {seed: x for seed, x in runs.get((name, size, measure.workload),
                                       {}).items() if measure.name in x.values}
      for name in (variant, base))
  return {seed: (ours[seed], theirs[seed])
          for seed in sorted(ours.keys() & theirs.keys())}


def _differences_by_seed(sizes, measure: Measure) -> dict[int, list[float]]:
  """Returns the differences at each size, of the seeds whose runs ended at all
  sizes: a mean over other sizes would be another figure."""
  seeds = sorted(set.intersection(*(set(pairs) for pairs in sizes)))
  return {seed: [ours.values[measure.name] - base.values[measure.name]
                 for ours, base in (pairs[seed] for pairs in sizes)]
          for seed in seeds
          if not any(x.diverged for pairs in sizes for x in pairs[seed])}


def _means(by_seed: Mapping[int, list[float]]) -> list[float]:
  return [sum(values) / len(values) for values in by_seed.values()]


def _more_diverge(sizes) -> float:
  """McNemar's exact test, of one side: of the pairs of which one run diverged,
  the variant's is it no more often than the base's."""
  pairs = [pair for size in sizes for pair in size.values()]
  ours, base = (sum(a.diverged > b.diverged for a, b in (
      pair[::order] for pair in pairs)) for order in (1, -1))
  if not ours:
    return 1.0
  from scipy.stats import binomtest
  return float(binomtest(ours, ours + base, alternative='greater').pvalue)


def _effect(size: str, values: Sequence[float]) -> Effect:
  ends = statistics.interval(values)[:3] if values else (None,) * 3
  return Effect(size, *ends, len(values), statistics.p_value(values))


def _text(plan: Plan, runs: Runs, variant: str) -> float | None:
  """Returns the noise of the held-out text in a mean effect on the loss: over
  documents, of each of which the seeds and the sizes have one mean."""
  each = [[(ours.documents, base.documents) for ours, base in _both(
      runs, variant, plan.base, size, plan.primary).values()
           if not (ours.diverged or base.diverged)] for size in plan.sizes]
  texts = [x.get('tokens') for pairs in each for pair in pairs for x in pair]
  if (plan.primary.figure != 'loss' or not all(each) or None in texts
      or any(text != texts[0] for text in texts)):
    return None
  means = [np.mean([np.subtract(ours['nats'], base['nats'])
                    for ours, base in pairs], axis=0) for pairs in each]
  return statistics.ratio_half_width(np.mean(means, axis=0), texts[0])


def _trend(plan: Plan, runs: Runs, variant: str) -> Effect | None:
  """Returns the slope of the effect over log10 of the base's parameters.

  Each seed gives a slope by least squares over its own sizes, and the interval
  is Student's over the seeds: it holds whatever the noise of each size is.
  """
  by_seed = _differences_by_seed(
      [_both(runs, variant, plan.base, size, plan.primary)
       for size in plan.sizes], plan.primary)
  if not by_seed or len(plan.sizes) < 2:
    return None
  logs = [math.log10(next(iter(runs[
      plan.base, size, plan.primary.workload].values())).params)
          for size in plan.sizes]
  slopes, _ = np.polyfit(logs, np.array([*by_seed.values()]).T, 1)
  return _effect(ALL, slopes.tolist())


def _speed_ups(plan: Plan, runs: Runs, variant: str) -> list[SpeedUp]:
  """Returns the speed-up of a variant at each size, by FLOPs and by time, of
  the curves of the primary measure's runs; none where no curves were kept.

  For each seed, the base's spending over the variant's to the same loss, read
  from a saturating power law of each curve (statistics.speed_up).
  """
  factors = []
  for size in plan.sizes:
    pairs = [pair for pair in _both(runs, variant, plan.base, size,
                                    plan.primary).values()
             if not any(x.diverged for x in pair)]
    if any(x.curve for pair in pairs for x in pair):
      for by in BY:
        x, error = statistics.over_seeds(
            [tuple(_law(run, by) for run in pair) for pair in pairs])
        factors.append(SpeedUp(size, by, *(x[:3] if x else (None,) * 3), error))
  return factors


def _law(outcome: Outcome, by: str) -> statistics.PowerLaw | None:
  """Fits a curve from where the learning rate had reached its height."""
  curve = outcome.curve
  warm = np.array(curve.get('warm', True), bool)
  return statistics.power_law(*(
      np.where(warm, np.array(curve.get(name, [])), math.nan)
      for name in (by, 'loss')))
