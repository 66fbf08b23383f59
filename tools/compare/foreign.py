"""Readers of the runs that other programs logged, for the referee (referee.py).

A file is known by what it holds and not by its name. To add a format, write a
class with `title`, `recognizes` and `read`, and add it to READERS.
"""

from collections.abc import Iterable, Mapping, Sequence
import csv
import dataclasses
import io
import numbers
import pathlib
import re
from typing import Any, NamedTuple, Protocol

from common.errors import RequestError, join_choices, require
from tools.compare import certificate
from training.evals import items
from training.workdir import storage

# The value of a figure, such as the held-out loss, by step.
Curve = Mapping[int, float]
# Columns of a CSV by what they hold, in lower case, the first one there counts.
_COLUMN_NAMES = {
    'entry': ('entry', 'variant', 'model', 'group', 'config'),
    'run': ('run', 'run_id', 'run_name', 'name', 'id'),
    'seed': ('seed',),
    'step': ('step', '_step', 'global_step', 'train/global_step',
             'trainer/global_step', 'iteration', 'iter', 'steps', 'epoch'),
    'split': ('split',),
    'mean': ('mean', 'mean_loss', 'avg_loss', 'mean_val_loss'),
    'num_runs': ('n', 'num_runs', 'runs', 'seeds'),
    'deviation': ('sd', 'std', 'stdev', 'standard_deviation')}
# Figures and columns that tell what a run was given, where their names are not
# those of certificate.QUANTITIES: the last part of the name, in lower case.
_QUANTITY_OF_FIGURE = {
    'num_params': 'params', 'total_flos': 'flops', 'train_time': 'seconds',
    'num_input_tokens_seen': 'tokens', 'train_runtime': 'seconds',
    '_runtime': 'seconds'}
_QUANTITIES_IN_WORDS = {
    name for name, quantity in certificate.QUANTITIES.items()
    if quantity.tolerance is None}
# The binary head of a file with a NUL byte is no text.
_BYTES_OF_HEAD = 4096
# Folders of TensorBoard that are a split of a run, as of Keras, and no run.
_SPLITS = ('train', 'validation', 'val', 'eval', 'test')
# How a run of an entry is called, as in muon-2 or muon_run2.
_NUMBER_OF_RUN = r'[-_ .](seed|s|run|r)?[-_=]?\d+'
_SEED = re.compile(r'(?:^|[-_/ .])seed[-_=]?(\d+)(?=$|[-_/ .])')


@dataclasses.dataclass(frozen=True)
class ForeignRun:
  """A run, as its log tells it.

  Attributes:
    path: the names of its folders and of itself, with '/' between them.
    seed: its seed; None: the log does not say.
    curves: the value of each figure by step, by the name of the figure.
    given: what it was given in words, by the names of certificate.QUANTITIES;
      figures tell the numbers.
    items: by the name of a figure, the scores of its items, such as questions
      (training/evals/items.py).
  """
  path: str
  seed: int | None = None
  curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
  given: Mapping[str, str] = dataclasses.field(default_factory=dict)
  items: Mapping[str, dict] = dataclasses.field(default_factory=dict)

  def given_until(self, step: int) -> dict[str, str | float]:
    """Returns what the run was given up to a step, in words and numbers, by the
    names of certificate.QUANTITIES."""
    values: dict[str, str | float] = dict(self.given)
    for figure, curve in self.curves.items():
      quantity = quantity_of_figure(figure)
      steps = [earlier for earlier in curve if earlier <= step]
      if quantity and steps:
        values[quantity] = curve[max(steps)]
    return values


