"""The figures of reports: drawn once, written as SVG, PNG and PDF, and set into
pages in the page's own ink.

A variant has the same colour and dashes in every figure. Sizes are a journal's:
one column, or two.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import html
import io
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from configs.errors import one_of
from tools.compare import decide, measures, page, statistics, tables
from tools.compare import plan as plans
from tools.compare.tables import known, percent

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
MARKERS = ('o', 's', '^', 'v', 'P', 'X', '*')  # of sizes, in turn
LEFT_OUT = 0.1  # of training, whose losses would flatten all that follows
_DASHED = (0, (4, 3))


def families() -> list[str]:
  """Returns what font.family is for figures, since a variant may be named in
  any script: matplotlib takes a character that one font lacks from the next.
  Its own has Latin, Greek, Cyrillic and more; the others, where they are
  installed, have Chinese, Japanese and Korean characters."""
  from matplotlib import font_manager
  eastern = re.compile('CJK|Hei|Fallback|Gothic|PingFang|Hiragino|Source Han|'
                       'Arial Unicode|Noto Sans (SC|JP|KR)')
  return ['DejaVu Sans', *sorted(filter(
      eastern.search, {*font_manager.get_font_names()}))]


def style(name: str) -> Any:
  """A context in which to draw.

  Args:
    name: of the figure; the ids in its SVG come from it, so that figures do
      not share any on one page, and are the same when it is drawn again.
  """
  import matplotlib
  matplotlib.use('Agg')
  return matplotlib.rc_context(_STYLE | {
      'font.family': families(), 'svg.hashsalt': name})


def check_format(path: str) -> None:
  """Raises RequestError for a file that is none of FORMATS."""
  one_of('the ending of --plot', pathlib.Path(path).suffix.lstrip('.'), FORMATS)


def written(figure: Any, kind: str, dpi: int = DPI) -> bytes:
  """Returns a figure as a file of one of FORMATS holds it."""
  file = io.BytesIO()
  figure.savefig(file, format=kind, dpi=dpi, metadata={
      'svg': {'Date': None}, 'pdf': {'CreationDate': None}}.get(kind))
  return file.getvalue()


def save(figure: Any, path: str | pathlib.Path) -> None:
  """Writes a figure in the format that the path ends in."""
  path = pathlib.Path(path)
  path.write_bytes(written(figure, path.suffix.lstrip('.'), 150))


def _drawn(name: str, title: str, caption: str, told: str,
           paint: Callable[[], Any]) -> page.Figure:
  """Returns what `paint` draws; `told` says its figures to who cannot see it.
  """
  from matplotlib import pyplot
  alt = f'{title}. {caption} {told}.'
  with style(name):
    figure = paint()
    files = {kind: written(figure, kind) for kind in FORMATS}
    pyplot.close(figure)
  return page.Figure(name, title, caption, alt,
                     _inline(files['svg'].decode(), name, alt), files)


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


def css_look(sweep, name: str, turn: int = 0) -> str:
  """Returns the same as classes of report.css.

  Args:
    sweep: whose variants are drawn.
    name: of the variant.
    turn: another number gives other dashes to another line of the variant.
  """
  others = [p.name for p in sweep.points if p is not sweep.base]
  if name == sweep.base.name:
    return f'ink d{turn % len(DASHES)}' if turn else 'ink'
  i = others.index(name)
  return (f'c{i % len(COLOURS)} '
          f'd{(turn or i // len(COLOURS)) % len(DASHES)}')


class Bar(NamedTuple):
  """A line of a forest plot: a difference from the base.

  Attributes:
    label: of the line.
    mean: of the difference; None: there is none.
    ends: of the bar; None: there is none.
    colour: of both.
    marker: of the mean.
    width: of the bar.
    look: of the variant's line, to be shown beside its label.
    word: the verdict, to stand at the right.
  """
  label: str
  mean: float | None
  ends: tuple[float, float] | None
  colour: str
  marker: str = 'o'
  width: float = 1.6
  look: Mapping[str, Any] | None = None
  word: str = ''


def _forest(axes: Any, groups: Sequence[Sequence[Bar]]) -> None:
  """Draws bars below each other, a little apart between groups; where a group
  has several, its first label is bold."""
  sides, y, ticks, labels = axes.get_yaxis_transform(), 0.0, [], []
  for group in groups:
    for bar in group:
      if bar.ends:
        axes.plot(bar.ends, [y, y], color=bar.colour, linewidth=bar.width,
                  solid_capstyle='butt')
      if bar.mean is not None:
        axes.plot(bar.mean, y, bar.marker, color=bar.colour,
                  markersize=2.5 + bar.width, markeredgewidth=0)
      elif not bar.word:
        axes.text(0.5, y, 'all runs diverged', color=bar.colour, va='center',
                  ha='center', transform=sides)
      if bar.look:
        axes.annotate('', (0, y), (-24, 0), xycoords=sides,
                      textcoords='offset points', annotation_clip=False,
                      arrowprops=dict(arrowstyle='-', shrinkA=0, shrinkB=5,
                                      linewidth=1.6, **bar.look))
      if bar.word:
        axes.text(1.02, y, bar.word, transform=sides, va='center',
                  fontsize=6.5, color=bar.colour)
      ticks, labels = [*ticks, y], [*labels, bar.label]
      y += 1.0
    y += 0.6 * (len(group) > 1)
  axes.axvline(0, color=INK, linewidth=0.6, linestyle=_DASHED)
  axes.set_yticks(ticks, labels)
  firsts = np.cumsum([0, *map(len, groups)])[:-1]
  for i, text in enumerate(axes.get_yticklabels()):
    if i in firsts and len(ticks) > len(groups):
      text.set_fontweight('bold')
  axes.set_ylim(y - 0.4, -0.8)
  axes.grid(axis='x')
  axes.locator_params(axis='x', nbins=6)
  axes.tick_params(axis='y', length=0,
                   pad=3.5 if groups[0][0].look is None else 28)


# A sweep: `rows` are sweep_report.outcomes.


def _sweep_bars(sweep, rows, words: bool) -> list[list[Bar]]:
  look = looks(sweep.base.name,
               [p.name for p in sweep.points if p is not sweep.base])
  label = tables.shortened([row.point.name for row in rows], 40)
  found = []
  for row in rows:
    name, d = row.point.name, row.difference
    word = tables.VERDICTS[row.verdict] if d else 'the base'
    found.append([Bar(
        label[name], d and d.mean, d and d.bar,
        {'better': BETTER, 'worse': WORSE}.get(row.verdict, NOISE),
        width=1.6 if d and d.known else 0.8, look=look[name],
        word=word if words else '')])
  return found


def sweep_forest(sweep, rows, bars: str) -> page.Figure:
  """Each variant's difference from the base; `bars` says what the bars are."""
  told = '; '.join(f'{row.point.name} {tables.difference(row.difference).text}'
                   for row in rows)

  def paint():
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(PAGE, 0.6 + 0.18 * len(rows)))
    _forest(axes, _sweep_bars(sweep, rows, words=False))
    axes.set_xlabel('held-out loss minus the base, nats per token')
    return figure

  return _drawn('forest', 'Differences',
                f'Left of the line is better. {bars}', told, paint)


