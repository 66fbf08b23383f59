"""report: writes W/report/ anew: a page, CSV and figures of a sweep or a study;
prints the main table.

Both are a Comparison (comparison.py), whose tables (tables.py) and plots
(plots.py) stand on one page. What a study has beside a sweep (noise, screening,
what was planned) has sections of its own. In all functions `c` is the
Comparison that is reported.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import sys
from typing import Any

from common.fields import check_number
from tools.compare import comparison, decide, figures, layout, page, plots
from tools.compare import measures as measures_lib
from tools.compare import phases as phases_lib
from tools.compare import plan as plans
from tools.compare import results as results_lib
from tools.compare import tables
from tools.compare.comparison import Comparison, changes_from_base
from tools.compare.comparison import first_row_with, format_changes
from tools.compare.page import UNKNOWN, Section
from training.workdir import metrics, storage

NOT_COOLED = ('Compute multipliers need runs whose learning rate has fallen to '
              'the end of its schedule by the last step: those of some had not.'
              )


def add_arguments(parser: argparse.ArgumentParser) -> None:
  layout.add_workdir_arguments(parser)
  parser.add_argument('--json', action='store_true', help='print JSON')
  parser.add_argument('--rows', default='', metavar='FILE.csv', help='of a '
                      'sweep: losses of variants that were trained elsewhere, '
                      'in columns variant, seed, loss and, maybe, step')
  parser.add_argument('--target', type=float, help='a held-out loss: what each '
                      'variant spends to reach it (default: TARGET of a study)')


def main(args) -> int:
  c = comparison.load_comparison(layout.parse_workdir(args), args.rows)
  if args.target is not None:
    check_number('--target', args.target, (('>', 0), ('<', 1e30)))
    c = dataclasses.replace(c, target=args.target)
  if args.json:
    print(json.dumps(as_json(c), indent=2))
    print(*write(c), sep='\n', file=sys.stderr)
  else:
    print(text(c))
    print(*write(c), sep='\n')
  return 0


def text(c: Comparison) -> str:
  """Returns the outcome for a terminal, with what to know of it."""
  shown = [tables.verdict_table(c), tables.target_table(c)]
  if not c.is_study:
    shown += [tables.costs(c), tables.other_table(c), tables.effects(c)]
  shown.append(tables.excluded(c))
  first, *others = [table for table in shown if table.rows]
  lines = [first.text()]
  lines += [f'- {line}' for line in c.warnings]
  lines += [f'\n{table.title}\n{table.text()}' for table in others]
  return '\n'.join(lines)


def as_json(c: Comparison) -> dict[str, Any]:
  """Returns what --json prints."""
  target = []
  for row in tables.target_table(c).rows:
    target.append({name: cell.value for name, cell in row.items()})
  return {'name': c.plan.name, 'file': c.plan.file, 'match': c.plan.match,
          'base': c.plan.base, 'answer': answer(c), 'warnings': c.warnings,
          'target': target, 'estimates': c.estimates,
          'points': metrics.as_json_value(c.frozen.points),
          'excluded': c.excluded}


# Files.


def write(c: Comparison) -> list[pathlib.Path]:
  """Writes the page, the estimates, the runs, the curves and the figures;
  returns their paths, the page's first."""
  folder = pathlib.Path(c.workdir) / 'report'
  storage.check_folder_is_writable(folder)
  drawn = figures.draw_figures(c)
  files: dict[str, Any] = {
      'index.html': html(c, drawn),
      'results.csv': page.sheet(c.estimates),
      'runs.csv': page.sheet(_run_rows(c)),
      'curves.csv': page.sheet(_curve_rows(c))}
  for figure in drawn:
    for kind, content in figure.files.items():
      files[f'{figure.name}.{kind}'] = content
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    storage.write_file(folder / name, content)
  return [folder / name for name in files]


def _run_rows(c: Comparison) -> list[dict[str, Any]]:
  """Returns a row for each measure of each run."""
  rows = []
  for run in c.outcomes:
    changes = json.dumps(run.changes, sort_keys=True)
    for measure, value in run.values.items():
      row = {}
      for name in ('phase', 'variant', 'size', 'workload', 'seed'):
        row[name] = getattr(run, name)
      row['measure'] = measure
      row['value'] = value
      for name in ('diverged', 'loss', 'flops', 'seconds', 'params'):
        row[name] = getattr(run, name)
      row['changes'] = changes
      rows.append(row)
  return rows


def _curve_rows(c: Comparison) -> list[dict[str, Any]]:
  """Returns a row for each point of each curve."""
  rows = []
  for (variant, size, seed), by_figure in c.curves.items():
    for figure, curve in by_figure.items():
      of_curve = {'variant': variant, 'size': size, 'seed': seed,
                  'figure': figure}
      for point in zip(*curve.values()):
        rows.append(of_curve | dict(zip(curve, point)))
  return rows


