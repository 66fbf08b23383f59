"""Low-rank adapters, x W + (alpha / rank) x A B, by NumPy: everything else is
frozen, and merged they are the same function. Dropout stands in every place
that it is meant for, no draw repeats, and its bits are random in every
direction."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

import architectures
from architectures.parts import layers, paths
from architectures.parts.attention.multi_head import SelfAttention
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import LayerKind
from architectures.parts.context import Context, Memory
from architectures.parts.layers import FFN
from tests.architectures.parts_test import EACH_BLOCK, normal
from tests.helpers import models
from tests.training import step_test
from training.costs import flops, totals
from training.hf import weights
from training import runs


RANK = 3
LORA = dict(rank=RANK, alpha=6.0, targets=layers.ALL_PRODUCTS)


logits = jax.jit(models.logits, static_argnums=0)


@pytest.fixture(scope='module')
def made():
  """(module, params) with an adapter of every product, B off zero."""
  return models.make_model('llama', lora=LORA, attention_gate='headwise')


@pytest.mark.slow
def test_merged_by_numpy_it_is_the_same_function(made):
  """W + 2 A B of each adapted weight, in float64, in the model without."""
  module, params = made
  flat = {path: np.asarray(x, np.float64)
          for path, x in paths.flatten_by_path(params).items()}
  adapted = [path.removesuffix('_lora_a') for path in flat
             if path.endswith('_lora_a')]
  assert {path.split('/')[-1] for path in adapted} == {
      'query', 'key', 'value', 'out', 'output_gate', 'up', 'gate', 'down'}
  for path in adapted:
    a, b = flat.pop(f'{path}_lora_a'), flat.pop(f'{path}_lora_b')
    assert a.shape[-1] == b.shape[1] == RANK
    for layer, w in enumerate(flat[path]):
      w += 2 * np.tensordot(a[layer], b[layer], 1)
  plain = architectures.build(weights.without_adapters(module.config))
  merged = jax.tree_util.tree_map_with_path(
      lambda key, _: jnp.asarray(flat[paths.path_to_string(key)], jnp.float32),
      weights.remove_adapters(params))
  tokens_BL = models.random_tokens()
  with_adapters = logits(module, params, tokens_BL)
  models.assert_trees_close(with_adapters, logits(plain, merged, tokens_BL),
                            rtol=2e-5)
  # As far away as the adapters are, and `merge` gives what NumPy gives.
  without = logits(plain, weights.remove_adapters(params), tokens_BL)
  assert np.abs(without - with_adapters).max() > 0.1
  also, params = weights.merge_adapters(module, params)
  assert also == plain
  models.assert_trees_close(merged, params, rtol=1e-6)


def test_a_new_adapter_changes_nothing_and_is_drawn_as_by_its_authors():
  module = architectures.build(models.small_config(lora=LORA))
  assert layers.has_adapter(resolved(lora=LORA | dict(rank=1)), 'query')
  params = jax.tree.map(
      lambda x: x.value, jax.jit(module.init)(
          jax.random.key(0), models.random_tokens())['params'],
      is_leaf=lambda x: hasattr(x, 'value'))
  flat = paths.flatten_by_path(jax.device_get(params))
  assert not any(x.any() for path, x in flat.items() if path.endswith('_b'))
  for name, fan_in in (('attention/query', 32), ('attention/out', 32),
                       ('ffn/down', 48)):
    a = flat[f'decoder/layers/block_0/{name}_lora_a']
    assert 0.95 < np.abs(a).max() * fan_in ** 0.5 <= 1, name
    assert np.std(a) * fan_in ** 0.5 == pytest.approx(3 ** -0.5, rel=0.1)
  plain = architectures.build(weights.without_adapters(module.config))
  np.testing.assert_array_equal(
      logits(module, params, models.random_tokens()),
      logits(plain, weights.remove_adapters(params), models.random_tokens()))


@pytest.fixture(scope='module')
def trained():
  """(run, parameters before a step, the state after it)."""
  c = step_test.config(model__lora=LORA, optim__name='adamw')
  run = runs.build(c, architectures.resolve(c.model),
                   mesh=step_test.one_device_mesh())
  new = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.abstract_state)
  params = jax.device_get(models.draw_parameters(run.abstract_state.params))
  with run.context():
    state, _ = run.train_step()(new.replace(params=params),
                                run.put(step_test.batch()))
  return run, params, jax.device_get(state)


def test_a_step_changes_the_adapters_alone(trained):
  run, params, state = trained
  before = paths.flatten_by_path(params)
  for path, x in paths.flatten_by_path(state.params).items():
    assert np.array_equal(x, before[path]) != weights.is_adapter(path), path
  sizes = {path: x.size for path, x in before.items()
           if weights.is_adapter(path)}
  # Adam's two moments of the adapters, a counter each of Adam and the rate.
  assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == (
      2 * sum(sizes.values()) + 2)
  figures = totals.count_costs(run.config, model=run.model)
  assert figures['trained_parameters'] == sum(sizes.values())
  assert figures['optimizer_bytes'] == 4 * (2 * sum(sizes.values()) + 2)


def test_no_gradient_of_a_frozen_weight_is_computed(trained):
  """The FLOPs of the step's program: forward, and in the backward pass twice
  the adapters and attention, but once the frozen products."""
  run = trained[0]
  with run.context():
    program = run.train_step().trace(run.abstract_state,
                                     step_test.batch()).jaxpr
  work = flops.count_work(program, flops.CountOptions('cpu'))
  whole = step_test.BATCH * sum(flops.training_flops(
      run.model, step_test.LENGTH).values())
  forward = flops.forward_flops(run.model, step_test.LENGTH)
  assert 3 * step_test.BATCH * sum(forward.values()) > 1.3 * whole
  # Attention multiplies masked pairs too, and no gradient goes below the first
  # layer's adapters.
  assert work.flops == pytest.approx(whole, rel=0.12)


ALL = 1 - 1e-7  # the greatest rate that a config takes: 1 is refused


def resolved(**changes):
  return architectures.resolve(models.small_config(**changes))


def run(module, *args, **kwargs):
  """Returns (parameters off their initial values, module's output in training
  and in evaluation)."""
  rngs = {name: jax.random.key(0) for name in ('params', 'dropout')}
  params = models.draw_parameters(nn.meta.unbox(jax.eval_shape(
      lambda: module.init(rngs, *args, **kwargs))))
  def call(deterministic):
    with_ctx = [a.replace(deterministic=deterministic)
                if isinstance(a, Context) else a for a in args]
    more = ({'deterministic': deterministic} if 'deterministic' in kwargs
            else {})
    return module.apply(params, *with_ctx, rngs=rngs, **kwargs | more)
  return params['params'], call(False), call(True)


def inputs(B=2, L=6, D=32):
  return normal(1, B, L, D), Context(jnp.arange(L)[None],
                                     memory=Memory(normal(2, B, L + 1, D)))


@pytest.mark.slow
@EACH_BLOCK
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
      want_BLD = layers.layernorm(want_BLD, p['scale'], p['bias'], 1e-5)
  np.testing.assert_allclose(dropped_BLD, want_BLD, atol=1e-5)
  assert not np.allclose(whole_BLD, want_BLD, atol=1e-2)


@pytest.mark.parametrize('make, bias', [
    (lambda: FFN(resolved(ffn_dropout=ALL), 'gelu'), 'down_bias'),
    (lambda: FFN(resolved(ffn_dropout=ALL), 'swiglu'), 'down_bias'),
    (lambda: SelfAttention(resolved(attention_dropout=ALL),
                           LayerKind('global', 'gelu')), 'out_bias')])
def test_a_part_that_drops_all_inside_is_its_bias(make, bias):
  x_BLD, ctx = inputs()
  params, (y_BLD, *_), (whole_BLD, *_) = run(
      make(), x_BLD, ctx, *([None] if bias == 'out_bias' else []))
  np.testing.assert_allclose(
      y_BLD, jnp.broadcast_to(params[bias], y_BLD.shape), rtol=1e-6)
  assert not np.allclose(y_BLD, whole_BLD)


# The bits.


def test_bits_are_scattered_as_the_published_finaliser_scatters():
  """MurmurHash3 of nothing is the finaliser of its seed: two of its vectors."""
  got = layers.hash_uint32(jnp.array([0, 1, 0xFFFFFFFF], jnp.uint32))
  assert got.tolist() == [0, 0x514E28B7, 0x81F16F39]


SHAPE = (4, 6, 64, 96)


def dropped(rate, key=0, shape=SHAPE):
  y = np.asarray(
      layers.apply_dropout(jnp.ones(shape), rate, jax.random.key(key)))
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
  f = jax.jit(lambda x, key: layers.apply_dropout(x, 0.3, key))
  want = jnp.stack([f(x, key) for key in keys])
  np.testing.assert_array_equal(jax.vmap(f, (None, 0))(x, keys), want)
  mesh = jax.make_mesh((2, 2), ('data', 'model'),
                       axis_types=(AxisType.Auto,) * 2)
  split = NamedSharding(mesh, PartitionSpec('data', 'model'))
  y, vjp = jax.vjp(jax.jit(lambda x: f(x, keys[0]), in_shardings=split,
                           out_shardings=split), x)
  np.testing.assert_array_equal(y, want[0])
  np.testing.assert_array_equal(vjp(jnp.ones_like(x))[0] == 0, want[0] == 0)


def test_each_layer_drops_by_a_draw_of_its_own():
  """Two layers alike that keep what one draw keeps would drop alike."""
  module, params = models.make_model(dropout=0.5)
  # A feed-forward whose output is a bias of ones shows the mask: 0 or 2.
  def one(path, x):
    name = path[-1].key
    if 'decoder' not in {k.key for k in path} or 'norm' in str(path):
      return x
    return jnp.ones_like(x) if name == 'down_bias' else jnp.zeros_like(x)
  params = jax.tree_util.tree_map_with_path(one, params)
  layers_NBLD = jax.jit(lambda params: module.apply(
      {'params': params}, models.random_tokens(), deterministic=False,
      keep_layers=True, rngs={'dropout': jax.random.key(0)}).aux['layers'])(
          params)
  masks = np.diff(np.asarray(layers_NBLD), axis=0) > 1
  assert 0.4 < masks.mean() < 0.6
  assert 0.4 < (masks[0] != masks[1]).mean() < 0.6
