"""The figures of reports: drawn once, written as SVG, PNG and PDF, and set into
pages in the page's own ink.

A variant has the same colour and dashes in every figure. Sizes are a journal's:
one column, or two.
"""

from collections.abc import Mapping, Sequence
import html
import math
import re
from typing import Any

from tools.compare import curves, measures, page, statistics
from tools.compare.comparison import Comparison
from tools.compare.plan import Measure
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
# The ink is of the base's line, axes and letters, and of nothing else.
INK = '#1b1d21'
GREY = '#8a9099'
COLOUR_OF_BETTER = '#00664a'
COLOUR_OF_WORSE = '#a63f00'
COLOUR_OF_NOISE = '#6a707a'
# The colours in whose place a page puts its own, which are others at night.
_CSS_COLOUR = {INK: 'currentColor', COLOUR_OF_BETTER: 'var(--better)',
               COLOUR_OF_WORSE: 'var(--worse)', COLOUR_OF_NOISE: 'var(--noise)'}
# By the marks that page.MARKS gives to verdicts.
_COLOUR_OF_MARK = {'better': COLOUR_OF_BETTER, 'worse': COLOUR_OF_WORSE}
_MATPLOTLIB_SETTINGS = {
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
_DASHES_OF_REFERENCE = (0, (4, 3))  # of a line at zero, or at chance


def drawing_style(name: str) -> Any:
  """Returns a context in which matplotlib draws in the style of reports.

  Args:
    name: the name of the figure; the ids in its SVG come from it, so that
      figures do not share any on one page, and are the same when it is drawn
      again.
  """
  import matplotlib
  return matplotlib.rc_context(_MATPLOTLIB_SETTINGS | {'svg.hashsalt': name})


def _svg_for_page(svg: str, name: str, alt: str) -> str:
  """Turns an SVG file of matplotlib into an element of an HTML page: without
  its head and background, with the colours of the page, and with a text for
  screen readers.

  Args:
    svg: the text of the file.
    name: the name of the figure, which becomes a part of each id.
    alt: the text for screen readers.
  """
  # Cut off the head and the metadata, and make the white rectangle behind the
  # picture, which matplotlib calls patch_1, transparent.
  body = svg[svg.index('<svg'):]
  body = re.sub(r'<metadata>.*?</metadata>', '', body, flags=re.DOTALL)
  body = re.sub(r'(<g id="patch_1">\s*<path [^>]*?)style="fill: #ffffff"',
                r'\1style="fill: none"', body, count=1)
  attributes, inner = re.match(r'<svg([^>]*)>(.*)', body, re.DOTALL).groups()

  # Ids must be unique in the page, so each gets the figure's name, and so does
  # each reference to one. Colours become those of the page's style sheet.
  inner = re.sub(r'id="([^"]*)"', rf'id="{name}-\1"', inner)
  inner = re.sub(r'(href="|url\()#', rf'\1#{name}-', inner)
  for colour, css_colour in _CSS_COLOUR.items():
    inner = inner.replace(colour, css_colour)

  # The picture is as wide as a column or a page. 72 points are an inch.
  view_box = re.search(r'viewBox="([^"]*)"', attributes)[1]
  inches_wide = float(view_box.split()[2]) / 72
  css_class = 'column' if inches_wide < 5 else 'page'
  return (f'<svg xmlns="http://www.w3.org/2000/svg" '
          f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view_box}" '
          f'class="{css_class}" role="img" '
          f'aria-labelledby="{name}-alt"><title id="{name}-alt">'
          f'{html.escape(alt)}</title>{inner}')


def line_styles(base: str, variants: Sequence[str]
                ) -> dict[str, dict[str, Any]]:
  """Returns the colour and dashes of the line of each variant, as keywords of
  matplotlib.

  The line of the base is black and solid. The others take the colours in turn.
  When the colours are used up, they are used again with other dashes.

  Args:
    base: the name of the base.
    variants: the names of the others.
  """
  style_by_name = {base: dict(color=INK, linestyle='-')}
  for i, name in enumerate(variants):
    rounds_of_colours, colour = divmod(i, len(COLOURS))
    style_by_name[name] = dict(
        color=COLOURS[colour],
        linestyle=DASHES[rounds_of_colours % len(DASHES)])
  return style_by_name


