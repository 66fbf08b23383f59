"""Sweeps as described: helpers, points, matching, and what check refuses."""

import argparse
import importlib.util
import json
import pathlib
import subprocess
import sys
import types

from absl import flags
from ml_collections import config_flags
import pytest

from configs.errors import RequestError
from configs.sweeps import helpers
from tests.helpers import sweeps
from tools.compare import check, commands, cost, layout, matching, spec
from tools.compare import statistics


def described(file, **options):
  args = types.SimpleNamespace(
      file=file, seeds=0, match='', match_field='', devices=0)
  vars(args).update(options)
  return check.describe(args)


def points(description):
  return {point['name']: point for point in description['points']}


def test_grid_is_every_combination():
  made = list(helpers.grid({'model.norm': ('a', 'b'), 'optim.lr': (1, 2)}))
  assert [name for name, _ in made] == ['a-lr=1', 'a-lr=2', 'b-lr=1', 'b-lr=2']
  assert made[1][1] == {'model.norm': 'a', 'optim.lr': 2}


def test_zip_goes_side_by_side():
  made = list(helpers.zip({'model.d_model': (32, 64), 'optim.lr': (2, 1)}))
  assert made[1] == ('d_model=64-lr=1', {'model.d_model': 64, 'optim.lr': 1})
  with pytest.raises(ValueError, match='model.d_model 2, optim.lr 1'):
    list(helpers.zip({'model.d_model': (32, 64), 'optim.lr': (2,)}))


def test_one_at_a_time_changes_one():
  made = dict(helpers.one_at_a_time({'model.norm': ('a', 'b'), 'seed': (1,)}))
  assert made == {'a': {'model.norm': 'a'}, 'b': {'model.norm': 'b'},
                  'seed=1': {'seed': 1}}


def test_leave_one_out_takes_back_one():
  made = dict(helpers.leave_one_out({'model.norm': 'a', 'model.ffn': 'b'}))
  assert made == {'all': {'model.norm': 'a', 'model.ffn': 'b'},
                  'without_norm': {'model.ffn': 'b'},
                  'without_ffn': {'model.norm': 'a'}}


@pytest.mark.parametrize('point, parts', [
    ("add('a', **{'model.nrom': 'rmsnorm'})", ['nrom', "'model.norm'"]),
    ("add('a', **{'model.d_model': 'wide'})", ['d_model', 'wide', 'int']),
    ("add('a', **{'model.moe': 1})", ['group of fields']),
    ("add('a', **{'model.kinds': {'b': {'windw': 1}}})",
     ["point 'a': model.kinds.b.windw is no field", 'window']),
    ("add('a', **{'model.kinds': {'b': 1}})", ['model.kinds.b is 1']),
    ("add('a', **{'optim.lr': {'b': 1}})", ["sets optim.lr to {'b': 1}"]),
    ("add('a', seed=1)", ["'a'", 'seed']),
    ("add('a/b', **{'optim.lr': 1.0})", ['a/b', 'folder']),
    ("add('a', **{'optim.lr': 1.0})\n  add('b', **{'optim.lr': 1.0})",
     ["'a' and 'b'", 'same config']),
    ("add('a')", ['nothing but the base']),
])
def test_a_wrong_point_is_a_sentence(point, parts, tmp_path):
  with pytest.raises(ValueError) as error:
    spec.read_sweep_file(sweeps.write(tmp_path, f'  {point}\n'))
  assert all(part in str(error.value) for part in parts)


def test_the_base_is_a_point(tmp_path):
  sweep = spec.read_sweep_file(sweeps.write(tmp_path))
  assert sweep.base_name == 'base'
  assert [point.name for point in sweep.points] == ['base', 'rms', 'swiglu']
  (tmp_path / 'own').mkdir()
  sweep = spec.read_sweep_file(sweeps.write(
      tmp_path / 'own', "  add('mine', **{'model.norm': 'layernorm'})\n"
      "  add('rms', **{'model.norm': 'rmsnorm'})\n"))
  assert sweep.base_name == 'mine' and len(sweep.points) == 2


