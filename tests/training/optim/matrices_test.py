"""SOAP and NorMuon against the published code, written out in numpy; and Muon
against optax's, also where the mesh splits matrices, which then are whole where
they are multiplied."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from architectures.parts import sharding
from architectures.parts.sharding import Role
from configs import sharding as tables
from training.distributed import devices
from training.optim import matrices, soap

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
    update = -size * self._project_back(self.exp_avg / denom)
    self._update_preconditioner(g)
    return update

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
    state, steps, early = tx.init(tree), [], None
    update = jax.jit(tx.update)
    for g in grads:
      step, state = update({'x': jnp.asarray(g)}, state)
      early = early or state
      steps.append(np.asarray(step['x']))
    return steps, early


def bases_of(state):
  """The bases after the first gradient, as its own are not unique where a
  gradient has more rows than columns."""
  bases = []
  for name in ('left', 'right'):
    basis, factor = (getattr(state, field)['x']
                     for field in (f'{name}_basis', name))
    if basis is None:
      bases.append(None)
      continue
    basis, factor = np.asarray(basis), np.asarray(factor)
    if name == 'right':
      basis, factor = basis.T, factor.T
    # It is an eigenbasis, the largest value first.
    values = basis.T @ factor @ basis
    np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-12)
    np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-12)
    assert (np.diff(np.diag(values)) <= 1e-12).all()
    bases.append(basis)
  return bases


@pytest.mark.parametrize('shape, every, most', [
    ((4, 4), 1, 99), ((5, 3), 3, 99), ((3, 5), 2, 99), ((5, 3), 2, 4),
    ((3, 5), 2, 4), ((5, 5), 2, 4)])
def test_soap_is_that_of_its_authors(shape, every, most):
  adam_settings = dict(b1=0.9, b2=0.95, eps=1e-8)
  tx = soap.scale_by_soap(
      {'x': MATRIX}, **adam_settings, basis_every=every, max_side=most)
  grads = gradients(shape)
  steps, early = ours(tx, grads)
  reference = Published(**adam_settings, every=every, most=most, bases=[
      basis if basis is None else basis.copy() for basis in bases_of(early)])
  for t, (g, step) in enumerate(zip(grads, steps)):
    np.testing.assert_allclose(-step, reference(g), rtol=1e-6, atol=1e-9,
                               err_msg=f'step {t}')
  if most < min(shape):  # neither side: Adam, a gradient late
    adam = optax.scale_by_adam(0.9, 0.95, 1e-8)
    theirs, _ = ours(adam, grads[1:])
    np.testing.assert_allclose(steps[-1], theirs[-1], rtol=1e-4)


@pytest.mark.parametrize('role, shape, matrix', [
    (HEADS, (2, 4, 3, 2), (4, 6)), (OUT, (2, 3, 2, 4), (6, 4)),
    (EXPERTS, (2, 3, 4, 5), (4, 5))])
@pytest.mark.parametrize('make', [
    lambda role: soap.scale_by_soap({'x': role}, 0.9, 0.95, 1e-8, 2, 99),
    lambda role: matrices.scale_by_normuon({'x': role}, 0.95, 0.95)])
def test_layers_and_experts_are_matrices_and_heads_a_side(
    role, shape, matrix, make):
  grads = gradients(shape, 5)
  steps, _ = ours(make(role), grads)
  one = make(MATRIX)
  apart = [g.reshape(-1, *matrix) for g in grads]
  for i in range(len(apart[0])):
    alone, _ = ours(one, [g[i] for g in apart])
    for whole, step in zip(steps, alone):
      # A gradient with more rows than columns has no one basis: sizes alone.
      np.testing.assert_allclose(whole.reshape(-1, *matrix)[i], step,
                                 rtol=1e-5, atol=1e-8)


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
  momentum, second, steps = 0.0, 0.0, []
  for grad in grads:
    momentum = momentum + (1 - beta) * (grad - momentum)
    update = grad + beta * (momentum - grad)
    update = newton_schulz(update)
    mean = np.mean(update * update, axis=-1, keepdims=True)
    second = second + (1 - beta2) * (mean - second)
    update = update / (np.sqrt(second) + 1e-10)
    steps.append(0.2 * np.sqrt(update.size) / np.linalg.norm(update) * update)
  return steps


@pytest.mark.parametrize('shape', [(4, 4), (3, 6), (6, 3)])
def test_normuon_is_that_of_its_authors(shape):
  grads = gradients(shape)
  steps, _ = ours(matrices.scale_by_normuon({'x': MATRIX}, 0.95, 0.9), grads)
  theirs = published_normuon([g.T for g in grads], 0.95, 0.9)
  for t, (step, other) in enumerate(zip(steps, theirs)):
    np.testing.assert_allclose(step, other.T, rtol=1e-6, atol=1e-9,
                               err_msg=f'step {t}')
    assert np.sqrt(np.mean(step ** 2)) == pytest.approx(0.2)


# Each with layers before it, which the mesh divides or not.
ROLES = dict(lone=MATRIX, layer=MATRIX, three=MATRIX, eight=MATRIX, query=HEADS,
             out=OUT, experts=EXPERTS, many=EXPERTS)
SHAPES = dict(
    lone=(16, 24), layer=(1, 16, 24), three=(3, 24, 16), eight=(8, 16, 24),
    query=(3, 16, 4, 8), out=(3, 4, 8, 16), experts=(3, 4, 16, 8),
    many=(2, 16, 16, 8))


def drawn(seed):
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.normal(size=shape), jnp.float32)
          for name, shape in SHAPES.items()}


def muon_steps(tx, place=lambda tree: tree):
  """Returns the updates of three steps, and the last step's program."""
  seen = []
  state = jax.jit(tx.init)(place(drawn(0)))
  state = state._replace(mu=place(state.mu))
  update = jax.jit(tx.update).lower(place(drawn(0)), state).compile()
  for step in range(3):
    updates, state = update(place(drawn(step)), state)
    seen.append(jax.device_get(updates))
  return seen, update.as_text()


