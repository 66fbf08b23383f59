"""How the figures of a study are drawn: sizes of a journal, SVG and PNG."""

import io
import re
from typing import Any, NamedTuple

from configs.errors import RequestError
from tools.compare.pages import colours, fonts

COLUMN, PAGE = 3.25, 6.75  # inches: one column, and two with what is between
DPI = 300
# The base's line, axes and letters; nothing else has this colour, so that a
# page can put its own ink there, which is light at night.
INK = '#1b1d21'
SOFT = '#8a9099'
_STYLE = {
    'font.size': 7, 'axes.titlesize': 7.5, 'axes.labelsize': 7,
    'xtick.labelsize': 6.5, 'ytick.labelsize': 6.5,
    'legend.fontsize': 6.5, 'axes.linewidth': 0.6, 'lines.linewidth': 1.2,
    'xtick.major.width': 0.6, 'ytick.major.width': 0.6, 'grid.linewidth': 0.4,
    'text.color': INK, 'axes.edgecolor': INK, 'axes.labelcolor': INK,
    'xtick.color': INK, 'ytick.color': INK, 'axes.spines.top': False,
    'axes.spines.right': False, 'axes.grid': False, 'grid.color': SOFT,
    'grid.alpha': 0.4, 'legend.frameon': False, 'figure.facecolor': 'white',
    'axes.facecolor': 'none',
    # Letters as outlines: they look the same wherever the file is opened.
    'svg.fonttype': 'path',
    'text.parse_math': False}  # a name may hold a '$'


class Drawn(NamedTuple):
  """A drawing as both files hold it."""
  svg: str
  png: bytes


def require_libraries() -> None:
  """Refuses a report where what writes it is not installed."""
  try:
    import jinja2  # noqa: F401
    import matplotlib
  except ImportError as error:
    raise RequestError(f'the report needs the package {error.name}: pip '
                       "install 'archetype[study]'") from error
  matplotlib.use('Agg')


def style(name: str) -> Any:
  """A context in which to draw.

  Args:
    name: of the figure; the ids in its SVG come from it, so that figures do
      not share any on one page, and are the same when it is drawn again.
  """
  import matplotlib
  return matplotlib.rc_context(_STYLE | {
      'font.family': fonts.families(), 'svg.hashsalt': name})


def looks(base: str, others) -> dict[str, dict[str, Any]]:
  return colours.looks(base, others, INK)


def save(figure: Any) -> Drawn:
  """Returns the figure as SVG and PNG, and closes it."""
  from matplotlib import pyplot
  svg, png = io.StringIO(), io.BytesIO()
  figure.savefig(svg, format='svg', metadata={'Date': None})
  figure.savefig(png, format='png', dpi=DPI)
  pyplot.close(figure)
  return Drawn(svg.getvalue(), png.getvalue())


def inline(svg: str, name: str, alt: str) -> str:
  """Returns a drawing as it stands within a page: without its head, with the
  page's ink, on no paper of its own, and named for who cannot see it.

  Args:
    svg: what matplotlib writes.
    name: of the figure.
    alt: what there is to see; escaped here.
  """
  from html import escape
  body = svg[svg.index('<svg'):]
  body = re.sub(r'<metadata>.*?</metadata>', '', body, flags=re.DOTALL)
  body = re.sub(r'(<g id="patch_1">\s*<path [^>]*?)style="fill: #ffffff"',
                r'\1style="fill: none"', body, count=1)
  head, inner = re.match(r'<svg([^>]*)>(.*)', body, re.DOTALL).groups()
  box = re.search(r'viewBox="([^"]*)"', head)[1]
  width = float(box.split()[2]) / 72  # points
  # Ids are looked up in the whole page.
  inner = re.sub(r'id="([^"]*)"', rf'id="{name}-\1"', inner)
  inner = re.sub(r'(href="|url\()#', rf'\1#{name}-', inner)
  inner = inner.replace(INK, 'currentColor')
  return (f'<svg xmlns="http://www.w3.org/2000/svg" '
          f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
          f'class="{"column" if width < 5 else "page"}" role="img" '
          f'aria-labelledby="{name}-alt"><title id="{name}-alt">{escape(alt)}'
          f'</title>{inner}')
