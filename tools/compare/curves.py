"""The runs of a sweep as they lie on disk: curves, final losses, evaluations.

In its folder W, sweep.json says what was to run, ledger.sqlite what became of
it, and W/points/NAME/seed-S are plain workdirs.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import sys
from typing import Any

import numpy as np

from tools.compare import layout
from training.evals import items
from training.objectives import pipeline
from training.workdir import metrics, run_config

# The axes that a curve can be drawn against, and their names to a reader.
AXES = {'tokens': 'tokens', 'flops': 'FLOPs of the model',
        'seconds': 'seconds of training', 'step': 'steps'}
# The routers' figures over a window of steps: an expert is unused if no step of
# the window used it.
_NAME_OF_ROUTER_FIGURE = {
    'dropped': 'dropped', 'unserved': 'unserved',
    'window_load_max': 'load, max/mean', 'window_load_entropy': 'load entropy',
    'window_unused': 'unused', 'confidence': 'confidence',
    'router_entropy': 'router entropy'}
# The figures that a curve can show, and their names to a reader.
FIGURES = {'eval': 'held-out loss', 'train': 'training loss'} | {
    f'health/{name}': f'experts: {title}'
    for name, title in _NAME_OF_ROUTER_FIGURE.items()}


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of a sweep: one point (a variant of the config) with one seed.

  Attributes:
    seed: the seed.
    state: the ledger's: pending, running, owed, done, failed, ...
    error: why a run failed, else ''.
    config: the config by dotted name; empty where the run never started.
    rows: the lines of its metrics.jsonl.
    evaluations: what its eval.json holds, by task.
    differing_fields: the fields in which its config is not the sweep's.
    items: what each item scored, by the names of figures, as items.read_records
      gives it; of the held-out loss they are the documents.
  """
  seed: int
  state: str
  error: str
  config: Mapping[str, Any]
  rows: tuple[Mapping[str, Any], ...]
  evaluations: Mapping[str, Any]
  differing_fields: tuple[str, ...] = ()
  items: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)

  @property
  def held_out(self) -> dict[str, Any]:
    """The results of the evaluation on held-out data after the last step, by
    name. None stands for a value that is not finite.

    A run has them once it is trained, even if an evaluation task that comes
    after training is missing or failed.
    """
    # There are several rows of the last step if the evaluation was resumed. The
    # later ones win.
    figures = {}
    for row in self.rows:
      is_last = row['step'] == self.config.get('train.steps')
      if row['split'] == 'eval' and is_last:
        figures |= row
    figures.pop('split', None)
    figures.pop('step', None)
    return figures

  @property
  def final_loss(self) -> float | None:
    """The held-out loss after the last step; None where there is none."""
    return self.held_out.get('loss')

  @property
  def shares_clock(self) -> bool:
    """Whether it trained as one program with other runs, whose time it shares.
    """
    return any(row.get('runs_at_once', 1) > 1 for row in self.rows)

  @property
  def has_all_results(self) -> bool:
    """Whether it is done and has all that it was to have: a held-out loss,
    unless it was to do tasks alone."""
    if self.state != 'done':
      return False
    if self.final_loss is not None:
      return True
    return bool(self.config) and not self.config['eval.every_steps']

  @property
  def has_ended_badly(self) -> bool:
    """Whether it ended after too many bad steps, or with parameters that are
    not finite; not whether it failed otherwise."""
    rows = [row for row in self.rows if row['split'] == 'train']
    if not rows:
      return False
    if rows[-1].get('param_norm', 0) is None:
      return True
    # The step after so many was under way, and may have been a good one.
    max_bad_steps = self.config['train.max_bad_steps']
    return any(row.get('bad_in_row', 0) >= max_bad_steps for row in rows)

  @property
  def diverged(self) -> bool:
    """Whether it ended badly, or at a held-out loss that is not finite."""
    if self.has_ended_badly:
      return True
    return 'loss' in self.held_out and self.final_loss is None


