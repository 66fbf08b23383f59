"""Plans: names of topologies, arithmetic, and the estimate without a
compiler."""

import json
import re

from configs import gpt, mixtral
from configs import sharding as tables
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tests.helpers import forked
from tools import explain_sharding
from tools.plan import analyse, chips
from tools.plan import predict, report, roofline, search, topology
from tools.plan.compile import DoesNotFit
from training import runs
from training.costs import memory, peaks
from training.costs import traced
from training.data import tokenizers
from training.distributed import devices


def test_names_say_chips_devices_and_what_is_together():
  cases = {'v5p:4x4x8': (128, 128, 128), 'v5e:4x8': (32, 32, 32),
           'tpu7x:2x2x1': (4, 8, 8), 'h100:1x8x8': (64, 64, 8)}
  for name, figures in cases.items():
    t = chips.parse(name)
    assert (t.chips, t.devices, t.together) == figures, name
  t = chips.parse('v5p:2x2x2', 2)
  assert (t.chips, t.together) == (16, 8)


@pytest.mark.parametrize('name, slices, words', [
    ('v5q:4x4x4', 1, "Did you mean 'v5"), ('v5p', 1, 'v5p:4x4x8'),
    ('v5e:32x32', 1, 'choose from 1x1, 2x2'),
    ('v5p:3x4x4', 1, 'three multiples of 4 in rising order'),
    ('h100:1x8x8', 2, 'SLICESxHOSTSxGPUS'), ('h100:3x5x7', 1, 'h100:1x15x7'),
    ('h100:1x1x64', 1, 'choose from 1, 2, 4, 8'),
    ('v4:2x2x1', 0, 'must be >= 1')])
def test_wrong_names_are_refused_with_choices(name, slices, words):
  with pytest.raises(ValueError, match=words):
    chips.parse(name, slices)


def test_every_chip_has_a_published_peak():
  for name, chip in chips.CHIPS.items():
    assert peaks.flops(chip.kind, 'bfloat16', chip.cores), name
  v5p = chips.parse('v5p:2x2x1')
  assert roofline.peak_flops(v5p, 'bfloat16') == 459e12
  assert 2 * roofline.peak_flops(
      chips.parse('tpu7x:2x2x1'), 'bfloat16') == 2307e12


def test_products_are_counted_through_loops_branches_and_shards():
  x, key = jnp.ones((4, 8)), 2.0 * 4 * 8 * 8
  w = jnp.ones((8, 8))
  count = lambda f, *a, **k: traced.count(
      jax.make_jaxpr(f)(*a), traced.Place('tpu', **k)).flops

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
  assert count(until, x) == key and count(until, x, passes=7) == 7 * key
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
    assert traced.count(three, traced.Place('tpu', rows)).nbytes == (
        2 * rows * 8 + min(rows, 3) * 64 + 3) * 4
  # Forward again, and a gradient each of the rows and of both matrices.
  both = jax.grad(lambda x, w: (jax.lax.ragged_dot(
      x, w, jnp.array([1, 1])) ** 2).sum(), (0, 1))
  args = x, jnp.ones((2, 8, 8))
  assert count(both, *args) == 3 * key
  for n, kind in enumerate(traced.GROUPED, 1):
    assert count(both, *args, dense=traced.GROUPED[:n]) == (3 + n) * key, kind


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
  monkeypatch.setattr(topology, 'compiler', lambda topology: '')
  monkeypatch.setenv('ARCHETYPE_CACHE', str(tmp_path))


def small(config):
  config.model.update(d_model=32, num_layers=2, num_heads=4, num_kv_heads=4,
                      d_ff=64, max_len=32)
  config.data.update(length=32, batch_size=16)
  return config


def run_on_cpu(config, preset):
  model, _ = runs.resolve(config, tokenizers.load('bytes'))
  shape = tables.PRESETS[preset] if isinstance(preset, str) else preset
  return runs.build(config, model, devices.make_mesh(shape))


