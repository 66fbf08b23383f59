"""Plans: names of topologies, arithmetic, the readers of compiled programs, and
the estimate without a compiler."""

import json
import re

from common.errors import RequestError
from configs import gpt, mixtral
from configs import sharding as tables
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tests.helpers import forked
from tools import explain_sharding
from tools.plan import chips, collectives, predict, programs, report, search
from tools.plan.programs import DoesNotFit
from training import runs
from architectures.parts import paths
from training.costs import flops, memory
from training.data import tokenizers
from training.distributed import devices


def test_names_say_chips_devices_and_what_is_together():
  cases = {'v5p:4x4x8': (128, 128, 128), 'v5e:4x8': (32, 32, 32),
           'tpu7x:2x2x1': (4, 8, 8), 'h100:1x8x8': (64, 64, 8)}
  for name, figures in cases.items():
    t = chips.parse_topology(name)
    assert (t.chips, t.devices, t.devices_in_fast_network) == figures, name
  t = chips.parse_topology('v5p:2x2x2', 2)
  assert (t.chips, t.devices_in_fast_network) == (16, 8)


@pytest.mark.parametrize('name, slices, words', [
    ('v5q:4x4x4', 1, "Did you mean 'v5"), ('v5p', 1, 'v5p:4x4x8'),
    ('v5e:32x32', 1, 'choose from 1x1, 2x2'),
    ('v5p:3x4x4', 1, 'three multiples of 4 in rising order'),
    ('v5p:8x4x4', 1, 'in rising order'), ('v4:16x16x32', 1, '4,096 chips'),
    ('h100:1x8x8', 2, 'HOSTSxGPUS'), ('h100:3x5x7', 1, 'all hosts in one'),
    ('h100:1x1x64', 1, '1, 2, 4 or 8 GPUs'),
    ('v4:2x2x1', 0, 'must be >= 1')])
def test_wrong_names_are_refused_with_choices(name, slices, words):
  with pytest.raises(ValueError, match=words):
    chips.parse_topology(name, slices)


def test_the_compiler_of_gpus_is_of_the_same_version_as_jax(monkeypatch):
  versions = {'libtpu': '1.0', 'jax': '2.0', 'jax-cuda13-plugin': '2.0',
              'jax-cuda13-pjrt': '2.0'}
  monkeypatch.setattr(chips.importlib.metadata, 'version', versions.get)
  tpu, gpu = (chips.parse_topology(x) for x in ('v5p:2x2x2', 'h100:1x1x8'))
  assert chips.installed_compiler(tpu) == 'libtpu 1.0'
  assert chips.installed_compiler(gpu) == 'jax-cuda13-plugin 2.0'
  versions['jax'] = '2.1'
  assert chips.installed_compiler(tpu) and not chips.installed_compiler(gpu)


def test_every_chip_has_a_published_peak():
  for name, chip in chips.CHIPS.items():
    peak = flops.peak_flops_per_second
    assert peak(chip.device_kind, 'bfloat16', chip.cores), name
  v5p = chips.parse_topology('v5p:2x2x1')
  assert predict.require_peak_flops(v5p, 'bfloat16') == 459e12
  assert 2 * predict.require_peak_flops(
      chips.parse_topology('tpu7x:2x2x1'), 'bfloat16') == 2307e12


