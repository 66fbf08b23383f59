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

from collections.abc import Callable, Iterator
import dataclasses
import functools
import itertools
import operator
from typing import Any, NamedTuple, Optional

from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers, lookup, passes, positions, sharding
from architectures.parts import streams
from architectures.parts.attention import steps
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.blocks import BLOCKS, begin_residual, EndOfResidual
from architectures.parts.cache import Cache, LayerCache, put_slots_back
from architectures.parts.cache import SlotsOfEntries, split_off_slots
from architectures.parts.config import LayerKind, ModelConfig, Section
from architectures.parts.context import Context, Distances, FirstLayerValues
from architectures.parts.context import KeysAndValues, Report, SharedArrays
from architectures.parts.loops import LoopsConfig
from architectures.parts.moe.layer import zero_router_state
from architectures.parts.streams import LayerInput
from common.errors import require


@struct.dataclass
class PassedOn:
  """The arrays that each layer passes on to the next, beside the residual
  stream. None stands for those that the model does not have.

  Attributes:
    first_values: the values of the first layer (model.value_residual).
    router_BLU: the state of the last router, 0 at first (moe.router_dim).
    skips: the results of the first half of the layers, on their way to the
      second half (model.skips).
  """
  first_values: Optional[FirstLayerValues] = None
  router_BLU: Optional[jax.Array] = None
  skips: Optional[streams.Skips] = None

  def after_layer(self, x: LayerInput, report: Report) -> 'PassedOn':
    """Returns these arrays with those that a layer has changed.

    The suffixes name axes: B batch, L length, U features of the state that
    routers pass on.

    Args:
      x: the residual stream after the layer.
      report: the report of the layer, which has its first values and the state
        of its router, where it computed any.
    """
    passed = self
    if report.first_values is not None:
      passed = passed.replace(first_values=report.first_values)
    if report.router_BLU is not None:
      passed = passed.replace(router_BLU=report.router_BLU)
    if passed.skips is not None:
      passed = passed.replace(skips=streams.write_skip(x, passed.skips))
    return passed


# The names of the random keys from which layers draw. Each run of a layer draws
# other numbers.
NAMES_OF_DRAWS = ('dropout', 'router')


class Carry(NamedTuple):
  """The state that goes from layer to layer.

  Attributes:
    x: the residual stream, [B, L, D] = [batch, length, d_model], or Streams,
      which are several.
    passed: what else each layer passes on to the next.
  """
  x: LayerInput
  passed: PassedOn


class ScanCarry(NamedTuple):
  """The state that goes from turn to turn of a scan over layers.

  Attributes:
    layers: the state that goes from layer to layer.
    slots: the cached keys and values of the layers of all turns, of which each
      turn writes its own; None: there is no cache.
  """
  layers: Carry
  slots: SlotsOfEntries

  def with_x(self, x: LayerInput) -> 'ScanCarry':
    """Returns the state with another residual stream."""
    return self._replace(layers=self.layers._replace(x=x))


class GivenToPeriod(NamedTuple):
  """The arguments that one period of layers alone is given. A scan over the
  periods takes them from arrays with an axis of periods in front.

  Attributes:
    row: the row of the slots that is the period's own; None: there is no cache.
    other_cache: what the caches of its layers hold beside their slots; None:
      there is no cache.
  """
  row: Optional[jax.Array]
  other_cache: Any


class SharedByPasses(NamedTuple):
  """The arguments that all passes over layers that loop have in common.

  Attributes:
    params: the parameters of the stack.
    inputs: the input of the first pass, which later ones may read again.
    ctx: what the layers read besides their input.
    lent: keys and values of layers of the sections before, by how far before
      the section their layer is: -1, ...
  """
  params: Any
  inputs: LayerInput
  ctx: Context
  lent: dict[int, KeysAndValues]


class GivenToPass(NamedTuple):
  """The arguments that one pass alone is given. A scan over the passes takes
  them from arrays with an axis of passes in front.

  Attributes:
    n: the number of the pass, from 0 on.
    other_cache: what the caches of its layers hold beside their slots, with an
      axis of periods in front; None: there is no cache.
    rngs: its random keys, by the name of what they are for.
  """
  n: jax.Array
  other_cache: Any
  rngs: dict[str, jax.Array]


@struct.dataclass
class LayerResults:
  """The results of the layers of a period beside x, in their order.

  Attributes:
    caches: their entries of the cache; None: no cache went in.
    reports: their reports.
    kept: with context.keep_layers, x after each of them; () without it.
    lent: keys and values that later periods read, by how far before the end of
      the period their layer is: -1, ...
    states: with loops.exit_gate, x after each pass; None in other sections.
  """
  caches: Optional[tuple[LayerCache, ...]]
  reports: tuple[Report, ...]
  kept: tuple[Any, ...]
  lent: dict[int, KeysAndValues]
  states: Any = None


