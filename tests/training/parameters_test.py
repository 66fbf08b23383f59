"""Fine-tuning starts from a language model's weights as they are: the head of
the task is drawn, that of the language model left out, all else refused. And
which parameters a checkpoint stands for, and the mean of several."""

import re

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf

import architectures
from architectures.parts import paths
from common.errors import RequestError
from configs import base
from tests.helpers import data_files, evaluations, models
from training import parameters, runs
from training.data import tokenizers
from training.hf import weights
from training.objectives import pipeline
from training.workdir import checkpoints, run_config

HEAD = dict(head='sequence', num_labels=3)


def _run(model, source):
  config = base.base()
  config.model = model
  config.update(init_from=str(source), data=dict(length=16, batch_size=8))
  return runs.build(config, architectures.resolve(model),
                    evaluations.one_device_mesh())


def _start(source, system, **changes):
  run = _run(models.small_config(system, **HEAD, **changes), source)
  return parameters.create_state(run, str(source)).params


def _folder(path, system, **changes):
  """Returns the parameters of a language model, whose tensors are written."""
  module, params = models.make_model(system, **changes)
  weights.to_hf(module, params, path)
  return paths.flatten_by_path(params)


def _workdir(path, system, **changes):
  module, params = models.make_model(system, **changes)
  run = _run(models.small_config(system, **changes), '')
  path = epath.Path(path)
  run_config.save_config(path, run.config)
  with checkpoints.Checkpoints(path, every_steps=0, every_minutes=0.0, keep=1,
                               keep_every=0) as saved:
    saved.save(0, {'params': params}, next_batch=0, tokens=0,
               config=run.config)
  return paths.flatten_by_path(params)


BERT = {'transform', 'transform_bias', 'transform_norm/scale',
        'transform_norm/bias', 'nsp', 'nsp_bias', 'head/bias'}


@pytest.mark.parametrize('write, system, drawn, left', [
    (_folder, 'bert', {'task/kernel', 'task/bias'}, BERT),
    pytest.param(_workdir, 'llama', {'task/kernel'}, {'head/kernel'},
                 marks=pytest.mark.long)])
def test_a_head_begins_on_a_language_model(tmp_path, capsys, write, system,
                                           drawn, left):
  """All but the head of the task is theirs; both heads are listed."""
  theirs = write(tmp_path, system)
  ours = paths.flatten_by_path(_start(tmp_path, system))
  lines = [x for x in capsys.readouterr().out.splitlines()
           if x.startswith('skipped: ')]
  assert ours.keys() - drawn == theirs.keys() - left
  for path in ours.keys() - drawn:
    np.testing.assert_array_equal(ours[path], theirs[path], path)
  assert len(lines) == len(drawn) + len(left)
  assert 0 < np.asarray(ours['task/kernel']).std() < 0.05  # as it is born


def test_a_head_begins_on_an_encoder_that_told_replaced_tokens(tmp_path):
  theirs = _workdir(tmp_path, 'electra', head='replaced')
  ours = paths.flatten_by_path(_start(tmp_path, 'electra'))
  new = {'task/kernel', 'task/bias', 'pooler', 'pooler_bias'}
  for path in ours.keys() - new:
    np.testing.assert_array_equal(ours[path], theirs[path], path)
  _workdir(tmp_path / 'apart', 'electra', head='replaced',
           generator=dict(sharing='apart'))
  with pytest.raises(RequestError, match='sum of two: begin with its export'):
    _start(tmp_path / 'apart', 'electra')


@pytest.mark.parametrize('write', models.mark_long_except(
    (_workdir,), (_folder, _workdir)))
def test_another_function_is_refused(tmp_path, write):
  write(tmp_path, 'gpt')
  with pytest.raises(RequestError, match="model.norm is 'rmsnorm', not"):
    _start(tmp_path, 'gpt', norm='rmsnorm')


@pytest.mark.parametrize('write', models.mark_long_except(
    (_folder,), (_folder, _workdir)))
