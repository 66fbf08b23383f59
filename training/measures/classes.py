"""What is measured of labels and of numbers, by scikit-learn and SciPy.

Of labels: accuracy; F1 of each label and the mean of those that occur, be it as
an answer or as a prediction (macro); of two labels the F1 of the second, which
is taken as the positive one, as 1 is of 0 and 1; and
Matthews' correlation coefficient (Matthews 1975), as GLUE's tasks are measured
(Wang et al. 2018). Of numbers: Pearson's and Spearman's correlation.
"""

from collections.abc import Iterable, Sequence
import json
from typing import Any
import warnings

import numpy as np

from configs.errors import RequestError, require
from training.data import records
from training.measures import Measured

SHOWN = 20  # labels of a printed confusion matrix
NONE = '(none of these)'
# The names of what is measured.
FIGURES = 'accuracy', 'f1', 'f1_macro', 'mcc', 'rows'
FIGURES_OF_NUMBERS = ('pearson', 'spearman', 'mean_squared_error',
                      'mean_absolute_error', 'rows')


def check_installed() -> None:
  """Raises RequestError where scikit-learn is not there."""
  try:
    import sklearn.metrics  # noqa: F401
  except ImportError as error:
    raise RequestError('task labels needs the package scikit-learn: '
                       "pip install 'archetype[finetune]'") from error


def of_scores(view: Any, scores: Sequence[np.ndarray], config: Any = None,
              options: Any = None) -> Measured:
  """Measures the label with the highest score of each row.

  Args:
    view: of training/data/records.py, with labels.
    scores: [U] of each of its rows.
    config, options: not read.
  """
  del config, options
  scores_NU = np.stack(scores)
  targets = np.array([item.target for item in view.items])
  p_NU = np.exp(scores_NU - scores_NU.max(1, keepdims=True))
  p_NU /= p_NU.sum(1, keepdims=True)
  predictions = [
      _told(record) | {
          'predicted': view.labels[int(p_U.argmax())],
          'probabilities': dict(zip(view.labels, map(float, p_U)))}
      for record, p_U in zip(view.records, p_NU)]
  return _measured(view.labels, targets, scores_NU.argmax(1), predictions)


def of_texts(view: Any, written: Sequence[tuple[str, str, bool]],
             config: Any = None, options: Any = None) -> Measured:
  """Measures labels that are written as text.

  Args:
    view, config, options: not read.
    written: (what the model wrote, the label) of each row, and more. The space
      that some tokenizers put before a text is no part of either.
  """
  del view, config, options
  rows = [(text.strip(), target.strip()) for text, target, *_ in written]
  labels = labels_of_texts(target for _, target in rows)
  numbers = {label: i for i, label in enumerate(labels)}
  found = np.array([numbers.get(text, len(labels)) for text, _ in rows])
  targets = np.array([numbers[target] for _, target in rows])
  predictions = [{'label': target, 'predicted': text} for text, target in rows]
  return _measured([*labels, NONE] if (found == len(labels)).any() else labels,
                   targets, found, predictions, len(labels))


def labels_of_texts(targets: Iterable[str]) -> tuple[str, ...]:
  """Returns the labels that targets write, in order.

  Raises:
    RequestError: where all are one label.
  """
  labels = records.in_order(target.strip() for target in targets)
  require(len(labels) > 1, f'what is held out has one label, {labels[0]!r}: '
          'there is nothing to measure')
  return labels


