"""The heads of tasks against their equations in NumPy and published counts; and
the modules that predict further tokens: what they are given, and their loss."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from architectures.parts import skeletons
from architectures.parts import stack
from architectures.parts.context import Context
from architectures.parts.moe.routing import MoEConfig
from common.errors import RequestError
from tests.helpers import models
from tests.training import step_test
from training import objectives, plugins
from training.costs import totals


def _run(module, params, tokens_BL, **kwargs):
  return jax.jit(lambda p: module.apply({'params': p}, tokens_BL, **kwargs))(
      params)


@pytest.mark.parametrize('size, head, labels, published', [
    # transformers' num_parameters() of bert-base-uncased and gpt2.
    ('configs/bert.py:base', 'sequence', 2, 109_483_778),
    ('configs/bert.py:base', 'span', 0, 108_893_186),
    pytest.param('configs/bert.py:base', 'tokens', 9, 108_898_569,
                 marks=pytest.mark.long),
    ('configs/gpt.py:gpt2', 'sequence', 2, 124_441_344)])
def test_parameters_are_as_many_as_published(size, head, labels, published):
  config = plugins.load_config_file(size)
  config.model.update(head=head, num_labels=labels)
  counted = totals.count_costs(config)
  assert counted['parameters'] == published
  assert counted['by_part']['task'] > 0
  assert counted['flops_per_token']['decode'] is None
  assert counted['kv_cache_bytes_per_token'] is None


def test_one_vector_tells_all_tokens_as_mads_decoder_does():
  """Of rows of 16, 9 and 2 tokens; its equations in NumPy, its sinusoids as
  published: sines, then cosines, from place 0 on."""
  module, params = models.make_model('llama', head='vector')
  tokens_BL = np.asarray(models.random_tokens(3, 16))
  lengths_B = np.array([16, 9, 2])
  ids_BL = (np.arange(16) < lengths_B[:, None]).astype(np.int32)
  output = _run(module, params, tokens_BL, segment_ids_BL=ids_BL)
  bare = models.make_model('llama', head='tokens', num_labels=2)[0]
  states_BLD = _run(bare, params | {'task': {
      'kernel': np.zeros((32, 2)), 'bias': np.zeros(2)}}, tokens_BL,
                    segment_ids_BL=ids_BL).hidden
  x_BD = np.asarray(states_BLD)[np.arange(3), lengths_B - 1]
  angle_L = np.arange(16)[:, None] * 10000.0 ** -(np.arange(16) / 15)
  x_BLD = x_BD[:, None] + np.concatenate([np.sin(angle_L), np.cos(angle_L)], 1)
  task = jax.tree.map(np.asarray, params['task'])

  def normed(x, name):
    y = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + module.config.norm_eps)
    return y * task[name]['scale'] + task[name].get('bias', 0.0)

  for i in range(2):
    y = normed(x_BLD, f'norm_{i}') @ task[f'kernel_{i}'] + task[f'bias_{i}']
    x_BLD = y * special.ndtr(y)
  np.testing.assert_allclose(
      output.logits, normed(x_BLD, 'norm_2') @ task['kernel'] + task['bias'],
      rtol=1e-3, atol=1e-4)


def test_a_row_is_read_off_the_mean_of_what_is_no_padding():
  module, params = models.make_model('bert', head='sequence', num_labels=3,
                                     pooling='mean')
  segments_BL = (np.arange(16)[None] < [[16], [11]]).astype(int)
  output = _run(module, params, models.random_tokens(),
                segment_ids_BL=segments_BL)
  rows = [np.asarray(output.hidden[0]).mean(0),
          np.asarray(output.hidden[1, :11]).mean(0)]
  read = np.tanh(np.stack(rows) @ np.asarray(params['pooler'])
                 + np.asarray(params['pooler_bias']))
  task = jax.tree.map(np.asarray, params['task'])
  np.testing.assert_allclose(
      output.extra['scores'], read @ task['kernel'] + task['bias'],
      rtol=1e-4, atol=1e-5)
  with pytest.raises(RequestError, match='no logits of tokens'):
    _ = output.logits


@pytest.mark.parametrize('system, activation', [
    ('bert', np.tanh), ('electra', lambda x: x * special.ndtr(x)),
    ('deberta_v2', lambda x: x * special.ndtr(x))])
def test_a_row_is_read_off_its_first_token(system, activation):
  """By the activation that each paper's pooler has."""
  module, params = models.make_model(system, head='sequence', num_labels=3)
  output = _run(module, params, models.random_tokens())
  first_BD = np.asarray(output.hidden[:, 0])
  read_BD = activation(first_BD @ np.asarray(params['pooler'])
                       + np.asarray(params['pooler_bias']))
  task = jax.tree.map(np.asarray, params['task'])
  np.testing.assert_allclose(
      output.extra['scores'], read_BD @ task['kernel'] + task['bias'],
      rtol=1e-4, atol=1e-5)


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
def test_modules_are_those_of_the_oracle():
  """Each is written out for the rows that it has, without the places that no
  token follows; the losses are those of equations 24 and 25."""
  module, params = models.make_model('llama', **TWO)
  c, tokens = module.config, models.random_tokens(2, 9)
  batch = batch_of(tokens)
  objective, run = objectives.OBJECTIVES['causal'], config(**TWO)
  @jax.jit
  def read(params):
    out = module.apply({'params': params}, batch['tokens'])
    return out, objective.figures(out, batch, run), objective.loss(
        out, batch, run)[0]
  out, figures, share = read(params)
  mtp, L = params['mtp'], 8
  def rms(x, p):
    x = np.asarray(x)
    return np.asarray(p['scale']) * x / np.sqrt(
        (x ** 2).mean(-1, keepdims=True) + c.norm_eps)
  before, losses = out.hidden, []
  embedded = np.asarray(params['embed']['tokens'])[batch['tokens']]
  for k in (1, 2):
    pair = np.concatenate([rms(embedded[:, k:], mtp[f'token_norm_{k}']),
                           rms(before[:, :L - k], mtp[f'hidden_norm_{k}'])], -1)
    layer = stack.Period(c, c.layer_kinds(c.num_layers)[-1:])
    one = jax.jit(lambda p, x, k=k, layer=layer: layer.apply(
        {'params': p}, (x, stack.PassedOn()), None,
        Context(jnp.arange(L - k)[None]), {})[0][0])
    h = one(mtp[f'depth_{k}'], pair @ np.asarray(mtp[f'join_{k}']))
    before = rms(h, mtp[f'norm_{k}'])
    models.assert_trees_close(out.extra['mtp'][k - 1][:, :L - k], before,
                              rtol=1e-4)
    logits = np.asarray(out.head.logits(before), np.float64)
    target = np.asarray(tokens)[:, k + 1:]
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, target[..., None], -1)[..., 0]
    losses.append(nats.sum())
  for k in (1, 2):
    assert figures[f'mtp_{k}_loss'].total == pytest.approx(
        losses[k - 1], rel=1e-4)
    assert figures[f'mtp_{k}_loss'].weight == 2 * (L - k)
  main_loss = float(figures['loss'].total)
  assert float(share) == pytest.approx(main_loss + 0.3 / 2 * sum(losses), 1e-5)
  assert float(objective.means(figures)['loss']) == pytest.approx(
      main_loss / 16)


