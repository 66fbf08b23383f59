"""Weights that are gathered where they are used: one device's numbers, and
no collective that sends more than it must."""

import jax
import jax.numpy as jnp
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


@pytest.mark.parametrize('n, first', [(4, 2), (8, 4), (16, 4), (128, 16),
                                      (7, 7), (2, 2)])
def test_two_steps_are_as_even_as_can_be(n, first):
  assert gathered._first_step(n) == first