@dataclasses.dataclass(frozen=True)
class ReportedMean:
  """A row of a table of results: a mean whose runs are not there.

  Attributes:
    path: the name of what was trained.
    step: the step of the figure; None: the table does not say.
    mean: the mean over runs.
    num_runs: the number of runs.
    deviation: their standard deviation; None: the table does not say.
    given: what they were given, by the names of certificate.QUANTITIES.
  """
  path: str
  step: int | None
  mean: float
  num_runs: int
  deviation: float | None = None
  given: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Reader(Protocol):
  """A reader of one format.

  Attributes:
    name: the format, as --format calls it.
    title: the format, as messages call it.
  """
  name: str
  title: str

  def recognizes(self, text: str) -> bool:
    """Returns whether a file with this text has the format."""
    ...

  def read(self, file: pathlib.Path, path: str, text: str
           ) -> Sequence[ForeignRun | ReportedMean]:
    """Returns the runs of a file.

    Args:
      file: the file.
      path: its path below the folder that was named, without ending; '' where
        the file itself was named.
      text: what it holds.
    """
    ...


class NanogptLog:
  """Reads logs of modded-nanogpt, where the lines of a run are such as
  'step:125/3350 val_loss:4.66393 train_time:22.6s'; one file may hold several
  runs, one after the other."""
  name = 'modded_nanogpt'
  title = 'a log of modded-nanogpt'
  _LINE = re.compile(r'^step:(\d+)/\d+ (.*loss:.*)$', re.MULTILINE)
  _FIGURE = re.compile(r'(\w*loss):(\S+)')
  _TIME = re.compile(r'train_time:([\d.]+)(ms|s)')
  _SECONDS_OF_UNIT = {'ms': 0.001, 's': 1.0}

  def recognizes(self, text: str) -> bool:
    return self._LINE.search(text) is not None

  def read(self, file, path, text):
    """Returns the runs of a log; a step that comes again begins another."""
    rows = []
    for step, line in self._LINE.findall(text):
      figures = {name: float(x) for name, x in self._FIGURE.findall(line)}
      for time, unit in self._TIME.findall(line):
        figures['train_time'] = float(time) * self._SECONDS_OF_UNIT[unit]
      rows.append((int(step), figures))
    return _runs_of_rows(path, None, rows)


class PrintedLosses:
  """Reads logs of programs that print a sentence for each evaluation: nanoGPT,
  nanochat and llm.c. The groups of a pattern are the step and the figures."""
  name = 'printed'
  title = 'a log of nanoGPT, nanochat or llm.c'
  _PATTERNS = tuple(re.compile(pattern, re.MULTILINE) for pattern in (
      r'^step (?P<step>\d+): train loss (?P<train_loss>[\d.]+|nan), '
      r'val loss (?P<val_loss>[\d.]+|nan)',
      r'^Step (?P<step>\d+) \| Validation bpb: (?P<val_bpb>[\d.]+|nan)',
      r'^s:(?P<step>\d+) tel:(?P<val_loss>[\d.]+|nan)'))

  def recognizes(self, text: str) -> bool:
    return any(pattern.search(text) for pattern in self._PATTERNS)

  def read(self, file, path, text):
    """Returns the runs of a log; a step that comes again begins another."""
    rows = []
    for pattern in self._PATTERNS:
      for match in pattern.finditer(text):
        figures = {name: float(x) for name, x in match.groupdict().items()}
        step = int(figures.pop('step'))
        rows.append((step, figures))
    return _runs_of_rows(path, None, rows)


class TrainerState:
  """Reads trainer_state.json of the Trainer of Hugging Face's transformers.
  Each checkpoint of a run has one, with the history up to there."""
  name = 'trainer'
  title = 'trainer_state.json of the Hugging Face Trainer'

  def recognizes(self, text: str) -> bool:
    return text.lstrip().startswith('{') and '"log_history"' in text

  def read(self, file, path, text):
    """Returns the run of a trainer_state.json: the curve of each figure in its
    log_history.

    Args:
      file: the file.
      path: its path below the folder of all runs.
      text: its content, an object whose log_history has an entry for each time
        that the Trainer logged.
    """
    state = storage.parse_json_object(text, str(file), {'log_history': list})
    # The run is named after its folder, without the folder of the checkpoint.
    folders = re.sub(r'(^|/)checkpoint-\d+(?=/|$)', '', path).split('/')[:-1]
    run_path = '/'.join(folders).strip('/')
    # A curve is {step: value}.
    curves: dict[str, dict[int, float]] = {}
    for entry in state['log_history']:
      for name, value in entry.items():
        if isinstance(value, numbers.Real) and name not in ('step', 'epoch'):
          curves.setdefault(name, {})[int(entry['step'])] = float(value)
    # FLOPs and tokens are counted once, in the state itself. A version of
    # transformers that does not count them has 0 there.
    for name in ('total_flos', 'num_input_tokens_seen'):
      if state.get(name):
        curves.setdefault(name, {})[int(state['global_step'])] = state[name]
    return [ForeignRun(path=run_path, curves=curves)]


