"""Averages of parameters in whole runs: of optim.ema, and of checkpoints."""

import shutil

import numpy as np
import pytest

from tests.training import vectorised_test as group
from training import evals, vectorised
from training.evals import checkpoint
from training.workdir import step_folders

texts = group.texts


@pytest.mark.slow
@pytest.mark.long
def test_all_figures_are_those_of_the_run_alone(texts, tmp_path):
  """Also where it goes on, and of eval.py's task."""
  configs = [
      group.config(
          texts, seed=seed, optim__lr=lr, optim__ema=0.75, eval__live=True,
          eval__batches=0, eval__every_steps=5, data__batch_size=8,
          checkpoint__average=2, checkpoint__every_steps=3, checkpoint__keep=1)
      for seed, lr in ((0, 1e-2), (1, 3e-2))]
  assert vectorised.groups(configs) == [[0, 1]]
  vectorised.train(configs, [tmp_path / '0', tmp_path / '1'])
  alone = tmp_path / 'alone'
  group.alone(configs[1], alone)
  group.assert_same(tmp_path / '1', alone)
  ours, theirs = (group.rows(at, 'eval') for at in (tmp_path / '1', alone))
  names = {'loss', 'live/loss', 'mean/loss'}
  for row, other in zip(ours, theirs, strict=True):
    found = names & row.keys()
    assert names - found == ({'mean/loss'} if row['step'] == 5 else set())
    for name in found:
      np.testing.assert_allclose(row[name], other[name], rtol=1e-5)
    assert len({row[name] for name in found}) == len(found)
  # From the checkpoint of step 6, which is one of those to be averaged.
  shutil.rmtree(alone / 'checkpoints/8')
  group.alone(configs[1], alone)
  assert group.rows(alone, 'eval') == theirs
  for name, options in (('loss', {}), ('live/loss', {'live': True}),
                        ('mean/loss', {'step': step_folders.named('last:2')})):
    figures = checkpoint.evaluate(
        alone, ['loss'], evals.defaults(), text='', programs={},
        **{'step': None} | options)
    np.testing.assert_allclose(figures['loss']['loss'], theirs[-1][name],
                               rtol=1e-5)
    assert ('parameters' in figures) == (name != 'live/loss')
