"""What lies on a device, from shapes and shardings alone."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
import ml_collections

import architectures
from architectures.parts import blocks, mixers, positions, remat
from architectures.parts import streams
from architectures.parts.attention import kernels, visibility
from architectures.parts.config import ModelConfig
from architectures.parts.ffn import NONE
from training import objectives, paths, runs
from training.distributed import devices
from training.optim import shares
from training.step import parameter_roles, parameter_shares


def on_device(tree: Any) -> int:
  """Returns the bytes of one device's shards of abstract arrays."""
  return sum(math.prod(x.sharding.shard_shape(x.shape))
             * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def state(run: runs.Run) -> dict[str, int]:
  """Returns bytes of a device: its parameters, optimiser state, and with
  optim.ema the average of the parameters."""
  found = {'parameters': on_device(run.abstract.params),
           'optimizer': on_device(run.abstract.opt_state)}
  if run.abstract.ema is not None:
    found['average'] = on_device(run.abstract.ema)
  return found


def trained(run: runs.Run):
  """The parameters that have a gradient."""
  return shares.trained(parameter_shares(run.module, run.config.optim),
                        run.abstract.params)


def replicated(run: runs.Run) -> list[dict]:
  """Returns, for each mesh axis, what each of its devices holds alike: bytes
  of state that sharding over it too would save a device, and the parameters
  that most of it is."""
  trees = (run.abstract.params, run.abstract.opt_state, run.abstract.ema)
  rows = []
  for axis, size in run.mesh.shape.items():
    if size == 1:
      continue
    saved = sum(_saved(x, axis, size)
                for tree in trees for x in jax.tree.leaves(tree))
    largest = sorted(
        ((path, _saved(x, axis, size))
         for path, x in paths.flatten(run.abstract.params).items()),
        key=lambda item: -item[1])[:3]
    rows.append(dict(axis=axis, devices=size, bytes_saved=saved,
                     largest=[path for path, n in largest if n]))
  return sorted(rows, key=lambda row: -row['bytes_saved'])


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


def _saved(x: Any, axis: str, size: int) -> int:
  if axis in axes(x.sharding):
    return 0
  shard = x.sharding.shard_shape(x.shape)
  if not any(n % size == 0 for n in shard):
    return 0
  nbytes = math.prod(shard) * jnp.dtype(x.dtype).itemsize
  return nbytes - nbytes // size


def least(run: runs.Run) -> dict[str, int]:
  """Returns bytes of a device that no compiler can save: the state, one
  gradient of each parameter, and what enters each block, which every remat
  policy keeps there, but for `offload`. Nothing is traced, so that it takes no
  time.

  Args:
    run: on any mesh, one that is only described too.
  """
  parts = state(run)
  parts['gradients'] = on_device(trained(run))
  inputs = block_inputs(run)
  parts['block_inputs'] = 0 if remat.of(run.model).to_host else inputs
  parts['peak'] = sum(parts.values())
  return parts


def block_inputs(run: runs.Run) -> int:
  """Returns bytes of a device of what enters all blocks at once."""
  config, c = run.config, run.model
  shapes = objectives.shapes(config)
  layers = {'tokens': c.num_layers, 'decoder_tokens': c.num_decoder_layers}
  inputs = sum(math.prod(shapes[name][0][:2]) * count * streams.slots(
      c, blocks.branches(c, c.layer_kinds(
          count, cross=name == 'decoder_tokens'))) // devices.stream_shards(
              run.mesh.shape, config.mesh.rules, shapes[name][0][1])
               for name, count in layers.items() if name in shapes)
  return (inputs * c.d_model * c.compute_dtype.itemsize
          // config.train.grad_accumulation)


def described(config: ml_collections.ConfigDict, model: ModelConfig,
              shape: Mapping[str, int]) -> runs.Run:
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
  run = runs.Run.of(config, traceable(model), mesh)
  return dataclasses.replace(run, model=model)


def analytic(run: runs.Run, kept_in_all: int = 0,
             platform: str = 'cpu') -> dict[str, int]:
  """Estimates a training step's peak, without a compiler.

  State, gradients, what the backward pass keeps by the config's remat policy
  (traced, not guessed; it is cut up as what goes from layer to layer is),
  weights that stay gathered, and the largest thing of one layer: scores, or
  the widest hidden units and the gathered weights.

  Args:
    run: on any devices.
    kept_in_all: what `kept` returns, where it is known; 0: trace it.
    platform: tpu, where splash attention writes no scores, if it can do this
      model's; elsewhere they are counted.
  """
  c, shape, rules = run.model, run.mesh.shape, run.config.mesh.rules
  parts = state(run)
  parts['gradients'] = on_device(jax.tree.map(  # in float32, as they add up
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32,
                                     sharding=x.sharding), trained(run)))
  micro = run.config.train.grad_accumulation
  shards = micro * devices.shards('tokens', shape, rules)
  length, width = run.config.data.length, c.compute_dtype.itemsize
  parts['kept_for_backward'] = (kept_in_all or kept(run)) // (
      micro * devices.stream_shards(shape, rules, length))
  if c.keep_gathered != 'none':
    parts['kept_gathered'] = _kept_gathered(run)
  tokens = run.config.data.batch_size * length // shards
  kinds = [c.of_kind(name) for name in c.kinds_used]
  hidden = max(tokens * _hidden(k) // shape['tensor'] for k in kinds)
  layer = max((x.size // x.shape[0] for path, x in paths.flatten(
      run.abstract.params).items() if paths.Stacks.has(path)), default=0)
  scores = max(_scores(k, mask, tokens, length, platform) for k in kinds
               for mask in _masks(run.config, k)) // shape['tensor']
  parts['one_layer'] = max(scores, 3 * width * hidden) + (
      2 * width * layer // (shape['tensor'] * shape['expert']))
  parts['peak'] = sum(parts.values())
  if remat.of(c).to_host:
    parts['host_memory'] = block_inputs(run)
  return parts


def gathers(run: runs.Run) -> dict[str, int]:
  """Returns how often a step gathers each parameter, if it is sharded."""
  return {path: remat.gathers(run.model, path, role.axes) for path, role
          in paths.flatten(parameter_roles(run.module)).items()}


def _kept_gathered(run: runs.Run) -> int:
  """Bytes of the weights that stay whole for the backward pass."""
  times, shape = gathers(run), run.mesh.shape
  once = [x for path, x in paths.flatten(run.abstract.params).items()
          if gathered(x.sharding) and times[path] == 1]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * math.prod(
      shape[axis] for axis in gathered(x.sharding)) for x in once
             ) * run.model.compute_dtype.itemsize


