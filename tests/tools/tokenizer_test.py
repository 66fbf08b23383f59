"""tools.tokenizer: what cannot be trained on or counted is refused. What it
trains is tested with the tokenizers (tests/training/data)."""

import pytest

from common.errors import RequestError
from tools import tokenizer as tool


@pytest.mark.parametrize('words, message', [
    ('train --vocab_size 100 --out x.json', 'vocab_size=100 is too small'),
    ('train --vocab_size 300 --out x.txt', 'must end in .json'),
    ('train --vocab_size 300 --out x.json --source probe:mqar',
     'holds rows of a probe, and no text')])
def test_what_cannot_be_done_is_refused(words, message, tmp_path, monkeypatch):
  for i in range(3):
    (tmp_path / f'{i}.txt').write_text(f'Text {i}, of a few words.\n')
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  source = [] if '--source' in words else ['--source', f'text:{tmp_path}/*.txt']
  with pytest.raises(RequestError, match=message):
    tool.main([*words.format(tmp_path).split(), *source])
  assert not list((tmp_path / 'here').iterdir())
