"""The trainer of real runs: each phase is a sweep in a folder of the study.

W/noise, W/tune-1, ... have a sweep.json, a ledger and points/NAME/seed-S as any
sweep has (layout.py). So a killed study goes on, several runners share one, and
`python -m tools.compare status W/noise` shows how far a phase is. Where the
plan was amended, and a phase that has run is no longer the one that is planned,
it runs anew in W/noise.1.
"""

from collections.abc import Mapping, Sequence
import math
import pathlib
import time

import numpy as np

from configs.errors import EnvironmentFailure, require
from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans
from tools.compare.phases import Run, steps_of
from tools.compare import layout
from tools.compare import ledger as ledger_lib
from tools.compare import curves

POLL_SECONDS = 1.0  # between two looks at what other runners have done
# Times the loss of guessing, above which a run counts as diverged: one that
# has learnt nothing ends near it.
GUESSING = 1.2


class Stopped(Exception):
  """A signal came: what was under way is saved."""


class Trainer:
  """Trains through the ledger and the runner of sweeps.

  Args:
    workdir: of the study.
    frozen: its plan.
    parallel: processes at once.
    group: how many runs one program holds at most.
    retry: whether to take up again what failed.
  """

  def __init__(self, workdir, frozen: frozen_lib.Frozen, parallel: int = 1,
               group: int = 8, retry: bool = False):
    self._workdir = pathlib.Path(workdir)
    self._frozen = frozen
    self._parallel, self._group = parallel, group
    self._retry = retry

  def train(self, folder: str, runs: Sequence[Run]) -> list[plans.Outcome]:
    """Returns the outcome of each run, once all of them have ended.

    Raises:
      Stopped: after a signal.
      EnvironmentFailure: where runs failed that did not diverge.
    """
    description = self.describe(folder, runs)
    path = compatible(self._workdir / folder, description)
    with ledger_lib.Ledger(path) as ledger:
      with ledger.transaction():
        if (path / 'sweep.json').exists():
          description = layout.merged(
              layout.load_description(path), description)
        layout.save_description(path, description)
      ledger.add((run.point, run.seed, ()) for run in runs)
      ledger.recover()
      if self._retry:
        _retry(path, description, ledger)
      self._wait(path, description, ledger, runs)
      states = {(row.point, row.seed): (row.state, row.error)
                for row in ledger.runs()}
    return self.outcomes(path, description, runs, states)

  def _wait(self, path, description, ledger, runs: Sequence[Run]) -> None:
    """Works, alone or beside other runners, until all of `runs` have ended."""
    wanted = {(run.point, run.seed) for run in runs}
    told = False
    while True:
      for row in ledger.runs(ledger_lib.PENDING):
        if (row.point, row.seed) not in wanted:  # of a plan that was amended
          ledger.drop(row.id)
      ended = {(row.point, row.seed) for row in ledger.runs()
               if row.state in ledger_lib.ENDED}
      if wanted <= ended:
        return
      if not self.work(path, description, ledger):
        raise Stopped
      ended = {(row.point, row.seed) for row in ledger.runs()
               if row.state in ledger_lib.ENDED}
      if left := wanted - ended:
        if not told:
          print(f'{path}: other runners have the last {len(left)} runs',
                flush=True)
        told = True
        time.sleep(POLL_SECONDS)

  def work(self, path: pathlib.Path, description: dict, ledger) -> bool:
    """Trains what is pending; returns whether it was not told to stop."""
    from tools.compare import local
    local.enter(path, ledger)
    return local.Runner(description, path, ledger, self._parallel, self._group
                        ).run()

  def describe(self, folder: str, runs: Sequence[Run]) -> dict:
    """Returns what sweep.json holds of a phase."""
    plan, rows = self._frozen.plan, {}
    for run in runs:
      if run.point not in rows:
        point = self._frozen.point_of(run)
        rows[run.point] = {
            'name': run.point, 'variant': run.variant, 'size': run.size,
            'workload': run.workload,
            'changes': plans.to_json(run.changes), 'seeds': [], 'tasks': [],
            # A run may take fewer steps than its point.
            'tokens': round(point['tokens'] / self._frozen.steps(point)
                            * steps_of(self._frozen, run)),
            **{name: point[name] for name in (
                'matched', 'params', 'active_params', 'flops_per_token')}}
      rows[run.point]['seeds'].append(run.seed)
    return {'name': f'{plan.name}, {folder}', 'file': plan.file,
            'match': plan.match, 'match_field': plan.match_field,
            'base': runs[0].point, 'base_config': self._frozen.base_config,
            'paired': True, 'points': list(rows.values()),
            'sources': {name: held
                        for name, held in self._frozen.sources.items()
                        if name != 'file'}}

  def outcomes(self, path: pathlib.Path, description: dict,
               runs: Sequence[Run], states: Mapping) -> list[plans.Outcome]:
    """Returns what the runs gave, as it lies on disk."""
    sweep = curves.read(path, description, states)
    require(not sweep.strangers, f'{path} holds runs of another config than '
            f'the plan says: {"; ".join(sweep.strangers[:3])}'
            + '; ...' * (len(sweep.strangers) > 3) + '; move them away')
    points = {point.name: point for point in sweep.points}
    found, failed = [], []
    for run in runs:
      point = points[run.point]
      own = point.runs[run.seed]
      if own.state == ledger_lib.FAILED and not ended_badly(own):
        failed.append(f'{run.point}, seed {run.seed}: {own.error}')
      elif not (figures(own) or ended_badly(own)):
        failed.append(f'{run.point}, seed {run.seed}: it was not evaluated '
                      'after its last step; move its folder away')
      else:
        found.append(self._outcome(run, point, own))
    if failed:
      raise EnvironmentFailure(
          f'{path}: {len(failed)} runs failed that did not diverge: '
          + '; '.join(failed[:3]) + ('; ...' if failed[3:] else '')
          + ': see log.txt in their folders; --retry takes them up again')
    return found

  def _outcome(self, run: Run, point: curves.Point, own: curves.Run
               ) -> plans.Outcome:
    plan = self._frozen.plan
    row = self._frozen.point_of(run)
    loss = own.final if own.final is not None else math.inf
    values = {measure.name: final(own, measure.figure)
              for measure in plan.of_workload(run.workload)}
    diverged = (ended_badly(own) or not math.isfinite(loss)
                or loss > GUESSING * self._frozen.guess(row))
    for measure in plan.of_workload(run.workload):
      if diverged:
        values[measure.name] = measure.chance
      require(values[measure.name] is not None, f'measure {measure.name!r} is '
              f'{measure.figure!r}, which {run.point}, seed {run.seed}, has '
              f'not reported: it has {", ".join(figures(own)) or "nothing"}')
    trained = point.curve(run.seed, 'train')
    tokens = float(trained.tokens[-1]) if len(trained.tokens) else 0.0
    seconds = float(trained.seconds[-1]) if len(trained.seconds) else math.nan
    return plans.Outcome(
        run.phase, run.variant, run.size, run.workload, run.seed, values,
        diverged, tokens * point.flops_per_token, seconds, point.params,
        dict(run.changes), loss,
        _curve(point, run.seed) if run.phase == 'confirm' else {})


