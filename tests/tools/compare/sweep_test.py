"""Sweeps: what their files say and what is refused, points of equal cost, the
ledger, and how they run: launchers, kills, failures, evaluations, status."""

import json
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

from absl import flags
from ml_collections import config_flags
import pytest

from common.errors import EnvironmentFailure, RequestError, STOPPED
from configs.sweeps import helpers
from tests.helpers import forked, studies, sweep_folder, sweeps, toy_run
from tests.helpers.sweeps import states
from tools.compare import __main__ as command
from tools.compare import check, cost, layout, local, run, slurm, spec
from tools.compare import statistics, status
from training import cli, progress, writer
from training.workdir import run_config

ROOT = pathlib.Path(__file__).parents[3]


def described(file, match='', field=''):
  return check.describe_sweep(types.SimpleNamespace(
      file=file, seeds=0, match=match, match_field=field))


def points(description):
  return {point['name']: point for point in description['points']}


# Its file.


def test_the_loops_that_most_sweeps_are():
  assert list(helpers.grid({'model.norm': ('a', 'b'), 'optim.lr': (1,)})) == [
      ('a-lr=1', {'model.norm': 'a', 'optim.lr': 1}),
      ('b-lr=1', {'model.norm': 'b', 'optim.lr': 1})]
  assert dict(helpers.one_at_a_time({'model.norm': ('a', 'b'), 'seed': (1,)})
              ) == {'a': {'model.norm': 'a'}, 'b': {'model.norm': 'b'},
                    'seed=1': {'seed': 1}}
  assert dict(helpers.leave_one_out({'model.norm': 'a', 'model.ffn': 'b'})) == {
      'all': {'model.norm': 'a', 'model.ffn': 'b'},
      'without_norm': {'model.ffn': 'b'}, 'without_ffn': {'model.norm': 'a'}}


@pytest.mark.parametrize('body, message', [
    ('add("a", **{"model.nrom": "rmsnorm"})', 'Did you mean model.norm?'),
    ('add("a", **{"model.d_model": "wide"})', "d_model is 'wide', of type str"),
    ('add("a", **{"model.kinds": {"b": {"windw": 1}}})', 'kinds.b.windw is no'),
    ('add("a", seed=1)', "'a' sets seed: every point has the same seeds"),
    ('add("a", **{"eval.batches": 1})', 'evaluated on the same text'),
    ('add("a/b", **{"optim.lr": 1.0})', "called 'a/b': begin with a letter"),
    ('add("=1+1", **{"optim.lr": 1.0})', "called '=1.1': begin with"),
    ('add("--help", **{"optim.lr": 1.0})', "called '--help': begin with"),
    ('add(3, **{"optim.lr": 1.0})', 'name is 3, of type int'),
    ('add("a", **{"optim.lr": 1.0})\n  add("b", **{"optim.lr": 1.0})',
     "points 'a' and 'b' train the same"),
    ('add("neox", **{"model.arch": "gpt_neox"})',
     "points 'base' and 'neox' train the same; .* write add.system"),
    ('add("a")', 'nothing but the base'),
    ('add("a", **{"optim.lr": 1.0})\n  add("a", **{"optim.lr": 2.0})',
     "two points are called 'a'"),
    ('add("base", **{"optim.lr": 1.0})', "called 'base' changes the base"),
    ('add("a", **{"optim.lr": 1.0})\nTASKS = "loss"', "TASKS is 'loss': wri"),
    ('add.system("t5")', "point 't5': model.arch 't5' stacks an encoder-dec"),
    ('add("a", **{"optim.lr": 1.0})\nTASKS = "embed",', 'embed.* task'),
    ('add("a", **{"optim.lr": 1.0})\nSEED = 2', 'Did you mean SEEDS?'),
    ('pass\ndel get_config', 'has no get_config: add `def get_config'),
    ('pass\ndef get_config():\n  return 1 / 0', 'ZeroDivisionError')])
def test_what_is_no_sweep_is_a_sentence(body, message, tmp_path):
  with pytest.raises(RequestError, match=message):
    spec.read_sweep_file(sweeps.write(tmp_path, f'  {body}\n'))


def test_the_base_is_a_point(tmp_path):
  sweep = spec.read_sweep_file(sweeps.write(tmp_path))
  assert sweep.base_name == 'base'
  assert [point.name for point in sweep.points] == ['base', 'rms', 'swiglu']
  sweep = spec.read_sweep_file(sweeps.write(
      tmp_path, "  add('mine', **{'model.norm': 'layernorm'})\n"
      "  add('rms', **{'model.norm': 'rmsnorm'})\n"))
  assert sweep.base_name == 'mine' and len(sweep.points) == 2


