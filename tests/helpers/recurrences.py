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
VARIANTS = {'delta_product': ('deltanet', dict(householders=2)),
            'preconditioned': ('deltanet', dict(precondition=1.5))}
WIDTH = 32  # d_model of models.small_config
# Each mixer takes those of these fields that its group has: 2 or 4 heads of
# keys with 6 features, and 4 heads of values with 5.
_SIZES = dict(key_heads=2, value_heads=4, heads=4, groups=2, key_dim=6, state=6,
              value_dim=5, head_dim=5, rank=3, decay_rank=3, rate_rank=3,
              gate_rank=3)
# Where a model in training has parameters that are not about 0.
_ABOUT = dict(scale=1.0, out_norm_scale=1.0, skip=1.0, decay_scale=1.5,
              removal_scale=0.7, conv_bias=0.5, decay_bias=-4.6, step_bias=-4.0)


def parametrize_mixers(*names: str, long: tuple[str, ...] = ()
                       ) -> pytest.MarkDecorator:
  """Returns the mark by which a test runs for each mixer, as `mixer`.

  Args:
    *names: the mixers.
    long: further mixers, for which the test is marked `long`, since it goes
      through the same lines of code for one of `names`.
  """
  return pytest.mark.parametrize(
      'mixer', models.mark_long_except(names, (*names, *long)))


def small_sizes(mixer: str, **changes) -> dict:
  """Returns small values for the fields of a mixer's group of the config."""
  group = blocks.MIXERS[mixer].settings
  names = {field.name for field in dataclasses.fields(group)}
  sizes = {name: size for name, size in _SIZES.items() if name in names}
  return sizes | changes


def settings_of_mixer(config: ModelConfig, mixer: str):
  """Returns the group of a model's config that belongs to a mixer."""
  return config.part(blocks.MIXERS[mixer].settings)


def changes_with_mixer(mixer: str, **changes) -> dict:
  """Returns the changes of models.small_config after which every layer has a
  mixer.

  Args:
    mixer: the mixer, or one of VARIANTS.
    **changes: other values of fields of the mixer's group.
  """
  mixer, settings = VARIANTS.get(mixer, (mixer, {}))
  changes = settings | changes
  return {'mixer': mixer, mixer: small_sizes(mixer, **changes)}


def changes_with_mixer_and_attention(mixer: str, **changes) -> dict:
  """Returns the changes of models.small_config after which every other layer
  has a mixer, and the others have attention."""
  return {'num_layers': 2, mixer: small_sizes(mixer, **changes),
          'pattern': 'own,whole',
          'kinds': dict(own=dict(mixer=mixer), whole={})}


def make_layer(mixer: str, dtype: str = 'float32', **changes):
  """Returns a small layer of a mixer, and parameters for it in float32, which
  are off their tidy initial values.

  Args:
    mixer: the mixer, or one of VARIANTS.
    dtype: the dtype in which the layer computes.
    **changes: other values of fields of the mixer's group.
  """
  config = architectures.resolve(models.small_config(
      'llama', dtype=dtype, num_layers=1,
      **changes_with_mixer(mixer, **changes)))
  layer = blocks.mixer_of_layers(config).module(config, None)
  return layer, _draw_parameters(mixer, tuple(sorted(changes.items())))


@functools.cache
def _draw_parameters(mixer: str, changes: tuple):
  """Returns parameters of a small layer, each about the value that it has in a
  model in training.

  Args:
    mixer: the mixer.
    changes: (field, value) of its group, a tuple so that it can be cached.
  """
  # The shapes, by a layer that computes in float32.
  config = architectures.resolve(models.small_config(
      'llama', num_layers=1, **changes_with_mixer(mixer, **dict(changes))))
  layer = blocks.mixer_of_layers(config).module(config, None)
  shapes = nn.meta.unbox(jax.eval_shape(lambda: layer.init(
      jax.random.key(0), jnp.zeros((1, 2, WIDTH)),
      Context(jnp.arange(2)[None]), None)['params']))

  random = np.random.default_rng(1)

  def draw(path, shape):
    mean = _ABOUT.get(path[-1].key, 0.0)
    values = mean + 0.12 * random.normal(size=shape.shape)
    return jax.device_put(values.astype(np.float32))

  return jax.tree_util.tree_map_with_path(draw, shapes)


def random_inputs(batch: int, length: int, seed: int = 3) -> jax.Array:
  """Returns random inputs of a layer, float32 [batch, length, WIDTH]."""
  values = np.random.default_rng(seed).normal(size=(batch, length, WIDTH))
  return jax.device_put(values.astype(np.float32))


def apply_layer(layer, params, x_BLD: jax.Array, cache=None, first: int = 0,
                **context):
  """Applies a layer, and returns its output, [B, L, D], and its cache.

  Args:
    layer: the layer.
    params: its parameters.
    x_BLD: its inputs.
    cache: what it keeps of the tokens before; None: nothing.
    first: the position of the first token.
    **context: other fields of Context.
  """
  positions_BL = first + jnp.arange(x_BLD.shape[1])[None]
  fields = dict(positions_BL=positions_BL) | context
  y_BLD, cache, _ = layer.apply(
      {'params': params}, x_BLD, Context(**fields), cache)
  return y_BLD, cache


def make_empty_cache(layer, batch: int, length: int = 1):
  """Returns the cache of a layer for rows without a token."""
  mixer = blocks.mixer_of_layers(layer.config)
  return mixer.cache(layer.config, (batch, length))
