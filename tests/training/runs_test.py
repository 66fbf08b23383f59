"""What a run says that it will do, against what it then does."""

import re
import shutil
import types

from configs import base
import jax
import numpy as np
import pytest

from common.errors import RequestError
from tests.helpers import evaluations, models
from tests.training import vectorised_test
from training import description, runs
from training.data import tokenizers
from training.objectives import pipeline

WORDS = 'What is sown is reaped. '


def _outline(tmp_path, start=0, **fields):
  config = base.base()
  config.model.update(d_model=16, num_layers=2, num_heads=2)
  config.data.update(length=8, batch_size=16, holdout_every=4,
                     cache_dir=str(tmp_path))
  config.train.update(steps=30, grad_accumulation=2)
  config.eval.update(every_steps=10, batches=2)
  config.mesh.fsdp = 2
  config.update_from_flattened_dict(fields)
  tokenizer = tokenizers.load('bytes')
  run = runs.build(config, runs.resolve_model(config, tokenizer)[0])
  loaders = (pipeline.make_training_loader(config, tokenizer),
             pipeline.make_evaluation_loaders(config, tokenizer))
  lines = description.describe_run(run, start, 128, *loaders).splitlines()
  return run, loaders, dict(line.split(': ', 1) for line in lines)


def test_the_outline_says_what_the_run_does(tmp_path):
  (tmp_path / 'one.txt').write_text(WORDS * 40)
  source = f'text:{tmp_path}/one.txt'
  run, (train, (held_out,)), lines = _outline(
      tmp_path, 10, **{'data.source': source})
  d, v, length = 16, run.model.vocab_size, run.model.max_len
  # GPT's by hand: embeddings, two blocks, the last norm.
  block = 4 * (d * d + d) + 2 * 4 * d * d + 5 * d + 4 * d
  assert f' {v * d + length * d + 2 * block + 2 * d:,} parameters in ' in (
      lines['model'])
  assert lines['devices'] == '8 of the kind cpu, mesh data=4,fsdp=2'
  assert lines['step'] == '16 rows in 2 micro-batches, 128 tokens'
  passes = 30 * 16 / train.num_windows
  assert lines['training'] == 'steps 11 to 30, 3,840 tokens in all'
  assert lines['data'] == (
      f'{passes:.3g} passes over all but the last 1/4 of {source}')
  assert ('warning' in lines) == (passes > description.MANY_PASSES_OVER_DATA)
  assert lines['held out'] == (
      f'the last 1/4 of {source}, {len(WORDS) * 10 + 1} tokens')
  assert lines['evaluation'] == (
      f'every 10 steps, on 2 of the {-(-len(WORDS) * 10 // 128)} batches held '
      'out')


def test_the_first_parameters_are_drawn_from_both_seeds():
  drawn = {}
  for seeds in ((3, 0), (3, 1), (4, 1)):
    config = base.base()
    config.model.update(d_model=16, num_layers=1, num_heads=2, vocab_size=8)
    config.seed, config.init_seed = seeds
    run = runs.build(config, runs.resolve_model_without_tokenizer(config),
                     evaluations.one_device_mesh())
    drawn[seeds] = jax.tree.leaves(run.new_state().params)[-1]
  assert len({float(np.std(x)) for x in drawn.values()}) == 3
  alone = jax.jit(lambda key: jax.tree.leaves(
      run.module.init(key, np.zeros((1, 1), np.int32)))[-1])
  np.testing.assert_allclose(drawn[3, 0], alone(jax.random.key(3)), rtol=1e-6)


def test_devices_of_one_machine_share_its_memory(monkeypatch):
  state = jax.ShapeDtypeStruct((10,), np.float32, sharding=(
      jax.sharding.SingleDeviceSharding(jax.devices()[0])))
  counted = []
  monkeypatch.setattr(runs, 'check_bytes_fit',
                      lambda num_bytes, **_: counted.append(num_bytes))
  for platform in ('cpu', 'gpu'):
    device = types.SimpleNamespace(platform=platform)
    runs.check_state_fits(state, types.SimpleNamespace(
        local_devices=8 * [device]))
  assert counted == [8 * 40, 40]


