"""What lies on a device, from shapes and shardings alone."""

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
  """Returns bytes of a device: its parameters, optimiser state, and with
  optim.ema the average of the parameters."""
  trees = dict(parameters=run.abstract.params, optimizer=run.abstract.opt_state,
               average=run.abstract.ema)
  return {name: devices.on_device(tree) for name, tree in trees.items()
          if tree is not None}


def trained(run: runs.Run):
  """The parameters that have a gradient."""
  return shares.trained(parameter_shares(run.module, run.config.optim),
                        run.abstract.params)


def axes(sharding: Any) -> set[str]:
  """Returns the mesh axes that an array's sharding names."""
  return {name for entry in sharding.spec for name in _names(entry)}


def gathered(sharding: Any) -> tuple[str, ...]:
  """Returns the mesh axes that a weight is gathered over: fsdp, and the axes
  that share its dimension."""
  return next((tuple(entry) for entry in map(_names, sharding.spec)
               if 'fsdp' in entry), ())


def _names(entry: Any) -> tuple[str, ...]:
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def described(config: Config, model: ModelConfig, shape: Mapping[str, int]
              ) -> runs.Run:
  """Returns the run on a mesh that is only described: nothing can be computed
  on it, and no device is looked for.

  Args:
    config: the run's.
    model: its model, resolved.
    shape: the size of each mesh axis.
  """
  mesh = AbstractMesh(tuple(shape.values()), tuple(shape),
                      axis_types=(AxisType.Auto,) * len(shape))
  runs.check_mesh(config, model, shape)
  # It is traced with kernels of the device that is there: those that the config
  # names may run on others alone.
  traced = dataclasses.replace(model, attention_kernel='auto').with_part(
      MoEConfig, grouped_kernel='auto')
  return dataclasses.replace(runs.Run.of(config, traced, mesh), model=model)


def analytic(run: runs.Run, kept_in_all: tuple[int, int] | None = None,
             platform: str = 'cpu') -> dict[str, int]:
  """Estimates a training step's peak, without a compiler.

  State, gradients, what the backward pass keeps by the config's remat policy
  (traced, not guessed; it is cut up as what goes from layer to layer is),
  weights that stay gathered, and the largest thing of one layer: scores, or
  the widest hidden units and the gathered weights.

  Args:
    run: on any devices.
    kept_in_all: what `kept` returns, where it is known; None: trace it.
    platform: tpu, where splash attention writes no scores, if it can do this
      model's; elsewhere they are counted.
  """
  c, shape, rules = run.model, run.mesh.shape, run.config.mesh.rules
  length, width = run.config.data.length, c.compute_dtype.itemsize
  micro = run.config.train.grad_accumulation
  parts = state(run)
  # In float32, as they add up.
  parts['gradients'] = devices.on_device(jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32,
                                     sharding=x.sharding), trained(run)))
  kept_here, in_host = (n // (micro * devices.stream_shards(
      shape, rules, length)) for n in kept_in_all or kept(run))
  parts['kept_for_backward'] = kept_here
  params = paths.flatten(run.abstract.params)
  if c.keep_gathered != 'none':
    times = gathers(run)
    parts['kept_gathered'] = width * sum(
        whole_size(x, shape) for path, x in params.items()
        if gathered(x.sharding) and times[path] == 1)
  tokens = run.config.data.batch_size * length // (
      micro * devices.shards('tokens', shape, rules))
  widest = max(max(_scores(run.config, k, tokens, platform),
                   3 * width * tokens * _hidden(k))
               for k in c.distinct_layers)
  roles = paths.flatten(parameter_roles(run.module))
  weights = max((x.size // x.shape[0] for path, x in params.items()
                 if paths.Stacks.has(path) and not roles[path].reads),
                default=0)
  parts['one_layer'] = widest // shape['tensor'] + (
      2 * width * weights // (shape['tensor'] * shape['expert']))
  parts['peak'] = sum(parts.values())
  if in_host:
    parts['host_memory'] = in_host
  return parts


def gathers(run: runs.Run) -> dict[str, int]:
  """Returns how often a step gathers each parameter, if it is sharded."""
  return {path: layers.gathers(run.model, path, role.axes) for path, role
          in paths.flatten(parameter_roles(run.module)).items()}


def whole_size(x: Any, shape: Mapping[str, int]) -> int:
  """Returns how many numbers a device has of a weight that is gathered."""
  return math.prod(x.sharding.shard_shape(x.shape)) * math.prod(
      shape[axis] for axis in gathered(x.sharding))


def _hidden(c: ModelConfig) -> int:
  """Hidden units of a token, of a layer's feed-forward network."""
  if c.ffn == layers.NO_FFN:
    return 0
  if c.ffn != 'moe':
    return c.d_ff
  moe = c.part(MoEConfig)
  return moe.d_ff * moe.top_k


def _scores(config: Config, c: ModelConfig, tokens: int, platform: str) -> int:
  """Bytes of the scores of a layer of a kind, where a kernel does not do
  without, in an encoder, in a decoder, or in both."""
  mixer, length = blocks.mixer_of(c), config.data.length
  if mixer.at_once:
    return 4 * tokens * mixer.at_once(c)
  kind = kernels.RULES[c.attention]
  masks = [kernels.Mask(
      causal=causal, bias=positions.of(c).has_bias,
      window=kind.window(c) if kind.window else 0,
      rule=bool(kind.top),
      prefix=causal and objectives.of(config).prefix,
      dropout=bool(c.attention_dropout)) for causal in (True, False)
           if architectures.stack(c) != ('encoder' if causal else 'decoder')]
  fused = mixer.module.FUSED and c.attention_kernel != 'xla' and not any(
      kernels.refusal('splash', c, mask, length, length, platform)
      for mask in masks)
  return 0 if fused else 2 * 4 * tokens * length * (
      c.num_heads + (c.part(IndexerConfig).heads if kind.top else 0))


def kept(run: runs.Run) -> tuple[int, int]:
  """Returns the bytes that all devices keep between the passes, of a whole
  batch without accumulation, and those that wait in the hosts' memory: the
  residuals of jax.vjp, but for weights."""
  run = dataclasses.replace(run, module=run.module.clone(
      config=dataclasses.replace(run.model, keep_gathered='none')))
  config = run.config
  objective = objectives.of(config)
  batch = {key: jax.ShapeDtypeStruct(size, dtype) for key, (size, dtype)
           in objectives.shapes(config).items()}

  def residuals(params: Any, batch: Any):
    keys = {name: jax.random.key(0) for name in ('dropout', 'router')}
    loss = lambda p: objective.loss(objective.apply(
        run.module, p, batch, deterministic=False, rngs=keys), batch,
        config)[0]
    return jax.vjp(loss, params)[1]

  with run.context():
    left = jax.make_jaxpr(residuals)(run.abstract.params, batch).out_avals
  weights = {x.shape for x in jax.tree.leaves(run.abstract.params)}
  nbytes = {True: 0, False: 0}
  for x in left:
    if x.shape not in weights and not jnp.issubdtype(
        x.dtype, jax.dtypes.extended):
      nbytes[x.memory_space == jax.memory.Space.Host] += (
          x.size * jnp.dtype(x.dtype).itemsize)
  return nbytes[False], nbytes[True]
