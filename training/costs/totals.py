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


def count(config: Config, length: int = 0,
          model: ModelConfig | None = None) -> dict:
  """Returns every figure of one config, as a dict for JSON.

  Args:
    config: the config of a run.
    length: the number of tokens of a sequence; 0: data.length, or as many as
      the model has positions for, if these are fewer.
    model: its model, resolved; None: as the config gives it without a
      tokenizer.
  """
  model = model or resolve_model_without_tokenizer(config)
  module = architectures.build(model)
  length = length or int(min(config.data.length, positions.reach(model)))
  sides = _row_lengths(config, model, length)
  is_encoder_decoder = architectures.stack(model) == 'encoder-decoder'

  # Parameters, and the bytes of the state.
  sizes, active = _sizes(module)
  active_by_part = {part: round(x) for part, x in _by_part(active).items()}
  state = _state_bytes(module, config)

  # FLOPs, and the bytes that a decoder keeps; None where it does not apply.
  training = flops.training_flops_of_row(config, model, sides)
  flops_per_token = {
      'training': _per_token(training, sides),
      **_inference_flops(model, length, objectives.of(config).prefix),
  }
  per_token = per_row = memory_per_token = None
  if _decodes(model):
    per_token, per_row = kept_bytes(model)
  if is_encoder_decoder:
    memory_per_token, _ = kept_bytes(flops.without_sharing(model))

  return {
      'model': model.arch,
      'rumoured': model.arch.startswith('gpt4'),
      'parameters': sum(sizes.values()),
      'active_parameters': round(sum(active.values())),
      'trained_parameters': trained_parameters(module, config.optim),
      'by_part': _by_part(sizes),
      'active_by_part': active_by_part,
      'length': length,
      'training_lengths': sides,  # both sides of an encoder-decoder
      'flops_per_token': flops_per_token,
      'kinds_of_layer': kinds_of_layer(model),
      'kv_cache_bytes_per_token': per_token,
      # The state of recurrences, for each row of a batch, however long it is.
      'state_bytes_per_row': per_row,
      # A decoder keeps as much of the source, for each token of it.
      'memory_cache_bytes_per_token': memory_per_token,
      'parameter_bytes': state['parameters'],
      'optimizer_bytes': state['optimizer'],
      'average_bytes': state['average'],  # optim.ema
      'checkpoint_bytes': sum(state.values()),
  }


def _state_bytes(module: nn.Module, config: Config) -> dict[str, int]:
  """Returns the bytes of the parameters, of the optimiser's state and of the
  average of the parameters."""
  params = parameter_shapes(module)
  tx = build_optimizer(module, config.optim, config.train.steps)
  parts = parameter_shares(module, config.optim)
  start = functools.partial(shares.start_average, config.optim, parts)

  # The shapes of the state, as nothing of it is computed.
  state = jax.eval_shape(tx.init, params)
  average = jax.eval_shape(start, params)
  return {
      'parameters': _nbytes(params),
      'optimizer': _nbytes(state),
      'average': _nbytes(average),
  }


def _nbytes(tree: Any) -> int:
  """Returns the bytes of all arrays of a tree of shapes."""
  return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _decodes(model: ModelConfig) -> bool:
  """Whether the model writes text, token by token."""
  return architectures.stack(model) != 'encoder' and model.head == 'lm'


def _inference_flops(model: ModelConfig, length: int, prefix: bool
                     ) -> dict[str, float | None]:
  """Returns the FLOPs of a token in inference: of a prompt (prefill), and of a
  token that is written after it (decode), None where the model writes none.

  Args:
    model: the resolved model.
    length: the number of tokens of a sequence, and of an encoder-decoder's
      source.
    prefix: whether the tokens of a prompt see each other.
  """
  lengths = [length]
  if architectures.stack(model) == 'encoder-decoder':
    lengths = [length, length]
  prefill = flops.forward_flops(model, *lengths, prompt=prefix)
  decode = None
  if _decodes(model):
    decode = sum(flops.decode_flops(model, *lengths).values())
  return {'prefill': _per_token(prefill, lengths), 'decode': decode}


def _per_token(parts: dict[str, float], lengths: Sequence[int]) -> float:
  """Returns the FLOPs of a token, given those of a row by part, and the number
  of tokens on each side of the row."""
  return sum(parts.values()) / sum(lengths)


def brief(config: Config) -> dict:
  """Returns the few figures that are told of every size at once."""
  model = resolve_model_without_tokenizer(config)
  sides = _row_lengths(config, model, config.data.length)
  total, active = parameters(model)
  return {
      'rumoured': model.arch.startswith('gpt4'),
      'parameters': total,
      'active_parameters': active,
      'training_flops_per_token': _per_token(
          flops.training_flops_of_row(config, model), sides),
  }