def sweep_picture(sweep, rows) -> Any:
  """On the left the held-out loss by tokens, the mean over seeds; on the right
  each variant's difference from the base with its 95 % interval and verdict,
  the best at the top."""
  from matplotlib import pyplot
  rows = [row for row in rows if row.point is sweep.base or row.difference]
  rows.sort(key=lambda row: row.difference.mean if row.difference else 0.0)
  look = looks(sweep.base.name,
               [p.name for p in sweep.points if p is not sweep.base])
  base = tables.shortened([p.name for p in sweep.points])[sweep.base.name]
  with style('sweep'):
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(PAGE, 1.2 + 0.17 * max(len(rows), 8)))
    for row in rows:
      curve = row.point.mean_curve('eval')
      left.plot(curve.tokens, curve.loss, **look[row.point.name])
    left.set(xlabel='training tokens', ylabel='held-out loss, nats per token',
             title='loss curves, mean over seeds')
    _tokens(left)
    _forest(right, _sweep_bars(sweep, rows, words=True))
    right.set(xlabel=f'held-out loss minus that of {base}, nats',
              title='final difference with its 95 % interval')
    right.locator_params(axis='x', nbins=4)
    figure.canvas.draw()  # under this style, wherever it is written
  return figure


def _tokens(axes: Any) -> None:
  from matplotlib.ticker import EngFormatter
  axes.xaxis.set_major_formatter(EngFormatter(sep=''))
  axes.locator_params(axis='x', nbins=4)
  axes.grid(axis='y')


