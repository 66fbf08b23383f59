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

NO_LABEL = '(none of these)'  # what stands for a written text that is no label
MOST_PRINTED_LABELS = 40  # more labels would be more than a screen

# The flags that answers to questions alone read.
ANSWER_FLAGS = (
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
  """The predictions for the records of a source, and how good they are.

  Attributes:
    figures: the measures by name; a dict among them holds those of a part, such
      as a type of entity.
    lines: the measures as lines for a reader.
    files: the texts of the files for --predictions, by what is put before the
      suffix of the file's name; '': nothing.
    table: the predictions as rows of a .csv: cells by the names of columns.
  """
  figures: dict[str, Any]
  lines: list[str]
  files: dict[str, str]
  table: list[dict[str, Any]]


class Labels(Task):
  """Measures the answers to all that is held out, each source on its own."""

  help = 'accuracy, F1, correlations: what labelled data say'
  figure_names = (
      'accuracy', 'f1', 'f1_macro', 'mcc', 'rows', 'pearson', 'spearman',
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
    """Returns why a run with this config has no labels to measure; '': it has.
    """
    if config.objective not in MEASURE_OF_OBJECTIVE:
      return f'objective {config.objective!r} learns no labels'
    spec = config.data.eval_source or config.data.source
    if all(source.records for _, source in sources.parse_sources(spec)):
      return ''
    return f'data source {spec!r} has no labels'

  def check(self, options: Any, config: Any) -> None:
    """Raises RequestError for a package that is missing, and a flag that is not
    read.

    Args:
      options: the values of the task's flags, by name.
      config: the config of the run; None: it is not known yet.
    """
    packages = {'sklearn': 'scikit-learn', 'seqeval': 'seqeval'}
    for package, name in packages.items():
      require(importlib.util.find_spec(package) is not None, 'task labels '
              f"needs the package {name}: pip install 'archetype[finetune]'")
    if options.predictions:
      storage.checked_output_file(options.predictions, '--predictions')

    # The flags of answers have no effect on labels and numbers.
    if config is None or config.objective == 'question_answering':
      return
    for flag in ANSWER_FLAGS:
      if getattr(options, flag.name) != flag.default:
        raise RequestError(f'--{flag.name} is of answers to questions, and '
                           f'objective {config.objective!r} gives none')

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Predicts the labels of each source, measures the predictions, and writes
    them to --predictions.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      {name: figure}; of several sources their means, with the figures of each
      as `sources`.
    """
    loaders = pipeline.make_evaluation_loaders(evaluation.run.config,
                                               tokenizer=evaluation.tokenizer,
                                               in_order=True, bare=True)
    _check_loaders(loaders, evaluation)

    # Predict and measure each source. Rows come in order, and may be without
    # labels, which are then only predicted.
    measure = MEASURE_OF_OBJECTIVE[evaluation.run.config.objective]
    results = []
    for loader in loaders:
      # A model without a head of its own for the labels writes them as text.
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

    # Average over the sources the figures that all of them have: a figure of
    # questions without answers, for example, may be missing in one.
    means = _average_sources(results, loaders)
    if means:
      shares = [f'{loader.share:.3g} {loader.name}' for loader in loaders]
      print('\n'.join([f'the mean by weight, {", ".join(shares)}:',
                       *_format_figures(means)]))
    figures_by_source = {}
    for loader, measured in zip(loaders, results):
      figures_by_source[loader.name] = measured.figures
    return means | {'sources': figures_by_source}


def _average_sources(results: Sequence[MeasuredPredictions],
                     loaders: Sequence[pipeline.Loader]) -> dict[str, Any]:
  """Returns the means by the sources' weights of the fractions that all sources
  have among their figures."""
  means = {}
  for name, value in results[0].figures.items():
    is_everywhere = all(name in measured.figures for measured in results)
    if isinstance(value, float) and is_everywhere:
      values = [measured.figures[name] for measured in results]
      means[name] = held_out.mean_of_sources(values, loaders)
  return means


def _check_loaders(loaders: Sequence[pipeline.Loader], evaluation: Evaluation
                   ) -> None:
  """Checks that data of several sources can be evaluated together, and that
  --predictions can be written for them.

  Args:
    loaders: the loader of each source.
    evaluation: the evaluation of the run.

  Raises:
    RequestError: where they cannot.
  """
  predictions = evaluation.options.predictions
  # Either all sources must have labels, by which figures are computed, or none.
  # Without labels there are only predictions to write.
  is_unlabelled = []
  for loader in loaders:
    view = loader.views[0]
    is_unlabelled.append(isinstance(view, records.Rows) and view.bare)
  if any(is_unlabelled) and not all(is_unlabelled):
    raise RequestError('some sources have labels or answers, and others have '
                       'none: evaluate them one by one')
  if any(is_unlabelled) and not predictions:
    raise RequestError('there are no labels or answers to measure by: pass '
                       '--predictions=FILE for what is predicted')

  # Questions of several sources might have the same ids.
  if evaluation.run.config.objective == 'question_answering' and predictions:
    require(len(loaders) == 1, '--predictions is one file, and '
            f'{len(loaders)} sources are evaluated: evaluate one by --text')
    answers.check_question_ids(loaders[0].views[0])


def _write_predictions(path: Any, results: Sequence[MeasuredPredictions]
                       ) -> None:
  """Writes the predictions for all sources to files.

  Args:
    path: the file of --predictions. With the suffix .csv it is one table. Else
      the format depends on the kind of predictions, and there may be several
      files.
    results: the predictions for each source.
  """
  # Join the texts of all sources for each file. The key of a file is put before
  # the suffix of its name, such as 'nbest' in FILE.nbest.json; '' is FILE
  # itself.
  files = {}
  if path.suffix == '.csv':
    rows = []
    for measured in results:
      rows += measured.table
    files[''] = _format_csv(rows)
  else:
    for infix in results[0].files:
      files[infix] = ''.join(measured.files[infix] for measured in results)

  for infix, text in files.items():
    file = path
    if infix:
      file = path.with_name(f'{path.stem}.{infix}{path.suffix}')
    storage.write_file(file, text)
    print(f'written: {file}')


def compute_scores(evaluation: Evaluation, loader: pipeline.Loader
                   ) -> list[np.ndarray]:
  """Computes the scores that the model's head gives to each row of a loader.

  Args:
    evaluation: the evaluation of the run.
    loader: the loader of the rows.

  Returns:
    For each row, in the loader's order, the scores [K] of the K labels. If each
    token has a label they are [L, K], where L is the length to which the batch
    was padded.
  """
  objective = loader.objective
  module = evaluation.run.module

  def score_batch(params: Any, batch: Any):
    """Returns the scores of each row of a batch."""
    return objective.apply(module, params, batch).extra['scores']

  step = evaluation.jit_once(score_batch, 'labels')
  scores_of_rows: list[np.ndarray] = []
  for batch_scores in evaluation.run_on_batches(step, loader, 'answering'):
    scores_of_rows += list(batch_scores)
  # Leave out the rows that only fill up the last batch.
  return scores_of_rows[:loader.num_windows]


def measure_labels(view: Any, scores: Sequence[np.ndarray], *_: Any
                   ) -> MeasuredPredictions:
  """Measures how often the label with the highest score is right (text
  classification).

  Args:
    view: the texts and their right labels, a view of training/data/records.py.
    scores: the scores [U] of the U labels for each text.

  Returns:
    The figures, lines for the user, and what --predictions writes.
  """
  # Prepare the predictions as objects for JSON, and as rows of a table for a
  # .csv.
  predicted = predicting.predict_labels(view, scores)
  objects = []
  table = []
  for record, prediction in zip(view.records, predicted):
    objects.append(_record_as_json(record) | {
        'predicted': prediction.label,
        'probabilities': prediction.probabilities})
    row = _record_as_columns(record) | {'predicted': prediction.label}
    for label, probability in prediction.probabilities.items():
      row[f'probability of {label}'] = probability
    table.append(row)

  # Measure them, if the right labels are known.
  if not view.bare:
    targets = np.array([item.target for item in view.items])
    return _measure_classification(
        names=view.labels, targets=targets,
        predicted=np.stack(scores).argmax(1), objects=objects, table=table)

  # Otherwise say how often each label is predicted.
  counts = collections.Counter(prediction.label for prediction in predicted)
  lines = [_describe_unlabelled(len(predicted), 'records')]
  for label in view.labels[:MOST_PRINTED_LABELS]:
    lines.append(f'  {label:<22} {counts[label]:,}')
  return MeasuredPredictions(
      figures={'rows': len(predicted)}, lines=lines,
      files=_format_jsonl(objects), table=table)


def measure_written_labels(view: Any,
                           written: Sequence[tuple[str, str, bool]],
                           evaluation: Evaluation) -> MeasuredPredictions:
  """Measures labels that a model writes as text.

  Args:
    view: a view of training/objectives/seq2seq.py.
    written: for each row, what the model wrote, the right label, and whether
      the two have the same tokens. The space that some tokenizers put before a
      text is no part of either.
    evaluation: the evaluation whose tokenizer the rows are of.

  Returns:
    The figures, lines for a reader, and what --predictions writes.

  Raises:
    RequestError: where all rows have the same label.
  """
  # The labels are those that are held out: a model that writes text has no list
  # of them.
  text_pairs = []
  for text, target, _ in written:
    text_pairs.append((text.strip(), target.strip()))
  labels = records.sort_labels(target for _, target in text_pairs)
  require(len(labels) > 1, f'what is held out has one label, {labels[0]!r}: '
          'there is nothing to measure')

  # Number the labels. A text that is no label gets the number after them, and a
  # name of its own in the tables; it is always wrong.
  number_of_label = {label: i for i, label in enumerate(labels)}
  no_label = len(labels)
  targets = np.array([number_of_label[target] for _, target in text_pairs])
  predicted = np.array(
      [number_of_label.get(text, no_label) for text, _ in text_pairs])
  names = [*labels]
  if (predicted == no_label).any():
    names.append(NO_LABEL)

  # The predictions, as objects of JSON and as rows of a .csv.
  objects = []
  table = []
  for (text, target), pair in zip(text_pairs, view):
    source = evaluation.tokenizer.decode(pair.source)
    objects.append({'texts': [source], 'label': target, 'predicted': text})
    table.append({'text': source, 'label': target, 'predicted': text})
  return _measure_classification(
      names=names, targets=targets, predicted=predicted, objects=objects,
      table=table, num_labels=len(labels))


def _measure_classification(names: Sequence[str], targets: np.ndarray,
                            predicted: np.ndarray, objects: list[dict],
                            table: list[dict], num_labels: int = 0
                            ) -> MeasuredPredictions:
  """Returns accuracy, F1, Matthews' correlation and the confusion matrix of
  predicted labels.

  Args:
    names: the labels by number.
    targets: the number of the right label of each record.
    predicted: the number of the label that the model gives it.
    objects: the predictions as objects of JSON.
    table: the predictions as rows of a .csv.
    num_labels: how many of the names are labels, the first ones; 0: all. The
      names after them are never right.
  """
  from sklearn import metrics
  num_labels = num_labels or len(names)
  label_options = dict(labels=range(num_labels), zero_division=0.0)

  # The figures over all labels. The macro F1 is the mean over the labels that
  # occur.
  precision, recall, f1, num_rows = metrics.precision_recall_fscore_support(
      targets, predicted, **label_options)
  occurring = np.union1d(targets, predicted)
  f1_macro = float(np.mean(f1[occurring[occurring < num_labels]]))
  f1_main = f1_macro
  if num_labels == 2:  # that of the second label, the positive one
    f1_main = float(f1[1])
  figures: dict[str, Any] = {
      'accuracy': float(metrics.accuracy_score(targets, predicted)),
      'f1': f1_main,
      'f1_macro': f1_macro,
      'mcc': float(metrics.matthews_corrcoef(targets, predicted))}

  # The lines for a reader.
  lines = [f'{len(targets):,} records', *_format_figures(figures)]
  if num_labels <= MOST_PRINTED_LABELS:
    report = metrics.classification_report(
        targets, predicted, target_names=names[:num_labels], digits=4,
        **label_options)
    lines += report.splitlines()
  else:
    lines.append(f'  {num_labels:,} labels, whose figures --json writes')

  # The figures of each label, and of each record.
  figures_by_label = []
  for i, name in enumerate(names[:num_labels]):
    figures_by_label.append({
        'label': name, 'precision': float(precision[i]),
        'recall': float(recall[i]), 'f1': float(f1[i]),
        'rows': int(num_rows[i])})
  confusion = metrics.confusion_matrix(targets, predicted,
                                       labels=range(len(names)))
  accuracy_of_items = items.record_scores(predicted == targets,
                                          _identify_items(objects))
  figures |= {'rows': len(targets), 'by_label': figures_by_label,
              'labels': [*names], 'confusion': confusion.tolist(),
              'items': {'accuracy': accuracy_of_items}}
  return MeasuredPredictions(figures=figures, lines=lines,
                             files=_format_jsonl(objects), table=table)


def measure_numbers(view: Any, scores: Sequence[np.ndarray], *_: Any
                    ) -> MeasuredPredictions:
  """Measures predicted numbers by their correlation with the right ones, and
  by their errors.

  Args:
    view: the texts, as a view of training/data/records.py.
    scores: the number that the model gives each text, [1].

  Returns:
    The figures, lines for a reader, and what --predictions writes.
  """
  # Prepare the predictions as objects for JSON, and as rows of a table for a
  # .csv. If the right numbers are not known, that is all.
  predicted = np.array(predicting.predict_numbers(view, scores))
  objects = []
  table = []
  for record, number in zip(view.records, predicted):
    objects.append(_record_as_json(record) | {'predicted': float(number)})
    table.append(_record_as_columns(record) | {'predicted': float(number)})
  files = _format_jsonl(objects)
  if view.bare:
    lines = [_describe_unlabelled(len(predicted), 'records')]
    return MeasuredPredictions(figures={'rows': len(predicted)}, lines=lines,
                               files=files, table=table)

  # Measure them, together and record by record.
  targets = np.array([item.target for item in view.items])
  pearson, spearman = _correlate(targets, predicted)
  squared_errors = (predicted - targets) ** 2
  absolute_errors = np.abs(predicted - targets)
  figures: dict[str, Any] = {
      'pearson': pearson, 'spearman': spearman,
      'mean_squared_error': float(np.mean(squared_errors)),
      'mean_absolute_error': float(np.mean(absolute_errors))}
  lines = [f'{len(targets):,} records', *_format_figures(figures)]
  names = _identify_items(objects)
  figures['rows'] = len(targets)
  figures['items'] = {
      'mean_squared_error': items.record_scores(squared_errors, names),
      'mean_absolute_error': items.record_scores(absolute_errors, names)}
  return MeasuredPredictions(figures=figures, lines=lines, files=files,
                             table=table)


def _correlate(targets: np.ndarray, predicted: np.ndarray
               ) -> tuple[float, float]:
  """Computes Pearson's and Spearman's correlation of predicted numbers with the
  right ones.

  Args:
    targets: the right numbers, [N].
    predicted: the predicted numbers, [N].

  Returns:
    Both correlations. They are nan if all numbers of one side are equal, or
    there are fewer than two.
  """
  from scipy import stats
  if len(predicted) < 2:
    return np.nan, np.nan
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # scipy warns of a constant side
    pearson = stats.pearsonr(targets, predicted).statistic
    spearman = stats.spearmanr(targets, predicted).statistic
  return float(pearson), float(spearman)


def measure_word_labels(view: records.Sentences, scores: Sequence[np.ndarray],
                        *_: Any) -> MeasuredPredictions:
  """Measures the likeliest label of each word of each sentence.

  Args:
    view: the sentences, each split into rows that the model can take.
    scores: the scores of the K labels for the tokens of each row, [L, K],
      padding or not.

  Returns:
    The figures, lines for a reader, and what --predictions writes.
  """
  # Lay out the predictions, as a table with a row for each word. A word without
  # a token has the probability nan.
  sentences = predicting.predict_word_labels(view, scores)
  without_tokens = 0
  table = []
  for number, (record, sentence) in enumerate(zip(view.records, sentences), 1):
    without_tokens += int(np.isnan(sentence.probabilities).sum())
    table += _word_rows(number, record, sentence)
  counts = dict(words=len(table), sentences=len(sentences),
                without_tokens=without_tokens)
  lines = [f'{len(sentences):,} sentences of {len(table):,} words, of which '
           f'{without_tokens:,} have no token']
  if view.bare:
    columns = ('word', 'predicted', 'probability')
    return MeasuredPredictions(figures=counts, lines=lines,
                               files=_format_conll(table, columns), table=table)

  # Measure them word by word, and labels of entities (B-PER, I-PER, ...) also
  # entity by entity.
  is_right = [row['label'] == row['predicted'] for row in table]
  accuracy = sum(is_right) / len(is_right)
  figures: dict[str, Any] = dict(accuracy=accuracy, **counts)
  lines.append(f'  accuracy         {accuracy:.4f}')
  if labelled.marks_entities(view.labels):
    entity_figures, report = measure_entities(
        right=[record.labels for record in view.records],
        predicted=[sentence.labels for sentence in sentences])
    figures |= entity_figures
    lines += report

  # Write the columns that CoNLL's own script, conlleval, reads.
  columns = ('word', 'label', 'predicted')
  return MeasuredPredictions(figures=figures, lines=lines,
                             files=_format_conll(table, columns), table=table)


def _format_conll(table: Sequence[dict[str, Any]], columns: Sequence[str]
                  ) -> dict[str, str]:
  """Writes a table of words in the format of CoNLL: a line for each word, and
  an empty line after each sentence.

  Args:
    table: rows of words, {column: cell}, in the order of their sentences.
    columns: the columns that are written.

  Returns:
    {'': the text of the file}, as `MeasuredPredictions.files` has it.
  """
  # groupby joins neighbours with the same number of the sentence.
  lines = []
  for _, words in itertools.groupby(table, lambda row: row['sentence']):
    for row in words:
      cells = [str(row[column]) for column in columns]
      lines.append(' '.join(cells))
    lines.append('')
  return {'': ''.join(line + '\n' for line in lines)}


def _word_rows(sentence_number: int, record: labelled.Sentence,
               sentence: predicting.WordLabels) -> list[dict[str, Any]]:
  """Returns the rows of a table of words for one sentence.

  Args:
    sentence_number: the number of the sentence.
    record: its words, with their labels if these are known.
    sentence: the labels that the model gives its words.
  """
  rows = []
  for i, word in enumerate(record.words):
    row = {'sentence': sentence_number, 'word': word}
    if record.labels:
      row['label'] = record.labels[i]
    row['predicted'] = sentence.labels[i]
    row['probability'] = sentence.probabilities[i]
    rows.append(row)
  return rows


def measure_entities(right: Sequence[Sequence[str]],
                     predicted: Sequence[Sequence[str]]
                     ) -> tuple[dict[str, Any], list[str]]:
  """Measures precision, recall and F1 of named entities, by the package
  seqeval.

  Args:
    right: the right labels of each sentence, such as B-PER, I-PER and O.
    predicted: the labels that the model gives.

  Returns:
    The figures; and the lines of a table for the user. The figures are
    precision, recall and f1 over all entities (micro averages), from 0 to 1;
    strict_precision, strict_recall and strict_f1; entities, their number; and
    types, {type: {precision, recall, f1, entities}}.
  """
  # Measure twice. By default an entity may begin with I-, as in CoNLL's script;
  # in strict mode it must begin with B-.
  from seqeval import metrics, scheme
  lenient = _seqeval_figures(right, predicted)
  strict = _seqeval_figures(right, predicted=predicted, mode='strict',
                            scheme=scheme.IOB2)

  # Take the averages over all entities, and then the figures of each type. The
  # number of entities is the same in both modes.
  figures: dict[str, Any] = dict(lenient['micro avg'])
  strict_figures = {}
  for name, value in strict['micro avg'].items():
    if name != 'entities':
      strict_figures[f'strict_{name}'] = value
  figures |= strict_figures
  figures['types'] = {}
  for name, figures_of_type in lenient.items():
    if not name.endswith(' avg'):
      figures['types'][name] = figures_of_type
  report = metrics.classification_report(right, predicted, digits=4,
                                         zero_division=0)
  return figures, [*report.splitlines(), *_format_figures(strict_figures)]


def _seqeval_figures(right: Sequence[Sequence[str]],
                     predicted: Sequence[Sequence[str]], **options: Any
                     ) -> dict[str, dict[str, Any]]:
  """Computes figures of named entities by seqeval.

  Args:
    right, predicted: the labels of each sentence.
    **options: options of seqeval's classification_report, such as its mode.

  Returns:
    {type of entity, or name of an average: {precision, recall, f1, entities}}.
  """
  from seqeval import metrics
  report = metrics.classification_report(
      right, predicted, output_dict=True, zero_division=0, **options)
  figures = {}
  for name, row in report.items():
    figures[name] = dict(
        precision=float(row['precision']), recall=float(row['recall']),
        f1=float(row['f1-score']), entities=int(row['support']))
  return figures


def measure_answers(view: records.Questions, scores: Sequence[np.ndarray],
                    evaluation: Evaluation) -> MeasuredPredictions:
  """Measures answers to questions by the rules of SQuAD.

  Args:
    view: the questions and their contexts.
    scores: for each window of a context, the scores of its tokens as the first
      and as the last one of the answer, [L, 2].
    evaluation: the evaluation, with the flags of ANSWER_FLAGS.

  Returns:
    The figures, lines for a reader, and what --predictions writes.
  """
  # Choose the answers, and lay them out as rows of a .csv.
  stack = architectures.stack(evaluation.run.model)
  predictions = answers.answer_questions(view, scores=scores, stack=stack,
                                         options=evaluation.options)
  table = []
  for question, chosen in zip(view.questions, predictions):
    answer = predicting.predict_answer(chosen)
    table.append({
        'id': question.id, 'question': question.question,
        'predicted': answer.text, 'start': answer.start,
        'probability': answer.probability})

  # Measure them, where the right answers are known.
  files = answers.format_prediction_files(view, predictions)
  if view.bare:
    lines = [_describe_unlabelled(len(predictions), 'questions')]
    return MeasuredPredictions(figures={'total': len(predictions)}, lines=lines,
                               files=files, table=table)
  figures = answers.measure_answers(view, predictions)
  return MeasuredPredictions(
      figures=figures, lines=answers.format_report(figures), files=files,
      table=table)


def _describe_unlabelled(count: int, things: str) -> str:
  """Returns a line that says how many records, or other things, have no labels
  to measure by."""
  return f'{count:,} {things} without labels or answers, which are predicted'


def _format_jsonl(objects: Iterable[dict[str, Any]]) -> dict[str, str]:
  """Returns the file of some objects, as `MeasuredPredictions.files` has it:
  a line of JSON for each."""
  lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in objects]
  return {'': ''.join(lines)}


def _format_csv(rows: Sequence[dict[str, Any]]) -> str:
  """Returns the text of a .csv with a first line of the names of the columns,
  in the order in which these first occur."""
  columns: dict[str, None] = {}
  for row in rows:
    columns |= dict.fromkeys(row)
  text = io.StringIO()
  writer = csv.DictWriter(text, [*columns])
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def _record_as_columns(record: labelled.Record) -> dict[str, Any]:
  """Returns the columns of a .csv that say which record a row is of."""
  row = _record_as_json(record)
  texts = dict(zip(('text', 'second text'), row.pop('texts')))
  return {'where': row.pop('where'), **texts, **row}


def _record_as_json(record: Any) -> dict[str, Any]:
  """Returns a record as an object of JSON, with its label if it has one."""
  json_object = {'where': record.where.rstrip(','), 'texts': [*record.texts]}
  if record.label:
    json_object['label'] = record.label
  return json_object


def _identify_items(objects: Iterable[dict[str, Any]]) -> list[tuple]:
  """Returns the texts and the label of each prediction, which tell it from the
  others; see items.py."""
  return [(row.get('texts'), row['label']) for row in objects]


def _format_figures(figures: Mapping[str, float]) -> list[str]:
  """Returns a line for each figure."""
  lines = []
  for name, value in figures.items():
    words = name.replace('_', ' ')
    lines.append(f'  {words:<22} {held_out.format_figure(value)}')
  return lines


# The function that measures the predictions on a view, by objective:
# measure(view, outputs, evaluation) -> MeasuredPredictions. The outputs are the
# scores of each row or, of a model without a head of its own for the labels,
# what it wrote.
MEASURE_OF_OBJECTIVE = {
    'classification': measure_labels,
    'regression': measure_numbers,
    'token_classification': measure_word_labels,
    'question_answering': measure_answers,
    'seq2seq': measure_written_labels}
TASKS = {'labels': Labels()}
