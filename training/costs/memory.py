"""The memory that a run takes on a device, from shapes and shardings alone."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
import architectures
from architectures.parts import blocks, layers, paths, positions
from architectures.parts.attention import kernels
from architectures.parts.attention.indexer import IndexerConfig
from architectures.parts.config import ModelConfig
from architectures.parts.moe.routing import MoEConfig
from training import objectives, runs
from training.distributed import devices
from training.objectives import Config
from training.optim import shares
from training.runs import parameter_roles, parameter_shares


def state_bytes(run: runs.Run) -> dict[str, int]:
  """Returns the bytes on a device of a run's parameters, optimiser state, and
  with optim.ema of the average of the parameters."""
  nbytes = {
      'parameters': devices.bytes_on_one_device(run.abstract_state.params),
      'optimizer': devices.bytes_on_one_device(run.abstract_state.opt_state),
  }
  if run.abstract_state.ema is not None:
    nbytes['average'] = devices.bytes_on_one_device(run.abstract_state.ema)
  return nbytes


def trained_parameters(run: runs.Run):
  """Returns the shapes of a run's parameters that have a gradient: those that
  are not frozen."""
  rate_shares = parameter_shares(run.module, run.config.optim)
  return shares.keep_trained(rate_shares, run.abstract_state.params)


def sharded_axes(sharding: Any) -> set[str]:
  """Returns the mesh axes that an array's sharding names."""
  names: set[str] = set()
  for entry in sharding.spec:
    names.update(_axes_of_entry(entry))
  return names


def gathered_axes(sharding: Any) -> tuple[str, ...]:
  """Returns the mesh axes over which a weight is gathered before it is used in
  a product: fsdp, and the axes that split the same dimension as fsdp does."""
  for entry in sharding.spec:
    if 'fsdp' in _axes_of_entry(entry):
      return _axes_of_entry(entry)
  return ()