def test_products_are_counted_through_loops_branches_and_shards():
  x, key = jnp.ones((4, 8)), 2.0 * 4 * 8 * 8
  w = jnp.ones((8, 8))
  count = lambda f, *a, **k: flops.count_work(
      jax.make_jaxpr(f)(*a), flops.CountOptions('tpu', **k)).flops

  def scanned(x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, 5)[0]

  assert count(scanned, x) == 5 * key
  remade = jax.value_and_grad(lambda x: jax.checkpoint(scanned)(x).sum())
  assert count(remade, x) == 5 * 3 * key  # forward, again, of x
  assert count(lambda x: ((x @ w), x)[1], x) == 0  # dead
  assert count(lambda x: jax.lax.platform_dependent(
      x, cpu=lambda x: x, default=lambda x: x @ w), x) == key
  until = lambda x: jax.lax.while_loop(
      lambda x: x.sum() < 9, lambda x: x @ w, x)
  assert count(until, x) == key and count(until, x, num_passes=7) == 7 * key
  mesh = devices.make_mesh(tables.PRESETS['tp'])
  with jax.set_mesh(mesh):
    shard = jax.shard_map(lambda x: x @ w, in_specs=P('data'),
                          out_specs=P('data'))
    assert count(shard, jnp.ones((8, 8))) == 8 * key  # on tensor alike
  ragged = lambda x: jax.lax.ragged_dot(x, jnp.ones((2, 8, 8)),
                                        jnp.array([1, 1]))
  assert count(ragged, x) == key
  assert count(ragged, x, rows=2) == key / 2
  # Rows are of as many groups as they can be, whose matrices alone are read.
  three = jax.make_jaxpr(lambda x: jax.lax.ragged_dot(
      x, jnp.ones((3, 8, 8)), jnp.array([1, 1, 0])))(x)
  for rows in (1, 2, 4):
    assert flops.count_work(three, flops.CountOptions('tpu', rows)).nbytes == (
        2 * rows * 8 + min(rows, 3) * 64 + 3) * 4
  # Forward again, and a gradient each of the rows and of both matrices.
  both = jax.grad(lambda x, w: (jax.lax.ragged_dot(
      x, w, jnp.array([1, 1])) ** 2).sum(), (0, 1))
  args = x, jnp.ones((2, 8, 8))
  assert count(both, *args) == 3 * key
  for n in range(1, 4):
    dense = flops.GROUPED_PRODUCTS[:n]
    assert count(both, *args, dense=dense) == (3 + n) * key, dense


@pytest.fixture
def no_compiler(monkeypatch):
  monkeypatch.setattr(chips, 'installed_compiler', lambda topology: '')


def small(config):
  config.model.update(d_model=32, num_layers=2, num_heads=4, num_kv_heads=4,
                      d_ff=64, max_len=32)
  config.data.update(length=32, batch_size=16)
  return config


def run_on_cpu(config, preset):
  model, _ = runs.resolve_model(config, tokenizers.load('bytes'))
  shape = tables.PRESETS[preset] if isinstance(preset, str) else preset
  return runs.build(config, model, devices.make_mesh(shape))


@pytest.mark.slow
def test_without_a_compiler_every_figure_is_an_estimate(no_compiler):
  t = chips.parse_topology('v5p:2x2x2')
  run = programs.run_on_topology(small(mixtral.get_config()), t, 'ep_fsdp_tp')
  plan = programs.make_plan(run, t, ['train'])
  [one] = plan['programs']
  assert plan['estimate'] and one['estimate'] and plan['fits']
  assert one['memory']['peak'] > one['memory']['parameters'] > 0
  work = one['flops']
  assert work['ratio'] >= 1 and work['loops_counted_once'] == 0
  assert 0 < one['roofline']['highest_mfu'] <= 1
  assert 'all-to-all' in {row['kind'] for row in one['collectives']}
  lines = report.plan_as_text(plan).splitlines()
  figures = [line for line in lines if 'GiB' in line
             and any(c.isdigit() for c in line)]
  assert figures and all('~' in line for line in figures)
  json.dumps(plan)
  with pytest.raises(RequestError, match='no estimate'):
    programs.make_plan(run, t, ['prefill'])


def test_a_plan_names_the_largest_of_what_stands_whole(
    no_compiler, monkeypatch):
  """Of a GPT, in which fsdp cuts d_model, the biases of d_ff numbers."""
  monkeypatch.setattr(programs, 'LEAST_BYTES_NAMED', 2 * 64 * 4)
  t = chips.parse_topology('v5p:2x2x2')
  run = programs.run_on_topology(small(gpt.get_config()), t, 'fsdp')
  row, = programs.largest_parameters_whole_along_fsdp(run)
  assert row['bytes_per_device'] == 2 * 64 * 4
  assert row['name'].startswith('decoder/layers/block_0/ffn/up')
  alone = programs.run_on_topology(small(gpt.get_config()), t, 'dp')
  assert not programs.largest_parameters_whole_along_fsdp(alone)


