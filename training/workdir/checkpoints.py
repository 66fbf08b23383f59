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

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import time
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

from configs.errors import EnvironmentFailure, RequestError, require
from training import paths, progress
from training.workdir import checksums, storage

BEST = 'best'  # a name for the step whose evaluation was the best
MOST = 2**31 - 1  # what the counter of a state can hold


class Mean(NamedTuple):
  """Several steps, for the mean of their parameters.

  Attributes:
    steps: these, in any order; or none,
    last: and so many of the newest.
  """
  steps: tuple[int, ...] = ()
  last: int = 0


def step_number(name: str) -> int | None:
  """Returns the step that a folder of this name holds; None: it holds none."""
  if not (name.isascii() and name.isdecimal()) or len(name) > len(str(MOST)):
    return None
  step = int(name)
  return step if name == str(step) and step <= MOST else None


def named_step(text: str | None) -> int | str | Mean | None:
  """Returns what --step names: a step, BEST, several steps whose mean is
  meant, as `100,200` or `last:2`, or None for the newest.

  Raises:
    RequestError: for a text that is none of these.
  """
  if text is None or text == BEST:
    return text
  if text.startswith('last:'):
    count = step_number(text.removeprefix('last:'))
    require(count is not None and count > 1, f'--step is {text!r}: write how '
            'many checkpoints the mean is of, from 2 on, such as last:5')
    return Mean(last=count)
  if ',' in text:
    steps = tuple(map(step_number, text.split(',')))
    require(None not in steps and len(set(steps)) == len(steps),
            f'--step is {text!r}: write the numbers of different steps, with '
            'commas between, for the mean of their parameters')
    return Mean(steps)
  step = step_number(text)
  require(step is not None, f'--step is {text!r}: write the number of a step, '
          f'or {BEST} for the best of a run with eval.best, or last:5 for the '
          'mean of the last 5 checkpoints')
  return step


def finished(folder: epath.Path) -> list[int]:
  """Returns the steps in `folder` that were saved whole, ascending."""
  import orbax.checkpoint as ocp
  if not folder.is_dir():
    return []
  return sorted(
      step_number(path.name) for path in folder.iterdir()
      if step_number(path.name) is not None
      and ocp.utils.is_checkpoint_finalized(path))


