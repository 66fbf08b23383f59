"""From Hugging Face's folders to workdirs and back, and mixtures of experts."""

import json
import re
import sys
from unittest import mock

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import archetype
import architectures
from architectures.parts import paths
from architectures.parts.moe.routing import MoEConfig
from common.errors import EnvironmentFailure, RequestError
from configs import base
from tests import train_test
from tests.helpers import evaluations, models, toy_run
from tests.parity import exports
from tools import convert
from training import parameters, runs
from training.data import tokenizers
from training.hf import config as hf_config, files as hf_files
from training.hf import generation as hf_generation, peft, upcycling
from training.hf import weights
from training.workdir import checkpoints, run_config

texts = train_test.texts

# A dense system, and what becomes of it: layers with experts alone or between
# dense ones, with biases or without, gated or not, in one stack or in two.
MIXTURES = {
    'llama': dict(num_experts=4, top_k=2),
    'gpt': dict(num_experts=3, top_k=3, every=2, router='sigmoid'),
    'gpt_neox': dict(num_experts=2, top_k=1, router='hash'),
    't5': dict(num_experts=4, top_k=2, every=2, capacity_factor=1.0),
}


def _upcycled(system, changes, **dense):
  old = models.small_config(system, **dense)
  module, params = models.make_model(system, **dense)
  config = base.base()
  config.model = upcycling.upcycle_config(old, changes)
  run = runs.build(config, architectures.resolve(config.model))
  return module, params, run, upcycling.upcycle_parameters(
      run.module, run.abstract_state.params, params, seed=0)


def _check_same_logits(module, params, run, mixture):
  tokens = models.random_tokens()
  a, b = (jax.jit(lambda p, m=m: models.logits(m, p, tokens))(p)
          for m, p in ((module, params), (run.module, mixture)))
  models.assert_trees_close(a, b, rtol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    'system', models.mark_long_except(('gpt',), MIXTURES))
