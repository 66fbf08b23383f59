"""freeze: makes the plan of a study's file, checked before anything is run.

The file holds `get_config()` and `sweep(add)` as a sweep's does; `SIZES`, the
changes of each size by its name, smallest first; and `EFFECT`, the smallest
difference of the first measure that is wanted. The rest has defaults.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import numbers
import re
from typing import Any

import jax

from common.errors import check_choice, require, shorten
from common.fields import check_number, check_type
from configs import base as base_config
from tools.compare import cost, curves, layout, phases, spec
from tools.compare import measures as measures_lib
from tools.compare import plan as plans
from training import objectives, plugins, preflight, progress
from training.data import tokenizers
from training.objectives import pipeline
from training.workdir import provenance, run_config

# The constants of a study's file and their defaults; None: it must say it. Its
# phases may have further ones (Phase.constants).
DEFAULT_OF_CONSTANT: dict[str, Any] = {
    'QUESTION': '',
    'SIZES': None,
    'EFFECT': None,
    # The runs that measures come from, with the fields in which they leave the
    # base: 'text', and probes by their names.
    'WORKLOADS': {plans.TEXT: {}},
    # Each is {'workload', 'figure', 'better', 'name', 'chance'}; derived: the
    # loss of the text, and the accuracy of each probe.
    'MEASURES': (),
    'SEEDS': {},  # by phase; derived: those of phases.default_seeds_by_phase
    # 'fields': the values of each that are tried; derived: half of the base's
    # learning rate, the rate, and twice the rate.
    'TUNING': {},
    'ALPHA': 0.05, 'Q': 0.05, 'POWER': 0.8, 'UNSTABLE': 0.1,
    'FLOOR': 0.0,  # of the loss, for one of two laws of compute multipliers
    'MARGIN': 0.0,  # of equivalence; 0: that is not asked for
    'LEAST_SNR': 0.0,  # of measures beside the first one; 0: all go on
    'TARGET': 0.0,  # a loss of the text to be reached; 0: none
    'MATCH': '', 'MATCH_FIELD': spec.DEFAULT_MATCH_FIELD,
    # Another number gives fresh seeds to a second study of the same; -1: drawn
    # by the plan's hash.
    'REPLICATION': 1, 'SEED_OFFSET': -1,
}
# The type, and an example, of each constant whose default does not tell it.
_TYPE_AND_EXAMPLE = {
    'SIZES': (dict, {'small': {'model.d_model': 32}, 'middle': ...}),
    'SEEDS': (dict, {'screen': 5, 'confirm': 10}),
    'EFFECT': (numbers.Real, 0.02),
    'MEASURES': (tuple | list, ({'figure': 'loss'},))}
# By what share the networks of models in muP, solved for at each size, may be
# wider or narrower, for the width of the model, than at the smallest size: a
# rate is off by as much, and those that are tried are a factor of 2 apart.
MOST_OUT_OF_PROPORTION = 0.25
FEWEST_SIZES = 3  # since a verdict must agree over sizes
# Fields that the study sets itself, so that no file may.
_FIELDS_OF_STUDY = ('seed', 'init_seed', 'eval.part')
# Fields by which a run sees other data, or more of it, than the base's.
_FIELDS_OF_DATA = (
    *spec.FIELDS_OF_BATCHES, 'train.steps', 'train.grad_accumulation', 'eval.')


def freeze_plan(file: str, kept: plans.FrozenPlan | None = None
                ) -> plans.FrozenPlan:
  """Makes the plan of a study from its file, and checks every run that it
  plans. The plan is written down before anything is trained, and is not changed
  after that.

  Args:
    file: the path of the file.
    kept: an earlier plan, if there is one. If neither the file nor the code has
      changed since, its runs are not checked again.

  Raises:
    RequestError: for the first thing in the file that is wrong, or that would
      make a comparison unfair.
  """
  cost.keep_off_accelerators()
  sweep, constants = read_study_file(file)

  # Hash all that the points (variants at a size, on a workload) follow from. If
  # the hash is that of the earlier plan, take its points; else check them.
  # Without a commit, it is not known whether the code has changed.
  start = provenance.describe_this_start()
  code = {'commit': start['commit'], 'diff': start['diff']}
  checksum_of_inputs = ''
  if code['commit']:
    checksum_of_inputs = layout.json_checksum(plans.to_json(
        [code, jax.__version__, sweep.base.to_dict(), sweep.points, constants]))
  if (kept is not None and checksum_of_inputs
      and kept.inputs == checksum_of_inputs):
    points = kept.points
  else:
    points = _check_points(sweep, constants)
  configs = [spec.apply_changes(sweep.base, row['changes'], 'it')
             for row in points]

  # Make the plan.
  plan = _make_plan(file=file, sweep=sweep, constants=constants, points=points,
                    configs=configs)
  frozen = plans.FrozenPlan(
      plan=plan, base_config=sweep.base.to_dict(), points=points,
      sources=cost.hash_data_of_configs(configs), code=code,
      inputs=checksum_of_inputs, files=dict(plugins.text_of_loaded_file))

  # The first seed may follow from a hash of all else that is planned, so that
  # nobody can choose it.
  offset = constants['SEED_OFFSET']
  if offset < 0:
    offset = frozen.seed_offset_of_hash
  return dataclasses.replace(
      frozen, plan=dataclasses.replace(plan, offset=offset))


def _make_plan(file: str, sweep: spec.Sweep, constants: Mapping,
               points: Sequence[Mapping], configs: Sequence) -> plans.Plan:
  """Returns the plan of a study, without the offset of its seeds.

  Args:
    file: the path of the study's file.
    sweep: the base and its variants.
    constants: the constants of the file, completed.
    points: a row for each variant, size and workload (FrozenPlan.points).
    configs: the config of each of these.
  """
  measures = _make_measures(file=file, constants=constants, points=points,
                            configs=configs)
  variants = tuple(point.name for point in sweep.points
                   if point.name != sweep.base_name)

  # The sizes, of which the largest may be predicted.
  sizes, largest = tuple(constants['SIZES']), None
  if 'largest' in constants['SEEDS']:
    *smaller_sizes, largest = sizes
    sizes = tuple(smaller_sizes)
    _check_predictable(file, measures[0], configs)

  # The sizes at which fields are tuned. With muP the values of the smallest
  # size are carried to all of them, and checked at the next one. A variant that
  # muP has no rules for is tuned at each size.
  names_without_mup = {
      row['variant'] for row, config in zip(points, configs, strict=True)
      if config.model.parametrization != 'mup'}
  tuned_sizes, tuned_at_each_size, checked_size = sizes, None, None
  if sweep.base_name not in names_without_mup:
    tuned_sizes, checked_size = sizes[:1], sizes[1]
    tuned_at_each_size = tuple(name for name in variants
                               if name in names_without_mup) or None

  match_field = ''
  if constants['MATCH']:
    match_field = constants['MATCH_FIELD']
  constants_of_phases = {
      name: value for name, value in constants.items()
      if name not in DEFAULT_OF_CONSTANT}
  return plans.Plan(
      name=sweep.name,
      question=constants['QUESTION'],
      file=file,
      base=sweep.base_name,
      variants=variants,
      sizes=sizes,
      largest=largest,
      tuned_sizes=tuned_sizes,
      tuned_at_each_size=tuned_at_each_size,
      checked_size=checked_size,
      workloads=tuple(constants['WORKLOADS']),
      measures=tuple(measures),
      seeds=constants['SEEDS'],
      tuning=constants['TUNING'],
      effect=float(constants['EFFECT']),
      alpha=constants['ALPHA'],
      q=constants['Q'],
      power=constants['POWER'],
      unstable=float(constants['UNSTABLE']),
      match=constants['MATCH'],
      match_field=match_field,
      margin=float(constants['MARGIN']) or None,
      floor=float(constants['FLOOR']) or None,
      least_snr=float(constants['LEAST_SNR']) or None,
      target=float(constants['TARGET']) or None,
      settings=constants_of_phases or None,
      replication=constants['REPLICATION'])


def _make_measures(file: str, constants: Mapping, points: Sequence[Mapping],
                   configs: Sequence) -> list[plans.Measure]:
  """Returns the measures of a study, such as the held-out loss. Each gets the
  score that random guessing would have.

  Args:
    file: the path of the study's file, for messages.
    constants: the constants of the file, with their defaults.
    points: a row for each variant, size and workload (FrozenPlan.points). A
      workload is the text, or a probe (a synthetic task).
    configs: the config of each of these, in the same order.

  Returns:
    The measures in the order of MEASURES. The first is the primary one.
  """
  bytes_per_token = _check_halves_of_held_out_text(configs[0])
  workloads = [row['workload'] for row in points]
  measures = []
  for entry in constants['MEASURES']:
    # The first point of a workload is the base at the smallest size.
    index = workloads.index(entry['workload'])
    is_text = entry['workload'] == plans.TEXT
    chance = measures_lib.score_of_guessing(
        measure=entry, config=configs[index], vocab=points[index]['vocab'],
        bytes_per_token=bytes_per_token if is_text else 0.0, file=file)
    # An entry that states its chance gets the same one back.
    fields = {**entry, 'chance': chance}
    measures.append(plans.Measure(**fields))
  return measures


def _check_predictable(file: str, primary: plans.Measure, configs: Sequence
                       ) -> None:
  """Raises RequestError where a scaling law cannot predict the largest size:
  where the first measure is no loss, or a run does not end cooled down."""
  are_cooled = all(
      curves.ends_cooled_down(run_config.flatten(config)) for config in configs)
  require(primary.better == plans.LOWER and are_cooled,
          f'{file}: SEEDS has `largest`, which a law of losses predicts: '
          'less must be better of the first measure, and optim.schedule must '
          "be 'wsd', 'cosine' or 'linear', with optim.decay_steps at 0")


def read_study_file(file: str) -> tuple[spec.Sweep, dict[str, Any]]:
  """Reads the Python file of a study, and checks its constants.

  Args:
    file: the path of the file.

  Returns:
    sweep: the base config and its variants.
    constants: the constants of the file by name, such as SEEDS, with the
      defaults of those that it leaves out. TUNING is a plans.Tuning, and
      MEASURES has no `chance`, the score of guessing, yet.

  Raises:
    RequestError: if no study can be made of the file.
  """
  # Read the constants that all studies have.
  module = spec.load_sweep_module(file)
  constants = {}
  for name, default in DEFAULT_OF_CONSTANT.items():
    constants[name] = getattr(module, name, default)
    _check_type_of_constant(file, name, constants[name])

  # Find the phases of the study, such as noise, tuning and confirmation, and
  # read the constants that these have.
  phases.check_phases(file)
  seeds = phases.default_seeds_by_phase() | constants['SEEDS']
  constants['SEEDS'] = _check_seeds(file, seeds)
  for phase in phases.phases_of_study(seeds):
    for name, default in phase.constants.items():
      constants[name] = getattr(module, name, default)
      check_type(constants[name], default, f'{file}: {name}')
  sweep = spec.read_sweep_file(file, seeds=1, known=constants)
  _check_ranges(file, constants)
  _check_sizes_and_workloads(file, constants)

  # Complete what a file may leave out, because it follows from the rest.
  constants['TUNING'] = _make_tuning(file, constants['TUNING'], sweep.base)
  _check_overlaps(file, sweep, constants)
  workloads = constants['WORKLOADS']
  entries = constants['MEASURES']
  if not entries:
    entries = [_default_measure(workload) for workload in workloads]
  constants['MEASURES'] = measures_lib.complete_measures(
      entries, workloads, file)
  return sweep, constants


def _check_type_of_constant(file: str, name: str, value: Any) -> None:
  """Raises RequestError if a constant of a study's file is not of the right
  type, which is that of its default, or the one that _TYPE_AND_EXAMPLE gives.

  Args:
    file: the path of the file, for messages.
    name: the name of the constant.
    value: its value in the file.
  """
  # A fraction may be written as an integer.
  default = DEFAULT_OF_CONSTANT[name]
  if name in _TYPE_AND_EXAMPLE:
    expected_type, example = _TYPE_AND_EXAMPLE[name]
  else:
    is_fraction = isinstance(default, float)
    expected_type = numbers.Real if is_fraction else type(default)
    example = default
  require(isinstance(value, expected_type), f'{file}: {name} is '
          f'{shorten(value)}: write it as {example!r}')


def _check_seeds(file: str, seeds: Mapping[str, Any]) -> dict[str, int]:
  """Checks the number of seeds of each phase of a study, and returns them in
  the order in which the phases run.

  Args:
    file: the path of the study's file, for messages.
    seeds: the number of seeds by the name of the phase.

  Raises:
    RequestError: for an unknown phase, and for a number out of its range.
  """
  for name in seeds:
    check_choice('phase of SEEDS', name, phases.PHASES)
  seeds_in_order = {}
  for phase in phases.phases_of_study(seeds):
    num_seeds = seeds[phase.name]
    is_in_range = (type(num_seeds) is int and phase.min_seeds <= num_seeds
                   <= phases.SEEDS_BETWEEN_PHASES)
    require(is_in_range,
            f'{file}: SEEDS has {num_seeds!r} for {phase.name}: choose a whole '
            f'number from {phase.min_seeds} to {phases.SEEDS_BETWEEN_PHASES:,}')
    seeds_in_order[phase.name] = num_seeds
  return seeds_in_order


# The bounds of the numbers of a study's file.
_BOUNDS_OF_CONSTANT = {
    'EFFECT': (('>', 0), ('<', 1e30)),
    'ALPHA': (('>', 0), ('<', 1)),
    'Q': (('>', 0), ('<', 1)),
    'POWER': (('>', 0), ('<', 1)),
    'MARGIN': (('>=', 0), ('<', 1e30)),
    'FLOOR': (('>=', 0), ('<', 1e30)),
    'LEAST_SNR': (('>=', 0), ('<', 1e30)),
    'TARGET': (('>=', 0), ('<', 1e30)),
    'UNSTABLE': (('>=', 0), ('<=', 1)),
    'REPLICATION': (('>=', 1), ('<=', 10_000)),
    'SEED_OFFSET': (('>=', -1), ('<=', plans.SEEDS_BETWEEN_STUDIES
                                 * plans.NUM_SEED_RANGES))}


def _check_ranges(file: str, constants: Mapping) -> None:
  """Raises RequestError for a number out of its range, and where MATCH is no
  cost that can be matched."""
  for name, bounds in _BOUNDS_OF_CONSTANT.items():
    check_number(f'{file}: {name}', constants[name], bounds)
  check_choice('MATCH', constants['MATCH'], ('', *spec.MATCHABLE_COSTS))


def _check_sizes_and_workloads(file: str, constants: Mapping) -> None:
  """Checks the sizes of the model and the workloads (the text, and probes) of a
  study's file.

  Args:
    file: the path of the file, for messages.
    constants: the constants of the file.

  Raises:
    RequestError: if they are not written as {name: {field: value}}, if there
      are too few sizes, or if the first workload is not the text.
  """
  for constant in ('SIZES', 'WORKLOADS'):
    for name, fields in constants[constant].items():
      is_name = re.fullmatch(r'[\w=+-]+', str(name)) is not None
      require(is_name and isinstance(fields, Mapping),
              f'{file}: {constant} has {name!r}: '
              f'{shorten(fields)}: write a name of letters and digits, and the '
              "fields that it changes, as 'small': {'model.d_model': 64}")

  # If the study has the phase `largest`, its largest size is predicted from the
  # others, which must be enough without it.
  fewest = FEWEST_SIZES
  if 'largest' in constants['SEEDS']:
    fewest += 1
  num_sizes = len(constants['SIZES'])
  require(num_sizes >= fewest, f'{file}: SIZES has {num_sizes} of them: this '
          f'study has at least {fewest}, since a verdict must agree over sizes')

  first_workload = next(iter(constants['WORKLOADS']), '')
  require(first_workload == plans.TEXT, f'{file}: WORKLOADS begins with '
          f'{first_workload or "nothing"!r}: begin it with {plans.TEXT!r}, '
          'which probes stand beside')


def _default_measure(workload: str) -> dict[str, str]:
  """Returns the measure of a workload that a file names no measure of: the loss
  of the text, or the accuracy of a probe."""
  figure = 'loss' if workload == plans.TEXT else 'accuracy'
  return {'workload': workload, 'figure': figure}


def _make_tuning(file: str, entries: Mapping, base) -> plans.Tuning:
  """Checks TUNING of a study's file, which says how fields such as the learning
  rate are tuned, and completes it with defaults.

  Args:
    file: the path of the file, for messages.
    entries: TUNING. Without 'fields', the base's learning rate, its half and
      its double are tried.
    base: the config of the base.

  Returns:
    How fields are tuned, with the values to try of each.

  Raises:
    RequestError: for values that cannot be tried, or numbers out of range.
  """
  for name in entries:
    check_choice('entry of TUNING', name, ('fields', 'keep', 'rungs', 'extend'))
  rate = base.optim.lr
  fields = entries.get('fields', {'optim.lr': (rate / 2, rate, 2 * rate)})
  tuning = plans.Tuning(**{**entries, 'fields': fields})

  # Check the values of each field. `extend` tries further values beyond the
  # edges, for which the values must be positive and rise.
  for field, values in fields.items():
    subject = f'{file}: TUNING of {field}'
    are_several = isinstance(values, tuple | list) and len(values) > 1
    require(are_several and _are_positive_and_rising(values),
            f'{subject} is {shorten(values)}: write two values or more above '
            '0, rising')
    has_inner_value = len(values) > 2 or tuning.extend != 0
    require(has_inner_value, f'{subject} is {shorten(values)}, both of which '
            'are at an edge, with extend at 0: no verdict could follow; write '
            'three values or more, or a larger extend')
    # Setting a value raises if the field is unknown or of another type.
    for value in values:
      spec.apply_changes(base, {field: value}, subject)

  # Check the numbers of the search.
  is_search = (_is_integer_within(tuning.rungs, 1, 10) and 0 < tuning.keep < 1
               and _is_integer_within(tuning.extend, 0, 10))
  require(is_search, f'{file}: TUNING is {shorten(entries)}: keep '
          'is a share between 0 and 1, rungs from 1 to 10, extend from 0 to 10')
  return tuning


def _are_positive_and_rising(values: Sequence) -> bool:
  """Returns whether each value is larger than the one before, and than 0."""
  return list(values) == sorted(set(values)) and values[0] > 0


def _is_integer_within(value: Any, least: int, most: int) -> bool:
  """Returns whether a value is an integer from `least` to `most`."""
  return type(value) is int and least <= value <= most


def _check_overlaps(file: str, sweep: spec.Sweep, constants: Mapping) -> None:
  """Checks that no two parts of a study set the same field of the config, and
  that all variants see the same data for as many steps.

  Args:
    file: the path of the study's file, for messages.
    sweep: the base and its variants.
    constants: the constants of the file.

  Raises:
    RequestError: for the first field that is set twice, or that changes the
      data of a variant.
  """
  # The names and fields that the study uses itself.
  changes_by_variant = {point.name: point.changes for point in sweep.points}
  require(plans.SECOND_BASE not in changes_by_variant,
          f'{file}: a variant is called '
          f'{plans.SECOND_BASE!r}, which is what the study calls its base '
          'with other first parameters: call it otherwise')
  for field in _FIELDS_OF_STUDY:
    value = sweep.base[field]
    require(not value, f'{file}: get_config() sets {field} to '
            f'{value!r}, which the study sets itself: leave it out')

  # Collect the fields that each part sets. The order matters: if two parts set
  # a field, the message leaves it to the earlier one.
  fields_of_setter = {
      'the study itself': [_FIELDS_OF_STUDY],
      'TUNING': [constants['TUNING'].fields],
      'a size': constants['SIZES'].values(),
      'a workload': constants['WORKLOADS'].values(),
      'a variant': changes_by_variant.values()}

  # Compare the fields of each part with those of the parts before it.
  fields_of_text = constants['WORKLOADS'].get(plans.TEXT, {})
  setter_of_field: dict[str, str] = {}
  for setter, groups_of_fields in fields_of_setter.items():
    fields = set(itertools.chain(*groups_of_fields))
    for field in fields:
      # A variant may be the base with other initial parameters.
      if field == 'init_seed' and setter == 'a variant':
        continue
      earlier = setter_of_field.get(field)
      # A probe may have other steps than the text has at a size.
      is_of_probe = setter == 'a workload' and field not in fields_of_text
      if is_of_probe and earlier == 'a size':
        continue
      require(earlier is None, f'{file}: {earlier} and {setter} both set '
              f'{field}: leave it to {earlier}')
      changes_data = (field.startswith(_FIELDS_OF_DATA)
                      and setter in ('TUNING', 'a variant'))
      require(not changes_data, f'{file}: {setter} sets {field}: '
              'every variant of a study has the same data and as many steps as '
              'the base, or no difference would be its own')
    setter_of_field |= dict.fromkeys(fields, setter)


def _check_points(sweep: spec.Sweep, constants: Mapping) -> list[dict]:
  """Checks the config of each variant at each size of the model and on each
  workload (the text, or a probe), and returns a row for each of them, those of
  the base first (FrozenPlan.points).

  Args:
    sweep: the base and its variants.
    constants: the constants of the study's file.

  Raises:
    RequestError: for the first config that cannot be trained, and for sizes
      that do not rise.
  """
  # List all combinations, those of the base first.
  of_base: list[tuple[str, str, spec.Point]] = []
  of_variants: list[tuple[str, str, spec.Point]] = []
  for size in constants['SIZES']:
    points = _match_points_at_size(sweep, constants, size)
    for workload in constants['WORKLOADS']:
      for point in points:
        is_base = point.name == sweep.base_name
        combinations = of_base if is_base else of_variants
        combinations.append((size, workload, point))

  # Check each of them.
  rows = []
  for size, workload, point in progress.show_items(
      [*of_base, *of_variants], 'points checked'):
    rows.append(_check_point(sweep=sweep, constants=constants, size=size,
                             workload=workload, point=point))

  _check_proportions(sweep, constants, rows)

  # Check that the sizes are written from small to large.
  params = [row['params'] for row in rows if row['workload'] == plans.TEXT
            and row['variant'] == sweep.base_name]
  params_text = ', '.join(f'{number:,}' for number in params)
  require(params == sorted(set(params)), f'{sweep.file}: the base has '
          f'{params_text} parameters at the sizes '
          f'{", ".join(constants["SIZES"])}: write them smallest first')
  return rows


def _check_proportions(sweep: spec.Sweep, constants: Mapping,
                       rows: Sequence[Mapping]) -> None:
  """Checks that the widths that matching solved for grow as the models do where
  these are in muP, whose rates hold for widths that go together.

  Args:
    sweep: the base and its variants.
    constants: the constants of the study's file.
    rows: a row for each variant, size and workload.

  Raises:
    RequestError: for a variant whose networks grow otherwise.
  """
  # Of the fields that matching may solve for, only the width of the
  # feed-forward networks is a share of the model's width.
  field = constants['MATCH_FIELD']
  if not constants['MATCH'] or field != spec.DEFAULT_MATCH_FIELD:
    return
  # The first row of a variant is of its smallest size: rows come in the order
  # of SIZES, and the caller checks that these rise.
  share_at_smallest: dict[str, float] = {}
  for row in rows:
    config = spec.apply_changes(sweep.base, row['changes'], 'it')
    model = config.model
    if row['workload'] != plans.TEXT or model.parametrization != 'mup':
      continue
    # A width that the config does not give is derived from the model's.
    width = cost.resolve_model(config).d_ff
    share = width / model.d_model
    name = row['variant']
    first_share = share_at_smallest.setdefault(name, share)
    require(abs(share / first_share - 1) <= MOST_OUT_OF_PROPORTION,
            f'{sweep.file}: variant {name!r} at size {row["size"]!r} would '
            f'have {field} {width} for the {constants["MATCH"]} of the base, '
            f'which is {share:.3g} times as wide as the model, and at the '
            f'smallest size {first_share:.3g} times: muP has rates for widths '
            'that go together; match something else')


def _match_points_at_size(sweep: spec.Sweep, constants: Mapping, size: str
                          ) -> tuple[spec.Point, ...]:
  """Returns the variants at one size of the model, with the field set by which
  they cost what the base costs, if the study matches costs.

  Args:
    sweep: the base and its variants.
    constants: the constants of the study's file.
    size: the name of the size.
  """
  # The field is solved for on the text. It keeps its value on the other
  # workloads, so that the model is the same on all.
  subject = f'{sweep.file}, size {size!r}'
  changes = _changes_of_workload(sweep=sweep, constants=constants, size=size,
                                 workload=plans.TEXT)
  base = spec.apply_changes(sweep.base, changes, subject)
  if not constants['MATCH']:
    return sweep.points
  with spec.prefix_errors(subject):
    sweep_at_size = dataclasses.replace(sweep, base=base)
    matched_sweep = cost.match_costs(
        sweep_at_size, constants['MATCH'], constants['MATCH_FIELD'])
    return matched_sweep.points


def _changes_of_workload(sweep: spec.Sweep, constants: Mapping, size: str,
                         workload: str, tasks: tuple[str, ...] = ()
                         ) -> dict[str, Any]:
  """Returns the fields of the base's config that a size of the model and a
  workload change, {field: value}.

  Args:
    sweep: the base and its variants.
    constants: the constants of the study's file.
    size: the name of the size.
    workload: the name of the workload, which is the text or a probe (a
      synthetic task).
    tasks: the evaluation tasks that the measures of the workload need.
  """
  base, fields = sweep.base, constants['WORKLOADS'][workload]
  changes = dict(constants['SIZES'][size])
  if tasks or workload != plans.TEXT:
    changes['eval.tasks'] = ','.join(tasks)
  if workload == plans.TEXT:
    return changes | fields

  # For a probe, reset the fields that its objective does not read.
  for name in objectives.OBJECTIVES['probe'].ignores:
    changes[name] = base_config.FIELDS[name].default

  def value_at_size(name: str) -> Any:
    """Returns the value that the size, or else the base, gives a field."""
    return changes.get(name, base[name])

  # The schedule keeps its proportions if the run is longer or shorter than that
  # on the text. Reports come at the end, unless the size says otherwise.
  steps = fields.get('train.steps', value_at_size('train.steps'))
  length_ratio = steps / value_at_size('train.steps')
  schedule = {name: round(value_at_size(name) * length_ratio)
              for name in ('optim.warmup_steps', 'optim.decay_steps')}
  reports = {'eval.every_steps': steps, 'checkpoint.every_steps': steps,
             'log.every_steps': max(steps // 10, 1)}
  probe = {'objective': 'probe', 'data.source': f'probe:{workload}',
           'model.vocab_size': 0, 'model.max_len': 0}
  # Later fields win: what the file says about the workload wins over all else.
  return reports | changes | schedule | probe | fields


def _check_point(sweep: spec.Sweep, constants: Mapping, size: str,
                 workload: str, point: spec.Point) -> dict:
  """Returns what a variant changes and costs at a size on a workload, once its
  config is checked (a row of FrozenPlan.points).

  Args:
    sweep: the base and its variants.
    constants: the constants of the study's file.
    size, workload: the names of both.
    point: the variant.

  Raises:
    RequestError: where its runs cannot be trained, or cannot be compared.
  """
  variant = f'variant {point.name!r}'
  subject = f'{sweep.file}, {variant} at size {size!r} on {workload!r}'
  measures = [measure for measure in constants['MEASURES']
              if measure['workload'] == workload]
  with spec.prefix_errors(subject):
    # The config of its runs.
    tasks = measures_lib.tasks_of_workload(constants['MEASURES'], workload)
    changes = _changes_of_workload(
        sweep=sweep, constants=constants, size=size, workload=workload,
        tasks=tasks) | point.changes
    config = spec.apply_changes(sweep.base, changes, 'it')

    # Whether they can run, with each value that is tried, and be compared.
    for measure in measures:
      measures_lib.check_task_has_figure(measure, config, variant)
    cost.check_config_of_point(config, changes)
    if workload == plans.TEXT:
      _check_tuned_values(config, constants['TUNING'])
    require(config.eval.every_steps > 0, 'eval.every_steps is 0: a study '
            'compares held-out losses after the last step; set it to '
            'train.steps, or to less for curves and speed-ups')
    require(not config.init_from, f'init_from is {config.init_from!r}: a run '
            'of a study begins with parameters of its own')
    share = phases.share_of_steps(constants['TUNING'], 0)
    require(config.train.steps * share >= 1, 'TUNING buys less than one run: '
            f'its first rung trains {share:.3g} of {config.train.steps} steps, '
            'which is less than one step; take fewer rungs, or a larger keep')

    # The costs of a run, and the loss of guessing.
    costs = cost.cost_of_run(config)._asdict()
    if workload == plans.TEXT:
      costs['body'] = cost.share_of_flops_without_vocabulary(config)
    vocab = cost.resolve_model(config).vocab_size
    guess = measures_lib.loss_of_guessing(measures, config, vocab)
  return {'variant': point.name, 'size': size, 'workload': workload,
          'changes': changes, 'matched': list(point.matched),
          **costs, 'vocab': vocab, 'guess': guess}


def _check_tuned_values(config, tuning: plans.Tuning) -> None:
  """Raises RequestError for a value to be tried that a run of a config cannot
  have."""
  for field, values in tuning.fields.items():
    for value in values:
      tried_config = spec.apply_changes(config, {field: value}, 'TUNING')
      preflight.check_config(tried_config, [field])


def _check_halves_of_held_out_text(config) -> float:
  """Checks that a study has held-out text, and that it can be split in halves.
  Variants are screened on the first half and confirmed on the second, so that
  they are not confirmed on the text that they were chosen by.

  Args:
    config: the config of the base.

  Returns:
    The mean number of bytes of a token in the second half.

  Raises:
    RequestError: if there is no held-out text, or a half of it is empty.
  """
  # A half is read for its errors: making loaders raises if it is empty.
  tokenizer = tokenizers.load(config.data.tokenizer)
  require(bool(config.data.holdout_every or config.data.eval_source),
          'data.holdout_every is 0: a study needs text that is held out')
  for part in ('first', 'second'):
    half = spec.apply_changes(config, {'eval.part': part}, 'it')
    loaders = pipeline.make_evaluation_loaders(half, tokenizer)

  # Average over the sources of the second half, which the loop has read last,
  # weighted by their shares.
  sum_of_shares = sum(loader.share for loader in loaders)
  weighted_bytes = sum(loader.share * loader.bytes_per_token
                       for loader in loaders)
  return weighted_bytes / sum_of_shares
