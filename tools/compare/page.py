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
         decide.NONE_SHOWN: 'noise', decide.AT_EDGE: 'noise',
         decide.TUNED_BY_FEW: 'noise'}


class Cell(NamedTuple):
  """A cell of a table.

  Attributes:
    text: the text that is shown.
    value: the number or the text by which a column sorts.
    mark: better, worse or noise, which gives it its colour; '': none.
  """
  text: str
  value: float | str | None = None
  mark: str = ''


@functools.cache
def _meanings() -> Mapping[str, str]:
  """Returns the meaning of each heading of a table, from columns.toml."""
  return tomllib.loads((TEMPLATES / 'columns.toml').read_text())


class Table(NamedTuple):
  """Rows of cells by heading, the same headings in all of them.

  Attributes:
    name: the anchor of the table on the page.
    title: the title.
    rows: the rows.
  """
  name: str
  title: str
  rows: Sequence[Mapping[str, Cell]]

  @property
  def columns(self) -> dict[str, str]:
    """The meaning of each heading, '' where it says so itself."""
    if not self.rows:
      return {}
    return {heading: _meanings().get(heading, '') for heading in self.rows[0]}

  def text(self) -> str:
    """Returns the table as lines for a terminal. If the terminal is too narrow,
    the last columns are left out, and named below the table."""
    # A file or pipe has no limit.
    width = math.inf
    if sys.stdout.isatty():
      width = os.get_terminal_size().columns
    headings = [*self.columns]
    rows = [headings]
    for row in self.rows:
      rows.append([cell.text for cell in row.values()])
    num_shown = len(headings)
    lines = layout.align_columns(rows, left=num_shown)

    # Drop columns from the right until the longest line fits.
    while num_shown > 1 and max(map(len, lines)) > width:
      num_shown -= 1
      lines = layout.align_columns(
          [row[:num_shown] for row in rows], left=num_shown)
    if num_shown < len(headings):
      lines.append(f'(too narrow for {", ".join(headings[num_shown:])})')
    return '\n'.join(lines)


def table(name: str, title: str, rows: Sequence[Mapping[str, Cell]]) -> Table:
  """Makes a table, and leaves out columns whose cells are all empty or unknown.

  Args:
    name: the anchor of the table on the page.
    title: the title of the table.
    rows: the cells of each row by heading. All rows have the same headings.
  """
  headings_shown = set()
  for row in rows:
    for heading, cell in row.items():
      if cell.text not in ('', UNKNOWN):
        headings_shown.add(heading)

  # The columns keep the order that the rows give them.
  kept_rows = []
  for row in rows:
    cells = {name: cell for name, cell in row.items() if name in headings_shown}
    kept_rows.append(cells)
  return Table(name=name, title=title, rows=kept_rows)


class Figure(NamedTuple):
  """A drawing.

  Attributes:
    name: the name of its files, without their endings.
    title: a short title.
    caption: a caption that says what its marks are.
    svg: the drawing, to stand within a page.
    files: the drawing by the ending of its file.
  """
  name: str
  title: str
  caption: str
  svg: str
  files: Mapping[str, bytes]


class Section(NamedTuple):
  """A section of a page.

  Attributes:
    name: its anchor.
    heading: its heading.
    paragraphs: the paragraphs below the heading.
    figures: the drawings below these.
    tables: the tables below these.
    plots: what report.js draws (plots.py), with a caption, into the <figure> of
      its id.
  """
  name: str
  heading: str
  paragraphs: Sequence[str] = ()
  figures: Sequence[Figure] = ()
  tables: Sequence[Table] = ()
  plots: Sequence[Mapping[str, Any]] = ()


def html(sections: Sequence[Section], **words: Any) -> str:
  """Renders a report as one HTML page. Empty tables, plots and sections are
  left out.

  Args:
    sections: the sections of the report.
    **words: the other variables of the template: title, about, answer and
      warnings.
  """
  # Keep the sections that have any content, and collect all plots.
  kept_sections, plots = [], []
  for section in sections:
    section = section._replace(
        tables=[table for table in section.tables if table.rows],
        plots=[plot for plot in section.plots if plot['series']])
    plots += section.plots
    content = (*section.paragraphs, *section.figures, *section.tables,
               *section.plots)
    if content:
      kept_sections.append(section)

  # The script on the page draws the plots from this JSON. '<' would end the
  # script early if a name held </script>; JSON may escape it.
  data = json.dumps(plots, allow_nan=False).replace('<', '\\u003c')
  css = (TEMPLATES / 'report.css').read_text()
  script = (TEMPLATES / 'report.js').read_text()
  return render('page.html', sections=kept_sections, data=data, css=css,
                script=script, **words)


