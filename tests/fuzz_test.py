"""Nothing that a user can write makes a traceback: each case either runs, or
ends with one sentence (configs/errors.py).

`make test` draws 60 cases in all, always the same; with FUZZ_CASES=2000 in the
environment they are others.
"""

import json
import sys

from absl import flags
import flax.linen as nn
from hypothesis import example, given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

import architectures
from configs import base
from configs.errors import RequestError
from tests.helpers import fuzzing, models, sweep_folder
from tests.helpers.fuzzing import each, runs_or_refuses
from tools.compare import layout, status
from tools.compare import report
from training import preflight, runs
from training import cli
from training.runs import abstract_params
from training.distributed import processes
from training.hf import files as hf_files, weights
from training.workdir import checkpoints, metrics, run_config

FIELDS = {name: type(value) for name, value in sorted(
    run_config.flatten(base.base()).items())}
CONFIGS = ('configs/gpt.py', 'configs/bert.py', 'configs/t5.py',
           'configs/mixtral.py', 'configs/switch.py', 'configs/llama.py')


class Ready(Exception):
  """All checks are passed: devices would be next."""


@pytest.fixture(name='program', scope='module')
def _program(tmp_path_factory):
  """A function that runs train.py with a command line, up to its devices."""
  import train
  workdir = tmp_path_factory.mktemp('run') / 'run'
  patch = pytest.MonkeyPatch()

  def ready(_):
    raise Ready

  def run(words):
    for name in list(flags.FLAGS):
      if name.startswith('config.'):  # of the case before
        delattr(flags.FLAGS, name)
      else:
        flags.FLAGS[name].unparse()
    flags.FLAGS.unparse_flags()
    patch.setattr(sys, 'argv', ['train.py', f'--workdir={workdir}', *words])
    patch.setattr(processes, 'initialize', ready)
    try:
      train.main()
    except SystemExit as error:  # cli.parse has refused it
      assert error.code == 2, error.code
      raise RequestError('see stderr') from error
    except Ready:
      config = flags.FLAGS.config
      runs.build(config, runs.resolve_alone(config))

  yield run
  patch.undo()


@st.composite
def command_lines(draw):
  words = [f'--config={draw(st.sampled_from(CONFIGS))}']
  for _ in range(draw(st.integers(0, 4))):
    name, kind = draw(st.sampled_from(sorted(FIELDS.items(), key=str)))
    words.append(f'--config.{name}={draw(fuzzing.LIKELY[kind])}')
  for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
    name = draw(st.sampled_from(
        [f'config.{field}' for field in FIELDS] * 2
        + ['config.model', 'config.train.step', 'config.seed.x', 'config.',
           'noconfig.seed', 'workdir', 'profile_steps', 'coordinator',
           'num_processes', 'process_id', 'cluster', 'stopped_exit_code',
           'flagfile', 'wrokdir', 'allow_config_change']))
    value = draw(fuzzing.WORDS)
    equals = draw(st.sampled_from(['=', '=', '=', '']))
    words.append(f'--{name}{equals}{value if equals else ""}')
  return words


@each(0.35)
@given(words=command_lines())
@example(['--config=configs/gpt.py', '--config.train.steps=2',
          '--config.train.step=3'])
@example(['--config=configs/gpt.py', '--coordinator=nonsense',
          '--num_processes=2', '--process_id=0'])
def test_flags(program, words):
  runs_or_refuses(lambda: program(words))


SYSTEMS = ('gpt', 'llama', 'mixtral', 't5', 'bert')
PIECES = st.sampled_from([
    '{', 'return', 'raise ValueError("a\\nb")', '1 / 0', 'import nosuch',
    'c = None', 'del c', 'c = {}', 'c.model = 3', 'c.model = None',
    'c.new = 1', 'c.lock()', 'c = c.to_dict()', 'exit()', 'c.model.update(a=1)',
    'c.optim = c.model', 'assert False', 'del c.seed', '\x01', 'x = "\ud83d"'])


@st.composite
def files(draw):
  lines = ['from configs import base', 'def get_config(size=""):',
           '  c = base.base()']
  for _ in range(draw(st.integers(0, 4))):
    field, value = draw(st.sampled_from(list(FIELDS))), draw(fuzzing.JUNK)
    lines.append('  ' + draw(st.one_of(
        PIECES, st.just(f'c.{field} = {_literal(value)}'))))
  lines.append(draw(st.sampled_from(['  return c', '  return c', '', 'return c',
                                     '  return get_config()', '  return 3'])))
  return '\n'.join(lines) + '\n'


def _literal(value) -> str:
  """A value in Python; an integer of 400 digits by a power."""
  return '10**400' if value == 10**400 else repr(value).replace(
      'nan', 'float("nan")').replace('inf', 'float("inf")')


@each(0.2)
@given(text=files())
def test_config_files(text, tmp_path_factory):
  file = tmp_path_factory.mktemp('file') / 'mine.py'
  file.write_bytes(text.encode('utf-8', 'surrogatepass'))

  def load():
    config = cli.load_config_file(str(file))
    preflight.check_config(config)
    config.to_dict()

  runs_or_refuses(load)


