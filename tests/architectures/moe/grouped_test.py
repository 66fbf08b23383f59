"""Megablox equals a loop over experts, a TPU's program holds it, and where it
does not run it is refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import sharding
from architectures.parts.context import Context
from architectures.parts.moe import grouped
from architectures.parts.moe import layer as moe
from tests.architectures.attention import kernels_test
from tests.helpers import models


COUNTS = {  # of 300 rows, in tiles of 128 and by the even load of 256
    'uneven': [5, 0, 129, 90], 'none': [0, 0, 0, 0], 'all': [0, 300, 0, 0],
    'edges': [128, 0, 128, 1]}


@pytest.mark.slow
@pytest.mark.parametrize('counts', COUNTS.values(), ids=list(COUNTS))
def test_the_product_equals_a_loop_over_experts(monkeypatch, counts):
  """Whatever void rows hold, and with sides that tiles do not divide."""
  monkeypatch.setitem(grouped.SIDE, 'float32', 128)
  R, K, N, E = 300, 200, 130, len(counts)
  keys = jax.random.split(jax.random.key(0), 3)
  x_RK, m_EKN, dy_RN = (jax.random.normal(key, shape) for key, shape in zip(
      keys, ((R, K), (E, K, N), (R, N))))
  inside_R1 = (jnp.arange(R) < sum(counts))[:, None]

  def loop(x_RK, m_EKN):
    ends = np.cumsum(counts)
    parts = [x_RK[end - n:end] @ m_KN
             for end, n, m_KN in zip(ends, counts, m_EKN)]
    return jnp.concatenate([*parts, jnp.zeros((R - ends[-1], N))])

  want_RN, vjp = jax.vjp(loop, x_RK, m_EKN)
  want = want_RN, *vjp(dy_RN)
  void = lambda x: jnp.where(inside_R1, x, jnp.nan)
  got_RN, vjp = jax.vjp(lambda x, m: grouped.megablox(
      256, True, x, m, jnp.array(counts, jnp.int32)), void(x_RK), m_EKN)
  for a, b in zip((got_RN, *vjp(void(dy_RN))), want):
    np.testing.assert_allclose(a, b, atol=1e-5 * (1 + float(jnp.abs(b).max())))


@pytest.mark.slow
def test_on_a_mesh_it_equals_xla(monkeypatch):
  c = architectures.build(models.config('mixtral')).config
  x_BLD = jax.random.normal(jax.random.key(1), (4, 16, c.d_model))
  ctx = Context(jnp.arange(16)[None])
  params = jax.tree.map(lambda p: 20 * p, nn.meta.unbox(jax.jit(
      lambda: moe.MoE(c).init(jax.random.key(0), x_BLD, ctx))()))
  grad = lambda p: jax.grad(lambda p: jnp.square(
      moe.MoE(c).apply(p, x_BLD, ctx)[0]).sum())(p)
  mesh = kernels_test._mesh(jax.devices()[:4], expert=2, tensor=2)
  with jax.set_mesh(mesh), sharding.rules('default'):
    want = jax.jit(grad)(params)
    monkeypatch.setattr(grouped, 'choose', lambda m: 'megablox')
    monkeypatch.setattr(
        grouped, 'product', lambda name, even: functools.partial(
            grouped.megablox, even, name == 'megablox'))
    models.close(want, jax.jit(lambda p: grad(p))(params))


@pytest.mark.slow
@pytest.mark.plan
@pytest.mark.parametrize('chips, sizes', [
    ('v5e:2x4', dict(data=2, expert=2, tensor=2)), ('v5p:2x2x1', dict())],
                         ids=['v5e', 'v5p-alone'])
def test_auto_is_megablox_in_a_tpu_program(chips, sizes):
  """Of 3 products, 3 kernels forward and 6 backward; of other sides too."""
  size = int(np.prod(list(sizes.values()), dtype=int))
  mesh = kernels_test._mesh(kernels_test.tpus(chips)[:size], **sizes)
  program = functools.partial(
      kernels_test.lowered, 'mixtral', mesh, attention_kernel='xla',
      dtype='bfloat16', d_ff=200)
  kernel, xla = program(), program(moe=dict(grouped_kernel='xla'))
  assert xla.as_text().count('ragged_dot') >= 9
  assert 'ragged_dot' not in kernel.as_text()
  calls = kernel.compile().as_text().count(
      'custom_call_target="tpu_custom_call"')
  assert calls == 9


@pytest.mark.slow
def test_a_kernel_that_cannot_is_refused(monkeypatch):
  named = dict(moe=dict(grouped_kernel='megablox'))
  module, params = models.make('mixtral')
  asked = architectures.build(models.config('mixtral', **named))
  with pytest.raises(ValueError, match='grouped_kernel is megablox, which runs '
                     'on tpu, and this program is for cpu: choose from auto, '
                     'xla'):
    models.logits(asked, params, models.tokens())
  with pytest.raises(ValueError, match='this program is for gpu'):
    grouped.check_grouped_kernel(asked.config.moe, 'gpu')
  with pytest.raises(ValueError, match="'megablocks'.*Did you mean 'megablox'"):
    architectures.build(models.config(
        'mixtral', moe=dict(grouped_kernel='megablocks')))
  assert grouped.choose(module.config.moe) == 'xla'
  monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
  assert grouped.choose(module.config.moe) == 'megablox'
