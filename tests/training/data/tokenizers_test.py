"""Tokenizers: what goes in comes out, and equals independent ones."""

import json
import re

import numpy as np
import pytest
import tokenizers as hf

from tools import tokenizer as tool
from training.data import tokenizers

TEXT = (
    "It is not the critic who counts; it isn't 1,905 men, nor 'he'll see'.\n\n"
    'The naïve café — déjà vu — costs 5 €. 日本語, Ωμέγα, 😀.\t  End  \n')
SAMPLES = [TEXT, '', ' ', 'a', '\n\n\n', '<|endoftext|> typed', 'x' * 300, '😀']


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """A folder of four files, the first of which is held out."""
  folder = tmp_path_factory.mktemp('corpus')
  (folder / '0.txt').write_text('zzqj ' * 400, encoding='utf-8')
  for i in range(1, 4):
    (folder / f'{i}.txt').write_text(TEXT * 5, encoding='utf-8')
  return folder


@pytest.fixture(scope='module')
def trained(corpus):
  """A file of each kind, trained by the tool."""
  files = {}
  for kind, size in ('bpe', 340), ('unigram', 170), ('wordpiece', 150):
    out = corpus / f'{kind}.json'
    tool.main(['train', '--kind', kind, '--source', f'text:{corpus}/*.txt',
               '--vocab_size', str(size), '--out', str(out), '--json'])
    files[kind] = str(out)
  return files


@pytest.fixture(scope='module')
def pair(trained, corpus):
  """GPT-2's two files, of the BPE that was trained."""
  model = json.loads(open(trained['bpe'], encoding='utf-8').read())['model']
  folder = corpus / 'gpt2'
  folder.mkdir()
  (folder / 'encoder.json').write_text(json.dumps(model['vocab']))
  lines = ['#version: 0.2', *(' '.join(merge) for merge in model['merges'])]
  (folder / 'vocab.bpe').write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return folder


def gpt2_by_hand(folder, text):
  """Radford et al.'s byte-level BPE, in plain Python."""
  vocab = json.loads((folder / 'encoder.json').read_text())
  merges = (folder / 'vocab.bpe').read_text(encoding='utf-8').split('\n')[1:-1]
  rank = {tuple(merge.split(' ')): i for i, merge in enumerate(merges)}
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [b for b in range(256) if b not in shown]
  char = {b: chr(b) for b in shown}
  char |= {b: chr(256 + i) for i, b in enumerate(hidden)}
  words = re.findall(
      r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+"
      r'|\s+(?!\S)|\s+', text)
  assert ''.join(words) == text
  ids = []
  for word in words:
    symbols = [char[b] for b in word.encode('utf-8')]
    while len(symbols) > 1:
      pairs = list(zip(symbols, symbols[1:]))
      best = min(pairs, key=lambda pair: rank.get(pair, 1 << 30))
      if best not in rank:
        break
      merged, i = [], 0
      while i < len(symbols):
        if tuple(symbols[i:i + 2]) == best:
          merged.append(symbols[i] + symbols[i + 1])
          i += 2
        else:
          merged.append(symbols[i])
          i += 1
      symbols = merged
    ids += [vocab[symbol] for symbol in symbols]
  return ids


def test_bytes_are_the_ids():
  tokenizer = tokenizers.load('bytes')
  assert tokenizer.encode('né').tolist() == [110, 195, 169]
  assert tokenizer.vocab_size == 384
  ids = [*tokenizer.special_ids.values(), *tokenizer.sentinel_ids]
  assert len(set(ids)) == 106 and min(ids) == 256 and max(ids) == 383
  assert tokenizer.separator_id == tokenizer.eos_id == 258
  assert tokenizer.decode([72, 258, 105, 383]) == 'Hi'


@pytest.mark.parametrize('size', [8, 10, 22, 61, 261, 262, 300])
def test_bytes_are_spelt_in_fewer_ids(size):
  tokenizer = tokenizers.load(f'bytes:{size}')
  every = bytes(range(128)).decode()
  for text in (*SAMPLES, every):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and ids.max(initial=0) < size
    digits = len(ids) / max(1, len(text.encode()))
    assert digits in (0, 1, 2, 4, 8)
  special = [*tokenizer.special_ids.values(), *tokenizer.sentinel_ids]
  assert len(set(special)) == len(special) and max(special) == size - 1 or (
      not tokenizer.sentinel_ids)
  assert not set(special) & set(tokenizer.encode(every).tolist())
  # What a model writes need not be whole bytes.
  assert tokenizer.decode([0, special[0], *tokenizer.encode('ab')])[-2:] == 'ab'


