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
from common.fields import MOST_TAPS, REGULARISATION, SHAPES, SIZE, ReadIf

Part = TypeVar('Part')  # the dataclass of a part

PARAMETRIZATIONS = ('standard', 'mup')
DTYPES = ('float32', 'bfloat16')


class FrozenDict(dict):
  """A dict that nobody changes, so that it can be hashed."""

  def __hash__(self) -> int:  # type: ignore[override]
    return hash(_dicts_as_tuples(self))


def _dicts_as_tuples(value: Any) -> Any:
  """Returns nested dicts as sorted tuples of names and values, which can be
  hashed, and any other value as it is."""
  if not isinstance(value, dict):
    return value
  pairs = [(name, _dicts_as_tuples(inner)) for name, inner in value.items()]
  return tuple(sorted(pairs))


@dataclasses.dataclass(frozen=True)
class LayerOverrides:
  """The fields that the layers of a kind have in place of the model's.

  Attributes:
    overrides: the entry of config.model.kinds, with what follows from it, by
      flat names.
    fields: the fields of the model that differ, by name.
    parts: pairs of the class of a part, and those of its fields that differ.
  """
  overrides: FrozenDict
  fields: FrozenDict
  parts: tuple[tuple[type, FrozenDict], ...] = ()


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """One layer of the pattern.

  Attributes:
    attention: the rule of which keys a query sees.
    ffn: its feed-forward network.
    causal: whether a token sees no later one.
    cross: whether it attends to the encoder's tokens too.
    name: the name of its kind in model.kinds; '': it is as the model says.
    source: the layer whose keys and values it reads; None: its own. In a
      period, the prefix or the suffix, 0 is the first layer; -1 is the prefix's
      last layer, seen from a period.
  """
  attention: str
  ffn: str
  causal: bool = True
  cross: bool = False
  name: str = ''
  source: int | None = None


class Section(NamedTuple):
  """Layers of a stack that follow one another.

  Attributes:
    name: the name of their parameters.
    kinds: the layers of one period.
    periods: the number of periods.
    passes: how many times all of these layers are run.
    periods_of_pass: the number of periods that a pass runs, where it runs some
      of them several times; 0: each once.
  """
  name: str
  kinds: tuple[LayerKind, ...]
  periods: int
  passes: int = 1
  periods_of_pass: int = 0

  @property
  def runs(self) -> int:
    """The number of periods that a token goes through."""
    periods_of_pass = self.periods
    if self.periods_of_pass:
      periods_of_pass = self.periods_of_pass
    return self.passes * periods_of_pass

  @property
  def layers(self) -> tuple[LayerKind, ...]:
    """The kind of each layer that a token goes through."""
    return self.kinds * self.runs


