"""The figures of reports: drawn once, written as SVG, PNG and PDF, and set into
pages in the page's own ink.

A variant has the same colour and dashes in every figure. Sizes are a journal's:
one column, or two. `c` is a comparison.Comparison.
"""

from collections.abc import Mapping, Sequence
import html
import math
import re
from typing import Any

from tools.compare import curves, measures, page, statistics
from training.workdir import metrics, storage

FORMATS = ('svg', 'png', 'pdf')
COLUMN, PAGE = 3.25, 6.75  # inches: one column, and two with what is between
DPI = 300
# Okabe and Ito's colours, which the colour-blind tell apart, as in report.css.
COLOURS = ('#0072b2', '#e69f00', '#009e73', '#d55e00', '#56b4e9', '#cc79a7')
# Of the first six variants, of the next six, and so on; as in report.css.
DASHES = ('-', (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
# What a page puts its own colours for, which are others at night. The ink is of
# the base's line, axes and letters, and of nothing else.
INK, SOFT, BETTER, WORSE, NOISE = (
    '#1b1d21', '#8a9099', '#00664a', '#a63f00', '#6a707a')
_VARIABLES = {INK: 'currentColor', BETTER: 'var(--better)',
              WORSE: 'var(--worse)', NOISE: 'var(--noise)'}
_STYLE = {
    'font.size': 7, 'axes.titlesize': 7.5, 'axes.labelsize': 7,
    'xtick.labelsize': 6.5, 'ytick.labelsize': 6.5, 'legend.fontsize': 6.5,
    'axes.linewidth': 0.6, 'lines.linewidth': 1.2, 'xtick.major.width': 0.6,
    'ytick.major.width': 0.6, 'grid.linewidth': 0.4, 'text.color': INK,
    'axes.edgecolor': INK, 'axes.labelcolor': INK, 'xtick.color': INK,
    'ytick.color': INK, 'axes.spines.top': False, 'axes.spines.right': False,
    'grid.color': SOFT, 'grid.alpha': 0.4, 'legend.frameon': False,
    'axes.facecolor': 'none', 'figure.constrained_layout.use': True,
    # Letters as outlines: they look the same wherever the file is opened.
    'svg.fonttype': 'path',
    'text.parse_math': False}  # a name may hold a '$'
MARKERS = ('D', 'o', 's', '^', 'v', 'P', 'X', '*')  # of all sizes, and of each
_DASHED = (0, (4, 3))


def style(name: str) -> Any:
  """A context in which to draw.

  Args:
    name: of the figure; the ids in its SVG come from it, so that figures do
      not share any on one page, and are the same when it is drawn again.
  """
  import matplotlib
  return matplotlib.rc_context(_STYLE | {'svg.hashsalt': name})


def _inline(svg: str, name: str, alt: str) -> str:
  """Returns a drawing as it stands within a page: without its head, with the
  page's ink, on no paper of its own, and named for who cannot see it."""
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
  for colour, variable in _VARIABLES.items():
    inner = inner.replace(colour, variable)
  return (f'<svg xmlns="http://www.w3.org/2000/svg" '
          f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
          f'class="{"column" if width < 5 else "page"}" role="img" '
          f'aria-labelledby="{name}-alt"><title id="{name}-alt">'
          f'{html.escape(alt)}</title>{inner}')


def looks(base: str, others: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Returns how the line of each variant is drawn: the base's in ink, without
  dashes; the others take the colours in turn, and then the colours dashed."""
  return {base: dict(color=INK, linestyle='-')} | {
      name: dict(color=COLOURS[i % len(COLOURS)],
                 linestyle=DASHES[i // len(COLOURS) % len(DASHES)])
      for i, name in enumerate(others)}


def css_look(c, name: str, turn: int = 0) -> str:
  """Returns the same as classes of report.css; another `turn` gives other
  dashes to another line of the variant."""
  if name == c.plan.base:
    return f'ink d{turn % len(DASHES)}' if turn else 'ink'
  i = c.plan.variants.index(name)
  return f'c{i % len(COLOURS)} d{(turn or i // len(COLOURS)) % len(DASHES)}'


def shortened(names: Sequence[str], most: int = 22) -> dict[str, str]:
  """Returns the label of each name in a figure: of at most `most` characters,
  but for names that would then look alike. A longer name loses its middle:
  names of one sweep often differ at the end."""
  tail = (most - 1) // 2
  short = {name: name if len(name) <= most else
           f'{name[:most - 1 - tail]}…{name[len(name) - tail:]}'
           for name in names}
  labels = list(short.values())
  return {name: name if labels.count(text) > 1 else text
          for name, text in short.items()}


def outcome(c) -> Any:
  """Returns the figure of what was found: on the left the held-out loss by
  tokens, the mean over seeds, at the largest size; on the right the difference
  of each variant with its interval and verdict, the best at the top."""
  from matplotlib import ticker
  from matplotlib.figure import Figure
  plan = c.plan
  rows = sorted((row for row in c.verdicts() if page.known(row['effect'])),
                key=lambda row: -plan.primary.sign * row['effect'])
  each = len(plan.sizes) + 1 if plan.sizes[1:] else 1
  look, label = looks(plan.base, plan.variants), shortened(c.variants)
  with style('outcome'):
    figure = Figure(figsize=(
        PAGE, 1.2 + max(0.17 * 8, 0.17 * len(rows) * min(each, 2.6))))
    left, right = figure.subplots(1, 2)
    for name in c.variants:
      if lines := [drawn['eval'] for (variant, size, _), drawn
                   in c.curves.items() if 'eval' in drawn
                   and (variant, size) == (name, plan.sizes[-1])]:
        _dots(left, [line['tokens'][-1] for line in lines],
              [line['loss'][-1] for line in lines], look[name]['color'])
        curve = curves.mean(lines)
        left.plot(curve['tokens'], curve['loss'], label=label[name],
                  **look[name])
    unit = measures.unit_text(c.frozen, plan.primary, ', ')
    left.set(xlabel='training tokens', ylabel=f'held-out loss{unit}',
             title=' '.join(['loss curves', plan.sizes[-1]]))
    left.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    left.locator_params(axis='x', nbins=4)
    left.grid(axis='y')
    if left.lines:
      figure.legend(*left.get_legend_handles_labels(), ncols=4,
                    loc='outside lower center')
    _forest(right, c, rows, shortened(c.variants, 40))
    right.set(xlabel=f'{plan.primary.name} minus that of '
              f'{label[plan.base]}{unit}', title='difference from the base')
    figure.draw_without_rendering()  # under this style, wherever it is written
  return figure


def _dots(axes: Any, x: Sequence[float], y: Sequence[float], colour: str
          ) -> None:
  """Draws each run, or each difference of two."""
  axes.plot(x, y, '.', color=colour, markersize=3, alpha=0.5, zorder=1,
            markeredgewidth=0)


def _forest(axes: Any, c, rows: Sequence[Mapping], label: Mapping) -> None:
  """Draws a bar for each row, and below it one for each of several sizes, in
  the colour of the verdict, which the corrected p decides; hollow marks are of
  those that are neither better nor worse."""
  sizes = c.plan.sizes if c.plan.sizes[1:] else ()
  y, ticks = 0.0, {}
  for row in rows:
    colour = {'better': BETTER, 'worse': WORSE}.get(
        page.MARKS.get(row['verdict']), NOISE)
    for i, size in enumerate(['', *sizes]):
      estimate = c.effect('confirm', row['variant'], row['measure'], size)
      if not estimate or not page.known(estimate['effect']):
        continue
      seeds = estimate.get('differences') or ()
      _dots(axes, seeds, [y + 0.25] * len(seeds), colour)
      if page.known(estimate['low']):
        axes.plot([estimate['low'], estimate['high']], [y, y], color=colour,
                  linewidth=0.8 if size else 1.6, solid_capstyle='butt')
      axes.plot(estimate['effect'], y, MARKERS[i % len(MARKERS)], color=colour,
                markersize=3.3 if size else 4.1, markeredgewidth=0.8,
                markerfacecolor='none' if colour == NOISE else colour)
      ticks[y] = size or label[row['variant']]
      if not size:
        axes.text(1.02, y, row['verdict'], va='center', fontsize=6.5,
                  transform=axes.get_yaxis_transform(), color=colour)
      y += 1.0
    y += 0.6 * bool(sizes)
  axes.axvline(0, color=INK, linewidth=0.6, linestyle=_DASHED)
  axes.set_yticks(list(ticks), ticks.values())
  axes.set_ylim(y - 0.4, -0.8)
  axes.grid(axis='x')
  axes.locator_params(axis='x', nbins=4)
  axes.tick_params(axis='y', length=0)


def by_size(c) -> Any:
  """Returns the figure of the measures that are not the primary one: means over
  the seeds with their intervals, by size, and what guessing gives."""
  from matplotlib.figure import Figure
  plan, look = c.plan, looks(c.plan.base, c.plan.variants)
  label = shortened(c.variants)
  columns = min(len(plan.measures) - 1, 4)
  rows = math.ceil((len(plan.measures) - 1) / columns)
  # Those of one size stand a little apart, so that no interval hides another.
  apart = min(0.12, 0.7 / len(c.variants))
  with style('measures'):
    figure = Figure(figsize=(
        PAGE if columns > 1 else COLUMN, 1.9 * rows + 0.6))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(plan.measures) - 1:]:
      axes.set_visible(False)
    for axes, measure in zip(grid.flat, plan.measures[1:]):
      for i, name in enumerate(c.variants):
        scores = {x: [*values.values()] for x, size in enumerate(plan.sizes)
                  if (values := c.values('confirm', name, size, measure))}
        if not scores:
          continue
        for x, each in scores.items():  # not behind their mean
          _dots(axes, [x + apart * (i - (len(c.variants) + 1) / 2)] * len(each),
                each, look[name]['color'])
        axes.errorbar(
            [x + apart * (i - len(c.variants) / 2) for x in scores],
            [sum(each) / len(each) for each in scores.values()],
            [*zip(*(_reach(measure, each) for each in scores.values()))],
            elinewidth=0.8, marker='o', markersize=2.5, label=label[name],
            **look[name])
      low, high = axes.get_ylim()  # of the runs
      axes.axhline(measure.chance, color=SOFT, linewidth=0.8,
                   linestyle=_DASHED, zorder=0)
      # With it in sight, runs that are alike would be one dot.
      is_far = bool(max(low - measure.chance, measure.chance - high)
                    > 3 * (high - low))
      if is_far:
        axes.set_ylim(low, high)
      axes.set_xticks(range(len(plan.sizes)), plan.sizes)
      axes.set(title=measure.name + (
          f' (guessing: {measure.chance:.3g})' * is_far),
               ylabel='score' + measures.unit_text(c.frozen, measure, ', '))
      axes.grid(axis='y')
    figure.legend(*grid[0, 0].get_legend_handles_labels(),
                  loc='outside lower center', ncols=min(2 * columns, 4))
    figure.draw_without_rendering()
  return figure


def _reach(measure, values: Sequence[float]) -> list[float]:
  """Returns how far the 95 % interval of a mean reaches down and up."""
  is_share = measure.figure.rpartition('/')[2] in metrics.SHARES
  mean, low, high, _ = (statistics.share_interval if is_share
                        else statistics.interval)(values)
  return [math.nan] * 2 if low is None else [mean - low, high - mean]


def of(c) -> list[page.Figure]:
  """Returns every figure that there are numbers for."""
  plan, drawn = c.plan, []
  effects = '; '.join(f'{row["variant"]} ' + page.estimate(
      row['effect'], row['low'], row['high']).text for row in c.verdicts()
                      if page.known(row['effect']))
  if c.curves or effects:
    side = 'left' if plan.primary.sign < 0 else 'right'
    sizes = ' over all sizes (diamonds) and at each' if plan.sizes[1:] else ''
    drawn.append(_drawn('outcome', 'Outcome', (
        'Held-out loss, the mean over seeds; and the difference of each '
        f'variant{sizes}, with 95 % intervals over paired seeds: {side} of the '
        f'line is better than {plan.base}. Each interval is of its variant '
        'alone; colours and filled marks are of verdicts, which count all '
        'variants. Dots are the runs, and the differences of their pairs.'),
        effects, outcome(c)))
  if plan.sizes[1:] and any(c.values('confirm', plan.base, size, measure)
                            for size in plan.sizes
                            for measure in plan.measures[1:]):
    drawn.append(_drawn('measures', 'Other measures', (
        'Means over the seeds of the confirmation with their 95 % intervals, '
        'and each run as a dot; '
        'the dashed line, or a number in the title, is what guessing gives.'),
                        '', by_size(c)))
  return drawn


def _drawn(name: str, title: str, caption: str, words: str,
           figure: Any) -> page.Figure:
  """Returns a figure; `words` says it to who cannot see it."""
  with style(name):
    files = {kind: storage.drawn(figure, kind, DPI) for kind in FORMATS}
  return page.Figure(name, title, caption, _inline(
      files['svg'].decode(), name, f'{title}. {caption} {words}'), files)
