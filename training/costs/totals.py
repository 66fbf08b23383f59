"""What a model costs, from its shapes alone: nothing is computed.

Parameters by part, total and active (a token's own: with experts, the router,
those that it goes through and the shared ones), FLOPs, and bytes.
tools/count.py prints them, a sweep matches its points by them.
"""

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
from training.runs import (optimizer, parameter_roles, parameter_shapes,
                           parameter_shares, resolve_alone)
from training.workdir import run_config


def count(config: Config, length: int = 0,
          model: ModelConfig | None = None) -> dict:
  """Returns every figure of one config, as a dict for JSON.

  Args:
    config: a run's.
    length: tokens of a sequence; 0: data.length, or as many as the model has
      positions for, if these are fewer.
    model: its model, resolved; None: as runs.resolve_alone fills it in.
  """
  model = model or resolve_alone(config)
  module, objective = architectures.build(model), objectives.of(config)
  tx = optimizer(module, config.optim, config.train.steps)
  params = parameter_shapes(module)
  opt_state = jax.eval_shape(tx.init, params)
  ema = jax.eval_shape(lambda p: shares.start_average(
      config.optim, parameter_shares(module, config.optim), p), params)
  sizes, active = _sizes(module)
  length = length or int(min(config.data.length, positions.reach(model)))
  sides = _row_lengths(config, model, length)
  stack = architectures.stack(model)
  both = stack == 'encoder-decoder'
  tokens = (length, length) if both else (length,)
  nbytes = lambda tree: int(sum(
      x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)))
  decodes = stack != 'encoder' and model.head == 'lm'
  per_token, per_row = kept_bytes(model) if decodes else (None, None)
  return {
      'model': model.arch,
      'rumoured': model.arch.startswith('gpt4'),
      'parameters': sum(sizes.values()),
      'active_parameters': round(sum(active.values())),
      'trained_parameters': trained_parameters(module, config.optim),
      'by_part': _by_part(sizes),
      'active_by_part': {k: round(v) for k, v in _by_part(active).items()},
      'length': length,
      'training_lengths': sides,  # of an encoder-decoder, those of both sides
      'flops_per_token': {
          'training': sum(flops.of_a_row(
              config, model, sides).values()) / sum(sides),
          'prefill': sum(flops.forward_flops(
              model, *tokens, prompt=objective.prefix).values()) / sum(tokens),
          'decode': sum(flops.decode_flops(model, *tokens).values())
                    if decodes else None,
      },
      'kinds_of_layer': kinds_of_layer(model),
      'kv_cache_bytes_per_token': per_token,
      # Of recurrences, for each row of a batch, however long it is.
      'state_bytes_per_row': per_row,
      # What a decoder keeps of the source is as large, for each token of it.
      'memory_cache_bytes_per_token':
          kept_bytes(flops.without_sharing(model))[0] if both else None,
      'parameter_bytes': nbytes(params),
      'optimizer_bytes': nbytes(opt_state),
      'average_bytes': nbytes(ema),  # of optim.ema
      'checkpoint_bytes': nbytes(params) + nbytes(opt_state) + nbytes(ema),
  }


def brief(config: Config) -> dict:
  """Returns those of the figures that are told of every size at once."""
  model = resolve_alone(config)
  sides = _row_lengths(config, model, config.data.length)
  total, active = parameters(model)
  return {'rumoured': model.arch.startswith('gpt4'), 'parameters': total,
          'active_parameters': active, 'training_flops_per_token': sum(
              flops.of_a_row(config, model).values()) / sum(sides)}


def _row_lengths(config: Config, model: ModelConfig, length: int) -> list[int]:
  """Returns the tokens of a row that a run trains on, whose data.length is
  `length`."""
  config = config.copy_and_resolve_references()
  config.data.length = length
  sides = [*objectives.of(config).row_lengths(config)]
  both = architectures.stack(model) == 'encoder-decoder'
  require(len(sides) == 1 + both, f'objective is {config.objective!r}, which '
          f'does not train model.arch {model.arch!r}: choose one that does')
  return sides


