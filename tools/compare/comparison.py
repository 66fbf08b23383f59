"""Comparison: what a sweep or a study planned and found, as reports read it.

A sweep is a study of one size that has no phase but the confirmation: both are
one table of runs and one of estimates.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import numpy as np

from common.errors import require
from tools.compare import certificate as certificates_lib
from tools.compare import curves, decide, efficiency, foreign, layout, page
from tools.compare import phases as phases_lib
from tools.compare import plan as plans
from tools.compare import recompute
from tools.compare import results as results_lib
from tools.compare import statistics, tuning
from training import evals, progress

LEARNING_RATE_FIELD = 'optim.lr'
# The entries of the column of verdicts for the base, and for a variant that no
# phase has compared yet.
BASE, NOT_DONE_YET = 'base', 'not done yet'
# The figures that an estimate takes from the comparison of a phase.
_FIGURES_OF_COMPARISON = (
    'effect', 'low', 'high', 'n', 'p', 'p_corrected', 'p_robust',
    'p_equivalent', 'p_not_worse', 'diverged', 'base_diverged', 'item_noise',
    'tuning_noise')


def first_row_with(rows: Sequence[Mapping[str, Any]], **wanted: Any
                   ) -> Mapping[str, Any]:
  """Returns the first row that has the wanted values of some columns; {} where
  none has them."""
  for row in rows:
    if all(row[column] == value for column, value in wanted.items()):
      return row
  return {}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The plan and the results of a sweep or a study.

  Attributes:
    workdir: the folder of the sweep or study.
    frozen: what study.json holds; for a sweep, the same in its place.
    results: what results.json holds; for a sweep, the same in its place.
    outcomes: the runs that have a figure, and those that diverged.
    curves: by (variant, size, seed), the figures that the run has, by name
      (curves.FIGURES).
    excluded: the runs that failed, diverged or are not done, as rows of
      {'phase', 'variant', 'size', 'workload', 'seed', 'state', 'why'}.
    about: paragraphs that say what was compared.
    warnings: what a reader must know before the figures.
    certificates: what the runs of the base and of each variant were given, by
      name; of a study by the name of the size, too, in the phases that gave
      the verdict.
    differences: in what each variant differs from the base beyond the question,
      by name; the base's is empty.
    target: the held-out loss that is to be reached; None: none is.
  """
  workdir: str
  frozen: plans.FrozenPlan
  results: Mapping[str, Any]
  outcomes: Sequence[plans.Outcome]
  curves: Mapping[tuple[str, str, int], Mapping[str, Mapping]]
  excluded: Sequence[Mapping[str, Any]]
  about: Sequence[str]
  warnings: Sequence[str]
  certificates: Mapping[str, Mapping[str, Any]]
  differences: Mapping[str, certificates_lib.Differences]
  target: float | None = None

  @property
  def plan(self) -> plans.Plan:
    """The plan of the study, or that in its place for a sweep."""
    return self.frozen.plan

  @property
  def is_study(self) -> bool:
    """Whether it is a study; a sweep has one size."""
    return len(self.plan.sizes) > 1

  @property
  def variants(self) -> tuple[str, ...]:
    """The base, and then the variants."""
    return (self.plan.base, *self.plan.variants)

  @property
  def comparing_phases(self) -> list[phases_lib.Phase]:
    """The phases that compare variants with the base, in order."""
    other_phases = phases_lib.Noise | phases_lib.Tune
    return [phase for phase in phases_lib.phases_of_study(self.plan.seeds)
            if not isinstance(phase, other_phases)]

  def values(self, phase: str, variant: str, size: str,
             measure: plans.Measure) -> dict[int, float]:
    """Returns the values of a measure, such as the held-out loss, that the runs
    of a variant have, {seed: value}.

    Args:
      phase: the name of the phase of the study, such as 'confirm'.
      variant: the name of the variant.
      size: the name of the size of the model.
      measure: the measure. It also says on which workload (the text, or a
        probe) the runs are trained.
    """
    wanted = phase, variant, size, measure.workload
    value_by_seed = {}
    for run in self.outcomes:
      value = run.values.get(measure.name)
      is_wanted = (run.phase, run.variant, run.size, run.workload) == wanted
      # An unknown value is None, and one that is not finite may be NaN.
      if is_wanted and page.known(value):
        value_by_seed[run.seed] = value
    return value_by_seed

  def effect(self, phase: str, variant: str, measure: str, size: str = ''
             ) -> Mapping[str, Any]:
    """Returns the difference of a variant from the base, with its interval and
    p-value, as a phase of the study found it.

    Args:
      phase: the name of the phase, such as 'confirm'.
      variant: the name of the variant.
      measure: the name of the measure.
      size: the name of one size of the model; '' or decide.ALL_SIZES stands for
        all of them together.

    Returns:
      A dict with the fields of decide.Verdict, or of decide.Effect at one of
      several sizes; {} if the phase has not compared the variant.
    """
    rows = self.results.get(phase, ())
    row = first_row_with(rows, variant=variant, measure=measure)
    # A row has the effect over all sizes, and that at each size in 'sizes'.
    # With a single size, both are the same.
    if not row or size in ('', decide.ALL_SIZES) or len(row['sizes']) == 1:
      return row
    return first_row_with(row['sizes'], size=size)

  def verdict_or_stage(self, variant: str) -> str:
    """Returns the verdict on a variant, or the words that say how far it came
    in the study, for the column of verdicts in a report.

    A study compares variants in phases: first a screening drops hopeless ones,
    then the confirmation decides. The verdict is that of the last phase which
    compared the variant. A screening that lets it pass gives no verdict.

    Args:
      variant: the name of the variant.
    """
    if variant == self.plan.base:
      return BASE
    # Phases after the confirmation only estimate, and give no verdict.
    names = [phase.name for phase in self.comparing_phases]
    until_confirmation = names[:names.index('confirm') + 1]
    for name in reversed(until_confirmation):
      row = self.effect(name, variant, self.plan.primary.name)
      if not row:
        continue
      if row['verdict'] == decide.PASSED:
        return NOT_DONE_YET
      return row['verdict']
    return NOT_DONE_YET

  @functools.cached_property
  def estimates(self) -> list[dict[str, Any]]:
    """The table of all estimates: for each phase of the study, measure, size of
    the model and variant, the mean and its difference from the base.

    The rows of the confirmation come first, because its verdict is that of the
    study. Within a phase, the rows are in the order of the measures, and for
    each measure all sizes together come first, then the sizes from the largest
    to the smallest.
    """
    # Put the confirmation first: False sorts before True, and the order of the
    # others stays.
    verdict_first = sorted(self.comparing_phases,
                           key=lambda phase: phase.name != 'confirm')
    rows = []
    for phase in verdict_first:
      # A phase that has not run is left out. The rows of the confirmation are
      # there even so, to show what is missing.
      if phase.name != 'confirm' and phase.name not in self.results:
        continue
      plan = phase.narrow_plan(self.plan)

      # A phase may have fewer sizes and measures than the study.
      sizes = [*reversed(plan.sizes)]
      if len(sizes) > 1:
        sizes.insert(0, decide.ALL_SIZES)
      for measure in plan.measures:
        for size in sizes:
          # The verdict of a phase is on its primary measure over all its sizes.
          is_verdict = measure == plan.primary and size == sizes[0]
          for variant in self.variants:
            rows.append(self._estimate(
                phase=phase.name, measure=measure, size=size, variant=variant,
                is_verdict=is_verdict))
    return rows

  def _estimate(self, phase: str, measure: plans.Measure, size: str,
                variant: str, is_verdict: bool) -> dict[str, Any]:
    """Returns one row of `estimates`, a dict of figures by name, with None for
    what is not known.

    Args:
      phase: the name of the phase.
      measure: the measure.
      size: the name of the size, or decide.ALL_SIZES.
      variant: the name of the variant.
      is_verdict: whether the verdict of the phase is on this row.
    """
    values = list(self.values(phase, variant=variant, size=size,
                              measure=measure).values())
    compared = self.effect(phase, variant=variant, measure=measure.name,
                           size=size)

    # The variant alone.
    row: dict[str, Any] = {
        'phase': phase, 'measure': measure.name, 'variant': variant,
        'size': size, 'mean': None, 'sd': None, 'runs': len(values)}
    if values:
      row['mean'] = float(np.mean(values))
    if len(values) > 1:
      row['sd'] = float(np.std(values, ddof=1))

    # Its difference from the base over seeds, and with the prefix both_ over
    # seeds and items (documents or questions).
    for figure in _FIGURES_OF_COMPARISON:
      row[figure] = compared.get(figure)
    over_seeds_and_items = compared.get('both') or {}
    for figure in ('effect', 'low', 'high', 'p'):
      row[f'both_{figure}'] = over_seeds_and_items.get(figure)
    row['tuned'] = self._format_tuned_values(variant, size, measure.workload)
    # In the confirmation, a variant that was stopped earlier shows where.
    row['verdict'] = None
    if is_verdict and phase == 'confirm':
      row['verdict'] = self.verdict_or_stage(variant)
    elif is_verdict:
      row['verdict'] = compared.get('verdict')

    # In what the variant differs from the base beyond what it is to show.
    row['not_alike'] = None
    if is_verdict and variant in self.differences:
      row['not_alike'] = self.differences[variant].titles

    # How the difference changes with the size, and which factor of compute or
    # time it saves. Speed-ups are kept in the row over all sizes, whichever
    # size this row is of.
    trend_over_sizes = compared.get('trend') or {}
    for figure in ('effect', 'low', 'high'):
      row[f'trend_{figure}'] = trend_over_sizes.get(figure)
    speed_ups = self.effect(phase, variant, measure.name).get('speed_ups', ())
    for by in efficiency.WAYS_TO_COUNT_SPENDING:
      speed_up = first_row_with(speed_ups, size=size, by=by)
      row[f'speed_up_{by}'] = speed_up.get('factor')
      for figure in ('low', 'high', 'fit_error'):
        row[f'speed_up_{by}_{figure}'] = speed_up.get(figure)
    return row

  def _format_tuned_values(self, variant: str, size: str, workload: str) -> str:
    """Returns the values that tuning chose for a variant at a size, or at each
    of all sizes, as 'SIZE: FIELD=VALUE; ...'; '' where nothing was tuned."""
    values = []
    for row in self.results['tuned']:
      is_of_variant = (row['variant'], row['workload']) == (variant, workload)
      if is_of_variant and size in (row['size'], decide.ALL_SIZES):
        values.append(f'{row["size"]}: {format_changes(row["changes"])}')
    return '; '.join(values)

  def verdicts(self) -> list[dict[str, Any]]:
    """Returns the estimates that the verdicts are on, the base's first."""
    return self.estimates[:len(self.variants)]

  def print_milestones(self) -> None:
    """Prints the verdict on each variant with its difference from the base, and
    in what the two are not alike, where nothing but milestones is printed."""
    for row in self.verdicts()[1:]:
      line = f'{row["variant"]}: {row["verdict"]}'
      if row['effect'] is not None:
        p_value = page.p_value(row['p_corrected']).text
        line += (f', {row["measure"]} {page.effect(row).text}, corrected p '
                 f'{p_value}')
      if row['not_alike']:
        line += f'; not alike in {row["not_alike"]}'
      progress.print_milestone(line)


