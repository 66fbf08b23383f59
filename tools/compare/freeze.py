"""freeze: makes the plan of a study's file, checked before anything is run."""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
from typing import Any

import ml_collections

from configs import base as base_config
from configs.errors import RequestError, require
from tools.compare import frozen as frozen_lib
from tools.compare import measures as measures_lib
from tools.compare import plan as plans
from tools.compare import study_spec
from tools.compare import tuning as tuning_lib
from tools.compare import cost, matching, systems
from tools.compare import spec as sweep_spec
from training import limits, progress

PARTS = ('first', 'second')  # eval.part of tuning, and of all else


def freeze(file: str, workdir: str = '') -> frozen_lib.Frozen:
  """Returns the plan of a study's file.

  Args:
    file: its path.
    workdir: of the study, which may have begun there.

  Raises:
    RequestError: for the first thing in it that cannot be, or that would make
      a comparison unfair.
  """
  from training.workdir import provenance, run_config
  cost.off_devices()
  spec = study_spec.Spec(file)
  begun = bool(workdir) and (pathlib.Path(workdir) / 'study.json').exists()
  systems.refuse_names_alone(
      spec.sweep, frozen_lib.load(workdir).plan.variants if begun else ())
  base = spec.sweep.base
  seeds, tuning = study_spec.seeds(spec), study_spec.tuning(spec, base)
  measures = study_spec.measures(spec)
  points = _points(spec, measures)
  _check_tuned(spec, points, tuning)
  text = _config(base, points[0]['changes'], 'the base')
  bytes_per_token = _check_halves(text)
  configs = [_config(base, row['changes'], 'it') for row in points]
  mup = all(c.model.parametrization == 'mup' for c in configs)
  sizes = tuple(spec.sizes)
  plan = plans.Plan(
      name=pathlib.Path(file).stem, question=spec.given['QUESTION'], file=file,
      base=spec.sweep.base_name, variants=tuple(
          point.name for point in spec.sweep.points
          if point.name != spec.sweep.base_name),
      sizes=sizes, workloads=tuple(spec.workloads),
      measures=tuple(_measure(own, base, points, bytes_per_token, file)
                     for own in measures),
      seeds=seeds, tuning=tuning, effect=float(spec.given['EFFECT']),
      alpha=spec.given['ALPHA'], q=spec.given['Q'], power=spec.given['POWER'],
      unstable=float(spec.given['UNSTABLE']), match=spec.given['MATCH'],
      match_field=spec.given['MATCH_FIELD'] if spec.given['MATCH'] else '',
      tuned_sizes=sizes[:1] if mup else sizes)
  _check_budget(plan, configs)
  code = provenance.this_start()
  return frozen_lib.Frozen(
      plan, run_config.to_json(base), points, _sources(file, configs),
      {name: code[name] for name in ('commit', 'diff')})


def _config(base, changes: Mapping[str, Any], who: str
            ) -> ml_collections.ConfigDict:
  return sweep_spec.changed(base, changes, who)


def _points(spec: study_spec.Spec, measures: list[dict]) -> list[dict]:
  """Returns the rows of Frozen.points, those of the base first."""
  matched = {size: _matched(spec, size) for size in spec.sizes}
  work = [(size, workload, point) for size in spec.sizes
          for workload in spec.workloads for point in matched[size]]
  work.sort(key=lambda row: row[2].name != spec.sweep.base_name)
  rows = [_row(spec, measures, *each)
          for each in progress.each(work, 'points checked')]
  params = [row['params'] for row in rows
            if row['variant'] == spec.sweep.base_name
            and row['workload'] == plans.TEXT]
  require(params == sorted(set(params)), f'{spec.file}: the base has '
          f'{", ".join(f"{n:,}" for n in params)} parameters at the sizes '
          f'{", ".join(spec.sizes)}: write them smallest first')
  return rows


def _matched(spec: study_spec.Spec, size: str) -> tuple[sweep_spec.Point, ...]:
  """Returns the variants as they are at a size: what is matched is solved on
  the text, and is the same on every workload."""
  changes = _workload(spec, size, plans.TEXT, ())
  sweep = dataclasses.replace(spec.sweep, base=_config(
      spec.sweep.base, changes, f'{spec.file}, size {size!r},'))
  what = spec.given['MATCH']
  if not what:
    return sweep.points
  try:
    return matching.match(sweep, what, spec.given['MATCH_FIELD'],
                          lambda config: cost.figure(config, what)).points
  except RequestError as error:
    raise RequestError(f'{spec.file}, size {size!r}, {error}') from error