def html(c: Comparison, drawn: Sequence[page.Figure]) -> str:
  """Returns the page with the figures that were drawn."""
  sections = [
      Section(name='verdict', heading='Verdict',
              figures=_of_name(drawn, 'outcome'),
              tables=[tables.verdict_table(c), tables.costs(c)]),
      Section(name='curves', heading='Loss curves',
              tables=[tables.target_table(c)], plots=plots.curve_plots(c)),
      _others_section(c, drawn)]
  if not c.is_study:
    sections.append(Section(name='changes', heading='Each change',
                            tables=[tables.effects(c)]))

  # The phases before and after the one that the verdicts are of.
  sections += [
      Section(name='tuning', heading='Tuning', tables=[tables.tuning(c)],
              plots=[plots.tuning_plot(c)]),
      Section(name='noise', heading='Noise and power',
              paragraphs=_power(c.results), tables=[tables.noise(c)])]
  for phase in c.comparing_phases:
    if phase.name != 'confirm':
      sections.append(phase_section(c, phase))
  sections.append(prediction_section(c))

  # How it was done.
  sections.append(Section(name='left-out', heading='Left out',
                          tables=[tables.excluded(c)]))
  method = []
  if c.is_study:
    method = methods(c.frozen, c.results)
    sections.append(Section(name='planned', heading='Planned and run',
                            paragraphs=_as_planned(c)))
  sections += [
      Section(name='methods', heading='Methods', paragraphs=method,
              tables=[tables.config(c)]),
      Section(name='provenance', heading='Provenance and cost',
              tables=[tables.spent(c), tables.provenance(c)])]
  return page.html(sections, title=c.plan.name, about=c.about,
                   answer=answer(c), warnings=c.warnings)


def _of_name(drawn: Sequence[page.Figure], name: str) -> list[page.Figure]:
  """Returns the figure of a name, if it was drawn."""
  return [figure for figure in drawn if figure.name == name]


def _others_section(c: Comparison, drawn: Sequence[page.Figure]) -> Section:
  """Returns the sizes and measures that the verdicts are not of."""
  paragraphs = []
  if not _all_cooled(c):
    paragraphs.append(NOT_COOLED)
  return Section(
      name='others', heading='Sizes and measures', paragraphs=paragraphs,
      figures=_of_name(drawn, 'measures'),
      tables=[tables.other_table(c), tables.multipliers(c), tables.ranks(c)])


def _as_planned(c: Comparison) -> list[str]:
  """Returns in what the runs differ from the plan, in sentences."""
  differences = c.results['as_planned']['differences']
  if differences:
    return differences
  return [f'What ran is what was planned, by the plan {c.frozen.hash}.']


def _all_cooled(c: Comparison) -> bool:
  """Returns whether no run on text that was confirmed is known to end before
  its learning rate had fallen."""
  for run in c.outcomes:
    is_confirmed_text = run.phase == 'confirm' and run.workload == plans.TEXT
    if is_confirmed_text and run.cooled is False:
      return False
  return True


def _power(results: Mapping[str, Any]) -> list[str]:
  """Returns what was announced of the effects that a study can find."""
  if not results['announced']:
    return []
  sentences = [results['announced']['sentence'], results['advice']]
  return [sentence for sentence in sentences if sentence]


def phase_section(c: Comparison, phase: phases_lib.Phase) -> Section:
  """Returns what a phase found that the verdicts are not of."""
  sizes = phase.narrow_plan(c.plan).sizes
  title = f'At {", ".join(sizes)}'
  if sizes == c.plan.sizes[:1]:
    title = f'At the smallest size, {sizes[0]}'
  paragraphs = []
  if phase.name == 'screen':
    paragraphs = lost(c)
  rows = [row for row in c.estimates if row['phase'] == phase.name]
  table = tables.estimate_table(c, name=f'{phase.name}-table', title=title,
                                rows=rows)
  return Section(name=phase.name, heading=phase.name.capitalize(),
                 paragraphs=paragraphs, tables=[table])


def prediction_section(c: Comparison) -> Section:
  """Returns what was predicted for the largest size, and what was seen there.
  """
  table = tables.predictions(c)
  paragraphs = []
  if table.rows:
    record = c.results['predicted']
    when = 'when runs of this size had begun: it is none.'
    if record['blind']:
      when = 'before any run of this size began.'
    paragraphs.append(
        f'The prediction {record["hash"]} of {c.plan.largest} was recorded on '
        f'{plans.format_date(record["time"])}, {when}')
  return Section(name='predicted', heading='Predicted and seen',
                 paragraphs=paragraphs, tables=[table])


# Sentences.


def answer(c: Comparison) -> str:
  """Returns the answer, as far as there is one, in a sentence."""
  # The variants of each verdict, with their effects.
  groups: dict[str, list[str]] = {}
  for row in c.verdicts()[1:]:
    variant = row['variant']
    effect = page.estimate(row['effect'], row['low'], row['high']).text
    if effect != UNKNOWN:
      variant += f' ({effect}{_excluded_effect(c, row)})'
    groups.setdefault(row['verdict'], []).append(variant)

  unit = measures_lib.format_unit(c.frozen, c.plan.primary, ' (', ')')
  verdicts = []
  for verdict, variants in groups.items():
    verdicts.append(f'{verdict}: {", ".join(variants)}')
  return f'By {c.plan.primary.name}{unit}: {"; ".join(verdicts)}.'


