"""The gate on what the heads of attention return."""

import numpy as np
import pytest

from architectures.parts.attention.latent import LatentAttention
from architectures.parts.attention.multi_head import Attention
from tests.architectures.parts_test import (
    D, KIND, born, context, normal, resolved)
from tests.helpers import models, numpy_attention
from tests.training import step_test

GATES = ('elementwise', 'headwise')


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize('cross', [False, True])
@pytest.mark.parametrize('gate', GATES)
def test_heads_are_gated_by_the_layers_input(gate, cross):
  """Against NumPy in float64, with grouped keys and biases."""
  x, memory = normal(0, 2, 6, D), normal(1, 2, 6, D)
  c = resolved(attention_gate=gate, num_kv_heads=2)
  module, ctx = Attention(c, KIND, cross=cross), context(memory_BMD=memory)
  params = born(module, x, ctx, None)
  p, at = numpy_attention.float64(params), np.asarray(x, np.float64)
  seen = np.asarray(memory, np.float64) if cross else at
  q, k, v = (numpy_attention.project(p, name, a) for name, a in (
      ('query', at), ('key', seen), ('value', seen)))
  o = numpy_attention.heads(q, k, v, c.score_scale, causal=not cross)
  assert 'output_gate_bias' in p
  z = numpy_attention.project(p, 'output_gate', at)
  assert z.shape == (2, 6, 4) + (8,) * (gate == 'elementwise')
  want = numpy_attention.out(p, o * sigmoid(z.reshape(2, 6, 4, -1)))
  got = module.apply({'params': params}, x, ctx, None)[0]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('gate', GATES)
@pytest.mark.parametrize('mixer', [Attention, LatentAttention])
def test_a_gate_that_is_open_is_none_and_one_half_is_half(mixer, gate):
  fields = dict(mixer='latent' if mixer is LatentAttention else 'attention',
                attention_bias=False, attention_gate=gate)
  x = normal(0, 2, 6, D)
  module = mixer(resolved(**fields), KIND)
  params = born(module, x, context(), None)
  run = lambda module, by: module.apply({'params': {
      n: w * by if n == 'output_gate' else w for n, w in params.items()}},
      x, context(), None)[0]
  plain = run(mixer(resolved(**fields | dict(attention_gate='none')), KIND), 0)
  np.testing.assert_allclose(run(module, 0), plain / 2, rtol=1e-4, atol=1e-6)
  assert not np.allclose(run(module, 1), plain / 2, atol=1e-2)


def test_a_wider_model_divides_the_one_number_of_a_head():
  """In muP, by how many times as wide it is; its bias is added after that."""
  x = normal(0, 2, 6, D)
  base, wider = (Attention(resolved(
      attention_gate='headwise', parametrization='mup', mup_base_width=width,
      mup_base_head_dim=8), KIND) for width in (D, D // 2))
  params = born(base, x, context(), None)
  twice = params | dict(output_gate=2 * params['output_gate'])
  run = lambda module, params: module.apply(
      {'params': params}, x, context(), None)[0]
  np.testing.assert_allclose(run(wider, twice), run(base, params), rtol=1e-5,
                             atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize('gate', GATES)
def test_gates_on_several_devices_are_those_on_one(gate):
  c = step_test.config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  c.model = models.config('llama', attention_gate=gate, num_kv_heads=2,
                          attention_bias=True)
  _, state, metrics = step_test.train(c, steps=1)
  _, alone, other = step_test.train(c, step_test.one_device(), steps=1)
  models.close(alone.params, state.params, rtol=1e-4)
  assert metrics[0]['loss'] == pytest.approx(other[0]['loss'], rel=1e-4)
