"""Runs as one program equal the runs alone: losses, files, going on."""

import functools
import json
import shutil

from configs import base
from configs import mixtral
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import train_test
from tests.helpers import evaluations, models
from training import begin, evals, loop, vectorised
from training.objectives import pipeline
from training.optim import optimizers
from training.runs import parameter_roles
from training.workdir import checkpoints, run_config, storage

texts = train_test.texts
pytestmark = pytest.mark.slow

STEPS = 8


def config(texts, **changes):
  c = base.base()
  c.model.update(d_model=16, num_layers=1, num_heads=2, init='fan_in')
  c.data.update(source=texts.split('=')[-1], length=16, batch_size=4,
                holdout_every=4)
  c.train.steps = STEPS
  c.optim.warmup_steps = 2
  c.eval.update(every_steps=4, batches=2)
  c.log.every_steps = 1
  c.checkpoint.every_steps = 4
  for name, value in changes.items():
    *parents, field = name.split('__')
    at = c
    for parent in parents:
      at = at[parent]
    at[field] = value
  return c.lock()


def alone(c, workdir):
  """Trains as train.py does, on one device; returns what the loop does."""
  request = begin.check_request(c, storage.checked_path(workdir))
  tokenizer = request.tokenizer
  run = begin.build_on_devices(request, evaluations.one_device_mesh())
  with checkpoints.Checkpoints(workdir, **c.checkpoint) as saved:
    start = begin.find_starting_point(request, run, saved)
    state = start.state or begin.create_first_state(run)
    run_config.save_config(workdir, c, request.derived,
                           pipeline.digest_contents(c, tokenizer))
    return loop.train_run(
        run, state, start.step, pipeline.make_training_loader(c, tokenizer),
        pipeline.make_evaluation_loaders(c, tokenizer), saved, workdir)


def rows(workdir, split='train'):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [row for row in map(json.loads, lines) if row['split'] == split]


# On several devices products have another form than on one, and round
# otherwise.
def assert_same(workdir, other, rtol=5e-6):
  for split, names in (('train', ('loss', 'grad_norm', 'learning_rate')),
                       ('eval', ('loss', 'bits_per_byte'))):
    ours, theirs = rows(workdir, split), rows(other, split)
    assert [r['step'] for r in ours] == [r['step'] for r in theirs]
    for name in names:
      np.testing.assert_allclose([r[name] for r in ours],
                                 [r[name] for r in theirs], rtol=rtol)


# Each differs from the others in everything that it may.
DIFFERENT = (
    dict(seed=0, optim__lr=1e-3, optim__weight_decay=0.0,
         optim__warmup_steps=0, model__init_stddev=0.02, model__init_scale=1.0),
    dict(seed=1, init_seed=5, optim__lr=1e-2, optim__weight_decay=1.0,
         optim__warmup_steps=2, model__init_stddev=0.05, model__init_scale=2.0),
    dict(seed=7, init_seed=9, optim__lr=3e-2, optim__weight_decay=0.1,
         optim__warmup_steps=5, model__init_stddev=0.01, model__init_scale=0.5))


# A hook of one's own, which taps the gradients of each scanned layer.
TAPS = '''
import jax.numpy as jnp
from training.hook import Hook

class LayerGradients(Hook):

  def trace(self, params, grads):
    scale_ND = grads['decoder']['layers']['block_0']['ffn_norm']['scale']
    return {'layer_gradients_N': jnp.linalg.norm(scale_ND, axis=-1)}
'''


@pytest.fixture(scope='module')
def singles(texts, tmp_path_factory):
  """(configs, workdir of one of them trained alone) of three runs with
  dropout."""
  folder = tmp_path_factory.mktemp('alone')
  (folder / 'taps.py').write_text(TAPS)
  configs = [config(texts, model__dropout=0.1,
                    train__hooks=f'{folder}/taps.py:LayerGradients', **fields)
             for fields in DIFFERENT]
  assert vectorised.group_configs(configs) == [[0, 1, 2]]

  @functools.cache
  def single(i):
    alone(configs[i], folder / str(i))
    return folder / str(i)
  return configs, single


# By devices, the shape of the joint arrays: (devices in use, rows on each). On
# two there is a row that only fills up.
SHAPES = {1: (1, 3), 2: (2, 2), 8: (3, 1)}


@pytest.fixture(scope='module', params=[
    pytest.param(n, marks=[pytest.mark.long] * (n != 2), id=f'{n} devices')
    for n in SHAPES])
