"""Labels of words: how many are right, and of entities their F1. A file of what
a model gives is as CoNLL's script conlleval reads it.

The measures of entities are seqeval's (Nakayama 2018). An entity counts as
found where its type, its first and its last word are right. seqeval reads
labels in two ways, and both are given. By default, as conlleval, an I that
follows on nothing begins an entity; with `strict` it is none. Labels of a file
are alike in both; those of a model need not be.
"""

from collections.abc import Sequence
import importlib.util
from typing import Any

import numpy as np

from configs.errors import require
from training.data import labelled, records
from training.data.records import Sentences
from training.measures import Measured

# The names of what is measured; those of entities only where labels mark them.
FIGURES = ('accuracy', 'words', 'sentences', 'without_tokens', 'precision',
           'recall', 'f1', 'entities', 'strict_precision', 'strict_recall',
           'strict_f1', 'types/*')


def labels(view: Sentences, scores: Sequence[np.ndarray]) -> list[list[str]]:
  """Returns the likeliest label of each word of each sentence of a view.

  A word in which no token begins gets the label O, or '_' where that is none.

  Args:
    view: the sentences.
    scores: of each item, [L, K]: of its row's tokens, padding or not.
  """
  outside = 'O' if 'O' in view.labels else '_'
  found = [[outside] * len(sentence.words) for sentence in view.records]
  for piece, scores_LK in zip(view.items, scores, strict=True):
    for place in np.flatnonzero(piece.words != records.NO_WORD):
      # Before the sentence stands one token.
      best = int(np.argmax(scores_LK[1 + place]))
      found[piece.sentence][piece.words[place]] = view.labels[best]
  return found


def figures(view: Sentences, found: Sequence[Sequence[str]]) -> dict[str, Any]:
  """Returns the figures of labels that a model gives.

  Args:
    view: the sentences.
    found: `labels` of each.

  Returns:
    accuracy, of words; words and sentences, how many there are; without_tokens,
    of how many words no label can be told; of entities those of
    `entities`.
  """
  right = [sentence.labels for sentence in view.records]
  pairs = [pair for rows in zip(right, found, strict=True)
           for pair in zip(*rows, strict=True)]
  told = sum(int((item.words != records.NO_WORD).sum()) for item in view.items)
  own = dict(accuracy=sum(a == b for a, b in pairs) / len(pairs),
             words=len(pairs), sentences=len(right),
             without_tokens=len(pairs) - told)
  if labelled.marks_entities(view.labels):
    own |= entities(right, found)
  return own


def written(view: Sentences, found: Sequence[Sequence[str]]) -> str:
  """Returns a file's text: a word, its label and the model's a line, with a
  space between, and an empty line after each sentence."""
  return ''.join(
      ''.join(' '.join(row) + '\n' for row in zip(
          sentence.words, sentence.labels, own, strict=True)) + '\n'
      for sentence, own in zip(view.records, found, strict=True))


def check_package() -> None:
  """Raises RequestError where seqeval is not installed."""
  require(importlib.util.find_spec('seqeval') is not None,
          'the measures of entities need the package seqeval: '
          "pip install 'archetype[finetune]'")


def entities(right: Sequence[Sequence[str]], found: Sequence[Sequence[str]]
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
                      if not name.endswith(' avg')}
  return figures


def _figures(row: dict[str, Any]) -> dict[str, Any]:
  return dict(precision=float(row['precision']), recall=float(row['recall']),
              f1=float(row['f1-score']), entities=int(row['support']))


def measure(view: Sentences, scores: Sequence[np.ndarray], config: Any,
            options: Any) -> Measured:
  """Returns what is found of the sentences of a view.

  Args:
    view: the sentences.
    scores: of each item, [L, K].
    config, options: not read.
  """
  del config, options
  found = labels(view, scores)
  own = figures(view, found)
  lines = [f'{own["sentences"]:,} sentences of {own["words"]:,} words',
           f'  accuracy         {own["accuracy"]:.4f}']
  if own['without_tokens']:
    lines.append(f'  of {own["without_tokens"]:,} words the tokenizer makes no '
                 'token')
  if 'types' in own:
    rows = {'entities': own} | own['types']
    rows['strict'] = {name: own[f'strict_{name}']
                      for name in ('precision', 'recall', 'f1')}
    lines.append(f'  {"":<16} precision  recall      F1  entities')
    lines += [f'  {name:<16} {row["precision"]:9.4f} {row["recall"]:7.4f} '
              f'{row["f1"]:7.4f}  {row.get("entities", "")}'.rstrip()
              for name, row in rows.items()]
  return Measured(own, lines, {'': written(view, found)})