def test_the_usual_bytes_are_384():
  usual, sized = tokenizers.load('bytes'), tokenizers.load('bytes:384')
  assert usual.fingerprint == sized.fingerprint
  assert usual.special_ids == sized.special_ids
  assert usual.sentinel_ids == sized.sentinel_ids


@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'pair'])
def test_round_trip(kind, trained, pair):
  tokenizer = tokenizers.load(
      {'bytes': 'bytes', 'bpe': trained['bpe'], 'pair': str(pair)}[kind])
  many = tokenizer.encode_batch(SAMPLES)
  for text, ids in zip(SAMPLES, many):
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & set(tokenizer.special_ids.values())
    # Bytes add up even where a cut falls inside a character.
    assert sum(tokenizer.num_bytes([i]) for i in ids) == len(text.encode())
    assert tokenizer.num_bytes([*ids, tokenizer.eos_id]) == len(text.encode())


def test_gpt2_pair_equals_the_algorithm_and_hugging_face(pair, trained):
  ours = tokenizers.load(str(pair))
  theirs = hf.ByteLevelBPETokenizer(
      str(pair / 'encoder.json'), str(pair / 'vocab.bpe'))
  original = tokenizers.load(trained['bpe'])
  for text in SAMPLES:
    ids = ours.encode(text).tolist()
    assert ids == gpt2_by_hand(pair, text)
    assert ids == theirs.encode(text).ids
    assert ids == original.encode(text).tolist()
  assert ours.special_ids == original.special_ids == {'eos': 0}


def test_what_lies_beside_a_gpt2_pair(pair, tmp_path):
  """transformers, asked by hand, gives these ids."""
  names = {'encoder.json': 'vocab.json', 'vocab.bpe': 'merges.txt'}
  for name, theirs in names.items():
    (tmp_path / theirs).write_bytes((pair / name).read_bytes())
  def read(**told):
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(told))
    return tokenizers.load(str(tmp_path))
  plain = tokenizers.load(str(pair))
  size = plain.vocab_size
  end = dict(content='<|endoftext|>', special=True, normalized=True)
  for told in ({}, dict(tokenizer_class='GPT2Tokenizer', eos_token=end),
               dict(tokenizer_class='RobertaTokenizerFast',
                    add_prefix_space=False, added_tokens_decoder={'0': end})):
    assert read(**told).fingerprint == plain.fingerprint
  spaced = read(add_prefix_space=True)
  assert spaced.encode('men').tolist() == plain.encode(' men').tolist()
  assert spaced.fingerprint != plain.fingerprint
  (tmp_path / 'added_tokens.json').write_text(
      json.dumps({'<pad>': size, '<new>': size + 1}))
  ours = read(bos_token='<|endoftext|>', pad_token='<pad>', added_tokens_decoder
              ={str(size + 2): dict(content='<mask>', special=True,
                                    lstrip=True)}, mask_token='<mask>')
  assert ours.special_ids == dict(bos=0, eos=0, pad=size, mask=size + 2)
  assert ours.vocab_size == size + 3
  assert ours.encode('a<new>b<pad>').tolist() == [
      *plain.encode('a'), size + 1, *plain.encode('b<pad>')]
  assert ours.encode_placed('a <mask>')[0].tolist() == [
      *plain.encode('a'), size + 2]
  assert ours.decode([size, size + 1, size + 2]) == '<new>'
  with pytest.raises(ValueError, match="'Qwen2Tokenizer', which may cut text"):
    read(tokenizer_class='Qwen2Tokenizer')
  (tmp_path / 'added_tokens.json').write_text(json.dumps({'<new>': size + 1}))
  with pytest.raises(ValueError, match=f'the id {size + 1}, and it has the id'):
    read()


@pytest.mark.parametrize('cased', [False, True])
def test_a_vocabulary_of_words_alone_equals_hugging_face(cased, trained,
                                                         tmp_path):
  """BERT's vocab.txt, and what tokenizer_config.json says of case."""
  theirs = hf.Tokenizer.from_file(trained['wordpiece'])
  words = sorted(theirs.get_vocab(), key=theirs.token_to_id)
  (tmp_path / 'vocab.txt').write_text('\n'.join(words) + '\n', 'utf-8')
  if cased:
    (tmp_path / 'tokenizer_config.json').write_text(
        json.dumps({'do_lower_case': False}))
  ours = tokenizers.load(str(tmp_path))
  theirs = hf.BertWordPieceTokenizer(str(tmp_path / 'vocab.txt'),
                                     lowercase=not cased)
  for text in SAMPLES:
    assert ours.encode(text).tolist() == theirs.encode(
        text, add_special_tokens=False).ids
  original = tokenizers.load(trained['wordpiece'])
  assert ours.special_ids == original.special_ids
  assert (ours.encode(TEXT).tolist() != original.encode(TEXT).tolist()) == cased
  (tmp_path / 'vocab.txt').write_text('a\nb\n')
  with pytest.raises(ValueError, match=r'no WordPiece vocabulary'):
    tokenizers.load(str(tmp_path))


