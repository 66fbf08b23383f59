"""On a GPU: attention, grouped products, decoding and steps are those of plain
arithmetic, or of the CPU.

  ARCHETYPE_TEST_PLATFORM=gpu python -m pytest -m gpu tests/gpu_test.py

On a CPU, make test-long runs those that need no GPU.
"""

import contextlib
import functools
import os

import jax
import jax.numpy as jnp
import pytest

import architectures
from architectures.parts.attention import kernels
from architectures.parts.layers import HiddenUnits
from architectures.parts.moe import dispatch, grouped
from configs import sharding as tables
from tests.helpers import models
from tests.training import step_test
from training.distributed import devices

ON_GPU = os.environ.get('ARCHETYPE_TEST_PLATFORM') == 'gpu'
pytestmark = pytest.mark.gpu
only_there = pytest.mark.skipif(
    not ON_GPU, reason='it is for a GPU, with ARCHETYPE_TEST_PLATFORM=gpu')
# On a CPU these are long tests, so that they do not grow old unseen.
long_elsewhere = pytest.mark.long if not ON_GPU else pytest.mark.slow

# Bounds, over the largest value. A GPU multiplies float32 with fewer digits by
# default.
TOLERANCE = {'float32': 1e-4, 'bfloat16': 3e-2}
B, L, H, J, K = 2, 128, 4, 2, 64
WINDOW = 40


def exact(dtype):
  return (jax.default_matmul_precision('highest') if dtype == 'float32'
          else contextlib.nullcontext())


def cpu():
  return jax.default_device(jax.devices('cpu')[0])


@only_there
def test_this_is_a_gpu_and_auto_takes_its_kernel():
  assert jax.default_backend() == 'gpu'
  c = architectures.resolve(models.small_config(dtype='bfloat16'))
  assert kernels.choose_attention_kernel(
      c, kernels.Mask(causal=True), L, L) == 'cudnn'


def attention_case(name, dtype):
  """Returns (q, k, v, a weight of the outputs), the mask, and what is seen."""
  q, k, v, w = (jax.random.normal(key, (B, L, heads, K), dtype)
                for key, heads in zip(
                    jax.random.split(jax.random.key(0), 4), (H, J, J, H)))
  at_L1, at_1L = jnp.arange(L)[:, None], jnp.arange(L)[None]
  seen_BLM, ids_BL, window = (at_1L <= at_L1)[None], None, 0
  if name == 'banded':
    window = WINDOW
    seen_BLM &= (at_L1 - at_1L < WINDOW)[None]
  elif name == 'documents':
    ids_BL = 1 + (at_1L >= jnp.array([[50], [101]]))
    seen_BLM &= ids_BL[:, :, None] == ids_BL[:, None]
  return (q, k, v, w), kernels.Mask(
      ids_BL, ids_BL, causal=True, window=window), seen_BLM


@pytest.mark.parametrize('name', ['causal', 'banded', 'documents'])
@pytest.mark.parametrize('kernel, dtype', [
    pytest.param('xla', 'float32', marks=long_elsewhere),
    pytest.param('xla', 'bfloat16', marks=long_elsewhere),
    pytest.param('cudnn', 'bfloat16', marks=only_there),
    pytest.param('tokamax', 'bfloat16', marks=only_there)])
