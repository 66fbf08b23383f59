"""Sentences with labels, cut into rows: each label counts once."""

import collections

import numpy as np
import pytest
import tokenizers as hf

from tests.helpers import labelled_files as files
from training.data import offsets, words
from training.measures import words as measures


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('words')


@pytest.fixture(scope='module')
def source(folder):
  return f'conll:{files.conll(folder / "a.conll")}'


@pytest.fixture(scope='module')
def tokenizer(folder):
  return files.wordpiece(folder)


def _view(source, tokenizer, **data):
  config = files.config(source, tokenizer, 'token_classification', **data)
  return words.Sentences(files.corpus(config))


@pytest.mark.parametrize('length, stride', [
    (64, 0), (12, 0), (12, 1), (12, 9), (3, 0), (7, 4)])
@pytest.mark.parametrize('kind', ['wordpiece', 'bytes'])
def test_each_label_counts_once(kind, length, stride, source, tokenizer):
  view = _view(source, tokenizer if kind == 'wordpiece' else kind,
               length=length, stride=stride)
  counted = collections.Counter()
  for item in view.items:
    assert len(item.ids) == len(item.targets) == len(item.weights) <= length - 2
    assert ((item.weights > 0) == (item.words != offsets.NO_WORD)).all()
    for place in np.flatnonzero(item.weights):
      word = item.words[place]
      counted[item.sentence, word] += 1
      assert view.labels[item.targets[place]] == (
          view.records[item.sentence].labels[word])
  assert set(counted.values()) == {1}
  assert len(counted) == sum(len(s.words) for s in view.records)


def test_first_tokens_equal_those_of_the_package_tokenizers(source, tokenizer):
  """Its words are given one by one, as transformers' is_split_into_words."""
  theirs = hf.Tokenizer.from_file(tokenizer)
  view = _view(source, tokenizer, length=128)
  for item in view.items:
    encoded = theirs.encode(view.records[item.sentence].words,
                            is_pretokenized=True, add_special_tokens=False)
    assert encoded.ids == item.ids.tolist()
    own = item.words[item.weights > 0].tolist()
    assert own == list(dict.fromkeys(encoded.word_ids))
    firsts = [i for i, word in enumerate(encoded.word_ids)
              if word not in encoded.word_ids[:i]]
    assert np.flatnonzero(item.weights).tolist() == firsts


@pytest.mark.parametrize('length', [64, 9])
def test_what_scores_say_goes_back_to_the_words(length, source, tokenizer):
  view = _view(source, tokenizer, length=length)
  rng = np.random.default_rng(0)
  scores = []
  for item in view.items:
    scores_LK = rng.normal(size=(length, len(view.labels)))
    for place in np.flatnonzero(item.weights):
      scores_LK[1 + place, item.targets[place]] = 9
    scores.append(scores_LK)
  found = measures.labels(view, scores)
  assert found == [sentence.labels for sentence in view.records]
  figures = measures.figures(view, found)
  assert figures['f1'] == figures['strict_f1'] == figures['accuracy'] == 1
  assert figures['without_tokens'] == 0
  assert figures['words'] == sum(len(s.words) for s in view.records)
  found[0] = ['O'] * len(found[0])
  assert measures.figures(view, found)['f1'] < 1


def test_a_word_without_tokens_is_outside(tmp_path, tokenizer):
  path = tmp_path / 'a'
  path.write_text('Ana\tB-per\n\u200d\tB-per\nRome\tO\n')  # a zero-width joiner
  view = _view(f'conll:{path}', tokenizer, length=32)
  scores = np.zeros((32, 2))
  scores[:, view.labels.index('B-per')] = 1
  found = measures.labels(view, [scores])
  assert found == [['B-per', 'O', 'B-per']]
  figures = measures.figures(view, found)
  assert figures['without_tokens'] == 1 and figures['accuracy'] == 1 / 3
  assert measures.written(view, found) == (
      'Ana B-per B-per\n\u200d B-per O\nRome O B-per\n\n')


def test_labels_that_are_no_entities_have_an_accuracy_alone(
    tmp_path, tokenizer):
  path = tmp_path / 'a'
  path.write_text('Ana\tNOUN\nran\tVERB\n')
  view = _view(f'conll:{path}', tokenizer, length=32)
  figures = measures.figures(view, [['NOUN', 'NOUN']])
  assert figures == dict(accuracy=0.5, words=2, sentences=1, without_tokens=0)


@pytest.mark.parametrize('text, data, message', [
    ('a\tO\nb\tI-x\n', {}, "a.conll, line 2, has the label 'I-x' after 'O'"),
    ('a\tO\nb\tO\n', {}, "has one label, 'O', for all words"),
    ('a\tO\nb\tB-y\n', dict(labels=('B-x', 'O')),
     "unknown label in .*a.conll, line 2: 'B-y': choose from B-x, O"),
    ('a\tO\nb\tB-x\n', dict(length=2), 'a row of a sentence needs 3 or more'),
    ('a\tO\nb\tB-x\n', dict(length=9, stride=7), 'data.stride is 7, but in '
     'data.length 9 there is room for 7 tokens of .*a.conll, line 1: choose'),
    (''.join(f'w{i}\tw{i}\n' for i in range(1001)), {}, 'has 1,001 labels')])
def test_what_cannot_be_learned_is_refused(text, data, message, tmp_path,
                                           tokenizer):
  (tmp_path / 'a.conll').write_text(text)
  with pytest.raises(ValueError, match=message):
    _view(f'conll:{tmp_path}/a.conll', tokenizer, **{'length': 64} | data)