def css_line_classes(comparison: Comparison, variant: str, turn: int = 0
                     ) -> str:
  """Returns the classes of report.css that draw the line of a variant: its
  colour (`ink` for the base, else `c0`, `c1`, ...) and its dashes (`d0`, `d1`,
  ...). The colours are those of `line_styles`.

  Args:
    comparison: the comparison that the report is about.
    variant: the name of the variant.
    turn: the number of this line among several lines of the variant, which get
      different dashes. 0 stands for its only or first line.
  """
  # The base has a colour of its own, and its first line no dashes.
  plan = comparison.plan
  if variant == plan.base:
    if not turn:
      return 'ink'
    return f'ink d{turn % len(DASHES)}'

  # Variants after the last colour use the colours again, with other dashes.
  rounds_of_colours, colour = divmod(plan.variants.index(variant), len(COLOURS))
  dashes = (turn or rounds_of_colours) % len(DASHES)
  return f'c{colour} d{dashes}'


def shorten_labels(names: Sequence[str], most: int = 22) -> dict[str, str]:
  """Returns a label for each name, {name: label}. A long name loses its middle,
  because names of one sweep often differ at the end.

  Args:
    names: the names.
    most: the most characters of a label. Names whose labels would be equal are
      not shortened.
  """
  # One character is the ellipsis, and the rest is shared by head and tail.
  tail = (most - 1) // 2
  head = most - 1 - tail
  label_by_name = {}
  for name in names:
    label_by_name[name] = name
    if len(name) > most:
      label_by_name[name] = f'{name[:head]}…{name[len(name) - tail:]}'

  # Give names back whose labels are equal.
  labels = list(label_by_name.values())
  for name, label in label_by_name.items():
    if labels.count(label) > 1:
      label_by_name[name] = name
  return label_by_name


def draw_outcome(comparison: Comparison) -> Any:
  """Draws what a comparison found, and returns the matplotlib figure, whose
  axes are those of the left and the right panel.

  The left panel has the loss curves at the largest size: the held-out loss over
  the tokens, averaged over seeds. The right panel has the difference of each
  variant from the base with its interval and verdict, the best at the top.

  Args:
    comparison: the sweep or study.
  """
  from matplotlib.figure import Figure
  plan = comparison.plan
  estimates = [estimate for estimate in comparison.verdicts()
               if page.known(estimate['effect'])]
  # An effect times the sign is positive for an improvement.
  estimates.sort(key=lambda estimate: -plan.primary.sign * estimate['effect'])

  # The figure is high enough for all bars of the right panel, which lie closer
  # together if there are several sizes, and for eight bars at least. A bar has
  # 0.17 inches, and a variant has the room of 2.6 bars at most. Titles, labels
  # and the legend take 1.2 inches.
  bars_of_variant = len(plan.sizes) + 1 if len(plan.sizes) > 1 else 1
  inches_of_bars = 0.17 * len(estimates) * min(bars_of_variant, 2.6)
  height = 1.2 + max(0.17 * 8, inches_of_bars)

  unit = measures.format_unit(comparison.frozen, plan.primary, ', ')
  base_label = shorten_labels(comparison.variants)[plan.base]
  with drawing_style('outcome'):
    figure = Figure(figsize=(PAGE_WIDTH, height))
    curve_axes, effect_axes = figure.subplots(1, 2)
    _draw_loss_curves(curve_axes, comparison, unit)
    if curve_axes.lines:
      figure.legend(*curve_axes.get_legend_handles_labels(), ncols=4,
                    loc='outside lower center')
    _draw_effects(axes=effect_axes, comparison=comparison, estimates=estimates,
                  label_by_name=shorten_labels(comparison.variants, 40))
    effect_axes.set(
        xlabel=f'{plan.primary.name} minus that of {base_label}{unit}',
        title='difference from the base')
    # The figure must be laid out inside of this block, where its style holds.
    figure.draw_without_rendering()
  return figure