class Names:
  """These names as Orbax asks for them (its NameFormat)."""

  def build_name(self, step: int) -> str:
    return str(step)

  def find_all(self, base_path: epath.Path) -> Iterator:
    import orbax.checkpoint as ocp
    for step in finished(base_path):
      yield ocp.path.step.Metadata(step=step, path=base_path / str(step))

  def find_step(self, base_path: epath.Path, step: int):
    for found in self.find_all(base_path):
      if found.step == step:
        return found
    raise ValueError(f'no step {step} in {base_path}')


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint, read and checked.

  Attributes:
    step: the number of updates that the state has had.
    state: the pytree that was asked for.
    record: the JSON object beside it: next_batch, tokens, config,
      environment, arrays.
    damaged: a sentence for each later step that was passed over.
    what: which parameters of it these are, where it is a choice
      (workdir/parameters.py).
  """
  step: int
  state: Any
  record: dict[str, Any]
  damaged: tuple[str, ...]
  what: str = ''


class Mismatch(RequestError):
  """The checkpoint is sound, and of another model or optimizer."""


class _Damaged(Exception):
  pass


def kept(steps: Sequence[int], is_good: Callable[[int], bool],
         best: int | None, *, keep: int, keep_every: int, average: int,
         every_steps: int) -> set[int]:
  """Returns those of `steps` to keep: never a stretch of bad steps instead of
  the last good ones. They are the newest, since the run goes on from it; the
  newest `keep` good ones; each multiple of keep_every; the best; and the newest
  `average` by every_steps, whose mean is to be taken."""
  good: list[int] = []
  for step in sorted(steps, reverse=True):
    if len(good) == keep:
      break  # older records need not be read
    if is_good(step):
      good.append(step)
  forever = [step for step in steps if keep_every and step % keep_every == 0]
  averaged = [step for step in sorted(steps)
              if average and step % every_steps == 0][-average:]
  return {*good, *forever, *averaged, *sorted(steps)[-1:],
          *({best} & set(steps))}


class Checkpoints:
  """Saves the state of a run when it is due, and finds it again.

  Args:
    workdir: the folder of the run; gs:// paths work as well.
    every_steps: a save is due at each multiple of it; 0: not by step.
    every_minutes: and once so much time has passed since the last; 0: not.
    keep: how many of the newest good ones are kept; at least 1. One that was
      saved in a stretch of bad steps is kept beside them, while it is the
      newest of all.
    keep_every: a step that is a multiple of it is kept for good; 0: none.
    average: so many of the newest that are multiples of every_steps are kept,
      whatever `keep` says; 0: none.
    agree_every: with several processes, time is looked at only at multiples
      of so many steps, since process 0 has to tell the others.
    clock: seconds; tests pass their own.
  """

  def __init__(self, workdir: epath.Path, *, every_steps: int,
               every_minutes: float, keep: int, keep_every: int,
               average: int = 0, agree_every: int = 1,
               clock: Callable[[], float] = time.monotonic):
    import orbax.checkpoint as ocp

    self._kept = dict(keep=keep, keep_every=keep_every, average=average,
                      every_steps=every_steps)
    self._every_steps = every_steps
    self._every_seconds = 60 * every_minutes
    self._agree_every = max(1, agree_every)
    self._clock = clock
    self._last_time = clock()
    self._last_step = None  # the one on disk that equals the live state
    self.directory = directory(workdir)
    self._good = {}  # by step: whether it is of no bad step
    self.best = None  # training.best.Best.record of the newest checkpoint
    with storage.writing(self.directory):
      self._manager = ocp.CheckpointManager(
          self.directory,
          options=ocp.CheckpointManagerOptions(
              preservation_policy=self,
              step_name_format=Names(),
              cleanup_tmp_directories=True,  # what a killed save has left
              # Else, where a folder cannot be made, the threads that wait for
              # it keep the process from ending for some 20 minutes.
              async_options=ocp.options.AsyncOptions(
                  create_directories_asynchronously=False),
              # Trust no file before it is checked.
              lightweight_initialize=True),
          item_handlers=dict(
              # Weights do not compress: zstd gains 8 % and costs a core.
              state=ocp.PyTreeCheckpointHandler(use_compression=False),
              record=ocp.JsonCheckpointHandler()))
    # Processes agree on a stop by distributed.signals. Orbax would only note
    # how much time the save of it rescues, and fails at that beside checkpoints
    # of an earlier start, whose times it has not read.
    self._manager.reached_preemption = lambda step: False

  @property
  def newest(self) -> int | None:
    """The step that was saved or restored last; None: none was."""
    return self._last_step

  def due(self, step: int) -> bool:
    """Whether to save after `step`. Every process gets the same answer."""
    if self._every_steps and step % self._every_steps == 0:
      return True
    if not self._every_seconds:
      return False
    is_time = self._clock() - self._last_time >= self._every_seconds
    if jax.process_count() == 1:
      return is_time
    if step % self._agree_every:
      return False
    return bool(from_process_0(np.int32(is_time)))

  def should_preserve(self, checkpoints: Sequence, *, context: Any
                      ) -> list[bool]:
    """Orbax asks this after each save, and deletes what is not to be kept."""
    there = kept([checkpoint.step for checkpoint in checkpoints], self._is_good,
                 self.best and self.best['step'], **self._kept)
    return [checkpoint.step in there for checkpoint in checkpoints]

  def _is_good(self, step: int) -> bool:
    if step not in self._good:
      self._good[step] = is_good(self.directory, step)
    return self._good[step]

  def save(self, step: int, state: Any, *, next_batch: int, tokens: int,
           config: ml_collections.ConfigDict, good: bool = True,
           best: dict[str, Any] | None = None) -> bool:
    """Starts to save; returns once `state` may be donated to the next step.

    Waits for the save before it, whose failure is raised here.

    Args:
      step: the number of updates that `state` has had.
      state: a pytree of jax arrays.
      next_batch: the index of the first global batch not yet trained on.
      tokens: the number of tokens trained on.
      config: the run's ConfigDict.
      good: whether the step was good: its loss, its gradients and what they
        made of the parameters were finite.
      best: the run's best evaluation so far (training/best.py), whose step is
        kept whatever `keep` says; None: the run has none.

    Returns:
      False if this very state is on disk already, else True.
    """
    import orbax.checkpoint as ocp

    if step == self._last_step:
      return False
    arrays = plain(state)
    record = dict(
        step=step, next_batch=next_batch, tokens=tokens,
        good=good, best=best, config=config.to_dict(),
        environment=environment(),
        arrays=_describe(paths.flatten(state), checksums.of(state), arrays))
    self.wait()
    self._good[step], self.best = good, best
    with self._writing(step):
      self._manager.save(
          step, force=True,
          args=ocp.args.Composite(
              state=ocp.args.PyTreeSave(nest(arrays)),
              record=ocp.args.JsonSave(seal(record))))
    self._last_step = step
    self._last_time = self._clock()
    return True

  def go_on_from(self, restored: Restored) -> None:
    """Begins where a checkpoint that was restored ends.

    Later steps, damaged or left behind by a `step` from before them, are set
    aside, as STEP.aside: the run is about to write these steps anew. No later
    save removes them: who has looked at them may."""
    self._last_step = restored.step
    self._last_time = self._clock()
    self.best = restored.record['best']
    later = [step for step in steps(self.directory) if step > restored.step]
    if not later:
      return
    for step in later if jax.process_index() == 0 else ():
      target = _unused(self.directory, f'{step}.aside')
      logging.warning('checkpoint %d is set aside as %s', step, target)
      (self.directory / str(step)).rename(target)
    from_process_0(np.int32(0))  # the others wait until it is done
    self._manager.reload()

  def wait(self):
    """Returns once all saves are on disk."""
    with self._writing(self._last_step):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def _writing(self, step: int):
    """Around a save, whose failure says what the run will go on from."""
    def then() -> str:
      try:
        left = [s for s in finished(self.directory) if s != step]
      except OSError:  # the storage is gone, and with it the list
        return storage.again()
      return f'{storage.again()} from ' + (
          f'step {left[-1]}' if left else 'the beginning')
    return storage.writing(f'checkpoint {step} in {self.directory}', then)

  def close(self):
    try:
      self.wait()
    finally:
      self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    # After an error, a save on its way is finished; but not with several
    # processes, since the others may never come to its barriers.
    if error is None:
      self.close()
    elif jax.process_count() == 1:
      # Its own failure would hide the first one, and may be the same.
      with contextlib.suppress(EnvironmentFailure):
        self.close()


def _unused(folder: epath.Path, name: str):
  """Returns folder/name, or the first of name-2, name-3, ... not taken."""
  path, count = folder / name, 1
  while path.exists():
    count += 1
    path = folder / f'{name}-{count}'
  return path


def environment() -> dict[str, Any]:
  """What a bitwise resume depends on beside the config: versions, devices."""
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')
  return dict(
      python=platform.python_version(),
      **{name: importlib.metadata.version(name) for name in packages},
      devices=jax.device_count(), processes=jax.process_count(),
      device_kind=jax.devices()[0].device_kind)


def environment_changes(record: dict[str, Any]) -> list[str]:
  """Says what differs now from where the checkpoint's run was.

  Not empty: the run goes on with the same batches, and losses that are equal
  to about 1e-5, but not bit for bit.
  """
  old, new = record['environment'], environment()
  return [f'{name}: {old.get(name)} -> {new[name]}'
          for name in new if old.get(name) != new[name]]


def _describe(leaves: dict[str, Any], sums: Any, arrays: Any
              ) -> dict[str, dict]:
  """What restoring must know of each array before it reads one."""
  return {
      name: dict(
          shape=list(leaf.shape), dtype=str(leaf.dtype), checksum=sums[name],
          shard=list(arrays[name].sharding.shard_shape(arrays[name].shape)))
      for name, leaf in leaves.items()}


def directory(workdir: epath.Path):
  path = storage.path(workdir)
  # Orbax wants it so; a bucket's paths are, and epath would prepend the folder.
  path = path if storage.in_bucket(path) else path.absolute()
  return path / storage.CHECKPOINTS


_MOST_STEPS = 4096  # of which process 0 tells the others


def steps(folder: epath.Path) -> list[int]:
  """Returns the finished steps in `folder`, ascending, as process 0 sees it."""
  found = finished(folder) if jax.process_index() == 0 else []
  if jax.process_count() > 1:
    padded = np.full(_MOST_STEPS, -1, np.int32)
    padded[:len(found[-_MOST_STEPS:])] = found[-_MOST_STEPS:]
    found = [int(step) for step in from_process_0(padded) if step >= 0]
  return found



def best_step(folder: epath.Path) -> int:
  """Returns the step whose evaluation was the best, as the newest record that
  can be read has it.

  Raises:
    RequestError: where none is kept.
  """
  for candidate in steps(folder)[::-1]:
    try:
      best = _read_record(folder / str(candidate))['best']
    except _Damaged:
      continue
    if best and best['step'] is not None:
      return best['step']
    break
  raise RequestError(f'there is no best checkpoint in {folder}: eval.best of '
                     'the run names no figure, or nothing was evaluated yet')


def restore(folder: epath.Path, abstract: Any, step: int | str | None = None,
            *, partial: bool = False) -> Restored:
  """Returns the newest good checkpoint of `folder`, or that of `step`.

  Args:
    folder: what `directory(workdir)` returns.
    abstract: a pytree of ShapeDtypeStructs with shardings; or a function that
      returns it, given {name: {shape, dtype, ...}} of the arrays of a step;
      where it returns None, only the record is read.
    step: this one, and no other if it is damaged; None: the newest.
    partial: `abstract` may be a part of what was saved, such as
      {'params': ...} without the optimizer.

  Raises:
    ValueError: there is no such checkpoint, or it does not fit `abstract`.
    RuntimeError: every checkpoint that was tried is damaged.
  """
  available = steps(folder)
  if not available:
    raise RequestError(f'no checkpoint in {folder}')
  if step == BEST:
    step = best_step(folder)
  if step is not None and step not in available:
    raise RequestError(f'no checkpoint of step {step} in {folder}: there are '
                       f'{", ".join(map(str, available))}')
  damaged = []
  for candidate in [step] if step is not None else available[::-1]:
    try:
      with progress.during(f'restoring step {candidate}'):
        state, record = _read(folder / str(candidate), abstract, partial)
    except _Damaged as error:
      now = steps(folder)
      if step is None and now[-1:] > available[-1:]:
        # A run that goes on there has deleted what was being read.
        return restore(folder, abstract, partial=partial)
      if candidate not in now:
        raise EnvironmentFailure(
            f'checkpoint {candidate} in {folder} was deleted while it was read:'
            f' there are {", ".join(map(str, now)) or "no others"}') from error
      damaged.append(f'checkpoint {candidate} in {folder} is damaged: {error}')
      continue
    warnings = [f'{sentence}; using {candidate} instead'
                for sentence in damaged]
    return Restored(candidate, state, record, tuple(warnings))
  others = [s for s in available if step is not None and s != step]
  raise EnvironmentFailure('; '.join(damaged) + (
      f'; there are also {", ".join(map(str, others))}' if others else
      '; there is no other'))


def arrays(folder: epath.Path, step: int | None = None
           ) -> dict[str, dict[str, Any]]:
  """Returns {name: {shape, dtype, ...}} of the newest step with a record that
  can be read, or of `step`; {} where there is none."""
  for candidate in [step] if step is not None else steps(folder)[::-1]:
    try:
      return _read_record(folder / str(candidate))['arrays']
    except _Damaged:
      continue
  return {}


def parameters_alone(arrays: dict[str, dict[str, Any]]) -> bool:
  """Whether a checkpoint has no optimiser's state, as an import has none."""
  return bool(arrays) and all(name.startswith('params/') for name in arrays)


