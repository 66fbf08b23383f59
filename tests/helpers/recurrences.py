"""Small layers of every mixer that keeps a state, of those that
architectures/parts/blocks.py lists: a new recurrence has the same tests at
once."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import blocks
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent.layer import Layer
from tests.helpers import models

MIXERS_WITH_STATE = tuple(name for name, mixer in blocks.MIXERS.items()
              if issubclass(mixer.module, Layer))
# Those whose cache and products are as Layer has them.
MIXERS_WITHOUT_OWN_CALL = tuple(name for name in MIXERS_WITH_STATE
              if '__call__' not in vars(blocks.MIXERS[name].module))
# Ways to set a mixer that are looked at as it is, by a name of their own.
VARIANTS = {'delta_product': ('deltanet', dict(householders=2))}
WIDTH = 32  # d_model of models.small_config
# Each mixer takes those of these fields that its group has: 2 or 4 heads of
# keys with 6 features, and 4 heads of values with 5.
_SIZES = dict(key_heads=2, value_heads=4, heads=4, groups=2, key_dim=6, state=6,
              value_dim=5, head_dim=5, rank=3, decay_rank=3, rate_rank=3,
              gate_rank=3)
# Where a model in training has parameters that are not about 0.
_ABOUT = dict(scale=1.0, out_norm_scale=1.0, skip=1.0, decay_scale=1.5,
              removal_scale=0.7, conv_bias=0.5, decay_bias=-4.6, step_bias=-4.0)


def parametrize_mixers(*names: str) -> pytest.MarkDecorator:
  """Parametrises a test by `mixer`."""
  return pytest.mark.parametrize('mixer', names)


def small_sizes(mixer: str, **changes) -> dict:
  """Returns the fields of a mixer's group."""
  group = blocks.MIXERS[mixer].settings
  names = {field.name for field in dataclasses.fields(group)}
  return {name: x for name, x in _SIZES.items() if name in names} | changes


def settings_of_mixer(c: ModelConfig, mixer: str):
  """Returns what a model has of a mixer's sizes."""
  return c.part(blocks.MIXERS[mixer].settings)


def changes_with_mixer(mixer: str, **changes) -> dict:
  """Returns the changes of models.small_config that have it in every layer."""
  mixer, settings = VARIANTS.get(mixer, (mixer, {}))
  changes = settings | changes
  return {'mixer': mixer, mixer: small_sizes(mixer, **changes)}


def changes_with_mixer_and_attention(mixer: str, **changes) -> dict:
  """The same in every other layer; attention is in the others."""
  return {'num_layers': 2, mixer: small_sizes(mixer, **changes),
          'pattern': 'own,whole',
          'kinds': dict(own=dict(mixer=mixer), whole={})}


def make_layer(mixer: str, dtype: str = 'float32', **changes):
  """Returns (layer, its parameters off their tidy initial values)."""
  c = architectures.resolve(models.small_config('llama', dtype=dtype,
                                                num_layers=1,
                                          **changes_with_mixer(mixer,
                                                               **changes)))
  return blocks.mixer_of_layers(c).module(c, None), _drawn(
      mixer, tuple(sorted(changes.items())))


@functools.cache
def _drawn(mixer: str, changes: tuple):
  c = architectures.resolve(models.small_config(
      'llama', num_layers=1, **changes_with_mixer(mixer, **dict(changes))))
  layer = blocks.mixer_of_layers(c).module(c, None)
  shapes = nn.meta.unbox(jax.eval_shape(lambda: layer.init(
      jax.random.key(0), jnp.zeros((1, 2, WIDTH)),
      Context(jnp.arange(2)[None]), None)['params']))
  rng = np.random.default_rng(1)
  return jax.tree_util.tree_map_with_path(lambda path, x: jax.device_put((
      _ABOUT.get(path[-1].key, 0.0) + 0.12 * rng.normal(size=x.shape)
  ).astype(np.float32)), shapes)


def random_inputs(batch: int, length: int, seed: int = 3) -> jax.Array:
  """Returns x_BLD of a layer."""
  return jax.device_put(np.random.default_rng(seed).normal(
      size=(batch, length, WIDTH)).astype(np.float32))


def apply_layer(layer, params, x_BLD: jax.Array, cache=None, first: int = 0,
            **context):
  """Returns (y_BLD, cache) of a layer; `first` is the place of its first token,
  and `context` goes to Context."""
  at = dict(positions_BL=first + jnp.arange(x_BLD.shape[1])[None]) | context
  y_BLD, cache, _ = layer.apply(
      {'params': params}, x_BLD, Context(**at), cache)
  return y_BLD, cache


def make_empty_cache(layer, batch: int, length: int = 1):
  """Returns the cache of rows without a token."""
  mixer = blocks.mixer_of_layers(layer.config)
  return mixer.cache(layer.config, (batch, length))