@pytest.mark.long
def test_without_a_compiler_every_figure_is_an_estimate(no_compiler):
  t = chips.parse('v5p:2x2x2')
  config = small(mixtral.get_config())
  run = analyse.run_on(config, t, 'ep_fsdp_tp')
  plan = analyse.describe(run, t) | analyse.active_parameters(run)
  one = analyse.analyse(run, t, 'train')
  plan['programs'] = [one]
  plan['advice'] = report.advice(plan)
  assert plan['estimate'] and one['estimate']
  assert one['memory']['peak'] > one['memory']['parameters'] > 0
  work = one['flops']
  assert work['ratio'] >= 1 and work['loops_counted_once'] == 0
  assert 0 < one['roofline']['highest_mfu'] <= 1
  kinds = {row['kind'] for row in one['collectives']}
  assert 'all-to-all' in kinds
  text = report.text(plan)
  figures = [line for line in text.splitlines() if 'GiB' in line
             and any(c.isdigit() for c in line)]
  assert figures and all('~' in line for line in figures)
  assert analyse.analyse(run, t, 'train') == one  # kept
  json.dumps(plan)


def test_fsdp_alone_with_all_reduces_is_advised_against():
  rows = [dict(kind='all-reduce', axes=['fsdp'],
               bytes_sent_per_device=3 * 2 ** 30),
          dict(kind='all-gather', axes=['fsdp'],
               bytes_sent_per_device=2 ** 30)]
  mesh = dict(data=1, fsdp=64, expert=1, context=1, tensor=1)
  plan = dict(mesh=mesh, estimate=False, programs=[dict(collectives=rows)])
  [sentence] = report.advice(plan)
  assert '3.000 GiB' in sentence and '--mesh data=2,fsdp=32' in sentence
  for others in (
      dict(estimate=True), dict(mesh=mesh | dict(data=2)),
      dict(mesh=mesh | dict(fsdp=1, tensor=64)),
      dict(programs=[dict(collectives=rows[1:])])):
    assert not report.advice(plan | others)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_figures(no_compiler, monkeypatch):
  t = chips.parse('v5p:2x2x2')
  tight = t._replace(chip=t.chip._replace(hbm=2 ** 16))
  run = analyse.run_on(small(gpt.get_config()), t, 'fsdp')
  with pytest.raises(DoesNotFit, match=r'about .* GiB, and a device has 0.00'):
    analyse.analyse(run, tight, 'train')
  nothing = t._replace(chip=t.chip._replace(hbm=2 ** 10))
  with pytest.raises(DoesNotFit, match='parameters 0.0 GiB, optimizer 0.0'):
    analyse.analyse(run, nothing, 'train')


def test_state_on_a_device_and_what_is_held_alike(no_compiler):
  t = chips.parse('v5p:2x2x2')
  alone = analyse.run_on(small(gpt.get_config()), t, 'dp')
  spread = analyse.run_on(small(gpt.get_config()), t, 'fsdp')
  params = 4 * analyse.active_parameters(alone)['parameters']
  assert memory.state(alone)['parameters'] == params
  assert memory.state(alone)['optimizer'] == 2 * params + 8  # two counters
  row, = memory.replicated(alone)
  assert row['axis'] == 'data'
  held = sum(memory.state(alone).values()) - sum(memory.state(spread).values())
  assert row['bytes_saved'] == pytest.approx(held, rel=0.02)
  assert memory.replicated(spread)[0]['bytes_saved'] < 0.03 * params


@pytest.mark.slow
def test_a_search_ranks_what_fits(no_compiler):
  t = chips.parse('v5p:2x2x2')
  config = small(gpt.get_config())
  listed = search.candidates(config, t)
  assert listed == sorted(listed, key=lambda one: one.step_seconds)
  assert {one.remat for one in listed} == {'none', 'dots', 'full'}
  assert {one.mesh['data'] for one in listed} >= {1, 8}
  assert all(one.peak_bytes < t.chip.hbm for one in listed)
  whole = memory.state(analyse.run_on(config, t, 'dp'))
  tight = t._replace(chip=t.chip._replace(hbm=1.1 * sum(whole.values())))
  for one in search.candidates(config, tight):  # no state lies whole
    assert one.mesh['fsdp'] * one.mesh['tensor'] > 1
  found = search.search(config, t, 2)
  assert len(found['plans']) == 2 and '--mesh' in found['plans'][0]['flags']
  assert search.text(found).count('~') >= 6
  nothing = t._replace(chip=t.chip._replace(hbm=2 ** 10))
  with pytest.raises(DoesNotFit, match='no mesh, remat policy'):
    search.search(config, nothing, 1)


