"""What mixes the tokens of a layer: (x_BLD, context, cache) -> (y_BLD, cache).

An entry of MIXERS is all that there is of one. A new one is a file like
latent.py or, of a recurrence, like recurrent/mamba2.py, and its entry here.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Optional

import flax.linen as nn

from architectures.parts.attention import latent
from architectures.parts.attention import multi_head
from architectures.parts.config import ModelConfig
from architectures.parts.recurrent import layer, linear_attention, mamba2


@dataclasses.dataclass(frozen=True)
class Mixer:
  """One way of mixing tokens.

  Attributes:
    module: of (config, kind), named by the block; its parameters stand under
      that name. Its FUSED says whether it may do without scores [B, H, L, M].
    cache: (config, shape) -> an empty cache.Cache, or the state of a
      recurrence; `shape` is [..., B, M].
    products: config -> which of linear.PRODUCTS a layer has.
    settings: the group of fields of config.model that it reads.
    fields: others of config.model that it reads and not every mixer does.
    sources: fields that others are derived from, where those are left open,
      and that it does not read otherwise.
    divided: (mesh axis, field of config.model that it must divide).
    whole: of these, the fields that a mesh need not divide where they are 1:
      all devices have the same.
    state: whether it is a recurrence, whose cache is a state of one size: what
      has been read cannot be taken back, padding must be told apart, and a row
      stays on one device.
    at_once: config -> how many numbers of a token its widest step holds; None:
      attention's scores.
    positional: whether its layers turn or bias by positions.
    turns_heads: whether what positions turn are heads of head_dim features; if
      not, `check` says what they may be.
    check: (config, stack) -> None; raises RequestError for what cannot be.
      `stack` is what architectures.stack returns.
  """
  module: type[nn.Module]
  cache: Callable[[ModelConfig, tuple[int, ...]], Any]
  products: Callable[[ModelConfig], set[str]]
  settings: Optional[type] = None
  fields: tuple[str, ...] = ()
  sources: tuple[str, ...] = ()
  divided: tuple[tuple[str, str], ...] = ()
  whole: tuple[str, ...] = ()
  state: bool = False
  at_once: Optional[Callable[[ModelConfig], int]] = None
  positional: bool = True
  turns_heads: bool = True
  check: Callable[[ModelConfig, str], None] = lambda c, stack: None


def of(c: ModelConfig) -> Mixer:
  """Returns the mixer of a model, or of its layers of one kind."""
  return MIXERS[c.mixer]


def readers(c: ModelConfig, field: str) -> list[ModelConfig]:
  """Returns the configs of those kinds of layer whose mixer reads a field."""
  return [own for own in map(c.of_kind, c.kinds_used)
          if field in of(own).fields]


def with_state(c: ModelConfig) -> bool:
  """Whether some layers of a model read a row in one direction alone and keep
  a state of it: a recurrence, or a short convolution before attention."""
  return any(of(own).state for own in map(c.of_kind, c.kinds_used)) or any(
      own.attention_conv for own in readers(c, 'attention_conv'))


# Of scores, and of products with a bias.
SCORES = ('attention_kernel', 'attention_softcap', 'attention_sinks',
          'attention_dropout', 'attention_bias', 'attention_out_bias')


def recurrent(module: type[layer.Layer],
              heads: tuple[str, ...] = ('key_heads', 'value_heads'),
              positional: bool = False, check: Callable = layer.check
              ) -> Mixer:
  """Returns the entry of a recurrence.

  Args:
    module: its layer.
    heads: those of its settings that the mesh axis tensor must divide.
    positional: as of a Mixer.
    check: (name, config, stack) -> None, as of a Mixer.
  """
  name = module.NAME
  return Mixer(
      module, functools.partial(layer.empty, name),
      products=lambda c: set(module.PRODUCTS), settings=module.settings,
      fields=('norm_eps',),
      sources=('num_heads', 'head_dim', 'mup_base_head_dim'),
      turns_heads=False,
      divided=tuple(('tensor', f'{name}.{field}') for field in heads),
      state=True, at_once=functools.partial(layer.at_once, name),
      positional=positional, check=functools.partial(check, name))


MIXERS = {
    'attention': Mixer(
        multi_head.Attention, multi_head.empty,
        products=lambda c: {'query', 'out'} | (
            set() if c.kv_sharing else {'key', 'value'}) | (
                multi_head.gate_products(c.attention_gate)),
        fields=('num_kv_heads', 'attention_scale', 'qk_norm', 'qk_norm_over',
                'attention_gate', 'value_residual', 'value_embedding',
                'kv_sharing', 'attention_conv', *SCORES),
        divided=(('tensor', 'num_heads'), ('tensor', 'num_kv_heads'))),
    'latent': Mixer(
        latent.LatentAttention, latent.empty, latent.products,
        settings=latent.LatentConfig,
        fields=('attention_gate', 'norm_eps', *SCORES),
        sources=('head_dim', 'mup_base_head_dim'), turns_heads=False,
        divided=(('tensor', 'num_heads'), ('fsdp', 'latent.kv_rank'),
                 ('fsdp', 'latent.q_rank')),
        check=latent.check),
    'deltanet': recurrent(linear_attention.DeltaNet),
    'mamba2': dataclasses.replace(
        recurrent(mamba2.Mamba2, heads=('heads', 'groups'),
                  check=mamba2.check),
        whole=('mamba2.groups',)),
    'kda': recurrent(linear_attention.KDA, check=linear_attention.check_kda),
    'gla': recurrent(linear_attention.GLA, ('heads',)),
    'retnet': recurrent(linear_attention.RetNet, ('heads',), positional=True,
                        check=linear_attention.check_retnet),
}
