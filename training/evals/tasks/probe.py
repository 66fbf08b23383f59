"""Accuracy of a probe by difficulty, and on rows longer than in training.

`accuracy` is the share of answers that are right, `rows` the share of rows all
of whose answers are. An interval is Wilson's, of 95 %, over rows: the answers
of one row are not independent, and the mean of a row varies at most as much as
a single answer would, so the interval of the accuracy is rather too wide. Rows
that ask for unequal numbers of answers, k, count as (sum k)^2 / sum k^2 rows.

`constant` is what one answer to everything scores: what a model gets which
knows no more of a task than which answer is the best one to give always. The
largest of the shares that some rows have is larger than any answer's true
share, so the answer is chosen on other rows than those that it is scored on: on
seven eighths of them it is chosen, on the last eighth scored, and so for each
eighth.
"""

from collections.abc import Iterator, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np

from architectures.parts import positions
from common.errors import one_of
from training import objectives
from training.data import probes
from training.distributed import devices
from training.evals import Evaluation, Flag, Task, items
from training.objectives import pipeline

LENGTH_FACTORS = (2, 4)  # lengths beyond training
MOST_LEVELS = 6  # at most so many of the levels of training are measured

CONSTANT_ROWS, CONSTANT_FOLDS = 4096, 8  # of a constant answer, over all levels
# In `accuracy` all answers count alike; in a task's figures all levels do.
CONSTANT_FIGURES = ('accuracy', 'probe/accuracy', 'probe/rows_right')


class ProbeCell(NamedTuple):
  """Rows that are measured at once: those of one level and length."""
  level: int | float
  length: int
  beyond: int  # how many times the length of training; 1: as in training


class MeasuredCell(NamedTuple):
  """The scores of rows of one level and length.

  Attributes:
    figures: the figures by name.
    share_R: the share of the answers of each row that are right, [R].
    asked_R: how many answers each row is asked for, [R].
  """
  figures: dict[str, Any]
  share_R: np.ndarray
  asked_R: np.ndarray


