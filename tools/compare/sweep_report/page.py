"""Writes a report as one HTML file that opens from disk, without network."""

from collections.abc import Mapping, Sequence
from html import escape
import json
import pathlib
import re

from tools.compare import pages as report
from tools.compare.pages.tables import Cell, Table

HERE = pathlib.Path(__file__).parent
# Nothing is fetched, and the browser is told so.
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; "
          "script-src 'unsafe-inline'")


def page(title: str, about: str, sections: Sequence[tuple[str, str]],
         plots: Sequence[Mapping]) -> str:
  """Returns the whole file.

  Args:
    title: the sweep's name.
    about: HTML below the title.
    sections: headings and their HTML.
    plots: what report.js draws, each into the <figure> of its id.
  """
  body = ''.join(f'<section><h2>{escape(heading)}</h2>\n{html}</section>\n'
                 for heading, html in sections)
  # '<' would end the script early if a name held </script>.
  data = json.dumps(list(plots), allow_nan=False).replace('<', '\\u003c')
  return f'''<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}: sweep</title>
<style>
{report.CSS.read_text()}</style>
<h1>{escape(title)}</h1>
{about}
{body}<script type="application/json" id="data">{data}</script>
<script>
{(HERE / 'report.js').read_text()}</script>
</html>
'''


def table(name: str, table: Table) -> str:
  """Returns a table that report.js makes sortable, its notes below."""
  head = ''.join(
      f'<th scope="col" aria-sort="none" title="{escape(why)}">'
      f'<button type="button">{escape(heading)}</button></th>'
      for heading, why in table.columns)
  rows = '\n'.join('<tr>' + ''.join(map(_cell, row)) + '</tr>'
                   for row in table.rows)
  notes = ''.join(f'<li>{escape(note)}</li>' for note in table.notes)
  meanings = ''.join(f'<dt>{escape(heading)}</dt><dd>{escape(why)}</dd>'
                     for heading, why in table.explained)
  return (f'<div class="scroll"><table id="{name}"><thead><tr>{head}</tr>'
          f'</thead>\n<tbody>\n{rows}\n</tbody></table></div>\n'
          + (f'<ul class="notes">{notes}</ul>\n' if notes else '')
          + (f'<details><summary>What the columns say</summary><dl>{meanings}'
             '</dl></details>\n' if meanings else ''))


def _cell(cell: Cell) -> str:
  value = '' if cell.value is None else f' data-value="{escape(_key(cell))}"'
  classes = ' '.join(filter(None, (
      cell.mark.replace('/', ''),
      'words' if isinstance(cell.value, str) else '',
      'long' if len(cell.text) > 34 else '')))
  mark = f' class="{classes}"' if classes else ''
  # A spread stands below its mean, so that a page of 1,100 pixels shows the
  # last column too.
  text = re.sub(r' (?=[\[(])', ' <br>', escape(cell.text), count=1)
  return f'<td{mark}{value}>{text}</td>'


def _key(cell: Cell) -> str:
  return (repr(float(cell.value)) if isinstance(cell.value, int | float)
          else cell.value)


def figure(name: str, caption: str) -> str:
  """Returns the place of a plot."""
  return (f'<figure id="{name}"><figcaption>{escape(caption)}</figcaption>'
          '</figure>\n')
