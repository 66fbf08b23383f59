"""Labelled records, cut into rows: against the package tokenizers, which cuts
them itself."""

import collections

import numpy as np
import pytest
import tokenizers as hf

from tests.helpers import labelled_files as files
from training.data import records, tokenizers
from training.objectives import labelled as objective

WORDS = ['Ångström', "isn't", '#1', '日本', '😀!', 'naïve', '.', '5,0']
TEXT = ' '.join(WORDS)


@pytest.fixture(scope='module')
def every(tmp_path_factory):
  """A tokenizer of each kind."""
  folder = tmp_path_factory.mktemp('tokenizers')
  pieces = [c for word in WORDS for c in word.lower()] + ['is', 'na']
  pieces += [f'##{piece}' for piece in pieces]
  wordpiece = hf.Tokenizer(hf.models.WordPiece(
      {'[UNK]': 0} | {piece: 1 + i for i, piece in enumerate(
          dict.fromkeys(pieces))}, unk_token='[UNK]'))
  wordpiece.normalizer = hf.normalizers.BertNormalizer(strip_accents=False)
  wordpiece.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
  wordpiece.save(str(folder / 'wordpiece.json'))
  for name, trim in ('bpe', True), ('untrimmed', False):
    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=trim)
    bpe.post_processor = hf.processors.ByteLevel(trim_offsets=trim)
    bpe.decoder = hf.decoders.ByteLevel()
    bpe.train_from_iterator([TEXT] * 3, hf.trainers.BpeTrainer(
        vocab_size=300, show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(folder / f'{name}.json'))
  return {name: tokenizers.load(str(folder / f'{name}.json')) for name in (
      'wordpiece', 'bpe', 'untrimmed')} | {
          spec: tokenizers.load(spec) for spec in ('bytes', 'bytes:30')}


@pytest.mark.parametrize('kind', [
    'bytes', 'bytes:30', 'wordpiece', 'bpe', 'untrimmed'])
def test_tokens_and_the_characters_that_they_stand_for(kind, every):
  tokenizer = every[kind]
  texts = [TEXT, '', 'a', ' a  b ']
  for text, ids, (own, spans) in zip(
      texts, tokenizer.encode_batch(texts), tokenizer.encode_spans(texts)):
    assert ids.tolist() == own.tolist() and spans.shape == (len(ids), 2)
    covered = np.zeros(len(text), bool)
    for first, end in spans:
      covered[first:end] = True
    assert all(covered[i] for i, c in enumerate(text) if not c.isspace())
  # Each word alone gives the tokens that begin in it.
  found, = records.words_of([WORDS], tokenizer)
  between = {'bpe': ' ', 'untrimmed': ' '}.get(kind, '')
  for i, word in enumerate(WORDS):
    alone = tokenizer.encode(between * (i > 0) + word).tolist()
    assert found.ids[found.words_T == i].tolist() == alone, word
  firsts = np.flatnonzero(found.first_T)
  assert found.words_T[firsts].tolist() == list(range(len(WORDS)))
  for place in firsts:  # no earlier token is of the word
    assert found.words_T[place] not in found.words_T[:place]
  # And the tokens of a part spell it.
  (_, spans), = tokenizer.encode_spans([TEXT])
  for word in WORDS:
    start = TEXT.index(word)
    first, last = records.tokens_of(spans, start, start + len(word))
    assert TEXT[spans[first, 0]:spans[last, 1]].strip() == word
  assert records.tokens_of(spans, len(TEXT), len(TEXT)) is None


@pytest.mark.parametrize('size, room, stride', [
    (0, 4, 1), (4, 4, 3), (5, 4, 3), (10, 4, 0), (100, 7, 5), (383, 382, 127)])
def test_strides_cover_each_token(size, room, stride):
  windows = records.windows(size, room, stride)
  assert windows[0][0] == 0 and windows[-1][1] == size
  for (first, end), (next_, end_) in zip(windows, windows[1:]):
    assert end - first == room and end - next_ == stride and end < end_
  for token, own in enumerate(records.owners(windows, size)):
    # BERT's rule, written as in its code.
    scores = [min(token - first, end - 1 - token) + 0.01 * (end - first)
              if first <= token < end else -9 for first, end in windows]
    assert own == scores.index(max(scores))


def test_what_is_too_long_is_cut_as_tokenizers_does_it():
  tokenizer = hf.Tokenizer(hf.models.WordLevel({'a': 0, 'b': 1}, unk_token='a'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  for room in range(2, 9):
    tokenizer.enable_truncation(room, strategy='longest_first')
    for n in range(1, 9):
      for m in range(1, 9):
        ids = tokenizer.encode('a ' * n, 'b ' * m).ids
        assert records.fitting([n, m], room) == [ids.count(0), ids.count(1)]
      assert records.fitting([n], room) == [min(n, room)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('records')


@pytest.fixture(scope='module')
def wordpiece(folder):
  return files.wordpiece(folder)


def _sentences(folder, tokenizer, **data):
  source = f'conll:{files.conll(folder / "a.conll")}'
  return records.Sentences(files.corpus(files.config(
      source, tokenizer, 'token_classification', **data)))


@pytest.mark.parametrize('length, stride', [(64, 0), (12, 9), (3, 0), (7, 4)])
@pytest.mark.parametrize('kind', ['', 'bytes'])
def test_each_label_counts_once(kind, length, stride, folder, wordpiece):
  view = _sentences(folder, kind or wordpiece, length=length, stride=stride)
  counted = collections.Counter()
  for item in view.items:
    assert len(item.ids) == len(item.targets) == len(item.weights) <= length - 2
    assert ((item.weights > 0) == (item.words != records.NO_WORD)).all()
    for place in np.flatnonzero(item.weights):
      word = item.words[place]
      counted[item.sentence, word] += 1
      assert view.labels[item.targets[place]] == (
          view.records[item.sentence].labels[word])
  assert set(counted.values()) == {1}
  assert len(counted) == sum(len(s.words) for s in view.records)


def test_first_tokens_equal_those_of_the_package_tokenizers(folder, wordpiece):
  """Its words are given one by one, as transformers' is_split_into_words."""
  theirs = hf.Tokenizer.from_file(wordpiece)
  view = _sentences(folder, wordpiece, length=128)
  for item in view.items:
    encoded = theirs.encode(view.records[item.sentence].words,
                            is_pretokenized=True, add_special_tokens=False)
    assert encoded.ids == item.ids.tolist()
    firsts = [i for i, word in enumerate(encoded.word_ids)
              if word not in encoded.word_ids[:i]]
    assert np.flatnonzero(item.weights).tolist() == firsts


def _asked(folder, tokenizer, **data):
  """Returns the config and the view of questions."""
  config = files.config(f'squad:{files.squad(folder / "a.json")}', tokenizer,
                        'question_answering', **data)
  return config, records.Questions(files.corpus(config))


@pytest.mark.parametrize('length, stride', [(128, 16), (36, 10), (30, 3)])
def test_rows_equal_those_of_the_package_tokenizers(
    length, stride, folder, wordpiece):
  """Its truncation `only_second` with a stride is what transformers uses; the
  ends of the answer are then found as in its run_qa.py."""
  config, view = _asked(folder, wordpiece, length=length, stride=stride)
  theirs = hf.Tokenizer.from_file(wordpiece)
  theirs.enable_truncation(length, stride=stride, strategy='only_second')
  expected = []
  for question, (context, _) in zip(view.questions, view.contexts):
    encoded = theirs.encode(question.question, context)
    for part in [encoded, *encoded.overflowing]:
      places = [i for i, side in enumerate(part.sequence_ids) if side == 1]
      ends = 0, 0
      if question.answers:
        text, start = question.answers[0]
        inside = [i for i in places if part.offsets[i][0] < start + len(text)
                  and part.offsets[i][1] > start]
        whole = (part.offsets[places[0]][0] <= start
                 and part.offsets[places[-1]][1] >= start + len(text))
        ends = (inside[0], inside[-1]) if whole else ends
      expected.append((part.ids, part.type_ids, *ends))
  ours = tokenizers.load(wordpiece)
  rows = [objective.lay_out_question(item, None, config, ours)
          for item in view.items]
  assert [(row['tokens'].tolist(), row['types'].astype(int).tolist(),
           row['starts'], row['ends']) for row in rows] == expected
  assert len(rows) > len(view.questions) or length == 128