@dataclasses.dataclass(frozen=True)
class Point:
  """A variant: what it changes, what it costs, its runs by seed.

  Attributes:
    name: the name.
    changes: the fields in which it differs from the base, by dotted name.
    matched: the fields among these that were solved for to match a cost.
    params: the number of parameters.
    active_params: the number of these that work for one token.
    multiplied_params, looked_up_params: the numbers of these in products, and
      in tables that are looked up.
    flops_per_token: the FLOPs of training on one token.
    tokens: the number of tokens of a whole run.
    runs: the runs by seed.
    csv_cells: the further columns of the CSV of a variant that was trained
      elsewhere; None: it was trained here.
  """
  name: str
  changes: Mapping[str, Any]
  matched: tuple[str, ...]
  params: float
  active_params: float
  multiplied_params: float
  looked_up_params: float
  flops_per_token: float
  tokens: int
  runs: Mapping[int, Run]
  csv_cells: Mapping[str, str] | None = None

  @functools.cached_property
  def final_losses(self) -> dict[int, float]:
    """The final held-out loss of each seed that has one."""
    losses = {seed: run.final_loss for seed, run in self.runs.items()}
    return {seed: loss for seed, loss in losses.items() if loss is not None}

  def curve(self, seed: int, figure: str = 'eval') -> dict[str, list]:
    """Returns the curve of a run: how a figure, such as the held-out loss,
    changes while it trains.

    Args:
      seed: the seed of the run.
      figure: 'eval' or 'train', the loss on that data, or a figure of routers
        (health/...).

    Returns:
      A dict of lists, with an entry for each step at which the figure was
      measured; {} if the run does not have the figure. Unknown values are NaN.
      'step', 'tokens', 'flops', 'seconds': what was spent so far. Seconds are
        those of training steps, without compiling, evaluating and saving.
      'loss': the figure, averaged over layers.
      'warm': whether the warmup of the learning rate was over.
    """
    # The loss has the same name in the rows of both splits. The figures of
    # routers are reported in training, by their own names.
    run = self.runs[seed]
    split, name = figure, 'loss'
    if figure.startswith('health/'):
      split, name = 'train', figure
    return curve_from_rows(
        rows=run.rows, split=split, name=name, config=run.config,
        tokens=self.tokens, flops_per_token=self.flops_per_token)


def curve_from_rows(
    rows: Sequence[Mapping[str, Any]], split: str, name: str,
    config: Mapping[str, Any], tokens: int, flops_per_token: float
    ) -> dict[str, list]:
  """Returns how a figure of a run, such as its loss, changes over its steps.

  Args:
    rows: the lines of its metrics.jsonl.
    split: the split of the rows that have the figure, 'train' or 'eval'.
    name: the figure's name there.
    config: the config of the run, by dotted name.
    tokens: the number of tokens of the whole run.
    flops_per_token: the FLOPs of training on one token.

  Returns:
    Lists of one length, by name, as Point.curve returns them; {} where the run
    does not have the figure.
  """
  rows_with_figure = [
      row for row in rows if row['split'] == split and name in row]
  if not rows_with_figure:
    return {}
  steps = np.array([row['step'] for row in rows_with_figure], float)

  # A figure of the layers is a list with a value for each, of which the mean is
  # taken. None, which stands for what is not finite, becomes NaN.
  values = []
  for row in rows_with_figure:
    value_of_layers = np.asarray(row[name], float)
    values.append(float(np.mean(value_of_layers)))

  # Tokens are not in proportion to steps where the batch grows while training.
  # They are in proportion to the rows of the batches so far.
  batch_ramp = pipeline.parse_ramp(config['data.batch_ramp'],
                                   config['data.batch_size'])
  rows_of_run = batch_ramp.rows_before(config['train.steps'])
  tokens_so_far = tokens * batch_ramp.rows_before(steps) / rows_of_run
  flops = tokens_so_far * flops_per_token
  # Before the learning rate has reached its height, a loss is no part of a
  # power law.
  is_warm = steps >= config['optim.warmup_steps']
  return {
      'step': steps.tolist(),
      'tokens': tokens_so_far.tolist(),
      'flops': flops.tolist(),
      'seconds': _training_seconds(rows, steps).tolist(),
      'loss': values,
      'warm': is_warm.tolist()}