def load_comparison(workdir, rows: str = '') -> Comparison:
  """Returns the plan and the results of a sweep or a study, from the files in
  its folder alone.

  Args:
    workdir: the folder of a sweep or a study.
    rows: the path of a CSV of further variants of a sweep, trained elsewhere
      (add_variants_of_csv); '': none.

  Raises:
    RequestError: where no sweep or study was run there, a file is damaged, or
      `rows` is given for a study.
  """
  if not layout.is_study(workdir):
    return _comparison_of_sweep(workdir, rows)
  require(not rows, f'--rows is of a sweep, and {workdir} holds '
          'a study, whose plan was written down before it ran')
  return _comparison_of_study(workdir)


def format_config_value(value: Any) -> str:
  """Returns a config's value as a flag would have it: a text as it is, and all
  else as JSON."""
  is_text = isinstance(value, str) and value != ''
  return value if is_text else json.dumps(value)


def format_changes(changes: Mapping[str, Any]) -> str:
  """Returns changes of a config as 'field=value, field=value'."""
  return ', '.join(f'{field}={format_config_value(value)}'
                   for field, value in changes.items())


def changes_from_base(frozen: plans.FrozenPlan, row: Mapping[str, Any]
                      ) -> dict[str, Any]:
  """Returns the fields of the config in which a variant differs from the base
  of the same size and workload.

  Args:
    frozen: the plan of the study.
    row: a row of the variant, with 'size', 'workload' and 'changes'.

  Returns:
    The value of the variant by the dotted name of the field.
  """
  # The changes of a point are from the config of the study's file, and include
  # those of its size. What variant and base both change is left out.
  base_point = frozen.point(frozen.plan.base, row['size'], row['workload'])
  base_changes = base_point['changes']
  differing = {}
  for field, value in row['changes'].items():
    if field not in base_changes or base_changes[field] != value:
      differing[field] = value
  return differing


