"""What a training step must send, before anything is compiled, and the least
time that a step can take: by its products, by memory, by the network.

Each of the three alone, at the published peak and perfectly overlapped with
the others, so the largest is a bound from below, and the model FLOPs
utilisation (MFU) at that time one from above. Real steps take longer.
"""

import functools
import math

import jax
import numpy as np

import architectures
from architectures.parts import layers, paths
from architectures.parts.moe.routing import MoEConfig
from common.errors import require
from tools.plan import collectives
from tools.plan.chips import Topology
from training import objectives, runs
from training.costs import flops, memory
from training.distributed import devices
from training.runs import parameter_roles


def sent(run: runs.Run, host_of: np.ndarray) -> list[collectives.Collective]:
  """Returns what a step must send: weights gathered, gradients reduced,
  products summed over `tensor`, tokens to experts and back.

  Args:
    run: on the topology's devices.
    host_of: as of collectives.read.
  """
  c, shape = run.model, run.mesh.shape
  accumulation = run.config.train.grad_accumulation
  itemsize = c.compute_dtype.itemsize
  batch = ('data', 'fsdp', 'expert')
  predicted = []

  def add(kind, axes, payload, times):
    size, hosts = _group(tuple(shape.items()), axes, host_of.tobytes())
    if size > 1:
      predicted.append(collectives.Collective(
          kind, axes, size, hosts, c.dtype, 0, payload, times))

  times = memory.gathers(run)
  for path, x in paths.flatten(run.abstract.params).items():
    shard = math.prod(x.sharding.shard_shape(x.shape)) * itemsize
    part, reads = shard, accumulation * layers.passes(c, path, back=True)
    for axis in reversed(memory.gathered(x.sharding)):  # one after the other
      add('reduce-scatter', (axis,), part, reads)  # of gradients
      part *= shape[axis]
      add('all-gather', (axis,), part, times[path] * accumulation)
    rest = tuple(a for a in batch if a not in memory.axes(x.sharding))
    add('all-reduce', rest, shard, reads)  # of gradients
  tokens = run.config.data.batch_size * sum(
      objectives.of(run.config).row_lengths(run.config))
  one = tokens * c.d_model * itemsize / math.prod(shape[a] for a in batch)
  both = architectures.stack(c) == 'encoder-decoder'
  sections = [section for n in (c.num_layers, c.num_decoder_layers)[:1 + both]
              for section in c.sections(n)]
  ahead, back = (sum((s._replace(passes=min(s.passes, layers.passes(
      c, '/layers/', way))).layers for s in sections), ())
                 for way in (False, True))
  kinds = ahead + (1 + layers.remat(c).again) * back
  parts = sum(1 + (kind.ffn != layers.NO_FFN) for kind in kinds)
  length, tensor = run.config.data.length, shape['tensor']
  if length % (shape['context'] * tensor):
    add('all-reduce', ('tensor',), one, parts)  # sums of products
  else:  # between the products, they lie over tensor: see configs/sharding.py
    for kind in ('reduce-scatter', 'all-gather'):
      add(kind, ('tensor',), one / tensor, parts)
  keys = 2 * c.num_kv_heads * c.head_dim / c.d_model / tensor
  add('all-gather', ('context',), keys * one, len(kinds))
  if c.has_experts:  # which cross twice in a pass: see parts/dispatch.py
    crossed = 2 * (ahead + (1 + (c.remat != 'none')) * back)
    add('all-to-all', ('expert',), c.part(MoEConfig).top_k * one,
        sum(kind.ffn == 'moe' for kind in crossed))
  return predicted


@functools.lru_cache
def _group(shape: tuple, axes: tuple[str, ...], host_of: bytes):
  """Returns (devices, hosts) of a group along some axes of a mesh."""
  names, sizes = zip(*shape)
  at = [names.index(axis) for axis in axes]
  hosts = np.frombuffer(host_of, np.int64).reshape(sizes)
  count = math.prod(sizes[i] for i in at)
  rows = np.moveaxis(hosts, at, range(-len(at), 0)).reshape(-1, count)
  return count, max(len(set(row)) for row in rows.tolist())


def peak_flops(topology: Topology, dtype: str) -> float:
  """Returns the published FLOP/s of one device, as jax multiplies `dtype`.

  Raises:
    RequestError: where none is published.
  """
  peak = flops.peak(topology.chip.kind, dtype, topology.chip.cores)
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
  Of the experts of a layer, as many are read as tokens choose in even load; of
  a table of embeddings, only some rows. In training, the state of what is
  trained is read and written besides.

  Args:
    run: on the topology's devices.
    products: bytes of the products of all devices together, where an array
      that each device has whole may count once.
    training: whether the program is the training step.
  """
  c, shape, state, back, accumulation = run.model, run.mesh.shape, 0, False, 1
  if training:
    accumulation = run.config.train.grad_accumulation
    state = 2 * sum((memory.state(run) | {
        'parameters': devices.on_device(memory.trained(run))}).values())
    # Below what is trained there is no backward pass.
    back = not (run.config.optim.freeze or c.lora.rank)
  roles, share = paths.flatten(parameter_roles(run.module)), 1.0
  if c.has_experts:
    data = run.config.data
    experts = c.part(MoEConfig).num_experts // devices.shards(
        'experts', shape, run.config.mesh.rules)
    share = min(experts, expert_rows(run, data.batch_size * (
        data.length - (not training)) // accumulation)) / experts
  gathered = accumulation * sum(
      (layers.passes(c, path) + back * layers.passes(c, path, back=True))
      * (share if 'experts' in roles[path].axes else 1)
      * memory.whole_size(x, shape)
      * min(c.compute_dtype.itemsize, x.dtype.itemsize)
      for path, x in paths.flatten(run.abstract.params).items()
      if roles[path].kind != 'embedding')
  return max(products / math.prod(shape.values()), gathered) + state


def expert_rows(run: runs.Run, tokens: float) -> int:
  """Returns the rows that a device has of so many tokens of all devices for the
  experts of a layer, in even load; 0: it has none."""
  if not run.model.has_experts:
    return 0
  return math.ceil(tokens * run.model.part(MoEConfig).top_k / devices.shards(
      'tokens', run.mesh.shape, run.config.mesh.rules))
