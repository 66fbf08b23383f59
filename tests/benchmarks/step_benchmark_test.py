"""The benchmark of a training step: every system trains on its objective's own
batch, and beside it transformers' class of the same model."""

import importlib
import itertools
import math

import numpy as np
import pytest

import architectures
from benchmarks import batches, ours, rival, step, worker
from configs import kinds
from configs.errors import RequestError
from tests.helpers import forked
from training import config_files, objectives, runs, weights
from training.data import tokenizers
from training.workdir import run_config

ONE_OF_EACH = ('gpt', 'bert', 't5')
ALONE = {'gpt4'}  # transformers has no class for it
ALL = [pytest.param(file, marks=() if file in ONE_OF_EACH
                    else pytest.mark.long) for file in architectures.files()]
SHARED = [row for row in ALL if row.values[0] not in ALONE]
SIZES = dict(d_model=32, num_heads=4, head_dim=0, d_ff=0, vocab_size=61,
             max_len=24, dtype='float32')


def toy(file, **more):
  """Returns the config of a small run, its optimiser without a warm-up."""
  config = importlib.import_module(f'configs.{file}').get_config('tiny')
  config = config.copy_and_resolve_references().unlock()
  model = config.model
  model.update(SIZES, num_layers=kinds.fewest_layers(model, 2))
  if model.num_decoder_layers:
    model.num_decoder_layers = model.num_layers
  config.data.update(batch_size=8, length=24, target_length=0)
  config.optim.update(warmup_steps=0, lr=3e-3)
  config_files.set_fields(config, more)
  return config


@pytest.mark.parametrize('system', [
    pytest.param(system, marks=[pytest.mark.long] * (system != 'gpt'))
    for system in architectures.files()])
def test_every_system_trains_on_a_batch_of_its_objective(system):
  config = toy(system)
  trainer = ours.Trainer(run_config.to_json(config))
  assert {key: (array.shape, array.dtype.type)
          for key, array in trainer.batch.items()} == objectives.shapes(config)
  trainer.create()
  losses = [trainer.step() for _ in range(4)]
  assert losses[3] < losses[0] < 2 * math.log(61)


def test_a_batch_is_of_the_whole_vocabulary_and_has_no_padding():
  for system in ONE_OF_EACH:
    config = toy(system)
    config.data.update(batch_size=64, length=64)
    config.model.vocab_size = 5000
    batch = batches.make(config, batches.tokenizer(config))
    assert 4900 < batch['tokens'].max() < 5000
    assert np.unique(batch['tokens']).size > 1000
    for key, array in batch.items():
      assert not key.endswith('segment_ids') or array.all()


def test_data_that_cannot_be_made_up_are_the_runs_own(tmp_path):
  file = tmp_path / 'rows.tsv'
  file.write_text('good\tyes\nbad\tno\n' * 8)
  config = toy('bert', objective='classification', model=dict(vocab_size=0))
  config.data.update(source=f'labelled:{file}', holdout_every=0,
                     eval_source=f'labelled:{file}')
  batch = ours.Trainer(run_config.to_json(config)).batch
  text = bytes(np.asarray(batch['tokens'][0])[1:4].astype(np.uint8))
  assert text in (b'goo', b'bad')


def test_what_the_other_side_lacks_is_left_out():
  config = toy('transformer', model=dict(
      dropout=0.1, attention_dropout=0.1, ffn_dropout=0.1,
      moe=dict(jitter=0.1, logit_noise=1.0, expert_dropout=0.1,
               capacity_factor=1.25, eval_capacity_factor=2.0,
               dispatch='sorted')))
  config.optim.update(name='adafactor', clip_norm=0.0)
  assert config.train.label_smoothing
  found = rival.alike(config)
  assert found.optim.name == 'adamw' and found.optim.clip_norm == 1.0
  assert not found.train.label_smoothing
  zero = ('dropout', 'attention_dropout', 'ffn_dropout', 'moe.jitter',
          'moe.logit_noise', 'moe.expert_dropout', 'moe.capacity_factor',
          'moe.eval_capacity_factor')
  flat = run_config.flatten_dict(found.model.to_dict())
  assert [flat[name] for name in zero] == [0.0] * len(zero)
  assert flat['moe.dispatch'] == 'auto'
  assert config.optim.name == 'adafactor'  # which is as it was