# A study.


def _comparison_of_study(workdir) -> Comparison:
  """Reads the comparison of a study: the plan of study.json, and the results,
  which are computed again from the runs.

  Args:
    workdir: the folder of the study.

  Raises:
    RequestError: if results.json is of another plan, or the figures of a run
      have changed since it ended.
  """
  frozen = plans.load_frozen_plan(workdir)

  # The plan may have been amended since the results were written. A study
  # without results can be shown too.
  study = results_lib.load(workdir)['study']
  require(not study or study['hash'] == frozen.hash,
          f'{workdir}/{results_lib.FILE} is of another plan than study.json, '
          'whose study has to be run before it is reported')
  results = recompute.recompute_results(workdir, frozen)
  return compare_study(workdir, frozen, results)


def compare_study(workdir, frozen: plans.FrozenPlan,
                  results: Mapping[str, Any]) -> Comparison:
  """Puts a study's plan and results together into what its report shows.

  Args:
    workdir: the folder of the study.
    frozen: its plan.
    results: its results, in the form of results.json.
  """
  # Collect the runs that diverged, which are in no mean. Of the others, collect
  # the curves that the report draws: those of the confirmation (the phase that
  # decides) on text.
  outcomes = [plans.outcome_from_json(row) for row in results['outcomes']]
  curves_of_runs, excluded = {}, []
  for run in outcomes:
    if run.diverged:
      excluded.append({
          'phase': run.phase, 'variant': run.variant, 'size': run.size,
          'workload': run.workload, 'seed': run.seed, 'state': 'diverged',
          'why': 'in no mean of differences'})
      continue
    is_confirmed_text = run.phase == 'confirm' and run.workload == plans.TEXT
    if is_confirmed_text and run.curve:
      curves_of_runs[run.variant, run.size, run.seed] = {'eval': run.curve}

  # Describe in what variants differ from the base beyond the question, each in
  # the last phase that compared it, and collect all warnings.
  certificates: dict[str, dict[str, certificates_lib.Certificate]] = {}
  differences: dict[str, certificates_lib.Differences] = {}
  for phases in (('screen',), ('rescreen',), ('confirm', 'largest')):
    sweeps = []
    for phase in phases:
      sweeps += results_lib.folders(workdir, phase)
    in_phases = certificates_lib.certify_study(
        frozen=frozen, outcomes=outcomes, tuned=results['tuned'],
        phases=phases, sweeps=sweeps)
    certificates |= in_phases
    for variant, at_sizes in in_phases.items():
      differences[variant] = certificates_lib.compare_sizes(
          base=in_phases[frozen.plan.base], variant=at_sizes)
  warnings = _study_warnings(frozen.plan, results)
  warnings += certificates_lib.name_differences(differences)
  return Comparison(
      workdir=workdir,
      frozen=frozen,
      results=results,
      outcomes=outcomes,
      curves=curves_of_runs,
      excluded=excluded,
      about=[frozen.plan.question],
      warnings=warnings,
      certificates=certificates,
      differences=differences,
      target=frozen.plan.target)


