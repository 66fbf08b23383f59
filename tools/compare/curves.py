"""The runs of a sweep as they lie on disk: curves, final losses, evaluations.

W/sweep.json says what was to run, W/ledger.sqlite what became of it, and
W/points/NAME/seed-S are plain workdirs.
"""

from collections.abc import Mapping
import dataclasses
import functools
import sys
from typing import Any

import numpy as np

from tools.compare import layout
from tools.compare import ledger as ledger_lib
from tools.compare import statistics
from training.data import ramp
from training.workdir import metrics, run_config, schema

# What a curve can be drawn against: field of Curve, and its name to a reader.
AXES = {'tokens': 'tokens', 'flops': 'FLOPs of the model',
        'seconds': 'seconds of training'}
SPLITS = {'eval': 'held-out loss', 'train': 'training loss'}


@dataclasses.dataclass(frozen=True)
class Curve:
  """Figures of one run at rising steps; NaN where one is not known.

  Attributes:
    tokens, flops: seen and spent so far.
    seconds: of training steps so far, without compiling, evaluating, saving.
    loss: in nats per token.
  """
  step: np.ndarray
  tokens: np.ndarray
  flops: np.ndarray
  seconds: np.ndarray
  loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
  """One seed of a point.

  Attributes:
    state: as the ledger has it: pending, running, owed, done, failed, ...
    error: of a failed run, else ''.
    config: by dotted name; empty where the run never started.
    rows: of its metrics.jsonl.
    evaluations: of its evaluation JSON, by task.
    strange: the fields in which its config is not the sweep's.
  """
  seed: int
  state: str
  error: str
  config: Mapping[str, Any]
  rows: tuple[Mapping[str, Any], ...]
  evaluations: Mapping[str, Any]
  strange: tuple[str, ...] = ()

  @property
  def final(self) -> float | None:
    """The held-out loss after the last step; None where there is none.

    A run has it once it is trained, whatever it still owes or fails at.
    """
    if not self.config:
      return None
    last = self.config['train.steps']
    losses = [row['loss'] for row in self.rows
              if row['split'] == 'eval' and row['step'] == last
              and row.get('loss') is not None]
    return losses[-1] if losses else None

  @property
  def is_whole(self) -> bool:
    """Whether it is done and has all that it was to have: a held-out loss,
    unless it was to do tasks alone."""
    return self.state == 'done' and (
        self.final is not None
        or bool(self.config) and not self.config['eval.every_steps'])


@dataclasses.dataclass(frozen=True)
class Point:
  """A variant: what it changes, what it costs, its runs by seed.

  Attributes:
    changes: the fields in which it differs from the base, by dotted name.
    matched: of these, the ones that were solved for to match a cost.
  """
  name: str
  changes: Mapping[str, Any]
  matched: tuple[str, ...]
  params: int
  active_params: int
  flops_per_token: float
  tokens: int
  runs: Mapping[int, Run]

  @functools.cached_property
  def finals(self) -> dict[int, float]:
    """The final held-out loss of each seed that has one."""
    return {seed: run.final for seed, run in self.runs.items()
            if run.final is not None}

  def curve(self, seed: int, split: str) -> Curve:
    """The losses of one run; null ones (not finite) are NaN."""
    run = self.runs[seed]
    rows = [row for row in run.rows
            if row['split'] == split and 'loss' in row]
    step = np.array([row['step'] for row in rows], float)
    tokens = _share(run.config, step) * self.tokens if rows else step
    return Curve(step, tokens, tokens * self.flops_per_token,
                 _seconds(run.rows, step),
                 np.array([_number(row.get('loss')) for row in rows]))

  def mean_curve(self, split: str) -> Curve:
    """The mean over the seeds that are done, at the steps all of them have."""
    curves = [self.curve(seed, split) for seed in self.finals]
    if not curves:
      return Curve(*(np.zeros(0) for _ in dataclasses.fields(Curve)))
    step = functools.reduce(np.intersect1d, [c.step for c in curves])
    at = [np.isin(c.step, step) for c in curves]
    mean = lambda name: np.mean(
        [getattr(c, name)[i] for c, i in zip(curves, at)], axis=0)
    return Curve(step, mean('tokens'), mean('flops'), mean('seconds'),
                 mean('loss'))

  def law(self, seed: int) -> statistics.PowerLaw | None:
    """The held-out loss of one run as a power law of compute, fitted where
    the learning rate has reached its height."""
    curve = self.curve(seed, 'eval')
    later = curve.step >= self.runs[seed].config['optim.warmup_steps']
    return statistics.power_law(curve.flops[later], curve.loss[later])


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What W holds: the points in the order in which they were added."""
  name: str
  file: str
  match: str
  paired: bool  # every point sees the same data in the same order
  base_config: Mapping[str, Any]  # by dotted name
  base: Point
  points: tuple[Point, ...]
  codes: tuple[str, ...]  # that trained them, as far as they are known
  changed_data: tuple[str, ...] = ()  # the sources that changed meanwhile

  @property
  def strangers(self) -> list[str]:
    """The runs that had another config than the sweep says, in words."""
    return [f'{point.name}, seed {seed} ({", ".join(run.strange)})'
            for point in self.points for seed, run in point.runs.items()
            if run.strange]


def _share(config: Mapping[str, Any], step: np.ndarray) -> np.ndarray:
  """Returns the share of a run's tokens that it has seen after each step."""
  rows = ramp.parse(config['data.batch_ramp'], config['data.batch_size'])
  return rows.before(step) / rows.before(config['train.steps'])


