"""The tool that kills and reshapes a run: what it says of a sound one, and of
one that differs."""

import json
import shutil

import pytest

from tests import train_test
from tests.helpers import forked
from tools.verify_resume import runs

texts = train_test.texts
pytestmark = pytest.mark.slow


def verify(*words, code=0):
  result = forked.run('-m', 'tools.verify_resume', *words, timeout=560)
  assert result.returncode == code, result.stdout + result.stderr
  return result


@pytest.fixture(scope='module')
def done(tmp_path_factory, texts):
  """(folder, findings, output) of a run that resumes."""
  folder = tmp_path_factory.mktemp('verify_resume')
  small = [f for f in train_test.SMALL if not f.startswith((
      '--config.mesh', '--config.checkpoint', '--config.log', '--config.eval.'
      'every_steps', '--config.train.steps'))]
  result = verify(
      '--config', 'configs/gpt.py', *small, texts, '--steps=7', '--devices=2',
      '--processes=2',
      '--config.model.dropout', '0.1', f'--folder={folder}',
      f'--json={folder}/found.json')
  return folder, json.loads((folder / 'found.json').read_text()), result.stdout


# Of a run that is killed and resumed, train_test.py has the laws; these are of
# the tool that shows them.
@pytest.mark.long
def test_a_sound_run_resumes(done):
  folder, found, output = done
  assert found['resumes'] and found['killed_after'] == 3
  assert found['devices'] == found['processes'] == 2
  assert (folder / 'reshaped-0/logs/process-1.log').exists()
  same, other = found['comparisons']
  assert same['ok'] and same['mesh'] == 'data=2'
  assert '7 losses and' in same['found']
  assert other['ok'] and other['mesh'] == 'fsdp=2'
  assert other['largest_difference'] <= 1e-5
  assert output.strip().endswith('it resumes')
  # It was killed for real, before its end, and went on where it was.
  steps = [row['step'] for row in train_test.rows(folder / 'killed')]
  assert steps == [1, 2, 3, 4, 5, 6, 7]
  # Half-way is kept, though a later checkpoint lies before the end.
  assert {p.name for p in (folder / 'reshaped-0/checkpoints').iterdir()} >= {
      '3', '6', '7'}


@pytest.mark.long
def test_what_differs_is_named(done, tmp_path):
  folder, _, _ = done
  copy = tmp_path / 'killed'
  shutil.copytree(folder / 'killed', copy)
  lines = (copy / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  rows[4]['loss'] *= 1 + 1e-6
  (copy / 'metrics.jsonl').write_text(
      '\n'.join(json.dumps(row) for row in rows) + '\n')
  mesh = dict(data=2)
  row = runs.bits(mesh, folder / 'whole', copy, 7)
  assert not row['ok'] and row['differing'] == ['loss of step 5']
  # Another state: that of half-way.
  shutil.rmtree(copy / 'checkpoints/7')
  shutil.copytree(folder / 'whole/checkpoints/3', copy / 'checkpoints/7')
  row = runs.bits(mesh, folder / 'whole', copy, 7)
  assert any('params' in name for name in row['differing'])
  assert runs.numbers(mesh, folder / 'whole', copy, 3, 7, 1e-5)['ok']
  assert not runs.numbers(mesh, folder / 'whole', copy, 3, 7, 1e-7)['ok']


def test_nothing_is_not_the_same(tmp_path, monkeypatch):
  """No arrays, other names, or losses that are not finite: no proof."""
  saved = {'one': {}, 'two': {}}
  monkeypatch.setattr(runs.restoring, 'arrays',
                      lambda folder, step: saved[folder.parent.name])
  folders = [tmp_path / name for name in saved]
  def differing(losses=(1.0, 2.0), **arrays):
    for name, folder in zip(saved, folders):
      folder.mkdir(exist_ok=True)
      saved[name] = {n: dict(checksum=1) for n in arrays.get(name, 'w')}
      (folder / 'metrics.jsonl').write_text('\n'.join(json.dumps(dict(
          step=i + 1, split='train', loss=x)) for i, x in enumerate(losses)))
    return runs.bits({}, *folders, 2)['differing']
  assert differing() == []
  assert differing(one='', two='') == ['no array is saved in step 2']
  assert differing(two='') == ['w'] and differing(two='wx') == ['x']
  assert differing(losses=(1.0, None)) == ['loss of step 2']
  assert differing(losses=(1.0,)) == ['loss of step 2']


@pytest.mark.parametrize('words, parts', [
    (['--config=configs/gpt.py', '--steps=2'], ['--steps is 2']),
    (['--config=configs/gpt.py', '--devices=1'], ['no other mesh of 1 device']),
    (['--config=configs/gpt.py', '--processes=3'], ['--processes is 3']),
    (['--config=configs/gpt.py', '--mesh=tensor=4', '--config.model.num_heads'
      '=2'], ['mesh.tensor is 4, which does not divide model.num_heads 2']),
    (['--config=configs/gpt.py', '--config.mesh.tensor=4', '--mesh=data=4',
      '--config.data.batch_ramp=2:2'], ['batches of 2 rows']),
    (['--config=configs/gpt.py', '--mesh=context=4', '--config.data.length=30'],
     ['mesh.context is 4, which does not divide data.length 30']),
    (['--config=configs/gpt.py', '--config.train.steps=3'],
     ['--config.train.steps=3 sets', 'itself: pass --steps']),
    (['--config=configs/gpt.py', '--config.log.tensorboard'],
     ['--config.log.tensorboard sets', 'itself: leave it out']),
])
def test_what_cannot_be_verified_is_refused(words, parts):
  result = verify(*words, code=2)
  assert all(part in result.stderr for part in parts), result.stderr
  assert not result.stdout  # before the first training


def test_a_mesh_of_unknown_axes_is_refused():
  with pytest.raises(ValueError, match="'date=2': choose sizes for data"):
    runs.parse('date=2', 2)
  assert runs.parse('fsdp=-1', 2)['fsdp'] == 2
