"""Modules that predict further tokens: what they are given, and their loss."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts import skeletons
from architectures.parts.context import Context
from configs.errors import RequestError
from tests.helpers import models
from tests.training import step_test
from training import objectives, preflight
from training.objectives import losses
from training.costs import flops, totals

TWO = dict(mtp_depth=2)


def batch_of(tokens, **more):
  """Rows of next tokens, as the data pipeline has them."""
  return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:],
              weights=jnp.ones(tokens[:, 1:].shape)) | more


def config(**fields):
  c = step_test.config()
  c.model.update(fields)
  return c


@pytest.mark.slow
@pytest.mark.parametrize('fields', [
    dict()], ids=str)
def test_modules_are_those_of_the_oracle(fields):
  """Each is written out for the rows that it has, without the places that no
  token follows; the losses are those of equations 24 and 25."""
  fields = dict(fields)
  module, params = models.make(fields.pop('system', 'llama'), **TWO, **fields)
  c, tokens = module.config, models.tokens(2, 9)
  batch = batch_of(tokens)
  out = jax.jit(lambda params: module.apply(
      {'params': params}, batch['tokens']))(params)
  own, L = params['mtp'], 8
  def rms(x, p):
    x = np.asarray(x)
    return np.asarray(p['scale']) * x / np.sqrt(
        (x ** 2).mean(-1, keepdims=True) + c.norm_eps)
  before, losses = out.hidden, []
  embedded = params['embed']['tokens'][batch['tokens']]
  for k in (1, 2):
    pair = np.concatenate([rms(embedded[:, k:], own[f'token_norm_{k}']),
                           rms(before[:, :L - k], own[f'hidden_norm_{k}'])], -1)
    layer = skeletons.Period(c, (c.layer_pattern()[-1],))
    run = jax.jit(lambda p, x, k=k, layer=layer: layer.apply(
        {'params': p}, (x, None), None,
        Context(jnp.arange(L - k)[None], length=L))[0][0])
    h = run(own[f'depth_{k}'], jnp.asarray(pair @ own[f'join_{k}']))
    before = rms(h, own[f'norm_{k}'])
    models.close(out.extra['mtp'][k - 1][:, :L - k], before, rtol=1e-4)
    logits = np.asarray(out.head.logits(before), np.float64)
    target = np.asarray(tokens)[:, k + 1:]
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, target[..., None], -1)[..., 0]
    losses.append(nats.sum())
  objective, run = objectives.OBJECTIVES['causal'], config(**TWO)
  figures = objective.figures(out, batch, run)
  for k in (1, 2):
    assert figures[f'mtp_{k}_loss'].total == pytest.approx(
        losses[k - 1], rel=1e-4)
    assert figures[f'mtp_{k}_loss'].weight == 2 * (L - k)
  share, _ = objective.loss(out, batch, run)
  own_loss = float(figures['loss'].total)
  assert float(share) == pytest.approx(own_loss + 0.3 / 2 * sum(losses), 1e-5)
  assert float(objective.means(figures)['loss']) == pytest.approx(own_loss / 16)


@pytest.mark.slow
def test_a_module_sees_no_token_that_it_predicts():
  """By gradient: depth k at place i hangs on the tokens up to i + k alone."""
  module, params = models.make('llama', **TWO)
  L = 6
  tokens = jnp.arange(L)[None]

  def states(table):
    own = params | dict(embed=dict(tokens=params['embed']['tokens'].at[:L].set(
        table)))
    out = module.apply({'params': own}, tokens)
    return jnp.stack([out.hidden[0], *(x[0] for x in out.extra['mtp'])])

  slope = jax.jit(jax.jacobian(lambda t: states(t).sum(-1)))(
      params['embed']['tokens'][:L])
  reach = np.abs(slope).sum(-1) > 0  # [depth, place, token]
  i = np.arange(L)
  for k in range(3):
    assert (reach[k, :L - k] == (i[None] <= i[:L - k, None] + k)).all(), k


def test_packed_documents_predict_only_their_own():
  c = config()
  ids = jnp.array([[1, 1, 1, 1, 2, 2, 2]])
  batch = dict(targets=jnp.arange(7)[None], weights=jnp.ones((1, 7)),
               segment_ids=ids)
  targets, weights = losses.mtp_shifted(batch, 2)
  assert weights.tolist() == [[1, 1, 0, 0, 1, 0, 0]]
  assert targets[0, :5].tolist() == [2, 3, 4, 5, 6]
  del batch['segment_ids']
  batch['weights'] = batch['weights'].at[0, 3].set(0)
  assert losses.mtp_shifted(batch, 1)[1].tolist() == [[1, 1, 0, 1, 1, 1, 0]]
  assert losses.mtp_share({}, c) == 0


def test_they_are_counted_apart():
  c = config(**dict(models.config('llama', **TWO).items()))
  c.model.max_len = c.data.length
  figures = totals.count(c, 16)
  D, F, K = 32, 48, 8
  attention = D * (2 * 4 * K + 2 * c.model.num_kv_heads * K
                   if c.model.num_kv_heads else 4 * 4 * K)
  layer = attention + 3 * D * F + 2 * D
  assert figures['by_part']['mtp'] == 2 * (layer + 2 * D * D + 3 * D)
  plain = c.copy_and_resolve_references()
  plain.model.mtp_depth = 0
  assert figures['parameters'] - totals.count(plain, 16)['parameters'] == (
      figures['by_part']['mtp'])
  own, without = (totals.resolved(x) for x in (c, plain))
  more = flops.training_flops_per_token(own, 16) - (
      flops.training_flops_per_token(without, 16))
  scores = 4 * 4 * K * 8.5  # of the mean of 1 to 16 keys
  assert more == pytest.approx(3 * 2 * (
      2 * (attention + 3 * D * F + 2 * D * D + D * own.vocab_size) + scores))
  assert flops.forward_flops(own, 16) == flops.forward_flops(without, 16)


@pytest.mark.parametrize('fields, words', [
    (dict(system='bert', objective='mlm'), "objective 'mlm' does not train"),
    (dict(objective='prefix'), "objective 'prefix' does not train"),
    (dict(model=dict(pattern='own,reads', kinds=dict(
        own={}, reads=dict(kv_sharing=True)))), 'reads the keys of another'),
    (dict(model=dict(mtp_depth=0), weight=0.1), 'train.mtp_weight is 0.1'),
])
def test_what_cannot_be_is_refused(fields, words):
  c = step_test.config()
  c.objective = fields.get('objective', 'causal')
  c.train.mtp_weight = fields.get('weight', 0.3)
  c.model = models.config(fields.get('system', 'llama'), **TWO | fields.get(
      'model', {}))
  with pytest.raises(RequestError, match=words):
    preflight.check_config(c)


@pytest.mark.slow
@pytest.mark.parametrize('ends', [(5, 12)])
def test_places_that_no_token_follows_take_no_expert(ends):
  """The last k of each document: what they join is of two texts. The load of an
  expert is a share of the choices of the others."""
  module, params = models.make('deepseek_v3', **TWO)
  at = np.arange(12)
  ids_BL = jnp.asarray(np.searchsorted(ends, at, side='right'))[None] + 1
  out = jax.jit(lambda x: module.apply(
      {'params': params}, x, segment_ids_BL=ids_BL, positions_BL=at[None]))(
          models.tokens(1, 12))
  for depth in (1, 2):
    load_E, = (np.asarray(x) for path, x in out.aux['loads'].items()
               if f'depth_{depth}' in str(path))
    choices = (12 - depth * len(ends)) * module.config.moe.top_k
    assert load_E.sum() == pytest.approx(1)
    np.testing.assert_allclose(load_E * choices, np.round(load_E * choices),
                               atol=1e-4)
    assert skeletons._followed(Context(
        at[None], ids_BL, tokens_BL=ids_BL), depth).sum() == (
            12 - depth * len(ends))
