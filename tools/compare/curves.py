"""The runs of a sweep as they lie on disk: curves, final losses, evaluations.

In its folder W, sweep.json says what was to run, ledger.sqlite what became of
it, and W/points/NAME/seed-S are plain workdirs.
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

# The axes that a curve can be drawn against, and their names to a reader.
AXES = {'tokens': 'tokens', 'flops': 'FLOPs of the model',
        'seconds': 'seconds of training', 'step': 'steps'}
# The routers' figures over a window of steps: an expert is unused if no step of
# the window used it.
_ROUTERS = {
    'dropped': 'dropped', 'unserved': 'unserved',
    'window_load_max': 'load, max/mean', 'window_load_entropy': 'load entropy',
    'window_unused': 'unused', 'confidence': 'confidence',
    'router_entropy': 'router entropy'}
# The figures that a curve can show.
FIGURES = {'eval': 'held-out loss', 'train': 'training loss'} | {
    f'health/{name}': f'experts: {words}' for name, words in _ROUTERS.items()}


@dataclasses.dataclass(frozen=True)
class Run:
  """One seed of a point.

  Attributes:
    seed: the seed.
    state: the ledger's: pending, running, owed, done, failed, ...
    error: why a run failed, else ''.
    config: the config by dotted name; empty where the run never started.
    rows: the lines of its metrics.jsonl.
    evaluations: what its eval.json holds, by task.
    strange: the fields in which its config is not the sweep's.
    items: what each item scored, by the names of figures, as
      items.read_records gives
      it; of the held-out loss they are the documents.
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
    figures = {}
    for row in self.rows:
      is_last = row['step'] == self.config.get('train.steps')
      if row['split'] == 'eval' and is_last:
        figures |= row
    figures.pop('split', None)
    figures.pop('step', None)
    return figures

  @property
  def final(self) -> float | None:
    """The held-out loss after the last step; None where there is none."""
    return self.held_out.get('loss')

  @property
  def is_whole(self) -> bool:
    """Whether it is done and has all that it was to have: a held-out loss,
    unless it was to do tasks alone."""
    if self.state != 'done':
      return False
    if self.final is not None:
      return True
    return bool(self.config) and not self.config['eval.every_steps']

  @property
  def ended_badly(self) -> bool:
    """Whether it ended after too many bad steps, or with parameters that are
    not finite; not whether it failed otherwise."""
    rows = [row for row in self.rows if row['split'] == 'train']
    if not rows:
      return False
    if rows[-1].get('param_norm', 0) is None:
      return True
    # The step after so many was under way, and may have been a good one.
    most = self.config['train.max_bad_steps']
    return any(row.get('bad_in_row', 0) >= most for row in rows)

  @property
  def diverged(self) -> bool:
    """Whether it ended badly, or at a held-out loss that is not finite."""
    if self.ended_badly:
      return True
    return 'loss' in self.held_out and self.final is None