class Stack(nn.Module):
  """num_layers layers, then the final norm where the wiring needs one."""
  config: ModelConfig
  sections: tuple[Section, ...]

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Any = None,
               one_by_one: bool = False
               ) -> tuple[jax.Array, Any, dict[str, Any]]:
    """Runs all layers, and the final norm.

    Args:
      x_BLD: the embedding of the tokens.
      ctx: what the layers read besides their input.
      cache: the entries of all layers; None: there is no cache.
      one_by_one: whether the layers follow one another in the program, as a
        scan may copy the weights of each. Parameters and cache are then those
        that skeletons.unstack_layers returns. Both ways update slots in place.

    Returns:
      The result, [B, L, D]; the cache with the tokens in it; and what the
      layers report, by name: see skeletons.Output.aux.
    """
    config = self.config
    # The layers.
    ctx = self._complete_context(x_BLD, ctx, cache)
    kinds = self._layer_kinds()
    carry = self._begin_carry(x_BLD, kinds)
    if one_by_one:
      carry, sections = self._run_one_by_one(carry, cache, ctx)
    else:
      carry, sections = self._scan_sections(carry, cache, ctx)

    # The streams end in one, which is normalised. If the length stayed over
    # `tensor`, as the vocabulary is, their product would gather the head.
    x = carry.x
    end_streams = EndOfResidual(config, name='final_streams')
    final_norm = self._final_norm(kinds[-1])
    y_BLD = sharding.constrain(
        final_norm(end_streams(x)), 'batch', 'length', 'embed')

    # The reports of the layers.
    reports = [section.reports for section in sections]
    aux = gather_figures(reports) | gather_attention_weights(reports)

    # With an exit gate, each token takes the result of one of the passes. The
    # loss of training is that of all passes.
    loops = config.find_part(LoopsConfig)
    if loops is not None and loops.exit_gate:
      states_TBLD = final_norm(self._states_of_passes(sections, x))
      log_p_TBL = passes.ExitGate(config, name='exit')(states_TBLD)
      y_BLD = passes.take_exits(config, states_TBLD, log_p_TBL)
      if not ctx.deterministic:
        aux['exits'] = states_TBLD, log_p_TBL

    # The input of the first layer, and the result of each.
    if ctx.keep_layers:
      kept = []
      for section in sections:
        kept.append([end_streams(x) for x in section.kept])
      layers_NBLD = jnp.concatenate([x_BLD[None], stack_by_layer(kept)])
      aux['layers'] = layers_NBLD
      aux['readouts'] = final_norm(layers_NBLD)

    # The cache. A scan returns a tuple of entries for each section.
    if cache is None:
      return y_BLD, None, aux
    caches = [section.caches for section in sections]
    if one_by_one:
      return y_BLD, caches, aux
    return y_BLD, sum(caches, ()), aux

  def _begin_carry(self, x_BLD: jax.Array, kinds: tuple[LayerKind, ...]
                   ) -> Carry:
    """Returns the state that the first layer is given: the residual stream, and
    empty places for what the layers pass on to one another.

    The suffixes name axes: B batch, L length, D d_model, U features of the
    state that routers pass on.

    Args:
      x_BLD: the embedding of the tokens, [batch, length, d_model].
      kinds: the kind of each layer.
    """
    config = self.config
    x = begin_residual(config, x_BLD, kinds)
    skips = None
    if config.skips:
      skips = streams.begin_skips(self, x_BLD, num_layers=len(kinds))
    router_BLU = None
    if config.has_experts:
      router_BLU = zero_router_state(config, x_BLD)
    passed = PassedOn(first_values=self._first_values(x_BLD),
                      router_BLU=router_BLU, skips=skips)
    return Carry(x=x, passed=passed)

  def _states_of_passes(self, sections: list[LayerResults], x: LayerInput
                        ) -> jax.Array:
    """Returns the result of each pass over the layers that loop, [passes, B, L,
    D].

    Args:
      sections: the results of all sections. Those of the section that loops
        have `states`, x after each pass.
      x: the result of the last layer. Where parameters are declared, a single
        pass is run, and this is its result.
    """
    if self.is_initializing():
      return x[None]
    states = [section.states.reshape(-1, *x.shape) for section in sections
              if section.states is not None]
    return jnp.concatenate(states)

  def _layer_kinds(self) -> tuple[LayerKind, ...]:
    """Returns the kind of each layer that a token goes through, in order."""
    kinds = []
    for section in self.sections:
      kinds += section.layers
    return tuple(kinds)

  def _final_norm(self, last_kind: LayerKind
                  ) -> Callable[[jax.Array], jax.Array]:
    """Returns the norm after the last layer or, where the wiring of that layer
    needs none, the identity."""
    config = self.config
    if BLOCKS[config.layer_config(last_kind.name).block].FINAL_NORM:
      return layers.norm(config, 'final_norm')
    return _identity

  def _complete_context(self, x_BLD: jax.Array, ctx: Context, cache: Any
                        ) -> Context:
    """Adds to the context of a call what is computed once for all layers of the
    stack.

    The suffixes name axes: B batch, L length, D d_model, M keys.

    Args:
      x_BLD: the embedding of the tokens.
      ctx: the context of the call.
      cache: the cache of all layers; None: there is none.

    Returns:
      The context with more fields: `lengths_B`, the number of tokens of each
      row so far, if there is a cache; `distances`, if the position encoding is
      relative; `embedded_BLD` and `row_scale_S`, if some layer reads them.
    """
    config = self.config
    # The keys are those of this call or, with a cache, all of its slots. Slot m
    # is for the token at position m. The mask of attention hides slots that are
    # not filled yet.
    k_positions_BM = ctx.positions_BL
    cache_of_tokens = find_cache_of_tokens(cache)
    if cache_of_tokens is not None:
      k_positions_BM = jnp.arange(cache_of_tokens.num_slots)[None]
    # With a cache, a row has as many tokens as the last position says.
    if cache is not None and ctx.lengths_B is None:
      ctx = ctx.replace(lengths_B=ctx.positions_BL[:, -1] + 1)
    # All layers of a stack are causal, or none is, so the first one tells.
    first_kind = self.sections[0].kinds[0]
    ctx = add_distances(
        config, kind=first_kind, ctx=ctx, k_positions_BM=k_positions_BM)
    for layer in config.distinct_layers:
      if layer.memory != 'per_layer':
        continue
      size = layer.part(lookup.PerLayerConfig).size
      row_scale_S = lookup.ScaleOfRows(config, name='memory_norm')(size)
      return ctx.replace(embedded_BLD=x_BLD, row_scale_S=row_scale_S)
    return ctx

  def _first_values(self, x_BLD: jax.Array) -> Optional[FirstLayerValues]:
    """Returns an empty place for the values of the first layer, which later
    layers read with model.value_residual; None: they do not."""
    config = self.config
    attention = config.find_part(AttentionConfig)
    if attention is None or not attention.value_residual:
      return None
    layers_of_attention = [layer for layer in config.distinct_layers
                           if layer.mixer == 'attention']
    return steps.zero_first_values(layers_of_attention[0], x_BLD)

  # A scan over periods, section by section.

  def _scan_sections(self, carry: Carry, cache: Any, ctx: Context
                     ) -> tuple[Carry, list[LayerResults]]:
    """Runs all layers of the stack, section by section. A section is the
    prefix, the repeated pattern or the suffix of the layers. It is run as a
    scan over its periods; a period is one repetition of the pattern.

    Args:
      carry: what goes from layer to layer: the residual stream, and what else
        each layer passes on.
      cache: the caches of all layers, section by section; None: there is no
        cache.
      ctx: what the layers read besides their input.

    Returns:
      The carry after the last layer, and the LayerResults of each section,
      whose arrays have an axis of periods in front.
    """
    # The caches of a layer are stacked over the periods. So each section takes
    # from the iterator as many as it has layers in one period.
    entries = iter(cache or ())
    lent: dict[int, KeysAndValues] = {}
    results_of_sections = []
    for section in self.sections:
      section_cache = None
      if cache is not None:
        section_cache = tuple(itertools.islice(entries, len(section.kinds)))
      carry, results = self._run_section(
          section, carry=carry, cache=section_cache, ctx=ctx, lent=lent)
      # Layers of later sections may read keys and values of this one. It is the
      # prefix, which has a single period, so the axis of periods is dropped.
      lent = jax.tree.map(operator.itemgetter(0), results.lent)
      results_of_sections.append(results)
    return carry, results_of_sections

  def _run_section(self, section: Section, carry: Carry,
                   cache: Optional[tuple[LayerCache, ...]], ctx: Context,
                   lent: dict[int, KeysAndValues]
                   ) -> tuple[Carry, LayerResults]:
    """Runs the layers of one section (the prefix, the repeated pattern or the
    suffix): all periods of its pattern and, if the model runs layers several
    times, all passes over them.

    The keys and values of the cache, its slots, are a part of the carry, so
    that they are updated in place. What else the cache holds is given to the
    periods one by one.

    Args:
      section: the section.
      carry: what goes from layer to layer.
      cache: the caches of its layers; None: there is no cache.
      ctx: what the layers read besides their input.
      lent: keys and values of earlier layers that layers of this section read,
        by how far before the section those layers are: -1, -2, ...

    Returns:
      The carry after the section, and the LayerResults, whose arrays have an
      axis of periods in front ([passes * periods] of layers that loop).
    """
    slots, other_cache, row_N = None, None, None
    if cache is not None:
      slots, other_cache = split_off_slots(cache)
      row_N = jnp.arange(section.periods)
    scan_carry = ScanCarry(layers=carry, slots=slots)

    # One scan over the periods, or one for each pass. A model whose parameters
    # are being declared runs a single pass, since all passes share them.
    is_looped = self._is_looped(section)
    if is_looped and not self.is_initializing():
      run_loop = self._run_passes
      if self.config.loop == 'turns':
        run_loop = self._scan_turns
      scan_carry, results = run_loop(
          section, carry=scan_carry, other_cache=other_cache, ctx=ctx,
          lent=lent)
    else:
      periods = self._scanned_periods(section, name=section.name)
      scan_carry, results = periods(
          scan_carry, GivenToPeriod(row=row_N, other_cache=other_cache), ctx,
          lent)

    # That single pass does not use the parameters that mix the input of a pass,
    # so these are declared here.
    carry = scan_carry.layers
    if is_looped and self.is_initializing():
      passes.Enter(self.config, name='loop')(carry.x, carry.x, 0)
    if cache is None:
      return carry, results
    caches = put_slots_back(scan_carry.slots, results.caches)
    return carry, results.replace(caches=caches)

  def _scanned_periods(self, section: Section, **module_options: Any
                       ) -> nn.Module:
    """Makes the module that runs the periods of a section as one scan. Its
    parameters are stacked over the periods along their first axis.

    Args:
      section: the section (the prefix, the repeated pattern or the suffix). A
        period is one repetition of its pattern.
      **module_options: `name`, its name in the stack, or parent=None, which
        leaves it unbound.
    """
    config = self.config
    # Flax can check what is constant in a scan by tracing its body a second
    # time. This must stay on where layers draw random numbers: the second trace
    # counts as draws too, so without it the same seed would draw other numbers.
    draws_numbers = any(map(self.has_rng, ('params', 'dropout', 'router')))
    draws_numbers = draws_numbers and not self.has_rng(sharding.SHAPES_ALONE)
    scanned = nn.scan(
        Scanned, variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True, 'router': True,
                    sharding.SHAPES_ALONE: False},
        in_axes=(0, nn.broadcast, nn.broadcast), length=section.periods,
        unroll=1 if config.scan_layers else section.periods,
        check_constancy_invariants=draws_numbers,
        metadata_params={nn.PARTITION_NAME: 'layers'})
    # A scan of one turn is no loop: XLA writes its body out.
    has_several_periods = section.runs > 1
    return scanned(
        config=config, pattern=section.kinds,
        lends=self._places_lent_by_section(section.name),
        in_loop=config.scan_layers and has_several_periods, **module_options)

  def _places_lent_by_section(self, section_name: str) -> tuple[int, ...]:
    """Returns which layers of a section (the prefix, the repeated pattern or
    the suffix) lend their keys and values to layers of later sections.

    Args:
      section_name: the name of the section. Only layers of the prefix lend.

    Returns:
      The lenders in ascending order, counted from the end of the section: -1 is
      its last layer. () if there are none.
    """
    if section_name != 'prefix':
      return ()
    # A source below 0 is counted back from the start of the reader's section,
    # which is the end of the prefix.
    places = set()
    for section in self.sections:
      for kind in section.kinds:
        if kind.source is not None and kind.source < 0:
          places.add(kind.source)
    return tuple(sorted(places))

  # Layers that loop.

  def _is_looped(self, section: Section) -> bool:
    """Returns whether the layers of a section are run several times, with
    model.loop: those between the prefix and the suffix are."""
    return self.config.loop != 'none' and section.name == 'layers'

  def _run_passes(self, section: Section, carry: ScanCarry, other_cache: Any,
                  ctx: Context, lent: dict[int, KeysAndValues]
                  ) -> tuple[ScanCarry, LayerResults]:
    """Runs all passes over a section whose layers are run several times, in a
    scan over the passes.

    All passes read the same parameters, so the periods are an unbound module
    that each pass applies. The first passes may have no gradient: then the scan
    is two, and the first one reads nothing that has a gradient.

    Args:
      section: the section.
      carry: what goes from layer to layer, and the slots of the cache.
      other_cache: what else its entries of the cache hold; None: no cache.
      ctx: what the layers read besides their input.
      lent: keys and values of layers of the sections before.

    Returns:
      The carry, and the results of all passes with those of a pass side by
      side: [passes * periods, ...].
    """
    num_passes, num_periods = section.passes, section.periods
    run_pass = functools.partial(
        _run_pass, config=self.config, section=section,
        periods=self._scanned_periods(section, parent=None))
    shared = SharedByPasses(params=self.variables['params'],
                            inputs=carry.layers.x, ctx=ctx, lent=lent)

    # The arrays of which each pass is given its own row.
    rngs = self._split_keys(num_passes)
    rows_by_pass = jax.tree.map(
        lambda x: x.reshape(num_passes, num_periods, *x.shape[1:]), other_cache)
    given = GivenToPass(n=jnp.arange(num_passes), other_cache=rows_by_pass,
                        rngs=rngs)

    # The passes without a gradient, and then those that have one.
    results_of_scans = []
    num_without_gradient = self._passes_without_gradient(num_passes)
    if num_without_gradient:
      run_without_gradient = functools.partial(
          run_pass, shared=_stop_gradients(shared))
      carry, results = self._scan_passes(
          run_without_gradient, carry=_stop_gradients(carry), given=given,
          start=0, end=num_without_gradient)
      carry = _stop_gradients(carry)
      results_of_scans.append(results)
    carry, results = self._scan_passes(
        functools.partial(run_pass, shared=shared), carry=carry, given=given,
        start=num_without_gradient, end=num_passes)
    results_of_scans.append(results)

    results = jax.tree.map(_flatten_passes, *results_of_scans)
    return carry, self._average_loads(section, results)

  def _split_keys(self, num_parts: int) -> dict[str, jax.Array]:
    """Returns a random key for each of several runs of the same layers, in an
    array with that axis, by the name of what the key is for."""
    return {name: jax.random.split(self.make_rng(name), num_parts)
            for name in NAMES_OF_DRAWS if self.has_rng(name)}

  def _scan_passes(
      self,
      run_pass: Callable[[ScanCarry, GivenToPass],
                         tuple[ScanCarry, LayerResults]],
      carry: ScanCarry, given: GivenToPass, start: int, end: int
      ) -> tuple[ScanCarry, LayerResults]:
    """Runs some of the passes over the layers, one after another, as one scan
    (jax.lax.scan): those from number `start` to before number `end`.

    Args:
      run_pass: the function of one pass. It takes the carry and the inputs of
        this pass, and returns the carry and the results of the pass.
      carry: the carry before the first of these passes.
      given: the inputs of all passes of the model, such as caches. Each array
        has an axis of passes in front.
      start: the number of the first pass.
      end: the number after that of the last pass.

    Returns:
      The carry after the last of them, and their results, with an axis of
      passes in front.
    """
    given_to_these = _rows(given, start, end)
    # A scan that is unrolled as often as it runs is no loop any more. Programs
    # without loops take longer to compile and may run faster.
    unroll = 1
    if not self.config.scan_layers:
      unroll = end - start
    return jax.lax.scan(run_pass, carry, given_to_these, unroll=unroll)

  def _passes_without_gradient(self, num_passes: int) -> int:
    """Returns how many passes, from the first on, have no gradient: all but the
    last loops.gradient_passes; none, if that is 0."""
    num_with_gradient = self.config.part(LoopsConfig).gradient_passes
    if num_with_gradient == 0:
      return 0
    return max(num_passes - num_with_gradient, 0)

  def _take_turns(
      self, carry: ScanCarry,
      run_half: Callable[[int, passes.Turn, ScanCarry], ScanCarry]
      ) -> ScanCarry:
    """Runs the two halves of the layers that loop in turns (HRM: Wang et al.
    2025, arXiv 2506.21734; passes.Turns). The states of the halves are z_L = 0
    and z_H = x at first, and each turn is one of

      z_L = norm_L(lower(z_L + z_H)),   z_H = norm_H(upper(z_H + z_L))

    where there are norms if loops.boundary is 'norm'. The last turn is one of
    the upper half.

    The turns follow one another in the program, not in a scan, because some
    have no gradient. Such a turn reads constants, and what it returns is a
    constant: this is what `detach` does. A state itself keeps its gradient for
    the later turns that read it.

    Args:
      carry: the input x of the layers that loop, what else goes from layer to
        layer, and the slots of the cache.
      run_half: the function that runs the layers of the half whose turn it is,
        (number of the turn, the Turn, carry) -> carry. The x of its carry is
        the input of the half, and then its result.

    Returns:
      The carry, whose x is the last z_H before its norm, as that is the final
      norm of the stack.
    """
    config, params = self.config, self.variables['params']
    z_high = carry.layers.x
    z_low = jnp.zeros_like(z_high)
    turns = passes.list_turns(config.part(LoopsConfig))
    for n, turn in enumerate(turns):
      detach = _identity
      if not turn.has_gradient:
        detach = _stop_gradients

      # Run the half on the sum of both states.
      params_of_turn = detach(params)
      input_of_half = passes.input_of_pass(
          config, params=params_of_turn, state=detach(z_low),
          inputs=detach(z_high), n=n)
      carry = run_half(n, turn, detach(carry.with_x(input_of_half)))
      carry = detach(carry)

      # Its result, after a norm, is the new state of the half.
      is_last = n == len(turns) - 1
      if is_last:
        break
      new_state = detach(passes.normalise_between_passes(
          config, params_of_turn, state=carry.layers.x,
          is_low=not turn.is_high))
      if turn.is_high:
        z_high = new_state
      else:
        z_low = new_state
    return carry

  def _scan_turns(self, section: Section, carry: ScanCarry, other_cache: Any,
                  ctx: Context, lent: dict[int, KeysAndValues]
                  ) -> tuple[ScanCarry, LayerResults]:
    """Runs a section whose two halves take turns, each turn as a scan over the
    periods of its half.

    Args:
      section: the section. The lower half of its periods is one stack of
        layers, and the upper half the other.
      carry: what goes from layer to layer, and the slots of the cache.
      other_cache: what else its entries of the cache hold; None: no cache.
      ctx: what the layers read besides their input.
      lent: keys and values of layers of the sections before.

    Returns:
      The carry, and the results of all turns with those of a turn side by side:
      [turns * periods of a half, ...].
    """
    periods_of_half = section.periods // 2
    num_turns = section.runs // periods_of_half
    half = section._replace(periods=periods_of_half)
    halves = ScannedHalves(
        periods=self._scanned_periods(half, parent=None), size=periods_of_half,
        params=self.variables['params'][section.name], other_cache=other_cache,
        ctx=ctx, lent=lent, rngs=self._split_keys(num_turns))
    carry = self._take_turns(carry, halves.run_half)
    results = jax.tree.map(_concatenate, *halves.results)
    return carry, self._average_loads(section, results)

  def _average_loads(self, section: Section, results: LayerResults
                     ) -> LayerResults:
    """Averages the loads of experts over the passes, in a model that runs its
    layers several times with the same weights.

    A load is the share of tokens that each expert got. The training step moves
    a bias of the router by it, and all passes share the bias.

    The suffixes name axes: N runs of a period, E experts.

    Args:
      section: the section of the layers (the prefix, the repeated pattern or
        the suffix).
      results: the results of all passes. The loads in their reports are
        [passes * periods, experts], by the path of the bias inside the section.

    Returns:
      The results with loads [periods, experts], by the whole path of the bias
      in the model. The module that made the reports did not know this path,
      because it was not bound to the model.
    """
    path_of_section = '/'.join((*self.path, section.name))
    reports = []
    for report in results.reports:
      loads = {}
      for path, load_NE in report.loads.items():
        whole_path = f'{path_of_section}/{path}'
        loads[whole_path] = self._mean_of_runs(section, load_NE)
      reports.append(report.replace(loads=loads))
    return results.replace(reports=tuple(reports))

  def _mean_of_runs(self, section: Section, x_NE: jax.Array) -> jax.Array:
    """Returns the mean over the runs of each period of layers.

    The suffixes name axes: N runs of periods, E experts.

    Args:
      section: the section of layers, whose periods are run several times.
      x_NE: a row for each run of a period, in the order of the runs.

    Returns:
      A row for each period, [periods, E].
    """
    loops = self.config.part(LoopsConfig)
    if not loops.low_cycles:
      by_pass = x_NE.reshape(section.passes, section.periods, -1)
      return by_pass.mean(0)
    # Two stacks take turns. In a pass the lower half of the periods is run
    # low_cycles times, and then the upper half once.
    half = section.periods // 2
    turns_of_pass = loops.low_cycles + 1
    by_turn = x_NE.reshape(section.passes, turns_of_pass, half, -1)
    low_mean = by_turn[:, :-1].mean((0, 1))
    high_mean = by_turn[:, -1].mean(0)
    return jnp.concatenate([low_mean, high_mean])

  # Single tokens: the layers one after another.

  def _run_one_by_one(self, carry: Carry, cache: Any, ctx: Context
                      ) -> tuple[Carry, list[LayerResults]]:
    """Runs all layers by a Python loop, so that each layer is a part of the
    program by itself. This is fast where text is generated token by token.

    The loop goes over the sections (the prefix, the repeated pattern, the
    suffix), the passes over a section, and its periods, which are the
    repetitions of its pattern.

    Args:
      carry: what goes from layer to layer.
      cache: the caches of each period of each pass, in order.
      ctx: what the layers read besides their input.

    Returns:
      The carry after the last layer, and the LayerResults of each period. Their
      arrays have an axis of one period in front, as a scan's would have; their
      caches do not, so that they are updated in place.
    """
    entries = iter(cache)
    lent: dict[int, KeysAndValues] = {}
    results_of_periods = []
    for section in self.sections:
      carry, results_of_section = self._run_section_one_by_one(
          section, carry=carry, entries=entries, ctx=ctx, lent=lent)
      for results in results_of_section:
        with_axis = jax.tree.map(
            lambda x: x[None], results.replace(caches=None))
        results_of_periods.append(with_axis.replace(caches=results.caches))
      # The prefix alone lends keys and values, to all sections after it.
      if section.name == 'prefix':
        lent = results_of_section[-1].lent
    return carry, results_of_periods

  def _run_section_one_by_one(
      self, section: Section, carry: Carry,
      entries: Iterator[tuple[LayerCache, ...]], ctx: Context,
      lent: dict[int, KeysAndValues]) -> tuple[Carry, list[LayerResults]]:
    """Runs the periods of a section by a Python loop, all passes over them or
    all turns of their halves.

    Args:
      section: the section.
      carry: what goes from layer to layer.
      entries: the caches of each period of each pass, of which it takes its
        own.
      ctx: what the layers read besides their input.
      lent: keys and values of layers of the sections before.

    Returns:
      The carry after the section, and the LayerResults of each run of a period.
    """
    config = self.config
    lends = self._places_lent_by_section(section.name)
    period = Period(config, pattern=section.kinds, lends=lends, parent=None)
    runner = PeriodsOneByOne(
        period=period, num_periods=section.periods,
        params=self.variables['params'][section.name], entries=entries, ctx=ctx,
        lent=lent)
    if not self._is_looped(section):
      carry = runner.run_all(carry)
    elif config.loop == 'turns':
      scan_carry = ScanCarry(layers=carry, slots=None)
      carry = self._take_turns(scan_carry, runner.run_half).layers
    else:
      carry = self._run_passes_one_by_one(section.passes, carry, runner)
    return carry, runner.results

  def _run_passes_one_by_one(self, num_passes: int, carry: Carry,
                             runner: 'PeriodsOneByOne') -> Carry:
    """Runs several passes over the periods of a section by a Python loop.

    A pass begins with a mixture of the last result and the first input.

    Args:
      num_passes: the number of passes.
      carry: what goes from layer to layer, before the first pass.
      runner: what runs the periods and keeps their results. With an exit gate,
        the last result of each pass gets x after the pass.

    Returns:
      The carry after the last pass.
    """
    config = self.config
    first_input = carry.x
    for n in range(num_passes):
      input_of_pass = passes.input_of_pass(
          config, params=self.variables['params'], state=carry.x,
          inputs=first_input, n=n)
      carry = runner.run_all(carry._replace(x=input_of_pass))
      if config.part(LoopsConfig).exit_gate:
        last_results = runner.results[-1]
        runner.results[-1] = last_results.replace(states=carry.x)
    return carry


