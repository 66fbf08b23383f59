"""What generation needs, and the tokenizer, go along with the weights."""

import json

import numpy as np
import pytest
import tokenizers as hf

import architectures
from common.errors import RequestError
from configs import base
from tests.helpers import data_files, evaluations, models
from training import runs
from training.data import tokenizers
from training.hf import config as hf_config, generation as hf_generation
from training.hf import tokenizer as hf_tokenizer
from training.objectives import pipeline


def _vocabulary(tmp_path, specials):
  """A tokenizer.json of letters, and these special tokens."""
  words = {letter: i for i, letter in enumerate('?abcdefghijklmnop ')}
  tokenizer = hf.Tokenizer(hf.models.WordLevel(words, unk_token='?'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Split('', 'isolated')
  tokenizer.add_special_tokens(specials)
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  return str(tmp_path / 'tokenizer.json')


SPECIALS = {'llama': ['<s>', '</s>'], 'gpt': ['<|endoftext|>'],
            'bert': ['[PAD]', '[CLS]', '[SEP]', '[MASK]'],
            't5': ['<pad>', '</s>'], 'transformer': ['</s>', '<pad>'],
            'gshard': ['<s>', '<pad>', '</s>']}
OBJECTIVES = {'bert': 'mlm', 't5': 'seq2seq', 'transformer': 'seq2seq',
              'gshard': 'seq2seq'}


@pytest.mark.parametrize('kind', ['bytes', 'own'])
@pytest.mark.parametrize('system', SPECIALS)
def test_a_run_of_our_own_says_what_its_sequences_look_like(
    system, kind, tmp_path):
  spec = 'bytes' if kind == 'bytes' else _vocabulary(tmp_path,
                                                     SPECIALS[system])
  tokenizer = tokenizers.load(spec)
  for i in range(12):
    (tmp_path / f'{i}.txt').write_text('a bad cab ')
  config = base.base()
  config.objective = OBJECTIVES[system] if system in OBJECTIVES else 'causal'
  config.data.update(source=f'text:{tmp_path}/*.txt', tokenizer=spec, length=24,
                     batch_size=4, holdout_every=0, cache_dir=str(tmp_path))
  model = architectures.resolve(models.small_config(
      system, vocab_size=tokenizer.vocab_size, head_dim=8,
      moe=dict(eval_capacity_factor=0.0)))
  fields, options = hf_generation.generation_of_run(config, model, tokenizer)
  batch = pipeline.make_training_loader(config, tokenizer).batch(0)
  for name in ('bos', 'pad'):
    if name in tokenizer.special_ids and f'{name}_token_id' in fields:
      assert fields[f'{name}_token_id'] == tokenizer.special_ids[name]
  if system == 'bert':
    assert options is None  # it writes nothing
    return
  if system == 'gshard':  # whose positions count from it
    assert 'pad_token_id' not in fields
  text = set(tokenizer.encode('a bad cab ').tolist())
  if config.objective == 'seq2seq':
    start = options['decoder_start_token_id']
    assert fields['decoder_start_token_id'] == start
    assert (batch['decoder_tokens'][:, 0] == start).all()
    assert (set(np.unique(batch['tokens'])) - text - {start}
            <= {options['eos_token_id']})
  else:
    other = set(np.unique(batch['tokens'])) - text
    assert other == {options['bos_token_id']} == {options['eos_token_id']}
  assert fields['eos_token_id'] == options['eos_token_id']
  tree = hf_config.config_json_of_model(model)
  assert hf_config.model_of_config_json(
      tree | fields) == hf_config.model_of_config_json(tree)
  used = {v for v in (*fields.values(), *options.values()) if v is not None}
  assert max(used) < tokenizer.vocab_size


def test_a_run_that_learned_to_chat_gives_its_template(tmp_path):
  """tests/parity compares what transformers makes of it."""
  config = base.base()
  config.data.tokenizer = _vocabulary(tmp_path, ['</s>'])
  (tmp_path / 'out').mkdir()
  file = tmp_path / 'out' / 'chat_template.jinja'
  hf_tokenizer.export_tokenizer(tmp_path, config, tmp_path / 'out', step=5)
  assert not file.exists()
  config.objective = 'chat'
  for source, words in (('jsonl:x:y', 'ASSISTANT:'), ('alpaca:x', 'Response:')):
    config.data.source = source
    hf_tokenizer.export_tokenizer(tmp_path, config, tmp_path / 'out', step=5)
    assert words in file.read_text() and '{{ eos_token }}' in file.read_text()


def _given(config, out):
  """Returns the files of an export's tokenizer, and what it says of it."""
  out.mkdir()
  hf_tokenizer.export_tokenizer(out.parent, config, out, step=5)
  return ({file.name for file in out.iterdir()},
          json.loads((out / 'tokenizer_config.json').read_text()))


def test_an_export_names_its_special_tokens(tmp_path):
  """transformers, asked by hand: the template then lays out the ids of the
  training; without it, eos_token is nothing there."""
  config = base.base()
  file = config.data.tokenizer = _vocabulary(tmp_path, ['</s>', '[MASK]'])
  wanted = dict(tokenizer_class='PreTrainedTokenizerFast', eos_token='</s>',
                mask_token='[MASK]')
  for i, config.data.tokenizer in enumerate((file, str(tmp_path))):
    names, tokens = _given(config, tmp_path / f'out{i}')
    assert names == {'tokenizer.json', 'tokenizer_config.json'}
    assert tokens == wanted
  # What lies beside the tokenizer goes along, and is not written over.
  for name in 'tokenizer_config.json', 'special_tokens_map.json':
    (tmp_path / name).write_text('{"eos_token": "[MASK]"}')
  for i, config.data.tokenizer in enumerate((file, str(tmp_path)), 2):
    names, tokens = _given(config, tmp_path / f'out{i}')
    assert tokens == {'eos_token': '[MASK]'}
    assert 'special_tokens_map.json' in names
    out = tokenizers.load(str(tmp_path / f'out{i}'))
    assert out.fingerprint == tokenizers.load(file).fingerprint
  # An export is written over an earlier one.
  _vocabulary(tmp_path, ['<new>'])
  hf_tokenizer.export_tokenizer(tmp_path, config, tmp_path / 'out2', step=5)
  assert tokenizers.load(str(tmp_path / 'out2')).fingerprint == (
      tokenizers.load(file).fingerprint)


def test_an_export_puts_a_text_between_the_tokens_of_its_family(tmp_path):
  """Where the tokenizer.json does not itself."""
  config, file = base.base(), tmp_path / 'mine.json'
  def given(arch, model, special, post_processor=None):
    pipeline = hf.Tokenizer(model)
    if post_processor is not None:
      pipeline.post_processor = post_processor
    pipeline.add_special_tokens(special)
    pipeline.save(str(file))
    config.model.arch, config.data.tokenizer = arch, str(file)
    out = tmp_path / str(len(list(tmp_path.iterdir())))
    _given(config, out)
    encode = hf.Tokenizer.from_file(str(out / 'tokenizer.json')).encode
    return [(row.tokens, row.type_ids) for row in (
        encode('a'), encode('a', 'a'))]
  words = hf.models.WordPiece({'[UNK]': 0, '[CLS]': 1, '[SEP]': 2, 'a': 3},
                              unk_token='[UNK]')
  assert given('bert', words, ['[CLS]', '[SEP]']) == [
      (['[CLS]', 'a', '[SEP]'], [0] * 3),
      (['[CLS]', 'a', '[SEP]', 'a', '[SEP]'], [0, 0, 0, 1, 1])]
  assert given('gpt', words, ['[CLS]', '[SEP]'])[0] == (['a'], [0])
  ends = hf.processors.TemplateProcessing(
      single='$A [SEP]', pair='$A $B [SEP]', special_tokens=[('[SEP]', 2)])
  assert given('bert', words, ['[CLS]', '[SEP]'], ends)[0] == (
      ['a', '[SEP]'], [0, 0])
  unigram = hf.models.Unigram([('a', -1.0), ('<unk>', -2.0)], unk_id=1)
  assert given('t5', unigram, ['</s>'])[0] == (['a', '</s>'], [0, 0])
  assert given('llama', unigram, ['</s>'])[0] == (['a'], [0])


IMAGE = '<image_soft_token>'


def test_a_model_needs_no_row_for_what_no_text_gives(tmp_path):
  """As the tokenizer of Gemma 3's text models has a special token IMAGE of
  which the model has no embedding."""
  folder = data_files.write_roberta_tokenizer(tmp_path)
  file = str(folder / 'tokenizer.json')
  tokenizer = hf.Tokenizer.from_file(file)
  tokenizer.add_special_tokens([IMAGE])
  tokenizer.save(file)
  (folder / 'a.txt').write_text(f'Any text, with {IMAGE} in it. ' * 60)
  config = evaluations.make_config('gpt', 'causal', str(folder), max_len=32)
  tokenizer = tokenizers.load(str(folder))
  size = tokenizer.vocab_size
  config.model.vocab_size = size - 1
  config.data.update(source=f'text:{folder}/a.txt', holdout_every=2)
  assert runs.resolve_model(config, tokenizer)[0].vocab_size == size - 1
  batch = pipeline.make_training_loader(config, tokenizer).batch(0)
  assert batch['tokens'].max() < size - 1  # IMAGE is spelt in plain text
  config.model.vocab_size = 0
  assert runs.resolve_model(config, tokenizer)[0].vocab_size == size
  config.model.vocab_size = size - 2
  with pytest.raises(RequestError, match=f'has {size - 1} ids: set it to 0'):
    runs.resolve_model(config, tokenizer)
