"""The configs that the pages' commands ask for are ones that a run takes, and
their learning rates get as high as they say."""

import re

from absl import flags
from ml_collections import config_flags
import pytest

from configs.errors import RequestError
from tests.docs import prose_test as prose
from training import cli, runs
from training.data import sources


# Of a run that begins with weights: full sizes have those of pretraining.
MOST_STEPS = 100_000
# Parts that a tutorial adds to the project.
ADDED = ('--config.model.ffn=bilinear',)


def _configs(page):
  """Yields (command, words) of the commands that name a config and a size,
  with the words that say so."""
  for command in prose._page_commands(page):
    target, rest = prose._program(prose._words(command))
    words = []
    for i, word in enumerate(rest):
      if word == '--config':
        words.append(f'--config={rest[i + 1]}')
      elif word.startswith(('--config', '--noconfig')):
        words.append(word)
    file = re.match(r'--config=configs/(?!sweeps|studies)(.*)', ' '.join(
        words[:1]))
    if target and file and not prose.PLACEHOLDER.search(file[1]) and (
        not set(words) & set(ADDED)):
      yield command, target, words


def _parsed(words, monkeypatch):
  values, spelt = flags.FlagValues(), [cli._spelt(word) for word in words]
  monkeypatch.setattr(cli, '_words_of_config', spelt)
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=spelt)
  values['config'].parser = cli._ConfigFile('config')
  values(['program', *spelt])
  return values.config, tuple(values['config'].override_values)


@pytest.mark.filterwarnings('ignore:the load_module')  # of ml_collections
@pytest.mark.parametrize('page', prose.PAGES, ids=prose._name)
def test_a_run_takes_what_a_page_asks_for(page, monkeypatch):
  told, wrong = ' '.join(page.read_text().split()), []
  for command, target, words in _configs(page):
    try:
      config, by_hand = _parsed(words, monkeypatch)
      runs.check_config(config, by_hand)
    except (RequestError, ValueError, flags.Error) as error:
      if ' '.join(str(error).split())[:60] not in told:  # the page shows it
        wrong.append(f'{command}\n  {error}')
      continue
    if target == 'train.py' and config.optim.warmup_steps >= config.train.steps:
      wrong.append(f'{command}\n  warm-up {config.optim.warmup_steps} of '
                   f'{config.train.steps} steps')
    if config.init_from and config.train.steps > MOST_STEPS:
      wrong.append(f'{command}\n  {config.train.steps} steps of fine-tuning')
  assert not wrong, '\n'.join(wrong)


def test_the_page_on_data_has_each_kind_of_source():
  text = (prose.ROOT / 'docs/howto/own_data.md').read_text()
  rows = re.findall(r'^\| `([^`]+)` \|', text, re.M)
  assert sorted(rows[1:]) == sorted(sources.USAGE.values())
