"""Certificates of fair comparison: each of many unfair pairs is named, or is
refused where its losses are of different text, and a fair one names nothing."""

import argparse
import csv
import json
import math
import shutil

import pytest

from common.errors import RequestError
from configs import base
from tests.helpers import study_folder, sweep_folder
from tests.helpers.sweep_folder import point
from tools.compare import certificate, comparison, cost, curves, judge, layout
from tools.compare import report, spec
from tools.compare import plan as plans
from tools.compare import results as results_lib
from training import progress
from training import runs as runs_lib
from training.workdir import provenance, run_config

TEXT = 'text:here/*.txt'
# What a run was started with, and on which device it ran for how long.
FACTS = dict(commit='1' * 40, diff='', files={}, data={
    TEXT: 'aa', 'tokenizer bytes': 'bb'}, device='8 of the kind H100',
             step_seconds=0.5, seed=None)
LOCAL = {'model.attention': 'banded', 'model.sliding_window': 4}
ASKED = {'model.ffn': 'relu'}  # as many parameters and FLOPs as gelu


def _config(changes):
  """Returns a small config of a text of its own, with some changes."""
  c = base.base()
  c.model.update(dict(num_layers=2, d_model=32, num_heads=2, d_ff=64,
                      vocab_size=256))
  c.data.update(dict(source=TEXT, length=64, batch_size=8))
  c.train.steps = 200
  c.eval.batches = 0
  return spec.apply_changes(c, changes, 'a test')


def _write_run(folder, changes, monkeypatch, seed, loss, facts):
  """Writes the folder of a run that ended, as train.py leaves it."""
  facts = FACTS | facts
  start = {name: facts[name] for name in ('commit', 'diff', 'files', 'data')}
  (folder / 'checkpoints/1').mkdir(parents=True)
  if facts['seed'] is not None:
    seed = facts['seed']
  config = _config({**changes, 'seed': seed})
  with monkeypatch.context() as patched:
    patched.setattr(provenance, 'describe_this_start', lambda data: start)
    run_config.save_config(folder, config)
  steps = config.train.steps
  rows = [dict(step=steps, split='train', loss=loss,
               step_seconds=facts['step_seconds']),
          dict(step=steps, split='eval', loss=loss)]
  (folder / 'metrics.jsonl').write_text(
      ''.join(json.dumps(row) + '\n' for row in rows))
  (folder / 'log.txt').write_text(f'devices: {facts["device"]}, mesh data=8\n')


def _write(root, monkeypatch, base_changes, changes, others=(), num_seeds=1,
           **facts):
  """Writes a base, a variant that is given something else than it, and others
  that lie beside both."""
  sides = {'base': (base_changes, {}),
           'variant': ({**base_changes, **ASKED, **changes}, facts)}
  for i, more in enumerate(others):
    sides[f'other-{i}'] = ({**base_changes, **ASKED, **more}, {})
  for name, (changes_of_side, facts_of_side) in sides.items():
    for seed in range(num_seeds):
      effect = 0.0 if name == 'base' else -0.5 + 0.001 * seed
      _write_run(root / name / f'seed-{seed}', changes_of_side, monkeypatch,
                 seed=seed, loss=2.0 + 0.01 * seed + effect,
                 facts=facts_of_side)


def _compare(root, monkeypatch, *sides, **facts):
  """Returns the changed fields of such a pair, and in what the judge finds it
  unlike beyond the question."""
  _write(root, monkeypatch, *sides, **facts)
  names = 'base', 'variant'
  runs = {name: judge._read_runs(root / name) for name in names}
  changes = judge._changed_fields([tuple(runs[name][0].config
                                         for name in names)])
  return changes, judge._find_differences(
      folder=root, names=names, runs=runs, seeds=[0], changes=changes,
      about=())


