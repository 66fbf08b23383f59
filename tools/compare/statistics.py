"""What may be said of a difference: intervals over paired seeds, and fits.

Seeds are paired: seed s of every variant sees the same data in the same order,
so the differences of a pair vary less than the runs themselves, and their
spread is the noise that a difference must leave behind.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

import numpy as np

MIN_SEEDS = 3  # with fewer, the spread itself is not known
MIN_POINTS = 6  # of a curve whose three constants are fitted


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean over seeds.

  Attributes:
    mean: the mean.
    low, high: of its 95 % interval; None where there are too few seeds.
    seeds: how many.
    least, most: of the seeds' own values.
  """
  mean: float
  low: float | None
  high: float | None
  seeds: int
  least: float
  most: float

  @property
  def known(self) -> bool:
    return self.low is not None

  @property
  def bar(self) -> tuple[float, float] | None:
    """What a figure draws: the interval; of two seeds, from one to the other;
    of one, nothing."""
    if self.known:
      return self.low, self.high
    return (self.least, self.most) if self.seeds == 2 else None

  def holds(self, value: float) -> bool:
    return self.known and self.low <= value <= self.high


def half_width(values: Sequence[float]) -> float:
  """Returns half of Student's 95 % interval of a mean of two or more values."""
  from scipy.special import stdtrit
  n = len(values)
  return float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n))


def interval(values: Sequence[float]) -> Interval:
  """Returns the mean and Student's interval around it."""
  n, mean = len(values), float(np.mean(values))
  ends = None, None
  if n >= MIN_SEEDS:
    half = half_width(values)
    ends = mean - half, mean + half
  return Interval(mean, *ends, n, float(min(values)), float(max(values)))


def p_value(values: Sequence[float]) -> float | None:
  """Returns Student's two-sided p of a mean of 0; None for too few values.

  Values that are all alike have no spread to be measured by, as where a task is
  solved wholly at every seed or not at all. Their p is that of the sign test:
  2^(1 - n), and 1 where they are all 0.
  """
  n = len(values)
  if n < MIN_SEEDS:
    return None
  spread, mean = float(np.std(values, ddof=1)), float(np.mean(values))
  if spread <= 1e-12 * abs(mean):
    return 2.0 ** (1 - n) if mean else 1.0
  from scipy.special import stdtr
  return float(2 * stdtr(n - 1, -abs(mean) / (spread / math.sqrt(n))))


def corrected(p: Sequence[float | None], method: str = 'holm'
              ) -> list[float | None]:
  """Returns the p-values as corrected for being several.

  Args:
    p: of the tests; None for one that could not be done, which is no member of
      the family.
    method: 'holm' (Holm 1979), for the probability that any of them is wrong,
      or 'bh' (Benjamini and Hochberg 1995), for the share of wrong ones among
      those found.
  """
  known = np.array([x for x in p if x is not None])
  if method == 'holm':  # the smallest times n, the next times n - 1, ...
    order = np.argsort(known)
    weighed = known[order] * np.arange(len(known), 0, -1)
    found = np.empty(len(known))
    found[order] = np.minimum(np.maximum.accumulate(weighed), 1.0)
  else:
    from scipy import stats
    found = stats.false_discovery_control(known) if len(known) else known
  each = iter(found.tolist())
  return [None if x is None else next(each) for x in p]


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]
                ) -> list[float]:
  """Returns ours - theirs of each seed that both have."""
  return [ours[s] - theirs[s] for s in sorted(ours.keys() & theirs.keys())]


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]
           ) -> Interval | None:
  """Returns ours - theirs over the seeds that both have; None: none."""
  values = differences(ours, theirs)
  return interval(values) if values else None


def beside_the_base(variants: Sequence[Mapping[int, float]],
                    base: Mapping[int, float]
                    ) -> list[tuple[float | None, float | None]]:
  """Returns p of each variant's paired differences, and p by Holm over all of
  them; None for those with too few pairs."""
  each = [p_value(differences(own, base)) for own in variants]
  return list(zip(each, corrected(each)))