def test_the_ramp_of_a_run_does_not_bind_its_evaluation():
  """Batches of 4 rows do not divide over the 8 devices of these tests."""
  config = base.base()
  config.model.update(d_model=16, num_layers=1, num_heads=2, vocab_size=8)
  config.data.update(batch_size=16, batch_ramp='2:4')
  with pytest.raises(RequestError, match='data.batch_ramp is 4'):
    runs.build(config, runs.resolve_model_without_tokenizer(config))
  here = runs.fit_mesh_to_this_machine(config)
  model = runs.resolve_model_without_tokenizer(here)
  assert runs.build(here, model).mesh.shape['data'] == 8


@pytest.mark.parametrize('arch, line', [
    ('gpt', ''), ('llama', 'llama with norm=layernorm in place of rmsnorm, '
                  'position=learned in place of rope, ')])
def test_a_run_says_where_it_is_not_the_system_that_it_names(
    arch, line, tmp_path):
  (tmp_path / 'one.txt').write_text(WORDS * 40)
  *_, lines = _outline(tmp_path, **{
      'data.source': f'text:{tmp_path}/one.txt', 'model.arch': arch,
      'model.ffn': 'gelu_tanh'})
  assert lines.get('not as published', '').startswith(line)
  assert ('not as published' in lines) == bool(line)


@pytest.fixture(name='labelled')
def _labelled(tmp_path):
  """A config of texts of 4 to 41 letters, whose label says whether there is a c
  among them."""
  draw = np.random.default_rng(0)
  texts = [''.join(draw.choice(list('ab'), draw.choice([4, 7, 13, 40])))
           for _ in range(200)]
  (tmp_path / 'rows.tsv').write_text(''.join(
      f'c{text}\twith\n' if i % 2 else f'{text}\twithout\n'
      for i, text in enumerate(texts)))
  return vectorised_test.config(
      f'labelled:{tmp_path}/rows.tsv', data__holdout_every=20,
      objective='classification', model__arch='bert', model__block='post_norm',
      data__length=32, data__batch_size=8, data__length_buckets=2,
      train__steps=24, eval__every_steps=0, checkpoint__every_steps=12).unlock()


@pytest.mark.slow
@pytest.mark.parametrize('goes_on',
                         models.mark_long_except((False,), (False, True)))
def test_a_run_in_batches_of_several_lengths_goes_on_bit_for_bit(
    labelled, tmp_path, goes_on):
  vectorised_test.alone(labelled, tmp_path / 'run')
  one = vectorised_test.rows(tmp_path / 'run')
  if goes_on:
    shutil.rmtree(tmp_path / 'run/checkpoints/24')
    vectorised_test.alone(labelled, tmp_path / 'run')
    two = vectorised_test.rows(tmp_path / 'run')
    assert [row['loss'] for row in one] == [row['loss'] for row in two]
  tokens = {round(row['tokens_per_second'] * row['step_seconds'])
            for row in one}
  assert tokens == {8 * 16, 8 * 32}


def test_a_run_says_how_rows_are_padded_and_cut(labelled):
  tokenizer = tokenizers.load('bytes')
  run = runs.build(labelled, runs.resolve_model(labelled, tokenizer)[0])
  train = pipeline.make_training_loader(labelled, tokenizer)
  text = description.describe_run(run, 0, 256, train,
                                  pipeline.make_evaluation_loaders(labelled,
                                                                   tokenizer))
  assert ('step: 8 rows padded to 16 or 32 tokens (a program each), at most '
          '256 tokens\n') in text
  assert re.search('[1-9][0-9]* of whose 1[0-9]+ rows are longer than '
                   'data.length 32, and cut off', text)
  # Each twentieth row is held out, and these have no c.
  assert '\nlabels: 2, in training with 100, without 90\n' in text
