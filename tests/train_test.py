"""The programs as a user runs them: train, stop, kill, resume, evaluate."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
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
    'checkpoint.every_steps=5', 'mesh.data=2', 'mesh.fsdp=4')]


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  for i in range(8):
    (folder / f'{i}.txt').write_text(f'Document {i}. {TEXT}')
  return f'--config.data.source=text:{folder}/*.txt'


def command(workdir, texts, *flags, config='configs/gpt.py'):
  return [sys.executable, 'train.py', '--config', config,
          f'--workdir={workdir}', texts, *SMALL, *flags]


def run(words, code=0):
  """Runs the command of a program; checks its exit code."""
  assert words[0] == sys.executable
  result = forked.run(*words[1:])
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
def test_resume_is_bitwise(straight, texts, tmp_path):
  """20 straight steps = 10 + restart + 10: parameters and optimiser alike."""
  _resumed_is(straight, texts, tmp_path)


def _resumed_is(straight, texts, tmp_path):
  shutil.copytree(straight, tmp_path / 'run')
  for step in (15, 20):
    shutil.rmtree(tmp_path / f'run/checkpoints/{step}')
  result = run(command(tmp_path / 'run', texts))
  assert 'going on from step 10' in result.stdout
  assert state(tmp_path / 'run') == state(straight)
  assert losses(tmp_path / 'run') == losses(straight)


@pytest.mark.slow
def test_resume_on_another_mesh_sees_the_same_batches(straight, texts,
                                                      tmp_path):
  shutil.copytree(straight, tmp_path / 'run')
  for step in (15, 20):
    shutil.rmtree(tmp_path / f'run/checkpoints/{step}')
  result = run(command(tmp_path / 'run', texts, '--config.mesh.data=1',
                       '--config.mesh.fsdp=2', '--config.mesh.tensor=2',
                       '--config.mesh.data=2'))
  assert 'safe' in result.stdout
  new, old = losses(tmp_path / 'run'), losses(straight)
  assert new.keys() == old.keys()
  np.testing.assert_allclose(list(new.values()), list(old.values()), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kind', [
    signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_saves_and_exits_cleanly(kind, straight, texts, tmp_path):
  process = _start(command(tmp_path / 'run', texts,
                           '--config.checkpoint.every_steps=0'))
  _wait_for_step(tmp_path / 'run', 2)
  process.send_signal(signal.SIGSTOP)  # or it may be done before the signal
  process.send_signal(kind)
  process.send_signal(signal.SIGCONT)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, out + err
  assert 'saved: the same command goes on' in out
  [saved] = (tmp_path / 'run/checkpoints').iterdir()
  assert int(saved.name) < 20
  result = run(command(tmp_path / 'run', texts,
                       '--config.checkpoint.every_steps=0'))
  assert f'going on from step {saved.name}' in result.stdout
  assert state(tmp_path / 'run') == state(straight)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [
    0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_kill_at_a_random_moment_then_resume(seed, straight, texts, tmp_path):
  process = _start(command(tmp_path / 'run', texts,
                           '--config.checkpoint.every_steps=1'))
  _wait_for_step(tmp_path / 'run', random.Random(seed).randint(1, 17))
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert max(losses(tmp_path / 'run')) < 20
  result = run(command(tmp_path / 'run', texts,
                       '--config.checkpoint.every_steps=1'))
  assert 'is complete' not in result.stdout
  assert state(tmp_path / 'run') == state(straight)
  assert losses(tmp_path / 'run') == losses(straight)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(straight, texts,
                                                              tmp_path):
  shutil.copytree(straight, tmp_path / 'run')
  files = [f for f in (tmp_path / 'run/checkpoints/20/state').rglob('*')
           if f.is_file() and f.parent.name == 'd']
  largest = max(files, key=lambda f: f.stat().st_size)
  data = bytearray(largest.read_bytes())
  for at in range(0, len(data), 997):  # some of it may have been replaced
    data[at] ^= 0x10
  largest.write_bytes(data)
  result = run(command(tmp_path / 'run', texts))
  assert 'checkpoint 20' in result.stderr and 'damaged' in result.stderr
  assert 'going on from step 15' in result.stdout
  assert state(tmp_path / 'run') == state(straight)


@pytest.mark.long
def test_other_text_is_noticed(straight, texts):
  """And other files that say the same are not."""
  path = pathlib.Path(texts.partition('text:')[2].replace('*', '0'))
  text = path.read_text()
  path.write_text('O' + text[1:])
  result = run(command(straight, texts), code=2)
  assert 'the data have changed' in result.stderr
  assert 'the data have changed' in evaluate(straight, '--tasks=loss').stderr
  path.write_text(text)
  assert 'is complete' in run(command(straight, texts)).stdout
  assert 'changed' not in evaluate(straight, '--tasks=loss').stderr


@pytest.mark.slow
def test_another_config_is_shown_and_needs_a_flag(straight, texts, tmp_path):
  changes = ['--config.optim.lr=0.1', '--config.log.every_steps=2',
             '--config.model.d_model=64']
  result = run(command(straight, texts, *changes), code=2)
  assert 'optim.lr' in result.stderr
  for kind in ('safe', 'changes the optimisation', 'incompatible'):
    assert kind in result.stderr
  shutil.copytree(straight, tmp_path / 'run')
  more = ['--config.train.steps=22', '--allow_config_change']
  assert 'going on from step 20' in run(
      command(tmp_path / 'run', texts, *more)).stdout
  result = run(command(tmp_path / 'run', texts, '--config.train.steps=22',
                       '--config.model.d_model=64', '--allow_config_change'),
               code=2)
  assert 'cannot go on with another model.d_model' in result.stderr
  # And nothing is lost: the old command still goes.
  assert 'is complete' in run(command(tmp_path / 'run', texts, *more)).stdout


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
  greedy = [evaluate(straight, '--temperature=0', '--tasks=samples',
                     '--step=10').stdout for _ in range(2)]
  assert greedy[0] == greedy[1] and 'step 10' in greedy[0]


@pytest.mark.slow
@pytest.mark.parametrize('flags, parts', [
    (['--step=7'], ['7', '10, 15, 20']),
    (['--tasks=los'], ["'los'", 'loss']),
    (['--tasks=samples', '--text=text:*.md'], ['samples would not read']),
    (['--samples=0'], ['--samples=0', 'range [1, 10000]']),
    (['--samples=1', '--prompt=' + 'x' * 40], ['32 positions']),
])
def test_a_wrong_eval_is_one_sentence(straight, flags, parts):
  result = evaluate(straight, *flags, code=2)
  for part in parts:
    assert part in result.stderr, result.stderr


@pytest.mark.long
@pytest.mark.slow
def test_a_signal_ends_an_evaluation_too(texts, tmp_path):
  (tmp_path / 'long.txt').write_text(TEXT * 2000)  # minutes of evaluation
  flags = [f'--config.data.eval_source=text:{tmp_path}/long.txt',
           '--config.data.holdout_every=0', '--config.eval.batches=0',
           '--config.checkpoint.every_steps=0']
  process = _start(command(tmp_path / 'run', texts, *flags))
  _wait_for_step(tmp_path / 'run', 10)
  time.sleep(3)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, out + err
  assert 'stopped after step 10, saved' in out
  assert {r['split'] for r in rows(tmp_path / 'run')} == {'train'}


@pytest.mark.long  # loop_test.py has its law, this the programs around it
def test_a_loss_that_is_not_finite_leaves_the_good_checkpoints(texts, tmp_path):
  """No launcher starts such a run again, and nor does the same command; a
  change of the config does, from where it was."""
  good = ['--config.train.steps=7', '--config.checkpoint.keep=2',
          '--config.checkpoint.every_steps=1', '--config.eval.every_steps=0']
  # So large that the norm of the gradients is infinite.
  bad = ['--config.train.z_loss=1e30', '--config.train.max_bad_steps=5',
         '--config.train.steps=20']
  kept = {path.name for path in _checkpoints(tmp_path, texts, good)}
  assert kept == {'6', '7'}
  launched = subprocess.run(
      [sys.executable, '-m', 'tools.launch', 'local', '--processes=1',
       '--devices=8', '--platform=cpu', '--max_restarts=3',
       *command(tmp_path / 'run', texts, *good, *bad,
                '--allow_config_change')[2:]], cwd=ROOT, text=True,
      capture_output=True)
  assert launched.returncode == 2, launched.stdout + launched.stderr
  assert 'starting it again' not in launched.stderr
  assert 'saved as step 12, beside the last good' in launched.stderr
  folder = tmp_path / 'run/checkpoints'
  assert {path.name for path in folder.iterdir()} == {*kept, '12'}
  again = run(command(tmp_path / 'run', texts, *good, *bad), code=2)
  assert 'ended at step 12' in again.stderr
  assert len(again.stderr.splitlines()) == 1
  assert {path.name for path in folder.iterdir()} == {*kept, '12'}
  run(command(tmp_path / 'run', texts, *good, '--config.train.steps=13',
              '--allow_config_change'))
  assert {path.name for path in folder.iterdir()} == {'7', '13'}


def _checkpoints(tmp_path, texts, flags):
  run(command(tmp_path / 'run', texts, *flags))
  return (tmp_path / 'run/checkpoints').iterdir()


@pytest.mark.slow
def test_a_second_run_in_the_workdir_is_refused(texts, tmp_path):
  with subprocess.Popen(
      [sys.executable, '-c', 'import sys; '
       'from training.workdir import storage; lock = storage.locked('
       'sys.argv[1]); print("held", flush=True); sys.stdin.read()',
       str(tmp_path / 'run')], cwd=ROOT, text=True, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE) as first:
    assert first.stdout.readline() == 'held\n'
    result = run(command(tmp_path / 'run', texts), code=2)
    assert 'another process trains in' in result.stderr
    assert not list((tmp_path / 'run').glob('checkpoints/*'))
    first.kill()
  run(command(tmp_path / 'run', texts, '--config.train.steps=2'))


@pytest.mark.long  # profile_test.py writes one in its own process
def test_a_profile_is_written(texts, tmp_path):
  run(command(tmp_path / 'run', texts, '--profile_steps=2:4',
              '--config.train.steps=5'))
  assert list((tmp_path / 'run/profile').rglob('*.xplane.pb'))


@pytest.mark.long
def test_the_best_of_a_run_is_kept_beside_the_newest(texts, tmp_path):
  """By train.py, which ends early, and says so again, and by eval.py. The
  learning rate is so large that the loss rises again."""
  words = command(tmp_path / 'run', texts, *(f'--config.{flag}' for flag in (
      'eval.best=loss', 'eval.patience=2', 'eval.every_steps=2',
      'checkpoint.keep=1', 'checkpoint.every_steps=0',
      'optim.schedule=constant', 'optim.lr=0.03', 'optim.warmup_steps=0',
      'model.d_model=16')))
  said = run(words).stdout
  evals = {row['step']: row['loss'] for row in rows(tmp_path / 'run')
           if row['split'] == 'eval'}
  end, lowest = max(evals), min(evals, key=evals.get)
  assert end < 20 and end == lowest + 4
  assert f'ended early after step {end}: loss has not been better' in said
  assert sorted(int(path.name) for path in (
      tmp_path / 'run/checkpoints').iterdir()) == [lowest, end]
  assert f'is complete: ended early after step {end}' in run(words).stdout
  assert max(row['step'] for row in rows(tmp_path / 'run')) == end
  assert f'step {lowest}' in evaluate(tmp_path / 'run', '--step=best').stdout


def _start(words):
  return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True,
                          env=os.environ | {'PYTHONUNBUFFERED': '1'})


def _wait_for_step(workdir, step):
  until = time.monotonic() + 200
  while time.monotonic() < until:
    path = workdir / 'metrics.jsonl'
    if path.exists() and path.read_text().count('\n') >= step:
      return
    time.sleep(0.01)
  raise AssertionError(f'no step {step} in time')
