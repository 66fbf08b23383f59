"""Weights that a run starts from: imported, upcycled, or taken in part."""

import json
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archetype
import architectures
from configs import base
from configs.errors import EnvironmentFailure, RequestError
from tests import train_test
from tests.helpers import models
from tools import convert
from training import parameters, paths, runs
from training.hf import generation as hf_generation, gguf, peft, upcycling
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
  old = models.config(system, **dense)
  module, params = models.make(system, **dense)
  config = base.base()
  config.model = upcycling.config(old, changes)
  run = runs.build(config, architectures.resolve(config.model))
  return module, params, run, upcycling.params(
      run.module, run.abstract.params, params, seed=0)


def _check_same_logits(module, params, run, mixture):
  tokens = models.tokens()
  a, b = (jax.jit(lambda p, m=m: models.logits(m, p, tokens))(p)
          for m, p in ((module, params), (run.module, mixture)))
  models.close(a, b, rtol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize('system', MIXTURES)
def test_a_mixture_starts_as_its_dense_model(system):
  module, params, run, mixture = _upcycled(
      system, MIXTURES[system], num_layers=4, num_decoder_layers=4)
  assert run.model.ffn == 'moe' and upcycling.is_the_same_function(run.model)
  assert jax.tree.structure(mixture) == jax.tree.structure(run.abstract.params)
  _check_same_logits(module, params, run, mixture)
  flat = paths.flatten(mixture)
  routers = [x for path, x in flat.items() if path.endswith('ffn/router')]
  assert system == 'gpt_neox' or routers
  for x in routers:
    assert (jnp.std(x, axis=(1, 2)) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize('words, sentence', [
    (['num_expert=4'], 'write FIELD=VALUE, of the fields'),
    (['num_experts'], 'write FIELD=VALUE'),
    (['num_experts=few'], "'few' is no int"),
    (['normalize_gates=no'], "'no' is no bool"),
    (['ffn=relu'], "unknown field of model.moe 'ffn'"),
])
def test_a_wrong_mixture_is_refused(words, sentence, tmp_path):
  module, params = models.make('llama', vocab_size=384)
  weights.to_hf(module, params, tmp_path / 'in')
  with pytest.raises(ValueError, match=sentence):
    convert.upcycle(tmp_path / 'in', tmp_path / 'out', moe=words, step=None,
                    seed=0)
  assert not run_config.exists(tmp_path / 'out')


@pytest.fixture(scope='module')
def imported(tmp_path_factory, texts):
  """A workdir of Hugging Face's weights, with a text and a length of ours."""
  folder = tmp_path_factory.mktemp('imported')
  module, params = models.make('llama', vocab_size=384)
  weights.to_hf(module, params, folder / 'in')
  convert.import_(folder / 'in', folder / 'run', partial=False, seed=0)
  file = folder / 'run/config.json'
  tree = json.loads(file.read_text())
  tree['data'].update(source=texts.partition('=')[2], length=16, batch_size=8,
                      holdout_every=4)
  tree['train']['steps'], tree['eval']['batches'] = 2, 1
  file.write_text(json.dumps(tree))
  return folder / 'run'


def test_an_import_that_fails_leaves_no_run(tmp_path, monkeypatch):
  """train.py would begin it with parameters of its own."""
  weights.to_hf(*models.make('llama', vocab_size=384), tmp_path / 'in')

  def to_run():
    convert.import_(tmp_path / 'in', tmp_path / 'run', partial=False, seed=0)

  def fail(*_, **__):
    raise EnvironmentFailure('the disk is full')
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.Checkpoints, 'save', fail)
    with pytest.raises(EnvironmentFailure, match='full'):
      to_run()
  assert not run_config.exists(tmp_path / 'run')
  to_run()  # the same command goes on
  (tmp_path / 'run/config.json').unlink()
  with pytest.raises(ValueError, match='holds a run already'):
    to_run()


@pytest.mark.parametrize('write', [
    lambda folder: convert.export(folder, folder, step=None, dtype='',
                                  shard_bytes=10**9),
    lambda folder: archetype.Model(None, {}).save(folder),
    lambda folder: peft.write(models.config('llama'), {}, folder, ''),
    lambda folder: gguf.write_folder(folder / 'config.json', folder)],
                         ids=['export', 'save', 'peft', 'gguf'])
@pytest.mark.parametrize('own', ['config.json', 'checkpoints'])
def test_no_weights_are_written_into_a_run(write, own, tmp_path):
  if own == 'checkpoints':
    (tmp_path / own / '5').mkdir(parents=True)
  else:
    run_config.save(tmp_path, base.base())
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(RequestError, match='which holds a training run'):
    write(tmp_path)
  assert sorted(tmp_path.rglob('*')) == before


# Of the programs; hf_generation_test.py evaluates an import, too.
def test_eval_reads_an_import_and_train_goes_on_in_a_mixture(
    imported, tmp_path, capsys):
  assert 'bits per byte' in train_test.evaluate(imported).stdout
  convert.upcycle(imported, tmp_path / 'moe',
                  moe=['num_experts=4', 'every=2'], step=None, seed=0)
  assert run_config.load_config(
      tmp_path / 'moe').model.pattern == 'dense,moe'
  assert hf_generation.kept(tmp_path / 'moe') == hf_generation.kept(imported)
  said = capsys.readouterr().out.strip().splitlines()[-1]
  words = shlex.split(said.removeprefix('to go on: '))
  assert words[:2] == ['python', 'train.py']
  result = train_test.run([sys.executable, *words[1:]])
  assert 'starting from the parameters in this workdir' in result.stdout
  assert [r['step'] for r in train_test.rows(tmp_path / 'moe')
          if r['split'] == 'eval'] == [2]


def _start(imported, **changes):
  """Returns (run, state, what was drawn) of a run that starts from a workdir.
  """
  config = run_config.load_config(imported).copy_and_resolve_references()
  with config.unlocked():
    config.init_from = str(imported)
    config.model.update(changes.pop('model', {}))
    config.update(changes)
  run = runs.build(config, architectures.resolve(config.model))
  return run, parameters.create(run, config.init_from)


@pytest.mark.slow
def test_a_run_starts_from_a_workdir(imported):
  _, params = models.make('llama', vocab_size=384)
  _, state = _start(imported)
  jax.tree.map(np.testing.assert_array_equal, state.params, params)
  with pytest.raises(ValueError, match=r"position is 'alibi', not 'rope'.*"
                     'init_partial=True'):
    _start(imported, model=dict(position='alibi'))


@pytest.mark.parametrize('content, words', [
    (None, 'is no file'), (b'{}', 'is no GGUF file')])
def test_what_is_no_gguf_file_is_refused(content, words, tmp_path):
  file = tmp_path / 'model.gguf'
  if content is not None:
    file.write_bytes(content)
  with pytest.raises(RequestError, match=words):
    gguf.write_folder(file, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
