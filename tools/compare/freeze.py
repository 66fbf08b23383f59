"""freeze: makes the plan of a study's file, checked before anything is run."""

import dataclasses
import math
import pathlib
from typing import Any

from configs import base as base_config
from configs.errors import RequestError, require
from tools.compare import cost, spec
from tools.compare import frozen as frozen_lib
from tools.compare import measures as measures_lib
from tools.compare import plan as plans
from tools.compare import tuning as tuning_lib
from training import limits, progress

PARTS = ('first', 'second')  # eval.part of tuning, and of all else


def freeze(file: str) -> frozen_lib.Frozen:
  """Returns the plan of a study's file.

  Raises:
    RequestError: for the first thing in it that cannot be, or that would make
      a comparison unfair.
  """
  from training.workdir import provenance, run_config
  cost.off_devices()
  study = spec.read_study_file(file)
  spec.refuse_names_alone(study.sweep)
  base, given = study.sweep.base, study.given
  points = _points(study)
  _check_tuned(study, points)
  bytes_per_token = _check_halves(
      spec.changed(base, points[0]['changes'], 'the base'))
  configs = [spec.changed(base, row['changes'], 'it') for row in points]
  mup = all(c.model.parametrization == 'mup' for c in configs)
  sizes = tuple(study.sizes)
  plan = plans.Plan(
      name=study.sweep.name, question=given['QUESTION'], file=file,
      base=study.sweep.base_name, variants=tuple(
          point.name for point in study.sweep.points
          if point.name != study.sweep.base_name),
      sizes=sizes, workloads=tuple(study.workloads),
      measures=tuple(_measure(own, base, points, bytes_per_token, file)
                     for own in study.measures),
      seeds=study.seeds, tuning=study.tuning, effect=float(given['EFFECT']),
      alpha=given['ALPHA'], q=given['Q'], power=given['POWER'],
      unstable=float(given['UNSTABLE']), match=given['MATCH'],
      match_field=given['MATCH_FIELD'] if given['MATCH'] else '',
      tuned_sizes=sizes[:1] if mup else sizes)
  least = min(config.train.steps for config in configs)
  share = tuning_lib.share(plan.tuning, 0)
  require(least * share >= 1, f'{file}: TUNING buys less than one run: its '
          f'first rung trains {share:.3g} of {least} steps, which is less than '
          'one step; take fewer rungs, or a larger keep')
  code = provenance.this_start()
  return frozen_lib.Frozen(
      plan, run_config.to_json(base), points, _sources(file, configs),
      {name: code[name] for name in ('commit', 'diff')})


def _points(study: spec.Study) -> list[dict]:
  """Returns the rows of Frozen.points, those of the base first."""
  base = study.sweep.base_name
  matched = {size: _matched(study, size) for size in study.sizes}
  work = [(size, workload, point) for size in study.sizes
          for workload in study.workloads for point in matched[size]]
  work.sort(key=lambda row: row[2].name != base)
  rows = [_row(study, *each) for each in progress.each(work, 'points checked')]
  params = [row['params'] for row in rows
            if (row['variant'], row['workload']) == (base, plans.TEXT)]
  require(params == sorted(set(params)), f'{study.file}: the base has '
          f'{", ".join(f"{n:,}" for n in params)} parameters at the sizes '
          f'{", ".join(study.sizes)}: write them smallest first')
  return rows


def _matched(study: spec.Study, size: str) -> tuple[spec.Point, ...]:
  """Returns the variants as they are at a size: what is matched is solved on
  the text, and is the same on every workload."""
  changes = _workload(study, size, plans.TEXT, ())
  sweep = dataclasses.replace(study.sweep, base=spec.changed(
      study.sweep.base, changes, f'{study.file}, size {size!r},'))
  what = study.given['MATCH']
  if not what:
    return sweep.points
  try:
    return cost.match(sweep, what, study.given['MATCH_FIELD']).points
  except RequestError as error:
    raise RequestError(f'{study.file}, size {size!r}, {error}') from error


def _workload(study: spec.Study, size: str, workload: str,
              tasks: tuple[str, ...]) -> dict[str, Any]:
  """Returns what a size and a workload change in the base."""
  base, own = study.sweep.base, study.workloads[workload]
  found = dict(study.sizes[size])
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


def _row(study: spec.Study, size: str, workload: str, point: spec.Point
         ) -> dict:
  variant = f'variant {point.name!r}'
  asked = [own for own in study.measures if own['workload'] == workload]
  try:
    changes = {**_workload(study, size, workload,
                           measures_lib.tasks(study.measures, workload)),
               **point.changes}
    config = spec.changed(study.sweep.base, changes, 'it')
    for own in asked:
      measures_lib.check_of_task(own, config, variant)
    cost.check(config, changes)
    require(config.eval.every_steps > 0, 'eval.every_steps is 0: a study '
            'compares held-out losses after the last step; set it to '
            'train.steps, or to less for curves and speed-ups')
    require(not config.init_from, f'init_from is {config.init_from!r}: a run '
            'of a study begins with parameters of its own')
    for own in asked:
      measures_lib.check_reported(own, config, variant)
    figures = cost.of(config)
    vocab = figures.model['model.vocab_size']
    guess = measures_lib.guess(asked, config, vocab)
  except RequestError as error:
    raise RequestError(f'{study.file}, {variant} at size {size!r} on '
                       f'{workload!r}: {error}') from error
  row = {'variant': point.name, 'size': size, 'workload': workload,
         'changes': changes, 'matched': list(point.matched),
         'params': figures.params, 'active_params': figures.active_params,
         'flops_per_token': figures.flops_per_token, 'tokens': figures.tokens,
         'vocab': vocab}
  return row | ({} if guess == math.log(vocab) else {'guess': guess})


def _check_tuned(study: spec.Study, points: list[dict]) -> None:
  """Raises RequestError where what is tuned cannot have one of its values, or
  is not read by a variant. The base alone is asked for those to which an edge
  may be moved."""
  from training import preflight
  smallest, extend = next(iter(study.sizes)), study.tuning.extend
  for row in points:
    if (row['size'], row['workload']) != (smallest, plans.TEXT):
      continue
    base = row['variant'] == study.sweep.base_name
    for moved in range((extend if base else 0) + 1):
      for tuned in tuning_lib.corners(study.tuning, moved):
        told = ', '.join(f'{name}={value:g}' for name, value in tuned.items())
        beyond = f', to which extend={extend} may move an edge,' * bool(moved)
        try:
          preflight.check_config(spec.changed(
              study.sweep.base, {**row['changes'], **tuned}, 'it'), tuned)
        except RequestError as error:
          raise RequestError(f'{study.file}: TUNING tries {told}{beyond} of '
                             f'variant {row["variant"]!r}: {error}') from error


def _measure(own: dict, base, points: list[dict], bytes_per_token: float,
             file: str) -> plans.Measure:
  point = next(row for row in points if row['workload'] == own['workload'])
  chance = measures_lib.chance(
      own, spec.changed(base, point['changes'], 'it'), point['vocab'],
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
        spec.changed(config, {'eval.part': part}, 'it'), tokenizer)
  return sum(x.share * x.bytes_per_token for x in loaders) / sum(
      x.share for x in loaders)


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
