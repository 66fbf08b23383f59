"""The measures of labelled data: what the model answers to every record that is
held out, and how good that is.

Of labels: accuracy; F1 of each label and the mean of those that occur, be it as
an answer or as a prediction (macro); of two labels the F1 of the second, which
is taken as the positive one, as 1 is of 0 and 1; and Matthews' correlation
coefficient (Matthews 1975), as GLUE's tasks are measured (Wang et al. 2018), by
scikit-learn. Of numbers: Pearson's and Spearman's correlation. Of answers to
questions: see ../answers.py.

Of words: how many labels are right, and of entities their F1, which is
seqeval's (Nakayama 2018). An entity counts as found where its type, its first
and its last word are right. seqeval reads labels in two ways, and both are
given. By default, as conlleval, an I that follows on nothing begins an entity;
with `strict` it is none. Labels of a file are alike in both; those of a model
need not be.
"""

from collections.abc import Iterable, Sequence
import importlib.util
import itertools
import json
from typing import Any, NamedTuple
import warnings

import numpy as np

import architectures
from common.errors import require
from training.data import labelled, records, sources
from training.evals import Evaluation, Flag, Task, answers, held_out, items
from training.evals.tasks import writing
from training.objectives import pipeline
from training.workdir import storage

NONE = '(none of these)'
MOST = 40  # labels whose figures are printed