def _row_lengths(config: Config, model: ModelConfig, length: int) -> list[int]:
  """Returns the number of tokens on each side of a row that a run trains on,
  if its data.length is `length`."""
  config = config.copy_and_resolve_references()
  config.data.length = length
  sides = [*objectives.of(config).row_lengths(config)]
  num_sides = 1
  if architectures.stack(model) == 'encoder-decoder':
    num_sides = 2
  require(len(sides) == num_sides, f'objective is {config.objective!r}, which '
          f'does not train model.arch {model.arch!r}: choose one that does')
  return sides


def kinds_of_layer(model: ModelConfig) -> list[dict]:
  """Returns what each kind of layer of a pattern is, and how many of the
  model's layers are of it; [] for a model whose layers are all alike."""
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
    c = model.of_kind(name)
    per_token, per_row = _layer_bytes(c)
    changes = {}
    if name:
      changes = run_config.flatten(model.kinds[name].said)
    rows.append({
        'kind': name,
        'layers': names.count(name),
        'changes': changes,
        'ffn': c.ffn,
        'kv_cache_bytes_per_token': per_token,
        'state_bytes_per_row': per_row,
    })
  return rows


def trained_parameters(module: nn.Module, optim: Config) -> int:
  """Returns how many parameters are not frozen; where some layers of a stack
  are, they count."""
  parts = parameter_shares(module, optim)
  trained = shares.trained(parts, parameter_shapes(module))
  return sum(x.size for x in jax.tree.leaves(trained))


def parameters(model: ModelConfig) -> tuple[int, int]:
  """Returns the parameters of a resolved model, and the active ones."""
  sizes, active = _sizes(architectures.build(model))
  return sum(sizes.values()), round(sum(active.values()))


def _sizes(module: nn.Module) -> tuple[dict, dict]:
  """Returns the size of each parameter by path, and how much of it one token
  uses: of the experts' weights, the share of those that it goes through, and
  of tables that n-grams look up, the rows that it reads."""
  moe = module.config.find(MoEConfig)
  roles = paths.flatten(parameter_roles(module))
  shapes = paths.flatten(parameter_shapes(module))
  # The share of all experts that one token goes through.
  share_of_experts = 1.0
  if moe is not None:
    share_of_experts = routing.active_experts(moe) / moe.num_experts

  sizes = {}
  active = {}
  for path, x in shapes.items():
    role = roles[path]
    used = 1.0
    # A lookup reads a few rows of its table.
    if role.reads:
      used = role.reads / x.shape[-2]
    elif 'experts' in role.axes:
      used = share_of_experts
    sizes[path] = x.size
    active[path] = x.size * used
  return sizes, active


def _by_part(sizes: dict) -> dict:
  """Returns the sum of the sizes of each part: embed, attention, ffn, norms,
  head, tables, ..."""
  parts: dict = {}
  for path, size in sizes.items():
    part = _part(path)
    parts[part] = parts.get(part, 0) + size
  return parts


def _part(path: str) -> str:
  """Returns the part of a model to which the parameter at a path belongs."""
  first, *inner = path.split('/')
  last = inner[-1] if inner else first
  if first == 'mtp':  # a model is without these modules in inference
    return 'mtp'
  for name in (first, *inner):
    if name == 'memory' and last == 'table':
      return 'tables'  # which nothing multiplies
    if name == 'ffn' and last.startswith('router'):
      return 'router'
    if name in _PARTS:
      return name
  if any(name.endswith('_streams') for name in (first, *inner)):
    return 'streams'
  if 'norm' in path:
    return 'norms'
  return first


_PARTS = ('cross_attention', 'attention', 'ffn', 'memory', 'loop')


def kept_bytes(model: ModelConfig) -> tuple[int, int]:
  """Returns the bytes of the keys and values of every decoder layer, for one
  token; and those that every decoder layer keeps of a row besides."""
  per_token = per_row = 0
  for kind in model.layer_kinds(model.num_decoder_layers):
    keys, state = _layer_bytes(model.of_kind(kind.name))
    per_token += keys
    per_row += state
  return per_token, per_row


def _layer_bytes(c: ModelConfig) -> tuple[int, int]:
  """Returns the bytes that a layer of a kind keeps of each token, and of each
  row besides: the slope and the intercept of its cache's size."""
  one = _nbytes(jax.eval_shape(lambda: blocks.empty_cache(c, (1, 1))))
  two = _nbytes(jax.eval_shape(lambda: blocks.empty_cache(c, (1, 2))))
  return two - one, 2 * one - two


def layers(model: ModelConfig) -> list[str]:
  """Returns a line that says which kinds of layer there are, if there are
  several."""
  rows = kinds_of_layer(model)
  if not rows:
    return []
  kinds = []
  for row in rows:
    text = f'{row["layers"]} of {row["kind"] or "no kind"}'
    for name, value in row['changes'].items():
      text += f', {name}={value}'
    kinds.append(text)
  # The pattern is repeated between what comes before it and after it.
  order = [model.prefix, model.pattern or 'the rest', model.suffix]
  in_order = ', then '.join(part for part in order if part)
  return [f'layers: {"; ".join(kinds)}; in the order {in_order}']