OWN_TEXT = {'data.eval_source': 'text:own.txt'}
MLM = {'model.arch': 'bert', 'objective': 'mlm', 'model.ffn': 'gelu'}
# Each unfair pair: the base, what the variant changes beside the question, the
# facts of its runs, and the quantity that is named.
UNFAIR = {
    'global for local attention': (
        LOCAL, {'model.attention': 'global', 'model.sliding_window': 0}, {},
        'flops_per_token'),
    'doubled width': ({}, {'model.d_model': 64}, {}, 'multiplied_params'),
    'wider networks': ({}, {'model.d_ff': 128}, {}, 'flops_per_token'),
    'twice the depth': ({}, {'model.num_layers': 4}, {}, 'multiplied_params'),
    'more ids': ({}, {'model.vocab_size': 512}, {}, 'looked_up_params'),
    'twice the steps': ({}, {'train.steps': 400}, {}, 'tokens'),
    'FLOPs of the run': ({}, {'train.steps': 400}, {}, 'flops'),
    'larger batches': ({}, {'data.batch_size': 16}, {}, 'batches'),
    'larger batches, more tokens': ({}, {'data.batch_size': 16}, {}, 'tokens'),
    'batches that grow': ({}, {'data.batch_ramp': '50:4'}, {}, 'batches'),
    'other tokens': (OWN_TEXT, {'data.source': 'text:b.txt'}, {}, 'batches'),
    'a longer warm-up': ({}, {'optim.warmup_steps': 150}, {}, 'recipe'),
    'a higher rate': ({}, {'optim.lr': 3e-3}, {}, 'recipe'),
    'another optimiser': ({}, {'optim.name': 'lion'}, {}, 'recipe'),
    'another schedule': ({}, {'optim.schedule': 'wsd'}, {}, 'recipe'),
    'no weight decay': ({}, {'optim.weight_decay': 0.0}, {}, 'recipe'),
    'an average of weights': ({}, {'optim.ema': 0.99}, {}, 'recipe'),
    'label smoothing': ({}, {'train.label_smoothing': 0.1}, {}, 'recipe'),
    'weights from elsewhere': (
        {}, {'init_from': 'runs/old', 'init_partial': True}, {},
        'first_weights'),
    'wider first weights': ({}, {'model.init_stddev': 0.1}, {},
                            'initialisation'),
    'drawn weights': ({}, {'init_seed': 7}, {}, 'first_weights'),
    'precision': ({}, {'model.dtype': 'bfloat16'}, {}, 'precision'),
    'stored precision': ({}, {'model.param_dtype': 'bfloat16'}, {},
                         'precision'),
    'edited code': ({}, {}, dict(diff='cd'), 'code'),
    'another commit': ({}, {}, dict(commit='2' * 40), 'code'),
    'an edited file beside the tree': ({}, {}, dict(files={'a.py': 'ef'}),
                                       'code'),
    'another device': ({}, {}, dict(device='8 of the kind B200'), 'devices'),
    'twice the time': ({}, {}, dict(step_seconds=1.0), 'seconds'),
    'more tuning': ({}, {}, dict(others=[{'optim.lr': 2e-3},
                                         {'optim.lr': 3e-3}]), 'tuning'),
    'other data of training': (
        OWN_TEXT, {}, dict(data={TEXT: 'xx'}), 'batches'),
}
# Each pair whose losses are of different text, and the name that is refused.
OTHER_TEXT = {
    'a tokenizer': ({}, {'data.tokenizer': 'bytes:512'}, {}, 'data.tokenizer'),
    'an edited tokenizer': ({}, {}, dict(data={'tokenizer bytes': 'xx'}),
                            'content of tokenizer bytes'),
    'edited text': ({}, {}, dict(data={TEXT: 'xx'}), 'content of text'),
    'other text': ({}, {'data.source': 'text:b.txt'}, {}, 'data.source'),
    'text of its own': ({}, OWN_TEXT, {}, 'data.eval_source'),
    'less held out': ({}, {'data.holdout_every': 7}, {}, 'data.holdout_every'),
    'longer rows': ({}, {'data.length': 128}, {}, 'data.length'),
    'fewer batches': ({}, {'eval.batches': 1}, {}, 'eval.batches'),
    'a half': ({}, {'eval.part': 'first'}, {}, 'eval.part'),
    'smaller batches of as many': (
        {'eval.batches': 2}, {'data.batch_size': 4}, {}, 'data.batch_size'),
    'documents apart': ({}, {'data.document_mask': True}, {},
                        'data.document_mask'),
    'fewer masks': (MLM, {'data.mask_rate': 0.1}, {}, 'data.mask_rate'),
    'whole words': (MLM, {'data.whole_words': True}, {}, 'data.whole_words'),
    'shorter spans': (
        {'model.arch': 't5', 'objective': 'span'}, {'span.mean_length': 2.0},
        {}, 'span.mean_length'),
    'other letters': (
        {'objective': 'probe', 'data.source': 'probe:recall'},
        {'probe.vocab': 8}, {}, 'probe.vocab'),
    'another objective': ({}, {'objective': 'prefix'}, {}, 'objective'),
}


