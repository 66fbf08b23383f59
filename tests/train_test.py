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
  """Returns the words that train in a workdir; flags go before SMALL's."""
  last = {flag.partition('=')[0]: flag for flag in (*SMALL, *flags)}
  return [sys.executable, 'train.py', '--config', config,
          f'--workdir={workdir}', texts, *last.values()]


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
@pytest.mark.long
@pytest.mark.parametrize('seed', range(3))
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


# Systems of which config.json lacks fields, as their models do not read them.
_PARTLY_READ = {
    'llama': ['--config.model.num_layers=1'],
    'qwen3_moe': ['--config.model.num_layers=1',
                  '--config.model.moe.num_experts=4',
                  '--config.model.moe.top_k=2'],
    'bert': [f'--config.{flag}' for flag in (
        'objective=classification', 'data.length_buckets=1',
        'data.batch_ramp=4:4')]}
_ENDS_EARLY = [f'--config.{flag}' for flag in (
    'mesh.data=1', 'mesh.fsdp=1', 'optim.lr=1e-2', 'checkpoint.every_steps=2',
    'checkpoint.keep=9', 'eval.every_steps=2', 'eval.best=loss',
    'eval.best_is=largest', 'eval.patience=3')]


@pytest.mark.slow
@pytest.mark.parametrize('system', [
    'llama', pytest.param('qwen3_moe', marks=pytest.mark.long),
    pytest.param('bert', marks=pytest.mark.long)])
def test_a_killed_run_records_what_it_would_have_without(
    system, texts, tmp_path, monkeypatch):
  """Its loss falls, so that the largest is the first: it waits for a better
  one, and is killed meanwhile."""
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'].replace(
      'device_count=8', 'device_count=1'))
  if system == 'bert':
    labelled = tmp_path / 'labelled.csv'
    labelled.write_text('it is,good\n' * 30 + 'it was,bad\n')
    texts = f'--config.data.source=labelled:{labelled}'
  whole, broken = [
      command(tmp_path / name, texts, *_ENDS_EARLY, *_PARTLY_READ[system],
              config=f'configs/{system}.py:tiny')
      for name in ('whole', 'broken')]
  said = run(whole).stdout
  killed = [sys.executable, '-m', 'tests.helpers.killed_run', '6']
  run([*killed, *broken[2:]], -signal.SIGKILL)
  assert max(losses(tmp_path / 'broken')) in (6, 7)
  went_on = run(broken).stdout
  assert 'going on from step 6' in went_on
  ending = [line for line in said.splitlines() if 'ended early' in line]
  assert ending and ending[0] in went_on
  records = _records(tmp_path / 'whole')
  assert records == _records(tmp_path / 'broken')
  assert _without_times(tmp_path / 'whole') == _without_times(
      tmp_path / 'broken')
  # And what is recorded is so.
  assert [record['step'] for record in records] == [2, 4, 6, 8]
  for record in records:
    rows_read = 8 * record['step']
    if system == 'bert':  # its ramp: half as many in each of four steps
      rows_read -= 4 * min(record['step'], 4)
    assert record['tokens'] == 16 * rows_read
    best = record['best']
    assert (best['step'], best['waited']) == (2, record['step'] // 2 - 1)


def _records(workdir) -> list[dict]:
  """The records of all checkpoints, the config and the sums of all arrays
  among them."""
  files = sorted((workdir / 'checkpoints').glob('*/record/metadata'))
  return [json.loads(file.read_text())['record'] for file in files]


def _without_times(workdir) -> list[dict]:
  """The rows of metrics.jsonl, without what another run measures otherwise."""
  return [{name: value for name, value in row.items()
           if 'second' not in name and name not in ('time', 'mfu')}
          for row in rows(workdir)]


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