def render(template: str, **words: Any) -> str:
  """Returns the text of a template of templates/, filled in by jinja2.

  Args:
    template: the name of its file without '.jinja'.
    **words: the values of its variables.
  """
  import jinja2
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(TEMPLATES),
      autoescape=template.endswith('.html'), undefined=jinja2.StrictUndefined,
      trim_blocks=True, lstrip_blocks=True)
  environment.filters |= {'broken': _broken, 'key': _key}
  return environment.get_template(f'{template}.jinja').render(words)


def _key(cell: Cell) -> str:
  """Returns the figure of a cell in full, by which a program may read the page.
  """
  if isinstance(cell.value, str):
    return cell.value
  return repr(float(cell.value))


def _broken(cell: Cell) -> list[str]:
  """Returns a cell's text in parts that stand below each other, so that a page
  of 1,100 pixels shows the last column too: a figure and its interval."""
  if isinstance(cell.value, str | None):
    return [cell.text]
  return re.split(r' (?=\[|\()', cell.text)


def known(x: float | None) -> bool:
  """Returns whether a figure is there and finite."""
  return x is not None and math.isfinite(x)


def label(text: str, mark: str = '') -> Cell:
  """Returns the cell of a word, by which the table can be sorted."""
  return Cell(text=text, value=text, mark=mark)


def number(x: float | None, form: str = '.4f') -> Cell:
  """Returns the cell of a number in a format."""
  if not known(x):
    return Cell(UNKNOWN)
  return Cell(f'{x:{form}}', x)


def count(x: float | None) -> Cell:
  """Returns the cell of a whole number."""
  return number(x, ',.0f')


def p_value(x: float | None) -> Cell:
  """Returns the cell of a probability: four digits, and no 0."""
  if known(x) and x < 1e-4:
    return Cell('< 0.0001', x)
  return number(x)


def duration(seconds: float | None) -> Cell:
  """Returns the cell of a time, in the unit that suits it."""
  if not known(seconds):
    return Cell(UNKNOWN)
  if seconds >= 3600:
    return Cell(f'{seconds / 3600:.1f} h', seconds)
  if seconds >= 60:
    return Cell(f'{seconds / 60:.1f} min', seconds)
  return Cell(f'{seconds:.1f} s', seconds)


def estimate(mean: float | None, low: float | None, high: float | None,
             form: str = '+.4f') -> Cell:
  """Returns '+0.1234 [-0.0100, +0.2568]'; the mean alone where no interval is
  known."""
  cell = number(mean, form)
  if not (known(mean) and known(low) and known(high)):
    return cell
  return Cell(f'{cell.text} [{low:{form}}, {high:{form}}]', mean)


def effect(row: Mapping[str, Any], form: str = '+.4f') -> Cell:
  """Returns the cell of the 'effect' of a row with its interval, from 'low' to
  'high'; a row without one has it unknown."""
  return estimate(mean=row.get('effect'), low=row.get('low'),
                  high=row.get('high'), form=form)


def mean(x: float | None, deviation: float | None) -> Cell:
  """Returns a mean over seeds with the standard deviation."""
  cell = number(x)
  if deviation is None:
    return cell
  return Cell(f'{cell.text} ± {deviation:.4f}', x)


def sheet(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns rows as CSV, in which no text begins as a formula does: a program
  for spreadsheets shows it with an apostrophe before it."""
  file = io.StringIO()
  headings = rows[0] if rows else ()
  writer = csv.DictWriter(file, headings, lineterminator='\n')
  writer.writeheader()
  for row in rows:
    writer.writerow({name: _no_formula(x) for name, x in row.items()})
  return file.getvalue()


def _no_formula(x: Any) -> Any:
  """Returns a value of a CSV file; a text that a spreadsheet would take for a
  formula gets an apostrophe before it."""
  begins_one = isinstance(x, str) and x.startswith(('=', '+', '-', '@', '\t',
                                                    '\r'))
  return f"'{x}" if begins_one else x
