"""A study's file: what is planned of it, and what is refused."""

import json
import math
import pathlib
import sys

import pytest

from configs.errors import RequestError
from tests.helpers import studies
from tools.compare import __main__ as compare
from tools.compare import costs, freeze, measures, phases, spec
from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans
from training.workdir import run_config

PROBE = ("WORKLOADS = {'text': {}, 'copy': {'data.length': 8, "
         "'probe.levels': (1, 2), 'train.steps': 8}}")


MLM_NSP = """from configs import bert
  own = bert.get_config('tiny')
  own.model.update(d_model=8, num_layers=1, num_heads=2, max_len=8)
  own.data.update(c.data)
  own.data.tokenizer = bert.get_config('tiny').data.tokenizer
  for name in 'train', 'optim', 'eval', 'checkpoint', 'log':
    own[name].update(c[name])
  c = own"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('studies')


@pytest.fixture(scope='module')
def frozen(folder):
  """With a probe, matched by parameters."""
  return freeze.freeze(studies.write(
      folder, f"{PROBE}\nMATCH = 'params'\nALPHA = 0.01",
      sweep="add('wide', **{'model.ffn': 'swiglu'})"))


def test_the_plan_is_what_the_file_says(frozen, folder):
  plan = frozen.plan
  assert (plan.name, plan.base, plan.variants) == ('made', 'base', ('wide',))
  assert plan.sizes == plan.tuned_sizes == ('s', 'm', 'l')
  assert plan.workloads == ('text', 'copy')
  assert (plan.alpha, plan.q, plan.effect) == (0.01, 0.05, 0.5)
  loss, copy = plan.measures
  assert loss == plans.Measure('loss', 'text', 'loss', 'lower',
                               math.log(frozen.points[0]['vocab']))
  # Of two or three answers one is the sign that ends the row.
  assert copy == plans.Measure('copy', 'copy', 'accuracy', 'higher',
                               pytest.approx(2 / (2 + 3), abs=0.01))
  # What guessing gives is told where it is another: old plans do not tell it.
  assert not any('guess' in row for row in frozen.points)
  assert frozen.guess(frozen.points[0]) == loss.chance
  assert set(frozen.sources) == {'file', f'text:{folder}/texts/*.txt'}
  assert frozen.sources['file'] == frozen_lib.digest(
      pathlib.Path(plan.file).read_bytes())


def test_each_point_is_matched_at_its_size_and_stays_so_on_a_probe(frozen):
  widths = set()
  for size in frozen.plan.sizes:
    base = frozen.point('base', size, 'text')
    wide = frozen.point('wide', size, 'text')
    assert abs(wide['params'] / base['params'] - 1) <= 0.01
    assert wide['matched'] == ['model.d_ff']
    widths.add(wide['changes']['model.d_ff'])
    probe = frozen.point('wide', size, 'copy')
    assert probe['changes']['model.d_ff'] == wide['changes']['model.d_ff']
    assert probe['changes']['train.steps'] == 8
    assert probe['changes']['optim.warmup_steps'] == 2
  assert len(widths) == 3


@pytest.mark.parametrize('probe, size, told', [
    (PROBE.replace(", 'train.steps': 8", ''),
     {'train.steps': 16, 'optim.warmup_steps': 4, 'optim.decay_steps': 12},
     {'optim.warmup_steps': 4, 'optim.decay_steps': 12,
      'eval.every_steps': 16, 'log.every_steps': 1}),
    (PROBE, {'optim.warmup_steps': 2, 'eval.every_steps': 3,
             'checkpoint.every_steps': 4, 'log.every_steps': 2},
     {'optim.warmup_steps': 4, 'eval.every_steps': 3,
      'checkpoint.every_steps': 4, 'log.every_steps': 2}),
    (PROBE.replace(", 'train.steps': 8", ''), {'train.steps': 16},
     {'optim.warmup_steps': 1})])  # as on the text
def test_a_probe_has_the_schedule_of_its_size(probe, size, told, folder):
  file = studies.write(folder, f"{probe}\nSIZES['m'].update({size})")
  frozen = freeze.freeze(file)
  assert frozen.point('base', 'm', 'copy')['changes'].items() >= told.items()
  assert frozen.point('base', 's', 'copy')['changes']['eval.every_steps'] == (
      8 if probe == PROBE else 4)


def test_the_costs_are_those_of_the_runs_that_are_asked_for(frozen):
  by_phase = {cost.phase: cost for cost in costs.of(frozen, 8, None)}
  assert by_phase['noise'].runs == 3 * 2 * 2 * 3
  # Two candidates at half of the steps, then one at all of them.
  assert by_phase['tune'].runs == 2 * 3 * 2 * 3
  assert by_phase['screen'].runs == 2 * 3  # of the text alone
  assert by_phase['confirm'].runs == 2 * 3 * 2 * 3
  tokens = 4 * 8 * (4 + 8)  # of a run on the text, and of one on the probe
  assert by_phase['noise'].tokens == 3 * 2 * 3 * tokens
  assert by_phase['tune'].tokens == 2 * 3 * (2 * 0.5 + 1) * tokens
  # Base and base-again are one program; three seeds of a variant are another.
  assert by_phase['noise'].programs == 6 and by_phase['screen'].programs == 2
  assert by_phase['screen'].seconds is None
  known = costs.of(frozen, 8, costs.Times(
      {(size, workload): 0.5 for size in frozen.plan.sizes
       for workload in frozen.plan.workloads}, 10.0))
  assert known[2].seconds == 6 * 4 * 0.5 + 2 * 10.0


def test_a_plan_comes_back_from_its_file(frozen):
  tree = json.loads(json.dumps(frozen_lib.to_json(frozen)))
  back = frozen_lib.from_json(tree, 'study.json')
  assert back.hash == frozen.hash == tree['hash']
  assert frozen_lib.changed(back, frozen) == []
  assert [run.point for run in phases.noise_runs(back)] == [
      run.point for run in phases.noise_runs(frozen)]


def test_muP_tunes_the_smallest_size_alone(folder):
  mup = "c.model.update(parametrization='mup', mup_base_width=8)"
  assert freeze.freeze(studies.write(folder, base=mup)).plan.tuned_sizes == (
      's',)


def test_the_chance_of_a_probe_is_what_a_constant_answer_scores(frozen):
  row = frozen.point('base', 's', 'copy')
  config = spec.changed(run_config.from_json(frozen.base_config),
                              row['changes'], 'it')
  found = {figure: measures.chance({'figure': figure, 'name': 'x'}, config,
                                   row['vocab'], 0.0, 'made.py')
           for figure in ('accuracy', 'probe/accuracy', 'probe/rows_right')}
  # Of one letter and of two, as many of either; the sign that ends a row.
  assert found['accuracy'] == frozen.plan.measures[1].chance
  assert found['probe/accuracy'] == pytest.approx((1 / 2 + 1 / 3) / 2)
  assert found['probe/rows_right'] == 0
  config.data.source = 'probe:parity'
  found = measures.chance({'figure': 'probe/rows_right', 'name': 'x'}, config,
                          2, 0.0, 'made.py')
  assert found == pytest.approx((1 / 2 + 1 / 4) / 2, abs=0.02)


def _labelled(folder, objective, targets) -> str:
  """Writes a labelled file; returns lines of base() that train on it."""
  file = folder / 'rows.tsv'
  file.write_text(''.join(f'row {i}\t{targets[i % len(targets)]}\n'
                          for i in range(24)))
  return (f"c.objective = {objective!r}; c.data.source = 'labelled:{file}'; "
          'c.data.length = c.model.max_len = 16')


def test_guessing_among_labels_is_not_guessing_among_tokens(folder):
  frozen = freeze.freeze(studies.write(
      folder, "MEASURES = ({'figure': 'loss'}, {'figure': 'accuracy'})",
      base=_labelled(folder, 'classification', 'abc')))
  loss, accuracy = frozen.plan.measures
  assert loss.chance == pytest.approx(math.log(3))
  assert accuracy.chance == pytest.approx(1 / 3)
  back = frozen_lib.from_json(
      json.loads(json.dumps(frozen_lib.to_json(frozen))), 'study.json')
  assert back.hash == frozen.hash
  assert {back.guess(row) for row in back.points} == {loss.chance}
  tree = frozen_lib.to_json(frozen)
  tree['points'][0]['guess'] = 'much'
  with pytest.raises(RequestError, match='is not as it was written'):
    frozen_lib.from_json(tree, 'study.json')


REFUSED = {
    'no base': (dict(sweep="pass\n\ndel base, get_config"),
                'has no base: add `def base'),
    'parameters of its own': (dict(base='c.init_seed = 1'),
                              r'base\(\) sets init_seed to 1'),
    'no sizes': (dict(constants='del SIZES'), 'has no SIZES'),
    'one size': (dict(constants="SIZES = {'s': {}}"), 'SIZES has 1 of them'),
    'sizes that fall': (dict(
        constants='SIZES = dict(reversed(SIZES.items()))'),
        'write them smallest first'),
    'no effect': (dict(drop='EFFECT = 0.5'), 'has no EFFECT'),
    'too few seeds for a test': (dict(constants="SEEDS['screen'] = 2"),
                                 'SEEDS has 2 for screen: .* from 3'),
    'a question that is a number': (dict(constants='QUESTION = 5'),
                                    'QUESTION is 5, a int: write a text'),
    'no variant': (dict(sweep='pass'), 'adds nothing but the base'),
    'a constant that nothing reads': (dict(constants='ALPAH = 0.1'),
                                      'has ALPAH, .* Did you mean ALPHA'),
    'alpha of 2': (dict(constants='ALPHA = 2.0'), 'ALPHA is 2.0'),
    'other data': (dict(sweep="add('x', **{'data.length': 4})"),
                   "'x' sets data.length: every variant of a study has the "
                   'same data'),
    'more steps': (dict(sweep="add('x', **{'train.steps': 9})"),
                   "'x' sets train.steps: .* as many steps"),
    'a size that tunes': (dict(constants="SIZES['m']['optim.lr'] = 1e-3"),
                          "TUNING and size 'm' both set optim.lr"),
    'a variant that tunes': (dict(sweep="add('x', **{'optim.lr': 1e-3})"),
                             "TUNING and variant 'x' both set optim.lr"),
    'a seed of its own': (dict(constants="SIZES['m']['init_seed'] = 1"),
                          "the study itself and size 'm' both set init_seed"),
    'a field of two': (dict(sweep="add('x', **{'model.d_model': 32})"),
                       "size 's' and variant 'x' both set model.d_model"),
    'no budget': (dict(constants="TUNING = {'rungs': 9}"),
                  'TUNING buys less than one run: its first rung trains 0.0039'
                  ),
    'tuning of nothing': (dict(constants="TUNING['fields'] = 5"),
                          "TUNING has 5 as fields: write {'optim.lr'"),
    'tuned seeds': (dict(constants="TUNING['fields'] = {'seed': (1, 2)}"),
                    'the study itself and TUNING both set seed'),
    'tuned steps': (dict(constants=(
        "TUNING['fields'] = {'train.steps': (2, 4)}")),
                    'TUNING sets train.steps: .* as many steps'),
    'a value that cannot be': (dict(constants=(
        "TUNING['fields'] = {'optim.b2': (0.5, 1.5)}")),
                               "TUNING tries optim.b2=1.5 of variant 'base'"),
    'an edge that cannot move': (dict(constants=(
        "TUNING.update(fields={'optim.b2': (0.9, 0.95)}, extend=1)")),
                                 'optim.b2=1.00278, to which extend=1 may'),
    'tuning of what a variant does not read': (dict(constants=(
        "TUNING['fields'] = {'model.relative.buckets': (16, 64)}")),
                                               'relative.buckets'),
    'no such workload': (dict(constants=(
        "MEASURES = ({'workload': 'copy', 'figure': 'accuracy'},)")),
        "unknown workload of a measure 'copy'"),
    'a measure of nothing': (dict(constants="MEASURES = ({'figure': 'los'},)"),
                             'it is not known which value'),
    'a measure without a chance': (dict(constants=(
        "MEASURES = ({'figure': 'loss'}, {'figure': 'loss/x', "
        "'better': 'higher'})")), 'needs a chance'),
    'a figure that a task has not': (dict(constants=(
        "MEASURES = ({'figure': 'loss'}, {'figure': 'samples/x', "
        "'better': 'higher', 'chance': 0})")),
                                     'the figures of samples are none'),
    'a measure that no variant can have': (dict(constants=(
        "MEASURES = ({'figure': 'loss'}, {'figure': 'routing/entropy', "
        "'better': 'higher', 'chance': 0})")),
        "routing/entropy' of text, which variant 'base' cannot have"),
    'a figure that the objective does not report': (dict(
        constants="MEASURES = ({'figure': 'accuracy'},)", base=MLM_NSP),
        "is 'accuracy' of text, which variant 'base' cannot have: objective "
        "'mlm_nsp' reports loss, mlm_accuracy, mlm_loss, nsp_accuracy"),
    'a probe first': (dict(constants=PROBE + (
        "\nMEASURES = ({'workload': 'copy', 'figure': 'accuracy'}, "
        "{'figure': 'loss'})")), "the first is the one that the verdict is on"),
    'nothing held out': (dict(base='c.data.holdout_every = 0'),
                         'a study needs text that is held out'),
    'one document held out': (dict(base='c.data.holdout_every = 8'),
                              'none for eval with eval.part=second'),
    'tasks': (dict(constants="TASKS = ('loss',)"), 'has TASKS'),
    'the name of the twin': (dict(sweep="add('base-again', init_seed=3)"),
                             'call it otherwise'),
    'patience': (dict(base="c.eval.update(patience=3, best='loss')"),
                 'eval.patience is 3'),
    'no evaluation': (dict(base='c.eval.every_steps = 0'),
                      "'base' at size 's' on 'text': eval.every_steps is 0"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_a_study_is_refused(case, tmp_path):
  fields, told = REFUSED[case]
  with pytest.raises(RequestError, match=told):
    freeze.freeze(studies.write(tmp_path, **fields))
  assert not (tmp_path / 'study.json').exists()


@pytest.mark.parametrize('command, words, told', [
    ('check', ['--workdir={}'], 'study.json is missing: no study was run'),
    ('check', ['--match=params'], '--match is of a sweep'),
    ('check', ['--workdir={}', '--time'], 'hours come from one of them'),
    ('run', ['--workdir={}/w', '--jobs=3'],
     '--jobs is for --launcher=slurm, and --launcher is local'),
    ('run', ['--workdir={}/w', '--slurm=a=b'], '--slurm is for --launcher=')])
def test_a_flag_that_would_do_nothing_is_refused(command, words, told, tmp_path,
                                                 monkeypatch):
  monkeypatch.setattr(sys, 'argv', [
      'compare', command, 'configs/studies/tiny.py',
      *(word.format(tmp_path) for word in words)])
  with pytest.raises(RequestError, match=told):
    compare.main()
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_variant_is_another_system_by_its_parts_and_not_by_name(tmp_path):
  alone = "add('neox', **{'model.arch': 'gpt_neox'})"
  with pytest.raises(RequestError, match="points 'base' and 'neox' differ in "
                     'model.arch alone'):
    freeze.freeze(studies.write(tmp_path, sweep=alone))
  frozen = freeze.freeze(studies.write(
      tmp_path, sweep="add.system('llama')"))
  for size in frozen.plan.sizes:
    changes = frozen.point('llama', size, 'text')['changes']
    assert changes['model.norm'] == 'rmsnorm'
    assert changes['model.position'] == 'rope'


def test_its_ratios_divide_the_layers():
  sweep = spec.read_study_file('configs/studies/hybrids.py').sweep
  found = {}
  for point in sweep.points:
    model = sweep.config(point).model
    names = model.pattern.split(',') if model.pattern else [None]
    mixers = [model.kinds[name].mixer if name else model.mixer
              for name in names]
    assert model.num_layers % len(mixers) == 0
    found[point.name] = (mixers.count('attention')
                         * model.num_layers // len(mixers))
  assert found == {'attention': 8, '1-to-1': 4, '3-to-1': 2, '7-to-1': 1,
                   'recurrence': 0}
