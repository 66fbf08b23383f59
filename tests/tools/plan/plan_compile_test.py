"""A tiny model's training step, compiled for TPUs and GPUs not there."""

import importlib.util
import os

from configs import gpt, llama, mixtral
import jax
import pytest

os.environ |= {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_LOG_DIR': 'disabled',
    'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
    'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1'}

from tests.helpers import forked
from tools.plan import chips, collectives, predict, programs
from tools.plan.programs import DoesNotFit
from training.costs import flops, memory

pytestmark = [pytest.mark.plan, pytest.mark.slow]
tpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="libtpu is not installed: pip install -e '.[plan]'")
gpu = pytest.mark.skipif(
    not chips.installed_compiler(chips.parse_topology('h100:1x2x8')),
    reason="the CUDA plugin of jax's own release is not installed: "
    "pip install -e '.[plan-gpu]', with Python 3.12 or later")


def run_on(topology, mesh, config):
  config.data.batch_size = max(config.data.batch_size, 16)
  config.model.dtype = 'bfloat16'
  return programs.run_on_topology(config, topology, mesh)


def compiled(run, topology):
  what = programs.make_program(run, 'train')
  traced = programs.trace_program(run, what)
  return programs.compile_program(run, what, traced, topology.chip.hbm)


@tpu
@pytest.mark.parametrize('preset', ['fsdp', 'ep_fsdp_tp'])
def test_experts_cross_by_all_to_all_and_tokens_are_not_gathered(preset):
  topology = chips.parse_topology('v5p:2x2x2')
  config = mixtral.get_config()
  config.model.update(num_layers=2, d_model=256, d_ff=128, num_kv_heads=4)
  config.model.moe.num_experts = 8
  config.data.batch_size = 64  # so that tokens are more than a dense weight
  run = run_on(topology, preset, config)
  sent = collectives.read_collectives(
      compiled(run, topology).as_text(), run.mesh.shape,
      host_of_device=programs.host_of_devices(run, topology),
      ragged_rows=programs.ragged_rows(run, 'train'))
  crossings = [c for c in sent if c.kind == 'ragged-all-to-all'
               and c.dtype == 'bf16']  # of rows, not of gates
  if run.mesh.shape['expert'] > 1:
    # There and back, forward and backward, in each of the 2 layers.
    assert sum(c.runs for c in crossings) == 2 * 4
    assert {c.axes for c in crossings} == {('expert',)}
    tokens = config.data.batch_size * config.data.length // (
        8 // run.mesh.shape['tensor'])
    assert all(c.payload == tokens * 2 * 256 * 2 for c in crossings)
    host_of = programs.host_of_devices(run, topology)
    foretold = next(c for c in predict.predict_collectives(run, host_of)
                    if c.kind == 'all-to-all')
    assert foretold.runs == 8
    assert foretold.sent * 8 == sum(c.sent * c.runs for c in crossings)
  else:
    assert not crossings
  # Whatever their dtype: the router has them in float32.
  a_device = config.data.batch_size * config.data.length * 256 // 8
  assert not [c for c in sent if c.kind == 'all-gather'
              and 'expert' in c.axes and c.elements >= a_device]


@tpu
def test_no_weight_is_summed_whole_on_a_mesh_of_fsdp_alone():
  """By gathers and scatters instead, which send half of an all-reduce."""
  topology = chips.parse_topology('v5p:4x4x4')
  config = llama.get_config()
  config.model.update(num_layers=2, d_model=512, d_ff=1024, remat='full')
  config.data.batch_size = 64
  run = run_on(topology, 'fsdp=64', config)
  sent = collectives.read_collectives(
      compiled(run, topology).as_text(), run.mesh.shape,
      host_of_device=programs.host_of_devices(run, topology))
  # Norms, and the ids of tokens.
  assert not [c for c in sent if c.kind == 'all-reduce' and c.size == 64
              and c.elements > 4 * 512 and c.dtype != 's32']
  assert {c.kind for c in sent if c.elements >= 512 * 1024
          } == {'all-gather'}
  assert [c for c in sent if c.kind == 'reduce-scatter']