# A study: study_report.Study.


def of_study(study) -> Iterator[page.Figure]:
  """Yields every figure that the study has numbers for."""
  for make in (_effects, _curves, _noise, _scores):
    if found := make(study):
      yield found


def _looks(study) -> dict[str, dict[str, Any]]:
  return looks(study.plan.base, study.plan.variants)


def _labels(study) -> dict[str, str]:
  """The names of variants, sizes and measures as a figure has room for them."""
  plan = study.plan
  return {name: label for names in (
      study.variants, plan.sizes, [m.name for m in plan.measures])
          for name, label in tables.shortened(names).items()}


def _effects(study) -> page.Figure | None:
  """A forest plot: each variant's difference, over all sizes and at each."""
  plan, look, label = study.plan, _looks(study), _labels(study)
  rows = [row for v in plan.variants if (row := study.verdict(v)) and any(
      known(x) for x in (row['effect'], *(
          own['mean'] for own in row['sizes'])))]
  if not rows:
    return None
  rows.sort(key=lambda row: row['effect'] if known(row['effect']) else math.inf)
  told = '; '.join(f'{row["variant"]} ' + tables.estimate(
      row['effect'], row['low'], row['high']).text for row in rows)
  unit = study.unit(plan.primary, ', ')
  ends = lambda own: (own['low'], own['high']) if known(own['low']) else None

  def paint():
    from matplotlib import pyplot
    lines = len(rows) * (len(plan.sizes) + 1.6)
    figure, axes = pyplot.subplots(figsize=(COLUMN, 0.5 + 0.125 * lines))
    groups = []
    for row in rows:
      colour = look[row['variant']]['color']
      groups.append([Bar(label[row['variant']], row['effect'], ends(row),
                         colour, 'D')])
      groups[-1] += [Bar(label[own['size']], own['mean'], ends(own), colour,
                         MARKERS[i % len(MARKERS)], 0.8)
                     for i, own in enumerate(row['sizes'])]
    _forest(axes, groups)
    of = f'{label[plan.primary.name]} minus that of {label[plan.base]}'
    axes.set_xlabel(of + study.unit(plan.primary,
                                    ', ' if len(of) < 40 else ',\n'))
    return figure

  side = 'left' if plan.primary.better == plans.LOWER else 'right'
  return _drawn(
      'effects', 'Effects',
      f'{plan.primary.name} minus that of {plan.base}{unit}: over all sizes '
      '(diamonds) and at each size, with 95 % intervals over paired seeds; '
      f'{side} of the line is better.', f'Over all sizes: {told}', paint)


