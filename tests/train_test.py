"""The programs as a user runs them: train, stop, kill, resume, evaluate."""

import json
import os
import pathlib
import random
import signal
import sys
import time

import numpy as np
import pytest

from tests.helpers import forked

ROOT = pathlib.Path(__file__).parents[1]
TEXT = 'It is a law of nature that what is sown is reaped. ' * 40
SMALL = [f'--config.{flag}' for flag in (
    'model.d_model=32', 'model.num_layers=2', 'model.num_heads=2',
    'data.length=16', 'data.batch_size=8', 'data.holdout_every=4',
    'model.max_len=32', 'train.steps=20', 'optim.warmup_steps=2',
    'eval.every_steps=10', 'eval.batches=1', 'log.every_steps=1',
    'checkpoint.every_steps=10', 'mesh.data=2', 'mesh.fsdp=4')]


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  for i in range(8):
    (folder / f'{i}.txt').write_text(f'Document {i}. {TEXT}')
  return f'--config.data.source=text:{folder}/*.txt'


def command(workdir, texts, *flags, config='configs/gpt.py'):
  return [sys.executable, 'train.py', '--config', config,
          f'--workdir={workdir}', texts, *SMALL, *flags]


def run(words, code=0, **options):
  """Runs the command of a program; checks its exit code."""
  assert words[0] == sys.executable
  result = forked.run(*words[1:], **options)
  assert result.returncode == code, result.stdout + result.stderr
  assert 'Traceback' not in result.stderr, result.stderr
  return result


def evaluate(workdir, *flags, code=0):
  return run([sys.executable, 'eval.py', f'--workdir={workdir}', *flags], code)


def rows(workdir):
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def losses(workdir):
  return {r['step']: r['loss'] for r in rows(workdir) if r['split'] == 'train'}


def state(workdir, step=20):
  """The arrays of a checkpoint, as bytes."""
  import orbax.checkpoint as ocp
  folder = pathlib.Path(workdir).absolute() / f'checkpoints/{step}/state'
  tree = ocp.PyTreeCheckpointHandler().restore(folder)
  import jax
  return {jax.tree_util.keystr(k): np.asarray(v).tobytes()
          for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope='module')
def straight(tmp_path_factory, texts):
  """A run of 20 steps without a break."""
  workdir = tmp_path_factory.mktemp('straight') / 'run'
  run(command(workdir, texts))
  return workdir


@pytest.mark.slow
def test_the_loss_falls_and_is_written(straight):
  seen = losses(straight)
  assert sorted(seen) == list(range(1, 21))
  assert seen[20] < seen[1] - 0.3
  evals = [r for r in rows(straight) if r['split'] == 'eval']
  assert [r['step'] for r in evals] == [10, 20]
  assert {'loss', 'perplexity', 'bits_per_byte'} <= evals[0].keys()
  first = rows(straight)[0]
  assert {'grad_norm', 'param_norm', 'learning_rate', 'tokens_per_second',
          'data_seconds', 'compile_seconds'} <= first.keys()
  assert first['mfu'] is None  # no peak is known for this CPU


@pytest.mark.slow
def test_a_complete_run_says_how_to_go_on(straight, texts):
  record = (straight / 'config.json').read_text()
  result = run(command(straight, texts, '--config.optim.lr=1e-2',
                       '--allow_config_change'))
  assert 'is complete: 20 steps of 20' in result.stdout
  assert 'Its config is left as it was' in result.stdout
  assert 'eval.py' in result.stdout and 'train.steps' in result.stdout
  result = run(command(straight, texts, '--config.train.steps=3',
                       '--allow_config_change'), code=2)
  assert 'train.steps is 3, and the run in' in result.stderr
  assert (straight / 'config.json').read_text() == record


@pytest.mark.slow
@pytest.mark.parametrize('kind', [
    signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_saves_and_exits_cleanly(kind, straight, texts, tmp_path):
  words = command(tmp_path / 'run', texts, '--config.checkpoint.every_steps=0')

  def stop(pid):
    _wait_for_step(tmp_path / 'run', 2)
    os.kill(pid, signal.SIGSTOP)  # or it may be done before the signal
    os.kill(pid, kind)
    os.kill(pid, signal.SIGCONT)
  assert 'saved: the same command goes on' in run(words, meanwhile=stop).stdout
  [saved] = (tmp_path / 'run/checkpoints').iterdir()
  assert int(saved.name) < 20
  result = run(words)
  assert f'going on from step {saved.name}' in result.stdout
  assert state(tmp_path / 'run') == state(straight)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [
    0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_kill_at_a_random_moment_then_resume(seed, straight, texts, tmp_path):
  words = command(tmp_path / 'run', texts, '--config.checkpoint.every_steps=3')

  def kill(pid):
    _wait_for_step(tmp_path / 'run', random.Random(seed).randint(1, 17))
    os.kill(pid, signal.SIGKILL)
  run(words, -signal.SIGKILL, meanwhile=kill)
  assert max(losses(tmp_path / 'run')) < 20
  assert 'is complete' not in run(words).stdout
  assert state(tmp_path / 'run') == state(straight)
  assert losses(tmp_path / 'run') == losses(straight)


@pytest.mark.slow
def test_eval_reports_and_samples(straight, texts):
  target = straight / 'eval.json'
  result = evaluate(straight, '--samples=3', '--prompt=It is', '--json',
                    str(target), '--max_new_tokens=8')
  assert 'bits per byte' in result.stdout
  assert result.stdout.count('It is') == 3
  figures = json.loads(target.read_text())
  assert figures['step'] == 20 and len(figures['samples']['samples']) == 3
  assert abs(np.log(figures['loss']['perplexity'])
             - figures['loss']['loss']) < 1e-5
  # The same two documents, named: the figures of one and the same text.
  held_out = texts.partition('=')[2].replace('*', '[04]')
  evaluate(straight, f'--text={held_out}', f'--json={target}')
  named = json.loads(target.read_text())['loss']
  assert named == figures['loss'] | {'text': held_out}
  evaluate(straight, '--temperature=0', '--tasks=samples', '--step=10',
           '--samples=2', f'--json={target}', '--max_new_tokens=8')
  greedy = json.loads(target.read_text())
  one, other = greedy['samples']['samples']
  assert one == other and greedy['step'] == 10


def _wait_for_step(workdir, step):
  until = time.monotonic() + 200
  while time.monotonic() < until:
    path = workdir / 'metrics.jsonl'
    if path.exists() and path.read_text().count('\n') >= step:
      return
    time.sleep(0.01)
  raise TimeoutError(f'no step {step}')
