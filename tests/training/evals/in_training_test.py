"""Tasks of eval.tasks: their figures are those of the parameters as they are,
and training goes as it does without them."""

import json
import shutil

import jax
import pytest

from configs import base
from configs import sharding as tables
from configs.errors import RequestError
from training import loop, parameters, preflight, progress, runs
from training.data import tokenizers
from training.objectives import pipeline
from training.distributed import devices
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
    preflight.check_config(config(texts, **fields))