class EventFile:
  """Reads event files of TensorBoard. A folder of them is a run, since one that
  was resumed has several."""
  name = 'tensorboard'
  title = 'an event file of TensorBoard'

  def recognizes(self, text: str) -> bool:
    # A length and its checksum are before the first event, which has this.
    return 'brain.Event:' in text[:64]

  def read(self, file, path, text):
    """Returns the run of an event file: the curve of each scalar in it.

    Args:
      file: the file.
      path: its path below the folder of all runs.
      text: its beginning, which is not used.
    """
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util
    # A size of 0 keeps all events; by default only a sample is kept.
    events = event_accumulator.EventAccumulator(
        str(file), size_guidance={event_accumulator.SCALARS: 0,
                                  event_accumulator.TENSORS: 0})
    events.Reload()
    run_path = path.rpartition('/')[0]

    # Read the scalars. Newer writers log them as tensors of shape ().
    curves: dict[str, dict[int, float]] = {}
    for name in events.Tags()['scalars']:
      curves[name] = {event.step: event.value for event in events.Scalars(name)}
    for name in events.Tags()['tensors']:
      array_by_step = {event.step: tensor_util.make_ndarray(event.tensor_proto)
                       for event in events.Tensors(name)}
      # Others are no figures: texts, pictures and histograms are tensors too.
      are_scalars = all(array.shape == () and array.dtype.kind == 'f'
                        for array in array_by_step.values())
      if are_scalars:
        curves[name] = {step: float(array)
                        for step, array in array_by_step.items()}

    # If the last folder is named after a split, such as `eval`, it is not a run
    # of its own: the split becomes a part of the names of the figures.
    parent, _, last_folder = run_path.rpartition('/')
    if last_folder in _SPLITS:
      run_path = parent
      curves = {f'{last_folder}/{name}': curve
                for name, curve in curves.items()}
    return [ForeignRun(path=run_path, curves=curves)]


class LmEvalSamples:
  """Reads the samples that lm-eval writes with --log_samples. All tasks of a
  folder are of one run."""
  name = 'lm_eval'
  title = 'samples of lm-eval (--log_samples)'

  def recognizes(self, text: str) -> bool:
    first_line = text[:text.find('\n')]
    return first_line.startswith('{') and '"filtered_resps"' in first_line

  def read(self, file, path, text):
    """Returns the scores of single items, such as questions, in a file of
    samples, as a run without curves.

    Args:
      file: the file, samples_TASK_TIME.jsonl.
      path: its path below the folder of all runs.
      text: its content, a JSON object for each item.
    """
    task = file.stem.removeprefix('samples_').rpartition('_')[0] or file.stem

    # Group the samples by their filter, a way to extract answers, which older
    # versions do not name.
    samples_by_filter: dict[str, list[dict]] = {}
    for line in text.splitlines():
      sample = storage.parse_json_object(line, str(file))
      filter_name = sample.get('filter', 'none')
      samples_by_filter.setdefault(filter_name, []).append(sample)

    # Make a record for each figure and filter. Values that are no numbers, such
    # as the parts of a perplexity, are not scores of items.
    records = {}
    for filter_name, samples in samples_by_filter.items():
      # An item is named by a hash of its content, or in older versions by its
      # number.
      names = [sample.get('doc_hash', sample['doc_id']) for sample in samples]
      # The figures are those of the first sample; newer versions list them.
      figures = samples[0].get('metrics', samples[0].keys() - {'doc_id'})
      for figure in sorted(figures):
        scores = [sample.get(figure) for sample in samples]
        if all(isinstance(score, numbers.Real) for score in scores):
          short_name = items.shorten_figure_name(f'{figure},{filter_name}')
          records[f'{task}/{short_name}'] = items.record_scores(scores, names)
    return [ForeignRun(path=path.rpartition('/')[0], items=records)]