def trained(request, singles, tmp_path_factory):
  """(configs, workdirs, `single`), trained as a group."""
  configs, single = singles
  folder = tmp_path_factory.mktemp('runs')
  workdirs = [folder / str(i) for i in range(3)]
  shapes = set()

  class Group(vectorised.RunGroup):

    def __init__(self, *args, **options):
      super().__init__(*args, **options)
      rows = len(jax.tree.leaves(jax.eval_shape(self.new_state))[0])
      used = len(self.devices)
      shapes.add((used, rows // used))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'device_count', lambda: request.param)
    patch.setattr(vectorised, 'RunGroup', Group)
    vectorised.train_group(configs, workdirs)
    assert shapes == {SHAPES[request.param]}
    yield configs, workdirs, single


two_devices = pytest.mark.parametrize(
    'trained', [2], indirect=True, ids='{} devices'.format)


@pytest.mark.parametrize('i', models.mark_long_except((1,), range(3)))
def test_each_run_equals_its_own(trained, i):
  _, workdirs, single = trained
  assert_same(workdirs[i], single(i))
  ours, theirs = rows(workdirs[i])[0], rows(single(i))[0]
  assert ours.keys() - theirs.keys() == {'runs_at_once'}
  assert not theirs.keys() - ours.keys()
  layer_gradient, = ours['layer_gradients_N']  # of one layer
  assert 0 < layer_gradient < ours['grad_norm']
  assert (workdirs[i] / 'config.json').read_text() == (
      single(i) / 'config.json').read_text()
  losses = [rows(workdir)[-1]['loss'] for workdir in workdirs]
  assert len({round(x, 3) for x in losses}) == 3  # and they do differ


@pytest.mark.long
@two_devices
def test_a_run_goes_on_alone_and_joins_again(trained, tmp_path):
  configs, workdirs, single = trained
  copies = [tmp_path / str(i) for i in range(3)]
  for source, copy in zip(workdirs, copies):
    shutil.copytree(source, copy)
  shutil.rmtree(copies[0] / 'checkpoints/8')
  alone(configs[0], copies[0])  # from what the group has saved
  assert_same(copies[0], single(0))
  # Killed in the middle of a save: one is done, two are not.
  for i in (1, 2):
    shutil.rmtree(copies[i] / 'checkpoints/8')
  vectorised.train_group(configs, copies)
  for i, copy in enumerate(copies):
    assert_same(copy, single(i))


@pytest.mark.long
def test_paired_runs_see_one_stream(texts, tmp_path):
  """And with a seed in common, which is no input then, dropout is the same."""
  configs = [config(texts, model__dropout=0.1, optim__lr=lr)
             for lr in (1e-3, 1e-2)]
  vectorised.train_group(configs, [tmp_path / '0', tmp_path / '1'])
  first = [rows(tmp_path / i)[0]['loss'] for i in '01']
  assert first[0] == first[1]  # the rate has done nothing yet
  alone(configs[1], tmp_path / 'alone')
  assert_same(tmp_path / '1', tmp_path / 'alone')


@pytest.mark.long
def test_experts_too(texts, tmp_path):
  moe = dict(num_experts=4, d_ff=32, jitter=0.1, dispatch='sorted',
             capacity_factor=1.0, eval_capacity_factor=2.0)
  configs = []
  for seed in range(2):
    c = config(texts, seed=seed, model__arch='mixtral').unlock()
    c.model.update(ffn='moe', num_layers=1, position='rope')
    c.model.moe = mixtral.get_config('tiny').model.moe
    c.model.moe.update(**moe)
    configs.append(c.lock())
  vectorised.train_group(configs, [tmp_path / '0', tmp_path / '1'])
  for i, c in enumerate(configs):
    alone(c, tmp_path / f'alone{i}')
    assert_same(tmp_path / str(i), tmp_path / f'alone{i}', rtol=1e-5)
    ours, theirs = rows(tmp_path / str(i)), rows(tmp_path / f'alone{i}')
    np.testing.assert_allclose(ours[-1]['health/load_E'],
                               theirs[-1]['health/load_E'], atol=1e-6)


@pytest.mark.parametrize('bad', models.mark_long_except((0,), (0, 1)))
def test_a_run_that_blows_up_ends_alone(texts, tmp_path, bad, monkeypatch):
  asked, due = {}, checkpoints.Checkpoints.is_due
  def spy(self, step):
    asked[self.directory.parent.name] = step
    return due(self, step)
  monkeypatch.setattr(checkpoints.Checkpoints, 'is_due', spy)
  configs = [config(texts, optim__name='sgd', optim__clip_norm=0.0,
                    train__max_bad_steps=2, optim__weight_decay=0.0,
                    optim__warmup_steps=0, optim__lr=lr)
             for lr in ((1e30, 1e-2), (1e-2, 1e30))[bad]]
  workdirs = [tmp_path / '0', tmp_path / '1']
  writers = vectorised.train_group(configs, workdirs)
  assert '2 steps in a row' in writers[bad].sentence
  assert [writers[i].code for i in (bad, 1 - bad)] == [loop.DIVERGED, 0]
  assert rows(workdirs[1 - bad])[-1]['step'] == STEPS
  assert rows(workdirs[bad])[-1]['loss'] is None
  last = rows(workdirs[bad])[-1]['step']
  assert last < STEPS
  # Its parameters are past use, and not saved.
  assert rows(workdirs[bad])[-1]['param_norm'] is None
  assert not (workdirs[bad] / f'checkpoints/{last}').exists()
  # Its clock stands still: it is not to say when the others save.
  assert asked.get(str(bad), 0) <= last


def test_groups_are_of_runs_that_differ_in_the_fields_alone(texts):
  configs = [config(texts), config(texts, optim__lr=0.5),
             config(texts, model__num_layers=2), config(texts, seed=3),
             config(texts, init_from='runs/a'), config(texts, mesh__fsdp=2),
             config(texts, mesh__data=1)]
  assert vectorised.group_configs(configs) == [[0, 1, 3], [2], [4], [5], [6]]
  for fields in (dict(init_from='runs/a'), dict(mesh__tensor=2),
                 dict(seed=2 ** 32), dict(optim__name='soap'),
                 dict(log__wandb=True), dict(log__trackio=True)):
    equal = [config(texts, **fields)] * 2
    assert vectorised.group_configs(equal) == [[0], [1]], fields


@pytest.mark.parametrize('fields, words', [
    (dict(optim__b1=0.5), 'differ in seed, init_seed, optim.lr'),
    (dict(optim__lr=-1.0), 'optim.lr is -1.0')])
def test_what_is_no_group_is_refused(fields, words, texts, tmp_path):
  with pytest.raises(ValueError, match=words):
    vectorised.train_group([config(texts), config(texts, **fields)],
                           [tmp_path / '0', tmp_path / '1'])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', models.mark_long_except(
    ('adamw', 'soap'), optimizers.OPTIMIZERS))
