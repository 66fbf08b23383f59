"""Weights that are gathered where they are used give the numbers of one device,
and no collective sends more than it must."""

import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import paths, sharding
from configs import sharding as tables
from tests.architectures.parts_test import normal
from tests.helpers import models
from training import runs
from training.objectives import losses
from training.distributed import devices

LENGTH = 16


def step_of(module):
  def loss(params, tokens_BL):
    out = module.apply({'params': params}, tokens_BL)
    return losses.cross_entropy(
        out.hidden, out.head, jnp.roll(tokens_BL, -1, 1),
        jnp.ones(tokens_BL.shape), chunk=24)[0]
  return jax.value_and_grad(loss)


def make_mesh(sizes):
  return devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1) | sizes)


def on_mesh(sizes, module, params, fn, *rows):
  """Returns the program of fn on a mesh, lowered, that XLA has yet to compile,
  and its arguments."""
  mesh = make_mesh(sizes)
  boxed = jax.eval_shape(module.init, jax.random.key(0),
                         models.random_tokens(1, 1))
  places = devices.param_shardings(boxed['params'], mesh, 'default')
  with jax.set_mesh(mesh), sharding.install_rules(
      tables.RULES['default']):
    args = jax.tree.map(jax.device_put, jax.device_get(params), places), *rows
    return jax.jit(fn).lower(*args), args


# Of all layers together. What is smaller is not worth a collective of its own.
SMALL = 4 * 2 ** 20


@pytest.mark.parametrize('system', models.mark_long_except(
    ('deepseek_v4', 'kimi_linear', 'mamba', 'zaya'), models.SYSTEMS))
def test_no_large_matrix_stands_whole_along_fsdp(system):
  """At all published sizes, from the shapes and the table of rules alone."""
  rules = dict(tables.RULES['default'])
  module = importlib.import_module(f'configs.{system}')
  for size in module.SIZES:
    model = runs.resolve_model_without_tokenizer(module.get_config(size))
    boxes = jax.tree_util.tree_leaves_with_path(
        runs.abstract_params(architectures.build(model)),
        is_leaf=lambda x: hasattr(x, 'names'))
    for path, box in boxes:
      is_cut = any('fsdp' in rules.get(axis, ()) for axis in box.names)
      count = math.prod(box.value.shape) * box.value.dtype.itemsize
      assert is_cut or not box.role.is_matrix or count <= SMALL, (
          size, paths.path_to_string(path), box.names, box.value.shape)


@pytest.mark.slow
@pytest.mark.parametrize('system', [
    'mamba', *(pytest.param(system, marks=pytest.mark.long)
               for system in ('deepseek_v4', 'zaya'))])
def test_products_of_low_rank_equal_one_device(system):
  module, params = models.make_model(system)
  tokens_BL, step = models.random_tokens(8, LENGTH), step_of(module)
  want = jax.jit(step)(params, tokens_BL)
  lowered, args = on_mesh(dict(fsdp=8), module, params, step, tokens_BL)
  models.assert_trees_close(want, lowered.compile()(*args), rtol=5e-5)


@pytest.mark.slow
def test_equals_one_device_and_scatters_each_gradient():
  module, params = models.make_model('llama', num_kv_heads=2, remat='full',
                                     tie_embeddings=False)
  tokens_BL, step = models.random_tokens(8, LENGTH), step_of(module)
  want = jax.jit(step)(params, tokens_BL)
  lowered, args = on_mesh(dict(fsdp=8), module, params, step, tokens_BL)
  models.assert_trees_close(want, lowered.compile()(*args), rtol=5e-5)
  text = lowered.as_text()
  count = lambda name: text.count(f'stablehlo.{name}"')
  # Gathered are a layer's seven matrices, for the product and for the gradient,
  # the head's, and the ids of the tokens.
  assert count('all_gather') == 2 * (2 * 7 + 1) + 1
  assert count('reduce_scatter') == 2 * (7 + 1)
  # The table of embeddings stays in shards: its rows cross, and gradients back.
  assert count('all_to_all') == 2