class WandbChart:
  """Reads the CSV of a chart that was exported from W&B: a column 'RUN -
  FIGURE' for each run, with others for its __MIN and __MAX."""
  name = 'wandb_chart'
  title = 'a chart exported from W&B (CSV)'

  def recognizes(self, text: str) -> bool:
    return '__MIN' in text[:text.find('\n')] and ' - ' in text

  def read(self, file, path, text):
    """Returns the runs of an exported chart: each cell is the value of a figure
    of one run at one step.

    Args:
      file: the file.
      path: its path below the folder of all runs.
      text: its content.
    """
    # Collect the steps and values of each run. A column 'RUN - FIGURE' is of a
    # run; the columns of its __MIN and __MAX are passed over. The first column
    # is the horizontal axis of the chart.
    table = _read_csv(text)
    step_column = table.fieldnames[0]
    points_by_run: dict[str, list] = {}
    for row in table:
      for column, cell in row.items():
        run, dash, figure = column.rpartition(' - ')
        if not dash or not cell or figure.endswith(('__MIN', '__MAX')):
          continue
        step = float(row[step_column])
        require(step.is_integer(), f'{file} is a chart over {step_column!r}: '
                'export it over Step')
        points = points_by_run.setdefault(run, [])
        points.append((int(step), {figure: float(cell)}))
    runs = []
    for run, points in points_by_run.items():
      run_path = _join_names(path, run)
      runs += _runs_of_rows(path=run_path, seed=None, rows=points)
    return runs


class ResultsTable:
  """Reads a CSV of results: the entry, the mean, the number n of its runs, and
  perhaps the step and the standard deviation."""
  name = 'results'
  title = 'a table of results (CSV with entry, mean, n)'

  def recognizes(self, text: str) -> bool:
    columns = _read_csv(text).fieldnames
    needed = ('entry', 'mean', 'num_runs')
    return all(_find_column(columns, name) for name in needed)

  def read(self, file, path, text):
    """Returns the mean that each row of a table of results reports, with what
    the runs behind it were given.

    Args:
      file: the file.
      path: its path below the folder of all runs, which is not used.
      text: its content.
    """
    # Find the columns by their usual names. A table has those of the entry, the
    # mean and the number of runs, or it would not be recognized. The other two
    # are None where it has none.
    table = _read_csv(text)
    columns = table.fieldnames
    entry_column = _find_column(columns, 'entry')
    mean_column = _find_column(columns, 'mean')
    num_runs_column = _find_column(columns, 'num_runs')
    step_column = _find_column(columns, 'step')
    deviation_column = _find_column(columns, 'deviation')

    results = []
    for row in table:
      step = int(row[step_column]) if step_column else None
      given = {}
      for column, cell in row.items():
        quantity = quantity_of_figure(column)
        has_other_meaning = column in (entry_column, num_runs_column)
        if quantity and cell and not has_other_meaning:
          given[quantity] = cell
      results.append(ReportedMean(
          path=row[entry_column], step=step, mean=float(row[mean_column]),
          num_runs=int(row[num_runs_column]),
          deviation=_parse_number(row.get(deviation_column)), given=given))
    return results


def _split_figures_and_words(cells: dict[str, str], no_figures: set[str]
                             ) -> tuple[dict[str, float], dict[str, str]]:
  """Splits the cells of a row of a CSV into figures, and words that say what a
  run was given, such as its code.

  Args:
    cells: the cells of a row by their column.
    no_figures: columns, in lower case, whose numbers are no figures.

  Returns:
    The figures by column, and the words by the name of their quantity.
  """
  figures, given = {}, {}
  for column, cell in cells.items():
    quantity = quantity_of_figure(column)
    # What is told in words is no figure even if it looks like a number, as the
    # name of a commit may.
    value = None
    if quantity not in _QUANTITIES_IN_WORDS:
      value = _parse_number(cell)
    if value is None and quantity and cell:
      given[quantity] = cell
    elif value is not None and column.lower() not in no_figures:
      figures[column] = value
  return figures, given