@pytest.mark.parametrize('name', UNFAIR)
def test_an_unfair_pair_is_named(name, tmp_path, monkeypatch):
  base_changes, changes, facts, quantity = UNFAIR[name]
  changed, unlike = _compare(tmp_path, monkeypatch, base_changes, changes,
                             **facts)
  assert quantity in unlike.named
  title = certificate.QUANTITIES[quantity].title
  assert title in unlike.titles
  text = ' '.join(certificate.name_differences({'variant': unlike}))
  assert f'not alike in {title}: variant (' in text
  # All fields that differ are either asked about or named.
  assert all(field in unlike.asked or field in text for field in changed)


@pytest.mark.parametrize('name', OTHER_TEXT)
def test_losses_of_other_text_are_refused(name, tmp_path, monkeypatch):
  base_changes, changes, facts, field = OTHER_TEXT[name]
  with pytest.raises(RequestError, match=field):
    _compare(tmp_path, monkeypatch, base_changes, changes, **facts)


@pytest.mark.parametrize('changes, facts', [
    ({}, {}), ({}, dict(step_seconds=0.6)),
    ({'mesh.fsdp': 2, 'log.every_steps': 7, 'data.threads': 4,
      'eval.every_steps': 20, 'checkpoint.keep': 1, 'model.remat': 'full',
      'model.scan_layers': False}, {})])
def test_a_fair_pair_names_nothing(changes, facts, tmp_path, monkeypatch):
  _, unlike = _compare(tmp_path, monkeypatch, {}, changes, **facts)
  assert unlike == (('model.ffn',), {}, ())
  assert not certificate.name_differences({'variant': unlike})


def _exit_code(words):
  """Returns the exit code of the judge with these arguments."""
  parser = argparse.ArgumentParser()
  judge.add_arguments(parser)
  return judge.main(parser.parse_args(words))


def test_the_judge_says_what_is_asked_and_what_is_not_alike(tmp_path,
                                                            monkeypatch):
  _write(tmp_path, monkeypatch, {}, {'optim.warmup_steps': 150}, num_seeds=3)
  sides = tmp_path / 'base', tmp_path / 'variant'
  answer = judge.judge_variant(*sides)
  asked = [*map(str, sides)]
  assert _exit_code(asked) == judge.EXIT_CODE_BETTER_BUT_UNLIKE
  assert _exit_code([
      *asked, '--about=model.ffn,optim.warmup_steps']) == 0
  warmup = 'optim.warmup_steps 100 -> 150'
  assert (answer['verdict'], answer['about'], answer['unlike']) == (
      'better', ['model.ffn'], {'recipe': warmup})
  first, second, *_, last = judge.render_answer(answer).splitlines()
  assert first == ('variant beside base: better, but not alike in optimiser '
                   'and schedule')
  assert second == 'about: model.ffn' and warmup in last
  answer = judge.judge_variant(*sides, ('optim.warmup_steps',))
  assert answer['unlike'] == {'model': "model.ffn 'gelu' -> 'relu'"}
  # A field that differs at a later seed alone.
  shutil.rmtree(sides[1] / 'seed-2')
  _write_run(sides[1] / 'seed-2', {**ASKED, 'optim.b1': 0.5}, monkeypatch,
             seed=2, loss=1.5, facts={})
  assert 'optim.b1 0.9 -> 0.5' in judge.judge_variant(*sides)['unlike'][
      'recipe']
  with pytest.raises(RequestError, match='optim.b2 is alike on both sides'):
    judge.judge_variant(*sides, ('optim.b2',))