def test_fingerprint_tells_tokenizers_apart(trained, pair):
  prints = [tokenizers.load(spec).fingerprint
            for spec in ('bytes', *trained.values())]
  assert len(set(prints)) == 4
  # The same BPE in another format shares the cache.
  assert tokenizers.load(str(pair)).fingerprint == prints[1]


def test_trained_kinds_have_the_tokens_of_their_family(trained):
  unigram = tokenizers.load(trained['unigram'])
  assert len(unigram.sentinel_ids) == 100 and unigram.vocab_size <= 170
  assert set(unigram.special_ids) == {'pad', 'eos'}
  assert unigram.decode(unigram.encode('who counts')) == 'who counts'
  wordpiece = tokenizers.load(trained['wordpiece'])
  assert set(wordpiece.special_ids) == {'pad', 'mask', 'cls', 'sep'}
  assert wordpiece.separator_id == wordpiece.sep_id
  assert wordpiece.decode(wordpiece.encode('WHO Counts')) == 'who counts'
  with pytest.raises(ValueError, match="no 'mask' token: it has eos, pad"):
    _ = unigram.mask_id


def test_training_leaves_out_held_out_documents(trained):
  vocab = json.loads(open(trained['wordpiece'], encoding='utf-8').read())
  assert 'q' not in vocab['model']['vocab']  # Only the first file has one.


def test_tokenizer_config_beside_the_file_names_the_special_tokens(
    trained, tmp_path):
  tokenizer = hf.Tokenizer.from_file(trained['bpe'])
  tokenizer.add_special_tokens(['<|end|>', '<|hole|>'])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(
      {'eos_token': '<|end|>', 'mask_token': {'content': '<|hole|>'}}))
  loaded = tokenizers.load(str(tmp_path))
  assert loaded.eos_id == tokenizer.token_to_id('<|end|>')
  assert loaded.mask_id == tokenizer.token_to_id('<|hole|>')
  assert loaded.vocab_size == tokenizer.get_vocab_size()


def test_sentencepiece_equals_its_own_package(corpus, tmp_path):
  sentencepiece = pytest.importorskip('sentencepiece')
  sentencepiece.SentencePieceTrainer.train(
      input=str(corpus / '1.txt'), model_prefix=str(tmp_path / 'tokenizer'),
      vocab_size=340, model_type='bpe', byte_fallback=True, minloglevel=2,
      character_coverage=1.0)
  path = tmp_path / 'tokenizer.model'
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
  for spec in str(path), str(tmp_path):
    ours = tokenizers.load(spec)
    assert ours.encode(TEXT).tolist() == theirs.encode(TEXT)
    assert ours.decode(theirs.encode(TEXT)) == theirs.decode(
        theirs.encode(TEXT))
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    assert ours.decode([ours.bos_id, *ours.encode('a b'), ours.eos_id]) == 'a b'
    assert ours.vocab_size == 340
  assert [ours.piece(i) for i in range(ours.vocab_size)] == [
      theirs.id_to_piece(i) for i in range(ours.vocab_size)]
  # A model may have more ids than its vocabulary, and may write them.
  assert ours.decode([*ours.encode('a b'), 340, 511]) == 'a b'
  assert (ours.piece(340), ours.piece(511)) == ('<340>', '<511>')


def _pieces(corpus, folder, **files):
  """Makes a folder of a sentencepiece model of 340 pieces and these files."""
  sentencepiece = pytest.importorskip('sentencepiece')
  sentencepiece.SentencePieceTrainer.train(
      input=str(corpus / '1.txt'), model_prefix=str(folder / 'tokenizer'),
      vocab_size=340, model_type='bpe', byte_fallback=True, minloglevel=2,
      character_coverage=1.0)
  for name, tree in files.items():
    (folder / f'{name}.json').write_text(json.dumps(tree))
  return folder


def _token(content, **more):
  return dict(content=content, lstrip=False, normalized=False, rstrip=False,
              single_word=False, special=True) | more