@pytest.mark.slow
@pytest.mark.parametrize('what', spec.MATCHABLE_COSTS)
def test_matched_points_cost_what_the_base_costs(what, tmp_path):
  description = described(sweeps.write(tmp_path), what)
  made = points(description)
  for point in made.values():
    assert abs(point[what] / made['base'][what] - 1) <= 0.01, point
  assert made['swiglu']['matched'] == ['model.d_ff']
  assert made['swiglu']['changes']['model.d_ff'] < 128
  assert '(matched)' in check.render_cost_table(description)


def test_a_sweep_that_is_begun_again_forgets_no_seed(tmp_path):
  description = described(sweeps.write(tmp_path))
  for seeds, all_seeds in (([0, 1], [0, 1]), ([2], [0, 1, 2]),
                           ([0], [0, 1, 2])):
    rows = [row | {'seeds': seeds} for row in description['points']]
    layout.save_sweep_description(tmp_path / 'w', description | {
        'points': rows})
    for point in layout.load_sweep_description(tmp_path / 'w')['points']:
      assert point['seeds'] == all_seeds


def test_a_matched_width_is_of_whole_heads(tmp_path, monkeypatch):
  deep = sweeps.write(tmp_path, "  add('deep', **{'model.num_layers': 4})\n")
  made = points(described(deep, 'params', 'model.d_model'))
  assert made['deep']['changes']['model.d_model'] % 4 == 0  # whole heads
  # Eight heads of even size, though 9,944 = 8 x 1,243 would be nearer.
  wide = sweeps.write(tmp_path, "  add('wide', **{'model.num_heads': 8})\n")
  monkeypatch.setattr(cost, 'one_cost_figure', lambda config, name: (
      config.model.d_model / 9944 if config.model.num_heads == 8 else 1.0))
  _, point = cost.match_costs(spec.read_sweep_file(wide), 'params',
                              'model.d_model').points
  assert point.changes['model.d_model'] in (9936, 9952)


@pytest.mark.parametrize('point, what, field, why', [
    ("'model.num_layers': 40", 'params', '', 'cannot be matched.*d_ff='),
    ("'model.d_ff': 999", 'params', '', 'sets model.d_ff, which --match=para'),
    ("'model.parametrization': 'mup', 'model.num_layers': 4, "
     "'model.mup_base_width': 32, 'model.init': 'fan_in'", 'params',
     'model.d_model', 'muP.*change model.d_model alone'),
    ("'optim.lr': 1.0", '', 'model.d_ff', 'nothing is matched: pass --match'),
    ("'model.num_heads': 5", '', '', "point 'x': .*num_heads is 5"),
    ("'data.source': 'text:/no/such/*.txt'", '', '', 'no/such.*no file'),
    ("'eval.every_steps': 0, 'eval.tasks': ''", '', '',
     "point 'x': eval.every_steps is 0 and no task is done")])
def test_what_cannot_be_compared_is_refused(point, what, field, why, tmp_path):
  with pytest.raises(RequestError, match=why):
    described(sweeps.write(tmp_path, f"  add('x', **{{{point}}})\n"), what,
              field)


def test_what_follows_from_a_change_is_told(tmp_path):
  description = described(sweeps.write(
      tmp_path, "  add('wide', **{'model.d_model': 64})\n"
      "  add('own', **{'model.pattern': 'own', "
      "'model.kinds.own.qk_norm': True})\n"
      "  add('long', **{'data.length': 8})\n"
      "  add.system('llama')\n"
      "  add.system('llama', name='other', **{'model.norm': 'layernorm'})\n"))
  made, table = points(description), check.render_cost_table(description)
  assert set(made['wide']['follows']) == {  # none unread
      'model.d_ff', 'model.head_dim', 'model.attention_scale'}
  assert 'so model.d_ff 128 -> 256' in table
  # The fields of a new part are not left open.
  assert made['llama']['follows'] == {}
  assert 'model.pattern=own, model.kinds.own.qk_norm=True' in table
  assert not description['paired'] and 'same batches' in table
  assert made['long']['tokens'] == 12 * 8 * 8
  assert made['llama']['changes'] == {
      'model.arch': 'llama', 'model.position': 'rope', 'model.norm': 'rmsnorm',
      'model.ffn': 'swiglu', 'model.attention_bias': False,
      'model.ffn_bias': False, 'model.tie_embeddings': False}
  assert ('other: not as published: llama with norm=layernorm in place of '
          'rmsnorm') in table
  assert 'llama: not as published' not in table
  # Each cost is compared with that of the base.
  for factor, figure in enumerate(('params', 'active_params',
                                   'flops_per_token'), 2):
    made['wide'][figure] = factor * made[description['base']][figure]
  row = re.search('^wide .*', check.render_cost_table(description), re.M)[0]
  assert re.findall(r'\+\d+.00%', row) == ['+100.00%', '+200.00%', '+300.00%']