class Probe(Task):
  """Measures each level of training, and the hardest one at longer lengths."""

  help = ('the accuracy of a probe by difficulty and beyond the length of '
          'training')
  why_not_allowed = 'is not trained on a probe'
  reads_held_out = False
  figure_names = ('accuracy', 'rows_right', 'rows', 'level/*', 'beyond/*')
  flags = (
      Flag(name='probe_rows', default=512, help='Rows of each difficulty.',
           least=1, most=2**20),
  )

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return objective.record_kind == probes.KIND_OF_SOURCE

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Prints and returns the accuracy at each level and length."""
    config = evaluation.run.config
    probe = probes.find_probe(config)
    settings = probes.read_settings(config)
    rows = evaluation.options.probe_rows
    print(f'{config.data.source}: {rows:,} rows of each kind\n'
          f'{probe.level:>20} {"length":>7} {"accuracy":>9} {"95 %":>16} '
          f'{"rows right":>11} {"95 %":>16}')

    # Each level and length.
    figures: dict[str, Any] = {'level': {}, 'beyond': {}, 'table': []}
    shares = []
    weights = []
    for cell in list_cells(settings, probe.grows, probe.longer):
      reason = _why_not_measurable(evaluation, cell)
      if reason:
        print(f'{cell.level:>20} {cell.length:>7}   refused: {reason}')
        continue
      measured = measure_cell(evaluation, cell, rows)
      scores = measured.figures
      print(_format_row(cell, scores))
      figures['table'].append(cell._asdict() | scores)
      if cell.beyond == 1:
        shares.append(measured.share_R)
        weights.append(measured.asked_R / scores['answers'])
        figures['level'][f'{cell.level:g}'] = scores['accuracy']
      else:
        figures['beyond'][f'{cell.beyond}x'] = scores['accuracy']

    # The means over the levels of training.
    trained = [row for row in figures['table'] if row['beyond'] == 1]
    for name in ('accuracy', 'rows_right'):
      scores_of_levels = [row[name] for row in trained]
      figures[name] = float(np.mean(scores_of_levels))
    print(f'the mean over the levels of training: accuracy '
          f'{figures["accuracy"]:.4f}, rows right {figures["rows_right"]:.4f}')
    figures['rows'] = rows

    # The scores of each row.
    names = config.data.source, settings, probes.held_out_seed(config), rows
    share_N = np.concatenate(shares)
    weight_N = np.concatenate(weights)
    figures['items'] = {
        'accuracy': items.record_scores(share_N, names=names, weights=weight_N),
        'rows_right': items.record_scores(share_N == 1, names)}
    return figures


def _why_not_measurable(evaluation: Evaluation, cell: ProbeCell) -> str:
  """Returns why rows of a level and length cannot be measured; '': they can."""
  config = evaluation.run.config
  reach = positions.longest_supported_length(evaluation.run.model)
  if cell.length > reach:
    return f'the positions of the model end at {reach:g}'
  settings = probes.read_settings(config)._replace(length=cell.length)
  return probes.find_probe(config).limit(settings, cell.level)


def _format_row(cell: ProbeCell, scores: dict[str, Any]) -> str:
  """Returns the line of a level and length for a reader."""
  low, high = scores['accuracy_95']
  accuracy = f'{scores["accuracy"]:>9.4f} [{low:.4f}, {high:.4f}]'
  low, high = scores['rows_right_95']
  rows_right = f'{scores["rows_right"]:>11.4f} [{low:.4f}, {high:.4f}]'
  return f'{cell.level:>20} {cell.length:>7} {accuracy} {rows_right}'


def list_cells(settings: Any, grows: bool,
               longer: bool = True) -> Iterator[ProbeCell]:
  """Yields what is measured.

  Args:
    settings: the settings of the run's probe.
    grows: whether longer rows are of a larger level, as Probe.grows says.
    longer: whether there are longer rows, as Probe.longer says.
  """
  levels = sorted(set(settings.levels))
  places = np.linspace(0, len(levels) - 1, min(MOST_LEVELS, len(levels)))
  for place in np.unique(np.rint(places).astype(int)):
    yield ProbeCell(level=levels[place], length=settings.length, beyond=1)
  if not longer:
    return
  hardest = levels[-1]
  for factor in LENGTH_FACTORS:
    level = hardest * factor if grows else hardest
    yield ProbeCell(level=level, length=settings.length * factor, beyond=factor)


def measure_cell(evaluation: Evaluation, cell: ProbeCell,
                 count: int) -> MeasuredCell:
  """Returns the figures of `count` held-out rows of one level and length, and
  what each row scores."""
  # The rows.
  place = evaluation.run.place
  config = evaluation.run.config.copy_and_resolve_references()
  config.data.length = cell.length
  probe = probes.find_probe(config)
  settings = probes.read_settings(config)._replace(held_out=count)
  rows = probes.Rows(
      probe=probe, settings=settings, split='eval',
      seed=probes.held_out_seed(config), levels=(cell.level,))
  index, number = devices.batch_shard(place, config.data.batch_size)
  loader = pipeline.Loader(
      name=config.data.source, share=1.0, text=config.data.source,
      dataset=rows, views=[rows], config=config,
      tokenizer=evaluation.tokenizer, split='eval', process_index=index,
      process_count=number)

  # Right answers and answers that are asked for, by row; those of what fills
  # up a batch are left out.
  counts = _make_count_function(evaluation.run.module,
                                objectives.find_objective(config))
  step = evaluation.jit_once(counts, 'probe')
  results = list(evaluation.run_on_batches(
      step, loader, f'{probe.level}: {cell.level}'))
  right_R, asked_R = np.concatenate(results, axis=1).astype(float)
  real_R = asked_R > 0
  right_R = right_R[real_R]
  asked_R = asked_R[real_R]

  # Their shares, and the intervals of these.
  asked = asked_R.sum()
  seen = len(asked_R)
  accuracy = right_R.sum() / asked
  rows_right = np.mean(right_R == asked_R)
  effective_rows = asked ** 2 / np.sum(asked_R ** 2)
  figures = dict(
      accuracy=float(accuracy), accuracy_95=wilson_interval(accuracy,
                                                            effective_rows),
      rows_right=float(rows_right), rows_right_95=wilson_interval(rows_right,
                                                                  seen),
      answers=int(asked), rows=seen)
  return MeasuredCell(figures=figures, share_R=right_R / asked_R,
                      asked_R=asked_R)


def _make_count_function(module: Any, objective: Any):
  """Returns step(params, batch) -> [2, B]: of each row the answers that are
  right, and those that it is asked for; 0 of what fills a batch up."""
  def step(params: Any, batch: Any):
    right_BL = objective.token_losses(module, params, batch).correct
    asked_BL = batch['weights'] > 0
    return jnp.stack([(right_BL & asked_BL).sum(1), asked_BL.sum(1)])

  return step


def score_constant_answer(config: ml_collections.ConfigDict,
                          figure: str = 'probe/accuracy'
             ) -> float:
  """Returns the figure of the constant answer that is the best one for it.

  Args:
    config: the config of a run whose source is a probe.
    figure: one of CONSTANT_FIGURES.
  """
  one_of('figure', figure, CONSTANT_FIGURES)
  return _cross_validate_constant(
      name=probes.parse_probe_name(config.data.source),
      settings=probes.read_settings(config), seed=probes.held_out_seed(config),
      figure=figure)


@functools.cache
def _cross_validate_constant(name: str, settings: probes.Settings, seed: int,
                             figure: str
              ) -> float:
  """Returns the figure of the best constant answer by cross-validation: for
  each fold of the rows, the answer that is the best one for the other folds is
  scored on this one.

  Args:
    name: the name of the probe.
    settings: what its rows are drawn with.
    seed: the seed of the rows.
    figure: one of CONSTANT_FIGURES.
  """
  # The levels whose scores count alike; (): all levels as one.
  probe = probes.PROBES[name]
  levels: list[tuple] = [()]
  if figure != 'accuracy':
    levels = []
    for cell in list_cells(settings, probe.grows, longer=False):
      levels.append((cell.level,))

  # How often each answer is right, and how many are asked for, by level and
  # fold.
  vocab = probe.vocab_size(settings)
  count = CONSTANT_ROWS // len(levels)
  right_NKV = np.zeros((len(levels), CONSTANT_FOLDS, vocab), int)
  asked_NK1 = np.zeros((len(levels), CONSTANT_FOLDS, 1), int)
  for n, level in enumerate(levels):
    rows = probes.Rows(
        probe=probe, settings=settings._replace(held_out=count), split='eval',
        seed=seed, levels=level)
    for k in range(CONSTANT_FOLDS):
      fold = [rows[i] for i in range(k, count, CONSTANT_FOLDS)]
      if figure == 'probe/rows_right':
        answers, asked = _list_row_answers(fold)
      else:
        answers = _list_answers(fold)
        asked = len(answers)
      right_NKV[n, k] = np.bincount(answers, minlength=vocab)
      asked_NK1[n, k] = asked

  # The best answer of the other folds, and what it scores on each fold.
  rest_NKV = right_NKV.sum(1, keepdims=True) - right_NKV
  rest_NK1 = asked_NK1.sum(1, keepdims=True) - asked_NK1
  best_K = (rest_NKV / rest_NK1).mean(0).argmax(1)
  score_KV = (right_NKV / asked_NK1).mean(0)
  return float(score_KV[np.arange(CONSTANT_FOLDS), best_K].mean())


def _list_answers(rows: Sequence[probes.Row]) -> np.ndarray:
  """Returns the answers that rows ask for."""
  return np.concatenate([row.targets[row.asked] for row in rows])


def _list_row_answers(rows: Sequence[probes.Row]) -> tuple[np.ndarray, int]:
  """Returns the answers of the rows that ask for one alone, however often, and
  how many rows ask for any."""
  answers = []
  asking = 0
  for row in rows:
    targets = row.targets[row.asked]
    if not len(targets):
      continue
    asking += 1
    if (targets == targets[0]).all():
      answers.append(targets[0])
  return np.array(answers, int), asking


def wilson_interval(share: float, count: float) -> tuple[float, float]:
  """Returns the bounds of Wilson's 95 % interval (1927) of a share of `count`.

  scipy's binomtest has it for whole numbers of successes alone.
  """
  z2 = 1.959963984540054 ** 2
  scale = 1 + z2 / count
  middle = (share + z2 / (2 * count)) / scale
  variance = share * (1 - share) / count + z2 / (4 * count ** 2)
  half = math.sqrt(z2 * variance) / scale
  return max(middle - half, 0.0), min(middle + half, 1.0)


TASKS = {'probe': Probe()}