def test_a_base_that_changes_is_refused(tmp_path):
  file = sweeps.write(tmp_path)
  with open(file, 'a') as source:
    source.write('\nimport random\nold = base\ndef base():\n  c = old()\n'
                 '  c.optim.lr = random.random()\n  return c\n')
  with pytest.raises(ValueError, match='another config each time'):
    spec.read_sweep_file(file)


# What a user's file may do in its base or its sweep, and what is said of it.
BASE = 'from configs import base as b\nbase = b.base\n'
PYTHON_ERRORS = {
    'def base(:': 'line 1: SyntaxError',
    'def base():\n  return 1 / 0': 'line 2: ZeroDivisionError',
    'def base():\n  pass': 'base() returned None, which is no ConfigDict',
    f'{BASE}def sweep(add):\n  add(x)': "line 4: NameError: name 'x'",
    f'{BASE}def sweep(add):\n  add(3)': 'a point is called 3',
    f'{BASE}TASKS = 5': 'TASKS is 5',
    f"{BASE}TASKS = 'embed',": "has 'embed', which cannot be done there: task",
    f'{BASE}SEEDS = "2"': "SEEDS or --seeds is '2'",
    f'{BASE}SEEDS = 10**20': '1 to 10,000',
    f'{BASE}SEED = 2': 'has SEED, which a sweep does not read: call it _SEED if'
                       " it is the file's own. Did you mean SEEDS?",
}


@pytest.mark.parametrize('text', PYTHON_ERRORS)
def test_an_error_in_a_sweep_file_has_its_file_and_line(text, tmp_path):
  file = tmp_path / 'mine.py'
  rest = '' if 'sweep(' in text else '\ndef sweep(add):\n  pass'
  file.write_text(f'{text}{rest}\nget_config = base\n')
  with pytest.raises(RequestError) as error:
    spec.read_sweep_file(str(file))
  assert PYTHON_ERRORS[text] in str(error.value)
  assert str(error.value).startswith((str(file), 'SEEDS'))


@pytest.mark.slow
@pytest.mark.parametrize('what', matching.WHAT)
def test_matched_points_cost_what_the_base_costs(what, tmp_path):
  description = described(sweeps.write(tmp_path), match=what)
  made = points(description)
  target = made['base'][what]
  for point in made.values():
    assert abs(point[what] / target - 1) <= 0.01, point
  assert made['swiglu']['matched'] == ['model.d_ff']
  assert made['swiglu']['changes']['model.d_ff'] < 128
  assert made['rms']['matched'] == [] or what != 'flops_per_token'
  assert '(matched)' in check.table(description)


@pytest.mark.slow
def test_matching_by_the_width_keeps_the_heads_whole(tmp_path):
  file = sweeps.write(tmp_path, "  add('deep', **{'model.num_layers': 4})\n")
  made = points(described(file, match='params', match_field='model.d_model'))
  assert made['deep']['changes']['model.d_model'] % 4 == 0


@pytest.mark.parametrize('point, parts', [
    ("add('big', **{'model.num_layers': 40})", ['cannot be matched', 'd_ff=']),
    ("add('set', **{'model.d_ff': 999})", ['sets model.d_ff', 'match_field']),
    ("add('moe', **{'model.ffn': 'moe', 'model.moe.d_ff': 64})",
     ['cannot be matched']),
    ("add('mup', **{'model.parametrization': 'mup', 'model.num_layers': 4, "
     "'model.mup_base_width': 32, 'model.init': 'fan_in'})",
     ['muP', 'change model.d_ff alone']),
])
def test_what_cannot_be_matched_is_refused(point, parts, tmp_path):
  with pytest.raises(ValueError) as error:
    described(sweeps.write(tmp_path, f'  {point}\n'), match='params')
  for part in [*parts, 'point ']:
    assert part in str(error.value)


