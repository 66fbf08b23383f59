"""Models of parts that divide themselves over a mesh: two steps of training on
eight devices are those on one."""

import pytest

from tests.helpers import models
from tests.training import step_test

MODELS = {
    # Values, keys and queries of several sorts, and heads of two numbers.
    'attention': ('llama', dict(
        attention_conv=3, attention_gate='elementwise', num_kv_heads=2,
        num_layers=4, pattern='own,reads', qk_norm=True,
        qk_norm_over='projection', value_residual=True, value_embedding=True,
        kinds=dict(own={}, reads=dict(kv_sharing=True)))),
    'latent': ('deepseek_v3', dict(mtp_depth=1)),
    'deltanet': ('llama', dict(mixer='deltanet', deltanet=dict(
        key_heads=2, value_heads=4, key_dim=8, value_dim=8))),
    'mamba2': ('mamba2', {}),
    'streams': ('llama', dict(residual='mhc')),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_several_devices_are_one(name, capfd):
  system, changes = MODELS[name]
  c = step_test.config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  c.model = models.config(system, vocab_size=64, **changes)
  _, state, metrics = step_test.train(c, steps=2)
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err
  _, alone, other = step_test.train(c, step_test.one_device(), steps=2)
  models.close(alone.params, state.params, rtol=2e-4)
  assert metrics[1]['loss'] == pytest.approx(other[1]['loss'], rel=1e-4)
