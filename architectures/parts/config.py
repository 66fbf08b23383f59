"""The model config: one frozen, hashable dataclass.

`make` fills in what is derived. What the fields may say together is checked
above the parts, in checks.py; architectures.resolve does both.

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
from typing import Any, Mapping, NamedTuple

import jax.numpy as jnp

from architectures.parts import fields as field_checks
from architectures.parts.attention import latent_config
from architectures.parts.attention.latent_config import LatentConfig
from architectures.parts.recurrent import groups
from architectures.parts.rope_config import RopeConfig
from architectures.parts.streams_config import StreamsConfig
from configs import kinds
from configs.errors import one_of, require

PARAMETRIZATIONS = ('standard', 'mup')


@dataclasses.dataclass(frozen=True)
class RelativeConfig:
  """T5's bucketed relative positions (Raffel et al. 2020, section 2.1)."""
  buckets: int
  max_distance: int


@dataclasses.dataclass(frozen=True)
class ClampConfig:
  """Of the network swiglu_clamped; see parts/ffn.py."""
  alpha: float
  limit: float


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters (Hu et al. 2021); see parts/linear.py."""
  rank: int
  alpha: float
  targets: str
  dropout: float

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Experts and their router; see parts/routing.py and parts/experts.py."""
  num_experts: int
  top_k: int
  router: str
  logit_bias: bool
  expert_groups: int
  top_groups: int
  ffn: str
  d_ff: int
  shared_experts: int
  shared_gate: bool
  dispatch: str
  grouped_kernel: str
  capacity_factor: float
  eval_capacity_factor: float
  normalize_gates: bool
  gate_scale: float
  jitter: float
  logit_noise: float
  balance_loss: str
  balance_weight: float
  z_loss_weight: float
  expert_dropout: float
  group_size: int
  bias_rate: float


class Kinds(dict):
  """{name of a kind of layer: {field: value}}; hashable, as nobody changes one.
  """

  def __hash__(self) -> int:  # type: ignore[override]
    return hash(_frozen(self))


