"""The parameters that a checkpoint stands for: to evaluate, to export, to start
another run from.

They are those of the average, in a checkpoint of a run with optim.ema, unless
those that were trained are asked for by `live`; and the mean of several
checkpoints, where several are named (checkpoints.Mean).
"""

from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from configs.errors import require
from training import paths
from training.workdir import checkpoints


def restore(folder: epath.Path, params: Any,
            step: int | str | checkpoints.Mean | None = None, *,
            live: bool = False) -> checkpoints.Restored:
  """Returns a checkpoint whose `state` are parameters.

  Args:
    folder: what checkpoints.directory(workdir) returns.
    params: which ones, as ShapeDtypeStructs with shardings.
    step: which checkpoint, or the mean of which; None: the newest good one.
    live: take the parameters themselves, where an average is kept as well.

  Raises:
    RequestError: there is no such checkpoint, or not of these parameters.
  """
  if isinstance(step, checkpoints.Mean):
    steps = _steps(folder, step)
    found = [_restore(folder, params, n, live) for n in steps]
    return checkpoints.Restored(
        steps[-1], mean([one.state for one in found]), found[-1].record,
        found[-1].damaged, f'the mean of steps {", ".join(map(str, steps))}'
        + (f', each {found[-1].what}' if found[-1].what else ''))
  return _restore(folder, params, step, live)


def mean(trees: Sequence[Any]):
  """Returns the mean of trees of parameters, taken in float32, in their own
  dtype."""
  def of(*leaves: jax.Array):
    total = leaves[0].astype(jnp.float32)
    for x in leaves[1:]:
      total = total + x.astype(jnp.float32)
    return (total / len(leaves)).astype(leaves[0].dtype)
  return jax.tree.map(of, *trees)


def _restore(folder: epath.Path, params: Any, step: int | str | None,
             live: bool) -> checkpoints.Restored:
  found = checkpoints.restore(folder, _asked(params, live), step, partial=True)
  arrays = {path.partition('/')[2]: x
            for path, x in paths.flatten(found.state).items()}
  state = jax.tree_util.tree_map_with_path(
      lambda path, x: arrays[paths.join(path)].astype(x.dtype), params)
  is_average = 'ema' in found.state
  return checkpoints.Restored(found.step, state, found.record, found.damaged,
                            'the average (optim.ema)' if is_average else '')


def _asked(params: Any, live: bool) -> Callable:
  """Returns what to read of a checkpoint that holds the arrays it is given."""
  def asked(saved: dict[str, Any]):
    found = {}
    for path, x in paths.flatten(params).items():
      if not live and f'ema/{path}' in saved:
        found[f'ema/{path}'] = jax.ShapeDtypeStruct(
            x.shape, jnp.float32, sharding=x.sharding)
      else:
        found[f'params/{path}'] = x
    return checkpoints.nest(found)
  return asked


def _steps(folder: epath.Path, asked: checkpoints.Mean) -> list[int]:
  """Returns the steps whose mean is asked for, ascending."""
  there = checkpoints.steps(folder)
  if asked.steps:
    return sorted(asked.steps)
  require(len(there) >= asked.last, f'the mean of the last {asked.last} '
          f'checkpoints was asked for, and {folder} has {len(there)}: '
          f'{", ".join(map(str, there)) or "none"}')
  return there[-asked.last:]