class Measured(NamedTuple):
  """What is found of some records.

  Attributes:
    figures: by name; a dict holds those of a part.
    lines: for a reader.
    files: the texts of files of predictions, by what is put before the suffix
      of their name.
  """
  figures: dict[str, Any]
  lines: list[str]
  files: dict[str, str]


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Measures the answers to all that is held out, each source on its own."""
  config, name = evaluation.run.config, evaluation.options.predictions
  loaders = pipeline.held_out(config, evaluation.tokenizer, in_order=True)
  if config.objective == 'question_answering' and name:
    require(len(loaders) == 1, '--predictions is one file, and '
            f'{len(loaders)} sources are evaluated: evaluate one by --text')
    answers.check_ids(loaders[0].views[0])
  results = []
  for loader in loaders:
    outputs = (writing.written(evaluation, loader)
               if loader.objective.head == 'lm' else scores(evaluation, loader))
    results.append(MEASURES[config.objective](loader.views[0], outputs,
                                              evaluation))
    print('\n'.join([f'{loader.text}:', *results[-1].lines]))
  for kind in results[0].files if name else ():
    path = storage.path(name, '--predictions')
    path = path.with_name(f'{path.stem}.{kind}{path.suffix}') if kind else path
    storage.write(path, ''.join(one.files[kind] for one in results))
    print(f'written: {path}')
  if len(results) == 1:
    return results[0].figures
  # Not those of questions without answers, which some sources do not have.
  names = [name for name, value in results[0].figures.items()
           if isinstance(value, float)
           and all(name in one.figures for one in results)]
  figures = {name: held_out.mix([one.figures[name] for one in results], loaders)
             for name in names}
  shares = ', '.join(f'{loader.share:.3g} {loader.name}' for loader in loaders)
  print('\n'.join([f'the mean by weight, {shares}:', *_lines(figures)]))
  return figures | {'sources': {loader.name: one.figures
                                for loader, one in zip(loaders, results)}}


def scores(evaluation: Evaluation, loader: pipeline.Loader) -> list[np.ndarray]:
  """Returns the scores of each row of a loader's view, in its order: [K], or
  of each token [L, K], where L is the length that its batch was padded to."""
  objective, module = loader.objective, evaluation.run.module
  step = evaluation.program(lambda params, batch: objective.apply(
      module, params, batch).extra['scores'], 'labels')
  batches = evaluation.results(step, loader, 'answering')
  return [*itertools.chain(*batches)][:loader.num_windows]


def of_scores(view: Any, scores: Sequence[np.ndarray], *_: Any) -> Measured:
  """Measures the label with the highest score of each row.

  Args:
    view: of training/data/records.py, with labels.
    scores: [U] of each of its rows.
  """
  scores_NU = np.stack(scores)
  targets = np.array([item.target for item in view.items])
  p_NU = np.exp(scores_NU - scores_NU.max(1, keepdims=True))
  p_NU /= p_NU.sum(1, keepdims=True)
  predictions = [
      _record(record) | {
          'predicted': view.labels[int(p_U.argmax())],
          'probabilities': dict(zip(view.labels, map(float, p_U)))}
      for record, p_U in zip(view.records, p_NU)]
  return _classified(view.labels, targets, scores_NU.argmax(1), predictions)


def of_texts(view: Any, written: Sequence[tuple[str, str, bool]],
             evaluation: Evaluation) -> Measured:
  """Measures labels that are written as text.

  Args:
    view: of training/objectives/seq2seq.py.
    written: (what the model wrote, the label) of each row, and more. The space
      that some tokenizers put before a text is no part of either.
    evaluation: whose tokenizer the rows are of.
  """
  rows = [(text.strip(), target.strip()) for text, target, *_ in written]
  labels = records.in_order(target for _, target in rows)
  require(len(labels) > 1, f'what is held out has one label, {labels[0]!r}: '
          'there is nothing to measure')
  numbers = {label: i for i, label in enumerate(labels)}
  predicted = np.array([numbers.get(text, len(labels)) for text, _ in rows])
  targets = np.array([numbers[target] for _, target in rows])
  predictions = [{'texts': [evaluation.tokenizer.decode(pair.source)],
                  'label': target, 'predicted': text}
                 for (text, target), pair in zip(rows, view)]
  return _classified(
      [*labels, NONE] if (predicted == len(labels)).any() else labels, targets,
      predicted, predictions, len(labels))


def _classified(names: Sequence[str], targets: np.ndarray,
                predicted: np.ndarray, predictions: list[dict], count: int = 0
                ) -> Measured:
  """Of the first `count` labels; 0: of all. Those after them are never right.
  """
  from sklearn import metrics
  count = count or len(names)
  labels = dict(labels=range(count), zero_division=0.0)
  precision, recall, f1, rows = metrics.precision_recall_fscore_support(
      targets, predicted, **labels)
  occur = np.union1d(targets, predicted)
  macro = float(np.mean(f1[occur[occur < count]]))
  right = {'accuracy': items.of(predicted == targets, _asked(predictions))}
  figures = {
      'accuracy': float(metrics.accuracy_score(targets, predicted)),
      'f1': float(f1[1]) if count == 2 else macro, 'f1_macro': macro,
      'mcc': float(metrics.matthews_corrcoef(targets, predicted))}
  confusion = metrics.confusion_matrix(targets, predicted,
                                       labels=range(len(names)))
  each = [{'label': name, 'precision': float(p), 'recall': float(r),
           'f1': float(f), 'rows': int(n)}
          for name, p, r, f, n in zip(names, precision, recall, f1, rows)]
  report = metrics.classification_report(
      targets, predicted, target_names=names[:count], digits=4, **labels)
  return Measured(
      figures | {'rows': len(targets), 'by_label': each, 'labels': [*names],
                 'confusion': confusion.tolist(), 'items': right},
      [f'{len(targets):,} records', *_lines(figures), *(
          report.splitlines() if count <= MOST else
          [f'  {count:,} labels, whose figures --json writes'])],
      _jsonl(predictions))


def of_numbers(view: Any, scores: Sequence[np.ndarray], *_: Any) -> Measured:
  """Measures numbers, [1] of each row."""
  from scipy import stats
  predicted = np.array([float(score[0]) for score in scores])
  targets = np.array([item.target for item in view.items])
  with warnings.catch_warnings():
    # Of a constant there is no correlation: nan, which is shown as n/a.
    warnings.simplefilter('ignore')
    pearson, spearman = (
        float(kind(targets, predicted).statistic) if len(predicted) > 1
        else np.nan
        for kind in (stats.pearsonr, stats.spearmanr))
  error = predicted - targets
  figures = {'pearson': pearson, 'spearman': spearman,
             'mean_squared_error': float(np.mean(error ** 2)),
             'mean_absolute_error': float(np.mean(np.abs(error)))}
  predictions = [_record(record) | {'predicted': float(value)}
                 for record, value in zip(view.records, predicted)]
  return Measured(figures | {'rows': len(targets), 'items': {
      name: items.of(each, _asked(predictions)) for name, each in (
          ('mean_squared_error', error ** 2),
          ('mean_absolute_error', np.abs(error)))}},
                  [f'{len(targets):,} records', *_lines(figures)],
                  _jsonl(predictions))


def of_words(view: records.Sentences, scores: Sequence[np.ndarray], *_: Any
             ) -> Measured:
  """Measures the likeliest label of each word of each sentence.

  A word in which no token begins gets the label O, or '_' where that is none.

  Args:
    view: the sentences.
    scores: of each item, [L, K]: of its row's tokens, padding or not.
  """
  outside = 'O' if 'O' in view.labels else '_'
  predicted = [[outside] * len(sentence.words) for sentence in view.records]
  with_tokens = 0
  for piece, scores_LK in zip(view.items, scores, strict=True):
    for place in np.flatnonzero(piece.words != records.NO_WORD):
      # Before the sentence stands one token.
      likeliest = int(np.argmax(scores_LK[1 + place]))
      predicted[piece.sentence][piece.words[place]] = view.labels[likeliest]
      with_tokens += 1
  right = [sentence.labels for sentence in view.records]
  same = [a == b for rows in zip(right, predicted) for a, b in zip(*rows)]
  figures = dict(accuracy=sum(same) / len(same), words=len(same),
                 sentences=len(right), without_tokens=len(same) - with_tokens)
  lines = [f'{len(right):,} sentences of {len(same):,} words, of which '
           f'{len(same) - with_tokens:,} have no token',
           f'  accuracy         {figures["accuracy"]:.4f}']
  if labelled.marks_entities(view.labels):
    entity_figures, table = entities(right, predicted)
    figures |= entity_figures
    lines += table
  return Measured(figures, lines, {'': ''.join(
      ''.join(' '.join(row) + '\n' for row in zip(
          sentence.words, sentence.labels, labels, strict=True)) + '\n'
      for sentence, labels in zip(view.records, predicted))})


def entities(right: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
             ) -> tuple[dict[str, Any], list[str]]:
  """Returns precision, recall and F1 of entities, and a table of them.

  Args:
    right: the labels of each sentence.
    predicted: those that a model gives.

  Returns:
    precision, recall, f1: of all entities (micro averages), from 0 to 1;
    strict_precision, strict_recall, strict_f1; entities, how many there are;
    types: {type: {precision, recall, f1, entities}}.
  """
  from seqeval import metrics, scheme
  how: dict[str, Any] = dict(zero_division=0)
  strict = how | dict(mode='strict', scheme=scheme.IOB2)
  lenient, strictly = (
      {name: dict(precision=float(row['precision']),
                  recall=float(row['recall']), f1=float(row['f1-score']),
                  entities=int(row['support'])) for name, row in
       metrics.classification_report(right, predicted, output_dict=True,
                                     **way).items()} for way in (how, strict))
  figures = lenient['micro avg'] | {
      f'strict_{name}': value for name, value in strictly['micro avg'].items()
      if name != 'entities'}
  figures['types'] = {name: row for name, row in lenient.items()
                      if not name.endswith(' avg')}
  table = metrics.classification_report(right, predicted, digits=4, **how)
  return figures, [*table.splitlines(), *_lines(
      {name: value for name, value in figures.items() if 'strict' in name})]


def of_questions(view: records.Questions, scores: Sequence[np.ndarray],
                 evaluation: Evaluation) -> Measured:
  """Measures answers to questions."""
  kind = architectures.stack(evaluation.run.model)
  predictions = answers.answers(view, scores, kind, evaluation.options)
  figures = answers.figures(view, predictions)
  return Measured(figures, answers.lines(figures),
                  answers.written(view, predictions))


def _jsonl(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
  return {'': ''.join(json.dumps(row, ensure_ascii=False) + '\n'
                      for row in rows)}


def _record(record: Any) -> dict[str, Any]:
  return {'where': record.where.rstrip(','), 'texts': [*record.texts],
          'label': record.label}


def _asked(predictions: Iterable[dict[str, Any]]) -> list[tuple]:
  return [(row.get('texts'), row['label']) for row in predictions]


def _lines(figures: dict[str, float]) -> list[str]:
  return [f'  {name.replace("_", " "):<22} {held_out.shown(value)}'
          for name, value in figures.items()]


def _unfit(config: Any) -> str:
  if config.objective not in MEASURES:
    return f'objective {config.objective!r} learns no labels'
  spec = config.data.eval_source or config.data.source
  if all(source.records for _, source in sources.parse(spec)):
    return ''
  return f'data source {spec!r} has no labels'


def _check(options: Any, config: Any) -> None:
  for package, name in (('sklearn', 'scikit-learn'), ('seqeval', 'seqeval')):
    require(importlib.util.find_spec(package) is not None, 'task labels needs '
            f"the package {name}: pip install 'archetype[finetune]'")
  if options.predictions:
    storage.output(options.predictions, '--predictions')
  for flag in OF_ANSWERS:
    require(config is None or config.objective == 'question_answering'
            or getattr(options, flag.name) == flag.default, f'--{flag.name} is '
            'of answers to questions, and objective '
            f'{config and config.objective!r} gives none')


# How the answers to a view are measured, by objective: (view, answers,
# evaluation) -> Measured. The answers are the scores of each row or, of a model
# without a head of its own, what it wrote.
MEASURES = {'classification': of_scores, 'regression': of_numbers,
            'token_classification': of_words,
            'question_answering': of_questions, 'seq2seq': of_texts}
OF_ANSWERS = (  # to questions
    Flag('n_best', 20, 'How many of the best answers to a question are '
         'written.', 1, 1000, needs='predictions'),
    Flag('max_answer_length', 30, 'The most tokens of an answer.', 1, 10_000),
    Flag('null_threshold', 0.0, 'How much more likely than the best answer '
         '(in nats) it has to be that there is none.', -1e6, 1e6))
TASKS = {'labels': Task(
    'accuracy, F1, correlations: what labelled data say', run, _unfit, _check,
    figures=('accuracy', 'f1', 'f1_macro', 'mcc', 'rows', 'pearson', 'spearman',
             'mean_squared_error', 'mean_absolute_error', 'words', 'sentences',
             'without_tokens', 'precision', 'recall', 'entities', 'strict_*',
             'types/*', *answers.FIGURES, 'sources/*'),
    flags=(
        Flag('predictions', '', 'A file for what is predicted of each record: '
             'words with labels, or answers as JSON.', asks=True),
        *OF_ANSWERS))}