def _read(folder: epath.Path, abstract: Any, partial: bool):
  """Returns (state, record) of one step.

  Raises:
    Mismatch: it does not fit.
    _Damaged: it cannot be read, on this process or another, or not as it was.
  """
  reason = arrays = record = None
  try:
    record = _read_record(folder)
    if callable(abstract):
      abstract = abstract(record['arrays'])
    if abstract is not None:
      wanted = plain(abstract)
      _check_fits(folder, record, paths.flatten(abstract), partial)
      arrays = _read_arrays(folder, record, wanted)
  except Exception as error:  # Orbax and TensorStore raise many types.
    reason = _reason(error)
    if any(word in reason for word in _ENVIRONMENT):
      raise EnvironmentFailure(
          f'cannot read checkpoint {folder.name} in {folder.parent}, which may '
          f'be sound: {reason}; once that is mended, run the same command again'
      ) from error
    if isinstance(error, Mismatch | AssertionError) or any(
        word in reason for word in _OURS):
      raise
  if not _all_processes(reason is None):
    raise _Damaged(reason or 'another process cannot read it')
  if abstract is None:
    return None, record
  state = _unflatten(abstract, arrays)
  sums = checksums.of(state)
  wrong = [name for name in sums
           if sums[name] != record['arrays'][name]['checksum']]
  if wrong:
    raise _Damaged(f'the checksum of {_some(wrong)} is not the one saved')
  return state, record


