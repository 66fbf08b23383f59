"""Hugging Face folders that are malformed, or say what is not done here: each
is refused in one sentence and at once, or told."""

import json
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import architectures
from configs.errors import RequestError
from tests.helpers import models
from tools import convert
from training import paths, weights
from training.step import abstract_params
from training.hf import config as hf_config
from training.hf import files as hf_files

INDEX = f'{hf_files.SAFE}.index.json'
# What a field may hold by mistake, of every type that JSON has.
WRONG = (
    '2', '', [], [1], {}, {'a': 1}, True, -1, 0, 1, 1.5, 10**9, 10**400,
    float('nan'), float('inf'), 'x' * 5000)


def _model(system, **changes):
  return models.config(system, **dict(dict(
      d_ff=128, head_dim=8, moe=dict(eval_capacity_factor=0.0)), **changes))


def _random(module):
  """Parameters without an initialisation, which would have to be compiled."""
  draw = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: jnp.asarray(draw.random(x.shape, np.float32)),
      nn.meta.unbox(abstract_params(module)))


def _write(folder, system, **changes):
  module = architectures.build(_model(system, **changes))
  weights.to_hf(module, _random(module), folder)
  return folder


def _refused(call, *words):
  """Checks that `call` fails in one sentence, at once, with these words."""
  start = time.process_time()
  with pytest.raises(RequestError) as caught:
    call()
  said = str(caught.value)
  assert len(said.splitlines()) == 1 and len(said) < 900, said
  for word in words:
    assert word in said, said
  assert time.process_time() - start < 5, said


@pytest.mark.parametrize('system', models.PUBLISHED)
def test_every_field_is_of_its_type_or_refused(system, monkeypatch):
  tree = hf_config.write(architectures.resolve(_model(system)))
  readers, make = [], hf_config.Reader.__init__
  def remember(self, *args):
    make(self, *args)
    readers.append(self)
  monkeypatch.setattr(hf_config.Reader, '__init__', remember)
  hf_config.read(tree)
  monkeypatch.undo()
  fields = [(r._name, name) for r in readers for name in sorted(r.asked)]
  assert len(fields) > 8
  refused = 0
  for section, name in fields:
    for value in WRONG:
      part = dict(tree.get(section) or {}) if section else dict(tree)
      part[name] = value
      try:
        hf_config.read(dict(tree, **{section: part}) if section else part)
      except RequestError as error:
        refused += 1
        said = str(error)
        assert '\n' not in said and len(said) < 900, said
  assert refused > 6 * len(fields)


@pytest.mark.parametrize('field, value, words', [
    ('n_layer', '2', "n_layer '2': it must be an integer"),
    ('n_layer', True, 'n_layer True: it must be an integer'),
    ('n_head', 0, 'n_head 0: it must be 1 or more'),
    ('activation_function', [], 'activation_function []: it must be a string'),
    ('layer_norm_epsilon', 'small', "epsilon 'small': it must be a number"),
    ('tie_word_embeddings', 'no', "embeddings 'no': it must be true or false"),
    ('model_type', [], 'model_type []: it must be a string'),
    ('scale_attn_weights', 1, 'scale_attn_weights 1: only True is known'),
    ('n_layer', 10**9, 'num_layers is 1000000000'),
])
def test_a_field_of_another_type_is_named(field, value, words, tmp_path):
  folder = _write(tmp_path, 'gpt')
  file = folder / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
  _refused(lambda: weights.from_hf(folder), words)


def test_a_section_of_another_type_is_named():
  tree = hf_config.write(architectures.resolve(_model('llama')))
  _refused(lambda: hf_config.read(tree | dict(rope_parameters=[1])),
           'rope_parameters [1]: it must be an object')
  _refused(lambda: hf_config.read(tree | dict(rope_parameters=dict(
      rope_type='yarn', factor='4'))),
           "rope_parameters.factor '4': it must be a number")


@pytest.mark.slow
def test_a_model_of_another_size_altogether_is_told_before_it_is_read(
    tmp_path):
  """Before each of the 60,000 experts of a layer is looked for."""
  folder = _write(tmp_path, 'mixtral')
  file = folder / 'config.json'
  file.write_text(json.dumps(
      json.loads(file.read_text()) | dict(num_local_experts=60_000)))
  _refused(lambda: weights.from_hf(folder), 'the files hold')


