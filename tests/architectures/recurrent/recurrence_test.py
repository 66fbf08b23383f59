"""A recurrence in pieces against its definition, one place after another; the
short convolution, and the inverse that a piece takes, against theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts.recurrent import features, mesa, pieces, recurrence
from architectures.parts.recurrent.recurrence import Inputs
from tests.helpers import models

B, J, H, K, U = 2, 2, 4, 5, 3
# name: (how many decays a head has, whether its state is corrected)
FAMILY = {'gated_deltanet': (1, True), 'deltanet': (0, True),
          'mamba2': (1, False), 'linear_attention': (0, False),
          'kda': (K, True), 'gla': (K, False),
          'products': (1, True, 3), 'erase': (K, 'erase'),
          'erase_in_steps': (K, 'erase', 2), 'head_erase': (1, 'erase'),
          'both': (K, 'both'), 'undecayed': (1, 'undecayed')}
# A decay of a head or of each feature, corrected or not: two have all of that.
TWO = pytest.mark.parametrize('name', ['mamba2', 'kda'])
GRADED = pytest.mark.parametrize('name', [
    'mamba2', 'kda', 'products', 'erase_in_steps', 'head_erase', 'both',
    'undecayed'])
DECAYS = pytest.mark.parametrize('decays', [1, K], ids=['head', 'feature'])


def drawn(length, decays=1, rate=True, steps=1, seed=0, most=1.0):
  """Inputs as a layer gives them: keys and queries of length 1, and rates in
  (0, most). The decays of a piece are far below what float32 can hold."""
  has_rate, has_erase = rate not in (False, 'erase'), isinstance(rate, str)
  rng = np.random.default_rng(seed)
  normal = lambda *shape, n=1: rng.normal(size=(B, length * n, *shape))
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  arrays = (unit(normal(J, K)), unit(normal(J, K, n=steps)),
            normal(H, U, n=steps),
            -np.exp(2 * normal(H, decays)) if decays else None,
            most / (1 + np.exp(-normal(H, n=steps))) if has_rate else None,
            unit(normal(J, K, n=steps)) if has_erase else None,
            rng.integers(0, 2, (B, length, 1)) if rate == 'undecayed' else None)
  return jax.tree.map(lambda x: jax.device_put(x.astype(np.float32)),
                      Inputs(*arrays))


def definition(x, state_BHKU=None):
  """numpy, in float64, one place after another and a head at a time."""
  q, k, v, log_decay, rate, erase, undecayed = (
      None if x is None else np.asarray(x, np.float64) for x in x)
  o, steps = np.zeros((B, q.shape[1], H, U)), k.shape[1] // q.shape[1]
  last = np.zeros((*v.shape[::2][:1], H, K, U))
  for b, h in np.ndindex(len(v), H):
    j = h // (H // J)
    S = (np.zeros((K, U)) if state_BHKU is None else
         np.array(state_BHKU[b, h], np.float64))
    for t in range(v.shape[1]):
      before = S
      if log_decay is not None and t % steps == 0:
        S = S * np.exp(log_decay[b, t // steps, h])[:, None]
      d = v[b, t, h]
      found = S if undecayed is None else undecayed[b, t, 0] * before
      if erase is not None or rate is not None:
        d = d - found.T @ (k if erase is None else erase)[b, t, j]
      if rate is not None:
        d = rate[b, t, h] * d
      S = S + np.outer(k[b, t, j], d)
      o[b, t // steps, h] = S.T @ q[b, t // steps, j]
    last[b, h] = S
  return o, last


def scanned(x, state_BHKU):
  """The definition as a scan in jax, whose gradient is plain autodiff's."""
  each = lambda y: jnp.repeat(y, H // y.shape[1], 1)
  n, tokens = x.steps, x.q_BLJK.shape[1]

  def step(S, x):
    before = S
    S = S * jnp.exp(x.log_decay_BLHK[:, 0])[..., None]
    for i in range(n):
      k, d = each(x.k_BLJK[:, i]), x.v_BLHU[:, i]
      found = S
      if x.undecayed_BL1 is not None:
        found = before * x.undecayed_BL1[:, i, :, None, None]
      if x.has_delta_rule:
        e = k if x.erase_BLJK is None else each(x.erase_BLJK[:, i])
        d -= jnp.einsum('bhku,bhk->bhu', found, e)
      if x.rate_BLH is not None:
        d = x.rate_BLH[:, i, :, None] * d
      S = S + k[..., None] * d[..., None, :]
    return S, jnp.einsum('bhku,bhk->bhu', S, each(x.q_BLJK[:, 0]))
  S, o = jax.lax.scan(step, state_BHKU, jax.tree.map(
      lambda y: jnp.moveaxis(y.reshape(
          B, tokens, -1, *y.shape[2:]), 1, 0), x))
  return jnp.moveaxis(o, 0, 1), S


@functools.partial(jax.jit, static_argnames='places')
def run(x, state_BHKU=None, places=4):
  return recurrence.run_recurrence(x, state_BHKU, places=places)


def graded(f, loss=lambda ys: sum(jnp.sin(y).sum() for y in ys), wrt=0):
  """Returns f jitted, whose results are the gradients of a loss of what f
  returns, and that."""
  def both(*args):
    ys = f(*args)
    return loss(ys), ys
  return jax.jit(jax.grad(both, wrt, has_aux=True))


STATE = np.random.default_rng(5).normal(size=(B, H, K, U)).astype(np.float32)


@pytest.mark.parametrize('name', FAMILY)
def test_pieces_equal_the_definition(name):
  x = drawn(9, *FAMILY[name])
  for got, want in zip(run(x, STATE), definition(x, STATE)):
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize('length, family', [
    (1, (1,)), (4, (1,)), (3, (K,)), (5, (K,)), (1, FAMILY['products']),
    (3, FAMILY['products']), (1, FAMILY['erase_in_steps']),
    (1, FAMILY['undecayed'])])
def test_lengths_that_no_piece_divides(length, family):
  x = drawn(length, *family)
  for got, want in zip(run(x), definition(x)):
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())



