"""SOAP and NorMuon against the published code, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from architectures.parts.roles import Role
from training.optim import normuon, optimizers, soap

MATRIX = Role(('embed', 'mlp'), (0,))
HEADS = Role(('embed', 'heads', 'head'), (0,))
OUT = Role(('heads', 'head', 'embed'), (0, 1))
EXPERTS = Role(('experts', 'embed', 'mlp'), (1,), (0,))


class Published:
  """nikhilvyas/SOAP's soap.py for one matrix (commit f42d296): `step`,
  `update_preconditioner`, `project`, `project_back`, `get_orthogonal_matrix`
  and `get_orthogonal_matrix_QR`; lr is 1 and nothing decays."""

  def __init__(self, b1, b2, eps, every, most, bases=None):
    self.b1, self.b2, self.eps = b1, b2, eps
    self.every, self.most = every, most
    self.step, self.Q, self.given = 0, None, bases

  def __call__(self, g):
    if self.Q is None:
      self.exp_avg, self.exp_avg_sq = np.zeros_like(g), np.zeros_like(g)
      self.GG = [None if n > self.most else np.zeros((n, n)) for n in g.shape]
      self._update_preconditioner(g)
      return np.zeros_like(g)  # "first step is skipped"
    projected = self._project(g)
    self.step += 1
    self.exp_avg = self.b1 * self.exp_avg + (1 - self.b1) * projected
    self.exp_avg_sq = (self.b2 * self.exp_avg_sq
                       + (1 - self.b2) * projected ** 2)
    denom = np.sqrt(self.exp_avg_sq) + self.eps
    size = np.sqrt(1 - self.b2 ** self.step) / (1 - self.b1 ** self.step)
    found = -size * self._project_back(self.exp_avg / denom)
    self._update_preconditioner(g)
    return found

  def _update_preconditioner(self, g):
    if self.Q is not None:
      self.exp_avg = self._project_back(self.exp_avg)
    for i, outer in enumerate((g @ g.T, g.T @ g)):
      if self.GG[i] is not None:
        self.GG[i] = self.GG[i] + (1 - self.b2) * (outer - self.GG[i])
    if self.Q is None:
      self.Q = self.given or [
          None if m is None else np.linalg.eigh(m)[1][:, ::-1]
          for m in self.GG]
    if self.step > 0 and self.step % self.every == 0:
      self._turn()
    if self.step > 0:
      self.exp_avg = self._project(self.exp_avg)

  def _turn(self):
    for i, (m, o) in enumerate(zip(self.GG, self.Q)):
      if m is not None:
        order = np.argsort(-np.diag(o.T @ m @ o))
        self.exp_avg_sq = np.take(self.exp_avg_sq, order, i)
        self.Q[i] = np.linalg.qr(m @ o[:, order])[0]

  def _project(self, x):
    left, right = self.Q
    x = x if left is None else left.T @ x
    return x if right is None else x @ right

  def _project_back(self, x):
    left, right = self.Q
    x = x if left is None else left @ x
    return x if right is None else x @ right.T


def gradients(shape, count=9):
  """Of sizes that differ by row, so that bases have an order."""
  rng = np.random.default_rng(0)
  size = np.linspace(0.2, 2, shape[-1])
  return [rng.normal(size=shape) * size for _ in range(count)]


def ours(tx, grads):
  """Returns the directions, and the state after the first."""
  with jax.enable_x64(True):
    tree = {'x': jnp.zeros(grads[0].shape)}
    state, found, early = tx.init(tree), [], None
    update = jax.jit(tx.update)
    for g in grads:
      step, state = update({'x': jnp.asarray(g)}, state)
      early = early or state
      found.append(np.asarray(step['x']))
    return found, early


def bases_of(state):
  """The bases after the first gradient, as its own are not unique where a
  gradient has more rows than columns."""
  found = []
  for name in ('left', 'right'):
    basis, factor = (getattr(state, field)['x']
                     for field in (f'{name}_basis', name))
    if isinstance(basis, optax.MaskedNode):
      found.append(None)
      continue
    basis, factor = np.asarray(basis), np.asarray(factor)
    if name == 'right':
      basis, factor = basis.T, factor.T
    # It is an eigenbasis, the largest value first.
    values = basis.T @ factor @ basis
    np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-12)
    np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-12)
    assert (np.diff(np.diag(values)) <= 1e-12).all()
    found.append(basis)
  return found


@pytest.mark.parametrize('shape, every, most', [
    ((4, 4), 1, 99), ((5, 3), 3, 99), ((3, 5), 2, 99), ((5, 3), 2, 4),
    ((3, 5), 2, 4), ((5, 5), 2, 4)])
def test_soap_is_that_of_its_authors(shape, every, most):
  settings = dict(b1=0.9, b2=0.95, eps=1e-8, every=every, most=most)
  tx = soap.scale_by_soap({'x': MATRIX}, **settings)
  grads = gradients(shape)
  found, early = ours(tx, grads)
  reference = Published(**settings, bases=[
      basis if basis is None else basis.copy() for basis in bases_of(early)])
  for t, (g, step) in enumerate(zip(grads, found)):
    np.testing.assert_allclose(-step, reference(g), rtol=1e-6, atol=1e-9,
                               err_msg=f'step {t}')
  if most < min(shape):  # neither side: Adam, a gradient late
    adam = optax.scale_by_adam(0.9, 0.95, 1e-8)
    theirs, _ = ours(adam, grads[1:])
    np.testing.assert_allclose(found[-1], theirs[-1], rtol=1e-4)


@pytest.mark.parametrize('role, shape, matrix', [
    (HEADS, (2, 4, 3, 2), (4, 6)), (OUT, (2, 3, 2, 4), (6, 4)),
    (EXPERTS, (2, 3, 4, 5), (4, 5))])
@pytest.mark.parametrize('make', [
    lambda role: soap.scale_by_soap({'x': role}, 0.9, 0.95, 1e-8, 2, 99),
    lambda role: normuon.scale_by_normuon({'x': role}, 0.95, 0.95)])
def test_layers_and_experts_are_matrices_and_heads_a_side(
    role, shape, matrix, make):
  grads = gradients(shape, 5)
  found, _ = ours(make(role), grads)
  apart = [g.reshape(-1, *matrix) for g in grads]
  for i in range(len(apart[0])):
    alone, _ = ours(make(MATRIX), [g[i] for g in apart])
    for whole, step in zip(found, alone):
      # A gradient with more rows than columns has no one basis: sizes alone.
      np.testing.assert_allclose(whole.reshape(-1, *matrix)[i], step,
                                 rtol=1e-5, atol=1e-8)


def test_runs_at_once_turn_their_bases_when_they_are_due():
  """Of two runs one has had a bad step, and is a step behind."""
  tx = soap.scale_by_soap({'x': MATRIX}, 0.9, 0.95, 1e-8, 2, 99)
  grads = [jnp.asarray(g, jnp.float32) for g in gradients((4, 4), 6)]
  state, both = tx.init({'x': grads[0]}), []
  alone = []
  for skipped in (None, 2):
    own, steps = state, []
    for t, g in enumerate(grads):
      if t == skipped:
        continue
      step, own = tx.update({'x': g}, own)
      steps.append(step['x'])
    alone.append(steps)
  joint = jax.tree.map(lambda x: jnp.stack([x, x]), state)
  update = jax.jit(jax.vmap(lambda g, ok, own: optimizers.update_if(
      ok, tx, {'x': g}, own, {'x': jnp.zeros_like(g)}), (None, 0, 0)))
  for t, g in enumerate(grads):
    moved, joint = update(g, jnp.array([True, t != 2]), joint)
    both.append(moved['x'])
  for t in range(len(grads)):
    np.testing.assert_allclose(both[t][0], alone[0][t], rtol=1e-4, atol=1e-5)
    if t != 2:
      np.testing.assert_allclose(both[t][1], alone[1][t - (t > 2)], rtol=1e-4,
                                 atol=1e-5)
    else:
      np.testing.assert_array_equal(both[t][1], 0)


def newton_schulz(x):
  """KellerJordan/Muon's zeropower_via_newtonschulz5, in float64, with optax's
  1e-8 beside the norm, where it has 1e-7."""
  a, b, c = 3.4445, -4.7750, 2.0315
  turned = x.shape[0] > x.shape[1]
  x = x.T if turned else x
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    square = x @ x.T
    x = a * x + (b * square + c * square @ square) @ x
  return x.T if turned else x


def published_normuon(grads, beta, beta2):
  """zichongli5/NorMuon's normuon_update (commit d45c9a4) of a weight [out, in],
  up to its last line, and then the step size of the paper's algorithm 1."""
  momentum, second, found = 0.0, 0.0, []
  for grad in grads:
    momentum = momentum + (1 - beta) * (grad - momentum)
    update = grad + beta * (momentum - grad)
    update = newton_schulz(update)
    mean = np.mean(update * update, axis=-1, keepdims=True)
    second = second + (1 - beta2) * (mean - second)
    update = update / (np.sqrt(second) + 1e-10)
    found.append(0.2 * np.sqrt(update.size) / np.linalg.norm(update) * update)
  return found


@pytest.mark.parametrize('shape', [(4, 4), (3, 6), (6, 3)])
def test_normuon_is_that_of_its_authors(shape):
  grads = gradients(shape)
  found, _ = ours(normuon.scale_by_normuon({'x': MATRIX}, 0.95, 0.9), grads)
  theirs = published_normuon([g.T for g in grads], 0.95, 0.9)
  for t, (step, other) in enumerate(zip(found, theirs)):
    np.testing.assert_allclose(step, other.T, rtol=1e-6, atol=1e-9,
                               err_msg=f'step {t}')
    assert np.sqrt(np.mean(step ** 2)) == pytest.approx(0.2)