def _panels(study, names: Sequence[str], paint: Callable[[Any, str], None],
            label: Callable[[str], str]) -> Any:
  """A row of panels with one legend below; rows of at most four. `label` gives
  the y-axis of each, which is not said again beside its like."""
  from matplotlib import pyplot
  columns = min(len(names), 4)
  rows = math.ceil(len(names) / columns)
  width = PAGE if columns > 1 else COLUMN
  lines = math.ceil(len(study.variants) / (6 if columns > 1 else 3))
  figure, grid = pyplot.subplots(
      rows, columns, figsize=(width, 1.9 * rows + 0.15 * lines + 0.1),
      squeeze=False)
  handles: dict[str, Any] = {}
  for i, (axes, name) in enumerate(zip(grid.flat, names)):
    paint(axes, name)
    for handle, own in zip(*axes.get_legend_handles_labels()):
      handles.setdefault(own, handle)
    if i % columns == 0 or label(name) != label(names[i - 1]):
      axes.set_ylabel(label(name))
  for axes in grid.flat[len(names):]:
    axes.set_visible(False)
  if handles:
    figure.legend(list(handles.values()), list(handles),
                  loc='outside lower center',
                  ncols=math.ceil(len(handles) / lines),
                  handlelength=2.2, columnspacing=1.2)
  return figure


def _curves(study) -> page.Figure | None:
  """Held-out loss by tokens, a panel for each size."""
  look, label = _looks(study), _labels(study)
  found = {size: lines for size in study.plan.sizes
           if (lines := _lines(study, size))}
  if not found:
    return None
  ends = '; '.join(f'{size}: ' + ', '.join(
      f'{name} {spans[-1].mean:.4f}' for name, (_, spans) in lines.items())
                   for size, lines in found.items())
  unit = measures.unit_of_loss(study.frozen, plans.TEXT)

  def paint(axes, size):
    for name, (tokens, spans) in found[size].items():
      low, high = np.array([x.bar or (math.nan,) * 2 for x in spans]).T
      axes.fill_between(tokens, low, high, color=look[name]['color'],
                        alpha=0.18, linewidth=0)
      axes.plot(tokens, [x.mean for x in spans], label=label[name],
                **look[name])
    axes.set(xlabel='training tokens', title=label[size])
    _tokens(axes)

  return _drawn(
      'curves', 'Loss curves',
      'Held-out loss on text in the confirmation: the mean over the seeds that '
      f'ended, and its 95 % band. The first {percent(LEFT_OUT)} of training '
      'are left out.', f'Mean losses at the end: {ends}', lambda: _panels(
          study, list(found), paint,
          lambda size: 'held-out loss' + f', {unit}' * bool(unit)))


def _lines(study, size: str) -> dict[str, tuple]:
  """Returns (tokens, means over seeds) of each variant that has curves."""
  found = {}
  for variant in study.variants:
    runs = [dict(zip(run.curve['tokens'], run.curve['loss']))
            for run in study.runs('confirm', variant, size, plans.TEXT)
            if run.curve and run.curve['loss'] and not run.diverged
            and all(map(known, run.curve['loss']))]
    if runs:
      tokens = sorted(set.intersection(*map(set, runs)))
      tokens = [x for x in tokens if x >= LEFT_OUT * tokens[-1]]
      found[variant] = tokens, [
          statistics.interval([run[x] for run in runs]) for x in tokens]
  return found


