"""One period of the layer pattern: what a stack repeats."""

from collections.abc import Callable
import functools
from typing import Any, Optional

import flax.linen as nn
import jax

from architectures.parts import remat
from architectures.parts import sharding
from architectures.parts import streams
from architectures.parts.attention import values
from architectures.parts.attention.cache import apart, joined, Slots
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context


class Period(nn.Module):
  """One period of the layer pattern. From layer to layer go x, which may be
  several streams, and, with model.value_residual, the values of the first one.
  Returned are also the keys and values of the layers `lends`, by their place
  before the period's end: -1 is the last.

  `in_loop`: a loop goes over several periods. If they have one layer, its remat
  needs no barrier. Anywhere else XLA would keep what the forward pass has, or
  compute several layers again at once.
  """
  config: ModelConfig
  pattern: tuple[LayerKind, ...]
  lends: tuple[int, ...] = ()
  in_loop: bool = False

  @nn.compact
  def __call__(self, carry: tuple[streams.X, Optional[values.First]],
               cache: Any, ctx: Context):
    x, first = carry
    caches, auxes, kept, lent = [], [], [], dict(ctx.lent)
    ends = len(self.pattern)
    wanted = {kind.source for kind in self.pattern} | {
        ends + place for place in self.lends}
    for i, kind in enumerate(self.pattern):
      config = self.config.of_kind(kind.name)
      block = remat.block(BLOCKS[config.block], config,
                          prevent_cse=not (self.in_loop and ends == 1))
      own = ctx.replace(first=first, keys=lent.get(kind.source), lent={},
                        lends=i in wanted)
      own_cache = None if cache is None else cache[i]
      make = functools.partial(block, config, kind, name=f'block_{i}')
      if (sharding.devices() == 1 or self.is_initializing()
          or self.in_loop and i == 0):
        x, new, aux = make()(x, own, own_cache)
      else:
        x, new, aux = self._after_its_weights(f'block_{i}', make, x, own,
                                              own_cache)
      if getattr(new, 'first', None) is not None:
        first, new = new.first, new.replace(first=None)
      if getattr(new, 'lent', None) is not None:
        lent[i], new = new.lent, new.replace(lent=None)
      caches.append(new)
      auxes.append(aux)
      kept.append(x if ctx.keep_layers else ())
    with_cache = cache is not None or ctx.keep_attention
    return (x, first), (
        tuple(caches) if with_cache else None, tuple(auxes), tuple(kept),
        {place: lent[ends + place] for place in self.lends})


  def _after_its_weights(self, name: str, block: Callable, x: streams.X,
                         *args: Any):
    """Returns block(x, *args), whose gradient goes on to the layer before it
    when those of its weights are there, each of them in its shards.

    XLA's scheduler may otherwise put off their sums over the devices, and then
    several layers have whole gradients at once. In a loop it cannot: the end of
    an iteration needs them.
    """
    held = [x]

    def tied(variables: Any):
      held[0], own = _tied(held[0], variables['params'][name])
      return {'params': {**variables['params'], name: own}}

    return nn.map_variables(lambda period: block()(held[0], *args), 'params',
                            tied)(self)


@jax.custom_vjp
def _tied(x: streams.X, params: Any) -> tuple[streams.X, Any]:
  return x, params


_tied.defvjp(lambda x, params: ((x, params), None),
             lambda _, gradients: jax.lax.optimization_barrier(gradients))


class Scanned(Period):
  """A period as the body of a scan.

  The slots of all periods go from one to the next, and each writes its own,
  those of place `n`, where they lie. If a scan were given the slots period by
  period and returned them, XLA would copy all of them for each token.
  """

  def __call__(self, carry: tuple[Any, Slots],
               own: tuple[Optional[jax.Array], Any], ctx: Context):
    carry, slots = carry
    n, rest = own
    cache = None if slots is None else joined(slots, rest, n)
    carry, (cache, *out) = super().__call__(carry, cache, ctx)
    if slots is not None:
      slots, cache = apart(cache)
    return (carry, slots), (cache, *out)