@pytest.mark.parametrize('options, part', [
    (dict(match='params', match_field='model.dff'), 'mean .model.d_ff'),
    (dict(match='params', match_field='model.norm'), 'holds .layernorm'),
    (dict(match_field='model.d_model'), 'nothing is matched'),
    (dict(match_field=matching.FIELD), 'nothing is matched'),
])
def test_a_wrong_field_to_match_is_a_sentence(options, part, tmp_path):
  with pytest.raises(ValueError, match=f'--match_field .*{part}'):
    described(sweeps.write(tmp_path), **options)


def test_the_first_bad_point_stops_the_check(tmp_path):
  file = sweeps.write(tmp_path, (
      "  add('good', **{'model.norm': 'rmsnorm'})\n"
      "  add('heads', **{'model.num_heads': 5})\n"
      "  add('worse', **{'model.norm': 'none'})\n"))
  with pytest.raises(ValueError, match="point 'heads': .*num_heads is 5"):
    described(file)


def test_a_source_that_is_not_there_is_found(tmp_path):
  file = sweeps.write(
      tmp_path, "  add('far', **{'data.source': 'text:/no/such/*.txt'})\n")
  with pytest.raises(ValueError, match="point 'far': .*no/such.*no file"):
    described(file)


def test_the_mesh_is_checked_without_devices(tmp_path):
  file = sweeps.write(tmp_path)
  one, four = (points(described(file, devices=n))['base'] for n in (1, 4))
  one, four = one['bytes_by_part'], four['bytes_by_part']
  assert one['optimizer'] == four['optimizer']  # the mesh is data alone
  assert one['kept_for_backward'] == 4 * four['kept_for_backward'] > 0
  file = sweeps.write(tmp_path, "  add('fsdp', **{'mesh.fsdp': 4})\n")
  made = points(described(file))
  sizes = [made[name]['bytes_by_part']['parameters'] / made['base']['params']
           for name in ('base', 'fsdp')]
  assert sizes[0] == 4 and 1 <= sizes[1] < 1.2
  with pytest.raises(ValueError, match="point 'fsdp': .*mesh.fsdp=4"):
    described(file, devices=2)


def test_only_declared_keys_differ(tmp_path, monkeypatch):
  file, config = sweeps.write(tmp_path), layout.config

  def altered(description, point, seed):
    return spec.changed(config(description, point, seed),
                        {'optim.clip_norm': 2.0} if point == 'rms' else {}, '')

  monkeypatch.setattr(layout, 'config', altered)
  with pytest.raises(ValueError, match="'rms' differs .* optim.clip_norm, whi"):
    described(file)


def test_derived_fields_are_told(tmp_path):
  file = sweeps.write(tmp_path, "  add('wide', **{'model.d_model': 64})\n")
  description = described(file)
  assert set(points(description)['wide']['follows']) == {  # none unread
      'model.d_ff', 'model.head_dim', 'model.attention_scale'}
  assert 'so model.d_ff 128 -> 256' in check.table(description)


def test_a_kind_of_layer_that_the_base_has_not_is_told(tmp_path):
  file = sweeps.write(tmp_path, "  add('own', **{'model.pattern': 'own', "
                      "'model.kinds.own.qk_norm': True})\n")
  told = check.table(described(file))
  assert 'model.pattern=own, model.kinds.own.qk_norm=True' in told


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


@pytest.mark.slow
def test_another_sweep_in_the_workdir_is_refused(tmp_path):
  file, workdir = sweeps.write(tmp_path), tmp_path / 'w'
  check.save(workdir, described(file))
  check.save(workdir, described(file, seeds=3))
  assert points(layout.load_description(workdir))['rms']['seeds'] == [0, 1, 2]
  with pytest.raises(ValueError, match="match was '' and is 'params'"):
    check.save(workdir, described(file, match='params'))
  sweeps.write(tmp_path, sweeps.POINTS.replace(
      "'rmsnorm'", "'rmsnorm', 'optim.lr': 2e-3"))
  with pytest.raises(ValueError, match="point 'rms' was .* and is .*0.002"):
    check.save(workdir, described(file))
  sweeps.write(tmp_path, sweeps.POINTS.replace("'rms'", "'root'"))
  with pytest.raises(ValueError, match="a point 'rms', which the sweep no"):
    check.save(workdir, described(file))
  sweeps.write(tmp_path)
  text = open(file).read().replace('train.steps = 12', 'train.steps = 13')
  open(file, 'w').write(text)
  with pytest.raises(ValueError, match='base, in train.steps'):
    check.save(workdir, described(file))