@pytest.fixture(name='folders', scope='module')
def _folders(tmp_path_factory):
  """Folders of Hugging Face's format, by system."""
  root = tmp_path_factory.mktemp('folders')
  draw = np.random.default_rng(0)
  for system in SYSTEMS:
    module = architectures.build(models.config(system))
    # Without an initialisation, which would have to be compiled.
    params = jax.tree.map(
        lambda x: jax.numpy.asarray(draw.random(x.shape, np.float32)),
        nn.meta.unbox(abstract_params(module)))
    weights.to_hf(module, params, root / system)
  return root


@each(0.2)
@given(data=st.data())
def test_model_folders(folders, tmp_path_factory, data):
  folder = tmp_path_factory.mktemp('cases') / 'folder'
  fuzzing.fresh(folders / data.draw(st.sampled_from(SYSTEMS)), folder)
  config = folder / 'config.json'
  if data.draw(st.booleans()):
    tree = fuzzing.mutated(data.draw, json.loads(config.read_text()))
    config.write_text(json.dumps(tree))
  else:
    fuzzing.damage(data.draw, data.draw(st.sampled_from(
        [config, folder / hf_files.SAFE])))
  runs_or_refuses(lambda: weights.from_hf(folder))


STATE = {'w': np.arange(600, dtype=np.float32), 'n': np.int32(7)}


@pytest.fixture(name='saved', scope='module')
def _saved(tmp_path_factory):
  """A workdir with the checkpoints 10 and 20 of a small state."""
  workdir = tmp_path_factory.mktemp('saved') / 'run'
  with checkpoints.Checkpoints(workdir, every_steps=10, every_minutes=0.0,
                               keep=3, keep_every=0) as store:
    for step in (10, 20):
      store.save(step, _at(step), next_batch=step, tokens=step,
                 config=base.base().lock())
  return workdir


def _at(step: int):
  return jax.tree.map(lambda x: jax.numpy.asarray(x) + step, STATE)


@each(0.1)
@given(data=st.data())
def test_checkpoints(saved, tmp_path_factory, data):
  """What is restored is what was saved, or nothing is."""
  workdir = tmp_path_factory.mktemp('cases') / 'run'
  fuzzing.fresh(saved, workdir)
  every = sorted(path for path in workdir.rglob('*') if path.is_file())
  for _ in range(data.draw(st.integers(1, 4))):
    file = data.draw(st.sampled_from(every))
    if file.is_file():
      fuzzing.damage(data.draw, file)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding), _at(0))

  def restore():
    restored = checkpoints.restore(checkpoints.directory(workdir), abstract)
    expected = _at(restored.step)
    jax.tree.map(np.testing.assert_array_equal, restored.state, expected)

  runs_or_refuses(restore)


@pytest.fixture(name='sweep', scope='module')
def _sweep(tmp_path_factory):
  root = tmp_path_factory.mktemp('sweep') / 'w'
  sweep_folder.write(root, [
      sweep_folder.point('base', seeds=(0, 1)),
      sweep_folder.point('other', {'optim.lr': 1e-4}, seeds=(0, 1))])
  run = layout.run_folder(root, 'base', 0)
  (run / 'eval.json').write_text('{"step": 200, "extrapolation": {"length": 2, '
                                 '"curves": {"rope": {"1": [1.0, null]}}}}')
  return root


@each(0.15)
@given(data=st.data())
def test_ledgers_and_runs(sweep, tmp_path_factory, data):
  workdir = tmp_path_factory.mktemp('cases') / 'w'
  fuzzing.fresh(sweep, workdir)
  run = layout.run_folder(workdir, 'base', 0)
  file = data.draw(st.sampled_from([
      workdir / 'sweep.json', workdir / 'ledger.sqlite', run / 'config.json',
      run / 'metrics.jsonl', run / 'eval.json']))
  if file.suffix == '.json' and data.draw(st.booleans()):
    tree = fuzzing.mutated(data.draw, json.loads(file.read_text()))
    file.write_text(json.dumps(tree))
  elif file.suffix == '.jsonl' and data.draw(st.booleans()):
    lines = file.read_text().splitlines()
    place = data.draw(st.integers(0, len(lines) - 1))
    lines[place] = json.dumps(
        fuzzing.mutated(data.draw, json.loads(lines[place])))
    file.write_text('\n'.join(lines) + '\n')
  else:
    fuzzing.damage(data.draw, file)

  def look():
    description = layout.load_description(workdir)
    with layout.Ledger(workdir) as ledger:
      ledger.recover()
      status.plain(description, workdir, ledger.runs())
    report.as_json(report.load(workdir))

  runs_or_refuses(look)
  if run.joinpath('config.json').exists():
    runs_or_refuses(lambda: runs.config_of(run))
  if run.joinpath('metrics.jsonl').is_file():
    runs_or_refuses(lambda: metrics.JsonlWriter(run, 100).close())
