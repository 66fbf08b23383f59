"""Writes report.html, report.csv and curves.csv, and the outcome for a terminal
or a program."""

import csv
from html import escape
import pathlib

import numpy as np

from tools.compare.sweep_report import extras
from tools.compare.sweep_report import measures
from tools.compare.sweep_report import page
from tools.compare.sweep_report import plots
from tools.compare.sweep_report import tables
from tools.compare.sweep_report.curves import AXES, SPLITS, Sweep

FILES = ('report.html', 'report.csv', 'curves.csv')
CURVES = (
    'Means over the seeds that are done. Seconds are of training steps on the '
    'machine that ran them, without compiling, evaluating and saving; where '
    "several runs trained as one program, each one's share.")


def write(sweep: Sweep, workdir) -> list[pathlib.Path]:
  """Writes report.html, report.csv (the outcome) and curves.csv (every loss);
  returns their paths."""
  rows = tables.outcomes(sweep)
  html, outcome, losses = (pathlib.Path(workdir) / name for name in FILES)
  html.write_text(_html(sweep, rows))
  _sheet(outcome, [_record(sweep, row) for row in rows])
  _sheet(losses, _losses(sweep))
  return [html, outcome, losses]


def _sheet(path: pathlib.Path, records: list[dict]) -> None:
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, list(records[0]))
    writer.writeheader()
    writer.writerows(records)


def _losses(sweep: Sweep) -> list[dict]:
  """A line for each loss of each run, also of what is not done; empty where a
  figure is not known. One empty line where no run has begun."""
  known = lambda x: x if np.isfinite(x) else None
  records = []
  for point in sweep.points:
    for seed in point.runs:
      for split in SPLITS:
        curve = point.curve(seed, split)
        records += [
            {'variant': point.name, 'seed': seed, 'split': split,
             'step': int(step)} | {
                 name: known(getattr(curve, name)[i])
                 for name in (*AXES, 'loss')}
            for i, step in enumerate(curve.step)]
  return records or [dict.fromkeys(
      ('variant', 'seed', 'split', 'step', *AXES, 'loss'))]


def text(sweep: Sweep) -> str:
  """Returns the outcome for a terminal, with its notes and what is missing."""
  table = tables.outcome_table(sweep, tables.outcomes(sweep))
  missing = tables.missing(sweep)
  lines = [table.text(), *(f'- {note}' for note in table.notes)]
  for more in (measures.lines(sweep), extras.effects_table(sweep)):
    if more.rows:
      lines += ['', more.text()]
  if missing.rows:
    lines += ['', f'failed or not done: {len(missing.rows)} runs',
              missing.text()]
  return '\n'.join(lines)


def figures(sweep: Sweep) -> dict:
  """Returns what `text` says, as JSON takes it."""
  rows = tables.outcomes(sweep)
  return {'sweep': sweep.name, 'file': sweep.file, 'match': sweep.match,
          'base': sweep.base.name,
          'points': [_record(sweep, row) for row in rows],
          'notes': list(tables.outcome_table(sweep, rows).notes),
          'effects': extras.effects_table(sweep).plain(),
          'missing': tables.missing(sweep).plain()}


def _record(sweep: Sweep, row: tables.Outcome) -> dict:
  """One line of the sheet: figures in full, empty where not known."""
  point, d, x = row.point, row.difference, row.speed_up
  seeds = sorted({seed for p in sweep.points for seed in p.runs})
  known = d is not None and d.known
  return {
      'variant': point.name,
      'changes': tables.changes(point),
      'loss': tables.mean_loss(point),
      'difference': d.mean if d else None,
      'low': d.low if known else None, 'high': d.high if known else None,
      'pairs': d.seeds if d else None,
      'p': row.p, 'p_holm': row.p_holm,
      'verdict': 'base' if point is sweep.base else tables.WORDS[row.verdict],
      'speed_up': x.mean if x else None,
      'speed_up_low': x.low if x else None,
      'speed_up_high': x.high if x else None,
      'fit_error': row.fit_error,
      'params': point.params, 'active_params': point.active_params,
      'flops_per_token': point.flops_per_token, 'tokens': point.tokens,
      'seeds_done': len(point.finals), 'seeds_asked': len(point.runs),
  } | {f'loss_seed_{seed}': point.finals.get(seed) for seed in seeds
       } | measures.record(sweep, point)


def _html(sweep: Sweep, rows) -> str:
  drawn, sections = [], []

  def section(heading: str, *parts: str) -> None:
    sections.append((heading, '\n'.join(parts)))

  def draw(plot: dict, caption: str) -> str:
    drawn.append(plot)
    return page.figure(plot['id'], caption)

  section('Beside the base',
          page.table('outcome', tables.outcome_table(sweep, rows)),
          _forest(sweep, rows))
  found = measures.table(sweep)
  if found.rows:
    section('What the tasks found', page.table('measures', found))
  effects = extras.effects_table(sweep)
  if effects.rows:
    section('Each change, whatever the others', page.table('effects', effects))
  curves = plots.losses(sweep)
  section('Loss curves', draw(curves, CURVES) if curves['series']
          else '<p>No run is done.</p>')
  groups = extras.rates(sweep)
  if groups:
    section('Sensitivity to the learning rate',
            page.table('rates-table', extras.rate_table(groups)),
            draw(plots.rates(sweep, groups), plots.bars(
                [len(p.finals) for g in groups for p in g.points.values()])))
  health = extras.health_table(sweep)
  if health.rows:
    section('Health of the routers', page.table('health-table', health),
            draw(plots.health(sweep), 'Means over layers and seeds.'))
  found = extras.extrapolation(sweep)
  if found:
    section('Past the training length',
            page.table('extrapolation-table',
                       extras.extrapolation_table(found)),
            draw(plots.extrapolation(sweep, found), 'At the longest text that '
                 'each encoding takes; means over seeds and over bins of '
                 'positions.'))
  missing = tables.missing(sweep)
  if missing.rows:
    section('Failed or not done', page.table('missing', missing))
  return page.page(sweep.name, _about(sweep), sections, drawn)


def _forest(sweep: Sweep, rows) -> str:
  seeds = [row.difference.seeds for row in rows if row.difference]
  if not seeds:
    return ''
  return ('<figure>' + plots.forest(rows, plots.looks(sweep))
          + '<figcaption>Left of the line is better. '
          f'{plots.bars(seeds, paired=True)}</figcaption></figure>')


def _about(sweep: Sweep) -> str:
  done = sum(run.state == 'done' for p in sweep.points
             for run in p.runs.values())
  asked = sum(len(p.runs) for p in sweep.points)
  matched = (f'{escape(sweep.match)} matched to the base\'s within 1 %'
             if sweep.match else 'sizes are not matched')
  paired = ('seed by seed, every point sees the same data in the same order'
            if sweep.paired else 'points differ in their data, so that seeds '
            'pair less than they do elsewhere')
  warning = '' if done == asked else (
      f'<p class="warn">{asked - done} of {asked} runs failed or are not '
      'done: they are listed at the end of this page.</p>')
  return (f'<p class="about"><code>{escape(sweep.file)}</code>: '
          f'{len(sweep.points)} points, {done} of {asked} runs done; base '
          f'<b>{escape(sweep.base.name)}</b>; {matched}; {paired}.</p>'
          + warning)
