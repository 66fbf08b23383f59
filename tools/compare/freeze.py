"""freeze: makes the plan of a study's file, checked before anything is run.

The file holds `get_config()` and `sweep(add)` as a sweep's does; `SIZES`, the
changes of each size by its name, smallest first; and `EFFECT`, the smallest
difference of the first measure that is wanted. The rest has defaults: `STUDY`.
"""

from collections.abc import Mapping
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
from training import objectives, preflight, progress
from training.data import tokenizers
from training.objectives import pipeline
from training.workdir import provenance, run_config

# What a study's file may hold, with its default; None: it must. So it may what
# its phases have (Phase.constants).
STUDY: dict[str, Any] = {
    'QUESTION': '',
    'SIZES': None,
    'EFFECT': None,
    # The runs that measures come from, with the fields in which they leave the
    # base: 'text', and probes by their names.
    'WORKLOADS': {plans.TEXT: {}},
    # Of each {'workload', 'figure', 'better', 'name', 'chance'}; derived: the
    # loss of the text, and the accuracy of each probe.
    'MEASURES': (),
    'SEEDS': {name: x.seeds for name, x in phases.PHASES.items() if x.seeds},
    # 'fields': the values of each that are tried; derived: half of the base's
    # learning rate, the rate, and twice the rate.
    'TUNING': {},
    'ALPHA': 0.05, 'Q': 0.05, 'POWER': 0.8, 'UNSTABLE': 0.1,
    'FLOOR': 0.0,  # of the loss, for one of two laws of compute multipliers
    'MARGIN': 0.0,  # of equivalence; 0: that is not asked for
    'LEAST_SNR': 0.0,  # of measures beside the first one; 0: all go on
    'TARGET': 0.0,  # a loss of the text to be reached; 0: none
    'MATCH': '', 'MATCH_FIELD': spec.MATCH_FIELD,
    # Another number gives fresh seeds to a second study of the same; -1: drawn
    # by the plan's hash.
    'REPLICATION': 1, 'SEED_OFFSET': -1,
}
# The type of what has no default to tell it, and an example.
_FORMS = {'SIZES': (dict, {'small': {'model.d_model': 32}, 'middle': ...}),
          'EFFECT': (numbers.Real, 0.02),
          'MEASURES': (tuple | list, ({'figure': 'loss'},))}
LEAST_SIZES = 3
# Fields that are the study's own.
_STUDY_FIELDS = ('seed', 'init_seed', 'eval.part')
# Fields by which a run sees other data, or more of it, than the base's.
_DATA = (*spec.BATCHES, 'train.steps', 'train.grad_accumulation', 'eval.')


def freeze(file: str, kept: plans.Frozen | None = None) -> plans.Frozen:
  """Returns the plan of a study's file.

  Args:
    file: its path.
    kept: an earlier plan, whose points are checked already where they follow
      from the same file by the same code.

  Raises:
    RequestError: for the first thing in it that cannot be, or that would make
      a comparison unfair.
  """
  cost.off_devices()
  sweep, constants = read_study_file(file)
  code = {name: provenance.this_start()[name] for name in ('commit', 'diff')}
  inputs = code['commit'] and layout.checksum(plans.to_json(
      [code, jax.__version__, sweep.base.to_dict(), sweep.points, constants]))
  points = (kept.points if kept and kept.inputs and kept.inputs == inputs
            else _points(sweep, constants))
  configs = [spec.changed(sweep.base, row['changes'], 'it') for row in points]
  bytes_per_token = _check_halves(configs[0])
  mup = all(c.model.parametrization == 'mup' for c in configs)
  measures = []
  for measure in constants['MEASURES']:
    at = [row['workload'] for row in points].index(measure['workload'])
    measures.append(plans.Measure(**measure | {'chance': measures_lib.chance(
        measure, configs[at], points[at]['vocab'],
        bytes_per_token * (measure['workload'] == plans.TEXT), file)}))
  last = [*constants['SIZES']][-1] if 'largest' in constants['SEEDS'] else None
  sizes = tuple(size for size in constants['SIZES'] if size != last)
  if last:
    require(measures[0].better == plans.LOWER and all(
        curves.cooled(run_config.flatten(config)) for config in configs),
            f'{file}: SEEDS has `largest`, which a law of losses predicts: '
            'less must be better of the first measure, and optim.schedule must '
            "be 'wsd', 'cosine' or 'linear', with optim.decay_steps at 0")
  plan = plans.Plan(
      name=sweep.name, question=constants['QUESTION'], file=file,
      base=sweep.base_name, variants=tuple(
          point.name for point in sweep.points
          if point.name != sweep.base_name),
      sizes=sizes, workloads=tuple(constants['WORKLOADS']),
      measures=tuple(measures), seeds=constants['SEEDS'],
      tuning=constants['TUNING'], effect=float(constants['EFFECT']),
      alpha=constants['ALPHA'], q=constants['Q'], power=constants['POWER'],
      unstable=float(constants['UNSTABLE']), match=constants['MATCH'],
      match_field=constants['MATCH_FIELD'] if constants['MATCH'] else '',
      tuned_sizes=sizes[:1 if mup else None], largest=last,
      margin=float(constants['MARGIN']) or None,
      floor=float(constants['FLOOR']) or None,
      least_snr=float(constants['LEAST_SNR']) or None,
      settings={name: x for name, x in constants.items() if name not in STUDY}
      or None, replication=constants['REPLICATION'],
      target=float(constants['TARGET']) or None)
  frozen = plans.Frozen(plan, sweep.base.to_dict(), points,
                        cost.contents(configs), code, inputs=inputs or '')
  offset = constants['SEED_OFFSET']
  return dataclasses.replace(frozen, plan=dataclasses.replace(
      plan, offset=frozen.drawn if offset < 0 else offset))


