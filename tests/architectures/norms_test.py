"""RMSNorm with 1 + offset and without parameters, against NumPy's formula."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import roles
from architectures.parts.norms import NORMS
from tests.helpers import models
from training import paths
from training.step import abstract_params

EPS = 1e-3


def config(norm, **changes):
  return models.config(norm=norm, norm_eps=EPS, **changes)


@pytest.mark.parametrize('name', ['rmsnorm_1p', 'rmsnorm_plain'])
def test_a_norm_is_its_formula(name):
  rng = np.random.default_rng(0)
  x, offset = rng.normal(size=(3, 8)), rng.normal(size=8)
  module = NORMS[name](models.config(norm_eps=EPS))
  made = module.init(jax.random.key(0), jnp.ones((1, 8)))
  factor = {'rmsnorm_1p': 1 + offset, 'rmsnorm_plain': 1.0}[name]
  params = jax.tree.map(lambda _: jnp.asarray(offset), made)
  np.testing.assert_allclose(
      module.apply(params, jnp.asarray(x, jnp.float32)),
      x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPS) * factor,
      rtol=1e-5)
  assert len(jax.tree.leaves(made)) == (name == 'rmsnorm_1p')


def test_all_forms_of_rmsnorm_begin_alike():
  x = jax.random.normal(jax.random.key(1), (3, 8))
  first = [module.apply(module.init(jax.random.key(0), x), x) for module in (
      NORMS[name](models.config(norm_eps=EPS))
      for name in ('rmsnorm', 'rmsnorm_1p', 'rmsnorm_plain'))]
  for other in first[1:]:
    np.testing.assert_array_equal(first[0], other)


def test_an_offset_is_no_matrix_and_decays_as_a_scale_does():
  """Not at all, by default; where decay_mask names it, to a factor of 1."""
  boxes = abstract_params(architectures.build(config('rmsnorm_1p')))
  found = paths.flatten(roles.read(boxes))
  offsets = {path: role for path, role in found.items() if 'norm' in path}
  assert len(offsets) == 3  # of attention, of the network, the last
  assert all(path.endswith('/offset') and not role.matrix
             and role.axes == ('embed',) for path, role in offsets.items())
  plain = abstract_params(architectures.build(config('rmsnorm_plain')))
  assert not [path for path in paths.flatten(nn.meta.unbox(plain))
              if 'norm' in path]
