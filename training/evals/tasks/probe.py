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

from collections.abc import Iterator
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
from training.evals import Evaluation, Flag, Task, items, without
from training.objectives import pipeline

FACTORS = (2, 4)  # lengths beyond training
LEVELS = 6  # at most so many of the levels of training are measured

CONSTANT_ROWS, FOLDS = 4096, 8  # of a constant answer, over all levels
# In `accuracy` all answers count alike; in a task's figures all levels do.
CONSTANT_FIGURES = ('accuracy', 'probe/accuracy', 'probe/rows_right')


class Cell(NamedTuple):
  """What is measured at once: rows of one level and length."""
  level: int | float
  length: int
  beyond: int  # how many times the length of training; 1: as in training


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Measures each level of training, and the hardest one at longer lengths."""
  config = evaluation.run.config
  probe, settings = probes.of(config), probes.settings(config)
  rows = evaluation.options.probe_rows
  print(f'{config.data.source}: {rows:,} rows of each kind\n'
        f'{probe.level:>20} {"length":>7} {"accuracy":>9} {"95 %":>16} '
        f'{"rows right":>11} {"95 %":>16}')
  figures: dict[str, Any] = {'level': {}, 'beyond': {}, 'table': []}
  rows_2R: list[np.ndarray] = []
  reach = positions.reach(evaluation.run.model)
  shown = lambda bounds: f'[{bounds[0]:.4f}, {bounds[1]:.4f}]'
  for cell in cells(settings, probe.grows, probe.longer):
    reason = (f'the positions of the model end at {reach:g}'
              if cell.length > reach else probe.limit(
                  settings._replace(length=cell.length), cell.level))
    if reason:
      print(f'{cell.level:>20} {cell.length:>7}   refused: {reason}')
      continue
    scores, each_2R = measured(evaluation, cell, rows)
    print(f'{cell.level:>20} {cell.length:>7} {scores["accuracy"]:>9.4f} '
          f'{shown(scores["accuracy_95"])} {scores["rows_right"]:>11.4f} '
          f'{shown(scores["rows_right_95"])}')
    figures['table'].append(cell._asdict() | scores)
    if cell.beyond == 1:
      rows_2R.append(each_2R / [[1], [scores['answers']]])
      figures['level'][f'{cell.level:g}'] = scores['accuracy']
    else:
      figures['beyond'][f'{cell.beyond}x'] = scores['accuracy']
  trained = [row for row in figures['table'] if row['beyond'] == 1]
  for name in ('accuracy', 'rows_right'):
    figures[name] = float(np.mean([row[name] for row in trained]))
  print(f'the mean over the levels of training: accuracy '
        f'{figures["accuracy"]:.4f}, rows right {figures["rows_right"]:.4f}')
  share_N, weights_N = np.concatenate(rows_2R, axis=1)
  names = config.data.source, settings, probes.held_out_seed(config), rows
  return figures | {'rows': rows, 'items': {
      'accuracy': items.of(share_N, names, weights_N),
      'rows_right': items.of(share_N == 1, names)}}


def cells(settings: Any, grows: bool, longer: bool = True) -> Iterator[Cell]:
  """Yields what is measured.

  Args:
    settings: of the run's probe.
    grows: whether longer rows are of a larger level, as Probe.grows says.
    longer: whether there are longer rows, as Probe.longer says.
  """
  levels = sorted(set(settings.levels))
  places = np.linspace(0, len(levels) - 1, min(LEVELS, len(levels)))
  for place in np.unique(np.rint(places).astype(int)):
    yield Cell(levels[place], settings.length, 1)
  for factor in FACTORS if longer else ():
    yield Cell(levels[-1] * factor if grows else levels[-1],
               settings.length * factor, factor)


def measured(evaluation: Evaluation, cell: Cell, count: int
             ) -> tuple[dict[str, Any], np.ndarray]:
  """Returns the figures of `count` held-out rows of one level and length; and
  [2, rows]: the share of the answers of each that are right, and how many it is
  asked for."""
  run_, config = evaluation.run, evaluation.run.config
  config = config.copy_and_resolve_references()
  config.data.length = cell.length
  rows = probes.Rows(
      probes.of(config), probes.settings(config)._replace(held_out=count),
      'eval', probes.held_out_seed(config), levels=(cell.level,))
  loader = pipeline.Loader(
      config.data.source, 1.0, config.data.source, rows, [rows], config,
      evaluation.tokenizer, 'eval',
      *devices.batch_shard(run_.place, config.data.batch_size))
  objective = objectives.of(config)
  step = evaluation.program(_counts(run_.module, objective), 'probe')
  right_R, asked_R = np.concatenate([*evaluation.results(
      step, loader, f'{probes.of(config).level}: {cell.level}')],
          axis=1).astype(float)
  right_R, asked_R = right_R[asked_R > 0], asked_R[asked_R > 0]
  asked, seen = asked_R.sum(), len(asked_R)
  accuracy, whole = right_R.sum() / asked, np.mean(right_R == asked_R)
  return dict(
      accuracy=float(accuracy),
      accuracy_95=wilson(accuracy, asked ** 2 / np.sum(asked_R ** 2)),
      rows_right=float(whole), rows_right_95=wilson(whole, seen),
      answers=int(asked), rows=seen), np.stack([right_R / asked_R, asked_R])


def _counts(module: Any, objective: Any):
  """Returns step(params, batch) -> [2, B]: of each row the answers that are
  right, and those that it is asked for; 0 of what fills a batch up."""
  def step(params: Any, batch: Any):
    right_BL = objective.token_losses(module, params, batch).correct
    asked_BL = batch['weights'] > 0
    return jnp.stack([(right_BL & asked_BL).sum(1), asked_BL.sum(1)])

  return step


def constant(config: ml_collections.ConfigDict, figure: str = 'probe/accuracy'
          ) -> float:
  """Returns the figure of the constant answer that is the best one for it.

  Args:
    config: of a run whose source is a probe.
    figure: one of CONSTANT_FIGURES.
  """
  one_of('figure', figure, CONSTANT_FIGURES)
  return _constant(probes.name_of(config.data.source), probes.settings(config),
                probes.held_out_seed(config), figure)


@functools.cache
def _constant(name: str, settings: probes.Settings, seed: int, figure: str
           ) -> float:
  probe = probes.PROBES[name]
  levels = [()] if figure == 'accuracy' else [
      (cell.level,) for cell in cells(settings, probe.grows, longer=False)]
  count = CONSTANT_ROWS // len(levels)
  right, asked = [], []  # [level][fold]
  for level in levels:
    rows = probes.Rows(probe, settings._replace(held_out=count), 'eval', seed,
                       level)
    folds = [[rows[i] for i in range(fold, count, FOLDS)]
             for fold in range(FOLDS)]
    answers = [_answers(fold, figure == 'probe/rows_right') for fold in folds]
    right.append([np.bincount(each, minlength=probe.vocab_size(settings))
                  for each, _ in answers])
    asked.append([number for _, number in answers])
  right_NKV, asked_NK1 = np.array(right), np.array(asked)[..., None]
  rest_KV = ((right_NKV.sum(1, keepdims=True) - right_NKV)
             / (asked_NK1.sum(1, keepdims=True) - asked_NK1)).mean(0)
  score_KV = (right_NKV / asked_NK1).mean(0)
  return float(score_KV[np.arange(FOLDS), rest_KV.argmax(1)].mean())


def _answers(rows: list[probes.Row], whole: bool) -> tuple[np.ndarray, int]:
  """Returns the answers that rows ask for, and how many these are; or where
  `whole` the answers of rows that ask for one alone, and how many rows
  ask for any."""
  each = [row.targets[row.asked] for row in rows if row.asked.any()]
  if whole:
    return np.array([targets[0] for targets in each
                     if (targets == targets[0]).all()], int), len(each)
  answers = np.concatenate(each)
  return answers, len(answers)


def wilson(share: float, count: float) -> tuple[float, float]:
  """Returns the bounds of Wilson's 95 % interval (1927) of a share of `count`.

  scipy's binomtest has it for whole numbers of successes alone.
  """
  z2 = 1.959963984540054 ** 2
  middle = (share + z2 / (2 * count)) / (1 + z2 / count)
  half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count ** 2))
                   ) / (1 + z2 / count)
  return max(middle - half, 0.0), min(middle + half, 1.0)


TASKS = {'probe': Task(
    'the accuracy of a probe by difficulty and beyond the length of training',
    run, without(lambda objective: objective.record_kind == probes.KIND,
                 'is not trained on a probe'), held_out=False, flags=(
        Flag('probe_rows', 512, 'Rows of each difficulty.', 1, 2**20),),
    figures=('accuracy', 'rows_right', 'rows', 'level/*', 'beyond/*'))}