@functools.cache
def muon_of_optax():
  def dimensions(tree):
    axes = {name: role.split(tree[name].ndim) for name, role in ROLES.items()}
    return {name: optax.contrib.MuonDimensionNumbers(a.inputs, a.outputs)
            for name, a in axes.items()}
  steps, _ = muon_steps(optax.contrib.scale_by_muon(
      beta=0.9, weight_dimension_numbers=dimensions))
  size = lambda name, x: max(ROLES[name].split(x.ndim).sizes(x.shape))
  return [{name: 0.2 * size(name, x) ** 0.5 * x for name, x in step.items()}
          for step in steps]


@pytest.mark.parametrize('sizes', [
    None, dict(fsdp=2, expert=2, tensor=2), *(pytest.param(
        x, marks=pytest.mark.long) for x in (
            dict(data=2, tensor=4), dict(fsdp=2, expert=4)))], ids=str)
def test_muon_is_that_of_optax_on_any_mesh(sizes, capfd):
  tx = matrices.scale_by_muon(ROLES, 0.9)
  if sizes is None:
    ours, _ = muon_steps(tx)
  else:
    mesh = devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1) | sizes)
    with jax.set_mesh(mesh), sharding.install_rules(
      tables.RULES['default']):
      homes = {}
      for name, role in ROLES.items():
        lead = len(SHAPES[name]) - len(role.axes)
        homes[name] = NamedSharding(mesh, PartitionSpec(*(
            names or None for names in sharding.mesh_axes_of_weight(
                SHAPES[name], (None,) * lead + role.axes))))
      ours, text = muon_steps(tx, lambda tree: jax.device_put(tree, homes))
    # A product over a side that is split would be summed.
    assert 'all-reduce(' not in text and 'reduce-scatter(' not in text
    assert 'all-to-all(' in text
    assert 'Involuntary full rematerialization' not in capfd.readouterr().err
  # Rounding grows where a singular value is small: by 3.4 an iteration.
  for a, b in zip(ours, muon_of_optax(), strict=True):
    for name, x in a.items():
      np.testing.assert_allclose(x, b[name], atol=3e-4, err_msg=name)


@pytest.mark.parametrize('layers, experts, split', [
    (3, 4, (1, 4)), (4, 3, (4, 1)), (8, 4, (4, 1)), (3, 3, (4, 1))])
def test_matrices_move_to_where_they_divide_the_devices(layers, experts, split):
  """Or to the first axis, where they do nowhere."""
  mesh = devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1) | dict(
      data=2, tensor=4))
  with jax.set_mesh(mesh), sharding.install_rules(tables.RULES['default']):
    *_, last = matrices._placements_to_whole_matrices(
        (layers, experts, 8, 8), EXPERTS, EXPERTS.split(4))
    assert tuple(map(sharding.count_devices_along, last)) == (*split, 1, 1)