def _draw_loss_curves(axes: Any, comparison: Comparison, unit: str) -> None:
  """Draws the loss curve of each variant at the largest size of the model: the
  held-out loss over the training tokens. A line is the mean over the seeds, and
  a dot is the last loss of one seed.

  Args:
    axes: the matplotlib axes to draw into.
    comparison: the comparison.
    unit: the unit of the loss, with a comma before it.
  """
  from matplotlib import ticker
  plan = comparison.plan
  style_by_name = line_styles(plan.base, plan.variants)
  label_by_name = shorten_labels(comparison.variants)
  largest = plan.sizes[-1]
  for name in comparison.variants:
    # Collect the curve of each seed.
    curve_of_seeds = []
    for (variant, size, _), curve_by_figure in comparison.curves.items():
      if (variant, size) == (name, largest) and 'eval' in curve_by_figure:
        curve_of_seeds.append(curve_by_figure['eval'])
    if not curve_of_seeds:
      continue

    # Draw their ends, and their mean.
    style = style_by_name[name]
    _draw_dots(axes=axes, x=[curve['tokens'][-1] for curve in curve_of_seeds],
               y=[curve['loss'][-1] for curve in curve_of_seeds],
               colour=style['color'])
    mean = curves.mean_curve(curve_of_seeds)
    axes.plot(mean['tokens'], mean['loss'], label=label_by_name[name], **style)
  axes.set(xlabel='training tokens', ylabel=f'held-out loss{unit}',
           title=f'loss curves {largest}')
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  axes.locator_params(axis='x', nbins=4)
  axes.grid(axis='y')


def _draw_dots(axes: Any, x: Sequence[float], y: Sequence[float], colour: str
               ) -> None:
  """Draws a small dot for each run, or for each difference of two runs."""
  axes.plot(x, y, '.', color=colour, markersize=3, alpha=0.5, zorder=1,
            markeredgewidth=0)


def _draw_effects(axes: Any, comparison: Comparison,
                  estimates: Sequence[Mapping],
                  label_by_name: Mapping[str, str]) -> None:
  """Draws a forest plot: for each variant a mark at its difference from the
  base, with a bar for the interval. If there are several sizes of the model, a
  bar for each of them follows below.

  The colour is that of the verdict, which the corrected p-value decides. The
  mark is hollow if the variant is neither better nor worse.

  Args:
    axes: the matplotlib axes to draw into.
    comparison: the comparison.
    estimates: the estimates that the verdicts are about, as
      Comparison.estimates has them, from the top down.
    label_by_name: the label of each variant.
  """
  # The bars of a variant: the one over all sizes, named '', comes first.
  sizes = comparison.plan.sizes
  bars = ['']
  if len(sizes) > 1:
    bars += sizes

  # y grows downwards, by 1 for each bar.
  y = 0.0
  tick_labels = {}
  for estimate in estimates:
    variant, verdict = estimate['variant'], estimate['verdict']
    colour = _COLOUR_OF_MARK.get(page.MARKS.get(verdict), COLOUR_OF_NOISE)
    for i, size in enumerate(bars):
      at_size = comparison.effect(
          phase='confirm', variant=variant, measure=estimate['measure'],
          size=size)
      if not at_size or not page.known(at_size['effect']):
        continue
      # More sizes than markers begin again with the first marker.
      _draw_bar(axes=axes, y=y, estimate=at_size, colour=colour,
                marker=MARKERS[i % len(MARKERS)], is_main=not size)
      tick_labels[y] = size
      if not size:
        tick_labels[y] = label_by_name[variant]
        axes.text(1.02, y, verdict, va='center', fontsize=6.5,
                  transform=axes.get_yaxis_transform(), color=colour)
      y += 1.0
    # Leave some space between variants that have several bars.
    if len(bars) > 1:
      y += 0.6

  _finish_forest(axes, tick_labels, y)


def _finish_forest(axes: Any, tick_labels: Mapping[float, str], bottom: float
                   ) -> None:
  """Draws the line of no effect and the labels of the bars of a forest plot.

  Args:
    axes: the matplotlib axes with the bars.
    tick_labels: the label of each bar, by its y.
    bottom: the y of the place below the last bar.
  """
  axes.axvline(0, color=INK, linewidth=0.6, linestyle=_DASHES_OF_REFERENCE)
  # The limits are given from the bottom up, so that y grows downwards.
  axes.set_yticks(list(tick_labels), tick_labels.values())
  axes.set_ylim(bottom - 0.4, -0.8)
  axes.grid(axis='x')
  axes.locator_params(axis='x', nbins=4)
  axes.tick_params(axis='y', length=0)