def _run_pass(carry: ScanCarry, given: GivenToPass, config: ModelConfig,
              section: Section, periods: nn.Module, shared: SharedByPasses
              ) -> tuple[ScanCarry, LayerResults]:
  """Runs one pass over layers that are run several times, as one turn of a scan
  over the passes.

  The suffix N names the axis of the periods.

  Args:
    carry: what goes from layer to layer, and the slots (the cached keys and
      values) of all passes.
    given: what this pass alone is given.
    config: the model.
    section: the section of these layers.
    periods: the unbound module that runs all periods of the section, each a
      repetition of its pattern of layers.
    shared: what all passes are given alike.

  Returns:
    The carry after the pass, and the LayerResults of its periods.
  """
  # Make the input of the pass of the last result and the first input.
  x = passes.input_of_pass(config, params=shared.params, state=carry.layers.x,
                           inputs=shared.inputs, n=given.n)

  # The slots have a row for each period of each pass, pass after pass.
  row_N = None
  if carry.slots is not None:
    first_row = given.n * section.periods
    row_N = first_row + jnp.arange(section.periods)
  given_to_periods = GivenToPeriod(row=row_N, other_cache=given.other_cache)
  carry, results = periods.apply(
      {'params': shared.params[section.name]}, carry.with_x(x),
      given_to_periods, shared.ctx, shared.lent, rngs=given.rngs)
  if config.part(LoopsConfig).exit_gate:
    results = results.replace(states=carry.layers.x)
  return carry, results