def test_tokens_that_files_add_to_a_sentencepiece_model(corpus, tmp_path):
  """transformers, asked by hand, gives these ids and texts."""
  folder = _pieces(corpus, tmp_path)
  plain = tokenizers.load(str(folder))
  between = lambda *texts: [plain.encode(text).tolist() for text in texts]
  # What is said of the pieces themselves changes nothing.
  for name, tree in ('added_tokens', {'</s>': 2}), ('tokenizer_config', dict(
      bos_token='<s>', added_tokens_decoder={'1': _token('<s>')})):
    (folder / f'{name}.json').write_text(json.dumps(tree))
  assert tokenizers.load(str(folder)).fingerprint == plain.fingerprint

  (folder / 'added_tokens.json').write_text(
      json.dumps({'<|end|>': 340, '<|to|>': 341, '<tool>': 342}))
  (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
      eos_token='<|end|>', added_tokens_decoder={
          '340': _token('<|end|>'), '341': _token('<|to|>', lstrip=True)})))
  ours = tokenizers.load(str(folder))
  assert (ours.vocab_size, ours.eos_id, ours.bos_id) == (343, 340, 1)
  assert ours.fingerprint != plain.fingerprint
  assert [ours.piece(i) for i in (340, 342, 343)] == [
      '<|end|>', '<tool>', '<343>']
  # Of these only the one that is not special is obeyed in plain text.
  a, b = between('the man', 'who')
  text = 'the man<tool>who'
  assert ours.encode(text).tolist() == [*a, 342, *b]
  assert ours.decode([*a, 342, *b, 340]) == 'the man<tool> who'
  ids, spans = ours.encode_spans([text])[0]
  assert spans[ids == 342].tolist() == [[7, 13]] and spans.max() == len(text)
  typed = ours.encode('who<|end|>').tolist()
  assert typed == plain.encode('who<|end|>').tolist()
  ids, spans = ours.encode_placed('the man <|to|>who<|end|>')
  assert ids.tolist() == [*a, 341, *b, 340]
  assert spans[[len(a), -1]].tolist() == [[7, 14], [17, 24]]
  assert set(ours.special_texts) == {'<s>', '<|end|>', '<|to|>'}
  # A worker gets the name alone.
  assert tokenizers.load(ours.name).fingerprint == ours.fingerprint


@pytest.mark.parametrize('file, tree, message', [
    ('added_tokens', {'<a>': 5}, "say that id 5 is '<a>', and it has"),
    ('added_tokens', {'<a>': '5'}, 'which is no token with its id'),
    ('tokenizer_config', dict(added_tokens_decoder={'340': 1}), 'no token'),
    ('tokenizer_config', dict(added_tokens_decoder={
        '340': _token('x', single_word=True)}), 'single_word is not done'),
    ('tokenizer_config', dict(added_tokens_decoder=[1]), 'added_tokens_decod'),
])
def test_added_tokens_of_another_kind_are_refused(file, tree, message, corpus,
                                                  tmp_path):
  folder = _pieces(corpus, tmp_path, **{file: tree})
  with pytest.raises(ValueError, match=message):
    tokenizers.load(str(folder))


def test_info_and_encode(trained, corpus, capsys):
  tool.main(['info', '--tokenizer', trained['bpe'], '--json', '--source',
             f'text:{corpus}/*.txt', '--holdout_every', '0'])
  info = json.loads(capsys.readouterr().out)
  texts = [(corpus / f'{i}.txt').read_bytes() for i in range(4)]
  assert info['bytes'] == sum(len(text) for text in texts)
  assert info['bytes_per_token'] == info['bytes'] / info['tokens'] > 1
  tool.main(['encode', '--tokenizer', 'bytes', '--text', 'Hi', '--json'])
  encoded = json.loads(capsys.readouterr().out)
  assert encoded == {'ids': [72, 105], 'pieces': ['H', 'i'], 'decoded': 'Hi'}


@pytest.mark.parametrize('spec, message', [
    ('bytes:7', 'choose from bytes:8 to bytes:384'),
    ('bytes:385', 'choose from bytes:8 to bytes:384'),
    ('byte', "unknown tokenizer 'byte': choose bytes, .* no such file"),
    ('byts', "no such file or folder. Did you mean 'bytes'"),
    ('{}/none.json', 'no such file or folder'),
    ('{}', 'holds none of: tokenizer.json; encoder.json \\+ vocab.bpe; '),
    ('{}/broken.json', 'is not a Hugging Face tokenizer.json: '),
    ('{}/broken.model', 'is not a sentencepiece model'),
    ('{}/pair', 'encoder.json and vocab.bpe are not a byte-level BPE'),
])
def test_what_is_no_tokenizer_is_refused(spec, message, tmp_path):
  (tmp_path / 'pair').mkdir()
  for name in ('broken.json', 'broken.model', 'pair/encoder.json',
               'pair/vocab.bpe'):
    (tmp_path / name).write_text('{"a": 1')
  with pytest.raises(ValueError, match=message) as caught:
    tokenizers.load(spec.format(tmp_path))
  assert '\n' not in str(caught.value)
