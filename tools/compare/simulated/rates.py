"""Counts over many simulated studies, with their Monte-Carlo errors."""

from collections.abc import Callable
import dataclasses
import math


@dataclasses.dataclass
class Mean:
  """A mean over studies; of true and false, a rate."""
  total: float = 0.0
  square: float = 0.0
  count: int = 0

  def add(self, value: float) -> None:
    self.total += value
    self.square += value * value
    self.count += 1

  @property
  def value(self) -> float:
    return self.total / self.count if self.count else math.nan

  @property
  def error(self) -> float:
    """The standard error of the mean."""
    if self.count < 2:
      return math.nan
    variance = max(self.square / self.count - self.value ** 2, 0.0)
    return math.sqrt(variance / (self.count - 1))


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of what is printed.

  Attributes:
    setting: of the simulated studies.
    what: was counted.
    value, error: the rate, and its Monte-Carlo standard error.
    studies: that it is of: those in which it could be seen.
    promised: what it should be; '': nothing is promised.
    holds: whether it is, up to 3 standard errors; None: nothing is promised.
  """
  setting: str
  what: str
  value: float
  error: float
  studies: int
  promised: str = ''
  holds: bool | None = None


def told(setting: str, what: str, mean: Mean) -> Row:
  """A figure of which nothing is promised."""
  return Row(setting, what, mean.value, mean.error, mean.count)


def at_most(setting: str, what: str, mean: Mean, bound: float) -> Row:
  return Row(setting, what, mean.value, mean.error, mean.count,
             f'<= {bound:g}', mean.value <= bound + 3 * mean.error)


def at_least(setting: str, what: str, mean: Mean, bound: float) -> Row:
  return Row(setting, what, mean.value, mean.error, mean.count,
             f'>= {bound:.3g}', mean.value >= bound - 3 * mean.error)


def near(setting: str, what: str, mean: Mean, wanted: float, within: float
         ) -> Row:
  return Row(setting, what, mean.value, mean.error, mean.count,
             f'{wanted:.3g} +- {within:g}',
             abs(mean.value - wanted) <= within + 3 * mean.error)


def grouped(studies: int, one: Callable[[int, Callable[[str, float], None]],
                                        None]) -> dict[str, Mean]:
  """Returns what `one(number, add)` adds to each name over the studies.

  The figures of one study hang together, so what it adds several times under
  one name counts as one: their mean. A rate over variants therefore has the
  error that the studies give it.
  """
  means: dict[str, Mean] = {}
  for number in range(studies):
    own: dict[str, list[float]] = {}
    one(number, lambda name, value, own=own: own.setdefault(
        name, []).append(float(value)))
    for name, values in own.items():
      means.setdefault(name, Mean()).add(sum(values) / len(values))
  return means
