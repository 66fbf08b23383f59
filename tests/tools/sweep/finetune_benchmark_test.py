"""The comparison with the Hugging Face Trainer: its statistics, its split of
one file into two, its recipe, and what it says."""

import json

import numpy as np
import pytest
from scipy import stats

import architectures
from benchmarks import finetune, finetune_ours, finetune_replay
from benchmarks import finetune_tasks
from configs import bert
from configs.errors import RequestError
from training import objectives, paths, runs, step
from training.data import squad
from training.optim import schedules


def test_intervals_are_those_of_students_t():
  one, other = [90.1, 90.9, 89.5], [88.2, 90.4, 91.3]
  low, high = stats.t.interval(0.95, 2, np.mean(one), stats.sem(one))
  assert finetune.interval(one) == pytest.approx((high - low) / 2)
  welch = stats.ttest_ind(one, other, equal_var=False).confidence_interval()
  assert finetune.joint_interval(one, other) == pytest.approx(
      (welch.high - welch.low) / 2)
  assert np.isnan(finetune.interval([1.0]))
  assert np.isnan(finetune.joint_interval([1.0], other))
  assert finetune.joint_interval([1.0, 1.0], [2.0, 2.0]) == 0


def _rows(ours, theirs, task='sst2'):
  return [dict(task=task, side=side, seed=seed, steps=10, score=score, loss=1.0)
          for side, scores in (('ours', ours), ('theirs', theirs))
          for seed, score in enumerate(scores)]


@pytest.mark.parametrize('ours, theirs, said', [
    ([90, 91, 92], [91, 92, 90], 'they agree'),
    ([90, 91, 92], [70, 71, 72], 'ours is higher'),
    ([70, 71, 72], [90, 91, 92], 'ours is lower'),
    ([70], [90], 'too few seeds')])
def test_the_table_says_whether_they_agree(ours, theirs, said):
  line = finetune.table(_rows(ours, theirs)).splitlines()[1]
  assert line.endswith(said)
  assert f'{np.mean(ours):.2f}' in line
  assert ('±' in line) == (len(ours) > 1)


def test_a_side_alone_has_no_verdict():
  line = finetune.table(_rows([90, 91], [])).splitlines()[1]
  assert line.split()[-1] == '-'


def test_speed_is_the_median_ratio_of_the_turns(monkeypatch, capsys):
  """Turns of (steps/s, steps/s of CPU time) of each side."""
  turns = {'finetune_ours': [(2, 4), (9, 9), (3, 2)],
           'finetune_hf': [(1, 1), (3, 9), (3, 4)]}

  class Side:
    def __init__(self, side, request):
      self.turns = [dict(zip(('steps', 'cpu_steps'), t)) for t in turns[side]]

    def do(self, job):
      return dict(result=self.turns.pop(0) if job == 'timed' else None)

    def close(self):
      assert not self.turns

  monkeypatch.setattr(finetune, 'Worker', Side)
  found = finetune.speed('sst2', {})
  assert (found['ratio'], found['cpu_ratio']) == (2, 1)
  assert (found['ours'], found['theirs']) == (3, 3)
  assert capsys.readouterr().out == (
      'sst2     ours 3.00 steps/s, theirs 3.00: 2.00 x as fast; by CPU time '
      '1.00 x\n')


def test_pieces_are_joined(tmp_path):
  for name, rows in (('a', _rows([90, 91], [])), ('b', _rows([], [80, 81]))):
    (tmp_path / name).write_text(json.dumps(dict(rows=rows)))
  both = [row for name in 'ab' for row in finetune._read(tmp_path / name)]
  assert 'ours is higher' in finetune.table(both)
  (tmp_path / 'c').write_text('{"rows": [{"task": "sst2"}]}')
  for name in ('c', 'd'):
    with pytest.raises(RequestError, match=str(tmp_path / name)):
      finetune._read(tmp_path / name)