@dataclasses.dataclass
class ScannedHalves:
  """The two halves of a section that take turns (passes.Turns), each run as a
  scan over its periods of layers. The results of all turns are kept.

  Attributes:
    periods: the unbound module that runs the periods of one half.
    size: the number of periods of a half.
    params: the parameters of both halves, with an axis of 2 * size periods in
      front. The lower half comes first.
    other_cache: what the caches hold beside their slots, with a row for each
      period of each turn, turn after turn; None: there is no cache.
    ctx: what the layers read besides their input.
    lent: keys and values of layers of the sections before.
    rngs: the random keys of each turn, by the name of what they are for.
    results: the LayerResults of the turns so far.
  """
  periods: nn.Module
  size: int
  params: Any
  other_cache: Any
  ctx: Context
  lent: dict[int, KeysAndValues]
  rngs: dict[str, jax.Array]
  results: list[LayerResults] = dataclasses.field(default_factory=list)

  def run_half(self, n: int, turn: passes.Turn, carry: ScanCarry) -> ScanCarry:
    """Runs the layers of the half whose turn it is, as a scan over the periods
    (repetitions of the pattern of layers) of the half.

    Args:
      n: the number of the turn, from 0 on. Each turn has rows of its own in the
        cache, turn after turn.
      turn: which half it runs, the lower or the upper one, and whether it has a
        gradient.
      carry: the input of the half, what else goes from layer to layer, and the
        slots (the cached keys and values) of all turns.

    Returns:
      The carry after the half.
    """
    # The parameters of the half. Without a gradient, they are constants, as is
    # everything else that the layers read.
    params_of_half = _rows(self.params, start=0, stop=self.size)
    if turn.is_high:
      params_of_half = _rows(
          self.params, start=self.size, stop=2 * self.size)
    params, ctx, lent = params_of_half, self.ctx, self.lent
    if not turn.has_gradient:
      params = _stop_gradients(params)
      ctx = _stop_gradients(ctx)
      lent = _stop_gradients(lent)

    # The rows of the cache that are the turn's own, and its random keys.
    start = n * self.size
    stop = start + self.size
    row_N = None
    if carry.slots is not None:
      row_N = jnp.arange(start, stop)
    given = GivenToPeriod(
        row=row_N, other_cache=_rows(self.other_cache, start, stop))
    rngs_of_turn = {name: keys[n] for name, keys in self.rngs.items()}

    carry_after, results = self.periods.apply(
        {'params': params}, carry, given, ctx, lent, rngs=rngs_of_turn)
    self.results.append(results)
    return carry_after


