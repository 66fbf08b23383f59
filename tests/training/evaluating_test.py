"""What is held out of several sources, and figures over unequal batches."""

import math
import types

import jax
import numpy as np
import pytest

from configs import base
from configs import sharding as tables
from tests.helpers import models
from training import objectives, runs
from training.objectives import pipeline
from training.data import tokenizers
from training.distributed import devices
from training.evals import checkpoint, held_out
from training.evals.task import Evaluation
from training.evals.tasks import extrapolation
from training.objectives import record

BYTES = tokenizers.load('bytes')


@pytest.fixture
def folder(tmp_path):
  """Text of a's alone, of b's, three times as long, and of many letters."""
  (tmp_path / 'a.txt').write_text('a' * 40)
  (tmp_path / 'b.txt').write_text('b' * 120)
  (tmp_path / 'c.txt').write_text(
      ''.join(chr(97 + k * k % 26) for k in range(60)))
  return tmp_path


def config_of(folder, source, **fields):
  c = base.base()
  c.model = models.config(**fields)
  c.model.vocab_size = 0
  c.data.update(source=source.format(folder), holdout_every=0, length=16,
                eval_source=source.format(folder), batch_size=4,
                cache_dir=str(folder / 'cache'))
  return c


def run_of(c):
  mesh = devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1),
                           jax.devices()[:1])
  return runs.build(c, runs.resolve(c, BYTES)[0], mesh)


def evaluation_of(c, workdir):
  run = run_of(c)
  state = run.new_state()
  return Evaluation(run, state.params, 0, BYTES,
                    types.SimpleNamespace(interpolate=False), workdir, {})


def judged(c, loss_of):
  """The figures where the loss of a target is `loss_of` its id."""
  def step(_, batch):
    weights = batch['weights']
    return {'loss': record.Mean(
        (loss_of(batch['targets']) * weights).sum(), weights.sum())}
  loaders = pipeline.held_out(c, BYTES)
  return held_out.means(held_out.evaluate(
      step, None, loaders, 0, run_of(c).put, lambda: False), loaders)


def test_a_text_that_is_named_is_evaluated_whole(folder, monkeypatch):
  """Also by a run that is evaluated on a half of what it holds out."""
  c = config_of(folder, 'text:{}/a.txt')
  c.eval.part, c.data.batch_size = 'second', 8
  kept = {}
  monkeypatch.setattr(runs, 'config_of', lambda _: c)
  monkeypatch.setattr(checkpoint.parameters, 'of_run', lambda run, *_: (
      kept.update(run=run) or types.SimpleNamespace(
          state=None, step=0, what='')))
  checkpoint.load(folder, ['loss'], types.SimpleNamespace(
      stride=0, detokenize='none'), step=None, text=f'text:{folder}/[bc].txt',
                  programs={})
  loader, = pipeline.held_out(kept['run'].config, BYTES)
  assert loader.num_tokens == 120 + 60 + 2


@pytest.mark.parametrize('a, b', [(0.9, 0.1), (1, 999)])
def test_the_loss_of_a_mixture_is_the_mean_of_its_sources(folder, a, b):
  """By its weights, however long each source is; 40 a's, 120 b's and an end
  each."""
  c = config_of(folder, f'{a}*text:{{0}}/a.txt,{b}*text:{{0}}/b.txt')
  figures = judged(c, lambda ids: ids * (ids < 256))
  own = [40 * 97 / 41, 120 * 98 / 121]
  assert figures[f'loss/text:{folder}/a.txt'] == pytest.approx(own[0])
  assert figures[f'loss/text:{folder}/b.txt'] == pytest.approx(own[1])
  assert figures['loss'] == pytest.approx(np.average(own, weights=[a, b]))
  size = np.average([40 / 41, 120 / 121], weights=[a, b])
  assert figures['bits_per_byte'] == pytest.approx(
      figures['loss'] / math.log(2) / size)


def test_bits_per_byte_are_the_bits_of_the_text_over_its_bytes(folder):
  """A token that is a toss of a coin, of ln 2 nats, is one bit."""
  figures = judged(config_of(folder, 'text:{0}/a.txt'),
                   lambda ids: math.log(2))
  assert figures.keys() == {'loss', 'perplexity', 'bits_per_byte'}
  assert figures['bits_per_byte'] == pytest.approx(41 / 40)
  assert figures['perplexity'] == pytest.approx(2)


def test_of_nothing_there_is_no_figure():
  nothing = record.Mean(np.float64(0), np.float64(0))
  loader = types.SimpleNamespace(
      objective=objectives.OBJECTIVES['chat'], share=1.0)
  figures = held_out.means([{'loss': nothing, 'accuracy': nothing}], [loader])
  assert {held_out.shown(x) for x in figures.values()} == {'n/a'}


@pytest.mark.long
def test_extrapolation_counts_the_tokens_that_there_are(folder, capsys):
  """61 tokens at 16 to 128 a row: each length's figure is the mean loss of
  these tokens, and past the 61st there is none."""
  c = config_of(folder, 'text:{0}/c.txt', position='none', num_layers=1)
  evaluation = evaluation_of(c, folder)
  with evaluation.run.context():
    found = extrapolation.TASKS['extrapolation'].run(evaluation)
  end = BYTES.separator_id
  ids = np.array([end, *(folder / 'c.txt').read_bytes(), end])
  rows = {line.split()[0]: line.split()[1:]
          for line in capsys.readouterr().out.splitlines()[2:4]}
  assert rows['tokens'] == ['61'] * 4
  for place, multiple in enumerate(extrapolation.MULTIPLES):
    tokens = found['texts'][str(multiple)]['tokens']
    length = 16 * multiple
    assert sum(tokens) == 61 and (np.array(tokens) > 0).sum() == min(length, 61)
    curve = np.array(found['curves']['none'][str(multiple)])
    assert (np.isnan(curve) == (np.array(tokens) == 0)).all()
    if multiple in (1, 8):
      loss = []
      for start in range(0, 61, length):
        row = ids[start:start + length + 1]
        logits = models.logits(evaluation.run.module, evaluation.params,
                               row[None, :-1])[0]
        loss += [-jax.nn.log_softmax(logits)[i, target]
                 for i, target in enumerate(row[1:])]
      assert float(rows['none'][place]) == pytest.approx(
          np.mean(loss), abs=6e-4)
