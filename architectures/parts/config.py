"""The model config: one frozen, hashable dataclass that validates itself.

Axis legend, for every array of the project:
B batch, L length, M memory length (what is attended to), D d_model, H query
heads, J key-value heads, R = H/J, K head size, F d_ff, V vocabulary, N layers,
E experts, C expert capacity, G routing groups, S group size, T tokens (= G*S),
X experts of a token, A assignments of a token to an expert (= T*X).
"""

import dataclasses
import math
from typing import Any, Mapping

import jax.numpy as jnp

from architectures.parts import fields as field_checks
from configs.errors import one_of, require

NORMS = ('layernorm', 'rmsnorm')
POSITIONS = ('learned', 'sinusoidal', 'rope', 'alibi', 'relative', 'none')
DENSE_FFNS = ('relu', 'gelu', 'gelu_tanh', 'silu', 'geglu', 'geglu_tanh',
              'swiglu')
BLOCKS = ('pre_norm', 'post_norm', 'parallel', 'sandwich')
ATTENTIONS = ('global', 'banded')
SINUSOIDS = ('interleaved', 'halves', 'fairseq')
ROPE_SCALINGS = ('none', 'linear', 'ntk', 'llama3', 'yarn')
INITS = ('normal', 'scaled_normal', 'fan_in')
KERNELS = ('auto', 'xla', 'splash', 'cudnn')
GROUPED_KERNELS = ('auto', 'xla', 'megablox')
PARAMETRIZATIONS = ('standard', 'mup')
REMATS = ('none', 'full', 'dots')
DTYPES = ('float32', 'bfloat16')
ROUTERS = ('topk', 'switch', 'gshard', 'expert_choice', 'sigmoid', 'sinkhorn',
           'hash', 'uniform')
DISPATCHES = ('auto', 'einsum', 'sorted', 'dropless')
BALANCE_LOSSES = ('switch', 'importance', 'none')


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary positions (Su et al. 2021) and how they stretch past training."""
  theta: float
  fraction: float
  scaling: str
  factor: float
  original_len: int
  low_freq_factor: float
  high_freq_factor: float
  beta_fast: float
  beta_slow: float


@dataclasses.dataclass(frozen=True)
class RelativeConfig:
  """T5's bucketed relative positions (Raffel et al. 2020, section 2.1)."""
  buckets: int
  max_distance: int


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Experts and their router; see parts/routing.py and parts/experts.py."""
  num_experts: int
  top_k: int
  router: str
  ffn: str
  every: int
  d_ff: int
  shared_experts: int
  dispatch: str
  grouped_kernel: str
  capacity_factor: float
  eval_capacity_factor: float
  normalize_gates: bool
  jitter: float
  logit_noise: float
  balance_loss: str
  balance_weight: float
  z_loss_weight: float
  expert_dropout: float
  group_size: int
  bias_rate: float


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What one layer of the pattern holds."""
  attention: str  # global | banded
  ffn: str
  causal: bool = True
  cross: bool = False


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
  norm: str
  norm_eps: float
  embed_norm: bool
  position: str
  sinusoid: str
  learned_stretch: float
  rope: RopeConfig
  relative: RelativeConfig
  ffn: str
  block: str
  attention: str
  attention_kernel: str
  sliding_window: int
  attention_softcap: float
  qk_norm: bool
  attention_sinks: bool
  attention_scale: float
  attention_bias: bool
  ffn_bias: bool
  tie_embeddings: bool
  embed_scale: float
  logits_scale: float
  logits_softcap: float
  logits_bias: bool
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
  moe: MoEConfig

  def __post_init__(self):
    from architectures.parts import checks  # which reads this file
    checks.check(self)

  @property
  def compute_dtype(self):
    return jnp.dtype(self.dtype)

  @property
  def reach(self) -> float:
    """How many positions there are, stretched; learned ones end."""
    return (int(self.max_len * self.learned_stretch)
            if self.position == 'learned' else math.inf)

  @property
  def widening(self) -> float:
    """How many times as wide as muP's base; 1 in the standard form."""
    return self.d_model / self.mup_base_width

  @property
  def head_widening(self) -> float:
    """The same of a head."""
    return self.head_dim / self.mup_base_head_dim

  @property
  def attention_pattern(self) -> tuple[str, ...]:
    return tuple(self.attention.split(','))

  def layer_pattern(self, *, causal: bool = True,
                    cross: bool = False) -> tuple[LayerKind, ...]:
    """The kinds of layer in one period; layers repeat it.

    Attention kinds repeat with the length of their pattern. With `moe`, the
    last of every `moe.every` layers has experts and the others `moe.ffn`, as
    in GShard and Switch (every other layer, the second first).
    """
    attention = self.attention_pattern
    every = self.moe.every if self.ffn == 'moe' else 1
    def ffn(i):
      if self.ffn != 'moe':
        return self.ffn
      return 'moe' if i % every == every - 1 else self.moe.ffn
    return tuple(
        LayerKind(attention[i % len(attention)], ffn(i), causal, cross)
        for i in range(math.lcm(len(attention), every)))