@dataclasses.dataclass
class PeriodsOneByOne:
  """The periods of a section, run by a Python loop. A period is one repetition
  of the pattern of layers. The results of all runs are kept.

  Attributes:
    period: the unbound module of one period.
    num_periods: the number of periods of the section.
    params: the parameters of the section, by the number of the period as text.
    entries: the caches of each run of a period, in the order of the runs.
    ctx: what the layers read besides their input.
    lent: keys and values of layers of the sections before.
    results: the LayerResults of each run of a period so far.
  """
  period: nn.Module
  num_periods: int
  params: Any
  entries: Iterator[tuple[LayerCache, ...]]
  ctx: Context
  lent: dict[int, KeysAndValues]
  results: list[LayerResults] = dataclasses.field(default_factory=list)

  def run_all(self, carry: Carry) -> Carry:
    """Runs all periods of the section once."""
    return self._run_periods(range(self.num_periods), carry)

  def run_half(self, n: int, turn: passes.Turn, carry: ScanCarry) -> ScanCarry:
    """Runs the layers of the half whose turn it is, in a model whose layers are
    two stacks that take turns (model.loop=turns). The lower half of the periods
    is one stack, and the upper half is the other.

    Args:
      n: the number of the turn. It is not read here, since each run takes the
        next caches; `ScannedHalves`, which stands in its place where layers are
        scanned, finds its caches by it.
      turn: which half it runs, the lower or the upper one.
      carry: the input of the half, and what else goes from layer to layer. It
        has no slots, which belong to a scan: each period has a cache of its own
        here.

    Returns:
      The carry after the half.
    """
    del n
    assert carry.slots is None
    half = self.num_periods // 2
    numbers = range(half)
    if turn.is_high:
      numbers = range(half, self.num_periods)
    carry_after = self._run_periods(numbers, carry.layers)
    return ScanCarry(layers=carry_after, slots=None)

  def _run_periods(self, numbers: range, carry: Carry) -> Carry:
    """Runs the periods with these numbers, one after another. Each takes the
    next caches, and its results are kept."""
    for number in numbers:
      params_of_period = {'params': self.params[str(number)]}
      carry, results = self.period.apply(
          params_of_period, carry, next(self.entries), self.ctx, self.lent)
      self.results.append(results)
    return carry


