"""The costs of a model, from its shapes alone: nothing is computed.

Parameters by part, total and active (a token's own: with experts, the router,
those that it goes through and the shared ones), FLOPs, and bytes.
tools/count.py prints them, a sweep matches its points by them.
"""

from collections.abc import Sequence
import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import architectures
from architectures.parts import blocks, paths, positions
from architectures.parts.config import ModelConfig
from architectures.parts.moe import routing
from architectures.parts.moe.routing import MoEConfig
from common.errors import require
from training import objectives
from training.costs import flops
from training.objectives import Config
from training.optim import shares
from training.runs import (build_optimizer, parameter_roles, parameter_shapes,
                           parameter_shares, resolve_model_without_tokenizer)
from training.workdir import run_config


def count_costs(config: Config, length: int = 0,
                model: ModelConfig | None = None) -> dict:
  """Returns all costs of a config's model: its parameters, FLOPs, and the bytes
  of its cache and of the state of training.

  Args:
    config: the config of a run.
    length: the number of tokens of a sequence; 0: data.length, or as many as
      the model has positions for, if these are fewer.
    model: the model of the run, resolved; None: the model that the config gives
      without a tokenizer.

  Returns:
    A dict for JSON, whose figures that do not apply to the model are None.
  """
  # The model, and the number of tokens on each side of a row.
  model = model or resolve_model_without_tokenizer(config)
  module = architectures.build(model)
  if not length:
    most = positions.longest_supported_length(model)
    length = int(min(config.data.length, most))
  sides = _row_lengths(config, model, length=length)
  is_encoder_decoder = architectures.stack(model) == 'encoder-decoder'

  # Parameters, and the bytes of the state.
  sizes, active = _parameter_sizes(module)
  active_by_part = {part: round(x) for part, x in _sum_by_part(active).items()}
  state = _state_bytes(module, config)

  # FLOPs, and the bytes that a decoder keeps; None where it does not apply.
  training = flops.training_flops_of_row(config, model, lengths=sides)
  has_prefix = objectives.find_objective(config).prefix
  flops_per_token = {
      'training': _flops_per_token(training, sides),
      **_inference_flops(model, length=length, prefix=has_prefix),
  }
  per_token = per_row = memory_per_token = None
  if _writes_text(model):
    per_token, per_row = cache_bytes(model)
  if is_encoder_decoder:
    memory_per_token, _ = cache_bytes(flops.without_sharing(model))

  return {
      'model': model.arch,
      'rumoured': model.arch.startswith('gpt4'),
      'parameters': sum(sizes.values()),
      'active_parameters': round(sum(active.values())),
      'trained_parameters': trained_parameters(module, config.optim),
      'by_part': _sum_by_part(sizes),
      'active_by_part': active_by_part,
      'length': length,
      'training_lengths': sides,  # both sides of an encoder-decoder
      'flops_per_token': flops_per_token,
      'kinds_of_layer': describe_kinds_of_layer(model),
      'kv_cache_bytes_per_token': per_token,
      # The state of recurrences has a fixed size for each row of a batch.
      'state_bytes_per_row': per_row,
      # The decoder of an encoder-decoder keeps this for each token of a source.
      'memory_cache_bytes_per_token': memory_per_token,
      'parameter_bytes': state['parameters'],
      'optimizer_bytes': state['optimizer'],
      'average_bytes': state['average'],  # optim.ema
      'checkpoint_bytes': sum(state.values()),
  }


def _state_bytes(module: nn.Module, config: Config) -> dict[str, int]:
  """Returns the bytes of the state of a training run.

  Args:
    module: the model.
    config: the config of the run.

  Returns:
    The bytes of the `parameters`, of the state of the `optimizer`, and of the
    `average` of the parameters (0 if the run keeps none).
  """
  params = parameter_shapes(module)
  tx = build_optimizer(module, config.optim, config.train.steps)
  rate_shares = parameter_shares(module, config.optim)
  start_average = functools.partial(
      shares.start_average, config.optim, rate_shares)

  # Only shapes are needed, so nothing is computed.
  state = jax.eval_shape(tx.init, params)
  average = jax.eval_shape(start_average, params)
  return {
      'parameters': _nbytes(params),
      'optimizer': _nbytes(state),
      'average': _nbytes(average),
  }


def _nbytes(tree: Any) -> int:
  """Returns the bytes of all arrays of a tree of shapes."""
  return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _writes_text(model: ModelConfig) -> bool:
  """Whether the model writes text, token by token."""
  if model.diffusion_block:  # which writes blocks of tokens
    return False
  return architectures.stack(model) != 'encoder' and model.head == 'lm'