def test_costs_are_those_of_the_counter(tmp_path):
  from training import runs
  from training.costs import totals
  from training.data import tokenizers
  base = spec.read_sweep_file(sweeps.write(tmp_path)).base
  model, _ = runs.resolve_model(base, tokenizers.load('bytes'))
  figures, ours = totals.count_costs(base, 16, model), cost.cost_of_run(base)
  assert ours.params == figures['parameters']
  assert ours.flops_per_token == figures['flops_per_token']['training']


def test_check_times_a_run_of_each_point(tmp_path, monkeypatch, capsys):
  ran = types.SimpleNamespace(returncode=0, stderr='', stdout='a step: 1 s\n'
                              'about 1,200 s in all, 0:20:00: 12 steps')
  monkeypatch.setattr(check, 'subprocess', types.SimpleNamespace(
      run=lambda words, **_: ran))
  monkeypatch.setattr(sys, 'argv', ['compare', 'check', str(sweeps.write(
      tmp_path)), '--time', '--seeds=3'])
  assert command.main() == 0
  printed = capsys.readouterr().out
  names = re.search('a run here takes (.*)', printed)[1].split(', ')
  assert all(name.startswith('0:20:00 (') for name in names)
  whole = len(names) * 3 * 1200
  assert f'some {whole // 3600}:{whole % 3600 // 60:02}:00; as one' in printed
  ran.returncode, ran.stderr = 2, 'W0000\nerror: no memory\n'
  with pytest.raises(RequestError, match='be timed: error: no memory'):
    command.main()


def test_a_job_goes_on_while_one_of_its_runs_is_this_runners(
    book, tmp_path, monkeypatch):
  monkeypatch.setattr(layout, 'BEAT_SECONDS', 0.0)
  book.add_runs([('a', seed, ()) for seed in range(3)])
  runner = local.Runner(tmp_path, book, 1, 1)
  assert book.claim_runs([1, 2, 3], runner._name) == [1, 2, 3]
  runs, killed = book.runs(), []
  for group in (runs[:2], runs[2:]):
    runner._jobs.append(local.Job(
        runs=group, evaluates=False, slot=0, process=types.SimpleNamespace(
            kill=lambda group=group: killed.append(group))))
  for run_id in (2, 3):  # which another runner took over
    assert book.settle_run(run_id, runner._name, layout.PENDING)
  runner._record_heartbeat()
  assert killed == [runs[2:]]


def test_a_runner_tells_the_time_left(tmp_path, monkeypatch, capsys):
  sweep_folder.write(tmp_path, sweep_folder.POINTS[:2], states={
      ('better', 1): (layout.PENDING, '')})
  with layout.Ledger(tmp_path) as ledger:
    runner = local.Runner(tmp_path, ledger, 1, 1)
    runner._description = layout.load_sweep_description(tmp_path)
    runner._trained_at_start, runner._time_of_progress = 3.0, float('-inf')
    runner._start_time = time.monotonic() - 100  # for two runs; one is left
    runner._print_progress()
    runner._print_progress()  # not again so soon
  assert capsys.readouterr().out == (
      '5 of 6 runs are trained, some 0:00:50 left\n')
  # As a milestone it is told once, since two of three runs are over a tenth.
  with layout.Ledger(tmp_path) as ledger, progress.print_milestones_only(True):
    runner._ledger, runner._has_told_tenth = ledger, False
    for _ in range(2):
      runner._time_of_progress = float('-inf')
      runner._print_progress()
  assert capsys.readouterr().out.count('left') == 1


def test_a_runner_makes_the_config_of_a_run_once(tmp_path, monkeypatch):
  made = []
  make = layout.config_of_run

  def make_and_note(description, point, seed):
    made.append((point, seed))
    return make(description, point, seed)

  monkeypatch.setattr(layout, 'config_of_run', make_and_note)
  sweep_folder.write(tmp_path, sweep_folder.POINTS[:2])
  made.clear()
  with layout.Ledger(tmp_path) as ledger:
    runner = local.Runner(tmp_path, ledger, parallel=1, group=8)
    runner._description = layout.load_sweep_description(tmp_path)
    runs = ledger.runs()
    assert runner._group_runs(runs) == runner._group_runs(runs)
  assert sorted(made) == sorted((run.point, run.seed) for run in runs)


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
  layout.save_sweep_description(tmp_path / 'w', described(file))
  description = layout.load_sweep_description(tmp_path / 'w')
  base = spec.read_sweep_file(file).base.to_dict()
  for point in points(description):
    words = layout.train_command(description, tmp_path / 'w', point, 1)
    values = parsed(words, monkeypatch)
    expected = layout.config_of_run(description, point, 1).to_dict()
    assert values.config.to_dict() == expected
    assert values.workdir == str(tmp_path / f'w/points/{point}/seed-1')
    # Nothing differs from the base but what is declared.
    assert {group for group in base if base[group] != expected[group]} <= {
        'seed', *(key.split('.')[0] for key in
                  layout.point_row(description, point)['changes'])}


