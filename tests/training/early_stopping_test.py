"""The best checkpoint of a run: it is kept, found by its name, remembered by a
run that goes on, and the run ends after eval.patience evaluations."""

import pytest

from configs import base
from configs.errors import RequestError
from tests import train_test
from training import early_stopping, preflight
from training.workdir import checkpoints

texts = train_test.texts
# The learning rate is so large that the loss rises again.
FLAGS = ('--config.eval.best=loss', '--config.eval.every_steps=2',
         '--config.checkpoint.keep=1', '--config.checkpoint.every_steps=0',
         '--config.optim.schedule=constant', '--config.optim.lr=0.03',
         '--config.optim.warmup_steps=0', '--config.model.d_model=16')


def config(**fields):
  c = base.base()
  c.eval.update(fields)
  return c


@pytest.mark.parametrize('fields, words', [
    (dict(patience=3), 'eval.patience is 3, which is not read where eval.best '
     'is empty'),
    (dict(best='labels/f1'), "eval.tasks has no 'labels': it has none"),
    (dict(best='loss', every_steps=0), 'eval.every_steps is 0: nothing is'),
    (dict(best='labels/f1', tasks='loss, labels', patience=2),
     'eval.patience is 2, but eval.tasks_every_steps is 0: the task labels'),
    (dict(best='surprise'), 'set eval.best_is to least or largest'),
    (dict(best='extrapolation/loss', tasks='extrapolation'),
     'the figures of task extrapolation are length')])
def test_what_cannot_be_meant_is_refused(fields, words):
  with pytest.raises(RequestError, match=words):
    preflight.check_config(config(**fields))


@pytest.mark.parametrize('figure, largest', [
    ('loss', False), ('accuracy', True), ('labels/f1', True),
    ('labels/loss', False)])
def test_the_way_of_a_known_figure(figure, largest):
  best = early_stopping.Best
  assert best.of(config(best=figure), None).largest == largest
  assert best.of(config(best=figure, best_is='largest'), None).largest


def test_another_figure_begins_anew():
  best, ended_early = early_stopping.Best, early_stopping.ended_early
  kept = best('loss', False, 1, 4, 0.5, 3).record()
  assert best.of(config(best='loss', patience=9), kept).waited == 3
  assert best.of(config(best='perplexity'), kept).step is None
  assert not ended_early(config(best='loss', patience=4), kept, 8)
  assert 'is 0.5, of step 4' in ended_early(
      config(best='loss', patience=3), kept, 8)


@pytest.mark.parametrize('text', ['-1', '2.5', 'last', '', '02'])
def test_a_step_that_is_none_is_refused(text):
  assert checkpoints.named_step(None) is None
  assert checkpoints.named_step('20') == 20
  with pytest.raises(RequestError, match='write the number of a step, or best'):
    checkpoints.named_step(text)


@pytest.mark.long
def test_the_best_of_a_run_is_kept_beside_the_newest(texts, tmp_path):
  """By train.py, which ends early, and says so again, and by eval.py."""
  words = train_test.command(tmp_path / 'run', texts, *FLAGS,
                             '--config.eval.patience=2')
  said = train_test.run(words).stdout
  losses = {row['step']: row['loss'] for row in
            train_test.rows(tmp_path / 'run') if row['split'] == 'eval'}
  end = next(n for n in losses if n >= 6 and all(
      losses[m] >= min(losses[k] for k in losses if k < n - 2)
      for m in (n - 2, n)))
  assert end == max(losses) < 20
  assert f'ended early after step {end}: loss has not been better' in said
  lowest = min(losses, key=losses.get)
  assert sorted(int(path.name) for path in (
      tmp_path / 'run/checkpoints').iterdir() if path.name.isdigit()) == [
          lowest, end]
  assert f'is complete: ended early after step {end}' in (
      train_test.run(words).stdout)
  assert max(row['step'] for row in train_test.rows(tmp_path / 'run')) == end
  said = train_test.evaluate(tmp_path / 'run', '--step=best').stdout
  assert f'step {lowest}' in said
