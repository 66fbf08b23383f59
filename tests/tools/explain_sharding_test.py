"""explain_sharding: its specs are those that a run uses, and its reasons."""

import json
import subprocess
import sys

from configs import gpt, mixtral
from configs import sharding as tables
import jax
import pytest

from tools.explain_sharding import arrays, predict, report, rules
from training import paths, runs
from training.data import tokenizers
from training.distributed import devices

BYTES = tokenizers.load('bytes')


def run_on(config, mesh):
  model, _ = runs.resolve(config, BYTES)
  return runs.build(config, model, devices.make_mesh(mesh))


def tokens(config):
  return config.data.batch_size * config.data.length


def plain():
  config = gpt.get_config()
  config.data.batch_size = 16
  return config


def odd():
  config = plain()
  config.model.vocab_size = 50257
  return config


@pytest.mark.parametrize('table', list(tables.RULES))
@pytest.mark.parametrize('preset', list(tables.PRESETS))
@pytest.mark.parametrize('make', [odd, mixtral.get_config])
def test_specs_are_those_of_a_run(preset, table, make):
  config, mesh = make(), tables.PRESETS[preset]
  if mesh['expert'] > 1 and make is odd:
    mesh = tables.PRESETS['fsdp_tp']
  config.mesh.rules = table
  if make is mixtral.get_config:
    config.model.update(num_kv_heads=4)
  run = run_on(config, mesh)
  rows = {row['name']: row for row in arrays.parameters(run)}
  ours = paths.flatten(run.abstract.params)
  assert list(rows) == list(ours)
  for path, x in ours.items():
    assert rows[path]['bytes_per_device'] * 8 == 8 * 4 * (
        jax.numpy.zeros(x.sharding.shard_shape(x.shape)).size), path
    used = [tuple(a for a in ((e,) if isinstance(e, str) else e or ())
                  if mesh[a] > 1) for e in x.sharding.spec]
    used += [()] * (x.ndim - len(used))
    assert [tuple(d['mesh']) for d in rows[path]['dimensions']] == used, path


def test_each_reason_is_given():
  mesh = dict(data=2, fsdp=2, expert=1, context=1, tensor=2)
  why = lambda shape, axes: [d.why for d in rules.explain(
      shape, axes, mesh, 'default')]
  assert why((4, 6), ('embed', 'mlp')) == ['expert has one device', '']
  assert why((50257, 6), ('vocab', None)) == [
      '50,257 does not divide over the 2 devices of tensor',
      'it has no logical axis']
  assert why((4, 8, 6), ('batch', 'length', 'embed')) == [
      'expert has one device', 'context has one device',
      'fsdp already shards dimension 0 (batch)']
  assert why((4,), ('experts',)) == ['expert has one device']
  found = rules.explain((8, 6), ('batch', 'embed'), mesh, 'default')
  assert rules.spec(found) == "P(('data', 'fsdp'))"
  assert rules.shards(found, mesh) == 4


@pytest.mark.slow
def test_activations_stand_where_the_program_puts_them():
  config = mixtral.get_config()
  run = run_on(config, tables.PRESETS['ep_fsdp_tp'])
  rows = {(r['name'], tuple(r['axes'])): r for r in arrays.activations(run)}
  stream = rows['decoder/layers/block_0', ('batch', 'stream', 'embed')]
  assert stream['times'] == 4
  assert stream['spec'] == "P(('fsdp', 'expert'), 'tensor')"
  assert stream['bytes_per_device'] == tokens(config) * 128 * 4 // 8
  q = rows['decoder/layers/block_0/attention',
           ('batch', 'length', 'heads', 'head')]
  assert q['spec'] == "P(('fsdp', 'expert'), None, 'tensor')"
  assert {name for name, _ in rows} >= {'embed', 'loss'}


def test_collectives_follow_from_the_rules():
  config = mixtral.get_config()
  run = run_on(config, tables.PRESETS['ep_fsdp_tp'])
  rows = predict.collectives(run, arrays.parameters(run))
  found = {(r['kind'], tuple(r['axes'])): r for r in rows}
  one = tokens(config) // 4 * 128 * 4  # of a device's tokens
  assert found['all-to-all', ('expert',)]['bytes_sent_per_device'] == (
      4 * 4 * 2 * one / 2)  # layers, crossings, choices
  for kind in ('reduce-scatter', 'all-gather'):
    assert found[kind, ('tensor',)]['bytes_sent_per_device'] == 4 * 2 * one
  assert ('all-gather', ('fsdp',)) in found
  alone = run_on(plain(), tables.PRESETS['dp'])
  rows = predict.collectives(alone, arrays.parameters(alone))
  size = sum(x.size for x in jax.tree.leaves(alone.abstract.params))
  assert [(r['kind'], r['axes']) for r in rows] == [('all-reduce', ['data'])]
  assert rows[0]['bytes_sent_per_device'] == 2 * 4 * size * 7 / 8


def test_micro_batches_repeat_collectives_and_send_tokens_once():
  config = mixtral.get_config()
  config.data.batch_size = 32
  mesh = tables.PRESETS['ep_fsdp_tp']
  def found():
    run = run_on(config, mesh)
    return {(r['kind'], *r['axes'], r['why']): r
            for r in predict.collectives(run, arrays.parameters(run))}
  once = found()
  config.train.grad_accumulation = 4
  for key, row in found().items():
    assert row['runs_per_step'] == 4 * once[key]['runs_per_step'], key
    more = 4 if 'weights' in key[-1] else 1
    assert row['bytes_sent_per_device'] == pytest.approx(
        more * once[key]['bytes_sent_per_device']), key


def test_two_meshes_side_by_side():
  config = plain()
  one = report.explain(config, tables.PRESETS['fsdp'])
  two = report.explain(config, tables.PRESETS['fsdp_tp'])
  assert not report.diff(one, one)['parameters']
  both = report.diff(one, two)
  changed = {row['name']: row for row in both['parameters']}
  query = changed['decoder/layers/block_0/attention/query']
  assert (query['one']['spec'], query['two']['spec']) == (
      "P(None, 'fsdp')", "P(None, 'fsdp', 'tensor')")
  assert 'decoder/final_norm/scale' in changed  # 8 shards against 4
  assert 'fsdp' in report.diff_text(both) and 'why' not in both['parameters']
  assert ('embed -> fsdp x expert: over fsdp (expert has one device)'
          in report.text(one))
  json.dumps([one, both])


@pytest.mark.slow
def test_the_program_makes_the_devices_of_its_mesh():
  words = [sys.executable, '-m', 'tools.explain_sharding', '--config',
           'configs/gpt.py', '--json',
           '--config.data.batch_size=32']
  done = subprocess.run(words + ['--mesh', 'fsdp=32,tensor=4'],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)['mesh']['fsdp'] == 32
  done = subprocess.run(words + ['--mesh', 'fdsp=32'], capture_output=True,
                        text=True)
  assert done.returncode == 2 and "Did you mean 'fsdp'" in done.stderr
