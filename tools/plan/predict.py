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


def predict_collectives(run: runs.Run, host_of_device: np.ndarray
                        ) -> list[collectives.Collective]:
  """Predicts, without compiling, which collectives (communication between
  devices) a training step must run: those that gather sharded weights, sum
  gradients, sum products over the mesh axis `tensor`, and carry tokens to
  experts and back.

  Args:
    run: the run, on the topology's devices.
    host_of_device: int [devices], the number of the slice (TPU) or host (GPU)
      of each device, in the order of the mesh.

  Returns:
    The collectives, each with the number of its runs in a step.
  """
  step = _Step(run, host_of_device)
  num_gathers = memory.gathers_per_step(run)
  parameters = paths.flatten_by_path(run.abstract_state.params)
  for path, parameter in parameters.items():
    step.add_parameter(path, parameter, gathers=num_gathers[path])
  step.add_layers()
  return step.sent


class _Step:
  """The collectives that a training step must run, added one by one."""

  def __init__(self, run: runs.Run, host_of_device: np.ndarray):
    self.run, self.model, self.mesh = run, run.model, run.mesh.shape
    self.host_of_device = host_of_device
    self.accumulation = run.config.train.grad_accumulation
    self.itemsize = run.model.compute_dtype.itemsize
    self.sent: list[collectives.Collective] = []

  def add(self, kind: str, axes: tuple[str, ...], payload: float,
          times: int) -> None:
    """Adds a collective along some mesh axes, if these have several devices.

    Args:
      kind: the kind of collective, such as 'all-gather'.
      axes: the mesh axes along which the devices of a group differ.
      payload: the bytes of its result on one device.
      times: how often a step runs it.
    """
    size_of_axes = tuple(self.mesh.items())
    # Results are cached by the arguments, so the array is given as bytes.
    size, hosts = _size_of_group(size_of_axes, axes,
                                 self.host_of_device.tobytes())
    if size > 1:
      self.sent.append(collectives.Collective(
          kind=kind, axes=axes, size=size, hosts=hosts, dtype=self.model.dtype,
          elements=0, payload=payload, runs=times))

  def add_parameter(self, path: str, parameter: jax.ShapeDtypeStruct,
                    gathers: int) -> None:
    """Adds the collectives that gather a parameter and reduce its gradients.

    Args:
      path: the path of the parameter.
      parameter: its shape, dtype and sharding.
      gathers: how often a micro-batch gathers it.
    """
    # Each time that the backward pass reads the parameter, there is a gradient
    # that must be summed over devices.
    sharding: Any = parameter.sharding
    shard_size = math.prod(sharding.shard_shape(parameter.shape))
    shard_bytes = shard_size * self.itemsize
    reads = layers.count_reads_of_weight(self.model, path, back=True)
    reductions = self.accumulation * reads

    # Gather the parameter along one mesh axis after the other, so that a device
    # holds more of it with each. The gradient is scattered the other way. The
    # payload of either is its result: of an all-gather the larger array, of a
    # reduce-scatter the smaller one.
    nbytes = shard_bytes
    for axis in reversed(memory.gathered_axes(sharding)):
      self.add('reduce-scatter', (axis,), payload=nbytes, times=reductions)
      nbytes *= self.mesh[axis]
      self.add('all-gather', (axis,), payload=nbytes,
               times=gathers * self.accumulation)

    # Its gradients are summed over the axes of the batch that do not shard it.
    sharded_axes = memory.sharded_axes(sharding)
    whole_axes = tuple(axis for axis in _BATCH_AXES if axis not in sharded_axes)
    self.add('all-reduce', whole_axes, payload=shard_bytes, times=reductions)

  def add_layers(self) -> None:
    """Adds the collectives that carry activations from device to device."""
    model, mesh, data = self.model, self.mesh, self.run.config.data
    tensor = mesh['tensor']

    # Count the bytes of an activation on a device.
    objective = objectives.find_objective(self.run.config)
    lengths = objective.row_lengths(self.run.config)
    tokens = data.batch_size * sum(lengths)
    shards = math.prod(mesh[axis] for axis in _BATCH_AXES)
    activation = tokens * model.d_model * self.itemsize / shards

    # List the layers that run in a step. If the remat policy recomputes
    # products, the backward pass runs them forward once more.
    forward_layers = _layers_of_pass(model, back=False)
    backward_layers = _layers_of_pass(model, back=True)
    run_layers = forward_layers + backward_layers
    if layers.remat_of_model(model).recomputes_products:
      run_layers += backward_layers

    # Along `tensor`, the products of each mixer and each feed-forward network
    # are summed. Between these, activations are split over `tensor` too, if the
    # length divides (see configs/sharding.py), and the sum is in two steps.
    num_networks = sum(layer.ffn != layers.NO_FFN for layer in run_layers)
    num_sums = len(run_layers) + num_networks
    if data.length % (mesh['context'] * tensor):
      self.add('all-reduce', ('tensor',), payload=activation, times=num_sums)
    else:
      piece = activation / tensor
      self.add('reduce-scatter', ('tensor',), payload=piece, times=num_sums)
      self.add('all-gather', ('tensor',), payload=piece, times=num_sums)

    # Along `context`, each device needs the keys and values of all tokens.
    kv_size = 2 * model.num_kv_heads * model.head_dim / model.d_model / tensor
    self.add('all-gather', ('context',), payload=kv_size * activation,
             times=len(run_layers))

    # Along `expert`, tokens are sent to their experts and back again in each
    # pass of a layer with experts (see parts/moe/dispatch.py).
    if model.has_experts:
      sending_layers = forward_layers + backward_layers
      if model.remat != 'none':
        sending_layers += backward_layers
      times = sum(2 for layer in sending_layers if layer.ffn == 'moe')
      payload = model.part(MoEConfig).top_k * activation
      self.add('all-to-all', ('expert',), payload=payload, times=times)


