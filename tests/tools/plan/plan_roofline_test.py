"""The bound of a plan: its arithmetic, by hand counts."""

from configs import gpt, mixtral
from configs.errors import RequestError
import jax
import pytest

from tests.tools.plan.plan_test import run_on_cpu, small
from tools.plan import analyse, chips
from tools.plan import roofline, search
from training import paths
from training.costs import memory


def test_the_slowest_of_compute_memory_and_network_bounds_a_step():
  figures = dict(flops=2 * 459e12, hbm_bytes=2765e9, sent=60e9,
                 sent_outside=0.0, model_flops=459e12)
  t = chips.parse('v5p:2x2x1')
  times = roofline.times(t, 'bfloat16', **figures)
  assert times['seconds'] == pytest.approx(
      {'compute': 2.0, 'hbm': 1.0, 'network': 0.1})
  assert (times['bound'], times['highest_mfu']) == ('compute', 0.5)
  figures['sent_outside'] = 62.5e9
  times = roofline.times(t, 'bfloat16', **figures)
  assert times['bound'] == 'network_outside' and times['step_seconds'] == 10
  v4 = roofline.times(chips.parse('v4:2x2x1', 2), 'bfloat16', **figures)
  assert v4['unknown'] == ['network_outside'] and v4['bound'] == 'compute'


@pytest.mark.parametrize('rules, mesh', [
    ('replicated', 'fsdp'), ('default', 'ep')])
def test_weights_are_read_whole_once_a_pass(rules, mesh):
  config = small(mixtral.get_config())
  config.model.moe.num_experts = 8
  config.mesh.rules = rules
  for dtype in ('float32', 'bfloat16'):
    config.model.update(param_dtype=dtype, dtype='bfloat16')
    run = run_on_cpu(config, mesh)
    shards = run.mesh.shape['expert']
    whole = sum(x.size * 2 // (shards if '/ffn/' in path and x.ndim == 4 else 1)
                for path, x in paths.flatten(run.abstract.params).items()
                if not path.startswith('embed/'))
    assert roofline.hbm_bytes(run, 0.0, False) == whole, dtype
    held = 2 * sum(memory.state(run).values())
    assert roofline.hbm_bytes(run, 0.0, True) == 2 * whole + held, dtype


def test_frozen_weights_are_read_once_and_not_written():
  config = small(gpt.get_config())
  config.optim.freeze = '.*/layers/.*'
  run = run_on_cpu(config, 'dp')
  params = paths.flatten(run.abstract.params)
  once = sum(4 * x.size for path, x in params.items()
             if not path.startswith('embed/'))
  trained = sum(4 * x.size for path, x in params.items()
                if '/layers/' not in path)
  assert roofline.hbm_bytes(run, 0.0, True) == once + 2 * (
      trained + memory.state(run)['optimizer'])


def test_a_precision_without_a_published_peak_is_refused():
  config, t = small(gpt.get_config()), chips.parse('v5p:2x2x2')
  config.model.dtype = 'float32'
  with jax.default_matmul_precision('highest'):
    for ask in (lambda: analyse.run_on(config, t, 'dp'),
                lambda: search.candidates(config, t)):
      with pytest.raises(RequestError, match="PRECISION is 'highest'.*float32"):
        ask()
    assert roofline.peak_flops(t, 'bfloat16') == 459e12