def parsed(words, monkeypatch):
  """The config that train.py would read of a command's words."""
  monkeypatch.setattr(sys, 'argv', words)  # config_flags looks there
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  flags.DEFINE_string('workdir', '', '', flag_values=values)
  values(words)
  return values


def test_printed_commands_give_the_configs_of_the_sweep(
    tmp_path, monkeypatch):
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
  for point in points(description):
    words = commands.train(description, tmp_path / 'w', point, 1)
    values = parsed(words, monkeypatch)
    expected = layout.config(description, point, 1)
    assert values.config.to_dict() == expected.to_dict()
    assert values.workdir == str(tmp_path / f'w/points/{point}/seed-1')


SWEEPS = pathlib.Path(__file__).parents[3] / 'configs' / 'sweeps'
WORKED = sorted({p.stem for p in SWEEPS.glob('*.py')} - {'__init__', 'helpers'})


@pytest.mark.slow
@pytest.mark.parametrize('name', [pytest.param(name, marks=[
    pytest.mark.long] * (name != 'small')) for name in WORKED])
def test_a_worked_sweep_is_small_and_whole(name):
  sweep = spec.read_sweep_file(f'configs/sweeps/{name}.py')
  assert len(sweep.points) >= 5
  for point in sweep.points:
    figures = cost.of(sweep.config(point))
    # About a minute on one CPU core.
    assert figures.flops_per_token * figures.tokens < 4e12, point.name
  assert sweep.owed(sweep.points[-1]) == sweep.tasks


@pytest.mark.parametrize('name', [n for n in WORKED if n != 'mup'])
def test_a_worked_sweep_evaluates_often_enough_for_a_speed_up(name):
  config = spec.read_sweep_file(f'configs/sweeps/{name}.py').base
  steps = {*range(0, config.train.steps, config.eval.every_steps),
           config.train.steps}  # and the last step is always evaluated
  after = [n for n in steps if n >= config.optim.warmup_steps]
  assert len(after) >= statistics.MIN_POINTS


@pytest.mark.long
def test_the_dense_twin_owes_no_routing():
  sweep = spec.read_sweep_file('configs/sweeps/routers.py')
  assert sweep.base_name == 'dense' and sweep.owed(sweep.points[0]) == ()
  base = cost.of(sweep.base)
  for point in sweep.points:
    figures = cost.of(sweep.config(point))
    assert abs(figures.active_params / base.active_params - 1) < 0.01


@pytest.mark.plan
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="libtpu is not installed: pip install -e '.[plan]'")
def test_every_point_is_compiled_for_a_topology(tmp_path, capsys):
  parser = argparse.ArgumentParser()
  check.add_arguments(parser)
  file = sweeps.write(tmp_path, "  add('wide', **{'model.d_ff': 8192})\n")
  assert check.main(parser.parse_args(
      [file, '--topology=v5e:1x1', '--json'])) == 0
  plans = [point['plan'] for point in json.loads(
      capsys.readouterr().out)['points']]
  for plan in plans:
    assert plan['topology'] == 'v5e:1x1' and not plan['programs'][0]['estimate']
  base, wide = (plan['programs'][0]['memory']['peak'] for plan in plans)
  # Two matrices of each layer: weights, gradients and two moments, in float32.
  assert wide - base > 0.9 * 2 * 2 * 32 * (8192 - 128) * 16


@pytest.mark.slow
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
