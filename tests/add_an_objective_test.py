"""A new objective and a new evaluation task are one file each: everything that
lists or reads objectives and tasks finds them, with no other edit."""

import json

import numpy as np
import pytest

from tests.helpers import adding

FILES = {
    'training/objectives/fim.py': '''
"""Fill in the middle (Bavarian et al. 2022): a text's beginning and its end,
each after a sentinel, then what stood between them."""

import numpy as np

from training.data import packing
from training.objectives import record


class Windows(packing.Windows):
  """Windows that leave room for three sentinels."""

  def __init__(self, corpus):
    super().__init__(corpus, corpus.config.data.length - 3)


def fim(window, rng, config, tokenizer):
  text = window.tokens[:window.size]
  first, last = np.sort(rng.integers(0, len(text) + 1, 2))
  beginning, end, middle = tokenizer.sentinel_ids[:3]
  ids = np.concatenate([[beginning], text[:first], [end], text[last:],
                        [middle], text[first:last]])
  told = np.arange(len(ids)) > len(ids) - 1 - (last - first)
  return dict(tokens=ids[:-1], targets=ids[1:], weights=told[1:],
              valid=np.ones(len(ids) - 1))


def arrays(config):
  row = record.text_arrays(config)
  return row | dict(valid=row['weights'])


OBJECTIVES = {'fim': record.Objective(
    ('decoder',), Windows, fim, arrays, ('tokens',), {'valid': 'valid_BL'},
    ('valid',), prompt=record.after_separator)}
''',
    'training/evals/tasks/among.py': '''
"""How often a target is among the likeliest tokens."""

from training.evals.task import Flag, Task


def run(evaluation):
  import jax

  from training import objectives
  from training.data import pipeline
  from training.distributed import devices
  run_, most = evaluation.run, evaluation.options.among
  objective = objectives.of(run_.config)

  def found(params, batch):
    logits_BLV = objective.apply(run_.module, params, batch).logits
    _, ids = jax.lax.top_k(logits_BLV, most)
    right = (ids == batch['targets'][..., None]).any(-1)
    return (right * batch['weights']).sum(), batch['weights'].sum()

  step = evaluation.program(lambda: found, 'among', most)
  loader, = pipeline.held_out(
      run_.config, evaluation.tokenizer,
      *devices.batch_shard(run_.place, run_.config.data.batch_size))
  sums = [step(evaluation.params, devices.put(batch, run_.place))
          for batch in loader.iterate()]
  right, count = (float(sum(one)) for one in zip(*sums))
  print(f'{right / count:.4f} of {count:,.0f} targets')
  return dict(share=right / count)


TASK = Task('the share of targets among the likeliest tokens', run, flags=(
    Flag('among', 5, 'So many of the likeliest tokens.', 1, 10_000),))
'''}
# What the other rooms of the copy make of the new objective and task.
SEEN = '''
import json
import sys

from configs import gpt
from tools.plan import compile
from tools.compare import spec
from training import objectives, runs
from training.costs import memory
from training.data import pipeline, tokenizers

config = gpt.get_config()
config.objective = 'fim'
config.data.update(source=sys.argv[1], length=32, batch_size=8,
                   holdout_every=4, cache_dir=sys.argv[2])
runs.check_config(config)
tokenizer = tokenizers.load('bytes')
run = runs.build(config, runs.resolve(config, tokenizer)[0])
_, planned = compile.PROGRAMS['train'](run).args
batch = pipeline.training_loader(config, tokenizer).batch(0)
print(json.dumps(dict(
    planned={key: [x.shape, str(x.dtype)] for key, x in planned.items()},
    loaded={key: [x.shape, str(x.dtype)] for key, x in batch.items()},
    rows=[batch[key].tolist() for key in ('tokens', 'targets', 'weights')],
    sentinels=tokenizer.sentinel_ids[:3],
    kept=memory.kept(run),
    owed=spec.read_sweep_file(sys.argv[3]).owed(spec.Point('x', {})))))
'''
SWEEP = '''
from configs import gpt
TASKS = ('among', 'exact')

def base():
  config = gpt.get_config()
  config.objective = 'fim'
  return config

get_config = base

def sweep(add):
  add('lr', **{'optim.lr': 0.1})
'''
TEXT = 'It is a law of nature that what is sown is reaped. ' * 20
SMALL = [f'--config.{flag}' for flag in (
    'objective=fim', 'model.d_model=32', 'model.num_layers=2',
    'model.num_heads=2', 'data.length=32', 'data.batch_size=8',
    'data.holdout_every=4', 'train.steps=4', 'optim.warmup_steps=2',
    'eval.every_steps=0', 'log.every_steps=1', 'mesh.data=2', 'mesh.fsdp=4')]