# Bounds of fields, past which no model goes. The programs of deeper models
# would take hours to make: MOST_LAYERS are of one function, repeated, and each
# of MOST_MODULES is written out. A device could not index the matrices of
# models wider than MOST_FEATURES.
MOST_LAYERS = 10_000
MOST_MODULES = 64
MOST_FEATURES = 2**20


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A model: its sizes and choices, with the derived ones filled in, and the
  parts that were chosen, each a value of its own class."""
  arch: str = field('gpt', 'The system, a page of architectures/.')
  d_model: int = field(128, 'The width of the residual stream.', above=0,
                       most=MOST_FEATURES, resume=SHAPES, about=SIZE)
  num_layers: int = field(
      4, 'The number of layers, in an encoder-decoder of the encoder.', above=0,
      most=MOST_LAYERS, resume=SHAPES, about=SIZE)
  num_decoder_layers: int = field(
      0, "The number of layers of an encoder-decoder's decoder; derived: "
      'num_layers.', most=MOST_LAYERS, resume=SHAPES, about=SIZE)
  num_heads: int = field(
      4, 'The number of heads of queries.', above=0, most=MOST_FEATURES,
      resume=SHAPES, about=SIZE, of_layers=True)
  num_kv_heads: int = field(
      0, 'The number of heads of keys and values; derived: num_heads.',
      most=MOST_FEATURES, resume=SHAPES, about=SIZE, of_layers=True)
  head_dim: int = field(
      0, 'The size of a head; derived: d_model / num_heads.',
      most=MOST_FEATURES, resume=SHAPES, about=SIZE, of_layers=True)
  d_ff: int = field(
      0, 'The hidden units of the feed-forward network; derived: 4 d_model.',
      resume=SHAPES, about=SIZE, of_layers=True)
  vocab_size: int = field(
      0, "The number of tokens that the model knows; derived: the tokenizer's.",
      resume=SHAPES, about=SIZE)
  max_len: int = field(
      0, 'The most tokens of a row; derived: data.length.', resume=SHAPES,
      about=SIZE)
  embed_dim: int = field(
      0, 'The features of the embedding of an encoder, of which a product '
      'makes d_model; 0: it has d_model, and there is no product.',
      resume=SHAPES)
  type_vocab_size: int = field(
      0, 'The number of kinds of segments (BERT: 2); 0: none.', resume=SHAPES)
  next_sentence: bool = field(
      False, "BERT's pooler, and its head of two texts: whether the second "
      'follows the first (mlm_nsp), or in which order they stand (mlm_sop).')
  norm: str = field('layernorm', 'The norm of every layer.')
  norm_eps: float = field(
      1e-5, 'The number that a norm adds to the variance or the mean square.',
      above=0, most=1, resume=FUNCTION)
  embed_norm: bool = field(False, 'A norm right after the embedding.')
  embed_affine: bool = field(
      False, 'A learned shift and a learned factor of each feature of the '
      'embedding, before its norm.', resume=SHAPES)
  position: str = field('learned', 'The position encoding.', of_layers=True)
  ffn: str = field(
      'gelu', 'The feed-forward network; moe: a mixture of experts; none: '
      'layers end before it.', of_layers=True)
  block: str = field(
      'pre_norm', 'How norms, attention and networks are wired.',
      of_layers=True)
  residual: str = field(
      'plain', 'The input of attention and of networks: plain, the residual '
      'sum; hyper (hyper-connections), mhc or gated, a mixture of several '
      'streams; or attention (attention residuals), a weighted mean of what '
      'came before.')
  skips: bool = field(
      False, 'Whether the result of layer i, times a learned number, is added '
      'to the input of layer N - 1 - i, of N layers.')
  layer_scale: bool = field(
      False, 'A learned factor of the output of each layer, 1 at first.')
  loop: str = field(
      'none', 'The input of each pass where the layers of the pattern, between '
      'the prefix and the suffix, are run several times: plain, the output of '
      'the pass before; add, concat or gate, that and the input of the first '
      'pass; turns, the outputs of both halves of the layers, which take '
      'turns. none: they are run once.')
  residual_scale: float = field(
      1.0, 'The factor of what a branch adds to a plain residual sum.',
      above=0, resume=FUNCTION)
  branch_conv: int = field(
      0, 'The number of tokens that a convolution sees beside the results of '
      'attention and of the network; 0: no convolution.', most=MOST_TAPS,
      resume=SHAPES,
      of_layers=True)
  mixer: str = field(
      'attention', 'The part of a layer that mixes tokens: attention; latent, '
      'whose keys and values are made of a small vector a token; a recurrence; '
      'or short_conv, a convolution over a few tokens.',
      of_layers=True)
  memory: str = field(
      'none', 'The vectors that a layer reads beside its input: none, or rows '
      'of tables that the last tokens look up, by gates (engram) or added up '
      '(over_encoding), or that the token does (per_layer), or the input of '
      'the token before (smear).', of_layers=True)
  attention: str = field('global', 'Which keys a query sees.', of_layers=True)
  pattern: str = field(
      '', 'The kinds of layer, names of model.kinds, that are repeated over '
      "the layers, such as local,local,global; empty: all are the model's own.")
  prefix: str = field(
      '', 'The kinds of the layers before the first period, likewise.')
  suffix: str = field(
      '', 'The kinds of the layers after the last period, likewise.')
  # For each kind of layer, by its name, what differs in its layers: a Kind.
  kinds: FrozenDict = dataclasses.field(default_factory=FrozenDict)
  attention_kernel: str = field(
      'auto', 'The program that computes attention over whole sequences. auto: '
      'splash on TPU and cudnn on GPU, where they can; never tokamax. Decoding '
      'with a cache is always xla.', resume=SAME, about=RUN)
  sliding_window: int = field(
      0, 'The number of keys that a banded layer sees, that of the query '
      'included.', resume=FUNCTION)
  attention_chunk: int = field(
      0, 'The tokens of a chunk, within which a chunked layer sees keys.',
      resume=FUNCTION)
  attention_scale: float = field(
      0.0, 'The factor of the scores; derived: head_dim ** -0.5 (with mup: '
      'that of the base).', least=0, resume=FUNCTION, of_layers=True)
  attention_softcap: float = field(
      0.0, 'The bound of the attention scores, by tanh; 0: none.', least=0,
      resume=FUNCTION, of_layers=True)
  attention_sinks: bool = field(
      False, "A learned term in the softmax's denominator.", of_layers=True)
  attention_gate: str = field(
      'none', "A gate of the heads' outputs: elementwise, headwise or none.",
      of_layers=True)
  attention_bias: bool = field(
      True, 'Biases in the products of attention.', of_layers=True)
  attention_out_bias: bool = field(
      True, 'A bias in the product of its output too, with attention_bias.',
      of_layers=True)
  ffn_bias: bool = field(
      True, 'Biases in the feed-forward network.', of_layers=True)
  tie_embeddings: bool = field(
      True, 'Whether the matrix of the head is the embedding, transposed.')
  mtp_depth: int = field(
      0, 'The number of modules that each predict a token further ahead, in '
      'training.', most=MOST_MODULES, resume=SHAPES)
  diffusion_block: int = field(
      0, 'The number of tokens of a block that see each other and all earlier '
      'blocks (block diffusion); 0: a token sees no later one.', least=0,
      most=2**20, resume=FUNCTION)
  self_conditioning: bool = field(
      False, 'For diffusion_block: whether noised tokens read what was '
      'predicted of them before.', resume=SHAPES)
  embed_scale: float = field(
      1.0, 'The factor of the embedding; 0, derived: d_model ** 0.5 (with mup: '
      'that of the base).', resume=FUNCTION)
  logits_scale: float = field(
      1.0, 'The factor of the logits; 0, derived: d_model ** -0.5 (with mup: '
      'that of the base).', resume=FUNCTION)
  logits_softcap: float = field(
      0.0, 'The bound of the logits, by tanh; 0: none.', least=0,
      resume=FUNCTION)
  logits_bias: bool = field(False, 'A bias of the logits.')
  head: str = field(
      '', "The head, which reads the last layer; derived: the objective's.",
      about=SIZE)
  num_labels: int = field(
      0, "The outputs of the head of a task; derived from the training data's "
      'labels.', resume=SHAPES, about=SIZE)
  head_dropout: float = field(
      0.0, 'The dropout before the head of a task.', least=0, below=1,
      resume=REGULARISATION, about=RUN)
  pooling: str = field(
      'cls', "What the head of a row reads of an encoder's tokens: cls, the "
      'first one, or mean, the mean of all that are not padding.',
      resume=FUNCTION, about=SIZE)
  dropout: float = field(
      0.0, 'The dropout of the embedding and of what each part adds.', least=0,
      below=1, resume=REGULARISATION, about=RUN)
  attention_dropout: float = field(
      0.0, 'The dropout of attention weights.', least=0, below=1,
      resume=REGULARISATION, about=RUN)
  ffn_dropout: float = field(
      0.0, 'The dropout of hidden units of dense networks; that of experts is '
      'moe.expert_dropout.', least=0, below=1, resume=REGULARISATION,
      about=RUN)
  parametrization: str = field(
      'standard', 'How initial sizes and learning rates change with width: '
      'standard, or mup (docs/mup.md), which equals standard at the base '
      'width.', choices=PARAMETRIZATIONS, resume=FUNCTION, about=SIZE)
  mup_base_width: int = field(
      0, 'The d_model of the base, which mup needs.', resume=FUNCTION,
      about=SIZE)
  mup_base_head_dim: int = field(
      0, 'The head_dim of the base; derived: it has as many heads.',
      resume=FUNCTION, about=SIZE, of_layers=True)
  mup_base_depth: int = field(
      0, 'The num_layers of the base: what a branch adds, and the epsilon of '
      'Adam, follow the number of layers from there (docs/mup.md). 0: they do '
      'not.', most=MOST_LAYERS, resume=FUNCTION, about=SIZE)
  init: str = field('scaled_normal', 'The distribution of the first weights.',
                    resume=AT_START, about=RUN)
  init_stddev: float = field(
      0.02, 'The standard deviation of init normal and scaled_normal.', least=0,
      resume=AT_START, about=RUN)
  init_scale: float = field(
      1.0, 'The variance of init fan_in is this / fan_in.', above=0,
      resume=AT_START, about=RUN)
  dtype: str = field('float32', 'The type of the computation.', choices=DTYPES,
                     resume=FUNCTION, about=RUN)
  param_dtype: str = field(
      'float32', 'The type of the parameters. The state of the optimiser is '
      'float32 in any case.', choices=DTYPES, resume=SHAPES, about=RUN)
  scan_layers: bool = field(
      True, 'One program for all layers, rather than one for each.',
      resume=SAME, about=RUN)
  remat: str = field(
      'none', 'The activations that the backward pass computes again: none, '
      'all but products (dots), or each layer from its input (full; with '
      "offload the inputs wait in the host's memory).", resume=SAME, about=RUN)
  keep_gathered: str = field(
      'none', 'The products (of lora.targets, with commas) whose weights, if '
      'they are sharded over fsdp, stay whole from the forward to the backward '
      'pass. none: all are gathered again, which sends more and keeps less.',
      resume=SAME, about=RUN, several=True)

  # The low-rank adapters; without a rank there are none.
  lora: LoraConfig = LoraConfig()
  # The parts that any layer has, one of each class.
  parts: tuple[Any, ...] = ()

  def find_part(self, kind: type[Part]) -> Optional[Part]:
    """Returns the part of a class, such as RopeConfig; None where no layer has
    it."""
    for part in self.parts:
      if type(part) is kind:
        return part
    return None

  def part(self, kind: type[Part]) -> Part:
    """Returns the part of a class, such as RopeConfig, which some layer has."""
    part = self.find_part(kind)
    assert part is not None, f'no layer of this model has a {kind.__name__}'
    return part

  def with_part(self, kind: type[Any], **fields: Any) -> 'ModelConfig':
    """Returns a copy of the config in which some fields of one part are
    changed. A part is a group of fields that has a frozen dataclass of its own,
    such as RopeConfig for rotary positions.

    Args:
      kind: the class of the part.
      **fields: the new values of its fields.

    Returns:
      The new config; this config itself if the model does not have the part.
    """
    part = self.find_part(kind)
    if part is None:
      return self
    # The part keeps its place among the others, so that equal configs still
    # compare as equal.
    parts = list(self.parts)
    parts[parts.index(part)] = dataclasses.replace(part, **fields)
    return dataclasses.replace(self, parts=tuple(parts))

  def without_part(self, kind: type[Any]) -> 'ModelConfig':
    """Returns the config without the part of a class."""
    parts = [part for part in self.parts if type(part) is not kind]
    return dataclasses.replace(self, parts=tuple(parts))

  def conditions_of_reading(self) -> dict[str, ReadIf]:
    """Returns the fields that have no effect as the config stands, such as
    those of muP in the standard parametrisation. A field that a user sets
    without effect is refused by this list.

    Returns:
      {field without effect: the other field that switches it off, and the
      condition under which it would be read}.
    """
    conditions = {}
    if not self.attention_bias:
      conditions['attention_out_bias'] = ReadIf('attention_bias', 'is set')
    if self.parametrization != 'mup':
      for name in ('mup_base_width', 'mup_base_head_dim', 'mup_base_depth'):
        conditions[name] = ReadIf('parametrization', 'is mup')
    if self.init != 'fan_in':
      conditions['init_scale'] = ReadIf('init', 'is fan_in')
    return conditions

  @property
  def compute_dtype(self):
    """The dtype of the computation."""
    return jnp.dtype(self.dtype)

  @property
  def config_of_embedding(self) -> 'ModelConfig':
    """The config as the embedding and the head of masked words read it."""
    if not self.embed_dim:
      return self
    return dataclasses.replace(self, d_model=self.embed_dim)

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
    """How many times as large as in muP's base a head is."""
    return self.head_dim / self.base_head_dim

  @property
  def base_depth(self) -> int:
    """The number of layers of muP's base; without one, the model's own."""
    return self.mup_base_depth or self.num_layers

  @property
  def deepening(self) -> float:
    """How many times as many layers as muP's base the model has."""
    return self.num_layers / self.base_depth

  @property
  def branch_scale(self) -> float:
    """The factor of what a branch adds to a plain residual sum: that of the
    base, divided by the depth over the base's (Dey et al. 2025, arXiv
    2505.01618, table 1 with alpha = 1)."""
    return self.residual_scale / self.deepening

  @property
  def score_scale(self) -> float:
    """The factor of the products of queries and keys. `attention_scale` is the
    base's; in muP it falls from there as 1 / head_dim (Yang et al. 2022,
    definition 4.1)."""
    return self.attention_scale * (self.base_head_dim / self.head_dim)

  def layers(self, num_layers: int) -> tuple['ModelConfig', ...]:
    """Returns the config of each layer that a token goes through, as
    `layer_config`
    does; layers of one kind are one value.

    Args:
      num_layers: the number of layers of the stack, each counted once.
    """
    kinds_of_layers = self.layer_kinds(num_layers)
    return tuple([self.layer_config(kind.name) for kind in kinds_of_layers])

  @functools.cached_property
  def distinct_layers(self) -> tuple['ModelConfig', ...]:
    """The layers of each kind, once, in the order of the layers."""
    return tuple([self.layer_config(name) for name in self.kinds_used])

  def layer_config(self, name: str) -> 'ModelConfig':
    """Returns the config of the layers of one kind. A model may have several
    kinds of layer, each with its own values of some fields.

    Args:
      name: the name of the kind, a key of model.kinds; '': the layers that have
        the model's own fields.

    Returns:
      The config, which has no pattern of layers. It is always the same object
      for a kind.
    """
    # In a model without kinds, the model's config is also that of its layers.
    if not (name or self.pattern or self.prefix or self.suffix):
      return self
    # Each is made once and kept.
    if name not in self._configs_by_kind:
      self._configs_by_kind[name] = self._make_layer_config(name)
    return self._configs_by_kind[name]

  @functools.cached_property
  def _configs_by_kind(self) -> dict[str, 'ModelConfig']:
    """The configs that `layer_config` has returned, so that layers of one kind
    are
    one value."""
    return {}

  def _make_layer_config(self, name: str) -> 'ModelConfig':
    """Makes the config of the layers of one kind. It is the config of the
    model, with the fields replaced that the kind overrides.

    Args:
      name: the name of the kind, a key of model.kinds; '': the layers that have
        the model's own fields.
    """
    # The config describes a layer, so it has no pattern and no kinds of layer.
    layer = dataclasses.replace(self, pattern='', prefix='', suffix='',
                                kinds=FrozenDict())
    if not name:
      return layer
    kind = self.kinds[name]
    # Replace the model's own fields, and then those of its parts. A part is a
    # group of fields with a dataclass of its own, such as RopeConfig.
    layer = dataclasses.replace(layer, **kind.fields)
    for part_class, fields in kind.parts:
      layer = layer.with_part(part_class, **fields)
    return layer

  @functools.cached_property
  def kind_names_of_sections(self) -> tuple[tuple[str, ...], ...]:
    """The names of the kinds of layer before the first period of the pattern,
    of a period, and after the last; '' stands for layers that are as the model
    says."""
    if not (self.pattern or self.prefix or self.suffix):
      return (), ('',), ()
    period = kinds.split_kind_names(self.pattern) or ('',)
    prefix = kinds.split_kind_names(self.prefix)
    suffix = kinds.split_kind_names(self.suffix)
    return prefix, period, suffix

  @functools.cached_property
  def kinds_used(self) -> tuple[str, ...]:
    """The kinds of all layers, each once, in the order of the layers."""
    prefix, period, suffix = self.kind_names_of_sections
    return tuple(dict.fromkeys((*prefix, *period, *suffix)))

  @property
  def shares_keys(self) -> bool:
    """Whether a layer is to read the keys and values of one before it."""
    attention = self.find_part(AttentionConfig)
    return attention is not None and attention.kv_sharing

  @property
  def has_experts(self) -> bool:
    """Whether any layer is a mixture of experts."""
    return any(layer.ffn == 'moe' for layer in self.distinct_layers)

  def sections(self, num_layers: int, *, causal: bool = True,
               cross: bool = False) -> tuple[Section, ...]:
    """Divides the layers of a stack into up to three sections: the prefix, the
    repeated pattern of layers, and the suffix. A repetition of the pattern is
    called a period.

    With model.loop, the repeated section is run several times (in passes).

    Args:
      num_layers: the number of layers, each counted once.
      causal: whether tokens see no later tokens.
      cross: whether the layers also attend to an encoder's result.

    Returns:
      The sections in order, each with the kinds of layer of one period, the
      number of periods, and the number of passes. A section without layers is
      left out.
    """
    # The pattern is repeated as often as it fits between prefix and suffix.
    prefix, period, suffix = self.kind_names_of_sections
    num_repeated = num_layers - len(prefix) - len(suffix)
    num_periods = num_repeated // len(period)
    num_passes, periods_of_pass = 1, num_periods
    if self.loop != 'none':
      loops = self.part(LoopsConfig)
      num_passes = loops.passes
      periods_of_pass = loops.count_rows_of_pass(num_periods)

    # The prefix and the suffix are one period each.
    sections = []
    for section, names in zip(kinds.SECTIONS, (prefix, period, suffix)):
      if not names:
        continue
      # Only layers of the repeated section may read keys of the prefix.
      names_before: tuple[str, ...] = ()
      periods, passes, of_pass = 1, 1, 1
      if section == kinds.REPEATED_SECTION:
        names_before, periods, passes = prefix, num_periods, num_passes
        of_pass = periods_of_pass
      layer_kinds = self._section_kinds(
          names, names_before=names_before, causal=causal, cross=cross)
      sections.append(Section(
          name=section, kinds=layer_kinds, periods=periods, passes=passes,
          periods_of_pass=of_pass))
    return tuple(sections)

  def _section_kinds(self, names: tuple[str, ...],
                     names_before: tuple[str, ...], causal: bool, cross: bool
                     ) -> tuple[LayerKind, ...]:
    """Returns what a section of the stack (the prefix, the repeated pattern or
    the suffix) needs to make its layers: a LayerKind for each. It names the
    kind of attention and of network, and the layer whose keys it reads, if any.

    Args:
      names: the name of each layer's kind, a key of model.kinds or ''.
      names_before: the names for the layers just before the section. Layers of
        the section may read their keys and values.
      causal: whether tokens see no later tokens.
      cross: whether the layers also attend to an encoder's result.
    """
    num_before = len(names_before)
    configs = [self.layer_config(name) for name in (*names_before, *names)]
    layer_kinds = []
    for i, name in enumerate(names):
      config = configs[num_before + i]
      source = _find_lender_of_keys(configs, i, num_before)
      layer_kinds.append(LayerKind(
          attention=config.attention, ffn=config.ffn, causal=causal,
          cross=cross, name=name, source=source))
    return tuple(layer_kinds)

  def layer_kinds(self, num_layers: int, *, causal: bool = True,
                  cross: bool = False) -> tuple[LayerKind, ...]:
    """Returns the kind of each layer that a token goes through, in order.

    Args:
      num_layers: the number of layers of the stack, each counted once.
      causal: whether tokens see no later tokens.
      cross: whether the layers also attend to an encoder's result.

    Returns:
      The kinds. There are more than `num_layers` if layers are run several
      times (model.loop): each occurs once for each pass.
    """
    layer_kinds: tuple[LayerKind, ...] = ()
    for section in self.sections(num_layers, causal=causal, cross=cross):
      layer_kinds += section.layers
    return layer_kinds