class PlainCsv:
  """Reads a CSV with a row for each evaluation: columns for the entry, the run,
  the seed and the step, as far as there are any, and one for each figure. The
  history of a run in W&B or trackio is such a table."""
  name = 'csv'
  title = 'a CSV of runs (entry, run, seed, step, loss), or the history of one'

  def recognizes(self, text: str) -> bool:
    columns = _read_csv(text).fieldnames
    has_name = any(_find_column(columns, name)
                   for name in ('run', 'seed', 'step'))
    return has_name and len(columns) > 1

  def read(self, file, path, text):
    table = _read_csv(text)
    return _runs_of_table(path, table.fieldnames, table)


class JsonLines:
  """Reads JSON lines with an object for each evaluation, as many a training
  loop writes them. The names in an object are as the columns of PlainCsv. An
  object without a step says what the whole run was given."""
  name = 'jsonl'
  title = 'JSON lines (an object with step and loss for each evaluation)'
  _STEP = re.compile(
      f'"({"|".join(map(re.escape, _COLUMN_NAMES["step"]))})" *:')

  def recognizes(self, text: str) -> bool:
    first_line = text.lstrip().partition('\n')[0].rstrip()
    is_object = first_line.startswith('{') and first_line.endswith('}')
    return is_object and self._STEP.search(text) is not None

  def read(self, file, path, text):
    """Returns the runs of a file of JSON lines.

    Args:
      file: the file.
      path: its path below the folder of all runs.
      text: its content.
    """
    # Write each object as the row of a table, whose cells are texts.
    rows = []
    columns: dict[str, None] = {}  # each once, in order
    for line in text.splitlines():
      if not line.strip():
        continue
      row = {}
      for column, value in storage.parse_json_object(line, str(file)).items():
        row[column] = '' if value is None else str(value)
      rows.append(row)
      columns |= dict.fromkeys(row)
    return _runs_of_table(path, [*columns], rows)


class LoopLog:
  """Reads what a training loop of one's own prints or logs: lines with a step
  and with losses, such as 'step 100 | train loss 3.2 | val loss 3.3' or
  '... INFO epoch=2 val_loss=3.3 acc=0.4'. Without steps, epochs count."""
  name = 'loop'
  title = "lines of a loop of one's own (step 100 val_loss 3.3)"
  _NUMBER_OF_STEP = r'\b["\']?\s*[:=#]?\s*[\[(]?(\d+)(?![.,]?\d)'
  _STEP = re.compile(r'\b(?:global_step|step|iteration|iter)'
                     + _NUMBER_OF_STEP, re.IGNORECASE)
  _EPOCH = re.compile(r'\bepoch' + _NUMBER_OF_STEP, re.IGNORECASE)
  _FIGURE = re.compile(
      r'\b(?:(training|train|validation|valid|val|dev|evaluation|eval|test)'
      r'[ _/.-])?(loss|perplexity|ppl|bpb|accuracy|acc)\b["\']?\s*[:=]?\s*'
      r'([-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?|nan|inf)', re.IGNORECASE)
  _SHORT_SPLITS = {'training': 'train', 'validation': 'val', 'valid': 'val',
                   'dev': 'val', 'evaluation': 'eval'}

  def recognizes(self, text: str) -> bool:
    return bool(self._read_rows(text))

  def read(self, file, path, text):
    return _runs_of_rows(path, None, self._read_rows(text))

  def _read_rows(self, text: str) -> list[tuple[int, dict[str, float]]]:
    """Returns the step and the figures of each line that has both: steps where
    any line counts them, and else epochs.

    Args:
      text: the content of the log.

    Returns:
      (step, {figure: value}) of each of these lines, in their order. A figure
      is named SPLIT_NAME, such as 'val_loss', or NAME where no split is named.
    """
    for counter in (self._STEP, self._EPOCH):
      rows = []
      for line in text.splitlines():
        step_match = counter.search(line)
        figures = {}
        for written_split, name, number in self._FIGURE.findall(line):
          split = written_split.lower()
          split = self._SHORT_SPLITS.get(split, split)
          # Without a split, the name would begin with '_'.
          figures[f'{split}_{name.lower()}'.strip('_')] = float(number)
        if step_match is not None and figures:
          rows.append((int(step_match[1]), figures))
      if rows:
        return rows
    return []


