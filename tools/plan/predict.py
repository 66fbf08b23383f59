"""Predicts the bytes that a training step must send, before anything is
compiled, and the least time that a step can take.

Compute, memory and the network each bound that time alone, at the published
peak and perfectly overlapped with the others. So the longest of the three is a
bound from below, and the model FLOPs utilisation (MFU) at that time is one from
above. Real steps take longer.
"""

import functools
import math
from typing import Any

import jax
import numpy as np

import architectures
from architectures.parts import layers, paths
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.moe.routing import MoEConfig
from common.errors import require
from tools.plan import collectives
from tools.plan.chips import Topology
from training import objectives, runs
from training.costs import flops, memory
from training.distributed import devices
from training.runs import parameter_roles

_BATCH_AXES = ('data', 'fsdp', 'expert')


def predict_collectives(run: runs.Run, host_of: np.ndarray
                        ) -> list[collectives.Collective]:
  """Returns the collectives that a step must run: they gather weights, reduce
  gradients, sum products over `tensor`, and carry tokens to experts and back.

  Args:
    run: the run, on the topology's devices.
    host_of: as in collectives.read.
  """
  step = _Step(run, host_of)
  times = memory.gathers_per_step(run)
  for path, x in paths.flatten_by_path(run.abstract_state.params).items():
    step.add_parameter(path, x, times[path])
  step.add_layers()
  return step.sent


class _Step:
  """The collectives that a training step must run, added one by one."""

  def __init__(self, run: runs.Run, host_of: np.ndarray):
    self.run, self.model, self.mesh = run, run.model, run.mesh.shape
    self.host_of = host_of
    self.accumulation = run.config.train.grad_accumulation
    self.itemsize = run.model.compute_dtype.itemsize
    self.sent: list[collectives.Collective] = []

  def add(self, kind: str, axes: tuple[str, ...], payload: float,
          times: int) -> None:
    """Adds a collective along some axes, if these have several devices."""
    shape = tuple(self.mesh.items())
    size, hosts = _size_of_group(shape, axes, self.host_of.tobytes())
    if size > 1:
      self.sent.append(collectives.Collective(
          kind=kind, axes=axes, size=size, hosts=hosts, dtype=self.model.dtype,
          elements=0, payload=payload, runs=times))

  def add_parameter(self, path: str, x: Any, gathers: int) -> None:
    """Adds what gathers a parameter and reduces its gradients.

    Args:
      path: the path of the parameter.
      x: its shape, dtype and sharding.
      gathers: how often a micro-batch gathers it.
    """
    shard = math.prod(x.sharding.shard_shape(x.shape)) * self.itemsize
    reads = layers.count_reads_of_weight(self.model, path, back=True)
    reductions = self.accumulation * reads

    # It is gathered along one axis after the other, so it grows on the way.
    part = shard
    for axis in reversed(memory.gathered_axes(x.sharding)):
      self.add('reduce-scatter', (axis,), part, reductions)
      part *= self.mesh[axis]
      self.add('all-gather', (axis,), part, gathers * self.accumulation)

    # Its gradients are summed over the axes of the batch that do not shard it.
    sharded = memory.sharded_axes(x.sharding)
    rest = tuple(axis for axis in _BATCH_AXES if axis not in sharded)
    self.add('all-reduce', rest, shard, reductions)

  def add_layers(self) -> None:
    """Adds what carries activations from device to device."""
    model, mesh, data = self.model, self.mesh, self.run.config.data
    tensor = mesh['tensor']

    # The bytes of an activation on a device, and the layers that run.
    lengths = objectives.find_objective(
        self.run.config).row_lengths(self.run.config)
    tokens = data.batch_size * sum(lengths)
    shards = math.prod(mesh[axis] for axis in _BATCH_AXES)
    activation = tokens * model.d_model * self.itemsize / shards
    ahead = _layers_run(model, back=False)
    back = _layers_run(model, back=True)
    kinds = ahead + back
    if layers.remat_of_model(model).recomputes_products:
      kinds += back

    # Over tensor, the products of a mixer and of a network are summed. Between
    # these, activations lie over tensor too: see configs/sharding.py.
    products = len(kinds) + sum(kind.ffn != layers.NO_FFN for kind in kinds)
    if data.length % (mesh['context'] * tensor):
      self.add('all-reduce', ('tensor',), activation, products)
    else:
      part = activation / tensor
      self.add('reduce-scatter', ('tensor',), part, products)
      self.add('all-gather', ('tensor',), part, products)

    # Over context, each device needs the keys and values of all tokens.
    keys = 2 * model.num_kv_heads * model.head_dim / model.d_model / tensor
    self.add('all-gather', ('context',), keys * activation, len(kinds))

    # To experts, tokens cross twice in a pass: see parts/moe/dispatch.py.
    if model.has_experts:
      crossed = ahead + back
      if model.remat != 'none':
        crossed += back
      times = sum(2 for kind in crossed if kind.ffn == 'moe')
      rows = model.part(MoEConfig).top_k * activation
      self.add('all-to-all', ('expert',), rows, times)