@dataclasses.dataclass(frozen=True)
class Point:
  """A variant: what it changes, what it costs, its runs by seed.

  Attributes:
    name: the name.
    changes: the fields in which it differs from the base, by dotted name.
    matched: the fields among these that were solved for to match a cost.
    params: the number of parameters.
    active_params: the number of these that work for one token.
    flops_per_token: the FLOPs of training on one token.
    tokens: the number of tokens of a whole run.
    runs: the runs by seed.
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
    losses = {seed: run.final for seed, run in self.runs.items()}
    return {seed: loss for seed, loss in losses.items() if loss is not None}

  def curve(self, seed: int, figure: str = 'eval') -> dict[str, list]:
    """Returns one of FIGURES of a run at rising steps; {}: there is none.

    Lists by 'step', 'tokens', 'flops' and 'seconds' (of training steps so far,
    without compiling, evaluating and saving), 'loss' (the figure, a mean over
    layers), and 'warm': whether the learning rate had reached its height. NaN
    where one is not known or not finite.
    """
    run = self.runs[seed]
    split, name = figure, 'loss'
    if figure.startswith('health/'):
      split, name = 'train', figure
    return curve_from_rows(
        rows=run.rows, split=split, name=name, config=run.config,
        tokens=self.tokens, flops_per_token=self.flops_per_token)


def curve_from_rows(rows: Sequence[Mapping[str, Any]], split: str, name: str,
                    config: Mapping[
                        str, Any], tokens: int, flops_per_token: float
                    ) -> dict[str, list]:
  """Returns a figure of a run as Point.curve does.

  Args:
    rows: the lines of its metrics.jsonl.
    split: the split of the rows that have the figure.
    name: the figure's name there.
    config: the config of the run, by dotted name.
    tokens: the number of tokens of the whole run.
    flops_per_token: the FLOPs of training on one token.
  """
  having = [row for row in rows if row['split'] == split and name in row]
  if not having:
    return {}
  step = np.array([row['step'] for row in having], float)

  # The figure; those of layers are lists, of which it is the mean.
  figure = []
  for row in having:
    of_layers = np.asarray(row[name], float)
    figure.append(float(np.mean(of_layers)))

  # The tokens so far, by the batches so far.
  batches = pipeline.parse_ramp(config['data.batch_ramp'],
                                config['data.batch_size'])
  all_batches = batches.before(config['train.steps'])
  tokens_so_far = tokens * batches.before(step) / all_batches
  flops = tokens_so_far * flops_per_token
  is_warm = step >= config['optim.warmup_steps']
  return {
      'step': step.tolist(),
      'tokens': tokens_so_far.tolist(),
      'flops': flops.tolist(),
      'seconds': _seconds(rows, step).tolist(),
      'loss': figure,
      'warm': is_warm.tolist()}


def ends_cooled_down(config: Mapping[str, Any]) -> bool:
  """Returns whether a run of a config, by dotted names, ends at a learning rate
  that fell to the end of its schedule, to a half or less: in the middle of a
  decay, and without one, a loss is not the best that its FLOPs buy."""
  return (config['optim.schedule'] in ('cosine', 'linear', 'wsd')
          and config['optim.decay_steps'] <= config['train.steps']
          and config['optim.final_fraction'] <= 0.5)


def mean_curve(each: Sequence[Mapping[str, list]]) -> dict[str, np.ndarray]:
  """Returns the mean of curves, at the steps that all of them have."""
  steps = functools.reduce(np.intersect1d, [curve['step'] for curve in each])
  means = {}
  for name in (*AXES, 'loss'):
    columns = []
    for curve in each:
      is_shared = np.isin(curve['step'], steps)
      column = np.asarray(curve[name], float)
      columns.append(column[is_shared])
    means[name] = np.mean(columns, axis=0)
  return means


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The points and runs that the folder of a sweep holds.

  Attributes:
    name: the name.
    file: the sweep's file.
    match: the cost that sizes were matched by; '': none.
    paired: whether every point sees the same data in the same order.
    base_tree: the config of the base.
    base_config: the same by dotted name.
    base: the point that the others are compared with.
    points: the points in the order in which they were added.
    codes: the codes that trained them, as far as they are known.
  """
  name: str
  file: str
  match: str
  paired: bool
  base_tree: Mapping[str, Any]
  base_config: Mapping[str, Any]
  base: Point
  points: tuple[Point, ...]
  codes: tuple[str, ...]

  @property
  def runs(self) -> list[Run]:
    """Every run of every point."""
    runs: list[Run] = []
    for point in self.points:
      runs += point.runs.values()
    return runs

  @property
  def strangers(self) -> list[str]:
    """The runs that had another config than the sweep says, in words."""
    strangers = []
    for point in self.points:
      for seed, run in point.runs.items():
        if run.strange:
          fields = ', '.join(run.strange)
          strangers.append(f'{point.name}, seed {seed} ({fields})')
    return strangers


def load_sweep(workdir) -> Sweep:
  """Returns the sweep of a folder, its states from the ledger there.

  Raises:
    ValueError: where no sweep was run.
  """
  description = layout.load_sweep_description(workdir)
  sweep = read_sweep(workdir, description, layout.load_ledger_runs(workdir))
  for stranger in sweep.strangers:
    print(f'warning: not of the config that sweep.json says: {stranger}',
          file=sys.stderr)
  return sweep


def add_variants_of_csv(sweep: Sweep, file: str) -> Sweep:
  """Returns a sweep with a point for each variant of a CSV, which was trained
  elsewhere on the batches of the same seeds; its costs are not known.

  Args:
    sweep: the sweep that was read.
    file: the CSV with the columns variant, seed and loss, held out; and step,
      where a run has several rows.

  Raises:
    RequestError: for a row that is none, or a name that the sweep has.
  """
  variants = _rows_of_file(file, sweep.base_config['train.steps'])
  again = variants.keys() & {point.name for point in sweep.points}
  require(not again, f'{file}: the sweep has a variant of the name '
          f'{min(again, default="")!r}, too: call it otherwise')
  points = list(sweep.points)
  for name, by_seed in variants.items():
    runs = {}
    for seed, rows in by_seed.items():
      runs[seed] = Run(
          seed=seed, state=layout.DONE, error='',
          config={**sweep.base_config, 'seed': seed}, rows=tuple(rows),
          evaluations={})
    points.append(Point(
        name=name,
        changes={'rows': f'{file}:{name}'},
        matched=(),
        params=math.nan,
        active_params=math.nan,
        flops_per_token=math.nan,
        tokens=sweep.base.tokens,
        runs=runs))
  return dataclasses.replace(sweep, points=tuple(points))


