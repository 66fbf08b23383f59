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

from common.errors import one_of, require, short
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
# The type of what has no default to tell it, and an example.
_FORMS = {'SIZES': (dict, {'small': {'model.d_model': 32}, 'middle': ...}),
          'SEEDS': (dict, {'screen': 5, 'confirm': 10}),
          'EFFECT': (numbers.Real, 0.02),
          'MEASURES': (tuple | list, ({'figure': 'loss'},))}
FEWEST_SIZES = 3
# Fields that are the study's own.
_STUDY_FIELDS = ('seed', 'init_seed', 'eval.part')
# Fields by which a run sees other data, or more of it, than the base's.
_DATA = (*spec.FIELDS_OF_BATCHES, 'train.steps', 'train.grad_accumulation',
         'eval.')


def freeze_plan(file: str,
                kept: plans.FrozenPlan | None = None) -> plans.FrozenPlan:
  """Returns the plan of a study's file.

  Args:
    file: its path.
    kept: an earlier plan, whose points are checked already where they follow
      from the same file by the same code.

  Raises:
    RequestError: for the first thing in it that cannot be, or that would make
      a comparison unfair.
  """
  cost.keep_off_accelerators()
  sweep, constants = read_study_file(file)

  # The points, checked; where nothing has changed, those of the earlier plan.
  start = provenance.describe_this_start()
  code = {'commit': start['commit'], 'diff': start['diff']}
  inputs = ''
  if code['commit']:
    inputs = layout.json_checksum(plans.to_json(
        [code, jax.__version__, sweep.base.to_dict(), sweep.points, constants]))
  if kept is not None and inputs and kept.inputs == inputs:
    points = kept.points
  else:
    points = _points(sweep, constants)
  configs = [spec.apply_changes(sweep.base, row['changes'], 'it')
             for row in points]

  plan = _plan(file=file, sweep=sweep, constants=constants, points=points,
               configs=configs)
  frozen = plans.FrozenPlan(
      plan=plan, base_config=sweep.base.to_dict(), points=points,
      sources=cost.hash_data_of_configs(configs), code=code, inputs=inputs,
      files=dict(plugins.text_of_loaded_file))

  # Which seeds the study has may hang on everything else that is planned.
  offset = constants['SEED_OFFSET']
  if offset < 0:
    offset = frozen.seed_offset_of_hash
  return dataclasses.replace(
      frozen, plan=dataclasses.replace(plan, offset=offset))


def _plan(file: str, sweep: spec.Sweep, constants: Mapping,
          points: Sequence[Mapping], configs: Sequence) -> plans.Plan:
  """Returns the plan without the offset of its seeds.

  Args:
    file: the path of the study's file.
    sweep: the base and its variants.
    constants: the constants of the file, completed.
    points: the rows of Frozen.points.
    configs: the config of each of these.
  """
  measures = _measures(file=file, constants=constants, points=points,
                       configs=configs)
  variants = tuple(point.name for point in sweep.points
                   if point.name != sweep.base_name)

  # The sizes, of which the largest may be predicted.
  sizes, largest = tuple(constants['SIZES']), None
  if 'largest' in constants['SEEDS']:
    *others, largest = sizes
    sizes = tuple(others)
    _check_predictable(file, measures[0], configs)
  # With muP the values of the smallest size hold for all of them.
  tuned_sizes = sizes
  if all(config.model.parametrization == 'mup' for config in configs):
    tuned_sizes = sizes[:1]

  match_field = ''
  if constants['MATCH']:
    match_field = constants['MATCH_FIELD']
  of_phases = {name: x for name, x in constants.items(
      ) if name not in DEFAULT_OF_CONSTANT}
  return plans.Plan(
      name=sweep.name,
      question=constants['QUESTION'],
      file=file,
      base=sweep.base_name,
      variants=variants,
      sizes=sizes,
      largest=largest,
      tuned_sizes=tuned_sizes,
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
      settings=of_phases or None,
      replication=constants['REPLICATION'])


def _measures(file: str, constants: Mapping, points: Sequence[Mapping],
              configs: Sequence) -> list[plans.Measure]:
  """Returns the measures, each with what guessing gives."""
  bytes_per_token = _check_halves(configs[0])
  workloads = [row['workload'] for row in points]
  measures = []
  for entry in constants['MEASURES']:
    at = workloads.index(entry['workload'])
    is_text = entry['workload'] == plans.TEXT
    chance = measures_lib.score_of_guessing(
        measure=entry, config=configs[at], vocab=points[at]['vocab'],
        bytes_per_token=bytes_per_token if is_text else 0.0, file=file)
    measures.append(plans.Measure(**entry | {'chance': chance}))
  return measures


