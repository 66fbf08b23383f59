"""Every export against transformers' own reading of it.

A round trip through our own reader cannot see that transformers reads a field
otherwise, or not at all. So each system is changed in one part of config.model
after the other. What is not refused is exported with random weights and loaded
by transformers, which must compute our logits.
"""

from collections.abc import Iterator
import importlib
import tempfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import blocks
from architectures.parts import paths
from architectures.parts import flat, tables
from architectures.parts.config import ModelConfig
from common import fields
from common import kinds
from common.errors import RequestError
from configs import base
from tests.parity import compare, reference
from training.hf import config as hf_config, weights
from training.runs import abstract_params

# What every system is made to before it is changed.
SIZES = dict(d_model=32, num_layers=2, num_heads=4, head_dim=0, d_ff=0,
             vocab_size=61, max_len=40, dtype='float32')
LENGTH = 12  # of the rows of compare.inputs

# Of longrope, for heads of 16 features.
FACTORS = dict(short_factor=tuple(1 + 0.1 * i for i in range(8)),
               long_factor=tuple(1.0 + i * i for i in range(8)))
# Changes of several fields at once, beside those of `changes`.
CHANGES = (
    dict(num_heads=5, head_dim=8), dict(head='sequence', num_labels=1),
    dict(head='sequence', num_labels=3), dict(head='tokens', num_labels=5),
    dict(head='sequence', num_labels=3, pooling='mean'),
    dict(residual='hyper', streams=dict(dynamic=False)),
    dict(attention_bias=True, attention_out_bias=False),
    dict(attention='banded', sliding_window=5),
    *(dict(prefix=prefix, pattern=pattern, suffix=suffix, kinds=dict(a=a, b=b))
      for prefix, pattern, suffix in (
          ('', 'a,b', ''), ('a', 'b', ''), ('', 'a', 'b'))
      for a, b in (
          (dict(window=0), dict(window=5)), ({}, {}),
          ({}, dict(kv_sharing=True)),
          (dict(window=5), dict(position='none')))),
    *(kinds.place_experts({}, every) for every in (1, 2)),
    dict(parametrization='mup', mup_base_width=16),
    dict(parametrization='mup', mup_base_width=16, mup_base_head_dim=8),
    dict(rope=dict(fraction=0.5, scaling='linear', factor=2.0)),
    *(dict(head_dim=16, rope=dict(dict(
        scaling=scaling, factor=4.0, original_len=10), **more))
      for scaling, more in (
          ('linear', {}), ('ntk', {}), ('llama3', {}),
          ('llama3', dict(low_freq_factor=0.5, high_freq_factor=2.0)),
          ('longrope', FACTORS),
          ('longrope', dict(FACTORS, original_len=20, attention_factor=1.2)),
          ('yarn', {}), ('yarn', dict(beta_fast=4.0, beta_slow=0.5)),
          ('yarn', dict(truncate=False)),
          ('yarn', dict(mscale=0.5, mscale_all_dim=0.5)),
          ('yarn', dict(mscale=0.8, mscale_all_dim=0.5)))),
    dict(head_dim=16, max_len=10, rope=dict(scaling='dynamic', factor=4.0)),
    dict(mamba2=dict(heads=4, head_dim=16)),
    dict(mamba2=dict(groups=2, norm_over='all')),
    dict(mamba2=dict(least_step=0.01, most_step=0.05)),
    dict(moe=dict(num_experts=8, expert_groups=4, top_groups=2)),
    *(dict(moe=dict(shared_experts=1, shared_gate=gate))
      for gate in (False, True)),
    *(dict(moe=dict(eval_capacity_factor=factor, group_size=LENGTH))
      for factor in (0.5, 1.0)),
)


def config(system: str):
  """Returns config.model of a system, small and without a capacity."""
  file = architectures.file_name(system)
  model = importlib.import_module(f'configs.{file}').get_config('tiny').model
  model.update(SIZES, num_layers=kinds.fewest_layers(model, 2))
  if model.num_decoder_layers:
    model.num_decoder_layers = SIZES['num_layers']
  model.moe.update(eval_capacity_factor=0.0, dispatch='auto')
  return model


