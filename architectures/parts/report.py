"""The report of a layer: what it returns beside its result and its cache; and
what the reports of all layers of a stack say together."""

from typing import Any, Optional

from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts.context import FirstLayerValues, KeysAndValues
from common.errors import require


@struct.dataclass
class Report:
  """The losses and figures that a layer, or a part of it, returns beside its
  result.

  Attributes:
    losses: the terms that it adds to the training loss, by name.
    health: the figures of a router, by name.
    loads: the load of each expert, by the path of the bias that it moves.
    experts: the choices of a router (moe.layer.choices), with
      context.keep_layers.
    weights_BHLM: the weights with which self-attention sums the values, with
      context.keep_attention.
    memory_weights_BHLM: the weights of attention to a memory, likewise.
    first_values: the values of the first layer, which the layers after this
      one read, with model.value_residual.
    keys: the keys and values of this layer, where later layers read them
      instead of their own (context.shared.lends).
  """
  losses: dict[str, jax.Array] = struct.field(default_factory=dict)
  health: dict[str, jax.Array] = struct.field(default_factory=dict)
  loads: dict[str, jax.Array] = struct.field(default_factory=dict)
  experts: dict[str, jax.Array] = struct.field(default_factory=dict)
  weights_BHLM: Optional[jax.Array] = None
  memory_weights_BHLM: Optional[jax.Array] = None
  first_values: Optional[FirstLayerValues] = None
  keys: Optional[KeysAndValues] = None

  def merge(self, other: 'Report') -> 'Report':
    """Returns one report of two parts of a layer, such as its attention and its
    feed-forward network.

    Args:
      other: the report of the other part. No name of a loss or a figure is in
        both, and no other array either: the first that exists is taken.
    """
    return Report(
        losses=self.losses | other.losses,
        health=self.health | other.health,
        loads=self.loads | other.loads,
        experts=self.experts | other.experts,
        weights_BHLM=_first_that_exists(self.weights_BHLM, other.weights_BHLM),
        memory_weights_BHLM=_first_that_exists(
            self.memory_weights_BHLM, other.memory_weights_BHLM),
        first_values=_first_that_exists(self.first_values, other.first_values),
        keys=_first_that_exists(self.keys, other.keys))


def _first_that_exists(first: Any, second: Any) -> Any:
  """Returns the first value, or the second where the first is None."""
  return second if first is None else first


def sum_losses_by_name(losses: list[dict[str, jax.Array]]
                       ) -> dict[str, jax.Array]:
  """Returns the sum of the losses of each name. A name may be missing in some
  of the dicts."""
  terms_by_name: dict[str, list[jax.Array]] = {}
  for losses_of_layer in losses:
    for name, loss in losses_of_layer.items():
      terms_by_name.setdefault(name, []).append(loss)
  return {name: sum(terms_by_name[name]) for name in sorted(terms_by_name)}


# The reports of the layers of a stack, put together in the layers' order.
#
# A stack has up to three sections: its prefix, its repeated period of layers,
# and its suffix. `sections` holds for each section a report of each layer of
# its period, whose arrays are [periods, ...].


def gather_figures(sections: list[tuple[Report, ...]]) -> dict[str, dict]:
  """Gathers what the layers of a stack report: auxiliary losses, the loads of
  experts, and figures on the health of routers.

  Args:
    sections: the reports of the layers, see above.

  Returns:
    'losses': the sums over the layers, by name. 'loads': the loads of experts,
    by the path of the bias that they move. 'health': the figures of routers,
    [N, ...] of the N layers that have some. 'experts': with
    context.keep_layers, the choices of routers, likewise. {} where the layers
    have neither losses nor experts.
  """
  reports = [report for section in sections for report in section]
  if not any(report.losses or report.health for report in reports):
    return {}
  # The sums of losses, and all loads.
  losses, loads = [], {}
  for report in reports:
    losses.append({name: loss_N.sum()
                   for name, loss_N in report.losses.items()})
    loads |= report.loads
  # The figures, layer by layer.
  figures = {'losses': sum_losses_by_name(losses), 'loads': loads,
             'health': _stack_field_by_layer(sections, 'health')}
  if any(report.experts for report in reports):
    figures['experts'] = _stack_field_by_layer(sections, 'experts')
  return figures


