"""What setup.cfg declares is what is imported, and what the locks pin."""

import ast
import configparser
import pathlib
import re
import subprocess
import sys

from packaging.requirements import Requirement
import pytest

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


def test_no_python_is_a_sentence(tmp_path):
  result = _make_venv('no-such-python', tmp_path / 'venv')
  assert result.returncode == 2
  assert "error: there is no 'no-such-python' here" in result.stderr
  assert 'make train PYTHON=' in result.stderr
