"""A report as HTML, Markdown and LaTeX, by the templates in templates/.

jinja2 escapes every value that it puts into a template, each format by its own
rules; what is markup already is marked as such where it is made. The HTML is
one file that opens from disk: nothing is fetched, and the browser is told so.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import re
from typing import Any, NamedTuple

from tools.compare.tables import TEMPLATES, Cell, Table

# Of a LaTeX table over two columns, which no page breaks.
WIDE, HIGH = 92, 45  # characters, rows
_TEX = {'\\': r'\textbackslash{}', '{': r'\{', '}': r'\}', '$': r'\$',
        '&': r'\&', '#': r'\#', '%': r'\%', '_': r'\_',
        '~': r'\textasciitilde{}', '^': r'\textasciicircum{}',
        '<': r'\textless{}', '>': r'\textgreater{}', '|': r'\textbar{}',
        '"': "''", '±': r'$\pm$', '×': r'$\times$', '…': r'\dots{}'}


class Figure(NamedTuple):
  """A drawing.

  Attributes:
    name: of its files.
    title: a short one.
    caption: what its marks are.
    alt: what there is to see, in a sentence, for who cannot see it.
    svg: the drawing, to stand within a page.
    files: the drawing by the ending of its file.
  """
  name: str
  title: str
  caption: str
  alt: str
  svg: str
  files: Mapping[str, bytes]


class Plot(NamedTuple):
  """What report.js draws, with controls, into the <figure> of its id."""
  data: Mapping[str, Any]
  caption: str


class Section(NamedTuple):
  """A heading, then its paragraphs, figures, tables and plots."""
  name: str
  heading: str
  paragraphs: Sequence[str] = ()
  figures: Sequence[Figure] = ()
  tables: Sequence[Table] = ()
  plots: Sequence[Plot] = ()


class Document(NamedTuple):
  """The whole report.

  Attributes:
    kind: sweep or study.
    title: its name.
    about: what it is, or asks.
    answer: as far as it has one, in a sentence.
    warnings: what a reader must know before the figures.
  """
  kind: str
  title: str
  about: str
  answer: str
  warnings: Sequence[str]
  sections: Sequence[Section]


def filled(sections: Sequence[Section]) -> list[Section]:
  """Returns the sections that there is something for, without empty tables and
  plots."""
  found = [own._replace(
      tables=[table for table in own.tables if table.rows],
      plots=[plot for plot in own.plots if plot.data['series']])
           for own in sections]
  return [own for own in found if any(own[2:])]


def html(document: Document) -> str:
  plots = [plot.data for section in document.sections for plot in section.plots]
  # '<' would end the script early if a name held </script>.
  data = json.dumps(plots, allow_nan=False).replace('<', '\\u003c')
  return _template('page.html', autoescape=True).render(
      document=document, data=data,
      css=(TEMPLATES / 'report.css').read_text(),
      script=(TEMPLATES / 'report.js').read_text())


def markdown(document: Document) -> str:
  def escape(value: Any) -> str:  # in a cell of a table too
    return re.sub(r'([\\`*_{}\[\]<>#|$~&])', r'\\\1', str(value)).replace(
        '\n', ' ')
  return _template('report.md', escape).render(document=document)


def latex(document: Document) -> str:
  """Returns the tables alone: booktabs, split where they are too wide."""
  parts = [part for section in document.sections for table in section.tables
           for part in _split(table)]
  return _template('tables.tex', tex, block_start_string='<%',
                   block_end_string='%>', variable_start_string='<<',
                   variable_end_string='>>', comment_start_string='<#',
                   comment_end_string='#>').render(parts=parts)


def paragraphs(template: str, **words: Any) -> list[str]:
  """Returns what a template of plain sentences says; lines of --- part its
  paragraphs."""
  text = _template(template).render(**words)
  return [' '.join(part.split()) for part in text.split('\n---\n')]


def tex(value: Any) -> str:
  """Returns a text as LaTeX prints it; a minus is one, not a hyphen."""
  text = ''.join(_TEX.get(c, c) for c in str(value))
  text = re.sub(r'(?<![\w.\\-])-(?=\d)', '$-$', text)
  # After a row's end, a bracket or star would be an argument of it.
  return f'{{}}{text}' if text[:1] in ('[', '*') else text


def _template(name: str, escape: Callable[[Any], str] | None = None,
              **options: Any):
  import jinja2
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(TEMPLATES), finalize=escape,
      undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
      keep_trailing_newline=True, **options)
  environment.filters |= {'broken': _broken, 'key': _key}
  return environment.get_template(f'{name}.jinja')


def _key(cell: Cell) -> str:
  """The figure of a cell in full, by which a program may read the page."""
  return (cell.value if isinstance(cell.value, str)
          else repr(float(cell.value)))


def _broken(cell: Cell) -> list[str]:
  """A cell's text in parts that stand below each other, so that a page of 1,100
  pixels shows the last column too: a figure, its interval, its p."""
  if isinstance(cell.value, str | None):
    return [cell.text]
  return re.split(r' (?=\[|\(|p [<=])', cell.text)


def _split(table: Table) -> list[Table]:
  """Returns a table as several that are no larger than a page, each with the
  first column."""
  first, *others = columns = list(table.columns)
  widths = {heading: max(len(heading), *(len(row[heading].text)
                                         for row in table.rows))
            for heading in columns}
  groups, room = [[first]], WIDE - widths[first]
  for heading in others:
    if widths[heading] > room and len(groups[-1]) > 1:
      groups.append([first])
      room = WIDE - widths[first]
    groups[-1].append(heading)
    room -= widths[heading]
  places = ((at, group) for at in range(0, len(table.rows), HIGH)
            for group in groups)
  parts = [dataclasses.replace(
      table, name=f'{table.name}-{n}', title=f'{table.title} (continued)',
      rows=[{heading: row[heading] for heading in group}
            for row in table.rows[at:at + HIGH]],
      notes=(), why=table.columns) for n, (at, group) in enumerate(places, 1)]
  parts[0] = dataclasses.replace(parts[0], name=table.name, title=table.title)
  parts[-1] = dataclasses.replace(parts[-1], notes=table.notes)
  return parts