class _NamedColumns(NamedTuple):
  """The columns of a table that are no figures, by their usual meanings; None:
  the table has none of that meaning.

  Attributes:
    entry: the name of the entry that a run belongs to.
    run: the name of the run.
    seed: its seed.
    step: the step of a row.
    split: the name of the data that a row's figures are of.
  """
  entry: str | None
  run: str | None
  seed: str | None
  step: str | None
  split: str | None


def _runs_of_table(path: str, columns: Sequence[str],
                   rows: Iterable[Mapping[str, str]]) -> list[ForeignRun]:
  """Returns the runs of a table with a row for each evaluation. A row without
  a step says what the run was given.

  Args:
    path: the path of the file below the folder of all runs.
    columns: the columns of the table.
    rows: the cells of each row by column, as texts.

  Returns:
    The runs, in the order of their first rows.
  """
  named = _NamedColumns(
      **{meaning: _find_column(columns, meaning)
         for meaning in _NamedColumns._fields})

  # Collect the rows of each run, and what the run was given, such as its
  # tokens or its code, which some columns tell in words.
  rows_by_run: dict[tuple, list] = {}
  given_to_run: dict[tuple, dict[str, str]] = {}
  for row in rows:
    run_key = (_cell(row, named.entry), _cell(row, named.run),
               _cell(row, named.seed))
    rows_of_run = rows_by_run.setdefault(run_key, [])
    given_to_this_run = given_to_run.setdefault(run_key, {})
    cells = {column: cell for column, cell in row.items()
             if column and column not in named}
    if named.step and not _cell(row, named.step):
      given_to_this_run |= _given_by_row(cells)
      continue
    step_and_figures, given = _read_row_of_step(row, cells, named)
    given_to_this_run |= given
    rows_of_run.append(step_and_figures)

  # Name each run by its entry, its name and its seed.
  runs = []
  for run_key, rows_of_run in rows_by_run.items():
    entry_name, run_name, seed_text = run_key
    seed_of_run = None
    if seed_text:
      # A program may write the seed 3 as 3.0.
      seed_of_run = int(float(seed_text))
      seed_text = f'seed-{seed_of_run}'
    run_path = _join_names(entry_name or path, run_name, seed_text)
    for log in _runs_of_rows(run_path, seed_of_run, rows_of_run):
      runs.append(dataclasses.replace(log, given=given_to_run[run_key]))
  return runs


def _given_by_row(cells: Mapping[str, str]) -> dict[str, str]:
  """Returns what a row without a step says that its run was given, by the name
  of the quantity. The cells are those of the columns that may be figures."""
  given = {}
  for column, cell in cells.items():
    quantity = quantity_of_figure(column)
    if quantity and cell:
      given[quantity] = cell
  return given


def _read_row_of_step(row: Mapping[str, str], cells: Mapping[str, str],
                      named: _NamedColumns
                      ) -> tuple[tuple[int, dict], dict[str, str]]:
  """Reads the row of an evaluation.

  Args:
    row: its cells by column.
    cells: those of the columns that may be figures.
    named: the columns that are none, by their meanings.

  Returns:
    The step and the figures, whose names begin with that of the split where
    there is one; and what the run was given, in words.
  """
  # A column is no figure if its name is a usual one of some meaning, even if
  # another column of the table has this meaning.
  no_figures: set[str] = set()
  for meaning in _NamedColumns._fields:
    no_figures.update(_COLUMN_NAMES[meaning])
  figures, given = _split_figures_and_words(cells, no_figures)
  split = _cell(row, named.split)
  if split:
    figures = {f'{split}/{name}': value for name, value in figures.items()}
  step = 0
  if named.step:
    step = int(float(row[named.step]))
  return (step, figures), given


