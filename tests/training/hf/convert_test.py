"""Weights that a run starts from: imported, upcycled, or taken in part."""

import json
import os
import pathlib
import shlex
import shutil
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
from tests.helpers import toy_run
from tools import convert
from training import paths, runs
from training import initial_state
from training import weights
from training.hf import generation as hf_generation
from training.hf import gguf, peft
from training.hf import upcycling
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
@pytest.mark.parametrize('system', [
    pytest.param(system, marks=[pytest.mark.long] * (
        system != 'llama')) for system in MIXTURES])
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


@pytest.mark.long
def test_layers_keep_their_order_in_another_period():
  # Global and banded layers in turn, of which every fourth gets experts.
  module, params, run, mixture = _upcycled(
      'gpt', dict(num_experts=2, every=4), num_layers=4,
      pattern='all,near', kinds=dict(all=dict(window=0), near=dict(window=5)))
  assert [kind.ffn for kind in run.model.layer_pattern()] == [
      'gelu_tanh'] * 3 + ['moe']
  _check_same_logits(module, params, run, mixture)


@pytest.mark.parametrize('changes', [
    dict(top_k=1), dict(normalize_gates=False), dict(eval_capacity_factor=1.0),
    dict(shared_experts=1)])
def test_another_function_is_told(changes):
  model = upcycling.config(models.config('llama'), changes)
  assert not upcycling.is_the_same_function(architectures.resolve(model))


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


def test_words_make_a_mixture_in_every_other_layer():
  model = models.config('llama')
  fields = upcycling.fields(['num_experts=4', 'every=2'], model.moe)
  assert fields == dict(num_experts=4, every=2)
  assert [kind.ffn for kind in architectures.resolve(
      upcycling.config(model, fields)).layer_pattern()] == [model.ffn, 'moe']
  for word, sentence in (('every=0', 'every is 0'), ('every=a', 'is no int')):
    with pytest.raises(RequestError, match=sentence):
      upcycling.config(model, upcycling.fields([word], model.moe))


@pytest.mark.slow
def test_weights_of_one_device_become_a_mixture_on_all():
  old = models.config('llama')
  _, params = models.make('llama')
  params = jax.device_put(params, jax.devices()[0])  # as files are read
  config = base.base()
  config.model = upcycling.config(old, MIXTURES['llama'])
  run = runs.build(config, architectures.resolve(config.model))
  assert run.mesh.size > 1
  made = paths.flatten(upcycling.params(
      run.module, run.abstract.params, params, seed=0))
  assert all(x.sharding.device_set == set(run.devices) for x in made.values())
  name = 'embed/tokens'
  np.testing.assert_array_equal(made[name], paths.flatten(params)[name])


def test_several_devices_have_threads_enough(tmp_path, monkeypatch):
  monkeypatch.delenv('PJRT_NPROC')
  monkeypatch.setattr(sys, 'argv', [
      'convert', 'import', str(tmp_path / 'none'), str(tmp_path / 'run')])
  with pytest.raises(RequestError, match='none'):
    convert.main()
  assert int(os.environ['PJRT_NPROC']) >= 32


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize('lora', [
    {}, pytest.param(dict(rank=2, alpha=4.0, targets='all-linear'),
                     marks=pytest.mark.long)])
def test_a_run_that_derived_its_vocabulary_is_upcycled(lora, tmp_path):
  """With adapters, from the sums of them and the weights."""
  config = base.base()
  config.data.length = 32
  config.model = models.config('llama', vocab_size=0, max_len=0, lora=lora)
  model, derived = convert._resolved(config)
  module, params = models.make('llama', vocab_size=model.vocab_size, lora=lora)
  convert._save(tmp_path / 'run', config, params, derived)
  convert.upcycle(tmp_path / 'run', tmp_path / 'moe',
                  moe=['num_experts=4', 'top_k=2'], step=None, seed=0)
  _, made, mixture, _ = convert._from_workdir(tmp_path / 'moe', None)
  assert (made.config.vocab_size, made.config.lora.rank) == (
      module.config.vocab_size, 0)
  tokens = models.tokens()
  models.close(*(jax.jit(lambda p, m=m: models.logits(m, p, tokens))(p)
                 for m, p in ((module, params), (made, mixture))))


def test_experts_are_not_upcycled_again():
  with pytest.raises(ValueError, match='has experts already'):
    upcycling.config(models.config('mixtral'), {})


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


def test_no_run_is_made_in_a_folder_of_weights(tmp_path):
  file = tmp_path / 'config.json'
  file.write_text('{"model_type": "llama"}')
  more = dict(step=None)
  for make in (
      lambda: convert.import_(tmp_path, tmp_path, partial=False, seed=0),
      lambda: convert.merge(tmp_path / 'run', tmp_path, **more),
      lambda: convert.upcycle(tmp_path, tmp_path, moe=[], seed=0, **more)):
    with pytest.raises(RequestError, match='is not that of a run .*: take '
                       'another WORKDIR'):
      make()
  assert list(tmp_path.iterdir()) == [file]


def _with_adapters(imported, workdir, step):
  """Saves the import with adapters, as a run after so many steps."""
  lora = dict(rank=2, alpha=4.0, targets='query')
  config = run_config.load_config(imported).copy_and_resolve_references()
  with config.unlocked():
    config.model.lora.update(lora)
  _, params = models.make('llama', vocab_size=384, lora=lora)
  with checkpoints.Checkpoints(workdir, every_steps=0, every_minutes=0.0,
                               keep=1, keep_every=0) as saved:
    saved.save(step, {'params': params}, next_batch=0, tokens=0, config=config)
  run_config.save(workdir, config)
  shutil.copy(imported / 'generation.json', workdir)
  return workdir


