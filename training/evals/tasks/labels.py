"""The measures of labelled data: what the model answers to every record that is
held out, and how good that is. Where records are without labels the answers
alone are written, with their probabilities.

For labels: accuracy; F1 of each label and the mean of those that occur, be it
as an answer or as a prediction (macro); of two labels the F1 of the second,
which is taken as the positive one, as 1 is of 0 and 1; and Matthews'
correlation coefficient (Matthews 1975), as GLUE's tasks are measured (Wang et
al. 2018), by scikit-learn. For numbers: Pearson's and Spearman's correlation.
For answers to questions: see ../answers.py.

For words: how many labels are right, and of entities their F1, which is
seqeval's (Nakayama 2018). An entity counts as found where its type, its first
and its last word are right. seqeval reads labels in two ways, and both are
given. By default, as conlleval, an I that follows on nothing begins an entity;
with `strict` it is none. Labels of a file are alike in both; those of a model
need not be.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import csv
import importlib.util
import io
import itertools
import json
from typing import Any, NamedTuple
import warnings

import numpy as np

import architectures
from common.errors import RequestError, require
from training.data import labelled, records, sources
from training.evals import Evaluation, Flag, Task, answers, held_out, items
from training.evals import predicting
from training.evals.tasks import writing
from training.objectives import Config, pipeline
from training.workdir import storage

NO_LABEL = '(none of these)'
MOST_PRINTED_LABELS = 40  # labels whose figures are printed

ANSWER_FLAGS = (  # to questions
    Flag(name='n_best', default=20,
         help='How many of the best answers to a question are written.',
         least=1, most=1000, needed_flag='predictions'),
    Flag(name='max_answer_length', default=30,
         help='The most tokens of an answer.', least=1, most=10_000),
    Flag(name='null_threshold', default=0.0,
         help='How much more likely than the best answer (in nats) it has to '
         'be that there is none.', least=-1e6, most=1e6),
)


class MeasuredPredictions(NamedTuple):
  """The measures of some records.

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