def ends_cooled_down(config: Mapping[str, Any]) -> bool:
  """Returns whether the learning rate of a run has fallen to a half or less at
  the end of training.

  Before the end of a decay, and without one, a loss is higher than it could be
  for its FLOPs, so that no scaling law should be fitted to it.

  Args:
    config: the fields of the run's config, by dotted name.
  """
  return (config['optim.schedule'] in ('cosine', 'linear', 'wsd')
          and config['optim.decay_steps'] <= config['train.steps']
          and config['optim.final_fraction'] <= 0.5)


def mean_curve(curves: Sequence[Mapping[str, list]]) -> dict[str, np.ndarray]:
  """Averages the curves of some runs, such as of several seeds, at the steps
  that all of them have.

  Args:
    curves: the curves, one or more, as Point.curve returns them.

  Returns:
    Arrays over the shared steps: one for each of AXES, and 'loss'.
  """
  # Runs may have been evaluated at different steps, as one that ended early.
  shared_steps = functools.reduce(
      np.intersect1d, [curve['step'] for curve in curves])
  means = {}
  for name in (*AXES, 'loss'):
    columns = []
    for curve in curves:
      is_shared = np.isin(curve['step'], shared_steps)
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
  def runs_of_other_config(self) -> list[str]:
    """The runs that had another config than the sweep says, each as 'POINT,
    seed SEED (FIELD, FIELD)'."""
    descriptions = []
    for point in self.points:
      for seed, run in point.runs.items():
        if run.differing_fields:
          fields = ', '.join(run.differing_fields)
          descriptions.append(f'{point.name}, seed {seed} ({fields})')
    return descriptions


def load_sweep(workdir) -> Sweep:
  """Reads a sweep from its folder: its points (variants of the config) and
  their runs. It prints a warning for each run whose config is not what
  sweep.json says.

  Args:
    workdir: the folder of the sweep.

  Raises:
    ValueError: if no sweep was run there.
  """
  description = layout.load_sweep_description(workdir)
  sweep = read_sweep(workdir, description, layout.load_ledger_runs(workdir))
  for run in sweep.runs_of_other_config:
    print(f'warning: not of the config that sweep.json says: {run}',
          file=sys.stderr)
  return sweep


def read_sweep(workdir, description: Mapping[str, Any],
               ledger_runs: Sequence[layout.Run], reads_configs: bool = True
               ) -> Sweep:
  """Returns the points (variants of the config) and runs of a sweep's folder.

  Args:
    workdir: the folder.
    description: what sweep.json holds.
    ledger_runs: the runs of the ledger, the database of their states.
    reads_configs: whether to read the config of each run and to compare it with
      that of the sweep, which takes a while; False: it was compared when the
      run ended, and is taken to be what sweep.json says.
  """
  # Read the config of the base, whose fields get dotted names as changes have,
  # and the states of the runs, which only the ledger has.
  base_config = run_config.flatten(description['base_config'])
  ledger_run_of = {(run.point, run.seed): run for run in ledger_runs}
  # Read each point of sweep.json, including those of which no run has begun.
  points = {}
  for row in description['points']:
    points[row['name']] = _read_point(
        workdir=workdir, description=description, row=row,
        base_config=base_config, ledger_run_of=ledger_run_of,
        reads_configs=reads_configs)
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


def _read_point(workdir, description: Mapping[str, Any], row: Mapping[str, Any],
                base_config: Mapping[str, Any],
                ledger_run_of: Mapping[tuple[str, int], layout.Run],
                reads_configs: bool) -> Point:
  """Reads a point of a sweep (a variant of the config) with its run for each
  seed.

  Args:
    workdir: the folder of the sweep.
    description: the contents of sweep.json.
    row: the entry of the point there.
    base_config: the fields of the base's config, by dotted name.
    ledger_run_of: the runs of the ledger (the database of their states), by
      point and seed.
    reads_configs: whether to read the configs of the runs, and to compare them
      with what sweep.json says.
  """
  name = row['name']
  runs = {}
  for seed in row['seeds']:
    # A seed that was added to sweep.json may not be in the ledger yet.
    state, error = 'not run', ''
    if (name, seed) in ledger_run_of:
      ledger_run = ledger_run_of[name, seed]
      state, error = ledger_run.state, ledger_run.error
    runs[seed] = _read_run(
        workdir=workdir, description=description, point=name, seed=seed,
        state=state, error=error, reads_config=reads_configs)

  # Keep the changes that make a difference. The base may lack a field, because
  # it need not have the kinds of layer that a point has.
  changes = {}
  for field, value in row['changes'].items():
    if field not in base_config or value != base_config[field]:
      changes[field] = value
  return Point(
      name=name,
      changes=changes,
      matched=tuple(row['matched']),
      params=row['params'],
      active_params=row['active_params'],
      multiplied_params=row['multiplied_params'],
      looked_up_params=row['looked_up_params'],
      flops_per_token=row['flops_per_token'],
      tokens=row['tokens'],
      runs=runs)


