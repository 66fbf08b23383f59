"""Weights that are gathered where they are used: one device's numbers, and
no collective that sends more than it must."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts import gathered
from architectures.parts import sharding
from configs import sharding as tables
from tests.helpers import models
from training import losses
from training.distributed import devices

LENGTH = 16


def step_of(module):
  def loss(params, tokens_BL):
    out = module.apply({'params': params}, tokens_BL)
    return losses.cross_entropy(
        out.hidden, out.head, jnp.roll(tokens_BL, -1, 1),
        jnp.ones(tokens_BL.shape), chunk=24)[0]
  return jax.value_and_grad(loss)


def on_mesh(sizes, module, params, fn, *rows):
  """Returns (what fn returns on a mesh, the program as it was asked for)."""
  mesh = devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1) | sizes)
  boxed = jax.eval_shape(module.init, jax.random.key(0), models.tokens(1, 1))
  places = devices.param_shardings(boxed['params'], mesh, 'default')
  with jax.set_mesh(mesh), sharding.rules('default'):
    args = jax.tree.map(jax.device_put, params, places), *rows
    lowered = jax.jit(fn).lower(*args)
    return lowered.compile()(*args), lowered.as_text()


@pytest.mark.slow
@pytest.mark.parametrize('sizes, remat, steps', [
    (dict(fsdp=8), 'full', 2),
    (dict(data=2, fsdp=2, context=2), 'none', 1),
    pytest.param(dict(data=2, fsdp=4), 'dots', 1, marks=pytest.mark.long)])
def test_equals_one_device_and_scatters_each_gradient(sizes, remat, steps):
  module, params = models.make('llama', num_kv_heads=2, remat=remat,
                               tie_embeddings=remat == 'none')
  tokens_BL, step = models.tokens(8, LENGTH), step_of(module)
  want = jax.jit(step)(params, tokens_BL)
  got, text = on_mesh(sizes, module, params, step, tokens_BL)
  models.close(want, got, rtol=5e-5)
  count = lambda name: text.count(f'stablehlo.{name}"')
  # A layer's seven matrices, before the product and for the gradient, the
  # head's, and the ids of tokens.
  assert count('all_gather') == steps * (2 * 7 + 1) + 1
  assert count('reduce_scatter') == steps * (7 + 1)
  # The table of embeddings stays where it is: tokens cross, and back.
  assert count('all_to_all') == 2


@pytest.mark.slow
def test_rows_that_the_mesh_does_not_divide_are_left_to_xla():
  module, params = models.make('llama', num_kv_heads=2)
  tokens_BL = models.tokens(3, LENGTH)
  got, text = on_mesh(
      dict(fsdp=8), module, params,
      lambda params: models.logits(module, params, tokens_BL))
  models.close(models.logits(module, params, tokens_BL), got, rtol=5e-5)
  assert 'stablehlo.all_gather' not in text


@pytest.mark.slow
def test_dense_weights_of_a_mixture_lie_over_fsdp_and_expert():
  """And are gathered over one, then the other: as many gathers and scatters as
  both axes have steps, and none of experts' weights over `expert`."""
  module, params = models.make(
      'mixtral', num_kv_heads=2, remat='full', moe=dict(
          num_experts=4, d_ff=24, dispatch='dropless'))
  tokens_BL, step = models.tokens(8, LENGTH), step_of(module)
  want = jax.jit(step)(params, tokens_BL)
  got, text = on_mesh(dict(fsdp=2, expert=4), module, params, step, tokens_BL)
  models.close(want, got, rtol=5e-5)
  count = lambda name: text.count(f'stablehlo.{name}"')
  # Attention's four matrices, before the product and for the gradient, over two
  # axes each, the experts' three over one, the head's, and the ids of tokens.
  assert count('all_gather') == 2 * (2 * 4 + 3) + 2 + 1
  assert count('reduce_scatter') == 2 * 4 + 3 + 2


@pytest.mark.parametrize('sizes', [
    dict(fsdp=8), dict(fsdp=2, expert=4), dict(data=2, fsdp=4), dict(expert=8)])
def test_shards_are_joined_and_sums_are_cut_up(sizes):
  """As numpy has it, along an axis that is not the first."""
  mesh = devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1) | sizes)
  names = tuple(name for name in sizes if name != 'data')
  w = np.arange(3 * 16.0, dtype=np.float32).reshape(3, 16)
  own = np.arange(8.0, dtype=np.float32)  # a number of each device
  def local(shard, number):
    whole = gathered.along(shard, 1, names)
    return whole[None], gathered.scatter(number * whole, 1, names)[None]
  P = jax.sharding.PartitionSpec
  every = P(tables.MESH_AXES)
  with jax.set_mesh(mesh):
    wholes, cuts = jax.jit(jax.shard_map(
        local, in_specs=(P(None, names), every), out_specs=(every, every),
        check_vma=False))(w, own)
  np.testing.assert_array_equal(wholes, np.broadcast_to(w, (8, 3, 16)))
  n = math.prod(sizes[name] for name in names)
  for i, cut in enumerate(cuts):  # the devices of `names` follow one another
    total = own.reshape(-1, n).sum(1)[i // n] * w
    np.testing.assert_array_equal(cut, np.split(total, n, 1)[i % n])


def test_an_axis_that_does_not_divide_a_weight_is_left_out_of_it():
  shape = dict(fsdp=4, expert=2)
  assert sharding.that_divide(('fsdp', 'expert'), 16, shape) == (
      'fsdp', 'expert')
  assert sharding.that_divide(('fsdp', 'expert'), 12, shape) == ('fsdp',)
  assert sharding.that_divide(('fsdp', 'expert'), 6, shape) == ()


@pytest.mark.parametrize('n, first', [(4, 2), (8, 4), (16, 4), (128, 16),
                                      (7, 7), (2, 2)])
def test_two_steps_are_as_even_as_can_be(n, first):
  assert gathered._first_step(n) == first
