"""Skeletons: embedding, the scanned stack of layers, and what is made of them:
a decoder, an encoder, or both.

A page under architectures/ puts these together. Layers are scanned over one
period of the pattern, so compile time does not grow with depth; parameters of
layer n stand in row n // period of `layers/block_{n % period}`, whether or
not `scan_layers` unrolls the scan. The layers of model.prefix come before the
first period: they are one of their own, `prefix/block_{n}` with one row, and
layer n of the others stands where n - len(prefix) would. Likewise those of
model.suffix come after the last period.

With model.loop the layers of all periods are run several times, between the
prefix and the suffix: see LOOPS.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools
import operator
from typing import Any, NamedTuple, Optional

import chex
from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import blocks, heads, layers, positions, sharding
from architectures.parts import streams
from architectures.parts.attention import steps
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.blocks import BLOCKS, branches
from architectures.parts.cache import apart, Cache, joined, LayerCache, Slots
from architectures.parts.config import LayerKind, ModelConfig, Section
from architectures.parts.context import Context, Distances, First, Keys
from architectures.parts.context import Memory, Shared
from architectures.parts.heads import GeneratorConfig
from architectures.parts.layers import FFNS, norm, NORMS
from architectures.parts.loops import LoopsConfig
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.report import Report, summed
from architectures.parts.streams import residual
from common.errors import require, short
from common.kinds import SECTIONS


@struct.dataclass
class Output:
  """What a model returns; `logits` [B, L, V] are computed when asked for.

  Attributes:
    hidden: [B, L, D], what the head is applied to.
    head: the output projection; None of a model with the head of a task that
      has scores, extra['scores'] (parts/heads.py).
    cache: keys and values of every layer, where a cache went in.
    aux: {'losses': scalars summed over layers, 'health': arrays by layer,
      'loads': of the experts, by the path of the bias that they move},
      with keep_layers 'layers': [N + 1, B, L, D], what the first layer is
      given and what each returns, 'readouts': the same as the head would read
      it, which ends with `hidden`, and 'experts': moe.layer.choices by layer
      of experts; with keep_attention 'attention': [N, B, H, L, M], what each
      layer weighs the values with, and of a decoder with a memory
      'cross_attention'.
    memory: [B, M, D] the encoder's output, of an encoder-decoder.
    extra: what one system alone returns, by name.
  """
  hidden: jax.Array
  head: Optional[heads.Head]
  cache: Any = None
  aux: Any = struct.field(default_factory=dict)
  memory: Optional[jax.Array] = None
  extra: Any = struct.field(default_factory=dict)

  @property
  def logits(self) -> jax.Array:
    require(self.head is not None, "a model whose model.head is not 'lm' has "
            "no logits of tokens: its scores are extra['scores']")
    return self.head.logits(self.hidden)


class Embed(nn.Module):
  """Tokens [B, L] -> (x_BLD, the table as a [D, V] kernel for a tied head).
  The names of positions and norm begin with `of`. With `added`, another table
  is added to that of the tokens, which then has no gradient."""
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, positions_BL: jax.Array, *,
               type_ids_BL: Optional[jax.Array] = None, of: str = '',
               added: bool = False, deterministic: bool = True):
    c = self.config
    table_VD = layers.embedding(self, 'tokens', c.vocab_size, 'vocab')
    if added:
      table_VD = jax.lax.stop_gradient(table_VD) + sharding.declare(
          self, ADDED, nn.initializers.zeros, table_VD.shape,
          sharding.Role(('vocab', 'embed'), inputs=(0,), kind='embedding'))
    x_BLD = sharding.lookup(table_VD, tokens_BL, c.compute_dtype)
    if c.embed_scale != 1:
      x_BLD = x_BLD * jnp.asarray(c.embed_scale, x_BLD.dtype)
    if positions.of(c).embed:
      x_BLD = positions.of(c).embed(self, x_BLD, positions_BL,
                                    f'{of}positions')
    if c.type_vocab_size:
      types_TD = layers.embedding(self, 'types', c.type_vocab_size)
      if type_ids_BL is None:
        type_ids_BL = jnp.zeros((1, 1), jnp.int32)
      x_BLD = x_BLD + types_TD[type_ids_BL].astype(x_BLD.dtype)
    if c.embed_norm:
      x_BLD = norm(c, f'{of}norm')(x_BLD)
    x_BLD = layers.Dropout(c.dropout)(x_BLD, deterministic=deterministic)
    return sharding.constrain_stream(x_BLD, 'embed'), table_VD.T


class Period(nn.Module):
  """One period of the layer pattern.

  (carry, cache, context, lent) -> (carry, what the layers return beside it).
  The carry goes from layer to layer: x, which may be several streams, and, with
  model.value_residual, the values of the first layer.

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
  def __call__(self, carry: tuple[streams.X, Optional[First]],
               cache: Optional[tuple[LayerCache, ...]], ctx: Context,
               lent: dict[int, Keys]) -> tuple[Any, 'Layers']:
    """Runs the layers. `lent` has keys and values of layers before the period,
    by how far before it they are: -1, ..."""
    x, first = carry
    caches, reports, kept, lent = [], [], [], dict(lent)
    ends = len(self.pattern)
    wanted = {kind.source for kind in self.pattern}
    wanted |= {ends + place for place in self.lends}
    for i, kind in enumerate(self.pattern):
      config = self.config.of_kind(kind.name)
      block = layers.with_remat(
          BLOCKS[config.block], config,
          prevent_cse=not (self.in_loop and ends == 1))
      make = functools.partial(block, config, kind, name=f'block_{i}')
      shared = Shared(first=first, keys=lent.get(kind.source),
                      lends=i in wanted)
      layer_ctx = ctx.replace(shared=shared)
      entry = None if cache is None else cache[i]
      # The end of an iteration waits for the gradients of its first layer.
      waits = self.in_loop and i == 0
      if sharding.devices() == 1 or self.is_initializing() or waits:
        x, entry, report = make()(x, layer_ctx, entry)
      else:
        x, entry, report = self._after_its_weights(
            f'block_{i}', make, x, layer_ctx, entry)
      # What later layers read goes on with the carry, and not into the report.
      if report.first is not None:
        first = report.first
      if report.keys is not None:
        lent[i] = report.keys
      caches.append(entry)
      reports.append(report.replace(first=None, keys=None))
      kept.append(x if ctx.keep_layers else ())
    return (x, first), Layers(
        caches=None if cache is None else tuple(caches),
        reports=tuple(reports), kept=tuple(kept),
        lent={place: lent[ends + place] for place in self.lends})

  def _after_its_weights(self, name: str, make: Callable[[], nn.Module],
                         x: streams.X, ctx: Context, cache: Any):
    """Returns make()(x, ctx, cache), where `make` makes the layer `name`. Its
    gradient goes on to the layer before it when those of its weights are there,
    each of them in its shards.

    XLA's scheduler may otherwise put off their sums over the devices, and then
    several layers have whole gradients at once. In a loop it cannot: the end of
    an iteration needs them.

    The order is that of the backward pass alone: x and the weights go through
    one barrier there, before the layer reads them.
    """
    x, weights = _tied(x, self.get_variable('params', name))

    def with_tied(variables: Any) -> dict:
      return {'params': {**variables['params'], name: weights}}

    def layer(period: nn.Module):
      del period  # the parent of what `make` makes
      return make()(x, ctx, cache)

    return nn.map_variables(layer, 'params', with_tied)(self)


