"""Modules that predict further tokens: what they are given, and their loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import skeletons
from architectures.parts.context import Context
from configs.errors import RequestError
from tests.helpers import models
from tests.training import step_test
from training import ahead, objectives, paths, runs
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
    dict(), pytest.param(dict(system='mixtral', num_kv_heads=2),
                         marks=pytest.mark.long)], ids=str)
def test_modules_are_those_of_the_oracle(fields):
  """Each is written out for the rows that it has, without the places that no
  token follows; the losses are those of equations 24 and 25."""
  fields = dict(fields)
  module, params = models.make(fields.pop('system', 'llama'), **TWO, **fields)
  c, tokens = module.config, models.tokens(2, 9)
  batch = batch_of(tokens)
  out = jax.jit(lambda params: module.apply(
      {'params': params}, batch['tokens']))(params)
  own, L = params['ahead'], 8
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
    models.close(out.extra['ahead'][k - 1][:, :L - k], before, rtol=1e-4)
    logits = np.asarray(out.head.logits(before), np.float64)
    target = np.asarray(tokens)[:, k + 1:]
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, target[..., None], -1)[..., 0]
    losses.append(nats.sum())
  objective, run = objectives.OBJECTIVES['causal'], config(**TWO)
  figures = objective.figures(out, batch, run)
  for k in (1, 2):
    assert figures[f'ahead_{k}_loss'].total == pytest.approx(
        losses[k - 1], rel=1e-4)
    assert figures[f'ahead_{k}_loss'].weight == 2 * (L - k)
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
    return jnp.stack([out.hidden[0], *(x[0] for x in out.extra['ahead'])])

  slope = jax.jit(jax.jacobian(lambda t: states(t).sum(-1)))(
      params['embed']['tokens'][:L])
  reach = np.abs(slope).sum(-1) > 0  # [depth, place, token]
  i = np.arange(L)
  for k in range(3):
    assert (reach[k, :L - k] == (i[None] <= i[:L - k, None] + k)).all(), k


@pytest.mark.long
def test_the_model_itself_stays_as_it_is():
  module, params = models.make('llama', **TWO)
  plain = architectures.build(dataclasses.replace(module.config, mtp_depth=0))
  rest = {name: x for name, x in params.items() if name != 'ahead'}
  tokens = models.tokens()
  models.close(models.logits(module, params, tokens),
               models.logits(plain, rest, tokens), rtol=1e-6)
  cache = architectures.init_cache(module.config, 2, 16)
  out = module.apply({'params': params}, tokens, cache=cache)
  assert not out.extra  # decoding is without them


def test_packed_documents_predict_only_their_own():
  c = config()
  ids = jnp.array([[1, 1, 1, 1, 2, 2, 2]])
  batch = dict(targets=jnp.arange(7)[None], weights=jnp.ones((1, 7)),
               segment_ids=ids)
  targets, weights = ahead.shifted(batch, 2)
  assert weights.tolist() == [[1, 1, 0, 0, 1, 0, 0]]
  assert targets[0, :5].tolist() == [2, 3, 4, 5, 6]
  del batch['segment_ids']
  batch['weights'] = batch['weights'].at[0, 3].set(0)
  assert ahead.shifted(batch, 1)[1].tolist() == [[1, 1, 0, 1, 1, 1, 0]]
  assert ahead.share({}, c) == 0


@pytest.mark.long
def test_documents_in_a_row_are_those_apart():
  module, params = models.make('llama', **TWO)
  first, second = models.tokens(1, 6), models.tokens(1, 9, seed=2)
  run = jax.jit(lambda batch: objectives.OBJECTIVES['causal'].figures(
      objectives.OBJECTIVES['causal'].apply(module, params, batch), batch,
      config(**TWO)))
  apart = [run(batch_of(x)) for x in (first, second)]
  rows = [batch_of(x, segment_ids=jnp.full((1, x.shape[1] - 1), n),
                   positions=jnp.arange(x.shape[1] - 1)[None])
          for n, x in enumerate((first, second), 1)]
  packed = run(jax.tree.map(lambda *xs: jnp.concatenate(xs, 1), *rows))
  for name in ('loss', 'ahead_1_loss', 'ahead_2_loss', 'ahead_2_accuracy'):
    models.close(packed[name], jax.tree.map(
        jnp.add, apart[0][name], apart[1][name]), rtol=1e-5)


def test_they_are_counted_apart():
  c = config(**dict(models.config('llama', **TWO).items()))
  c.model.max_len = c.data.length
  figures = totals.count(c, 16)
  D, F, K = 32, 48, 8
  attention = D * (2 * 4 * K + 2 * c.model.num_kv_heads * K
                   if c.model.num_kv_heads else 4 * 4 * K)
  layer = attention + 3 * D * F + 2 * D
  assert figures['by_part']['ahead'] == 2 * (layer + 2 * D * D + 3 * D)
  plain = c.copy_and_resolve_references()
  plain.model.mtp_depth = 0
  assert figures['parameters'] - totals.count(plain, 16)['parameters'] == (
      figures['by_part']['ahead'])
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
    runs.check_config(c)


@pytest.mark.long
def test_they_train_on_several_devices_as_on_one():
  """In micro-batches, with experts whose bias moves."""
  c = step_test.config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2,
                       train__grad_accumulation=2)
  c.model = models.config('deepseek_v3', vocab_size=64, mtp_depth=1)
  _, state, metrics = step_test.train(c, steps=2)
  _, alone, other = step_test.train(c, step_test.one_device(), steps=2)
  models.close(alone.params, state.params, rtol=2e-4)
  assert 'ahead_1_loss' in metrics[0]
  for name in ('loss', 'ahead_1_loss', 'grad_norm'):
    assert metrics[-1][name] == pytest.approx(other[-1][name], rel=1e-3)
  biases = [x for path, x in paths.flatten(state.params).items()
            if path.startswith('ahead/') and path.endswith('router_bias')]
  assert biases and all(np.abs(x).max() > 0 for x in biases)


def test_encoders_look_no_further():
  with pytest.raises(RequestError, match='mtp_depth 2 has no meaning with'):
    architectures.resolve(models.config('bert', **TWO))


@pytest.mark.slow
@pytest.mark.parametrize('ends', [
    pytest.param((12,), marks=pytest.mark.long), (5, 12)])
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
