"""Checkpoints: written while training goes on, checked when read back.

WORKDIR/checkpoints/STEP/ holds two Orbax items: `state`, the arrays under
their paths, sharded; and `record`, a JSON object with the data position, the
config, the versions, and the shape, dtype and checksum of every array.

Orbax alone restores a flipped byte in silence, casts to another dtype in
silence, takes the mesh of the file where none is given, and lists a damaged
step as the latest. So: shapes and dtypes are compared with the record before
anything is read, shardings are always given, the checksum of every array is
compared after, and a step that fails is named and passed over for the one
before it.

Orbax (the v0 API: v1 is experimental, and drops a save while one is under
way) is imported where a run first needs it.
"""

from collections.abc import Callable, Sequence
import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import logging as std_logging
import math
import os
import platform
import re
import time
from typing import Any, NamedTuple

from absl import logging
from etils import epath
from flax import traverse_util
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import ml_collections
import numpy as np

from architectures.parts import paths
from common.errors import EnvironmentFailure, RequestError, require
from training.workdir import storage

BEST_STEP_NAME = 'best'  # The name of the step whose evaluation was the best.


class MeanOfSteps(NamedTuple):
  """Several steps, for the mean of their parameters.

  Attributes:
    steps: the steps, in any order; or (), and then
    last: the number of the newest steps to take.
  """
  steps: tuple[int, ...] = ()
  last: int = 0


def parse_step(text: str | None, name: str = '--step'
               ) -> int | str | MeanOfSteps | None:
  """Parses a text that says which checkpoint to load, such as the value of the
  flag --step.

  Args:
    text: the text as the user writes it; None: the flag was not given.
    name: the name of the flag, for messages.

  Returns:
    The number of a step; BEST_STEP_NAME for the step of the best evaluation; a
    MeanOfSteps, from `100,200` or `last:2`, for the mean of the parameters of
    several checkpoints; or None for the newest.

  Raises:
    RequestError: for a text that is none of these.
  """
  if text is None or text == BEST_STEP_NAME:
    return text
  # All other texts are a number, or several different ones with commas between.
  # 18 digits at most, as no run has so many steps.
  steps = text.removeprefix('last:').split(',')
  all_numbers = all(re.fullmatch('0|[1-9][0-9]{0,17}', step) for step in steps)
  if not all_numbers or len(set(steps)) < len(steps):
    raise RequestError(
        f'{name} is {text!r}: write the number of a step, or {BEST_STEP_NAME} '
        'for the best of a run with eval.best; or, for the mean of several, '
        'the numbers of different steps with commas between, or last:5 for the '
        'last 5 checkpoints')
  numbers = tuple(int(step) for step in steps)
  if text.startswith('last:'):
    return MeanOfSteps(last=numbers[0])
  if len(numbers) > 1:
    return MeanOfSteps(steps=numbers)
  return numbers[0]


class RestoredCheckpoint(NamedTuple):
  """A checkpoint, read and checked.

  Attributes:
    step: the number of updates that the state has had.
    state: the pytree that was asked for.
    record: the JSON object beside it: next_batch, tokens, config,
      environment, arrays.
    damaged: a sentence for each later step that was passed over.
    which_parameters: which parameters of it these are, where there is a choice
      (training/parameters.py).
  """
  step: int
  state: Any
  record: dict[str, Any]
  damaged: tuple[str, ...]
  which_parameters: str = ''


class CheckpointMismatch(RequestError):
  """The checkpoint is sound, and of another model or optimizer."""


class _DamagedCheckpoint(Exception):
  """A checkpoint cannot be read, or is not as it was saved; the message says
  why."""


def steps_to_keep(steps: Sequence[int], is_good: Callable[[int], bool],
                  best: int | None, *, keep: int, keep_every: int) -> set[int]:
  """Chooses which checkpoints of a run are kept; all others are deleted. While
  the loss is not finite, bad checkpoints must not replace the last good ones.

  Args:
    steps: the steps of the checkpoints that exist, ascending.
    is_good: returns whether the loss and the gradients of a step were finite.
    best: the step of the best evaluation, which is kept; None: there is none.
    keep: how many of the newest good checkpoints are kept. The newest of all is
      kept too, good or bad, since the run resumes from it.
    keep_every: the steps that are multiples of this number are kept; 0: none.

  Returns:
    The steps of the checkpoints that are kept.
  """
  # Find the newest good checkpoints.
  newest_good: list[int] = []
  for step in sorted(steps, reverse=True):
    if len(newest_good) == keep:
      break  # is_good reads a file, so do not ask it about older steps
    if is_good(step):
      newest_good.append(step)

  # Add the newest of all, the multiples of keep_every, and the best.
  kept_steps = set(newest_good)
  if steps:
    kept_steps.add(max(steps))
  for step in steps:
    is_multiple = keep_every > 0 and step % keep_every == 0
    if is_multiple or step == best:
      kept_steps.add(step)
  return kept_steps


