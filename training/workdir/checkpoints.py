"""Checkpoints: written while training goes on, checked when read back.

WORKDIR/checkpoints/STEP/ holds two Orbax items: `state`, the arrays under
their paths, sharded; and `record`, a JSON object with the data position, the
config, the versions, and the shape, dtype and checksum of every array. Reading
them back, onto any mesh, is training/workdir/restoring.py.

Orbax (the v0 API: v1 is experimental, and drops a save while one is under
way) is imported where a run first needs it.
"""

from collections.abc import Callable
import contextlib
import importlib.metadata
import platform
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import ml_collections
import numpy as np

from configs.errors import EnvironmentFailure, RequestError
from training import paths
from training.workdir import checksums, keeping, orbax_noise, restoring
from training.workdir import run_config, step_folders, writing


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

    _check_nonnegative(every_steps=every_steps, every_minutes=every_minutes,
                       keep_every=keep_every)
    if keep < 1:
      raise RequestError(f'checkpoint.keep={keep}: at least 1 must be kept, or '
                         'the run cannot be resumed')
    self._every_steps = every_steps
    self._every_seconds = 60 * every_minutes
    self._agree_every = max(1, agree_every)
    self._clock = clock
    self._last_time = clock()
    self._last_step = None  # the one on disk that equals the live state
    self.directory = restoring.directory(workdir)
    self._good = {}  # by step: whether it is of no bad step
    self.best = None  # training.best.Best.record of the newest checkpoint
    orbax_noise.silence()
    with writing.to(self.directory):
      self._manager = ocp.CheckpointManager(
          self.directory,
          options=ocp.CheckpointManagerOptions(
              preservation_policy=keeping.Policy(
                  keep, keep_every, self._is_good, self._best_step, average,
                  every_steps),
              step_name_format=step_folders.Names(),
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
    return bool(restoring.from_process_0(np.int32(is_time)))

  def _is_good(self, step: int) -> bool:
    if step not in self._good:
      self._good[step] = restoring.is_good(self.directory, step)
    return self._good[step]

  def _best_step(self) -> int | None:
    return self.best and self.best['step']

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
    arrays = restoring.plain(state)
    record = dict(
        step=step, next_batch=next_batch, tokens=tokens,
        good=good, best=best, config=run_config.to_json(config),
        environment=environment(),
        arrays=_describe(paths.flatten(state), checksums.of(state), arrays))
    self.wait()
    self._good[step], self.best = good, best
    with self._writing(step):
      self._manager.save(
          step, force=True,
          args=ocp.args.Composite(
              state=ocp.args.PyTreeSave(restoring.nest(arrays)),
              record=ocp.args.JsonSave(restoring.seal(record))))
    self._last_step = step
    self._last_time = self._clock()
    return True

  def restore(self, abstract: Any, step: int | None = None
              ) -> restoring.Restored | None:
    """Returns the newest good checkpoint, or None where a run begins.

    Later steps, damaged or left behind by a `step` from before them, are set
    aside, as STEP.aside: the run is about to write these steps anew. No later
    save removes them: who has looked at them may.

    Args:
      abstract: the state as ShapeDtypeStructs with shardings.
      step: this one, and no other if it is damaged; None: the newest.
    """
    steps = restoring.steps(self.directory)
    if not steps and step is None:
      return None
    restored = restoring.restore(self.directory, abstract, step)
    self.go_on_from(restored)
    return restored

  def go_on_from(self, restored: restoring.Restored) -> None:
    """Sets later steps aside, as `restore` does, once its checkpoint is known
    to be good."""
    steps = restoring.steps(self.directory)
    self._set_aside([s for s in steps if s > restored.step])
    self._last_step = restored.step
    self._last_time = self._clock()
    self.best = restored.record.get('best')  # earlier records have none

  def _set_aside(self, steps: list[int]):
    if not steps:
      return
    if jax.process_index() == 0:
      for step in steps:
        source = self.directory / str(step)
        target = _unused(self.directory, f'{step}.aside')
        logging.warning('checkpoint %d is set aside as %s', step, target)
        source.rename(target)
    restoring.from_process_0(np.int32(0))  # the others wait until it is done
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
        left = [s for s in step_folders.finished(self.directory) if s != step]
      except OSError:  # the storage is gone, and with it the list
        return writing.again()
      return f'{writing.again()} from ' + (
          f'step {left[-1]}' if left else 'the beginning')
    return writing.to(f'checkpoint {step} in {self.directory}', then)

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


def _check_nonnegative(**fields):
  for name, value in fields.items():
    if value < 0:
      raise RequestError(
          f'checkpoint.{name}={value}: must be positive, or 0 for never')


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