@pytest.mark.parametrize('dtype', models.mark_long_except(
    ('float32',), ('float32', 'bfloat16')))
def test_every_optimizer_takes_traced_fields(name, dtype):
  module, params = models.make_model('gpt', num_layers=1)
  roles = parameter_roles(module)
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  grads = jax.tree.map(lambda x: (0.1 * np.cos(
      7 * np.asarray(x, np.float32))).astype(x.dtype), params)
  optim = base.base().optim
  optim.update(name=name, warmup_steps=3)

  def update(optim):
    tx = optimizers.make_optimizer(optim, 10, roles)
    return tx.update(grads, tx.init(params), params)[0]

  traced = jax.jit(jax.vmap(lambda values: update(
      vectorised.config_with_traced_values(optim, values))))(
          {'lr': jnp.array([1e-3, 2e-2], jnp.float32),
           'weight_decay': jnp.array([0.1, 0.3], jnp.float32)})
  optim.update(lr=2e-2, weight_decay=0.3)
  models.assert_trees_close(jax.jit(lambda: update(optim))(),
               jax.tree.map(lambda x: x[1], jax.device_get(traced)),
               rtol=1e-5 if dtype == 'float32' else 1e-2)


@pytest.mark.slow
@pytest.mark.long
def test_all_figures_are_those_of_the_run_alone(texts, tmp_path):
  """Also where it goes on, and of eval.py's task."""
  configs = [
      config(
          texts, seed=seed, optim__lr=lr, optim__ema=0.75, eval__live=True,
          eval__batches=0, eval__every_steps=5, data__batch_size=8)
      for seed, lr in ((0, 1e-2), (1, 3e-2))]
  assert vectorised.group_configs(configs) == [[0, 1]]
  vectorised.train_group(configs, [tmp_path / '0', tmp_path / '1'])
  single = tmp_path / 'alone'
  alone(configs[1], single)
  assert_same(tmp_path / '1', single)
  ours, theirs = (rows(at, 'eval') for at in (tmp_path / '1', single))
  for row, other in zip(ours, theirs, strict=True):
    for name in ('loss', 'live/loss'):
      np.testing.assert_allclose(row[name], other[name], rtol=1e-5)
    assert row['loss'] != row['live/loss']
  for name, options in (('loss', {}), ('live/loss', {'live': True})):
    figures = evals.evaluate_run(
        single, ['loss'], None, step=None, **options)
    np.testing.assert_allclose(figures['loss']['loss'], theirs[-1][name],
                               rtol=1e-5)
    assert ('parameters' in figures) == (name != 'live/loss')
