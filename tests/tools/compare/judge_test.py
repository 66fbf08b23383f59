"""The judge of loops: its shares of alpha, loops whose truth is known, and its
answers of runs on disk."""

import json
import math
import shutil
import types

import numpy as np
import pytest
from scipy import stats

from common.errors import RequestError
from configs import base
from tests.helpers import sweep_folder
from tools.compare import __main__ as command
from tools.compare import judge, statistics
from training.workdir import run_config

SHIFT = {0: 0.0, 1: 0.01, 2: -0.02}


def test_the_shares_of_all_answers_sum_to_one_or_less():
  """Whatever is asked together; and the p of eleven at once is Bonferroni's of
  twelve."""
  for each in ((1,) * 500, (3, 1, 20, 7), (400, 100)):
    shares = [judge.alpha_share_of_question(sum(each[:i]), n)
              for i, n in enumerate(each)]
    assert np.dot(shares, each) == pytest.approx(1 - 1 / (sum(each) + 1))
  assert judge.alpha_share_of_question(0, 11) == pytest.approx(1 / 12)
  looks = dict(judge.latest_look(n) for n in range(3, 3000))
  assert list(looks)[:4] == [3, 6, 12, 24] and sum(looks.values()) < 1
  assert judge.latest_look(11) == (6, 0.25)


def test_an_answer_is_scipys_test_at_its_share():
  d = np.random.default_rng(0).normal(-0.01, 0.02, 6)
  answer, test = judge.paired_test(d.tolist(), 0.1), stats.ttest_1samp(d, 0)
  assert (answer.effect, answer.p, answer.p_corrected) == pytest.approx(
      (d.mean(), test.pvalue, min(1, test.pvalue / 0.1)))
  assert answer.interval == pytest.approx(test.confidence_interval(
      1 - 0.05 * 0.1))
  assert judge.paired_test([0.1] * 3, 0.5) == (
      pytest.approx(0.1), None, 0.25, 0.5)


def test_the_spread_of_all_that_was_looked_at_makes_an_answer_more_cautious(
    tmp_path):
  """Of those beside the same base; the test is by scipy's t, at any share."""
  tail = 0.2 * np.random.default_rng(3).exponential(size=24)
  d = [-0.1, -0.11, -0.12]
  looked = [{'names': ['base', 'a'], 'values': list(enumerate(tail.tolist()))},
            {'names': ['other', 'b'], 'values': [[0, 5.0], [1, 9.0]] * 2},
            {'names': ['base', 'c'], 'values': [[0, None], [1, 0.1]]}]
  pooled = judge._register_look(
      {'questions': [], 'looked': looked, 'answers': []}, tmp_path,
      ('base', 'v'), dict(enumerate(d)))[2]
  squares = [np.var(x) * len(x) for x in (tail, d)]
  assert pooled == pytest.approx((math.sqrt(sum(squares) / 25), 25))
  t = -0.11 * 3 ** 0.5 / 0.06
  for share, is_shown in ((0.5, True), (0.02, False)):
    test = judge.paired_test(d, share, statistics.PooledDeviation(0.06, 25))
    assert test.p == pytest.approx(2 * stats.t.sf(-t, 25))
    assert (test.interval[1] < 0) == is_shown == (test.p_corrected <= 0.05)
    assert judge.paired_test(d, share).p < test.p


@pytest.mark.parametrize('seeds', [2, 3, 4])
def test_a_look_takes_three_seeds(seeds):
  runs = {seed: types.SimpleNamespace(
      diverged=False, final_loss=1.0, config={'seed': seed})
          for seed in range(seeds)}
  look = lambda: judge._ended_seeds({'a': runs, 'b': runs}, ('a', 'b'))[0]
  if seeds < judge.SEEDS_OF_FIRST_LOOK:
    with pytest.raises(RequestError, match='2 seeds have ended'):
      look()
    return
  assert look() == [*range(seeds)]


def _loops(effect: float, loops: int = 2000, variants: int = 20
           ) -> tuple[np.ndarray, np.ndarray]:
  """Whether any of the variants is called different, by loop: by the judge, and
  by p < 0.05. Each is looked at with 3, 6, 12 and 24 seeds; the last one alone
  has an effect, of so many standard deviations."""
  rng = np.random.default_rng(1)
  d = rng.normal(0, 1, (loops, variants, 24)) - rng.normal(0, 1, (loops, 1, 24))
  d[:, -1] += effect * 2 ** 0.5
  wrong, naive = np.zeros((2, loops), bool)
  for n in (3, 6, 12, 24):
    p = stats.ttest_1samp(d[..., :n], 0, axis=-1).pvalue
    shares = judge.latest_look(n)[1] * np.array(
        [judge.alpha_share_of_question(k, 1) for k in range(variants)])
    wrong |= (p / shares <= judge.ALPHA).any(1)
    naive |= (p <= judge.ALPHA).any(1)
  return wrong, naive


def test_a_loop_that_asks_of_all_is_wrong_as_rarely_as_it_says():
  wrong, naive = _loops(0.0)
  assert wrong.mean() <= 0.05 and naive.mean() > 0.6
  assert _loops(3.0)[0].mean() > 0.95  # the twentieth question finds it


