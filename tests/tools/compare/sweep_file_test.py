"""A sweep as its file describes it: helpers, points, equal cost, and what check
refuses and says."""

import argparse
import json
import subprocess
import sys
import types

from absl import flags
from ml_collections import config_flags
import pytest

from configs.errors import RequestError
from configs.sweeps import helpers
from tests.helpers import sweeps
from tools.compare import check, cost, layout, spec, statistics


def described(file, **options):
  args = types.SimpleNamespace(
      file=file, seeds=0, match='', match_field='', devices=0)
  vars(args).update(options)
  return check.describe(args)


def points(description):
  return {point['name']: point for point in description['points']}


def test_the_loops_that_most_sweeps_are():
  assert list(helpers.grid({'model.norm': ('a', 'b'), 'optim.lr': (1,)})) == [
      ('a-lr=1', {'model.norm': 'a', 'optim.lr': 1}),
      ('b-lr=1', {'model.norm': 'b', 'optim.lr': 1})]
  sizes = {'model.d_model': (32, 64), 'optim.lr': (2, 1)}
  assert list(helpers.zip(sizes))[1] == (
      'd_model=64-lr=1', {'model.d_model': 64, 'optim.lr': 1})
  with pytest.raises(ValueError, match='model.d_model 2, optim.lr 1'):
    list(helpers.zip(sizes | {'optim.lr': (2,)}))
  assert dict(helpers.one_at_a_time({'model.norm': ('a', 'b'), 'seed': (1,)})
              ) == {'a': {'model.norm': 'a'}, 'b': {'model.norm': 'b'},
                    'seed=1': {'seed': 1}}
  assert dict(helpers.leave_one_out({'model.norm': 'a', 'model.ffn': 'b'})) == {
      'all': {'model.norm': 'a', 'model.ffn': 'b'},
      'without_norm': {'model.ffn': 'b'}, 'without_ffn': {'model.norm': 'a'}}


# What a file may hold, and what is said of it.
BASE = 'from configs import base as b\nbase = b.base\n'
REFUSED = {
    'add("a", **{"model.nrom": "rmsnorm"})': "did you mean 'model.norm'",
    'add("a", **{"model.d_model": "wide"})': "'wide', a str: it holds 32",
    'add("a", **{"model.moe": 1})': 'a group of fields',
    'add("a", **{"model.kinds": {"b": {"windw": 1}}})':
        "point 'a': model.kinds.b.windw is no field",
    'add("a", **{"optim.lr": {"b": 1}})': "sets optim.lr to {'b': 1}",
    'add("a", seed=1)': "'a' sets seed: every point has the same seeds",
    'add("a/b", **{"optim.lr": 1.0})': "called 'a/b': choose letters",
    'add(3)': 'a point is called 3',
    'add("a", **{"optim.lr": 1.0})\n  add("b", **{"optim.lr": 1.0})':
        "points 'a' and 'b' are the same config",
    'add("a")': 'nothing but the base',
    'add(x)': "NameError: name 'x'",
    'add.system("t5")': "point 't5': model.arch 't5' stacks an encoder-dec",
    'pass\nTASKS = 5': 'TASKS is 5',
    'pass\nTASKS = "embed",': "has 'embed', which cannot be done there: task",
    'pass\nSEEDS = 10**20': '1 to 10,000',
    'pass\nSEED = 2': 'has SEED, which a sweep does not read: call it _SEED if '
                      "it is the file's own. Did you mean SEEDS?",
    'pass\ndel get_config': 'has no get_config: add `get_config = base`',
    'pass\ndef base(:': 'SyntaxError',
    'pass\ndef base():\n  return 1 / 0': 'ZeroDivisionError',
    'pass\ndef base():\n  pass': 'base() returned None, which is no ConfigDict',
    'pass\nimport random\nold = base\ndef base():\n  c = old()\n'
    '  c.optim.lr = random.random()\n  return c': 'another config each time',
}


