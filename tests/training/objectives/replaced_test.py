"""Replaced-token detection: rows, losses by NumPy, which loss trains what, and
the encoder alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts import paths
from architectures.parts.heads import GeneratorConfig
from common.errors import RequestError
from configs import electra
from tests.helpers import data_files as files
from tests.helpers import models
from training import objectives
from training.data import tokenizers
from training.hf import weights
from training.objectives import causal

TOKENIZER = tokenizers.load('bytes')
RECORD = objectives.OBJECTIVES['replaced_tokens']


def _config():
  config = electra.get_config()
  config.data.update(length=32, batch_size=3)
  return config


def _batch(config, sizes=(31, 12, 31)):
  draw = np.random.default_rng(1)
  rows = [files.make_batch_row(RECORD, causal.Window(
      draw.integers(97, 123, 31).astype(np.int32), size), draw, config,
                               TOKENIZER) for size in sizes]
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _make(sharing):
  return models.make_model('electra', head='replaced', vocab_size=384,
                           generator=dict(sharing=sharing))


def test_a_row_masks_its_share_and_knows_the_words():
  batch = _batch(_config())
  assert batch['places'].shape == batch['targets'].shape == (3, 5)
  assert batch['weights'].sum(1).tolist() == [4, 2, 4]
  masks = batch['tokens'] == TOKENIZER.mask_id
  for row, places in enumerate(batch['places']):
    real = places[batch['weights'][row] > 0]
    assert np.flatnonzero(masks[row]).tolist() == real.tolist()
    assert (places[len(real):] == 32).all()
    assert ((97 <= batch['targets'][row, :len(real)])
            & (batch['targets'][row, :len(real)] < 123)).all()


def test_a_row_is_split_over_no_devices_and_a_generator_is_needed():
  config = _config()
  RECORD.check(config)
  config.mesh.context = 2
  with pytest.raises(RequestError, match='^mesh.context is 2'):
    RECORD.check(config)
  config.mesh.context = 1
  config.model.generator.num_layers = 0
  with pytest.raises(RequestError, match='^model.generator.num_layers is 0'):
    RECORD.check(config)


@pytest.mark.parametrize('sharing', [
    'whole', pytest.param('apart', marks=pytest.mark.long)])
def test_the_encoder_judges_what_the_generator_drew(sharing):
  config = _config()
  (module, params), batch = _make(sharing), _batch(config)
  params['generator']['head']['bias'] += 60 * (
      np.arange(384) == batch['targets'][0, 0])

  def both(params):
    out = RECORD.apply(module, params, batch)
    figures = RECORD.figures(out, batch, config)
    totals = lambda p, name: RECORD.figures(
        RECORD.apply(module, p, batch), batch, config)[name].total
    return out.extra, figures, [jax.grad(totals)(params, name) for name in (
        'generator_loss', 'detection_loss')]
  extra, figures, grads = jax.device_get(jax.jit(both)(params))
  assert (extra['drawn'] == batch['targets'][0, 0]).all()
  shown, real = batch['tokens'].copy(), batch['segment_ids'] != 0
  weights_BM = batch['weights'] > 0
  for row, places in enumerate(batch['places']):
    shown[row, places[weights_BM[row]]] = batch['targets'][0, 0]
  replaced = np.zeros(shown.shape, bool)
  for row, places in enumerate(batch['places']):
    real_places = places[weights_BM[row]]
    replaced[row, real_places] = (
        extra['drawn'] != batch['targets'])[row, weights_BM[row]]
  alone, theirs = weights.without_generator(module, params)
  assert not alone.config.part(GeneratorConfig).num_layers
  judged = jax.jit(lambda p: alone.apply(
      {'params': p}, shown, segment_ids_BL=batch['segment_ids']))(theirs)
  models.assert_trees_close(extra['scores'] * real[..., None],
                            judged.extra['scores'] * real[..., None], rtol=1e-4)
  scores = np.asarray(extra['scores'][..., 0], np.float64)
  nats = np.log1p(np.exp(np.where(replaced, -scores, scores)))
  assert figures['detection_loss'].total == pytest.approx(
      nats[real].sum(), 1e-4)
  assert figures['replaced'].total == replaced.sum()
  means = RECORD.means(figures)
  assert means['loss'] == pytest.approx(
      means['generator_loss'] + 50 * nats[real].mean(), 1e-4)
  generator, encoder = (
      {path for path, x in paths.flatten_by_path(g).items()
       if np.abs(x).max() > 0}
      for g in grads)
  assert not any(path.startswith('generator') for path in encoder)
  assert 'encoder/layers/block_0/ffn/up' in encoder - generator
  assert 'generator/encoder/layers/block_0/ffn/up' in generator
  assert 'embed/tokens' in generator
  assert ('embed/tokens' in encoder) == (sharing == 'whole')
  assert ('embed/tokens_added' in encoder) == (sharing == 'apart')
  assert 'embed/tokens_added' not in generator


def test_a_draw_is_as_likely_as_the_generator_has_it():
  module, params = _make('whole')
  tokens, places = jnp.full((64, 8), 5), jnp.tile(jnp.arange(8), (64, 1))
  out = jax.jit(lambda p: module.apply(
      {'params': p}, tokens, places_BM=places))(params)
  p_V = np.asarray(jax.nn.softmax(out.logits, -1).mean((0, 1)))
  drawn_V = np.bincount(np.asarray(out.extra['drawn']).ravel(), minlength=384)
  top = np.argsort(p_V)[-3:]
  np.testing.assert_allclose(drawn_V[top] / 512, p_V[top], atol=0.08)