@tpu
@pytest.mark.parametrize('preset, kinds', [
    ('fsdp=4,tensor=2', {('reduce-scatter', 'tensor'),
                         ('all-gather', 'tensor')}),
    ('fsdp=4,expert=2', {('reduce-scatter', 'fsdp'), ('all-gather', 'fsdp'),
                         ('ragged-all-to-all', 'expert')})])
@pytest.mark.usefixtures('quickly')
def test_what_is_large_is_scattered_and_gathered(preset, kinds):
  """Sums over `tensor`, along the length, and the gradients of experts, both
  those that end with d_model and those that do not."""
  topology = chips.parse_topology('v5p:2x2x2')
  config = mixtral.get_config()
  config.model.update(num_layers=2, d_model=1024, d_ff=512, num_kv_heads=4)
  config.model.moe.update(num_experts=4, d_ff=512)
  if 'tensor' in preset:
    config.model.ffn = 'swiglu'
  config.data.update(batch_size=64, length=1024)
  config.model.update(max_len=1024, remat='full')
  run = run_on(topology, preset, config)
  sent = collectives.read_collectives(
      compiled(run, topology).as_text(), run.mesh.shape,
      host_of_device=programs.host_of_devices(run, topology),
      ragged_rows=programs.ragged_rows(run, 'train'))
  # What a reduce-scatter returns is one of its shards.
  whole = lambda c: c.elements * (c.size if c.kind == 'reduce-scatter' else 1)
  large = {(c.kind, *c.axes) for c in sent if c.runs > 1  # of a layer
           and c.dtype == 'bf16' and whole(c) >= 2 * 1024 * 512}
  assert large >= kinds
  assert not [kind for kind, *_ in large if kind == 'all-reduce']


@pytest.fixture
def quickly():
  """Compiles by O1, in a third of the time."""
  level = jax.config.jax_optimization_level
  jax.config.update('jax_optimization_level', 'O1')
  yield
  jax.config.update('jax_optimization_level', level)


@tpu
def test_what_does_not_fit_is_refused_by_the_compiler():
  topology = chips.parse_topology('v5e:2x2')
  config = gpt.get_config()
  config.data.update(batch_size=4 * 64, length=4096)
  config.model.update(max_len=4096, num_heads=64, d_model=512)
  with pytest.raises(DoesNotFit, match='train does not fit.*HBM'):
    compiled(run_on(topology, 'data=4', config), topology)


@tpu
@pytest.mark.parametrize('name', ['v5e:2x2', 'v5p:2x2x1'])
def test_grouped_products_are_counted_as_the_compiler_makes_them(name):
  topology = chips.parse_topology(name)
  one = jax.sharding.SingleDeviceSharding(chips.described_devices(topology)[0])
  shape = lambda *size, dtype='bfloat16': jax.ShapeDtypeStruct(
      size, dtype, sharding=one)
  def products(x_RK, w_EKN, counts_E, d_RN):
    product = lambda x, w: jax.lax.ragged_dot(x, w, counts_E)
    y_RN, back = jax.vjp(product, x_RK, w_EKN)
    return y_RN, back(d_RN)
  traced = jax.jit(products).trace(
      shape(512, 256), shape(4, 256, 128), shape(4, dtype='int32'),
      shape(512, 128))
  options = flops.CountOptions(
      'tpu', dense=chips.products_of_all_groups(topology))
  counted = flops.count_work(traced.jaxpr, options).flops
  made = traced.lower().compile().cost_analysis()['flops']
  assert counted == pytest.approx(made, rel=0.1)


