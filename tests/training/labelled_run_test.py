"""Runs on texts with labels: what is learned, the laws of runs in batches of
several lengths, and the labels that a run keeps."""


import numpy as np
import pytest

from tests.training import vectorised_test
from training import loop, runs
from training.data import tokenizers
from training.objectives import pipeline

BYTES = tokenizers.load('bytes')
STEPS = 24


@pytest.fixture(name='folder', scope='module')
def _folder(tmp_path_factory):
  """Texts of 2 to 29 letters: a's and b's, whose label says whether there is a
  c among them, or how many a's there are."""
  folder = tmp_path_factory.mktemp('labelled')
  rng = np.random.default_rng(0)
  for name, count in (('train', 200), ('held', 50)):
    classes, numbers = [], []
    for i in range(count):
      letters = rng.choice(list('ab'), int(rng.choice([4, 7, 13, 27])))
      if i % 2:
        letters[0] = 'c'
      classes.append(f'{"".join(letters)}\t{("without", "with")[i % 2]}\n')
      numbers.append(f'{"".join(letters)}\t{(i % 2) * 2 - 1}\n')
    (folder / f'{name}.tsv').write_text(''.join(classes))
    (folder / f'{name}-numbers.tsv').write_text(''.join(numbers))
  return folder


def config(folder, arch='bert', objective='classification', **changes):
  kind = '-numbers' if objective == 'regression' else ''
  block = 'post_norm' if arch == 'bert' else 'pre_norm'
  return vectorised_test.config(
      f'labelled:{folder}/train{kind}.tsv', **dict(
          data__eval_source=f'labelled:{folder}/held{kind}.tsv',
          data__holdout_every=20, objective=objective, model__arch=arch,
          model__block=block, data__length=32, data__batch_size=8,
          data__length_buckets=2, train__steps=STEPS, optim__lr=1e-2,
          eval__every_steps=STEPS, eval__batches=0,
          checkpoint__every_steps=12) | changes)


@pytest.mark.parametrize('arch, objective, fields', [
    ('bert', 'classification', {}), ('gpt', 'regression', {})])
@pytest.mark.slow
def test_every_stack_learns_it(folder, arch, objective, fields, tmp_path):
  c = config(folder, arch, objective, **dict(train__steps=120) | fields)
  vectorised_test.alone(c, tmp_path)
  figures, = vectorised_test.rows(tmp_path, 'eval')[-1:]
  if objective == 'classification':
    assert figures['accuracy'] == 1 and 'perplexity' not in figures
  else:
    assert figures['loss'] < 0.2 and figures['mean_absolute_error'] < 0.4


@pytest.fixture(name='alone', scope='module')
def _alone(folder, tmp_path_factory):
  """Runs of two seeds, each alone."""
  found = []
  for seed in range(2):
    workdir = tmp_path_factory.mktemp('alone') / str(seed)
    c = config(folder, seed=seed)
    vectorised_test.alone(c, workdir)
    found.append((c, workdir))
  return found


def _same(ours, theirs, rtol):
  for split, names in (('train', ('loss', 'accuracy', 'grad_norm')),
                       ('eval', ('loss', 'accuracy'))):
    for name in names:
      np.testing.assert_allclose(*[
          [row[name] for row in vectorised_test.rows(workdir, split)]
          for workdir in (ours, theirs)], rtol=rtol, atol=rtol)


@pytest.mark.slow
def test_it_goes_on_bit_for_bit(folder, tmp_path):
  first, whole = (config(folder, model__dropout=0.1, train__steps=steps,
                         optim__decay_steps=STEPS, eval__every_steps=0)
                  for steps in (12, STEPS))
  vectorised_test.alone(first, tmp_path / 'two')
  vectorised_test.alone(whole, tmp_path / 'two')
  vectorised_test.alone(whole, tmp_path / 'one')
  _same(tmp_path / 'two', tmp_path / 'one', 0)
  lengths = {row['tokens_per_second'] * row['step_seconds']
             for row in vectorised_test.rows(tmp_path / 'one')}
  assert {round(x) for x in lengths} == {8 * 16, 8 * 32}  # tokens of a step


def test_a_run_says_how_rows_are_padded_and_cut(folder):
  c = config(folder, data__length=16, data__batch_size=8)
  run = runs.build(c, runs.resolve(c, BYTES)[0])
  train = pipeline.training_loader(c, BYTES)
  long = sum(len(line.partition('\t')[0]) > 14 for line in
             (folder / 'train.tsv').read_text().splitlines())
  lines = loop.describe(run, 0, 128, train,
                        pipeline.held_out(c, BYTES)).splitlines()
  assert ('step: 8 rows padded to 8 or 16 tokens (a program each), at most 128 '
          'tokens') in lines
  told = (f'train.tsv, {long} of whose 200 rows are longer than data.length '
          '16, and cut off')
  assert any(line.endswith(told) for line in lines)
