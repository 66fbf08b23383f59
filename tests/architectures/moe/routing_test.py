"""Routers choose and weigh as their papers say; groups of experts, losses and
the panel by hand."""

import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import paths
from architectures.parts.moe import routing
from architectures.parts.moe.routing import MoEConfig
from configs import base
from tests.helpers import models


E, T = 4, 24
# What vmap can go over, as a grouped product cannot.
PADDED = dict(dispatch='sorted', capacity_factor=9.0, eval_capacity_factor=9.0)


def moe(**fields):
  model = base.base().model
  model.update(vocab_size=5, max_len=8, ffn='moe')
  model.arch = 'bert'  # in a decoder experts may not choose
  model.moe.update(dict(num_experts=E) | fields)
  return architectures.resolve(model).part(MoEConfig)


def inputs(seed=0, **fields):
  random = np.random.default_rng(seed)
  return routing.RouterInputs(**(dict(
      logits_TE=2 * random.normal(size=(T, E)).astype(np.float32),
      valid_T=np.ones(T, bool), bias_E=np.zeros(E, np.float32),
      expert_TX=routing.experts_of_token_ids(
          moe(), random.integers(50, size=T))) | fields))


def route(router, x=None, **fields):
  m = moe(router=router, **({'switch': dict(top_k=1)}.get(router, {}) | fields))
  assign = functools.partial(routing.ROUTERS[router].assign, m)
  return m, jax.jit(assign)(x or inputs())


def gates(r):
  """[T, E]: the weight of each expert for each token."""
  w = np.zeros((T, r.probs_TE.shape[1] + 1))
  np.add.at(w, (r.token_A, r.expert_A), r.gate_A)
  return w[:, :-1]