@struct.dataclass
class Layers:
  """What the layers of a period return beside x, in their order.

  Attributes:
    caches: their entries of the cache; None: none went in.
    reports: what they report.
    kept: with context.keep_layers, x after each.
    lent: keys and values that later periods read, by place.
  """
  caches: Optional[tuple[LayerCache, ...]]
  reports: tuple[Report, ...]
  kept: tuple[Any, ...]
  lent: dict[int, Keys]


@jax.custom_vjp
def _tied(x: streams.X, params: Any) -> tuple[streams.X, Any]:
  """Returns both as they are; their gradients wait for one another."""
  return x, params


def _tied_fwd(x: streams.X, params: Any):
  return (x, params), None


def _tied_bwd(_, gradients: tuple[streams.X, Any]):
  return jax.lax.optimization_barrier(gradients)


_tied.defvjp(_tied_fwd, _tied_bwd)


class Scanned(Period):
  """A period as the body of a scan.

  The slots of all periods go from one to the next, and each writes its own,
  those of place `n`, where they lie. If a scan were given the slots period by
  period and returned them, XLA would copy all of them for each token.
  """

  def __call__(self, carry: tuple[Any, Slots],
               xs: tuple[Optional[jax.Array], Any], ctx: Context,
               lent: dict[int, Keys]) -> tuple[Any, Layers]:
    carry, slots = carry
    n, rest = xs
    if slots is None:
      carry, layers = super().__call__(carry, None, ctx, lent)
      return (carry, None), layers
    carry, layers = super().__call__(carry, joined(slots, rest, n), ctx, lent)
    slots, rest = apart(layers.caches)
    return (carry, slots), layers.replace(caches=rest)


# Loops: the layers between the prefix and the suffix are run loops.passes
# times with the same weights (recurrent depth: Dehghani et al. 2019, arXiv
# 1807.03819). F is one pass, e what the prefix returns, and s_t what pass t
# returns; the suffix reads the last one. Pass t reads
#
#   plain   s_(t-1)                          s_0 = e   (ALBERT, Ouro)
#   add     s_(t-1) + e                      s_0 = 0   (Yang et al. 2024, arXiv
#                                            2311.12424)
#   concat  [s_(t-1); e] W                   s_0 = 0   (Huginn: Geiping et al.
#                                            2025, arXiv 2502.05171, sec. 3.2)
#   gate    (1 - f) * e + g * s_(t-1)        pass 1 reads e
#           f = tanh(r W_f)    g = tanh(r W_g)
#           r = [rms(e); rms(s_(t-1))] W_r
#
# gate is the message gate of Inkling 2 (transformers: inkling2_loop), of rank
# loops.gate_rank. Inkling has one for each query, key, value and network of
# each layer, and attends to the blocks of the pass before; here one gate reads
# the end of that pass. Huginn draws s_0, here it is 0, so that a model is a
# function of its tokens. With loops.boundary 'norm', s_(t-1) goes through the
# stack's final norm before a pass reads it (Ouro: Zhu et al. 2025, arXiv
# 2510.25741). With loops.gradient_passes k, neither the passes before the last
# k nor what they read have a gradient (Huginn, section 3.3).
#
# One plain pass, or one of add or gate, is the stack without a loop. Each pass
# has keys, values and states of its own: a cache has loops.passes times the
# rows of the stack, those of a pass side by side.


def _concat(module: nn.Module, one_BLD: jax.Array, other_BLD: jax.Array,
            name: str = 'join') -> jax.Array:
  c, axes = module.config, ('mlp', 'embed')  # type: ignore[attr-defined]
  w_UD = layers.weight(module, name, (2 * c.d_model, c.d_model), axes)
  return layers.einsum(
      'BLU,UD->BLD', jnp.concatenate([one_BLD, other_BLD], -1), w_UD,
      c.compute_dtype, axes=axes, keep=False)


def _gate(module: nn.Module, state_BLD: jax.Array, input_BLD: jax.Array
          ) -> jax.Array:
  c: Any = module.config  # type: ignore[attr-defined]
  D, R = c.d_model, c.part(LoopsConfig).gate_rank
  both_BLU = jnp.concatenate([layers.rmsnorm(x, None, c.norm_eps)
                              for x in (input_BLD, state_BLD)], -1)
  rank_BLR = layers.einsum('BLU,UR->BLR', both_BLU, layers.weight(
      module, 'down', (2 * D, R), ('mlp', None)), c.compute_dtype)
  forget_BLD, message_BLD = (jnp.tanh(layers.einsum(
      'BLR,RD->BLD', rank_BLR, layers.weight(
          module, name, (R, D), (None, 'embed')), c.compute_dtype, jnp.float32))
                             for name in ('forget', 'message'))
  return ((1 - forget_BLD) * input_BLD + message_BLD * state_BLD).astype(
      input_BLD.dtype)


