"""Every system learns from real text, and is judged while it does."""

import importlib
import json

import pytest

import architectures
from common import kinds
from training import begin, loop
from training.distributed import devices
from training.objectives import pipeline
from training.workdir import checkpoints


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


@pytest.mark.long
@pytest.mark.parametrize('system', architectures.files())
def test_a_system_learns_and_is_judged(system, tmp_path):
  """By what train.py does."""
  config = small(system)
  request = begin.check_request(config, tmp_path)
  tokenizer, run = request.tokenizer, begin.build_on_devices(request)
  rows = devices.batch_slice_of_process(run.batch_sharding,
                                        config.data.batch_size)
  texts = [pipeline.make_training_loader(config, tokenizer, *rows),
           pipeline.make_evaluation_loaders(config, tokenizer, *rows)]
  with checkpoints.Checkpoints(
      tmp_path, **config.checkpoint,
      agree_every=config.log.every_steps) as saved:
    assert loop.train_run(run, begin.create_first_state(run), 0, *texts, saved,
                          tmp_path) == 0
  lines = [json.loads(line) for line in
           (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  first = next(r['loss'] for r in lines if r['split'] == 'train')
  held_out = next(r for r in lines if r['split'] == 'eval')
  assert held_out['loss'] < first - 0.5
  measures = {'mlm_accuracy', 'nsp_accuracy', 'mlm_loss', 'nsp_loss'}
  assert held_out.keys() >= {'loss'} | {
      'bert': {'perplexity', *measures}, 'electra': {'detection_accuracy'},
      'deberta_v2': {'detection_accuracy'}}.get(system, {'perplexity'})