def find_cache_of_tokens(cache: Any) -> Optional[Cache]:
  """Returns one entry of a cache that holds tokens; all such entries have room
  for as many.

  The arrays are [N / period, B, M, J, K], or [B, M, J, K] where the layers are
  apart. None: there is no cache, or all entries are states.
  """
  for entry in jax.tree.leaves(cache, is_leaf=is_cache):
    if is_cache(entry) and entry.key_BMJK is not None:
      return entry
  return None


def is_cache(x: Any) -> bool:
  """Returns whether a part of a tree is a cache of keys and values."""
  return isinstance(x, Cache)


def _identity(x: Any) -> Any:
  """Returns x as it is."""
  return x


def _stop_gradients(tree: Any) -> Any:
  """Returns a tree of arrays without their gradient."""
  return jax.tree.map(jax.lax.stop_gradient, tree)


def _flatten_passes(*of_scans: jax.Array) -> jax.Array:
  """Returns [passes * periods, ...] of the results of one or two scans over
  passes, each [some passes, periods, ...]."""
  by_pass = jnp.concatenate(of_scans)
  return by_pass.reshape(-1, *by_pass.shape[2:])


def _concatenate(*arrays: jax.Array) -> jax.Array:
  """Returns arrays joined along their first axis, as a leaf of trees."""
  return jnp.concatenate(arrays)


def _rows(tree: Any, start: int, stop: int) -> Any:
  """Returns the rows from `start` to before `stop` of all arrays of a tree."""
  return jax.tree.map(operator.itemgetter(slice(start, stop)), tree)


def add_distances(config: ModelConfig, kind: LayerKind, ctx: Context,
                  k_positions_BM: jax.Array, name_suffix: str = '') -> Context:
  """Adds to the context of a stack of layers what a relative position encoding
  computes once for all layers: biases on attention's scores, or a table of
  vectors for the distances between queries and keys.

  It must be called inside the module of the stack, since the modules of the
  encoding become its children.

  The suffixes name axes: B batch (or 1 for all rows), H heads, L queries, M
  keys, U distances, D d_model.

  Args:
    config: the model.
    kind: a kind of layer of the stack, which says whether it is causal.
    ctx: the context, which has the positions of the queries.
    k_positions_BM: the positions of the keys.
    name_suffix: the end of the names of the encoding's modules, which tells
      those of several stacks in one module apart.

  Returns:
    The context. Its `distances` has `bias_BHLM`, which is added to the scores,
    and `table_UD`, the vectors of distances. Each is None if the encoding has
    none.
  """
  # An encoding has a bias or a table for all layers, or neither.
  encoding = positions.position_of(config)
  bias_BHLM, table_UD = None, None
  if encoding.stack_bias:
    make_bias = encoding.stack_bias(
        config, kind.causal, name=f'{config.position}_bias{name_suffix}')
    bias_BHLM = make_bias(ctx.positions_BL, k_positions_BM)
  if encoding.stack_table:
    make_table = encoding.stack_table(config,
                                      name=f'{config.position}{name_suffix}')
    table_UD = make_table()
  distances = Distances(bias_BHLM=bias_BHLM, table_UD=table_UD)
  return ctx.replace(distances=distances)