def verdict(difference: Interval | None) -> str:
  """What a difference in loss says: better, worse, noise, unknown or n/a."""
  if difference is None:
    return 'n/a'
  if not difference.known:
    return 'unknown'
  if difference.holds(0.0):
    return 'noise'
  return 'better' if difference.mean < 0 else 'worse'


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """loss(C) = floor + scale / C^exponent, fitted between `first` and `last`.

  Attributes:
    rms: of the residuals, in nats.
  """
  floor: float
  scale: float
  exponent: float
  first: float
  last: float
  rms: float

  def loss(self, compute):
    return self.floor + self.scale * np.asarray(compute) ** -self.exponent

  def compute(self, loss: float) -> float | None:
    """Returns where the curve reaches `loss`; None outside what was fitted."""
    end, start = self.loss(self.last), self.loss(self.first)
    slack = 1e-9 * abs(start)  # of the arithmetic: the ends are inside
    if not end - slack <= loss <= start + slack:
      return None
    return float((self.scale / (loss - self.floor)) ** (1 / self.exponent))


def power_law(compute: Sequence[float], loss: Sequence[float]
              ) -> PowerLaw | None:
  """Fits a saturating power law by least squares; None where it cannot.

  For each exponent the two other constants are a linear fit (floor >= 0), so
  one exponent is all there is to search, and no start has to be guessed.
  """
  x, y = np.asarray(compute, float), np.asarray(loss, float)
  good = np.isfinite(x) & np.isfinite(y) & (x > 0)
  x, y = x[good], y[good]
  if len(x) < MIN_POINTS or np.ptp(x) == 0:
    return None
  from scipy.optimize import minimize_scalar, nnls
  unit = np.exp(np.mean(np.log(x)))
  linear = lambda a: nnls(np.stack([np.ones_like(x), (x / unit) ** -a], 1), y)
  error = lambda a: linear(a)[1]
  tried = np.geomspace(0.01, 5.0, 60)
  i = int(np.argmin([error(a) for a in tried]))
  bounds = tried[max(i - 1, 0)], tried[min(i + 1, len(tried) - 1)]
  best = minimize_scalar(error, bounds=bounds, method='bounded',
                         options={'xatol': 1e-10})
  (floor, scale), norm = linear(best.x)
  if scale <= 0:  # the loss did not fall
    return None
  return PowerLaw(float(floor), float(scale * unit ** best.x), float(best.x),
                  float(x.min()), float(x.max()), norm / math.sqrt(len(x)))


def speed_up(ours: PowerLaw | None, theirs: PowerLaw | None) -> float | None:
  """Returns how many times the compute of `ours` the other curve needs to
  reach the same loss: the worse of the two at their ends, which both have
  reached, so that neither curve is read where it was not measured."""
  if ours is None or theirs is None:
    return None
  level = max(float(law.loss(law.last)) for law in (ours, theirs))
  needed, base = ours.compute(level), theirs.compute(level)
  return None if needed is None or base is None else base / needed


def over_seeds(pairs: Sequence[tuple[PowerLaw | None, PowerLaw | None]]
               ) -> tuple[Interval | None, float | None]:
  """Returns the geometric mean over seeds of speed-ups, with its interval, and
  the largest error of the fits, in nats; None where a seed gives no speed-up,
  since the seeds that give one are those that went well."""
  ratios = [speed_up(*pair) for pair in pairs]
  if not ratios or None in ratios:
    return None, None
  logs = interval(np.log(ratios))
  ends = [None if x is None else math.exp(x) for x in (logs.low, logs.high)]
  return (Interval(math.exp(logs.mean), *ends, logs.seeds,
                   float(min(ratios)), float(max(ratios))),
          max(law.rms for pair in pairs for law in pair))