def _check_predictable(file: str, primary: plans.Measure, configs: Sequence
                       ) -> None:
  """Raises RequestError where a law of losses cannot predict a size."""
  are_cooled = all(
      curves.ends_cooled_down(run_config.flatten(c)) for c in configs)
  require(primary.better == plans.LOWER and are_cooled,
          f'{file}: SEEDS has `largest`, which a law of losses predicts: '
          'less must be better of the first measure, and optim.schedule must '
          "be 'wsd', 'cosine' or 'linear', with optim.decay_steps at 0")


def read_study_file(file: str) -> tuple[spec.Sweep, dict[str, Any]]:
  """Returns the base and its variants, and the constants of a study's file by
  their names, completed: TUNING as the plan has it, and MEASURES without
  `chance`s.

  Raises:
    RequestError: for what no study can be made of.
  """
  module = spec.load_sweep_module(file)
  constants = {}
  for name, default in DEFAULT_OF_CONSTANT.items():
    constants[name] = getattr(module, name, default)
    _check_form(file, name, constants[name])
  phases.check_phases(file)
  seeds = phases.default_seeds_by_phase() | constants['SEEDS']
  constants['SEEDS'] = _checked_seeds(file, seeds)
  for phase in phases.phases_of_study(seeds):
    for name, default in phase.constants.items():
      constants[name] = getattr(module, name, default)
      check_type(constants[name], default, f'{file}: {name}')
  sweep = spec.read_sweep_file(file, seeds=1, known=constants)
  _check_ranges(file, constants)
  _check_names(file, constants)

  # A file may leave out what follows from the rest of it.
  constants['TUNING'] = _tuning(file, constants['TUNING'], sweep.base)
  _check_overlaps(file, sweep, constants)
  workloads = constants['WORKLOADS']
  entries = constants['MEASURES']
  if not entries:
    entries = [_usual_measure(workload) for workload in workloads]
  constants[
      'MEASURES'] = measures_lib.complete_measures(entries, workloads, file)
  return sweep, constants


def _check_form(file: str, name: str, value: Any) -> None:
  """Raises RequestError for a constant of another type than it has."""
  default = DEFAULT_OF_CONSTANT[name]
  if name in _FORMS:
    kind, example = _FORMS[name]
  else:
    kind = numbers.Real if isinstance(default, float) else type(default)
    example = default
  require(isinstance(value, kind), f'{file}: {name} is {short(value)}: '
          f'write it as {example!r}')


def _checked_seeds(file: str, seeds: Mapping[str, Any]) -> dict[str, int]:
  """Returns the seeds of each phase, in the order of the phases."""
  for phase in seeds:
    one_of('phase of SEEDS', phase, phases.PHASES)
  ordered = {}
  for phase in phases.phases_of_study(seeds):
    number = ordered[phase.name] = seeds[phase.name]
    require(type(number) is int and phase.min_seeds <= number
            <= phases.SEEDS_BETWEEN_PHASES,
            f'{file}: SEEDS has {number!r} for {phase.name}: choose a whole '
            f'number from {phase.min_seeds} to {phases.SEEDS_BETWEEN_PHASES:,}')
  return ordered


