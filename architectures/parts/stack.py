"""A stack of layers: one period of its pattern in a scan over the periods.

Compile time then does not grow with depth. Parameters of layer n stand in row
n // period of `layers/block_{n % period}`, whether or not `scan_layers`
unrolls the scan. The layers of model.prefix come before the first period: they
are one of their own, `prefix/block_{n}` with one row, and layer n of the others
stands where n - len(prefix) would. Likewise those of model.suffix come after
the last period. The prefix, the periods and the suffix are the stack's
sections.

With model.loop the layers of all periods are run several times, between the
prefix and the suffix: see passes.py.
"""

from collections.abc import Callable
import functools
import itertools
import operator
from typing import Any, Optional

from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers, passes, positions, report, sharding
from architectures.parts import streams
from architectures.parts.attention import steps
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.blocks import BLOCKS, count_branches
from architectures.parts.cache import Cache, LayerCache, put_slots_back
from architectures.parts.cache import SlotsOfEntries, split_off_slots
from architectures.parts.config import LayerKind, ModelConfig, Section
from architectures.parts.context import Context, Distances, FirstLayerValues
from architectures.parts.context import KeysAndValues, SharedArrays
from architectures.parts.loops import LoopsConfig
from architectures.parts.report import Report

# The state that goes from layer to layer: x, which may be several streams, and
# with model.value_residual the values of the first layer.
Carry = tuple[streams.LayerInput, Optional[FirstLayerValues]]


@struct.dataclass
class LayerResults:
  """The results of the layers of a period beside x, in their order.

  Attributes:
    caches: their entries of the cache; None: none went in.
    reports: their reports.
    kept: with context.keep_layers, x after each of them.
    lent: keys and values that later periods read, by place.
  """
  caches: Optional[tuple[LayerCache, ...]]
  reports: tuple[Report, ...]
  kept: tuple[Any, ...]
  lent: dict[int, KeysAndValues]