@pytest.mark.parametrize('body', REFUSED)
def test_what_is_no_sweep_is_a_sentence(body, tmp_path):
  file = sweeps.write(tmp_path, f'  {body}\n')
  with pytest.raises(RequestError) as error:
    spec.read_sweep_file(file)
  assert REFUSED[body] in str(error.value)


def test_a_missing_file_is_refused_with_those_that_are_there():
  with pytest.raises(RequestError, match='choose from .*studies/tiny.py.*sweeps'
                     '/parts.py'):
    spec.is_study('configs/sweeps/prats.py')


def test_the_base_is_a_point(tmp_path):
  sweep = spec.read_sweep_file(sweeps.write(tmp_path))
  assert sweep.base_name == 'base'
  assert [point.name for point in sweep.points] == ['base', 'rms', 'swiglu']
  sweep = spec.read_sweep_file(sweeps.write(
      tmp_path, "  add('mine', **{'model.norm': 'layernorm'})\n"
      "  add('rms', **{'model.norm': 'rmsnorm'})\n"))
  assert sweep.base_name == 'mine' and len(sweep.points) == 2


@pytest.mark.slow
@pytest.mark.parametrize('what', spec.MATCH)
def test_matched_points_cost_what_the_base_costs(what, tmp_path):
  description = described(sweeps.write(tmp_path), match=what)
  made = points(description)
  for point in made.values():
    assert abs(point[what] / made['base'][what] - 1) <= 0.01, point
  assert made['swiglu']['matched'] == ['model.d_ff']
  assert made['swiglu']['changes']['model.d_ff'] < 128
  assert '(matched)' in check.table(description)


def test_matching_by_the_width_keeps_the_heads_whole(tmp_path):
  file = sweeps.write(tmp_path, "  add('deep', **{'model.num_layers': 4})\n")
  made = points(described(file, match='params', match_field='model.d_model'))
  assert made['deep']['changes']['model.d_model'] % 4 == 0


@pytest.mark.parametrize('point, options, told', [
    ("'model.num_layers': 40", {}, "point 'x': it cannot be matched.*d_ff="),
    ("'model.d_ff': 999", {}, 'sets model.d_ff, which --match=params would'),
    ("'model.parametrization': 'mup', 'model.num_layers': 4, "
     "'model.mup_base_width': 32, 'model.init': 'fan_in'", {},
     'muP.*change model.d_ff alone'),
    ("'optim.lr': 1.0", {'match_field': 'model.dff'}, 'mean .model.d_ff'),
    ("'optim.lr': 1.0", {'match_field': 'model.norm'}, 'holds .layernorm'),
    ("'optim.lr': 1.0", {'match': '', 'match_field': 'model.d_ff'},
     'nothing is matched: pass --match'),
    ("'model.num_heads': 5", {'match': ''}, "point 'x': .*num_heads is 5"),
    ("'data.source': 'text:/no/such/*.txt'", {'match': ''},
     "point 'x': .*no/such.*no file"),
    ("'mesh.fsdp': 4", {'match': '', 'devices': 2}, "point 'x': .*mesh.fsdp=4"),
    ("'eval.every_steps': 0, 'eval.tasks': ''", {'match': ''},
     "point 'x': eval.every_steps is 0 and no task is done"),
])
def test_what_cannot_be_compared_is_refused(point, options, told, tmp_path):
  with pytest.raises(RequestError, match=told):
    described(sweeps.write(tmp_path, f"  add('x', **{{{point}}})\n"),
              **{'match': 'params', **options})


def test_the_memory_of_a_mesh_is_told_without_devices(tmp_path):
  file = sweeps.write(tmp_path, "  add('fsdp', **{'mesh.fsdp': 4})\n")
  made = points(described(file))
  sizes = [made[name]['bytes_by_part']['parameters'] / made['base']['params']
           for name in ('base', 'fsdp')]
  assert sizes[0] == 4 and 1 <= sizes[1] < 1.2


