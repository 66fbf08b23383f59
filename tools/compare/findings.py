"""What decide.py finds: rows of results.json, which a report draws.

Effects are differences variant - base in the units of the measure; which sign
is an improvement, `Measure.sign` says. Intervals are of 95 %. None stands where
a figure cannot be given.
"""

import dataclasses

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