@pytest.mark.slow
def test_a_module_sees_no_token_that_it_predicts():
  """By gradient: depth k at place i hangs on the tokens up to i + k alone."""
  module, params = models.make_model('llama', **TWO)
  L = 6
  tokens = jnp.arange(L)[None]

  def states(table):
    changed = params | dict(embed=dict(
        tokens=params['embed']['tokens'].at[:L].set(table)))
    out = module.apply({'params': changed}, tokens)
    return jnp.stack([out.hidden[0], *(x[0] for x in out.extra['mtp'])])

  slope = jax.jit(jax.jacobian(lambda t: states(t).sum(-1)))(
      params['embed']['tokens'][:L])
  reach = np.abs(slope).sum(-1) > 0  # [depth, place, token]
  i = np.arange(L)
  for k in range(3):
    assert (reach[k, :L - k] == (i[None] <= i[:L - k, None] + k)).all(), k


def test_what_no_token_follows_and_padding_take_no_expert():
  """A row that is whole, and one that is padded from its fifth place on."""
  def followed(depth, **fields):
    return skeletons._mark_tokens_with_successor(Context(
        jnp.arange(7)[None], tokens_BL=jnp.zeros((2, 7), int), **fields), depth)
  valid_BL = jnp.arange(7)[None] < jnp.array([[7], [4]])
  ids_BL = jnp.array([[1, 1, 1, 2, 2, 2, 2], [3] * 7])
  for fields, first, second in (
      ({}, '1111110 1111100', '1111110 1111100'),
      (dict(valid_BL=valid_BL), '1111110 1111100', '1110000 1100000'),
      (dict(segment_ids_BL=ids_BL), '1101110 1001100', '1111110 1111100'),
      (dict(valid_BL=valid_BL, segment_ids_BL=ids_BL),
       '1101110 1001100', '1110000 1100000')):
    got = [np.asarray(followed(depth, **fields)) for depth in (1, 2)]
    for row, want in enumerate((first, second)):
      assert ' '.join(''.join(map(str, each[row])) for each in got) == want


@pytest.mark.slow
def test_the_load_of_a_module_is_of_those_that_take_experts():
  """Not of the last k of each document: what they join is of two texts; nor of
  padding. It is a share of the choices of the others."""
  module, params = models.make_model('mixtral', num_layers=1,
                                     moe=dict(router='sigmoid'), **TWO)
  at, ends, size = np.arange(12), (5, 12), 10
  ids_BL = jnp.asarray(np.searchsorted(ends, at, side='right'))[None] + 1
  out = jax.jit(lambda x: module.apply(
      {'params': params}, x, segment_ids_BL=ids_BL, positions_BL=at[None],
      valid_BL=jnp.asarray(at < size)[None]))(models.random_tokens(1, 12))
  for depth in (1, 2):
    load_E, = (np.asarray(x) for path, x in out.aux['loads'].items()
               if f'depth_{depth}' in str(path))
    choices = (size - depth * len(ends)) * module.config.part(MoEConfig).top_k
    assert load_E.sum() == pytest.approx(1)
    np.testing.assert_allclose(load_E * choices, np.round(load_E * choices),
                               atol=1e-4)