# An error that says so is no fault of the files, but of their storage or of
# this machine; or it is one of this program, and raised as it is.
_ENVIRONMENT = ('DEADLINE_EXCEEDED', 'PERMISSION_DENIED', 'PermissionError',
                'RESOURCE_EXHAUSTED', 'UNAUTHENTICATED', 'UNAVAILABLE',
                # TensorStore's errors name them too. EIO may be of the files.
                *(os.strerror(code) for code in storage.OF_THE_MACHINE
                  if code != errno.EIO))
_OURS = ('MemoryError', 'more bytes than we reserved')


def _read_record(folder: epath.Path) -> dict[str, Any]:
  import orbax.checkpoint as ocp

  try:
    sealed = ocp.JsonCheckpointHandler().restore(folder / 'record')
  except FileNotFoundError as error:
    raise _Damaged('its record is missing') from error
  except ValueError as error:  # of JSON, or of UTF-8
    raise _Damaged('its record is not JSON') from error
  record = unseal(sealed)
  if str(record['step']) != folder.name:
    raise _Damaged(f'it holds step {record["step"]}: its folder was renamed or '
                   'copied')
  return record


def seal(record: dict[str, Any]) -> dict[str, Any]:
  """Returns what is written: the record, and a digest to check it by."""
  return dict(record=record, sha256=_digest(record))