def _axes_of_entry(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes of one entry of a PartitionSpec."""
  if isinstance(entry, str):
    return (entry,)
  return tuple(entry or ())


def run_on_described_mesh(config: Config, model: ModelConfig,
                          mesh_shape: Mapping[str, int]) -> runs.Run:
  """Returns a run on an abstract mesh, whose devices are not there: its arrays
  have shapes and shardings, but nothing can be computed.

  Args:
    config: the config of the run.
    model: the model of the run, resolved.
    mesh_shape: the number of devices along each mesh axis.
  """
  # Describe the mesh, and check that the run can be split over it.
  axis_types = (AxisType.Auto,) * len(mesh_shape)
  mesh = AbstractMesh(tuple(mesh_shape.values()), tuple(mesh_shape),
                      axis_types=axis_types)
  runs.check_mesh(config, model, mesh_shape)

  # The kernels that the config names may not run on the device that is here, so
  # the program is traced with kernels that do. The run keeps its own model.
  traced = dataclasses.replace(model, attention_kernel='auto')
  traced = traced.with_part(MoEConfig, grouped_kernel='auto')
  run = runs.Run.build_on_mesh(config, traced, mesh)
  return dataclasses.replace(run, model=model)


def estimate_peak_bytes(run: runs.Run,
                        bytes_in_all: tuple[int, int] | None = None,
                        platform: str = 'cpu') -> dict[str, int]:
  """Estimates the peak memory of a training step on a device, without compiling
  it.

  It is the sum of the state, the gradients, the activations that are kept for
  the backward pass (traced, so that the config's remat policy counts), the
  weights that stay gathered, and the largest arrays that exist within one
  layer: attention's scores or the hidden units, and the gathered weights.

  Args:
    run: the run, on any devices.
    bytes_in_all: the bytes of kept activations on all devices and on all hosts,
      as `bytes_kept_for_backward` returns them; None: the step is traced here.
    platform: the platform of the devices. On tpu, splash attention writes no
      scores where it can do the model's attention; elsewhere they are counted.

  Returns:
    The bytes of each of these by its name; their sum as `peak`; and
    `host_memory`, if activations are kept in the memory of the host.
  """
  model = run.model
  mesh_shape = run.mesh.shape
  rules = run.config.mesh.rules
  length = run.config.data.length
  itemsize = model.compute_dtype.itemsize
  micro_batches = run.config.train.grad_accumulation

  # The state, and the gradients, which are summed in float32.
  parts = state_bytes(run)
  gradients = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
      trained_parameters(run))
  parts['gradients'] = devices.bytes_on_one_device(gradients)

  # The activations that a micro-batch keeps on this device. They are split over
  # devices in the same way as activations between the layers.
  if bytes_in_all is None:
    bytes_in_all = bytes_kept_for_backward(run)
  on_devices, in_hosts = bytes_in_all
  num_stream_shards = devices.num_stream_shards(mesh_shape, rules, length)
  num_pieces = micro_batches * num_stream_shards
  parts['kept_for_backward'] = on_devices // num_pieces

  # Weights that stay gathered from the forward pass to the backward one.
  params = paths.flatten_by_path(run.abstract_state.params)
  if model.keep_gathered != 'none':
    num_kept = _size_of_kept_gathered_weights(run, params)
    parts['kept_gathered'] = itemsize * num_kept

  # The largest arrays of one layer: the scores, or three arrays of hidden units
  # (their values, their gradient and the input of the activation); and two of a
  # weight (the gathered weight and its gradient).
  batch_tokens = run.config.data.batch_size * length
  token_shards = devices.num_shards('tokens', mesh_shape, rules)
  tokens = batch_tokens // (micro_batches * token_shards)
  widest = 0
  for layer in model.distinct_layers:
    scores = _score_bytes(run.config, layer=layer, tokens=tokens,
                          platform=platform)
    hidden = 3 * itemsize * tokens * _hidden_units(layer)
    widest = max(widest, scores, hidden)
  weights = 2 * itemsize * _largest_weight_of_layer(run, params)
  weight_shards = mesh_shape['tensor'] * mesh_shape['expert']
  parts['one_layer'] = widest // mesh_shape['tensor'] + weights // weight_shards

  # The sum is taken before host_memory is added, which is on no device.
  parts['peak'] = sum(parts.values())
  if in_hosts // num_pieces:
    parts['host_memory'] = in_hosts // num_pieces
  return parts


def _size_of_kept_gathered_weights(run: runs.Run, params: Mapping[str, Any]
                                   ) -> int:
  """Returns how many numbers a device holds of the weights that stay gathered
  from the forward pass to the backward pass: those that a step gathers once.

  Args:
    run: the run.
    params: the shapes of its parameters, with shardings, by path.
  """
  num_gathers = gathers_per_step(run)
  total = 0
  for path, x in params.items():
    if gathered_axes(x.sharding) and num_gathers[path] == 1:
      total += gathered_size(x, run.mesh.shape)
  return total


def _largest_weight_of_layer(run: runs.Run, params: Mapping[str, Any]) -> int:
  """Returns how many numbers the largest weight of one layer has, apart from
  tables whose rows are looked up.

  Args:
    run: the run.
    params: the shapes of its parameters, by path.
  """
  roles = paths.flatten_by_path(parameter_roles(run.module))
  largest = 0
  for path, x in params.items():
    if paths.Stacks.is_in_stack(path) and not roles[path].reads:
      # The first axis is that of the layers of the stack.
      largest = max(largest, x.size // x.shape[0])
  return largest


def gathers_per_step(run: runs.Run) -> dict[str, int]:
  """Returns how often a training step gathers each parameter that is sharded
  over fsdp, by the path of the parameter."""
  roles = paths.flatten_by_path(parameter_roles(run.module))
  return {path: layers.count_gathers_of_weight(run.model, path, axes=role.axes)
          for path, role in roles.items()}


def gathered_size(x: Any, mesh_shape: Mapping[str, int]) -> int:
  """Returns how many numbers of a weight a device holds after it is gathered.

  Args:
    x: the shape of the weight, with its sharding.
    mesh_shape: the number of devices along each mesh axis.
  """
  size_of_shard = math.prod(x.sharding.shard_shape(x.shape))
  num_shards = math.prod(mesh_shape[axis] for axis in gathered_axes(x.sharding))
  return size_of_shard * num_shards


def _hidden_units(layer: ModelConfig) -> int:
  """Returns how many hidden units a layer's feed-forward network computes for a
  token: those of all experts that the token goes through."""
  if layer.ffn == layers.NO_FFN:
    return 0
  if layer.ffn != 'moe':
    return layer.d_ff
  moe = layer.part(MoEConfig)
  return moe.d_ff * moe.top_k


def _score_bytes(config: Config, layer: ModelConfig, tokens: int, platform: str
                 ) -> int:
  """Returns the bytes of the attention scores of a layer; 0 where a fused
  kernel never writes them.

  Args:
    config: the config of the run.
    layer: the model's config as the layer reads it.
    tokens: the number of tokens on a device.
    platform: the platform of the device.
  """
  # A recurrence has no scores. It has other float32 numbers for each token that
  # exist at the same time.
  mixer = blocks.mixer_of_layers(layer)
  length = config.data.length
  if not mixer.has_scores:
    return 4 * tokens * mixer.widest_step_of_token(layer, length)

  # Splash, a fused attention kernel, writes no scores. It is used if it
  # supports every mask of the model.
  rule = kernels.RULES[layer.attention]
  shows_later_keys = (objectives.find_objective(config).prefix
                      or layer.diffusion_block > 0)
  is_fused = mixer.module.FUSED and layer.attention_kernel != 'xla'
  for causal in _causal_of_stack(architectures.stack(layer)):
    mask = kernels.Mask(
        causal=causal,
        has_bias=positions.position_of(layer).has_bias,
        window=rule.window(layer) if rule.window else 0,
        has_indexer=bool(rule.top),
        shows_later_keys=causal and shows_later_keys,
        has_dropout=bool(layer.attention_dropout))
    reason = kernels.reason_of_refusal(
        'splash', config=layer, mask=mask, q_length=length, k_length=length,
        device=platform)
    if reason:
      is_fused = False
  if is_fused:
    return 0

  # Each head has its scores and its weights, two arrays [tokens, length] in
  # float32, of 4 bytes an entry. An indexer's heads score all tokens as well.
  heads = layer.num_heads
  if rule.top:
    heads += layer.part(IndexerConfig).heads
  return 2 * 4 * tokens * length * heads


def _causal_of_stack(stack: str) -> tuple[bool, ...]:
  """Returns whether attention is causal in an encoder, in a decoder, or in each
  of the two sides of an encoder-decoder.

  Args:
    stack: 'encoder', 'decoder' or 'encoder-decoder'.
  """
  if stack == 'encoder':
    return (False,)
  if stack == 'decoder':
    return (True,)
  return (True, False)


def bytes_kept_for_backward(run: runs.Run) -> tuple[int, int]:
  """Returns the bytes of the activations of a whole batch that are kept from
  the forward pass to the backward pass, on all devices together.

  They are the residuals of jax.vjp, without the weights, which are counted
  elsewhere.

  Args:
    run: the run, whose config names the remat policy.

  Returns:
    The bytes on devices, and the bytes in the memory of hosts.
  """
  # Weights are counted elsewhere, so trace a module that keeps none gathered.
  config = run.config
  objective = objectives.find_objective(run.config)
  module = run.module.clone(
      config=dataclasses.replace(run.model, keep_gathered='none'))
  run = dataclasses.replace(run, module=module)

  # Describe a batch of the run, of which only the shapes matter.
  batch = {}
  for key, (size, dtype) in objectives.shapes_of_batch(config).items():
    batch[key] = jax.ShapeDtypeStruct(size, dtype)

  def backward_pass(params: Any, batch: Any):
    """Returns the backward pass of the loss, which holds its residuals."""
    rngs = {name: jax.random.key(0) for name in runs.RANDOM_STREAMS}

    def loss(params: Any) -> jax.Array:
      output = objective.apply(
          module, params, batch, deterministic=False, rngs=rngs)
      total, _ = objective.loss(output, batch, config)
      return total

    _, backward = jax.vjp(loss, params)
    return backward

  # The arrays that the backward pass closes over are kept between the passes.
  with run.context():
    traced = jax.make_jaxpr(backward_pass)(run.abstract_state.params, batch)
  residuals = traced.out_avals

  # Sum their bytes. Arrays that have the shape of a weight are taken for
  # weights and left out, and so are keys of random numbers.
  weight_shapes = {x.shape for x in jax.tree.leaves(run.abstract_state.params)}
  on_devices = in_hosts = 0
  for x in residuals:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.extended)
    if x.shape in weight_shapes or is_key:
      continue
    nbytes = x.size * jnp.dtype(x.dtype).itemsize
    if x.memory_space == jax.memory.Space.Host:
      in_hosts += nbytes
    else:
      on_devices += nbytes
  return on_devices, in_hosts