def _rows_of_file(file: str, steps: int
                  ) -> dict[str, dict[int, list[dict[str, Any]]]]:
  """Returns the rows of a CSV as those of metrics.jsonl, by variant and seed;
  a row that names no step is of the last of `steps`."""
  variants: dict[str, dict[int, list]] = {}
  with open(file, newline='') as text:
    table = csv.DictReader(text)
    for row in table:
      try:
        variant, seed = row['variant'], int(row['seed'])
        loss: float | None = float(row['loss'])
        step = int(row.get('step') or steps)
      except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f'{file}, line {table.line_num}, has no variant, '
                           f'seed or loss: {error}') from error
      if not math.isfinite(loss):
        loss = None
      by_seed = variants.setdefault(variant, {})
      rows = by_seed.setdefault(seed, [])
      rows.append({'split': 'eval', 'step': step, 'loss': loss})
  return variants


def read_sweep(workdir, description: Mapping[str, Any],
               rows: Sequence[layout.Run]) -> Sweep:
  """Returns the sweep of a folder.

  Args:
    workdir: the folder.
    description: what sweep.json holds.
    rows: the runs of the ledger.
  """
  base_config = run_config.flatten(description['base_config'])
  by_run = {(row.point, row.seed): row for row in rows}
  points = {}
  for row in description['points']:
    points[row['name']] = _point(
        workdir=workdir, description=description, row=row, base=base_config,
        by_run=by_run)
  return Sweep(
      name=description['name'],
      file=description['file'],
      match=description['match'],
      paired=description['paired'],
      base_tree=description['base_config'],
      base_config=base_config,
      base=points[description['base']],
      points=tuple(points.values()),
      codes=tuple(layout.codes_of_runs(workdir, description)))


def _point(workdir, description, row: Mapping[str, Any],
           base: Mapping[str, Any],
           by_run: Mapping[tuple[str, int], layout.Run]) -> Point:
  """Returns the point that a row of sweep.json describes.

  Args:
    workdir: the folder of the sweep.
    description: what sweep.json holds.
    row: its row of the point.
    base: the config of the base, by dotted name.
    by_run: the runs of the ledger by point and seed.
  """
  name = row['name']
  runs = {}
  for seed in row['seeds']:
    state, error = 'not run', ''
    if (name, seed) in by_run:
      run = by_run[name, seed]
      state, error = run.state, run.error
    runs[seed] = _run(workdir=workdir, description=description, point=name,
                      seed=seed, state=state, error=error)

  # The base need not have the kinds of layer that a point has.
  changes = {}
  for key, value in row['changes'].items():
    if key not in base or value != base[key]:
      changes[key] = value
  return Point(
      name=name,
      changes=changes,
      matched=tuple(row['matched']),
      params=row['params'],
      active_params=row['active_params'],
      flops_per_token=row['flops_per_token'],
      tokens=row['tokens'],
      runs=runs)


def _run(workdir, description, point: str, seed: int, state: str, error: str
         ) -> Run:
  """Returns what lies in the folder of a run, which the ledger has in a state
  and with an error."""
  folder = layout.run_folder(workdir, point, seed)
  config, strange, rows = {}, (), ()
  is_started = (folder / 'config.json').exists()
  if is_started:
    config = run_config.flatten(run_config.load_config(folder))
  scored = items.read_records(folder)
  if 'documents/loss' in scored:
    scored['loss'] = scored['documents/loss']
  file = folder / 'metrics.jsonl'
  if file.exists():
    rows = tuple(metrics.read_metrics(file))
  evaluations = layout.load_evaluation(folder)
  if is_started:
    strange = tuple(
        layout.fields_unlike_sweep(description, workdir, point, seed))
  return Run(seed=seed, state=state, error=error, config=config, rows=rows,
             evaluations=evaluations, strange=strange, items=scored)


def _seconds(rows, step: np.ndarray) -> np.ndarray:
  """Returns the seconds of training up to each of `step`, from the rows'
  step_seconds; of runs that trained as one program, each one's share."""
  laps = [row for row in rows if row['split'] == 'train']
  if not laps or any(row.get('step_seconds') is None for row in laps):
    return np.full(len(step), np.nan)
  ends = np.array([row['step'] for row in laps], float)
  seconds_a_step = [row['step_seconds'] / row.get('runs_at_once', 1)
                    for row in laps]
  spent = np.cumsum(np.diff(ends, prepend=0.0) * seconds_a_step)
  return np.interp(step, [0.0, *ends], [0.0, *spent])