def test_labels_are_what_transformers_looks_for():
  tokens = np.array([[5, 6, 7, 8]])
  batch = dict(tokens=tokens, targets=np.array([[6, 7, 8, 9]]),
               weights=np.array([[1.0, 1.0, 0.0, 1.0]]))
  # A causal class shifts them, so that place i predicts label i + 1.
  assert rival.arguments(batch, causal=True)['labels'].tolist() == [
      [-100, 6, 7, -100]]
  masked = batch | dict(segment_ids=np.array([[1, 1, 1, 0]]),
                        types=np.array([[0, 0, 1, 0]]))
  found = rival.arguments(masked, causal=False)
  assert found['labels'].tolist() == [[6, 7, -100, 9]]
  assert found['attention_mask'].tolist() == [[1, 1, 1, 0]]
  assert found['token_type_ids'].tolist() == [[0, 0, 1, 0]]
  masked['segment_ids'] += 1
  assert 'attention_mask' not in rival.arguments(masked, causal=False)


@pytest.mark.parametrize('words, sentence', [
    (('--config=configs/gpt4.py:tiny', '--compare=pytorch'), 'gpt4-rumoured'),
    (('--config=configs/t5.py:tiny', '--sections=generate'),
     "'t5' is an encoder-decoder")])
def test_what_cannot_be_is_refused_before_any_work(words, sentence):
  result = forked.run('-m', 'benchmarks.step', *words)
  assert result.returncode == 2, result.stderr
  assert sentence in result.stderr.splitlines()[-1]
  assert not result.stdout


@pytest.mark.parametrize('system, field, value, sentence', [
    ('gpt4', 'objective', 'causal', "'gpt4-rumoured' has no counterpart"),
    ('gpt', 'objective', 'prefix', "'prefix' with prefix and valid"),
    ('gpt', 'data.document_mask', True, "'causal' with positions"),
    ('bert', 'objective', 'masked_diffusion', "'masked_diffusion'"),
    ('bert', 'objective', 'question_answering', "'question_answering'")])
def test_what_transformers_lacks_is_named(system, field, value, sentence):
  config = toy(system)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(RequestError, match=sentence):
    rival.check(config)