@pytest.mark.slow
def test_a_search_moves_inputs_to_the_host_where_that_saves_sending(
    no_compiler):
  t, config = chips.parse('v5p:2x2x1'), small(gpt.get_config())
  config.model.update(num_layers=12, keep_gathered='up')
  run = lambda policy: analyse.run_on(search.with_policy(config, policy, 1), t,
                                      'fsdp=4')
  full, offload = (memory.analytic(run(policy)) for policy in
                   ('full', 'offload'))
  waiting = full['kept_for_backward'] - offload['kept_for_backward']
  assert waiting == offload['host_memory'] == memory.block_inputs(run('full'))
  D, F = config.model.d_model, config.model.d_ff
  assert offload['kept_gathered'] == full['kept_gathered'] == 12 * D * F * 4
  assert full['peak'] - offload['peak'] == waiting
  tight = t._replace(chip=t.chip._replace(hbm=full['peak'] - waiting // 2))
  found = {(one.remat, one.grad_accumulation): one for one in
           search.candidates(config, tight)
           if one.mesh == dict(data=1, fsdp=4, expert=1, context=1, tensor=1)}
  assert ('offload', 1) in found and ('full', 1) not in found
  assert not any(one.remat == 'offload' for one in search.candidates(config, t))


def test_bytes_between_hosts_count_in_a_search():
  for mesh, gathers in ((dict(data=2, fsdp=4), False), (dict(data=8), False),
                        (dict(data=1, fsdp=8), True)):
    run = run_on_cpu(small(gpt.get_config()), tables.PRESETS['dp'] | mesh)
    found = predict.sent(run, np.arange(8) // 4)
    kinds = {one.kind for one in found if one.sent_outside}
    assert 'all-reduce' in kinds and ('all-gather' in kinds) == gathers, mesh
    assert sum(one.sent for one in found) > sum(
        one.sent_outside for one in found)


@pytest.mark.parametrize('name, drawn', [('prefill', 1), ('decode', 64)])
def test_a_generation_needs_the_head_for_tokens_that_are_drawn(name, drawn):
  config = small(gpt.get_config())
  config.model.max_len = config.data.length = 96
  run = run_on_cpu(config, 'dp')
  layer, head = 4 * 32 * 32 + 2 * 32 * 64, 32 * run.model.vocab_size
  assert analyse.model_flops(run, name)['weights'] == 2 * 16 * (
      95 * 2 * layer + drawn * head)


@pytest.mark.parametrize('words, told', [
    (['--search=2', '--mesh=fsdp=8'], 'pass one of them'),
    (['--search=2', '--programs=train,decode'], 'for train alone')])
def test_a_search_refuses_what_it_would_ignore(words, told):
  done = forked.run('-m', 'tools.plan', '--config', 'configs/gpt.py',
                    '--topology', 'v5p:2x2x2', *words)
  assert done.returncode == 2 and told in done.stderr


def test_an_array_is_explained_by_its_rules():
  config = small(mixtral.get_config())
  config.model.vocab_size = 385
  run = run_on_cpu(config, 'ep_fsdp_tp')
  told = {row['name']: row for row in explain_sharding.parameters(run)}
  assert told['decoder/layers/block_0/ffn/up'] == dict(
      name='decoder/layers/block_0/ffn/up', shape=[2, 4, 32, 64], dimensions=[
          'layers 2', 'experts 4 over expert', 'embed 32 over fsdp',
          'mlp 64 over tensor'],
      bytes_per_device=2 * 4 * 32 * 64 * 4 // 8)
  assert told['embed/tokens']['dimensions'][0] == (
      'vocab 385 (not over tensor, which does not divide it)')
  stream = next(row for row in explain_sharding.activations(run)
                if row['name'] == 'decoder/layers/block_0'
                and row['dimensions'][1].startswith('stream'))
  assert stream['dimensions'] == [
      'batch 16 over fsdp x expert', 'stream 32 over tensor',
      'embed 32 (fsdp shards another dimension)']


@pytest.mark.slow
def test_two_meshes_are_explained_side_by_side():
  done = forked.run(
      '-m', 'tools.explain_sharding', '--config', 'configs/gpt.py',
      '--mesh=fsdp=8', '--diff=fsdp=4,tensor=2')
  assert done.returncode == 0, done.stderr
  query = re.findall('.*block_0/attention/query .*', done.stdout)
  assert [re.findall('heads 4( over tensor)?', line) for line in query] == [
      [''], [' over tensor']]
  assert done.stdout.count('all-gather          fsdp') == 2


@pytest.mark.parametrize('text, words', [
    ('fdsp=8', "Did you mean 'fsdp'"), ('tensor', 'write it as tensor=8'),
    ('fsdp=3', 'does not divide')])
def test_wrong_meshes_are_refused(text, words):
  with pytest.raises(ValueError, match=words):
    devices.parse_mesh(text, 8)