@pytest.mark.slow
def test_a_weight_that_stays_gathered_is_not_gathered_again():
  module, params = models.make_model(
      'llama', num_kv_heads=2, num_layers=3, remat='offload',
      keep_gathered='query,key,value,out')
  text = on_mesh(dict(data=2, fsdp=4), module, params, step_of(module),
                 models.random_tokens(8, LENGTH))[0].as_text()
  assert text.count('stablehlo.all_gather"') == 7 + 3 + 2
  assert text.count('stablehlo.reduce_scatter"') == 7 + 1


@pytest.mark.slow
def test_of_a_row_over_several_devices_only_keys_and_values_are_gathered():
  """Each keeps its part of the length: what is gathered is at most a layer's
  keys, or values, of a single head here, a quarter of the stream."""
  L = 8 * LENGTH
  module, params = models.make_model(max_len=L, position='rope', num_kv_heads=1)
  text = on_mesh(dict(context=8), module, params, step_of(module),
                 models.random_tokens(2, L))[0].compile().as_text()
  sizes = [math.prod(int(n) for n in dims.split(','))
           for shapes in re.findall(r' = (.*?) all-gather(?:-start)?\(', text)
           for dims in re.findall(r'f32\[([\d,]+)\]', shapes)]
  assert max(sizes) == 2 * L * module.config.head_dim, sizes
  assert ' all-to-all' not in text


def test_the_input_of_each_layer_waits_in_the_hosts_memory():
  """And nothing else does; without a loop over layers too."""
  tokens_BL = models.random_tokens(2, 16)
  for scan, remat in ((True, 'offload'), (False, 'offload'), (True, 'full')):
    module, params = models.make_model('llama', num_layers=3, scan_layers=scan,
                                       remat=remat)
    text = str(jax.make_jaxpr(step_of(module))(params, tokens_BL))
    D, waiting = module.config.d_model, set(re.findall(r'<host>(\S+)', text))
    assert waiting == ({f'[2,16,{D}]', f'[3,2,16,{D}]'}
                       if remat == 'offload' else set()), waiting


@pytest.mark.parametrize('sizes', [
    dict(fsdp=8), dict(fsdp=2, expert=4), dict(data=2, fsdp=4), dict(expert=8)])
