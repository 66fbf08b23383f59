"""Logical axis names on parameters and activations.

Axis names stand beside the array; the table in configs/sharding.py says which
mesh axis each goes to. An unknown name raises: Linen alone would take a
misspelt one for 'not sharded'.
"""

import contextlib

from configs import sharding as tables
import flax.linen as nn
import jax

from architectures.parts.config import one_of


def check(axes) -> tuple[str | None, ...]:
  """Returns `axes`; raises ValueError for one that the legend lacks."""
  for axis in axes:
    if axis is not None:
      one_of('logical axis', axis, tables.LOGICAL_AXES)
  return tuple(axes)


def init(fn, *axes: str | None):
  """Wraps an initializer so that its parameter carries `axes`."""
  return nn.with_logical_partitioning(fn, check(axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains `x` to the mesh axes of its logical ones; no mesh, no effect."""
  check(axes)
  return nn.with_logical_constraint(x, axes)


@contextlib.contextmanager
def rules(name: str):
  """Installs the table configs.sharding.RULES[name] for what is traced."""
  one_of('mesh.rules', name, tables.RULES)
  with nn.logical_axis_rules(tables.RULES[name]):
    yield