def read_study_file(file: str) -> tuple[spec.Sweep, dict[str, Any]]:
  """Returns the base and its variants, and the constants of a study's file by
  the names of STUDY, completed: TUNING as the plan has it, and MEASURES without
  `chance`s.

  Raises:
    RequestError: for what no study can be made of.
  """
  module, constants = spec.module_of(file), {}
  for name, default in STUDY.items():
    kind, form = _FORMS.get(name, (
        numbers.Real if isinstance(default, float) else type(default), default))
    constants[name] = value = getattr(module, name, default)
    require(isinstance(value, kind), f'{file}: {name} is {short(value)}: '
            f'write it as {form!r}')
  seeds = STUDY['SEEDS'] | constants['SEEDS']
  for phase in seeds:
    one_of('phase of SEEDS', phase, phases.PHASES)
  constants['SEEDS'] = {phase.name: seeds[phase.name]
                        for phase in phases.of(seeds)}
  for phase in phases.of(seeds):
    number = seeds[phase.name]
    require(type(number) is int and phase.least <= number <= phases.APART,
            f'{file}: SEEDS has {number!r} for {phase.name}: choose a whole '
            f'number from {phase.least} to {phases.APART:,}')
    for name, default in phase.constants.items():
      constants[name] = getattr(module, name, default)
      check_type(constants[name], default, f'{file}: {name}')
  sweep = spec.read_sweep_file(file, seeds=1, known=constants)
  for name, most in (('EFFECT', 1e30), ('ALPHA', 1), ('Q', 1), ('POWER', 1)):
    check_number(f'{file}: {name}', constants[name], (('>', 0), ('<', most)))
  for name in ('MARGIN', 'FLOOR', 'LEAST_SNR', 'TARGET'):
    check_number(f'{file}: {name}', constants[name], (('>=', 0), ('<', 1e30)))
  check_number(f'{file}: UNSTABLE', constants['UNSTABLE'],
               (('>=', 0), ('<=', 1)))
  check_number(f'{file}: REPLICATION', constants['REPLICATION'],
               (('>=', 1), ('<=', 10_000)))
  check_number(f'{file}: SEED_OFFSET', constants['SEED_OFFSET'],
               (('>=', -1), ('<=', plans.STUDY_APART * plans.PLACES)))
  one_of('MATCH', constants['MATCH'], ('', *spec.MATCH))
  for name in ('SIZES', 'WORKLOADS'):
    for key, fields in constants[name].items():
      require(re.fullmatch(r'[\w=+-]+', str(key)) is not None
              and isinstance(fields, Mapping), f'{file}: {name} has {key!r}: '
              f'{short(fields)}: write a name of letters and digits, and the '
              "fields that it changes, as 'small': {'model.d_model': 64}")
  least = LEAST_SIZES + ('largest' in constants['SEEDS'])
  require(len(constants['SIZES']) >= least, f'{file}: SIZES has '
          f'{len(constants["SIZES"])} of them: this study has at least '
          f'{least}, since a verdict must agree over sizes')
  workloads = constants['WORKLOADS']
  require(next(iter(workloads), '') == plans.TEXT, f'{file}: WORKLOADS begins '
          f'with {next(iter(workloads), "nothing")!r}: begin it with '
          f'{plans.TEXT!r}, which probes stand beside')
  constants['TUNING'] = _tuning(file, constants['TUNING'], sweep.base)
  _check_overlaps(file, sweep, constants)
  constants['MEASURES'] = measures_lib.completed(constants['MEASURES'] or [
      {'workload': name, 'figure': 'loss' if name == plans.TEXT else 'accuracy'}
      for name in workloads], workloads, file)
  return sweep, constants


