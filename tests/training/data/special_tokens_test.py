"""Which tokens of a folder are special, and of which kind; and which of them a
model may be without."""

import hashlib
import json

import numpy as np
import pytest
import tokenizers as hf

from configs import base
from tests.training.data import roberta_files
from training.data import tokenizers
from training.hf import tokenizer as hf_tokenizer
from training.objectives import chat

NAMES = {'bos_token': '<s>', 'eos_token': '</s>', 'cls_token': '<s>',
         'sep_token': {'content': '</s>'}, 'pad_token': '<pad>',
         'mask_token': {'content': '<mask>', 'lstrip': True}}
ENCODER = '<s> $A </s>', '<s> $A </s> </s> $B </s>'


def _framings():
  template = roberta_files.template(*ENCODER)
  return {
      'roberta': None,
      'bert': hf.processors.BertProcessing(('</s>', 2), ('<s>', 0)),
      'template': template,
      'sequence': hf.processors.Sequence(
          [hf.processors.ByteLevel(trim_offsets=False), template])}


def _published(folder, kind):
  if kind in ('model', 'class of the model'):
    roberta_files.write(folder, pair=True)
    (folder / 'config.json').write_text(json.dumps(
        dict(model_type='roberta') if kind == 'model' else
        dict(model_type='new', tokenizer_class='RobertaTokenizerFast')))
  elif kind in ('class', 'map'):
    described = {} if kind == 'map' else dict(
        tokenizer_class='RobertaTokenizer')
    roberta_files.write(folder, pair=True, **described)
    if kind == 'map':
      (folder / 'special_tokens_map.json').write_text(json.dumps(NAMES))
  else:
    roberta_files.write(folder, framing=_framings()[kind])
  return tokenizers.load(str(folder))


@pytest.mark.parametrize('kind', [
    *_framings(), 'class', 'map', 'model', 'class of the model'])
def test_a_folder_of_roberta_as_published_has_cls_and_sep(kind, tmp_path):
  """The tokenizer_config.json of roberta-base says how long texts are, and no
  more; others have no class but a special_tokens_map.json, or the model's
  config.json."""
  ours = _published(tmp_path, kind)
  assert ours.special_ids == dict(
      bos=0, eos=2, pad=1, cls=0, sep=2, mask=ours.vocab_size - 1)
  assert ours.separator_id == 2


@pytest.mark.parametrize('model', [
    {'model_type': 'gpt2'}, {'model_type': ['roberta']},
    {'model_type': 'roberta', 'tokenizer_class': 'OtherTokenizer'}])
def test_a_model_of_another_type_puts_no_tokens_around_a_text(model, tmp_path):
  roberta_files.write(tmp_path, pair=True)
  (tmp_path / 'config.json').write_text(json.dumps(model))
  assert {'cls', 'sep'}.isdisjoint(tokenizers.load(str(tmp_path)).special_ids)


@pytest.mark.parametrize('described', [True, False])
def test_a_copy_knows_its_class_without_the_models_config(described, tmp_path):
  source, workdir = tmp_path / 'source', tmp_path / 'run'
  source.mkdir()
  ours = _published(source, 'model')
  if not described:
    (source / 'tokenizer_config.json').unlink()
  config = base.base()
  copied = hf_tokenizer.take(source, workdir, config)
  assert set(copied) >= {'vocab.json', 'merges.txt'}
  kept = tokenizers.load(config.data.tokenizer)
  assert kept.special_ids == ours.special_ids
  told = json.loads((workdir / 'tokenizer/tokenizer_config.json').read_text())
  assert told == {'tokenizer_class': 'RobertaTokenizer'} | (
      {'model_max_length': 512} if described else {})


@pytest.mark.parametrize('single, pair', [
    ('<s> $A', '<s> $A <s> $B'), ('$A </s>', '$A </s> $B </s>'),
    ('<s> $A </s>', '<s> $A </s> <s> $B </s>'),
    ('<s> $A </s>', '<s> $A $B </s>'), ('</s> $A </s>', '</s> $A </s> $B </s>'),
    ('$A', '$A $B')])
def test_tokens_around_a_decoders_text_are_no_cls_and_sep(single, pair,
                                                          tmp_path):
  ours = tokenizers.load(str(roberta_files.write(
      tmp_path, framing=roberta_files.template(single, pair))))
  assert not {'cls', 'sep'} & {*ours.special_ids}


def test_padding_that_a_file_asks_for_frames_nothing(tmp_path):
  file = roberta_files.write(tmp_path) / 'tokenizer.json'
  pipeline = hf.Tokenizer.from_file(str(file))
  pipeline.enable_padding(length=9, pad_id=1, pad_token='<pad>')
  pipeline.enable_truncation(4)
  pipeline.save(str(file))
  ours = tokenizers.load(str(tmp_path))
  assert (ours.cls_id, ours.sep_id) == (0, 2)


