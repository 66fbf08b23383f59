"""What the runs of a sweep owe is done in one process, and compiled once."""

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import architectures
from tests.helpers import sweeps
from tests.helpers.sweeps import states
from tools.compare import check, commands, layout, ledger, run, worker
from training.step import abstract_params
from training.evals import checkpoint
from training.workdir import checkpoints, run_config

# What a group of runs leaves: argv holds their folders.
TRAINED = '''
import pathlib, sys
for folder in map(pathlib.Path, sys.argv[1:]):
  (folder / 'checkpoints/12').mkdir(parents=True)
  (folder / 'metrics.jsonl').write_text(
      '{"step": 12, "split": "train", "loss": 1.0, '
      '"bad_in_row": 0}\\n')
'''
# Evaluates all but a point `bad`, and ends as argv says.
EVALUATED = '''
import json, pathlib, sys
code, tasks, *folders = sys.argv[1:]
for folder in map(pathlib.Path, folders):
  if folder.parent.name == 'bad':
    with (folder / 'log.txt').open('a') as log:
      print('error: this task is not for it', file=log)
  else:
    (folder / 'eval.json').write_text(
        json.dumps(dict.fromkeys(tasks.split(','), 1)))
sys.exit(int(code))
'''


@pytest.fixture
def asked(monkeypatch):
  """Fakes trainings and evaluations; holds the names of what was asked for
  together, and `code`, how that ends."""
  sweeps.fake(monkeypatch)
  told = dict(names=[], code=0)

  def together(workdir, names):
    return ['-c', TRAINED, *(str(layout.run_folder(workdir, *name))
                             for name in names)]

  def evaluate(workdir, names, tasks):
    told['names'].append(names)
    return ['-c', EVALUATED, str(told['code']), ','.join(tasks),
            *(str(layout.run_folder(workdir, *name)) for name in names)]

  monkeypatch.setattr(commands, 'train_together', together)
  monkeypatch.setattr(commands, 'evaluate_together', evaluate)
  return told


def _run(tmp_path, points, code):
  file = sweeps.write(tmp_path, points, tasks=('loss',))
  workdir = tmp_path / 'w'
  assert run.main(sweeps.arguments(
      file, f'--workdir={workdir}', '--vectorised')) == code
  return workdir


@pytest.mark.slow
def test_all_that_is_owed_is_evaluated_in_one_process(asked, tmp_path):
  workdir = _run(tmp_path, "  add('rms', **{'model.norm': 'rmsnorm'})\n", 0)
  assert set(states(workdir).values()) == {'done'}
  names, = asked['names']  # one process, after all trainings
  assert set(names) == set(states(workdir))


@pytest.mark.slow
def test_one_that_cannot_be_evaluated_fails_alone(asked, tmp_path, capsys):
  asked['code'] = worker.UNFINISHED
  workdir = _run(tmp_path, "  add('bad', **{'model.norm': 'rmsnorm'})\n", 1)
  assert states(workdir) == {('base', s): 'done' for s in (0, 1)} | {
      ('bad', s): 'failed' for s in (0, 1)}
  assert len(asked['names']) == 1
  assert 'this task is not for it' in capsys.readouterr().err


@pytest.mark.slow
def test_when_the_process_falls_each_is_evaluated_alone(asked, tmp_path):
  """What it had done is done; the others go on, by eval.py."""
  asked['code'] = 1
  workdir = _run(tmp_path, "  add('bad', **{'model.norm': 'rmsnorm'})\n", 0)
  assert set(states(workdir).values()) == {'done'}
  assert len(asked['names']) == 1
  with ledger.Ledger(workdir) as book:
    assert {r.point for r in book.runs() if r.alone} == {'bad'}


@pytest.mark.long
def test_seeds_of_a_point_compile_once_and_have_their_own_figures(
    tmp_path, monkeypatch):
  workdir = tmp_path / 'w'
  check.save(workdir, check.describe(sweeps.arguments(
      sweeps.write(tmp_path, seeds=3), f'--workdir={workdir}')))
  description, folders = layout.load_description(workdir), []
  for seed in (0, 1):
    config = layout.config(description, 'base', seed)
    folders.append(layout.run_folder(workdir, 'base', seed))
    run_config.save(folders[-1], config)
    with config.unlocked():
      config.model.vocab_size = 384
    shapes = nn.meta.unbox(abstract_params(
        architectures.build(config.model)))
    wave = jnp.sin(jnp.arange(2 ** 14) * (seed + 1.7))
    params = jax.tree.map(
        lambda x, wave=wave: jnp.resize(wave, x.shape), shapes)
    with checkpoints.Checkpoints(folders[-1], every_steps=0, every_minutes=0.0,
                                 keep=1, keep_every=0) as saved:
      saved.save(12, {'params': params}, next_batch=0, tokens=0, config=config)
  folders.append(layout.run_folder(workdir, 'base', 2))  # never trained
  folders[2].mkdir(parents=True)
  compiled, evaluate = [], checkpoint.evaluate

  def counted(*args, programs, **kwargs):
    figures = evaluate(*args, programs=programs, **kwargs)
    compiled.append((len(programs), sum(
        program._cache_size() for program in programs.values())))
    return figures

  monkeypatch.setattr(checkpoint, 'evaluate', counted)
  monkeypatch.setattr(sys, 'argv', [
      'worker', f'--workdir={workdir}', '--evaluate=loss',
      '--runs=base/2,base/0,base/1'])
  assert worker.main() == worker.UNFINISHED
  assert compiled == [(1, 1), (1, 1)]
  losses = [json.loads((f / 'eval.json').read_text())['loss']['loss']
            for f in folders[:2]]
  assert losses[0] != losses[1]
  logs = [(f / 'log.txt').read_text() for f in folders]
  assert 'bits per byte' in logs[0] and 'bits per byte' in logs[1]
  assert str(folders[1]) in logs[1] and str(folders[0]) not in logs[1]
  assert layout.error(folders[2]).startswith(str(folders[2]))