def test_without_pytorch_its_extra_is_named(monkeypatch):
  monkeypatch.setattr(rival.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(RequestError, match=r'torch and transformers.*verify'):
    rival.check(toy('llama'))


class Side:
  """A worker whose turns take what is written here."""
  turns = {'ours': [(9.0, 9.0), (1.0, 2.0), (10.0, 2.0), (1.0, 2.0)],
           'pytorch': [(9.0, 9.0), (2.0, 5.0), (20.0, 5.0), (4.0, 5.0)]}
  asked, closed = [], []

  def __init__(self, side, request):
    if request.get('parameters') == 1:
      raise RequestError('two models')
    self.side, self.left = side, iter(self.turns[side])

  def do(self, job):
    self.asked.append(self.side)
    seconds, cpu_seconds = next(self.left)
    return dict(seconds=seconds, cpu_seconds=cpu_seconds, peak_bytes=1)

  def close(self):
    self.closed.append(self.side)


def test_a_ratio_is_of_one_turn_by_the_clock_and_by_cpu_time(monkeypatch,
                                                             capsys):
  monkeypatch.setattr(step, 'Worker', Side)
  monkeypatch.setattr(Side, 'asked', [])
  monkeypatch.setattr(Side, 'closed', [])
  args = type('Args', (), dict(compare='pytorch', torch_compile=False,
                               dtype='float32', pairs=3))
  request = dict(config=dict(data=dict(batch_size=2, length=5)))
  found = step._step(request, args, dict(parameters=2))
  assert Side.asked == ['ours', 'pytorch'] * 4
  assert sorted(Side.closed) == ['ours', 'pytorch']
  theirs = found['pytorch float32']
  assert theirs['ours_is_faster_by'] == 2.0  # of 2, 2 and 4
  assert theirs['ours_is_faster_by_cpu_time'] == 2.5
  assert (theirs['median_s'], theirs['cpu_s'], theirs['per_s']) == (4, 5, 2.5)
  assert 'ours is 2.00 x as fast (2.50 x by CPU time)' in (
      capsys.readouterr().out)
  with pytest.raises(RequestError, match='two models'):
    step._step(request, args, dict(parameters=1))
  assert len(Side.closed) == 2  # ours was not started


def test_the_loop_is_timed_by_the_clock_and_by_cpu_time(tmp_path, monkeypatch):
  (tmp_path / 'text').write_text('All is well that ends well. ' * 200)
  config = toy('gpt')
  config.data.update(source=f'text:{tmp_path}/text', eval_source='',
                     tokenizer='bytes')
  config.model.vocab_size = runs.vocab_size(config, tokenizers.load('bytes'))
  trainer = ours.Trainer(run_config.to_json(config))
  clock = itertools.count(step=2)
  monkeypatch.setattr(ours, '_now', lambda: (n := next(clock), 3 * n))
  # Six batches are asked for, and then all is done: from the third one on that
  # are four turns of the clock for the four steps after the first two.
  assert trainer.loop(6) == [2.0, 6.0]


def test_a_side_that_refuses_says_so(monkeypatch, capsys):
  config = toy('gpt', model=dict(d_model=33))  # of 4 heads
  with pytest.raises(RequestError, match='33'):
    worker.Worker('ours', dict(kind='step', prompt=1, new=1, count=1,
                               config=run_config.to_json(config)))


def theirs(config):
  """Returns the other side's trainer of a config, and what it was told."""
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  from benchmarks import pytorch
  request = rival.request(rival.alike(config)) | dict(
      dtype='float32', compiled=False)
  return pytorch.Trainer(request), request


@pytest.mark.parametrize('system', SHARED)
def test_transformers_has_the_same_model(system):
  trainer, request = theirs(toy(system))
  loss = trainer.step()
  assert 0 < loss < 2 * math.log(61)
  assert trainer.step() != loss  # it has learned something
  for module in trainer.model.modules():
    assert not getattr(module, 'p', 0.0), module  # of torch.nn.Dropout


@pytest.mark.parametrize('system', ONE_OF_EACH)
def test_the_loss_of_both_sides_is_the_same(system, tmp_path):
  """With the same weights and batch, each by its own definition."""
  config = rival.alike(toy(system))
  other, _ = theirs(config)
  trainer = ours.Trainer(run_config.to_json(config))
  trainer.create()
  weights.to_hf(trainer.run.module, trainer.state.params, tmp_path)
  other.forward = type(other.model).from_pretrained(
      tmp_path, config=other.model.config).train()
  if config.objective == 'causal':  # theirs does not look behind its end
    trainer.batch['weights'] = trainer.batch['weights'].at[:, -1].set(0)
  assert other.step() == pytest.approx(trainer.step(), rel=1e-5)


def test_a_model_of_another_size_is_refused():
  _, request = theirs(toy('gpt'))
  from benchmarks import pytorch
  with pytest.raises(RequestError, match='GPT2LMHeadModel.*two models'):
    pytorch.build(request | dict(parameters=request['parameters'] + 1))


def test_a_bert_has_the_class_of_its_objective():
  config = rival.alike(toy('bert', objective='mlm'))
  with pytest.raises(RequestError, match='next_sentence=False'):
    rival.request(config)
  config.model.next_sentence = False
  found = rival.request(config)
  assert found['config_json']['architectures'] == ['BertForMaskedLM']
  assert set(found['inputs']) == {'input_ids', 'labels'}