def test_one_file_is_split_by_paragraphs(tmp_path):
  paragraphs = [dict(context=f'It is {n}.', qas=[dict(
      id=f'{n}-{k}', question='Which?', answers=[dict(
          text=str(n), answer_start=6)]) for k in range(2)])
                for n in range(10, 21)]
  data = [dict(title='a', paragraphs=paragraphs[:4]),
          dict(title='b', paragraphs=paragraphs[4:])]
  (tmp_path / 'xquad').mkdir()
  (tmp_path / 'xquad/xquad.en.json').write_text(json.dumps(
      dict(version='1.1', data=data)))
  task = finetune_tasks.TASKS['xquad']
  train, dev = [list(squad.read(path)) for path in finetune_tasks.files(
      task, tmp_path, tmp_path)]
  contexts = [{row.context for row in rows} for rows in (train, dev)]
  assert not contexts[0] & contexts[1]
  assert contexts[1] == {'It is 14.', 'It is 19.'}
  assert len(train) + len(dev) == len(paragraphs)
  with pytest.raises(RequestError, match='sst2/.*.tsv is missing'):
    finetune_tasks.files(finetune_tasks.TASKS['sst2'], tmp_path, tmp_path)


@pytest.mark.parametrize('name', finetune_tasks.TASKS)
def test_our_side_has_the_recipe(tmp_path, name):
  """Trainer's: all but biases and norms decay; a linear rate down to 0."""
  (tmp_path / 'config.json').write_text(json.dumps(dict(
      hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
      intermediate_size=48, hidden_dropout_prob=0.1,
      attention_probs_dropout_prob=0.1)))
  task = finetune_tasks.TASKS[name]
  config = bert.get_config('base')
  config.update_from_flattened_dict(finetune_ours.fields(dict(
      task=task._asdict(), weights=str(tmp_path), train='a', dev='b', seed=1)))
  objectives.check_objective(config)
  assert objectives.of(config).head == {
      'sst2': 'sequence', 'wnut17': 'tokens', 'xquad': 'span'}[name]
  model = runs.resolve_alone(config)
  assert model.head_dropout == (0.0 if name == 'xquad' else 0.1)
  tree = step.parameter_roles(architectures.build(model))
  decays = paths.match(config.optim.decay_mask, tree, '')
  matrices = {name: role.matrix for name, role in paths.flatten(tree).items()}
  assert {name: bool(x) for name, x in paths.flatten(decays).items()} == (
      matrices)


def test_the_trainer_is_shown_our_rows_without_their_padding():
  batch = dict(tokens=np.array([[101, 7, 8, 102], [101, 9, 102, 0]]),
               segment_ids=np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
               labels=np.array([[0, 3, 0, 0], [0, 0, 0, 0]]),
               weights=np.array([[0, 1, 0, 0], [0, 1, 0, 0]], np.float32))
  assert finetune_replay.rows([batch, batch]) == 2 * [
      dict(input_ids=[101, 7, 8, 102], attention_mask=[1] * 4,
           labels=[-100, 3, -100, -100]),
      dict(input_ids=[101, 9, 102], attention_mask=[1] * 3,
           labels=[-100, 0, -100])]


def test_a_replay_tells_the_largest_difference_of_ten_steps():
  one = dict(loss=[2.0] * 12, norm=[1.0] * 12, rate=[0.5] * 12)
  two = dict(loss=[2.0] * 9 + [1.75, 2.0, 2.0], norm=[1.0] * 12,
             rate=[0.5] * 11 + [0.25])
  _, first, last = finetune_replay.table(one, two).splitlines()
  assert first.split() == ['1', 'to', '10', '2.0000', '2.5e-01', '1.0000',
                           '0.0e+00', '0.0e+00']
  assert last.split() == ['11', 'to', '12', '2.0000', '0.0e+00', '1.0000',
                          '0.0e+00', '2.5e-01']


@pytest.mark.parametrize('steps', [0, 301])
def test_a_replay_has_the_steps_of_a_run_at_most(monkeypatch, steps):
  monkeypatch.setattr('sys.argv', ['finetune_replay', f'--steps={steps}'])
  with pytest.raises(RequestError, match=f'--steps is {steps}: .* 1 to 300'):
    finetune_replay.main()


def test_our_rates_are_the_trainers_one_step_later():
  """get_linear_schedule_with_warmup of transformers, of 300 steps."""
  theirs = lambda i: min(i / 30, (300 - i) / 270)
  config = bert.get_config('base')
  config.update_from_flattened_dict(dict([
      ('optim.schedule', 'linear'), ('optim.warmup_steps', 30),
      ('optim.lr', 2e-4), ('optim.final_fraction', 0.0)]))
  rate = schedules.make(config.optim, 300)
  np.testing.assert_allclose(
      [rate(i) for i in range(300)],
      [2e-4 * theirs(i + 1) for i in range(300)], rtol=1e-5, atol=1e-12)