class Stack(nn.Module):
  """num_layers layers, then the final norm where the wiring needs one."""
  config: ModelConfig
  sections: tuple[Section, ...]

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Any = None,
               one_by_one: bool = False
               ) -> tuple[jax.Array, Any, dict[str, Any]]:
    """Returns the result of the last layer, the cache, and what the layers
    report.

    Args:
      x_BLD: the embedding of the tokens.
      ctx: what the layers read besides their input.
      cache: the entries of all layers; None: there is no cache.
      one_by_one: whether the layers follow one another in the program, as a
        scan may copy the weights of each. Parameters and cache are then those
        that skeletons.one_by_one returns. Both ways update slots in place.
    """
    c = self.config
    ctx = self._complete_context(x_BLD, ctx, cache)
    first = self._first_values(x_BLD)
    kinds = self._layer_kinds()
    x = streams.begin_streams(c, x_BLD, count_branches(c, kinds))
    # The layers.
    if one_by_one:
      (x, _), sections = self._run_one_by_one((x, first), cache, ctx)
    else:
      (x, _), sections = self._scan_sections((x, first), cache, ctx)
    # The streams end in one, which is normalised. If the length stayed over
    # `tensor`, as the vocabulary is, their product would gather the head.
    end = streams.EndOfStreams(c, name='final_streams')
    final = self._final_norm(kinds[-1])
    y_BLD = sharding.constrain(final(end(x)), 'batch', 'length', 'embed')
    # The reports of the layers.
    reports = [section.reports for section in sections]
    aux = report.gather_figures(
      reports) | report.gather_attention_weights(reports)
    if ctx.keep_layers:
      kept = []
      for section in sections:
        kept.append([end(x) for x in section.kept])
      layers_NBLD = jnp.concatenate([x_BLD[None], report.stack_by_layer(kept)])
      aux = aux | {'layers': layers_NBLD, 'readouts': final(layers_NBLD)}
    if cache is None:
      return y_BLD, None, aux
    caches = [section.caches for section in sections]
    return y_BLD, caches if one_by_one else sum(caches, ()), aux

  def _layer_kinds(self) -> tuple[LayerKind, ...]:
    """Returns the kind of each layer that a token goes through."""
    kinds = []
    for section in self.sections:
      kinds += section.layers
    return tuple(kinds)

  def _final_norm(self, last: LayerKind) -> Callable[[jax.Array], jax.Array]:
    """Returns the norm after the last layer, or a function that changes
    nothing."""
    c = self.config
    if BLOCKS[c.of_kind(last.name).block].FINAL_NORM:
      return layers.norm(c, 'final_norm')
    return _identity

  def _complete_context(self, x_BLD: jax.Array, ctx: Context, cache: Any
                           ) -> Context:
    """Returns the context with all that the layers read besides their input:
    how long the rows are, distances, and the embedding of the tokens."""
    c = self.config
    # The keys that queries meet stand in the slots of a cache.
    k_positions_BM = ctx.positions_BL
    slots = find_cache_of_tokens(cache)
    if slots is not None:
      k_positions_BM = jnp.arange(slots.num_slots)[None]
    if cache is not None and ctx.lengths_B is None:
      ctx = ctx.replace(lengths_B=ctx.positions_BL[:, -1] + 1)
    ctx = add_distances(c, self.sections[0].kinds[0], ctx, k_positions_BM)
    if any(layer.memory == 'per_layer' for layer in c.distinct_layers):
      ctx = ctx.replace(embedded_BLD=x_BLD)
    return ctx

  def _first_values(self, x_BLD: jax.Array) -> Optional[FirstLayerValues]:
    """Returns the values that the first layer is given with
    model.value_residual; None: there are none."""
    c = self.config
    attention = c.find(AttentionConfig)
    if attention is None or not attention.value_residual:
      return None
    readers = [layer for layer in c.distinct_layers
               if layer.mixer == 'attention']
    return steps.zero_first_values(readers[0], x_BLD)

  # A scan over periods, section by section.

  def _scan_sections(self, carry: Carry, cache: Any, ctx: Context
            ) -> tuple[Carry, list[LayerResults]]:
    """Runs the sections one after another. The results of each have an axis of
    periods in front."""
    entries = iter(cache or ())
    lent: dict[int, KeysAndValues] = {}
    outputs = []
    for section in self.sections:
      section_cache = None
      if cache is not None:
        section_cache = tuple(itertools.islice(entries, len(section.kinds)))
      carry, results = self._run_section(
          section, carry, section_cache, ctx, lent)
      lent = jax.tree.map(operator.itemgetter(0), results.lent)
      outputs.append(results)
    return carry, outputs

  def _run_section(self, section: Section, carry: Carry,
                   cache: Optional[tuple[LayerCache, ...]], ctx: Context,
                   lent: dict[int, KeysAndValues]
                   ) -> tuple[Carry, LayerResults]:
    """Runs the periods of one section, all of its passes.

    The slots of the cache go along with the carry (see Scanned), and `rest`,
    what else it holds, is given to the periods one by one.
    """
    slots, rest, n_N = None, None, None
    if cache is not None:
      slots, rest = split_off_slots(cache)
      n_N = jnp.arange(section.periods)
    if self._is_looped(section) and not self.is_initializing():
      (carry, slots), results = self._run_passes(
          section, (carry, slots), rest, ctx, lent)
    else:
      periods = self._scanned_periods(section, name=section.name)
      (carry, slots), results = periods(
          (carry, slots), (n_N, rest), ctx, lent)
    # A new model runs one pass, and declares what passes are entered with.
    if self._is_looped(section) and self.is_initializing():
      passes.Enter(self.config, name='loop')(carry[0], carry[0], 0)
    if slots is None:
      return carry, results
    return carry, results.replace(caches=put_slots_back(slots, results.caches))

  def _scanned_periods(self, section: Section, **named: Any) -> nn.Module:
    """Returns the module that scans the periods of a section; `named` gives it
    a name in the stack, or leaves it unbound."""
    c = self.config
    # If the check were left out, the layers would be traced once and not twice.
    # Where they draw numbers, the draws of both are counted, and what is drawn
    # depends on the count.
    draws = any(map(self.has_rng, ('params', 'dropout', 'router')))
    scanned = nn.scan(
        Scanned, variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True, 'router': True},
        in_axes=(0, nn.broadcast, nn.broadcast), length=section.periods,
        unroll=1 if c.scan_layers else section.periods,
        check_constancy_invariants=draws,
        metadata_params={nn.PARTITION_NAME: 'layers'})
    several = section.periods * section.passes > 1
    return scanned(
  config=c,
  pattern=section.kinds,
  lends=self._places_lent_by_section(
    section.name),
    in_loop=c.scan_layers and several,
     **named)

  def _places_lent_by_section(self, section: str) -> tuple[int, ...]:
    """Returns which layers of a section lend their keys to later sections, by
    their place before its end: only those of the prefix do."""
    if section != 'prefix':
      return ()
    sources = set()
    for other in self.sections:
      for kind in other.kinds:
        if kind.source is not None and kind.source < 0:
          sources.add(kind.source)
    return tuple(sorted(sources))

  # Layers that loop.

  def _is_looped(self, section: Section) -> bool:
    return self.config.loop != 'none' and section.name == 'layers'

  def _run_passes(self,
  section: Section,
  carry: tuple[Carry,
  SlotsOfEntries],
  rest: Any,
  ctx: Context,
  lent: dict[int,
  KeysAndValues] ) -> tuple[tuple[Carry,
  SlotsOfEntries],
   LayerResults]:
    """Runs all passes of the section that loops, in a scan over the passes.

    All passes read the same parameters, so the periods are an unbound module
    that each pass applies. The first passes may have no gradient: then the scan
    is two, and the first one reads nothing that has a gradient.

    Returns:
      The carry, and the results of all passes with those of a pass side by
      side: [passes * periods, ...].
    """
    c, params = self.config, self.variables['params']
    count, periods = section.passes, section.periods
    module = self._scanned_periods(section, parent=None)
    (inputs, _), _ = carry
    keys = {name: jax.random.split(self.make_rng(name), count)
            for name in ('dropout', 'router') if self.has_rng(name)}

    def one_pass(params: Any, inputs: streams.LayerInput, ctx: Context,
                 lent: dict[int, KeysAndValues], carry: tuple, own: tuple):
      """Runs pass n. `own` is what it alone is given: its number, its rows of
      the cache, and its keys of random numbers."""
      (x, first), slots = carry
      n, rest, keys = own
      x = passes.input_of_pass(c, params, x, inputs, n)
      n_N = None if slots is None else n * periods + jnp.arange(periods)
      return module.apply({'params': params[section.name]},
                          ((x, first), slots), (n_N, rest), ctx, lent,
                          rngs=keys)

    own = (jnp.arange(count),
           jax.tree.map(lambda x: x.reshape(count, periods, *x.shape[1:]),
                        rest), keys)

    def run(shared: tuple, carry: tuple, start: int, end: int):
      """Runs the passes from `start` to before `end`."""
      some = jax.tree.map(operator.itemgetter(slice(start, end)), own)
      unroll = 1 if c.scan_layers else end - start
      return jax.lax.scan(functools.partial(one_pass, *shared), carry, some,
                          unroll=unroll)

    # The passes without a gradient, and then those that have one.
    shared, parts = (params, inputs, ctx, lent), []
    free = self._passes_without_gradient(count)
    if free:
      carry, results = run(_stop_gradients(
        shared), _stop_gradients(carry), 0, free)
      carry = _stop_gradients(carry)
      parts.append(results)
    carry, results = run(shared, carry, free, count)
    parts.append(results)
    results = jax.tree.map(_flatten_passes, *parts)
    reports = [self._mean_loads(section, layer_report)
               for layer_report in results.reports]
    return carry, results.replace(reports=tuple(reports))

  def _passes_without_gradient(self, count: int) -> int:
    """Returns how many of the first of `count` passes have no gradient."""
    with_gradient = self.config.part(LoopsConfig).gradient_passes
    if not with_gradient:
      return 0
    return max(count - with_gradient, 0)

  def _mean_loads(self, section: Section, layer_report: Report) -> Report:
    """Returns a report of all passes with the mean load of experts over these,
    by which a bias moves, and with the whole path of that bias: the unbound
    module that made the report does not know where it stands."""
    root = '/'.join((*self.path, section.name))
    loads = {}
    for path, load_NE in layer_report.loads.items():
      by_pass = load_NE.reshape(section.passes, section.periods, -1)
      loads[f'{root}/{path}'] = by_pass.mean(0)
    return layer_report.replace(loads=loads)

  # Single tokens: the layers one after another.

  def _run_one_by_one(self, carry: Carry, cache: Any, ctx: Context
                  ) -> tuple[Carry, list[LayerResults]]:
    """Runs the layers period by period, as the program's own loop. `cache` has
    the slots of each period of each pass. The results of each have an axis of
    one period in front, but their caches, which are updated in place."""
    c, params = self.config, self.variables['params']
    entries = iter(cache)
    lent: dict[int, KeysAndValues] = {}
    outputs = []
    for section in self.sections:
      period = Period(
  c,
  section.kinds,
  self._places_lent_by_section(
    section.name),
     parent=None)
      inputs, _ = carry
      for n in range(section.periods * section.passes):
        pass_, row = divmod(n, section.periods)
        if self._is_looped(section) and row == 0:
          x, first = carry
          carry = passes.input_of_pass(c, params, x, inputs, pass_), first
        carry, results = period.apply(
            {'params': params[section.name][str(row)]}, carry, next(entries),
            ctx, lent)
        rows = jax.tree.map(lambda x: x[None], results.replace(caches=None))
        outputs.append(rows.replace(caches=results.caches))
      if section.name == 'prefix':
        lent = results.lent
    return carry, outputs