# The ranges of the numbers of a study's file.
_RANGES = {
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
  """Raises RequestError for a number outside its range, and another match."""
  for name, bounds in _RANGES.items():
    check_number(f'{file}: {name}', constants[name], bounds)
  one_of('MATCH', constants['MATCH'], ('', *spec.MATCHABLE_COSTS))


def _check_names(file: str, constants: Mapping) -> None:
  """Raises RequestError for sizes or workloads that are none, or too few."""
  for name in ('SIZES', 'WORKLOADS'):
    for key, fields in constants[name].items():
      is_name = re.fullmatch(r'[\w=+-]+', str(key)) is not None
      require(is_name and isinstance(fields, Mapping),
              f'{file}: {name} has {key!r}: '
              f'{short(fields)}: write a name of letters and digits, and the '
              "fields that it changes, as 'small': {'model.d_model': 64}")
  least = FEWEST_SIZES
  if 'largest' in constants['SEEDS']:
    least += 1
  require(len(constants['SIZES']) >= least, f'{file}: SIZES has '
          f'{len(constants["SIZES"])} of them: this study has at least '
          f'{least}, since a verdict must agree over sizes')
  first = next(iter(constants['WORKLOADS']), '')
  require(first == plans.TEXT, f'{file}: WORKLOADS begins with '
          f'{first or "nothing"!r}: begin it with {plans.TEXT!r}, which probes '
          'stand beside')


def _usual_measure(workload: str) -> dict[str, str]:
  """Returns the loss of the text, or the accuracy of a probe."""
  figure = 'loss' if workload == plans.TEXT else 'accuracy'
  return {'workload': workload, 'figure': figure}


def _tuning(file: str, entries: Mapping, base) -> plans.Tuning:
  """Returns TUNING; `base` is the base's config."""
  for name in entries:
    one_of('entry of TUNING', name, ('fields', 'keep', 'rungs', 'extend'))
  lr = base.optim.lr
  fields = entries.get('fields', {'optim.lr': (lr / 2, lr, 2 * lr)})
  tuning = plans.Tuning(**{**entries, 'fields': fields})
  for name, values in fields.items():
    who = f'{file}: TUNING of {name}'
    are_several = isinstance(values, tuple | list) and len(values) > 1
    require(are_several and _rise_from_zero(values),
            f'{who} is {short(values)}: write two values or more above 0, '
            'rising')
    for value in values:
      spec.apply_changes(base, {name: value}, who)
  is_search = (_is_whole(tuning.rungs, 1, 10) and 0 < tuning.keep < 1
               and _is_whole(tuning.extend, 0, 10))
  require(is_search, f'{file}: TUNING is {short(entries)}: keep '
          'is a share between 0 and 1, rungs from 1 to 10, extend from 0 to 10')
  return tuning


def _rise_from_zero(values: Sequence) -> bool:
  """Returns whether each value is larger than the one before, and than 0."""
  return list(values) == sorted(set(values)) and values[0] > 0


def _is_whole(value: Any, least: int, most: int) -> bool:
  """Returns whether a value is a whole number of a range."""
  return type(value) is int and least <= value <= most


def _check_overlaps(file: str, sweep: spec.Sweep, constants: Mapping) -> None:
  """Raises RequestError for a field that two would set, or by which variants
  would not see the same data."""
  points = {point.name: point.changes for point in sweep.points}
  require(plans.SECOND_BASE not in points, f'{file}: a variant is called '
          f'{plans.SECOND_BASE!r}, which is what the study calls its base '
          'with other first parameters: call it otherwise')
  for name in _STUDY_FIELDS:
    value = sweep.base[name]
    require(not value, f'{file}: get_config() sets {name} to '
            f'{value!r}, which the study sets itself: leave it out')
  setters = {
      'the study itself': [_STUDY_FIELDS],
      'TUNING': [constants['TUNING'].fields],
      'a size': constants['SIZES'].values(),
      'a workload': constants['WORKLOADS'].values(),
      'a variant': points.values()}
  owners: dict[str, str] = {}
  for who, groups in setters.items():
    fields = set(itertools.chain(*groups))
    for field in fields:
      # Variants may be the base with other first parameters.
      if field == 'init_seed' and who == 'a variant':
        continue
      owner = owners.get(field)
      require(owner is None, f'{file}: {owner} and {who} both set {field}: '
              f'leave it to {owner}')
      changes_data = field.startswith(_DATA) and who in ('TUNING', 'a variant')
      require(not changes_data, f'{file}: {who} sets {field}: '
              'every variant of a study has the same data and as many steps as '
              'the base, or no difference would be its own')
    owners |= dict.fromkeys(fields, who)


def _points(sweep: spec.Sweep, constants: Mapping) -> list[dict]:
  """Returns the rows of Frozen.points, those of the base first."""
  work = []
  for size in constants['SIZES']:
    matched = _matched(sweep, constants, size)
    for workload in constants['WORKLOADS']:
      work += [(size, workload, point) for point in matched]
  work.sort(key=lambda row: row[2].name != sweep.base_name)
  rows = []
  for size, workload, point in progress.show_items(work, 'points checked'):
    rows.append(_row(sweep=sweep, constants=constants, size=size,
                     workload=workload, point=point))
  params = [row['params'] for row in rows if row['workload'] == plans.TEXT
            and row['variant'] == sweep.base_name]
  listed = ', '.join(f'{n:,}' for n in params)
  require(params == sorted(set(params)), f'{sweep.file}: the base has '
          f'{listed} parameters at the sizes '
          f'{", ".join(constants["SIZES"])}: write them smallest first')
  return rows


def _matched(sweep: spec.Sweep, constants: Mapping, size: str
             ) -> tuple[spec.Point, ...]:
  """Returns the variants as they are at a size: what is matched is solved on
  the text, and is the same on every workload."""
  who = f'{sweep.file}, size {size!r}'
  changes = _workload(sweep, constants, size, plans.TEXT)
  base = spec.apply_changes(sweep.base, changes, who)
  if not constants['MATCH']:
    return sweep.points
  with spec.prefix_errors(who):
    at_size = dataclasses.replace(sweep, base=base)
    solved = cost.match_costs(
        at_size, constants['MATCH'], constants['MATCH_FIELD'])
    return solved.points


def _workload(sweep: spec.Sweep, constants: Mapping, size: str, workload: str,
              tasks: tuple[str, ...] = ()) -> dict[str, Any]:
  """Returns what a size and a workload change in the base."""
  base, fields = sweep.base, constants['WORKLOADS'][workload]
  changes = dict(constants['SIZES'][size])
  if tasks or workload != plans.TEXT:
    changes['eval.tasks'] = ','.join(tasks)
  if workload == plans.TEXT:
    return changes | fields

  # A probe: what its objective does not read is as if it were not set.
  for name in objectives.OBJECTIVES['probe'].ignores:
    changes[name] = base_config.FIELDS[name].default

  def of_size(name: str) -> Any:
    return changes.get(name, base[name])

  # A schedule is as much longer as the run; reports are as a size has them.
  steps = fields.get('train.steps', of_size('train.steps'))
  longer = steps / of_size('train.steps')
  schedule = {name: round(of_size(name) * longer)
              for name in ('optim.warmup_steps', 'optim.decay_steps')}
  reports = {'eval.every_steps': steps, 'checkpoint.every_steps': steps,
             'log.every_steps': max(steps // 10, 1)}
  probe = {'objective': 'probe', 'data.source': f'probe:{workload}',
           'model.vocab_size': 0, 'model.max_len': 0}
  return reports | changes | schedule | probe | fields


def _row(sweep: spec.Sweep, constants: Mapping, size: str, workload: str,
         point: spec.Point) -> dict:
  """Returns the row of a variant at a size on a workload, once it is checked.
  """
  variant = f'variant {point.name!r}'
  where = f'{sweep.file}, {variant} at size {size!r} on {workload!r}'
  asked = [measure for measure in constants['MEASURES']
           if measure['workload'] == workload]
  with spec.prefix_errors(where):
    # The config of its runs.
    tasks = measures_lib.tasks_of_workload(constants['MEASURES'], workload)
    changes = _workload(sweep=sweep, constants=constants, size=size,
                        workload=workload, tasks=tasks) | point.changes
    config = spec.apply_changes(sweep.base, changes, 'it')

    # Whether they can run, with each value that is tried, and be compared.
    for measure in asked:
      measures_lib.check_task_has_figure(measure, config, variant)
    cost.check_config_of_point(config, changes)
    if workload == plans.TEXT:
      _check_tuned(config, constants['TUNING'])
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
    figures = cost.cost_of_run(config)._asdict()
    if workload == plans.TEXT:
      figures['body'] = cost.share_of_flops_without_vocabulary(config)
    vocab = cost.resolve_model(config).vocab_size
    guess = measures_lib.loss_of_guessing(asked, config, vocab)
  return {'variant': point.name, 'size': size, 'workload': workload,
          'changes': changes, 'matched': list(point.matched),
          **figures, 'vocab': vocab, 'guess': guess}


def _check_tuned(config, tuning: plans.Tuning) -> None:
  """Raises RequestError for a value of the search that a run cannot have."""
  for name, values in tuning.fields.items():
    for value in values:
      tried = spec.apply_changes(config, {name: value}, 'TUNING')
      preflight.check_config(tried, [name])


def _check_halves(config) -> float:
  """Reads what is held out of the text; returns the bytes of a token.

  Raises:
    RequestError: where it has no two halves.
  """
  tokenizer = tokenizers.load(config.data.tokenizer)
  require(bool(config.data.holdout_every or config.data.eval_source),
          'data.holdout_every is 0: a study needs text that is held out')
  for part in ('first', 'second'):  # see Phase.part
    half = spec.apply_changes(config, {'eval.part': part}, 'it')
    loaders = pipeline.make_evaluation_loaders(half, tokenizer)
  # The mean over the sources, each by its share.
  shares = sum(x.share for x in loaders)
  return sum(x.share * x.bytes_per_token for x in loaders) / shares
