"""Pairs of texts as RoBERTa was shown them: two separators between them."""


import numpy as np
import pytest
import tokenizers as hf

from tests.helpers import labelled_files as files
from tests.training.data import roberta_files
from training import objectives
from training.data import records, tokenizers

PAIRS = [('an ant', 'ran'), ('a', 'an an an an an an an an an'),
         ('what is an anagram of nap, then?', 'pan'), ('a an a an', 'an a an')]


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory):
  return roberta_files.write(tmp_path_factory.mktemp('roberta'))


def _config(source, folder, objective, arch='roberta', **data):
  config = files.config(source, str(folder), objective, **data)
  config.model.arch = arch
  return config


def _labelled(tmp_path, folder, objective='classification', length=16,
              pairs=True, **changes):
  lines = [f'{a}\t{b}\t{i % 2}\n' if pairs else f'{a}\t{i % 2}\n'
           for i, (a, b) in enumerate(PAIRS)]
  (tmp_path / 'a.tsv').write_text(''.join(lines))
  return _config(f'labelled:{tmp_path}/a.tsv', folder, objective,
                 length=length, **changes)


def _rows(config, view):
  """Returns the tokens of each row, as they are and as a batch has them."""
  row, tokenizer = objectives.of(config), tokenizers.load(config.data.tokenizer)
  for item in view.items:
    whole = files.row(row, item, np.random.default_rng(0), config,
                      tokenizer)
    size = row.length(item)
    assert whole['segment_ids'].tolist() == (
        [1] * size + [0] * (config.data.length - size))
    yield whole, whole['tokens'][:size].tolist()


@pytest.mark.parametrize('objective', ['classification', 'regression'])
@pytest.mark.parametrize('length', [12, 64])
def test_pairs_equal_those_of_the_package_tokenizers(objective, length, folder,
                                                     tmp_path):
  config = _labelled(tmp_path, folder, objective, length)
  view = objectives.of(config).view(files.corpus(config))
  theirs = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  theirs.enable_truncation(length)
  expected = [theirs.encode(*pair).ids for pair in PAIRS]
  assert [ids for _, ids in _rows(config, view)] == expected
  assert view.lengths.tolist() == list(map(len, expected))
  assert view.cut == (3 if length == 12 else 0)
  one = _labelled(tmp_path, folder, objective, length, pairs=False)
  view = objectives.of(one).view(files.corpus(one))
  assert [ids for _, ids in _rows(one, view)] == [
      theirs.encode(text).ids for text, _ in PAIRS]


def test_a_pair_equals_transformers_own(folder, tmp_path):
  """Of its RobertaTokenizer, by the files that it reads itself."""
  transformers = pytest.importorskip('transformers')
  theirs = transformers.RobertaTokenizerFast.from_pretrained(str(folder))
  config = _labelled(tmp_path, folder, length=12)
  view = records.Classes(files.corpus(config))
  for (_, ids), pair in zip(_rows(config, view), PAIRS, strict=True):
    assert ids == theirs(*pair, truncation=True, max_length=12).input_ids
  ours = tokenizers.load(str(folder))
  for kind, i in ours.special_ids.items():
    assert i == getattr(theirs, f'{kind}_token_id'), kind


@pytest.mark.parametrize('arch, given, between', [
    ('roberta', 0, 2), ('roberta', 1, 1), ('bert', 0, 1), ('bert', 2, 2),
    ('modernbert', 0, 1), ('gpt', 0, 1)])
def test_separators_of_each_system(arch, given, between, folder, tmp_path):
  config = _labelled(tmp_path, folder, arch=arch, pair_separators=given)
  assert records.separators(config) == between
  (_, ids), *_ = _rows(config, records.Classes(files.corpus(config)))
  inner = np.array(ids)[1:-1]
  assert (inner == 2).sum() == between