def _retry(path: pathlib.Path, description: dict, ledger) -> None:
  """Makes what failed pending again, but for what diverged, which is done."""
  failed = ledger.runs(ledger_lib.FAILED)
  sweep = curves.read(path, description, {})
  points = {point.name: point for point in sweep.points}
  for row in failed:
    run = points[row.point].runs[row.seed]
    if not run.config or not ended_badly(run):
      ledger.adopt(row.id, ledger_lib.FAILED, ledger_lib.PENDING)


def compatible(path: pathlib.Path, description: dict) -> pathlib.Path:
  """Returns `path`, or path.1, path.2, ...: the first that is not there yet, or
  whose sweep is the described one as far as both have the same points and know
  what their data held."""
  number = 0
  at = path
  while (at / 'sweep.json').exists():
    old = layout.load_description(at)
    if not layout.unlike(old, description) and all(
        description['sources'].get(name, held) == held
        for name, held in old['sources'].items()):
      return at
    number += 1
    at = path.with_name(f'{path.name}.{number}')
  return at


def ended_badly(run: curves.Run) -> bool:
  """Whether a run ended after too many bad steps, or with parameters that are
  not finite; not whether it failed otherwise."""
  rows = [row for row in run.rows if row['split'] == 'train']
  if not rows:
    return False
  last, most = rows[-1], run.config['train.max_bad_steps']
  # The step after so many was under way, and may have been a good one.
  return any(row.get('bad_in_row', 0) >= most for row in rows) or (
      'param_norm' in last and last['param_norm'] is None)


def figures(run: curves.Run) -> dict[str, float]:
  """Returns what a run reported of what is held out after its last step."""
  found = {}
  for row in run.rows:
    if row['split'] == 'eval' and row['step'] == run.config['train.steps']:
      found |= {name: value for name, value in row.items()
                if name not in ('split', 'step')}
  return found


def final(run: curves.Run, figure: str) -> float | None:
  """Returns a figure after the last step; None where it is not there, or not
  finite."""
  value = figures(run).get(figure) if run.config else None
  return float(value) if isinstance(value, int | float) else None


def _curve(point: curves.Point, seed: int) -> dict[str, list[float]]:
  """Returns the held-out losses of a run that are finite."""
  curve = point.curve(seed, 'eval')
  good = np.isfinite(curve.loss)
  warm = curve.step >= point.runs[seed].config['optim.warmup_steps']
  return {name: getattr(curve, name)[good].tolist()
          for name in ('step', 'tokens', 'flops', 'seconds', 'loss')
          } | {'warm': warm[good].tolist()}
