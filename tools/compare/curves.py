"""The runs of a sweep as they lie on disk: curves, final losses, evaluations.

W/sweep.json says what was to run, W/ledger.sqlite what became of it, and
W/points/NAME/seed-S are plain workdirs.
"""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import functools
import math
import sys
from typing import Any

import numpy as np

from common.errors import RequestError, require
from tools.compare import layout
from training.evals import items
from training.objectives import pipeline
from training.workdir import metrics, run_config

# What a curve can be drawn against, and its name to a reader.
AXES = {'tokens': 'tokens', 'flops': 'FLOPs of the model',
        'seconds': 'seconds of training', 'step': 'steps'}
# What a curve can show. Of a router's figures over a window of steps: an expert
# is unused if no step of the window used it.
FIGURES = {'eval': 'held-out loss', 'train': 'training loss'} | {
    f'health/{name}': f'experts: {words}' for name, words in {
        'dropped': 'dropped', 'unserved': 'unserved',
        'window_load_max': 'load, max/mean',
        'window_load_entropy': 'load entropy',
        'window_unused': 'unused', 'confidence': 'confidence',
        'router_entropy': 'router entropy'}.items()}


@dataclasses.dataclass(frozen=True)
class Run:
  """One seed of a point.

  Attributes:
    state: as the ledger has it: pending, running, owed, done, failed, ...
    error: of a failed run, else ''.
    config: by dotted name; empty where the run never started.
    rows: of its metrics.jsonl.
    evaluations: of its evaluation JSON, by task.
    items: what each item scored, by the names of figures, as items.read gives
      it; of the held-out loss they are the documents.
    strange: the fields in which its config is not the sweep's.
  """
  seed: int
  state: str
  error: str
  config: Mapping[str, Any]
  rows: tuple[Mapping[str, Any], ...]
  evaluations: Mapping[str, Any]
  strange: tuple[str, ...] = ()
  items: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)

  @property
  def held_out(self) -> dict[str, Any]:
    """The figures of what is held out after the last step, by name; None: not
    finite.

    A run has them once it is trained, whatever it still owes or fails at.
    """
    return {name: value for row in self.rows if row['split'] == 'eval'
            and row['step'] == self.config.get('train.steps')
            for name, value in row.items() if name not in ('split', 'step')}

  @property
  def final(self) -> float | None:
    """The held-out loss after the last step; None where there is none."""
    return self.held_out.get('loss')

  @property
  def is_whole(self) -> bool:
    """Whether it is done and has all that it was to have: a held-out loss,
    unless it was to do tasks alone."""
    return self.state == 'done' and (
        self.final is not None
        or bool(self.config) and not self.config['eval.every_steps'])

  @property
  def ended_badly(self) -> bool:
    """Whether it ended after too many bad steps, or with parameters that are
    not finite; not whether it failed otherwise."""
    rows = [row for row in self.rows if row['split'] == 'train']
    # The step after so many was under way, and may have been a good one.
    return bool(rows) and (rows[-1].get('param_norm', 0) is None or any(
        row.get('bad_in_row', 0) >= self.config['train.max_bad_steps']
        for row in rows))

  @property
  def diverged(self) -> bool:
    """Whether it ended badly, or at a held-out loss that is not finite."""
    return self.ended_badly or (
        'loss' in self.held_out and self.final is None)


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
  params: float
  active_params: float
  flops_per_token: float
  tokens: int
  runs: Mapping[int, Run]

  @functools.cached_property
  def finals(self) -> dict[int, float]:
    """The final held-out loss of each seed that has one."""
    return {seed: run.final for seed, run in self.runs.items()
            if run.final is not None}

  def curve(self, seed: int, figure: str = 'eval') -> dict[str, list]:
    """Returns one of FIGURES of a run at rising steps; {}: there is none.

    Lists by 'step', 'tokens', 'flops' and 'seconds' (of training steps so far,
    without compiling, evaluating and saving), 'loss' (the figure, a mean over
    layers), and 'warm': whether the learning rate had reached its height. NaN
    where one is not known or not finite.
    """
    run = self.runs[seed]
    split, name = ('train', figure) if figure.startswith('health/') else (
        figure, 'loss')
    return line(run.rows, split, name, run.config, self.tokens,
                self.flops_per_token)


def line(rows: Sequence[Mapping[str, Any]], split: str, name: str,
         config: Mapping[str, Any], tokens: int, flops_per_token: float
         ) -> dict[str, list]:
  """Returns a figure of a run as Point.curve does.

  Args:
    rows: of its metrics.jsonl.
    split: of the rows that have the figure.
    name: the figure's there.
    config: of the run, by dotted name.
    tokens: of the whole run.
    flops_per_token: of training.
  """
  those = [row for row in rows if row['split'] == split and name in row]
  if not those:
    return {}
  step = np.array([row['step'] for row in those], float)
  batches = pipeline.parse_ramp(config['data.batch_ramp'],
                                config['data.batch_size'])
  so_far = tokens * batches.before(step) / batches.before(
      config['train.steps'])
  return {'step': step.tolist(), 'tokens': so_far.tolist(),
          'flops': (so_far * flops_per_token).tolist(),
          'seconds': _seconds(rows, step).tolist(),
          'loss': [float(np.mean(np.asarray(row[name], float)))
                   for row in those],
          'warm': (step >= config['optim.warmup_steps']).tolist()}