class Checkpoints:
  """Saves the state of a run when it is due, and finds it again.

  Args:
    workdir: the folder of the run; gs:// paths work as well.
    every_steps: a save is due at each multiple of it; 0: not by step.
    every_minutes: a save is also due once so much time has passed since the
      last one; 0: not by time.
    keep: the number of the newest good ones that are kept; at least 1. One that
      was saved in a stretch of bad steps is kept beside them, while it is the
      newest of all.
    keep_every: a step that is a multiple of it is kept for good; 0: none.
    agree_every: with several processes, time is looked at only at multiples
      of so many steps, since process 0 has to tell the others.
    clock: a function that returns seconds; tests pass their own.

  Attributes:
    directory: the folder of the checkpoints.
    newest: the step on disk that equals the live state, saved or restored last;
      None: there is none.
    best: the record of the best evaluation in the newest checkpoint.
  """

  def __init__(self, workdir: epath.Path, *, every_steps: int,
               every_minutes: float, keep: int, keep_every: int,
               agree_every: int = 1,
               clock: Callable[[], float] = time.monotonic):
    """Prepares the saving of a run's checkpoints. No checkpoint is read or
    written yet.

    Args:
      workdir: the folder of the run, on disk or gs://BUCKET/NAME.
      every_steps: save at each multiple of this number; 0: not by step.
      every_minutes: save this long after the last time; 0: not by time.
      keep: how many of the newest good checkpoints are kept.
      keep_every: the checkpoints of steps that are multiples of this number are
        never deleted; 0: none.
      agree_every: with several processes, the time is checked only at multiples
        of this number of steps, since process 0 has to tell the others.
      clock: a function that returns seconds; tests pass their own.
    """
    # The settings: when to save, and what to keep.
    self._keep = keep
    self._keep_every = keep_every
    self._every_steps = every_steps
    self._every_seconds = 60 * every_minutes
    self._agree_every = agree_every
    self._clock = clock
    self._last_time = clock()
    # The newest and the best checkpoint in the folder are not known yet.
    self.newest: int | None = None
    self.best: dict[str, Any] | None = None
    self.directory = checkpoint_folder(workdir)
    self._good: dict[int, bool] = {}  # by step: whether it is of no bad step
    # Orbax's manager writes and deletes checkpoints.
    for logger in (logging.get_absl_logger(), std_logging.getLogger('asyncio')):
      logger.addFilter(_is_worth_logging)
    with storage.explain_write_failures(self.directory):
      self._manager = self._new_manager()
    # Orbax asks at each save whether the machine is about to be taken away.
    # Answer no: processes agree on that by distributed.signals. After a yes,
    # Orbax only logs how much time the save rescues, and it fails at that in a
    # resumed run, because it has not read the times of older checkpoints.
    self._manager.reached_preemption = lambda step: False

  def _new_manager(self) -> Any:
    """Makes Orbax's manager of the checkpoints in `directory`. A checkpoint has
    two items: `state`, the arrays, and `record`, a JSON object that describes
    them.
    """
    import orbax.checkpoint as ocp

    # Arrays of less than 1 MiB are written by one replica. To split them over
    # all replicas takes longer than writing them.
    array_handler = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=1 << 20)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, array_handler))
    # Weights do not compress: zstd gains 8 % and costs a core.
    state_handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, type_handler_registry=registry)

    # Make folders synchronously: if that fails, threads that wait for a folder
    # would keep the process alive for some 20 minutes.
    async_options = ocp.options.AsyncOptions(
        create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=self,
        cleanup_tmp_directories=True,  # what a killed save has left
        async_options=async_options,
        lightweight_initialize=True)  # trust no file before it is checked
    return ocp.CheckpointManager(
        self.directory,
        options=options,
        item_handlers=dict(
            state=state_handler, record=ocp.JsonCheckpointHandler()))

  def is_due(self, step: int) -> bool:
    """Whether the state after `step` is to be saved, by the number of the step
    or by the time since the last save. Every process gets the same answer."""
    if self._every_steps and step % self._every_steps == 0:
      return True
    if not self._every_seconds:
      return False
    if jax.process_count() > 1 and step % self._agree_every:
      return False
    has_passed = self._clock() - self._last_time >= self._every_seconds
    return bool(broadcast_from_process_0(np.int32(has_passed)))

  def should_preserve(self, checkpoints: Sequence, *, context: Any
                      ) -> list[bool]:
    """Decides which checkpoints are kept. Orbax calls this after each save, and
    deletes the others.

    Args:
      checkpoints: the checkpoints in the folder, each with its `step`.
      context: an argument of Orbax, which is not needed.

    Returns:
      Whether to keep each of the checkpoints.
    """
    del context
    best_step = None
    if self.best:
      best_step = self.best['step']
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept_steps = steps_to_keep(
        steps, is_good=self._is_good, best=best_step, keep=self._keep,
        keep_every=self._keep_every)
    return [step in kept_steps for step in steps]

  def _is_good(self, step: int) -> bool:
    """Whether the loss and the gradients were finite at the step of a
    checkpoint; False for a damaged one."""
    if step not in self._good:
      try:
        self._good[step] = _read_record(self.directory / str(step))['good']
      except _DamagedCheckpoint:
        self._good[step] = False
    return self._good[step]

  def save(self, step: int, state: Any, *, next_batch: int, tokens: int,
           config: ml_collections.ConfigDict, good: bool = True,
           best: dict[str, Any] | None = None) -> bool:
    """Starts to save; returns once `state` may be donated to the next step.

    Waits for the save before it, whose failure is raised here.

    Args:
      step: the number of updates that `state` has had.
      state: a pytree of jax arrays, each with its sharding.
      next_batch: the index of the first global batch not yet trained on.
      tokens: the number of tokens trained on.
      config: the run's ConfigDict.
      good: whether the step was good: its loss, its gradients and what they
        made of the parameters were finite.
      best: the run's best evaluation so far (BestEvaluation.record), whose step
        is kept whatever `keep` says; None: the run has none.

    Returns:
      False if this very state is on disk already, else True.
    """
    import orbax.checkpoint as ocp

    if step == self.newest:
      return False

    # The record, with what each array is to be checked by.
    leaves = paths.flatten_by_path(state)
    sums = compute_checksums(state)
    arrays = {}
    for name, x in leaves.items():
      arrays[name] = dict(shape=list(x.shape), dtype=str(x.dtype),
                          checksum=sums[name])
    record = dict(
        step=step, next_batch=next_batch, tokens=tokens, good=good, best=best,
        config=config.to_dict(), environment=describe_environment(),
        arrays=arrays)

    # The save, after the one before it.
    self.wait()
    self._good[step] = good
    self.best = best
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(nest_by_path(leaves)),
        record=ocp.args.JsonSave(add_digest(record)))
    checkpoint = f'checkpoint {step} in {self.directory}'
    with storage.explain_write_failures(checkpoint):
      self._manager.save(step, force=True, args=items)
    self.newest, self._last_time = step, self._clock()
    return True

  def go_on_from(self, restored: RestoredCheckpoint) -> None:
    """Makes a restored checkpoint the newest one of the run, which resumes from
    there.

    Later checkpoints may exist: they are damaged, or the user has chosen an
    earlier one. As the run is going to write these steps again, they are
    renamed to STEP.aside-TIME. They are never deleted; the user may do that.

    Args:
      restored: the checkpoint, as `restore_checkpoint` returned it.
    """
    # Saves that are due after some minutes are counted from now on.
    self.newest, self._last_time = restored.step, self._clock()
    self.best = restored.record['best']

    # Process 0 renames the later checkpoints.
    steps = list_steps(self.directory)
    later_steps = [step for step in steps if step > restored.step]
    if not later_steps:
      return
    if jax.process_index() == 0:
      for step in later_steps:
        target = self.directory / f'{step}.aside-{time.time_ns()}'
        logging.warning('checkpoint %d is set aside as %s', step, target)
        (self.directory / str(step)).rename(target)
    broadcast_from_process_0(np.int32(0))  # the others wait until it is done
    # Orbax keeps a list of steps, which must be read again after the renaming.
    self._manager.reload()

  def wait(self):
    """Returns once all saves are on disk."""
    checkpoint = f'checkpoint {self.newest} in {self.directory}'
    with storage.explain_write_failures(checkpoint):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self):
    """Closes Orbax's manager once all saves are on disk."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    """Waits for the last save, where it may be waited for."""
    # After an error, a save on its way is finished; but not with several
    # processes, since the others may never come to its barriers.
    if error is None:
      self.close()
    elif jax.process_count() == 1:
      # Its own failure would hide the first one, and may be the same.
      with contextlib.suppress(EnvironmentFailure):
        self.close()


def _is_worth_logging(record: std_logging.LogRecord) -> bool:
  """Whether a log record is to be printed: not the traceback with which each of
  Orbax's threads logs a failure of the environment, such as a full disk, nor
  that of a write which nobody waits for after another one failed, which asyncio
  logs when its task is thrown away. The failure is raised too, and
  storage.explain_write_failures makes one sentence of it."""
  is_of_a_save = 'orbax' in record.pathname or record.name == 'asyncio'
  if not record.exc_info or not is_of_a_save:
    return True
  return not storage.environment_reason(record.exc_info[1])


def describe_environment() -> dict[str, Any]:
  """Returns what a run that is resumed bit for bit depends on beside its
  config: the versions of packages, and the devices."""
  environment: dict[str, Any] = dict(python=platform.python_version())
  for name in ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint'):
    environment[name] = importlib.metadata.version(name)
  environment['devices'] = jax.device_count()
  environment['processes'] = jax.process_count()
  environment['device_kind'] = jax.devices()[0].device_kind
  return environment


def list_environment_changes(record: dict[str, Any]) -> list[str]:
  """Compares the versions of packages and the devices with those with which a
  checkpoint was written, and returns a line for each difference.

  A run that is resumed with a difference has the same batches, but its losses
  are only equal to about 1e-5, not bit for bit.

  Args:
    record: the record of the checkpoint, a JSON object that was saved with its
      arrays.
  """
  old_environment = record['environment']
  lines = []
  for name, value in describe_environment().items():
    old_value = old_environment.get(name)
    if old_value != value:
      lines.append(f'{name}: {old_value} -> {value}')
  return lines


def checkpoint_folder(workdir: epath.Path):
  """Returns the folder of a run's checkpoints, as an absolute path."""
  path = storage.checked_path(workdir)
  # Orbax demands an absolute path. That of a bucket is one, and epath would
  # prepend the current folder to it.
  if not storage.is_in_bucket(path):
    path = path.absolute()
  return path / storage.CHECKPOINTS_FOLDER