@pytest.mark.parametrize('name', sorted(
    path.stem for path in pathlib.Path('configs/sweeps').glob('*.py')
    if path.stem not in ('__init__', 'helpers')))
def test_a_worked_sweep_is_whole(name):
  sweep = spec.read_sweep_file(f'configs/sweeps/{name}.py')
  assert len(sweep.points) >= (3 if name == 'loops' else 5)
  assert sweep.tasks_of_point(sweep.points[-1]) == sweep.tasks
  if name == 'routers':  # the dense twin owes no routing
    assert sweep.base_name == 'dense' and sweep.tasks_of_point(
        sweep.points[0]) == ()
  config = sweep.base
  steps = {*range(0, config.train.steps, config.eval.every_steps),
           config.train.steps}  # and the last step is always evaluated
  after = [n for n in steps if n >= config.optim.warmup_steps]
  assert len(after) >= statistics.MIN_POINTS_OF_CURVE or name in ('mup',
                                                                  'recurrent')


# Its ledger.


@pytest.fixture
def book(tmp_path):
  with layout.Ledger(tmp_path) as opened:
    yield opened


def test_a_run_goes_through_its_states(book):
  rows = [('a', 0, ()), ('a', 1, ()), ('b', 0, ('routing',))]
  book.add_runs(rows)
  book.add_runs(rows)  # again: the same rows
  assert [(r.point, r.seed) for r in book.runs()] == [
      ('a', 0), ('b', 0), ('a', 1)]
  me = book.register_runner()
  assert book.claim_runs([3], me) == [3]
  assert book.claim_runs([3], me) == []  # it is taken
  assert book.settle_run(3, me, layout.PENDING)
  assert not book.settle_run(3, me, layout.DONE)  # no claim of ours any more
  assert book.claim_runs([3], me) == [3]
  assert book.settle_run(3, me, layout.DONE)
  book.add_runs([('b', 0, ('routing', 'loss'))])  # a new task is pending
  assert book.runs()[1].state == layout.PENDING


def _claimed_elsewhere(book, monkeypatch, *ids):
  """Lets a runner of another host take runs; returns its name."""
  with monkeypatch.context() as elsewhere:
    elsewhere.setattr(layout.storage, 'host_name', lambda: 'elsewhere')
    other = book.register_runner()
  assert book.claim_runs(ids, other) == list(ids)
  return other


def test_a_runner_of_another_host_is_dead_once_it_stands_still(
    book, monkeypatch):
  """What its clock says, or that of who looks on, plays no part."""

  def look(times, beats=False):
    freed = []
    for _ in range(times):
      if beats:
        assert book.record_heartbeat(other) == {1, 2}
      freed += book.free_runs_of_dead_runners()
    return freed

  book.add_runs([('a', 0, ()), ('a', 1, ())])
  other = _claimed_elsewhere(book, monkeypatch, 1, 2)
  assert look(layout.LOOKS_UNTIL_DEAD) == [] and book.has_doubtful_runners
  assert look(5 * layout.LOOKS_UNTIL_DEAD, beats=True) == []
  assert not book.has_doubtful_runners
  assert look(layout.LOOKS_UNTIL_DEAD - 1) == []
  assert look(1) == ['a, seed 0', 'a, seed 1']
  assert book.record_heartbeat(other) == set()  # and the runner finds out


def _trained(tmp_path):
  """Begins a sweep of which all but one run is done; returns its folder."""
  description, workdir = described(sweeps.write(tmp_path)), tmp_path / 'w'
  with layout.Ledger(workdir) as book:
    layout.begin_sweep(workdir, book, description)
    for run in book.runs()[1:]:
      studies.leave(layout.run_folder(workdir, run.point, run.seed),
                    layout.config_of_run(description, run.point, run.seed), 2.0)
      book.set_state_of_unclaimed(run, layout.DONE)
  return description, workdir


def test_a_sweep_begins_with_what_lies_on_disk(tmp_path, monkeypatch, capsys):
  """A run that is gone, and one whose runner is silent, are pending again."""
  monkeypatch.setattr(layout, 'BEAT_SECONDS', 0.0)
  description, workdir = _trained(tmp_path)
  before = states(workdir)
  shutil.rmtree(layout.run_folder(workdir, 'rms', 1))
  with layout.Ledger(workdir) as book:
    _claimed_elsewhere(book, monkeypatch, book.runs()[0].id)
    layout.begin_sweep(workdir, book, description)
  assert states(workdir) == before | {('rms', 1): layout.PENDING}
  stderr = capsys.readouterr().err
  assert 'seed-1 is gone: it is trained anew' in stderr
  assert 'waiting for a sign of life' in stderr