def find_cache_of_tokens(cache: Any) -> Optional[Cache]:
  """Returns one entry of a cache that holds tokens, all of which hold as many:
  [N / period, B, M, J, K], or [B, M, J, K] where the layers are apart. None: no
  entry does, as all are states, or there is no cache."""
  for entry in jax.tree.leaves(cache, is_leaf=is_cache):
    if is_cache(entry) and entry.key_BMJK is not None:
      return entry
  return None


def is_cache(x: Any) -> bool:
  return isinstance(x, Cache)


def _identity(x: jax.Array) -> jax.Array:
  return x


def _stop_gradients(tree: Any) -> Any:
  """Returns a tree of arrays without their gradient."""
  return jax.tree.map(jax.lax.stop_gradient, tree)


def _flatten_passes(*parts: jax.Array) -> jax.Array:
  """Returns [passes * periods, ...] of arrays [some passes, periods, ...]."""
  return jnp.concatenate(parts).reshape(-1, *parts[0].shape[2:])


def add_distances(c: ModelConfig, kind: LayerKind, ctx: Context,
                   k_positions_BM: jax.Array, after: str = '') -> Context:
  """Returns the context with what all layers of a stack have of distances.

  Args:
    c: the model.
    kind: a kind of layer of the stack, which says whether it is causal.
    ctx: the context, which says where the queries stand.
    k_positions_BM: where the keys stand.
    after: the end of the names of the encoding's modules in the stack.
  """
  encoding = positions.position_of(c)
  bias_BHLM, table_UD = None, None
  if encoding.stack_bias:
    bias = encoding.stack_bias(c, kind.causal, name=f'{c.position}_bias{after}')
    bias_BHLM = bias(ctx.positions_BL, k_positions_BM)
  if encoding.stack_table:
    table_UD = encoding.stack_table(c, name=f'{c.position}{after}')()
  distances = Distances(bias_BHLM=bias_BHLM, table_UD=table_UD)
  return ctx.replace(distances=distances)