def _draw_bar(axes: Any, y: float, estimate: Mapping[str, Any], colour: str,
              marker: str, is_main: bool) -> None:
  """Draws one bar of a forest plot: the difference of a variant from the base
  as a mark, its interval as a line, and below it the difference of each pair of
  runs as a dot.

  Args:
    axes: the matplotlib axes to draw into.
    y: the height at which to draw.
    estimate: the difference, with its 'effect', 'low', 'high' and 'differences'
      (of pairs of runs), as Comparison.effect returns it.
    colour: the colour, which is that of the verdict.
    marker: matplotlib's marker.
    is_main: whether the bar is over all sizes. That of one size is thinner.
  """
  line_width, marker_size = 0.8, 3.3
  if is_main:
    line_width, marker_size = 1.6, 4.1

  # Draw the dots, then the interval, then the mark, which is hollow if the
  # variant is neither better nor worse.
  differences = estimate.get('differences') or ()
  _draw_dots(axes=axes, x=differences, y=[y + 0.25] * len(differences),
             colour=colour)
  low, high = estimate['low'], estimate['high']
  if page.known(low):
    axes.plot([low, high], [y, y], color=colour, linewidth=line_width,
              solid_capstyle='butt')
  fill = colour
  if colour == COLOUR_OF_NOISE:
    fill = 'none'
  axes.plot(estimate['effect'], y, marker, color=colour, markersize=marker_size,
            markeredgewidth=0.8, markerfacecolor=fill)


def draw_verdicts(rows: Sequence[Mapping[str, Any]], xlabel: str) -> Any:
  """Draws a forest plot of some verdicts, and returns the matplotlib figure: a
  bar for each difference with its interval, in the colour of its verdict.

  Args:
    rows: the verdicts from the top down. Each has its 'entry' (a label),
      'effect' (the difference), 'low', 'high', 'differences' (of pairs of
      runs), and 'verdict'.
    xlabel: the label of the axis of differences.
  """
  from matplotlib.figure import Figure
  labels = shorten_labels([row['entry'] for row in rows], 40)
  with drawing_style('verdicts'):
    figure = Figure(figsize=(PAGE_WIDTH, 0.8 + 0.22 * len(rows)))
    axes = figure.subplots()
    # y grows downwards, by 1 for each verdict.
    tick_labels = {}
    for y, row in enumerate(rows):
      tick_labels[y] = labels[row['entry']]
      colour = _COLOUR_OF_MARK.get(page.MARKS.get(row['verdict']),
                                   COLOUR_OF_NOISE)
      _draw_bar(axes=axes, y=y, estimate=row, colour=colour, marker=MARKERS[0],
                is_main=True)
      axes.text(1.02, y, row['verdict'], va='center', fontsize=6.5,
                transform=axes.get_yaxis_transform(), color=colour)
    _finish_forest(axes, tick_labels, len(rows))
    axes.set_xlabel(xlabel)
    # The figure must be laid out inside of this block, where its style holds.
    figure.draw_without_rendering()
  return figure


def draw_measures_by_size(comparison: Comparison) -> Any:
  """Draws a panel for each measure besides the primary one: the means over the
  seeds with their intervals, by the size of the model, and the score that
  guessing gives. Returns the matplotlib figure.

  Args:
    comparison: the study.
  """
  from matplotlib.figure import Figure
  other_measures = comparison.plan.measures[1:]
  num_columns = min(len(other_measures), 4)
  num_rows = math.ceil(len(other_measures) / num_columns)
  width = PAGE_WIDTH if num_columns > 1 else COLUMN_WIDTH
  with drawing_style('measures'):
    figure = Figure(figsize=(width, 1.9 * num_rows + 0.6))
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    # The last row may have more panels than there are measures left.
    for axes in grid.flat[len(other_measures):]:
      axes.set_visible(False)
    for axes, measure in zip(grid.flat, other_measures):
      _draw_scores(axes, comparison, measure)
    figure.legend(*grid[0, 0].get_legend_handles_labels(),
                  loc='outside lower center', ncols=min(2 * num_columns, 4))
    # The figure must be laid out inside of this block, where its style holds.
    figure.draw_without_rendering()
  return figure


