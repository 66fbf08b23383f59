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

from collections.abc import Callable, Iterator, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from architectures.parts import positions
from common.errors import check_choice
from training import objectives
from training.data import probes
from training.distributed import devices
from training.evals import Evaluation, Flag, Task, items
from training.objectives import pipeline

# The rows that are longer than in training, as multiples of its length.
LENGTH_FACTORS = (2, 4)
# How many of the levels of difficulty of training are measured; of more, some
# that are evenly spread.
MOST_LEVELS = 6

# The rows that a constant answer is chosen and scored on, in all levels
# together, and the folds of its cross-validation.
CONSTANT_ROWS = 4096
CONSTANT_FOLDS = 8
# The figures of a constant answer. In `accuracy` all answers count alike; in
# the figures of this task all levels do.
CONSTANT_FIGURES = ('accuracy', 'probe/accuracy', 'probe/rows_right')


class ProbeCell(NamedTuple):
  """A level of difficulty and a length, whose rows are measured together.

  Attributes:
    level: the level, as the probe's settings have it.
    length: the length of the rows.
    beyond: how many times the length of training that is; 1: as in training.
  """
  level: int | float
  length: int
  beyond: int


class MeasuredCell(NamedTuple):
  """The scores of R rows of one level and length.

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
    num_rows = evaluation.options.probe_rows
    print(f'{config.data.source}: {num_rows:,} rows of each kind\n'
          f'{probe.level:>20} {"length":>7} {"accuracy":>9} {"95 %":>16} '
          f'{"rows right":>11} {"95 %":>16}')

    # Each level and length.
    figures: dict[str, Any] = {'level': {}, 'beyond': {}, 'table': []}
    shares = []
    weights = []
    for cell in list_cells(settings, grows=probe.grows, longer=probe.longer):
      reason = _why_not_measurable(evaluation, cell)
      if reason:
        print(f'{cell.level:>20} {cell.length:>7}   refused: {reason}')
        continue
      measured = measure_cell(evaluation, cell=cell, num_rows=num_rows)
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
    trained_cells = [row for row in figures['table'] if row['beyond'] == 1]
    for name in ('accuracy', 'rows_right'):
      scores_of_levels = [row[name] for row in trained_cells]
      figures[name] = float(np.mean(scores_of_levels))
    print(f'the mean over the levels of training: accuracy '
          f'{figures["accuracy"]:.4f}, rows right {figures["rows_right"]:.4f}')
    figures['rows'] = num_rows

    # The scores of each row; what the rows were drawn with tells them from
    # others.
    names = (config.data.source, settings, probes.held_out_seed(config),
             num_rows)
    share_N = np.concatenate(shares)
    weight_N = np.concatenate(weights)
    figures['items'] = {
        'accuracy': items.record_scores(share_N, names=names, weights=weight_N),
        'rows_right': items.record_scores(share_N == 1, names)}
    return figures


def _why_not_measurable(evaluation: Evaluation, cell: ProbeCell) -> str:
  """Returns why rows of a level and length cannot be measured; '': they can."""
  config = evaluation.run.config
  longest = positions.longest_supported_length(evaluation.run.model)
  if cell.length > longest:
    return f'the positions of the model end at {longest:g}'
  settings = probes.read_settings(config)._replace(length=cell.length)
  return probes.find_probe(config).reason_against(settings, cell.level)


def _format_row(cell: ProbeCell, scores: dict[str, Any]) -> str:
  """Formats the line of a table with the accuracies at one level of difficulty
  and one row length.

  Args:
    cell: the level and the length.
    scores: the figures of `measure_cell`, each with its 95 % interval.
  """
  low, high = scores['accuracy_95']
  accuracy = f'{scores["accuracy"]:>9.4f} [{low:.4f}, {high:.4f}]'
  low, high = scores['rows_right_95']
  rows_right = f'{scores["rows_right"]:>11.4f} [{low:.4f}, {high:.4f}]'
  return f'{cell.level:>20} {cell.length:>7} {accuracy} {rows_right}'


def list_cells(settings: Any, grows: bool, longer: bool = True
               ) -> Iterator[ProbeCell]:
  """Lists the levels of difficulty and the row lengths at which a probe (a
  small task) is measured.

  First come up to MOST_LEVELS levels of training at the length of training,
  evenly spread from the easiest to the hardest. Then comes the hardest level at
  longer lengths.

  Args:
    settings: the settings of the run's probe.
    grows: whether the level grows with the length of rows, as Probe.grows says.
    longer: whether there are longer rows, as Probe.longer says.

  Yields:
    A level, a length, and how many times the length of training that is.
  """
  # Rounding may choose a level twice, which np.unique undoes.
  levels = sorted(set(settings.levels))
  indices = np.linspace(0, len(levels) - 1, min(MOST_LEVELS, len(levels)))
  for i in np.unique(np.rint(indices).astype(int)):
    yield ProbeCell(level=levels[i], length=settings.length, beyond=1)
  if not longer:
    return
  hardest = levels[-1]
  for factor in LENGTH_FACTORS:
    level = hardest * factor if grows else hardest
    yield ProbeCell(level=level, length=settings.length * factor, beyond=factor)


def measure_cell(evaluation: Evaluation, cell: ProbeCell, num_rows: int
                 ) -> MeasuredCell:
  """Measures how often a model answers rightly on held-out rows of one
  difficulty (level) and length.

  Among the figures are accuracy and rows_right, their 95 % intervals
  accuracy_95 and rows_right_95, and how many answers and rows they are over.

  Args:
    evaluation: the evaluation of the run.
    cell: the level and the length.
    num_rows: the number of rows to draw.

  Returns:
    The figures, with the scores of the rows.
  """
  # Draw the rows of the probe, in batches. They are the same for all runs.
  config = evaluation.run.config.copy_and_resolve_references()
  config.data.length = cell.length
  probe = probes.find_probe(config)
  settings = probes.read_settings(config)._replace(held_out=num_rows)
  rows = probes.Rows(
      probe=probe, settings=settings, split='eval',
      seed=probes.held_out_seed(config), levels=(cell.level,))
  process_index, num_processes = devices.batch_slice_of_process(
      evaluation.run.batch_sharding, config.data.batch_size)
  loader = pipeline.Loader(
      name=config.data.source, share=1.0, text=config.data.source,
      dataset=rows, views=[rows], config=config,
      tokenizer=evaluation.tokenizer, split='eval', process_index=process_index,
      process_count=num_processes)

  # Count the answers of each row (axis R) that are right, and those that it is
  # asked for. What fills up a batch is asked for none, and left out.
  count_answers = _make_count_function(evaluation.run.module,
                                       objectives.find_objective(config))
  step = evaluation.jit_once(count_answers, 'probe')
  counts = list(evaluation.run_on_batches(
      step, loader, f'{probe.level}: {cell.level}'))
  right_R, asked_R = np.concatenate(counts, axis=1).astype(float)
  is_row_R = asked_R > 0
  right_R = right_R[is_row_R]
  asked_R = asked_R[is_row_R]

  # Compute their shares, and the intervals of these. Answers of one row are not
  # independent, so the interval counts rows. Rows that ask for unequal numbers
  # of answers count as fewer ones, (sum n)^2 / sum n^2.
  num_asked = asked_R.sum()
  num_rows_read = len(asked_R)
  num_effective_rows = num_asked ** 2 / np.sum(asked_R ** 2)
  accuracy = right_R.sum() / num_asked
  rows_right = np.mean(right_R == asked_R)
  figures = dict(
      accuracy=float(accuracy),
      accuracy_95=wilson_interval(accuracy, num_effective_rows),
      rows_right=float(rows_right),
      rows_right_95=wilson_interval(rows_right, num_rows_read),
      answers=int(num_asked), rows=num_rows_read)
  return MeasuredCell(figures=figures, share_R=right_R / asked_R,
                      asked_R=asked_R)


def _make_count_function(module: Any, objective: Any) -> Callable:
  """Makes the function that counts the right answers of a model.

  Args:
    module: the Flax module of the model.
    objective: the objective by which it was trained.

  Returns:
    count_answers(params, batch), which returns [2, B]: for each of B rows the
    number of right answers, and the number of answers that it asks for.
  """

  def count_answers(params: Any, batch: Any) -> jax.Array:
    """Returns the right answers and all answers of each row, [2, B]; 0 of what
    fills a batch up."""
    is_right_BL = objective.token_losses(module, params, batch).correct
    is_asked_BL = batch['weights'] > 0
    num_right_B = (is_right_BL & is_asked_BL).sum(1)
    return jnp.stack([num_right_B, is_asked_BL.sum(1)])

  return count_answers


def score_constant_answer(config: ml_collections.ConfigDict,
                          figure: str = 'probe/accuracy') -> float:
  """Computes a baseline: the score of a model that always gives the same
  answer, the one that is best for the figure.

  Args:
    config: the config of a run on a probe (a small task).
    figure: the figure to compute, one of CONSTANT_FIGURES.

  Returns:
    The figure of that model on the held-out rows.

  Raises:
    RequestError: for an unknown figure.
  """
  check_choice('figure', value=figure, choices=CONSTANT_FIGURES)
  return _cross_validate_constant(
      name=probes.parse_probe_name(config.data.source),
      settings=probes.read_settings(config), seed=probes.held_out_seed(config),
      figure=figure)


@functools.cache
def _cross_validate_constant(name: str, settings: probes.Settings, seed: int,
                             figure: str) -> float:
  """Returns the figure of the best constant answer by cross-validation: for
  each fold of the rows, the answer that is the best one for the other folds is
  scored on this one.

  Args:
    name: the name of the probe.
    settings: the settings with which its rows are drawn.
    seed: the seed of the rows.
    figure: one of CONSTANT_FIGURES.
  """
  # The groups of levels that count alike: for `accuracy` all levels are one
  # group, (), and else each is a group of its own.
  probe = probes.PROBES[name]
  level_groups: list[tuple] = [()]
  if figure != 'accuracy':
    level_groups = []
    for cell in list_cells(settings, grows=probe.grows, longer=False):
      level_groups.append((cell.level,))

  # How often each answer V is right, and how many are asked for, by the N
  # groups and the K folds.
  vocab_size = probe.vocab_size(settings)
  num_rows = CONSTANT_ROWS // len(level_groups)
  right_NKV = np.zeros((len(level_groups), CONSTANT_FOLDS, vocab_size), int)
  asked_NK1 = np.zeros((len(level_groups), CONSTANT_FOLDS, 1), int)
  for n, levels in enumerate(level_groups):
    rows = probes.Rows(
        probe=probe, settings=settings._replace(held_out=num_rows),
        split='eval', seed=seed, levels=levels)
    for k in range(CONSTANT_FOLDS):
      rows_of_fold = [rows[i] for i in range(k, num_rows, CONSTANT_FOLDS)]
      if figure == 'probe/rows_right':
        answers, num_asked = _list_row_answers(rows_of_fold)
      else:
        answers = _list_answers(rows_of_fold)
        num_asked = len(answers)
      right_NKV[n, k] = np.bincount(answers, minlength=vocab_size)
      asked_NK1[n, k] = num_asked

  # The best answer of the other folds, and what it scores on each fold.
  other_right_NKV = right_NKV.sum(1, keepdims=True) - right_NKV
  other_asked_NK1 = asked_NK1.sum(1, keepdims=True) - asked_NK1
  best_answer_K = (other_right_NKV / other_asked_NK1).mean(0).argmax(1)
  score_KV = (right_NKV / asked_NK1).mean(0)
  return float(score_KV[np.arange(CONSTANT_FOLDS), best_answer_K].mean())


def _list_answers(rows: Sequence[probes.Row]) -> np.ndarray:
  """Returns all answers that rows ask for, one after the other."""
  return np.concatenate([row.targets[row.asked] for row in rows])


def _list_row_answers(rows: Sequence[probes.Row]) -> tuple[np.ndarray, int]:
  """Finds the rows that a model gets right as a whole if it always gives the
  same answer: those in which all places that ask have one answer.

  Args:
    rows: the rows of a probe, each with its targets and which of them are asked
      for.

  Returns:
    The answer of each such row, int; and the number of rows that ask for
    anything.
  """
  answers = []
  num_asking = 0
  for row in rows:
    targets = row.targets[row.asked]
    if not len(targets):
      continue
    num_asking += 1
    if (targets == targets[0]).all():
      answers.append(targets[0])
  return np.array(answers, int), num_asking


def wilson_interval(share: float, num_trials: float) -> tuple[float, float]:
  """Computes Wilson's 95 % confidence interval (1927) of a share p of n:
  (p + z^2/2n ± z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n).

  scipy's binomtest has it for whole numbers of successes alone.

  Args:
    share: p, from 0 to 1.
    num_trials: n, which may be a fraction.

  Returns:
    The lower and the upper bound.
  """
  # z is the 97.5 % quantile of the normal distribution, which leaves out 2.5 %
  # on either side. Rounding may bring the bounds out of 0 to 1.
  z_squared = 1.959963984540054 ** 2
  scale = 1 + z_squared / num_trials
  middle = (share + z_squared / (2 * num_trials)) / scale
  variance = share * (1 - share) / num_trials
  variance += z_squared / (4 * num_trials ** 2)
  half_width = math.sqrt(z_squared * variance) / scale
  return max(middle - half_width, 0.0), min(middle + half_width, 1.0)


TASKS = {'probe': Probe()}