# One period, and the order in which the gradients of its layers are computed.


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
  def __call__(self, carry: Carry, cache: Optional[tuple[LayerCache, ...]],
               ctx: Context, lent: dict[int, KeysAndValues]
               ) -> tuple[Carry, LayerResults]:
    """Runs the layers of one period of the layer pattern, one after another.

    The suffixes name axes: B batch, L length, U features of the state that
    routers pass on.

    Args:
      carry: what goes from layer to layer: the residual stream, and what else
        each layer passes on.
      cache: the entries of the layers; None: there is no cache.
      ctx: what the layers read besides their input.
      lent: keys and values of layers before the period, by how far before it
        they are: -1, ...

    Returns:
      The carry after the last layer, and LayerResults: the caches, the reports,
      the results that were to be kept, and the keys and values that later
      periods read, by how far before the end of this period their layer is.
    """
    x, passed = carry
    # The keys and values that a layer may read, by the place of the layer that
    # computed them: 0, 1, ... in the period, and below 0 before it.
    lent = dict(lent)
    lenders = self._places_of_lenders()
    caches, reports, kept = [], [], []
    for i, kind in enumerate(self.pattern):
      # Run the layer, with what it reads of other layers.
      shared = SharedArrays(
          first_values=passed.first_values, router_BLU=passed.router_BLU,
          keys=lent.get(kind.source), lends=i in lenders)
      cache_of_layer = None
      if cache is not None:
        cache_of_layer = cache[i]
      if passed.skips is not None:
        x = streams.read_skip(x, passed.skips)
      x, cache_of_layer, report = self._run_layer(
          i, kind=kind, x=x, ctx=ctx.replace(shared=shared),
          cache=cache_of_layer)

      # Keep its results. Arrays that later layers read go with the carry or
      # with `lent`, and are taken out of the report.
      passed = passed.after_layer(x, report)
      if report.keys is not None:
        lent[i] = report.keys
      caches.append(cache_of_layer)
      reports.append(report.replace(
          first_values=None, router_BLU=None, keys=None))
      if ctx.keep_layers:
        kept.append(x)
    num_layers = len(self.pattern)
    results = LayerResults(
        caches=None if cache is None else tuple(caches),
        reports=tuple(reports), kept=tuple(kept),
        lent={place: lent[num_layers + place] for place in self.lends})
    return Carry(x=x, passed=passed), results

  def _places_of_lenders(self) -> set[int | None]:
    """Returns the places, 0, 1, ..., of the layers of this period whose keys
    and values other layers read. Places of layers before it, which are below 0,
    and None may be among them: no layer of the period has such a place."""
    places = {kind.source for kind in self.pattern}
    # The layers that later periods read are counted from the end of this one.
    for place_from_end in self.lends:
      places.add(len(self.pattern) + place_from_end)
    return places

  def _run_layer(self, i: int, kind: LayerKind, x: LayerInput,
                 ctx: Context, cache: Optional[LayerCache]
                 ) -> tuple[LayerInput, Optional[LayerCache], Report]:
    """Runs one layer, with the rematerialisation that the model asks for.

    On several devices the gradient of the layer's input waits for the gradients
    of its weights, see `_run_after_weight_gradients`. The first layer in an
    iteration of a loop does not need this, as the end of the iteration waits
    for all gradients anyway.

    Args:
      i: the index of the layer in its period, which is one repetition of the
        pattern of layers.
      kind: its kind.
      x: its input, the residual stream.
      ctx: what it reads besides.
      cache: its cache; None: there is none.

    Returns:
      The residual stream after the layer, its cache with the new tokens (None:
      there is none), and its Report.
    """
    config = self.config.layer_config(kind.name)
    # Outside a loop, XLA may merge the second computation of a layer with the
    # first (common subexpression elimination) and so keep what was to be
    # dropped; prevent_cse adds a barrier against it.
    is_alone_in_loop = self.in_loop and len(self.pattern) == 1
    block = layers.apply_remat(
        BLOCKS[config.block], config, prevent_cse=not is_alone_in_loop)
    name = f'block_{i}'
    make_layer = functools.partial(block, config, kind, name=name)
    starts_iteration = self.in_loop and i == 0
    if (sharding.count_devices() == 1 or self.is_initializing()
        or starts_iteration):
      return make_layer()(x, ctx, cache)
    return self._run_after_weight_gradients(
        name, make_layer=make_layer, x=x, ctx=ctx, cache=cache)

  def _run_after_weight_gradients(
      self, name: str, make_layer: Callable[[], nn.Module],
      x: LayerInput, ctx: Context, cache: Optional[LayerCache]
      ) -> tuple[LayerInput, Optional[LayerCache], Report]:
    """Runs a layer such that in the backward pass the gradient of its input
    waits for the gradients of its weights, and these are already summed over
    the devices. The forward pass is unchanged.

    Without this, XLA's scheduler may put off the sums over the devices. Then
    the whole gradients of several layers are in memory at once.

    Args:
      name: the name of the layer, which is that of its parameters.
      make_layer: a function that makes the layer.
      x: its input, the residual stream.
      ctx: what it reads besides.
      cache: its cache; None: there is none.

    Returns:
      The residual stream after the layer, its cache (None: there is none), and
      its Report.
    """
    # x and the weights go through one barrier before the layer reads them. In
    # the backward pass the barrier waits for the gradients of both.
    x, weights = _tie_gradients(x, self.get_variable('params', name))

    def replace_weights(variables: Any) -> dict:
      """Returns the period's parameters, with those of the layer behind the
      barrier."""
      return {'params': {**variables['params'], name: weights}}

    def run_layer(period: nn.Module) -> Any:
      """Makes the layer inside of its parent, and applies it."""
      del period  # the parent, which Flax binds the layer to by itself
      return make_layer()(x, ctx, cache)

    # Inside run_layer, the period's parameters are what replace_weights
    # returns, so the layer reads those that went through the barrier with x.
    return nn.map_variables(run_layer, 'params', replace_weights)(self)


@jax.custom_vjp
def _tie_gradients(x: LayerInput, params: Any
                   ) -> tuple[LayerInput, Any]:
  """Returns both as they are; their gradients wait for one another."""
  return x, params


def _tie_gradients_fwd(x: LayerInput, params: Any):
  """Returns both, and nothing that the gradient needs."""
  return (x, params), None


def _tie_gradients_bwd(_, gradients: tuple[LayerInput, Any]):
  """Returns the gradients of both, unchanged, behind one barrier."""
  return jax.lax.optimization_barrier(gradients)


_tie_gradients.defvjp(_tie_gradients_fwd, _tie_gradients_bwd)


