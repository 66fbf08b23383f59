"""Tables of a report, and the numbers in them; 'n/a' is what is not known.

A table is rows of cells by heading. What the headings mean stands in
templates/columns.toml, and how a table is written as HTML, Markdown or LaTeX in
page.py.
"""

from collections.abc import Iterable, Mapping, Sequence
import csv
import dataclasses
import functools
import io
import math
import pathlib
import tomllib
from typing import Any

import numpy as np

from tools.compare.statistics import Interval

TEMPLATES = pathlib.Path(__file__).parent / 'templates'
UNKNOWN = 'n/a'
VERDICTS = {
    'better': 'better', 'worse': 'worse', 'noise': 'inside the noise',
    'unknown': 'noise unknown', 'n/a': UNKNOWN}


@dataclasses.dataclass(frozen=True)
class Cell:
  """`value` is what a column sorts by: a number or a text."""
  text: str
  value: float | str | None = None
  mark: str = ''  # better, worse or noise: how it is coloured


@functools.cache
def _meanings() -> Mapping[str, Mapping[str, str]]:
  return tomllib.loads((TEMPLATES / 'columns.toml').read_text())


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of cells by heading, the same headings in all of them.

  Attributes:
    name: its anchor, its label, and where columns.toml explains its headings.
    rows: from top to bottom.
    notes: what stands below.
    title: what stands above.
    words: what the explanations of columns.toml leave open, by name.
    why: the explanations of headings that are not in columns.toml.
  """
  name: str
  rows: Sequence[Mapping[str, Cell]]
  notes: Sequence[str] = ()
  title: str = ''
  words: Mapping[str, str] = dataclasses.field(default_factory=dict)
  why: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def columns(self) -> dict[str, str]:
    """What each heading means, '' where it says so itself."""
    own = _meanings().get(self.name, {})
    return {heading: self.why.get(heading) or own.get(heading, '').format(
        **self.words) for heading in (self.rows[0] if self.rows else ())}

  def text(self) -> str:
    """Renders for a terminal."""
    rows = [list(self.columns)]
    rows += [[cell.text for cell in row.values()] for row in self.rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(
        text.ljust(width) for text, width in zip(row, widths)).rstrip()
                     for row in rows)

  def plain(self) -> list[dict[str, str]]:
    """Returns its rows as JSON takes them: what is shown, by heading."""
    return [{heading: cell.text for heading, cell in row.items()}
            for row in self.rows]


def label(text: str, mark: str = '') -> Cell:
  """The cell of a word, by which the table can be sorted."""
  return Cell(text, text, mark)


def known(x: float | None) -> bool:
  return x is not None and math.isfinite(x)


def number(x: float | None, form: str = '.4f') -> Cell:
  return Cell(f'{x:{form}}', x) if known(x) else Cell(UNKNOWN)


def count(x: float | None) -> Cell:
  return number(x, ',.0f')


def flops(x: float | None) -> Cell:
  return number(x, '.3g')


def percent(x: float) -> str:
  return f'{100 * x:.0f} %'


def share(x: float | None) -> Cell:
  return Cell(percent(x), x) if known(x) else Cell(UNKNOWN)


def p_value(x: float | None) -> Cell:
  """A probability: four digits, and no 0."""
  return Cell('< 0.0001', x) if known(x) and x < 1e-4 else number(x)


def fraction(part: int, whole: int) -> Cell:
  return Cell(f'{part} of {whole}', part)


def duration(seconds: float | None) -> Cell:
  """A time, in the unit that suits it."""
  if not known(seconds):
    return Cell(UNKNOWN)
  for unit, size in (('h', 3600), ('min', 60)):
    if seconds >= size:
      return Cell(f'{seconds / size:.1f} {unit}', seconds)
  return Cell(f'{seconds:.1f} s', seconds)


def estimate(mean: float | None, low: float | None = None,
             high: float | None = None, form: str = '+.4f') -> Cell:
  """'+0.1234 [-0.0100, +0.2568]'; the mean alone where no interval is known."""
  cell = number(mean, form)
  if not (known(mean) and known(low) and known(high)):
    return cell
  return Cell(f'{cell.text} [{low:{form}}, {high:{form}}]', mean)


def difference(x: Interval | None, form: str = '+.4f') -> Cell:
  """A mean over seeds and its interval; of two seeds, from one to the other."""
  if x is None:
    return Cell(UNKNOWN)
  if x.seeds == 2:
    return Cell(f'{x.mean:{form}} ({x.least:{form}} to {x.most:{form}})',
                x.mean)
  return estimate(x.mean, x.low, x.high, form)


def mean(values: Sequence[float]) -> Cell:
  """A mean over seeds with the standard deviation; of two seeds, from one to
  the other."""
  if not values:
    return Cell(UNKNOWN)
  middle, spread = float(np.mean(values)), ''
  if len(values) == 2:
    spread = f' ({min(values):.4f} to {max(values):.4f})'
  elif len(values) > 2:
    spread = f' ± {np.std(values, ddof=1):.4f}'
  return Cell(f'{middle:.4f}{spread}', middle)


def sheet(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
  """Returns rows as CSV."""
  file = io.StringIO()
  writer = csv.DictWriter(file, columns, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return file.getvalue()


def some(n: int, one: str) -> str:
  """'1 run', '3 runs', 'no run'."""
  return f'{n or "no"} {one}{"s" * (n > 1)}'


def listed(words: Sequence[str], last: str = 'and') -> str:
  """'a', 'a and b', 'a, b and c'."""
  *most, end = words
  return f'{", ".join(most)} {last} {end}' if most else end


def shortened(names: Sequence[str], most: int = 22) -> dict[str, str]:
  """Returns the label of each name in a figure: of at most `most` characters,
  but for names that would then look alike. A longer name loses its middle:
  names of one sweep often differ at the end."""
  tail = (most - 1) // 2
  short = {name: name if len(name) <= most else
           f'{name[:most - 1 - tail]}…{name[len(name) - tail:]}'
           for name in names}
  labels = list(short.values())
  return {name: name if labels.count(own) > 1 else own
          for name, own in short.items()}