def softmax(logits):
  e = np.exp(logits - logits.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def best(scores, k):
  """Mask of the k best of each row."""
  return np.argsort(np.argsort(-scores, -1), -1) < k


def test_gshard_keeps_the_second_expert_by_twice_its_gate():
  logits = jnp.log(jnp.array([0.8, 0.2, 1e-9, 1e-9]))
  logits_TE = jnp.broadcast_to(logits, (T, E))
  expert_SA = np.array(jax.jit(jax.vmap(lambda key: route('gshard', inputs(
      logits_TE=logits_TE, key=key))[1].expert_A))(
          jax.random.split(jax.random.key(0), 40)))
  assert (expert_SA[:, ::2] == 0).all()
  assert set(expert_SA[:, 1::2].flat) == {1, E}
  assert abs((expert_SA[:, 1::2] == 1).mean() - 0.4) < 0.05
  _, r = route('gshard', inputs(logits_TE=logits_TE))
  np.testing.assert_allclose(gates(r)[:, :2], [[0.8, 0.2]] * T, atol=1e-6)


@pytest.mark.parametrize('factor, slots', [(0.0, 6), (0.5, 3), (9.0, 12)])
@pytest.mark.parametrize('train', [True, False])
def test_expert_choice_fills_every_expert_with_its_best_tokens_of_a_group(
    factor, slots, train):
  """12 tokens of a group, two experts each, are 6 of each of 4 experts."""
  x = inputs(groups=2, train=train)
  _, r = route('expert_choice', x, **{
      'capacity_factor' if train else 'eval_capacity_factor': factor})
  probs = softmax(np.array(x.logits_TE)).reshape(2, T // 2, E)
  mask = best(probs.swapaxes(1, 2), slots).swapaxes(1, 2)
  np.testing.assert_allclose(gates(r), (probs * mask).reshape(T, E), atol=1e-6)


SCORES = {'softmax_bias': softmax,
          'sqrt_softplus': lambda x: np.sqrt(np.log1p(np.exp(x)))}


@pytest.mark.parametrize('router', SCORES)
def test_the_biased_score_chooses_and_the_score_weighs(router):
  x = inputs(bias_E=jnp.array([10.0, 0, 0, 0]))
  scores = SCORES[router](np.array(x.logits_TE))
  mask = best(scores + np.array(x.bias_E), 2)
  assert mask[:, 0].all()
  want = scores * mask
  np.testing.assert_allclose(
      gates(route(router, x)[1]), want / want.sum(1, keepdims=True),
      atol=1e-6)


def test_where_the_hash_chooses_the_scores_may_weigh():
  x = inputs()
  _, r = route('hash_scored', x)
  mask = gates(route('hash', x)[1]) > 0
  want = SCORES['sqrt_softplus'](np.array(x.logits_TE)) * mask
  np.testing.assert_allclose(gates(r), want / want.sum(1, keepdims=True),
                             atol=1e-6)


def test_hash_goes_by_the_token_id_alone():
  table = {}
  for tokens_T in np.random.default_rng(0).integers(50, size=(2, T)):
    expert_TX = routing.experts_of_token_ids(moe(), tokens_T)
    _, r = route('hash', inputs(expert_TX=expert_TX))
    for token, pair in zip(tokens_T, np.array(r.expert_A).reshape(T, 2)):
      assert table.setdefault(int(token), tuple(pair)) == tuple(pair)
      assert pair[1] == (pair[0] + 1) % E
  spread = np.bincount([pair[0] for pair in table.values()], minlength=E)
  assert (spread > 0).all()


@pytest.mark.parametrize('top_k', [1, 2, 3])
def test_uniform_fills_the_experts_in_turn(top_k):
  m, r = route('uniform', top_k=top_k)
  assert np.array(r.expert_A).tolist() == [
      i % m.num_experts for i in range(T * top_k)]
  np.testing.assert_allclose(r.gate_A, 1 / top_k)


@pytest.mark.parametrize('router', list(routing.ROUTERS))
def test_beliefs_and_full_gates_are_shares(router):
  """Of each token: they add up to 1, where experts do not choose."""
  _, r = route(router, inputs(), **(
      dict(normalize_gates=True) if router != 'switch' else {}))
  np.testing.assert_allclose(np.array(r.probs_TE).sum(1), 1, rtol=1e-5)
  if router not in ('switch', 'expert_choice'):
    np.testing.assert_allclose(gates(r).sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize('normalize_gates', [True, False])
@pytest.mark.parametrize('top_k', [1, 2])
@pytest.mark.parametrize('router', list(routing.ROUTERS))
def test_gates_are_said_to_sum_to_1_where_they_do(router, top_k,
                                                  normalize_gates):
  top_k = routing.ROUTERS[router].top_k or top_k
  m = moe(router=router, top_k=top_k, normalize_gates=normalize_gates)
  x = inputs(expert_TX=routing.experts_of_token_ids(m, np.arange(T)))
  sums = gates(jax.jit(functools.partial(routing.route_tokens, m))(x)).sum(1)
  if routing.has_whole_gates(m):
    np.testing.assert_allclose(sums, 1, rtol=1e-5)
  elif router in ('topk', 'switch'):
    assert np.abs(sums - 1).max() > 1e-3


@pytest.mark.parametrize('field', ['jitter', 'logit_noise'])
def test_a_router_is_noisy_in_training_alone(field):
  module, params = models.make_model('mixtral', moe={field: 0.5})
  tokens = models.random_tokens(2, 8)

  @functools.partial(jax.jit, static_argnums=0)
  def logits(deterministic, key=0):
    return module.apply({'params': params}, tokens, deterministic=deterministic,
                        rngs={'router': jax.random.key(key)}).logits
  drawn, other = logits(False), logits(False, 1)
  assert (drawn != other).any()
  np.testing.assert_array_equal(logits(True), logits(True, 1))
  assert (drawn != logits(True)).any()


@pytest.mark.parametrize('router', list(routing.ROUTERS))
def test_padding_takes_no_expert(router):
  valid_T = np.arange(T) % 3 != 0
  _, r = route(router, inputs(valid_T=valid_T, train=True))
  given = np.array(r.expert_A) < E
  assert given.any() and np.array(valid_T)[np.array(r.token_A)[given]].all()
  assert (gates(r)[~np.array(valid_T)] == 0).all()
  assert not np.array(r.gate_A)[~given].any()


def test_capacity_serves_first_choices_first_then_by_position():
  # The choices of four tokens: 01 01 10 12. First choices fill 0 and 1.
  expert_A = jnp.array([0, 1, 0, 1, 1, 0, 1, 2])
  within = lambda **how: jax.jit(functools.partial(
      routing.void_over_capacity, choices=2, experts=3, **how))(expert_A)
  kept = within(groups=1, slots=2)
  assert kept.tolist() == [0, 3, 0, 3, 1, 3, 1, 2]
  by_group = within(groups=2, slots=1)
  assert by_group.tolist() == [0, 1, 3, 3, 1, 0, 3, 2]


def test_capacity_is_exact():
  assert routing.expert_capacity(1.25, 16, 2, 8) == 5
  assert routing.expert_capacity(1.0, 10, 1, 4) == 3  # 2.5, rounded up
  # In floats a hair above.
  assert routing.expert_capacity(1.1, 100, 1, 10) == 11
  assert routing.expert_capacity(0.1, 4, 1, 8) == 1


def report(r, m, x, kept_A=None, shards=2, rows=1):
  kept_A = np.asarray(r.expert_A) < E if kept_A is None else kept_A
  return jax.jit(functools.partial(
      routing.report_routing, m, shards=shards, rows=rows))(
          r, x.logits_TE, x.valid_T, kept_A)


def test_losses_by_hand():
  x = inputs(valid_T=np.arange(T) < 20)
  m, r = route('topk', x, z_loss_weight=0.5)
  logits, got = np.array(x.logits_TE)[:20], report(r, m, x)
  f = np.bincount(np.array(r.expert_A), minlength=E + 1)[:E] / 40
  p = softmax(logits).mean(0)
  raw = got.health
  np.testing.assert_allclose(raw['balance_loss'], E * (f * p).sum(), rtol=1e-5)
  np.testing.assert_allclose(raw['importance_loss'], E * (p ** 2).sum(),
                             rtol=1e-5)
  z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
  np.testing.assert_allclose(raw['z_loss'], z, rtol=1e-5)
  np.testing.assert_allclose(got.losses['balance'],
                             0.01 * raw['balance_loss'], rtol=1e-6)
  np.testing.assert_allclose(got.losses['router_z'], 0.5 * z, rtol=1e-5)
  m = moe(router='topk', balance_loss='importance')
  np.testing.assert_allclose(report(r, m, x).losses['balance'],
                             0.01 * raw['importance_loss'], rtol=1e-6)
  m = moe(router='topk', balance_loss='none')
  assert report(r, m, x).losses == {}


def test_gshards_balance_counts_first_choices_alone():
  x = inputs()
  m, r = route('gshard', x)
  first = np.bincount(np.array(x.logits_TE).argmax(1), minlength=E) / T
  want = E * (first * softmax(np.array(x.logits_TE)).mean(0)).sum()
  np.testing.assert_allclose(report(r, m, x).health['balance_loss'], want,
                             rtol=1e-5)


def test_panel_by_hand():
  x = inputs(logits_TE=jnp.log(jnp.array([[0.5, 0.3, 0.1, 0.1]] * T)))
  m, r = route('topk', x)
  # The first quarter of tokens has no expert, the second one of its two.
  index_A = np.arange(2 * T)
  kept_A = (index_A >= T // 2) & ((index_A >= T) | (index_A % 2 == 0))
  got = {k: np.array(v) for k, v in report(r, m, x, kept_A).health.items()}
  want = dict(dropped=0.375, unserved=0.25, load_E=[0.5, 0.5, 0, 0], load_max=2,
              load_entropy=0.5, unused=0.5, confidence=0.5, shard_imbalance=2,
              balance_loss=1.6, importance_loss=1.44, z_loss=0,
              router_entropy=-sum(p * np.log(p) for p in (.5, .3, .1, .1))
              / np.log(4))
  assert got.keys() == want.keys() | {  # a loss that is added too
      row.metric for row in routing.BALANCE_LOSSES.values()
      if row.metric and not row.by_sequence}
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6,
                               err_msg=name)


def test_the_panel_of_a_window_by_hand():
  """One step of a token, and one of three."""
  got = routing.summarize_window(
      np.array([[[0.5, 0.5, 0, 0]], [[0, 0.5, 0.5, 0]]]), np.array([1, 3]))
  entropy = -sum(p * np.log(p) for p in (1 / 8, 1 / 2, 3 / 8)) / np.log(4)
  assert {name: x.tolist() for name, x in got.items()} == dict(
      load_max=[2], unused=[0.25],
      load_entropy=[pytest.approx(entropy, rel=1e-5)])
  assert routing.entropy(jnp.ones(1)) == 1  # where there is one expert


def model(balance='switch', **changes):
  return models.make_model('gpt', ffn='moe', num_layers=4, moe=dict(
      num_experts=E, z_loss_weight=0.1, d_ff=8,
      balance_loss=balance, **PADDED), **models.DENSE_AND_MOE_LAYERS, **changes)


def losses_of(*args, **kwargs):
  """(aux, the gradient of each loss by the routers) of a model."""
  module, params = model(*args, **kwargs)
  flat = paths.flatten_by_path(params)
  path = 'decoder/layers/block_1/ffn/router'
  def losses(router):
    aux = module.apply({'params': traverse_util.unflatten_dict(
        flat | {path: router}, sep='/')}, models.random_tokens()).aux
    return aux['losses'], aux
  grads, aux = jax.jit(jax.jacrev(losses, has_aux=True))(flat[path])
  return aux, grads


@pytest.mark.slow
@pytest.mark.parametrize('remat, balance', [
    pytest.param('none', 'importance', marks=pytest.mark.long),
    ('full', 'switch')])
def test_each_loss_is_summed_over_layers_and_has_gradient(remat, balance):
  aux, grads = losses_of(balance, remat=remat)
  raw = aux['health']
  assert raw['load_E'].shape == (2, E)
  name = {'switch': 'balance_loss', 'importance': 'importance_loss'}[balance]
  np.testing.assert_allclose(aux['losses']['balance'], 0.01 * raw[name].sum(),
                             rtol=1e-5)
  np.testing.assert_allclose(aux['losses']['router_z'],
                             0.1 * raw['z_loss'].sum(), rtol=1e-5)
  assert aux['losses'].keys() == grads.keys()
  for loss in grads:
    assert aux['losses'][loss] > 0
    assert (np.abs(grads[loss]).max((1, 2)) > 0).all(), loss


# Sinkhorn's balance against the iteration written on the matrix itself.


def sinkhorn_by_hand(logits, steps=8):
  """The iteration on the matrix itself, in float64."""
  tokens, experts = logits.shape
  m = np.exp(np.float64(logits))
  for _ in range(steps):
    m *= tokens / experts / m.sum(0, keepdims=True)
    m /= m.sum(1, keepdims=True)
  return m


def test_sinkhorn_is_the_iteration_of_each_group_without_its_padding():
  """A group of 12 tokens is balanced by itself, and padding weighs nothing:
  what stands in it does not matter."""
  logits = np.array(inputs(3).logits_TE) + np.array([[2.0, 0, 0, 0]])
  valid = np.ones(T, bool)
  valid[[3, 4, 13, 20, 23]] = False
  chosen = np.zeros((T, E), bool)
  for group in (np.arange(12), np.arange(12, 24)):
    rows = group[valid[group]]
    want = sinkhorn_by_hand(logits[rows])
    chosen[rows] = best(want, 2)
    padded = np.where(valid[group][:, None], logits[group], 9.0)
    got = np.exp(jax.jit(routing.balance_logits)(jnp.array(padded, jnp.float32),
                                                 jnp.array(valid[group])))
    np.testing.assert_allclose(got[valid[group]], want, rtol=1e-4)
  for filler in (-9.0, 9.0):
    padded = np.where(valid[:, None], logits, [[filler, 0, 0, 0]])
    _, r = route('sinkhorn', inputs(
        logits_TE=jnp.array(padded, jnp.float32), valid_T=jnp.array(valid),
        groups=2, train=True))
    np.testing.assert_array_equal(gates(r) > 0, chosen)
  alone = best(sinkhorn_by_hand(logits[valid]), 2)
  assert (alone != chosen[valid]).any()  # one group of all chooses otherwise


# Groups of experts.


MANY, GROUPS, KEPT, X = 12, 4, 2, 3


def grouped(router, **fields):
  return moe(router=router, num_experts=MANY, expert_groups=GROUPS,
             top_groups=KEPT, top_k=X, **fields)


routed = jax.jit(routing.route_tokens, static_argnums=0)


def many(**fields):
  random = np.random.default_rng(0)
  return inputs(**dict(
      logits_TE=2 * random.normal(size=(T, MANY)).astype(np.float32),
      # So low that zero, for what is in no group, would be better.
      bias_E=random.normal(size=MANY).astype(np.float32) - 5) | fields)


def by_hand(scores_TE, best):
  """Mask of the experts that a token goes to."""
  chosen_TE = np.zeros(scores_TE.shape, bool)
  for row, chosen in zip(scores_TE, chosen_TE):
    groups = sorted(np.split(np.arange(MANY), GROUPS),
                    key=lambda g, row=row: -np.sort(row[g])[-best:].sum())
    allowed = np.concatenate(groups[:KEPT])
    chosen[allowed[np.argsort(-row[allowed])[:X]]] = True
  return chosen_TE


@pytest.mark.parametrize('scale', [1.0, 2.5])
def test_groups_of_the_two_best_and_scaled_gates_of_the_sigmoid_router(scale):
  x = many()
  scores_TE = 1 / (1 + np.exp(-np.array(x.logits_TE)))
  chosen_TE = by_hand(scores_TE + np.array(x.bias_E), best=2)
  want_TE = scores_TE * chosen_TE
  want_TE *= scale / want_TE.sum(1, keepdims=True)
  got_TE = gates(routed(grouped('sigmoid', gate_scale=scale), x))
  np.testing.assert_allclose(got_TE, want_TE, atol=1e-6)
  assert (chosen_TE != by_hand(scores_TE + np.array(x.bias_E), best=1)).any()


def test_of_equal_groups_the_first_are_taken():
  r = routed(grouped('topk'), many(logits_TE=jnp.zeros((T, MANY))))
  assert (np.array(r.expert_A).reshape(T, X) == [0, 1, 2]).all()
  tied = np.eye(MANY, dtype=np.float32)[[MANY - 1] * T]
  r = routed(grouped('topk'), many(logits_TE=tied))
  assert (np.array(r.expert_A).reshape(T, X) == [11, 0, 1]).all()


def test_balance_of_each_sequence_by_hand():
  """Equations 17 to 20 of DeepSeek-V3: three sequences, of 8, 5 and no token
  that is no padding."""
  rows, length = 3, T // 3
  valid_BL = np.arange(length) < np.array([[8], [5], [0]])
  x = many(valid_T=valid_BL.reshape(-1))
  m = grouped('sigmoid', balance_loss='sequence', balance_weight=0.5)
  r = routed(m, x)
  scores_BLE = 1 / (1 + np.exp(-np.array(x.logits_TE))).reshape(
      rows, length, MANY)
  # By the scores alone: neither the bias nor the groups of experts count.
  expert_BLX = np.argsort(-scores_BLE, axis=-1)[..., :X]
  chosen_BLX = np.array(r.expert_A).reshape(rows, length, X)
  assert (np.sort(expert_BLX[0]) != np.sort(chosen_BLX[0])).any()
  losses = []
  for s_LE, expert_LX, n in zip(scores_BLE[:2], expert_BLX[:2], (8, 5)):
    f_E = np.bincount(expert_LX[:n].reshape(-1), minlength=MANY) * MANY / (
        X * n)
    p_E = (s_LE / s_LE.sum(1, keepdims=True))[:n].mean(0)
    losses.append((f_E * p_E).sum())
  reported = report(r, m, x, np.asarray(r.expert_A) < MANY, 1, rows)
  np.testing.assert_allclose(reported.health['sequence_loss'],
                             np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(reported.losses['balance'],
                             0.5 * np.mean(losses), rtol=1e-5)
  assert abs(reported.health['balance_loss'] - np.mean(losses)) > 1e-3