def test_a_recipe_alone_is_the_question_and_code_where_it_is_said():
  sides = [dict(recipe={'optim.lr': lr}, tokens=tokens)
           for lr, tokens in ((1e-3, 100.0), (2e-3, 200.0))]
  unlike = certificate.compare_certificates(*sides)
  assert unlike.asked == ('optim.lr',)
  assert unlike.named == {'tokens': '100 -> 200, +100.0%'}
  for alone, name in ((dict(code={'code': 'a'}), 'code'),
                      (dict(first_weights={'init_from': 'a'}),
                       'first_weights')):
    sides = [alone, {name: dict.fromkeys(alone[name], 'b')}]
    assert [*certificate.compare_certificates(*sides).named] == [name]
    assert certificate.compare_certificates(*sides, (name,)) == (
        (name,), {}, ())


def test_a_sweep_and_rows_of_a_csv_name_what_is_not_alike(tmp_path, capsys):
  """Once for each of both, by the words that the judge has."""
  changes = {
      'base': {}, 'fair': ASKED, 'wide': ASKED, 'long': ASKED,
      'warm': {**ASKED, 'optim.warmup_steps': 50},
      'masked': {**ASKED, 'data.document_mask': True},
      'other-start': {**ASKED, 'init_seed': 3},
      'fewer': {'model.norm': 'rmsnorm'}, 'low': {'optim.lr': 1e-4}}
  costs = {'wide': dict(params=99_000), 'long': dict(tokens=2_000_000),
           'fewer': dict(seeds=(0,))}
  sweep_folder.write(tmp_path, [
      point(name, changes[name], **{'seeds': (0, 1)} | costs.get(name, {}))
      for name in changes])
  rows = ['variant,seed,loss,tokens,flops_per_token,batches,precision']
  for seed in range(2):
    rows += [f'torch,{seed},1.7,same,8e5,same,float16', f'bare,{seed},1.7,,,,']
  (tmp_path / 'rows.csv').write_text('\n'.join(rows))
  compared = comparison.load_comparison(tmp_path, str(tmp_path / 'rows.csv'))
  named = {name: set(compared.differences[name].named)
           for name in compared.variants}
  assert named == {
      'base': set(), 'fair': set(), 'wide': {'multiplied_params'},
      'long': {'tokens', 'flops'}, 'warm': {'recipe'},
      'masked': {'held_out_text', 'tuning'},
      'other-start': {'first_weights', 'tuning'}, 'fewer': {'seeds', 'tuning'},
      'low': set(), 'torch': {'flops_per_token', 'flops', 'precision'},
      'bare': set()}
  unknown = compared.differences['bare'].unknown
  assert set(unknown) == {*certificate.QUANTITIES} - {'seeds', 'code',
                                                      'devices'}
  with progress.print_milestones_only(True):
    comparison.load_comparison(tmp_path).print_milestones()
  milestones = capsys.readouterr().out.splitlines()
  assert milestones[2].startswith('long: ') and milestones[2].endswith(
      '; not alike in FLOPs of the run, tokens')
  assert milestones[0].startswith('fair: ') and ';' not in milestones[0]
  text = report.format_report(compared)
  assert 'not alike in tokens: long (1e+06 -> 2e+06, +100.0%)' in text
  assert 'Unknown of bare or of the base, and so not compared: model, ' in text
  assert 'float16' in text
  # The table of costs has what was told.
  told = compared.frozen.point('torch', '', plans.TEXT)
  assert (told['flops_per_token'], told['tokens']) == (8e5, 1_000_000)
  assert math.isnan(told['params'])
  given = report.report_as_json(compared)['certificates']
  assert given['torch']['flops_per_token'] == 8e5
  assert given['torch']['batches'] == given['base']['batches']
  (tmp_path / 'rows.csv').write_text('variant,seed,loss,tokens\na,0,1.7,many')
  with pytest.raises(RequestError, match="tokens of a is 'many'"):
    comparison.load_comparison(tmp_path, str(tmp_path / 'rows.csv'))


