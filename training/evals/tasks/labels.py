"""The measures of labelled data: what the model answers to every record that is
held out, and how good that is. Of records without labels the answers alone are
written, with their probabilities.

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

import collections
from collections.abc import Iterable, Sequence
import csv
import importlib.util
import io
import itertools
import json
from typing import Any, NamedTuple
import warnings

import numpy as np

import architectures
from common.errors import require
from training.data import labelled, records, sources
from training.evals import Evaluation, Flag, Task, answers, held_out, items
from training.evals import predicting
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
    table: the predictions as rows of a .csv: cells by the names of columns.
  """
  figures: dict[str, Any]
  lines: list[str]
  files: dict[str, str]
  table: list[dict[str, Any]]


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Measures the answers to all that is held out, each source on its own."""
  config, name = evaluation.run.config, evaluation.options.predictions
  loaders = pipeline.held_out(config, evaluation.tokenizer, in_order=True,
                              bare=True)
  bare = [isinstance(loader.views[0], records.Rows) and loader.views[0].bare
          for loader in loaders]
  require(all(bare) or not any(bare), 'some sources have labels or answers, '
          'and others have none: evaluate them one by one')
  require(bool(name) or not any(bare), 'there are no labels or answers to '
          'measure by: pass --predictions=FILE for what is predicted')
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
  if name:
    _write(storage.path(name, '--predictions'), results)
  if len(results) == 1:
    return results[0].figures
  # Not those of questions without answers, which some sources do not have.
  names = [name for name, value in results[0].figures.items()
           if isinstance(value, float)
           and all(name in one.figures for one in results)]
  figures = {name: held_out.mix([one.figures[name] for one in results], loaders)
             for name in names}
  shares = ', '.join(f'{loader.share:.3g} {loader.name}' for loader in loaders)
  if figures:
    print('\n'.join([f'the mean by weight, {shares}:', *_lines(figures)]))
  return figures | {'sources': {loader.name: one.figures
                                for loader, one in zip(loaders, results)}}


def _write(path: Any, results: Sequence[Measured]) -> None:
  """Writes the predictions of all sources: as a table, where the name of the
  file ends in .csv."""
  files = {kind: ''.join(one.files[kind] for one in results)
           for kind in results[0].files}
  if path.suffix == '.csv':
    files = {'': _csv([row for one in results for row in one.table])}
  for kind, text in files.items():
    file = path.with_name(f'{path.stem}.{kind}{path.suffix}') if kind else path
    storage.write(file, text)
    print(f'written: {file}')


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
  predicted = predicting.of_texts(view, scores)
  predictions = [_record(record) | {
      'predicted': one.label, 'probabilities': one.probabilities}
                 for record, one in zip(view.records, predicted)]
  table = [_columns(record) | {'predicted': one.label} | {
      f'probability of {label}': p for label, p in one.probabilities.items()}
           for record, one in zip(view.records, predicted)]
  if view.bare:
    counts = collections.Counter(one.label for one in predicted)
    return Measured({'rows': len(predicted)}, [
        _bare(len(predicted), 'records'),
        *(f'  {label:<22} {counts[label]:,}' for label in view.labels[:MOST])],
                    _jsonl(predictions), table)
  targets = np.array([item.target for item in view.items])
  return _classified(view.labels, targets, np.stack(scores).argmax(1),
                     predictions, table)


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
  table = [{'text': row['texts'][0], 'label': row['label'],
            'predicted': row['predicted']} for row in predictions]
  return _classified(
      [*labels, NONE] if (predicted == len(labels)).any() else labels, targets,
      predicted, predictions, table, len(labels))


def _classified(names: Sequence[str], targets: np.ndarray,
                predicted: np.ndarray, predictions: list[dict],
                table: list[dict], count: int = 0) -> Measured:
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
      _jsonl(predictions), table)


def of_numbers(view: Any, scores: Sequence[np.ndarray], *_: Any) -> Measured:
  """Measures numbers, [1] of each row."""
  from scipy import stats
  predicted = np.array(predicting.of_numbers(view, scores))
  predictions = [_record(record) | {'predicted': float(value)}
                 for record, value in zip(view.records, predicted)]
  table = [_columns(record) | {'predicted': float(value)}
           for record, value in zip(view.records, predicted)]
  if view.bare:
    return Measured({'rows': len(predicted)},
                    [_bare(len(predicted), 'records')], _jsonl(predictions),
                    table)
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
  return Measured(figures | {'rows': len(targets), 'items': {
      name: items.of(each, _asked(predictions)) for name, each in (
          ('mean_squared_error', error ** 2),
          ('mean_absolute_error', np.abs(error)))}},
                  [f'{len(targets):,} records', *_lines(figures)],
                  _jsonl(predictions), table)


def of_words(view: records.Sentences, scores: Sequence[np.ndarray], *_: Any
             ) -> Measured:
  """Measures the likeliest label of each word of each sentence.

  Args:
    view: the sentences.
    scores: of each item, [L, K]: of its row's tokens, padding or not.
  """
  sentences = predicting.of_words(view, scores)
  predicted = [sentence.labels for sentence in sentences]
  without = sum(bool(np.isnan(p)) for sentence in sentences
                for p in sentence.probabilities)
  table = []
  for number, record in enumerate(view.records):
    table += _words(number + 1, record, sentences[number])
  counts = dict(words=len(table), sentences=len(sentences),
                without_tokens=without)
  summary = (f'{len(sentences):,} sentences of {len(table):,} words, of which '
             f'{without:,} have no token')
  if view.bare:
    return Measured(counts, [summary], _conll(
        table, ('word', 'predicted', 'probability')), table)
  right = [sentence.labels for sentence in view.records]
  same = [row['label'] == row['predicted'] for row in table]
  figures = dict(accuracy=sum(same) / len(same), **counts)
  lines = [summary, f'  accuracy         {figures["accuracy"]:.4f}']
  if labelled.marks_entities(view.labels):
    entity_figures, report = entities(right, predicted)
    figures |= entity_figures
    lines += report
  return Measured(figures, lines, _conll(
      table, ('word', 'label', 'predicted')), table)


def _conll(table: Sequence[dict[str, Any]], names: Sequence[str]
           ) -> dict[str, str]:
  """Returns these columns of a table of words, a word a line, with an empty
  line after each sentence."""
  lines = []
  for _, words in itertools.groupby(table, lambda row: row['sentence']):
    lines += [' '.join(str(row[name]) for name in names) for row in words]
    lines.append('')
  return {'': ''.join(line + '\n' for line in lines)}


def _words(number: int, record: labelled.Sentence,
           sentence: predicting.Words) -> list[dict[str, Any]]:
  """Returns the rows of a table of one sentence, a word each."""
  rows = []
  for i, word in enumerate(record.words):
    row = {'sentence': number, 'word': word}
    if record.labels:
      row['label'] = record.labels[i]
    rows.append(row | {'predicted': sentence.labels[i],
                       'probability': sentence.probabilities[i]})
  return rows


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
  chosen = [predicting.of_best(best) for best in predictions]
  table = [{'id': question.id, 'question': question.question,
            'predicted': one.text, 'start': one.start,
            'probability': one.probability}
           for question, one in zip(view.questions, chosen)]
  files = answers.written(view, predictions)
  if view.bare:
    return Measured({'total': len(chosen)}, [_bare(len(chosen), 'questions')],
                    files, table)
  figures = answers.figures(view, predictions)
  return Measured(figures, answers.lines(figures), files, table)


def _bare(count: int, what: str) -> str:
  return f'{count:,} {what} without labels or answers, which are predicted'


def _jsonl(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
  return {'': ''.join(json.dumps(row, ensure_ascii=False) + '\n'
                      for row in rows)}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
  """Returns rows as a table with a line of names."""
  names = dict.fromkeys(name for row in rows for name in row)
  text = io.StringIO()
  writer = csv.DictWriter(text, [*names])
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def _columns(record: labelled.Record) -> dict[str, Any]:
  """Returns the columns of a table that say which record a row is of."""
  row = _record(record)
  texts = dict(zip(('text', 'second text'), row.pop('texts')))
  return {'where': row.pop('where'), **texts, **row}


def _record(record: Any) -> dict[str, Any]:
  row = {'where': record.where.rstrip(','), 'texts': [*record.texts]}
  return row | {'label': record.label} if record.label else row


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
             'words with labels, answers as JSON, or a table in a .csv.',
             asks=True),
        *OF_ANSWERS))}