# Process 0 tells the others about so many of the newest steps.
_MOST_STEPS_LISTED = 4096


def list_steps(folder: epath.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder, ascending. Every
  process of the run must call it, as all are told what process 0 sees. Only the
  newest _MOST_STEPS_LISTED are returned.

  Args:
    folder: the folder of the checkpoints, which need not exist.
  """
  import orbax.checkpoint as ocp
  # A broadcast needs an array of a fixed size; -1 stands for no step.
  steps = np.full(_MOST_STEPS_LISTED, -1, np.int32)
  if jax.process_index() == 0 and folder.is_dir():
    # A run counts its steps in int32, so a folder with a higher number is none
    # of its checkpoints.
    largest = np.iinfo(np.int32).max
    steps_on_disk = [step for step in ocp.utils.checkpoint_steps(folder)
                     if step <= largest]
    newest = sorted(steps_on_disk)[-_MOST_STEPS_LISTED:]
    steps[:len(newest)] = newest

  # All processes must agree, even if a shared disk shows them different files.
  steps = broadcast_from_process_0(steps)
  return steps[steps >= 0].tolist()


def find_best_step(folder: epath.Path) -> int:
  """Returns the step of the best evaluation of a run so far. The newest
  checkpoint whose record can be read says it.

  Args:
    folder: the folder of the checkpoints.

  Raises:
    RequestError: for a run that has not recorded a best step.
  """
  record = _newest_record(folder) or {}
  best = record.get('best') or {'step': None}
  require(best['step'] is not None, f'there is no best checkpoint in {folder}: '
          'eval.best of the run names no figure, or nothing was evaluated yet')
  return best['step']


def read_array_records(folder: epath.Path, step: int | None = None
                       ) -> dict[str, dict[str, Any]]:
  """Returns what the record of a checkpoint says of its arrays, {name: {shape,
  dtype, checksum}}; {} where no record can be read.

  Args:
    folder: the folder of the checkpoints.
    step: the checkpoint; None: the newest with a record that can be read.
  """
  record = _newest_record(folder, step)
  return record['arrays'] if record else {}


def has_only_parameters(arrays: dict[str, dict[str, Any]]) -> bool:
  """Whether a checkpoint with these arrays, by name, has no optimiser's state,
  as that of imported weights has none."""
  return bool(arrays) and all(name.startswith('params/') for name in arrays)


def restore_checkpoint(folder: epath.Path, abstract: Any,
                       step: int | str | None = None,
                       *, partial: bool = False) -> RestoredCheckpoint:
  """Reads and checks the newest good checkpoint of a folder, or that of `step`.

  Args:
    folder: the folder that `checkpoint_folder(workdir)` returns.
    abstract: a pytree of ShapeDtypeStructs with shardings; or a function that
      returns it, given {name: {shape, dtype, ...}} of the arrays of a step;
      where it returns None, only the record is read.
    step: the step to read, and no other if it is damaged; None: the newest.
    partial: `abstract` may be a part of what was saved, such as
      {'params': ...} without the optimizer.

  Raises:
    RequestError: there is no such checkpoint, or it does not fit `abstract`.
    EnvironmentFailure: every checkpoint that was tried is damaged.
  """
  # The steps to try: the one that was asked for, or all, the newest first.
  available = list_steps(folder)
  require(bool(available), f'no checkpoint in {folder}')
  if step == BEST_STEP_NAME:
    step = find_best_step(folder)
  if step is None:
    steps_to_try = available[::-1]
  else:
    require(step in available, f'no checkpoint of step {step} in '
            f'{folder}: there are {", ".join(map(str, available))}')
    steps_to_try = [step]

  # The first one that is not damaged.
  damaged = []
  for tried_step in steps_to_try:
    try:
      state, record = _read_step(folder / str(tried_step), abstract=abstract,
                                 partial=partial)
    except _DamagedCheckpoint as error:
      damaged.append(f'checkpoint {tried_step} in {folder} is damaged: {error}')
      continue
    sentences = [f'{sentence}; using {tried_step} instead'
                 for sentence in damaged]
    return RestoredCheckpoint(step=tried_step, state=state, record=record,
                              damaged=tuple(sentences))

  # There is none; others may be sound where one was asked for.
  other_steps = [str(other) for other in available if other not in steps_to_try]
  advice = 'there is no other'
  if other_steps:
    advice = f'there are also {", ".join(other_steps)}'
  raise EnvironmentFailure('; '.join([*damaged, advice]))


# An error whose text has one of these words, or the text of one of these errors
# of the operating system, is no fault of the files, but of their storage or of
# this machine.
_WORDS_OF_ENVIRONMENT_ERRORS = ('DEADLINE_EXCEEDED', 'PERMISSION_DENIED',
                                'PermissionError',
                                'RESOURCE_EXHAUSTED', 'UNAUTHENTICATED',
                                'UNAVAILABLE')
_NUMBERS_OF_ENVIRONMENT_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM,
    errno.EMFILE, errno.ENFILE, errno.EBUSY, errno.EAGAIN)


def _read_step(folder: epath.Path, abstract: Any, partial: bool):
  """Reads the checkpoint of one step, and checks its arrays by their checksums.

  Args:
    folder: the folder of the step.
    abstract: the arrays to read, a tree of ShapeDtypeStructs with shardings.
    partial: whether the checkpoint may have other arrays, too.

  Returns:
    The state, a tree of arrays, and the record, a JSON object.

  Raises:
    CheckpointMismatch: the checkpoint does not fit `abstract`.
    EnvironmentFailure: this machine or the storage cannot read it now.
    _DamagedCheckpoint: it cannot be read, on this process or another, or is not
      as it was saved.
  """
  # Read the record, and then the arrays, if their shapes are as expected.
  reason = ''
  state = None
  try:
    record = _read_record(folder)
    if callable(abstract):
      abstract = abstract(record['arrays'])
    if abstract is not None:
      _check_fits(folder, record=record,
                  expected=paths.flatten_by_path(abstract),
                  partial=partial)
      state = _read_arrays(folder, record=record, abstract=abstract)
  except (CheckpointMismatch, MemoryError):
    raise
  except Exception as error:  # Orbax and TensorStore raise many types.
    reason = _describe_first_cause(error)
    if _is_fault_of_environment(reason):
      raise EnvironmentFailure(
          f'cannot read checkpoint {folder.name} in {folder.parent}, which may '
          f'be sound: {reason}; once that is mended, run the same command again'
      ) from error

  # All processes take the step, or none does.
  if not _holds_on_all_processes(not reason):
    raise _DamagedCheckpoint(reason or 'another process cannot read it')

  # The arrays are those that were saved.
  wrong_arrays = []
  for name, checksum in compute_checksums(state).items():
    if checksum != record['arrays'][name]['checksum']:
      wrong_arrays.append(name)
  if wrong_arrays:
    names = ', '.join(wrong_arrays[:8])
    raise _DamagedCheckpoint(
        f'the checksum of {names} is not the one saved')
  return state, record


def _is_fault_of_environment(reason: str) -> bool:
  """Whether the text of an error says that the storage or this machine is at
  fault, and not the files."""
  # TensorStore's errors have the texts of the operating system's errors too.
  texts = [os.strerror(number) for number in _NUMBERS_OF_ENVIRONMENT_ERRORS]
  return any(text in reason for text in (*_WORDS_OF_ENVIRONMENT_ERRORS, *texts))


def _holds_on_all_processes(condition: bool) -> bool:
  """Whether a condition holds on every process."""
  if jax.process_count() == 1:
    return condition
  everywhere = multihost_utils.process_allgather(np.int32(condition))
  return bool(np.all(everywhere))


def _read_arrays(folder: epath.Path, record: dict[str, Any], abstract: Any
                 ) -> Any:
  """Reads arrays from the checkpoint of one step, by Orbax.

  Args:
    folder: the folder of the step.
    record: the record of the step, a JSON object that lists all of its arrays.
      Orbax compares this list with its own, which may be damaged.
    abstract: the arrays to read, a tree of ShapeDtypeStructs with shardings.
      Others may be left out.

  Returns:
    The arrays, in the tree structure of `abstract`.

  Raises:
    _DamagedCheckpoint: for an array that cannot be read.
  """
  import orbax.checkpoint as ocp

  expected = paths.flatten_by_path(abstract)
  # Tell Orbax about each array of the checkpoint: either its shape and where to
  # put it, or a placeholder for an array that is not read.
  item = {}
  restore_args = {}
  for name in record['arrays']:
    item[name] = ocp.PLACEHOLDER
    restore_args[name] = ocp.RestoreArgs()
  for name, x in expected.items():
    if name in record['arrays']:
      item[name] = x
      restore_args[name] = ocp.ArrayRestoreArgs(
          sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)

  args = ocp.args.PyTreeRestore(
      item=nest_by_path(item), restore_args=nest_by_path(restore_args))
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    leaves = paths.flatten_by_path(handler.restore(folder / 'state', args=args))
  # Where Orbax could not read an array, it returns the ShapeDtypeStruct that it
  # was given in its place.
  for name in expected:
    if not isinstance(leaves[name], jax.Array):
      raise _DamagedCheckpoint(f'{name} is not read as an array')
  return jax.tree_util.tree_map_with_path(
      lambda path, _: leaves[paths.path_to_string(path)], abstract)


def _newest_record(folder: epath.Path, step: int | None = None
                   ) -> dict[str, Any] | None:
  """Returns the record of `step`, or the newest record that can be read where
  `step` is None; None where none can be read."""
  candidates = [step]
  if step is None:
    candidates = list_steps(folder)[::-1]
  for candidate in candidates:
    with contextlib.suppress(_DamagedCheckpoint):
      return _read_record(folder / str(candidate))
  return None


def _read_record(folder: epath.Path) -> dict[str, Any]:
  """Reads the record of one step: the JSON object that was saved beside its
  arrays. It is saved as {'record': ..., a checksum of it}.

  Args:
    folder: the folder of the step.

  Raises:
    _DamagedCheckpoint: where the record is missing or changed, or that of
      another step.
  """
  import orbax.checkpoint as ocp

  # Read the JSON object of the record and its checksum.
  try:
    with_digest = ocp.JsonCheckpointHandler().restore(folder / 'record')
  except FileNotFoundError as error:
    raise _DamagedCheckpoint('its record is missing') from error
  except ValueError as error:  # of JSON, or of UTF-8
    raise _DamagedCheckpoint('its record is not JSON') from error
  # Its checksum must be the one of the record, and its step that of the folder.
  is_sound = isinstance(with_digest, dict) and (
      with_digest == add_digest(with_digest.get('record')))
  if not is_sound:
    raise _DamagedCheckpoint('the checksum of its record is not the one saved')
  record = with_digest['record']
  if str(record['step']) != folder.name:
    raise _DamagedCheckpoint(f'it holds step {record["step"]}: its folder was '
                             'renamed or copied')
  return record


def add_digest(record: Any) -> dict[str, Any]:
  """Returns the record of a checkpoint as it is written, together with a digest
  (SHA-256) by which it is checked when it is read."""
  text = json.dumps(record, sort_keys=True)
  return dict(record=record, sha256=hashlib.sha256(text.encode()).hexdigest())


def _check_fits(folder: epath.Path, record: dict[str, Any],
                expected: dict[str, Any], partial: bool):
  """Checks that the arrays of a checkpoint have the shapes and dtypes that the
  model has.

  Args:
    folder: the folder of the step.
    record: the record of the step, which lists the shape and dtype of each
      array.
    expected: {name: ShapeDtypeStruct} of the arrays to read.
    partial: whether the checkpoint may have further arrays.

  Raises:
    CheckpointMismatch: with the names of the arrays that differ.
  """
  wrong_lines = []
  for name, line in list_array_differences(record['arrays'], expected).items():
    if not partial or name in expected:
      wrong_lines.append(line)
  if wrong_lines:
    raise CheckpointMismatch(
        f'checkpoint {folder.name} in {folder.parent} does not fit this '
        f'config: {"; ".join(wrong_lines[:8])}')


def list_array_differences(
    saved: dict[str, dict[str, Any]], expected: dict[str, Any]
    ) -> dict[str, str]:
  """Compares the shapes and dtypes of the arrays in a checkpoint with those
  that are expected.

  Args:
    saved: {name: {'shape': ..., 'dtype': ..., ...}}, as a checkpoint's record
      lists its arrays.
    expected: {name: jax.ShapeDtypeStruct}.

  Returns:
    {name: a line for the user} of each array that differs, or that only one of
    the two has.
  """
  saved_types = {name: f'{x["dtype"]}{x["shape"]}' for name, x in saved.items()}
  expected_types = {name: f'{x.dtype}{list(x.shape)}'
                    for name, x in expected.items()}
  # A line reads 'NAME is float32[8] in the checkpoint and not here' where one
  # of the two has no such array.
  lines = {}
  for name in expected_types | saved_types:
    saved_type = saved_types.get(name, 'not')
    expected_type = expected_types.get(name, 'not')
    if saved_type != expected_type:
      lines[name] = (f'{name} is {saved_type} in the checkpoint and '
                     f'{expected_type} here')
  return lines


def _describe_first_cause(error: BaseException) -> str:
  """Describes in one short line what an error was caused by at first. Orbax
  wraps the errors of TensorStore, often more than once.

  Args:
    error: an error that may have been raised from others.
  """
  # Follow the causes to the first one. Our own error says enough itself.
  while not isinstance(error, _DamagedCheckpoint):
    cause = error.__cause__ or error.__context__
    if cause is None:
      break
    error = cause

  # Take the first line of its message, without the database file and the line
  # of TensorStore's source code.
  line = str(error).split('\n')[0].rstrip(':')
  line = re.sub(r' in OCDBT database at \w+ file "[^"]*"', '', line)
  line = re.split(r' \[(?:source locations|tensorstore_spec)', line)[0]
  if isinstance(error, (_DamagedCheckpoint, ValueError)) and line:
    return line[:300]
  return f'{type(error).__name__}: {line[:300]}'


def nest_by_path(leaves: dict[str, Any]) -> dict[str, Any]:
  """Returns the nested dicts {'a': {'b': x}} of a flat {'a/b': x}.

  Orbax stores these plain dicts, so that the files know nothing of optax's
  classes or of ours.
  """
  return traverse_util.unflatten_dict(leaves, sep='/')


def broadcast_from_process_0(value: np.ndarray) -> np.ndarray:
  """Returns process 0's value on every process; waits until each of them has
  called this."""
  if jax.process_count() == 1:
    return value
  return np.asarray(multihost_utils.broadcast_one_to_all(value))


# Checksums: one uint32 per array, computed on the devices that hold it,
#
#   sum_i mix(bits(x_i) ^ place(i))  mod 2^32,
#
# where bits() reads the element as an unsigned integer, place() is another
# number for each position of the row-major order, and mix() is MurmurHash3's
# finalizer. All three steps can be undone, so any change within one element
# changes the sum, with certainty; exchanged, missing and shifted blocks change
# it all but about once in 2^32. (A plain sum of bits times weights is weaker:
# 1.0 has its lowest set bit at 2^23, which leaves 9 bits of such a sum.)
# Addition of integers is associative: the sum is the same on every mesh.

# More would take memory on a CPU, which holds what goes into a sum.
_ELEMENTS_SUMMED_AT_ONCE = 2**20
# 2^32 over the golden ratio, odd: products with it differ for each position.
_GOLDEN_RATIO_FACTOR = np.uint32(0x9E3779B1)
# The unsigned integer type of each size in bytes, in which an element is read.
_UNSIGNED_TYPE_OF_BYTES = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def compute_checksums(tree: Any) -> dict[str, int]:
  """Computes a checksum of each array of a tree on the devices.

  Args:
    tree: arrays, all on one mesh of devices, or all on one device.

  Returns:
    {path of the array in the tree: its checksum}.
  """
  leaves = paths.flatten_by_path(tree)
  if not leaves:
    return {}
  # Find the mesh, which is the same for all arrays; None: one device.
  mesh = None
  for x in leaves.values():
    if isinstance(x.sharding, NamedSharding):
      mesh = x.sharding.mesh
      break

  # Compute a sum for each device's part of each array, then the totals of all
  # arrays at once. JAX computes in the background until np.asarray waits.
  device_sums = []
  for x in leaves.values():
    spec = P()
    if isinstance(x.sharding, NamedSharding):
      spec = x.sharding.spec
    sum_on_devices = _make_device_sums(mesh, spec)
    device_sums.append(sum_on_devices(x))
  totals = np.asarray(_make_total(mesh)(device_sums))
  return dict(zip(leaves, totals.tolist()))


# A program for each shape, and not one for all leaves: an optimizer's moments
# share theirs with the parameters, and it is compiled in a third of the time.
@functools.cache
def _make_device_sums(mesh: Mesh | None, spec: Any):
  """Makes a compiled function from one array to uint32 [devices]: the checksum
  of the part of the array on each device.

  Args:
    mesh: the mesh of devices that hold the array; None: one device holds it.
    spec: the PartitionSpec of the array, which says for each of its dimensions
      which mesh axes split it.
  """
  # Along a mesh axis that splits no dimension, the devices hold copies of the
  # same part.
  axes_of_dimensions = tuple(_mesh_axes(entry) for entry in spec)
  split_axes = set().union(*axes_of_dimensions)

  def sum_on_device(shard: Any) -> jax.Array:
    """Returns the checksum of a device's part of the array, [1]."""
    shard_sum = _sum_of_shard(shard, axes=axes_of_dimensions, mesh=mesh)
    if mesh is None:
      return shard_sum[None]
    for name in mesh.axis_names:
      if name not in split_axes:  # count only the first of the copies
        is_first = jax.lax.axis_index(name) == 0
        shard_sum = jnp.where(is_first, shard_sum, 0)
    return shard_sum[None]

  if mesh is None:
    return jax.jit(sum_on_device)
  on_each_device = jax.shard_map(
      sum_on_device, mesh=mesh, in_specs=spec, out_specs=P(mesh.axis_names),
      check_vma=False)
  return jax.jit(on_each_device)


def _mesh_axes(entry: Any) -> tuple[str, ...]:
  """Returns the names of the mesh axes over which one dimension of an array is
  split, given its entry in a PartitionSpec."""
  if entry is None:
    return ()
  if isinstance(entry, tuple):
    return entry
  return (entry,)


@functools.cache
def _make_total(mesh: Mesh | None):
  """Makes a compiled function that adds up the checksums of the devices: from
  the sums uint32 [devices] of each of several arrays to uint32 [arrays].

  Args:
    mesh: the mesh of devices that hold the arrays; None: one device holds them.
  """
  # Put the result on every device of the mesh, so that each process can read
  # it.
  replicated = None
  if mesh is not None:
    replicated = NamedSharding(mesh, P())

  def add_devices(device_sums: Sequence[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(device_sums), axis=1, dtype=jnp.uint32)

  return jax.jit(add_devices, out_shardings=replicated)


def _sum_of_shard(x: jax.Array, axes: tuple[tuple[str, ...], ...],
                  mesh: Mesh | None) -> jax.Array:
  """Returns the checksum of one device's part of an array: the sum of the mixed
  bits of its elements, each with its position in the whole array.

  It goes by rows of the last axis, about a million elements at a time: a CPU
  does not fuse a sum with what goes into it, and would hold x once more. The
  part is read as a matrix [R, C]: C is its last axis, and R all axes before it.

  Args:
    x: the device's part of the array.
    axes: the mesh axes over which each dimension of the array is split.
    mesh: the mesh; None: the array lies on one device.

  Returns:
    The checksum, a uint32. The checksums of all parts add up to that of the
    whole array, modulo 2^32, however it is split.
  """
  # Where the shard starts in each dimension of the whole array, and how many
  # positions of the whole array one step along that dimension is. From the last
  # dimension on, `stride` is the product of the whole sizes so far. All numbers
  # are taken modulo 2^32.
  shape = x.shape or (1,)
  axes += ((),) * (len(shape) - len(axes))
  starts = []
  strides = []
  stride = 1
  for size, names in reversed(list(zip(shape, axes))):
    index = jax.lax.axis_index(names) if names else 0
    starts.insert(0, jnp.uint32(index) * np.uint32(size))
    strides.insert(0, np.uint32(stride % 2**32))
    stride *= size * math.prod(mesh.shape[name] for name in names)

  x_RC = x.reshape(-1, shape[-1])
  num_rows, num_columns = x_RC.shape
  column_C = starts[-1] + jnp.arange(num_columns, dtype=jnp.uint32)

  def sum_of_rows(first_row: Any, count: Any) -> jax.Array:
    """Computes the checksum of some rows of x_RC, which is a device's part of
    an array as a matrix: C is the last axis of the array, and the rows R join
    all other axes.

    Args:
      first_row: the index of the first row.
      count: the number of rows, a Python number.
    """
    # Find the position of each row in the whole array. For this, split the
    # number of the row into indices of the axes that R joins, the last axis
    # first. `shape` is that of the device's part, `starts` its first index
    # along each axis, and `strides` how many positions a step along the axis
    # is.
    row_R = jnp.uint32(first_row) + jnp.arange(count, dtype=jnp.uint32)
    position_R = jnp.zeros(count, jnp.uint32)
    for size, start, stride in reversed(
        list(zip(shape[:-1], starts, strides))):
      position_R += (start + row_R % np.uint32(size)) * stride
      row_R //= np.uint32(size)

    # Mix the bits of each element with its position: otherwise the sum would
    # stay the same if two elements were exchanged.
    position_RC = position_R[:, None] + column_C[None]
    place_RC = position_RC * _GOLDEN_RATIO_FACTOR
    bits_RC = _bits_of_elements(
        jax.lax.dynamic_slice_in_dim(x_RC, first_row, count))
    # dtype: without it jnp.sum would widen to uint64 where x64 is on.
    return jnp.sum(_mix_bits(bits_RC ^ place_RC), dtype=jnp.uint32)

  # Equal groups of rows, since a loop needs one shape, and the rows that are
  # left.
  rows_at_once = min(num_rows, max(1, _ELEMENTS_SUMMED_AT_ONCE // num_columns))
  num_groups = num_rows // rows_at_once
  total = jax.lax.fori_loop(
      0, num_groups,
      lambda i, total: total + sum_of_rows(i * rows_at_once, rows_at_once),
      jnp.uint32(0))
  num_left = num_rows % rows_at_once
  if num_left:
    total += sum_of_rows(num_rows - num_left, num_left)
  return total


def _mix_bits(h: jax.Array) -> jax.Array:
  """Returns MurmurHash3's finalizer of each uint32: an invertible function in
  which each bit of the input changes about half of the bits of the result."""
  h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return h ^ (h >> np.uint32(16))


def _bits_of_elements(x: jax.Array) -> jax.Array:
  """Returns the bits of each element of x, read as an unsigned integer, as
  uint32."""
  is_small = jnp.issubdtype(x.dtype, jnp.integer) and (
      jnp.iinfo(x.dtype).bits < 8)
  if x.dtype == jnp.bool_ or is_small:
    return x.astype(jnp.uint32)
  # No run has elements of another size.
  unsigned_type = _UNSIGNED_TYPE_OF_BYTES[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x, unsigned_type).astype(jnp.uint32)