def _inference_flops(model: ModelConfig, length: int, prefix: bool
                     ) -> dict[str, float | None]:
  """Returns the FLOPs of a token in inference.

  Args:
    model: the model, resolved.
    length: the number of tokens of a sequence; for an encoder-decoder, of the
      source and of the target each.
    prefix: whether the tokens of a prompt see each other.

  Returns:
    `prefill`: the FLOPs of each token of a prompt.
    `decode`: the FLOPs of a token that is generated after it; None for a model
      that generates no text.
  """
  lengths = [length]
  if architectures.stack(model) == 'encoder-decoder':
    lengths = [length, length]
  prefill = flops.forward_flops(model, *lengths, prompt=prefix)
  decode = None
  if _writes_text(model):
    decode = sum(flops.decode_flops(model, *lengths).values())
  return {'prefill': _flops_per_token(prefill, lengths), 'decode': decode}


def _flops_per_token(parts: dict[str, float], lengths: Sequence[int]) -> float:
  """Returns the FLOPs of a token.

  Args:
    parts: the FLOPs of a row of tokens, by part of the model.
    lengths: the number of tokens of the row, on each of its sides.
  """
  return sum(parts.values()) / sum(lengths)


def count_briefly(config: Config) -> dict:
  """Returns the few costs of a config that fit into a table of many configs:
  the number of parameters, and the FLOPs of a token in training.

  Args:
    config: the config of a run.
  """
  model = resolve_model_without_tokenizer(config)
  sides = _row_lengths(config, model, length=config.data.length)
  # The model is built as its FLOPs are counted, so that it is traced once.
  total, active = count_parameters(
      flops.config_for_counting(model, max(sides)))
  return {
      'rumoured': model.arch.startswith('gpt4'),
      'parameters': total,
      'active_parameters': active,
      'training_flops_per_token': _flops_per_token(
          flops.training_flops_of_row(config, model), sides),
  }


def _row_lengths(config: Config, model: ModelConfig, length: int) -> list[int]:
  """Returns the number of tokens on each side of a row that a run trains on.

  Args:
    config: the config of the run.
    model: the model of the run, resolved.
    length: the value of data.length to take in place of the config's.

  Raises:
    RequestError: if the objective makes rows with one side for a model with
      two, an encoder-decoder, or the other way round.
  """
  config = config.copy_and_resolve_references()
  config.data.length = length
  sides = [*objectives.find_objective(config).row_lengths(config)]
  num_sides = 1
  if architectures.stack(model) == 'encoder-decoder':
    num_sides = 2
  require(len(sides) == num_sides, f'objective is {config.objective!r}, which '
          f'does not train model.arch {model.arch!r}: choose one that does')
  return sides


def describe_kinds_of_layer(model: ModelConfig) -> list[dict]:
  """Returns a row for each kind of layer of a model whose layers differ.

  A kind of layer is a named set of fields whose values differ from the model's
  in some layers (model.kinds). The pattern says which layers are of which kind.

  Args:
    model: the model, resolved.

  Returns:
    Rows with the name of the kind, the number of its layers, the fields that it
    changes, its feed-forward network, and the bytes that one of its layers
    caches; [] for a model whose layers are all alike.
  """
  if not model.kinds:
    return []

  # The kind of each layer, of both stacks where there are two.
  names = [kind.name for kind in model.layer_kinds(model.num_layers)]
  if architectures.stack(model) == 'encoder-decoder':
    decoder = model.layer_kinds(model.num_decoder_layers)
    names += [kind.name for kind in decoder]

  # A row for each kind, with what it changes of the model's own fields.
  rows = []
  for name in model.kinds_used:
    layer = model.layer_config(name)
    per_token, per_row = _cache_bytes_of_layer(layer)
    changes = {}
    if name:
      changes = run_config.flatten(model.kinds[name].overrides)
    rows.append({
        'kind': name,
        'layers': names.count(name),
        'changes': changes,
        'ffn': layer.ffn,
        'kv_cache_bytes_per_token': per_token,
        'state_bytes_per_row': per_row,
    })
  return rows


def trained_parameters(module: nn.Module, optim: Config) -> int:
  """Returns the number of parameters that are trained. Frozen layers of a stack
  of which others are trained count too, as their gradient is computed.

  Args:
    module: the model.
    optim: config.optim, whose pattern `freeze` names frozen parameters.
  """
  rate_shares = parameter_shares(module, optim)
  trained = shares.keep_trained(rate_shares, parameter_shapes(module))
  return sum(x.size for x in jax.tree.leaves(trained))


def count_parameters(model: ModelConfig) -> tuple[int, int]:
  """Returns the number of parameters of a resolved model, and how many of them
  one token uses."""
  sizes, active = _parameter_sizes(architectures.build(model))
  return sum(sizes.values()), round(sum(active.values()))


def count_parameters_by_use(model: ModelConfig) -> tuple[int, int]:
  """Returns the number of parameters of a model that are multiplied or added as
  a whole, and the number of those in tables in which a token looks up rows.

  A table of tokens that is also the matrix of the head (tie_embeddings) counts
  for both.

  Args:
    model: the model, resolved.
  """
  module = architectures.build(model)
  roles = paths.flatten_by_path(parameter_roles(module))
  multiplied = looked_up = 0
  for path, x in paths.flatten_by_path(parameter_shapes(module)).items():
    role = roles[path]
    is_table = role.kind == 'embedding'
    is_matrix_of_head = model.tie_embeddings and 'vocab' in role.axes
    if is_table:
      looked_up += x.size
    if not is_table or is_matrix_of_head:
      multiplied += x.size
  return multiplied, looked_up