@pytest.fixture(name='tree', scope='module')
def _tree(tmp_path_factory):
  return adding.copy_with(tmp_path_factory.mktemp('added') / 'tree', FILES)


@pytest.fixture(name='texts', scope='module')
def _texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  for i in range(8):
    (folder / f'{i}.txt').write_text(f'Document {i}. {TEXT}')
  return f'text:{folder}/*.txt'


@pytest.fixture(name='trained', scope='module')
def _trained(tree, texts):
  """The workdir of a run of train.py on eight devices."""
  adding.run(tree, 'train.py', '--config', 'configs/gpt.py', '--workdir=run',
             f'--config.data.source={texts}', *SMALL)
  return tree / 'run'


def test_help_and_refusals_name_them(tree):
  shown = ' '.join(adding.run(tree, 'eval.py', '--help').stdout.split())
  assert 'among: the share of targets among the likeliest tokens' in shown
  assert '--among: among: So many of the likeliest tokens. (default: 5)' in (
      shown)
  said = adding.run(tree, 'eval.py', '--workdir=run', '--tasks=amnog', code=2)
  assert 'choose from among, bound' in said.stderr
  assert "Did you mean 'among'?" in said.stderr
  said = adding.run(tree, 'eval.py', '--workdir=run', '--among=0', code=2)
  assert 'among' in said.stderr


@pytest.mark.slow
def test_an_unknown_objective_is_told_of_it(tree):
  said = adding.run(tree, 'train.py', '--config', 'configs/gpt.py',
                    '--workdir=no', '--config.objective=fmi', code=2)
  assert "'fmi'" in said.stderr and "Did you mean 'fim'?" in said.stderr
  said = adding.run(tree, 'train.py', '--config', 'configs/bert.py',
                    '--workdir=no', '--config.objective=fim', code=2)
  assert "'fim', which does not fit model.arch bert" in said.stderr


@pytest.mark.slow
def test_it_trains_and_is_evaluated(trained, tree):
  lines = (trained / 'metrics.jsonl').read_text().splitlines()
  losses = [row['loss'] for row in map(json.loads, lines)
            if row['split'] == 'train']
  assert len(losses) == 4 and np.isfinite(losses).all()
  figures = {}
  for most in (1, 384):  # of 384 ids
    adding.run(tree, 'eval.py', '--workdir=run', '--tasks=loss,among',
               f'--among={most}', '--json=found.json')
    figures[most] = json.loads((tree / 'found.json').read_text())
  assert figures[384]['among']['share'] == 1
  np.testing.assert_allclose(
      figures[1]['among']['share'], figures[1]['loss']['accuracy'], atol=1e-6)
  assert 'bits_per_byte' not in figures[1]['loss']


@pytest.mark.slow
def test_it_writes_but_not_what_it_cannot(trained, tree):
  shown = adding.run(tree, 'eval.py', '--workdir=run', '--prompt=It is',
                     '--tasks=samples', '--max_new_tokens=4').stdout
  assert 'sample 1 of 1:\nIt is' in shown
  for task in ('exact', 'extrapolation', 'translation'):
    said = adding.run(tree, 'eval.py', '--workdir=run', f'--tasks={task}',
                      code=2)
    assert "objective 'fim'" in said.stderr
    assert f'leave {task} out of --tasks' in said.stderr


@pytest.mark.slow
def test_plans_and_sweeps_know_them(tree, texts, tmp_path):
  (tmp_path / 'sweep.py').write_text(SWEEP)
  seen = json.loads(adding.run(
      tree, '-c', SEEN, texts, str(tmp_path), tmp_path / 'sweep.py'
      ).stdout.splitlines()[-1])
  assert seen['planned'] == seen['loaded'] == {
      key: [[8, 32], dtype] for key, dtype in (
          ('tokens', 'int32'), ('targets', 'int32'), ('weights', 'float32'),
          ('valid', 'float32'))}
  assert seen['kept'] > 0
  assert seen['owed'] == ['among']  # exact has no targets to write
  beginning, end, middle = seen['sentinels']
  whole = ''.join(f'Document {n}. {TEXT}' for n in (1, 2, 3, 5, 6, 7))
  for tokens, targets, weights in zip(*seen['rows']):
    ids = [*tokens, targets[-1]]
    assert ids[0] == beginning and len(ids) == 33
    i, j = ids.index(end), ids.index(middle)
    text = bytes(x for x in ids[1:i] + ids[j + 1:] + ids[i + 1:j] if x < 256)
    assert text.decode() in whole
    assert sum(weights) == len(ids) - 1 - j