def _workload(spec: study_spec.Spec, size: str, workload: str,
              tasks: tuple[str, ...]) -> dict[str, Any]:
  """Returns what a size and a workload change in the base."""
  base, own = spec.sweep.base, spec.workloads[workload]
  found = dict(spec.sizes[size])
  if tasks or workload != plans.TEXT:
    found['eval.tasks'] = ','.join(tasks)
  if workload == plans.TEXT:
    return found | own
  from training import objectives
  defaults = base_config.base()
  unread = objectives.OBJECTIVES['probe'].ignores
  found |= {name: limits.get(defaults, name) for name in unread}
  of_size = lambda name: found.get(name, limits.get(base, name))
  steps = own.get('train.steps', of_size('train.steps'))
  longer = steps / of_size('train.steps')
  # A schedule is as much longer as the run; reports are as a size has them.
  schedule = {name: round(of_size(name) * longer)
              for name in ('optim.warmup_steps', 'optim.decay_steps')}
  reports = {'eval.every_steps': steps, 'checkpoint.every_steps': steps,
             'log.every_steps': max(steps // 10, 1)}
  return reports | found | schedule | {
      'objective': 'probe', 'data.source': f'probe:{workload}',
      'model.vocab_size': 0, 'model.max_len': 0} | own


def _row(spec: study_spec.Spec, measures: list[dict], size: str, workload: str,
         point: sweep_spec.Point) -> dict:
  from training import runs
  from training.data import pipeline
  who = f'{spec.file}, variant {point.name!r} at size {size!r} on {workload!r}'
  try:
    changes = {**_workload(spec, size, workload,
                           measures_lib.tasks(measures, workload)),
               **point.changes}
    config = _config(spec.sweep.base, changes, 'it')
    asked = [own for own in measures if own['workload'] == workload]
    for own in asked:
      measures_lib.check_of_task(own, config, f'variant {point.name!r}')
    runs.check_config(config)
    limits.refuse_unread_of(changes, config, runs.resolve_alone(config))
    require(not config.eval.patience, f'eval.patience is '
            f'{config.eval.patience}: every run of a study trains to its last '
            'step; leave it at 0')
    require(config.eval.every_steps > 0, 'eval.every_steps is 0: a study '
            'compares held-out losses after the last step; set it to '
            'train.steps, or to less for curves and speed-ups')
    require(not config.init_from, f'init_from is {config.init_from!r}: a run '
            'of a study begins with parameters of its own')
    pipeline.check_sources(config)
    for own in asked:
      measures_lib.check_reported(own, config, f'variant {point.name!r}')
    figures = cost.of(config)
    vocab = figures.model['model.vocab_size']
    guess = measures_lib.guess(asked, config, vocab)
  except RequestError as error:
    raise RequestError(f'{who}: {error}') from error
  row = {'variant': point.name, 'size': size, 'workload': workload,
          'changes': changes, 'matched': list(point.matched),
          'params': figures.params, 'active_params': figures.active_params,
          'flops_per_token': figures.flops_per_token, 'tokens': figures.tokens,
          'vocab': vocab}
  return row | ({} if guess == math.log(vocab) else {'guess': guess})


def _check_tuned(spec: study_spec.Spec, points: list[dict],
                 tuning: plans.Tuning) -> None:
  """Raises RequestError where what is tuned cannot have one of its values, or
  is not read by a variant. The base alone is asked for those to which an edge
  may be moved."""
  from training import runs
  smallest = next(iter(spec.sizes))
  for row in points:
    if (row['size'], row['workload']) != (smallest, plans.TEXT):
      continue
    base = row['variant'] == spec.sweep.base_name
    for moved in range((tuning.extend if base else 0) + 1):
      for tuned in tuning_lib.corners(tuning, moved):
        told = ', '.join(f'{name}={value:g}' for name, value in tuned.items())
        beyond = f', to which extend={tuning.extend} may move an edge,'
        try:
          runs.check_config(_config(
              spec.sweep.base, {**row['changes'], **tuned}, 'it'), tuned)
        except RequestError as error:
          raise RequestError(
              f'{spec.file}: TUNING tries {told}{beyond * bool(moved)} of '
              f'variant {row["variant"]!r}: {error}') from error


def _measure(own: dict, base, points: list[dict], bytes_per_token: float,
             file: str) -> plans.Measure:
  point = next(row for row in points if row['workload'] == own['workload'])
  chance = measures_lib.chance(
      own, _config(base, point['changes'], 'it'), point['vocab'],
      bytes_per_token if own['workload'] == plans.TEXT else 0.0, file)
  return plans.Measure(own['name'], own['workload'], own['figure'],
                       own['better'], chance)


def _check_halves(config) -> float:
  """Reads what is held out of the text; returns the bytes of a token.

  Raises:
    RequestError: where it has no two halves.
  """
  from training.data import pipeline, tokenizers
  tokenizer = tokenizers.load(config.data.tokenizer)
  require(bool(config.data.holdout_every or config.data.eval_source),
          'data.holdout_every is 0: a study needs text that is held out')
  for part in PARTS:
    loaders = pipeline.held_out(
        sweep_spec.changed(config, {'eval.part': part}, 'it'), tokenizer)
  return sum(x.share * x.bytes_per_token for x in loaders) / sum(
      x.share for x in loaders)


def _check_budget(plan: plans.Plan, configs) -> None:
  least = min(config.train.steps for config in configs)
  share = plan.tuning.keep ** (plan.tuning.rungs - 1)
  require(least * share >= 1, f'{plan.file}: TUNING buys less than one run: '
          f'its first rung trains {share:.3g} of {least} steps, which is less '
          'than one step; take fewer rungs, or a larger keep')


def _sources(file: str, configs) -> dict[str, str]:
  """Returns the hashes of the file and of the data that lies here: of each part
  of a mixture, and under its own name that of its last part, as ever."""
  from training.data import sources
  found = {'file': frozen_lib.digest(pathlib.Path(file).read_bytes())}
  for config in configs:
    for name in filter(None, (config.data.source, config.data.eval_source)):
      for _, source in [] if name in found else sources.parse(name):
        if not source.drawn:
          found[source.name] = found[name] = source.digest()
  return found
