"""Folders of encoders as they are: without a pooler, a head, or both; RoBERTa's
positions and ModernBERT's layers."""

import json

from etils import epath
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import architectures
from configs.errors import RequestError
from tests.helpers import models
from tools import convert
from tests.parity import exports
from training import paths
from training.hf import config as hf_config, files as hf_files
from training.hf import heads as hf_heads, weights

HEADS = {'transform', 'transform_bias', 'transform_norm/scale',
         'transform_norm/bias', 'head/bias'}
NSP = {'nsp', 'nsp_bias'}
POOLER = {'pooler', 'pooler_bias'}
# Folders as transformers' classes write them: (the class, what is left out of
# the files, model.next_sentence, the parameters that are new).
FOLDERS = {
    'BertForMaskedLM': (r'bert\.pooler|cls\.seq', False, set()),
    'BertModel': (r'cls\.', True, HEADS | NSP),
    'BertModel without a pooler': (r'cls\.|pooler', False, HEADS),
}


def _make(system, **changes):
  """Returns (module, parameters that all matter), of which nothing is compiled.
  """
  module = architectures.build(models.config(system, **changes))
  return module, exports.random(module)


def _folder(path, drop='', architecture='', system='bert', **changes):
  """Writes a folder without the tensors whose names have `drop`; returns it."""
  module, params = _make(system, **changes)
  weights.to_hf(module, params, path)
  bare = architecture.startswith('BertModel')
  tensors = {name.removeprefix('bert.') if bare else name: x
             for name, x in load_file(path / hf_files.SAFE).items()
             if not (drop and hf_heads._of(f'.*({drop}).*', [name]))}
  save_file(tensors, path / hf_files.SAFE)
  if architecture:
    _say(path, architectures=[architecture.partition(' ')[0]])
  return path


def _say(folder, **changes):
  file = folder / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.slow
@pytest.mark.parametrize('kind', FOLDERS)
def test_a_folder_without_all_heads_goes_in_and_out_as_it_is(kind, tmp_path,
                                                             capsys):
  drop, next_sentence, new = FOLDERS[kind]
  given = _folder(tmp_path / 'in', drop, kind)
  run = epath.Path(tmp_path / 'run')
  convert.import_(given, run, partial=False, seed=0)
  said = [line for line in capsys.readouterr().out.splitlines()
          if 'new, drawn from the seed' in line]
  config, _, params, _ = convert._from_workdir(run, None)
  assert config.model.next_sentence == next_sentence
  named = {name for line in said
           for name in line.rpartition(': ')[2].split(', ')}
  assert named == new and new <= paths.flatten(params).keys()
  convert.export(run, tmp_path / 'out', step=None, dtype='',
                 shard_bytes=10**9)
  before, after = (load_file(folder / hf_files.SAFE)
                   for folder in (given, tmp_path / 'out'))
  assert before.keys() == after.keys()
  for name, x in before.items():
    np.testing.assert_array_equal(x, after[name], name)
  assert (hf_config.load_config_json(tmp_path / 'out')['architectures']
          == [kind.partition(' ')[0]])


def test_files_tell_of_a_pooler_whatever_config_json_says(tmp_path):
  """Those of 2018 call themselves BertForMaskedLM and hold all heads."""
  folder = _folder(tmp_path, architecture='BertForMaskedLM')
  assert not hf_config.read(
      hf_config.load_config_json(folder)).next_sentence
  module, params = weights.from_hf(folder)
  assert module.config.next_sentence
  assert NSP | POOLER <= paths.flatten(params).keys()


def test_a_head_that_is_there_in_part_is_damage(tmp_path):
  folder = _folder(tmp_path, r'predictions\.transform\.dense\.bias')
  with pytest.raises(RequestError, match='have no cls.predictions.transform'):
    weights.from_hf(folder)


@pytest.mark.parametrize('system', ['bert', 'roberta', 'modernbert'])
def test_the_head_is_left_out_on_request(system, tmp_path):
  module, params = _make(system)
  weights.to_hf(module, params, tmp_path, bare=True)
  tree = hf_config.load_config_json(tmp_path)
  assert tree['architectures'][0].endswith('Model')
  files = hf_files.Files(tmp_path)
  page = architectures.hugging_face(system)
  assert not any(name.startswith(page.bare[1]) for name in files)
  assert hf_heads.is_bare(page, module.config, set(files))
  with pytest.warns(UserWarning, match='no head of') as said:
    again, read = weights.from_hf(tmp_path)
  assert any('no head of masked words' in str(w.message) for w in said)
  theirs = paths.flatten(read)
  for path, x in paths.flatten(params).items():
    if path.startswith(('embed', 'encoder')):
      np.testing.assert_array_equal(x, theirs[path], path)
  assert again.config.next_sentence == module.config.next_sentence