def test_the_same_head_goes_on(tmp_path, capsys, write):
  theirs = write(tmp_path, 'bert', **HEAD)
  params = paths.flatten_by_path(_start(tmp_path, 'bert'))
  assert 'skipped' not in capsys.readouterr().out
  jax.tree.map(np.testing.assert_array_equal, params, dict(theirs))


def test_labels_in_another_order_are_refused(tmp_path):
  """An output would stand for another label than it was trained for."""
  module, params = models.make_model('bert', **HEAD)
  weights.to_hf(module, params, tmp_path, labels=('b', 'a', 'c'))
  run = _run(models.small_config('bert', **HEAD), tmp_path)
  run.config.update(objective='classification',
                    data=dict(labels=('a', 'b', 'c')))
  with pytest.raises(RequestError, match=r'has the labels .b, a, c.*a, b, c'):
    parameters.create_state(run, str(tmp_path))
  for fields in (dict(init_partial=True), dict(data=dict(
      labels=('b', 'a', 'c')), init_partial=False)):
    run.config.update(fields)
    parameters.create_state(run, str(tmp_path))


def test_a_run_begins_with_the_step_that_is_named(tmp_path):
  params = _workdir(tmp_path, 'gpt')
  run = _run(models.small_config('gpt'), tmp_path)
  later = jax.tree.map(lambda x: x + 1, run.new_state().params)
  with checkpoints.Checkpoints(tmp_path, every_steps=0, every_minutes=0.0,
                               keep=2, keep_every=0) as saved:
    saved.save(1, {'params': later}, next_batch=1, tokens=0, config=run.config)
  for step, wanted in ((0, params), (None, paths.flatten_by_path(later))):
    state = parameters.create_state(run, str(tmp_path), step=step)
    jax.tree.map(np.testing.assert_array_equal,
                 paths.flatten_by_path(state.params), wanted)


@pytest.mark.parametrize('is_run', [False, True])
def test_weights_are_not_trained_with_another_tokenizer(tmp_path, is_run):
  """Where pieces that were only added differ, ids mean what they did."""
  def read(name, text, *special):
    file = tmp_path / name / 'tokenizer.json'
    file.parent.mkdir()
    words = hf.Tokenizer(hf.models.WordLevel(
        {word: i for i, word in enumerate(text.split())}, unk_token='a'))
    words.add_special_tokens(list(special))
    words.save(str(file))
    return tokenizers.load(str(file.parent))

  config = base.base()
  config.init_from = (theirs := read('theirs', 'a b c', '<end>')).name
  if is_run:
    config.data.tokenizer = theirs.name
    run_config.save_config(epath.Path(tmp_path), config)
    (tmp_path / 'checkpoints/0').mkdir(parents=True)
    config.update(init_from=str(tmp_path), data=dict(tokenizer='bytes'))
  check = lambda ours: parameters.check_tokenizer_of_weights(config, ours)
  for ours in tokenizers.load('bytes'), read('ours', 'a c b', '<end>'):
    with pytest.raises(RequestError, match=re.escape(
        f'--config.data.tokenizer={theirs.name},')):
      check(ours)
  check(read('like', 'a b c', '<eos>'))
  config.init_partial = True
  check(tokenizers.load('bytes'))


def test_weights_are_not_trained_with_a_tokenizer_that_was_replaced(
    tmp_path, capsys):
  config = base.base()
  config.data.tokenizer = data_files.write_wordpiece_tokenizer(tmp_path)
  before = tokenizers.load(config.data.tokenizer)
  run_config.save_config(epath.Path(tmp_path), config,
                         data=pipeline.digest_tokenizer(config, before))
  (tmp_path / 'checkpoints/0').mkdir(parents=True)
  runs.load_run_tokenizer(tmp_path, config)
  assert not capsys.readouterr().err
  config.init_from = str(tmp_path)
  parameters.check_tokenizer_of_weights(config, before)

  file = tmp_path / 'tokenizer.json'
  file.write_text(file.read_text().replace('"ran"', '"raw"'))
  after = tokenizers.load(config.data.tokenizer)
  with pytest.raises(RequestError, match='before it was replaced'):
    parameters.check_tokenizer_of_weights(config, after)
  runs.load_run_tokenizer(tmp_path, config)
  assert f'what \'tokenizer {file}\' holds' in capsys.readouterr().err


HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
DRAWN = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float32)


def of_step(n, averaged=True):
  """The state of step n: a and b are trained, c is frozen."""
  put = lambda x, dtype=jnp.float32: jax.device_put(jnp.asarray(x, dtype), HERE)
  drawn = DRAWN[n // 10]
  state = {'params': {'a': put(drawn[0]), 'b': put(drawn[1], jnp.bfloat16),
                      'c': put(drawn[0, 0])}}
  if averaged:
    state['ema'] = {'a': put(drawn[0] / 2), 'b': put(drawn[1] / 2)}
  return state


def asked():
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=HERE), of_step(0)['params'])


def saved(tmp_path, averaged, steps=(10, 20, 30, 40)):
  with checkpoints.Checkpoints(tmp_path, every_steps=0, every_minutes=0,
                               keep=4, keep_every=0) as store:
    for n in steps:
      store.save(n, of_step(n, averaged), next_batch=n, tokens=n,
                 config=base.base())
  return checkpoints.checkpoint_folder(tmp_path)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  return saved(tmp_path_factory.mktemp('plain'), False)


@pytest.fixture(scope='module')
def averaged(tmp_path_factory):
  return saved(tmp_path_factory.mktemp('averaged'), True)


def test_it_is_the_average_where_one_is_kept(averaged):
  taken = parameters.read_parameters(averaged, asked())
  assert (taken.step, taken.which_parameters) == (40, 'the average (optim.ema)')
  kept = of_step(40)
  np.testing.assert_array_equal(taken.state['a'], kept['ema']['a'])
  np.testing.assert_array_equal(taken.state['c'], kept['params']['c'])
  assert taken.state['b'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(
      taken.state['b'], kept['ema']['b'].astype(jnp.bfloat16))


@pytest.mark.parametrize('text, steps', [
    ('last:3', [20, 30, 40]), ('last:4', [10, 20, 30, 40]),
    ('40,10', [10, 40])])
def test_a_mean_is_that_of_numpy(plain, text, steps):
  taken = parameters.read_parameters(plain, asked(),
                                     checkpoints.parse_step(text))
  assert taken.step == 40
  names = ', '.join(map(str, steps))
  assert taken.which_parameters == f'the mean of steps {names}'
  for name in 'abc':
    values = [np.asarray(of_step(n)['params'][name], np.float32) for n in steps]
    expected = np.mean(values, axis=0)
    if name == 'b':
      expected = expected.astype(jnp.bfloat16)
    np.testing.assert_allclose(np.float32(taken.state[name]),
                               np.float32(expected), rtol=2e-7, err_msg=name)
    assert taken.state[name].dtype == asked()[name].dtype


def test_a_mean_of_more_than_there_are_is_refused(plain):
  with pytest.raises(RequestError, match='last 5 .* has 4: 10, 20, 30, 40'):
    parameters.read_parameters(plain, asked(), checkpoints.MeanOfSteps(last=5))


def test_a_mean_is_of_averages_where_these_are_kept(averaged):
  taken = parameters.read_parameters(averaged, asked(),
                                     checkpoints.MeanOfSteps(last=2))
  assert taken.which_parameters == (
      'the mean of steps 30, 40, each the average (optim.ema)')
  np.testing.assert_array_equal(taken.state['a'], np.mean(
      [of_step(n)['ema']['a'] for n in (30, 40)], axis=0))
  live = parameters.read_parameters(averaged, asked(),
                                    checkpoints.MeanOfSteps(last=2),
                                    live=True)
  np.testing.assert_array_equal(live.state['a'], np.mean(
      [of_step(n)['params']['a'] for n in (30, 40)], axis=0))
