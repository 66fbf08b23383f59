"""Studies: what their files plan and what is refused, the phases, what each
asks for and what follows, and what stands in their folders meanwhile."""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types

import numpy as np
import pytest

from common.errors import EnvironmentFailure, RequestError, Stopped
from configs import base as base_config
from tests.helpers import studies
from tools.compare import comparison, decide, freeze, layout, measures, phases
from tools.compare import plan as plans
from tools.compare import publish, report, results, status, study
from training import progress
from training.workdir import run_config

ROOT = pathlib.Path(__file__).parents[3]
SECONDS = 1500  # that a process may take beside other tests
PROBE = ("WORKLOADS = {'text': {}, 'copy': {'data.length': 8, "
         "'probe.levels': (1, 2), 'train.steps': 8}}")


noise_runs = phases.PHASES['noise'].largest_set_of_runs


# Its file.


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('studies')


@pytest.fixture(scope='module')
def probed(folder):
  """With a probe, matched by parameters."""
  return freeze.freeze_plan(studies.write(
      folder, f"{PROBE}\nMATCH = 'params'\nALPHA = 0.01",
      sweep="add('wide', **{'model.ffn': 'swiglu'})"))


def test_the_plan_is_what_the_file_says(probed, folder, tmp_path):
  plan = probed.plan
  assert (plan.name, plan.base, plan.variants) == ('made', 'base', ('wide',))
  assert plan.sizes == plan.tuned_sizes == ('s', 'm', 'l')
  assert plan.workloads == ('text', 'copy')
  assert (plan.alpha, plan.q, plan.effect) == (0.01, 0.05, 0.5)
  loss, copy = plan.measures
  assert loss == plans.Measure('loss', 'text', 'loss', 'lower',
                               math.log(probed.points[0]['vocab']))
  assert probed.points[0]['guess'] == loss.chance
  # Of two or three answers one is the sign that ends the row.
  assert copy == plans.Measure('copy', 'copy', 'accuracy', 'higher',
                               pytest.approx(2 / (2 + 3), abs=0.01))
  assert set(probed.sources) == {
      f'text:{folder}/texts/*.txt', 'tokenizer bytes', 'probe:copy'}
  plans.save_frozen_plan(tmp_path, probed)
  back = plans.load_frozen_plan(tmp_path)
  assert back.hash == probed.hash and back.plan == plan
  assert plans.adopt_plan(tmp_path, probed).hash == probed.hash
  assert noise_runs(back)[3].point == noise_runs(probed)[3].point


def test_each_point_is_matched_at_its_size_and_stays_so_on_a_probe(probed):
  widths = set()
  for size in probed.plan.sizes:
    base = probed.point('base', size, 'text')
    wide = probed.point('wide', size, 'text')
    assert abs(wide['params'] / base['params'] - 1) <= 0.01
    assert wide['matched'] == ['model.d_ff']
    widths.add(wide['changes']['model.d_ff'])
    probe = probed.point('wide', size, 'copy')['changes']
    assert probe['model.d_ff'] == wide['changes']['model.d_ff']
    assert probe['train.steps'] == 8 and probe['optim.warmup_steps'] == 2
  assert len(widths) == 3


@pytest.mark.parametrize('probe, size, changes', [
    (PROBE.replace(", 'train.steps': 8", ''),
     {'train.steps': 16, 'optim.warmup_steps': 4, 'optim.decay_steps': 12},
     {'optim.warmup_steps': 4, 'optim.decay_steps': 12,
      'eval.every_steps': 16, 'log.every_steps': 1}),
    (PROBE, {'optim.warmup_steps': 2, 'eval.every_steps': 3,
             'checkpoint.every_steps': 4, 'log.every_steps': 2},
     {'optim.warmup_steps': 4, 'eval.every_steps': 3,
      'checkpoint.every_steps': 4, 'log.every_steps': 2})])
def test_a_probe_has_the_schedule_of_its_size(probe, size, changes, folder):
  frozen = freeze.freeze_plan(studies.write(
      folder, f"{probe}\nSIZES['m'].update({size})"))
  assert frozen.point('base', 'm', 'copy')['changes'].items() >= changes.items()
  assert frozen.point('base', 's', 'copy')['changes']['eval.every_steps'] == (
      8 if probe == PROBE else 4)


def test_a_probe_may_have_other_steps_than_a_size_and_the_text_may_not(folder):
  steps = "SIZES['m']['train.steps'] = 16\n"
  frozen = freeze.freeze_plan(studies.write(folder, f'{PROBE}\n{steps}'))
  assert frozen.point('base', 'm', 'text')['changes']['train.steps'] == 16
  probe = frozen.point('base', 'm', 'copy')['changes']
  assert probe['train.steps'] == 8
  with pytest.raises(RequestError, match='a size and a workload both set trai'):
    freeze.freeze_plan(studies.write(
        folder, f"{steps}WORKLOADS = {{'text': {{'train.steps': 8}}}}"))


MUP = "c.model.update(parametrization='mup', mup_base_width=8)"


def test_what_mup_has_no_rule_for_is_tuned_at_each_size(folder):
  """And at the one that is predicted by the values of the last of these."""
  plan = freeze.freeze_plan(studies.write(
      folder, base=MUP, sweep="""add('none', **{'model.position': 'none'})
  add('standard', **{'model.parametrization': 'standard',
                     'model.mup_base_width': 0})""")).plan
  assert plan.tuned_sizes == ('s',)
  assert plan.tuned_at_each_size == ('standard',)
  tuned = {(search.variant, search.size)
           for search in phases.make_searches(plan)}
  assert tuned == {('base', 's'), ('none', 's'), ('standard', 's'),
                   ('standard', 'm'), ('standard', 'l')}
  plan = dataclasses.replace(plan, largest='xl')
  for tuned_sizes, expected in ('s', 'ssss'), ('sm', 'smmm'), ('sml', 'smll'):
    assert expected == ''.join(
        plan.size_of_tuning(size, tuned_sizes) for size in plan.all_sizes)
  # A phase that has fewer sizes knows the others still.
  plan = dataclasses.replace(
      plan, sizes=('xl',), order_of_sizes=('s', 'm', 'l', 'xl'))
  assert plan.size_of_tuning('xl', 'sm') == 'm'


def test_widths_that_are_solved_for_stay_in_proportion_in_mup(
    folder, monkeypatch):
  file = studies.write(folder, "MATCH = 'params'", base=MUP,
                       sweep="add('wide', **{'model.ffn': 'swiglu'})")
  frozen = freeze.freeze_plan(file)
  assert frozen.point('wide', 'm', 'text')['matched'] == ['model.d_ff']
  monkeypatch.setattr(freeze, 'MOST_OUT_OF_PROPORTION', -1.0)
  with pytest.raises(RequestError, match='would have model.d_ff .* muP has'):
    freeze.freeze_plan(file)


def test_the_costs_are_those_of_the_runs_that_are_asked_for(probed):
  by_phase = {cost.phase: cost for cost in results.costs(probed, 8, None)}
  assert by_phase['noise'].runs == 3 * 2 * 2 * 3
  # Three candidates at half of the steps, then two at all of them.
  assert by_phase['tune'].runs == 2 * 3 * 2 * 3 * (3 + 2)
  assert by_phase['screen'].runs == 2 * 3  # of the text alone
  assert by_phase['confirm'].runs == 2 * 3 * 2 * 3
  tokens = 4 * 8 * (4 + 8)  # of a run on the text, and of one on the probe
  assert by_phase['noise'].tokens == 3 * 2 * 3 * tokens
  assert by_phase['tune'].tokens == 2 * 3 * 3 * (3 * 0.5 + 2) * tokens
  # Base and base-again are one program; three seeds of a variant are another.
  assert by_phase['noise'].programs == 6 and by_phase['screen'].programs == 2
  assert by_phase['screen'].seconds is None
  known = results.costs(probed, 8, {
      (size, workload): 0.5 for size in probed.plan.sizes
      for workload in probed.plan.workloads})
  assert known[2].seconds == 6 * 4 * 0.5