# One period, and how its layers wait for their gradients.


class Period(nn.Module):
  """One period of the layer pattern.

  Attributes:
    config: the model.
    pattern: the layers.
    lends: the layers whose keys and values later periods read, by their place
      before the period's end: -1 is the last.
    in_loop: whether a loop goes over several periods. If they have one layer,
      its remat needs no barrier. Anywhere else XLA would keep what the forward
      pass has, or compute several layers again at once.
  """
  config: ModelConfig
  pattern: tuple[LayerKind, ...]
  lends: tuple[int, ...] = ()
  in_loop: bool = False

  @nn.compact
  def __call__(self,
  carry: Carry,
  cache: Optional[tuple[LayerCache,
  ...]],
  ctx: Context,
  lent: dict[int,
  KeysAndValues]) -> tuple[Any,
   LayerResults]:
    """Runs the layers one after another.

    Args:
      carry: what goes from layer to layer.
      cache: the entries of the layers; None: there is no cache.
      ctx: what the layers read besides their input.
      lent: keys and values of layers before the period, by how far before it
        they are: -1, ...

    Returns:
      The carry, and what the layers return beside it.
    """
    x, first = carry
    lent = dict(lent)
    end = len(self.pattern)
    # The layers whose keys and values another one reads, here or later.
    read = {kind.source for kind in self.pattern}
    read |= {end + place for place in self.lends}
    caches, reports, kept = [], [], []
    for i, kind in enumerate(self.pattern):
      shared = SharedArrays(
  first_values=first, keys=lent.get(
    kind.source), lends=i in read)
      entry = None if cache is None else cache[i]
      x, entry, layer_report = self._run_layer(
          i, kind, x, ctx.replace(shared=shared), entry)
      # Arrays that later layers read go with the carry, not into the report.
      if layer_report.first_values is not None:
        first = layer_report.first_values
      if layer_report.keys is not None:
        lent[i] = layer_report.keys
      caches.append(entry)
      reports.append(layer_report.replace(first_values=None, keys=None))
      kept.append(x if ctx.keep_layers else ())
    return (x, first), LayerResults(
        caches=None if cache is None else tuple(caches),
        reports=tuple(reports), kept=tuple(kept),
        lent={place: lent[end + place] for place in self.lends})

  def _run_layer(self,
  i: int,
  kind: LayerKind,
  x: streams.LayerInput,
  ctx: Context,
  cache: Optional[LayerCache] ) -> tuple[streams.LayerInput,
  Optional[LayerCache],
   Report]:
    """Runs layer i of the period. On several devices its gradient waits for
    that of its weights, unless it is the first one of an iteration of a loop,
    whose end waits for all gradients."""
    config = self.config.of_kind(kind.name)
    alone_in_loop = self.in_loop and len(self.pattern) == 1
    block = layers.apply_remat(
        BLOCKS[config.block], config, prevent_cse=not alone_in_loop)
    name = f'block_{i}'
    make = functools.partial(block, config, kind, name=name)
    starts_iteration = self.in_loop and i == 0
    if (sharding.count_devices() == 1 or self.is_initializing()
        or starts_iteration):
      return make()(x, ctx, cache)
    return self._run_after_weight_gradients(name, make, x, ctx, cache)

  def _run_after_weight_gradients(self,
  name: str,
  make: Callable[[],
  nn.Module],
  x: streams.LayerInput,
  ctx: Context,
  cache: Optional[LayerCache] ) -> tuple[streams.LayerInput,
  Optional[LayerCache],
   Report]:
    """Returns make()(x, ctx, cache), where `make` makes the layer `name`.

    The order of the forward pass is unchanged. In the backward pass the layer's
    gradient goes on to the layer before it only when the gradients of its
    weights are there, each of them in its shards: x and the weights go through
    one barrier, before the layer reads them.

    XLA's scheduler may otherwise put off the sums over the devices, and then
    several layers have whole gradients at once. In a loop it cannot: the end of
    an iteration needs them.
    """
    x, weights = _tie_gradients(x, self.get_variable('params', name))

    def with_tied(variables: Any) -> dict:
      """Returns the period's parameters, those of the layer behind the barrier.
      """
      return {'params': {**variables['params'], name: weights}}

    def run_layer(period: nn.Module):
      del period  # the parent of what `make` makes
      return make()(x, ctx, cache)

    return nn.map_variables(run_layer, 'params', with_tied)(self)