def _draw_scores(axes: Any, comparison: Comparison, measure: Measure) -> None:
  """Draws a measure of each variant by size: the mean over seeds with its
  interval, each run as a dot, and the score of guessing as a line."""
  plan = comparison.plan
  style_by_name = line_styles(plan.base, plan.variants)
  label_by_name = shorten_labels(comparison.variants)
  # The variants at one size stand a little apart, so that no interval hides
  # another.
  distance = min(0.12, 0.7 / len(comparison.variants))
  for i, name in enumerate(comparison.variants):
    scores_at_x = {}
    for x, size in enumerate(plan.sizes):
      values = comparison.values('confirm', name, size, measure)
      if values:
        scores_at_x[x] = [*values.values()]
    if not scores_at_x:
      continue

    # The dots, which stand beside their mean and not behind it.
    offset_of_mean = distance * (i - len(comparison.variants) / 2)
    offset_of_dots = distance * (i - (len(comparison.variants) + 1) / 2)
    for x, scores in scores_at_x.items():
      _draw_dots(axes=axes, x=[x + offset_of_dots] * len(scores), y=scores,
                 colour=style_by_name[name]['color'])

    # The means, with their intervals.
    means = [sum(scores) / len(scores) for scores in scores_at_x.values()]
    below_and_above = [_interval_arms(measure, scores)
                       for scores in scores_at_x.values()]
    axes.errorbar(
        [x + offset_of_mean for x in scores_at_x], means,
        [*zip(*below_and_above)], elinewidth=0.8, marker='o', markersize=2.5,
        label=label_by_name[name], **style_by_name[name])

  # The score of guessing. Where it is far from all runs, the title says it:
  # with it in sight, runs that are alike would be one dot.
  low, high = axes.get_ylim()  # of the runs
  chance = measure.chance
  axes.axhline(chance, color=GREY, linewidth=0.8,
               linestyle=_DASHES_OF_REFERENCE, zorder=0)
  title = measure.name
  if max(low - chance, chance - high) > 3 * (high - low):
    axes.set_ylim(low, high)
    title += f' (guessing: {chance:.3g})'
  unit = measures.format_unit(comparison.frozen, measure, ', ')
  axes.set_xticks(range(len(plan.sizes)), plan.sizes)
  axes.set(title=title, ylabel='score' + unit)
  axes.grid(axis='y')


def _interval_arms(measure: Measure, values: Sequence[float]) -> list[float]:
  """Returns how far the 95 % interval of a mean reaches below and above it; NaN
  for both where there is none."""
  if measure.figure.rpartition('/')[2] in metrics.FIGURES_BETWEEN_0_AND_1:
    mean, low, high, _ = statistics.logit_interval(values)
  else:
    mean, low, high, _ = statistics.student_interval(values)
  if low is None:
    return [math.nan, math.nan]
  return [mean - low, high - mean]


def draw_figures(comparison: Comparison) -> list[page.Figure]:
  """Draws the figures of a report with their captions, as far as there are
  numbers for them.

  Args:
    comparison: the sweep or study.
  """
  plan, figures = comparison.plan, []

  # The loss curves, and the difference of each variant from the base.
  effects = []
  for row in comparison.verdicts():
    if page.known(row['effect']):
      effects.append(f'{row["variant"]} {page.effect(row).text}')
  if comparison.curves or effects:
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
    figures.append(_page_figure(
        name='outcome', title='Outcome', caption=caption,
        description='; '.join(effects), figure=draw_outcome(comparison)))

  # The other measures, by the size of the model.
  if len(plan.sizes) > 1 and _has_other_measures(comparison):
    caption = (
        'Means over the seeds of the confirmation with their 95 % intervals, '
        'and each run as a dot; '
        'the dashed line, or a number in the title, is what guessing gives.')
    figures.append(_page_figure(
        name='measures', title='Other measures', caption=caption,
        description='', figure=draw_measures_by_size(comparison)))
  return figures


def _has_other_measures(comparison: Comparison) -> bool:
  """Returns whether any run of the base's confirmation has a measure that is
  not the primary one."""
  plan = comparison.plan
  for size in plan.sizes:
    for measure in plan.measures[1:]:
      if comparison.values('confirm', plan.base, size, measure):
        return True
  return False


def _page_figure(name: str, title: str, caption: str, description: str,
                 figure: Any) -> page.Figure:
  """Renders a drawing to the files of a report, and to SVG for its page.

  Args:
    name: the name of the files, without their endings.
    title: the text above the drawing.
    caption: the text below it.
    description: its figures in words, for those who cannot see it.
    figure: the matplotlib figure.
  """
  with drawing_style(name):
    files = {file_format: storage.render_picture(figure, file_format, DPI)
             for file_format in FILE_FORMATS}
  alt = f'{title}. {caption} {description}'
  svg = _svg_for_page(svg=files['svg'].decode(), name=name, alt=alt)
  return page.Figure(name=name, title=title, caption=caption, svg=svg,
                     files=files)
