"""The scores of each item of an evaluation: a question, a row, a document.

Runs that were asked the same are compared item by item, so that what a hard
item does to both of them cancels. A task that knows these scores returns
`items` among its figures: by figure a record as `of` makes it, of figures that
are the mean of their items. They stand in what eval.py writes as --json; of
tasks that are done in training, those of the last evaluation are in evals.ITEMS
of the run's folder.
"""

from collections.abc import Iterable, Mapping, Sequence
import hashlib
import numbers
import pathlib
from typing import Any

import numpy as np

from common.errors import require
from training import evals
from training.workdir import storage


def record_scores(scores: Sequence[float], names: Iterable[Any],
       weights: Sequence[float] | None = None) -> dict[str, Any]:
  """Returns the record of a figure, which is the mean of `scores` by `weights`.

  Args:
    scores: the score of each item.
    names: what tells these items, in this order, from others.
    weights: the weight of each item; None: all count alike.
  """
  digest = hashlib.sha256(repr([*names]).encode()).hexdigest()
  record = {'of': digest[:16], 'scores': np.asarray(scores, float).tolist()}
  if weights is not None:
    record['weights'] = np.asarray(weights, float).tolist()
  return record


def record_lm_eval_samples(results: Mapping[str, Any],
                           samples: Sequence[Mapping]
               ) -> dict[str, dict]:
  """Returns the records of the figures of a task of lm_eval that are means of
  what its samples score; a perplexity is none.

  Args:
    results: the figures of the task, by 'FIGURE,FILTER'.
    samples: its own, or those of all tasks of a group, as lm_eval logs them.
  """
  records = {}
  for name, value in results.items():
    figure, _, kind = name.partition(',')
    # The scores of the items, under the name and the filter of the figure.
    rows = [row for row in samples if row['filter'] == kind]
    scores = [row.get(figure) for row in rows]
    if not rows or not isinstance(value, numbers.Real):
      continue
    if not all(isinstance(score, numbers.Real) for score in scores):
      continue
    # A figure that is not the mean of its scores is a perplexity, or the like.
    if np.isclose(np.mean(scores), value):
      names = [row['doc_hash'] for row in rows]
      records[shorten_figure_name(name)] = record_scores(scores, names)
  return records


def shorten_figure_name(name: str) -> str:
  """Returns what a figure of lm_eval is called without the name of a filter
  that does nothing."""
  figure, _, kind = name.partition(',')
  if kind in ('', 'none'):
    return figure
  return f'{figure} ({kind})'


def pair_scores(pairs: Iterable[Sequence[Mapping | None]]
           ) -> tuple[np.ndarray, np.ndarray, Any] | None:
  """Returns the scores of the first and of the second of each pair of records,
  [pairs, items], and the weights of the items; None where a record is, or they
  are not all of the same items."""
  first = []
  second = []
  for one, other in pairs:
    first.append(one)
    second.append(other)
  every = first + second
  if not every or None in every:
    return None
  if len({record['of'] for record in every}) > 1:
    return None
  return _stack_scores(first), _stack_scores(second), every[0].get('weights')


def _stack_scores(records: Iterable[Mapping]) -> np.ndarray:
  """Returns the scores of records of the same items, [records, items]."""
  return np.array([record['scores'] for record in records], float)


def read_records(path: pathlib.Path) -> dict[str, dict]:
  """Returns the records that a file of eval.py's --json holds; or the folder of
  a run (eval.json, and what was evaluated in training), or of lm_eval's
  --output_path with --log_samples: by TASK/FIGURE.

  Raises:
    RequestError: where a file is damaged.
  """
  # Files of eval.py, and of the last evaluation in training.
  records: dict[str, dict] = {}
  files = [path / 'eval.json', path / evals.ITEMS_FILE]
  if path.is_file():
    files = [path]
  for file in files:
    if not file.is_file():
      continue
    for task, figures in storage.read_json(file).items():
      if not isinstance(figures, Mapping):
        continue
      for name, record in figures.get('items', {}).items():
        records[f'{task}/{name}'] = record

  # Files of lm_eval, which makes a folder of each model.
  for file in sorted([*path.glob('samples_*.jsonl'),
                      *path.glob('*/samples_*.jsonl')]):
    # samples_TASK_DATE.jsonl, beside results_DATE.json.
    stem = file.name.removeprefix('samples_').removesuffix('.jsonl')
    task, _, date = stem.rpartition('_')
    summary = file.with_name(f'results_{date}.json')
    require(summary.is_file(), f'{file} has no {summary.name} beside it')
    results = storage.read_json(summary)['results'][task]
    samples = []
    for line in file.read_text().splitlines():
      samples.append(storage.parse_json_object(line, str(file)))
    for name, record in record_lm_eval_samples(results, samples).items():
      records[f'{task}/{name}'] = record
  return records
