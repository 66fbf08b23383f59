"""Dropout stands in every place that it is meant for, and no draw repeats.

Where everything is dropped, a part returns what it would if it computed
nothing: that tells each place apart, in every wiring of a block. The bits of a
mask are random in every direction.
"""

import math

import flax.linen as nn
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import dropout
from architectures.parts import norms
from architectures.parts.attention.multi_head import Attention
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import LayerKind
from architectures.parts.context import Context
from architectures.parts.ffn import FFN
from tests.helpers import models

ALL = 1 - 1e-7  # the greatest rate that a config takes: 1 is refused


def resolved(**changes):
  return architectures.resolve(models.config(**changes))


def run(module, *args, **kwargs):
  """Returns (parameters off their initial values, module's output in training
  and in evaluation)."""
  rngs = {name: jax.random.key(0) for name in ('params', 'dropout')}
  params = nn.meta.unbox(module.init(rngs, *args, **kwargs))
  params = jax.tree.map(lambda x: x + 0.1, params)
  def call(deterministic):
    with_ctx = [a.replace(deterministic=deterministic)
                if isinstance(a, Context) else a for a in args]
    more = ({'deterministic': deterministic} if 'deterministic' in kwargs
            else {})
    return module.apply(params, *with_ctx, rngs=rngs, **kwargs | more)
  return params['params'], call(False), call(True)


def inputs(B=2, L=6, D=32):
  x_BLD = jax.random.normal(jax.random.key(1), (B, L, D))
  memory_BMD = jax.random.normal(jax.random.key(2), (B, L + 1, D))
  return x_BLD, Context(jnp.arange(L)[None], memory_BMD=memory_BMD)


@pytest.mark.slow
@pytest.mark.parametrize('block, cross', [
    (name, cross) for name, block in BLOCKS.items()
    for cross in (False, True)[:1 + block.CROSS]])
def test_a_block_that_drops_all_that_its_parts_return_passes_x_on(block, cross):
  x_BLD, ctx = inputs()
  kind = LayerKind('global', 'gelu', cross=cross)
  module = BLOCKS[block](resolved(block=block, dropout=ALL), kind)
  params, (dropped_BLD, *_), (whole_BLD, *_) = run(module, x_BLD, ctx, None)
  want_BLD = x_BLD
  if block == 'post_norm':  # which normalises its input after each part
    names = ('attention_norm', *['cross_norm'] * cross, 'ffn_norm')
    for name in names:
      p = params[name]
      want_BLD = norms.layernorm(want_BLD, p['scale'], p['bias'], 1e-5)
  np.testing.assert_allclose(dropped_BLD, want_BLD, atol=1e-5)
  assert not np.allclose(whole_BLD, want_BLD, atol=1e-2)


@pytest.mark.parametrize('kind', ['gelu', 'swiglu'])
def test_a_feed_forward_that_drops_its_hidden_units_is_its_bias(kind):
  x_BLD, ctx = inputs()
  params, (y_BLD, _), (whole_BLD, _) = run(
      FFN(resolved(ffn_dropout=ALL), kind), x_BLD, ctx)
  np.testing.assert_allclose(
      y_BLD, jnp.broadcast_to(params['down_bias'], y_BLD.shape), rtol=1e-6)
  assert not np.allclose(y_BLD, whole_BLD)


def test_attention_that_drops_its_weights_is_its_bias():
  x_BLD, ctx = inputs()
  module = Attention(resolved(attention_dropout=ALL),
                     LayerKind('global', 'gelu'))
  params, (y_BLD, _), (whole_BLD, _) = run(module, x_BLD, ctx, None)
  np.testing.assert_allclose(
      y_BLD, jnp.broadcast_to(params['out_bias'], y_BLD.shape), rtol=1e-6)
  assert not np.allclose(y_BLD, whole_BLD)


# The bits.


def test_bits_are_scattered_as_the_published_finaliser_scatters():
  """MurmurHash3 of nothing is the finaliser of its seed: two of its vectors."""
  got = dropout.mix(jnp.array([0, 1, 0xFFFFFFFF], jnp.uint32))
  assert got.tolist() == [0, 0x514E28B7, 0x81F16F39]


SHAPE = (4, 6, 64, 96)


def dropped(rate, key=0, shape=SHAPE):
  y = np.asarray(dropout.drop(jnp.ones(shape), rate, jax.random.key(key)))
  np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)
  return y == 0


@pytest.mark.parametrize('rate', [0.1, 0.5, 1e-3])
def test_elements_are_dropped_by_their_share_and_independent(rate):
  """Both of two elements, which lie apart on any axis or are of another key,
  with the square of the rate; within 5 standard deviations."""
  x = dropped(rate)
  pairs = [(x, dropped(rate, key=1))]
  for axis, size in enumerate(SHAPE):
    for apart in {1, 2, 4, size // 2, size - 1} & {*range(1, size)}:
      pairs.append((np.take(x, range(apart, size), axis),
                    np.take(x, range(size - apart), axis)))
  for share, mean, n in [(rate, x.mean(), x.size), *(
      (rate ** 2, (a & b).mean(), a.size) for a, b in pairs)]:
    # Of two pairs that share an element, the drops are correlated: a factor.
    sd = math.sqrt(share * (1 - share) / n) * math.sqrt(1 + 2 * rate)
    assert abs(mean - share) < 5 * sd
  rows = x.mean(-1)  # whose spread is that of independent draws
  np.testing.assert_allclose(rows.var() * SHAPE[-1], rate * (1 - rate),
                             rtol=0.2)


def test_a_mask_is_the_same_on_a_mesh_under_vmap_and_for_the_gradient():
  x = jax.random.normal(jax.random.key(1), (4, 2, 8, 6))
  keys = jax.random.split(jax.random.key(2), 3)
  f = lambda x, key: dropout.drop(x, 0.3, key)
  want = jnp.stack([f(x, key) for key in keys])
  np.testing.assert_array_equal(jax.vmap(f, (None, 0))(x, keys), want)
  mesh = jax.make_mesh((2, 2), ('data', 'model'),
                       axis_types=(AxisType.Auto,) * 2)
  split = NamedSharding(mesh, PartitionSpec('data', 'model'))
  y, vjp = jax.vjp(jax.jit(lambda x: f(x, keys[0]), in_shardings=split,
                           out_shardings=split), x)
  np.testing.assert_array_equal(y, want[0])
  np.testing.assert_array_equal(vjp(jnp.ones_like(x))[0] == 0, want[0] == 0)


@pytest.mark.parametrize('scan_layers', [True, False])
def test_each_layer_drops_by_a_draw_of_its_own(scan_layers):
  """Two layers alike that keep what one draw keeps would drop alike."""
  module, params = models.make(dropout=0.5, scan_layers=scan_layers)
  # A feed-forward whose output is a bias of ones shows the mask: 0 or 2.
  def one(path, x):
    name = path[-1].key
    if 'decoder' not in {k.key for k in path} or 'norm' in str(path):
      return x
    return jnp.ones_like(x) if name == 'down_bias' else jnp.zeros_like(x)
  params = jax.tree_util.tree_map_with_path(one, params)
  layers_NBLD = module.apply(
      {'params': params}, models.tokens(), deterministic=False,
      keep_layers=True, rngs={'dropout': jax.random.key(0)}).aux['layers']
  masks = np.diff(np.asarray(layers_NBLD), axis=0) > 1
  assert 0.4 < masks.mean() < 0.6
  assert 0.4 < (masks[0] != masks[1]).mean() < 0.6


# The key of a draw: of the seed, the step, the micro-batch and the stream.