def _noise(study) -> page.Figure | None:
  """The smallest effect that is found, of each measure at each size."""
  plan, label = study.plan, _labels(study)
  rows = [row for row in study.results['noise']
          if row['phase'] == 'confirm' and known(row['sd'])]
  names = [m.name for m in plan.measures
           if any(row['measure'] == m.name for row in rows)]
  if not rows:
    return None
  told = '; '.join(f'{row["measure"]} at {row["size"]} {row["sd"]:.4f}'
                   for row in rows)
  unit = {m.name: study.unit(m, ',\n') for m in plan.measures}

  def paint(axes, name):
    own = [row for row in rows if row['measure'] == name]
    for x, row in enumerate(own):
      if known(row['sd_low']) and known(row['sd_high']):
        axes.plot([x, x], [row['sd_low'], row['sd_high']], color=INK,
                  linewidth=0.8)
      axes.plot(x, row['sd'], 'o', color=INK, markersize=3, clip_on=False,
                zorder=3)  # whole on the axis too
      if known(row['smallest_effect']):
        axes.plot(x + 0.18, row['smallest_effect'], 'x', color='#d55e00',
                  markersize=4)
    most = max(x for row in own for x in (
        row['sd'], row['sd_high'], row['smallest_effect']) if known(x))
    if name == plan.primary.name and most and plan.effect > 2 * most:
      # A line there would squash all others. No line of the grid runs through
      # the words.
      axes.set_ylim(0, 1.25 * most)
      axes.set_yticks([y for y in axes.get_yticks() if y < 1.1 * most])
      axes.text(0.98, 0.98, f'wanted: {plan.effect:g} ↑', ha='right', va='top',
                transform=axes.transAxes)
    elif name == plan.primary.name:
      axes.axhline(plan.effect, color=SOFT, linewidth=0.8, linestyle=_DASHED)
    axes.set_xticks(range(len(own)), [
        'all' if row['size'] == decide.ALL else label[row['size']]
        for row in own])
    axes.set(title=label[name], xlim=(-0.5, len(own) - 0.3))
    axes.set_ylim(bottom=0)
    axes.grid(axis='y')

  return _drawn(
      'noise', 'Noise',
      'Base against base: the standard deviation of a paired difference with '
      'its 95 % interval (dots), and the smallest effect that '
      f'{plan.seeds.confirm} seeds find with a power of {percent(plan.power)} '
      f'(crosses). Wanted on {plan.primary.name} is an effect of '
      f'{study.wanted}: the dashed line, or an arrow where that lies far above '
      'all others.', f'Standard deviations: {told}', lambda: _panels(
          study, names, paint,
          lambda name: 'noise of a difference' + unit[name]))


def _scores(study) -> page.Figure | None:
  """The measures that are not the primary one, by size."""
  plan, look, label = study.plan, _looks(study), _labels(study)
  by_name = {m.name: m for m in plan.measures[1:] if any(
      study.values('confirm', v, s, m)
      for v in study.variants for s in plan.sizes)}
  if not by_name:
    return None
  told = '; '.join(f'{name}: ' + ', '.join(
      f'{v} {np.mean(own):.4f}' for v in study.variants
      if (own := study.values('confirm', v, plan.sizes[-1], measure)))
                   for name, measure in by_name.items())
  # Those of one size stand together, however many there are, and a little
  # apart, so that no interval hides another one.
  apart = min(0.06, 0.7 / len(study.variants))

  def paint(axes, name):
    for i, variant in enumerate(study.variants):
      spans = {x + apart * (i - len(study.variants) / 2):
               statistics.interval(own) for x, size in enumerate(plan.sizes)
               if (own := study.values('confirm', variant, size,
                                       by_name[name]))}
      for x, span in spans.items():
        if span.bar:
          axes.plot([x, x], span.bar, linewidth=0.8,
                    color=look[variant]['color'])
      if spans:
        axes.plot(list(spans), [span.mean for span in spans.values()],
                  marker='o', markersize=2.5, label=label[variant],
                  **look[variant])
    axes.axhline(by_name[name].chance, color=SOFT, linewidth=0.8,
                 linestyle=_DASHED, zorder=0)
    axes.set_xticks(range(len(plan.sizes)), [label[s] for s in plan.sizes])
    axes.set(title=label[name])
    axes.grid(axis='y')

  return _drawn(
      'measures', 'Probes and other measures',
      'Means over the seeds of the confirmation with their 95 % intervals; the '
      'dashed line is what guessing gives.',
      f'Means at {plan.sizes[-1]}: {told}',
      lambda: _panels(study, list(by_name), paint,
                      lambda name: 'score' + study.unit(by_name[name], ', ')))
