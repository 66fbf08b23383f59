"""Tasks of eval.tasks: their figures are those of the parameters as they are,
and training goes as it does without them."""

import json
import shutil

import jax
import pytest

from configs import base
from configs import sharding as tables
from configs.errors import RequestError
from training import evals, loop, parameters, progress, runs, vectorised
from training.data import pipeline, tokenizers
from training.distributed import devices
from training.evals import in_training
from training.workdir import checkpoints, run_config

TEXT = 'It is a law of nature that what is sown is reaped. ' * 10


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  for i in range(8):
    (folder / f'{i}.txt').write_text(f'Document {i}. {TEXT}')
  return f'text:{folder}/*.txt'


def config(texts, **changes):
  c = base.base()
  c.model.update(d_model=16, num_layers=1, num_heads=2)
  c.data.update(source=texts, length=16, batch_size=4, holdout_every=4)
  c.train.steps = 8
  # All that is held out, each time: so the task has the same to say.
  c.eval.update(every_steps=4, batches=0, tasks='loss', tasks_every_steps=2)
  c.log.every_steps = 1
  c.checkpoint.every_steps = 4
  c.update_from_flattened_dict(changes)
  return c.lock()


def alone(c, workdir):
  tokenizer = tokenizers.load(c.data.tokenizer)
  model, derived = runs.resolve(c, tokenizer)
  mesh = devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1),
                           jax.devices()[:1])
  run = runs.build(c, model, mesh)
  with checkpoints.Checkpoints(workdir, **c.checkpoint) as saved:
    state, start = parameters.restore_or_create(run, saved)
    run_config.save(workdir, c, derived)
    return loop.train(
        run, state, start, pipeline.training_loader(c, tokenizer),
        pipeline.held_out(c, tokenizer), saved, workdir)


def rows(workdir, split):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [row for row in map(json.loads, lines) if row['split'] == split]


def same_figures(row):
  """Whether a row has the task's figures and they are the loop's own."""
  return row['loss/loss'] == pytest.approx(row['loss'], rel=1e-6) and (
      row['loss/bits_per_byte'] == pytest.approx(row['bits_per_byte'], 1e-6))


@pytest.mark.long
def test_training_is_the_same_and_goes_on_with_the_same_figures(
    texts, tmp_path, capsys):
  plain = config(texts, **{'eval.tasks': '', 'eval.tasks_every_steps': 0})
  assert alone(plain, tmp_path / 'plain') == 0
  assert alone(config(texts), tmp_path / 'run') == 0
  train = [row['loss'] for row in rows(tmp_path / 'run', 'train')]
  assert train == [row['loss'] for row in rows(tmp_path / 'plain', 'train')]
  found = rows(tmp_path / 'run', 'eval')
  assert [row['step'] for row in found] == [2, 4, 6, 8]
  assert [('loss' in row, 'loss/loss' in row) for row in found] == [
      (False, True), (True, True)] * 2
  assert all(map(same_figures, found[1::2]))
  said = capsys.readouterr().out
  assert f'step 6  loss: loss {found[2]["loss/loss"]:.4f}' in said
  assert 'tasks: loss, every 2 steps' in said
  shutil.rmtree(tmp_path / 'run/checkpoints/8')
  assert alone(config(texts), tmp_path / 'run') == 0
  assert rows(tmp_path / 'run', 'eval') == found


@pytest.mark.long
@pytest.mark.slow
def test_each_of_a_group_has_its_own_and_one_program_does(
    texts, tmp_path, monkeypatch):
  made, make = [], in_training.Tasks.__init__

  def noted(tasks, *args):
    make(tasks, *args)
    made.append(tasks)

  monkeypatch.setattr(in_training.Tasks, '__init__', noted)
  configs = [config(texts, seed=seed, **{
      'model.init_stddev': 0.02 * (seed + 1), 'eval.tasks_every_steps': 0})
             for seed in range(3)]
  workdirs = [tmp_path / str(seed) for seed in range(3)]
  vectorised.train(configs, workdirs)
  tasks, = made
  program, = tasks._programs.values()
  assert program._cache_size() <= 1  # 0 where jax has had to forget it
  last = [rows(workdir, 'eval')[-1] for workdir in workdirs]
  assert all(map(same_figures, last))
  assert len({row['loss/loss'] for row in last}) == 3
  for workdir in workdirs:  # after the last step alone
    assert ['loss/loss' in row for row in rows(workdir, 'eval')] == [
        False, True]


@pytest.mark.long
def test_a_task_that_fails_costs_no_training(
    texts, tmp_path, capsys, monkeypatch):
  def fails(*_):
    raise RequestError('a text is too long')

  with monkeypatch.context() as patch, pytest.raises(
      RequestError, match='too long'):
    patch.setattr(evals, 'run', fails)
    alone(config(texts, **{'eval.tasks_every_steps': 3}), tmp_path / 'run')
  assert 'step 3 is saved, without all that' in capsys.readouterr().out
  c = config(texts, **{'eval.tasks': '', 'eval.tasks_every_steps': 0})
  assert alone(c, tmp_path / 'run') == 0
  assert 'steps 4 to 8' in capsys.readouterr().out
  assert alone(c, tmp_path / 'plain') == 0
  assert [row['loss'] for row in rows(tmp_path / 'run', 'train')] == [
      row['loss'] for row in rows(tmp_path / 'plain', 'train')]


def test_what_a_task_goes_through_ends_when_the_run_is_told_to_stop():
  seen = []
  with pytest.raises(progress.Stopped), progress.inside_a_run(
      lambda: len(seen) == 3):
    for i in progress.each(range(9), 'counting'):
      seen.append(i)
  assert seen == [0, 1, 2]
  assert list(progress.each(range(9), 'counting')) == list(range(9))


@pytest.mark.parametrize('fields, sentence', [
    ({'eval.tasks': 'los'}, "'los'"),
    ({'eval.tasks': 'loss:much'}, "eval.tasks has 'loss:much': write loss"),
    ({'eval.tasks': 'loss,loss'}, 'names loss twice'),
    ({'eval.tasks': 'embed'}, 'cannot be done there: task embed reads texts'),
    ({'eval.tasks': 'routing'}, 'has no experts to route to: leave routing'),
    ({'eval.tasks': 'fill_mask'}, 'cannot be done there'),
    ({'eval.tasks': ''}, 'eval.tasks_every_steps is 2, but eval.tasks names'),
    ({'eval.tasks_every_steps': -1}, 'must be >= 0')])
def test_what_no_training_can_do_is_refused(texts, fields, sentence):
  with pytest.raises(RequestError, match=sentence):
    runs.check_config(config(texts, **fields))


@pytest.mark.slow
@pytest.mark.parametrize('figure, several, choices', [
    ('los', False, 'loss, accuracy, perplexity, bits_per_byte$'),
    ('los', True, 'loss, accuracy, perplexity, bits_per_byte$'),
    ('loss/los', False, 'loss/loss, loss/accuracy')])
def test_a_best_that_is_no_figure_is_refused_before_the_first_step(
    texts, tmp_path, figure, several, choices):
  c = config(texts, **{'eval.best': figure, 'eval.best_is': 'least'})
  with pytest.raises(RequestError, match=f'choose from {choices}'):
    if several:
      vectorised.train([c], [tmp_path])
    else:
      alone(c, tmp_path)
  assert not rows(tmp_path, 'train')
