"""Reads checkpoints back: onto any mesh, whole or in part, never unchecked.

Orbax alone restores a flipped byte in silence, casts to another dtype in
silence, takes the mesh of the file where none is given, and lists a damaged
step as the latest. So: shapes and dtypes are compared with the record before
anything is read, shardings are always given, the checksum of every array is
compared after, and a step that fails is named and passed over for the one
before it.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from configs.errors import EnvironmentFailure, RequestError
from training import paths, progress
from training.workdir import checksums, orbax_noise, step_folders
from training.workdir import storage


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint, read and checked.

  Attributes:
    step: the number of updates that the state has had.
    state: the pytree that was asked for.
    record: the JSON object beside it: next_batch, tokens, config,
      environment, arrays.
    damaged: a sentence for each later step that was passed over, and for each
      folder whose name only looks like a step's.
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


def directory(workdir: epath.Path):
  path = storage.path(workdir)
  # Orbax wants it so; a bucket's paths are, and epath would prepend the folder.
  path = path if storage.in_bucket(path) else path.absolute()
  return path / storage.CHECKPOINTS


def steps(folder: epath.Path) -> list[int]:
  """Returns the finished steps in `folder`, ascending, as process 0 sees it."""
  found = step_folders.finished(folder) if jax.process_index() == 0 else []
  if jax.process_count() > 1:
    padded = np.full(_MOST_STEPS, -1, np.int32)
    padded[:len(found[-_MOST_STEPS:])] = found[-_MOST_STEPS:]
    found = [int(step) for step in from_process_0(padded) if step >= 0]
  return found


# Of the steps on disk, how many process 0 tells the others.
_MOST_STEPS = 4096


def best_step(folder: epath.Path) -> int:
  """Returns the step whose evaluation was the best, as the newest record that
  can be read has it.

  Raises:
    RequestError: where none is kept.
  """
  for candidate in steps(folder)[::-1]:
    try:
      best = _read_record(folder / str(candidate)).get('best')
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
  if step == step_folders.BEST:
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
    return Restored(candidate, state, record,
                    (*warnings, *step_folders.strangers(folder)))
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
  return 'good' not in record or record['good']  # earlier ones do not say


def _read_arrays(folder: epath.Path, record: dict[str, Any],
                 wanted: dict[str, Any]) -> dict[str, jax.Array]:
  import orbax.checkpoint as ocp

  orbax_noise.silence()
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
