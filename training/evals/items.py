"""The scores of each item of an evaluation: a question, a row, a document.

Runs that were asked the same are compared item by item, so that what a hard
item does to both of them cancels. A task that knows these scores returns
`items` among its figures: by figure a record of `record_scores`, for figures
that are the mean of their items. They stand in what eval.py writes as --json;
those of tasks that are done in training are in evals.ITEMS_FILE of the run's
folder, for the last evaluation.
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
  """Records the scores of all items (texts, questions, ...) of an evaluation,
  so that two models can be compared item by item.

  Args:
    scores: the score of each item.
    names: what identifies the items, in the same order.
    weights: the weight of each item in the mean; None: all count the same.

  Returns:
    A dict with `of`, a digest of the names, by which two records are known to
    be of the same items; `scores`; and `weights` if they are given.
  """
  # Store only a digest of the names, as they may be long texts.
  digest = hashlib.sha256(repr([*names]).encode()).hexdigest()
  record = {'of': digest[:16], 'scores': np.asarray(scores, float).tolist()}
  if weights is not None:
    record['weights'] = np.asarray(weights, float).tolist()
  return record


def record_lm_eval_samples(results: Mapping[str, Any],
                           samples: Sequence[Mapping]) -> dict[str, dict]:
  """Records the scores of the samples of an lm_eval task, for each figure that
  is the mean of its samples' scores. A perplexity, for instance, is not.

  Args:
    results: {'FIGURE,FILTER': value} of the task.
    samples: the samples of the task, or of all tasks of a group, as lm_eval
      logs them.

  Returns:
    {name of the figure: the record of its scores}.
  """
  records = {}
  for full_name, value in results.items():
    # The scores of the samples for this figure and filter. A standard error is
    # a figure, too, and has none.
    figure, _, filter_name = full_name.partition(',')
    filtered = [row for row in samples if row['filter'] == filter_name]
    scores = [row.get(figure) for row in filtered]
    numbers_of_figure = [value, *scores]
    if not scores or not all(map(_is_number, numbers_of_figure)):
      continue
    # Leave out a figure that is not the mean of the scores.
    if np.isclose(np.mean(scores), value):
      names = [row['doc_hash'] for row in filtered]
      records[shorten_figure_name(full_name)] = record_scores(scores, names)
  return records


def _is_number(value: Any) -> bool:
  """Returns whether a value of lm_eval is a number; others are words, lists or
  None."""
  return isinstance(value, numbers.Real)


def shorten_figure_name(full_name: str) -> str:
  """Returns the name of a figure of lm_eval without that of a filter that does
  nothing: 'acc,none' is acc, and 'exact_match,strict' exact_match (strict)."""
  figure, _, filter_name = full_name.partition(',')
  if filter_name in ('', 'none'):
    return figure
  return f'{figure} ({filter_name})'


def pair_scores(pairs: Iterable[Sequence[Mapping | None]]
                ) -> tuple[np.ndarray, np.ndarray, Any] | None:
  """Returns the scores of pairs of records, such as those of two runs, if all
  records are of the same items.

  Args:
    pairs: (record, record) of each pair, as `record_scores` returns them; None
      for a record that does not exist.

  Returns:
    The scores of the first records, [pairs, items]; those of the second
    records; and the weights of the items, or None if all count the same. None
    instead of all three if a record is missing, or is of other items.
  """
  # `of` identifies the items. The same items have the same weights, so those of
  # any record will do.
  first_records = []
  second_records = []
  for first, second in pairs:
    first_records.append(first)
    second_records.append(second)
  records = first_records + second_records
  if not records or None in records:
    return None
  if len({record['of'] for record in records}) > 1:
    return None
  return (_stack_scores(first_records), _stack_scores(second_records),
          records[0].get('weights'))


def _stack_scores(records: Iterable[Mapping]) -> np.ndarray:
  """Returns the scores of records of the same items, [records, items]."""
  return np.array([record['scores'] for record in records], float)


def read_records(path: pathlib.Path) -> dict[str, dict]:
  """Reads the scores of single items that a file or a folder holds.

  Args:
    path: a file of eval.py's --json; or the folder of a run, with its eval.json
      and what was evaluated in training; or that of lm_eval's --output_path
      with --log_samples.

  Returns:
    {TASK/FIGURE: the record of `record_scores`}. Of two with one name, the one
    in the file that is read last stays.

  Raises:
    RequestError: where a file is damaged.
  """
  # The files of eval.py, and of the last evaluation in training.
  records: dict[str, dict] = {}
  files = [path / 'eval.json', path / evals.ITEMS_FILE]
  if path.is_file():
    files = [path]
  for file in files:
    if file.is_file():
      records |= _read_file_of_eval(file)

  # The files of lm_eval, which makes a folder for each model. Their names end
  # in a date, so the newest of two evaluations is read last.
  sample_files = [*path.glob('samples_*.jsonl'),
                  *path.glob('*/samples_*.jsonl')]
  for file in sorted(sample_files):
    records |= _read_file_of_lm_eval(file)
  return records


def _read_file_of_eval(file: pathlib.Path) -> dict[str, dict]:
  """Returns the records of the items of all tasks that a JSON file of eval.py
  has, by TASK/FIGURE."""
  records = {}
  for task, figures in storage.read_json(file).items():
    # A value that is no dict is a number, such as the step.
    if not isinstance(figures, Mapping):
      continue
    for name, record in figures.get('items', {}).items():
      records[f'{task}/{name}'] = record
  return records


def _read_file_of_lm_eval(file: pathlib.Path) -> dict[str, dict]:
  """Returns the records of the items of the task that a file of lm_eval is of,
  by TASK/FIGURE.

  Args:
    file: a file samples_TASK_DATE.jsonl, which has a line for each sample. The
      means of the task are in results_DATE.json beside it.

  Raises:
    RequestError: if that file is missing, or a line is no JSON object.
  """
  stem = file.name.removeprefix('samples_').removesuffix('.jsonl')
  task, _, date = stem.rpartition('_')
  results_file = file.with_name(f'results_{date}.json')
  require(results_file.is_file(),
          f'{file} has no {results_file.name} beside it')
  results = storage.read_json(results_file)['results'][task]
  samples = []
  for line in file.read_text().splitlines():
    samples.append(storage.parse_json_object(line, str(file)))
  records = {}
  for name, record in record_lm_eval_samples(results, samples).items():
    records[f'{task}/{name}'] = record
  return records