def test_the_first_question_errs_more_where_its_noise_is_not_normal():
  """As the module says: by three seeds nobody sees a rare plateau, nor by six.
  """
  rng = np.random.default_rng(2)
  base_noise = rng.normal(0, 0.1, (4000, 24))
  tail = rng.exponential(1.0, base_noise.shape) - 1.0
  on_plateau = rng.random(base_noise.shape) < 0.1
  plateau = 10 * base_noise[::-1] + 30 * (on_plateau - 0.1)
  for noise, rate in ((10 * base_noise[::-1], 0.02), (tail, 0.09),
                      (plateau, 0.58)):
    for looks in ((3, 6, 12, 24), (6, 12, 24)):
      wrong = np.zeros(len(noise), bool)
      for i, n in enumerate(looks):
        p = stats.ttest_1samp((noise - base_noise)[:, :n], 0, axis=1).pvalue
        wrong |= p <= judge.ALPHA / 2 * 0.5 ** (i + 1)
      assert wrong.mean() == pytest.approx(rate, abs=0.09 * rate + 0.01)


@pytest.fixture
def ask(tmp_path, tmp_path_factory, monkeypatch, capsys):
  """Returns ask(BASE, VARIANT) -> (exit code, answer); ask.write writes runs,
  each point's by the shifts of its seeds."""

  def of(base, variant):
    at = tmp_path / 'points'
    monkeypatch.setattr('sys.argv', [
        'compare', 'judge', str(at / base), str(at / variant), '--json'])
    code = command.main()
    return code, json.loads(capsys.readouterr().out)

  def write(**points):
    root = tmp_path_factory.mktemp('runs')
    sweep_folder.write(root, [
        sweep_folder.point(name, {} if name == 'base' else {
            'optim.b1': 0.9 + 0.001 * i}, shift=shift, seeds=tuple(shift))
        for i, (name, shift) in enumerate(points.items())])
    shutil.copytree(root / 'points', tmp_path / 'points', dirs_exist_ok=True)

  of.write, of.folder = write, tmp_path / 'points'
  return of


def _shift(effect, *seeds):
  return {seed: effect + 0.003 * (-1) ** seed + SHIFT.get(seed, 0.0)
          for seed in seeds}


def test_codes_are_of_verdicts_and_asking_again_is_free(ask):
  base = {seed: SHIFT.get(seed, 0.0) for seed in range(6)}
  ask.write(base=base, good=_shift(-0.3, *range(6)),
            bad=_shift(0.3, *range(3)), same=_shift(0.0, *range(3)))
  answers = {name: ask('base', name) for name in ('good', 'same', 'bad')}
  assert {name: (code, answer['verdict']) for name, (code, answer) in (
      answers.items())} == {'good': (0, 'better'), 'bad': (4, 'worse'),
                            'same': (3, 'no difference shown')}
  d = [_shift(-0.3, seed)[seed] - base[seed] for seed in range(6)]
  good = answers['good'][1]
  # Three variants lie there: a quarter each, as is the second look's share.
  assert good['p_corrected'] == pytest.approx(
      16 * stats.ttest_1samp(d, 0).pvalue)
  assert good['interval'][1] < 0 and good['questions'] == 3
  assert (good['seeds'], good['next_look']) == ([*range(6)], 12)
  assert 'optim.b1' in good['changes']
  assert ask('base', 'good') == (0, good)
  # A question more, and one of runs that were trained anew.
  ask.write(base=base, later=_shift(-0.3, *range(3)))
  later = ask('base', 'later')[1]
  assert later['p_corrected'] == pytest.approx(2 * 4 * 5 * later['p'])
  ask.write(base=base, same=_shift(-0.3, *range(3)))
  again = ask('base', 'same')[1]
  assert again['questions'] == 5 and 'others than those' in again['warnings'][0]
  assert again['p_corrected'] == pytest.approx(2 * 5 * 6 * again['p'])


def test_what_cannot_be_judged_is_refused_and_what_diverges_not_better(ask):
  ask.write(base=SHIFT, few=_shift(0, 0, 1), wild=_shift(-0.3, 0, 1, 2))
  for variant, message in (('few', '2 seeds have ended in both'),
                        ('none', 'none has no runs'), ('base', 'beside each')):
    with pytest.raises(RequestError, match=message):
      ask('base', variant)
  file = ask.folder / 'wild/seed-1/metrics.jsonl'
  whole = file.read_text()
  file.write_text(whole.replace('"loss"', '"other"'))
  with pytest.raises(RequestError, match='wild/seed-1 has no held-out loss'):
    ask('base', 'wild')
  file.write_text(whole + json.dumps({
      'step': 201, 'split': 'train', 'param_norm': None}) + '\n')
  code, answer = ask('base', 'wild')
  assert (code, answer['verdict'], answer['p']) == (3, 'unstable', None)
  assert answer['diverged'] == {'base': 0, 'wild': 1}


CONFIG = run_config.flatten(base.base())


def test_losses_of_different_text_are_not_compared():
  """Also where one of the seeds alone has another."""
  both = [CONFIG, CONFIG | {'optim.lr': 0.5}]
  other = [CONFIG, CONFIG | {'data.mask_rate': 0.5, 'optim.lr': 0.5}]
  assert judge._changed_fields([both] * 3) == {
      'optim.lr': [CONFIG['optim.lr'], 0.5]}
  with pytest.raises(RequestError, match='^data.mask_rate differ'):
    judge._changed_fields([both, other, both])


def test_seeds_are_not_chosen(ask):
  ask.write(base={seed: 0.0 for seed in (0, 1, 3, 4)},
            good=_shift(-0.3, 0, 1, 3, 4), more=_shift(-0.3, 0, 1, 2))
  with pytest.raises(RequestError, match='seed 3, but not seed 2'):
    ask('base', 'good')
  with pytest.raises(RequestError, match='2 seeds have ended'):
    ask('base', 'more')
  shutil.move(ask.folder / 'base/seed-3', ask.folder / 'base/seed-2')
  with pytest.raises(RequestError, match='base/seed-2 is of seed 3'):
    ask('base', 'more')