def _read_run(workdir, description: Mapping[str, Any], point: str, seed: int,
              state: str, error: str, reads_config: bool) -> Run:
  """Reads a run of a sweep from its folder: its config, its curves, its
  evaluations, and the scores of single documents or questions. Any of the files
  may be missing, as before the run has begun.

  Args:
    workdir: the folder of the sweep.
    description: the contents of sweep.json.
    point: the name of the point (a variant of the config) that is trained.
    seed: the seed of the run.
    state: its state in the ledger, the database of runs.
    error: the reason why it failed, or ''.
    reads_config: whether to read its config.json. If not, its config is taken
      to be what sweep.json says.
  """
  # The config, and the fields in which it differs from sweep.json.
  folder = layout.run_folder(workdir, point, seed)
  config = {}
  differing_fields = ()
  if reads_config and (folder / 'config.json').exists():
    config = run_config.flatten(run_config.load_config(folder))
    differing_fields = tuple(
        layout.fields_unlike_sweep(description, workdir=workdir, point=point,
                                   seed=seed))

  # The scores of items (documents, questions), by figure. The held-out loss is
  # made up of the losses of documents.
  scores_of_items = items.read_records(folder)
  if 'documents/loss' in scores_of_items:
    scores_of_items['loss'] = scores_of_items['documents/loss']

  # The curves. If config.json was not read, a run that has metrics gets the
  # config that sweep.json gives it.
  metrics_file = folder / 'metrics.jsonl'
  metrics_rows = ()
  if metrics_file.exists():
    metrics_rows = tuple(metrics.read_metrics(metrics_file))
    if not reads_config:
      config = run_config.flatten(description['base_config'])
      config |= layout.point_row(description, point)['changes']
  evaluations = layout.load_evaluation(folder)
  return Run(
      seed=seed, state=state, error=error, config=config, rows=metrics_rows,
      evaluations=evaluations, differing_fields=differing_fields,
      items=scores_of_items)


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
  """Returns the seconds of all training steps of a run that its rows of
  metrics.jsonl report; NaN where they do not."""
  last_step = max([row['step'] for row in rows], default=0)
  return float(_training_seconds(rows, np.array([last_step]))[0])


def _training_seconds(rows: Sequence[Mapping[str, Any]], steps: np.ndarray
                      ) -> np.ndarray:
  """Returns how many seconds a run had trained at some steps.

  The times that the rows of its metrics report are summed, and interpolated in
  between. If several runs were trained as one program, each counts an equal
  share of the time.

  Args:
    rows: the lines of the run's metrics.jsonl.
    steps: [points], the steps.

  Returns:
    [points], the seconds; NaN if the rows do not report times.
  """
  train_rows = [row for row in rows if row['split'] == 'train']
  has_times = all(row.get('step_seconds') is not None for row in train_rows)
  if not train_rows or not has_times:
    return np.full(len(steps), np.nan)

  # A row reports the mean time of a step since the row before it. It is
  # multiplied by the number of these steps, and summed.
  last_steps = np.array([row['step'] for row in train_rows], float)
  seconds_a_step = [row['step_seconds'] / row.get('runs_at_once', 1)
                    for row in train_rows]
  num_steps = np.diff(last_steps, prepend=0.0)
  seconds_so_far = np.cumsum(num_steps * seconds_a_step)
  return np.interp(steps, [0.0, *last_steps], [0.0, *seconds_so_far])