def _frozen(value: Any) -> Any:
  return (tuple(sorted((name, _frozen(x)) for name, x in value.items()))
          if isinstance(value, dict) else value)


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
  """Layers of a stack that follow one another: `kinds`, `periods` times. `name`
  is that of their parameters."""
  name: str
  kinds: tuple[LayerKind, ...]
  periods: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Every field of `config.model`, with the derived ones filled in."""
  arch: str
  d_model: int
  num_layers: int
  num_decoder_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  vocab_size: int
  max_len: int
  type_vocab_size: int
  next_sentence: bool
  norm: str
  norm_eps: float
  embed_norm: bool
  position: str
  position_offset: int
  sinusoid: str
  learned_stretch: float
  rope: RopeConfig
  relative: RelativeConfig
  ffn: str
  clamp: ClampConfig
  block: str
  residual: str
  streams: StreamsConfig
  mixer: str
  latent: LatentConfig
  deltanet: groups.DeltaNetConfig
  mamba2: groups.Mamba2Config
  kda: groups.KDAConfig
  gla: groups.GLAConfig
  retnet: groups.RetNetConfig
  attention: str
  pattern: str
  prefix: str
  suffix: str
  kinds: Kinds
  attention_kernel: str
  sliding_window: int
  attention_softcap: float
  qk_norm: bool
  qk_norm_over: str
  attention_sinks: bool
  attention_gate: str
  attention_conv: int
  value_residual: bool
  value_embedding: bool
  kv_sharing: bool
  attention_scale: float
  attention_bias: bool
  attention_out_bias: bool
  ffn_bias: bool
  tie_embeddings: bool
  mtp_depth: int
  embed_scale: float
  logits_scale: float
  logits_softcap: float
  logits_bias: bool
  head: str
  num_labels: int
  head_dropout: float
  pooling: str
  dropout: float
  attention_dropout: float
  ffn_dropout: float
  parametrization: str
  mup_base_width: int
  mup_base_head_dim: int
  init: str
  init_stddev: float
  init_scale: float
  dtype: str
  param_dtype: str
  scan_layers: bool
  remat: str
  keep_gathered: str
  lora: LoraConfig
  moe: MoEConfig

  @property
  def compute_dtype(self):
    return jnp.dtype(self.dtype)

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

  def of_kind(self, name: str) -> 'ModelConfig':
    """Returns the config of the layers of a kind, which has no pattern; '': of
    layers that are as the model says."""
    if not (name or self.pattern or self.prefix or self.suffix):
      return self
    own = dict(self.kinds[name]) if name else {}
    if 'window' in own:
      window = own.pop('window')
      own = {'attention': 'banded' if window else 'global',
             'sliding_window': window} | own
    if 'rope' in own:
      own['rope'] = dataclasses.replace(self.rope, **own['rope'])
    if own.get('ffn') == kinds.DENSE:
      own['ffn'] = self.moe.ffn if self.ffn == 'moe' else self.ffn
    return dataclasses.replace(self, pattern='', prefix='', suffix='',
                               kinds=Kinds(), **own)

  @property
  def kinds_used(self) -> tuple[str, ...]:
    """The kinds of all layers, each once, in the order of the layers."""
    return tuple(dict.fromkeys(
        (*kinds.split(self.prefix), *(kinds.split(self.pattern) or ('',)),
         *kinds.split(self.suffix))))

  @property
  def has_experts(self) -> bool:
    """Whether any layer is a mixture of experts."""
    return any(self.of_kind(name).ffn == 'moe' for name in self.kinds_used)

  def layer_pattern(self) -> tuple[LayerKind, ...]:
    """The kinds of layer in one period; layers repeat it."""
    return next(section.kinds for section in self.sections(self.num_layers)
                if section.name == 'layers')

  def sections(self, num_layers: int, *, causal: bool = True,
               cross: bool = False) -> tuple[Section, ...]:
    """The layers of a stack of so many: those before the first period, its
    repetitions, and those after the last. Each section has layers."""
    first, last = kinds.split(self.prefix), kinds.split(self.suffix)
    period = kinds.split(self.pattern) or ('',)
    repeated = (num_layers - len(first) - len(last)) // len(period)
    return tuple(Section(name, self._layer_kinds(own, causal, cross, before), n)
                 for name, own, before, n in zip(
                     kinds.SECTIONS, (first, period, last), ((), first, ()),
                     (1, repeated, 1)) if own)

  def layer_kinds(self, num_layers: int, *, causal: bool = True,
                  cross: bool = False) -> tuple[LayerKind, ...]:
    """The kind of each layer of a stack of so many."""
    return sum((section.kinds * section.periods for section in self.sections(
        num_layers, causal=causal, cross=cross)), ())

  def _layer_kinds(self, names: tuple[str, ...], causal: bool, cross: bool,
                   before: tuple[str, ...]) -> tuple[LayerKind, ...]:
    configs = [self.of_kind(name) for name in (*before, *names)]
    return tuple(LayerKind(c.attention, c.ffn, causal, cross, name,
                           _source(configs, i, len(before)))
                 for i, (c, name) in enumerate(
                     zip(configs[len(before):], names)))


def _source(layers: list[ModelConfig], i: int, first: int) -> int | None:
  """Returns which layer lends its keys and values to layer i of those from
  `first` on: the nearest one before it that has some, of as many tokens."""
  reader = layers[first + i]
  sees = lambda c: (c.mixer, c.attention,
                    c.attention != 'global' and c.sliding_window)
  if not reader.kv_sharing:
    return None
  return next((j for j in reversed(range(-first, i))
               if not layers[first + j].kv_sharing
               and sees(layers[first + j]) == sees(reader)), None)


def make(fields: Mapping[str, Any]) -> ModelConfig:
  """Builds the frozen config from `config.model` (a ConfigDict or a dict),
  which is left as it is. What it builds, as a dict, builds the same again.

  Raises:
    RequestError: a field that is missing, not of its type or out of range, or
      one that another is derived from and that does not allow it.
  """
  fields = kinds.modern(
      fields.to_dict() if hasattr(fields, 'to_dict') else fields)
  field_checks.check_fields(fields, ModelConfig)
  for name in ('d_model', 'num_layers', 'num_heads', 'vocab_size', 'max_len'):
    require(fields[name] > 0, f'model.{name} is {fields[name]}: it must be > 0'
            + (' (derived from data.length at the start of a run)'
               if name == 'max_len' else '')
            + (' (derived from the tokenizer at the start of a run)'
               if name == 'vocab_size' else ''))
  heads, width = fields['num_heads'], fields['d_model']
  require(fields['head_dim'] or width % heads == 0,
          f'model.num_heads is {heads}, which does not divide model.d_model '
          f'{width}: choose a divisor, or set model.head_dim')
  head_dim = fields['head_dim'] or width // heads
  d_ff = fields['d_ff'] or 4 * width
  base_width, base_head_dim = _base(fields, head_dim)
  rope, moe, lora = fields['rope'], fields['moe'], fields['lora']
  return ModelConfig(**fields | dict(
      num_decoder_layers=fields['num_decoder_layers'] or fields['num_layers'],
      num_kv_heads=fields['num_kv_heads'] or heads,
      head_dim=head_dim,
      d_ff=d_ff,
      head=fields['head'] or 'lm',
      mup_base_head_dim=fields['mup_base_width'] and base_head_dim,
      attention_scale=fields['attention_scale'] or base_head_dim ** -0.5,
      embed_scale=fields['embed_scale'] or base_width ** 0.5,
      logits_scale=fields['logits_scale'] or base_width ** -0.5,
      rope=RopeConfig(**{
          **rope, 'original_len': rope['original_len'] or fields['max_len']}),
      kinds=Kinds({name: _kind(fields, kind)
                   for name, kind in fields['kinds'].items()}),
      lora=LoraConfig(**{**lora, 'alpha': lora['alpha'] or lora['rank']}),
      moe=MoEConfig(**{**moe, 'd_ff': moe['d_ff'] or d_ff}),
      latent=latent_config.derived(fields['latent'], head_dim,
                                   fields['norm_eps']),
      **groups.derived(fields, heads, head_dim),
      clamp=ClampConfig(**fields['clamp']),
      streams=StreamsConfig(**fields['streams']),
      relative=RelativeConfig(**fields['relative'])))


def _kind(fields: Mapping[str, Any], kind: Mapping[str, Any]
          ) -> dict[str, Any]:
  """Returns a kind of layer with what follows from the fields that it changes,
  where the model leaves that to be derived."""
  own = dict(kind)
  if 'num_heads' in own and not fields['num_kv_heads']:
    own.setdefault('num_kv_heads', own['num_heads'])
  if own.get('head_dim'):
    base_width, base_head_dim = _base(
        {**fields, **own, 'd_model': fields['d_model']}, own['head_dim'])
    del base_width
    if not fields['attention_scale']:
      own.setdefault('attention_scale', base_head_dim ** -0.5)
    if fields['mup_base_width'] and not fields['mup_base_head_dim']:
      own.setdefault('mup_base_head_dim', base_head_dim)
  return own


def _base(fields: Mapping[str, Any], head_dim: int) -> tuple[int, int]:
  """Returns the width of muP's base and of its heads; the standard form is its
  own base."""
  name = fields['parametrization']
  one_of('model.parametrization', name, PARAMETRIZATIONS)
  if name == 'standard':
    for base in ('mup_base_width', 'mup_base_head_dim'):
      require(not fields[base], f'model.{base} is {fields[base]}, which '
              "model.parametrization 'standard' does not read: set it to 0, or "
              "choose 'mup'")
    return fields['d_model'], head_dim
  width = fields['mup_base_width']
  require(width > 0, "model.parametrization is 'mup', but model.mup_base_width "
          'is 0: set it to the d_model at which mup equals standard')
  if fields['mup_base_head_dim']:
    return width, fields['mup_base_head_dim']
  base, rest = divmod(width * head_dim, fields['d_model'])
  require(base > 0 and rest == 0,
          f'model.mup_base_width is {width}, at which a head would have '
          f'{width * head_dim / fields["d_model"]:g} features: '
          'choose another, or set model.mup_base_head_dim')
  return width, base
