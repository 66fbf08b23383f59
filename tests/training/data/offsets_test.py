"""Tokens and the characters that they stand for: words, windows, parts."""

import numpy as np
import pytest
import tokenizers as hf

from training.data import offsets, tokenizers

WORDS = ['Ångström', "isn't", '#1', '日本', '😀!', 'naïve', '.', '5,0']
TEXT = ' '.join(WORDS)
SMALL = {'[UNK]': 0, '[CLS]': 1, '[SEP]': 2, '[PAD]': 3}


@pytest.fixture(scope='module')
def every(tmp_path_factory):
  """A tokenizer of each kind."""
  folder = tmp_path_factory.mktemp('tokenizers')
  pieces = [c for word in WORDS for c in word.lower()] + ['is', 'na']
  pieces += [f'##{piece}' for piece in pieces]
  vocab = SMALL | {
      piece: 4 + i for i, piece in enumerate(dict.fromkeys(pieces))}
  wordpiece = hf.Tokenizer(hf.models.WordPiece(vocab, unk_token='[UNK]'))
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
  found = {name: tokenizers.load(str(folder / f'{name}.json'))
           for name in ('wordpiece', 'bpe', 'untrimmed')}
  try:
    import sentencepiece
    (folder / 'text').write_text(f'{TEXT}\n' * 9, encoding='utf-8')
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / 'text'), model_prefix=str(folder / 'own'),
        vocab_size=310, model_type='bpe', byte_fallback=True, minloglevel=2,
        character_coverage=0.98, normalization_rule_name='identity')
    found['sentencepiece'] = tokenizers.load(str(folder / 'own.model'))
  except ImportError:
    pass
  return found | {spec: tokenizers.load(spec) for spec in ('bytes', 'bytes:30')}


KINDS = ['bytes', 'bytes:30', 'wordpiece', 'bpe', 'untrimmed', 'sentencepiece']


def _tokenizer(every, kind):
  if kind not in every:
    pytest.skip('the package sentencepiece is not installed')
  return every[kind]


@pytest.mark.parametrize('kind', KINDS)
def test_the_ids_are_those_of_encoding_and_the_spans_cover_the_text(
    kind, every):
  tokenizer = _tokenizer(every, kind)
  texts = [TEXT, '', 'a', ' a  b ']
  for text, ids, (own, spans) in zip(
      texts, tokenizer.encode_batch(texts), tokenizer.encode_spans(texts)):
    assert ids.tolist() == own.tolist() and spans.shape == (len(ids), 2)
    assert (spans[:, 0] <= spans[:, 1]).all()
    covered = np.zeros(len(text), bool)
    for first, end in spans:
      covered[first:end] = True
    assert all(covered[i] for i, c in enumerate(text) if not c.isspace())


@pytest.mark.parametrize('kind', KINDS)
def test_words_equal_those_that_are_encoded_one_by_one(kind, every):
  """Each word alone gives the tokens that begin in it."""
  tokenizer = _tokenizer(every, kind)
  found, = offsets.of_words([WORDS], tokenizer)
  between = {'bpe': ' ', 'untrimmed': ' '}.get(kind, '')
  for i, word in enumerate(WORDS):
    alone = tokenizer.encode(between * (i > 0) + word).tolist()
    own = found.ids[found.words_T == i].tolist()
    if kind == 'sentencepiece':  # it may write the space as a piece of its own
      alone, own = (tokenizer.decode(ids).strip() for ids in (alone, own))
    assert own == alone, word
  firsts = np.flatnonzero(found.first_T)
  assert found.words_T[firsts].tolist() == list(range(len(WORDS)))
  for place in firsts:  # no earlier token is of the word
    assert found.words_T[place] not in found.words_T[:place]


def test_a_byte_tokenizer_has_spaces_of_no_word():
  found, = offsets.of_words([['é', 'b']], tokenizers.load('bytes'))
  assert found.words_T.tolist() == [0, 0, -1, 1]
  assert found.first_T.tolist() == [True, False, False, True]


def test_a_token_over_two_words_is_of_the_first(tmp_path):
  vocab = {'[UNK]': 0, 'a b': 1, 'c': 2, ' ': 3}
  tokenizer = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token='[UNK]'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Split(
      hf.Regex('a b|c| '), 'isolated')
  tokenizer.save(str(tmp_path / 'a.json'))
  found, = offsets.of_words([['a', 'b', 'c']],
                            tokenizers.load(str(tmp_path / 'a.json')))
  assert found.words_T.tolist() == [0, -1, 2]


@pytest.mark.parametrize('size, room, stride', [
    (0, 4, 1), (1, 4, 1), (4, 4, 3), (5, 4, 3), (9, 4, 1), (10, 4, 0),
    (11, 4, 2), (100, 7, 5), (383, 382, 127), (700, 510, 1)])
def test_strides_cover_each_token(size, room, stride):
  windows = offsets.windows(size, room, stride)
  assert windows[0][0] == 0 and windows[-1][1] == size
  for (first, end), (next_, end_) in zip(windows, windows[1:]):
    assert end - first == room and end - next_ == stride and end < end_
  assert all(end - first <= room for first, end in windows)
  owner = offsets.owners(windows, size)
  for token, own in enumerate(owner):
    # BERT's rule, written as in its code.
    scores = [min(token - first, end - 1 - token) + 0.01 * (end - first)
              if first <= token < end else -9 for first, end in windows]
    assert own == scores.index(max(scores))


@pytest.mark.parametrize('kind', KINDS)
def test_the_tokens_of_a_part_spell_it(kind, every):
  tokenizer = _tokenizer(every, kind)
  (_, spans), = tokenizer.encode_spans([TEXT])
  for word in WORDS:
    start = TEXT.index(word)
    first, last = offsets.tokens_of(spans, start, start + len(word))
    assert TEXT[spans[first, 0]:spans[last, 1]].strip() == word
  assert offsets.tokens_of(spans, len(TEXT), len(TEXT)) is None