def test_sequences_are_those_of_a_device_at_once(no_compiler):
  config = small(gpt.get_config())
  config.train.grad_accumulation = 2
  t = chips.parse_topology('v5p:2x2x2')
  plan = programs.make_plan(programs.run_on_topology(config, t, 'fsdp'), t, [])
  assert plan['sequences_per_device'] == 16 / 8 / 2


def test_what_does_not_fit_is_refused_with_figures(no_compiler):
  t = chips.parse_topology('v5p:2x2x2')
  run = programs.run_on_topology(small(gpt.get_config()), t, 'fsdp')
  for hbm, words in ((2 ** 16, r'at its peak, and a device has 0.00'),
                     (2 ** 10, 'parameters 0.0 GiB, optimizer 0.0')):
    with pytest.raises(DoesNotFit, match=words):
      tight = t._replace(chip=t.chip._replace(hbm=hbm))
      programs.analyse_program(run, tight, 'train')


def test_the_state_on_a_device(no_compiler):
  t = chips.parse_topology('v5p:2x2x2')
  alone, spread = (memory.state_bytes(programs.run_on_topology(
      small(gpt.get_config()), t, mesh)) for mesh in ('dp', 'fsdp'))
  params = 4 * runs.count_parameters(programs.run_on_topology(
      small(gpt.get_config()), t, 'dp').abstract_state.params)
  assert alone['parameters'] == params
  assert alone['optimizer'] == 2 * params + 8  # two counters
  assert sum(spread.values()) < 0.14 * sum(alone.values())


@pytest.mark.slow
def test_a_search_ranks_what_fits(no_compiler):
  t = chips.parse_topology('v5p:2x2x1')
  config = small(gpt.get_config())
  listed = search.plans_by_estimate(config, t)
  assert listed == sorted(listed, key=lambda one: one['step_seconds'])
  assert {one['remat'] for one in listed} == {'none', 'dots', 'full'}
  assert {one['mesh']['data'] for one in listed} >= {1, 4}
  assert all(one['peak_bytes'] < t.chip.hbm for one in listed)
  whole = memory.state_bytes(programs.run_on_topology(config, t, 'data=4'))
  tight = t._replace(chip=t.chip._replace(hbm=1.1 * sum(whole.values())))
  for one in search.plans_by_estimate(config, tight):  # no state lies whole
    assert one['mesh']['fsdp'] * one['mesh']['tensor'] > 1
  result = search.search_plans(config, t, 2)
  assert len(result['plans']) == 2 and '--mesh' in result['plans'][0]['flags']
  assert search.plans_as_text(result).count('~') >= 6
  nothing = t._replace(chip=t.chip._replace(hbm=2 ** 10))
  with pytest.raises(DoesNotFit, match='0 plans'):
    search.search_plans(config, nothing, 1)


def test_a_batch_is_cut_as_every_size_of_a_ramp_allows():
  for ramp, parts in (('', [1, 2]), ('10:8', [1])):
    config = small(gpt.get_config())
    config.data.batch_ramp = ramp
    assert search._possible_accumulations(run_on_cpu(config, 'dp')) == parts


