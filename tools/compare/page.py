"""A report's tables, and its page by the templates in templates/.

A table is rows of cells by heading; what the headings mean stands in
templates/columns.toml. jinja2 escapes every value that it puts into the page,
which is one file that opens from disk: nothing is fetched, and the browser is
told so.
"""

from collections.abc import Mapping, Sequence
import csv
import functools
import io
import json
import math
import os
import pathlib
import re
import sys
import tomllib
from typing import Any, NamedTuple

from tools.compare import decide, layout

TEMPLATES = pathlib.Path(__file__).parent / 'templates'
UNKNOWN = 'n/a'
# How a verdict is coloured.
MARKS = {decide.BETTER: 'better', decide.WORSE: 'worse',
         decide.UNSTABLE: 'worse', decide.STOPPED_UNSTABLE: 'worse',
         decide.NONE_SHOWN: 'noise'}


class Cell(NamedTuple):
  """`value` is what a column sorts by: a number or a text."""
  text: str
  value: float | str | None = None
  mark: str = ''  # better, worse or noise: how it is coloured


@functools.cache
def _meanings() -> Mapping[str, str]:
  return tomllib.loads((TEMPLATES / 'columns.toml').read_text())


class Table(NamedTuple):
  """Rows of cells by heading, the same headings in all of them."""
  name: str  # its anchor
  title: str
  rows: Sequence[Mapping[str, Cell]]

  @property
  def columns(self) -> dict[str, str]:
    """What each heading means, '' where it says so itself."""
    return {heading: _meanings().get(heading, '')
            for heading in (self.rows[0] if self.rows else ())}

  def text(self) -> str:
    """Renders for a terminal, without the last columns where it is narrow."""
    room = os.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    rows = [[*self.columns], *([cell.text for cell in row.values()]
                               for row in self.rows)]
    for shown in range(len(self.columns), 0, -1):
      lines = layout.columns([row[:shown] for row in rows], left=shown)
      if len(max(lines, key=len)) <= room:
        break
    left = ', '.join([*self.columns][shown:])
    return '\n'.join(lines + [f'(too narrow for {left})'] * bool(left))


def table(name: str, title: str, rows: Sequence[Mapping[str, Cell]]) -> Table:
  """Returns a table without the columns that say nothing in any row."""
  spoken = {heading for row in rows for heading, cell in row.items()
            if cell.text not in ('', UNKNOWN)}
  return Table(name, title, [{
      heading: cell for heading, cell in row.items() if heading in spoken}
                             for row in rows])


class Figure(NamedTuple):
  """A drawing.

  Attributes:
    name: of its files.
    title: a short one.
    caption: what its marks are.
    svg: the drawing, to stand within a page.
    files: the drawing by the ending of its file.
  """
  name: str
  title: str
  caption: str
  svg: str
  files: Mapping[str, bytes]


class Section(NamedTuple):
  """A heading, then its paragraphs, figures, tables, and what report.js draws
  (plots.py), with a caption, into the <figure> of its id."""
  name: str
  heading: str
  paragraphs: Sequence[str] = ()
  figures: Sequence[Figure] = ()
  tables: Sequence[Table] = ()
  plots: Sequence[Mapping[str, Any]] = ()


def html(sections: Sequence[Section], **words: Any) -> str:
  """Returns the page; what there is nothing for is left out."""
  sections = [section._replace(
      tables=[table for table in section.tables if table.rows],
      plots=[plot for plot in section.plots if plot['series']])
              for section in sections]
  plots = [plot for section in sections for plot in section.plots]
  return render(
      'page.html', sections=[x for x in sections if any(x[2:])],
      # '<' would end the script early if a name held </script>.
      data=json.dumps(plots, allow_nan=False).replace('<', '\\u003c'),
      css=(TEMPLATES / 'report.css').read_text(),
      script=(TEMPLATES / 'report.js').read_text(), **words)


def render(template: str, **words: Any) -> str:
  import jinja2
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(TEMPLATES),
      autoescape=template.endswith('.html'), undefined=jinja2.StrictUndefined,
      trim_blocks=True, lstrip_blocks=True)
  environment.filters |= {'broken': _broken, 'key': _key}
  return environment.get_template(f'{template}.jinja').render(words)


def _key(cell: Cell) -> str:
  """The figure of a cell in full, by which a program may read the page."""
  return (cell.value if isinstance(cell.value, str)
          else repr(float(cell.value)))


def _broken(cell: Cell) -> list[str]:
  """A cell's text in parts that stand below each other, so that a page of 1,100
  pixels shows the last column too: a figure and its interval."""
  if isinstance(cell.value, str | None):
    return [cell.text]
  return re.split(r' (?=\[|\()', cell.text)


def known(x: float | None) -> bool:
  return x is not None and math.isfinite(x)


def label(text: str, mark: str = '') -> Cell:
  """The cell of a word, by which the table can be sorted."""
  return Cell(text, text, mark)


def number(x: float | None, form: str = '.4f') -> Cell:
  return Cell(f'{x:{form}}', x) if known(x) else Cell(UNKNOWN)


def count(x: float | None) -> Cell:
  return number(x, ',.0f')


def p_value(x: float | None) -> Cell:
  """A probability: four digits, and no 0."""
  return Cell('< 0.0001', x) if known(x) and x < 1e-4 else number(x)


def duration(seconds: float | None) -> Cell:
  """A time, in the unit that suits it."""
  if not known(seconds):
    return Cell(UNKNOWN)
  for unit, size in (('h', 3600), ('min', 60)):
    if seconds >= size:
      return Cell(f'{seconds / size:.1f} {unit}', seconds)
  return Cell(f'{seconds:.1f} s', seconds)


def estimate(mean: float | None, low: float | None, high: float | None,
             form: str = '+.4f') -> Cell:
  """'+0.1234 [-0.0100, +0.2568]'; the mean alone where no interval is known."""
  cell = number(mean, form)
  if not (known(mean) and known(low) and known(high)):
    return cell
  return Cell(f'{cell.text} [{low:{form}}, {high:{form}}]', mean)


def mean(x: float | None, deviation: float | None) -> Cell:
  """A mean over seeds with the standard deviation."""
  cell = number(x)
  return cell if deviation is None else Cell(
      f'{cell.text} ± {deviation:.4f}', x)


def sheet(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns rows as CSV, in which no text begins as a formula does: a program
  for spreadsheets shows it with an apostrophe before it."""
  file = io.StringIO()
  writer = csv.DictWriter(file, rows[0] if rows else (), lineterminator='\n')
  writer.writeheader()
  for row in rows:
    writer.writerow({name: _no_formula(x) for name, x in row.items()})
  return file.getvalue()


def _no_formula(x: Any) -> Any:
  begins_one = isinstance(x, str) and x.startswith(tuple('=+-@\t\r'))
  return f"'{x}" if begins_one else x