class Scanned(Period):
  """A period as the body of a scan.

  The slots of all periods go from one to the next with the carry, and each
  writes its own, those of row `row`, where they lie. If a scan were given the
  slots period by period and returned them, XLA would copy all of them for each
  token.
  """

  def __call__(  # type: ignore[override]
      self, carry: ScanCarry, given: GivenToPeriod, ctx: Context,
      lent: dict[int, KeysAndValues]) -> tuple[ScanCarry, LayerResults]:
    """Runs one period, a repetition of the pattern of layers, as one turn of a
    scan.

    Args:
      carry: what goes from layer to layer (the residual stream), and the slots
        (the cached keys and values) of all periods, or None without a cache.
      given: what this period alone is given: which row of the slots is its own,
        and what else its caches hold.
      ctx: what the layers read besides their input.
      lent: keys and values of earlier layers that layers of this period read,
        by how far before the section those layers are: -1, -2, ...

    Returns:
      The carry after the period, and the LayerResults. Their caches have no
      slots, as these are in the carry.
    """
    if carry.slots is None:
      layers_carry, results = super().__call__(carry.layers, None, ctx, lent)
      return ScanCarry(layers=layers_carry, slots=None), results
    # The layers get the slots of all periods, and write into their row only.
    cache = put_slots_back(carry.slots, given.other_cache, layer=given.row)
    layers_carry, results = super().__call__(carry.layers, cache, ctx, lent)
    slots, cache_without_slots = split_off_slots(results.caches)
    return (ScanCarry(layers=layers_carry, slots=slots),
            results.replace(caches=cache_without_slots))


def sum_losses_by_name(losses: list[dict[str, jax.Array]]
                       ) -> dict[str, jax.Array]:
  """Returns the sum of the losses of each name. A name may be missing in some
  of the dicts."""
  terms_by_name: dict[str, list[jax.Array]] = {}
  for losses_of_layer in losses:
    for name, loss in losses_of_layer.items():
      terms_by_name.setdefault(name, []).append(loss)
  return {name: sum(terms_by_name[name]) for name in sorted(terms_by_name)}


def gather_figures(sections: list[tuple[Report, ...]]) -> dict[str, dict]:
  """Gathers what the layers of a stack report beside their results: auxiliary
  losses, how many tokens experts got, and statistics of routers.

  Args:
    sections: the reports of the layers, for each section of the stack (the
      prefix, the repeated pattern, the suffix).

  Returns:
    A dict, which is {} if the layers have neither losses nor experts:
      losses: the sums over the layers, by name.
      loads: the share of tokens that each expert got, by the path of the
        router's bias which they move.
      health: statistics of routers by name, [N, ...] for the N layers that have
        experts.
      experts: with context.keep_layers, the choices of the routers by name,
        [N, ...].
  """
  reports = list(itertools.chain.from_iterable(sections))
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
  """Joins what the layers of a stack report in one field to arrays of all
  layers, in the order of the layers.

  Args:
    sections: for each section of the stack (the prefix, the repeated pattern,
      the suffix) the reports of the layers of one period, that is one
      repetition of its pattern. Their arrays have an axis of periods in front.
    field: the field, a dict of arrays by name, such as 'health'.

  Returns:
    The arrays by name, [N, ...] for the N layers that report them; {} if none
    does.
  """
  # Leave out the layers that report nothing in this field, such as those
  # without experts.
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
  # Join the arrays of one name after another. All layers have the same names.
  stacked = {}
  for name in sorted(sections_with_arrays[0][0]):
    arrays = []
    for arrays_of_layers in sections_with_arrays:
      arrays.append([by_name[name] for by_name in arrays_of_layers])
    stacked[name] = stack_by_layer(arrays)
  return stacked


def gather_attention_weights(sections: list[tuple[Report, ...]]
                             ) -> dict[str, jax.Array]:
  """Gathers the attention weights of all layers of a stack.

  The suffixes name axes: N layers, B batch, H heads, L queries, M keys.

  Args:
    sections: the reports of the layers, for each section of the stack (the
      prefix, the repeated pattern, the suffix).

  Returns:
    A dict of arrays [layers, batch, heads, queries, keys]. 'attention' has the
    weights of self-attention, and 'cross_attention' those of attention to an
    encoder's result. A name is missing if the layers kept no such weights.

  Raises:
    RequestError: if layers differ in their number of heads.
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
  """Joins the results of scans over layers to one array of all layers, in the
  order in which a token goes through them.

  The letters name axes: U layers of a pattern, N layers.

  Args:
    sections: for each section of the stack (the prefix, the repeated pattern,
      the suffix) a list with an array for each layer of its pattern,
      [periods, ...]. A period is one repetition of the pattern.

  Returns:
    The array, [N, ...].
  """
  arrays_of_sections = []
  for arrays_of_period in sections:
    # A token goes through all layers of a period, and then through those of the
    # next one. So [periods, U, ...] is flattened, and not [U, periods, ...].
    layers_NU = jnp.stack(arrays_of_period, 1)
    shape = arrays_of_period[0].shape[1:]
    arrays_of_sections.append(layers_NU.reshape(-1, *shape))
  if len(arrays_of_sections) == 1:
    return arrays_of_sections[0]
  return jnp.concatenate(arrays_of_sections)


def add_losses(aux: dict, losses: dict, loads: dict) -> dict:
  """Adds the auxiliary losses of further layers to what a stack of layers
  reports.

  Args:
    aux: what the stack reports, as `gather_figures` returns it.
    losses: the losses of the further layers, by name.
    loads: the share of tokens that each of their experts got, by the path of
      the router's bias which they move.

  Returns:
    The report with both. `aux` itself is not changed.
  """
  if not losses and not loads:
    return aux
  return aux | {'losses': sum_losses_by_name([aux['losses'], losses]),
                'loads': aux['loads'] | loads}


def merge_reports_of_stacks(encoder: dict, decoder: dict) -> dict:
  """Merges what the layers of an encoder and those of a decoder report. Losses
  are added up. In arrays with an axis of layers, the encoder's layers come
  first.

  Args:
    encoder: what the encoder's layers report; {}: nothing.
    decoder: what the decoder's layers report, by the same names; {}: nothing.

  Returns:
    The merged report.
  """
  if not encoder or not decoder:
    return encoder or decoder
  merged = dict(decoder)
  # The states and the attention of every layer, as tuples of arrays: a source
  # and its target differ in length, so their layers cannot stand in one array.
  for name in ('layers', 'attention'):
    if name in decoder:
      merged[name] = *encoder[name], *decoder[name]
  # Losses, and the figures of routers.
  if 'losses' in decoder:
    merged = add_losses(merged, encoder['losses'], encoder['loads'])
    merged['health'] = jax.tree.map(
        _concatenate, encoder['health'], decoder['health'])
  if 'experts' in decoder:
    experts = {}
    for name, chosen_N in decoder['experts'].items():
      experts[name] = *encoder['experts'][name], *chosen_N
    merged['experts'] = experts
  return merged