def _sweep_of_unfair_pairs(root, monkeypatch, base_changes):
  """Returns a sweep of all unfair pairs with one base, and the quantity that is
  to be named of each point."""
  base_config = _config(base_changes)
  flat_base = run_config.flatten(base_config)
  changes_of_point, facts_of_point = {'base': {}}, {'base': {}}
  quantity_of_point = {}
  for name, (theirs, changes, facts, quantity) in UNFAIR.items():
    if theirs != base_changes:
      continue
    point_name = name.replace(' ', '-').replace(',', '')
    quantity_of_point[point_name] = quantity
    facts_of_point[point_name] = dict(facts)
    changes_of_point[point_name] = {**ASKED, **changes}
    for i, more in enumerate(facts_of_point[point_name].pop('others', ())):
      changes_of_point[f'{point_name}-{i}'] = {**ASKED, **more}
  points = []
  for name, changes in changes_of_point.items():
    folder = layout.run_folder(root, name, 0)
    changed = {**base_changes, **changes}
    _write_run(folder, changed, monkeypatch, seed=0, loss=2.0,
               facts=FACTS | facts_of_point.get(name, {}))
    config = _config(changed)
    costs = cost.cost_of_run(
        config, runs_lib.resolve_model_without_tokenizer(config))
    points.append(curves.Point(
        name=name, changes=changes, matched=(),
        runs=judge._read_runs(folder.parent), **costs._asdict()))
  sweep = curves.Sweep(
      name='unfair', file='unfair.py', match='', paired=True,
      base_tree=base_config.to_dict(), base_config=flat_base, base=points[0],
      points=tuple(points), codes=())
  return sweep, quantity_of_point


@pytest.mark.parametrize('base_changes', [{}, LOCAL, OWN_TEXT])
def test_a_sweep_and_a_csv_name_each_unfair_pair(
    base_changes, tmp_path, monkeypatch):
  sweep, quantity_of_point = _sweep_of_unfair_pairs(
      tmp_path, monkeypatch, base_changes)
  certificates = certificate.certify_sweep(sweep, tmp_path)
  of_base = certificates['base']
  # Each variant again, as a row of a CSV tells what it was given.
  rows = [['variant', 'seed', 'loss', *certificate.QUANTITIES]]
  for name in quantity_of_point:
    cells = []
    for quantity in certificate.QUANTITIES:
      value = certificates[name].get(quantity, '')
      alike = value == of_base.get(quantity)
      cells.append('same' if alike else certificate.format_value(value))
    rows.append([f'told {name}', 0, 2.0, *cells])
  with open(tmp_path / 'rows.csv', 'w', newline='') as file:
    csv.writer(file).writerows(rows)
  told = certificate.certify_sweep(
      comparison.add_variants_of_csv(sweep, str(tmp_path / 'rows.csv')),
      tmp_path)
  unlike = comparison.differences_from_base(told, 'base')
  for name, quantity in quantity_of_point.items():
    for row in (name, f'told {name}'):
      assert quantity in unlike[row].named, row
      assert not unlike[row].unknown, row
      assert certificate.QUANTITIES[quantity].title in unlike[row].titles


