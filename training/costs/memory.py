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


def state(run: runs.Run) -> dict[str, int]:
  """Returns the bytes on a device of a run's parameters, optimiser state, and
  with optim.ema of the average of the parameters."""
  nbytes = {
      'parameters': devices.on_device(run.abstract.params),
      'optimizer': devices.on_device(run.abstract.opt_state),
  }
  if run.abstract.ema is not None:
    nbytes['average'] = devices.on_device(run.abstract.ema)
  return nbytes


def trained(run: runs.Run):
  """Returns the parameters that have a gradient."""
  parts = parameter_shares(run.module, run.config.optim)
  return shares.trained(parts, run.abstract.params)


def axes(sharding: Any) -> set[str]:
  """Returns the mesh axes that an array's sharding names."""
  names: set[str] = set()
  for entry in sharding.spec:
    names.update(_names(entry))
  return names


def gathered(sharding: Any) -> tuple[str, ...]:
  """Returns the mesh axes that a weight is gathered over: fsdp, and the axes
  that share its dimension."""
  for entry in sharding.spec:
    if 'fsdp' in _names(entry):
      return _names(entry)
  return ()


def _names(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes of one entry of a PartitionSpec."""
  if isinstance(entry, str):
    return (entry,)
  return tuple(entry or ())


def described(config: Config, model: ModelConfig, shape: Mapping[str, int]
              ) -> runs.Run:
  """Returns the run on a mesh that is only described: nothing can be computed
  on it, and no device is looked for.

  Args:
    config: the config of the run.
    model: its model, resolved.
    shape: the size of each mesh axis.
  """
  axis_types = (AxisType.Auto,) * len(shape)
  mesh = AbstractMesh(tuple(shape.values()), tuple(shape),
                      axis_types=axis_types)
  runs.check_mesh(config, model, shape)
  # It is traced with kernels of the device that is there: those that the config
  # names may run on others alone.
  traced = dataclasses.replace(model, attention_kernel='auto')
  traced = traced.with_part(MoEConfig, grouped_kernel='auto')
  run = runs.Run.of(config, traced, mesh)
  return dataclasses.replace(run, model=model)


def analytic(run: runs.Run, kept_in_all: tuple[int, int] | None = None,
             platform: str = 'cpu') -> dict[str, int]:
  """Estimates a training step's peak, without a compiler.

  State, gradients, what the backward pass keeps by the config's remat policy
  (traced, not guessed; it is cut up as what goes from layer to layer is),
  weights that stay gathered, and the largest thing of one layer: scores, or
  the widest hidden units and the gathered weights.

  Args:
    run: the run, on any devices.
    kept_in_all: the result of `kept`, where it is known; None: trace it.
    platform: tpu, where splash attention writes no scores, if it can do this
      model's; elsewhere they are counted.

  Returns:
    The bytes of each part, by its name; their sum as `peak`; and
    `host_memory`, where anything waits there.
  """
  c = run.model
  shape = run.mesh.shape
  rules = run.config.mesh.rules
  length = run.config.data.length
  width = c.compute_dtype.itemsize
  micro = run.config.train.grad_accumulation

  # The state, and the gradients in float32, as they add up.
  parts = state(run)
  gradients = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
      trained(run))
  parts['gradients'] = devices.on_device(gradients)

  # The part that a micro-batch keeps for the backward pass, on this device.
  if kept_in_all is None:
    kept_in_all = kept(run)
  on_devices, in_hosts = kept_in_all
  pieces = micro * devices.stream_shards(shape, rules, length)
  parts['kept_for_backward'] = on_devices // pieces
  params = paths.flatten(run.abstract.params)
  if c.keep_gathered != 'none':
    parts['kept_gathered'] = width * _kept_gathered(run, params)

  # The largest thing of one layer.
  tokens = run.config.data.batch_size * length // (
      micro * devices.shards('tokens', shape, rules))
  widest = 0
  for layer in c.distinct_layers:
    scores = _scores(run.config, c=layer, tokens=tokens, platform=platform)
    hidden = 3 * width * tokens * _hidden(layer)
    widest = max(widest, scores, hidden)
  weights = 2 * width * _largest_weight(run, params)
  parts['one_layer'] = widest // shape['tensor'] + (
      weights // (shape['tensor'] * shape['expert']))

  parts['peak'] = sum(parts.values())
  if in_hosts // pieces:
    parts['host_memory'] = in_hosts // pieces
  return parts


def _kept_gathered(run: runs.Run, params: Mapping[str, Any]) -> int:
  """Returns how many numbers a device has of the weights that stay gathered
  from the forward pass to the backward one: those that are gathered once."""
  times = gathers(run)
  total = 0
  for path, x in params.items():
    if gathered(x.sharding) and times[path] == 1:
      total += whole_size(x, run.mesh.shape)
  return total


def _largest_weight(run: runs.Run, params: Mapping[str, Any]) -> int:
  """Returns the numbers of the largest weight of one layer, apart from tables
  whose rows are looked up."""
  roles = paths.flatten(parameter_roles(run.module))
  largest = 0
  for path, x in params.items():
    if paths.Stacks.has(path) and not roles[path].reads:
      largest = max(largest, x.size // x.shape[0])
  return largest


def gathers(run: runs.Run) -> dict[str, int]:
  """Returns how often a step gathers each parameter, if it is sharded."""
  roles = paths.flatten(parameter_roles(run.module))
  return {path: layers.gathers(run.model, path, role.axes)
          for path, role in roles.items()}


def whole_size(x: Any, shape: Mapping[str, int]) -> int:
  """Returns how many numbers a device has of a weight that is gathered."""
  shard = math.prod(x.sharding.shard_shape(x.shape))
  shards = math.prod(shape[axis] for axis in gathered(x.sharding))
  return shard * shards


def _hidden(c: ModelConfig) -> int:
  """Returns the hidden units of a token, in a layer's feed-forward network."""
  if c.ffn == layers.NO_FFN:
    return 0
  if c.ffn != 'moe':
    return c.d_ff
  moe = c.part(MoEConfig)
  return moe.d_ff * moe.top_k


def _scores(config: Config, c: ModelConfig, tokens: int, platform: str) -> int:
  """Returns the bytes of the attention scores of a layer, where no kernel does
  without them: in an encoder, in a decoder, or in both.

  Args:
    config: the config of the run.
    c: the config of the layer's kind.
    tokens: the number of tokens on a device.
    platform: the platform of the device.
  """
  mixer = blocks.mixer_of(c)
  length = config.data.length
  if not mixer.scores:
    return 4 * tokens * mixer.at_once(c, length)

  # Splash attention writes no scores, if it can do all masks of the model.
  rule = kernels.RULES[c.attention]
  fused = mixer.module.FUSED and c.attention_kernel != 'xla'
  for causal in _directions(architectures.stack(c)):
    mask = kernels.Mask(
        causal=causal,
        bias=positions.of(c).has_bias,
        window=rule.window(c) if rule.window else 0,
        rule=bool(rule.top),
        prefix=causal and objectives.of(config).prefix,
        dropout=bool(c.attention_dropout))
    why_not = kernels.refusal('splash', c=c, mask=mask, q_length=length,
                              k_length=length, device=platform)
    if why_not:
      fused = False
  if fused:
    return 0

  # The scores and the weights of each head, in float32.
  heads = c.num_heads
  if rule.top:
    heads += c.part(IndexerConfig).heads
  return 2 * 4 * tokens * length * heads


def _directions(stack: str) -> tuple[bool, ...]:
  """Returns whether the attention of a stack is causal; both for an
  encoder-decoder."""
  if stack == 'encoder':
    return (False,)
  if stack == 'decoder':
    return (True,)
  return (True, False)


def kept(run: runs.Run) -> tuple[int, int]:
  """Returns the bytes that all devices keep between the passes, of a whole
  batch without accumulation, and those that wait in the hosts' memory: the
  residuals of jax.vjp, but for weights."""
  config = run.config
  objective = objectives.of(run.config)
  module = run.module.clone(
      config=dataclasses.replace(run.model, keep_gathered='none'))
  run = dataclasses.replace(run, module=module)
  # A batch of the run, of which only the shapes matter.
  batch = {}
  for key, (size, dtype) in objectives.shapes(config).items():
    batch[key] = jax.ShapeDtypeStruct(size, dtype)

  def residuals(params: Any, batch: Any):
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
    left = jax.make_jaxpr(residuals)(run.abstract.params, batch).out_avals
  weight_shapes = {x.shape for x in jax.tree.leaves(run.abstract.params)}
  # Weights are counted elsewhere, and keys of random numbers take no room.
  on_devices = in_hosts = 0
  for x in left:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.extended)
    if x.shape in weight_shapes or is_key:
      continue
    nbytes = x.size * jnp.dtype(x.dtype).itemsize
    if x.memory_space == jax.memory.Space.Host:
      in_hosts += nbytes
    else:
      on_devices += nbytes
  return on_devices, in_hosts