DAMAGES = {
    'no JSON': ('config.json', '{"a": ', 'config.json is damaged'),
    'deep': ('config.json', '[' * 100_000, 'config.json is damaged'),
    'a list': ('config.json', '[]', 'must be an object'),
    'no text': ('config.json', b'\xff\xfe\x00', 'config.json is damaged'),
    'empty': ('config.json', '', 'config.json is damaged'),
    'index a list': (INDEX, '[]', 'must be an object'),
    'index empty': (INDEX, '{}', "it has no 'weight_map'"),
    'index null': (INDEX, '{"weight_map": null}', 'must be an object'),
    'index to numbers': (INDEX, '{"weight_map": {"a": 1}}', 'weight_map.a'),
    'index to nothing': (INDEX, '{"weight_map": {"a": ""}}', 'must be a'),
    'index to a text': (INDEX, '{"weight_map": {"a": "config.json"}}',
                        'must be a .safetensors'),
    'index above': (INDEX, '{"weight_map": {"a": ".."}}', 'must be a'),
    'empty weights': (hf_files.SAFE, '', 'no whole safetensors file'),
    'text for weights': (hf_files.SAFE, 'x' * 100, 'no whole safetensors'),
    'weights of nothing': (hf_files.SAFE, b'\x02' + bytes(7) + b'{}',
                           'the files have no'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_malformed_folder_is_one_sentence(damage, tmp_path):
  file, content, words = DAMAGES[damage]
  folder = _write(tmp_path, 'gpt')
  (folder / file).write_bytes(
      content if isinstance(content, bytes) else content.encode())
  if damage == 'weights of nothing':  # many lines, one for each tensor
    with pytest.raises(RequestError, match=words):
      weights.from_hf(folder)
  else:
    _refused(lambda: weights.from_hf(folder), words)


@pytest.mark.parametrize('content', [
    b'', b'x', 'list', 'numbers', 'names', 'sparse', 'int8'])
def test_a_malformed_pickle_is_one_sentence(content, tmp_path):
  torch = pytest.importorskip('torch')
  folder = _write(tmp_path, 'gpt')
  good = {k: torch.as_tensor(v)
          for k, v in load_file(folder / hf_files.SAFE).items()}
  (folder / hf_files.SAFE).unlink()
  if isinstance(content, bytes):
    (folder / hf_files.BIN).write_bytes(content)
  else:
    torch.save(dict(
        list=[1], numbers={'a': 1}, names={1: torch.ones(1)},
        sparse={'a': torch.ones(2, 2).to_sparse()},
        int8={k: v.to(torch.int8) for k, v in good.items()})[content],
               folder / hf_files.BIN)
  _refused(lambda: weights.from_hf(folder),
           'is of type int8' if content == 'int8' else hf_files.BIN)


@pytest.mark.parametrize('dtype, said', [
    (np.int8, 'I8'), (np.float64, 'F64'), (np.int32, 'I32'),
    (ml_dtypes.float8_e4m3fn, 'F8_E4M3')])
def test_a_tensor_that_is_no_array_of_weights_is_refused(dtype, said,
                                                         tmp_path):
  folder, name = _write(tmp_path, 'gpt'), 'transformer.h.1.ln_1.bias'
  tensors = load_file(folder / hf_files.SAFE)
  tensors[name] = tensors[name].astype(dtype)
  # A mask of old files, which is not read, may be of whole numbers.
  tensors['transformer.h.0.attn.bias'] = np.ones((1, 1, 8, 8), np.uint8)
  save_file(tensors, folder / hf_files.SAFE)
  _refused(lambda: weights.from_hf(folder), f'{name} is of type {said}')
  _refused(lambda: weights.from_hf(folder, partial=True), f'{name} is of type')


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused_both_ways(value, dtype,
                                                        tmp_path):
  folder, name = _write(tmp_path, 'gpt'), 'transformer.h.1.mlp.c_fc.weight'
  tensors = {k: v.astype(dtype)
             for k, v in load_file(folder / hf_files.SAFE).items()}
  tensors[name][3, 5] = value
  save_file(tensors, folder / hf_files.SAFE)
  _refused(lambda: weights.from_hf(folder),
           f'{name} has a value that is no finite number')
  module = architectures.build(_model('gpt'))
  params = paths.flatten(_random(module))
  at = 'decoder/layers/block_0/ffn/up'
  bad = params | {at: params[at].at[1, 3, 5].set(value)}
  _refused(lambda: weights.to_hf(module, _nested(bad), tmp_path / 'out'),
           f'{at} has a value that is no finite number')
  assert not (tmp_path / 'out').exists()


def _nested(flat):
  tree = {}
  for path, leaf in flat.items():
    *folders, name = path.split('/')
    at = tree
    for folder in folders:
      at = at.setdefault(folder, {})
    at[name] = leaf
  return tree


def test_an_export_that_would_overflow_is_refused(tmp_path):
  module = architectures.build(_model('gpt'))
  params = paths.flatten(_random(module))
  params['head/kernel' if 'head/kernel' in params else 'embed/tokens'] *= 1e6
  call = lambda dtype: weights.to_hf(module, _nested(params),
                                     tmp_path / 'out', dtype=dtype)
  _refused(lambda: call('float16'), 'float16 ends at 65504')
  assert not (tmp_path / 'out').exists()
  call('bfloat16')


@pytest.mark.parametrize('system', ['llama', 'mixtral'])
@pytest.mark.parametrize('where', ['rope_parameters', 'rope_scaling', ''])
def test_half_a_head_is_turned_where_transformers_turns_half(system, where):
  """transformers reads partial_rotary_factor in neither: both ways refused."""
  tree = hf_config.write(architectures.resolve(_model(system)))
  part = dict(rope_theta=1e4, partial_rotary_factor=0.5)
  _refused(lambda: hf_config.read(tree | ({where: part} if where else part)),
           'partial_rotary_factor 0.5', 'whole heads')
  _refused(lambda: hf_config.write(architectures.resolve(_model(
      system, rope=dict(fraction=0.5)))), 'rope.fraction is 0.5')


def test_neox_turns_the_part_that_it_names():
  tree = hf_config.write(architectures.resolve(_model(
      'gpt_neox', rope=dict(fraction=0.5, theta=500.0))))
  del tree['rope_parameters']
  old = dict(rotary_pct=0.5, rotary_emb_base=500)
  # Versions 4.45 on wrote both under other names as well, and read the first.
  for more in ({}, dict(rope_theta=500.0, partial_rotary_factor=0.5)):
    rope = hf_config.read(tree | old | more).rope
    assert (rope.fraction, rope.theta) == (0.5, 500.0)
  _refused(lambda: hf_config.read(tree | old | dict(rope_theta=10000.0)),
           'rope_theta 10000.0: only 500.0')


def test_a_llama_that_transformers_refuses_is_not_exported():
  _refused(lambda: hf_config.write(architectures.resolve(_model(
      'llama', num_heads=5, num_kv_heads=5))), 'num_heads is 5', 'd_model 32')


SMOLLM2 = dict(
    model_type='llama', architectures=['LlamaForCausalLM'],
    attention_bias=False, attention_dropout=0.0, bos_token_id=0,
    eos_token_id=0, hidden_act='silu', hidden_size=576,
    initializer_range=0.041666666666666664, intermediate_size=1536,
    is_llama_config=True, max_position_embeddings=8192, mlp_bias=False,
    num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3,
    pretraining_tp=1, rms_norm_eps=1e-05, rope_interleaved=False,
    rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
    torch_dtype='bfloat16', use_cache=True, vocab_size=49152)
BERT_CHINESE = dict(
    model_type='bert', attention_probs_dropout_prob=0.1, directionality='bidi',
    hidden_act='gelu', hidden_dropout_prob=0.1, hidden_size=768,
    initializer_range=0.02, intermediate_size=3072, layer_norm_eps=1e-12,
    max_position_embeddings=512, num_attention_heads=12, num_hidden_layers=12,
    pad_token_id=0, pooler_fc_size=768, pooler_num_attention_heads=12,
    pooler_num_fc_layers=3, pooler_size_per_head=128,
    pooler_type='first_token_transform', type_vocab_size=2, vocab_size=21128)


@pytest.mark.parametrize('published', [SMOLLM2, BERT_CHINESE])
def test_a_published_field_that_changes_nothing_is_accepted(published):
  c = hf_config.read(published)
  assert (c.d_model, c.num_layers) == (published['hidden_size'],
                                       published['num_hidden_layers'])


def test_a_published_field_that_would_change_something_is_refused():
  _refused(lambda: hf_config.read(SMOLLM2 | dict(rope_interleaved=True)),
           'rope_interleaved True')
  _refused(lambda: hf_config.read(SMOLLM2 | {
      f'field_{i}': 'x' * 1000 for i in range(100)}), 'and 91 more')


@pytest.mark.slow
@pytest.mark.parametrize('file', [
    'tokenizer.json', 'vocab.txt', 'tokenizer.model', 'generation_config.json'])
def test_a_damaged_file_beside_the_weights_is_told_before_work(file,
                                                               tmp_path):
  if file == 'tokenizer.model':
    pytest.importorskip('sentencepiece')
  folder = _write(tmp_path / 'in', 'gpt', vocab_size=384)
  (folder / file).write_text('')
  _refused(lambda: convert.import_(
      folder, tmp_path / 'run', partial=False, seed=0))
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_an_import_says_that_it_drops_nothing(tmp_path, capsys):
  folder = _write(tmp_path / 'in', 'switch', vocab_size=384)
  file = folder / 'config.json'
  tree = json.loads(file.read_text())
  assert hf_config.fields_and_notes(tree)[1] == []  # our own export
  grouped = tree | dict(expert_capacity=2, moe_group_size=16)
  assert hf_config.fields_and_notes(grouped)[1] == []
  file.write_text(json.dumps(tree | dict(expert_capacity=2)))
  convert.import_(folder, tmp_path / 'run', partial=False, seed=0)
  said = capsys.readouterr().err
  assert 'config.json has expert_capacity 2' in said
  assert 'this import drops nothing' in said


def test_an_export_of_gshard_says_what_it_is_in_evaluation():
  """transformers draws the second expert of `random` in evaluation too."""
  tree = hf_config.write(architectures.resolve(_model('gshard')))
  assert tree['second_expert_policy'] == 'all'
  model, notes = hf_config.fields_and_notes(tree)
  assert (model.moe.router, notes) == ('gshard', [])
  model, [note] = hf_config.fields_and_notes(
      tree | dict(second_expert_policy='random'))
  assert model.moe.router == 'gshard' and 'in evaluation too' in note
  _refused(lambda: hf_config.read(tree | dict(
      second_expert_policy='sampling')), "config.json 'sampling'")


def test_a_t5_is_of_the_activation_that_transformers_takes():
  """dense_act_fn counts there, whatever feed_forward_proj says."""
  tree = hf_config.write(architectures.resolve(_model('t5')))
  flan = dict(feed_forward_proj='gated-gelu', dense_act_fn='gelu_new',
              is_gated_act=True)
  assert hf_config.read(tree | flan).ffn == 'geglu_tanh'
  _refused(lambda: hf_config.read(tree | flan | dict(dense_act_fn='silu')),
           "dense_act_fn 'silu': only 'gelu_new'")
  _refused(lambda: hf_config.read(tree | flan | dict(is_gated_act=False)),
           'is_gated_act False')
  _refused(lambda: hf_config.read(tree | dict(scale_decoder_outputs=None)),
           'scale_decoder_outputs null')


@pytest.mark.parametrize('extra, read', [
    (dict(), (64, 2, 4)), (dict(num_attention_heads=8), (64, 2, 8)),
    (dict(num_hidden_layers=3), (64, 3, 4)), (dict(n_embed=32), (32, 2, 4)),
    (dict(n_embed=None), (64, 2, 4))])
def test_of_two_names_for_one_thing_transformers_own_counts(extra, read):
  """BloomConfig: its attribute_map, and n_embed in its __post_init__."""
  c = hf_config.read(dict(model_type='bloom', hidden_size=64, n_layer=2,
                          n_head=4) | extra)
  assert (c.d_model, c.num_layers, c.num_heads) == read
