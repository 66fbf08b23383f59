"""The writers of a run's figures: metrics.jsonl always, TensorBoard, Weights &
Biases and trackio as asked.

A writer has write(step, split, figures), flush(), called before a checkpoint
is saved, and close(); `split` is train, eval or another set, `figures` maps
names to numbers, lists of numbers or None. After a resume metrics.jsonl and
TensorBoard hold no step twice; a tracker keeps what was logged before.
"""

from collections.abc import Callable, Mapping
import importlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import secrets
import socket
import time
from typing import Any

from etils import epath
import ml_collections
import numpy as np

from common.errors import RequestError, require
from training.workdir import storage

METRICS_FILE = 'metrics.jsonl'
TYPE_OF_ROW_FIELD = {'step': int, 'split': str}
UPLOAD_SECONDS = 60
TRACKERS = ('wandb', 'trackio')  # packages, and fields of config.log
# The figures whose best value is known, by the last part of a name,
# TASK/FIGURE: the least one, or the largest one.
FIGURES_BEST_WHEN_LEAST = ('loss', 'perplexity', 'bits_per_byte',
                           'word_perplexity',
                           'byte_perplexity')
FIGURES_BEST_WHEN_LARGEST = ('accuracy', 'f1', 'macro_f1', 'micro_f1', 'mcc',
                             'matthews',
                             'precision', 'recall', 'pearson', 'spearman',
                             'exact', 'exact_match',
                             'em', 'acc', 'acc_norm', 'bleu')
FIGURES_BETWEEN_0_AND_1 = ('accuracy', 'rows_right', 'acc',
                           'acc_norm')  # between 0 and 1
_FILE_NUMBERS = itertools.count()  # numbers TensorBoard's files of this process