def test_a_mixture_starts_as_its_dense_model(system):
  module, params, run, mixture = _upcycled(
      system, MIXTURES[system], num_layers=4, num_decoder_layers=4)
  assert run.model.ffn == 'moe' and upcycling.keeps_function(run.model)
  for changes in dict(shared_experts=1), dict(eval_capacity_factor=2.0):
    other = run.model.with_part(MoEConfig, **changes)
    assert not upcycling.keeps_function(other), changes
  expected = jax.tree.structure(run.abstract_state.params)
  assert jax.tree.structure(mixture) == expected
  _check_same_logits(module, params, run, mixture)
  flat = paths.flatten_by_path(mixture)
  routers = [x for path, x in flat.items() if path.endswith('ffn/router')]
  assert system == 'gpt_neox' or routers
  for x in routers:
    assert (jnp.std(x, axis=(1, 2)) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize('words, sentence', [
    (['num_expert=4'], "unknown name in --moe 'num_expert': choose from"),
    (['num_experts'], 'write it as NAME=VALUE'),
    (['num_experts=4', 'num_experts=8'], "num_experts twice, as '4' and '8'"),
    (['num_experts=few'], "'few': it must be a whole number"),
    (['normalize_gates=no'], "'no': it must be True or False"),
    (['ffn=relu'], "unknown name in --moe 'ffn'"),
])
def test_a_wrong_mixture_is_refused(words, sentence, tmp_path):
  module, params = models.make_model('llama', vocab_size=384)
  weights.to_hf(module, params, tmp_path / 'in')
  with pytest.raises(ValueError, match=sentence):
    convert.upcycle(tmp_path / 'in', tmp_path / 'out', moe=words, step=None,
                    seed=0)
  assert not run_config.config_file(tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def imported(tmp_path_factory, texts):
  """A workdir of Hugging Face's weights, with a text and a length of ours."""
  folder = tmp_path_factory.mktemp('imported')
  module, params = models.make_model('llama', vocab_size=384)
  weights.to_hf(module, params, folder / 'in')
  convert.import_model(folder / 'in', folder / 'run', partial=False, seed=0)
  file = folder / 'run/config.json'
  tree = json.loads(file.read_text())
  tree['data'].update(source=texts.partition('=')[2], length=16, batch_size=8,
                      holdout_every=4)
  tree['train']['steps'], tree['eval']['batches'] = 2, 1
  file.write_text(json.dumps(tree))
  return folder / 'run'


@pytest.mark.parametrize('room, name', [
    (checkpoints.Checkpoints, 'save'), (run_config, 'save_config')])
def test_an_import_that_fails_leaves_no_run(room, name, tmp_path, monkeypatch):
  """train.py would begin it with parameters of its own."""
  weights.to_hf(*models.make_model('llama', vocab_size=384), tmp_path / 'in')

  def to_run():
    convert.import_model(
        tmp_path / 'in', tmp_path / 'run', partial=False, seed=0)

  def fail(*_, **__):
    raise EnvironmentFailure('the disk is full')
  with monkeypatch.context() as patch:
    patch.setattr(room, name, fail)
    with pytest.raises(EnvironmentFailure, match='full'):
      to_run()
  assert not list((tmp_path / 'run').iterdir())
  left = tmp_path / 'run/tokenizer/tokenizer.json'  # of one that was killed
  left.parent.mkdir()
  left.write_text('{}')
  with pytest.raises(ValueError, match="tokenizer.json', which would stay"):
    to_run()
  left.unlink()
  to_run()  # the same command goes on
  (tmp_path / 'run/config.json').unlink()
  with pytest.raises(ValueError, match='holds a run already'):
    to_run()


@pytest.mark.parametrize('write', [
    lambda folder: convert.export(folder, folder, step=None),
    lambda folder: archetype.Model(*models.make_model()).save(folder),
    lambda folder: peft.write_adapters(models.small_config('llama'), {}, folder,
                                       ''),
    lambda folder: convert.convert_gguf(folder / 'config.json', folder)],
                         ids=['export', 'save', 'peft', 'gguf'])
def test_no_weights_are_written_into_a_run(write, tmp_path):
  run_config.save_config(tmp_path, base.base())
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(RequestError, match='which holds a training run'):
    write(tmp_path)
  assert sorted(tmp_path.rglob('*')) == before


def test_a_run_begins_with_the_parameters_of_a_mixture(
    imported, tmp_path, capsys, monkeypatch):
  workdir, mesh = epath.Path(tmp_path), evaluations.one_device_mesh()
  monkeypatch.setattr(runs.devices, 'make_mesh', lambda *_, **__: mesh)
  load = convert._load_from_workdir
  monkeypatch.setattr(convert, '_load_from_workdir',
                      lambda *args: (*load(*args)[:3], 7))  # its step
  convert.upcycle(imported, workdir, moe=['num_experts=4', 'every=2'],
                  step=None, seed=0)
  assert 'to go on: python train.py' in capsys.readouterr().out
  assert hf_generation.load_generation(
      workdir) == hf_generation.load_generation(imported)
  assert hf_generation.is_published(imported, 0)
  assert not hf_generation.is_published(workdir, 0)  # as it was trained
  config, _, params, _ = convert._load_from_workdir(workdir, None)
  assert config.model.pattern == 'dense,moe'
  run = runs.build(config, architectures.resolve(config.model))
  with toy_run.open_store(workdir) as store:
    state = parameters.restore_run(run, store).state
  assert ('starting from the parameters in this workdir'
          in capsys.readouterr().out)
  jax.tree.map(np.testing.assert_array_equal, state.params, params)


def test_what_is_no_gguf_file_is_refused(
    tmp_path, content=b'{}', words='is no GGUF file'):
  file = tmp_path / 'model.gguf'
  file.write_bytes(content)
  with pytest.raises(RequestError, match=words):
    convert.convert_gguf(file, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


ALL = dict.fromkeys(('missing_keys', 'unexpected_keys', 'mismatched_keys'), ())


def _model(size):
  """Stands for a model of one tensor, whose epsilon is none."""
  tensor = mock.Mock(**{'numel.return_value': size})
  return mock.Mock(**{'state_dict.return_value': dict(a=tensor),
                      'config.to_json_string.return_value':
                      '{"model_type": "llama", "rms_norm_eps": -1.0}'})


@pytest.mark.parametrize('loaded, words', [
    ((_model(9), ALL), 'that an import refuses: .*norm_eps is -1'),
    ((_model(4), ALL), 'has 9 weights, of which transformers reads 4'),
    ((None, dict(missing_keys={'a'})), r"names as missing_keys \['a'\]"),
    ((None, dict(missing_keys=(), unexpected_keys={'b'})), 'as unexpected_key'),
    (None, 'says that it has 2 layers, and has 1 tensors'),
    (IndexError('no tensor'), 'does not read .*: IndexError: no tensor')])
def test_a_gguf_file_is_read_whole_or_not(loaded, words, tmp_path, monkeypatch):
  """By what transformers, which this stands in for, says of it."""
  library = mock.Mock()
  library.AutoConfig.from_pretrained().num_hidden_layers = 1 if loaded else 2
  library.AutoModelForCausalLM.from_pretrained.side_effect = [loaded]
  library.GGUFReader.return_value.tensors = [
      mock.Mock(n_elements=9, **{'name.startswith.return_value': False})]
  for name in 'gguf', 'torch', 'transformers':
    monkeypatch.setitem(sys.modules, name, library)
  test_what_is_no_gguf_file_is_refused(tmp_path, b'GGUF', words)


GIVEN = dict(
    fields=dict(bos_token_id=3, eos_token_id=[4, 5], pad_token_id=None,
                task_specific_params=dict(chat=dict(max_length=50))),
    options=dict(bos_token_id=3, eos_token_id=[4, 5, 7], do_sample=True,
                 temperature=0.6, transformers_version='4.40.0'))
TEMPLATE = '{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}'


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """A workdir of weights with 61 ids, a chat template and no tokenizer."""
  folder = tmp_path_factory.mktemp('generation')
  module, params = models.make_model('llama', vocab_size=61)
  weights.to_hf(module, params, folder / 'in',
                generation=hf_generation.Generation(**GIVEN))
  (folder / 'in/chat_template.jinja').write_text(TEMPLATE)
  convert.import_model(folder / 'in', folder / 'run', partial=False, seed=0)
  return folder / 'run'


def _exported(workdir, out):
  convert.export(workdir, out, step=None)
  return {path.name: path.read_text() for path in out.iterdir()
          if path.suffix not in ('.safetensors', '.md')}


@pytest.mark.slow
def test_an_import_is_exported_with_what_generation_needs(published, tmp_path):
  files = _exported(published, tmp_path / 'out')
  given = published.parent / 'in'
  assert files == {name: (given / name).read_text() for name in (
      'config.json', 'generation_config.json', 'chat_template.jinja')}
  assert load_file(tmp_path / 'out' / hf_files.SAFE).keys() == load_file(
      given / hf_files.SAFE).keys()
  assert (tmp_path / 'out' / hf_files.SAFE).read_bytes() == (
      given / hf_files.SAFE).read_bytes()
  tree = json.loads(files['config.json'])
  assert {k: tree[k] for k in GIVEN['fields']} == GIVEN['fields']


@pytest.mark.slow
def test_training_gives_the_ids_another_meaning(published):
  """Of the first step on, a model of 61 ids writes bytes, and its export says
  so; one that has its own tokenizer keeps its own."""
  config = run_config.load_config(published)
  model = architectures.resolve(config.model)
  kept = hf_generation.load_generation(published)
  assert convert._generation_of_export(published, config, model, 0) == kept
  assert checkpoints.checkpoint_folder(published).exists()
  ids = tokenizers.load('bytes:61').special_ids
  assert convert._generation_of_export(published, config, model, 9).fields == {
      f'{name}_token_id': ids[name] for name in ('bos', 'eos', 'pad')}
  with config.unlocked():
    config.data.tokenizer = 'a/tokenizer.json'
  assert convert._generation_of_export(published, config, model, 9) == kept


@pytest.mark.slow
def test_a_tokenizer_that_is_not_read_goes_along(tmp_path, capsys):
  """Marian's numbers its pieces by vocab.json, without merges."""
  module, params = models.make_model('llama', vocab_size=384)
  weights.to_hf(module, params, tmp_path / 'in')
  kept = ('source.spm', 'target.spm', 'vocab.json')
  for name in kept:
    (tmp_path / 'in' / name).write_text(name)
  convert.import_model(tmp_path / 'in', tmp_path / 'run', partial=False, seed=0)
  assert ('no tokenizer that is read here, though vocab.json, source.spm'
          in capsys.readouterr().err)
  assert run_config.load_config(tmp_path / 'run').data.tokenizer == 'bytes'
  convert.export(tmp_path / 'run', tmp_path / 'out', step=None)
  for name in kept:
    assert (tmp_path / 'out' / name).read_text() == name

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


def _folder(path, drop='', architecture='', system='bert', **changes):
  """Writes a folder without the tensors whose names have `drop`; returns it."""
  module = architectures.build(models.small_config(system, **changes))
  params = exports.random(module)
  weights.to_hf(module, params, path)
  bare = architecture.startswith('BertModel')
  tensors = {name.removeprefix('bert.') if bare else name: x
             for name, x in load_file(path / hf_files.SAFE).items()
             if not (drop and re.search(drop, name))}
  save_file(tensors, path / hf_files.SAFE)
  if architecture:
    file = path / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(
        architectures=[architecture.partition(' ')[0]])))
  return path


@pytest.mark.slow
@pytest.mark.parametrize('kind', FOLDERS)
def test_a_folder_may_lack_heads(kind, tmp_path, capsys):
  drop, next_sentence, new = FOLDERS[kind]
  given = _folder(tmp_path / 'in', drop, kind)
  run = epath.Path(tmp_path / 'run')
  convert.import_model(given, run, partial=False, seed=0)
  lines = [line for line in capsys.readouterr().out.splitlines()
           if 'new, drawn from the seed' in line]
  config, _, params, _ = convert._load_from_workdir(run, None)
  assert config.model.next_sentence == next_sentence
  named = {name for line in lines
           for name in line.rpartition(': ')[2].split(', ')}
  assert named == new and new <= paths.flatten_by_path(params).keys()
  convert.export(run, tmp_path / 'out', step=None)
  before, after = (load_file(folder / hf_files.SAFE)
                   for folder in (given, tmp_path / 'out'))
  assert len(before) == len(after) or kind != 'BertForMaskedLM'
  for name, x in before.items():
    there = name if name in after else f'bert.{name}'
    np.testing.assert_array_equal(x, after[there], name)


def test_files_tell_of_a_pooler_whatever_config_json_says(tmp_path):
  """Those of 2018 call themselves BertForMaskedLM and hold all heads."""
  folder = _folder(tmp_path, architecture='BertForMaskedLM')
  assert not hf_config.model_of_config_json(
      hf_config.load_config_json(folder)).next_sentence
  module, params = weights.from_hf(folder)
  assert module.config.next_sentence
  assert NSP | POOLER <= paths.flatten_by_path(params).keys()


def test_a_head_that_is_there_in_part_is_damage(tmp_path):
  folder = _folder(tmp_path, r'predictions\.transform\.dense\.bias')
  with pytest.raises(RequestError, match='have no cls.predictions.transform'):
    weights.from_hf(folder)