def _layers_of_pass(model: ModelConfig, back: bool) -> tuple[LayerKind, ...]:
  """Lists the layers that the forward pass or the backward pass runs, in their
  order. With model.loop, a section of layers is run several times.

  Args:
    model: the config of the model.
    back: whether to list the layers of the backward pass, which may run a
      section less often than the forward pass does.

  Returns:
    The kind of each layer, repeated as often as the layer is run.
  """
  # '/layers/' is in the path of the parameters of all layers that are repeated,
  # so a weight there is read as often as these layers are run.
  max_repeats = layers.count_reads_of_weight(model, '/layers/', back=back)
  lengths_of_stacks = [model.num_layers]
  if architectures.stack(model) == 'encoder-decoder':
    lengths_of_stacks.append(model.num_decoder_layers)
  layer_kinds: tuple[LayerKind, ...] = ()
  for num_layers in lengths_of_stacks:
    for section in model.sections(num_layers):
      repeats = min(section.passes, max_repeats)
      layer_kinds += section._replace(passes=repeats).layers
  return layer_kinds


@functools.lru_cache
def _size_of_group(size_of_axes: tuple, axes: tuple[str, ...],
                   host_of_device: bytes) -> tuple[int, int]:
  """Returns the sizes of a group of devices that communicate along some axes of
  a mesh. All arguments are hashable, because results are cached.

  Args:
    size_of_axes: pairs of the name of a mesh axis and its size, for all axes.
    axes: the mesh axes along which the devices of a group differ.
    host_of_device: the bytes of an int64 array [devices] with the number of the
      host of each device, in the order of the mesh.

  Returns:
    The number of devices in a group, and the number of hosts that a group spans
    at most.
  """
  names, sizes = zip(*size_of_axes)
  dimensions = [names.index(axis) for axis in axes]
  group_size = math.prod(sizes[i] for i in dimensions)

  # Move the axes of a group to the end, so that the reshape makes each group a
  # row, [groups, devices of a group]. Then count the hosts in each row.
  hosts = np.frombuffer(host_of_device, np.int64).reshape(sizes)
  hosts = np.moveaxis(hosts, dimensions, range(-len(dimensions), 0))
  hosts_of_groups = hosts.reshape(-1, group_size).tolist()
  return group_size, max(len(set(group)) for group in hosts_of_groups)


def require_peak_flops(topology: Topology, dtype: str) -> float:
  """Returns the published peak FLOP/s of one device.

  Args:
    topology: the devices.
    dtype: the type of the products.

  Raises:
    RequestError: if none is published for products of this type in the
      precision that jax is set to.
  """
  chip = topology.chip
  peak = flops.peak_flops_per_second(chip.device_kind, dtype, cores=chip.cores)
  precision = jax.config.jax_default_matmul_precision
  require(peak is not None, f'JAX_DEFAULT_MATMUL_PRECISION is {precision!r}, '
          f'and no peak of {topology.name} is published for '
          f'{dtype} products in it: unset it, or choose model.dtype=bfloat16')
  return peak


