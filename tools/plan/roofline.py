"""The least time a step can take: by its products, by memory, by the network.

Each of the three alone, at the published peak and perfectly overlapped with
the others, so the largest is a bound from below, and the model FLOPs
utilisation (MFU) at that time one from above. Real steps take longer.
"""

import math

import jax

from configs.errors import require
from tools.plan.chips import Topology
from training import paths, runs
from training.costs import memory, peaks
from training.distributed import devices
from training.step import parameter_roles


def peak_flops(topology: Topology, dtype: str) -> float:
  """Returns the published FLOP/s of one device, as jax multiplies `dtype`.

  Raises:
    RequestError: where none is published.
  """
  peak = peaks.flops(topology.chip.kind, dtype, topology.chip.cores)
  precision = jax.config.jax_default_matmul_precision
  require(peak is not None, f'JAX_DEFAULT_MATMUL_PRECISION is {precision!r}, '
          f'and no peak of {topology.name} is published for '
          f'{dtype} products in it: unset it, or choose model.dtype=bfloat16')
  return peak


def times(topology: Topology, dtype: str, *, flops: float, hbm_bytes: float,
          sent: float, sent_outside: float, model_flops: float) -> dict:
  """Returns seconds a step, the bound and the highest MFU.

  Args:
    topology: whose figures to take.
    dtype: of the products.
    flops: of one device, recomputation included.
    hbm_bytes: that one device reads and writes.
    sent: bytes that a device sends within its slice or host.
    sent_outside: likewise between slices or hosts.
    model_flops: of one device, what the model needs and no more.
  """
  chip, peak = topology.chip, peak_flops(topology, dtype)
  seconds = {'compute': flops / peak, 'hbm': hbm_bytes / chip.hbm_rate,
             'network': sent / chip.links}
  if sent_outside and chip.outside:
    seconds['network_outside'] = sent_outside / chip.outside
  bound = max(seconds, key=seconds.get)
  step = seconds[bound]
  return dict(
      seconds=seconds, bound=bound, step_seconds=step,
      highest_mfu=model_flops / peak / step if step else 0.0,
      peak_flops=peak,
      unknown=['network_outside'] if sent_outside and not chip.outside else [])


def hbm_bytes(run: runs.Run, products: float, training: bool) -> float:
  """Returns bytes that a device moves to and from its memory, at least.

  They are its share of the operands and results of the products, once each,
  or, if these are more, the weights (gathered), which are among the operands:
  read once, and in training, if all are trained, again by the backward pass.
  Of the experts of a layer, those that `experts` tells are read; of a table of
  embeddings, only some rows. In training, the state of what is trained is read
  and written besides.

  Args:
    run: on the topology's devices.
    products: bytes of the products of all devices together, where an array
      that each device has whole may count once.
    training: whether the program is the training step.
  """
  c, shape, state = run.model, run.mesh.shape, 0
  passes = 1
  if training:
    held = memory.state(run) | {
        'parameters': memory.on_device(memory.trained(run))}
    state = 2 * sum(held.values())
    # Below what is trained there is no backward pass.
    back = not (run.config.optim.freeze or c.lora.rank)
    passes = (1 + back) * run.config.train.grad_accumulation
  roles = paths.flatten(parameter_roles(run.module))
  data = run.config.data
  read, held = experts(run, data.batch_size * (data.length - (not training))
                       // run.config.train.grad_accumulation)
  gathered = sum(
      (read / held if 'experts' in roles[path].axes else 1)
      * math.prod(x.sharding.shard_shape(x.shape))
      * math.prod(shape[axis] for axis in memory.gathered(x.sharding))
      * min(c.compute_dtype.itemsize, x.dtype.itemsize)
      for path, x in paths.flatten(run.abstract.params).items()
      if roles[path].kind != 'embedding')
  return max(products / math.prod(shape.values()), passes * gathered) + state


def experts(run: runs.Run, tokens: int) -> tuple[int, int]:
  """Returns of how many experts of a layer a device reads the weights for so
  many tokens of all devices, and how many it has: in even load, as many as
  tokens choose them, if that is fewer. Without experts: one of one."""
  if not run.model.has_experts:
    return 1, 1
  m, shape, rules = run.model.moe, run.mesh.shape, run.config.mesh.rules
  held = m.num_experts // devices.shards('experts', shape, rules)
  return min(held, expert_rows(run, tokens)), held


def expert_rows(run: runs.Run, tokens: float) -> int:
  """Returns the rows that a device has of so many tokens of all devices for the
  experts of a layer, in even load; 0: it has none."""
  if not run.model.has_experts:
    return 0
  return math.ceil(tokens * run.model.moe.top_k / devices.shards(
      'tokens', run.mesh.shape, run.config.mesh.rules))
