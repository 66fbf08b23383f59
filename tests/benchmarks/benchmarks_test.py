"""The benchmarks: both sides of a comparison have the same model, batch and
loss, and a ratio is of one turn."""

import importlib
import json
import math

import numpy as np
import pytest

from architectures.parts.attention import kernels
from benchmarks import gpu, ours, rival, step, worker
from common.errors import RequestError
from tests.helpers import forked
from training.hf import weights

SYSTEMS = ('gpt', 'bert', 't5')
SIZES = dict(d_model=32, num_heads=4, head_dim=0, d_ff=0, vocab_size=384,
             max_len=24, dtype='float32', num_layers=2)


def toy(file):
  """Returns the config of a small run, its optimiser without a warm-up."""
  config = importlib.import_module(f'configs.{file}').get_config('tiny')
  config = config.copy_and_resolve_references().unlock()
  config.model.update(SIZES)
  if config.model.num_decoder_layers:
    config.model.num_decoder_layers = 2
  config.data.update(batch_size=8, length=24, target_length=0)
  config.optim.update(warmup_steps=0, lr=3e-3)
  return config


def test_labels_are_what_transformers_looks_for():
  tokens = np.array([[5, 6, 7, 8]])
  batch = dict(tokens=tokens, targets=np.array([[6, 7, 8, 9]]),
               weights=np.array([[1.0, 1.0, 0.0, 1.0]]))
  # A causal class shifts them, so that place i predicts label i + 1.
  inputs = rival.arguments_of_transformers(batch, causal=True)
  assert inputs['labels'].tolist() == [[-100, 6, 7, -100]]
  masked = batch | dict(segment_ids=np.array([[1, 1, 1, 0]]),
                        types=np.array([[0, 0, 1, 0]]))
  inputs = rival.arguments_of_transformers(masked, causal=False)
  assert inputs['labels'].tolist() == [[6, 7, -100, 9]]
  assert inputs['attention_mask'].tolist() == [[1, 1, 1, 0]]
  assert inputs['token_type_ids'].tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize('system, field, value, sentence', [
    ('gpt4', 'objective', 'causal', "'gpt4-rumoured' has no counterpart"),
    ('gpt', 'objective', 'prefix', "'prefix' with prefix and valid"),
    ('bert', 'objective', 'masked_diffusion', "'masked_diffusion'")])
def test_what_transformers_lacks_is_named(system, field, value, sentence):
  config = toy(system)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(RequestError, match=sentence):
    rival.check_pytorch_has(config)


class Side:
  """A worker whose turns take what is written here."""
  turns = {'ours': [(9.0, 9.0), (1.0, 2.0), (10.0, 2.0), (1.0, 2.0)],
           'pytorch': [(9.0, 9.0), (2.0, 5.0), (20.0, 5.0), (4.0, 5.0)]}

  def __init__(self, side, request):
    self.left = iter(self.turns[side])

  def do(self, job):
    seconds, cpu_seconds = next(self.left)
    return dict(seconds=seconds, cpu_seconds=cpu_seconds, peak_bytes=1)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    pass


def test_steps_are_compared_turn_by_turn(monkeypatch, capsys):
  monkeypatch.setattr(step, 'Worker', Side)
  args = type('Args', (), dict(compare='pytorch', torch_compile=False,
                               dtype='float32', pairs=3))
  request = dict(config=dict(data=dict(batch_size=2, length=5)))
  figures = step.time_section('step', args=args, our_request=request,
                              pytorch_request=request)
  theirs = figures['pytorch float32']
  assert theirs['ours_is_faster_by'] == 2.0  # of 2, 2 and 4
  assert theirs['ours_is_faster_by_cpu_time'] == 2.5
  assert (theirs['median_s'], theirs['cpu_s'], theirs['per_s']) == (4, 5, 2.5)
  assert 'ours is 2.00 x as fast (2.50 x by CPU time)' in (
      capsys.readouterr().out)


@pytest.mark.slow
def test_a_side_that_refuses_says_so():
  config = toy('gpt')
  config.model.d_model = 33  # of 4 heads
  with pytest.raises(RequestError, match='33'):
    worker.Worker('ours', dict(prompt=1, new=1,
                               config=config.to_dict()))


@pytest.mark.slow
@pytest.mark.verify
@pytest.mark.parametrize('system', SYSTEMS)
def test_the_loss_of_both_sides_is_the_same(system, tmp_path):
  """With the same weights and batch, each by its own definition."""
  from benchmarks import pytorch
  config = rival.keep_what_pytorch_has(toy(system))
  request = rival.request_of_pytorch(config)
  request |= dict(dtype='float32', compiled=False)
  other = pytorch.Trainer(request)
  trainer = ours.Trainer(dict(config=config.to_dict()))
  weights.to_hf(trainer.run.module, trainer.state.params, tmp_path)
  other.forward = type(other.model).from_pretrained(
      tmp_path, config=other.model.config).train()
  if config.objective == 'causal':  # theirs does not look behind its end
    trainer.batch['weights'] = trainer.batch['weights'].at[:, -1].set(0)
  assert other.step() == pytest.approx(trainer.step(), rel=1e-5)
  with pytest.raises(RequestError, match='two models'):
    pytorch.build_model(request | dict(parameters=request['parameters'] + 1))


@pytest.mark.slow
@pytest.mark.long
def test_mixers_are_measured_as_they_say(tmp_path):
  file = tmp_path / 'found.json'
  result = forked.run(
      '-m', 'benchmarks.mixers', '--mixers=attention,retnet', '--lengths=32',
      '--rounds=1', '--dtypes=float32', '--d_model=16', '--num_heads=2',
      f'--json={file}')
  assert result.returncode == 0, result.stderr
  rows = json.loads(file.read_text())['rows']
  assert result.stdout.count('retnet') == 2 and len(rows) == 4
  nbytes = {(row['section'], row['mixer']): row['nbytes'] for row in rows}
  # Keys and values of 2 layers; states of 2 heads of 8 x 16.
  assert nbytes['decode', 'attention'] == 4 * 2 * 2 * 32 * 16
  assert nbytes['decode', 'retnet'] == 4 * 2 * 2 * 8 * 16


@pytest.mark.slow
def test_attention_alone_is_timed_on_a_cpu():
  config = gpu.config_of_case('gpt2', toy=True)
  config.data.update(length=32, batch_size=1)
  [row] = gpu.time_attention(config)
  assert row['way'] == 'xla' and 0 < row['seconds'] < math.inf


@pytest.mark.slow
def test_kernels_that_refuse_are_named_and_the_others_timed(monkeypatch):
  def refuse_arrays(*_, **options):
    raise RequestError('which refuses these arrays')
  config = gpu.config_of_case('gpt2', toy=True)
  config.data.update(length=32, batch_size=1)
  kernel = kernels.KERNELS['tokamax']
  monkeypatch.setattr(kernels, 'KERNELS', {
      'named': kernel._replace(platform='cpu', refuse=lambda *_: 'which lacks'),
      'traced': kernel._replace(platform='cpu', refuse=lambda *_: '',
                                run=refuse_arrays)})
  timed, *refused = gpu.time_attention(config)
  assert timed['seconds'] > 0
  assert refused == [
      dict(way='named', error='named is refused, which lacks'),
      dict(way='traced', error='which refuses these arrays')]