def test_what_follows_from_a_change_is_told(tmp_path):
  file = sweeps.write(
      tmp_path, "  add('wide', **{'model.d_model': 64})\n"
      "  add('own', **{'model.pattern': 'own', "
      "'model.kinds.own.qk_norm': True})\n"
      "  add('long', **{'data.length': 8})\n"
      "  add('part', **{'eval.part': 'first'})\n"
      "  add.system('llama')\n"
      "  add.system('llama', name='other', **{'model.norm': 'layernorm'})\n")
  description = described(file)
  made, told = points(description), check.table(description)
  assert set(made['wide']['follows']) == {  # none unread
      'model.d_ff', 'model.head_dim', 'model.attention_scale'}
  assert 'so model.d_ff 128 -> 256' in told
  assert 'model.pattern=own, model.kinds.own.qk_norm=True' in told
  assert not description['paired'] and 'same batches' in told
  assert made['long']['tokens'] == 12 * 8 * 8
  assert 'Points differ in eval.part, so their held-out losses are ' in told
  assert made['llama']['changes'] == {
      'model.arch': 'llama', 'model.position': 'rope', 'model.norm': 'rmsnorm',
      'model.ffn': 'swiglu', 'model.attention_bias': False,
      'model.ffn_bias': False, 'model.tie_embeddings': False}
  assert ('other: not as published: llama with norm=layernorm in place of '
          'rmsnorm') in told
  assert 'llama: not as published' not in told
  plain = described(sweeps.write(tmp_path))
  assert plain['paired'] and 'warning' not in check.table(plain)


@pytest.mark.parametrize('body, one, other, arch', [
    ("  add('neox', **{'model.arch': 'gpt_neox'})\n", 'base', 'neox',
     'gpt_neox'),
    ("  add('rms', **{'model.norm': 'rmsnorm'})\n"
     "  add('ours', **{'model.norm': 'rmsnorm', 'model.arch': 'llama'"
     "})\n", 'rms', 'ours', 'llama')])
def test_a_point_of_another_name_alone_is_refused(
    body, one, other, arch, tmp_path):
  with pytest.raises(RequestError, match=f'points {one!r} and {other!r} differ '
                     f"in model.arch alone.*write add.system\\('{arch}'\\)"):
    described(sweeps.write(tmp_path, body))
  described(sweeps.write(
      tmp_path, body.replace("'model.arch'", "'optim.lr': 1e-3, 'model.arch'")))


def test_costs_are_those_of_the_counter(tmp_path):
  sweep = spec.read_sweep_file(sweeps.write(tmp_path))
  from training import runs
  from training.costs import totals
  from training.data import tokenizers
  model, _ = runs.resolve(sweep.base, tokenizers.load('bytes'))
  figures = totals.count(sweep.base, 16, model)
  ours = cost.of(sweep.base)
  assert ours.params == figures['parameters']
  assert ours.flops_per_token == figures['flops_per_token']['training']
  # Parameters and their gradients in float32, Adam's two moments.
  parts = cost.bytes_per_device(sweep.base)
  assert parts['parameters'] + parts['gradients'] == 8 * ours.params
  assert parts['optimizer'] == 8 * ours.params + 8  # and two counters
  assert parts['peak'] > 16 * ours.params


def test_another_sweep_in_the_workdir_is_refused(tmp_path):
  file, workdir = sweeps.write(tmp_path), tmp_path / 'w'
  check.save(workdir, described(file))
  check.save(workdir, described(file, seeds=3))
  check.save(workdir, described(file))
  assert points(layout.load_description(workdir))['rms']['seeds'] == [0, 1, 2]
  text = open(file).read()
  for old, new, told in (
      ("'rmsnorm'", "'rmsnorm', 'optim.lr': 2e-3",
       "point 'rms' was .* and is .*0.002"),
      ("'rms'", "'root'", "point 'rms' is gone"),
      ('train.steps = 12', 'train.steps = 13',
       'the base differs in train.steps')):
    open(file, 'w').write(text.replace(old, new))
    with pytest.raises(RequestError, match=f'another sweep: {told}'):
      check.save(workdir, described(file))


