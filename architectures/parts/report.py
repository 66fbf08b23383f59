"""The report of a layer: what it returns beside its result and its cache; and
what the reports of all layers of a stack say together."""

from typing import Any, Optional

from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts.context import First, Keys
from common.errors import require


@struct.dataclass
class Report:
  """The things that a layer, or a part of it, says of its work.

  Attributes:
    losses: the terms that it adds to the training loss, by name.
    health: the figures of a router, by name.
    loads: the load of each expert, by the path of the bias that it moves.
    experts: the choices of a router (moe.layer.choices), with
      context.keep_layers.
    weights_BHLM: the weights with which self-attention sums the values, with
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
    """Returns the report of two parts of one layer, which have no name in
    common."""
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
  terms: dict[str, list[jax.Array]] = {}
  for each in losses:
    for name, loss in each.items():
      terms.setdefault(name, []).append(loss)
  return {name: sum(terms[name]) for name in sorted(terms)}


# The reports of the layers of a stack, put together in the layers' order.
# `sections` has for each section of the stack the report of each block of its
# period, whose arrays are [periods, ...].


def figures(sections: list[tuple[Report, ...]]) -> dict[str, dict]:
  """Returns 'losses', the sums over the layers; 'loads' of their experts, by
  path; 'health' and, with keep_layers, 'experts', of all layers that have some.
  {}: there are neither losses nor experts."""
  reports = [report for section in sections for report in section]
  if not any(report.losses or report.health for report in reports):
    return {}
  losses, loads = [], {}
  for report in reports:
    losses.append({name: loss_N.sum()
                   for name, loss_N in report.losses.items()})
    loads |= report.loads
  gathered = {'losses': summed(losses), 'loads': loads,
              'health': _stacked(sections, 'health')}
  if any(report.experts for report in reports):
    gathered['experts'] = _stacked(sections, 'experts')
  return gathered


def _stacked(sections: list[tuple[Report, ...]], field: str
             ) -> dict[str, jax.Array]:
  """Returns [N, ...] by name of what a field of the reports has by name, of the
  N layers that have something there."""
  filled = []
  for section in sections:
    named = []
    for report in section:
      if getattr(report, field):
        named.append(getattr(report, field))
    if named:
      filled.append(named)
  if not filled:
    return {}
  stacked = {}
  for name in sorted(filled[0][0]):
    arrays = []
    for named in filled:
      arrays.append([of_block[name] for of_block in named])
    stacked[name] = by_layer(arrays)
  return stacked


def attention_weights(sections: list[tuple[Report, ...]]
                      ) -> dict[str, jax.Array]:
  """Returns what the layers weighed the values with, [N, B, H, L, M], as
  'attention', and the memory's values, as 'cross_attention'; {}: they do not
  say."""
  names = {'attention': 'weights_BHLM',
           'cross_attention': 'memory_weights_BHLM'}
  gathered = {}
  for name, field in names.items():
    weights = []
    for section in sections:
      weights.append([getattr(report, field) for report in section])
    if weights[0][0] is None:
      continue
    heads = set()
    for section_weights in weights:
      heads |= {w_NBHLM.shape[-3] for w_NBHLM in section_weights}
    require(len(heads) == 1,
            'attention weights are kept of layers with as many heads each')
    gathered[name] = by_layer(weights)
  return gathered


def by_layer(sections: list[list[jax.Array]]) -> jax.Array:
  """Returns [N, ...] of the arrays [periods, ...] of each block of a section.
  """
  parts = []
  for blocks in sections:
    layers_NU = jnp.stack(blocks, 1)  # U: the blocks of a period
    parts.append(layers_NU.reshape(-1, *blocks[0].shape[1:]))
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def with_losses(aux: dict, losses: dict, loads: dict) -> dict:
  """Returns what a stack reports, with more losses and loads."""
  if not losses and not loads:
    return aux
  return aux | {'losses': summed([aux['losses'], losses]),
                'loads': aux['loads'] | loads}


def join_stacks(encoder: dict, decoder: dict) -> dict:
  """Returns what two stacks report, with the sums of their losses; the
  encoder's layers come first in the rest."""
  if not encoder or not decoder:
    return encoder or decoder
  joined = dict(decoder)
  for name in ('layers', 'attention'):
    if name in decoder:
      joined[name] = *encoder[name], *decoder[name]
  if 'losses' in decoder:
    joined = with_losses(joined, encoder['losses'], encoder['loads'])
    joined['health'] = jax.tree.map(
        lambda *both: jnp.concatenate(both), encoder['health'],
        decoder['health'])
  if 'experts' in decoder:
    joined['experts'] = {
        name: (*encoder['experts'][name], *chosen_N)
        for name, chosen_N in decoder['experts'].items()}
  return joined
