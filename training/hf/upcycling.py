"""A mixture of experts from a dense model (Komatsuzaki et al. 2023).

Every expert begins as a copy of its layer's dense network, its router is drawn
anew, and all else stays. While the gates of a token sum to 1 and none is
dropped, sum_e g_e FFN(x) = FFN(x): the model starts from the function that the
dense one has learned. The paper keeps the optimiser's state too; here the run
that follows begins its own, with its own warm-up.
"""

from collections.abc import Mapping, Sequence
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import ml_collections

import architectures
from architectures.parts import paths
from architectures.parts.config import ModelConfig
from architectures.parts.layers import NO_FFN
from architectures.parts.moe import routing
from architectures.parts.moe.routing import MoEConfig
from common import kinds
from common.arguments import parse_assignments
from common.errors import require
from training import cli
from training.hf import weights

# The page of a dense model's mixture; the others are the same page.
TWINS = {'llama': 'mixtral', 't5': 'switch'}
# Fields of model.moe that the dense model gives.
GIVEN = 'ffn', 'd_ff'
# The parameters of a mixture that a dense network has not, by path.
NEW = re.compile(r'/ffn/(router|router_bias|logit_bias|shared/.*)$')


def config(model: ml_collections.ConfigDict, moe: dict,
           dense: ModelConfig | None = None) -> ml_collections.ConfigDict:
  """Returns config.model of the mixture.

  Args:
    model: config.model of the dense model.
    moe: what model.moe changes, by field, and `every`: n, where the last of
      every n layers is to have experts.
    dense: what a run made of `model`, where that leaves fields to be derived.

  Raises:
    ValueError: for a model that has experts already.
  """
  dense = dense or architectures.resolve(model)
  require(not dense.has_experts,
          'model.ffn is moe: this model has experts already, only a dense one '
          'is upcycled')
  # Each layer needs a network whose copies its experts become.
  networks = [model.ffn, *(kind.get('ffn') for kind in model.kinds.values())]
  require(NO_FFN not in networks,
          f'model.ffn is {NO_FFN!r} of some layers: experts begin as copies of '
          "a layer's feed-forward network, which each must have")

  # An expert is as wide as the network that it is copied from.
  moe = dict(moe)
  every = moe.pop('every', 1)
  require(every > 0, f'every is {every}: it must be > 0')
  model = model.copy_and_resolve_references()
  model.moe.update(moe, ffn=model.ffn, d_ff=0)
  model.update(arch=TWINS.get(model.arch, model.arch), ffn='moe')
  made = kinds.place_experts(model.to_dict(), every)
  with model.unlocked():
    model.pattern = made['pattern']
    model.kinds = ml_collections.ConfigDict(made['kinds'])
  return model


def is_the_same_function(config: ModelConfig) -> bool:
  """Whether a mixture of equal experts computes what one of them does, in
  evaluation."""
  moe = config.part(MoEConfig)
  return (routing.whole_gates(moe) and not moe.eval_capacity_factor
          and not moe.shared_experts)


def params(module: nn.Module, like: Any, dense: Any, seed: int) -> Any:
  """Returns the parameters of the mixture.

  Args:
    module: the mixture.
    like: its parameters' shapes with shardings, as in TrainState.
    dense: the parameters of the dense model, arrays without boxes.
    seed: the seed of the routers.
  """
  # The old parameters lie on the mixture's devices.
  shapes = paths.flatten_by_path(nn.meta.unbox(like))
  places = {path: x.sharding for path, x in shapes.items()}
  mesh = next(iter(places.values())).mesh
  old = {path: _on_mesh(x, mesh)
         for path, x in paths.flatten_by_path(dense).items()}
  theirs = paths.Stacks(old)
  ours = paths.Stacks(shapes)

  # Parameters that the dense model does not have.
  new = [path for path in shapes if re.search(NEW, path)]
  drawn = {}
  if new:
    drawn = weights.draw(module, like=like, wanted=new, seed=seed)

  def make(old: dict[str, jax.Array], drawn: dict[str, jax.Array]
           ) -> dict[str, jax.Array]:
    """Returns each parameter of the mixture, by path."""
    flat = {}
    for path, x in shapes.items():
      if path in drawn:
        flat[path] = drawn[path]
      elif paths.Stacks.is_in_stack(path):
        flat[path] = _layers(old, path=path, shape=x.shape, theirs=theirs,
                             ours=ours)
      else:
        flat[path] = old[path]
    return flat

  flat = jax.jit(make, out_shardings=places)(old, drawn)
  return jax.tree_util.tree_map_with_path(
      lambda path, _: flat[paths.path_to_string(path)], nn.meta.unbox(like))


def _on_mesh(x: jax.Array, mesh: Any) -> jax.Array:
  """Returns an array on all devices of a mesh. Weights that were read from
  files lie on one device."""
  if x.sharding.device_set == set(mesh.devices.flat):
    return x
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))


def _layers(old: dict[str, jax.Array], path: str, shape: tuple[int, ...],
            theirs: paths.Stacks, ours: paths.Stacks) -> jax.Array:
  """Returns one stacked parameter of the mixture, of the dense model's rows:
  a layer may stand in another block, of another period.

  Args:
    old: the parameters of the dense model, by path.
    path: the path of the parameter in the mixture.
    shape: its shape.
    theirs: where the layers of the dense model stand.
    ours: where the layers of the mixture stand.
  """
  rows = []
  for n in ours.layer_numbers(path):
    place, row = theirs.path_and_row(path, n)
    x = old[place][row]
    if x.ndim < len(shape) - 1:
      x = x[None]  # for every expert
    rows.append(jnp.broadcast_to(x, shape[1:]))
  return jnp.stack(rows)


def fields(words: Sequence[str], like: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {field: value} of FIELD=VALUE words, typed as in `like`, beside
  which there is `every`: see `config`."""
  usual = {name: value for name, value in like.items() if name not in GIVEN}
  usual['every'] = 1
  parsed = {}
  for name, text in parse_assignments(words, '--moe', sorted(usual)).items():
    parsed[name] = cli.parse_value(text, usual[name], f'--moe {name}')
  return parsed