def test_a_study_names_what_is_not_alike(tmp_path, capsys, monkeypatch):
  tree = results_lib.NOTHING | study_folder.write(tmp_path)
  frozen = plans.load_frozen_plan(tmp_path)
  base, sizes = frozen.plan.base, frozen.plan.sizes
  # A field that was solved for is no part of the question, but one that the
  # variant sets is.
  for name, matched in (('rope', ['model.d_ff']), ('alibi', [])):
    point = frozen.point(name, sizes[-1], plans.TEXT)
    point['changes']['model.d_ff'] = 99
    point['matched'] = matched
  fair = comparison.compare_study(tmp_path, frozen, tree)
  assert not fair.differences['rope'].named
  assert fair.differences['rope'].asked == ('model.position',)
  assert {*fair.differences['alibi'].asked} == {'model.position', 'model.d_ff'}
  largest = {name: fair.certificates[name][sizes[-1]]['model']['model.d_ff']
             for name in ('rope', base)}
  assert largest['rope'] == largest[base] != 99
  # More recipes for one, and at the largest size more FLOPs for another, which
  # has another value at the medium one.
  for row in tree['tuned']:
    if row['variant'] == 'rope':
      row['tried'].append(row['tried'][0] | {'changes': {'optim.lr': 8e-3}})
  point = frozen.point('alibi', sizes[-1], plans.TEXT)
  point['flops_per_token'] *= 2
  for row in tree['outcomes']:
    if (row['phase'], row['variant'], row['size']) == (
        'confirm', 'alibi', 'medium'):
      row['changes'] = {'optim.lr': 4e-3}
  unfair = comparison.compare_study(tmp_path, frozen, tree)
  assert unfair.differences['rope'].named == {
      'tuning': 'recipes tried 3 -> 4'}
  named = unfair.differences['alibi'].named
  assert [*named] == ['flops_per_token', 'flops', 'recipe']
  assert named['flops_per_token'].endswith(', +100.0% at large')
  assert named['recipe'] == 'optim.lr 0.002 -> 0.004 at medium'
  rows = {row['variant']: row['not_alike'] for row in unfair.verdicts()}
  assert rows['rope'] == 'tuning' and 'FLOPs of a token' in rows['alibi']
  with progress.print_milestones_only(True):
    unfair.print_milestones()
  assert any(line.startswith('rope: ') and line.endswith('not alike in tuning')
             for line in capsys.readouterr().out.splitlines())

  # A variant that was stopped is certified at the size of the screening, and
  # the code of each size by the runs of that size.
  frozen.point('none', sizes[0], plans.TEXT)['tokens'] *= 2
  rows = []
  for name in (base, 'rope'):
    for size in sizes[:2]:
      row = dict(name=f'{name}-{size}', variant=name, size=size,
                 workload=plans.TEXT, seeds=[0])
      rows.append(row)
      is_edited = (name, size) == ('rope', sizes[0])
      _write_run(layout.run_folder(tmp_path / 'confirm', row['name'], 0), {},
                 monkeypatch, seed=0, loss=2.0,
                 facts=dict(diff='cd' if is_edited else ''))
  layout.save_sweep_description(tmp_path / 'confirm', dict(points=rows))
  unfair = comparison.compare_study(tmp_path, frozen, tree)
  assert 'stopped' in unfair.verdict_or_stage('none')
  assert [*unfair.differences['none'].named] == ['flops', 'tokens']
  named = unfair.differences['rope'].named
  assert [*named] == ['tuning', 'code'] and named['code'].endswith(' at small')


@pytest.mark.parametrize('size', study_folder.SIZES)
@pytest.mark.parametrize('quantity', [
    'multiplied_params', 'looked_up_params', 'flops_per_token', 'tokens',
    'seeds', 'seconds', 'tuning'])
def test_a_study_names_what_is_not_alike_at_one_size_alone(
    size, quantity, tmp_path):
  """Whichever size it is, and that it is that one."""
  tree = results_lib.NOTHING | study_folder.write(
      tmp_path, study_folder.plan(tuned_sizes=study_folder.SIZES))
  tree['tuned'] = [row | {'size': each, 'tried': row['tried'][:]}
                   for row in tree['tuned'] for each in study_folder.SIZES]
  frozen = plans.load_frozen_plan(tmp_path)
  point = frozen.point('rope', size, plans.TEXT)
  runs = [row for row in tree['outcomes'] if (
      row['phase'], row['variant'], row['size'], row['workload']) == (
          'confirm', 'rope', size, plans.TEXT)]
  if quantity == 'seeds':
    tree['outcomes'].remove(runs[0])
  elif quantity == 'seconds':
    for row in runs:
      row['seconds'] *= 2
  elif quantity == 'tuning':
    tuned = next(row for row in tree['tuned'] if (
        row['variant'], row['size'], row['workload']) == (
            'rope', size, plans.TEXT))
    tuned['tried'].append(tuned['tried'][0] | {'changes': {'optim.lr': 8e-3}})
  else:
    point[quantity] = 2 * point[quantity] + 1000

  compared = comparison.compare_study(tmp_path, frozen, tree)
  assert compared.differences['rope'].named[quantity].endswith(f' at {size}')
  others = compared.differences.keys() - {'rope'}
  assert not any(compared.differences[name].named for name in others)
  title = certificate.QUANTITIES[quantity].title
  assert any(f'not alike in {title}: rope (' in line and f' at {size})' in line
             for line in compared.warnings)