def _excluded_effect(c: Comparison, row: Mapping[str, Any]) -> str:
  """Says of a variant of which no difference is shown that it cannot have one
  of EFFECT; '' where it can.

  Its interval lies within, and does so where it is as wide as makes the
  intervals of all confirmed variants hold at once (Bonferroni)."""
  if row['verdict'] != decide.NONE_SHOWN or not page.known(row['low']):
    return ''
  from scipy.stats import t
  measures = [other['measure'] for other in c.results['confirm']]
  family = measures.count(row['measure'])
  degrees = row['n'] - 1
  # How much wider an interval is that holds with all others at once.
  at_once = t.isf(c.plan.alpha / (2 * family), degrees)
  wider = max(at_once / t.isf(0.025, degrees), 1.0)
  half = max(row['high'] - row['effect'], row['effect'] - row['low'])
  if abs(row['effect']) + half * wider >= c.plan.effect:
    return ''
  return f': an effect of {c.plan.effect:g} is excluded'


def lost(c: Comparison) -> list[str]:
  """Says what the screening may have lost; [] where it stopped nothing, or its
  power is not known."""
  plan, rows = c.plan, c.results.get('screen', ())
  noise = first_row_with(c.results['noise'], phase='screen',
                         measure=plan.primary.name)
  stopped = [row for row in rows if row['verdict'] != decide.PASSED]
  if not stopped or not noise or not noise['power']:
    return []
  may_be_better = []
  for row in stopped:
    if not _is_excluded(plan, row):
      may_be_better.append(row['variant'])
  within = ', '.join(may_be_better) or 'none'
  return [f'{len(stopped)} of {len(rows)} variants were stopped. Of such as '
          f'improve {plan.primary.name} by {plan.effect:g} at this size, '
          f'{1 - noise["power"]:.0%} are stopped by the noise; so much is '
          f'within the interval of {within}. What '
          'only larger sizes show cannot be seen here.']


def _is_excluded(plan: plans.Plan, row: Mapping[str, Any]) -> bool:
  """Returns whether the interval of a row ends before EFFECT."""
  if row['low'] is None:
    return False
  sign = plan.primary.sign
  return max(sign * row['low'], sign * row['high']) < plan.effect


def methods(frozen: plans.FrozenPlan,
            results: Mapping[str, Any] = results_lib.NOTHING) -> list[str]:
  """Returns the paragraphs that a paper needs to say how a study was done, or
  will be: then there are no results yet. Nothing is said of a phase that had no
  runs."""
  plan, as_planned = frozen.plan, results['as_planned']

  def changes(row: Mapping[str, Any]) -> str:
    """Returns what a point of the base changes, for the template."""
    return _changes_of_size(frozen, row)

  # The phases that had runs, and the values that were tuned.
  phases = []
  for phase in phases_lib.phases_of_study(plan.seeds):
    phase_result = results['phases'].get(phase.name)
    is_empty = (phase_result and phase_result['finished']
                and not phase_result['done'])
    if not is_empty:
      phases.append(phase)
  grid = []
  for field, values in plan.tuning.fields.items():
    tried = ', '.join(map(comparison.format_config_value, values))
    grid.append(f'{field} in {{{tried}}}')

  # How much was seen before the confirmation, and what was done again.
  seen = [change['seen'].get('confirm', 0) for change in frozen.amendments]
  again = as_planned.get('repeated', {}).get('confirm', 0)
  rendered = page.render(
      'methods.txt',
      frozen=frozen, plan=plan, primary=plan.primary, phases=phases, grid=grid,
      announced=results['announced'],
      seen=max(seen, default=0), again=again,
      otherwise=as_planned['differences'],
      unknown=as_planned.get('unknown', 0),
      shows=decide.describe_detectable_difference(plan),
      amount=measures_lib.format_amount(frozen, plan.effect),
      # The functions that the template calls.
      date=plans.format_date, changed=format_changes, changes=changes,
      alone=changes_from_base,
      unit_text=measures_lib.format_unit)
  return [' '.join(part.split()) for part in rendered.split('\n---\n')]


def _changes_of_size(frozen: plans.FrozenPlan, row: Mapping[str, Any]) -> str:
  """Returns what a size and a workload change in the base; where most of it is
  as at the smallest size, the rest alone."""
  plan, fields = frozen.plan, row['changes']
  smallest = frozen.point(plan.base, plan.sizes[0], row['workload'])['changes']
  new = {}
  for name, x in fields.items():
    if name not in smallest or smallest[name] != x:
      new[name] = x
  is_like_it = smallest.keys() <= fields.keys()
  if not new or len(new) == len(fields) or not is_like_it:
    return format_changes(fields)
  return f'as at {plan.sizes[0]}, but {format_changes(new)}'
