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
from common.fields import parse_assignments
from common.errors import require
from training import cli
from training.hf import weights

# The system with experts by that of a dense model, where the two differ.
ARCH_WITH_EXPERTS = {'llama': 'mixtral', 't5': 'switch'}
# Fields of model.moe that follow from the dense model.
FIELDS_OF_DENSE_NETWORK = 'ffn', 'd_ff'
# The paths of parameters that a network with experts alone has.
NEW_PARAMETERS = re.compile(r'/ffn/(router\w*|logit_bias|shared/.*)$')


def upcycle_config(model: ml_collections.ConfigDict, moe: dict,
                   dense: ModelConfig | None = None
                   ) -> ml_collections.ConfigDict:
  """Returns the config of the mixture of experts into which a dense model is
  turned. Its experts begin as copies of the dense feed-forward networks.

  Args:
    model: config.model of the dense model.
    moe: the fields of model.moe to set; and `every` = n if only the last of
      every n layers is to have experts.
    dense: the config with all derived fields that a run has made of `model`;
      None: it is derived here.

  Raises:
    RequestError: for a model that already has experts, or has layers without a
      feed-forward network.
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

  # An expert is as wide as the network that it is copied from, which a width
  # (d_ff) of 0 stands for.
  moe = dict(moe)
  every = moe.pop('every', 1)
  require(every > 0, f'every is {every}: it must be > 0')
  model = model.copy_and_resolve_references()
  model.moe.update(moe, ffn=model.ffn, d_ff=0)
  arch = ARCH_WITH_EXPERTS.get(model.arch, model.arch)
  model.update(arch=arch, ffn='moe')

  # Give experts to the last of every `every` layers.
  layers_with_experts = kinds.place_experts(model.to_dict(), every)
  with model.unlocked():
    model.pattern = layers_with_experts['pattern']
    model.kinds = ml_collections.ConfigDict(layers_with_experts['kinds'])
  return model


def keeps_function(config: ModelConfig) -> bool:
  """Whether a mixture of equal experts computes in evaluation what one of these
  experts does alone."""
  moe = config.part(MoEConfig)
  return (routing.has_whole_gates(moe) and not moe.eval_capacity_factor
          and not moe.shared_experts)


def upcycle_parameters(module: nn.Module, like: Any, dense: Any, seed: int
                       ) -> Any:
  """Returns the parameters of the mixture of experts that a dense model
  becomes: each expert is a copy of the dense network, and the router is drawn.

  Args:
    module: the mixture.
    like: its parameters' shapes with shardings, as in TrainState.
    dense: the parameters of the dense model, arrays without boxes.
    seed: the seed of the routers.
  """
  # The dense parameters lie on the mixture's devices.
  shapes = paths.flatten_by_path(nn.meta.unbox(like))
  shardings = {path: x.sharding for path, x in shapes.items()}
  mesh = next(iter(shardings.values())).mesh
  dense_params = {}
  for path, x in paths.flatten_by_path(dense).items():
    dense_params[path] = _replicate_on_mesh(x, mesh)
  dense_stacks = paths.Stacks(dense_params)
  mixture_stacks = paths.Stacks(shapes)

  # Parameters that the dense model does not have are drawn.
  new_paths = {path for path in shapes if re.search(NEW_PARAMETERS, path)}
  drawn = {}
  if new_paths:
    drawn = weights.draw_parameters(
        module, abstract_params=like, paths_to_draw=new_paths, seed=seed)

  def make_parameters(dense_params: dict[str, jax.Array],
                      drawn: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the parameters of the mixture of experts, by path. `shapes` has
    the shape of each of them.

    Args:
      dense_params: the parameters of the dense model, by path.
      drawn: randomly drawn values for the parameters that the dense model
        lacks, such as those of routers.
    """
    params = {}
    for path, x in shapes.items():
      # Parameters of layers are stacked in arrays, in which the two models may
      # keep a layer at different places.
      if path in drawn:
        params[path] = drawn[path]
      elif paths.Stacks.is_in_stack(path):
        params[path] = _restack_layers(
            dense_params, path=path, shape=x.shape, dense_stacks=dense_stacks,
            mixture_stacks=mixture_stacks)
      else:
        params[path] = dense_params[path]
    return params

  params = jax.jit(make_parameters, out_shardings=shardings)(
      dense_params, drawn)
  return jax.tree_util.tree_map_with_path(
      lambda path, _: params[paths.path_to_string(path)], nn.meta.unbox(like))


def _replicate_on_mesh(x: jax.Array, mesh: Any) -> jax.Array:
  """Returns an array on all devices of a mesh: one that was read from files
  lies on one device, and is copied to each."""
  if x.sharding.device_set == set(mesh.devices.flat):
    return x
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))


def _restack_layers(dense_params: dict[str, jax.Array], path: str,
                    shape: tuple[int, ...], dense_stacks: paths.Stacks,
                    mixture_stacks: paths.Stacks) -> jax.Array:
  """Returns a parameter of a mixture of experts, made from the dense model. All
  experts of a layer begin as copies of the layer's network.

  Both models keep the parameters of several layers in one array with an axis of
  layers. Where only some layers have experts, more arrays are needed than in
  the dense model, so that a layer may be in another array and in another row.

  Args:
    dense_params: the parameters of the dense model, by path.
    path: the path of the parameter in the mixture.
    shape: its shape, [layers, ...].
    dense_stacks: in which array and row the dense model keeps each layer.
    mixture_stacks: in which array and row the mixture keeps each layer.
  """
  # Collect the layers of this array from where the dense model keeps them.
  layers = []
  for n in mixture_stacks.layer_numbers(path):
    dense_path, row = dense_stacks.path_and_row(path, n)
    x = dense_params[dense_path][row]
    if x.ndim < len(shape) - 1:
      # Only the mixture has an axis of experts here. Broadcasting along it
      # makes each expert a copy.
      x = x[None]
    layers.append(jnp.broadcast_to(x, shape[1:]))
  return jnp.stack(layers)


def parse_moe_fields(words: Sequence[str], moe_fields: Mapping[str, Any]
                     ) -> dict[str, Any]:
  """Parses the words FIELD=VALUE of the flag --moe.

  Args:
    words: the words of the command line. A field is one of model.moe, or
      `every`: the last of every so many layers has experts.
    moe_fields: the defaults of model.moe, which tell the type of each field.

  Returns:
    {field: value}.
  """
  defaults = {}
  for name, value in moe_fields.items():
    if name not in FIELDS_OF_DENSE_NETWORK:
      defaults[name] = value
  defaults['every'] = 1
  parsed = {}
  for name, text in parse_assignments(words, flag='--moe',
                                      choices=sorted(defaults)).items():
    parsed[name] = cli.parse_value(text, default=defaults[name],
                                   flag=f'--moe {name}')
  return parsed