def parsed(words, monkeypatch):
  """The config that train.py would read of a command's words."""
  monkeypatch.setattr(sys, 'argv', words)  # config_flags looks there
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  flags.DEFINE_string('workdir', '', '', flag_values=values)
  values(words)
  return values


def test_printed_commands_give_the_configs_of_the_sweep(tmp_path, monkeypatch):
  (tmp_path / 'a b').mkdir()
  (tmp_path / 'a b/0.txt').write_text('Quoted where a shell reads it.')
  file = sweeps.write(tmp_path, f"""
  add('many', **{{
      'model.norm': 'rmsnorm', 'optim.lr': 3e-4, 'train.z_loss': 1,
      'model.attention_bias': False, 'data.tokenizer': 'bytes',
      'optim.decay_mask': (('.*norm.*', 0), ('.*', 1)),
      'data.source': 'text:{tmp_path}/a b/*.txt'}})
  add('kinds', **{{
      'model.position': 'rope', 'model.pattern': 'near,global',
      'model.kinds': {{
          'near': {{'window': 2, 'rope': {{'theta': 1e6}}}},
          'global': {{'qk_norm': True}}}}}})
""")
  layout.save_description(tmp_path / 'w', described(file))
  description = layout.load_description(tmp_path / 'w')
  base = spec.read_sweep_file(file).base.to_dict()
  for point in points(description):
    words = layout.train_command(description, tmp_path / 'w', point, 1)
    values = parsed(words, monkeypatch)
    expected = layout.config(description, point, 1).to_dict()
    assert values.config.to_dict() == expected
    assert values.workdir == str(tmp_path / f'w/points/{point}/seed-1')
    # Nothing differs from the base but what is declared.
    assert {group for group in base if base[group] != expected[group]} <= {
        'seed', *(key.split('.')[0] for key in
                  layout.row_of(description, point)['changes'])}


@pytest.mark.parametrize('name', ['lr', 'parts', 'positions', 'routers',
                                  'small', 'ladder', 'mup'])
def test_a_worked_sweep_is_whole(name):
  sweep = spec.read_sweep_file(f'configs/sweeps/{name}.py')
  assert len(sweep.points) >= 5
  assert sweep.owed(sweep.points[-1]) == sweep.tasks
  if name == 'routers':  # the dense twin owes no routing
    assert sweep.base_name == 'dense' and sweep.owed(sweep.points[0]) == ()
  config = sweep.base
  steps = {*range(0, config.train.steps, config.eval.every_steps),
           config.train.steps}  # and the last step is always evaluated
  after = [n for n in steps if n >= config.optim.warmup_steps]
  assert len(after) >= statistics.MIN_POINTS or name == 'mup'


def test_a_topology_is_asked_of_the_plan(tmp_path, monkeypatch, capsys):
  asked = []

  def plan(words, **options):
    asked.append(words)
    if '--config.model.norm=rmsnorm' in words:
      return subprocess.CompletedProcess(
          words, 2, '{"fits": false}', 'error: peak 17 GiB of 15.75\n')
    memory = {'peak': 2 ** 30, 'hbm': 2 ** 34}
    return subprocess.CompletedProcess(words, 0, json.dumps(dict(
        topology='v5e:2x2', programs=[dict(program='train', memory=memory,
                                           estimate=False)])), '')

  monkeypatch.setattr(check.subprocess, 'run', plan)
  parser = argparse.ArgumentParser()
  check.add_arguments(parser)
  file = sweeps.write(tmp_path, "  add('wide', **{'model.d_model': 64})\n")
  assert check.main(parser.parse_args([file, '--topology=v5e:2x2'])) == 0
  assert 'wide: fits v5e:2x2, train peaks at 1.00 of 16.00 GiB a device' in (
      capsys.readouterr().out)
  assert asked[1][1:] == ['-m', 'tools.plan', '--json', '--topology=v5e:2x2',
                          '--config', file, '--config.model.d_model=64']
  file = sweeps.write(tmp_path)
  with pytest.raises(ValueError, match="point 'rms', tools.plan: peak 17 GiB"):
    check.main(parser.parse_args([file, '--topology=v5e:2x2']))