def test_shards_are_joined_and_sums_are_cut_up(sizes):
  """Compares with numpy, along an axis that is not the first."""
  names = tuple(name for name in sizes if name != 'data')
  w = np.arange(3 * 16.0, dtype=np.float32).reshape(3, 16)
  numbers = np.arange(8.0, dtype=np.float32)  # a number of each device
  def local(shard, number):
    whole, gradient = jax.vjp(
        lambda w: sharding.gather_shards(w, 1, names), shard)
    cut, = gradient(number[:, None] * whole)
    return whole[None], cut[None]
  P = jax.sharding.PartitionSpec
  every = P(tables.MESH_AXES)
  with jax.set_mesh(make_mesh(sizes)):
    wholes, cuts = jax.jit(jax.shard_map(
        local, in_specs=(P(None, names), every), out_specs=(every, every),
        check_vma=False))(w, numbers)
  np.testing.assert_array_equal(wholes, np.broadcast_to(w, (8, 3, 16)))
  n = math.prod(sizes[name] for name in names)
  for i, cut in enumerate(cuts):  # the devices of `names` follow one another
    total = numbers.reshape(-1, n).sum(1)[i // n] * w
    np.testing.assert_array_equal(cut, np.split(total, n, 1)[i % n])


@pytest.mark.parametrize('sizes', [
    dict(fsdp=8), dict(fsdp=2, expert=4), dict(data=2, fsdp=2, tensor=2)])
def test_rows_are_looked_up_where_they_lie(sizes):
  table_IK, d_BLUK = normal(0, 32, 4), normal(1, 8, 3, 2, 4)
  ids_BLU = np.random.default_rng(2).integers(0, 32, (8, 3, 2))
  def rows(table_IK):
    return sharding.look_up_sharded_rows(table_IK, ids_BLU, jnp.float32)
  def both(table_IK):
    x_BLUK, back = jax.vjp(rows, table_IK)
    return x_BLUK, back(d_BLUK)[0]
  want = jax.jit(both)(table_IK)
  with jax.set_mesh(make_mesh(sizes)), sharding.install_rules(
      tables.RULES['default']):
    lowered = jax.jit(both).lower(table_IK)
    models.assert_trees_close(want, lowered.compile()(table_IK))
  assert 'reduce_scatter"' in lowered.as_text()


@pytest.mark.parametrize('axes', [('embed', 'mlp'), (None, 'mlp')])
@pytest.mark.parametrize('sizes', [
    dict(data=2, fsdp=4), dict(fsdp=2, expert=4),
    dict(data=2, fsdp=2, tensor=2)])
def test_gradients_of_shards_are_summed_whatever_splits_the_weight(sizes, axes):
  shards = math.prod(n for name, n in sizes.items() if name != 'tensor')
  d_Q = np.arange(shards * 16.0 * 8, dtype=np.float32).reshape(shards, 16, 8)
  with jax.set_mesh(make_mesh(sizes)), sharding.install_rules(
      tables.RULES['default']):
    total = jax.jit(lambda d_Q: sharding.sum_gradients_of_shards(
        d_Q, axes))(d_Q)
  np.testing.assert_array_equal(total, d_Q.sum(0))


@pytest.mark.parametrize('sizes, gathers', [
    (dict(data=2, fsdp=4), 1), (dict(fsdp=2, expert=4), 2)])
@pytest.mark.parametrize('keep', [True, False])
def test_a_product_gathers_its_weight_again_unless_it_may_be_kept(
    sizes, gathers, keep):
  x_BLD, w_DF = normal(0, 8, 4, 16), normal(1, 16, 24)
  local = lambda x, w: jnp.einsum('BLD,DF->BLF', x, w)
  def loss(x_BLD, w_DF):
    at = sharding.sharding_of_product(
        'BLD,DF->BLF', x_BLD, w_DF, ('embed', 'mlp'))
    y_BLF = sharding.multiply_by_gathered_weight(local, x_BLD, w_DF, at, keep)
    return jnp.square(y_BLF).sum()
  want = jax.grad(lambda x, w: jnp.square(local(x, w)).sum(), (0, 1))(
      x_BLD, w_DF)
  with jax.set_mesh(make_mesh(sizes)), sharding.install_rules(
      tables.RULES['default']):
    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(x_BLD, w_DF)
    models.assert_trees_close(want, lowered.compile()(x_BLD, w_DF))
  text = lowered.as_text()
  assert text.count('stablehlo.all_gather"') == gathers * (1 if keep else 2)
  assert text.count('stablehlo.reduce_scatter"') == gathers
  if keep:  # the product, the weight's gradient, its sum, then that of x
    first, last = text.split('stablehlo.optimization_barrier')
    assert (first.count('stablehlo.dot_general'),
            last.count('stablehlo.dot_general')) == (2, 1)
    assert first.count('stablehlo.reduce_scatter"') == gathers


def test_rows_of_a_table_whose_columns_are_split_and_their_gradient():
  table_VD = normal(0, 12, 16)
  ids_BL, d_BLD = models.random_tokens(8, 5) % 12, jnp.arange(8 * 5 * 16.0)
  def loss(table_VD, ids_BL):
    rows_BLD = sharding.look_up_embeddings(table_VD, ids_BL, jnp.float32)
    return (rows_BLD * d_BLD.reshape(8, 5, 16)).sum()
  want = jax.value_and_grad(lambda table_VD: (
      table_VD[ids_BL] * d_BLD.reshape(8, 5, 16)).sum())(table_VD)
  with jax.set_mesh(make_mesh(dict(fsdp=2, expert=4))), sharding.install_rules(
      tables.RULES['default']):
    got = jax.jit(jax.value_and_grad(loss))(table_VD, ids_BL)
  models.assert_trees_close(want, got)


@pytest.mark.parametrize('num_devices', [*range(2, 40), 64, 128, 144, 1024])
def test_a_reduction_in_two_steps_has_the_squarest_groups(num_devices):
  size = sharding._size_of_first_groups(num_devices)
  divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
  assert size == min(d for d in divisors if d * d >= num_devices)