def test_no_flipped_bit_of_a_ledger_gets_through(tmp_path, capsys):
  """It is said, and what is done is known from the runs; or has no effect."""
  _, workdir = _trained(tmp_path)
  file, before = workdir / 'ledger.sqlite', states(workdir)
  whole, draw, warnings = file.read_bytes(), random.Random(0), 0
  places = [place for place, byte in enumerate(whole) if byte]
  for place in draw.sample(places, 12):
    toy_run.flip(file, place, draw.randrange(8))
    assert states(workdir) == before
    warnings += 'ledger.sqlite is damaged (' in capsys.readouterr().err
    file.write_bytes(whole)
  assert 0 < warnings == len(list(workdir.glob('*.aside-*')))
  file.unlink()
  assert states(workdir) == before
  file.write_bytes(b'')
  assert states(workdir) == before
  with layout.Ledger(workdir) as book:
    file.write_text('no ledger')
    assert states(workdir) == before
    with pytest.raises(EnvironmentFailure, match='run the sweep again'):
      book.register_runner()  # in what was set aside


# Claims what is pending in the ledger of a folder; says so, and lives on.
CLAIM = '''
import sys
from tools.compare import layout
with layout.Ledger(sys.argv[1]) as book:
  me = book.register_runner()
  print('ready', flush=True)
  sys.stdin.readline()
  print(*(id for run in book.runs('pending')
          for id in book.claim_runs([run.id], me)), flush=True)
  sys.stdin.readline()
'''