def _parameter_sizes(module: nn.Module) -> tuple[dict, dict]:
  """Returns the size of each parameter, and how much of it one token uses.

  Of the weights of experts a token uses the share of the experts that it is
  routed to, of a table in which n-grams are looked up only the rows that it
  reads, and of all other parameters the whole.

  Args:
    module: the model.

  Returns:
    The size of each parameter, and the used part of that size, both by the path
    of the parameter.
  """
  moe = module.config.find_part(MoEConfig)
  roles = paths.flatten_by_path(parameter_roles(module))
  shapes = paths.flatten_by_path(parameter_shapes(module))
  # The share of all experts that one token goes through.
  share_of_experts = 1.0
  if moe is not None:
    share_of_experts = routing.mean_active_experts(moe) / moe.num_experts

  sizes = {}
  active = {}
  for path, x in shapes.items():
    role = roles[path]
    share_used = 1.0
    # A lookup reads a few rows of its table.
    if role.reads:
      share_used = role.reads / x.shape[-2]
    elif 'experts' in role.axes:
      share_used = share_of_experts
    sizes[path] = x.size
    active[path] = x.size * share_used
  return sizes, active


def _sum_by_part(sizes: dict) -> dict:
  """Returns the sum of the sizes of the parameters of each part of a model:
  embed, attention, ffn, norms, head, tables, ...

  Args:
    sizes: the size of each parameter, by its path.
  """
  parts: dict = {}
  for path, size in sizes.items():
    part = _part_of_parameter(path)
    parts[part] = parts.get(part, 0) + size
  return parts


def _part_of_parameter(path: str) -> str:
  """Returns the part of a model to which a parameter belongs, such as
  'attention' or 'norms'.

  Args:
    path: the path of the parameter, names of modules with a / between them.
  """
  # Modules that predict later tokens are one part, whatever is in them, because
  # a model is used without them in inference.
  modules = path.split('/')
  first = modules[0]
  last = modules[-1]
  if first == 'mtp':
    return 'mtp'

  # The outermost module with a name of a part decides. Routers and tables,
  # which are looked up and never multiplied, are parts of their own.
  for name in modules:
    if name == 'memory' and last == 'table':
      return 'tables'
    if name == 'ffn' and last.startswith('router'):
      return 'router'
    if name in _MODULES_OF_PART:
      return name

  # Other parameters go by a part of a name, or by their outermost module.
  if any(name.endswith('_streams') for name in modules):
    return 'streams'
  if 'norm' in path:
    return 'norms'
  return first


_MODULES_OF_PART = ('cross_attention', 'attention', 'ffn', 'memory', 'loop')


def cache_bytes(model: ModelConfig) -> tuple[int, int]:
  """Returns the bytes of a decoder's cache in all layers.

  Args:
    model: the model, resolved.

  Returns:
    The bytes for each token, of keys and values; and the bytes for each row of
    a batch, however long it is, such as the state of a recurrence.
  """
  per_token = per_row = 0
  for kind in model.layer_kinds(model.num_decoder_layers):
    keys, state = _cache_bytes_of_layer(model.layer_config(kind.name))
    per_token += keys
    per_row += state
  return per_token, per_row


def _cache_bytes_of_layer(layer: ModelConfig) -> tuple[int, int]:
  """Returns the bytes that a layer caches for each token, and those that it
  caches for each row besides.

  The size of a cache grows linearly with its length. So the bytes for a token
  are the slope, and those for a row the intercept, of the line through the
  sizes at lengths 1 and 2.

  Args:
    layer: the config of the model, as the layer reads it.
  """
  def bytes_of_length(length: int) -> int:
    """Returns the bytes of the cache of one row of this length."""
    empty_cache = functools.partial(
        blocks.empty_cache_of_layer, layer, (1, length))
    return _nbytes(jax.eval_shape(empty_cache))

  one_token = bytes_of_length(1)
  two_tokens = bytes_of_length(2)
  return two_tokens - one_token, 2 * one_token - two_tokens


def describe_layers(model: ModelConfig) -> list[str]:
  """Returns a line of text about a model's kinds of layer: how many layers are
  of each kind, the fields that the kind changes, and the order of the kinds.

  Args:
    model: the model, resolved.

  Returns:
    A list of the one line; [] for a model whose layers are all alike.
  """
  rows = describe_kinds_of_layer(model)
  if not rows:
    return []
  kinds = []
  for row in rows:
    text = f'{row["layers"]} of {row["kind"] or "no kind"}'
    for name, value in row['changes'].items():
      text += f', {name}={value}'
    kinds.append(text)
  # The pattern is repeated between the layers of the prefix and the suffix.
  order = [model.prefix, model.pattern or 'the rest', model.suffix]
  in_order = ', then '.join(part for part in order if part)
  return [f'layers: {"; ".join(kinds)}; in the order {in_order}']