def changes(base: ModelConfig) -> Iterator[dict[str, Any]]:
  """Yields what differs from `base` in each variant, by the fields of
  config.model: every choice, and other values of what it reads."""
  yield {}
  for name, leaf in flat.FIELDS.items():
    if leaf.rule.about not in (fields.RUN, fields.RECIPE):
      for choice in tables.CHOICES.get(name, leaf.rule.choices):
        yield _nested(name, choice)
  for name, value in hf_config.fields_of_function(base).items():
    for other in _others(value):
      yield _nested(name, other)
  yield from CHANGES


def _others(value) -> list:
  match value:
    case bool():
      return [not value]
    case int():  # PyTorch's products of experts want sizes of 16 bytes
      step = 4 if value > 16 else 1
      return [0, value + step, 2 * (value + step)]
    case float():
      return [0.5 * value, value + 0.4]
  return []


def _nested(name: str, value) -> dict[str, Any]:
  group, _, field = name.rpartition('.')
  return {group: {field: value}} if group else {name: value}


def words(change: dict[str, Any], group: str = '') -> str:
  """Returns a change as one word."""
  return ','.join(
      words(value, f'{name}.') if isinstance(value, dict)
      else f'{group}{name}={value}' for name, value in change.items()) or 'base'


def export_findings(system: str) -> Iterator[compare.Finding]:
  """Yields a finding for each variant of a system that is not refused."""
  seen = []
  for change in changes(architectures.resolve(config(system))):
    model = config(system)
    try:
      base.set_model_fields(model, change)
      module = architectures.build(model)
      hf_config.config_json_of_model(module.config)
    except RequestError:
      continue
    if any(same(module.config, other) for other in seen):
      continue  # what was changed is not read there
    seen.append(module.config)
    error, why = _error(system, module)
    # A state accumulates the rounding of all tokens before.
    limit = compare.LIMITS['output'] * (
        3 if blocks.has_layers_with_state(module.config) else 1)
    yield compare.Finding(f'{words(change)}{why}', error, limit)


def same(one: ModelConfig, other: ModelConfig) -> bool:
  """Whether two configs are of the same function."""
  try:
    hf_config.check_same_function(one, other, '')
  except RequestError:
    return False
  return True


def _error(system: str, module: nn.Module) -> tuple[float, str]:
  """Returns how far transformers' reading of an export is from our model, and
  what it has against the folder, if anything."""
  params = random(module)
  head = module.config.head
  inputs = compare.inputs(architectures.stack(module.config), dict(
      vocab_size=module.config.vocab_size,
      type_vocab_size=module.config.type_vocab_size,
      pad_token_id=max(0, flat.get_field(module.config, 'learned.offset') - 1)))
  if head != 'lm':
    inputs = compare.padded(inputs, left=False)
  with tempfile.TemporaryDirectory() as folder:
    weights.to_hf(module, params, folder)
    try:
      theirs = reference.logits(system, folder, inputs, head)
    except Exception as error:  # of any kind: it refuses what we write
      return float('inf'), f', which transformers refuses: {error}'
  ours = logits(module, params, inputs)
  return compare.worst(ours, theirs, inputs), ''


def random(module: nn.Module):
  """Returns parameters that all matter, without compiling their making."""
  draw = np.random.default_rng(0)
  like = nn.meta.unbox(abstract_params(module))
  return jax.tree_util.tree_map_with_path(
      lambda path, x: (
          paths.path_to_string(path).endswith('scale')
          + 0.15 * draw.standard_normal(x.shape)).astype(x.dtype), like)


def logits(module: nn.Module, params, inputs) -> dict:
  """Returns our logits, by name."""
  call = compare.CALLS[architectures.stack(module.config)]
  return jax.jit(lambda params: {
      name: value for name, value in call(
          module, params, {k: jnp.asarray(v) for k, v in inputs.items()}
      )[0].items() if 'logits' in name})(params)