def cooled(config: Mapping[str, Any]) -> bool:
  """Whether a run of a config, by dotted names, ends at a learning rate that
  fell to the end of its schedule, to a half or less: in the middle of a decay,
  and without one, a loss is not the best that its FLOPs buy."""
  return (config['optim.schedule'] in ('cosine', 'linear', 'wsd')
          and config['optim.decay_steps'] <= config['train.steps']
          and config['optim.final_fraction'] <= 0.5)


def mean(each: Sequence[Mapping[str, list]]) -> dict[str, np.ndarray]:
  """Returns the mean of curves, at the steps that all of them have."""
  step = functools.reduce(np.intersect1d, [curve['step'] for curve in each])
  at = [np.isin(curve['step'], step) for curve in each]
  return {name: np.mean([np.asarray(curve[name], float)[i]
                         for curve, i in zip(each, at)], axis=0)
          for name in (*AXES, 'loss')}


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What W holds: the points in the order in which they were added."""
  name: str
  file: str
  match: str
  paired: bool  # every point sees the same data in the same order
  base_tree: Mapping[str, Any]  # the config of the base
  base_config: Mapping[str, Any]  # the same by dotted name
  base: Point
  points: tuple[Point, ...]
  codes: tuple[str, ...]  # that trained them, as far as they are known

  @property
  def strangers(self) -> list[str]:
    """The runs that had another config than the sweep says, in words."""
    return [f'{point.name}, seed {seed} ({", ".join(run.strange)})'
            for point in self.points for seed, run in point.runs.items()
            if run.strange]


def load_sweep(workdir) -> Sweep:
  """Returns the sweep of a folder, its states from the ledger there.

  Raises:
    ValueError: where no sweep was run.
  """
  description = layout.load_description(workdir)
  sweep = read(workdir, description, layout.ledger_runs(workdir))
  for stranger in sweep.strangers:
    print(f'warning: not of the config that sweep.json says: {stranger}',
          file=sys.stderr)
  return sweep


def with_rows(sweep: Sweep, file: str) -> Sweep:
  """Returns a sweep with a point for each variant of a CSV, which was trained
  elsewhere on the batches of the same seeds; its costs are not known.

  Args:
    sweep: as read.
    file: with the columns variant, seed and loss, held out; and step, where a
      run has several rows.

  Raises:
    RequestError: for a row that is none, or a name that the sweep has.
  """
  steps = sweep.base_config['train.steps']
  variants: dict[str, dict[int, list]] = {}
  with open(file, newline='') as text:
    table = csv.DictReader(text)
    for row in table:
      try:
        loss = float(row['loss'])
        variants.setdefault(row['variant'], {}).setdefault(
            int(row['seed']), []).append({
                'split': 'eval', 'step': int(row.get('step') or steps),
                'loss': loss if math.isfinite(loss) else None})
      except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f'{file}, line {table.line_num}, has no variant, '
                           f'seed or loss: {error}') from error
  again = variants.keys() & {point.name for point in sweep.points}
  require(not again, f'{file}: the sweep has a variant of the name '
          f'{min(again, default="")!r}, too: call it otherwise')
  return dataclasses.replace(sweep, points=(*sweep.points, *(
      Point(name, {'rows': f'{file}:{name}'}, (), *[math.nan] * 3,
            sweep.base.tokens, {seed: Run(seed, layout.DONE, '', {
                **sweep.base_config, 'seed': seed}, tuple(rows), {})
                                for seed, rows in by_seed.items()})
      for name, by_seed in variants.items())))


def read(workdir, description: Mapping[str, Any],
         rows: Sequence[layout.Run]) -> Sweep:
  """Returns the sweep of a folder.

  Args:
    workdir: W.
    description: what sweep.json holds.
    rows: the ledger's.
  """
  base_config = run_config.flatten(description['base_config'])
  states = {(row.point, row.seed): (row.state, row.error) for row in rows}
  points = tuple(_point(workdir, description, row, base_config, states)
                 for row in description['points'])
  base = next(p for p in points if p.name == description['base'])
  return Sweep(description['name'], description['file'], description['match'],
               description['paired'], description['base_config'], base_config,
               base, points, tuple(layout.codes(workdir, description)))


def _point(workdir, description, row: Mapping[str, Any],
           base: Mapping[str, Any], states) -> Point:
  runs = {seed: _run(workdir, description, row['name'], seed, *states.get(
      (row['name'], seed), ('not run', ''))) for seed in row['seeds']}
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
  config = run_config.flatten(run_config.load_config(folder)) if started else {}
  scored = items.read(folder)
  if 'documents/loss' in scored:
    scored['loss'] = scored['documents/loss']
  return Run(
      seed, state, error, config,
      tuple(metrics.read(file)) if file.exists() else (),
      layout.evaluation(folder), tuple(layout.differing(
          description, workdir, point, seed)) if started else (), scored)


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