def test_bytes_between_hosts_count_in_a_search():
  for mesh, gathers in ((dict(data=2, fsdp=4), False), (dict(data=8), False),
                        (dict(data=1, fsdp=8), True)):
    run = run_on_cpu(small(gpt.get_config()), tables.PRESETS['dp'] | mesh)
    messages = predict.predict_collectives(run, np.arange(8) // 4)
    kinds = {one.kind for one in messages if one.sent_outside}
    assert 'all-reduce' in kinds and ('all-gather' in kinds) == gathers, mesh
    assert sum(one.sent for one in messages) > sum(
        one.sent_outside for one in messages)


@pytest.mark.parametrize('axis, preset, tokens, features', [
    # The keys and values of whole rows, and the sums of what is in d_model.
    ('context', 'cp', 16 // 2 * 32, 2 * 2 * 8),
    ('tensor', 'fsdp_tp', 16 // 4 * 32 // 2, 32)])
def test_activations_send_what_their_shapes_say(axis, preset, tokens, features):
  config = small(gpt.get_config())
  config.model.num_kv_heads = 2
  run = run_on_cpu(config, preset)
  sent = {one.payload for one in predict.predict_collectives(
      run, np.zeros(8, np.int64)) if one.axes == (axis,)}
  assert sent == {tokens * features * run.model.compute_dtype.itemsize}


@pytest.mark.parametrize('name, drawn', [('prefill', 1), ('decode', 64)])
def test_a_generation_needs_the_head_for_tokens_that_are_drawn(name, drawn):
  config = small(gpt.get_config())
  config.model.max_len = config.data.length = 96
  run = run_on_cpu(config, 'dp')
  layer, head = 4 * 32 * 32 + 2 * 32 * 64, 32 * run.model.vocab_size
  assert programs.model_flops(run, name)['weights'] == 2 * 16 * (
      95 * 2 * layer + drawn * head)


def test_the_slowest_of_compute_memory_and_network_bounds_a_step():
  figures = dict(flops=2 * 459e12, hbm_bytes=2765e9, sent=60e9,
                 sent_outside=0.0, model_flops=459e12)
  t = chips.parse_topology('v5p:2x2x1')
  times = predict.step_times(t, 'bfloat16', **figures)
  assert times['seconds'] == pytest.approx(
      {'compute': 2.0, 'hbm': 1.0, 'network': 0.1})
  assert (times['bound'], times['highest_mfu']) == ('compute', 0.5)
  figures['sent_outside'] = 62.5e9
  times = predict.step_times(t, 'bfloat16', **figures)
  assert times['bound'] == 'network_outside' and times['step_seconds'] == 10
  v4 = predict.step_times(
      chips.parse_topology('v4:2x2x1', 2), 'bfloat16', **figures)
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
    params = paths.flatten_by_path(run.abstract_state.params)
    whole = sum(x.size * 2 // (shards if '/ffn/' in path and x.ndim == 4 else 1)
                for path, x in params.items() if not path.startswith('embed/'))
    assert predict.memory_traffic(run, 0.0, False) == whole, dtype
    state = 2 * sum(memory.state_bytes(run).values())
    assert predict.memory_traffic(run, 0.0, True) == 2 * whole + state, dtype


def test_passes_cost_what_as_many_layers_do():
  """Those without a gradient have no backward pass: three of four passes send
  and read half as much, and their weights are not summed again."""
  def costs(**changes):
    config = small(mixtral.get_config())
    config.model.update(changes)
    run = run_on_cpu(config, 'ep_fsdp_tp')
    figures = {'read': predict.memory_traffic(run, 0.0, True)
               - 2 * sum(memory.state_bytes(run).values())}
    for one in predict.predict_collectives(run, np.zeros(8, int)):
      key = one.kind, *one.axes
      figures[key] = figures.get(key, 0) + one.sent * one.runs
    return figures

  loop = lambda passes, k=0: dict(loop='add', loops=dict(
      passes=passes, gradient_passes=k))
  once, several, last = (costs(**loop(*n)) for n in ((1,), (4,), (4, 1)))
  assert several == costs(num_layers=8)
  for key, figure in last.items():
    summed = key[0] in ('all-reduce', 'reduce-scatter') and 'tensor' not in key
    assert figure == (once[key] if summed
                      else (once[key] + several[key]) / 2), key


@pytest.mark.slow
def test_every_pass_keeps_its_activations():
  def kept(**changes):
    config = small(gpt.get_config())
    config.model.update(changes)
    return memory.bytes_kept_for_backward(run_on_cpu(config, 'dp'))[0]

  loop = lambda **loops: kept(loop='add', loops=dict(passes=4, **loops))
  assert loop() == kept(num_layers=8) + 4  # bytes of the number of a pass
  assert kept() < loop(gradient_passes=1) < loop(gradient_passes=2) < loop()


@pytest.mark.parametrize('text, members', [
    ('replica_groups={{0,2},{1,3}}, x', [[0, 2], [1, 3]]),
    ('replica_groups=[2,2]<=[4], x', [[0, 1], [2, 3]]),
    ('replica_groups=[2,3]<=[3,2], x', [[0, 1, 2], [3, 4, 5]]),
    ('replica_groups=[4,2]<=[2,2,2]T(2,1,0), x',
     [[0, 4], [2, 6], [1, 5], [3, 7]]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, use",
     [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=1,'b'=2,'c'=2] {'c','b'}", [[0, 2, 1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([4]<=[2,2]T(1,0)) {'b'}",
     [[0, 2], [1, 3]]),
    ('source_target_pairs={{0,1},{1,0}}', [[0, 1], [1, 0]]),
    ('channel_id=3', None)])
def test_groups_in_every_syntax(text, members):
  got = collectives.parse_groups(text)
  assert (got.tolist() if got is not None else None) == members


def test_axes_are_those_along_which_a_group_differs():
  mesh = dict(data=1, fsdp=2, expert=2, tensor=2)
  axes = lambda *rows: collectives.axes_of_groups(np.array(rows), mesh)
  assert axes([0, 4], [1, 5]) == ('fsdp',)
  assert axes([0, 2], [1, 3]) == ('expert',)
  assert axes([0, 1, 4, 5]) == ('fsdp', 'tensor')

# What libtpu 0.0.50 and XLA's CPU and GPU backends write, shortened.
PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1.clone (input.1: bf16[64,8]) -> bf16[16,8] {
  %input.1 = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input.1), \
replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %slice.1 = bf16[16,8]{1,0} dynamic-slice(%all-reduce.1), x={16,8}
}

%condition.7 (p: (s32[], bf16[16,8])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(4)
  %p = (s32[]{:T(128)}, bf16[16,8]{1,0}) parameter(0)
  %gte = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%gte, %constant.4), direction=LT, m={}
}

%body.7 (p.1: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %p.1 = (s32[]{:T(128)}, /*index=1*/bf16[16,8]{1,0:T(8,128)}) parameter(0)
  %ag = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%x), \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, metadata={op_name="go/on"}
  %agd = bf16[64,8]{1,0} all-gather-done(%ag)
  %ragged = bf16[80,2,8]{2,1,0:T(2,128)} ragged-all-to-all(%x, %y, %z), \
replica_groups=mesh['fsdp'=4,'tensor'=2] {'tensor'}, channel_id=1
  %rs = ((bf16[80,2,8]{2,1,0:T(2,128)(2,1)}, s32[4]{0}), \
bf16[80,2,8]{2,1,0:T(2,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
ragged-all-to-all-start(%x, %y), replica_groups=[2,4]<=[4,2]T(1,0)
  %fused = bf16[16,8]{1,0} fusion(%agd), kind=kCustom, \
calls=%all-reduce-scatter.1.clone
  %w = (s32[], f32[4]) while(%t), condition=%data.1, body=%inner.1
  ROOT %out = (s32[], bf16[16,8]) tuple(%i, %fused)
}

%data.1 (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[], f32[4]) parameter(0)
  ROOT %ne = pred[] compare(%a, %b), direction=NE
}

%inner.1 (r: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = (s32[], f32[4]) parameter(0)
  %permute = f32[4] collective-permute(%v), source_target_pairs={{0,1},{1,0}}
  ROOT %o = (s32[], f32[4]) tuple(%i, %permute)
}

ENTRY %main (arg: bf16[16,8]) -> f32[4] {
  %arg = bf16[16,8]{1,0} parameter(0)
  %while.1 = (s32[], bf16[16,8]) while(%t), condition=%condition.7, \
body=%body.7
  %while.2 = (s32[], f32[4]) while(%t), condition=%data.1, body=%inner.1, \
backend_config={"known_trip_count":{"n":"3"}}
  %both = (f32[4], f32[6]) all-reduce(%a, %b), replica_groups=[1,8]<=[8]
  %alone = f32[9] all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %gte = f32[4] get-tuple-element(%both), index=0
}
"""

MESH = dict(data=1, fsdp=4, expert=1, tensor=2)


def test_every_collective_is_read_with_its_runs_and_bytes():
  moves = collectives.read_collectives(
      PROGRAM, MESH, host_of_device=np.zeros(8, int), ragged_rows=20)
  rows = {(c.kind, c.axes, c.runs, c.known): c for c in moves}
  assert len(rows) == len(moves)
  sent = {key: c.sent for key, c in rows.items()}
  one = 64 * 8 * 2  # bytes of the whole bf16[64,8]
  assert sent == {
      ('all-gather', ('fsdp',), 4, True): one * 3 / 4,
      ('ragged-all-to-all', ('tensor',), 4, True): 20 * 16 * 2 / 2,
      ('ragged-all-to-all', ('fsdp',), 4, True): 20 * 16 * 2 * 3 / 4,
      ('reduce-scatter', ('fsdp',), 4, True): one * 3 / 4,
      ('collective-permute', ('tensor',), 4, False): 16,
      ('collective-permute', ('tensor',), 3, True): 16,
      ('all-reduce', ('fsdp', 'tensor'), 1, True): 2 * 7 / 8 * 40}
  again = collectives.read_collectives(
      PROGRAM, MESH, host_of_device=np.zeros(8, int), num_passes=6)
  assert all(c.known for c in again)
  assert {c.runs for c in again if c.kind == 'collective-permute'} == {24, 3}
  table = collectives.sum_by_kind(moves)
  permutes = next(r for r in table if r['kind'] == 'collective-permute')
  assert permutes['runs_per_step'] == 7 and not permutes['exact']
  assert permutes['bytes_sent_per_device'] == 7 * 16


def test_bytes_between_hosts_are_at_best_those_of_rings_over_hosts():
  def one(kind, payload):
    return collectives.Collective(kind, ('fsdp',), 8, 2, 'f32', 1, payload, 1)
  # Two hosts of four: half of the result enters each, by four adapters.
  assert one('all-gather', 800).sent_outside == 800 / 2 / 4
  assert one('reduce-scatter', 100).sent_outside == 800 / 2 / 4
  assert one('all-reduce', 800).sent_outside == 2 * 800 / 2 / 4
  assert one('all-to-all', 800).sent_outside == 400
  assert one('all-gather', 800)._replace(hosts=1).sent_outside == 0


def test_a_gather_that_several_fusions_print_is_one():
  gather = ('  %g.{0} = bf16[8,4]{{1,0}} all-gather(bf16[1,4]{{1,0}} %p.{0}), '
            'channel_id={1}, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, '
            'dimensions={{0}}')
  fusion = '%fused_computation.{0} (p.{0}: bf16[1,4]) -> bf16[8,4] {{\n' + (
      gather + '\n}}\n')
  call = ('  %c.{0} = bf16[8,4]{{1,0}} fusion(bf16[1,4]{{1,0}} %x), kind=kLoop,'
          ' calls=%fused_computation.{0}')
  text = ''.join(fusion.format(i, channel) for i, channel in enumerate(
      (5, 5, 6))) + 'ENTRY %main (x: bf16[1,4]) -> bf16[8,4] {\n' + '\n'.join(
          call.format(i) for i in range(3)) + '\n}\n'
  sent = collectives.read_collectives(
      text, dict(fsdp=8), host_of_device=np.zeros(8, int))
  assert [c.kind for c in sent] == ['all-gather'] * 2


def test_an_array_is_explained_by_its_rules():
  config = small(mixtral.get_config())
  config.model.vocab_size = 385
  run = run_on_cpu(config, 'ep_fsdp_tp')
  rows = {row['name']: row for row in explain_sharding.describe_parameters(run)}
  assert rows['decoder/layers/block_0/ffn/up'] == dict(
      name='decoder/layers/block_0/ffn/up', shape=[2, 4, 32, 64], dimensions=[
          'layers 2', 'experts 4 over expert', 'embed 32 over fsdp',
          'mlp 64 over tensor'],
      bytes_per_device=2 * 4 * 32 * 64 * 4 // 8)
  assert rows['embed/tokens']['dimensions'][0] == (
      'vocab 385 (not over tensor, which does not divide it)')
  stream = next(row for row in explain_sharding.describe_activations(run)
                if row['name'] == 'decoder/layers/block_0'
                and row['dimensions'][1].startswith('stream'))
  assert stream['dimensions'] == [
      'batch 16 over fsdp x expert', 'stream 32 over tensor',
      'embed 32 (fsdp shards another dimension)']


@pytest.mark.slow
def test_a_mesh_is_explained():
  done = forked.run('-m', 'tools.explain_sharding', '--config',
                    'configs/gpt.py', '--mesh=fsdp=4,tensor=2')
  assert done.returncode == 0, done.stderr
  assert re.search('block_0/attention/query .*heads 4 over tensor', done.stdout)
  assert 'all-gather          fsdp' in done.stdout