def _stack_field_by_layer(sections: list[tuple[Report, ...]], field: str
                          ) -> dict[str, jax.Array]:
  """Stacks what the layers of a stack report in one field, in the order of the
  layers.

  Args:
    sections: the reports of the layers of one period of each section (the
      prefix, the repeated pattern, the suffix). Their arrays have an axis of
      periods in front.
    field: the field, a dict of arrays by name, such as 'health'.

  Returns:
    The arrays [N, ...] by name, of the N layers that have some. {} where none
    has.
  """
  # The dicts of the layers that have arrays, section by section.
  sections_with_arrays = []
  for section in sections:
    arrays_of_layers = []
    for report in section:
      if getattr(report, field):
        arrays_of_layers.append(getattr(report, field))
    if arrays_of_layers:
      sections_with_arrays.append(arrays_of_layers)
  if not sections_with_arrays:
    return {}
  # All layers have the same names.
  stacked = {}
  for name in sorted(sections_with_arrays[0][0]):
    arrays = []
    for arrays_of_layers in sections_with_arrays:
      arrays.append([by_name[name] for by_name in arrays_of_layers])
    stacked[name] = stack_by_layer(arrays)
  return stacked


def gather_attention_weights(sections: list[tuple[Report, ...]]
                             ) -> dict[str, jax.Array]:
  """Returns the attention weights of all layers of a stack, [N, B, H, L, M].

  Args:
    sections: the reports of the layers of each section.

  Returns:
    'attention': the weights of self-attention. 'cross_attention': those of
    attention to a memory. A name is missing where the reports have no such
    weights.

  Raises:
    RequestError: where layers differ in their number of heads.
  """
  fields = {'attention': 'weights_BHLM',
            'cross_attention': 'memory_weights_BHLM'}
  gathered = {}
  for name, field in fields.items():
    weights = []
    for section in sections:
      weights.append([getattr(report, field) for report in section])
    if weights[0][0] is None:
      continue
    # One array holds all layers only if each has the same number of heads.
    numbers_of_heads = set()
    for weights_of_section in weights:
      numbers_of_heads |= {w_NBHLM.shape[-3] for w_NBHLM in weights_of_section}
    require(len(numbers_of_heads) == 1,
            'attention weights are kept of layers with as many heads each')
    gathered[name] = stack_by_layer(weights)
  return gathered


def stack_by_layer(sections: list[list[jax.Array]]) -> jax.Array:
  """Joins the results of scans over layers into one array of all layers, in
  the order in which a token goes through them.

  Args:
    sections: for each section (the prefix, the repeated pattern, the suffix) an
      array [periods, ...] for each of the U layers of its pattern.

  Returns:
    The array, [N layers, ...].
  """
  arrays_of_sections = []
  for arrays_of_period in sections:
    # The layers of a period follow one another, and then those of the next
    # period: [periods, U, ...] is flattened in this order.
    layers_NU = jnp.stack(arrays_of_period, 1)
    shape = arrays_of_period[0].shape[1:]
    arrays_of_sections.append(layers_NU.reshape(-1, *shape))
  if len(arrays_of_sections) == 1:
    return arrays_of_sections[0]
  return jnp.concatenate(arrays_of_sections)


def add_losses(aux: dict, losses: dict, loads: dict) -> dict:
  """Returns what a stack of layers reports, with the auxiliary losses of
  further layers added to its own.

  Args:
    aux: the figures, as `gather_figures` returns them.
    losses: the losses that are added, by name.
    loads: further loads of experts, by the path of the bias that they move.
  """
  if not losses and not loads:
    return aux
  return aux | {'losses': sum_losses_by_name([aux['losses'], losses]),
                'loads': aux['loads'] | loads}


def merge_reports_of_stacks(encoder: dict, decoder: dict) -> dict:
  """Merges what the layers of an encoder and those of a decoder report: losses
  are added up, and in all arrays by layer the encoder's layers come first.

  Args:
    encoder: the figures of the encoder's stack; {}: there are none.
    decoder: those of the decoder's, with the same names.
  """
  if not encoder or not decoder:
    return encoder or decoder
  merged = dict(decoder)
  # The states and the attention of every layer.
  for name in ('layers', 'attention'):
    if name in decoder:
      merged[name] = *encoder[name], *decoder[name]
  # Losses, and the figures of routers.
  if 'losses' in decoder:
    merged = add_losses(merged, encoder['losses'], encoder['loads'])
    merged['health'] = jax.tree.map(
        lambda *both: jnp.concatenate(both), encoder['health'],
        decoder['health'])
  if 'experts' in decoder:
    merged['experts'] = {
        name: (*encoder['experts'][name], *chosen_N)
        for name, chosen_N in decoder['experts'].items()}
  return merged
