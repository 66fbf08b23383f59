"""What each item of an evaluation scores: a question, a row, a document.

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


def of(scores: Sequence[float], names: Iterable[Any],
       weights: Sequence[float] | None = None) -> dict[str, Any]:
  """Returns the record of a figure, which is the mean of `scores` by `weights`.

  Args:
    scores: of each item.
    names: what tells these items, in this order, from others.
    weights: None: all count alike.
  """
  record = {'of': hashlib.sha256(repr([*names]).encode()).hexdigest()[:16],
            'scores': np.asarray(scores, float).tolist()}
  return record if weights is None else record | {
      'weights': np.asarray(weights, float).tolist()}


def of_samples(results: Mapping[str, Any], samples: Sequence[Mapping]
               ) -> dict[str, dict]:
  """Returns the records of the figures of a task of lm_eval that are means of
  what its samples score; a perplexity is none.

  Args:
    results: of the task, by 'FIGURE,FILTER'.
    samples: its own, or those of all tasks of a group, as lm_eval logs them.
  """
  records = {}
  for name, value in results.items():
    figure, _, kind = name.partition(',')
    rows = [row for row in samples if row['filter'] == kind]
    scores = [row.get(figure) for row in rows]
    if (isinstance(value, numbers.Real) and rows
        and all(isinstance(score, numbers.Real) for score in scores)
        and np.isclose(np.mean(scores), value)):
      records[called(name)] = of(scores, [row['doc_hash'] for row in rows])
  return records


def called(name: str) -> str:
  """Returns what a figure of lm_eval is called without the name of a filter
  that does nothing."""
  figure, _, kind = name.partition(',')
  return figure if kind in ('', 'none') else f'{figure} ({kind})'


def paired(pairs: Iterable[Sequence[Mapping | None]]
           ) -> tuple[np.ndarray, np.ndarray, Any] | None:
  """Returns the scores of the first and of the second of each pair of records,
  [pairs, items], and the weights of the items; None where a record is, or they
  are not all of the same items."""
  pairs = [*pairs]
  every = [record for pair in pairs for record in pair]
  if not every or None in every or len({x['of'] for x in every}) > 1:
    return None
  scores = np.array([[x['scores'] for x in pair] for pair in pairs], float)
  return scores[:, 0], scores[:, 1], every[0].get('weights')


def read(path: pathlib.Path) -> dict[str, dict]:
  """Returns the records that a file of eval.py's --json holds; or the folder of
  a run (eval.json, and what was evaluated in training), or of lm_eval's
  --output_path with --log_samples: by TASK/FIGURE.

  Raises:
    RequestError: where a file is damaged.
  """
  records: dict[str, dict] = {}
  load = storage.read_json
  for file in [path] if path.is_file() else [
      path / 'eval.json', path / evals.ITEMS]:
    for task, figures in load(file).items() if file.is_file() else ():
      if isinstance(figures, Mapping):
        records |= {f'{task}/{name}': record
                    for name, record in figures.get('items', {}).items()}
  # lm_eval makes a folder of each model.
  for file in sorted([*path.glob('samples_*.jsonl'),
                      *path.glob('*/samples_*.jsonl')]):
    task, _, date = file.name[len('samples_'):-len('.jsonl')].rpartition('_')
    summary = file.with_name(f'results_{date}.json')
    require(summary.is_file(), f'{file} has no {summary.name} beside it')
    samples = [storage.parse(line, str(file))
               for line in file.read_text().splitlines()]
    records |= {f'{task}/{name}': record for name, record in of_samples(
        load(summary)['results'][task], samples).items()}
  return records
