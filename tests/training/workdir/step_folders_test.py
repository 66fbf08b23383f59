"""A step's folder is what its name and its record say, or it is not used."""

import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import toy_run
from training.workdir import restoring
from training.workdir import run_config
from training.workdir import step_folders


@pytest.fixture(name='run', scope='module')
def _run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  return workdir, toy_run.run(workdir)


@pytest.fixture(name='copy')
def _copy(run, tmp_path):
  shutil.copytree(run[0], tmp_path / 'run')
  return tmp_path / 'run'


@pytest.mark.parametrize('name, step', [
    ('0', 0), ('20', 20), ('2147483647', 2**31 - 1), ('2147483648', None),
    ('0020', None), ('\u00b2', None), ('2\u0660', None), ('\u0662', None),
    ('-1', None), ('+1', None), ('1_0', None), (' 1', None), ('1\n', None),
    ('', None), ('20.aside', None), ('9' * 200, None)])
def test_the_name_of_a_step(name, step):
  assert step_folders.number(name) == step


@pytest.mark.parametrize('change', [shutil.move, shutil.copytree])
@pytest.mark.parametrize('new', [25, 35])
def test_a_folder_under_another_number_is_passed_over(
    run, copy, change, new):
  """Renamed or copied: of a run that says it goes on from step 35, the steps
  to 35 must have been trained."""
  folder = copy / 'checkpoints'
  shutil.rmtree(folder / '30')
  change(folder / '20', folder / str(new))
  good = 10 if change is shutil.move else 20
  with toy_run.open_store(copy) as store:
    restored = store.restore(toy_run.abstract(4, 2))
    assert restored.step == int(restored.state['step']) == good
    assert f'checkpoint {new} in ' in restored.damaged[0]
    assert 'it holds step 20' in restored.damaged[0]
    toy_run.assert_bitwise(restored.state, run[1][good])
  assert (folder / f'{new}.aside').exists()


def test_nor_is_it_read_by_number_or_for_its_parameters(copy):
  folder = copy / 'checkpoints'
  shutil.move(folder / '30', folder / '35')
  abstract = {'params': toy_run.abstract(1, 1)['params']}
  with pytest.raises(RuntimeError, match='35 .*holds step 30.* also 10, 20'):
    restoring.restore(folder, abstract, 35, partial=True)
  assert restoring.restore(folder, abstract, partial=True).step == 20


def test_other_names_are_left_alone_and_said(copy):
  """By us and by Orbax, which would take some of them for a step."""
  folder = copy / 'checkpoints'
  shutil.move(folder / '30', folder / '0030')
  others = ['\u00b2', '3\u0660', 'notes']
  for name in others:
    (folder / name).mkdir()
  with toy_run.open_store(copy, keep=2) as store:
    restored = store.restore(toy_run.abstract(1, 1))
    assert restored.step == 20
    assert [sentence.split()[0] for sentence in restored.damaged] == [
        "'0030'", "'3\u0660'", "'\u00b2'"]
    for step in (21, 30):
      toy_run.save(store, step, restored.state)
    store.wait()
  left = {path.name for path in folder.iterdir()}
  assert left == {'21', '30', '0030', *others}


def test_a_config_that_was_lost_is_asked_for(copy):
  """Else the run would go on with whatever config it is given."""
  assert run_config.has_begun(copy)
  with pytest.raises(ValueError, match='config.json is missing, although'):
    run_config.load_config(copy)


_READ = '''
    import sys
    import jax
    from tests.training.workdir import step_folders_test as here
    from training.workdir import restoring
    restored = restoring.restore(
        restoring.directory(sys.argv[1]), here.many(jax.ShapeDtypeStruct))
    print(restored.step, len(restored.damaged))
    '''


def many(make):
  """A state of so many arrays that reads are under way when one fails."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return {str(i): make((64, 64), jnp.float32, sharding=place)
          for i in range(100)}


@pytest.mark.slow
def test_damage_prints_no_tracebacks(tmp_path):
  """Orbax closes its event loop under the reads that still run, and each said
  so by sys.excepthook, which ends a process of several."""
  state = many(lambda shape, dtype, sharding: jax.device_put(
      jnp.ones(shape, dtype), sharding))
  with toy_run.open_store(tmp_path) as store:
    for step in (10, 20):
      toy_run.save(store, step, state)
  path = tmp_path / 'checkpoints/20/state/manifest.ocdbt'
  toy_run.flip(path, path.stat().st_size // 2)
  result = subprocess.run(
      [sys.executable, '-c', textwrap.dedent(_READ), tmp_path], text=True,
      capture_output=True, check=True)
  assert (result.stdout.split(), result.stderr) == (['10', '1'], '')