@pytest.mark.slow
def test_two_processes_never_share_a_run(book, tmp_path):
  book.add_runs(('p', seed, ()) for seed in range(200))
  claimers = [subprocess.Popen(
      [sys.executable, '-c', CLAIM, str(tmp_path)], cwd=ROOT, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
  for process in claimers:
    assert process.stdout.readline() == 'ready\n'
  for process in claimers:
    process.stdin.write('go\n')
    process.stdin.flush()
  got = [process.stdout.readline().split() for process in claimers]
  assert sorted(int(x) for taken in got for x in taken) == sorted(
      row.id for row in book.runs())
  assert book.free_runs_of_dead_runners() == []  # both live
  claimers[0].kill()
  claimers[0].wait()
  freed = book.free_runs_of_dead_runners()
  assert len(freed) == len(got[0]) == len(book.runs('pending'))
  claimers[1].communicate('end\n')


# How it runs.


def test_print_gives_a_line_a_run_and_runs_none(tmp_path, capsys):
  file = sweeps.write(tmp_path, tasks=('extrapolation',))
  args = sweeps.arguments(file, f'--workdir={tmp_path}', '--launcher=print')
  assert run.main(args) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 6 and set(states(tmp_path).values()) == {'pending'}
  words = shlex.split(lines[-1])
  assert words[:4] == ['python', 'train.py', '--config', file]
  assert '--config.model.ffn=swiglu' in words and '--config.seed=1' in words
  assert words[words.index('&&'):][1:3] == ['python', 'eval.py']
  assert '--tasks=extrapolation' in words
  # More seeds may be added, and nothing may change.
  assert run.main(sweeps.arguments(
      file, f'--workdir={tmp_path}', '--launcher=print', '--seeds=3')) == 0
  assert run.main(args) == 0 and len(states(tmp_path)) == 9
  text = open(file).read()
  for old, new, message in (
      ("'rmsnorm'", "'rmsnorm', 'optim.lr': 2e-3", 'points.rms.optim.lr'),
      ("'rms'", "'root'", 'points.rms.model.norm'),
      ('train.steps = 12', 'train.steps = 13', 'base_config.train.steps')):
    open(file, 'w').write(text.replace(old, new))
    with pytest.raises(RequestError, match=f'another sweep, .* in {message}'):
      run.main(args)


def test_a_runner_that_leaves_runs_to_others_does_not_say_all_is_done(
    tmp_path, monkeypatch):
  monkeypatch.setattr(local.Runner, 'run', lambda self: self._ledger.claim_runs(
      [row.id for row in self._ledger.runs()], 'another'))
  args = sweeps.arguments(sweeps.write(tmp_path), f'--workdir={tmp_path}')
  assert run.main(args) == STOPPED
  assert set(states(tmp_path).values()) == {'running'}


@pytest.mark.parametrize('word, message', [
    ('--launcher=slrum', "Did you mean 'slurm'"),
    ('--parallel=0', '--parallel is 0'), ('--seeds=-1', '--seeds is -1'),
    ('--slurm=timeout_min=60', '--slurm is of --launcher=slurm'),
    ('--anyway', '--anyway is of a study, and .* is none'),
    ('--workdir=gs://bucket/w', 'gs://bucket/w')])
def test_a_wrong_request_is_a_sentence(word, message, tmp_path):
  with pytest.raises(RequestError, match=message):
    run.main(sweeps.arguments(sweeps.write(tmp_path), f'--workdir={tmp_path}',
                              word))
  assert not (tmp_path / 'ledger.sqlite').exists()


OF = {
    'sweep': ('--seeds=2', '--match=params', '--match_field=model.d_ff',
              '--time', '--json'),
    'study': ('--until=noise', '--amend=why', '--anyway')}


@pytest.mark.parametrize('command', [check, run])
@pytest.mark.parametrize('whose', OF)
def test_a_flag_is_refused_beside_the_other_kind_of_file(
    whose, command, tmp_path):
  files = {'sweep': sweeps.write(tmp_path), 'study': studies.write(tmp_path)}
  other = {'sweep': 'study', 'study': 'sweep'}[whose]
  parser = cli.Parser()
  command.add_arguments(parser)
  of_this_command = [word for word in OF[whose]
                     if parser.get_default(word.strip('-').partition('=')[0])
                     is not None]
  assert of_this_command or command is check
  for word in of_this_command:
    parser = cli.Parser()  # which takes each flag once
    command.add_arguments(parser)
    words = ['--workdir=w', word]
    assert check.check_arguments(parser.parse_args([files[whose], *words])) == (
        whose == 'study')
    parser = cli.Parser()
    command.add_arguments(parser)
    with pytest.raises(RequestError, match=f' is of a {whose}, and .* is none'):
      check.check_arguments(parser.parse_args([files[other], *words]))


@pytest.mark.slow
def test_a_failing_point_is_recorded_and_the_others_go_on(
    tmp_path, monkeypatch, capsys):
  sweeps.fake(monkeypatch)
  file = sweeps.write(tmp_path, sweeps.POINTS
                      + "  add('bad', **{'optim.lr': 1.0})\n",
                      tasks=('extrapolation',))
  workdir = tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}', '--parallel=3')
  assert run.main(args) == 1
  assert {k for k, v in states(workdir).items() if v == 'failed'} == {
      ('bad', 0), ('bad', 1)}
  assert sorted(set(states(workdir).values())) == ['done', 'failed']
  stderr = capsys.readouterr().err
  assert 'bad, seed 1: this point is bad (exit code 1)' in stderr

  path = layout.run_folder(workdir, 'rms', 1) / 'metrics.jsonl'
  path.write_text(path.read_text().replace('"eval", "loss": 1.0',
                                           '"eval", "loss": 1.5') + '{"st')
  where = dict(where='', workdir=str(workdir))
  assert status.main(types.SimpleNamespace(json=False, **where)) == 0
  lines = capsys.readouterr().out.splitlines()
  rows = {line.split()[0]: line.split() for line in lines if line}
  assert rows['base'] == ['base', '2', 'done', '100%', '1.0000']
  assert rows['rms'] == ['rms', '2', 'done', '100%', '1.2500', '+0.2500']
  assert rows['bad'][1:4] == ['2', 'failed', '8%']
  assert '8 runs: 2 failed, 6 done' in lines
  told = [line for line in lines if line.startswith('failed: ')]
  assert told == [f'failed: bad, seed {seed}: this point is bad (exit code 1)'
                  for seed in (0, 1)]
  assert status.main(types.SimpleNamespace(json=True, **where)) == 0
  assert len(json.loads(capsys.readouterr().out)['runs']) == 8

  # Again: what is done is not touched, what failed only with --retry.
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*.jsonl')}
  assert len(before) == 8
  assert run.main(args) == 1
  assert before == {p: p.stat().st_mtime_ns for p in before}
  monkeypatch.setattr(sweeps, 'SCRIPT', sweeps.SCRIPT.replace("'bad'", "''"))
  args.retry = True
  assert run.main(args) == 0
  assert set(states(workdir).values()) == {'done'}
  assert {p.parents[1].name for p in before
          if p.stat().st_mtime_ns != before[p]} == {'bad'}


def _wait(condition, seconds=240):
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until, 'waited in vain'
    time.sleep(0.05)


def _running(workdir):
  """Numbers of the processes that train in `workdir`."""
  numbers = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      words = path.read_bytes().split(b'\0')
    except OSError:
      continue
    if b'-c' in words and any(
        word.startswith(f'{workdir}/points'.encode()) for word in words):
      numbers.append(int(path.parent.name))
  return numbers


@pytest.mark.long
@pytest.mark.skipif(sys.platform != 'linux', reason='prctl is of Linux')
def test_kill_in_the_middle_then_two_runners_redo_nothing(tmp_path):
  file, workdir = sweeps.write(tmp_path), tmp_path / 'w'
  workdir.mkdir()
  (workdir / 'hold-seed-1').touch()
  start = lambda *words: subprocess.Popen(
      [sys.executable, '-m', 'tests.helpers.sweeps', file,
       f'--workdir={workdir}', *words], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  runner = start('--parallel=2')
  _wait(lambda: len(_running(workdir)) == 2 and
        sum(s == 'done' for s in states(workdir).values()) == 3)
  runner.kill()
  runner.communicate()
  _wait(lambda: not _running(workdir))  # its children died with it
  before = {p: p.stat().st_mtime_ns for name in ('base', 'rms', 'swiglu')
            for p in layout.run_folder(workdir, name, 0).glob('*')}
  assert len(before) == 3 * 4
  runners = [start() for _ in range(2)]
  _wait(lambda: len(_running(workdir)) == 2)  # the ledger may say so too soon
  (workdir / 'hold-seed-1').unlink()
  printed = [process.communicate(timeout=100)[0] for process in runners]
  # One that leaves while the other one still trains has not seen all done.
  assert 0 in (codes := [p.returncode for p in runners]), printed
  assert {*codes} <= {0, 75}, printed
  assert set(states(workdir).values()) == {'done'}
  assert before == {p: p.stat().st_mtime_ns for p in before}
  ended = [[line for line in text.splitlines() if line.endswith(': done')]
           for text in printed]
  assert sorted(sum(ended, [])) == [
      f'{name}, seed 1: done' for name in ('base', 'rms', 'swiglu')]
  assert all(ended)  # each had its share


@pytest.mark.slow
def test_a_sweep_that_owes_runs_does_not_end_with_0(tmp_path):
  """After a signal, and where nobody reads what it prints."""
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  workdir.mkdir()
  (workdir / 'hold-seed-0').touch()
  words = '-m', 'tests.helpers.sweeps', file, f'--workdir={workdir}'

  def terminate(pid):
    _wait((layout.run_folder(workdir, 'base', 0) / 'metrics.jsonl').exists)
    os.kill(pid, signal.SIGTERM)
  assert forked.run(*words, meanwhile=terminate).returncode == STOPPED
  assert set(states(workdir).values()) == {'pending'}
  runner = subprocess.Popen([sys.executable, *words], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  assert runner.stdout.readline() == b'base, seed 0: training\n'
  runner.stdout.close()
  (workdir / 'hold-seed-0').unlink()
  assert runner.wait(100) == STOPPED
  assert states(workdir)['base', 0] == 'done'
  assert 'pending' in states(workdir).values()


@pytest.mark.slow
def test_a_run_of_another_config_on_disk_is_not_adopted(tmp_path, monkeypatch):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}')
  assert run.main(args) == 0
  (workdir / 'ledger.sqlite').unlink()
  description = layout.load_sweep_description(workdir)
  run_config.save_config(layout.run_folder(workdir, 'rms', 0),
                         spec.apply_changes(
      layout.config_of_run(description, 'rms', 0),
      {'optim.lr': 1.0, 'eval.batches': 3}, 'a test'))
  (layout.run_folder(workdir, 'swiglu', 0) / 'config.json').unlink()
  assert run.main(args) == 1
  with layout.Ledger(workdir) as opened:
    errors = {r.point: r.error for r in opened.runs(layout.FAILED)}
  assert errors.keys() == {'rms', 'swiglu'}
  assert 'in eval.batches, optim.lr: move it away' in errors['rms']
  assert 'config.json is missing' in errors['swiglu']


@pytest.mark.parametrize('text, sentence', [
    ('error: an old one\n$ again\nW00\nerror: first\nerror: last\nrest\n',
     'last'),
    ('error: an old one\n$ again\nW00\n\nkilled\n\n', 'killed')])
def test_a_log_says_why_its_last_command_failed(text, sentence, tmp_path):
  (tmp_path / 'log.txt').write_text(text)
  assert layout.read_error_of_log(tmp_path) == sentence


def test_the_log_of_a_run_says_why_it_ended_in_its_group(
    tmp_path, monkeypatch):
  ended = {'whole': (0, ''), 'early': (writer.ENDED_EARLY, 'ended early'),
           'bad': (writer.DIVERGED, 'not finite'),
           'stopped': (STOPPED, 'stopped at step 2')}
  writers = []
  for name, (code, sentence) in ended.items():
    (tmp_path / name).mkdir()
    writers.append(types.SimpleNamespace(
        workdir=tmp_path / name, code=code, sentence=sentence))

  def train(*names):
    monkeypatch.setattr(
        local.vectorised, 'train_group', lambda configs, folders: [
            x for x in writers if x.workdir.name in names])
    return local._train_as_one_program([], [])

  assert train('whole', 'early') == 0
  assert train('bad') == train('stopped') == local.EXIT_CODE_UNFINISHED
  logs = {path.parent.name: path.read_text()
          for path in tmp_path.glob('*/log.txt')}
  assert logs == {'early': 'ended early\n', 'bad': 'error: not finite\n',
                  'stopped': 'stopped at step 2\n'}


# A group ends in an error of all, or of one that says so in its log.
@pytest.mark.slow
@pytest.mark.parametrize('code', [1, local.EXIT_CODE_UNFINISHED])
def test_of_a_group_each_run_ends_by_itself(
    code, tmp_path, monkeypatch, capsys):
  sweeps.fake(monkeypatch, code)
  file, workdir = sweeps.write(
      tmp_path, "  add('bad', **{'optim.lr': 1.0})\n"
      "  add('odd', **{'optim.lr': 2e-3})\n", 1, ('loss',)), tmp_path / 'w'
  assert run.main(sweeps.arguments(
      file, f'--workdir={workdir}', '--group=8')) == 1
  assert states(workdir) == {
      ('base', 0): 'done', ('bad', 0): 'failed', ('odd', 0): 'failed'}
  output = capsys.readouterr()
  assert output.out.count('goes on alone, since its group failed') == 2 * (
      code == 1)
  reason = 'this point is bad' if code == 1 else 'not as the others'
  assert f'failed: bad, seed 0: {reason} (exit code {code})' in output.err
  assert f'odd, seed 0: not as the others (exit code {code})' in output.err


@pytest.mark.long
def test_a_task_that_is_added_is_not_lost(tmp_path, monkeypatch):
  """While a run trains, and while it evaluates."""
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  names = ('base', 'rms', 'swiglu')

  def adding(name, tasks):
    of = getattr(layout, name)
    def act(*args, **options):
      with layout.Ledger(workdir) as opened:
        opened.add_runs((point, 0, tasks) for point in names)
      return of(*args, **options)
    monkeypatch.setattr(layout, name, act)

  adding('train_command', ['loss'])
  adding('group_command', ['loss', 'extrapolation'])
  assert run.main(sweeps.arguments(file, f'--workdir={workdir}')) == 0
  assert all(layout.is_evaluated(layout.run_folder(workdir, point, 0), [
      'loss', 'extrapolation']) for point in names)
  assert set(states(workdir).values()) == {'done'}


def test_the_array_is_of_local_runners(tmp_path, monkeypatch):
  file, workdir, submitted = sweeps.write(tmp_path), tmp_path / 'w', []
  monkeypatch.setattr(
      slurm, 'submit', lambda jobs, folder, options, name: submitted.append(
          (jobs, folder, options, name)))
  words = ['run', file, f'--workdir={workdir}', '--match=params', '--launcher',
           'slurm', '--retry', '--slurm=timeout_min=2']
  monkeypatch.setattr(sys, 'argv', ['sweep', *words])
  assert command.main() == 0
  (jobs, folder, options, _), = submitted
  assert len(jobs) == 6 and jobs[0][:3] == [
      sys.executable, '-m', 'tools.compare']
  args = sweeps.arguments(*jobs[0][4:])
  assert (args.file, args.launcher, args.slurm, args.retry, args.match) == (
      file, 'local', '', False, 'params')
  assert (folder, options) == (workdir / 'slurm', 'timeout_min=2')


def test_slurm_runs_the_runner_as_an_array(tmp_path):
  pytest.importorskip('submitit')
  words = [sys.executable, '-c', f'open({str(tmp_path / "mark")!r}, "a")'
           '.write("x")']
  jobs = slurm.submit(
      2 * [words], tmp_path / 'slurm', 'timeout_min=2', 'x', 'local')
  assert [job.result() for job in jobs] == [0, 0]
  assert (tmp_path / 'mark').read_text() == 'xx'
  for options, message in (
      ('partition', '--slurm has .partition'),
      ('gpus=1', '--launcher=slurm: .*gpus'),
      ('slurm_signal_delay_s=10', 'slurm_signal_delay_s=10: ')):
    with pytest.raises(ValueError, match=message):
      slurm.submit([words], tmp_path, options, 'x', 'local')


@pytest.mark.slow
def test_a_job_out_of_time_saves_before_it_is_queued_again(tmp_path):
  """By submitit's own signal, handler and queue, without SLURM. The signal
  comes as soon as the command hears SIGTERM, and it takes some time to save."""
  pytest.importorskip('submitit')
  saved = tmp_path / 'saved'
  jobs = slurm.submit([[sys.executable, '-c', f"""
import os, pathlib, signal, sys, time
saved = pathlib.Path({str(saved)!r})
if saved.exists():
  sys.exit(7)  # the second time it goes on, to its end
def save(number, frame):
  time.sleep(0.5)
  saved.touch()
  sys.exit()
signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.SIGUSR2)
time.sleep(60)
"""]], tmp_path / 'slurm', 'timeout_min=2', 'x', 'local')
  assert jobs[0].result() == 7 and saved.exists()
