"""The objective of probes: what it reads, what it refuses, and its batches."""

import jax
import numpy as np
import pytest

from common.errors import RequestError
from configs import bert, gpt
from tests.helpers import evaluations, models
from training import objectives, preflight, runs
from training.data import probes, tokenizers
from training.objectives import pipeline


def config_of(name='induction', length=32, **fields):
  config = gpt.get_config('tiny')
  config.objective = getattr(probes.PROBES.get(name), 'objective', 'probe')
  config.update_from_flattened_dict(
      {'data.source': f'probe:{name}', 'data.length': length,
       'data.batch_size': 8, 'model.num_layers': 2, 'model.d_model': 32}
      | fields)
  return config


def loader(config, index=0, count=1):
  return pipeline.make_training_loader(
      config, tokenizers.load(config.data.tokenizer), index, count)


def test_a_batch_is_the_rows_of_its_seed_on_any_number_of_hosts():
  config = config_of(**{'probe.examples': 100})
  batches = [loader(config).batch(n) for n in range(3)]
  parts = [loader(config, i, 2).batch(2) for i in range(2)]
  for key in batches[2]:
    np.testing.assert_array_equal(
        np.concatenate([part[key] for part in parts]), batches[2][key])
  again = loader(config_of(**{'probe.examples': 100, 'seed': 1})).batch(2)
  assert not np.array_equal(again['tokens'], batches[2]['tokens'])


def test_a_pass_has_each_row_once_and_held_out_rows_are_others():
  config = config_of(**{'probe.examples': 40, 'probe.held_out': 20})
  ours = loader(config)
  rows = np.concatenate([ours.batch(n)['tokens'] for n in range(10)])
  of_pass = [set(map(bytes, rows[i:i + 40])) for i in (0, 40)]
  assert of_pass[0] == of_pass[1] and len(of_pass[0]) == 40
  heldout, = pipeline.make_evaluation_loaders(config, ours.tokenizer)
  batches = list(heldout.iterate())
  weights = np.concatenate([batch['weights'] for batch in batches])
  shown = set(map(bytes, np.concatenate(
      [batch['tokens'] for batch in batches])[:20]))
  assert len(batches) == 3 and not weights[20:].any()
  assert len(shown) == 20 and not shown & of_pass[0]
  other, = pipeline.make_evaluation_loaders(config_of(**{
      'seed': 5, 'probe.held_out': 20}), ours.tokenizer)
  np.testing.assert_array_equal(other.batch(0)['tokens'],
                                batches[0]['tokens'])


@pytest.mark.parametrize('name', probes.PROBES)
def test_batches_hold_the_rows_of_the_probe(name):
  probe = probes.PROBES[name]
  config = config_of(name, probe.length)
  batch, settings = loader(config).batch(0), probes.read_settings(config)
  shapes = objectives.shapes_of_batch(config)
  assert {key: (x.shape, x.dtype) for key, x in batch.items()} == {
      key: (shape, np.dtype(dtype)) for key, (shape, dtype) in shapes.items()}
  assert batch['tokens'].max() < probe.vocab_size(settings)
  assert (batch['weights'] <= batch['segment_ids']).all()
  assert batch['weights'].any(1).all()


def test_an_encoder_reads_what_does_not_show_its_answers():
  config = bert.get_config('tiny')
  config.objective = 'probe'
  config.data.update(source='probe:mqar', length=32)
  config.probe.levels = (4,)
  preflight.check_config(config)
  config.data.source = 'probe:reverse'
  with pytest.raises(RequestError, match='mqar, .*parity'):
    preflight.check_config(config)


def test_only_what_is_asked_for_counts():
  """The loss is log V per answer of a model that knows nothing, and targets
  that are not asked for do not move it."""
  config = config_of()
  model, _ = runs.resolve_model(config, tokenizers.load('bytes'))
  run = runs.build(config, model, evaluations.one_device_mesh())
  batch = loader(config).batch(0)
  others = dict(batch, targets=np.where(batch['weights'] > 0, batch['targets'],
                                        (batch['targets'] + 3) % 16))
  drawn = models.draw_parameters(run.abstract_state.params)
  judge = run.eval_step()
  with run.context():
    loss, moved, blind = (
        jax.device_get(judge(params, run.put(each)))['loss']
        for params, each in ((drawn, batch), (drawn, others), (
            jax.tree.map(np.zeros_like, drawn), batch)))
  assert loss == moved != blind
  assert blind.weight == batch['weights'].sum()
  np.testing.assert_allclose(blind.total / blind.weight,
                             np.log(model.vocab_size), rtol=1e-5)
