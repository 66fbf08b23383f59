"""What is found inside a model, of heads that were built to be found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archetype
from tests.helpers import models
from training.evals import inspection as measures

L = 9


def _model(system='gpt', **changes):
  return archetype.Model(*models.make_model(system, **changes))


def _changed(model, changes):
  """Returns the model with other values of parameters of its layers, by path;
  each is [N, ...]."""
  def change(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    name = name.removeprefix('decoder/layers/block_0/')
    return jnp.asarray(changes[name], x.dtype) if name in changes else x
  params = jax.tree_util.tree_map_with_path(change, model.params)
  return archetype.Model(model.module, params)


@pytest.fixture(scope='module')
def built():
  """Two layers with two heads: of the first, head 0 looks at the token before
  and head 1 at the first token; those of the second weigh all alike.

  Positions are one-hot vectors and tokens nothing, so that queries and keys
  are told by weights alone.
  """
  model = _model(num_heads=2)
  D, K = model.config.d_model, model.config.head_dim
  query, key = np.zeros((2, 2, D, 2, K))
  query_bias, key_bias = np.zeros((2, 2, 2, K))
  for place in range(K - 1):
    query[0, place, 0, place] = 10
    key[0, place, 0, place + 1] = 10
  query_bias[0, 1, 0] = 10
  key[0, 0, 1, 0] = 10
  positions = np.zeros(model.params['embed']['positions'].shape)
  positions[:D, :D] = np.eye(D)
  model = _changed(model, {
      'embed/tokens': np.zeros((models.VOCAB, D)),
      'embed/positions': positions,
      'attention_norm/scale': np.ones((2, D)),
      'attention_norm/bias': np.zeros((2, D)),
      'attention/query': query, 'attention/key': key,
      'attention/query_bias': query_bias, 'attention/key_bias': key_bias})
  return model, model.inspect(models.random_tokens(2, L))


def test_heads_that_were_built_are_found(built):
  attention = built[1].attention['decoder']
  queries = np.ones((2, L), bool)
  queries[:, 0] = False  # it sees but itself
  np.testing.assert_allclose(attention.previous_token[0],
                             [[1, 1 / (L - 1)]] * 2, atol=1e-3)
  np.testing.assert_allclose(
      measures.mean_over_queries(attention.first_token, queries)[0],
      [[1 / (L - 1), 1]] * 2, atol=1e-3)
  assert (attention.entropy[0] < 1e-2).all()
  uniform_L = np.log(np.arange(1, L + 1))
  np.testing.assert_allclose(attention.entropy[1],
                             np.broadcast_to(uniform_L, (2, 2, L)), atol=1e-5)
  np.testing.assert_allclose(attention.previous_token[1],
                             (1 / np.arange(2, L + 1)).mean(), atol=1e-6)
  assert (attention.sink < 1e-6).all()


def test_induction_is_the_weight_on_what_followed():
  """Of one map, by its definition: 7 8 8 7 8 5 9, and padding."""
  tokens_BL = np.array([[7, 8, 8, 7, 8, 5, 9, 7]])
  real_BL = np.array([[1] * 7 + [0]], bool)
  weights = np.random.default_rng(0).dirichlet(np.ones(8), size=(1, 1, 2, 8))
  scores = measures.induction_score(weights, tokens_BL, real_BL)
  w_HLM = weights[0, 0]
  np.testing.assert_allclose(
      scores[0, 0], (w_HLM[:, 3, 1] + w_HLM[:, 4, 2] + w_HLM[:, 4, 3]) / 2)
  np.testing.assert_allclose(  # of the six queries that have a token before
      measures.previous_token_weight(weights, real_BL)[0, 0],
      w_HLM[:, range(1, 7), range(6)].mean(1))
  assert np.isnan(measures.induction_score(weights, np.arange(8)[None], real_BL)
                  ).all()


def test_norms_and_peaks_are_numpys_and_padding_does_not_count():
  model, tokens_BL = _model(), models.random_tokens(2, L)
  mask_BL = np.array([[1] * L, [1] * 5 + [0] * 4])
  stream = model.inspect(tokens_BL, mask=mask_BL).stream['decoder']
  states = np.asarray(model.hidden_states(tokens_BL, mask=mask_BL))
  embed = jax.tree.map(np.asarray, model.params['embed'])
  np.testing.assert_allclose(
      states[0], embed['tokens'][tokens_BL] + embed['positions'][:L], atol=1e-6)
  np.testing.assert_allclose(
      stream.norms, np.sqrt((states ** 2).sum(-1)), rtol=1e-5)
  short = np.abs(states[:, 1, :5])
  np.testing.assert_allclose(stream.peaks[:, 1], short.max(1), rtol=1e-6)
  for n in range(3):
    assert stream.median[n, 1] == pytest.approx(np.median(short[n]))
    assert stream.rms[n, 1] == pytest.approx((short[n] ** 2).mean() ** 0.5)


@pytest.mark.parametrize('layers, tokens, size, result', [
    (2, 3, 6.0, True), (2, 3, -7.0, True), (2, 3, 5.9, False),
    (1, 10, 9.0, False), (4, 1, 9.0, False), (5, 1, 9.0, True)])
def test_an_outlier_is_one_by_dettmers_criterion(layers, tokens, size, result):
  """Of 8 layers a quarter are 2; of the 80 tokens of all, 6 % are 4.8."""
  states = np.zeros((8, 10, 3), np.float32)
  states[:layers, :tokens, 1] = size
  found = measures.find_outlier_features(states)
  assert found.tolist() == [False, result, False]


@pytest.mark.parametrize('system', [
    'gpt', 't5', 'bert', pytest.param('llama', marks=pytest.mark.long)])
def test_the_last_layer_of_the_lens_is_the_models_own_prediction(system):
  model, tokens_BL = _model(system), models.random_tokens(2, L)
  lens = model.inspect(tokens_BL, top=4).lens
  logits = np.asarray(model(tokens_BL), np.float64)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  best = np.argsort(-logits)[..., :4]
  np.testing.assert_array_equal(lens.ids[-1], best)
  np.testing.assert_allclose(lens.probabilities[-1],
                             np.take_along_axis(p, best, -1), atol=1e-5)
  assert lens.ids.shape == (3, 2, L, 4)
  assert (lens.ids[0] != lens.ids[-1]).any()


def test_experts_are_the_two_best_of_a_router_in_numpy():
  """In the parallel wiring a router reads the norm of the layer's input."""
  model, tokens_BL = _model('mixtral',
                            block='parallel'), models.random_tokens(2, L)
  result = model.inspect(tokens_BL)
  assert result.experts['decoder'].layers.tolist() == [0, 1]
  states = np.asarray(model.hidden_states(tokens_BL), np.float64)
  block = jax.tree.map(np.asarray, model.params['decoder']['layers']['block_0'])
  for n in range(2):
    x = states[n] / np.sqrt((states[n] ** 2).mean(-1, keepdims=True)
                            + model.config.norm_eps)
    logits = x * block['ffn_norm']['scale'][n] @ block['ffn']['router'][n]
    e = np.exp(logits)
    np.testing.assert_allclose(result.experts['decoder'].probabilities[n],
                               e / e.sum(-1, keepdims=True), atol=1e-5)
    best = e >= np.sort(e)[..., -2:-1]
    np.testing.assert_array_equal(result.experts['decoder'].chosen[n], best)
    np.testing.assert_allclose(
        result.experts['decoder'].gates[n],
        best * e / (best * e).sum(-1, keepdims=True), atol=1e-5)