def test_attention_equals_a_plain_softmax(kernel, dtype, name):
  """Compares outputs and gradients with float32 on the CPU, with shared
  keys."""
  if kernel == 'tokamax':
    pytest.importorskip('tokamax', reason='extra `tokamax`')
  args, mask, seen_BLM = attention_case(name, dtype)

  def ours(q, k, v, w):
    if kernel == 'xla':
      out = kernels.attend(q, k, v, scale=K ** -0.5, mask_BLM=seen_BLM,
                           causal=True, window=mask.window)
    else:
      out = kernels.KERNELS[kernel].run(
          q, k, v, mask, seen_BLM, scale=K ** -0.5, softcap=0.0, sink_H=None)
    return (w * out).astype(jnp.float32).sum(), out

  def plain(q, k, v, w):
    k, v = (jnp.repeat(x, H // J, axis=2) for x in (k, v))
    scores_BHLM = jnp.einsum('BLHK,BMHK->BHLM', q, k) * K ** -0.5
    seen_BHLM = jnp.broadcast_to(seen_on_cpu[:, None], scores_BHLM.shape)
    weights_BHLM = jax.nn.softmax(jnp.where(seen_BHLM, scores_BHLM, -1e30))
    out = jnp.einsum('BHLM,BMHK->BLHK', weights_BHLM, v)
    return (w * out).sum(), out

  with exact(dtype):
    (_, out), grads = jax.jit(jax.value_and_grad(
        ours, (0, 1, 2), has_aux=True))(*args)
  with cpu():
    seen_on_cpu = on_cpu(seen_BLM)
    (_, want), want_grads = jax.jit(jax.value_and_grad(
        plain, (0, 1, 2), has_aux=True))(*(
            on_cpu(x).astype(jnp.float32) for x in args))
  close((want, want_grads), (out, grads), dtype)


def on_cpu(tree):
  return jax.device_put(tree, jax.devices('cpu')[0])


def close(want, result, dtype):
  want, result = (jax.tree.map(lambda x: on_cpu(x).astype(jnp.float32), tree)
                  for tree in (want, result))
  models.assert_trees_close(want, result, TOLERANCE[dtype])


@long_elsewhere
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('counts', [
    [60, 0, 129, 11], [0, 0, 0, 0], [0, 256, 0, 0]],
                         ids=['uneven', 'none', 'all'])
def test_products_of_experts_equal_a_loop(counts, dtype):
  """Compares outputs and gradients of rows sorted by expert with the CPU."""
  rows, D, F, E = 256, 64, 96, len(counts)
  normal = lambda i, *shape: jax.random.normal(
      jax.random.key(i), shape, dtype) * shape[-2] ** -0.5
  x_PD, d_PD = normal(0, rows, D) * rows ** 0.5, normal(1, rows, D)
  d_PD = d_PD * (jnp.arange(rows) < sum(counts))[:, None].astype(d_PD.dtype)
  w = dispatch.ExpertWeights(normal(2, E, D, F), normal(3, E, F, D),
                             normal(4, E, D, F))
  gate_P = jax.random.uniform(jax.random.key(5), (rows,)) + 0.5
  kind = HiddenUnits('swiglu')

  def ours(again, x_PD, gate_P, w):
    y_PD = grouped.grouped_ffn(
        x_PD, jnp.array(counts, jnp.int32), gate_P, w, None,
        grouped.GroupedSettings(kind, rows // E, 'xla', again))
    return (y_PD * d_PD).astype(jnp.float32).sum()

  def loop(x_PD, gate_P, w):
    total, start = 0.0, 0
    for e, n in enumerate(counts):
      x, d, gate = (a[start:start + n] for a in (x_PD, d_on_cpu, gate_P))
      h = kind(x @ w.up_EDF[e], x @ w.gate_EDF[e])
      total += (gate[:, None] * (h @ w.down_EFD[e]) * d).sum()
      start += n
    return total

  with exact(dtype):
    ways = [jax.jit(jax.value_and_grad(functools.partial(ours, again),
                                       (0, 1, 2)))(x_PD, gate_P, w)
            for again in (False, True)]
  with cpu():
    *args, d_on_cpu = jax.tree.map(
        lambda x: on_cpu(x).astype(jnp.float32), (x_PD, gate_P, w, d_PD))
    want = jax.value_and_grad(loop, (0, 1, 2))(*args)
  one = jnp.ones(1)  # what differences are measured by where all is zero
  for result in ways:
    close((*want, one), (*result, one), dtype)


@long_elsewhere
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('arch', ['gpt', 'llama', 'mixtral'])
def test_decoding_equals_the_forward_pass(arch, dtype):
  module, params = models.make_model(arch, dtype=dtype)
  tokens = models.random_tokens()
  with exact(dtype):
    want = jax.jit(lambda p: models.logits(module, p, tokens))(params)
    close(want, models.decode_with_cache(module, params, tokens, 1), dtype)


@long_elsewhere
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('arch, moe', [
    ('gpt', {}), ('llama', {}), ('mixtral', {}),
    ('mixtral', dict(dispatch='sorted', capacity_factor=1.25,
                     eval_capacity_factor=1.25))],
                         ids=['gpt', 'llama', 'dropless', 'capacity'])
def test_steps_equal_those_of_the_cpu(arch, moe, dtype):
  """Compares losses, norms of gradients, and parameters after two steps."""
  c = step_test.config()
  c.model = models.small_config(arch, dtype=dtype, moe=moe)
  shape = dict.fromkeys(tables.MESH_AXES, 1)
  with exact(dtype):
    (_, want, wanted_rows), (_, result, here) = (
        step_test.train(c, devices.make_mesh(shape, [device]))
        for device in (jax.devices('cpu')[0], jax.devices()[0]))
  for a, b in zip(wanted_rows, here, strict=True):
    for name in ('loss', 'grad_norm'):
      assert b[name] == pytest.approx(a[name], rel=TOLERANCE[dtype])
  models.assert_trees_close(want.params, result.params, TOLERANCE[dtype])