@pytest.mark.long
@pytest.mark.slow
def test_what_is_made_of_a_trained_run_was_trained(imported, tmp_path):
  """And so was what is made of that."""
  def upcycle(run, new):
    convert.upcycle(run, new, moe=['num_experts=2', 'top_k=1'], step=None,
                    seed=0)
    return new
  merged = {}
  for step in 0, 3:
    run = _with_adapters(imported, tmp_path / f'run{step}', step)
    merged[step] = tmp_path / f'merged{step}'
    convert.merge(run, merged[step], step=None)
  assert hf_generation.published(merged[0], 0) == hf_generation.kept(imported)
  for made in merged[3], upcycle(merged[3], tmp_path / 'moe'):
    assert not hf_generation.is_published(made, 0)
    assert hf_generation.kept(made) == hf_generation.kept(merged[3])
  # A run of our own has no folder, and so has what is made of it.
  (run / 'generation.json').unlink()
  own = upcycle(run, tmp_path / 'own')
  assert not hf_generation.is_published(own, 0)
  assert hf_generation.kept(own) is None


# Of the programs; hf_generation_test.py evaluates an import, too.
@pytest.mark.long
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
  return run, initial_state.create(run, config.init_from)


@pytest.mark.slow
def test_a_run_starts_from_a_workdir(imported):
  _, params = models.make('llama', vocab_size=384)
  _, state = _start(imported)
  jax.tree.map(np.testing.assert_array_equal, state.params, params)
  with pytest.raises(ValueError, match=r"position is 'alibi', not 'rope'.*"
                     'init_partial=True'):
    _start(imported, model=dict(position='alibi'))


@pytest.mark.slow
def test_what_fits_is_taken_and_the_rest_listed(imported, capsys):
  _, params = models.make('llama', vocab_size=384)
  old = paths.flatten(params)
  _, state = _start(imported, init_partial=True,
                    model=dict(d_ff=96, norm='layernorm'))
  lines = [line.removeprefix('skipped: ') for line in
           capsys.readouterr().out.splitlines() if 'skipped: ' in line]
  new = paths.flatten(state.params)
  same = {path for path in new
          if path in old and new[path].shape == old[path].shape
          and (new[path] == old[path]).all()}
  assert set(new) - same == {
      path for path in new if '/ffn/' in path or path.endswith('norm/bias')}
  for path in set(new) - same:
    assert any(line.startswith(f'params/{path} is ') for line in lines), path
  assert len(lines) == len(set(new) - same) + 2  # and model.d_ff, model.norm
  assert any("model.norm is 'layernorm', not 'rmsnorm'" in x for x in lines)


@pytest.mark.slow
def test_nothing_that_fits_is_an_error(imported):
  with pytest.raises(ValueError, match='nothing fits'):
    _start(imported, init_partial=True,
           model=dict(d_model=64, head_dim=4, num_heads=2, vocab_size=400))


def test_weights_without_an_optimiser_are_told_apart(imported, tmp_path):
  folder = pathlib.Path(imported) / 'checkpoints'
  assert initial_state.has_parameters_alone(folder)
  assert not initial_state.has_parameters_alone(tmp_path / 'checkpoints')
  with checkpoints.Checkpoints(tmp_path, every_steps=0, every_minutes=0.0,
                               keep=1, keep_every=0) as saved:
    saved.save(0, {'params': jnp.zeros(2), 'opt_state': jnp.zeros(2)},
               next_batch=0, tokens=0, config=base.base())
  assert not initial_state.has_parameters_alone(tmp_path / 'checkpoints')


@pytest.mark.long
@pytest.mark.parametrize('damaged', ['record', 'state'])
def test_an_import_is_begun_anew_where_the_first_checkpoint_is_damaged(
    imported, tmp_path, damaged, capsys):
  shutil.copytree(imported, tmp_path, dirs_exist_ok=True)
  config = run_config.load_config(imported)
  run = runs.build(config, architectures.resolve(config.model))
  for again in (False, True):
    with checkpoints.Checkpoints(tmp_path, **config.checkpoint) as saved:
      state, start = initial_state.restore_or_create(run, saved)
      assert (int(state.step), start) == (0, 0)
      assert saved.save(2, state, next_batch=2, tokens=2, config=config)
    step = saved.directory / '2'
    if again:
      break
    if damaged == 'record':
      (step / 'record/metadata').unlink()
    else:
      toy_run.flip_in_largest(pathlib.Path(step))
  assert 'checkpoint 2 in' in capsys.readouterr().err
  assert (saved.directory / '2.aside').exists()
  _, params = models.make('llama', vocab_size=384)
  jax.tree.map(np.testing.assert_array_equal, state.params, params)


@pytest.mark.parametrize('content, words', [
    (None, 'is no file'), (b'{}', 'is no GGUF file')])
def test_what_is_no_gguf_file_is_refused(content, words, tmp_path):
  file = tmp_path / 'model.gguf'
  if content is not None:
    file.write_bytes(content)
  with pytest.raises(RequestError, match=words):
    gguf.write_folder(file, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
