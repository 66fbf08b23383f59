"""The list of the tools; and folders that are not a tool's own are refused
before it does any work."""

import pytest

from common.errors import RequestError
from tests.helpers import forked
from tools import tokenize
from tools.compare import layout


def test_the_tools_are_listed():
  lines = forked.run('-m', 'tools').stdout.splitlines()
  names = [line.split()[2].removeprefix('tools.') for line in lines]
  assert names == ('batches chat compare convert coord_check count curves '
                   'explain_sharding launch lm_eval package_text plan probes '
                   'study sweep tokenize tokenizer'
                   ).split()
  assert all(line.endswith('.') for line in lines), lines
  refused = forked.run('-m', 'tools', 'cuont')
  assert refused.returncode == 2 and 'count' in refused.stderr


def _refused(enter, folder) -> str:
  try:
    enter(folder)
    return ''
  except RequestError as error:
    return str(error)


@pytest.mark.parametrize('enter, file', [
    (layout.check_workdir, 'sweep.json'),
    (lambda folder: tokenize.main(['none:', '--out', str(folder)]),
     'begun.json')], ids=['sweep', 'tokenize'])
def test_the_folder_of_a_run_is_refused(enter, file, tmp_path):
  message = 'holds a training run: choose another folder'
  (tmp_path / 'config.json').touch()
  assert message not in _refused(enter, tmp_path)  # of no run, or not yet
  (tmp_path / 'checkpoints').mkdir()
  assert message in _refused(enter, tmp_path)
  assert len(list(tmp_path.iterdir())) == 2
  (tmp_path / file).touch()  # what was there before goes on
  assert message not in _refused(enter, tmp_path)


def test_the_folder_of_a_run_is_refused_by_probes(tmp_path):
  (tmp_path / 'config.json').touch()
  (tmp_path / 'checkpoints').mkdir()
  result = forked.run('-m', 'tools.probes', 'run', 'configs/gpt.py',
                      f'--workdir={tmp_path}')
  assert result.returncode == 2 and 'holds a training run' in result.stderr
  assert len(list(tmp_path.iterdir())) == 2