def step_times(topology: Topology, dtype: str, *, flops: float,
               hbm_bytes: float, sent: float, sent_outside: float,
               model_flops: float) -> dict:
  """Returns the roofline of a step (Williams et al. 2009): the least seconds
  that its products, its memory traffic and its network traffic each take. All
  of them at once, the step takes the longest of these times:

    step_seconds = max over the bounds of amount / published rate
    highest_mfu = model_flops / (peak_flops * step_seconds)

  Args:
    topology: the devices, whose published figures are taken.
    dtype: the type of the products.
    flops: the FLOPs that one device computes, recomputation included.
    hbm_bytes: the bytes that one device reads from its memory and writes to it.
    sent: the bytes that a device sends within its slice or host.
    sent_outside: the bytes that it sends to other slices or hosts.
    model_flops: the FLOPs that the model needs of one device, without
      recomputation.

  Returns:
    seconds: the least time by each bound.
    bound: the name of the bound with the longest time.
    step_seconds: that time.
    highest_mfu: the model FLOPs utilisation of a step that takes that time.
    peak_flops: the peak FLOP/s of a device.
    unknown: the bounds for which no figure is published.
  """
  # For some chips no rate between slices or hosts is published.
  chip = topology.chip
  peak = require_peak_flops(topology, dtype)
  seconds = {
      'compute': flops / peak,
      'hbm': hbm_bytes / chip.hbm_rate,
      'network': sent / chip.link_rate,
  }
  unknown = []
  if sent_outside and chip.outside_rate:
    seconds['network_outside'] = sent_outside / chip.outside_rate
  elif sent_outside:
    unknown.append('network_outside')

  bound = max(seconds, key=seconds.get)
  step_seconds = seconds[bound]
  highest_mfu = 0.0
  if step_seconds:
    highest_mfu = model_flops / peak / step_seconds
  return dict(
      seconds=seconds, bound=bound, step_seconds=step_seconds,
      highest_mfu=highest_mfu, peak_flops=peak, unknown=unknown)


def memory_traffic(run: runs.Run, products: float, training: bool) -> float:
  """Returns the bytes that a device moves to and from its memory in a step, at
  the least.

  There are two lower bounds, of which the larger one is taken. The first is the
  device's share of the operands and results of all products, once each. The
  second is the gathered weights, which are among these operands: they are read
  once, and in training, if all are trained, again by the backward pass. The
  experts that no token chooses and tables of embeddings are left out. In
  training, the state of all trained parameters is read and written besides.

  Args:
    run: the run, on the topology's devices.
    products: the bytes of the operands and results of all products, on all
      devices together. An array that each device holds whole may count once.
    training: whether the program is the training step.
  """
  model = run.model
  mesh = run.mesh.shape

  # A training step reads and writes the state once.
  state = 0
  has_backward_pass = False
  accumulation = 1
  if training:
    accumulation = run.config.train.grad_accumulation
    trained = devices.bytes_on_one_device(memory.trained_parameters(run))
    state_bytes = memory.state_bytes(run) | {'parameters': trained}
    state = 2 * sum(state_bytes.values())
    # If some parameters are frozen, the backward pass may not reach all
    # weights.
    has_backward_pass = not (run.config.optim.freeze or model.lora.rank)

  # Sum the gathered weights that a micro-batch reads, times their reads.
  roles = paths.flatten_by_path(parameter_roles(run.module))
  share_of_experts = _share_of_experts_read(
      run, training=training, accumulation=accumulation)
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


def _share_of_experts_read(run: runs.Run, training: bool, accumulation: int
                           ) -> float:
  """Returns the share of a device's experts whose weights a micro-batch reads
  from memory, at the most.

  A device with E experts in a layer gets r rows of activations for them, each
  of which goes to one expert. So no more than r experts get any row, and the
  others need not be read:

    share = min(E, r) / E

  All experts are taken to get equally many rows.

  Args:
    run: the run, on the topology's devices.
    training: whether the program is the training step. A generation does not
      read the last token of a row.
    accumulation: the number of micro-batches of a step.
  """
  if not run.model.has_experts:
    return 1.0
  # The tokens of a micro-batch, on all devices.
  length = run.config.data.length
  if not training:
    length -= 1
  num_tokens = run.config.data.batch_size * length // accumulation

  # The experts of one device, and the rows of activations that come to it.
  shards = devices.num_shards('experts', run.mesh.shape, run.config.mesh.rules)
  num_experts = run.model.part(MoEConfig).num_experts // shards
  num_rows = rows_of_experts(run, num_tokens)
  return min(num_experts, num_rows) / num_experts


def rows_of_experts(run: runs.Run, tokens: float) -> int:
  """Returns the number of rows of activations that one device has for the
  experts of a layer. A token that goes to top_k experts has a row for each of
  them:

    rows = ceil(tokens * top_k / devices that share the tokens)

  All experts are taken to get equally many tokens. A model without experts has
  0 rows.

  Args:
    run: the run, on the topology's devices.
    tokens: the number of tokens on all devices together.
  """
  if not run.model.has_experts:
    return 0
  shards = devices.num_shards('tokens', run.mesh.shape, run.config.mesh.rules)
  rows_of_all_devices = tokens * run.model.part(MoEConfig).top_k
  return math.ceil(rows_of_all_devices / shards)