@pytest.mark.parametrize('kind', ['roberta', 'template', 'class'])
def test_tokens_read_off_a_pipeline_leave_fingerprints_alone(kind, tmp_path):
  """Caches and shards of earlier versions are those of the same text."""
  ours = _published(tmp_path, kind)
  before = {name: i for name, i in ours.special_ids.items()
            if name not in ('cls', 'sep')}
  described = json.dumps([ours._tokenizer.to_str(), before])
  assert ours.fingerprint == hashlib.blake2b(
      described.encode(), digest_size=16).hexdigest()


def test_a_template_for_export_names_the_token_that_files_name(tmp_path):
  """Where eos and sep are one token, the files may name eos alone."""
  ours = tokenizers.load(str(roberta_files.write(tmp_path, eos_token='</s>')))
  template = chat.jinja(base.base(), ours)
  assert '{{ eos_token }}' in template and 'sep_token' not in template


def test_a_map_of_special_tokens_fills_what_the_config_leaves_out(tmp_path):
  roberta_files.write(tmp_path, sep_token='<unk>', cls_token=None)
  (tmp_path / 'special_tokens_map.json').write_text(json.dumps(
      NAMES | {'cls_token': '<unk>', 'eos_token': '<pad>', 'note': 3}))
  ours = tokenizers.load(str(tmp_path))
  assert ours.special_ids['sep'] == 3  # the config's
  assert ours.special_ids['cls'] == 0  # the pipeline's: the config has none
  assert ours.special_ids['eos'] == 1  # the map's
  (tmp_path / 'special_tokens_map.json').write_text('[]')
  with pytest.raises(ValueError, match='special_tokens_map.json'):
    tokenizers.load(str(tmp_path))


def test_a_map_names_what_is_beside_sentencepiece(tmp_path):
  sentencepiece = pytest.importorskip('sentencepiece')
  (tmp_path / 'text').write_text('a b c d e f\n' * 20)
  sentencepiece.SentencePieceTrainer.train(
      input=str(tmp_path / 'text'), model_prefix=str(tmp_path / 'tokenizer'),
      vocab_size=11, minloglevel=2)
  plain = tokenizers.load(str(tmp_path))
  size = plain.vocab_size
  assert plain.least_size == size
  (tmp_path / 'added_tokens.json').write_text(
      json.dumps({'<mask>': size, '<x>': size + 1, '<y>': size + 2}))
  (tmp_path / 'special_tokens_map.json').write_text(json.dumps(
      {'mask_token': '<mask>', 'additional_special_tokens': ['<y>', '<x>']}))
  ours = tokenizers.load(str(tmp_path))
  assert ours.mask_id == size and ours.vocab_size == size + 3
  assert ours.least_size == size + 1
  assert ours.encode('a<x>').max() < size


def test_rare_special_tokens_at_the_end_need_no_row(tmp_path):
  """Gemma 3's <image_soft_token>, of which the published text models have no
  embedding."""
  def load(*tokens, **described):
    roberta_files.write(tmp_path, **described)
    file = str(tmp_path / 'tokenizer.json')
    pipeline = hf.Tokenizer.from_file(file)
    pipeline.add_tokens([hf.AddedToken(token, special=special)
                         for token, special in tokens])
    pipeline.save(file)
    return tokenizers.load(str(tmp_path))
  size = load().vocab_size
  assert load().least_size == size  # <mask> is a kind, and a piece besides
  ours = load(('<image>', True), ('<sound>', True))
  assert (ours.vocab_size, ours.least_size) == (size + 2, size)
  assert ours.encode('<image>').max() < size
  assert ours.encode_placed('<image>')[0].tolist() == [size]
  assert load(('<image>', True), ('<end>', False)).least_size == size + 2
  assert load(('<end>', False), ('<image>', True)).least_size == size + 1
  assert load(('<image>', True), eos_token='<image>').least_size == size + 1
  assert load(('<extra_id_0>', True)).least_size == size + 1
  assert tokenizers.load('bytes').least_size == 384
  # A special token that plain text gives: what it does not know.
  unknown = hf.Tokenizer(hf.models.WordLevel({'a': 0, '<unk>': 1}, '<unk>'))
  unknown.add_special_tokens(['<unk>'])
  unknown.save(str(tmp_path / 'tokenizer.json'))
  ours = tokenizers.load(str(tmp_path / 'tokenizer.json'))
  assert ours.least_size == 2
  np.testing.assert_array_equal(ours.encode('b'), [1])