@tpu
@pytest.mark.parametrize('remat, keep', [('full', 'none'), ('offload', 'down')])
def test_the_peak_is_near_the_estimate(remat, keep):
  topology = chips.parse_topology('v5p:2x2x1')
  config = gpt.get_config()
  config.model.update(d_model=1024, num_heads=16, num_layers=8, remat=remat,
                      keep_gathered=keep)
  run = run_on(topology, 'fsdp=4', config)
  stats = compiled(run, topology).memory_analysis()
  peak = programs.peak_bytes(stats)
  estimate = memory.estimate_peak_bytes(run, platform='tpu')
  assert stats.host_temp_size_in_bytes == estimate.get('host_memory', 0)
  assert 0.5 < estimate['peak'] / peak < 2


@tpu
def test_two_slices_send_over_the_network_between_them():
  topology = chips.parse_topology('v5p:2x2x1', 2)
  run = run_on(topology, 'data=2,fsdp=4', gpt.get_config())
  report = programs.analyse_program(run, topology, 'train')
  assert set(programs.host_of_devices(run, topology)) == {0, 1}
  outside = report['roofline']['seconds']['network_outside']
  assert outside > report['roofline']['seconds']['network']


@tpu
def test_generation_holds_weights_and_cache():
  topology = chips.parse_topology('v5p:2x2x1')
  config = gpt.get_config()
  run = run_on(topology, 'fsdp=4', config)
  prefill = programs.analyse_program(run, topology, 'prefill')
  decode = programs.analyse_program(run, topology, 'decode')
  cache = (2 * config.model.num_layers * config.data.batch_size // 4
           * config.data.length * config.model.d_model * 2)
  for report in (prefill, decode):
    sizes = report['memory']
    assert sizes['peak'] > sizes['parameters'] + cache
    assert report['flops']['loops_counted_once'] == 0
    assert 0.9 < report['flops']['ratio'] < 3
  assert all(row['exact'] for row in decode['collectives'])


@gpu
def test_gpus_of_two_hosts():
  topology = chips.parse_topology('h100:1x2x8')
  config = mixtral.get_config()
  config.model.attention_kernel = 'xla'
  run = run_on(topology, 'data=2,fsdp=4,expert=2', config)
  assert set(programs.host_of_devices(run, topology)) == {0, 1}
  report = programs.analyse_program(run, topology, 'train')
  assert report['memory']['peak'] > report['memory']['parameters'] > 0
  kinds = {(row['kind'], tuple(row['axes'])) for row in report['collectives']}
  assert any('all-to-all' in kind and axes == ('expert',)
             for kind, axes in kinds), kinds
  assert report['roofline']['seconds']['network_outside'] > 0
  needed = 1.1 * report['memory']['arguments']
  tight = topology._replace(chip=topology.chip._replace(hbm=needed))
  with pytest.raises(DoesNotFit, match='GiB at its peak, and a device has'):
    programs.analyse_program(run, tight, 'train')


@gpu
def test_kernels_of_tokamax_are_in_a_program_for_hopper():
  """Attention's, forward and the gradient's two; and of the 3 products of
  experts, each forward and two of its gradient."""
  pytest.importorskip('tokamax', reason='extra `tokamax`')
  topology = chips.parse_topology('h100:1x1x2')
  config = mixtral.get_config('tiny')
  config.model.update(num_layers=1, d_ff=256, attention_kernel='tokamax',
                      remat='none', moe=dict(grouped_kernel='tokamax'))
  program = compiled(run_on(topology, 'fsdp=2', config), topology)
  assert program.as_text().count(
      'custom_call_target="mosaic_gpu_v2"') == 3 + 9


@gpu
def test_attention_of_tokamax_compiles_for_blackwell():
  """In a process of its own, as JAX keeps the generation of the first GPU that
  Mosaic compiles for."""
  pytest.importorskip('tokamax', reason='extra `tokamax`')
  result = forked.run(
      '-m', 'tools.plan', '--config=configs/gpt.py:tiny',
      '--topology=b200:1x1x1', '--config.model.num_layers=1',
      '--config.model.dtype=bfloat16',
      '--config.model.attention_kernel=tokamax')
  assert result.returncode == 0, result.stderr
