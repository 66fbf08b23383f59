"""What setup.cfg declares is what is imported, and what the locks pin."""

import ast
import configparser
import json
import pathlib
import os
import re
import shutil
import subprocess
import sys

from packaging.requirements import Requirement
import pytest

from common.errors import RequestError
from training import plugins

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ('architectures', 'benchmarks', 'common', 'configs', 'tools',
         'training')
# What is imported under another name than it is installed by.
DISTRIBUTION = {
    'PIL': 'pillow', 'absl': 'absl-py', 'orbax': 'orbax-checkpoint',
    'yaml': 'PyYAML', 'fsspec': 'gcsfs', 'griffe': 'griffelib',
    'ml_dtypes': 'jax', 'jaxlib': 'jax',
    'huggingface_hub': 'transformers', 'sklearn': 'scikit-learn',
    'markupsafe': 'jinja2'}
# Chosen by machine or by the release of jax or fsspec, or for developers alone,
# or at odds with what others pin, so left to their ranges.
UNPINNED_EXTRAS = {'tpu', 'cuda', 'cuda13', 'gcs', 'mutants', 'trackio'}


def _setup():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  return setup


def _requirements(lines):
  return [Requirement(line) for line in lines.strip().splitlines()
          if not line.startswith('#')]


def _declared():
  """Returns {extra, '' for all: requirements}."""
  setup = _setup()
  extras = {extra: _requirements(lines)
            for extra, lines in setup['options.extras_require'].items()}
  return {'': _requirements(setup['options']['install_requires']), **extras}


def _key(name):
  return re.sub(r'[-_.]+', '-', name).lower()


def _third_party(path):
  ours = {*ROOMS, 'archetype', 'train', 'eval', 'tests'}
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module]
    for name in names:
      top = name.split('.')[0]
      if top not in ours and top not in sys.stdlib_module_names:
        yield top


def _sources(*rooms):
  return [path for room in rooms for path in ROOT.glob(f'{room}/**/*.py')]


def test_what_is_imported_is_declared():
  declared = {_key(r.name) for rs in _declared().values() for r in rs}
  wrong = {
      f'{path.relative_to(ROOT)} imports {name}'
      for path in [*ROOT.glob('*.py'), *_sources(*ROOMS, 'tests')]
      for name in _third_party(path)
      if _key(DISTRIBUTION.get(name, name)) not in declared}
  assert not wrong, '\n'.join(sorted(wrong))


@pytest.mark.parametrize('lock, python', [
    ('py311.txt', '3.11'), ('py312.txt', '3.12')])
def test_a_lock_pins_what_is_declared(lock, python):
  pins = {}
  for line in (ROOT / 'requirements' / lock).read_text().splitlines():
    if not line.startswith('#'):
      name, version = line.split('==')
      pins[_key(name)] = version
  assert not any('+' in version for version in pins.values())
  for extra, requirements in _declared().items():
    for requirement in requirements:
      if extra in UNPINNED_EXTRAS or requirement.name == 'torch':
        continue
      if requirement.marker and not requirement.marker.evaluate(
          {'python_version': python}):
        continue
      version = pins[_key(requirement.name)]
      assert requirement.specifier.contains(version), (extra, requirement)


@pytest.mark.parametrize('room', ROOMS)
def test_every_folder_of_a_room_is_a_package(room):
  for path in _sources(room):
    assert (path.parent / '__init__.py').exists(), path.parent


def _make_venv(python, directory, **environment):
  return subprocess.run(
      ['sh', ROOT / 'requirements/venv.sh', python, directory, 'train'],
      env={'PATH': '/usr/bin:/bin', **environment}, capture_output=True,
      text=True)


def test_the_newest_python_that_has_venv_is_taken(tmp_path):
  def newest(**code_of_python):
    for name, code in code_of_python.items():
      file = tmp_path / name.replace('_', '.')
      file.write_text(f'#!/bin/sh\nexit {code}\n')
      file.chmod(0o755)
    return subprocess.run(
        ['/bin/sh', ROOT / 'requirements/newest.sh'],
        env={'PATH': str(tmp_path)}, capture_output=True, text=True).stdout

  assert newest() == 'python3\n'
  assert newest(python3_13=1, python3_11=0) == 'python3.11\n'
  assert newest(python3_12=0) == 'python3.12\n'
  assert newest(python3_13=0) == 'python3.13\n'