class Labels(Task):
  """Measures the answers to all that is held out, each source on its own."""

  help = 'accuracy, F1, correlations: what labelled data say'
  figure_names = ('accuracy', 'f1', 'f1_macro', 'mcc', 'rows', 'pearson',
                  'spearman',
             'mean_squared_error', 'mean_absolute_error', 'words', 'sentences',
             'without_tokens', 'precision', 'recall', 'entities', 'strict_*',
             'types/*', *answers.FIGURE_NAMES, 'sources/*')
  flags = (
      Flag(name='predictions', default='',
           help='A file for what is predicted of each record: words with '
           'labels, answers as JSON, or a table in a .csv.',
           requests_task=True),
      *ANSWER_FLAGS,
  )

  def why_unfit(self, config: Config) -> str:
    if config.objective not in MEASURE_OF_OBJECTIVE:
      return f'objective {config.objective!r} learns no labels'
    spec = config.data.eval_source or config.data.source
    if all(source.records for _, source in sources.parse(spec)):
      return ''
    return f'data source {spec!r} has no labels'

  def check(self, options: Any, config: Any) -> None:
    """Raises RequestError for a package that is missing, and a flag that is not
    read."""
    packages = {'sklearn': 'scikit-learn', 'seqeval': 'seqeval'}
    for package, name in packages.items():
      require(importlib.util.find_spec(package) is not None, 'task labels '
              f"needs the package {name}: pip install 'archetype[finetune]'")
    if options.predictions:
      storage.checked_output_file(options.predictions, '--predictions')
    if config is None or config.objective == 'question_answering':
      return
    for flag in ANSWER_FLAGS:
      if getattr(options, flag.name) != flag.default:
        raise RequestError(f'--{flag.name} is of answers to questions, and '
                           f'objective {config.objective!r} gives none')

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Measures and writes the predictions on each source; returns the
    figures."""
    loaders = pipeline.held_out(evaluation.run.config,
                                tokenizer=evaluation.tokenizer, in_order=True,
                                bare=True)
    _check_loaders(loaders, evaluation)

    # The answers of each source, and how good they are.
    measure = MEASURE_OF_OBJECTIVE[evaluation.run.config.objective]
    results = []
    for loader in loaders:
      if loader.objective.head == 'lm':
        outputs: list[Any] = writing.write_targets(evaluation, loader)
      else:
        outputs = compute_scores(evaluation, loader)
      measured = measure(loader.views[0], outputs, evaluation)
      results.append(measured)
      print('\n'.join([f'{loader.text}:', *measured.lines]))
    if evaluation.options.predictions:
      path = storage.checked_path(evaluation.options.predictions,
                                  '--predictions')
      _write_predictions(path, results)
    if len(results) == 1:
      return results[0].figures

    # The means of the figures that all sources have: some have no questions
    # without answers.
    figures = {}
    for name, value in results[0].figures.items():
      everywhere = all(name in one.figures for one in results)
      if isinstance(value, float) and everywhere:
        values = [one.figures[name] for one in results]
        figures[name] = held_out.mean_of_sources(values, loaders)
    if figures:
      shares = [f'{loader.share:.3g} {loader.name}' for loader in loaders]
      print('\n'.join([f'the mean by weight, {", ".join(shares)}:',
                       *_format_figures(figures)]))
    each = {loader.name: one.figures for loader, one in zip(loaders, results)}
    return figures | {'sources': each}


def _check_loaders(loaders: Sequence[pipeline.Loader], evaluation: Evaluation
                   ) -> None:
  """Raises RequestError where the data of several sources, or --predictions,
  do not go together."""
  predictions = evaluation.options.predictions
  # A figure is of all sources, and needs the labels of each.
  bare = []
  for loader in loaders:
    view = loader.views[0]
    bare.append(isinstance(view, records.Rows) and view.bare)
  if any(bare) and not all(bare):
    raise RequestError('some sources have labels or answers, and others have '
                       'none: evaluate them one by one')
  if any(bare) and not predictions:
    raise RequestError('there are no labels or answers to measure by: pass '
                       '--predictions=FILE for what is predicted')

  # Questions of several sources might have the same ids.
  if evaluation.run.config.objective == 'question_answering' and predictions:
    require(len(loaders) == 1, '--predictions is one file, and '
            f'{len(loaders)} sources are evaluated: evaluate one by --text')
    answers.check_question_ids(loaders[0].views[0])


def _write_predictions(path: Any,
                       results: Sequence[MeasuredPredictions]) -> None:
  """Writes the predictions of all sources: as a table, where the name of the
  file ends in .csv."""
  # The texts by the kind that the name of the file gets; '': none. A table is
  # of all sources, and other files are put one after the other.
  files = {}
  if path.suffix == '.csv':
    rows = []
    for one in results:
      rows += one.table
    files[''] = _format_csv(rows)
  else:
    for kind in results[0].files:
      files[kind] = ''.join(one.files[kind] for one in results)
  for kind, text in files.items():
    file = path
    if kind:
      file = path.with_name(f'{path.stem}.{kind}{path.suffix}')
    storage.write_file(file, text)
    print(f'written: {file}')


def compute_scores(evaluation: Evaluation,
                   loader: pipeline.Loader) -> list[np.ndarray]:
  """Returns the scores of each row of a loader's view, in its order: [K], or
  of each token [L, K], where L is the length that its batch was padded to."""
  objective = loader.objective
  module = evaluation.run.module

  def scores_of(params: Any, batch: Any):
    """Returns the scores of each row of a batch."""
    return objective.apply(module, params, batch).extra['scores']

  step = evaluation.jit_once(scores_of, 'labels')
  rows: list[np.ndarray] = []
  for batch_scores in evaluation.run_on_batches(step, loader, 'answering'):
    rows += list(batch_scores)
  return rows[:loader.num_windows]  # without what fills up the last batch


def measure_labels(view: Any, scores: Sequence[np.ndarray],
                   *_: Any) -> MeasuredPredictions:
  """Measures the label with the highest score of each row.

  Args:
    view: a view of training/data/records.py, with labels.
    scores: the scores of the labels of each of its rows, [U].
  """
  # The predictions.
  predicted = predicting.of_texts(view, scores)
  predictions = []
  table = []
  for record, one in zip(view.records, predicted):
    predictions.append(_record_as_json(record) | {
        'predicted': one.label, 'probabilities': one.probabilities})
    row = _record_as_columns(record) | {'predicted': one.label}
    for label, probability in one.probabilities.items():
      row[f'probability of {label}'] = probability
    table.append(row)
  if not view.bare:
    targets = np.array([item.target for item in view.items])
    return _measure_classification(
        names=view.labels, targets=targets,
        predicted=np.stack(scores).argmax(1), predictions=predictions,
        table=table)

  # How often each label is predicted, where none is known.
  counts = collections.Counter(one.label for one in predicted)
  lines = [_count_of_unlabelled(len(predicted), 'records')]
  for label in view.labels[:MOST_PRINTED_LABELS]:
    lines.append(f'  {label:<22} {counts[label]:,}')
  return MeasuredPredictions(figures={'rows': len(predicted)}, lines=lines,
                  files=_format_jsonl(predictions), table=table)


def measure_written_labels(view: Any, written: Sequence[tuple[str, str, bool]],
             evaluation: Evaluation) -> MeasuredPredictions:
  """Measures labels that are written as text.

  Args:
    view: a view of training/objectives/seq2seq.py.
    written: what the model wrote, the label, and more, of each row. The space
      that some tokenizers put before a text is no part of either.
    evaluation: the evaluation whose tokenizer the rows are of.
  """
  rows = [(text.strip(), target.strip()) for text, target, *_ in written]
  labels = records.in_order(target for _, target in rows)
  require(len(labels) > 1, f'what is held out has one label, {labels[0]!r}: '
          'there is nothing to measure')

  # The numbers of the labels; what is no label has the number after them.
  numbers = {label: i for i, label in enumerate(labels)}
  none = len(labels)
  predicted = np.array([numbers.get(text, none) for text, _ in rows])
  targets = np.array([numbers[target] for _, target in rows])
  names = [*labels]
  if (predicted == none).any():
    names.append(NO_LABEL)

  # The predictions.
  predictions = []
  table = []
  for (text, target), pair in zip(rows, view):
    source = evaluation.tokenizer.decode(pair.source)
    predictions.append({'texts': [source], 'label': target, 'predicted': text})
    table.append({'text': source, 'label': target, 'predicted': text})
  return _measure_classification(names=names, targets=targets,
                                 predicted=predicted,
                     predictions=predictions, table=table, count=len(labels))


def _measure_classification(names: Sequence[str], targets: np.ndarray,
                predicted: np.ndarray, predictions: list[dict],
                table: list[dict], count: int = 0) -> MeasuredPredictions:
  """Returns the measures of labels.

  Args:
    names: the labels by number.
    targets: the number of the right label of each record.
    predicted: the number of the label that the model gives it.
    predictions: the predictions as objects of JSON.
    table: the predictions as rows of a .csv.
    count: how many labels there are; 0: as many as names. Names after them are
      never right.
  """
  from sklearn import metrics
  count = count or len(names)
  labels = dict(labels=range(count), zero_division=0.0)

  # Over all labels; the mean is of the labels that occur.
  precision, recall, f1, rows = metrics.precision_recall_fscore_support(
      targets, predicted, **labels)
  occur = np.union1d(targets, predicted)
  macro = float(np.mean(f1[occur[occur < count]]))
  figures: dict[str, Any] = {
      'accuracy': float(metrics.accuracy_score(targets, predicted)),
      'f1': float(f1[1]) if count == 2 else macro,
      'f1_macro': macro,
      'mcc': float(metrics.matthews_corrcoef(targets, predicted))}

  # For a reader.
  lines = [f'{len(targets):,} records', *_format_figures(figures)]
  if count <= MOST_PRINTED_LABELS:
    report = metrics.classification_report(
        targets, predicted, target_names=names[:count], digits=4, **labels)
    lines += report.splitlines()
  else:
    lines.append(f'  {count:,} labels, whose figures --json writes')

  # The figures of each label, and of each record.
  by_label = []
  for i, name in enumerate(names[:count]):
    by_label.append({
        'label': name, 'precision': float(precision[i]),
        'recall': float(recall[i]), 'f1': float(f1[i]), 'rows': int(rows[i])})
  confusion = metrics.confusion_matrix(targets, predicted,
                                       labels=range(len(names)))
  right = items.record_scores(predicted == targets,
                              _identify_items(predictions))
  figures |= {'rows': len(targets), 'by_label': by_label, 'labels': [*names],
              'confusion': confusion.tolist(), 'items': {'accuracy': right}}
  return MeasuredPredictions(figures=figures, lines=lines,
                             files=_format_jsonl(predictions),
                  table=table)


def measure_numbers(view: Any, scores: Sequence[np.ndarray],
                    *_: Any) -> MeasuredPredictions:
  """Measures numbers, [1] of each row."""
  # The predictions.
  predicted = np.array(predicting.of_numbers(view, scores))
  predictions = []
  table = []
  for record, value in zip(view.records, predicted):
    predictions.append(_record_as_json(record) | {'predicted': float(value)})
    table.append(_record_as_columns(record) | {'predicted': float(value)})
  files = _format_jsonl(predictions)
  if view.bare:
    return MeasuredPredictions(figures={'rows': len(predicted)},
                    lines=[_count_of_unlabelled(len(predicted),
                                                'records')], files=files,
                    table=table)

  # How good they are.
  targets = np.array([item.target for item in view.items])
  pearson, spearman = _correlations(targets, predicted)
  squares = (predicted - targets) ** 2
  magnitudes = np.abs(predicted - targets)
  figures: dict[str, Any] = {
      'pearson': pearson, 'spearman': spearman,
      'mean_squared_error': float(np.mean(squares)),
      'mean_absolute_error': float(np.mean(magnitudes))}
  lines = [f'{len(targets):,} records', *_format_figures(figures)]
  asked = _identify_items(predictions)
  figures['rows'] = len(targets)
  figures['items'] = {'mean_squared_error': items.record_scores(squares, asked),
                      'mean_absolute_error': items.record_scores(magnitudes,
                                                                 asked)}
  return MeasuredPredictions(figures=figures, lines=lines, files=files,
                             table=table)


def _correlations(targets: np.ndarray, predicted: np.ndarray
                  ) -> tuple[float, float]:
  """Returns Pearson's and Spearman's correlation. Where one side is constant
  there is none: nan, which is shown as n/a."""
  from scipy import stats
  if len(predicted) < 2:
    return np.nan, np.nan
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    pearson = stats.pearsonr(targets, predicted).statistic
    spearman = stats.spearmanr(targets, predicted).statistic
  return float(pearson), float(spearman)


def measure_word_labels(view: records.Sentences, scores: Sequence[np.ndarray],
                        *_: Any
             ) -> MeasuredPredictions:
  """Measures the likeliest label of each word of each sentence.

  Args:
    view: the sentences.
    scores: the scores of each item, [L, K]: of its row's tokens, padding or
      not.
  """
  # The predictions.
  sentences = predicting.of_words(view, scores)
  without = 0
  table = []
  for number, record in enumerate(view.records):
    sentence = sentences[number]
    without += int(np.isnan(sentence.probabilities).sum())
    table += _word_rows(number + 1, record, sentence)
  counts = dict(words=len(table), sentences=len(sentences),
                without_tokens=without)
  lines = [f'{len(sentences):,} sentences of {len(table):,} words, of which '
           f'{without:,} have no token']
  if view.bare:
    columns = ('word', 'predicted', 'probability')
    return MeasuredPredictions(figures=counts, lines=lines,
                               files=_format_conll(table, columns),
                    table=table)

  # How good they are.
  same = [row['label'] == row['predicted'] for row in table]
  figures: dict[str, Any] = dict(accuracy=sum(same) / len(same), **counts)
  lines.append(f'  accuracy         {figures["accuracy"]:.4f}')
  if labelled.marks_entities(view.labels):
    entity_figures, report = measure_entities(
        right=[record.labels for record in view.records],
        predicted=[sentence.labels for sentence in sentences])
    figures |= entity_figures
    lines += report
  # The columns of CoNLL's own script, conlleval.
  columns = ('word', 'label', 'predicted')
  return MeasuredPredictions(figures=figures, lines=lines,
                             files=_format_conll(table, columns),
                  table=table)


def _format_conll(table: Sequence[dict[str, Any]], names: Sequence[str]
           ) -> dict[str, str]:
  """Returns these columns of a table of words, a word a line, with an empty
  line after each sentence."""
  lines = []
  for _, words in itertools.groupby(table, lambda row: row['sentence']):
    for row in words:
      cells = [str(row[name]) for name in names]
      lines.append(' '.join(cells))
    lines.append('')
  return {'': ''.join(line + '\n' for line in lines)}


def _word_rows(number: int, record: labelled.Sentence,
           sentence: predicting.Words) -> list[dict[str, Any]]:
  """Returns the rows of a table of one sentence, a word each."""
  rows = []
  for i, word in enumerate(record.words):
    row = {'sentence': number, 'word': word}
    if record.labels:
      row['label'] = record.labels[i]
    row['predicted'] = sentence.labels[i]
    row['probability'] = sentence.probabilities[i]
    rows.append(row)
  return rows


def measure_entities(right: Sequence[Sequence[str]],
                     predicted: Sequence[Sequence[str]]
             ) -> tuple[dict[str, Any], list[str]]:
  """Returns precision, recall and F1 of entities, and a table of them.

  Args:
    right: the labels of each sentence.
    predicted: the labels that a model gives.

  Returns:
    precision, recall, f1: of all entities (micro averages), from 0 to 1;
    strict_precision, strict_recall, strict_f1; entities, how many there are;
    types: {type: {precision, recall, f1, entities}}.
  """
  # An entity may begin with I-; in the strict mode it begins with B-.
  from seqeval import metrics, scheme
  lenient = _seqeval_figures(right, predicted)
  strict = _seqeval_figures(right, predicted=predicted, mode='strict',
                           scheme=scheme.IOB2)

  # The rows of types stand beside those of averages.
  figures: dict[str, Any] = dict(lenient['micro avg'])
  strict_figures = {}
  for name, value in strict['micro avg'].items():
    if name != 'entities':
      strict_figures[f'strict_{name}'] = value
  figures |= strict_figures
  figures['types'] = {}
  for name, row in lenient.items():
    if not name.endswith(' avg'):
      figures['types'][name] = row
  table = metrics.classification_report(right, predicted, digits=4,
                                        zero_division=0)
  return figures, [*table.splitlines(), *_format_figures(strict_figures)]


def _seqeval_figures(right: Sequence[Sequence[str]],
                    predicted: Sequence[Sequence[str]], **how: Any
                    ) -> dict[str, dict[str, Any]]:
  """Returns seqeval's figures of each type of entity, and its averages."""
  from seqeval import metrics
  report = metrics.classification_report(
      right, predicted, output_dict=True, zero_division=0, **how)
  figures = {}
  for name, row in report.items():
    figures[name] = dict(
        precision=float(row['precision']), recall=float(row['recall']),
        f1=float(row['f1-score']), entities=int(row['support']))
  return figures


