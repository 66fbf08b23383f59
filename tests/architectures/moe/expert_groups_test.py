"""Groups of experts, scaled gates and the balance loss of each sequence, as the
equations of DeepSeek-V2 and V3 say, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts.moe import health, routing
from tests.architectures.moe import routing_test

E, T, GROUPS, KEPT, X = 12, 24, 4, 2, 3


def inputs(seed=0, **fields):
  keys = jax.random.split(jax.random.key(seed), 2)
  return routing.Inputs(**dict(
      logits_TE=2 * jax.random.normal(keys[0], (T, E)),
      # So low that zero, for what is in no group, would be better.
      bias_E=jax.random.normal(keys[1], (E,)) - 5,
      valid_T=jnp.ones(T, bool)) | fields)


def moe(router, **fields):
  return routing_test.moe(**dict(
      router=router, num_experts=E, expert_groups=GROUPS, top_groups=KEPT,
      top_k=X) | fields)


def by_hand(scores_TE, best):
  """Mask of the experts that a token goes to."""
  chosen_TE = np.zeros(scores_TE.shape, bool)
  for row, chosen in zip(scores_TE, chosen_TE):
    groups = sorted(np.split(np.arange(E), GROUPS),
                    key=lambda g, row=row: -np.sort(row[g])[-best:].sum())
    allowed = np.concatenate(groups[:KEPT])
    chosen[allowed[np.argsort(-row[allowed])[:X]]] = True
  return chosen_TE


def gates(r):
  table_TE = np.zeros((T, E))
  np.add.at(table_TE, (np.array(r.token_A), np.array(r.expert_A)), r.gate_A)
  return table_TE


def test_groups_of_the_best_expert_limit_the_softmax_router():
  x = inputs()
  probs_TE = routing_test.softmax(np.array(x.logits_TE))
  want_TE = probs_TE * by_hand(probs_TE, best=1)
  got_TE = gates(routing.route(moe('topk', normalize_gates=False), x))
  np.testing.assert_allclose(got_TE, want_TE, atol=1e-6)
  assert (want_TE != probs_TE * routing_test.best(probs_TE, X)).any()


@pytest.mark.parametrize('scale', [1.0, 2.5])
def test_groups_of_the_two_best_and_scaled_gates_of_the_sigmoid_router(scale):
  x = inputs()
  scores_TE = 1 / (1 + np.exp(-np.array(x.logits_TE)))
  chosen_TE = by_hand(scores_TE + np.array(x.bias_E), best=2)
  want_TE = scores_TE * chosen_TE
  want_TE *= scale / want_TE.sum(1, keepdims=True)
  got_TE = gates(routing.route(moe('sigmoid', gate_scale=scale), x))
  np.testing.assert_allclose(got_TE, want_TE, atol=1e-6)
  assert (chosen_TE != by_hand(scores_TE + np.array(x.bias_E), best=1)).any()


def test_of_equal_groups_the_first_are_taken():
  r = routing.route(moe('topk'), inputs(logits_TE=jnp.zeros((T, E))))
  assert (np.array(r.expert_A).reshape(T, X) == [0, 1, 2]).all()
  tied = jnp.zeros((T, E)).at[:, E - 1].set(1.0)
  r = routing.route(moe('topk'), inputs(logits_TE=tied))
  assert (np.array(r.expert_A).reshape(T, X) == [E - 1, 0, 1]).all()


def test_balance_of_each_sequence_by_hand():
  """Equations 17 to 20 of DeepSeek-V3: three sequences, of 8, 5 and no token
  that is no padding."""
  rows, length = 3, T // 3
  valid_BL = np.arange(length) < np.array([[8], [5], [0]])
  x = inputs(valid_T=jnp.asarray(valid_BL.reshape(-1)))
  m = moe('sigmoid', balance_loss='sequence', balance_weight=0.5)
  r = routing.route(m, x)
  scores_BLE = 1 / (1 + np.exp(-np.array(x.logits_TE))).reshape(
      rows, length, E)
  # By the scores alone: neither the bias nor the groups of experts count.
  expert_BLX = np.argsort(-scores_BLE, axis=-1)[..., :X]
  chosen_BLX = np.array(r.expert_A).reshape(rows, length, X)
  assert (np.sort(expert_BLX[0]) != np.sort(chosen_BLX[0])).any()
  losses = []
  for s_LE, expert_LX, n in zip(scores_BLE[:2], expert_BLX[:2], (8, 5)):
    f_E = E / (X * n) * (expert_LX[:n, :, None] == np.arange(E)).sum((0, 1))
    p_E = (s_LE / s_LE.sum(1, keepdims=True))[:n].mean(0)
    losses.append((f_E * p_E).sum())
  found = health.report(m, r, x.logits_TE, x.valid_T, r.expert_A < E, 1, rows)
  np.testing.assert_allclose(found['health']['sequence_loss'],
                             np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(found['losses']['balance'],
                             0.5 * np.mean(losses), rtol=1e-5)
  assert abs(found['health']['balance_loss'] - np.mean(losses)) > 1e-3


@pytest.mark.parametrize('fields, words', [
    (dict(expert_groups=5), 'expert_groups is 5, which does not divide'),
    (dict(top_groups=5), 'top_groups is 5: choose at most'),
    (dict(top_groups=1, top_k=4), '1 groups of model.moe.top_groups have 3'),
    (dict(expert_groups=12, top_k=2), 'of one expert each'),
    (dict(gate_scale=0.0), 'gate_scale is 0.0: it must be > 0'),
    (dict(router='expert_choice', balance_loss='sequence'), 'they do not'),
])
def test_refuses_in_a_sentence(fields, words):
  with pytest.raises(ValueError) as error:
    moe(**dict(router='sigmoid') | fields)
  assert words in str(error.value)
