"""The second step of each optimiser in muP, against numpy; and the first of
adamw and sgd against the authors' package."""

import dataclasses

from configs import base
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.sharding import Role
from tests.helpers import models
from tests.training.optim import matrices_test
from training.optim import mup, optimizers

RATE, B1, B2, EPS, MOMENTUM, B3, ALPHA = 0.1, 0.8, 0.9, 1e-8, 0.7, 0.99, 3.0
# A model is R times as wide as the base.
R = 4
ROLES = dict(
    hidden=Role(('embed', 'mlp'), (0,)),
    head=Role(('embed', 'vocab'), (0,), kind='logits'),
    table=Role(('vocab', 'embed'), (0,), kind='embedding'),
    bias=Role(('embed',)))
SHAPES = dict(hidden=(8, 8), head=(8, 6), table=(6, 8), bias=(8,))


def parameters_and_gradients():
  random = np.random.default_rng(0)
  def draw():
    return {name: random.normal(size=shape) for name, shape in SHAPES.items()}
  return draw(), [draw(), draw()]


def config_of_wide_model():
  config = architectures.resolve(models.small_config(
      'gpt', parametrization='mup', mup_base_width=32))
  return dataclasses.replace(config, d_model=32 * R, head_dim=8 * R)


def our_step(optim, params, grads):
  """The steps for the last of some gradients, the parameters as they were."""
  optim.update(lr=RATE, warmup_steps=0, schedule='constant', weight_decay=0.0,
               clip_norm=0.0)
  factors = mup.learning_rate_factors(
      config_of_wide_model(), optim.name, ROLES, optim.hyperball)
  tx = optimizers.make_optimizer(optim, 9, ROLES, factors)
  tree = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
  state = tx.init(tree)
  for grad in grads:
    step, state = tx.update(grad, state, tree)
  return step


def adam(params, grads):
  m, v = 0.0, 0.0
  for g in grads:
    m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
  t = len(grads)
  return m / (1 - B1 ** t) / (np.sqrt(v / (1 - B2 ** t)) + EPS)


def ademamix(params, grads):
  (first, second), denominator = grads, adam(params, grads)
  m = (B1 * first + second) * (1 - B1) / (1 - B1 ** 2)
  slow = (B3 * first + second) * (1 - B3)
  return denominator * (m + ALPHA * slow) / m


def lion(params, grads):
  first, second = grads
  return np.sign(B1 * (1 - B2) * first + (1 - B1) * second)


def sgd(params, grads):
  return MOMENTUM * grads[0] + grads[1]


def adafactor(params, grads):
  decay = 1 - 2 ** -0.8
  step = grads[1] / np.sqrt(decay * grads[0]**2 + (1 - decay) * grads[1]**2)
  step /= max(1.0, np.sqrt(np.mean(step ** 2)))
  return step * np.sqrt(np.mean(params ** 2))


def muon(params, grads):
  mean = MOMENTUM * grads[0] + grads[1]
  ahead = MOMENTUM * mean * (1 - MOMENTUM) / (1 - MOMENTUM ** 3) + (
      1 - MOMENTUM) * grads[1] / (1 - MOMENTUM ** 2)
  return 0.2 * np.sqrt(8) * matrices_test.newton_schulz(ahead)


def normuon(params, grads):
  return matrices_test.published_normuon(
      [g.T for g in grads], MOMENTUM, B2)[-1].T


def soap(params, grads):
  reference = matrices_test.Published(B1, B2, EPS, every=10, most=6)
  return [-reference(g) for g in grads][-1]


