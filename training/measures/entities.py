"""The measures of entities, by seqeval (Nakayama 2018).

An entity counts as found where its type, its first and its last word are right.
seqeval reads labels in two ways, and both are given. By default, as CoNLL's
script conlleval, an I that follows on nothing begins an entity; with `strict`
it is none. Labels of a file are alike in both; those of a model need not be.
"""

from collections.abc import Sequence
import importlib.util
from typing import Any

from configs.errors import require

# The names of what is measured.
FIGURES = ('precision', 'recall', 'f1', 'entities', 'strict_precision',
           'strict_recall', 'strict_f1', 'types/*')
AVERAGES = ('micro avg', 'macro avg', 'weighted avg')


def check_package() -> None:
  """Raises RequestError where seqeval is not installed."""
  require(importlib.util.find_spec('seqeval') is not None,
          'the measures of entities need the package seqeval: '
          "pip install 'archetype[finetune]'")


def measures(right: Sequence[Sequence[str]], found: Sequence[Sequence[str]]
             ) -> dict[str, Any]:
  """Returns precision, recall and F1 of entities, from 0 to 1.

  Args:
    right: the labels of each sentence.
    found: those that a model gives.

  Returns:
    precision, recall, f1: of all entities (micro averages); strict_precision,
    strict_recall, strict_f1; entities, how many there are; types: {type:
    {precision, recall, f1, entities}}.
  """
  check_package()
  from seqeval import metrics, scheme
  own = dict(zero_division=0, output_dict=True)
  report = metrics.classification_report(right, found, **own)
  strict = metrics.classification_report(
      right, found, mode='strict', scheme=scheme.IOB2, **own)
  figures = _figures(report['micro avg'])
  figures |= {f'strict_{name}': value for name, value in
              _figures(strict['micro avg']).items() if name != 'entities'}
  figures['types'] = {name: _figures(row) for name, row in report.items()
                      if name not in AVERAGES}
  return figures


def _figures(row: dict[str, Any]) -> dict[str, Any]:
  return dict(precision=float(row['precision']), recall=float(row['recall']),
              f1=float(row['f1-score']), entities=int(row['support']))