def _measured(names: Sequence[str], targets: np.ndarray, found: np.ndarray,
              predictions: list[dict], count: int = 0) -> Measured:
  """Of the first `count` labels; 0: of all. Those after them are never right.
  """
  from sklearn import metrics
  count = count or len(names)
  precision, recall, f1, rows = metrics.precision_recall_fscore_support(
      targets, found, labels=range(count), zero_division=0.0)
  occur = np.union1d(targets, found)
  macro = float(np.mean(f1[occur[occur < count]]))
  figures = {
      'accuracy': float(metrics.accuracy_score(targets, found)),
      'f1': float(f1[1]) if count == 2 else macro, 'f1_macro': macro,
      'mcc': float(metrics.matthews_corrcoef(targets, found)),
      'rows': len(targets)}
  confusion = metrics.confusion_matrix(targets, found, labels=range(len(names)))
  each = [{'label': name, 'precision': float(p), 'recall': float(r),
           'f1': float(f), 'rows': int(n)}
          for name, p, r, f, n in zip(names, precision, recall, f1, rows)]
  words = f"F1 of '{names[1]}'" if count == 2 else 'F1, macro'
  told = [_line('accuracy', figures['accuracy']), _line(words, figures['f1'])]
  if count == 2:
    told.append(_line('F1, macro', macro))
  told += [_line("Matthews' correlation", figures['mcc']), '',
           *_table(each), *_pictured(names, confusion[:count])]
  return Measured(figures | {'by_label': each, 'labels': [*names],
                             'confusion': confusion.tolist()},
                  [f'{len(targets):,} records', *told], _file(predictions))


def of_numbers(view: Any, scores: Sequence[np.ndarray], config: Any = None,
               options: Any = None) -> Measured:
  """Measures numbers, [1] of each row; `config` and `options` are not read.
  """
  del config, options
  from scipy import stats
  found = np.array([float(score[0]) for score in scores])
  targets = np.array([item.target for item in view.items])
  with warnings.catch_warnings():
    # Of a constant there is no correlation: nan, which is shown as n/a.
    warnings.simplefilter('ignore')
    pearson, spearman = (
        float(kind(targets, found).statistic) if len(found) > 1 else np.nan
        for kind in (stats.pearsonr, stats.spearmanr))
  error = found - targets
  figures = {'pearson': pearson, 'spearman': spearman,
             'mean_squared_error': float(np.mean(error ** 2)),
             'mean_absolute_error': float(np.mean(np.abs(error))),
             'rows': len(targets)}
  predictions = [_told(record) | {'predicted': float(value)}
                 for record, value in zip(view.records, found)]
  told = [_line(words, figures[name]) for words, name in (
      ("Pearson's correlation", 'pearson'),
      ("Spearman's correlation", 'spearman'),
      ('mean squared error', 'mean_squared_error'),
      ('mean absolute error', 'mean_absolute_error'))]
  return Measured(figures, [f'{len(targets):,} records', *told],
                  _file(predictions))


def _file(predictions: Sequence[dict[str, Any]]) -> dict[str, str]:
  return {'': ''.join(json.dumps(row, ensure_ascii=False) + '\n'
                      for row in predictions)}


def _told(record: Any) -> dict[str, Any]:
  return {'where': record.where.rstrip(','), 'texts': [*record.texts],
          'label': record.label}


def _line(words: str, value: float) -> str:
  return f'  {words:<22} ' + ('n/a' if np.isnan(value) else f'{value:.4f}')


def _table(each: Sequence[dict[str, Any]]) -> list[str]:
  width = max(5, *(len(row['label']) for row in each))
  lines = [f'  {"label":<{width}}  precision  recall      F1    rows']
  for row in each:
    lines.append(f'  {row["label"]:<{width}}  {row["precision"]:>9.4f}  '
                 f'{row["recall"]:.4f}  {row["f1"]:.4f}  {row["rows"]:>6,}')
  return lines


def _pictured(names: Sequence[str], confusion: np.ndarray) -> list[str]:
  """A row for each label that is right, a column for each that is found."""
  if len(names) > SHOWN:
    return []
  width = max(6, *(len(name) for name in names))
  lines = ['', f'  {"right":<{width}}  found as '
           + '  '.join(f'{name:>{width}}' for name in names)]
  for name, row in zip(names, confusion):
    lines.append(f'  {name:<{width}}  {"":<8} '
                 + '  '.join(f'{count:>{width},}' for count in row))
  return lines