# The first that recognizes a file reads it: the narrower formats come first.
READERS: tuple[Reader, ...] = (
    EventFile(), LmEvalSamples(), TrainerState(), JsonLines(), NanogptLog(),
    PrintedLosses(), WandbChart(), ResultsTable(), PlainCsv(), LoopLog())


def read_source(source: pathlib.Path, format_name: str = ''
                ) -> list[ForeignRun | ReportedMean]:
  """Returns the runs that a file holds, or all files of a folder.

  Args:
    source: the file or folder. Files of a folder that no reader knows are
      passed over.
    format_name: the name of the only format to read; '': any.

  Raises:
    RequestError: where there is none, or of two formats: a run that two
      programs logged would count twice.
  """
  require(source.exists(), f'there is no {source}')
  files = [source]
  if source.is_dir():
    files = sorted(file for file in source.rglob('*') if file.is_file())

  # The format and the content of each file.
  results, titles = [], {}
  for file in files:
    text = _read_text(file)
    reader = _find_reader(text)
    if reader is None or format_name not in ('', reader.name):
      continue
    titles[reader.title] = reader.name
    path = ''
    if file != source:
      path = file.relative_to(source).with_suffix('').as_posix()
    try:
      results += reader.read(file, path, text)
    except (KeyError, ValueError) as error:
      raise RequestError(f'{file} looks like {reader.title}, and cannot be '
                         f'read: {error!r}') from error
  formats = join_choices(reader.title for reader in READERS)
  require(titles, f'{source} has no runs that are known here: {formats}')
  require(len(titles) == 1, f'{source} has runs in several formats, and one '
          'that two programs logged would count twice: choose one of them with '
          f'--format, of {join_choices(titles.values())}')

  # A seed may stand in the name of a file or folder.
  runs = []
  for result in _merge_runs(results):
    if isinstance(result, ForeignRun) and result.seed is None:
      seed = find_seed(f'{source.stem}/{result.path}')
      result = dataclasses.replace(result, seed=seed)
    runs.append(result)
  return runs


def _find_reader(text: str) -> Reader | None:
  """Returns the reader that knows a text; None: there is none."""
  for reader in READERS:
    if reader.recognizes(text):
      return reader
  return None


def _read_text(file: pathlib.Path) -> str:
  """Returns the text of a file; of a binary file, such as a checkpoint, no more
  than its first bytes."""
  with file.open('rb') as opened:
    head = opened.read(_BYTES_OF_HEAD)
    if b'\0' in head:
      return head.decode('latin-1')
    return (head + opened.read()).decode('utf-8-sig', errors='replace')


def _merge_runs(results: Iterable[ForeignRun | ReportedMean]
                ) -> list[ForeignRun | ReportedMean]:
  """Merges what was read of the same run from several files, such as the
  checkpoints of a Trainer, the event files of a run that was resumed, or the
  tasks of lm-eval.

  Args:
    results: what the files hold. Runs of equal `path` are merged.

  Returns:
    The reported means, which stay as they are, and then the runs.
  """
  means: list[ForeignRun | ReportedMean] = []
  run_of_path: dict[str, ForeignRun] = {}
  for result in results:
    if isinstance(result, ReportedMean):
      means.append(result)
    elif result.path in run_of_path:
      run_of_path[result.path] = _merge_two_runs(
          run_of_path[result.path], result)
    else:
      run_of_path[result.path] = result
  return [*means, *run_of_path.values()]


def _merge_two_runs(earlier: ForeignRun, later: ForeignRun) -> ForeignRun:
  """Merges what two files hold of one run. Where both have a value, such as the
  loss at the same step, the later file's counts.

  Args:
    earlier: what the file that was read first holds.
    later: what the other file holds. Its path and its seed are kept.
  """
  curves = {}
  for name in earlier.curves | later.curves:
    # A curve is {step: value}.
    curve_of_earlier = earlier.curves.get(name, {})
    curve_of_later = later.curves.get(name, {})
    curves[name] = curve_of_earlier | curve_of_later
  return dataclasses.replace(
      later, curves=curves, given=earlier.given | later.given,
      items=earlier.items | later.items)