def kinds_of_layer(model: ModelConfig) -> list[dict]:
  """Returns what each kind of layer of a pattern is, and how many of the
  model's layers are of it; [] of a model whose layers are all alike."""
  if not model.kinds:
    return []
  both = architectures.stack(model) == 'encoder-decoder'
  kinds = [kind.name for count in
           [model.num_layers, model.num_decoder_layers][:1 + both]
           for kind in model.layer_kinds(count)]
  rows = []
  for name in model.kinds_used:
    c = model.of_kind(name)
    per_token, per_row = _layer_bytes(c)
    rows.append({
        'kind': name, 'layers': kinds.count(name),
        'changes': run_config.flatten(model.kinds[name].said) if name else {},
        'ffn': c.ffn, 'kv_cache_bytes_per_token': per_token,
        'state_bytes_per_row': per_row})
  return rows


def trained_parameters(module: nn.Module, optim: Config) -> int:
  """Returns how many parameters are not frozen; where some layers of a stack
  are, they count."""
  return sum(x.size for x in jax.tree.leaves(shares.trained(
      parameter_shares(module, optim), parameter_shapes(module))))


def parameters(model: ModelConfig) -> tuple[int, int]:
  """Returns the parameters of a resolved model, and the active ones."""
  sizes, active = _sizes(architectures.build(model))
  return sum(sizes.values()), round(sum(active.values()))


def _sizes(module: nn.Module) -> tuple[dict, dict]:
  """Returns the size of each parameter by path, and how much of it one token
  uses: of what the experts hold, the share of those that it goes through, and
  of tables that n-grams look up, the rows that it reads."""
  m = module.config.find(MoEConfig)
  roles = paths.flatten(parameter_roles(module))
  shapes = paths.flatten(parameter_shapes(module))
  sizes = {path: x.size for path, x in shapes.items()}
  share = routing.active_experts(m) / m.num_experts if m else 1.0

  def used(path: str) -> float:
    if reads := roles[path].reads:
      return reads / shapes[path].shape[-2]
    return share if 'experts' in roles[path].axes else 1.0

  return sizes, {path: size * used(path) for path, size in sizes.items()}


def _by_part(sizes: dict) -> dict:
  """Sums by part: embed, attention, ffn, norms, head, tables, ..."""
  parts: dict = {}
  for path, size in sizes.items():
    names = path.split('/')
    part = next((n for n in names if n in ('cross_attention', 'attention',
                                           'ffn', 'memory', 'loop')), None)
    if part == 'memory' and names[-1] == 'table':
      part = 'tables'  # which nothing multiplies
    if names[0] == 'mtp':  # which the model is without in inference
      part = names[0]
    if part is None and any(n.endswith('_streams') for n in names):
      part = 'streams'
    if part is None:
      part = 'norms' if any('norm' in n for n in names) else names[0]
    if part == 'ffn' and names[-1].startswith('router'):
      part = 'router'
    parts[part] = parts.get(part, 0) + size
  return parts


def kept_bytes(model: ModelConfig) -> tuple[int, int]:
  """Returns the keys and values of every decoder layer, of one token; and what
  every decoder layer keeps of a row besides."""
  layers = [_layer_bytes(model.of_kind(kind.name))
            for kind in model.layer_kinds(model.num_decoder_layers)]
  return sum(x for x, _ in layers), sum(x for _, x in layers)


def _layer_bytes(c: ModelConfig) -> tuple[int, int]:
  def row(length: int) -> int:
    cache = jax.eval_shape(lambda: blocks.empty_cache(c, (1, length)))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  return row(2) - row(1), 2 * row(1) - row(2)


def layers(model: ModelConfig) -> list[str]:
  """A line that says which kinds of layer there are, if there are several."""
  rows = kinds_of_layer(model)
  kinds = '; '.join(f'{row["layers"]} of {row["kind"] or "no kind"}' + ''.join(
      f', {name}={value}' for name, value in row['changes'].items())
                    for row in rows)
  order = ', then '.join(filter(None, (
      model.prefix, model.pattern or 'the rest', model.suffix)))
  return [f'layers: {kinds}; in the order {order}'] if rows else []