def _study_warnings(plan: plans.Plan, results: Mapping[str, Any]) -> list[str]:
  """Returns sentences that a reader of a study must know before its figures.

  Args:
    plan: the plan of the study.
    results: what its results.json holds.
  """
  warnings = _doubt_runs_and_results(results)
  confirmed = results.get('confirm', ())

  # Phases that are not over, and runs that were not planned.
  finished_phases = [
      name for name, row in results['phases'].items() if row['finished']]
  remaining_phases = [
      name for name in plan.seeds if name not in finished_phases]
  if remaining_phases:
    verb = 'is' if len(remaining_phases) == 1 else 'are'
    reason = f' ({results["missing"]})' if results['missing'] else ''
    warnings.append(f'This study is not over: {", ".join(remaining_phases)} '
                    f'{verb} to be done{reason}.')
  if results['as_planned']['differences']:
    warnings.append('What ran is not what was planned at first: see "Planned '
                    'and run".')

  # Differences that the noise may hide, or that other items may not show.
  announced = results['announced']
  if announced and not announced['enough']:
    warnings.append(announced['sentence'] + ' That no difference is shown does '
                    'not mean that there is none.')
  shown_over_seeds_alone = _shown_over_seeds_alone(plan, confirmed)
  if shown_over_seeds_alone:
    warnings.append(
        f'The difference of {"; ".join(shown_over_seeds_alone)} is not shown '
        'over seeds and items (documents, questions) together: other '
        'items of their kind may show none.')

  warnings += _doubt_tuning(plan, results['tuned'])
  return warnings + doubt_normal_noise(plan, confirmed)


def _doubt_tuning(plan: plans.Plan, tuned: Sequence[Mapping[str, Any]]
                  ) -> list[str]:
  """Returns sentences on how the values that were tuned in a study, such as
  learning rates, limit what its verdicts say.

  Args:
    plan: the plan of the study.
    tuned: the rows of 'tuned' in its results.json.
  """
  warnings = []
  # Values that were tuned too narrowly.
  variants_at_edge = dict.fromkeys(  # each once, in order
      row['variant'] for row in tuned if row['at_edge'])
  if variants_at_edge:
    undecided = 'any' if plan.base in variants_at_edge else 'these'
    warnings.append('Tuning ended at the edge of what was tried for '
                    f'{", ".join(variants_at_edge)}: a better value may lie '
                    f'beyond, so that there is no verdict on {undecided}.')

  # Warnings of the noise and the differences that the choice of values adds.
  few_seeds = tuning.describe_few_seeds(plan)
  if few_seeds:
    warnings.append(few_seeds)
  if any(row.get('kept') is False for row in tuned):
    warnings.append(tuning.describe_check(plan, tuned))
  unlike_values = _values_unlike_base(plan, tuned)
  if unlike_values:
    warnings.append('Tuning chose other values than for the base: '
                    f'{"; ".join(unlike_values)}. A difference there is that '
                    'of the part and of its values together.')
  return warnings


def _values_unlike_base(plan: plans.Plan, tuned: Sequence[Mapping[str, Any]]
                        ) -> list[str]:
  """Returns 'VARIANT at SIZE (FIELD=VALUE, base FIELD=VALUE)' of each variant
  whose tuned values on the text are not those of the base.

  Args:
    plan: the plan of the study.
    tuned: what tuning found, as plans.Tuned has it.
  """
  unlike = []
  for row in tuned:
    base_row = plans.find_tuned_row(
        plan, tuned, variant=plan.base, size=row['size'],
        workload=row['workload'])
    if row['workload'] != plans.TEXT or base_row is None:
      continue
    # Where muP carries the values of both from a smaller size, they are the
    # same as there, and are named at that size alone.
    if row.get('kept') and base_row['size'] != row['size']:
      continue
    if row['changes'] != base_row['changes']:
      unlike.append(f'{row["variant"]} at {row["size"]} '
                    f'({format_changes(row["changes"])}, base '
                    f'{format_changes(base_row["changes"])})')
  return unlike


def differences_from_base(
    certificates: Mapping[str, certificates_lib.Certificate], base: str
    ) -> dict[str, certificates_lib.Differences]:
  """Returns in what each variant of a sweep differs from the base besides what
  the sweep asks about, such as in tokens or in trials of tuning, by name.

  Args:
    certificates: the certificate of each variant and of the base, by name. A
      certificate lists what a variant was given: tokens, parameters, ...
    base: the name of the base.
  """
  differences = {}
  for variant, certificate in certificates.items():
    differences[variant] = certificates_lib.compare_certificates(
        certificates[base], certificate)
  return differences


def _doubt_runs_and_results(results: Mapping[str, Any]) -> list[str]:
  """Returns warnings about results that cannot be trusted: if the saved results
  do not follow from the runs, or if the runs may have changed since they ended.

  Args:
    results: the results of a study, as recompute.recompute_results gives them.
  """
  # Saved results are computed again from the runs, and compared.
  warnings = []
  if results['unlike_saved']:
    warnings.append(
        f'{results_lib.FILE} has other verdicts than follow from the runs, by '
        'other code or since it was changed; what stands here follows from the '
        f'runs: {"; ".join(results["unlike_saved"])}.')

  # The figures of a run are hashed when it ends.
  without_hash = results['as_planned'].get('without_hash')
  if without_hash:
    warnings.append(f'The ledger has no hash of {without_hash} runs from when '
                    'they ended: a later change of their figures would not '
                    'show.')
  return warnings