def _hidden(c: ModelConfig) -> int:
  """Hidden units of a token, of a layer's feed-forward network."""
  return (c.moe.d_ff * c.moe.top_k if c.ffn == 'moe' else
          0 if c.ffn == NONE else c.d_ff)


def _masks(config: ml_collections.ConfigDict, c: ModelConfig
           ) -> list[kernels.Mask]:
  """Returns what the layers of a kind see in a training step: in an encoder,
  in a decoder, or in both."""
  kind = visibility.KINDS[c.attention]
  causal = {'decoder': (True,), 'encoder': (False,)}.get(
      architectures.stack(c), (False, True))
  return [kernels.Mask(
      causal=one_way, bias=positions.of(c).has_bias,
      window=kind.window(c) if kind.window else 0,
      rule=c.attention if kind.sees else '',
      prefix=one_way and objectives.of(config).prefix,
      dropout=bool(c.attention_dropout)) for one_way in causal]


def _scores(c: ModelConfig, mask: kernels.Mask, tokens: int, length: int,
            platform: str) -> int:
  """Bytes of one layer's scores, where a kernel does not do without."""
  at_once = mixers.of(c).at_once
  if at_once:
    return 4 * tokens * at_once(c)
  fused = (mixers.of(c).module.FUSED and c.attention_kernel != 'xla'
           and not kernels.refusal('splash', c, mask, length, length, platform))
  return 0 if fused else 2 * 4 * tokens * c.num_heads * length


def traceable(model: ModelConfig) -> ModelConfig:
  """Returns the model with kernels of the device that it is traced on: those
  that its config names may run on others alone."""
  moe = model.moe and dataclasses.replace(model.moe, grouped_kernel='auto')
  return dataclasses.replace(model, attention_kernel='auto', moe=moe)


def kept(run: runs.Run) -> int:
  """Bytes that all devices keep between the passes, of a whole batch without
  accumulation: the residuals of jax.vjp, but for weights and for what waits in
  the host's memory."""
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
    found = jax.make_jaxpr(residuals)(run.abstract.params, batch).out_avals
  weights = {x.shape for x in jax.tree.leaves(run.abstract.params)}
  return sum(x.size * jnp.dtype(x.dtype).itemsize
             for x in found if x.shape not in weights
             and x.memory_space != jax.memory.Space.Host
             and not jnp.issubdtype(x.dtype, jax.dtypes.extended))
