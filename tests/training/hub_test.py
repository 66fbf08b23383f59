"""hf://ORG/NAME: what huggingface_hub's cache holds is read without a network,
an export is uploaded, and what goes wrong is said. And an export's card."""

import shutil
import sys

import huggingface_hub
from huggingface_hub import constants
import jax
import numpy as np
import pytest

import archetype
from common.errors import EnvironmentFailure, RequestError
from tests.helpers import sweep_folder
from tests.training import chat_test
from tools import convert
from tools.compare import comparison, layout, page
from training import chat, hub, parameters
from training.data import conversations, tokenizers
from training.hf import card
from training.workdir import run_config

NAME = 'hf://org/tiny'


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """The folder that the cache of huggingface_hub, offline, has of org/tiny."""
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  repo = tmp_path / 'hub/models--org--tiny'
  folder = repo / 'snapshots' / ('a' * 40)
  folder.mkdir(parents=True)
  (repo / 'refs').mkdir()
  (repo / 'refs/main').write_text(folder.name)
  return chat_test.save(folder)


def test_what_the_cache_holds_is_read(cache, tmp_path):
  ours, theirs = archetype.load(cache), archetype.load(NAME)
  jax.tree.map(np.testing.assert_array_equal, theirs.params, ours.params)
  assert theirs.encode('a').tolist() == ours.encode('a').tolist()
  assert tokenizers.load(NAME).name == str(cache)
  assert conversations.read_template_text(NAME)[1] == chat_test.OF_FOLDER
  assert hub.download_if_on_hub(f'{NAME}@{"a" * 40}') == str(cache)
  parameters.check_init_from(NAME)


@pytest.mark.slow
def test_a_run_is_made_of_it_and_exported(cache, tmp_path, monkeypatch):
  run_main(monkeypatch, 'import', NAME, str(tmp_path / 'run'))
  imported = chat.load_from_run(tmp_path / 'run')
  assert imported.talk.encode(chat_test.ASK).tolist() == [1, 18, 2]
  calls, kept = [], {}

  class Api:  # of huggingface_hub.HfApi, with the arguments of the real one
    def whoami(self):
      calls.append('whoami')

    def create_repo(self, repo_id, *, private, exist_ok):
      calls.append(('create', repo_id, private, exist_ok))

    def file_exists(self, repo_id, filename):
      return filename in kept

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
      calls.append((repo_id, ignore_patterns))
      shutil.copytree(folder_path, tmp_path / 'out', dirs_exist_ok=True)
  monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
  run_main(monkeypatch, 'export', str(tmp_path / 'run'), NAME)
  assert calls == ['whoami', ('create', 'org/tiny', True, True),
                   ('org/tiny', [])]
  jax.tree.map(np.testing.assert_array_equal, archetype.load(
      tmp_path / 'out').params, archetype.load(cache).params)
  assert 'evaluated nothing' in (tmp_path / 'out/README.md').read_text()
  kept['README.md'] = 'with a licence'
  run_main(monkeypatch, 'export', str(tmp_path / 'run'), NAME)
  assert calls[-1] == ('org/tiny', ['README.md'])


def run_main(monkeypatch, *words):
  monkeypatch.setattr(sys, 'argv', ['convert', *words])
  convert.main()


def test_what_goes_wrong_is_said(cache, monkeypatch):
  for name, kind, words in (
      ('hf://org/other', EnvironmentFailure, 'hub did not do what hf://org'),
      ('hf://a b/c', RequestError, 'hub refuses hf://a b/c')):
    with pytest.raises(kind, match=words):
      hub.download_if_on_hub(name)
  for token, kind in (None, RequestError), ('hf_x', EnvironmentFailure):
    monkeypatch.setattr(huggingface_hub.hf_api, 'get_token',
                        lambda token=token: token)
    with pytest.raises(kind), hub.open_destination(NAME):
      pytest.fail('the work was done before the hub was asked')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(RequestError, match='pip install huggingface_hub'):
    parameters.check_init_from(NAME)
  assert hub.download_if_on_hub('models/a') == 'models/a'


def test_the_card_of_a_run_of_a_sweep(tmp_path):
  sweep_folder.write(tmp_path, sweep_folder.POINTS)
  c = comparison.load_comparison(tmp_path)
  run, out = layout.run_folder(tmp_path, 'better', 0), tmp_path / 'out'
  out.mkdir()
  (tmp_path / 'report').mkdir()
  (tmp_path / 'report/results.csv').write_text(page.sheet(c.estimates))
  config = run_config.load_config(run)
  card.write_model_card(run, config, out, sweep_folder.STEPS, 50_000)
  written = huggingface_hub.ModelCard.load(out / 'README.md')
  assert written.data.library_name == 'transformers'
  assert written.data.license is None and 'gpt' in written.data.tags
  loss = sweep_folder.loss(sweep_folder.STEPS, 0.8) + 0.012
  assert f'| loss | {loss:.6g} |' in written.text
  assert '--config.model.norm=rmsnorm' in written.text
  verdict = next(x for x in c.verdicts() if x['variant'] == 'better')['verdict']
  assert f'| {verdict} |' in written.text and '| worse |' not in written.text
  (out / 'README.md').write_text('edited')
  card.write_model_card(run, config, out, sweep_folder.STEPS, 50_000)
  assert (out / 'README.md').read_text() == 'edited'


@pytest.mark.parametrize('weights', [True, False])
def test_weights_are_downloaded_only_where_they_are_asked_for(
    weights, monkeypatch):
  asked = []
  monkeypatch.setattr(huggingface_hub, 'snapshot_download',
                      lambda name, **words: asked.append((name, words)))
  hub.download_if_on_hub(NAME + '@b', weights=weights)
  (name, words), = asked
  assert (name, words['revision']) == ('org/tiny', 'b')
  patterns = words['allow_patterns']
  assert {*hub.TEXT_FILE_PATTERNS} <= {*patterns}
  assert ({*hub.WEIGHT_FILE_PATTERNS} <= {*patterns}) == weights