class JsonlWriter:
  """Writes metrics.jsonl, one JSON object a line: step, split, and the figures.

  `loss` is in nats per token. What is unknown or not finite is null, since
  JSON has no word for it.
  """

  def __init__(self, workdir: epath.Path, resumed_step: int):
    path = pathlib.Path(workdir) / METRICS_FILE
    self._there = _drop_rows_after(path, resumed_step)
    self._file = storage.GrowingFile(path)

  def has_kept(self, step: int, split: str) -> bool:
    """Whether the row of a step and split was in the file when the run was
    resumed at that step."""
    return (step, split) in self._there

  def write(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
    if self.has_kept(step, split):
      return  # evaluated again, to know whether it is the best
    row = as_json_value({'step': int(step), 'split': split, **figures})
    line = json.dumps(row, allow_nan=False) + '\n'
    # One call a line: what is read while the run goes on is whole.
    self._file.write(line.encode())

  def flush(self) -> None:
    """Does nothing: every line is on disk."""

  def close(self) -> None:
    self._file.close()


class TensorboardWriter:
  """Writes single numbers as split/name for TensorBoard, under
  WORKDIR/tensorboard."""

  def __init__(self, workdir: epath.Path, resumed_step: int):
    """Begins a new file of TensorBoard events. Events of later steps than
    `resumed_step` in older files will not be shown any more.

    Args:
      workdir: the folder of the run.
      resumed_step: the step from which the run is resumed.
    """
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer import record_writer
    self._event = event_pb2.Event
    self._summary = summary_pb2.Summary
    # Give the file a name that TensorBoard looks for. Its own EventFileWriter
    # is not used: it writes in a thread, which prints errors and raises them.
    name = (f'events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.'
            f'{os.getpid()}.{next(_FILE_NUMBERS)}')
    path = pathlib.Path(workdir) / 'tensorboard' / name
    self._file = record_writer.RecordWriter(storage.GrowingFile(path))
    self._add_event(file_version='brain.Event:2')
    # By this event, TensorBoard discards what older files have of these steps.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add_event(step=resumed_step + 1, session_log=start)

  def _add_event(self, **fields) -> None:
    """Appends an event with these fields to the file."""
    event = self._event(wall_time=time.time(), **fields)
    self._file.write(event.SerializeToString())

  def write(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
    values = []
    for name, value in scalar_figures(figures).items():
      values.append(self._summary.Value(
          tag=f'{split}/{name}', simple_value=value))
    self._add_event(step=step, summary=self._summary(value=values))

  def flush(self) -> None:
    """Does nothing: every event is on disk."""

  def close(self) -> None:
    self._file.close()


class TrackerWriter:
  """Writes single numbers as split/name to a tracker, `wandb` or `trackio`,
  whose id of the run the workdir remembers."""

  def __init__(self, module: str, workdir: epath.Path,
               config: Mapping[str, Any], local: epath.Path | None = None):
    """Starts a run at a tracker of experiments, or resumes it there.

    Args:
      module: the tracker's package, wandb or trackio.
      workdir: the folder of the run.
      config: the whole config, as a dict.
      local: a folder on disk for the tracker's own files; default: workdir.
    """
    # Keep a random id of the run in its folder, by which a resumed run is
    # found.
    tracker = importlib.import_module(module)
    workdir = storage.checked_path(workdir)
    id_file = workdir / f'{module}_id'
    name = workdir.absolute().name
    if not id_file.exists():
      storage.write_file(id_file, secrets.token_hex(4))
    run_id = id_file.read_text().strip()

    # wandb finds a run by its id. trackio finds it by its name, so the id
    # becomes a part of the name: two folders may have the same name.
    self._logs_step = module == 'wandb'
    if self._logs_step:
      run_arguments = dict(id=run_id, name=name, dir=str(local or workdir))
    else:
      run_arguments = dict(name=f'{name}-{run_id}')
    self._run = tracker.init(
        project=config['log'][f'{module}_project'], config=dict(config),
        resume='allow', **run_arguments)
    if self._logs_step:
      # Plot all figures over our own step: wandb's step can only grow, and a
      # run that is resumed goes back to an earlier step.
      self._run.define_metric('step')
      self._run.define_metric('*', step_metric='step')

  def write(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
    row = {f'{split}/{name}': x for name, x in scalar_figures(figures).items()}
    if self._logs_step:
      self._run.log({'step': step} | row)
    else:
      self._run.log(row, step=step)

  def flush(self) -> None:
    """Does nothing: a tracker sends what it has by itself."""

  def close(self) -> None:
    self._run.finish()


class UploadWriter:
  """Copies what the writers before it have written into the bucket: once a
  minute, and before a checkpoint is saved, so that none lacks its figures."""

  def __init__(self, uploads: storage.BucketUploads,
               clock: Callable[[], float] = time.monotonic):
    self._uploads = uploads
    self._clock = clock
    self._last = clock()

  def write(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
    if self._clock() - self._last >= UPLOAD_SECONDS:
      self.flush()

  def flush(self) -> None:
    self._uploads.push()
    self._last = self._clock()

  def close(self) -> None:
    self.flush()


def check_writers(log: ml_collections.ConfigDict) -> None:
  """Raises RequestError where config.log asks for a tracker, or TensorBoard,
  whose package is not installed."""
  for name in ('tensorboard', *TRACKERS):
    if log[name] and importlib.util.find_spec(name) is None:
      raise RequestError(
          f'log.{name} is True, but the package {name} is not installed: run '
          f"pip install -e '.[{name}]', or set log.{name}=False")


def open_writers(workdir: epath.Path, config: Mapping[str, Any],
                 resumed_step: int = 0, primary: bool = True) -> list:
  """Opens everything that a run's figures are written to: metrics.jsonl, and
  TensorBoard and online trackers if the config asks for them.

  Args:
    workdir: the folder of the run.
    config: the whole config, as a dict.
    resumed_step: the step from which the run is resumed; what was written of
      later steps is dropped.
    primary: whether this is process 0, the only one that writes.

  Returns:
    The writers, to be called in this order; [] for another process.
  """
  if not primary:
    return []
  # Files are written to a local disk. If the folder of the run is in a bucket,
  # they are copied there from time to time.
  uploads = storage.BucketUploads(storage.checked_path(workdir))
  uploads.fetch(METRICS_FILE)
  writers: list[Any] = [JsonlWriter(uploads.local, resumed_step)]
  if config['log']['tensorboard']:
    writers.append(TensorboardWriter(uploads.local, resumed_step))
  for module_name in TRACKERS:
    if config['log'][module_name]:
      writers.append(TrackerWriter(module_name, workdir=workdir, config=config,
                                   local=uploads.local))
  # This one must be last: it copies what the others have written.
  if storage.is_in_bucket(workdir):
    writers.append(UploadWriter(uploads))
  return writers


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
  """Reads the rows of a metrics.jsonl. An incomplete last line is left out: it
  may just be being written, or a killed process may have left it.

  Args:
    path: the path of the file.

  Returns:
    The rows, dicts with at least a step and a split ('train' or 'eval').

  Raises:
    RequestError: for any other line that is damaged, and for steps that do not
      rise within a split.
  """
  # Parse all lines but the last, which must be complete, and then the last.
  lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
  rows = []
  for number, line in enumerate(lines[:-1], 1):
    subject = f'{path}, line {number},'
    rows.append(storage.parse_json_object(line, subject=subject,
                                          fields=TYPE_OF_ROW_FIELD))
  if lines:
    last_row = _parse_whole_row(lines[-1])
    if last_row:
      rows.append(last_row)

  # Check that the steps of each split rise.
  last_step_of_split: dict[str, int] = {}
  for number, row in enumerate(rows, 1):
    split = row['split']
    last_step = last_step_of_split.get(split, -1)
    require(row['step'] > last_step, f'{path}, line {number}, is damaged: its '
            f'step is {row["step"]}, and {split} was at {last_step} before')
    last_step_of_split[split] = row['step']
  return rows


def as_json_value(value: Any) -> Any:
  """Converts a figure to what JSON can hold. A number that is not finite
  becomes None, as JSON has no such numbers.

  Args:
    value: a number, an array, or lists and dicts of these.
  """
  if value is None or isinstance(value, str | bool | int):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, list | tuple):
    return [as_json_value(x) for x in value]
  if isinstance(value, Mapping):
    return {name: as_json_value(x) for name, x in value.items()}
  return as_json_value(np.asarray(value).tolist())


def scalar_figures(figures: Mapping[str, Any]) -> dict[str, float]:
  """Returns the figures that are single numbers, for a tracker to plot. A list
  becomes the numbers name/0, name/1, and so on. Matrices are left out.

  Args:
    figures: the figures by name: numbers, arrays, or lists of them.
  """
  scalars = {}
  for name, value in as_json_value(figures).items():
    if isinstance(value, bool | int | float):
      scalars[name] = float(value)
    elif isinstance(value, list):
      is_matrix = bool(value) and isinstance(value[0], list)
      if not is_matrix:
        entries = {f'{name}/{i}': x for i, x in enumerate(value)}
        scalars.update(scalar_figures(entries))
  return scalars


def _drop_rows_after(path: pathlib.Path, step: int) -> set[tuple[int, str]]:
  """Drops the rows of later steps from a metrics.jsonl, since a run that is
  resumed will write them again. An incomplete line is dropped too. The new file
  replaces the old one in one move, so that neither is lost in a crash.

  Args:
    path: the file, which need not exist.
    step: the step from which the run is resumed.

  Returns:
    (step, split) for each row of exactly this step, which must not be written
    again.
  """
  if not path.exists():
    return set()

  # A step has up to two rows: one of training and one of an evaluation.
  lines = path.read_bytes().splitlines(keepends=True)
  kept_lines = []
  rows_of_step = set()
  for line in lines:
    row = _parse_whole_row(line)
    if not row or row['step'] > step:
      continue
    kept_lines.append(line)
    if row['step'] == step:
      rows_of_step.add((step, row['split']))
  if kept_lines != lines:
    storage.write_file(path, b''.join(kept_lines).decode())
  return rows_of_step


def _parse_whole_row(line: bytes) -> dict[str, Any] | None:
  """Returns the row that a line of metrics.jsonl holds; None for a line that is
  not whole."""
  if not line.endswith(b'\n'):
    return None
  try:
    return storage.parse_json_object(line, subject='', fields=TYPE_OF_ROW_FIELD)
  except RequestError:
    return None
