"""The model config: one frozen, hashable value that every layer reads.

It has the sizes and the choices of a model, and the parts that were chosen.
Each part with fields of its own is a frozen dataclass beside the module that
reads them, as RopeConfig in positions.py, and stands in `parts` where a layer
has it: `c.part(RopeConfig).theta`. A part that no layer has does not exist.

flat.py makes this value of the names in a config file, which are flat
(`rope.theta`), and writes it back; no other file knows these names. What the
fields may say together is checked in tables.py.

Axis legend, for every array of the project:
B batch, L length, M memory length (what is attended to), D d_model, H query
heads, J key-value heads, R = H/J, K head size, F d_ff, V vocabulary, N layers,
E experts, C expert capacity, G routing groups, S group size, T tokens (= G*S),
X experts of a token, A assignments of a token to an expert (= T*X), I inputs
and O outputs of a product, P places that are computed at once (rows of the
experts, positions of a chunk), Q shards of the tokens, W steps of a window,
U an axis that has no letter.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Optional, TypeVar

import jax.numpy as jnp

from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.loops import LoopsConfig
from architectures.parts.lora import LoraConfig
from common import kinds
from common.fields import AT_START, field, FUNCTION, RUN, SAME
from common.fields import REGULARISATION, SHAPES, SIZE, Wait

Part = TypeVar('Part')  # the dataclass of a part

PARAMETRIZATIONS = ('standard', 'mup')
DTYPES = ('float32', 'bfloat16')


class Frozen(dict):
  """A dict that nobody changes, so that it can be hashed."""

  def __hash__(self) -> int:  # type: ignore[override]
    return hash(_frozen(self))


def _frozen(value: Any) -> Any:
  return (tuple(sorted((name, _frozen(x)) for name, x in value.items()))
          if isinstance(value, dict) else value)


@dataclasses.dataclass(frozen=True)
class Kind:
  """What the layers of a kind have in place of the model's.

  Attributes:
    said: what config.model.kinds says of it, by flat names.
    fields: the fields of the model that are other ones, by name.
    parts: (the class of a part, its fields that are other ones).
  """
  said: Frozen
  fields: Frozen
  parts: tuple[tuple[type, Frozen], ...] = ()


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What one layer of the pattern holds; `name` is of its kind in
  model.kinds, '' of a layer that is as the model. `source` is the layer whose
  keys and values it reads, None: its own. In a period, the prefix or suffix,
  0 is the first layer; -1 is the prefix's last layer, seen from a period."""
  attention: str
  ffn: str
  causal: bool = True
  cross: bool = False
  name: str = ''
  source: int | None = None


class Section(NamedTuple):
  """Layers of a stack that follow one another: `kinds`, `periods` times, and
  all of these `passes` times. `name` is that of their parameters."""
  name: str
  kinds: tuple[LayerKind, ...]
  periods: int
  passes: int = 1

  @property
  def layers(self) -> tuple[LayerKind, ...]:
    """The kind of each layer that a token goes through."""
    return self.kinds * self.periods * self.passes