def unseal(sealed: dict[str, Any]) -> dict[str, Any]:
  is_ours = isinstance(sealed, dict) and sealed.keys() == {'record', 'sha256'}
  if not is_ours or sealed['sha256'] != _digest(sealed['record']):
    raise _Damaged('the checksum of its record is not the one saved')
  return sealed['record']


def _digest(record: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def is_good(folder: epath.Path, step: int) -> bool:
  """Whether the record of a step can be read, and is of no bad step."""
  try:
    record = _read_record(folder / str(step))
  except _Damaged:
    return False
  return record['good']


def _read_arrays(folder: epath.Path, record: dict[str, Any],
                 wanted: dict[str, Any]) -> dict[str, jax.Array]:
  import orbax.checkpoint as ocp

  handler = ocp.PyTreeCheckpointHandler(
      restore_concurrent_gb=_read_limit_gb(record, wanted))
  nested = nest(wanted)
  arguments = jax.tree.map(
      lambda x: ocp.ArrayRestoreArgs(
          sharding=x.sharding, global_shape=x.shape, dtype=x.dtype), nested)
  restored = handler.restore(folder / 'state', args=ocp.args.PyTreeRestore(
      item=nested, restore_args=arguments, partial_restore=True))
  handler.close()
  return paths.flatten(restored)


def _read_limit_gb(record: dict[str, Any], wanted: dict[str, Any]) -> int:
  """Bounds the host memory of reading: the largest read, and up to 1 GB.

  A read takes the saved shards that overlap one shard of the new mesh, so it
  is at most two of them larger along each axis.
  """
  def largest_read(name: str, x: Any):
    saved = record['arrays'][name]['shard']
    new = x.sharding.shard_shape(x.shape)
    return x.dtype.itemsize * math.prod(
        min(n, s + 2 * c) for n, s, c in zip(x.shape, new, saved))
  largest = max(largest_read(name, x) for name, x in wanted.items())
  return 1 + largest // 10**9


def _check_fits(folder: epath.Path, record: dict[str, Any],
                wanted: dict[str, Any], partial: bool):
  """Raises Mismatch with the name of each array that is not the same."""
  saved = record['arrays']
  wrong = []
  for name, x in wanted.items():
    here = f'{x.dtype}{list(x.shape)}'
    if name not in saved:
      wrong.append(f'{name} is not in it')
      continue
    there = f'{saved[name]["dtype"]}{saved[name]["shape"]}'
    if here != there:
      wrong.append(f'{name} is {there} in it and {here} here')
  if not partial:
    wrong += [f'{name} is in it and not here'
              for name in saved if name not in wanted]
  if wrong:
    raise Mismatch(f'checkpoint {folder.name} in {folder.parent} does not fit '
                   f'this config: {_some(wrong, "; ")}')


def _some(names: list[str], separator: str = ', ') -> str:
  more = f'{separator}and {len(names) - 8} more' if len(names) > 8 else ''
  return separator.join(names[:8]) + more


def _reason(error: BaseException) -> str:
  """Returns the first cause of an error as one short line.

  Orbax wraps what TensorStore found more than once, and TensorStore adds
  where in its own source it was found.
  """
  while not isinstance(error, _Damaged) and (
      error.__cause__ or error.__context__):
    error = error.__cause__ or error.__context__
  line = str(error).split('\n')[0]
  line = re.sub(r' in OCDBT database at \w+ file "[^"]*"', '', line)
  line = re.split(r' \[(?:source locations|tensorstore_spec)', line)[0]
  if isinstance(error, (_Damaged, ValueError)):
    return line[:300]
  return f'{type(error).__name__}: {line[:300]}'


def plain(tree: Any) -> dict[str, Any]:
  """Returns the leaves by path, with random keys as the integers they hold.

  Takes arrays or ShapeDtypeStructs; each must have its sharding.
  """
  leaves = paths.flatten(tree)
  for name, x in leaves.items():
    assert getattr(x, 'sharding', None) is not None, f'{name} has no sharding'
  return {name: _key_data(x) if str(x.dtype) in _KEYS else x
          for name, x in leaves.items()}


def _key_data(key: Any):
  if isinstance(key, jax.Array):
    return jax.random.key_data(key)
  data = jax.eval_shape(jax.random.key_data, key)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


# The dtype of a random key, and the generator that it belongs to.
_KEYS = {'key<fry>': 'threefry2x32', 'key<rbg>': 'rbg',
         'key<urbg>': 'unsafe_rbg'}


def _unflatten(abstract: Any, arrays: dict[str, jax.Array]):
  def leaf(path: tuple, x: Any):
    array = arrays[paths.join(path)]
    if str(x.dtype) in _KEYS:
      return jax.random.wrap_key_data(array, impl=_KEYS[str(x.dtype)])
    return array
  return jax.tree_util.tree_map_with_path(leaf, abstract)


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
  """Turns {'a/b': x} into {'a': {'b': x}}: what Orbax stores, and others read.

  Plain dicts, so that the files know nothing of optax's or our own classes.
  """
  tree = {}
  for path, leaf in leaves.items():
    *folders, name = path.split('/')
    branch = tree
    for folder in folders:
      branch = branch.setdefault(folder, {})
    branch[name] = leaf
  return tree


def from_process_0(value: np.ndarray) -> np.ndarray:
  """Returns process 0's value on every process, once all have asked."""
  if jax.process_count() == 1:
    return value
  return np.asarray(multihost_utils.broadcast_one_to_all(value))


def _all_processes(ok: bool) -> bool:
  if jax.process_count() == 1:
    return ok
  return bool(np.all(multihost_utils.process_allgather(np.int32(ok))))
