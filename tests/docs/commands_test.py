"""The configs that the pages' commands ask for are ones that a run takes, and
their learning rates get as high as they say."""

from absl import flags
from ml_collections import config_flags
import pytest

from configs.errors import RequestError
from tests.docs import prose_test as prose
from training import cli, runs


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
    named = words and words[0].startswith('--config=configs/')
    if target and named and not any(
        prose.PLACEHOLDER.search(word.partition('=')[2]) for word in words[:1]
    ) and not words[0].startswith(('--config=configs/sweeps',
                                   '--config=configs/studies')):
      yield command, target, words


def _parsed(words, monkeypatch):
  values, spelt = flags.FlagValues(), [cli._spelt(word) for word in words]
  monkeypatch.setattr(cli, '_words_of_config', spelt)
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=spelt)
  values['config'].parser = cli._ConfigFile('config')
  values(['program', *spelt])
  return values.config, tuple(values['config'].override_values)


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
    if target == 'train.py' and config.init_from and (
        'train.steps' not in by_hand):
      wrong.append(f'{command}\n  {config.train.steps} steps, as in pretraining')
  assert not wrong, '\n'.join(wrong)