def _runs_of_rows(path: str, seed: int | None,
                  rows: Iterable[tuple[int, Mapping[str, float]]]
                  ) -> list[ForeignRun]:
  """Splits the rows of a log file into runs. Several runs may have written to
  one file, so a step that has been seen already begins another run.

  Args:
    path: the path of the first run. Those of the others end in #2, #3, ...
    seed: the seed of the first run; None: it is not known. That of the others
      is never known.
    rows: the step and the figures of each row, in the order of the file.

  Returns:
    The runs, one or more: without rows, one that has no curves.
  """
  # Collect the curves of each run, {name of the figure: {step: value}}. Rows
  # are added to the last run.
  curves_of_runs: list[dict[str, dict[int, float]]] = [{}]
  for step, figures in rows:
    last_run = curves_of_runs[-1]
    has_step = any(step in last_run.get(name, {}) for name in figures)
    if has_step:
      last_run = {}
      curves_of_runs.append(last_run)
    for name, value in figures.items():
      last_run.setdefault(name, {})[step] = value

  # The first run has the name of the file.
  runs = [ForeignRun(path=path, seed=seed, curves=curves_of_runs[0])]
  for number, curves in enumerate(curves_of_runs[1:], start=2):
    runs.append(ForeignRun(path=f'{path}#{number}', curves=curves))
  return runs


def quantity_of_figure(name: str) -> str:
  """Returns which quantity of certificate.QUANTITIES a figure or a column tells
  that a run was given; '' where it tells none, as a loss does."""
  last_part = name.rpartition('/')[2].lower()
  if last_part in certificate.QUANTITIES:
    return last_part
  return _QUANTITY_OF_FIGURE.get(last_part, '')


def _read_csv(text: str) -> Any:
  """Returns the rows of a CSV by column, with the cells beyond the last column
  under ''; and no column where it has none."""
  table = csv.DictReader(io.StringIO(text), restkey='')
  if table.fieldnames is None:
    table.fieldnames = []
  return table


def _find_column(columns: Sequence[str], meaning: str) -> str | None:
  """Returns the column of a CSV that holds the step, the seed, or the like, a
  key of _COLUMN_NAMES; None: there is none."""
  by_lower_case = {column.lower(): column for column in columns}
  for name in _COLUMN_NAMES[meaning]:
    if name in by_lower_case:
      return by_lower_case[name]
  return None


def _cell(row: Mapping[str, str], column: str | None) -> str:
  """Returns the cell of a row in a column; '' where it is empty or the table
  has no such column."""
  if column is None:
    return ''
  return row.get(column) or ''


def find_seed(path: str) -> int | None:
  """Returns the seed in a path such as base/seed-3 or base_seed3; None: it has
  none."""
  match = _SEED.search(path.lower())
  return int(match[1]) if match else None


def is_of_entry(path: str, entry: str) -> bool:
  """Returns whether a run with this path is one of an entry: entry, entry/run,
  entry-seed3, entry_2, or the second run of a log, entry#2."""
  below = (f'{entry}/', f'{entry}#')
  pattern = re.escape(entry) + _NUMBER_OF_RUN + '([/#].*)?'
  return (path == entry or path.startswith(below)
          or re.fullmatch(pattern, path, re.IGNORECASE) is not None)


def without_seed(path: str) -> str:
  """Returns a path without the seed in it: that of all runs of an entry."""
  match = _SEED.search(path.lower())
  if match is None:
    return path
  return (path[:match.start()] + path[match.end():]).strip('-_/ .')


def _join_names(*names: str) -> str:
  """Returns a path of the names that are not empty."""
  return '/'.join(name for name in names if name)


def _parse_number(cell: str | None) -> float | None:
  """Returns the number in a cell; None: it holds none."""
  try:
    return float(cell or '')
  except ValueError:
    return None