def _shown_over_seeds_alone(plan: plans.Plan,
                            rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the differences that hold for other seeds, but perhaps not for
  other items (the documents or questions of an evaluation).

  Args:
    plan: the plan of the study.
    rows: the verdicts of the confirmation, as decide.Verdict has them. A row
      has the test over seeds alone, and as 'both' that over seeds and items.

  Returns:
    A text 'VARIANT in MEASURE' for each difference that the first test shows
    and the second does not.
  """
  names = []
  for row in rows:
    is_shown = row['verdict'] in (decide.BETTER, decide.WORSE)
    # Most measures have no scores of items.
    over_seeds_and_items = row.get('both')
    if not is_shown or not over_seeds_and_items:
      continue
    if over_seeds_and_items['p'] > plan.alpha:
      names.append(f'{row["variant"]} in {row["measure"]}')
  return names


def doubt_normal_noise(plan: plans.Plan, rows: Sequence[Mapping[str, Any]]
                       ) -> list[str]:
  """Returns warnings that Student's t-test may mislead. There is one if the
  noise does not look normal, and one if a robust test (a permutation test of
  the trimmed mean) disagrees with it.

  Args:
    plan: the plan of the study.
    rows: the verdicts of the confirmation, as decide.Verdict has them.
  """
  primary_rows = [row for row in rows if row['measure'] == plan.primary.name]
  warnings = []

  # Normality is tested once for all variants together, so that all rows have
  # the same p. If none has it, the noise is taken to be normal.
  p_of_shape = 1.0
  for row in primary_rows:
    if page.known(row.get('p_shape')):
      p_of_shape = row['p_shape']
      break
  if p_of_shape <= statistics.MAX_P_OF_IRREGULAR:
    warnings.append(
        f'The differences look skewed or have outliers (p = {p_of_shape:.2g} '
        'of normal noise): p and intervals are the more cautious of Student\'s '
        'and of those by the differences of all variants together.')

  # The robust test is of each variant alone. Neither p-value is corrected for
  # the number of variants, so both are compared with the same alpha.
  disagreeing = []
  for row in primary_rows:
    p, p_robust = row['p'], row.get('p_robust')
    if p is None or p_robust is None:
      continue
    if (p <= plan.alpha) != (p_robust <= plan.alpha):
      disagreeing.append(f'{row["variant"]} (p = {p:.2g} and {p_robust:.2g})')
  if disagreeing:
    warnings.append(
        'Student\'s test and the permutation test of the trimmed mean '
        f'disagree, before correction, on {", ".join(disagreeing)}.')
  return warnings


# A sweep.


def _comparison_of_sweep(workdir, rows: str) -> Comparison:
  """Returns the comparison of the points of a sweep, as a study that has no
  phase but the confirmation.

  Args:
    workdir: the folder of the sweep.
    rows: the path of a CSV of further variants; '': none.
  """
  sweep = curves.load_sweep(workdir)
  if rows:
    sweep = add_variants_of_csv(sweep, rows)

  # The results that a study would have in its files. Through JSON they get the
  # form that they would have when read from there; NOTHING has what a sweep
  # lacks.
  outcomes = _sweep_outcomes(sweep)
  plan = _sweep_plan(sweep, outcomes)
  records = {'confirm': decide.judge_sweep(plan, outcomes),
             'tuned': _tuned_learning_rates(sweep),
             'provenance': {'codes': sweep.codes, 'devices': [],
                            'versions': {}}}
  results = results_lib.NOTHING | plans.to_json(records)

  # The runs that have curves, and those that are left out. A run may be both:
  # it has a loss, but fails an evaluation that it owes.
  not_diverged = {
      (run.variant, run.seed) for run in outcomes if not run.diverged}
  curves_of_runs, excluded = {}, []
  for point in sweep.points:
    for seed, run in point.runs.items():
      if (point.name, seed) in not_diverged:
        curves_of_runs[point.name, '', seed] = _curves_by_figure(point, seed)
      if run.diverged or not run.has_all_results:
        excluded.append(_excluded_row(point, run))
  # A plan of the form of a study's, whose points are those of the sweep.
  frozen = plans.FrozenPlan(
      plan=plan, base_config=sweep.base_tree,
      points=[_frozen_row(point) for point in sweep.points], sources={},
      code={})
  certificates = certificates_lib.certify_sweep(sweep, workdir)
  differences = differences_from_base(certificates, sweep.base.name)
  warnings = _sweep_warnings(sweep)
  warnings += certificates_lib.name_differences(differences)
  warnings += doubt_normal_noise(plan, results['confirm'])
  return Comparison(
      workdir=workdir,
      frozen=frozen,
      results=results,
      outcomes=outcomes,
      curves=curves_of_runs,
      excluded=excluded,
      about=[_describe_sweep(sweep)],
      warnings=warnings,
      certificates=certificates,
      differences=differences)


def _run_of_csv(log: foreign.ForeignRun, base_config: Mapping[str, Any]
                ) -> curves.Run:
  """Returns a run that was trained elsewhere in the form of a run of a sweep.

  Args:
    log: the run, as its rows of the CSV give it.
    base_config: the config of the sweep's base, by dotted name. The run is
      taken to have it, but for its seed.
  """
  # The rows are those of metrics.jsonl, which has None for what is not finite.
  # Without a column of steps, a loss is the final one.
  rows = []
  for step, loss in log.curves['loss'].items():
    finite_loss = None
    if math.isfinite(loss):
      finite_loss = loss
    rows.append({'split': 'eval', 'step': step or base_config['train.steps'],
                 'loss': finite_loss})
  return curves.Run(
      seed=log.seed, state=layout.DONE, error='',
      config={**base_config, 'seed': log.seed}, rows=tuple(rows),
      evaluations={})


def add_variants_of_csv(sweep: curves.Sweep, file: str) -> curves.Sweep:
  """Returns a sweep with further variants from a CSV, which were trained
  elsewhere on the batches of the same seeds; their costs are not known.

  Args:
    sweep: the sweep that was read.
    file: the path of the CSV with the columns variant, seed and loss, held out;
      and step, where a run has several rows. Further columns tell what the
      variant was given (certificate.QUANTITIES).

  Raises:
    RequestError: for a run without seed or loss, or a variant whose name a
      point of the sweep has.
  """
  # Collect the runs of each variant, and what the CSV says they were given.
  names_of_sweep = {point.name for point in sweep.points}
  runs_of_variant: dict[str, dict[int, curves.Run]] = {}
  cells_of_variant: dict[str, dict[str, str]] = {}
  for log in foreign.read_source(pathlib.Path(file), 'csv'):
    is_run = (isinstance(log, foreign.ForeignRun) and log.seed is not None
              and 'loss' in log.curves)
    require(is_run, f'{file}: {log.path} has no seed or no loss, or has them '
            'twice: write columns variant, seed, loss and perhaps step')
    variant = log.path.removesuffix(f'/seed-{log.seed}')
    require(variant not in names_of_sweep, f'{file}: the sweep has a variant '
            f'of the name {variant!r}, too: call it otherwise')
    run = _run_of_csv(log, sweep.base_config)
    runs_of_variant.setdefault(variant, {})[log.seed] = run
    given = log.given_until(max(log.curves['loss']))
    cells_of_variant[variant] = {
        name: str(value) for name, value in given.items()}

  # The CSV may leave out a config and tokens, which are then those of the base,
  # and other costs, which are then NaN.
  costs_of_base = {name: getattr(sweep.base, name)
                   for name in ('params', 'active_params', 'multiplied_params',
                                'looked_up_params', 'flops_per_token',
                                'tokens')}
  points = list(sweep.points)
  for name, runs in runs_of_variant.items():
    costs = dict.fromkeys(costs_of_base, math.nan)
    costs['tokens'] = sweep.base.tokens
    told = certificates_lib.certify_cells(
        name, cells_of_variant[name], base=costs_of_base, seeds=())
    for cost in costs:
      if cost in told:
        costs[cost] = told[cost]
    points.append(curves.Point(
        name=name,
        changes={'rows': f'{file}:{name}'},
        matched=(),
        runs=runs,
        csv_cells=cells_of_variant[name],
        **costs))
  return dataclasses.replace(sweep, points=tuple(points))


def _frozen_row(point: curves.Point) -> dict[str, Any]:
  """Returns what a point of a sweep changes and costs, as a row of the points
  of a study's plan (plans.Frozen.points)."""
  return {
      'variant': point.name, 'size': '', 'workload': plans.TEXT,
      'changes': point.changes, 'matched': point.matched,
      'params': point.params, 'active_params': point.active_params,
      'flops_per_token': point.flops_per_token, 'tokens': point.tokens}


def _sweep_plan(sweep: curves.Sweep, outcomes: Sequence[plans.Outcome]
                ) -> plans.Plan:
  """Describes a sweep as the plan of a study, so that both can be compared and
  reported by the same code. The study has one phase, the confirmation, and a
  measure for each figure that the runs have.

  Args:
    sweep: the sweep.
    outcomes: the outcomes of its runs.
  """
  # The first measure is the primary one. It is always the loss, even if no run
  # has it.
  names_of_figures = ['loss']
  for run in outcomes:
    names_of_figures += run.values.keys()
  measures = []
  for name in dict.fromkeys(names_of_figures):  # each once, in order
    measures.append(plans.Measure(
        name=name, workload=plans.TEXT, figure=name, better=plans.LOWER,
        chance=math.nan))

  # A sweep has one size, whose name is '', and no least effect.
  variants = tuple(point.name for point in sweep.points
                   if point is not sweep.base)
  return plans.Plan(
      name=sweep.name,
      question='',
      file=sweep.file,
      base=sweep.base.name,
      variants=variants,
      sizes=('',),
      workloads=(plans.TEXT,),
      measures=tuple(measures),
      seeds={'confirm': len(sweep.base.runs)},
      tuning=plans.Tuning(fields={LEARNING_RATE_FIELD: ()}, rungs=1),
      effect=0.0,
      match=sweep.match)


def _curves_by_figure(point: curves.Point, seed: int
                      ) -> dict[str, dict[str, list]]:
  """Returns the curves that the run of a point with a seed has, by the name of
  the figure (curves.FIGURES)."""
  curve_by_figure = {}
  for figure in curves.FIGURES:
    curve = point.curve(seed, figure)
    if curve:
      curve_by_figure[figure] = curve
  return curve_by_figure


def _excluded_row(point: curves.Point, run: curves.Run) -> dict[str, Any]:
  """Returns why a run is left out, as a row of Comparison.excluded."""
  reason = run.error.strip()
  if not reason and run.state == 'done':
    reason = 'no finite held-out loss at the last step (eval.every_steps)'
  state = run.state
  if run.diverged:
    state = 'diverged'
  return {'phase': '', 'variant': point.name, 'size': '', 'workload': '',
          'seed': run.seed, 'state': state, 'why': reason}


def _sweep_outcomes(sweep: curves.Sweep) -> list[plans.Outcome]:
  """Returns the outcome of each run of a sweep that has ended: its figures, or
  that it diverged.

  A run that diverged has NaN in place of every figure that another run has, so
  that it counts as one that was tried.

  Args:
    sweep: the sweep.
  """
  # First pass: the figures of the runs that did not diverge. nan_by_name gets
  # NaN under the name of each figure that any run has.
  values_of_run, nan_by_name = {}, {}
  for point in sweep.points:
    for seed, run in point.runs.items():
      if not run.diverged:
        values = _final_values(run)
        values_of_run[point.name, seed] = values
        nan_by_name |= dict.fromkeys(values, math.nan)

  # Second pass, because the names of all figures are known only now. A run
  # without any figure is left out: it has not ended.
  outcomes = []
  for point in sweep.points:
    for seed, run in point.runs.items():
      values = dict(nan_by_name)
      if not run.diverged:
        values = values_of_run[point.name, seed]
      if values:
        outcomes.append(_outcome(point, run, values))
  return outcomes


def _outcome(point: curves.Point, run: curves.Run, values: dict[str, float]
             ) -> plans.Outcome:
  """Describes a run of a sweep as the outcome of a run of a study's
  confirmation, so that both are compared by the same code.

  Args:
    point: the point of the sweep (a variant of the config) that was trained.
    run: the run.
    values: its figures by name.
  """
  # The compute and the time up to its last step are the last entries of its
  # training curve. They are NaN if there is none.
  spent = {'flops': math.nan, 'seconds': math.nan}
  for name, column in point.curve(run.seed, 'train').items():
    spent[name] = column[-1]

  # Keep the scores of single items (documents, questions) of those figures that
  # are compared.
  scores_of_items = {}
  for name in run.items:
    if name in values:
      scores_of_items[name] = run.items[name]
  return plans.Outcome(
      phase='confirm',
      variant=point.name,
      size='',
      workload=plans.TEXT,
      seed=run.seed,
      values=values,
      diverged=run.diverged,
      flops=spent['flops'],
      seconds=spent['seconds'],
      params=point.params,
      changes=point.changes,
      curve=point.curve(run.seed),
      items=scores_of_items,
      shares_clock=run.shares_clock)


def _final_values(run: curves.Run) -> dict[str, float]:
  """Returns the results of a run after its last step, {name: value}.

  They are the held-out loss as 'loss', fractions such as accuracies that
  evaluation tasks found, as 'TASK/FIGURE', and the last figures of the routers
  of its experts. Counts and values that are not finite are left out.

  Args:
    run: the run.
  """
  values = {}
  if run.final_loss is not None:
    values['loss'] = run.final_loss
  values |= _task_values(run)
  # A run with figures of routers alone has not ended, and has no results.
  if values:
    values |= _router_values(run)
  return {name: value for name, value in values.items() if math.isfinite(value)}


def _task_values(run: curves.Run) -> dict[str, float]:
  """Returns the fractions, such as accuracies, that evaluation tasks measured
  on a run, {'TASK/FIGURE': value}.

  Args:
    run: the run.
  """
  values = {}

  # The tasks of the field eval.tasks are evaluated in training. Their results
  # are in metrics.jsonl. A fraction is a float, and a count an int.
  held_out = run.held_out
  if held_out:
    tasks = evals.parse_task_names(run.config['eval.tasks'])
    for name, value in held_out.items():
      is_of_task = any(_is_figure_of_task(task, name) for task in tasks)
      if type(value) is float and is_of_task:
        values[name] = value

  # Other tasks are evaluated after training. Their results are in eval.json,
  # and override figures of the same name.
  for task, figures in run.evaluations.items():
    if not isinstance(figures, Mapping):
      continue
    for name, value in figures.items():
      if type(value) is float:
        values[f'{task}/{name}'] = value
  return values


def _router_values(run: curves.Run) -> dict[str, float]:
  """Returns how the routers of a mixture of experts did at the end of a run:
  the last figures that training reported, each averaged over layers.

  Args:
    run: the run.

  Returns:
    The figures by the names that a report shows; {} for a model without
    experts.
  """
  # Search from the end for a row of training that has any of them.
  for row in reversed(run.rows):
    if row['split'] != 'train' or row.keys().isdisjoint(curves.FIGURES):
      continue
    values = {}
    for name, title in curves.FIGURES.items():
      if name in row:
        values[title] = float(np.mean(np.asarray(row[name], float)))
    return values
  return {}


def _is_figure_of_task(task: str, name: str) -> bool:
  """Returns whether a figure of metrics.jsonl is a result of an evaluation
  task.

  A result is named TASK/FIGURE, or TASK/PART/FIGURE if the task has parts. Side
  information, such as counts, is named TASK/GROUP/FIGURE and is no result.

  Args:
    task: the task, as eval.tasks names it.
    name: the name of the figure.
  """
  # TASK/FIGURE: what stands before the last slash is the task.
  if name.rpartition('/')[0] == task:
    return True

  # A task of another version is not known here, and most tasks have no parts.
  definition = evals.TASKS.get(task.partition(':')[0])
  if definition is None or definition.other_groups is None:
    return False
  if not name.startswith(f'{task}/'):
    return False

  # TASK/PART/FIGURE looks like TASK/GROUP/FIGURE, but the task lists the names
  # of its groups.
  part_or_group = name.removeprefix(f'{task}/').partition('/')[0]
  return part_or_group not in definition.other_groups


def _tuned_learning_rates(sweep: curves.Sweep) -> list[dict[str, Any]]:
  """Finds the best learning rate of each variant in a sweep that tries several
  rates of some variants.

  Args:
    sweep: the sweep.

  Returns:
    A row of the form of plans.Tuned for each variant of which two rates or more
    have a loss.
  """
  # Group the points (variants of the config) that differ only in the rate, by
  # what else they change. A point that sets no rate has that of the base.
  points_of_group: dict[str, dict[float, curves.Point]] = {}
  for point in sweep.points:
    other_changes = dict(point.changes)
    rate = other_changes.pop(LEARNING_RATE_FIELD,
                             sweep.base_config[LEARNING_RATE_FIELD])
    group = format_changes(other_changes) or sweep.base.name
    points_of_group.setdefault(group, {})[rate] = point

  tuned = []
  for group, point_by_rate in points_of_group.items():
    row = _tuned_row(group, point_by_rate)
    if row is not None:
      tuned.append(row)
  return tuned


def _tuned_row(group: str, point_by_rate: Mapping[float, curves.Point]
               ) -> dict[str, Any] | None:
  """Finds the best learning rate among points of a sweep that differ only in
  the rate.

  Args:
    group: the name of these points in a report.
    point_by_rate: the points by their learning rate.

  Returns:
    A row of the form of plans.Tuned, or None if fewer than two rates have a
    loss. Its 'at_edge' names the field of the rate if the best rate is the
    lowest or the highest.
  """
  # Collect a trial for each rate that has a loss.
  trials = []
  for rate in sorted(point_by_rate):
    if point_by_rate[rate].final_losses:
      trials.append(_trial_row(rate, point_by_rate[rate]))
  if len(trials) < 2:
    return None

  # Choose the lowest loss among the rates at which no run diverged, if there
  # are any: False sorts before True.
  best = min(trials, key=lambda trial: (trial['diverged'], trial['value']))

  # If the best rate is the lowest or the highest, a better one may lie beyond.
  fields_at_edge = []
  edges = (min(point_by_rate), max(point_by_rate))
  if best['changes'][LEARNING_RATE_FIELD] in edges:
    fields_at_edge.append(LEARNING_RATE_FIELD)

  points = [*point_by_rate.values()]
  num_runs = sum(len(point.final_losses) for point in points)
  return {
      'variant': group, 'size': '', 'workload': '', 'changes': best['changes'],
      'look': points[0].name, 'at_edge': fields_at_edge, 'runs': num_runs,
      'tried': trials}


def _trial_row(rate: float, point: curves.Point) -> dict[str, Any]:
  """Returns the loss of a point at a learning rate with its interval, as a row
  of plans.Tuned.tried."""
  losses = statistics.student_interval([*point.final_losses.values()])
  has_diverged = any(run.diverged for run in point.runs.values())
  return {'rung': 0, 'changes': {LEARNING_RATE_FIELD: rate},
          'diverged': has_diverged, 'value': losses.mean, 'low': losses.low,
          'high': losses.high}


def _describe_sweep(sweep: curves.Sweep) -> str:
  """Returns a sentence that says what a sweep compares, and how much of it is
  done.

  Args:
    sweep: the sweep.
  """
  # Whether all points cost the same, and whether they see the same data.
  matching = 'sizes are not matched'
  if sweep.match:
    matching = f'{sweep.match} matched to the base\'s within 1 %'
  pairing = ('points differ in their data, so that seeds pair less than they '
             'do elsewhere')
  if sweep.paired:
    pairing = 'seed by seed, every point sees the same data in the same order'
  num_done = sum(run.state == 'done' for run in sweep.runs)
  return (f'{sweep.file}: {len(sweep.points)} points, '
          f'{num_done} of {len(sweep.runs)} runs done; base '
          f'{sweep.base.name}; {matching}; {pairing}.')


def _sweep_warnings(sweep: curves.Sweep) -> list[str]:
  """Returns sentences that a reader of a sweep must know before its figures.

  Args:
    sweep: the sweep.
  """
  warnings = []

  # Runs that are missing, because they failed or have not ended.
  unfinished = [run for run in sweep.runs
                if run.state != 'done' and not run.diverged]
  if unfinished:
    warnings.append(f'{len(unfinished)} of {len(sweep.runs)} runs failed or '
                    'are not done: they are listed at the end, and are in no '
                    'verdict.')
  if not sweep.base.final_losses:
    warnings.append(f'The base {sweep.base.name} has no finished run with a '
                    'held-out loss: no loss can be compared with it.')

  # Runs that were trained by another version of the code, or with another
  # config.
  if len(sweep.codes) > 1:
    warnings.append(layout.describe_changed_code(sweep.codes))
  if sweep.runs_of_other_config:
    warnings.append('Not of the config that sweep.json says, though in these '
                    f'figures: {"; ".join(sweep.runs_of_other_config)}.')
  return warnings
