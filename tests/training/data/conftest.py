"""Fixtures of the tests of shards."""

import json
import random

import pytest

from tests.helpers.shards import text_of, tokenize
from training.data.shards import pages, plan, records


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """Seven files of JSON lines."""
  folder, rng = tmp_path_factory.mktemp('corpus'), random.Random(0)
  for i in range(7):
    lines = [json.dumps({'text': text_of(rng)})
             for _ in range(rng.randint(3, 25))] + ['{"text": "end"}']
    (folder / f'{i}.jsonl').write_text('\n'.join(lines))
  return folder


@pytest.fixture
def small(monkeypatch):
  """Records, pages and shards of a size at which there are many."""
  monkeypatch.setattr(records, 'RECORD_TOKENS', 512)
  monkeypatch.setattr(pages, 'ROWS', 4)
  monkeypatch.setattr(pages, 'PAGE_BYTES', 4 * pages.COLUMNS * 8 + 4)
  real = plan.of
  monkeypatch.setattr(plan, 'of', lambda spec, every, _: real(
      spec, every, 100_000))


@pytest.fixture
def shards(corpus, tmp_path, small):
  assert tokenize(corpus, tmp_path / 'shards') == 0
  return tmp_path / 'shards'