def test_guessing_among_labels_is_not_guessing_among_tokens(folder):
  file = folder / 'rows.tsv'
  file.write_text(''.join(f'row {i}\t{"abc"[i % 3]}\n' for i in range(24)))
  frozen = freeze.freeze_plan(studies.write(
      folder, "MEASURES = ({'figure': 'loss'}, {'figure': 'accuracy'})",
      base="c.objective = 'classification'; "
      f"c.data.source = 'labelled:{file}'; "
      'c.data.length = c.model.max_len = 16'))
  loss, accuracy = frozen.plan.measures
  assert loss.chance == pytest.approx(math.log(3))
  assert accuracy.chance == pytest.approx(1 / 3)
  assert {row['guess'] for row in frozen.points} == {loss.chance}


def test_what_guessing_numbers_costs_is_what_the_measure_of_the_loss_states():
  config = types.SimpleNamespace(objective='regression', data=None)
  stated = [dict(figure='pearson', chance=0.0), dict(figure='loss', chance=2.5)]
  assert measures.loss_of_guessing(stated, config, 7) == 2.5
  with pytest.raises(RequestError, match="'regression' has no loss of guess"):
    measures.loss_of_guessing(stated[:1], config, 7)


REFUSED = {
    'one size': (dict(constants="SIZES = {'s': {}}"), 'SIZES has 1 of them'),
    'sizes that fall': (dict(
        constants='SIZES = dict(reversed(SIZES.items()))'),
        'write them smallest first'),
    'no effect': (dict(drop='EFFECT = 0.5'), 'EFFECT is None: write it as 0.0'),
    'too few seeds for a test': (dict(constants="SEEDS['screen'] = 2"),
                                 'SEEDS has 2 for screen: .* from 3'),
    'too few seeds of tuning': (dict(constants="SEEDS['tune'] = 2"),
                                'SEEDS has 2 for tune: .* from 3'),
    'edges alone': (dict(constants="TUNING['fields'] = {'optim.lr': (1., 2.)}"),
                    'TUNING of optim.lr is .*, both of which are at an edge'),
    'a constant that nothing reads': (dict(constants='ALPAH = 0.1'),
                                      'has ALPAH, .* Did you mean ALPHA'),
    'alpha of 2': (dict(constants='ALPHA = 2.0'), 'ALPHA is 2.0'),
    'a margin below 0': (dict(constants='MARGIN = -1.0'), 'MARGIN is -1.0'),
    'other data': (dict(sweep="add('x', **{'data.length': 4})"),
                   'a variant sets data.length: every variant of a study has '
                   'the same data'),
    'a variant that tunes': (dict(sweep="add('x', **{'optim.lr': 1e-3})"),
                             'TUNING and a variant both set optim.lr'),
    'a seed of its own': (dict(constants="SIZES['m']['init_seed'] = 1"),
                          'the study itself and a size both set init_seed'),
    'a field of two': (dict(sweep="add('x', **{'model.d_model': 32})"),
                       'a size and a variant both set model.d_model'),
    'no budget': (dict(constants="TUNING = {'rungs': 9}"),
                  'TUNING buys less than one run: its first rung trains 0.0039'
                  ),
    'tuned steps': (dict(constants=(
        "TUNING['fields'] = {'train.steps': (2, 3, 4)}")),
                    'TUNING sets train.steps: .* as many steps'),
    'a value that cannot be': (dict(constants=(
        "TUNING['fields'] = {'optim.b2': (0.5, 0.9, 1.5)}")),
                               "variant 'base' at size 's' on 'text': .*b2"),
    'tuning of what a variant does not read': (dict(constants=(
        "TUNING['fields'] = {'model.relative.buckets': (16, 32, 64)}")),
                                               'relative.buckets'),
    'a measure of nothing': (dict(constants="MEASURES = ({'figure': 'los'},)"),
                             'it is not known which value'),
    'a measure that no variant can have': (dict(constants=(
        "MEASURES = ({'figure': 'loss'}, {'figure': 'routing/entropy', "
        "'better': 'higher', 'chance': 0})")),
        "routing/entropy' of text, which variant 'base' cannot have"),
    'one document held out': (dict(base='c.data.holdout_every = 8'),
                              'none for eval with eval.part=second'),
    'a search that keeps all': (dict(constants="TUNING['keep'] = 1.0"),
                                'TUNING is .*keep is a share between 0 and 1'),
    'a search of no rung': (dict(constants="TUNING['rungs'] = 0"),
                            'TUNING is .*rungs from 1 to 10'),
    'a search that extends by a part': (dict(constants=(
        "TUNING['extend'] = 0.5")), 'TUNING is .*extend from 0 to 10'),
    'values that fall': (dict(constants=(
        "TUNING['fields'] = {'optim.lr': (2., 1., 3.)}")),
                         'TUNING of optim.lr is .*above 0, rising'),
    'values from 0': (dict(constants=(
        "TUNING['fields'] = {'optim.lr': (0., 1., 3.)}")), 'above 0, rising'),
    'one value': (dict(constants="TUNING['fields'] = {'optim.lr': (1.,)}"),
                  'write two values or more'),
    'a size of two words': (dict(constants="SIZES['a b'] = {}"),
                            "SIZES has 'a b': "),
    'no text': (dict(constants="WORKLOADS = {'copy': {}}"),
                "WORKLOADS begins with 'copy': begin it with 'text'"),
    'parameters of another run': (dict(base="c.init_from = 'x'"),
                                  "init_from is 'x': a run of a study begins"),
    'nothing held out': (dict(base='c.data.holdout_every = 0'),
                         'holdout_every is 0: a study needs text that is held'),
    'two measures of a name': (dict(constants=(
        "MEASURES = ({'figure': 'loss', 'name': 'a'}, "
        "{'figure': 'accuracy', 'name': 'a'})")),
                               "two measures are called 'a'"),
    'a measure that is a word': (dict(constants="MEASURES = ('loss',)"),
                                 "the measure 'loss' has no figure"),
    'a chance of text': (dict(constants=(
        "MEASURES = ({'figure': 'loss', 'chance': 'x'},)")),
                         "has 'x' as chance: write a number"),
    'a figure that is a number': (dict(constants="MEASURES = ({'figure': 3},)"),
                                  'has 3 as figure: write a text'),
    'patience': (dict(base="c.eval.update(patience=3, best='loss')"),
                 'eval.patience is 3'),
    'no evaluation': (dict(base='c.eval.every_steps = 0'),
                      "'base' at size 's' on 'text': eval.every_steps is 0"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_a_study_is_refused(case, tmp_path):
  fields, message = REFUSED[case]
  with pytest.raises(RequestError, match=message):
    freeze.freeze_plan(studies.write(tmp_path, **fields))


OURS = ('seed', 'init_seed', 'eval.part')
DATA = ('data.source', 'data.batch_size', 'objective', 'span.mean_length',
        'probe.vocab', 'train.steps', 'train.grad_accumulation', 'eval.batches')


def _check_fields(base=None, variant=(), tuned=()):
  """Checks a study of one variant, whose fields are named."""
  sweep = types.SimpleNamespace(
      base=dict.fromkeys(OURS, 0) | (base or {}), points=[types.SimpleNamespace(
          name='a', changes=dict.fromkeys(variant, 1))])
  freeze._check_overlaps('file', sweep, dict(
      TUNING=types.SimpleNamespace(fields=tuned), SIZES={}, WORKLOADS={}))


@pytest.mark.parametrize('field', OURS)
def test_what_the_study_sets_is_its_own(field):
  """But variants may be the base with other first parameters."""
  with pytest.raises(RequestError, match=f'sets {field} to 3, which the study'):
    _check_fields(base={field: 3})
  with pytest.raises(RequestError, match=f'both set {field}'):
    _check_fields(tuned=[field])
  if field == 'init_seed':
    _check_fields(variant=[field])
    return
  with pytest.raises(RequestError, match=f'both set {field}'):
    _check_fields(variant=[field])


@pytest.mark.parametrize('field', DATA)
def test_all_variants_see_the_data_of_the_base(field):
  _check_fields(variant=['model.d_model'], tuned=['optim.lr'])
  for who, fields in (('a variant', dict(variant=[field])),
                      ('TUNING', dict(tuned=[field]))):
    with pytest.raises(RequestError, match=f'{who} sets {field}: every'):
      _check_fields(**fields)


@pytest.mark.parametrize('better, figures', [
    ('lower', 'loss perplexity bits_per_byte word_perplexity byte_perplexity'),
    ('higher', 'accuracy f1 macro_f1 micro_f1 mcc matthews precision recall '
     'pearson spearman exact exact_match em acc acc_norm bleu rows_right')])
def test_it_is_known_which_value_of_a_figure_is_better(better, figures):
  for figure in figures.split():
    entries = [{'figure': 'loss'}, {'figure': f'task/{figure}'}]
    _, measure = measures.complete_measures(entries, ['text'], 'file')
    assert measure['better'] == better, figure


def test_another_replication_has_fresh_seeds_and_the_same_has_its_own(
    folder, probed, monkeypatch):
  # Seeds follow from the file and the code; what its points cost is no matter.
  monkeypatch.setattr(freeze, '_check_points', lambda *args: probed.points)
  plan = lambda constants='': freeze.freeze_plan(
      studies.write(folder, constants)
      ).plan
  seeds = lambda plan: {
      seed for phase in phases.phases_of_study(
          plan.seeds) for seed in phase.seeds_of_phase(plan)}
  first, second = plan(), plan('REPLICATION = 2')
  assert first == plan() and first.replication == 1
  assert first.offset % plans.SEEDS_BETWEEN_STUDIES == 0 != first.offset
  assert len(seeds(first)) == 3 + 3 + 3 + 3
  assert not seeds(first) & seeds(second) and max(seeds(second)) < 2 ** 31
  assert seeds(plan('SEED_OFFSET = 70')) == {
      seed - first.offset + 70 for seed in seeds(first)}
  # Of 2,000 plans, as few share seeds as of such draws do.
  offsets = [studies.frozen(studies.plan(effect=1 / n)).seed_offset_of_hash
             for n in range(1, 2001)]
  assert 1860 < len(set(offsets)) < 1945  # 20,000 (1 - e^-0.1) = 1,903


@pytest.mark.parametrize('changes, offset, is_kept', [
    (dict(effect=0.2), None, True), (dict(effect=0.2), 70, False),
    (dict(replication=2), None, False), (dict(replication=2), 70, False)])
def test_an_amendment_keeps_the_seeds_unless_others_are_asked_for(
    changes, offset, is_kept):
  old = studies.frozen(studies.plan(replication=1))
  old = _with(old, offset=old.seed_offset_of_hash)
  new = _with(old, **changes)
  drawn = new.seed_offset_of_hash
  assert drawn != old.plan.offset
  new = _with(new, offset=drawn if offset is None else offset)
  going = plans._keep_seeds_of_older_plan(old, new)
  if is_kept:
    assert going == _with(new, offset=old.plan.offset)
  else:
    assert going == new


def test_its_ratios_divide_the_layers():
  sweep, _ = freeze.read_study_file('configs/studies/hybrids.py')
  attention = {}
  for point in sweep.points:
    model = sweep.config_of_point(point).model
    names = model.pattern.split(',') if model.pattern else [None]
    mixers = [model.kinds[name].mixer if name else model.mixer
              for name in names]
    assert model.num_layers % len(mixers) == 0
    attention[point.name] = (mixers.count('attention')
                             * model.num_layers // len(mixers))
  assert attention == {'attention': 8, '1-to-1': 4, '3-to-1': 2, '7-to-1': 1,
                       'recurrence': 0}


# Its phases.


@pytest.mark.parametrize('name, phase, sentence', [
    ('mine', phases.Phase(name='mine', block=3, seeds=3),
     "block=3, which is that of 'confirm', so that both would have the same"),
    ('mine', phases.Phase(name='mine', block=10, seeds=3), 'from 0 to 9'),
    ('mine', phases.Phase(name='other', block=6, seeds=3), 'no Phase of that'),
    ('mine', 'noise', 'no Phase of that name'),
    ('once-more', phases.Phase(name='once-more', block=6, seeds=3),
     'choose lower-case letters and _')])
def test_a_phase_that_cannot_be_told_from_others_is_refused(
    name, phase, sentence, monkeypatch):
  phases.check_phases('file')
  monkeypatch.setitem(phases.PHASES, name, phase)
  with pytest.raises(RequestError, match=sentence):
    phases.check_phases('file')


@pytest.fixture(scope='module')
def made():
  frozen = studies.frozen(studies.plan())
  trainer = studies.Trainer(frozen)
  seen = []
  for state in phases.run_phases(frozen, trainer):
    seen.append(list(state.finished))
  return frozen, trainer, state, seen


def test_a_whole_study_finds_what_is_there(made):
  frozen, trainer, state, seen = made
  assert seen == [[*frozen.plan.seeds][:i] for i in (1, 2, 3, 4)]
  assert [row.variant for row in state.records['screen']
          if row.verdict == decide.PASSED] == ['good']
  verdicts = {(row.variant, row.measure): row.verdict
              for row in state.records['confirm']}
  assert verdicts['good', 'loss'] == 'better'
  assert {variant for variant, _ in verdicts} == {'good'}
  assert len(state.outcomes) == sum(map(len, trainer.asked.values()))


def test_each_phase_asks_for_its_runs(made):
  frozen, trainer, _, _ = made
  plan = frozen.plan
  noise = trainer.asked['noise']
  assert len(noise) == 3 * 2 * 2 * 6  # sizes, workloads, base and again, seeds
  again = [run for run in noise if run.variant == plans.SECOND_BASE]
  assert len(again) == len(noise) / 2
  assert all(run.changes['init_seed'] for run in again)
  assert {(run.size, run.workload) for run in trainer.asked['screen']} == {
      ('s', 'text')}
  confirm = trainer.asked['confirm']
  assert {run.variant for run in confirm} == {'base', 'good'}
  assert {run.size for run in confirm} == {'s', 'm', 'l'}
  for folder, runs in trainer.asked.items():
    phase = folder.partition('-')[0]
    assert {run.seed for run in runs} == set(
        phases.PHASES[phase].seeds_of_phase(plan))
    # What confirms has a half of what is held out that nothing else has seen.
    assert {run.changes['eval.part'] for run in runs} == {
        'second' if phase == 'confirm' else 'first'}
    assert len({(run.point, run.seed) for run in runs}) == len(runs)
  # Other blocks of seeds would be other runs of studies that are over.
  assert [phase.block for phase in phases.PHASES.values()] == [
      0, 1, 2, 4, 3, 5]
  # A short rung has a whole schedule of its own.
  for run in trainer.asked['tune-1']:
    assert run.changes['train.steps'] == run.changes['eval.every_steps'] == 50
    assert run.changes['optim.warmup_steps'] == 5
    assert run.changes['data.batch_ramp'] == '20:8'
  assert all('train.steps' not in run.changes
             for run in trainer.asked['tune-2'])


def test_every_variant_is_tuned_alike_and_takes_its_own_best(made):
  _, trainer, state, _ = made
  spent = {}
  for run in trainer.asked['tune-1'] + trainer.asked['tune-2']:
    spent[run.variant] = spent.get(run.variant, 0) + run.share
  assert len(set(spent.values())) == 1 and len(spent) == 4
  best = {row.variant: row.changes['optim.lr']
          for row in state.records['tuned']}
  assert best == studies.BEST_LR
  for run in trainer.asked['confirm'] + trainer.asked['screen']:
    assert run.changes['optim.lr'] == studies.BEST_LR[run.variant]
  # The optimum of `good` was at the edge: one value further out was tried.
  assert {run.variant for run in trainer.asked['tune-3']} == {'good'}
  assert {run.changes['optim.lr'] for run in trainer.asked['tune-3']} == {8e-3}
  assert not any(row.at_edge for row in state.records['tuned'])


def test_a_study_that_is_too_weak_stops_before_it_spends():
  frozen = studies.frozen(studies.plan(effect=1e-4, variants=('same',)))
  trainer = studies.Trainer(frozen)
  kept = []
  with pytest.raises(RequestError, match='less than the 80% .*pairing, which '
                     'is in it already: .*--anyway'):
    kept.extend(phases.run_phases(frozen, trainer))
  assert list(trainer.asked) == ['noise']
  assert kept[-1].records['noise'] and kept[-1].weakness
  *_, state = phases.run_phases(frozen, trainer, anyway=True)
  assert state.finished == list(frozen.plan.seeds)
  # None passed.
  assert 'confirm' not in trainer.asked and not state.records['confirm']


MORE = {'noise': 6, 'tune': 3, 'screen': 6, 'rescreen': 6, 'confirm': 6,
        'largest': 4}


def test_a_second_look_and_a_prediction_before_the_largest_size():
  """`late` is hidden at the smallest size, and looks better at the next."""
  frozen = studies.frozen(studies.plan(
      variants=('good', 'late', 'bad'), seeds=MORE, largest='xl',
      settings={'KEEP': 1}))
  trainer = studies.Trainer(frozen, effects={
      'good': 0.3, 'bad': -0.3, 'late': {'s': 0.02}}, noise=0.05)
  *_, state = phases.run_phases(frozen, trainer, anyway=True)
  assert [*trainer.asked][-4:] == ['screen', 'rescreen', 'confirm', 'largest']
  asked = lambda name: ({run.variant for run in trainer.asked[name]},
                        {run.size for run in trainer.asked[name]})
  assert asked('rescreen') == ({'base', 'late'}, {'m'})
  assert [row.variant for row in state.records['rescreen']] == ['late']
  assert asked('confirm')[1] == asked('noise')[1] == {'s', 'm', 'l'}
  names = {row.variant for row in state.records['confirm']}
  assert names == {'good', 'bad', 'late'}
  assert asked('largest') == ({'base', *names}, {'xl'})
  # It has the values that were tuned at the largest of the other sizes.
  best = {row.variant: row.changes for row in state.records['tuned']
          if (row.size, row.workload) == ('l', 'text')}
  for run in trainer.asked['largest']:
    if run.workload == 'text':
      assert best[run.variant].items() <= run.changes.items()
  # It was predicted when the largest size had not been asked for.
  (name, rows, before), = trainer.foretold
  assert name == 'largest' and 'largest' not in before
  assert {row['variant'] for row in rows} == {'base', *names}
  assert state.records['predicted']['rows'] == rows


def test_a_prediction_is_frozen_once_and_says_whether_it_was_blind(
    frozen, tmp_path):
  plan = plans.adopt_plan(tmp_path, frozen)
  rows = [{'variant': 'base', 'value': 2.0, 'low': 1.9, 'high': 2.1}]
  first = plans.record_prediction(tmp_path, plan, 'confirm', rows)
  assert first['blind'] and first['plan'] == plan.hash
  assert first['hash'] == layout.json_checksum(rows)
  other = [rows[0] | {'value': 3.0}]
  # Another runner, and whoever has seen the outcome, gets the first one.
  assert plans.record_prediction(tmp_path, plans.load_frozen_plan(tmp_path),
                                 'confirm', other) == (
      first)
  assert plans.load_frozen_plan(tmp_path).predictions == [first]
  assert plans.adopt_plan(tmp_path, frozen).predictions == [first]
  path = tmp_path / 'study.json'
  path.write_text(path.read_text().replace('1.9', '0.9'))
  with pytest.raises(RequestError, match='is not as it was written'):
    plans.load_frozen_plan(tmp_path)
  path.unlink()  # it is put back from the ledger
  assert plans.adopt_plan(tmp_path, frozen).predictions == [first]
  # By a changed plan there is another, which is late once runs have begun.
  with layout.StudyLedger(tmp_path) as ledger:
    ledger.add_begun_runs(plan.hash, [('confirm', 'text.s.base', 30_000)])
  plan = plans.adopt_plan(tmp_path, _with(frozen, effect=0.2), 'a reason')
  late = plans.record_prediction(tmp_path, plan, 'confirm', other)
  assert not late['blind'] and late['rows'] == other
  assert plans.load_frozen_plan(tmp_path).predictions == [first, late]
  assert plans.record_prediction(tmp_path, plan, 'confirm', rows) == late


def test_the_size_that_is_predicted_is_no_other_phases(folder):
  text = ("SIZES['xl'] = {'model.d_model': 24}\nSEEDS.update(largest=3, "
          "rescreen=3)\nKEEP = 2\nFLOOR = 0.5")
  frozen = freeze.freeze_plan(studies.write(folder, text))
  plan = frozen.plan
  assert (plan.sizes, plan.largest, plan.floor) == (('s', 'm', 'l'), 'xl', 0.5)
  assert plan.tuned_sizes == plan.sizes and plan.settings == {'KEEP': 2}
  assert {run.size for run in phases.PHASES['largest'].largest_set_of_runs(
      frozen)} == {'xl'}
  # Nothing is said of the second look where no variant had one.
  done = {'screen': {'finished': True, 'done': 6},
          'rescreen': {'finished': True, 'done': 0}}
  assert 'looked at again' in ' '.join(report.describe_methods(frozen))
  assert 'looked at again' not in ' '.join(report.describe_methods(
      frozen, results.NOTHING | {'phases': done}))
  assert not {'xl'} & {run.size for name in ('noise', 'tune', 'confirm')
                       for run in phases.PHASES[name].largest_set_of_runs(
                           frozen)}
  # Embeddings cost no product on their way in; the head is one of d x vocab.
  for row in frozen.points:
    head = 6 * row['changes']['model.d_model'] * row['vocab']
    assert row['flops_per_token'] * (1 - row['body']) == pytest.approx(head)
  for more, message in (('', 'has 3 of them: this study has at least 4'),
                        ("SIZES['xl'] = {'model.d_model': 24, "
                         "'optim.decay_steps': 9}", 'optim.decay_steps at 0'),
                        ("SIZES['xl'] = {'model.d_model': 24, "
                         "'optim.schedule': 'constant'}", "must be 'wsd'")):
    with pytest.raises(RequestError, match=message):
      freeze.freeze_plan(studies.write(folder, f"{more}\nSEEDS['largest'] = 3"))


def _take(search, losses, steps=100, diverged=(), value=None):
  search.record_rung(steps, [[plans.Outcome(
      'tune', search.variant, search.size, search.workload, 0,
      {'loss': loss, 'copy': value}, i in diverged, 1.0, 1.0, 1, {}, loss)]
                             for i, loss in enumerate(losses)])
  return [c['optim.lr'] for c in search.candidates]


def _search(values=(1e-3, 2e-3), workload='text', **changes):
  plan = studies.plan(tuning=plans.Tuning({'optim.lr': values}, **changes))
  return phases.Search(plan, 'base', 's', workload)


def test_a_shortened_run_has_its_schedules_in_proportion():
  config = base_config.base()
  config.update_from_flattened_dict({
      'train.steps': 1000, 'optim.warmup_steps': 100, 'optim.decay_steps': 800,
      'data.batch_ramp': '400:8', 'checkpoint.every_steps': 500,
      'log.every_steps': 10})
  changes = {'train.steps': 2000, 'optim.lr': 0.5}
  phases.shorten_run(changes, config.to_dict(), share=0.125)
  assert changes == {
      'train.steps': 250, 'optim.lr': 0.5, 'optim.warmup_steps': 12,
      'optim.decay_steps': 100, 'data.batch_ramp': '50:8',
      'checkpoint.every_steps': 250, 'log.every_steps': 10}


def test_the_better_half_survives_a_rung():
  search = _search((1e-3, 2e-3, 4e-3, 8e-3), rungs=3)
  assert search.share == 0.25
  assert _take(search, (3.0, 2.0, 1.0, 4.0), 25) == [4e-3, 2e-3]
  assert search.share == 0.5
  assert _take(search, (2.0, 1.0), 50) == [2e-3]
  assert _take(search, (1.0,)) == []
  tuned = search.result()
  assert tuned.changes == {'optim.lr': 2e-3} and tuned.at_edge == ()
  assert tuned.runs == 7
  assert phases.num_survivors(plans.Tuning({}), 3) == 2  # the larger half


def test_an_edge_moves_as_often_as_the_plan_says_and_is_marked_then():
  search = _search(rungs=1, extend=2)
  assert _take(search, (1.0, 2.0)) == [5e-4]
  assert _take(search, (0.9,)) == [2.5e-4]
  assert _take(search, (0.8,)) == []
  assert search.result().changes == {'optim.lr': 2.5e-4}
  assert search.result().at_edge == ('optim.lr',)
  search = _search(rungs=1, extend=1)
  _take(search, (1.0, 2.0))
  _take(search, (1.5,))
  assert search.result().changes == {'optim.lr': 1e-3}
  assert search.result().at_edge == ()
  # What diverged is the worst, and ties go by the loss.
  search = _search(rungs=1, extend=0)
  _take(search, (1.0, 2.0), diverged=(0,))
  assert search.result().changes == {'optim.lr': 2e-3}
  search = _search(rungs=1, workload='copy')
  _take(search, (1.0, 0.5), value=0.25)
  assert search.best['changes'] == {'optim.lr': 2e-3}


def test_the_hash_is_of_all_that_is_planned_and_of_nothing_else():
  frozen = plans.FrozenPlan(studies.plan(), {'seed': 0}, [], {'text': 'a'}, {})
  for changed in (dict(plan=studies.plan(effect=0.02)),
                  dict(base_config={'seed': 1}),
                  dict(sources={'text': 'b'}), dict(code={'commit': 'c'})):
    assert dataclasses.replace(frozen, **changed).hash != frozen.hash
  # What a plan may hold since then, and this one does not, is no part of it.
  assert studies.frozen(studies.plan()).hash == '4b78e66cfc7424bb'
  noted = dataclasses.replace(frozen, notes=[{'time': 0.0, 'told': 'looked'}])
  assert noted.hash == frozen.hash


# Its folder.


@pytest.fixture(scope='module')
def frozen(tmp_path_factory):
  return freeze.freeze_plan(studies.write(tmp_path_factory.mktemp('study')))


def test_points_are_checked_once_for_the_same_file_and_code(
    frozen, tmp_path, monkeypatch):
  checked, code = [], {'commit': 'a', 'diff': ''}
  monkeypatch.setattr(freeze, '_check_points', lambda *args: (
      checked.append(args) or frozen.points))
  monkeypatch.setattr(freeze.provenance, 'describe_this_start', lambda: code)
  write = lambda *text: studies.write(tmp_path, *text)
  assert plans.load_last_plan(tmp_path / 'w') is None
  layout.check_workdir(tmp_path / 'w', 'study.json')
  first = plans.adopt_plan(tmp_path / 'w', freeze.freeze_plan(write()))
  kept = plans.load_last_plan(tmp_path / 'w')
  assert freeze.freeze_plan(write(), kept).hash == first.hash
  assert len(checked) == 1
  freeze.freeze_plan(write('ALPHA = 0.01'), kept)
  code['diff'] = 'b'
  freeze.freeze_plan(write(), kept)
  code['commit'] = None  # what code this is cannot be told
  freeze.freeze_plan(write(), freeze.freeze_plan(write()))
  assert len(checked) == 5


def loss_of_rate(config):
  """Returns what a run loses by its learning rate, which is best at 4e-3."""
  return 0.1 * math.log2(config.optim.lr / 4e-3) ** 2


def loss_of(config):
  """Returns a loss with noise, which is larger without positions."""
  return (2.0 + (config.model.position == 'none') + loss_of_rate(config)
          + 0.01 * studies.spread(config.seed, config.model.position,
                                  str(config.init_seed)))


def start(workdir, frozen, loss=loss_of, stop_after=None, amend='', **args):
  """Freezes and runs as `run` does; returns the trainer."""
  plan = plans.adopt_plan(workdir, dataclasses.replace(
      frozen, notes=[], amendments=[]), amend)
  trainer = studies.Written(workdir, plan, loss=loss, stop_after=stop_after)
  code = study.run_and_report_phases(
      workdir, plan, trainer, studies.arguments(**args))
  assert code == 0
  return trainer


def read(workdir):
  return json.loads((workdir / 'results.json').read_text())


@pytest.fixture(scope='module')
def whole(frozen, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  return start(workdir, frozen), read(workdir), workdir


def test_what_a_study_found_is_in_its_results(whole, frozen, capsys):
  trainer, results, workdir = whole
  assert results['study'] == {'name': 'made', 'hash': frozen.hash}
  verdict, = results['confirm']
  assert (verdict['variant'], verdict['verdict']) == ('none', 'worse')
  assert len(results['outcomes']) == len(trainer.did) == len(set(trainer.did))
  for phase, row in results['phases'].items():
    runs = [x for x in results['outcomes'] if x['phase'] == phase]
    assert row['finished'] and row['done'] == row['planned'] == len(runs)
    assert row['flops'] == pytest.approx(sum(x['flops'] for x in runs))
    assert row['seconds'] == pytest.approx(sum(x['seconds'] for x in runs))
    # A batch is 4 rows of 8 tokens; a step takes half a second.
    assert row['tokens'] == pytest.approx(row['seconds'] * 2 * 4 * 8)
  assert results['phases']['tune']['tokens'] == (
      2 * 3 * 3 * (3 * 2 + 2 * 4) * 4 * 8)
  assert all(row['changes'] == {'optim.lr': 4e-3} for row in results['tuned'])
  curves = [x['curve'] for x in results['outcomes'] if x['curve']]
  assert len(curves) == sum(results['phases'][name]['done']
                            for name in plans.PHASES_WITH_CURVES)
  assert curves[0]['step'] == [2, 4] and curves[0]['seconds'] == [1.0, 2.0]
  assert results['as_planned'] == {
      'differences': [], 'repeated': {}, 'unknown': 0,
      'without_hash': 0}
  assert results['provenance']['versions']['jax']
  capsys.readouterr()
  with progress.print_milestones_only(True):
    again = start(workdir, frozen, until='report')
  assert again.did == []  # what is done is not done again
  assert read(workdir) == results
  page = workdir / 'report' / 'index.html'
  *phases_, milestone, last = capsys.readouterr().out.splitlines()
  assert phases_ == [f'{phase}: {row["done"]} runs, 0 diverged'
                     for phase, row in results['phases'].items()]
  assert milestone.startswith(f'none: worse, loss {verdict["effect"]:+.4f} [')
  assert last == f'report: {page}' and page.is_file()


@pytest.mark.long
@pytest.mark.parametrize('loss', [None, 9.0], ids=(
    'too many bad steps', 'well above guessing'))
def test_runs_that_diverge_are_results(frozen, tmp_path, loss):
  lost = phases.PHASES['noise'].seeds_of_phase(frozen.plan)[0]
  start(tmp_path, frozen, until='noise', anyway=True, loss=lambda config: (
      loss if config.seed == lost and not config.init_seed
      else loss_of(config)))
  results = read(tmp_path)
  bad = [x for x in results['outcomes'] if x['diverged']]
  assert len(bad) == results['phases']['noise']['failed'] == 3
  assert {(x['variant'], x['seed']) for x in bad} == {('base', lost)}
  assert all(x['values'] == {'loss': frozen.plan.primary.chance} for x in bad)


def test_runs_that_fail_otherwise_end_the_study_and_are_retried(
    frozen, tmp_path):
  lost = phases.PHASES['noise'].seeds_of_phase(frozen.plan)[1]
  loss = lambda config: 'no space' if config.seed == lost else loss_of(config)
  for _ in range(2):
    with pytest.raises(EnvironmentFailure,
                       match='6 runs failed that did not diverge: .*no space'):
      start(tmp_path, frozen, loss=loss)
  with layout.Ledger(tmp_path / 'noise') as book:
    book.retry_failed_runs()
  trainer = start(tmp_path, frozen, until='noise', anyway=True)
  assert {seed for *_, seed in trainer.did} == {lost} and len(trainer.did) == 6


def test_a_study_that_is_stopped_goes_on(frozen, tmp_path):
  with pytest.raises(Stopped):
    start(tmp_path, frozen, until='noise', stop_after=5)
  trainer = start(tmp_path, frozen, until='noise', anyway=True)
  assert len(trainer.did) == len(noise_runs(frozen)) - 5


def test_a_run_that_is_gone_is_trained_anew(whole, frozen, tmp_path):
  shutil.copytree(whole[2], tmp_path / 'w')
  gone = next((tmp_path / 'w').glob('screen/points/*/seed-*'))
  shutil.rmtree(gone)
  assert start(tmp_path / 'w', frozen).did == [
      ('screen', gone.parent.name, int(gone.name[5:]))]
  again = read(tmp_path / 'w')
  assert again.pop('as_planned') == {
      'repeated': {'screen': 1}, 'unknown': 0,
      'without_hash': 0, 'differences': [
          'Runs of screen were deleted and trained again: 1.']}
  assert again | {'checksum': 0} == {name: x for name, x in whole[1].items()
                                     if name != 'as_planned'} | {'checksum': 0}
  # Nor does it help to delete a whole phase, and look again.
  assert 'on 3 fresh seeds' in _methods(whole[2])
  shutil.rmtree(tmp_path / 'w' / 'confirm')
  start(tmp_path / 'w', frozen, loss=lambda config: 1.01 * loss_of(config))
  assert read(tmp_path / 'w')['as_planned']['repeated'] == {
      'screen': 1, 'confirm': 18}
  methods = _methods(tmp_path / 'w')
  assert 'Runs of confirm were deleted and trained again: 18.' in methods
  assert 'on 3 seeds:' in methods and 'fresh' not in methods


def _methods(workdir):
  c = comparison.load_comparison(workdir)
  return ' '.join(report.describe_methods(c.frozen, c.results))


def test_a_plan_cannot_be_swapped(frozen, tmp_path):
  """Neither by deleting study.json, nor by putting another one there, nor by
  deleting the ledger of the study too: the runs know their plan."""
  start(tmp_path, frozen, until='noise', anyway=True)
  methods = _methods(tmp_path)
  assert 'before any run' in methods
  # Nothing is told of phases that nothing entered.
  assert 'planned phases tune, screen, confirm had no runs' in methods
  for words in ('tuning', 'Holm', 'screened', 'unstable', 'We compared'):
    assert words not in methods
  path, other = tmp_path / 'study.json', _with(frozen, effect=0.2)
  path.unlink()
  with pytest.raises(RequestError, match='planned otherwise: plan.effect'):
    start(tmp_path, other)
  start(tmp_path, frozen, until='noise')  # which puts it back
  plans.save_frozen_plan(tmp_path / 'other', other)
  shutil.copy(tmp_path / 'other' / 'study.json', path)
  with pytest.raises(RequestError, match='not the plan that the ledger'):
    comparison.load_comparison(tmp_path)
  for name in ('study.sqlite', 'study.json'):
    (tmp_path / name).unlink()
  known = f'noise by the plan {frozen.hash}; results.json|noise, results.json '
  with pytest.raises(RequestError, match=known):
    start(tmp_path, other)
  # It is adopted as an amendment, which is told.
  start(tmp_path, other, until='noise', amend='a smaller effect', anyway=True)
  first, second = read(tmp_path)['as_planned']['differences']
  assert first == (
      f'The plan was changed (from the plan {frozen.hash}, which is not kept) '
      'when noise had been looked at. Reason: a smaller effect')
  assert second.endswith('or it was lost: 18.')
  assert ('The ledger has no hash of 18 runs from when they ended: a later '
          'change of their figures would not show.'
          ) in comparison.load_comparison(tmp_path).warnings
  methods = _methods(tmp_path)
  assert 'before any run' not in methods and first in methods
  assert 'changed once since' in methods


def test_runs_and_results_of_another_plan_are_no_part_of_it(
    whole, frozen, tmp_path):
  other = _with(frozen, alpha=0.01)
  for name in ('noise', 'results.json'):
    workdir = tmp_path / name
    plans.adopt_plan(workdir, other)
    copy = shutil.copy if '.' in name else shutil.copytree
    copy(whole[2] / name, workdir / name)
    with pytest.raises(RequestError, match=f'{name} by the plan {frozen.hash}'):
      start(workdir, other)
  with pytest.raises(RequestError, match='noise holds runs of another plan'):
    studies.Written(tmp_path / 'noise', other, loss=loss_of).train(
        'noise', noise_runs(other))


def test_methods_say_what_had_been_looked_at(whole, frozen, tmp_path):
  shutil.copytree(whole[2], tmp_path / 'w')
  more = _with(frozen, seeds=frozen.plan.seeds | {'confirm': 5})
  more = _with(more, offset=more.seed_offset_of_hash)  # as its file is read
  assert more.plan.offset != frozen.plan.offset
  made = start(tmp_path / 'w', more, amend='it was not enough')
  assert len(made.did) == 2 * 2 * 3  # an amendment keeps the seeds that it has
  methods = _methods(tmp_path / 'w')
  for words in ('on 5 seeds, of which 3 had been looked at when',
                'plan.seeds.confirm', 'Reason: it was not enough'):
    assert words in methods
  assert 'fresh' not in methods and 'before any run' not in methods


# What may be believed of its results.


def _copy(whole, folder):
  return pathlib.Path(shutil.copytree(whole[2], folder / 'w'))


def _publish(folder, *workdirs):
  """Returns the page of verdicts."""
  page = folder / 'p.md'
  publish.main(argparse.Namespace(workdirs=workdirs, page=page,
                                  bundles=folder / 'bundles'))
  return page.read_text()


def _triple_effect(path):
  """Triples an effect of results.json, with a fresh checksum."""
  tree = layout.load_with_checksum(path)
  tree['confirm'][0]['effect'] *= 3
  layout.save_with_checksum(path, tree)


def test_verdicts_are_published_from_bundles_alone(
    whole, frozen, tmp_path, monkeypatch):
  first = _publish(tmp_path, whole[2])
  verdict, = whole[1]['confirm']
  row, = [line for line in first.splitlines() if line.startswith('| none (')]
  assert f'{verdict["effect"]:+.4f} [{verdict["low"]:+.4f}' in row
  assert '| worse |' in row and f'plan {frozen.hash}' in first
  for words in ('rate of 0.05 in the screening (Q)',
                'with 3 seeds, and no best value was the outermost',
                f'confirmation was {decide.STUDENT}{decide.AND_OVER_CHOICES}.',
                *whole[1]['statistics']['codes']):
    assert words in first
  # Without the workdir the page is the same, and so are the bytes of a bundle.
  path, = (tmp_path / 'bundles').iterdir()
  assert _publish(tmp_path) == first
  c = comparison.load_comparison(whole[2])
  assert publish.bundle_study(whole[2], c.results) == path.read_bytes()
  with tarfile.open(path) as tar:
    tar.extractall(tmp_path / 'unpacked', filter='data')
  back = comparison.load_comparison(tmp_path / 'unpacked')
  assert (back.estimates, back.warnings) == (c.estimates, c.warnings)
  # A bundle of whose runs this code gives other verdicts, or that is none.
  differences = decide.pairing.mean_differences
  monkeypatch.setattr(decide.pairing, 'mean_differences', lambda by_seed: [
      1.5 * x for x in differences(by_seed)])
  effect = verdict['effect']
  with pytest.raises(RequestError, match=f'confirm, none, loss: effect '
                     f'{effect:.4g} and not {1.5 * effect:.4g}'):
    _publish(tmp_path)
  monkeypatch.undo()
  path.write_bytes(path.read_bytes()[:500])
  with pytest.raises(RequestError, match='is no bundle'):
    _publish(tmp_path)
  path.unlink()
  assert _publish(tmp_path).endswith('\nNo study has been published yet.\n')


def test_no_effect_that_was_saved_is_believed(whole, tmp_path):
  workdir = _copy(whole, tmp_path)
  _triple_effect(workdir / results.FILE)
  c = comparison.load_comparison(workdir)
  assert c.effect('confirm', 'none', 'loss') == whole[1]['confirm'][0]
  true_effect = whole[1]['confirm'][0]['effect']
  words = (f'confirm, none, loss: effect {3 * true_effect:.4g} and not '
           f'{true_effect:.4g}')
  assert any(words in line for line in c.warnings)
  assert f'| worse | {true_effect:+.4f} [' in _publish(tmp_path, workdir)
  # Nor is one in a bundle, whose ledger and metrics are as they were.
  path, = (tmp_path / 'bundles').iterdir()
  shutil.unpack_archive(path, tmp_path / 'unpacked')
  _triple_effect(tmp_path / 'unpacked' / results.FILE)
  packed = shutil.make_archive(str(path).removesuffix('.tar.gz'), 'gztar',
                               tmp_path / 'unpacked')
  assert packed == str(path)
  with pytest.raises(RequestError, match=f'{words}.* publish {path} again'):
    _publish(tmp_path)
  # Published anew from its runs, it has what follows from them.
  assert f'| worse | {true_effect:+.4f} [' in _publish(tmp_path, path)


def _lower_losses(workdir, pattern, by):
  """Lowers the held-out losses of runs; returns their folders."""
  paths = sorted(workdir.glob(pattern))
  for path in paths:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
      if row['split'] == 'eval':
        row['loss'] -= by
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return [path.parent for path in paths]


def test_runs_whose_figures_changed_since_they_ended_are_refused(
    whole, tmp_path):
  workdir = _copy(whole, tmp_path)
  _lower_losses(workdir, 'confirm/points/*.none/*/metrics.jsonl', 0.2)
  words = ('the figures of 9 runs have changed .*confirm/text.s.none, seed '
           r'\d+; .*; and 6 more')
  for use in (comparison.load_comparison, lambda w: _publish(tmp_path, w)):
    with pytest.raises(RequestError, match=words):
      use(workdir)
  assert not (tmp_path / 'bundles').exists()
  # One that is taken up again is under way.
  for state in (layout.RUNNING, layout.PENDING):
    with layout.Ledger(workdir / 'confirm') as ledger:
      for run in ledger.runs():
        ledger.set_state_of_unclaimed(run, state=state)
    assert 'it has not ended' in ' '.join(
        comparison.load_comparison(workdir).warnings)


def test_a_variant_that_was_stopped_does_not_pass_by_other_figures(
    frozen, tmp_path):
  """Nor where the hashes of its runs are forged: then it was not confirmed."""
  workdir = tmp_path / 'w'
  # Over three seeds the differences of the variant have a mean of 0.
  start(workdir, frozen, loss=lambda config: (
      2.0 + loss_of_rate(config)
      + 0.01 * studies.spread(config.seed, str(config.init_seed))
      + 0.01 * (config.model.position == 'none') * (config.seed % 3 - 1)))
  verdict, = read(workdir)['screen']
  assert verdict['verdict'] == decide.STOPPED
  assert '| stopped at the screen |' in _publish(tmp_path, workdir)
  runs = _lower_losses(workdir, 'screen/points/*.none/*/metrics.jsonl', 0.5)
  with pytest.raises(RequestError, match='the figures of 3 runs have changed'):
    comparison.load_comparison(workdir)
  with layout.StudyLedger(workdir) as ledger:
    for run in runs:
      ledger.add_ended_run(
          folder='screen', point=run.parent.name, seed=int(run.name[5:]),
          hash=layout.hash_figures(run))
  c = comparison.load_comparison(workdir)
  assert 'confirm is to be done (confirm was not begun)' in c.warnings[1]
  assert f'{decide.STOPPED} and not {decide.PASSED}' in c.warnings[0]
  with pytest.raises(RequestError, match='over .confirm was not begun.: there'):
    _publish(tmp_path, workdir)


def _with(frozen, **plan):
  return dataclasses.replace(frozen, plan=dataclasses.replace(
      frozen.plan, **plan))


def test_seeds_may_be_added_and_other_models_and_data_may_not(
    frozen, tmp_path):
  start(tmp_path, frozen, until='noise', anyway=True)
  more = _with(frozen, seeds=frozen.plan.seeds | {'noise': 4})
  trainer = start(tmp_path, more, until='noise', amend='too few', anyway=True)
  assert len(trainer.did) == 6  # a pair more at each size
  source, = (name for name in frozen.sources if name.startswith('text:'))
  for changes, words in (
      (dict(points=[row | {'changes': row['changes'] | {
          'model.norm': 'rmsnorm'}} for row in frozen.points]), 'model.norm'),
      (dict(sources={source: 'other'}), 'sources')):
    with pytest.raises(RequestError, match=f'holds another sweep, .*{words}'):
      start(tmp_path, dataclasses.replace(more, **changes), until='noise',
            amend='why not')


def test_a_plan_that_was_written_over_is_refused(frozen, tmp_path):
  plans.adopt_plan(tmp_path, frozen)
  path = tmp_path / 'study.json'
  path.write_text(path.read_text().replace('"effect": 0.5', '"effect": 5.0'))
  with pytest.raises(RequestError, match='is not as it was written'):
    plans.load_frozen_plan(tmp_path)


def test_a_damaged_ledger_of_a_study_has_its_own_sentence(
    frozen, tmp_path, capsys):
  before = plans.adopt_plan(tmp_path, frozen)
  (tmp_path / 'study.sqlite').write_text('no ledger')
  assert plans.adopt_plan(tmp_path, frozen).hash == before.hash
  stderr = capsys.readouterr().err
  assert 'the plan is that of study.json' in stderr and 'failed' not in stderr


def test_hours_and_states_are_known_of_what_has_run(
    whole, frozen, tmp_path, capsys):
  _, found, workdir = whole
  assert results.times_of(tmp_path, frozen) is None
  times = results.times_of(workdir, frozen)
  assert times == {(size, 'text'): 0.5 for size in 'sml'}
  noise = results.costs(frozen, 8, times)[0]
  assert noise.seconds == pytest.approx(found['phases']['noise']['seconds'])
  table = results.table([noise._replace(seconds=7200.0)], 2)
  assert table.splitlines()[1].split() == [
      'noise', '18', '3', '2,304', f'{noise.flops:.3g}', '1.00']
  capsys.readouterr()
  assert status.main(types.SimpleNamespace(
      where='', workdir=str(workdir), json=True)) == 0
  told = json.loads(capsys.readouterr().out)
  assert {row['phase']: row['states'] for row in told['phases']} == {
      phase: {'done': row['done']} for phase, row in found['phases'].items()}
  assert (told['seconds_left'], told['verdicts']) == (0, {'none': 'worse'})
  plans.adopt_plan(tmp_path, frozen)
  assert status.main(types.SimpleNamespace(
      where=str(tmp_path), workdir='', json=False)) == 0
  out = capsys.readouterr().out
  assert 'screen  not begun, 6 planned\n' in out
  assert 'confirm not begun, 18 planned if every variant passes' in out
  # Phases that are over tell what they had, which may be more than was planned,
  # since tuning goes on where an optimum is at an edge, or nothing.
  saved = read(workdir)
  saved['phases']['screen']['finished'] = True
  phases_ = [(types.SimpleNamespace(phase='screen', runs=6, note=''), [])]
  status._print_plan_and_phases(frozen, phases_, saved)
  assert 'screen no runs: no variant was left for it' in capsys.readouterr().out
  assert 'time left: not known yet' in out
  # After an amendment, and one of its phases.
  begun = tmp_path / 'begun'
  start(begun, frozen, until='noise', anyway=True)
  plans.adopt_plan(begun, _with(frozen, alpha=0.01), 'it was too much')
  assert status.main(types.SimpleNamespace(
      where=str(begun), workdir='', json=False)) == 0
  out = capsys.readouterr().out
  assert 'plan.alpha. Reason: it was too much' in out
  seconds = sum(cost.seconds for cost in results.costs(frozen, 8, times)[1:])
  assert f'at most {progress.format_seconds(seconds)} for the steps' in out


def test_a_plan_has_hours_before_anything_has_run(
    folder, frozen, monkeypatch, capsys):
  """By a few steps of each size; of what would take long, by its FLOPs."""
  monkeypatch.setattr(study, 'Trainer', studies.Written)
  args = types.SimpleNamespace(file=studies.write(folder), workdir='',
                               parallel=2, group=8)
  # A short study is timed at its smallest size alone.
  short = study.time_training_steps(frozen, 1, 8)
  monkeypatch.setattr(study, 'SHORT_SECONDS', 0.0)
  assert study.check(args) == 0
  out = capsys.readouterr().out
  assert 'by the time of 8 steps of the base on this machine' in out
  seconds = sum(cost.seconds for cost in results.costs(
      frozen, 8, {(size, 'text'): 0.5 for size in 'sml'}))
  assert f'{seconds / 2 / 3600:.2f}' in out.splitlines()[-3]
  monkeypatch.setattr(study, 'MOST_SECONDS', 0.0)
  times = study.time_training_steps(frozen, 1, 8)
  flops = [frozen.point('base', size, 'text')['flops_per_token']
           for size in 'sml']
  assert list(times.values()) == pytest.approx([
      0.5 * x / flops[0] for x in flops])
  assert times == short
  monkeypatch.setattr(study.Trainer, 'train_pending_runs',
                      lambda self, path, ledger: None)
  assert study.check(args) == 0
  out, err = capsys.readouterr()
  # The costs in all but hours do not wait for these.
  assert f'{results.table(results.costs(frozen, 8, None), 2)}\n' in out
  assert 'unknown' in out and 'the hours are not known: a run of text.s' in err


def test_a_run_of_another_config_is_refused(frozen, tmp_path):
  trainer = studies.Written(tmp_path, frozen, loss=loss_of)
  runs = noise_runs(frozen)[:1]
  trainer.train('noise', runs)
  file = layout.run_folder(tmp_path / 'noise', runs[0].point, runs[0].seed)
  file /= 'config.json'
  file.write_text(file.read_text().replace('"b2": 0.95', '"b2": 0.9'))
  with pytest.raises(RequestError, match='of another config than the plan .*'
                     'optim.b2'):
    trainer.train('noise', runs)


def test_results_do_not_lose_what_is_known_by_now(tmp_path):
  def go(frozen, **args):
    study.run_and_report_phases(tmp_path, frozen, studies.Trainer(frozen),
             studies.arguments(**args))
    return (tmp_path / results.FILE).read_bytes()

  frozen = studies.frozen(studies.plan())
  whole = go(frozen)
  assert json.loads(whole)['phases']['confirm']['finished']
  assert go(frozen, until='noise') == whole
  # Of another plan they are others.
  phases_ = json.loads(go(dataclasses.replace(frozen, sources={'file': 'b'}),
                          until='noise'))['phases']
  assert [name for name, row in phases_.items() if row['finished']] == ['noise']


def _start(file, workdir):
  return subprocess.Popen(
      [sys.executable, '-m', 'tools.study', 'run', file, '--workdir',
       str(workdir), '--group=16', '--anyway'], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env=os.environ | {'XLA_FLAGS': ''})


@pytest.mark.slow
@pytest.mark.long
def test_an_a_a_study_goes_through_all_phases(tmp_path):
  """The variant is the base with other first parameters. MARGIN lets it pass,
  as no Q below 1 always does: over draws of the rates p may be 1."""
  file = studies.write(
      tmp_path, "TUNING['rungs'] = 1\nMARGIN = 9.0\nQUESTION = 'Is it better?'",
      base="c.model.update(parametrization='mup', mup_base_width=8)\n"
      '  c.data.holdout_every = 2',  # two documents in each half
      sweep="add('twin', init_seed=2)")
  workdir = tmp_path / 'study'
  first = _start(file, workdir)
  until = time.monotonic() + SECONDS
  while not list(workdir.glob('noise/points/*/*/metrics.jsonl')):
    assert first.poll() is None, first.communicate()[0]
    assert time.monotonic() < until
    time.sleep(0.1)
  first.send_signal(signal.SIGKILL)
  first.communicate()

  both = [_start(file, workdir) for _ in range(2)]
  outputs = [process.communicate(timeout=SECONDS)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs

  results = json.loads((workdir / 'results.json').read_text())
  phases_ = results['phases']
  assert all(row['finished'] for row in phases_.values()), (phases_, outputs)
  # The best of the three rates is the largest at each size: so the values that
  # muP carries do not hold at m, where their upper neighbour is better, and
  # each variant is tuned at l too, with three rates more than was planned.
  tuning = phases_.pop('tune')
  assert tuning['planned'] == 2 * 3 * (3 + 3)
  assert tuning['done'] == 2 * 3 * (3 + 3 + 3)
  assert [row['kept'] for row in results['tuned']] == [
      None, None, False, False, None, None]
  assert {name: row['done'] for name, row in phases_.items()} == {
      'noise': 3 * 2 * 3, 'screen': 2 * 3, 'confirm': 2 * 3 * 3}
  assert all(row['planned'] == row['done'] for row in phases_.values())
  frozen = plans.load_frozen_plan(workdir)
  assert not any(x['diverged'] for x in results['outcomes'])
  verdict, = results['confirm']
  assert verdict['variant'] == 'twin'
  assert verdict['verdict'] != decide.UNSTABLE and verdict['n'] == 3
  # Each run has the plan in its record, and each confirmed one its documents.
  records = [run_config.load_starts(path.parent)[-1]['plan']
             for path in workdir.glob('*/points/*/*/config.json')]
  assert set(records) == {f'{frozen.hash} {plans.format_date(frozen.time)}'}
  assert results['as_planned']['differences'] in ([], [
      frozen.notes[0]['told'] if frozen.notes else ''])
  assert results['as_planned']['without_hash'] == 0
  assert verdict['item_noise'] > 0
  for x in results['outcomes']:
    if x['phase'] == 'confirm':
      scores = x['items']['loss']
      assert np.average(scores['scores'], weights=scores['weights']
                        ) == pytest.approx(x['loss'], rel=1e-5)
  # Base and twin have the same data, but not the same parameters.
  values = {(x['variant'], x['seed']): x['values']['loss']
            for x in results['outcomes'] if x['phase'] == 'screen'}
  assert len(set(values.values())) == 6
  # A run has the rate that its variant was given at its size.
  best = {(row['variant'], row['size']): row['changes']
          for row in results['tuned']}
  for x in results['outcomes']:
    if x['phase'] == 'confirm':
      assert best[x['variant'], x['size']].items() <= x['changes'].items()
  assert results['provenance']['devices'] and results['provenance']['versions']
  assert (workdir / 'report' / 'index.html').is_file()
