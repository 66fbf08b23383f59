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

FILE_FORMATS = ('svg', 'png', 'pdf')
# In inches: one column, and two with what is between.
COLUMN_WIDTH, PAGE_WIDTH = 3.25, 6.75
DPI = 300
# Okabe and Ito's colours, which the colour-blind tell apart, as in report.css.
COLOURS = ('#0072b2', '#e69f00', '#009e73', '#d55e00', '#56b4e9', '#cc79a7')
# The dashes of the first six variants, of the next six, and so on; as in
# report.css.
DASHES = ('-', (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
# The colours in whose place a page puts its own, which are others at night. The
# ink is of the base's line, axes and letters, and of nothing else.
INK, GREY, COLOUR_OF_BETTER, COLOUR_OF_WORSE, COLOUR_OF_NOISE = (
    '#1b1d21', '#8a9099', '#00664a', '#a63f00', '#6a707a')
_VARIABLES = {INK: 'currentColor', COLOUR_OF_BETTER: 'var(--better)',
              COLOUR_OF_WORSE: 'var(--worse)', COLOUR_OF_NOISE: 'var(--noise)'}
_VERDICTS = {
    'better': COLOUR_OF_BETTER, 'worse': COLOUR_OF_WORSE}  # by page.MARKS
_STYLE = {
    'font.size': 7, 'axes.titlesize': 7.5, 'axes.labelsize': 7,
    'xtick.labelsize': 6.5, 'ytick.labelsize': 6.5, 'legend.fontsize': 6.5,
    'axes.linewidth': 0.6, 'lines.linewidth': 1.2, 'xtick.major.width': 0.6,
    'ytick.major.width': 0.6, 'grid.linewidth': 0.4, 'text.color': INK,
    'axes.edgecolor': INK, 'axes.labelcolor': INK, 'xtick.color': INK,
    'ytick.color': INK, 'axes.spines.top': False, 'axes.spines.right': False,
    'grid.color': GREY, 'grid.alpha': 0.4, 'legend.frameon': False,
    'axes.facecolor': 'none', 'figure.constrained_layout.use': True,
    # Letters as outlines: they look the same wherever the file is opened.
    'svg.fonttype': 'path',
    'text.parse_math': False}  # a name may hold a '$'
MARKERS = ('D', 'o', 's', '^', 'v', 'P', 'X', '*')  # of all sizes, and of each
_DASHED = (0, (4, 3))


def drawing_style(name: str) -> Any:
  """Returns a context in which to draw.

  Args:
    name: the name of the figure; the ids in its SVG come from it, so that
      figures do not share any on one page, and are the same when it is drawn
      again.
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
  # Ids are looked up in the whole page.
  inner = re.sub(r'id="([^"]*)"', rf'id="{name}-\1"', inner)
  inner = re.sub(r'(href="|url\()#', rf'\1#{name}-', inner)
  for colour, variable in _VARIABLES.items():
    inner = inner.replace(colour, variable)
  box = re.search(r'viewBox="([^"]*)"', head)[1]
  points_wide = float(box.split()[2])
  width = 'column' if points_wide / 72 < 5 else 'page'
  return (f'<svg xmlns="http://www.w3.org/2000/svg" '
          f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
          f'class="{width}" role="img" '
          f'aria-labelledby="{name}-alt"><title id="{name}-alt">'
          f'{html.escape(alt)}</title>{inner}')


def line_styles(base: str, others: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Returns how the line of each variant is drawn: the base's in ink, without
  dashes; the others take the colours in turn, and then the colours dashed."""
  each = {base: dict(color=INK, linestyle='-')}
  for i, name in enumerate(others):
    rounds, place = divmod(i, len(COLOURS))
    each[name] = dict(color=COLOURS[place],
                      linestyle=DASHES[rounds % len(DASHES)])
  return each


def css_line_classes(c, name: str, turn: int = 0) -> str:
  """Returns how the line of a variant is drawn as classes of report.css;
  another `turn` gives other dashes to another line of the variant."""
  if name == c.plan.base:
    return f'ink d{turn % len(DASHES)}' if turn else 'ink'
  rounds, place = divmod(c.plan.variants.index(name), len(COLOURS))
  return f'c{place} d{(turn or rounds) % len(DASHES)}'


def shorten_labels(names: Sequence[str], most: int = 22) -> dict[str, str]:
  """Returns the label of each name in a figure: of at most `most` characters,
  but for names that would then look alike. A longer name loses its middle:
  names of one sweep often differ at the end."""
  tail = (most - 1) // 2
  head = most - 1 - tail
  labels = {}
  for name in names:
    labels[name] = name
    if len(name) > most:
      labels[name] = f'{name[:head]}…{name[len(name) - tail:]}'
  every = list(labels.values())
  return {name: name if every.count(label) > 1 else label
          for name, label in labels.items()}


def draw_outcome(c) -> Any:
  """Returns the figure of what was found: on the left the held-out loss by
  tokens, the mean over seeds, at the largest size; on the right the difference
  of each variant with its interval and verdict, the best at the top."""
  from matplotlib.figure import Figure
  plan = c.plan
  rows = [row for row in c.verdicts() if page.known(row['effect'])]
  rows.sort(key=lambda row: -plan.primary.sign * row['effect'])
  bars_a_row = len(plan.sizes) + 1 if len(plan.sizes) > 1 else 1
  height = max(0.17 * 8, 0.17 * len(rows) * min(bars_a_row, 2.6))
  unit = measures.format_unit(c.frozen, plan.primary, ', ')
  base = shorten_labels(c.variants)[plan.base]
  with drawing_style('outcome'):
    figure = Figure(figsize=(PAGE_WIDTH, 1.2 + height))
    left, right = figure.subplots(1, 2)
    _loss_curves(left, c, unit)
    if left.lines:
      figure.legend(*left.get_legend_handles_labels(), ncols=4,
                    loc='outside lower center')
    _forest(right, c, rows, shorten_labels(c.variants, 40))
    right.set(xlabel=f'{plan.primary.name} minus that of {base}{unit}',
              title='difference from the base')
    figure.draw_without_rendering()  # under this style, wherever it is written
  return figure


def _loss_curves(axes: Any, c, unit: str) -> None:
  """Draws the held-out loss of each variant at the largest size by tokens: the
  mean over its seeds, and each seed's last."""
  from matplotlib import ticker
  look = line_styles(c.plan.base, c.plan.variants)
  label = shorten_labels(c.variants)
  largest = c.plan.sizes[-1]
  for name in c.variants:
    seeds = []
    for (variant, size, _), drawn in c.curves.items():
      if (variant, size) == (name, largest) and 'eval' in drawn:
        seeds.append(drawn['eval'])
    if not seeds:
      continue
    _dots(axes, x=[line['tokens'][-1] for line in seeds],
          y=[line['loss'][-1] for line in seeds], colour=look[name]['color'])
    curve = curves.mean_curve(seeds)
    axes.plot(curve['tokens'], curve['loss'], label=label[name], **look[name])
  axes.set(xlabel='training tokens', ylabel=f'held-out loss{unit}',
           title=' '.join(['loss curves', largest]))
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  axes.locator_params(axis='x', nbins=4)
  axes.grid(axis='y')


def _dots(axes: Any, x: Sequence[float], y: Sequence[float], colour: str
          ) -> None:
  """Draws each run, or each difference of two."""
  axes.plot(x, y, '.', color=colour, markersize=3, alpha=0.5, zorder=1,
            markeredgewidth=0)


def _forest(axes: Any, c, rows: Sequence[Mapping], label: Mapping) -> None:
  """Draws a bar for each row, and below it one for each of several sizes, in
  the colour of the verdict, which the corrected p decides; hollow marks are of
  those that are neither better nor worse."""
  sizes = [''] if len(c.plan.sizes) == 1 else ['', *c.plan.sizes]
  y, ticks = 0.0, {}
  for row in rows:
    verdict = row['verdict']
    colour = _VERDICTS.get(page.MARKS.get(verdict), COLOUR_OF_NOISE)
    for i, size in enumerate(sizes):
      estimate = c.effect('confirm', row['variant'], row['measure'], size)
      if not estimate or not page.known(estimate['effect']):
        continue
      _bar(axes, y=y, estimate=estimate, colour=colour,
           marker=MARKERS[i % len(MARKERS)], is_main=not size)
      ticks[y] = size
      if not size:
        ticks[y] = label[row['variant']]
        axes.text(1.02, y, verdict, va='center', fontsize=6.5,
                  transform=axes.get_yaxis_transform(), color=colour)
      y += 1.0
    if len(sizes) > 1:
      y += 0.6
  axes.axvline(0, color=INK, linewidth=0.6, linestyle=_DASHED)
  axes.set_yticks(list(ticks), ticks.values())
  axes.set_ylim(y - 0.4, -0.8)
  axes.grid(axis='x')
  axes.locator_params(axis='x', nbins=4)
  axes.tick_params(axis='y', length=0)


def _bar(axes: Any, y: float, estimate: Mapping[str, Any], colour: str,
         marker: str, is_main: bool) -> None:
  """Draws an effect with its interval, and the difference of each pair below
  it; the bar of one of several sizes, which is not the main one, is thinner."""
  # The seeds, then the interval, then the mean; hollow where it says nothing.
  seeds = estimate.get('differences') or ()
  _dots(axes, x=seeds, y=[y + 0.25] * len(seeds), colour=colour)
  width, size = 0.8, 3.3
  if is_main:
    width, size = 1.6, 4.1
  low, high = estimate['low'], estimate['high']
  if page.known(low):
    axes.plot([low, high], [y, y], color=colour, linewidth=width,
              solid_capstyle='butt')
  fill = colour
  if colour == COLOUR_OF_NOISE:
    fill = 'none'
  axes.plot(estimate['effect'], y, marker, color=colour, markersize=size,
            markeredgewidth=0.8, markerfacecolor=fill)


def draw_measures_by_size(c) -> Any:
  """Returns the figure of the measures that are not the primary one: means over
  the seeds with their intervals, by size, and what guessing gives."""
  from matplotlib.figure import Figure
  others = c.plan.measures[1:]
  columns = min(len(others), 4)
  rows = math.ceil(len(others) / columns)
  width = PAGE_WIDTH if columns > 1 else COLUMN_WIDTH
  with drawing_style('measures'):
    figure = Figure(figsize=(width, 1.9 * rows + 0.6))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(others):]:
      axes.set_visible(False)
    for axes, measure in zip(grid.flat, others):
      _scores(axes, c, measure)
    figure.legend(*grid[0, 0].get_legend_handles_labels(),
                  loc='outside lower center', ncols=min(2 * columns, 4))
    figure.draw_without_rendering()
  return figure


def _scores(axes: Any, c, measure) -> None:
  """Draws a measure of each variant by size: the mean over seeds with its
  interval, each run as a dot, and what guessing gives."""
  plan = c.plan
  look, label = line_styles(
      plan.base, plan.variants), shorten_labels(c.variants)
  # Those of one size stand a little apart, so that no interval hides another.
  apart = min(0.12, 0.7 / len(c.variants))
  for i, name in enumerate(c.variants):
    scores = {}
    for x, size in enumerate(plan.sizes):
      values = c.values('confirm', name, size, measure)
      if values:
        scores[x] = [*values.values()]
    if not scores:
      continue
    aside = apart * (i - len(c.variants) / 2)
    beside_mean = apart * (i - (len(c.variants) + 1) / 2)
    for x, each in scores.items():  # not behind their mean
      _dots(axes, x=[x + beside_mean] * len(each), y=each,
            colour=look[name]['color'])
    down_and_up = [_reach(measure, each) for each in scores.values()]
    axes.errorbar(
        [x + aside for x in scores],
        [sum(each) / len(each) for each in scores.values()],
        [*zip(*down_and_up)], elinewidth=0.8, marker='o', markersize=2.5,
        label=label[name], **look[name])

  # Guessing far from all runs is said in the title: with it in sight, runs that
  # are alike would be one dot.
  low, high = axes.get_ylim()  # of the runs
  chance = measure.chance
  axes.axhline(chance, color=GREY, linewidth=0.8, linestyle=_DASHED, zorder=0)
  title = measure.name
  if max(low - chance, chance - high) > 3 * (high - low):
    axes.set_ylim(low, high)
    title += f' (guessing: {chance:.3g})'
  axes.set_xticks(range(len(plan.sizes)), plan.sizes)
  axes.set(title=title,
           ylabel='score' + measures.format_unit(c.frozen, measure, ', '))
  axes.grid(axis='y')


def _reach(measure, values: Sequence[float]) -> list[float]:
  """Returns how far the 95 % interval of a mean reaches down and up."""
  if measure.figure.rpartition('/')[2] in metrics.FIGURES_BETWEEN_0_AND_1:
    mean, low, high, _ = statistics.share_interval(values)
  else:
    mean, low, high, _ = statistics.interval(values)
  if low is None:
    return [math.nan, math.nan]
  return [mean - low, high - mean]


def draw_figures(c) -> list[page.Figure]:
  """Returns every figure that there are numbers for."""
  plan, drawn = c.plan, []
  effects = []
  for row in c.verdicts():
    if page.known(row['effect']):
      effect = page.estimate(row['effect'], row['low'], row['high']).text
      effects.append(f'{row["variant"]} {effect}')
  if c.curves or effects:
    side = 'left' if plan.primary.sign < 0 else 'right'
    sizes = ''
    if len(plan.sizes) > 1:
      sizes = ' over all sizes (diamonds) and at each'
    caption = (
        'Held-out loss, the mean over seeds; and the difference of each '
        f'variant{sizes}, with 95 % intervals over paired seeds: {side} of the '
        f'line is better than {plan.base}. Each interval is of its variant '
        'alone; colours and filled marks are of verdicts, which count all '
        'variants. Dots are the runs, and the differences of their pairs.')
    drawn.append(_drawn(name='outcome', title='Outcome', caption=caption,
                        words='; '.join(effects), figure=draw_outcome(c)))
  if len(plan.sizes) > 1 and _has_other_measures(c):
    caption = (
        'Means over the seeds of the confirmation with their 95 % intervals, '
        'and each run as a dot; '
        'the dashed line, or a number in the title, is what guessing gives.')
    drawn.append(_drawn(name='measures', title='Other measures',
                        caption=caption, words='', figure=draw_measures_by_size(
                            c)))
  return drawn


def _has_other_measures(c) -> bool:
  """Returns whether the base has a figure that is not of the primary measure.
  """
  for size in c.plan.sizes:
    for measure in c.plan.measures[1:]:
      if c.values('confirm', c.plan.base, size, measure):
        return True
  return False


def _drawn(name: str, title: str, caption: str, words: str,
           figure: Any) -> page.Figure:
  """Returns a figure; `words` says it to who cannot see it."""
  with drawing_style(name):
    files = {kind: storage.render_picture(figure, kind, DPI)
             for kind in FILE_FORMATS}
  alt = f'{title}. {caption} {words}'
  return page.Figure(name=name, title=title, caption=caption,
                     svg=_inline(files['svg'].decode(), name, alt),
                     files=files)