class Loop(NamedTuple):
  """A form of loop, as an entry of LOOPS.

  Attributes:
    read: (module, state, input) -> what a pass reads; None: the state.
    first: whether the first pass reads by it too; if not, it reads the input.
    fields: of config.model, those that this form reads and others may not.
    settings: the group of fields that all forms read.
  """
  read: Optional[Callable[[nn.Module, Any, Any], jax.Array]] = None
  first: bool = False
  fields: tuple[str, ...] = ()
  settings: type = LoopsConfig


LOOPS = {
    'none': None,
    'plain': Loop(),
    'add': Loop(lambda module, state_BLD, input_BLD: state_BLD + input_BLD),
    'concat': Loop(_concat, first=True),
    'gate': Loop(_gate, fields=('loops.gate_rank', 'norm_eps')),
}


class Enter(nn.Module):
  """(state, the input of the first pass, which pass) -> what this one reads."""
  config: ModelConfig

  @nn.compact
  def __call__(self, state: streams.X, inputs: streams.X, n: Any) -> streams.X:
    loop = LOOPS[self.config.loop]
    assert loop is not None
    if not loop.read:
      return state
    if loop.first:
      return residual(loop.read(self, jnp.where(n == 0, 0, state), inputs))
    return residual(jnp.where(n == 0, inputs, loop.read(self, state, inputs)))


def _enter(c: ModelConfig, params: Any, state: streams.X, inputs: streams.X,
           n: Any) -> streams.X:
  """Returns what pass n reads, with `params` those of the stack."""
  if c.part(LoopsConfig).boundary == 'norm':
    state = jnp.where(n == 0, state, NORMS[c.norm](c, parent=None).apply(
        {'params': params.get('final_norm', {})}, state))
  return Enter(c, parent=None).apply({'params': params.get('loop', {})}, state,
                                     inputs, n)