def make(fields: Mapping[str, Any]) -> ModelConfig:
  """Builds the frozen config from `config.model` (a ConfigDict or a dict).

  Raises:
    ValueError: a sentence that names the field, its value and the choices.
  """
  fields = fields.to_dict() if hasattr(fields, 'to_dict') else dict(fields)
  field_checks.check(fields, ModelConfig)
  for name in ('d_model', 'num_layers', 'num_heads', 'vocab_size', 'max_len'):
    require(fields[name] > 0, f'model.{name} is {fields[name]}: it must be > 0'
            + (' (derived from data.length at the start of a run)'
               if name == 'max_len' else '')
            + (' (derived from the tokenizer at the start of a run)'
               if name == 'vocab_size' else ''))
  heads = fields['num_heads']
  require(fields['head_dim'] or fields['d_model'] % heads == 0,
          f'model.num_heads is {heads}, which does not divide model.d_model '
          f'{fields["d_model"]}: choose a divisor, or set model.head_dim')
  fields['num_decoder_layers'] = (
      fields['num_decoder_layers'] or fields['num_layers'])
  fields['num_kv_heads'] = fields['num_kv_heads'] or heads
  fields['head_dim'] = fields['head_dim'] or fields['d_model'] // heads
  fields['d_ff'] = fields['d_ff'] or 4 * fields['d_model']
  _resolve_base(fields)
  width, head_dim = fields['mup_base_width'], fields['mup_base_head_dim']
  # muP: as 1 / head_dim (Yang et al. 2022, definition 4.1).
  fields['attention_scale'] = (fields['attention_scale'] or head_dim ** -0.5
                               ) * (head_dim / fields['head_dim'])
  fields['embed_scale'] = fields['embed_scale'] or width ** 0.5
  fields['logits_scale'] = fields['logits_scale'] or width ** -0.5
  rope, moe = dict(fields['rope']), dict(fields['moe'])
  rope['original_len'] = rope['original_len'] or fields['max_len']
  moe['d_ff'] = moe['d_ff'] or fields['d_ff']
  fields.update(rope=RopeConfig(**rope), moe=MoEConfig(**moe),
                relative=RelativeConfig(**fields['relative']))
  return ModelConfig(**fields)


def _resolve_base(fields: dict) -> None:
  """Fills in the base of muP; the standard form is its own base."""
  name = fields['parametrization']
  one_of('model.parametrization', name, PARAMETRIZATIONS)
  bases = ('mup_base_width', 'mup_base_head_dim')
  if name == 'standard':
    for base in bases:
      require(not fields[base], f'model.{base} is {fields[base]}, which '
              "model.parametrization 'standard' does not read: set it to 0, or "
              "choose 'mup'")
    fields.update(zip(bases, (fields['d_model'], fields['head_dim'])))
    return
  width = fields['mup_base_width']
  require(width > 0, "model.parametrization is 'mup', but model.mup_base_width "
          'is 0: set it to the d_model at which mup equals standard')
  if not fields['mup_base_head_dim']:
    head_dim, rest = divmod(width * fields['head_dim'], fields['d_model'])
    require(head_dim > 0 and rest == 0,
            f'model.mup_base_width is {width}, at which a head would have '
            f'{width * fields["head_dim"] / fields["d_model"]:g} features: '
            'choose another, or set model.mup_base_head_dim')
    fields['mup_base_head_dim'] = head_dim


def rotary_dim(c: ModelConfig) -> int:
  """How many of a head's features are rotated."""
  return int(c.head_dim * c.rope.fraction)
