"""One sequence over several devices (mesh.context): the same numbers as one
device at 8 times the length, and what is gathered for it."""

import math
import re

import flax.linen as nn
import jax
from jax.sharding import NamedSharding
import jax.numpy as jnp
import pytest

import architectures
from architectures.parts import sharding
from architectures.parts.attention import kernels
from configs import sharding as tables
from tests.helpers import models
from training.objectives import losses
from training.distributed import devices

SHORT = 16
LONG = 8 * SHORT  # on 8 devices, each with SHORT


def mesh_of(**sizes):
  return devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1) | sizes)


def compile_on(mesh, fn, module, params, *arrays):
  """Returns (compiled, arguments on the mesh)."""
  boxed = jax.eval_shape(module.init, jax.random.key(0), models.tokens(1, 1))
  with jax.set_mesh(mesh), sharding.rules('default'):
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed['params']))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    rows = devices.batch_sharding(mesh, 'default')
    args = (jax.tree.map(put, params, specs),
            *(jax.device_put(x, rows) for x in arrays))
    return jax.jit(fn).lower(*args).compile(), args


def loss_of(module):
  """As in training, over two documents a row; 0: padding."""
  place_L = jnp.arange(LONG)
  ids_BL = jnp.where(place_L < 50, 1, jnp.where(place_L < LONG - 9, 2, 0))[None]
  positions_BL = jnp.where(ids_BL == 2, place_L[None] - 50, place_L[None])

  def loss(params, tokens):
    out = module.apply({'params': params}, tokens, positions_BL=positions_BL,
                       segment_ids_BL=ids_BL)
    return losses.cross_entropy(
        out.hidden, out.head, jnp.roll(tokens, -1, 1),
        jnp.broadcast_to(ids_BL != 0, tokens.shape), chunk=24)[0]

  return jax.value_and_grad(loss)


@pytest.mark.slow
def test_only_keys_and_values_are_gathered():
  """Each device keeps its part of the length: what is gathered is at most a
  layer's keys, or values, of a single head here, a quarter of the stream."""
  module, params = models.make(max_len=LONG, position='rope', num_kv_heads=1)
  compiled, _ = compile_on(mesh_of(context=8), loss_of(module), module, params,
                           models.tokens(2, LONG))
  text = compiled.as_text()
  sizes = [math.prod(int(n) for n in dims.split(','))
           for shapes in re.findall(r' = (.*?) all-gather(?:-start)?\(', text)
           for dims in re.findall(r'f32\[([\d,]+)\]', shapes)]
  assert max(sizes) == 2 * LONG * module.config.head_dim, sizes
  assert ' all-to-all' not in text


@pytest.mark.slow
def test_decoding_on_a_context_mesh_equals_the_forward_pass():
  module, params = models.make(position='rope')
  tokens = models.tokens(2, 16)
  def decode(params, tokens):
    cache = architectures.init_cache(module.config, 2, 16)
    out = module.apply({'params': params}, tokens[:, :15], cache=cache)
    last = module.apply({'params': params}, tokens[:, 15:], cache=out.cache,
                        positions_BL=jnp.full((2, 1), 15))
    return jnp.concatenate([out.logits, last.logits], 1)
  compiled, args = compile_on(mesh_of(data=2, context=4), decode, module,
                              params, tokens)
  models.close(models.logits(module, params, tokens), compiled(*args))


@pytest.mark.slow
def test_splash_with_split_queries_equals_one_device():
  """In interpret mode: each shard's kernel has the mask of its queries."""
  L, H, J, K = 1024, 2, 1, 16
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (2, L, heads, K))
             for key, heads in zip(keys, (H, J, J)))
  ids_BL = 1 + (jnp.arange(L)[None] >= jnp.array([[300], [777]]))
  mask = kernels.Mask(ids_BL, ids_BL, causal=True, window=200)
  def grads(q, k, v):
    return jax.value_and_grad(lambda *x: jnp.square(kernels.splash(
        *x, mask, scale=0.2, interpret=True)).sum(), (0, 1, 2))(q, k, v)
  want = jax.jit(grads)(q, k, v)
  with jax.set_mesh(mesh_of(data=2, context=4)), sharding.rules('default'):
    models.close(want, jax.jit(grads)(q, k, v))