ROBERTA = dict(
    architectures=['RobertaForMaskedLM'], attention_probs_dropout_prob=0.1,
    bos_token_id=0, eos_token_id=2, hidden_act='gelu', hidden_dropout_prob=0.1,
    hidden_size=768, initializer_range=0.02, intermediate_size=3072,
    layer_norm_eps=1e-05, max_position_embeddings=514, model_type='roberta',
    num_attention_heads=12, num_hidden_layers=12, pad_token_id=1,
    type_vocab_size=1, vocab_size=50265)
MODERNBERT = dict(
    architectures=['ModernBertForMaskedLM'], attention_bias=False,
    attention_dropout=0.0, bos_token_id=50281, classifier_activation='gelu',
    classifier_bias=False, classifier_dropout=0.0, classifier_pooling='mean',
    cls_token_id=50281, decoder_bias=True, deterministic_flash_attn=False,
    embedding_dropout=0.0, eos_token_id=50282, global_attn_every_n_layers=3,
    global_rope_theta=160000.0, gradient_checkpointing=False,
    hidden_activation='gelu', hidden_size=768, initializer_cutoff_factor=2.0,
    initializer_range=0.02, intermediate_size=1152, layer_norm_eps=1e-05,
    local_attention=128, local_rope_theta=10000.0,
    max_position_embeddings=8192, mlp_bias=False, mlp_dropout=0.0,
    model_type='modernbert', norm_bias=False, norm_eps=1e-05,
    num_attention_heads=12, num_hidden_layers=22, pad_token_id=50283,
    position_embedding_type='absolute', sep_token_id=50282,
    tie_word_embeddings=True, torch_dtype='float32', vocab_size=50368)


def test_robertas_first_token_stands_after_the_row_of_padding(tmp_path):
  c = hf_config.read(ROBERTA)
  assert (c.max_len, c.learned.offset) == (512, 2)
  c = hf_config.read(ROBERTA | dict(pad_token_id=0))
  assert (c.max_len, c.learned.offset) == (513, 1)
  with pytest.raises(RequestError, match='learned.offset is 0: transformers'):
    hf_config.write(architectures.resolve(
        models.config('roberta', learned=dict(offset=0))))
  with pytest.raises(RequestError, match='max_position_embeddings 2, of which'):
    hf_config.read(ROBERTA | dict(max_position_embeddings=2))
  # As roberta-base, whose files have a pooler that nothing trained.
  module, params = _make('roberta')
  weights.to_hf(module, params, tmp_path)
  file = tmp_path / hf_files.SAFE
  save_file(load_file(file) | {
      f'roberta.pooler.dense.{name}': np.ones(shape, np.float32)
      for name, shape in (('weight', (32, 32)), ('bias', 32))}, file)
  with pytest.warns(UserWarning, match='model has no pooler'):
    _, read = weights.from_hf(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, read)


def test_modernberts_layers_are_those_that_its_config_json_names():
  c = hf_config.read(MODERNBERT)
  layers = [c.of_kind(kind.name) for kind in c.layer_kinds(22)]
  assert [layer.block for layer in layers] == ['ffn_norm'] + 21 * ['pre_norm']
  assert [layer.sliding_window for layer in layers] == [
      65 if n % 3 else 0 for n in range(22)]
  assert [layer.rope.theta for layer in layers] == [
      1e4 if n % 3 else 1.6e5 for n in range(22)]
  assert (c.prefix, c.pattern) == ('first', 'local,local,global')
  local = ['full_attention', *5 * ['sliding_attention'], 'full_attention']
  other = hf_config.read(MODERNBERT | dict(
      num_hidden_layers=7, layer_types=local))
  assert other.pattern == 'local,local,local,local,local,global'
  with pytest.raises(RequestError, match='layer_types that are not 22 of full'):
    hf_config.read(MODERNBERT | dict(layer_types=local))
  rows = MODERNBERT | dict(
      architectures=['ModernBertForSequenceClassification'])
  assert (c.pooling, hf_config.read(rows).pooling) == ('cls', 'mean')
  with pytest.raises(RequestError, match="classifier_pooling 'max': choose"):
    hf_config.read(rows | dict(classifier_pooling='max'))
  for wrong in (dict(rope_scaling=dict(rope_type='linear', factor=2.0)),
                dict(rope_parameters=dict(rope_theta=1e4)),
                dict(classifier_bias=True)):
    with pytest.raises(RequestError, match=next(iter(wrong))):
      hf_config.read(MODERNBERT | wrong)