def _tuning(file: str, entries: Mapping, base) -> plans.Tuning:
  """Returns TUNING; `base` is the base's config."""
  for name in entries:
    one_of('entry of TUNING', name, ('fields', 'keep', 'rungs', 'extend'))
  lr = base.optim.lr
  fields = entries.get('fields', {'optim.lr': (lr / 2, lr, 2 * lr)})
  tuning = plans.Tuning(**{**entries, 'fields': fields})
  for name, values in fields.items():
    who = f'{file}: TUNING of {name}'
    require(isinstance(values, tuple | list) and len(values) > 1
            and list(values) == sorted(set(values)) and values[0] > 0,
            f'{who} is {short(values)}: write two values or more above 0, '
            'rising')
    for value in values:
      spec.changed(base, {name: value}, who)
  require(type(tuning.rungs) is int and 1 <= tuning.rungs <= 10
          and type(tuning.extend) is int and 0 <= tuning.extend <= 10
          and 0 < tuning.keep < 1, f'{file}: TUNING is {short(entries)}: keep '
          'is a share between 0 and 1, rungs from 1 to 10, extend from 0 to 10')
  return tuning


def _check_overlaps(file: str, sweep: spec.Sweep, constants: Mapping) -> None:
  """Raises RequestError for a field that two would set, or by which variants
  would not see the same data."""
  points = {point.name: point.changes for point in sweep.points}
  require(plans.AGAIN not in points, f'{file}: a variant is called '
          f'{plans.AGAIN!r}, which is what the study calls its base with other '
          'first parameters: call it otherwise')
  for name in _STUDY_FIELDS:
    value = sweep.base[name]
    require(not value, f'{file}: get_config() sets {name} to '
            f'{value!r}, which the study sets itself: leave it out')
  owners: dict[str, str] = {}
  for who, groups in (
      ('the study itself', [_STUDY_FIELDS]),
      ('TUNING', [constants['TUNING'].fields]),
      ('a size', constants['SIZES'].values()),
      ('a workload', constants['WORKLOADS'].values()),
      ('a variant', points.values())):
    fields = set(itertools.chain(*groups))
    for field in fields:
      # Variants may be the base with other first parameters.
      twin = field == 'init_seed' and who == 'a variant'
      require(field not in owners or twin, f'{file}: {owners.get(field)} and '
              f'{who} both set {field}: leave it to {owners.get(field)}')
      require(who not in ('TUNING', 'a variant') or twin
              or not field.startswith(_DATA), f'{file}: {who} sets {field}: '
              'every variant of a study has the same data and as many steps as '
              'the base, or no difference would be its own')
    owners |= dict.fromkeys(fields, who)


def _points(sweep: spec.Sweep, constants: Mapping) -> list[dict]:
  """Returns the rows of Frozen.points, those of the base first."""
  work = [(size, workload, point) for size in constants['SIZES']
          for matched in [_matched(sweep, constants, size)]
          for workload in constants['WORKLOADS'] for point in matched]
  work.sort(key=lambda row: row[2].name != sweep.base_name)
  rows = [_row(sweep, constants, *each)
          for each in progress.each(work, 'points checked')]
  params = [row['params'] for row in rows if (
      row['variant'], row['workload']) == (sweep.base_name, plans.TEXT)]
  require(params == sorted(set(params)), f'{sweep.file}: the base has '
          f'{", ".join(f"{n:,}" for n in params)} parameters at the sizes '
          f'{", ".join(constants["SIZES"])}: write them smallest first')
  return rows