def _find_lender_of_keys(layers: list[ModelConfig], i: int, num_before: int
                         ) -> int | None:
  """Finds the layer that lends its keys and values to layer i, if layer i has
  none of its own. This is the nearest earlier layer that has keys and values
  and whose attention sees as many tokens.

  A section is the prefix, the repeated pattern or the suffix of a model's
  layers.

  Args:
    layers: the layers before the section that may lend, followed by those of
      one repetition of the section's pattern.
    i: the index of the reading layer, counted from the section's first layer.
    num_before: how many of `layers` stand before the section.

  Returns:
    The index of the lender, counted in the same way; a negative one stands
    before the section. None: layer i has its own keys, or no layer can lend.
  """
  reader = layers[num_before + i]
  if not reader.shares_keys:
    return None
  # From the layer just before the reader back to the first one.
  for j in reversed(range(-num_before, i)):
    lender = layers[num_before + j]
    sees_as_many = (
        _rule_of_visible_tokens(lender) == _rule_of_visible_tokens(reader))
    if not lender.shares_keys and sees_as_many:
      return j
  return None


def _rule_of_visible_tokens(layer: ModelConfig) -> tuple:
  """Returns what decides which tokens a layer sees: its mixer, its rule of
  attention and its window."""
  window = 0
  if layer.attention != 'global':
    window = layer.sliding_window
  return layer.mixer, layer.attention, window
