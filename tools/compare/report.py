"""report: writes W/report/ anew: a page, CSV and figures of a sweep or a study;
prints the main table.

Both are a Comparison (comparison.py), whose tables (tables.py) and plots
(plots.py) stand on one page. What a study has beside a sweep (noise, screening,
what was planned) has sections of its own.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import sys
from typing import Any

from common.fields import check_number
from tools.compare import comparison as comparison_lib
from tools.compare import decide, figures, layout, page, plots
from tools.compare import measures as measures_lib
from tools.compare import phases as phases_lib
from tools.compare import plan as plans
from tools.compare import results as results_lib
from tools.compare import tables, tuning
from tools.compare.certificate import QUANTITIES
from tools.compare.comparison import Comparison, changes_from_base
from tools.compare.comparison import first_row_with, format_changes
from tools.compare.page import UNKNOWN, Section
from training.workdir import metrics, storage

# Said where a run ended before its learning rate had fallen.
NOT_COOLED = ('Compute multipliers need runs whose learning rate has fallen to '
              'the end of its schedule by the last step: those of some had not.'
              )


def add_arguments(parser: argparse.ArgumentParser) -> None:
  layout.add_workdir_arguments(parser)
  parser.add_argument('--json', action='store_true', help='print JSON')
  parser.add_argument('--rows', default='', metavar='FILE.csv', help='of a '
                      'sweep: losses of variants that were trained elsewhere, '
                      'in columns variant, seed, loss and, maybe, step, and '
                      f'what each was given, in {", ".join(QUANTITIES)}: a '
                      'number, words, or same as the base')
  parser.add_argument('--target', type=float, help='a held-out loss: what each '
                      'variant spends to reach it (default: TARGET of a study)')


def main(args) -> int:
  """Writes the report of a sweep or a study into its folder, and prints it as
  text or JSON. Returns the exit code, 0.

  Args:
    args: the arguments of the command `report`.

  Raises:
    RequestError: where no sweep or study was run, or --target is out of range.
  """
  comparison = comparison_lib.load_comparison(layout.parse_workdir(args),
                                              args.rows)
  if args.target is not None:
    check_number('--target', args.target, (('>', 0), ('<', 1e30)))
    comparison = dataclasses.replace(comparison, target=args.target)
  if args.json:
    # Standard output has the JSON alone, for programs that read it.
    print(json.dumps(report_as_json(comparison), indent=2))
    print(*write_report(comparison), sep='\n', file=sys.stderr)
  else:
    print(format_report(comparison))
    print(*write_report(comparison), sep='\n')
  return 0


def format_report(comparison: Comparison) -> str:
  """Returns the report for a terminal: the table of verdicts, the warnings, and
  the further tables that have a row.

  Args:
    comparison: the sweep or study.
  """
  shown = [tables.verdict_table(comparison), tables.target_table(comparison)]
  if not comparison.is_study:
    shown += [tables.cost_table(comparison), tables.other_table(comparison),
              tables.change_table(comparison)]
  shown.append(tables.excluded_table(comparison))
  # The first is the table of verdicts, which always has the row of the base.
  verdict_table, *further_tables = [table for table in shown if table.rows]
  lines = [verdict_table.text()]
  lines += [f'- {warning}' for warning in comparison.warnings]
  lines += [f'\n{table.title}\n{table.text()}' for table in further_tables]
  return '\n'.join(lines)


def report_as_json(comparison: Comparison) -> dict[str, Any]:
  """Returns the figures that --json prints: the estimates, what each variant
  changes, costs and was given, and the runs that are left out.

  Args:
    comparison: the sweep or study.
  """
  # The values of the cells, and not their texts, which are rounded.
  target = []
  for row in tables.target_table(comparison).rows:
    target.append({heading: cell.value for heading, cell in row.items()})
  return {'name': comparison.plan.name, 'file': comparison.plan.file,
          'match': comparison.plan.match,
          'base': comparison.plan.base,
          'answer': answer_in_a_sentence(comparison),
          'warnings': comparison.warnings,
          'target': target, 'estimates': comparison.estimates,
          'points': metrics.as_json_value(comparison.frozen.points),
          'certificates': comparison.certificates,
          'excluded': comparison.excluded}


# Files.


def write_report(comparison: Comparison) -> list[pathlib.Path]:
  """Writes the report into the folder `report` of a sweep or a study: the page,
  the estimates, runs and curves as CSV, and the figures.

  Args:
    comparison: the sweep or study.

  Returns:
    The paths of the files, that of the page first.
  """
  # Make all contents before anything is written, so that an error leaves the
  # last report whole.
  folder = pathlib.Path(comparison.workdir) / 'report'
  storage.check_folder_is_writable(folder)
  drawn = figures.draw_figures(comparison)
  files: dict[str, Any] = {
      'index.html': render_page(comparison, drawn),
      'results.csv': page.sheet(comparison.estimates),
      'runs.csv': page.sheet(_rows_of_runs(comparison)),
      'curves.csv': page.sheet(_rows_of_curves(comparison))}
  for figure in drawn:
    for kind, content in figure.files.items():
      files[f'{figure.name}.{kind}'] = content
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    storage.write_file(folder / name, content)
  return [folder / name for name in files]


def _rows_of_runs(comparison: Comparison) -> list[dict[str, Any]]:
  """Returns the rows of runs.csv, one for each measure of each run.

  Args:
    comparison: the sweep or study.
  """
  # The columns are in the order in which they are added here.
  rows = []
  for run in comparison.outcomes:
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


def _rows_of_curves(comparison: Comparison) -> list[dict[str, Any]]:
  """Returns the rows of curves.csv, one for each point of each curve."""
  rows = []
  for (variant, size, seed), by_figure in comparison.curves.items():
    for figure, curve in by_figure.items():
      of_curve = {'variant': variant, 'size': size, 'seed': seed,
                  'figure': figure}
      for point in zip(*curve.values()):
        rows.append(of_curve | dict(zip(curve, point)))
  return rows


def render_page(comparison: Comparison, drawn: Sequence[page.Figure]) -> str:
  """Returns the HTML page of a report.

  Args:
    comparison: the sweep or study.
    drawn: the figures of figures.draw_figures.
  """
  sections = [
      Section(name='verdict', heading='Verdict',
              figures=_figures_with_name(drawn, 'outcome'),
              tables=[tables.verdict_table(comparison),
                      tables.cost_table(comparison)]),
      Section(name='curves', heading='Loss curves',
              tables=[tables.target_table(comparison)],
              plots=plots.curve_plots(comparison)),
      _section_of_other_estimates(comparison, drawn)]
  if not comparison.is_study:
    sections.append(Section(name='changes', heading='Each change',
                            tables=[tables.change_table(comparison)]))

  # The phases before and after the one that the verdicts are of.
  sections += [
      Section(name='tuning', heading='Tuning',
              tables=[tables.tuning_table(comparison)],
              plots=[plots.tuning_plot(comparison)]),
      Section(name='noise', heading='Noise and power',
              paragraphs=_say_power_of_study(comparison.results),
              tables=[tables.noise_table(comparison)])]
  for phase in comparison.comparing_phases:
    if phase.name != 'confirm':
      sections.append(section_of_phase(comparison, phase))
  sections.append(section_of_prediction(comparison))

  # How it was done.
  sections.append(Section(name='left-out', heading='Left out',
                          tables=[tables.excluded_table(comparison)]))
  method = []
  if comparison.is_study:
    method = describe_methods(comparison.frozen, comparison.results)
    sections.append(Section(name='planned', heading='Planned and run',
                            paragraphs=_say_what_was_not_planned(comparison)))
  sections += [
      Section(name='methods', heading='Methods', paragraphs=method,
              tables=[tables.config_table(comparison)]),
      Section(name='provenance', heading='Provenance and cost',
              tables=[tables.certificate_table(comparison),
                      tables.spent_table(comparison),
                      tables.provenance_table(comparison)])]
  return page.html(sections, title=comparison.plan.name, about=comparison.about,
                   answer=answer_in_a_sentence(comparison),
                   warnings=comparison.warnings)


def _figures_with_name(drawn: Sequence[page.Figure],
                       name: str) -> list[page.Figure]:
  """Returns the drawn figures that have a name: one, or none."""
  return [figure for figure in drawn if figure.name == name]


def _section_of_other_estimates(comparison: Comparison,
                                drawn: Sequence[page.Figure]) -> Section:
  """Returns the section of the report with the estimates that no verdict is
  about: those at each size of the model, and those of further measures.

  Args:
    comparison: the sweep or study.
    drawn: the figures that were drawn for the report.
  """
  paragraphs = []
  if not _have_all_runs_cooled(comparison):
    paragraphs.append(NOT_COOLED)
  return Section(
      name='others', heading='Sizes and measures', paragraphs=paragraphs,
      figures=_figures_with_name(drawn, 'measures'),
      tables=[tables.other_table(comparison), tables.multiplier_table(
          comparison), tables.rank_table(comparison)])


def _say_what_was_not_planned(comparison: Comparison) -> list[str]:
  """Returns sentences that say how the runs differ from the frozen plan."""
  differences = comparison.results['as_planned']['differences']
  if differences:
    return differences
  return ['What ran is what was planned, by the plan '
          f'{comparison.frozen.hash}.']


def _have_all_runs_cooled(comparison: Comparison) -> bool:
  """Returns whether the learning rate of all confirmed runs on text fell to the
  end of its schedule; a run of which this is not known counts as one."""
  for run in comparison.outcomes:
    is_confirmed_text = run.phase == 'confirm' and run.workload == plans.TEXT
    if is_confirmed_text and run.cooled is False:
      return False
  return True


def _say_power_of_study(results: Mapping[str, Any]) -> list[str]:
  """Returns the sentences on the effects that a study can find, and on how to
  find smaller ones; [] before the noise was measured."""
  if not results['announced']:
    return []
  sentences = [results['announced']['sentence'], results['advice']]
  return [sentence for sentence in sentences if sentence]


def section_of_phase(comparison: Comparison,
                     phase: phases_lib.Phase) -> Section:
  """Returns the section of the report about a phase of a study that gives no
  final verdict, such as the screening: a table of what it found.

  Args:
    comparison: the study.
    phase: the phase.
  """
  sizes = phase.narrow_plan(comparison.plan).sizes
  title = f'At {", ".join(sizes)}'
  if sizes == comparison.plan.sizes[:1]:
    title = f'At the smallest size, {sizes[0]}'
  paragraphs = []
  if phase.name == 'screen':
    paragraphs = say_what_screening_may_lose(comparison)
  rows = [row for row in comparison.estimates if row['phase'] == phase.name]
  table = tables.estimate_table(
      comparison, name=f'{phase.name}-table', title=title, rows=rows)
  return Section(name=phase.name, heading=phase.name.capitalize(),
                 paragraphs=paragraphs, tables=[table])


def section_of_prediction(comparison: Comparison) -> Section:
  """Returns the section of the report that compares what was predicted for the
  largest size of the model with what was observed there.

  Args:
    comparison: the study.
  """
  table = tables.prediction_table(comparison)
  paragraphs = []
  if table.rows:
    record = comparison.results['predicted']
    when = 'when runs of this size had begun: it is none.'
    if record['blind']:
      when = 'before any run of this size began.'
    paragraphs.append(
        f'The prediction {record["hash"]} of {comparison.plan.largest} was '
        f'recorded on {plans.format_date(record["time"])}, {when}')
  return Section(name='predicted', heading='Predicted and seen',
                 paragraphs=paragraphs, tables=[table])


# Sentences.


def answer_in_a_sentence(comparison: Comparison) -> str:
  """Returns one sentence that names the variants of each verdict, with their
  differences from the base in the primary measure.

  Args:
    comparison: the sweep or study.
  """
  # Group the variants by verdict. The first row is the base.
  groups: dict[str, list[str]] = {}
  for row in comparison.verdicts()[1:]:
    variant = row['variant']
    effect = page.effect(row).text
    if effect != UNKNOWN:
      variant += f' ({effect}{_say_excluded_effect(comparison, row)})'
    groups.setdefault(row['verdict'], []).append(variant)

  unit = measures_lib.format_unit(comparison.frozen,
                                  measure=comparison.plan.primary, before=' (',
                                  after=')')
  verdicts = []
  for verdict, variants in groups.items():
    verdicts.append(f'{verdict}: {", ".join(variants)}')
  return f'By {comparison.plan.primary.name}{unit}: {"; ".join(verdicts)}.'


def _say_excluded_effect(comparison: Comparison, row: Mapping[str, Any]) -> str:
  """Returns words that say that a variant without a shown difference has no
  effect as large as the study looks for (EFFECT), or '' if that is not known.

  It is known if an effect of that size lies outside of the interval that holds
  for all confirmed variants at once (Bonferroni): Student's interval at the
  level alpha / m, where m is the number of confirmed variants. The 95 %
  interval of the row is widened to it by the quotient of the quantiles
    t(1 - alpha / (2 m), n - 1) / t(0.975, n - 1),
  where n is the number of pairs.

  Args:
    comparison: the study.
    row: the estimate of the variant, as Comparison.estimates has it.
  """
  if row['verdict'] != decide.NONE_SHOWN or not page.known(row['low']):
    return ''
  from scipy.stats import t
  # Each confirmed variant has one row of this measure.
  measures = [verdict['measure'] for verdict in comparison.results['confirm']]
  num_variants = measures.count(row['measure'])
  df = row['n'] - 1
  quantile = t.isf(comparison.plan.alpha / (2 * num_variants), df)
  # A large alpha must not make the interval narrower than that of the row. Its
  # wider side counts, since it may reach further to one side.
  factor = max(quantile / t.isf(0.025, df), 1.0)
  half_width = max(row['high'] - row['effect'], row['effect'] - row['low'])
  if abs(row['effect']) + half_width * factor >= comparison.plan.effect:
    return ''
  return f': an effect of {comparison.plan.effect:g} is excluded'


def say_what_screening_may_lose(comparison: Comparison) -> list[str]:
  """Returns a paragraph about the good variants that the screening of a study
  may have stopped because of noise, as a list of one text. It is [] if none was
  stopped, or the power of the screening is not known.

  Args:
    comparison: the study.
  """
  plan = comparison.plan
  rows = comparison.results.get('screen', ())
  noise = first_row_with(comparison.results['noise'], phase='screen',
                         measure=plan.primary.name)
  stopped = [row for row in rows if row['verdict'] != decide.PASSED]
  if not stopped or not noise or not noise['power']:
    return []
  may_be_better = []
  for row in stopped:
    if not _is_effect_excluded(plan, row):
      may_be_better.append(row['variant'])
  within = ', '.join(may_be_better) or 'none'
  return [f'{len(stopped)} of {len(rows)} variants were stopped. Of such as '
          f'improve {plan.primary.name} by {plan.effect:g} at this size, '
          f'{1 - noise["power"]:.0%} are stopped by the noise; so much is '
          f'within the interval of {within}. What '
          'only larger sizes show cannot be seen here.']


def _is_effect_excluded(plan: plans.Plan, row: Mapping[str, Any]) -> bool:
  """Returns whether the interval of an effect lies below the improvement that
  the study looks for (EFFECT)."""
  if row['low'] is None:
    return False
  sign = plan.primary.sign
  return max(sign * row['low'], sign * row['high']) < plan.effect


def describe_methods(frozen: plans.FrozenPlan,
                     results: Mapping[str, Any] = results_lib.NOTHING
                     ) -> list[str]:
  """Returns the paragraphs of a methods section, which say how a study was
  done, or will be done. Once a phase has ended, nothing is said of those that
  have not, or that had no runs.

  Args:
    frozen: the plan of the study.
    results: what it found, as results.json has it; by default nothing yet.
  """
  plan, as_planned = frozen.plan, results['as_planned']

  def changes(row: Mapping[str, Any]) -> str:
    """Returns what a point of the base changes, for the template."""
    return _format_changes_of_size(frozen, row)

  # The phases that are told of, and the values that were tuned.
  phases = phases_lib.phases_of_study(plan.seeds)
  phases_with_runs = [
      phase for phase in phases if _has_run(results, phase.name)]
  not_ended = []
  if phases_with_runs:
    not_ended = [phase.name for phase in phases
                 if phase not in phases_with_runs]
    phases = phases_with_runs
  grid = []
  for field, values in plan.tuning.fields.items():
    tried = ', '.join(map(comparison_lib.format_config_value, values))
    grid.append(f'{field} in {{{tried}}}')

  # How much was seen before the confirmation, and what was done again.
  seen = [change['seen'].get('confirm', 0) for change in frozen.amendments]
  again = as_planned.get('repeated', {}).get('confirm', 0)
  rendered = page.render(
      'methods.txt',
      frozen=frozen, plan=plan, primary=plan.primary, phases=phases,
      names=[phase.name for phase in phases], not_ended=not_ended, grid=grid,
      announced=results['announced'], statistics=results['statistics'],
      seen=max(seen, default=0), again=again,
      otherwise=as_planned['differences'],
      unknown=as_planned.get('unknown', 0),
      shows=decide.describe_detectable_difference(plan),
      few_seeds_of_tuning=tuning.describe_few_seeds(plan),
      level_of_check=tuning.LEVEL_OF_CHECK,
      found_by_check=tuning.describe_check(plan, results['tuned']),
      amount=measures_lib.format_amount(frozen, plan.effect),
      # The functions that the template calls.
      date=plans.format_date, changed=format_changes, changes=changes,
      alone=changes_from_base,
      unit_text=measures_lib.format_unit)
  return [' '.join(part.split()) for part in rendered.split('\n---\n')]


def _has_run(results: Mapping[str, Any], phase: str) -> bool:
  """Returns whether a phase has ended, and had any runs."""
  return results['phases'].get(phase, {}).get('done', 0) > 0


def _format_changes_of_size(frozen: plans.FrozenPlan,
                            row: Mapping[str, Any]) -> str:
  """Returns the fields that a size of the model and a workload (the text, or a
  probe) set, as 'field=value, ...'. If they include all fields of the smallest
  size, only the different ones are listed: 'as at SMALLEST, but ...'.

  Args:
    frozen: the plan of the study.
    row: a point of the base, as FrozenPlan.points has it.
  """
  plan = frozen.plan
  changes = row['changes']
  smallest = frozen.point(plan.base, plan.sizes[0], row['workload'])['changes']
  differing = {}
  for field, value in changes.items():
    if field not in smallest or smallest[field] != value:
      differing[field] = value

  # List all fields if 'as at SMALLEST' would be wrong, since this size lacks a
  # field of it, or would save nothing, since none or all of the fields differ.
  has_all_of_smallest = smallest.keys() <= changes.keys()
  all_differ = len(differing) == len(changes)
  if not differing or all_differ or not has_all_of_smallest:
    return format_changes(changes)
  return f'as at {plan.sizes[0]}, but {format_changes(differing)}'