def test_gradients_of_the_mesa_layer_are_those_of_an_inverse():
  """Its solutions are converged, so a solver's gradient is theirs."""
  x, ridge_HK = drawn(9), jnp.linspace(0.5, 2, H * K).reshape(H, K)
  x = x._replace(q_BLJK=jnp.repeat(x.q_BLJK, H // J, 2),
                 k_BLJK=jnp.repeat(x.k_BLJK, H // J, 2))

  def exact(x, ridge_HK):
    S, o = jnp.zeros((B, H, K, K + U)), []
    for t in range(9):
      k = x.k_BLJK[:, t]
      values = jnp.concatenate([k, x.v_BLHU[:, t]], -1)[..., None, :]
      S = jnp.exp(x.log_decay_BLHK[:, t])[..., None] * S
      S = S + (x.rate_BLH[:, t, :, None] * k)[..., None] * values
      y = jnp.linalg.solve(S[..., :K] + jax.vmap(jnp.diag)(ridge_HK)[None],
                           x.q_BLJK[:, t, ..., None])
      o.append((y * S[..., K:]).sum(-2))
    return jnp.stack(o, 1), S

  pieced = lambda x, ridge_HK: mesa.run_mesa(x, ridge_HK, steps=30, places=4)
  for got, want in zip(*(jax.tree.leaves(graded(f, wrt=(0, 1))(x, ridge_HK))
                         for f in (pieced, exact))):
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@GRADED
def test_gradients_are_those_of_autodiff_through_the_definition(name):
  x = drawn(9, *FAMILY[name])
  weigh = [np.random.default_rng(3).normal(size=shape).astype(np.float32)
           for shape in ((B, 9, H, U), STATE.shape)]
  loss = lambda ys: sum((y * w).sum() for y, w in zip(ys, weigh))
  models.assert_trees_close(*(graded(f, loss, (0, 1))(x,
                                                      STATE) for f in (scanned,
                                                                       run)))


def test_groups_that_share_a_piece(monkeypatch):
  """Five pieces, two at a time: the second and the third group share one."""
  monkeypatch.setattr(recurrence, 'PLACES_AT_ONCE', 8)
  monkeypatch.setattr(recurrence, 'MOST_DECAYS_AT_ONCE', 0)
  x = drawn(18, K, True)
  in_groups = lambda *args: recurrence.run_recurrence(*args, places=4)
  assert 'dynamic_slice' in str(jax.make_jaxpr(in_groups)(x, STATE))
  models.assert_trees_close(*(graded(f, wrt=(0, 1))(x, STATE)
                              for f in (scanned, in_groups)))


@pytest.mark.parametrize('count, most, size', [
    (5, 2, 2), (5, 4, 3), (8, 3, 3), (6, 6, 6), (6, 9, 6), (3, 1, 1)])
def test_groups_are_as_few_as_may_be_and_of_one_size(count, most, size):
  sizes = set()
  def double(rows):
    sizes.add(len(rows))
    return 2 * rows
  x = np.arange(2.0 * count).reshape(count, 2)  # of two rows
  np.testing.assert_array_equal(
      pieces.map_pieces_in_groups(double, most, x), 2 * x)
  assert sizes == {2 * size}


@pytest.mark.parametrize('length, decays', [(9, K), (1, 1)])
def test_inputs_of_bfloat16_are_those_numbers_in_float32(length, decays):
  """Only their gradients are rounded, to the numbers that bfloat16 has."""
  to = lambda dtype, x: jax.tree.map(lambda y: np.asarray(y).astype(dtype), x)
  half = to(jnp.bfloat16, drawn(length, decays))
  grad = graded(lambda x: run(x, STATE))
  (got, got_ys), (want, want_ys) = grad(half), grad(to(np.float32, half))
  models.assert_trees_close(want_ys, got_ys, 1e-6)
  assert all(y.dtype == jnp.bfloat16 for y in jax.tree.leaves(got))
  models.assert_trees_close(want, to(np.float32, got), 2 ** -8)


def test_rates_up_to_two_and_keys_that_repeat():
  """The triangular system at its worst: all keys alike, and rates near 2."""
  x = drawn(40, 0, most=2.0)
  x = x._replace(k_BLJK=jnp.broadcast_to(x.k_BLJK[:, :1], x.k_BLJK.shape),
                 rate_BLH=jnp.full(x.rate_BLH.shape, 1.99))
  for got, want in zip(run(x, places=40), definition(x)):
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@DECAYS
def test_a_decay_of_zero_forgets_all_and_one_of_one_nothing(decays):
  """Exactly, in the gradient too: what comes after is a row of its own."""
  x = drawn(9, decays)
  at = 4
  decay = np.array(x.log_decay_BLHK)
  decay[:, :3], decay[:, at] = 0, -np.inf
  x = x._replace(log_decay_BLHK=decay)
  after = jax.tree.map(lambda y: np.asarray(y)[:, at:], x)
  grads, ys = graded(run, lambda ys: ys[0][:, at:].sum())(x)
  models.assert_trees_close(run(after)[0], ys[0][:, at:], 1e-6)
  for grad in map(np.asarray, jax.tree.leaves(grads)):
    assert np.isfinite(grad).all()
    assert not np.any(grad[:, :at])
    assert np.any(grad[:, at:])


@DECAYS
def test_a_large_decay_takes_no_digits_from_those_after_it(decays):
  x = drawn(8, decays)
  x = x._replace(log_decay_BLHK=jnp.full(
      (B, 8, H, decays), -0.01).at[:, 1].set(-1e6))
  for got, want in zip(run(x, places=8), definition(x)):
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


@DECAYS
def test_a_row_goes_on_from_its_state(decays):
  x = drawn(9, decays)
  o, last = run(x)
  state, parts = None, []
  for piece in (slice(0, 8), slice(8, 9)):
    part, state = run(jax.tree.map(
        lambda y, piece=piece: np.asarray(y)[:, piece], x), state)
    parts.append(part)
  models.assert_trees_close((o, last), (np.concatenate(parts, 1), state), 3e-6)


@pytest.mark.parametrize('decays, rate', [(1, True), (K, True), (1, False)],
                         ids=['head', 'feature', 'additive'])
def test_the_gradient_keeps_inputs_and_the_states_between_pieces(decays, rate):
  """And no [P, P] of a piece, of which plain autodiff keeps several."""
  x = drawn(32, decays, rate)
  kept = jax.eval_shape(lambda x: jax.vjp(run, x)[1], x)
  sizes = [y.shape for y in jax.tree.leaves(kept)]
  assert ((8, B, H, K, U) if rate else (8, B, J, K, H // J, U)) in sizes
  inputs = sum(y.size for y in jax.tree.leaves(x))
  assert sum(y.size for y in jax.tree.leaves(kept)) == (
      inputs + 8 * B * H * K * U)


def test_a_feature_that_forgets_leaves_the_others_alone():
  """Decays of 0 and of 1 side by side, against the definition: a quotient of
  cumulative decays would be 0 / 0 here."""
  x = drawn(9, K)
  rng = np.random.default_rng(1)
  ends, stays = (rng.random(x.log_decay_BLHK.shape) < 0.3 for _ in range(2))
  x = x._replace(log_decay_BLHK=np.where(
      ends, -np.inf, np.where(stays, 0, x.log_decay_BLHK)).astype(np.float32))
  (want, _), (got, ys) = (graded(f)(x, STATE) for f in (scanned, run))
  for y, exact in zip(ys, definition(x, STATE)):
    np.testing.assert_allclose(y, exact, atol=2e-6 * np.abs(exact).max())
  models.assert_trees_close(want, got)


@TWO
def test_products_as_tpus_compute_them_lose_no_more_than_inputs(
    name, monkeypatch):
  """TPUs round what goes into a product of float32 to bfloat16, unless it asks
  for more. Beside rounding queries, keys and values alone, the states lose at
  most as much again, however long the row is."""
  decays, rate = FAMILY[name]
  x = drawn(512, decays, rate)
  x = x._replace(log_decay_BLHK=x.log_decay_BLHK / 50)  # a long memory
  want = definition(x)[0]
  round_ = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
  inputs = x._replace(q_BLJK=round_(x.q_BLJK), k_BLJK=round_(x.k_BLJK),
                      v_BLHU=round_(x.v_BLHU))
  product = jax.lax.dot_general

  def rounded(a, b, *args, precision=None, **kwargs):
    if 'highest' not in str(precision).lower():
      a, b = round_(a), round_(b)
    return product(a, b, *args, precision=precision, **kwargs)

  monkeypatch.setattr('jax._src.lax.lax.dot_general', rounded)
  got = jax.jit(lambda x: recurrence.run_recurrence(x, places=16)[0])(x)
  size = lambda x: np.sqrt(np.square(x).mean())
  error = size(got - want)
  assert error > 1e-3 * size(want)  # they are rounded
  assert error < 2 * size(definition(inputs)[0] - want)
  late, early = ((got - want)[:, part] for part in (slice(256, None),
                                                    slice(256)))
  assert size(late) < 2 * size(early)


def test_features_are_weighted_as_by_a_product():
  """And so are the gradients, which are written out."""
  x_LHU, w_HU, d_LHU = (
      np.random.default_rng(i).normal(size=shape).astype(np.float32)
      for i, shape in enumerate([(5, 2, 3), (2, 3), (5, 2, 3)]))
  by_hand = jax.vjp(features.multiply_by_weights, x_LHU, w_HU)
  derived = jax.vjp(lambda x, w: x * w[None], x_LHU, w_HU)
  models.assert_trees_close(by_hand[0], derived[0])
  models.assert_trees_close(by_hand[1](d_LHU), derived[1](d_LHU))


def convolution(x_BLHK, w_WHK, before_BWHK, ids_BL):
  """The definition: a sum over all pairs of places, l and m, W - 1 before at
  most, in the same document."""
  L, W = x_BLHK.shape[1], len(w_WHK)
  all_BMHK = jnp.concatenate([before_BWHK, x_BLHK], 1)
  at_l, at_m = jnp.arange(L)[:, None] + W - 1, jnp.arange(L + W - 1)[None]
  gap = at_l - at_m
  w_LMHK = jnp.where(((0 <= gap) & (gap < W))[..., None, None],
                     w_WHK[jnp.clip(W - 1 - gap, 0, W - 1)], 0)
  if ids_BL is None:
    return jnp.einsum('lmhk,bmhk->blhk', w_LMHK, all_BMHK)
  same_BLM = ids_BL[:, :, None] == jnp.pad(
      ids_BL, ((0, 0), (W - 1, 0)), constant_values=-1)[:, None]
  return jnp.einsum('lmhk,blm,bmhk->blhk', w_LMHK, same_BLM * 1.0, all_BMHK)


@pytest.mark.parametrize('ids', [None, (1, 1, 1, 2, 3, 3, 3, 3, 3)])
def test_a_convolution_and_its_gradient_are_those_of_the_definition(ids):
  L, W = 9, 4
  rng = np.random.default_rng(0)
  drawn = lambda *shape: rng.normal(size=shape).astype(np.float32)
  args = drawn(B, L, H, K), drawn(W, H, K), drawn(B, W - 1, H, K), drawn(H, K)
  if ids is not None:
    ids = jnp.array([ids])
  # Without a bias, and with one and through SiLU.
  ours = lambda x, w, before, bias: [features.convolve(
      x, w, b, before_BWHK=before, segment_ids_BL=ids, silu=b is not None)[0]
                                     for b in (None, bias)]
  def theirs(x, w, before, bias):
    y = convolution(x, w, before, ids)
    return [y, jax.nn.silu(y + bias[None, None])]
  def both(f, *args):
    y, vjp = jax.vjp(f, *args)
    return y, [vjp([a * jnp.cos(y[0]), b * jnp.cos(y[1])])
               for a, b in ((1, 0), (0, 1))]
  models.assert_trees_close(*(jax.jit(functools.partial(both, f))(*args)
                              for f in (ours, theirs)), 2e-6)


# The inverse of a triangular matrix against numpy's in float64, as CPUs, GPUs
# and TPUs compute it.
WAYS = pytest.mark.parametrize('inverse', [
    jax.jit(pieces.invert_by_substitution), jax.jit(pieces.invert_by_library),
    jax.jit(pieces.invert_by_blocks)],
                               ids=['substitution', 'library', 'blocks'])


def expected(a):
  a = np.asarray(a, np.float64)
  return np.linalg.inv(np.eye(a.shape[-1]) + np.tril(a, -1))


@WAYS
@pytest.mark.parametrize('size', [1, 7, 64])
def test_it_is_the_inverse_and_reads_what_is_below_the_diagonal_alone(
    size, inverse):
  a = (0.3 * np.random.default_rng(0).normal(size=(2, 3, size, size))).astype(
      np.float32)
  want = expected(a)
  np.testing.assert_allclose(inverse(a), want, atol=1e-6 * np.abs(want).max())
  upper = np.triu(np.full(a.shape, np.float32('nan')))
  np.testing.assert_array_equal(inverse(a + upper), inverse(a))


@WAYS
@pytest.mark.parametrize('rate', [0.5, 1.0, 1.99])
def test_keys_that_are_alike_take_no_digits(rate, inverse):
  """Powers of A grow to 1e18 here, and the inverse is below 2."""
  a = np.full((1, 1, 64, 64), rate, np.float32)
  np.testing.assert_allclose(inverse(a), expected(a), atol=5e-5)


def test_halves_are_multiplied_in_all_digits():
  text = str(jax.make_jaxpr(pieces.invert_by_blocks)(jnp.zeros((1, 1, 8, 8))))
  assert text.count('HIGHEST') == 2 * text.count('dot_general[') > 0
