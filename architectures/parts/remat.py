"""What the backward pass computes again, and what is kept for it.

A policy is an entry of REMAT. What a layer computes has names (JAX's
`checkpoint_name`), by which the entry keeps it.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from architectures.parts import sharding
from architectures.parts import linear
from architectures.parts.config import ModelConfig

INPUT = 'block_input'
HOST = 'pinned_host'  # the kind of memory


class Remat(NamedTuple):
  """A policy.

  Attributes:
    keeps: the names of what a layer keeps on its device, beside its input.
    to_host: whether the input of each layer waits in the host's memory.
    again: whether the products of a layer are computed again.
  """
  keeps: tuple[str, ...] = ()
  to_host: bool = False
  again: bool = True


REMAT = {
    'none': Remat(again=False),  # each layer keeps all that its gradient needs
    'dots': Remat(keeps=(linear.PRODUCT,), again=False),
    'full': Remat(),
    'offload': Remat(to_host=True),
}


def of(c: ModelConfig) -> Remat:
  """Returns the config's policy."""
  return REMAT[c.remat]


def block(kind: type[nn.Module], c: ModelConfig, prevent_cse: bool
          ) -> type[nn.Module]:
  """Returns a kind of block whose backward pass computes again what the config
  says.

  Args:
    kind: its module, called with (x, *args).
    c: the config.
    prevent_cse: as of jax.checkpoint.
  """
  if c.remat == 'none':
    return kind
  if of(c).to_host:
    kind = _named(kind)
  return nn.remat(kind, policy=policy(c), prevent_cse=prevent_cse)


def policy(c: ModelConfig) -> Optional[Callable[..., object]]:
  """Returns the config's policy as jax.checkpoint takes it."""
  keeps = of(c).keeps
  if linear.keeps_gathered(c):
    keeps += (sharding.KEPT,)
  policies = jax.checkpoint_policies
  if of(c).to_host:
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=keeps, names_which_can_be_offloaded=[INPUT],
        offload_src='device', offload_dst=HOST)
  return policies.save_only_these_names(*keeps) if keeps else None


def gathers(c: ModelConfig, path: str, axes: tuple[str | None, ...]) -> int:
  """Returns how often a step gathers a sharded parameter: for the product and
  again for its gradient, or once.

  Args:
    c: the config.
    path: of the parameter, as 'decoder/layers/block_0/ffn/up'.
    axes: its logical axes.
  """
  once = linear.keeps_gathered(c, path.split('/')[-1]) and 'experts' not in axes
  return 1 if once else 2


def _named(kind: type[nn.Module]) -> type[nn.Module]:
  """Returns the kind of block with a name for what goes in. Only what is
  computed inside of jax.checkpoint can go to the host: not an argument."""

  class Named(kind):

    def __call__(self, x, *args):
      name = lambda leaf: checkpoint_name(leaf, INPUT)
      return super().__call__(jax.tree.map(name, x), *args)

  return Named