# The direction of a hidden matrix and of the others, and the factors of the
# rates of the hidden matrix, the head, the table and the vector.
OF_ADAM, OF_SGD = (1, 1, 1), (R, R, R)
CASES = dict(
    adamw=(adam, adam, 1 / R, OF_ADAM), lion=(lion, lion, 1 / R, OF_ADAM),
    ademamix=(ademamix, ademamix, 1 / R, OF_ADAM),
    adafactor=(adafactor, adafactor, R ** -0.5, OF_ADAM),
    muon=(muon, adam, R ** -0.5, OF_ADAM),
    normuon=(normuon, adam, R ** -0.5, OF_ADAM),
    soap=(soap, soap, 1 / R, OF_ADAM), sgd=(sgd, sgd, 1, OF_SGD))


def optim_of(name, **changes):
  optim = base.base().optim
  optim.update(name=name, b1=B1, b2=B2, eps=EPS, momentum=MOMENTUM, b3=B3,
               alpha=ALPHA, precondition_max=6, **changes)
  return optim


@pytest.mark.parametrize('name', list(CASES))
def test_a_step_is_that_of_numpy(name):
  params, grads = parameters_and_gradients()
  got = our_step(optim_of(name), params, grads)
  of_hidden, of_others, hidden_factor, factors = CASES[name]
  for path, factor in zip(SHAPES, (hidden_factor, *factors), strict=True):
    direction = of_hidden if path == 'hidden' else of_others
    if name == 'soap' and path == 'bias':
      direction = adam
    want = direction(params[path], [g[path] for g in grads])
    np.testing.assert_allclose(got[path], -RATE * factor * want, rtol=2e-4,
                               atol=1e-6, err_msg=path)


def test_every_optimizer_has_a_step_of_numpy():
  assert set(CASES) == set(mup.RULES)


@pytest.mark.parametrize('name, direction, factor', [
    ('adamw', adam, R ** -0.5), ('muon', muon, 1), ('lion', lion, R ** -0.5)])
def test_a_step_of_a_kept_norm_is_that_of_numpy(name, direction, factor):
  params, grads = parameters_and_gradients()
  got = our_step(optim_of(name, hyperball=True), params, grads)['hidden']
  w = params['hidden']
  u = direction(w, [g['hidden'] for g in grads])
  moved = w - RATE * factor * np.linalg.norm(w) * u / np.linalg.norm(u)
  want = np.linalg.norm(w) * moved / np.linalg.norm(moved) - w
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.verify
@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_a_step_is_that_of_the_authors_package(name):
  """`mup` 1.0.0, which `pip install --no-deps mup` adds to PyTorch."""
  package = pytest.importorskip('mup')
  import torch  # pylint: disable=import-outside-toplevel
  params, grads = parameters_and_gradients()

  def network(width):
    """An embedding, a hidden matrix with a bias, and a readout."""
    return torch.nn.ModuleDict(dict(
        table=torch.nn.Embedding(6, width),
        hidden=torch.nn.Linear(width, width),
        head=package.MuReadout(width, 6, bias=False)))

  wide = network(8)
  package.set_base_shapes(wide, network(8 // R), delta=network(4))
  theirs = dict(hidden=wide['hidden'].weight, bias=wide['hidden'].bias,
                head=wide['head'].weight, table=wide['table'].weight)
  optimizer = {'adamw': lambda p: package.MuAdamW(
                   p, lr=RATE, betas=(B1, B2), eps=EPS, weight_decay=0.0),
               'sgd': lambda p: package.MuSGD(p, lr=RATE, momentum=MOMENTUM)}[
      name](list(theirs.values()))
  # Its matrices are [outputs, inputs]; each step begins where the last did.
  for grad in grads:
    before = {path: x.detach().clone() for path, x in theirs.items()}
    for path, x in theirs.items():
      is_turned = path in ('hidden', 'head')
      g = grad[path].T if is_turned else grad[path]
      x.grad = torch.tensor(g, dtype=x.dtype)
    optimizer.step()
  got = our_step(optim_of(name), params, grads)
  for path, x in theirs.items():
    step = (x.detach() - before[path]).numpy()
    want = step.T if path in ('hidden', 'head') else step
    np.testing.assert_allclose(got[path], want, rtol=1e-4, atol=1e-6,
                               err_msg=path)