def _layers_run(model: ModelConfig, back: bool) -> tuple[LayerKind, ...]:
  """Returns the kind of each layer that a forward pass runs, or, with `back`, a
  backward pass: a looped layer once for each of its passes."""
  stacks = [model.num_layers]
  if architectures.stack(model) == 'encoder-decoder':
    stacks.append(model.num_decoder_layers)
  most = layers.count_reads_of_weight(model, '/layers/', back)
  kinds: tuple[LayerKind, ...] = ()
  for num_layers in stacks:
    for section in model.sections(num_layers):
      passes = min(section.passes, most)
      kinds += section._replace(passes=passes).layers
  return kinds


@functools.lru_cache
def _size_of_group(shape: tuple, axes: tuple[str, ...], host_of: bytes
                   ) -> tuple[int, int]:
  """Returns the number of devices, and of hosts, of a group along some axes of
  a mesh."""
  names, sizes = zip(*shape)
  at = [names.index(axis) for axis in axes]
  hosts = np.frombuffer(host_of, np.int64).reshape(sizes)
  count = math.prod(sizes[i] for i in at)
  rows = np.moveaxis(hosts, at, range(-len(at), 0)).reshape(-1, count)
  return count, max(len(set(group)) for group in rows.tolist())


def require_peak_flops(topology: Topology, dtype: str) -> float:
  """Returns the published FLOP/s of one device, as jax multiplies `dtype`.

  Raises:
    RequestError: where none is published.
  """
  chip = topology.chip
  peak = flops.peak_flops_per_second(chip.kind, dtype, cores=chip.cores)
  precision = jax.config.jax_default_matmul_precision
  require(peak is not None, f'JAX_DEFAULT_MATMUL_PRECISION is {precision!r}, '
          f'and no peak of {topology.name} is published for '
          f'{dtype} products in it: unset it, or choose model.dtype=bfloat16')
  return peak


def step_times(topology: Topology, dtype: str, *, flops: float,
               hbm_bytes: float, sent: float, sent_outside: float,
               model_flops: float) -> dict:
  """Returns the roofline of a step: the least seconds that it takes by its
  products, by its memory traffic and by what it sends.

  Args:
    topology: the devices, whose published figures are taken.
    dtype: the dtype of the products.
    flops: the FLOPs of one device, recomputation included.
    hbm_bytes: the bytes that one device reads and writes.
    sent: the bytes that a device sends within its slice or host.
    sent_outside: the bytes that it sends to other slices or hosts.
    model_flops: the FLOPs that the model needs of one device, and no more.

  Returns:
    seconds: the least time by each bound.
    bound: the name of the bound with the longest time.
    step_seconds: that time.
    highest_mfu: the model FLOPs utilisation of a step that takes that time.
    peak_flops: the peak FLOP/s of a device.
    unknown: the bounds of which no figure is published.
  """
  chip = topology.chip
  peak = require_peak_flops(topology, dtype)
  seconds = {
      'compute': flops / peak,
      'hbm': hbm_bytes / chip.hbm_rate,
      'network': sent / chip.links,
  }
  unknown = []
  if sent_outside and chip.outside:
    seconds['network_outside'] = sent_outside / chip.outside
  elif sent_outside:
    unknown.append('network_outside')

  bound = max(seconds, key=seconds.get)
  step = seconds[bound]
  highest_mfu = 0.0
  if step:
    highest_mfu = model_flops / peak / step
  return dict(
      seconds=seconds, bound=bound, step_seconds=step, highest_mfu=highest_mfu,
      peak_flops=peak, unknown=unknown)