@jax.custom_vjp
def _tie_gradients(x: streams.LayerInput,
                   params: Any) -> tuple[streams.LayerInput, Any]:
  """Returns both as they are; their gradients wait for one another."""
  return x, params


def _tie_gradients_fwd(x: streams.LayerInput, params: Any):
  return (x, params), None


def _tie_gradients_bwd(_, gradients: tuple[streams.LayerInput, Any]):
  return jax.lax.optimization_barrier(gradients)


_tie_gradients.defvjp(_tie_gradients_fwd, _tie_gradients_bwd)


class Scanned(Period):
  """A period as the body of a scan.

  The slots of all periods go from one to the next with the carry, and each
  writes its own, those of place `n`, where they lie. If a scan were given the
  slots period by period and returned them, XLA would copy all of them for each
  token.
  """

  def __call__(self, carry: tuple[Carry, SlotsOfEntries],
               xs: tuple[Optional[jax.Array], Any], ctx: Context,
               lent: dict[int, KeysAndValues]) -> tuple[Any, LayerResults]:
    """Runs the period.

    Args:
      carry: what goes from layer to layer, and the slots of all periods.
      xs: the period's number n, and what else its entries of the cache hold.
      ctx: what the layers read besides their input.
      lent: keys and values of layers of the sections before.
    """
    carry, slots = carry
    n, rest = xs
    if slots is None:
      carry, results = super().__call__(carry, None, ctx, lent)
      return (carry, None), results
    cache = put_slots_back(slots, rest, n)
    carry, results = super().__call__(carry, cache, ctx, lent)
    slots, rest = split_off_slots(results.caches)
    return (carry, slots), results.replace(caches=rest)
