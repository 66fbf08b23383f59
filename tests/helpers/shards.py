"""A corpus, its shards, and the loaders of runs that read either."""

import json
import random

import numpy as np

from configs import base
from tools import tokenize as command
from training.data import tokenizers
from training.objectives import pipeline

BYTES = tokenizers.load('bytes')


def make_corpus(folder):
  """Writes seven files of JSON lines, whose texts are of no token to many
  blocks."""
  rng = random.Random(0)
  for i in range(7):
    texts = [''.join(rng.choices('abcdefgh \n', k=rng.choice(
        [0, 1, 5, 300, 700, 3000, 20_000])))
             for _ in range(rng.randint(3, 25))] + ['end']
    (folder / f'{i}.jsonl').write_text('\n'.join(
        json.dumps({'text': text}) for text in texts))
  return folder


def spec_of(corpus):
  return f'jsonl:{corpus}/*.jsonl:text'


def tokenize(corpus, out, *words):
  """Runs the command in this process; returns the exit code."""
  return command.main([spec_of(corpus), '--out', str(out), *words])


def contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in sorted(folder.rglob('*')) if path.is_file()}


def config_of(corpus, folder, source='', **fields):
  config = base.base()
  config.objective = fields.pop('objective', 'causal')
  config.eval.part = fields.pop('part', '')
  config.seed = fields.pop('seed', 3)
  config.data.update(dict(
      source=source or spec_of(corpus), cache_dir=str(folder / 'cache'),
      length=96, batch_size=6, holdout_every=4) | fields)
  return config


def loaders(config):
  return [pipeline.training_loader(config, BYTES),
          *pipeline.held_out(config, BYTES)]


def assert_same(ours, theirs, batches=12):
  assert len(ours) == len(theirs)
  for one, two in zip(ours, theirs):
    assert (one.num_windows, one.num_tokens, one.num_bytes) == (
        two.num_windows, two.num_tokens, two.num_bytes)
    for n in range(min(batches, one.num_batches)):
      a, b = one.batch(n), two.batch(n)
      assert a.keys() == b.keys()
      for key in a:
        np.testing.assert_array_equal(a[key], b[key])
