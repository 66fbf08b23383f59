"""Where a run's figures go: metrics.jsonl always, TensorBoard and W&B as asked.

A writer has write(step, split, figures), flush(), called before a checkpoint
is saved, and close(); `split` is train, eval or another set, `figures` maps
names to numbers, lists of numbers or None. After a resume no writer holds a
step twice.
"""

from collections.abc import Callable, Mapping
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

from configs.errors import RequestError
from training.workdir import schema, storage


class JsonlWriter:
  """One JSON object a line: step, split, and the figures.

  `loss` is in nats per token. What is unknown or not finite is null, since
  JSON has no word for it.
  """

  def __init__(self, workdir: epath.Path, resumed_step: int):
    path = pathlib.Path(workdir) / METRICS
    self._there = _drop_after(path, resumed_step)
    self._file = storage.File(path)

  def has_kept(self, step: int, split: str) -> bool:
    """Whether the row stood there when the run was resumed at `step`."""
    return (step, split) in self._there

  def write(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
    row = {'step': int(step), 'split': split}
    if self.has_kept(*row.values()):
      return  # evaluated again, to know whether it is the best
    row.update((name, plain(value)) for name, value in figures.items())
    # One call a line: what is read while the run goes on is whole.
    self._file.write((json.dumps(row, allow_nan=False) + '\n').encode())

  def flush(self) -> None:
    """Nothing: every line is on disk."""

  def close(self) -> None:
    self._file.close()


class TensorboardWriter:
  """Scalars as split/name, and matrices (layer x expert) as heat maps, under
  WORKDIR/tensorboard."""

  def __init__(self, workdir: epath.Path, resumed_step: int):
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer import record_writer
    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    # The name that TensorBoard looks for. Its own EventFileWriter writes in a
    # thread, which prints what it also raises.
    name = (f'events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.'
            f'{os.getpid()}.{next(_FILES)}')
    self._file = record_writer.RecordWriter(
        storage.File(pathlib.Path(workdir) / 'tensorboard' / name))
    self._add(file_version='brain.Event:2')
    # TensorBoard forgets what an earlier file has from here on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(step=resumed_step + 1, session_log=start)

  def _add(self, **fields) -> None:
    event = self._event(wall_time=time.time(), **fields)
    self._file.write(event.SerializeToString())

  def write(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
    values = [self._summary.Value(tag=f'{split}/{name}', simple_value=value)
              for name, value in scalars(figures).items()]
    values += [self._summary.Value(tag=f'{split}/{name}', image=_heat_map(
        value, self._summary.Image))
               for name, value in figures.items() if _is_matrix(value)]
    self._add(step=step, summary=self._summary(value=values))

  def flush(self) -> None:
    """Nothing: every event is on disk."""

  def close(self) -> None:
    self._file.close()


class WandbWriter:
  """Scalars as split/name, in the W&B run whose id the workdir remembers."""

  def __init__(self, workdir: epath.Path, config: Mapping[str, Any],
               local: epath.Path | None = None):
    import wandb
    workdir = storage.path(workdir)
    path = workdir / 'wandb_id'
    if not path.exists():
      storage.write(path, secrets.token_hex(4))
    self._run = wandb.init(
        project=config['log']['wandb_project'], id=path.read_text().strip(),
        name=workdir.absolute().name, dir=str(local or workdir),
        config=dict(config), resume='allow')
    # Our own step is the axis: W&B's only grows, and a resume goes back.
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def write(self, step: int, split: str, figures: Mapping[str, Any]) -> None:
    row = {f'{split}/{name}': x for name, x in scalars(figures).items()}
    self._run.log({'step': step, **row})

  def flush(self) -> None:
    """Nothing: W&B sends what it has by itself."""

  def close(self) -> None:
    self._run.finish()


class UploadWriter:
  """Copies what the writers before it have written into the bucket: once a
  minute, and before a checkpoint is saved, so that none lacks its figures."""

  def __init__(self, uploads: storage.Uploads,
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


METRICS = 'metrics.jsonl'
ROW = {'step': int, 'split': str}
# What tools calculate with. A row of eval.tasks alone has no loss.
FIGURES = {'loss', 'step_seconds', 'runs_at_once'}
_FILES = itertools.count()  # of TensorBoard, by this process
UPLOAD_SECONDS = 60
EXTRAS = ('tensorboard', 'wandb')


def check_writers(log: ml_collections.ConfigDict) -> None:
  """Raises ValueError where config.log asks for an extra that is missing."""
  for name in EXTRAS:
    if log[name] and importlib.util.find_spec(name) is None:
      raise RequestError(
          f'log.{name} is True, but the package {name} is not installed: run '
          f"pip install -e '.[{name}]', or set log.{name}=False")


def writers(workdir: epath.Path, config: Mapping[str, Any],
            resumed_step: int = 0, primary: bool = True) -> list:
  """Returns the writers that config.log asks for.

  Args:
    workdir: the run's folder.
    config: the whole config, as a dict.
    resumed_step: the step that the run goes on from; later lines are dropped.
    primary: whether this is process 0; the others write nothing.
  """
  log = config['log']
  check_writers(log)
  if not primary:
    return []
  uploads = storage.Uploads(storage.path(workdir))
  uploads.fetch(METRICS)
  result = [JsonlWriter(uploads.local, resumed_step)]
  if log['tensorboard']:
    result.append(TensorboardWriter(uploads.local, resumed_step))
  if log['wandb']:
    result.append(WandbWriter(workdir, config, uploads.local))
  if storage.in_bucket(workdir):
    result.append(UploadWriter(uploads))
  return result


def read(path: epath.Path) -> list[dict[str, Any]]:
  """Returns the rows of a metrics.jsonl, less a last line that a kill cut
  short, or that is being written.

  Raises:
    RequestError: for a line that is no row.
  """
  lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
  if lines and (not lines[-1].endswith(b'\n') or _parse(lines[-1]) is None):
    lines.pop()
  rows = []
  for number, line in enumerate(lines, 1):
    who = f'{path}, line {number},'
    row = schema.parse(line, who)
    schema.check_shape(row, ROW, who)
    for name in FIGURES & row.keys():
      schema.check_shape(row[name], schema.MAYBE, f'{who} {name}')
    rows.append(row)
  return rows


def plain(value: Any) -> Any:
  """Returns a figure as JSON has it: what is not finite is None."""
  if value is None or isinstance(value, str | bool | int):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, list | tuple):
    return [plain(x) for x in value]
  if isinstance(value, Mapping):
    return {name: plain(x) for name, x in value.items()}
  return plain(np.asarray(value).tolist())


def scalars(figures: Mapping[str, Any]) -> dict[str, float]:
  """Returns the numbers among the figures; lists as name/0, name/1, ...;
  matrices are left out: they are drawn (TensorBoard) or in metrics.jsonl."""
  result = {}
  for name, value in figures.items():
    value = plain(value)
    if _is_matrix(value):
      continue
    if isinstance(value, list):
      result.update(scalars({f'{name}/{i}': x for i, x in enumerate(value)}))
    elif isinstance(value, bool | int | float):
      result[name] = float(value)
  return result


def _is_matrix(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and isinstance(value[0], list)


def _heat_map(rows: list[list[float]], image_proto: Any):
  """Draws a matrix: black 0, white twice the mean of its row, or more."""
  import io
  from PIL import Image
  x = np.asarray(rows, np.float32)
  x = x / np.maximum(x.mean(1, keepdims=True), 1e-9) / 2
  pixels = (255 * np.clip(x, 0, 1)).astype(np.uint8)
  cell = max(1, 256 // max(pixels.shape))
  pixels = np.kron(pixels, np.ones((cell, cell), np.uint8))
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG')
  return image_proto(height=pixels.shape[0], width=pixels.shape[1],
                     colorspace=1, encoded_image_string=file.getvalue())


def _drop_after(path: pathlib.Path, step: int) -> set[tuple[int, str]]:
  """Drops the lines past `step`, and one cut short, in one atomic move; returns
  (step, split) of those of `step`."""
  if not path.exists():
    return set()
  lines = path.read_bytes().splitlines(keepends=True)
  rows = [_parse(line) if line.endswith(b'\n') else None for line in lines]
  kept = [line for line, row in zip(lines, rows)
          if row is not None and row['step'] <= step]
  there = {(step, row.get('split')) for row in rows
           if row is not None and row['step'] == step}
  if kept == lines:
    return there
  new = path.with_suffix('.jsonl.new')
  with storage.writing(path):
    with new.open('wb') as file:
      file.writelines(kept)
      file.flush()
      os.fsync(file.fileno())
    os.replace(new, path)
  return there


def _parse(line: bytes) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):  # cut short, or damaged
    return None
  return row if isinstance(row, dict) and type(
      row.get('step')) is int else None