def _matched(sweep: spec.Sweep, constants: Mapping, size: str
             ) -> tuple[spec.Point, ...]:
  """Returns the variants as they are at a size: what is matched is solved on
  the text, and is the same on every workload."""
  who = f'{sweep.file}, size {size!r}'
  base = spec.changed(sweep.base, _workload(sweep, constants, size, plans.TEXT),
                      who)
  if not constants['MATCH']:
    return sweep.points
  with spec.naming(who):
    return cost.match(dataclasses.replace(sweep, base=base), constants['MATCH'],
                      constants['MATCH_FIELD']).points


def _workload(sweep: spec.Sweep, constants: Mapping, size: str, workload: str,
              tasks: tuple[str, ...] = ()) -> dict[str, Any]:
  """Returns what a size and a workload change in the base."""
  base, fields = sweep.base, constants['WORKLOADS'][workload]
  changes = dict(constants['SIZES'][size])
  if tasks or workload != plans.TEXT:
    changes['eval.tasks'] = ','.join(tasks)
  if workload == plans.TEXT:
    return changes | fields
  changes |= {name: base_config.FIELDS[name].default
              for name in objectives.OBJECTIVES['probe'].ignores}
  of_size = lambda name: changes.get(name, base[name])
  steps = fields.get('train.steps', of_size('train.steps'))
  longer = steps / of_size('train.steps')
  # A schedule is as much longer as the run; reports are as a size has them.
  schedule = {name: round(of_size(name) * longer)
              for name in ('optim.warmup_steps', 'optim.decay_steps')}
  reports = {'eval.every_steps': steps, 'checkpoint.every_steps': steps,
             'log.every_steps': max(steps // 10, 1)}
  return reports | changes | schedule | {
      'objective': 'probe', 'data.source': f'probe:{workload}',
      'model.vocab_size': 0, 'model.max_len': 0} | fields


def _row(sweep: spec.Sweep, constants: Mapping, size: str, workload: str,
         point: spec.Point) -> dict:
  variant = f'variant {point.name!r}'
  where = f'{sweep.file}, {variant} at size {size!r} on {workload!r}'
  asked = [measure for measure in constants['MEASURES']
           if measure['workload'] == workload]
  with spec.naming(where):
    changes = {**_workload(sweep, constants, size, workload, measures_lib.tasks(
        constants['MEASURES'], workload)), **point.changes}
    config = spec.changed(sweep.base, changes, 'it')
    for measure in asked:
      measures_lib.check_of_task(measure, config, variant)
    cost.check(config, changes)
    for name, values in constants['TUNING'].fields.items():
      for value in values if workload == plans.TEXT else ():
        preflight.check_config(spec.changed(config, {name: value}, 'TUNING'),
                               [name])
    require(config.eval.every_steps > 0, 'eval.every_steps is 0: a study '
            'compares held-out losses after the last step; set it to '
            'train.steps, or to less for curves and speed-ups')
    require(not config.init_from, f'init_from is {config.init_from!r}: a run '
            'of a study begins with parameters of its own')
    share = phases.share(constants['TUNING'], 0)
    require(config.train.steps * share >= 1, 'TUNING buys less than one run: '
            f'its first rung trains {share:.3g} of {config.train.steps} steps, '
            'which is less than one step; take fewer rungs, or a larger keep')
    figures = cost.of(config)
    vocab = cost.resolved(config).vocab_size
    guess = measures_lib.guess(asked, config, vocab)
    body = {'body': cost.body(config)} if workload == plans.TEXT else {}
  return {'variant': point.name, 'size': size, 'workload': workload,
          'changes': changes, 'matched': list(point.matched),
          **figures._asdict(), **body, 'vocab': vocab, 'guess': guess}


def _check_halves(config) -> float:
  """Reads what is held out of the text; returns the bytes of a token.

  Raises:
    RequestError: where it has no two halves.
  """
  tokenizer = tokenizers.load(config.data.tokenizer)
  require(bool(config.data.holdout_every or config.data.eval_source),
          'data.holdout_every is 0: a study needs text that is held out')
  for part in ('first', 'second'):  # see Phase.part
    loaders = pipeline.held_out(
        spec.changed(config, {'eval.part': part}, 'it'), tokenizer)
  return sum(x.share * x.bytes_per_token for x in loaders) / sum(
      x.share for x in loaders)