def measure_answers(view: records.Questions, scores: Sequence[np.ndarray],
                 evaluation: Evaluation) -> MeasuredPredictions:
  """Measures answers to questions."""
  # The predictions.
  kind = architectures.stack(evaluation.run.model)
  predictions = answers.answer_questions(view, scores=scores, kind=kind,
                                options=evaluation.options)
  table = []
  for question, best in zip(view.questions, predictions):
    chosen = predicting.of_best(best)
    table.append({
        'id': question.id, 'question': question.question,
        'predicted': chosen.text, 'start': chosen.start,
        'probability': chosen.probability})

  # How good they are.
  files = answers.format_prediction_files(view, predictions)
  if view.bare:
    return MeasuredPredictions(figures={'total': len(predictions)},
                    lines=[_count_of_unlabelled(len(predictions),
                                                'questions')], files=files,
                    table=table)
  figures = answers.measure_answers(view, predictions)
  return MeasuredPredictions(figures=figures,
                             lines=answers.format_report(figures), files=files,
                  table=table)


def _count_of_unlabelled(count: int, what: str) -> str:
  return f'{count:,} {what} without labels or answers, which are predicted'


def _format_jsonl(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
  lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
  return {'': ''.join(lines)}


def _format_csv(rows: Sequence[dict[str, Any]]) -> str:
  """Returns rows as a table with a line of names."""
  names: dict[str, None] = {}  # in the order in which they come first
  for row in rows:
    names |= dict.fromkeys(row)
  text = io.StringIO()
  writer = csv.DictWriter(text, [*names])
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def _record_as_columns(record: labelled.Record) -> dict[str, Any]:
  """Returns the columns of a table that say which record a row is of."""
  row = _record_as_json(record)
  texts = dict(zip(('text', 'second text'), row.pop('texts')))
  return {'where': row.pop('where'), **texts, **row}


def _record_as_json(record: Any) -> dict[str, Any]:
  """Returns a record as an object of JSON, with its label if it has one."""
  row = {'where': record.where.rstrip(','), 'texts': [*record.texts]}
  if record.label:
    row['label'] = record.label
  return row


def _identify_items(predictions: Iterable[dict[str, Any]]) -> list[tuple]:
  """Returns what tells the records of predictions from others."""
  return [(row.get('texts'), row['label']) for row in predictions]


def _format_figures(figures: Mapping[str, float]) -> list[str]:
  """Returns a line for each figure."""
  lines = []
  for name, value in figures.items():
    words = name.replace('_', ' ')
    lines.append(f'  {words:<22} {held_out.format_figure(value)}')
  return lines


# How the answers to a view are measured, by objective: (view, answers,
# evaluation) -> Measured. The answers are the scores of each row or, of a model
# without a head of its own, what it wrote.
MEASURE_OF_OBJECTIVE = {
    'classification': measure_labels, 'regression': measure_numbers,
    'token_classification': measure_word_labels,
    'question_answering': measure_answers, 'seq2seq': measure_written_labels}
TASKS = {'labels': Labels()}