def test_no_python_is_a_sentence(tmp_path):
  result = _make_venv('no-such-python', tmp_path / 'venv')
  assert result.returncode == 2
  assert "error: there is no 'no-such-python' here" in result.stderr
  assert 'make train PYTHON=' in result.stderr


ELSEWHERE = """
import archetype
model = archetype.build('gpt:tiny', d_model=32, num_layers=1)
print(archetype.__file__, archetype.load('run').config == model.config)
"""


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The folder where the wheel alone is installed, of a copy of the project
  that is deleted again."""
  copy = tmp_path_factory.mktemp('wheel') / 'copy'
  site = copy.with_name('site')
  for path in ROOT.iterdir():
    if path.name in ROOMS:
      shutil.copytree(path, copy / path.name)
    elif path.is_file() and path.suffix in ('.py', '.cfg', '.toml', '.md', ''):
      shutil.copy(path, copy / path.name)
  install = subprocess.run(
      [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps',
       '--no-build-isolation', f'--target={site}', copy],
      capture_output=True, text=True)
  assert install.returncode == 0, install.stderr
  shutil.rmtree(copy)
  return site


@pytest.fixture
def python_elsewhere(site, tmp_path):
  """A function that runs Python with the wheel, from an empty folder or `cwd`,
  and returns what is printed."""
  def run(*words, cwd=tmp_path):
    result = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {'PYTHONPATH': str(site)})
    assert result.returncode == 0, result.stderr
    return result.stdout

  return run


@pytest.mark.long
def test_a_wheel_trains_from_another_folder(site, python_elsewhere, tmp_path):
  (tmp_path / 'text.txt').write_text('a text to read\n' * 200)
  python_elsewhere(
      '-m', 'train', '--config=gpt:tiny', '--workdir=run',
      *(f'--config.{field}' for field in (
          'model.d_model=32', 'model.num_layers=1', 'train.steps=2',
          'data.source=text:text.txt', 'data.cache_dir=cache',
          'data.length=16', 'data.batch_size=8', 'checkpoint.every_steps=2',
          'eval.every_steps=0')))
  printed = python_elsewhere('-c', ELSEWHERE)
  assert printed.split() == [f'{site}/archetype.py', 'True']


@pytest.mark.long
def test_the_command_takes_its_own_modules(site, python_elsewhere, tmp_path):
  """The user's folders have the names of the project's."""
  for name in ('architectures', 'common', 'configs', 'tools', 'training'):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / '__init__.py').write_text(
        'raise ImportError("not this")')
  (tmp_path / 'train.py').write_text('raise ImportError("not this")')
  command = site / 'bin' / 'archetype'
  assert python_elsewhere(command).startswith('python -m tools.batches')
  assert 'parameters' in python_elsewhere(command, 'count', '--config=gpt:tiny')
  assert '"d_model"' in python_elsewhere(
      command, 'train', '--config=gpt:tiny', '--print_config')


@pytest.mark.long
@pytest.mark.parametrize('notebook', sorted(ROOT.glob('docs/**/*.ipynb')),
                         ids=lambda path: path.stem)
def test_a_notebook_runs_from_an_empty_folder(notebook, python_elsewhere):
  pytest.importorskip('treescope', reason='no treescope')
  cells = json.loads(notebook.read_text())['cells']
  code = '\n'.join(''.join(cell['source']) for cell in cells
                   if cell['cell_type'] == 'code')
  python_elsewhere('-c', code)


@pytest.mark.parametrize('name, meant', [
    ('gpt', 'gpt.py'), ('configs/gpt.py', 'gpt.py'), ('gpt.py', 'gpt.py'),
    ('sweeps/lr', 'sweeps/lr.py'), ('lr', 'sweeps/lr.py')])
def test_a_file_of_configs_is_named_from_any_folder(
    name, meant, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  places = ('sweeps', 'studies') if 'lr' in name else ('',)
  path = plugins.find_config_file(name, '--config', places)
  assert path == str(ROOT / 'configs' / meant)
  # A file of the user goes first.
  mine = tmp_path / name
  mine.parent.mkdir(exist_ok=True)
  mine.write_text('')
  assert plugins.find_config_file(name, '--config', places) == name


def test_an_unknown_config_is_answered_by_the_nearest_names():
  with pytest.raises(RequestError, match='Did you mean gpt or gpt4\\?$'):
    plugins.find_config_file('gptt', '--config')
  with pytest.raises(RequestError, match='sweeps/parts or studies/parts'):
    plugins.find_config_file('parts', 'file', ('sweeps', 'studies'))
