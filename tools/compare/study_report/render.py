"""A document as HTML, Markdown and LaTeX, by the templates beside this file.

jinja2 escapes every value that it puts into a template, each format by its own
rules; what is markup already is marked as such where it is made.
"""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
import re
from typing import Any

from tools.compare import pages as report
from tools.compare.pages.tables import Table
from tools.compare.study_report.document import Document, Named

TEMPLATES = pathlib.Path(__file__).parent
# Of a LaTeX table over two columns, which no page breaks.
WIDE, HIGH = 92, 45  # characters, rows
_TEX = {'\\': r'\textbackslash{}', '{': r'\{', '}': r'\}', '$': r'\$',
        '&': r'\&', '#': r'\#', '%': r'\%', '_': r'\_',
        '~': r'\textasciitilde{}', '^': r'\textasciicircum{}',
        '<': r'\textless{}', '>': r'\textgreater{}', '|': r'\textbar{}',
        '"': "''", '±': r'$\pm$',
        '×': r'$\times$', '…': r'\dots{}'}


def tex(value: Any) -> str:
  """Returns a text as LaTeX prints it; a minus is one, not a hyphen."""
  text = ''.join(_TEX.get(c, c) for c in str(value))
  text = re.sub(r'(?<![\w.\\-])-(?=\d)', '$-$', text)
  # After a row's end, a bracket or star would be an argument of it.
  return f'{{}}{text}' if text[:1] in ('[', '*') else text


def markdown(value: Any) -> str:
  """Returns a text as Markdown shows it, in a cell of a table too."""
  return re.sub(r'([\\`*_{}\[\]<>#|$~&])', r'\\\1', str(value)).replace(
      '\n', ' ')


def html_page(document: Document) -> str:
  return _render('page.html', document, autoescape=True)


def markdown_page(document: Document) -> str:
  return _render('report.md', document, escape=markdown)


def latex_tables(document: Document) -> str:
  """Returns the tables alone: booktabs, split where they are too wide."""
  parts = [part for section in document.sections for named in section.tables
           for part in split(named)]
  return _render('tables.tex', document, escape=tex, parts=parts,
                 block_start_string='<%', block_end_string='%>',
                 variable_start_string='<<', variable_end_string='>>',
                 comment_start_string='<#', comment_end_string='#>')


def _render(name: str, document: Document, autoescape: bool = False,
            escape: Callable[[Any], str] | None = None,
            parts: Sequence[Named] = (), **syntax: str) -> str:
  import jinja2
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=autoescape,
      undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
      keep_trailing_newline=True, finalize=escape, **syntax)
  environment.filters |= {'broken': broken, 'key': key, 'classes': classes}
  return environment.get_template(f'{name}.jinja').render(
      document=document, parts=parts, css=report.CSS.read_text())


def classes(cell: Any) -> str:
  """The classes of a cell."""
  return ' '.join(filter(None, (
      cell.mark, 'long' if len(cell.text) > 34 else '')))


def key(cell: Any) -> str:
  """The figure of a cell in full, by which a program may read the page."""
  value = cell.value
  return value if isinstance(value, str) else repr(float(value))


def broken(text: str) -> list[str]:
  """A cell's text in parts that stand below each other: a figure, its interval,
  its p."""
  return re.split(r' (?=\[|p [<=])', text)


def split(named: Named) -> list[Named]:
  """Returns a table as several that are no larger than a page, each with the
  first column."""
  table = named.table
  found = [Table([table.columns[i] for i in group],
                 [[row[i] for i in group] for row in table.rows[at:at + HIGH]])
           for at in range(0, max(len(table.rows), 1), HIGH)
           for group in _groups(table)]
  found[-1] = dataclasses.replace(found[-1], notes=table.notes)
  return [Named(named.name, named.title, part) if not n else
          Named(f'{named.name}-{n + 1}', f'{named.title} (continued)', part)
          for n, part in enumerate(found)]


def _groups(table: Table) -> list[list[int]]:
  """Returns the columns that stand together, each with the first one."""
  widths = [max([len(heading), *(len(row[i].text) for row in table.rows)])
            for i, (heading, _) in enumerate(table.columns)]
  groups, room = [[0]], WIDE - widths[0]
  for i, width in enumerate(widths[1:], 1):
    if width > room and len(groups[-1]) > 1:
      groups.append([0])
      room = WIDE - widths[0]
    groups[-1].append(i)
    room -= width
  return groups
