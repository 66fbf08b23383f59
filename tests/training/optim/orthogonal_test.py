"""Muon's direction: that of optax, on one device and where the mesh splits
matrices, which then are whole where they are multiplied."""

import functools

from configs import sharding as tables
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from architectures.parts import sharding
from architectures.parts.roles import Role
from training.distributed import devices
from training.optim import orthogonal

DENSE = Role(('embed', 'mlp'), inputs=(0,))
EXPERTS = Role(('experts', 'embed', 'mlp'), inputs=(1,), batch=(0,))
# Each with layers before it, which the mesh divides or not.
ROLES = dict(
    lone=DENSE, layer=DENSE, three=DENSE, eight=DENSE,
    query=Role(('embed', 'heads', 'head'), inputs=(0,)),
    out=Role(('heads', 'head', 'embed'), inputs=(0, 1)),
    experts=EXPERTS, many=EXPERTS)
SHAPES = dict(
    lone=(16, 24), layer=(1, 16, 24), three=(3, 24, 16), eight=(8, 16, 24),
    query=(3, 16, 4, 8), out=(3, 4, 8, 16), experts=(3, 4, 16, 8),
    many=(2, 16, 16, 8))


def drawn(seed):
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.normal(size=shape), jnp.float32)
          for name, shape in SHAPES.items()}


def run(tx, place=lambda tree: tree):
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
def theirs():
  def dimensions(tree):
    axes = {name: role.split(tree[name].ndim) for name, role in ROLES.items()}
    return {name: optax.contrib.MuonDimensionNumbers(a.inputs, a.outputs)
            for name, a in axes.items()}
  return run(optax.contrib.scale_by_muon(
      beta=0.9, weight_dimension_numbers=dimensions))[0]


def close(ours):
  # Rounding grows where a singular value is small: by 3.4 an iteration.
  for a, b in zip(ours, theirs(), strict=True):
    for name, x in a.items():
      np.testing.assert_allclose(x, b[name], atol=3e-4, err_msg=name)


def test_it_is_that_of_optax():
  close(run(orthogonal.scale_by_muon(ROLES, 0.9))[0])


@pytest.mark.parametrize('sizes', [
    dict(fsdp=8), dict(fsdp=2, expert=4), dict(fsdp=2, expert=2, tensor=2),
    dict(data=2, tensor=4)], ids=str)
def test_matrices_are_whole_where_they_are_multiplied(sizes, capfd):
  mesh = devices.make_mesh(
      dict.fromkeys(tables.MESH_AXES, 1) | sizes)
  with jax.set_mesh(mesh), sharding.rules('default'):
    homes = {}
    for name, role in ROLES.items():
      lead = len(SHAPES[name]) - len(role.axes)
      homes[name] = NamedSharding(mesh, PartitionSpec(*(
          names or None for names in sharding.weight_places(
              SHAPES[name], (None,) * lead + role.axes))))
    ours, text = run(orthogonal.scale_by_muon(ROLES, 0.9),
                     lambda tree: jax.device_put(tree, homes))
  close(ours)
  # A product over a side that is split would be summed.
  assert 'all-reduce(' not in text and 'reduce-scatter(' not in text
  assert 'all-to-all(' in text
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err