# No model is as deep; the programs of deeper ones would take hours to make.
MOST_LAYERS = 10_000  # one function, repeated
MOST_MODULES = 64  # each written out
MOST_WIDE = 2**20  # more would be no matrices that a device can index


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A model: its sizes and choices, with the derived ones filled in, and the
  parts that were chosen, each a value of its own class."""
  arch: str = field('gpt', 'a page of architectures/')
  d_model: int = field(128, 'width of the residual stream', above=0,
                       most=MOST_WIDE, resume=SHAPES, about=SIZE)
  num_layers: int = field(4, 'of the encoder, in encoder-decoders', above=0,
                          most=MOST_LAYERS, resume=SHAPES, about=SIZE)
  num_decoder_layers: int = field(
      0, 'layers of the decoder in encoder-decoders; derived: num_layers',
      most=MOST_LAYERS, resume=SHAPES, about=SIZE)
  num_heads: int = field(4, 'query heads', above=0, most=MOST_WIDE,
                         resume=SHAPES, about=SIZE, of_layers=True)
  num_kv_heads: int = field(
      0, 'key and value heads; derived: num_heads', most=MOST_WIDE,
      resume=SHAPES, about=SIZE, of_layers=True)
  head_dim: int = field(0, 'size of a head; derived: d_model / num_heads',
                        most=MOST_WIDE, resume=SHAPES, about=SIZE,
                        of_layers=True)
  d_ff: int = field(
      0, 'hidden units of the feed-forward network; derived: 4 d_model',
      resume=SHAPES, about=SIZE, of_layers=True)
  vocab_size: int = field(0, "derived: the tokenizer's", resume=SHAPES,
                          about=SIZE)
  max_len: int = field(0, 'the length of the model; derived: data.length',
                       resume=SHAPES, about=SIZE)
  embed_dim: int = field(
      0, 'features of the embedding of an encoder, of which a product makes '
      'd_model; 0: it has d_model, and there is no product', resume=SHAPES)
  type_vocab_size: int = field(0, 'kinds of segments (BERT: 2); 0: none',
                               resume=SHAPES)
  next_sentence: bool = field(
      False, "BERT's pooler, and its head of two texts: whether the second "
      'follows the first (mlm_nsp), or in which order they stand (mlm_sop)')
  norm: str = field('layernorm', 'the norm of every layer')
  norm_eps: float = field(1e-5, 'added to the variance or the mean square',
                          above=0, most=1, resume=FUNCTION)
  embed_norm: bool = field(False, 'a norm right after the embedding')
  position: str = field('learned', 'the position encoding', of_layers=True)
  ffn: str = field(
      'gelu', 'the feed-forward network; moe: a mixture of experts; none: '
      'layers end before it', of_layers=True)
  block: str = field(
      'pre_norm', 'how norms, attention and networks are wired',
      of_layers=True)
  residual: str = field(
      'plain', 'What attention and networks read of what stands before them: '
      'plain, the residual sum; hyper (hyper-connections), mhc or gated, a '
      'mixture of several streams; or attention (attention residuals), a '
      'weighted mean.')
  layer_scale: bool = field(
      False, 'a learned factor of what each layer returns, 1 at first')
  loop: str = field(
      'none', 'What each pass reads where the layers of the pattern, between '
      'the prefix and the suffix, are run several times: plain, what the pass '
      'before returned; add, concat or gate, that and the input of the first '
      'pass. none: they are run once.')
  residual_scale: float = field(
      1.0, 'The factor of what a branch adds to a plain residual sum.',
      above=0, resume=FUNCTION)
  branch_conv: int = field(
      0, 'Tokens that a convolution beside the results of attention and of the '
      'network sees; 0: no convolution.', resume=SHAPES, of_layers=True)
  mixer: str = field(
      'attention', 'What mixes the tokens of a layer: attention; latent, whose '
      'keys and values are made of a small vector a token; a recurrence; or '
      'short_conv, a convolution over a few tokens.',
      of_layers=True)
  memory: str = field(
      'none', 'What a layer reads beside its input: none, or rows of tables '
      'that the last tokens look up, by gates (engram) or added up '
      '(over_encoding), or that the token does (per_layer).', of_layers=True)
  attention: str = field('global', 'which keys a query sees', of_layers=True)
  pattern: str = field(
      '', 'The kinds of layer, names of model.kinds, that are repeated over '
      "the layers, such as local,local,global; empty: all are the model's own.")
  prefix: str = field(
      '', 'the kinds of the layers before the first period, likewise')
  suffix: str = field(
      '', 'the kinds of the layers after the last period, likewise')
  # What the layers of a kind have of their own: a Kind, by its name.
  kinds: Frozen = dataclasses.field(default_factory=Frozen)
  attention_kernel: str = field(
      'auto', 'What computes attention over whole sequences. auto: splash on '
      'TPU and cudnn on GPU, where they can. Decoding with a cache is always '
      'xla.', resume=SAME, about=RUN)
  sliding_window: int = field(
      0, 'the keys that a banded layer sees, that of the query included',
      resume=FUNCTION)
  attention_chunk: int = field(
      0, 'The tokens of a chunk, within which a chunked layer sees keys.',
      resume=FUNCTION)
  attention_scale: float = field(
      0.0, 'The factor of the scores; derived: head_dim ** -0.5 (with mup: '
      'that of the base).', least=0, resume=FUNCTION, of_layers=True)
  attention_softcap: float = field(
      0.0, 'bounds the attention scores; 0: none', least=0, resume=FUNCTION,
      of_layers=True)
  attention_sinks: bool = field(
      False, "a learned term in the softmax's denominator", of_layers=True)
  attention_gate: str = field(
      'none', "of the heads' outputs: elementwise, headwise", of_layers=True)
  attention_bias: bool = field(True, 'biases in the products of attention',
                               of_layers=True)
  attention_out_bias: bool = field(
      True, 'if so, in the product of its output too', of_layers=True)
  ffn_bias: bool = field(True, 'biases in the feed-forward network',
                         of_layers=True)
  tie_embeddings: bool = field(True, "the head is the embedding's transpose")
  mtp_depth: int = field(
      0, 'modules that predict a token further ahead each; read in training',
      most=MOST_MODULES, resume=SHAPES)
  embed_scale: float = field(
      1.0, 'The factor of the embedding; 0, derived: d_model ** 0.5 (with mup: '
      'that of the base).', resume=FUNCTION)
  logits_scale: float = field(
      1.0, 'The factor of the logits; 0, derived: d_model ** -0.5 (with mup: '
      'that of the base).', resume=FUNCTION)
  logits_softcap: float = field(0.0, 'bounds the logits; 0: none', least=0,
                                resume=FUNCTION)
  logits_bias: bool = field(False, 'a bias of the logits')
  head: str = field(
      '', "What is read off the last layer; derived: the objective's.",
      about=SIZE)
  num_labels: int = field(
      0, 'outputs of the head of a task; derived: of the training data\'s '
      'labels', resume=SHAPES, about=SIZE)
  head_dropout: float = field(
      0.0, 'of what the head of a task is applied to', least=0, below=1,
      resume=REGULARISATION, about=RUN)
  pooling: str = field(
      'cls', "What the head of a row reads of an encoder's tokens: cls, the "
      'first one, or mean, the mean of all that are not padding.',
      resume=FUNCTION, about=SIZE)
  dropout: float = field(
      0.0, 'of the embedding and of what each part adds', least=0, below=1,
      resume=REGULARISATION, about=RUN)
  attention_dropout: float = field(
      0.0, 'of attention weights', least=0, below=1, resume=REGULARISATION,
      about=RUN)
  ffn_dropout: float = field(
      0.0, 'Of hidden units of dense networks; those of experts: '
      'moe.expert_dropout.', least=0, below=1, resume=REGULARISATION,
      about=RUN)
  parametrization: str = field(
      'standard', 'How initial sizes and learning rates change with width: '
      'standard, or mup (docs/mup.md), which equals standard at the base '
      'width.', choices=PARAMETRIZATIONS, resume=FUNCTION, about=SIZE)
  mup_base_width: int = field(
      0, 'the d_model of the base, which mup needs', resume=FUNCTION,
      about=SIZE)
  mup_base_head_dim: int = field(
      0, 'its head_dim; derived: it has as many heads', resume=FUNCTION,
      about=SIZE, of_layers=True)
  init: str = field('scaled_normal', 'the distribution of the first weights',
                    resume=AT_START, about=RUN)
  init_stddev: float = field(0.02, 'of normal and scaled_normal', least=0,
                             resume=AT_START, about=RUN)
  init_scale: float = field(
      1.0, 'of fan_in: the variance is this / fan_in', above=0,
      resume=AT_START, about=RUN)
  dtype: str = field('float32', 'of the computation', choices=DTYPES,
                     resume=FUNCTION, about=RUN)
  param_dtype: str = field(
      'float32', 'Of the parameters. What the optimiser keeps is float32 in '
      'any case.', choices=DTYPES, resume=SHAPES, about=RUN)
  scan_layers: bool = field(
      True, 'one program for all layers, or one for each', resume=SAME,
      about=RUN)
  remat: str = field(
      'none', 'What the backward pass computes again: nothing (none), all but '
      'products (dots), or each layer from its input (full; with offload the '
      "inputs wait in the host's memory).", resume=SAME, about=RUN)
  keep_gathered: str = field(
      'none', 'The products (of lora.targets, with commas) whose weights, if '
      'they are sharded over fsdp, stay whole from the forward to the backward '
      'pass. none: all are gathered again, which sends more and keeps less.',
      resume=SAME, about=RUN, several=True)

  # The adapters, without a rank where there are none.
  lora: LoraConfig = LoraConfig()
  # The parts that any layer has, one of each class.
  parts: tuple[Any, ...] = ()

  def find(self, kind: type[Part]) -> Optional[Part]:
    """Returns the part of a class; None where no layer has it."""
    for part in self.parts:
      if type(part) is kind:
        return part
    return None

  def part(self, kind: type[Part]) -> Part:
    """Returns the part of a class, which a layer has."""
    part = self.find(kind)
    assert part is not None, f'no layer of this model has a {kind.__name__}'
    return part

  def with_part(self, kind: type[Any], **fields: Any) -> 'ModelConfig':
    """Returns the config with other fields of a part; as it is where no layer
    has the part."""
    part = self.find(kind)
    if part is None:
      return self
    changed = dataclasses.replace(part, **fields)
    parts = [changed if x is part else x for x in self.parts]
    return dataclasses.replace(self, parts=tuple(parts))

  def without(self, kind: type[Any]) -> 'ModelConfig':
    """Returns the config without a part."""
    parts = [part for part in self.parts if type(part) is not kind]
    return dataclasses.replace(self, parts=tuple(parts))

  def waits(self) -> dict[str, Wait]:
    """Returns the fields that nothing reads as others are, with what each of
    them waits for."""
    waits = {}
    if not self.attention_bias:
      waits['attention_out_bias'] = Wait('attention_bias', 'is set')
    if self.parametrization != 'mup':
      for name in ('mup_base_width', 'mup_base_head_dim'):
        waits[name] = Wait('parametrization', 'is mup')
    if self.init != 'fan_in':
      waits['init_scale'] = Wait('init', 'is fan_in')
    return waits

  @property
  def compute_dtype(self):
    return jnp.dtype(self.dtype)

  @property
  def of_embedding(self) -> 'ModelConfig':
    """The config as the embedding and the head of masked words read it."""
    return dataclasses.replace(
        self, d_model=self.embed_dim) if self.embed_dim else self

  @property
  def base_width(self) -> int:
    """The d_model of muP's base; the standard form is its own."""
    return self.mup_base_width or self.d_model

  @property
  def base_head_dim(self) -> int:
    """The head_dim of muP's base."""
    return self.mup_base_head_dim or self.head_dim

  @property
  def widening(self) -> float:
    """How many times as wide as muP's base; 1 in the standard form."""
    return self.d_model / self.base_width

  @property
  def head_widening(self) -> float:
    """The same of a head."""
    return self.head_dim / self.base_head_dim

  @property
  def score_scale(self) -> float:
    """What multiplies the products of queries and keys. `attention_scale` is
    the base's; in muP it falls from there as 1 / head_dim (Yang et al. 2022,
    definition 4.1)."""
    return self.attention_scale * (self.base_head_dim / self.head_dim)

  def layers(self, num_layers: int) -> tuple['ModelConfig', ...]:
    """Returns each layer that a token goes through in a stack of so many, as
    `of_kind` does; layers of one kind are one value."""
    return tuple([self.of_kind(kind.name)
                  for kind in self.layer_kinds(num_layers)])

  @functools.cached_property
  def distinct_layers(self) -> tuple['ModelConfig', ...]:
    """The layers of each kind, once, in the order of the layers."""
    return tuple([self.of_kind(name) for name in self.kinds_used])

  def of_kind(self, name: str) -> 'ModelConfig':
    """Returns the layers of a kind: a config that has their sizes, choices and
    parts, and no pattern; '': layers that are as the model says."""
    if not (name or self.pattern or self.prefix or self.suffix):
      return self
    if name not in self._known_kinds:
      self._known_kinds[name] = self._layer(name)
    return self._known_kinds[name]

  @functools.cached_property
  def _known_kinds(self) -> dict[str, 'ModelConfig']:
    """What `of_kind` has returned, so that layers of one kind are one value."""
    return {}

  def _layer(self, name: str) -> 'ModelConfig':
    """Makes a layer of the model's fields and of those of its kind."""
    layer = dataclasses.replace(self, pattern='', prefix='', suffix='',
                                kinds=Frozen())
    if not name:
      return layer
    kind = self.kinds[name]
    layer = dataclasses.replace(layer, **kind.fields)
    for part, fields in kind.parts:
      layer = layer.with_part(part, **fields)
    return layer

  @functools.cached_property
  def names_of_layers(self) -> tuple[tuple[str, ...], ...]:
    """The kinds of the layers before the first period, of a period, and of
    those after the last; '' is that of layers as the model says."""
    return (kinds.split(self.prefix), kinds.split(self.pattern) or ('',),
            kinds.split(self.suffix))

  @functools.cached_property
  def kinds_used(self) -> tuple[str, ...]:
    """The kinds of all layers, each once, in the order of the layers."""
    first, period, last = self.names_of_layers
    return tuple(dict.fromkeys((*first, *period, *last)))

  @property
  def shares_keys(self) -> bool:
    """Whether a layer is to read the keys and values of one before it."""
    attention = self.find(AttentionConfig)
    return attention is not None and attention.kv_sharing

  @property
  def has_experts(self) -> bool:
    """Whether any layer is a mixture of experts."""
    return any(layer.ffn == 'moe' for layer in self.distinct_layers)

  def sections(self, num_layers: int, *, causal: bool = True,
               cross: bool = False) -> tuple[Section, ...]:
    """The layers of a stack of so many: those before the first period, its
    repetitions, and those after the last. Each section has layers, and the
    repetitions have the passes of model.loop."""
    first, period, last = self.names_of_layers
    repeated = (num_layers - len(first) - len(last)) // len(period)

    def layer_kinds(names: tuple[str, ...], before: tuple[str, ...]):
      configs = [self.of_kind(name) for name in (*before, *names)]
      return tuple(LayerKind(c.attention, c.ffn, causal, cross, name,
                             _source(configs, i, len(before)))
                   for i, (c, name) in enumerate(
                       zip(configs[len(before):], names)))

    passes = 1
    if self.loop != 'none':
      passes = self.part(LoopsConfig).passes
    return tuple(Section(name, layer_kinds(names, before), *times)
                 for name, names, before, times in zip(
                     kinds.SECTIONS, (first, period, last), ((), first, ()),
                     ((1,), (repeated, passes), (1,))) if names)

  def layer_kinds(self, num_layers: int, *, causal: bool = True,
                  cross: bool = False) -> tuple[LayerKind, ...]:
    """The kind of each layer that a token goes through in a stack of so many,
    which are more where they loop."""
    return sum((section.layers for section in self.sections(
        num_layers, causal=causal, cross=cross)), ())


def _source(layers: list[ModelConfig], i: int, first: int) -> int | None:
  """Returns which layer lends its keys and values to layer i of those from
  `first` on: the nearest one before it that has some, of as many tokens."""
  reader = layers[first + i]
  if not reader.shares_keys:
    return None
  for j in reversed(range(-first, i)):
    lender = layers[first + j]
    if not lender.shares_keys and _sees(lender) == _sees(reader):
      return j
  return None


def _sees(layer: ModelConfig) -> tuple:
  """Returns what decides which tokens a layer sees."""
  window = layer.sliding_window if layer.attention != 'global' else 0
  return layer.mixer, layer.attention, window
