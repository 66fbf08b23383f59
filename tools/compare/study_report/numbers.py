"""Numbers as a reader is shown them; what is not known is 'n/a'."""

from collections.abc import Mapping
import math
from typing import Any

from tools.compare.pages.tables import Cell

UNKNOWN = 'n/a'


def known(x: float | None) -> bool:
  return x is not None and math.isfinite(x)


def plain(x: float | None, digits: int = 4) -> str:
  return f'{x:.{digits}f}' if known(x) else UNKNOWN


def with_interval(mean: float | None, low: float | None, high: float | None,
                  form: str = '+.4f') -> str:
  """'+0.1234 [-0.0100, +0.2568]'; the mean alone where no interval is known."""
  if not known(mean):
    return UNKNOWN
  ends = f' [{low:{form}}, {high:{form}}]' if known(low) and known(high) else ''
  return f'{mean:{form}}{ends}'


def estimate(row: Mapping[str, Any], name: str = 'effect') -> Cell:
  """The cell of an effect with its interval."""
  return Cell(with_interval(row[name], row['low'], row['high']),
              row[name] if known(row[name]) else None)


def p(x: float | None) -> Cell:
  """The cell of a probability: four digits, and no 0."""
  if not known(x):
    return Cell(UNKNOWN)
  return Cell('< 0.0001' if x < 1e-4 else f'{x:.4f}', x)


def ratio(row: Mapping[str, Any] | None) -> Cell:
  """The cell of a speed-up."""
  if row is None or not known(row['factor']):
    return Cell(UNKNOWN)
  return Cell(with_interval(row['factor'], row['low'], row['high'], '.2f'),
              row['factor'])


def percent(x: float) -> str:
  return f'{100 * x:.0f} %'


def share(x: float | None) -> Cell:
  """The cell of a power or another share."""
  return Cell(percent(x), x) if known(x) else Cell(UNKNOWN)


def count(x: float | None) -> Cell:
  return Cell(f'{x:,.0f}', x) if known(x) else Cell(UNKNOWN)


def flops(x: float | None) -> Cell:
  return Cell(f'{x:.3g}', x) if known(x) else Cell(UNKNOWN)


def duration(seconds: float | None) -> Cell:
  """The cell of a time, in the unit that suits it."""
  if not known(seconds):
    return Cell(UNKNOWN)
  for unit, size in (('h', 3600), ('min', 60)):
    if seconds >= size:
      return Cell(f'{seconds / size:.1f} {unit}', seconds)
  return Cell(f'{seconds:.1f} s', seconds)


def some(n: int, one: str, many: str = '') -> str:
  """'1 run', '3 runs', 'no run'."""
  return f'{n or "no"} {one if n < 2 else many or one + "s"}'