def memory_traffic(run: runs.Run, products: float, training: bool) -> float:
  """Returns the bytes that a device moves to and from its memory in a step, at
  the least.

  They are the larger of two sums. The first is the device's share of the
  operands and results of all products, once each. The second is the gathered
  weights, which are among the operands: they are read once, and in training, if
  all are trained, again by the backward pass. Of a layer's experts as many are
  read as tokens choose in even load, and of a table of embeddings only some
  rows. In training, the state of what is trained is read and written besides.

  Args:
    run: the run, on the topology's devices.
    products: the bytes of the products of all devices together, where an array
      that each device has whole may count once.
    training: whether the program is the training step.
  """
  model = run.model
  mesh = run.mesh.shape

  # The state is read and written once.
  state = 0
  has_backward_pass = False
  accumulation = 1
  if training:
    accumulation = run.config.train.grad_accumulation
    trained = devices.bytes_on_one_device(memory.trained_parameters(run))
    state_bytes = memory.state_bytes(run) | {'parameters': trained}
    state = 2 * sum(state_bytes.values())
    # Where some parameters are frozen, the backward pass may not reach them.
    has_backward_pass = not (run.config.optim.freeze or model.lora.rank)

  # Each weight is read whole, but only the experts that tokens choose.
  roles = paths.flatten_by_path(parameter_roles(run.module))
  share_of_experts = _share_of_experts(run, training, accumulation)
  weights = 0.0
  for path, x in paths.flatten_by_path(run.abstract_state.params).items():
    role = roles[path]
    if role.kind == 'embedding':
      continue
    reads = layers.count_reads_of_weight(model, path)
    if has_backward_pass:
      reads += layers.count_reads_of_weight(model, path, back=True)
    if 'experts' in role.axes:
      reads *= share_of_experts
    itemsize = min(model.compute_dtype.itemsize, x.dtype.itemsize)
    weights += reads * memory.gathered_size(x, mesh) * itemsize

  operands = products / math.prod(mesh.values())
  return max(operands, accumulation * weights) + state


def _share_of_experts(run: runs.Run, training: bool, accumulation: int
                      ) -> float:
  """Returns the share of a device's experts that a micro-batch is sent to in
  even load. A generation does not read the last token of a row."""
  if not run.model.has_experts:
    return 1.0
  length = run.config.data.length
  if not training:
    length -= 1
  tokens = run.config.data.batch_size * length // accumulation
  shards = devices.num_shards('experts', run.mesh.shape, run.config.mesh.rules)
  experts = run.model.part(MoEConfig).num_experts // shards
  return min(experts, rows_of_experts(run, tokens)) / experts


def rows_of_experts(run: runs.Run, tokens: float) -> int:
  """Returns the rows that a device has for the experts of a layer, in even
  load; 0: it has none.

  Args:
    run: the run, on the topology's devices.
    tokens: the tokens of all devices.
  """
  if not run.model.has_experts:
    return 0
  shards = devices.num_shards('tokens', run.mesh.shape, run.config.mesh.rules)
  return math.ceil(tokens * run.model.part(MoEConfig).top_k / shards)