def load_sweep(workdir) -> Sweep:
  """Returns the sweep of a folder, its states from the ledger there.

  Raises:
    ValueError: where no sweep was run.
  """
  description = layout.load_description(workdir)
  with ledger_lib.Ledger(workdir) as ledger:
    states = {(run.point, run.seed): (run.state, run.error)
              for run in ledger.runs()}
  sweep = read(workdir, description, states)
  for stranger in sweep.strangers:
    print(f'warning: not of the config that sweep.json says: {stranger}',
          file=sys.stderr)
  return sweep


def read(workdir, description: Mapping[str, Any],
         states: Mapping[tuple[str, int], tuple[str, str]]) -> Sweep:
  """Returns the sweep of a folder.

  Args:
    workdir: W.
    description: what sweep.json holds.
    states: the ledger's (state, error) by point and seed.
  """
  base_config = run_config.flatten_dict(description['base_config'])
  points = tuple(_point(workdir, description, row, base_config, states)
                 for row in description['points'])
  base = next(p for p in points if p.name == description['base'])
  ran = [(p.name, s) for p in points for s in p.runs]
  return Sweep(description['name'], description['file'], description['match'],
               description['paired'], base_config, base, points,
               tuple(layout.codes(workdir, ran)),
               tuple(layout.changed_data(workdir, ran)))


def _point(workdir, description, row: Mapping[str, Any],
           base: Mapping[str, Any], states) -> Point:
  runs = {}
  for seed in row['seeds']:
    state, error = states.get((row['name'], seed), ('not run', ''))
    runs[seed] = _run(workdir, description, row['name'], seed, state, error)
  # The base need not have the kinds of layer that a point has.
  changes = {key: value for key, value in row['changes'].items()
             if key not in base or value != base[key]}
  return Point(row['name'], changes, tuple(row['matched']), row['params'],
               row['active_params'], row['flops_per_token'], row['tokens'],
               runs)


def _run(workdir, description, point: str, seed: int, state: str, error: str
         ) -> Run:
  folder = layout.run_folder(workdir, point, seed)
  started = (folder / 'config.json').exists()
  file = folder / 'metrics.jsonl'
  evaluations = {}
  if (folder / 'eval.json').exists():
    evaluations = layout.evaluation(folder)
    if 'extrapolation' in evaluations:
      schema.check_shape(evaluations['extrapolation'], layout.EXTRAPOLATION,
                         f'{folder / "eval.json"}: extrapolation')
  config = run_config.flatten(run_config.load_config(folder)) if (
      started) else {}
  return Run(
      seed, state, error, config,
      tuple(metrics.read(file)) if file.exists() else (), evaluations,
      tuple(layout.differing(description, workdir, point, seed))
      if started else ())


def _seconds(rows, step: np.ndarray) -> np.ndarray:
  """Seconds of training up to each of `step`, from the rows' step_seconds; of
  runs that trained as one program, each one's share."""
  laps = [row for row in rows if row['split'] == 'train']
  if not laps or any(row.get('step_seconds') is None for row in laps):
    return np.full(len(step), np.nan)
  ends = np.array([row['step'] for row in laps], float)
  spent = np.cumsum(np.diff(ends, prepend=0.0)
                    * [row['step_seconds'] / row.get('runs_at_once', 1)
                       for row in laps])
  return np.interp(step, [0.0, *ends], [0.0, *spent])


def _number(value) -> float:
  return float('nan') if value is None else float(value)
