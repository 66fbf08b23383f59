"""The report of a layer: what it returns beside its result and its cache."""

from typing import Any, Optional

from flax import struct
import jax

from architectures.parts.context import First, Keys


@struct.dataclass
class Report:
  """The things that a layer, or a part of it, says of its work.

  Attributes:
    losses: what it adds to the training loss, by name.
    health: the figures of a router, by name.
    loads: the load of each expert, by the path of the bias that it moves.
    experts: what a router chose (moe.layer.choices), with
      context.keep_layers.
    weights_BHLM: what self-attention weighs the values with, with
      context.keep_attention.
    memory_weights_BHLM: the weights of attention to a memory, likewise.
    first: the values of the first layer, for the layers after this one.
    keys: its keys and values, where context.shared.lends asks for them.
  """
  losses: dict[str, jax.Array] = struct.field(default_factory=dict)
  health: dict[str, jax.Array] = struct.field(default_factory=dict)
  loads: dict[str, jax.Array] = struct.field(default_factory=dict)
  experts: dict[str, jax.Array] = struct.field(default_factory=dict)
  weights_BHLM: Optional[jax.Array] = None
  memory_weights_BHLM: Optional[jax.Array] = None
  first: Optional[First] = None
  keys: Optional[Keys] = None

  def joined(self, other: 'Report') -> 'Report':
    """Returns the report of two parts of one layer, which name what they say
    differently."""
    return Report(
        losses=self.losses | other.losses,
        health=self.health | other.health,
        loads=self.loads | other.loads,
        experts=self.experts | other.experts,
        weights_BHLM=_either(self.weights_BHLM, other.weights_BHLM),
        memory_weights_BHLM=_either(
            self.memory_weights_BHLM, other.memory_weights_BHLM),
        first=_either(self.first, other.first),
        keys=_either(self.keys, other.keys))


def _either(one: Any, other: Any) -> Any:
  """Returns the first, or the second where the first is None."""
  return other if one is None else one


def summed(losses: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  """Returns the sums of losses by name, which not all have."""
  names = set()
  for each in losses:
    names |= each.keys()
  return {name: sum(each[name] for each in losses if name in each)
          for name in sorted(names)}