class Stack(nn.Module):
  """num_layers layers, then the final norm where the wiring needs one.

  (x_BLD, context, cache) -> (x_BLD, cache, aux). With `one_by_one` the layers
  follow one another in the program, as a scan may copy the weights of each;
  both update slots in place. Parameters and cache are then those that the
  function `one_by_one` returns.
  """
  config: ModelConfig
  sections: tuple[Section, ...]

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Any = None,
               one_by_one: bool = False):
    c = self.config
    # The layers are told of the tokens; the first one is given the embedding.
    ctx = self._told(x_BLD, ctx, cache)
    inputs_BLD, first = x_BLD, self._first_values(x_BLD)
    kinds = sum((section.layers for section in self.sections), ())
    x = streams.begin_streams(c, x_BLD, branches(c, kinds))
    run = self._one_by_one if one_by_one else self._scan
    (x, _), sections = run((x, first), cache, ctx)
    # The end of the stack, and what its layers report.
    final, end = lambda x: x, streams.EndOfStreams(c, name='final_streams')
    if BLOCKS[c.of_kind(kinds[-1].name).block].FINAL_NORM:
      final = norm(c, 'final_norm')
    # If the length stayed over `tensor`, as the vocabulary is, their product
    # would gather the head.
    x_BLD = sharding.constrain(final(end(x)), 'batch', 'length', 'embed')
    reports = [section.reports for section in sections]
    aux = _figures(reports) | _weights(reports)
    if ctx.keep_layers:
      kept = [[end(x) for x in section.kept] for section in sections]
      layers_NBLD = jnp.concatenate([inputs_BLD[None], _by_layer(kept)])
      aux = aux | {'layers': layers_NBLD, 'readouts': final(layers_NBLD)}
    if cache is None:
      return x_BLD, None, aux
    caches = [section.caches for section in sections]
    return x_BLD, caches if one_by_one else sum(caches, ()), aux

  def _told(self, x_BLD: jax.Array, ctx: Context, cache: Any) -> Context:
    """Returns the context with all that the layers read besides their input."""
    c = self.config
    slots, k_positions_BM = any_cache(cache), ctx.positions_BL
    if slots is not None:  # where the keys stand that queries meet
      k_positions_BM = jnp.arange(slots.num_slots)[None]
    if cache is not None and ctx.lengths_B is None:  # up to the last token
      ctx = ctx.replace(lengths_B=ctx.positions_BL[:, -1] + 1)
    ctx = _with_distances(c, self.sections[0].kinds[0], ctx, k_positions_BM)
    if any(layer.memory == 'per_layer' for layer in c.distinct_layers):
      ctx = ctx.replace(embedded_BLD=x_BLD)
    return ctx

  def _first_values(self, x_BLD: jax.Array) -> Optional[First]:
    """Returns the values that the first layer is given with
    model.value_residual; None: there are none."""
    c = self.config
    attention = c.find(AttentionConfig)
    if attention is None or not attention.value_residual:
      return None
    readers = [layer for layer in c.distinct_layers
               if layer.mixer == 'attention']
    return steps.first_values(readers[0], x_BLD)

  def _scan(self, carry: tuple, cache: Any, ctx: Context):
    c, entries, lent, outputs = self.config, iter(cache or ()), {}, []
    for section in self.sections:
      name, kinds, periods, passes = section
      slots, rest, at_N = None, None, None
      make = functools.partial(nn.scan(
          Scanned, variable_axes={'params': 0},
          split_rngs={'params': True, 'dropout': True, 'router': True},
          in_axes=(0, nn.broadcast, nn.broadcast), length=periods,
          unroll=1 if c.scan_layers else periods,
          # Else the layers are traced twice. Where they draw numbers, the draws
          # of both are counted, and what is drawn depends on the count.
          check_constancy_invariants=any(
              map(self.has_rng, ('params', 'dropout', 'router'))),
          metadata_params={nn.PARTITION_NAME: 'layers'}), c, kinds,
                               self._lends(name),
                               c.scan_layers and periods * passes > 1)
      if cache is not None:
        slots, rest = apart(tuple(itertools.islice(entries, len(kinds))))
        at_N = jnp.arange(periods)
      if not self._loops(section) or self.is_initializing():
        (carry, slots), layers = make(name=name)(
            (carry, slots), (at_N, rest), ctx, lent)
      else:
        (carry, slots), layers = self._loop(
            make(parent=None), section, (carry, slots), rest, ctx, lent)
      if self._loops(section) and self.is_initializing():
        Enter(c, name='loop')(carry[0], carry[0], 0)
      lent = jax.tree.map(lambda x: x[0], layers.lent)
      if slots is not None:
        layers = layers.replace(caches=joined(slots, layers.caches))
      outputs.append(layers)
    return carry, outputs

  def _loops(self, section: Section) -> bool:
    return self.config.loop != 'none' and section.name == 'layers'

  def _loop(self, layers: nn.Module, section: Section, carry: tuple,
            rest: Any, ctx: Context, lent: dict[int, Keys]):
    """Returns what a scan over the layers that loop returns, of all passes,
    those of a pass side by side. `layers` is that of one pass, and unbound."""
    c, params = self.config, self.variables['params']
    inputs, (_, _, periods, passes) = carry[0][0], section
    keys = {name: jax.random.split(self.make_rng(name), passes)
            for name in ('dropout', 'router') if self.has_rng(name)}
    root = '/'.join((*self.path, section.name))

    def once(params: Any, inputs: streams.X, ctx: Context,
             lent: dict[int, Keys], carry: tuple, xs: tuple):
      ((x, first), slots), (n, rest, keys) = carry, xs
      x = _enter(c, params, x, inputs, n)
      at_N = None if slots is None else n * periods + jnp.arange(periods)
      return layers.apply({'params': params[section.name]},
                          ((x, first), slots), (at_N, rest), ctx, lent,
                          rngs=keys)

    xs = jnp.arange(passes), jax.tree.map(
        lambda x: x.reshape(passes, periods, *x.shape[1:]), rest), keys
    stopped = functools.partial(jax.tree.map, jax.lax.stop_gradient)
    loops = c.part(LoopsConfig)
    free = (max(passes - loops.gradient_passes, 0)
            if loops.gradient_passes else 0)  # passes without a gradient
    fixed, parts = (params, inputs, ctx, lent), []
    for some in filter(len, (range(free), range(free, passes))):
      carry, out = jax.lax.scan(
          functools.partial(once, *(fixed if some.stop == passes else
                                    stopped(fixed))),
          stopped(carry) if free else carry,
          jax.tree.map(operator.itemgetter(slice(some.start, some.stop)), xs),
          unroll=1 if c.scan_layers else len(some))
      parts.append(out)
    out = jax.tree.map(lambda *x: jnp.concatenate(x).reshape(
        -1, *x[0].shape[2:]), *parts)
    # A bias moves by the mean of the passes; `layers` does not know its path.
    reports = []
    for report in out.reports:
      loads = {}
      for path, load_NE in report.loads.items():
        by_pass = load_NE.reshape(passes, periods, -1)
        loads[f'{root}/{path}'] = by_pass.mean(0)
      reports.append(report.replace(loads=loads))
    return carry, out.replace(reports=tuple(reports))

  def _lends(self, section: str) -> tuple[int, ...]:
    """Returns which layers of the prefix lend their keys to those after it."""
    return tuple(sorted({
        kind.source for section_ in self.sections for kind in section_.kinds
        if kind.source is not None and kind.source < 0
    })) if section == 'prefix' else ()

  def _one_by_one(self, carry: tuple, cache: Any, ctx: Context):
    c, params = self.config, self.variables['params']
    lent, outputs, inputs = {}, [], None
    places = [(section, n) for section in self.sections
              for n in range(section.periods * section.passes)]
    for (section, n), entry in zip(places, cache, strict=True):
      if self._loops(section) and n % section.periods == 0:
        x, first = carry
        inputs = x if n == 0 else inputs
        carry = _enter(c, params, x, inputs, n // section.periods), first
      period = Period(c, section.kinds, self._lends(section.name), parent=None)
      carry, layers = period.apply(
          {'params': params[section.name][str(n % section.periods)]}, carry,
          entry, ctx, lent)
      if section.name == 'prefix':
        lent = layers.lent
      # What is not a cache has an axis of periods, as after a scan.
      caches = layers.caches
      layers = jax.tree.map(lambda x: x[None], layers.replace(caches=None))
      outputs.append(layers.replace(caches=caches))
    return carry, outputs


def _with_distances(c: ModelConfig, kind: LayerKind, ctx: Context,
                    k_positions_BM: jax.Array, after: str = '') -> Context:
  """Returns the context with what all layers of a stack have of distances,
  whose modules are named by the encoding and `after`."""
  row = positions.of(c)
  bias_BHLM, table_UD = None, None
  if row.stack_bias:
    bias = row.stack_bias(c, kind.causal, name=f'{c.position}_bias{after}')
    bias_BHLM = bias(ctx.positions_BL, k_positions_BM)
  if row.stack_table:
    table_UD = row.stack_table(c, name=f'{c.position}{after}')()
  return ctx.replace(distances=Distances(bias_BHLM, table_UD))


def _context(tokens_BL: jax.Array, positions_BL: Optional[jax.Array],
             segment_ids_BL: Optional[jax.Array], **how: Any) -> Context:
  """Returns the Context of some tokens, whose positions are 0..L-1 by default.
  Those that are passed with segment ids promise an order: see Decoder.

  Raises:
    RequestError: for a segment id in several pieces of a row, unless it is
      traced: see Decoder.
  """
  chex.assert_rank(tokens_BL, 2)
  if not isinstance(segment_ids_BL, jax.core.Tracer | None):
    for ids_L in np.asarray(segment_ids_BL):
      pieces = ids_L[(ids_L != 0) & (np.diff(ids_L, prepend=0) != 0)]
      require(len(np.unique(pieces)) == len(pieces), 'a row of segment ids, or '
              f'of a mask, is {short(ids_L.tolist())}: each id but 0, which is '
              'padding, lies in one piece')
  in_order = positions_BL is None or segment_ids_BL is not None
  if positions_BL is None:
    positions_BL = jnp.arange(tokens_BL.shape[1])[None]
  return Context(positions_BL, segment_ids_BL, tokens_BL=tokens_BL,
                 in_order=in_order, **how)


class Mtp(nn.Module):
  """Modules that predict tokens further ahead (DeepSeek-AI 2024b, arXiv
  2412.19437, section 2.2): the one of depth k, for the token at place i,

    h'_i = M [n(e_(i+k)); n(h_i)],   h_i^k = layer(h'_1 ... h'_i)

  where e is the embedding, h what the head reads of the model, or of the module
  of depth k - 1, and the layer is one more of the last kind. The head, which is
  the model's, reads of h_i^k, after a norm, the token at place i + k + 1.

  (x_BLD, embedded_BLD, context) -> (a tuple of [B, L, D] by depth, their
  reports). The last k places of depth k hold nothing: no token follows them.
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, embedded_BLD: jax.Array, ctx: Context):
    c = self.config
    kind = c.layer_kinds(c.num_layers)[-1]
    hidden, reports = [], []
    for depth in range(1, c.mtp_depth + 1):
      depth_ctx = ctx.replace(tokens_BL=jnp.roll(ctx.tokens_BL, -depth, 1),
                              routed_BL=_followed(ctx, depth))
      x_BLD = residual(_concat(
          self, norm(c, f'token_norm_{depth}')(
              jnp.roll(embedded_BLD, -depth, 1)),
          norm(c, f'hidden_norm_{depth}')(x_BLD), f'join_{depth}'))
      x = streams.begin_streams(c, x_BLD, branches(c, (kind,)))
      depth_ctx = _with_distances(c, kind, depth_ctx, ctx.positions_BL,
                                  f'_{depth}')
      (x, _), layers = Period(c, (kind,), name=f'depth_{depth}')(
          (x, None), None, depth_ctx, {})
      x_BLD = streams.EndOfStreams(c, name=f'streams_{depth}')(x)
      if BLOCKS[c.of_kind(kind.name).block].FINAL_NORM:
        x_BLD = norm(c, f'norm_{depth}')(x_BLD)
      hidden.append(x_BLD)
      reports += layers.reports
    return tuple(hidden), reports


def _followed(ctx: Context, depth: int) -> jax.Array:
  """Returns [B, L] which tokens have another one `depth` places on, in the same
  document: the others join two texts, and take no expert."""
  B, L = ctx.tokens_BL.shape
  there_BL = jnp.broadcast_to(jnp.arange(L)[None] < L - depth, (B, L))
  if ctx.segment_ids_BL is not None:
    ids_BL = ctx.segment_ids_BL
    there_BL &= ids_BL == jnp.roll(ids_BL, -depth, 1)
  if ctx.valid_BL is not None:
    there_BL &= jnp.roll(ctx.valid_BL, -depth, 1) != 0
  return there_BL.astype(jnp.int32)


class Decoder(nn.Module):
  """A decoder-only model (GPT, LLaMA, ...).

  tokens [B, L] -> Output. `positions_BL` default to 0..L-1; with a cache they
  are where the tokens go. `segment_ids_BL` keep packed documents apart; a mask,
  1 on tokens and 0 on padding, is such ids of one document. Each id but 0 lies
  in one piece of a row. One in several, as in a mask 1 1 0 0 1 1, raises a
  RequestError unless it is traced: a state would begin anew with each piece,
  and positions would count what is between them. Passed with positions, they
  also promise that each document is in order, and attention skips keys by it.
  The first `prefix_B` tokens of a row see each other. `valid_BL` is 0 on
  padding, where that is all a row's end: it is unseen, and takes no room of an
  expert. `lengths_B` says how many tokens each row has, where dynamic or
  longrope turn by it; default: L or, with a cache, up to the last of them.
  `how` are these and other fields of Context: deterministic, keep_layers,
  keep_attention. `one_by_one` says that parameters and cache are those that the
  function of that name returns.

  REREADS: whether a text that outgrows one of positions.lengths_apart while it
    is written is read again, as if all of it had been its prompt.
  """
  STACK = 'decoder'
  REREADS = False
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, *,
               positions_BL: Optional[jax.Array] = None,
               segment_ids_BL: Optional[jax.Array] = None,
               cache: Any = None, one_by_one: bool = False,
               **how: Any) -> Output:
    c = self.config
    require(cache is None or segment_ids_BL is None,
            'a cache holds one document a row: pass no segment ids with it')
    ctx = _context(tokens_BL, positions_BL, segment_ids_BL, **how)
    embedded_BLD, table_DV = Embed(c, name='embed')(
        tokens_BL, ctx.positions_BL, deterministic=ctx.deterministic)
    x_BLD, cache, aux = Stack(c, c.sections(c.num_layers), name='decoder')(
        embedded_BLD, ctx, cache, one_by_one)
    if c.head == 'lm':
      head, extra = heads.Unembed(c, name='head')(table_DV), {}
      if c.mtp_depth and cache is None and not (
          ctx.keep_layers or ctx.keep_attention):
        extra['mtp'], more = Mtp(c, name='mtp')(x_BLD, embedded_BLD, ctx)
        for report in more:
          aux = _with_losses(aux, report.losses, report.loads)
      return Output(x_BLD, head, cache, aux, extra=extra)
    kind = heads.HEADS[c.head]
    y = (heads.last(x_BLD, ctx.valid_BL, segment_ids_BL) if kind.of_row else
         x_BLD)
    if kind.unfolds:
      return Output(*heads.Unfold(c, name='task')(y, x_BLD.shape[1]), cache,
                    aux)
    scores = heads.Task(c, bias=not kind.of_row, name='task')(
        y, deterministic=ctx.deterministic)
    return Output(x_BLD, None, cache, aux, extra=dict(scores=scores))


# Of an encoder that tells replaced tokens (model.head 'replaced', heads.py).
APART = 'generator_'  # what a generator has of its own in `embed` begins so
ADDED = 'tokens_added'  # the encoder's own part of the table of tokens


def generator(c: ModelConfig) -> ModelConfig:
  """Returns the config of the network that replaces tokens."""
  g, width = c.part(GeneratorConfig), c.of_embedding.d_model
  head_dim = g.d_model // g.num_heads
  return dataclasses.replace(
      c.without(GeneratorConfig), head='lm', next_sentence=False,
      d_model=g.d_model,
      num_layers=g.num_layers, num_decoder_layers=g.num_layers, d_ff=g.d_ff,
      num_heads=g.num_heads, num_kv_heads=g.num_heads, head_dim=head_dim,
      attention_scale=head_dim ** -0.5,
      embed_dim=width if width != g.d_model else 0)


class Encoder(nn.Module):
  """An encoder, whose tokens all see each other, as BERT's and those that came
  after it. A page says how its pre-training reads the last layer and, with
  `scored`, what a task's head is applied to.

  tokens [B, L] -> Output: `logits` of the masked words, and in `extra`
  hidden [B, L, D] of the encoder and, with model.next_sentence, pooled [B, D]
  and nsp_logits [B, 2] (0: the second text follows the first, 1: it does not,
  or with objective mlm_sop it is the first that follows).
  With the head of a task: in `extra` hidden, scores and, where a pooler is
  what a row is scored by, pooled. `segment_ids_BL` are as a Decoder's, and
  `how` are further fields of Context. With a generator (model.generator):
  hidden and head are the generator's, at `places_BM` if they are there; what it
  draws for these, extra['drawn'] [B, M], is what the encoder reads at them. A
  place past the row's end is none. `embedded` is what Embed returned already.

  HEAD_ACT: the network of FFNS whose activation the head of masked words has;
    '': that of the layers.
  HEAD_BIAS: whether the product of that head has a bias.
  POOLER_ACT: the same of the pooler; '': tanh.
  PAIR_SEPARATORS: how many separators stand between two texts of a row.
  """
  STACK = 'encoder'
  HEAD_ACT = ''
  HEAD_BIAS = True
  POOLER_ACT = ''
  PAIR_SEPARATORS = 1
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, *,
               type_ids_BL: Optional[jax.Array] = None,
               positions_BL: Optional[jax.Array] = None,
               segment_ids_BL: Optional[jax.Array] = None,
               places_BM: Optional[jax.Array] = None,
               embedded: Optional[tuple[jax.Array, jax.Array]] = None,
               **how: Any) -> Output:
    c = self.config
    ctx = _context(tokens_BL, positions_BL, segment_ids_BL, **how)
    embed = functools.partial(
        Embed(c.of_embedding, name='embed'), positions_BL=ctx.positions_BL,
        type_ids_BL=type_ids_BL, deterministic=ctx.deterministic)
    apart, generated, drawn = '', None, {}
    drawn_by = c.find(GeneratorConfig)
    if drawn_by is not None and drawn_by.num_layers:
      apart = APART if drawn_by.sharing == 'apart' else ''
      generated = type(self)(generator(c), name='generator')(
          tokens_BL, positions_BL=positions_BL, segment_ids_BL=segment_ids_BL,
          deterministic=ctx.deterministic, embedded=embed(tokens_BL, of=apart))
    if generated is not None and places_BM is not None:
      generated = generated.replace(hidden=jnp.take_along_axis(
          generated.hidden, places_BM[..., None], 1, mode='clip'))
      drawn = dict(drawn=self._drawn(generated, ctx.deterministic))
      tokens_BL = jnp.asarray(tokens_BL).at[
          jnp.arange(len(tokens_BL))[:, None], places_BM].set(
              drawn['drawn'], mode='drop')
    x_BLD, table_DV = embedded or embed(tokens_BL, added=bool(apart))
    if c.embed_dim:
      x_BLD = sharding.constrain_stream(
          self._dense('widen', x_BLD, c.d_model), 'embed')
    x_BLD, _, aux = Stack(c, c.sections(c.num_layers, causal=False),
                          name='encoder')(x_BLD, ctx)
    if c.head == 'lm':
      return self._pretraining(x_BLD, table_DV, aux)
    kind = heads.HEADS[c.head]
    if kind.unfolds:
      return Output(*heads.Unfold(c, name='task')(
          heads.last(x_BLD, None, segment_ids_BL), x_BLD.shape[1]), aux=aux,
                    extra=dict(hidden=x_BLD))
    read, extra = self.scored(
        heads.POOLINGS[c.pooling](x_BLD, segment_ids_BL) if kind.of_row
        else x_BLD, kind.of_row)
    if kind.detects:
      read = self._act()(self._dense('detector', read, c.d_model))
    scores = heads.Task(c, name='task')(
        read, deterministic=ctx.deterministic)
    extra = dict(hidden=x_BLD, scores=scores) | extra | drawn
    return (Output(x_BLD, None, aux=aux, extra=extra) if generated is None else
            generated.replace(aux=aux, extra=extra))

  def _drawn(self, generated: Output, deterministic: bool) -> jax.Array:
    """Returns a token for each place, [B, M], drawn as likely as the generator
    has it, one place after the other, so that no logits [B, M, V] are held.
    Where nothing is dropped the draws are always the same."""
    key = jax.random.key(0) if deterministic else self.make_rng('dropout')
    hidden_BMD, head = jax.lax.stop_gradient(
        (generated.hidden, generated.head))
    drawn_MB = jax.lax.map(
        lambda of: jax.random.categorical(of[0], head.logits(of[1])),
        (jax.random.split(key, hidden_BMD.shape[1]),
         jnp.moveaxis(hidden_BMD, 1, 0)))
    return drawn_MB.T.astype(jnp.int32)

  def _act(self, name: str = '') -> Callable[[jax.Array], jax.Array]:
    """Returns the activation of a network of FFNS; '': of that of the layers.
    """
    c = self.config
    if not name:
      name = c.part(MoEConfig).ffn if c.ffn == 'moe' else c.ffn
    return FFNS[name].act

  def scored(self, x: jax.Array, of_row: bool
             ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns what the head of a task is applied to, of a row [B, D] or of
    each token [B, L, D], and what of it belongs into `extra`."""
    if not of_row:
      return x, {}
    pooled_BD = self._pooled(x)
    return pooled_BD, dict(pooled=pooled_BD)

  def transform(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D], or as wide as the embedding: what the head of
    masked words reads."""
    c, act = self.config, self._act(self.HEAD_ACT)
    return norm(c, 'transform_norm')(act(self._dense(
        'transform', x, c.of_embedding.d_model, bias=self.HEAD_BIAS)))

  def _pretraining(self, x_BLD: jax.Array, table_DV: jax.Array, aux: dict
                   ) -> Output:
    """Masked words and, where the model has a head for them, next sentences."""
    c = self.config
    extra = dict(hidden=x_BLD)
    if c.next_sentence:
      pooled_BD = self._pooled(x_BLD[:, 0])
      logits_B2 = self._dense('nsp', pooled_BD, 2, output=True)
      extra |= dict(pooled=pooled_BD,
                    nsp_logits=logits_B2.astype(jnp.float32))
    # Of every layer, where they are kept.
    t_BLD = self.transform(aux.get('readouts', x_BLD))
    if 'readouts' in aux:
      t_BLD, aux = t_BLD[-1], aux | {'readouts': t_BLD}
    head = heads.Unembed(c.of_embedding, name='head')(table_DV)
    return Output(t_BLD, head, aux=aux, extra=extra)

  def _pooled(self, x_BD: jax.Array) -> jax.Array:
    act = FFNS[self.POOLER_ACT].act if self.POOLER_ACT else jnp.tanh
    return act(self._dense('pooler', x_BD, self.config.d_model))

  def _dense(self, name: str, x: jax.Array, size: int, output: bool = False,
             bias: bool = True) -> jax.Array:
    w = layers.weight(self, name, (x.shape[-1], size), ('embed', None),
                      output=output)
    y = layers.einsum('...D,DE->...E', x, w, self.config.compute_dtype)
    return layers.add_bias(y, layers.bias(
        self, f'{name}_bias', (size,), (None,), output=output)) if bias else y


class EncoderDecoder(nn.Module):
  """Source [B, M] and target [B, L] -> Output (Vaswani et al. 2017, figure 1).

  The encoder reads the source, every token seeing all; the decoder writes the
  target, a token seeing those before it and, by cross-attention, all of the
  encoder's output: the memory. One embedding serves both and, tied, the head.

  The target is what the decoder is shown: its output at l predicts target
  l + 1. To generate: `encode` once, `decode` the start with an empty cache
  and the memory, then token by token with the cache alone, which holds the
  keys and values of the memory from then on.

  DECODER_EMBED: what the names of the decoder's positions and norm of the
    embedding begin with; '': they are the encoder's.
  STARTS_AFTER_END: whether a target starts after the token that ends texts, and
    not after that of padding.
  """
  STACK = 'encoder-decoder'
  REREADS = False
  DECODER_EMBED = ''
  STARTS_AFTER_END = False
  config: ModelConfig

  def setup(self):
    c = self.config
    self.embed = Embed(c)
    self.encoder = Stack(c, c.sections(c.num_layers, causal=False))
    self.decoder = Stack(c, c.sections(c.num_decoder_layers, cross=True))
    self.head = heads.Unembed(c)

  def __call__(self, tokens_BM: Optional[jax.Array],
               decoder_tokens_BL: Optional[jax.Array] = None, *,
               segment_ids_BM: Optional[jax.Array] = None,
               decoder_positions_BL: Optional[jax.Array] = None,
               decoder_segment_ids_BL: Optional[jax.Array] = None,
               cache: Any = None, memory: Optional[jax.Array] = None,
               one_by_one: bool = False, **how: Any) -> Output:
    """Runs both stacks, or the decoder alone.

    Args:
      tokens_BM: the source; None with `memory` or a cache that holds it.
      decoder_tokens_BL: what the decoder is shown; default: the source.
      segment_ids_BM: 0 where the source is padding; as a Decoder's.
      decoder_positions_BL: default: 0..L-1; with a cache, where the tokens go.
      decoder_segment_ids_BL: 0 where the target is padding; as a Decoder's.
      cache: of the decoder; see architectures.init_cache.
      memory: the encoder's output, where it is known.
      one_by_one: whether parameters and cache are those that the function of
        that name returns.
      **how: further fields of Context: deterministic; keep_layers and
        keep_attention, with which the encoder's layers come first in aux, and
        `readouts` are what the head would read of the decoder's.
    """
    aux = {}
    if memory is None and tokens_BM is not None:
      memory, aux = self.encode(tokens_BM, segment_ids_BM=segment_ids_BM, **how)
    output = self.decode(
        tokens_BM if decoder_tokens_BL is None else decoder_tokens_BL,
        memory=memory, memory_segment_ids_BM=segment_ids_BM,
        positions_BL=decoder_positions_BL,
        segment_ids_BL=decoder_segment_ids_BL, cache=cache,
        one_by_one=one_by_one, **how)
    return output.replace(aux=_join_aux(aux, output.aux))

  def encode(self, tokens_BM: jax.Array, *,
             segment_ids_BM: Optional[jax.Array] = None, **how: Any
             ) -> tuple[jax.Array, dict]:
    """Returns the memory [B, M, D] and aux."""
    ctx = _context(tokens_BM, None, segment_ids_BM, **how)
    x_BMD, _ = self.embed(tokens_BM, ctx.positions_BL,
                          deterministic=ctx.deterministic)
    memory_BMD, _, aux = self.encoder(x_BMD, ctx)
    return memory_BMD, aux

  def decode(self, tokens_BL: jax.Array, *, memory: Optional[jax.Array] = None,
             memory_segment_ids_BM: Optional[jax.Array] = None,
             positions_BL: Optional[jax.Array] = None,
             segment_ids_BL: Optional[jax.Array] = None, cache: Any = None,
             one_by_one: bool = False, **how: Any) -> Output:
    """Returns what follows each target token; `memory` may be left out where
    the cache has been given it."""
    require(memory is not None or (
        cache is not None
        and any_cache(cache).memory_key_BMJK is not None),
            'a decoder attends to a memory: pass the source, `memory`, or a '
            'cache that was filled with one')
    require(cache is None or segment_ids_BL is None,
            'a cache holds one target a row: pass no decoder segment ids')
    ctx = _context(tokens_BL, positions_BL, segment_ids_BL,
                   memory=Memory(memory, memory_segment_ids_BM), **how)
    x_BLD, table_DV = self.embed(tokens_BL, ctx.positions_BL,
                                 of=self.DECODER_EMBED,
                                 deterministic=ctx.deterministic)
    x_BLD, cache, aux = self.decoder(x_BLD, ctx, cache, one_by_one)
    return Output(x_BLD, self.head(table_DV), cache, aux, memory=memory)


def init_cache(config: ModelConfig, batch: int, length: int):
  """An empty cache for `length` tokens a row: one entry a layer of the prefix
  or the suffix, [1, B, M, J, K], and a block of the period, [N / period, B, M,
  J, K], in their order; of layers that loop, those of each pass.

  Raises:
    ValueError: where learned positions do not reach `length`.
  """
  positions.check_length(config, length)
  def empty(kind: LayerKind, rows: int) -> LayerCache:
    c = config.of_kind(kind.name)
    return blocks.empty_cache(c, (rows, batch, length))
  return tuple(empty(kind, section.periods * section.passes)
               for section in config.sections(config.num_decoder_layers)
               for kind in section.kinds)


def any_cache(cache: Any) -> Optional[Cache]:
  """Returns one entry of a cache that holds tokens, all of which hold as many:
  [N / period, B, M, J, K], or [B, M, J, K] where the layers are apart. None: no
  entry does, as all are states, or there is no cache."""
  is_entry = lambda x: isinstance(x, Cache)
  return next((entry for entry in jax.tree.leaves(cache, is_leaf=is_entry)
               if is_entry(entry) and entry.key_BMJK is not None), None)


def one_by_one(params: Any, cache: Any) -> tuple[Any, list]:
  """Returns what a loop over single tokens takes instead of both arguments,
  with `one_by_one=True` in each call of the model: the decoder's layers apart,
  and a list of their slots, of the prefix, each period and the suffix.

  On CPU these are copies of the layers' weights, made once: XLA would make
  them at every turn of the loop. Elsewhere it reads them where they lie.
  """
  decoder, slots, entries = params['decoder'], [], iter(cache)
  apart = {}
  for name in SECTIONS:
    if name not in decoder:
      continue
    layers, layer_slots = ([
        jax.tree.map(operator.itemgetter(i), stacked)
        for i in range(jax.tree.leaves(stacked)[0].shape[0])] for stacked in (
            decoder[name], tuple(itertools.islice(entries,
                                                  len(decoder[name])))))
    apart[name] = jax.lax.platform_dependent(
        {str(i): layer for i, layer in enumerate(layers)},
        cpu=jax.lax.optimization_barrier, default=lambda x: x)
    slots += layer_slots
  if sharding.one_cpu():
    is_cache = lambda x: isinstance(x, Cache)
    slots = jax.tree.map(lambda x: x.turn() if is_cache(x) else x, slots,
                         is_leaf=is_cache)
  return params | {'decoder': decoder | apart}, slots


# What the layers of a stack report, put together in their order. `sections` has
# for each section of the stack the report of each block of its period, whose
# arrays are [periods, ...].


def _figures(sections: list[tuple[Report, ...]]) -> dict[str, dict]:
  """Returns the sums of the layers' losses; the loads of their experts, by
  path; their health, and with keep_layers what they chose of their experts, of
  all layers that have some. {}: there are neither losses nor experts."""
  reports = [report for section in sections for report in section]
  if not any(report.losses or report.health for report in reports):
    return {}
  losses, loads = [], {}
  for report in reports:
    losses.append({name: loss_N.sum()
                   for name, loss_N in report.losses.items()})
    loads |= report.loads
  health = [[report.health for report in section] for section in sections]
  figures = {'losses': summed(losses), 'loads': loads,
             'health': _stacked(health)}
  experts = [[report.experts for report in section] for section in sections]
  if any(report.experts for report in reports):
    figures['experts'] = _stacked(experts)
  return figures


def _stacked(sections: list[list[dict[str, jax.Array]]]
             ) -> dict[str, jax.Array]:
  """Returns [N, ...] by name, of the N layers that say anything."""
  told = []
  for section in sections:
    section = [named for named in section if named]
    if section:
      told.append(section)
  if not told:
    return {}
  return {name: _by_layer([[named[name] for named in section]
                           for section in told])
          for name in sorted(told[0][0])}


def _weights(sections: list[tuple[Report, ...]]) -> dict[str, jax.Array]:
  """Returns what the layers weighed the values with, [N, B, H, L, M], and the
  memory's values; {}: they do not say."""
  names = {'attention': 'weights_BHLM',
           'cross_attention': 'memory_weights_BHLM'}
  gathered = {}
  for name, field_ in names.items():
    weights = [[getattr(report, field_) for report in section]
               for section in sections]
    if weights[0][0] is None:
      continue
    heads = {w_NBHLM.shape[-3] for section in weights for w_NBHLM in section}
    require(len(heads) == 1,
            'attention weights are kept of layers with as many heads each')
    gathered[name] = _by_layer(weights)
  return gathered


def _by_layer(sections: list[list[jax.Array]]) -> jax.Array:
  """Returns [N, ...] of the arrays [periods, ...] of each block of a section.
  """
  parts = []
  for blocks_ in sections:
    layers_NU = jnp.stack(blocks_, 1)
    parts.append(layers_NU.reshape(-1, *blocks_[0].shape[1:]))
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _with_losses(aux: dict, losses: dict, loads: dict) -> dict:
  """Returns what a stack reports, with more losses and loads."""
  if not losses and not loads:
    return aux
  return aux | {'losses': summed([aux['losses'], losses]),
                'loads': aux['loads'] | loads}


def _join_aux(encoder: dict, decoder: dict) -> dict:
  """Sums the stacks' losses; the encoder's layers come first in the rest."""
  if not encoder or not decoder:
    return encoder or decoder
  joined_ = dict(decoder)
  for name in ('layers', 'attention'):
    if name in decoder:
      joined_[name] = *encoder[name], *decoder[name]
  if 'losses' in decoder:
    joined_ = _with_losses(joined_, encoder['losses'], encoder['loads'])
    joined_['health'] = jax.tree.map(
        lambda *x: jnp.concatenate(x), encoder['health'], decoder['health'])
  if 'experts' in decoder:
    joined_['experts'] = {name: (*encoder['experts'][name], *x)
                          for name, x in decoder['experts'].items()}
  return joined_
