"""What a model config may not say, each refused with its reason.

Refused are values out of range, and combinations that nobody can mean. A field
that a config file sets for a part of its system stays where that part is
swapped away, and is not read then: `moe.*` of Mixtral with `--config.model.ffn=
gelu` (its dense twin), GShard's `sinusoid` with rotary positions, Switch's
jitter with a router that has no weights.
"""

from collections.abc import Mapping
from typing import Any

from architectures.parts import config as choices
from architectures.parts.config import ModelConfig, rotary_dim
from configs.errors import one_of, require

# field: the choices.
NAMES = {
    'norm': choices.NORMS,
    'position': choices.POSITIONS,
    'sinusoid': choices.SINUSOIDS,
    'ffn': choices.DENSE_FFNS + ('moe',),
    'block': choices.BLOCKS,
    'attention_kernel': choices.KERNELS,
    'rope.scaling': choices.ROPE_SCALINGS,
    'init': choices.INITS,
    'remat': choices.REMATS,
    'dtype': choices.DTYPES,
    'param_dtype': choices.DTYPES,
    'moe.ffn': choices.DENSE_FFNS,
    'moe.router': choices.ROUTERS,
    'moe.dispatch': choices.DISPATCHES,
    'moe.grouped_kernel': choices.GROUPED_KERNELS,
    'moe.balance_loss': choices.BALANCE_LOSSES,
}
# What a number must be: (in words, its test, the fields).
RANGES = (
    ('it must be > 0', lambda x: x > 0, (
        'norm_eps', 'attention_scale', 'init_scale', 'rope.theta',
        'rope.original_len', 'rope.low_freq_factor', 'rope.beta_slow',
        'relative.buckets', 'relative.max_distance', 'moe.num_experts',
        'moe.every', 'moe.d_ff')),
    ('it must be >= 0', lambda x: x >= 0, (
        'attention_softcap', 'logits_softcap', 'init_stddev',
        'moe.shared_experts', 'moe.group_size', 'moe.capacity_factor',
        'moe.eval_capacity_factor', 'moe.logit_noise', 'moe.balance_weight',
        'moe.z_loss_weight', 'moe.bias_rate')),
    ('it must be >= 1', lambda x: x >= 1, ('learned_stretch', 'rope.factor')),
    ('choose it in [0, 1)', lambda x: 0 <= x < 1, (
        'dropout', 'attention_dropout', 'ffn_dropout', 'moe.jitter',
        'moe.expert_dropout')),
    ('choose it in (0, 1]', lambda x: 0 < x <= 1, ('rope.fraction',)),
)
SCALINGS = tuple(s for s in choices.ROPE_SCALINGS if s != 'none')


def unread(c: ModelConfig) -> tuple[tuple[str, Any, str, tuple], ...]:
  """Returns (field, its value where it says nothing, the field that decides
  whether it is read, the values of that under which it is)."""
  return (
      ('learned_stretch', 1, 'position', ('learned',)),
      ('rope.scaling', 'none', 'position', ('rope',)),
      ('rope.factor', 1, 'rope.scaling', SCALINGS),
  ) + (() if c.ffn != 'moe' else (
      ('moe.grouped_kernel', 'auto', 'moe.dispatch', ('auto', 'dropless')),
      # The gates of the other routers sum to 1 whatever it says.
      ('moe.normalize_gates', True, 'moe.router',
       ('topk', 'sigmoid', 'sinkhorn', 'switch', 'expert_choice')),
      ('moe.bias_rate', 0.001, 'moe.router', ('sigmoid',)),
      # The other routers have no logits.
      ('moe.logit_noise', 0, 'moe.router', tuple(
          r for r in choices.ROUTERS if r not in ('hash', 'uniform'))),
  ))


def check(c: ModelConfig) -> None:
  """Raises ValueError: a sentence with the field, its value, the choices."""
  for field, names in NAMES.items():
    one_of(f'model.{field}', _get(c, field), names)
  for kind in c.attention_pattern:
    one_of('model.attention', kind, choices.ATTENTIONS)
  for words, holds, fields in RANGES:
    for field in fields:
      if not isinstance(_get(c, field), (int, float)):
        continue  # traced: runs as one program, each checked by itself
      require(holds(_get(c, field)), f'model.{field} is {_get(c, field)}: '
              f'{words}')
  for field, rest, other, where in unread(c):
    require(_get(c, field) == rest or _get(c, other) in where,
            f'model.{field} {_get(c, field)!r} has no meaning with '
            f'model.{other} {_get(c, other)!r}, which does not read it: set it '
            f'to {rest!r}, or choose model.{other} from {", ".join(where)}')
  _check_attention(c)
  _check_positions(c)
  _check_experts(c)
  for field in ('num_layers', 'num_decoder_layers'):
    layers, period = getattr(c, field), len(c.layer_pattern())
    require(layers % period == 0,
            f'model.{field} is {layers}, which is no multiple of the {period} '
            f'layers of the pattern (model.attention {c.attention!r}, '
            f'model.moe.every {c.moe.every})')


def _get(c: ModelConfig, field: str):
  for name in field.split('.'):
    c = getattr(c, name)
  return c


def _check_attention(c: ModelConfig) -> None:
  require(c.num_heads % c.num_kv_heads == 0,
          f'model.num_kv_heads is {c.num_kv_heads}, which does not divide '
          f'model.num_heads {c.num_heads}')
  require('banded' not in c.attention_pattern or c.sliding_window > 0,
          'model.attention has a banded layer, but model.sliding_window is 0: '
          'set it to the number of keys that such a layer sees')
  require('banded' in c.attention_pattern or c.sliding_window == 0,
          f'model.sliding_window is {c.sliding_window}, but model.attention '
          f'{c.attention!r} has no banded layer: add one, or set it to 0')


def _check_positions(c: ModelConfig) -> None:
  if c.position == 'rope':
    _check_rope(c)
  if c.position == 'sinusoidal':
    least = 4 if c.sinusoid == 'fairseq' else 2  # it divides by D/2 - 1
    require(c.d_model % 2 == 0 and c.d_model >= least,
            f'model.d_model is {c.d_model}: sinusoidal positions, '
            f'{c.sinusoid}, need it even and at least {least}')


def _check_rope(c: ModelConfig) -> None:
  r, dim = c.rope, rotary_dim(c)
  require(dim % 2 == 0 and dim > 0,
          f'model.rope.fraction {r.fraction} of model.head_dim {c.head_dim} is '
          f'{dim}: rotary positions turn pairs, so it must be even and > 0')
  require(r.scaling != 'ntk' or dim > 2,
          f'model.rope.scaling is ntk, but only {dim} features of a head are '
          'rotated: it needs 4 or more')
  require(r.scaling != 'llama3' or r.high_freq_factor > r.low_freq_factor,
          f'model.rope.high_freq_factor is {r.high_freq_factor}: llama3 needs '
          f'it above model.rope.low_freq_factor {r.low_freq_factor}')
  require(r.scaling != 'yarn' or (r.beta_fast > r.beta_slow and r.theta > 1),
          f'model.rope.beta_fast is {r.beta_fast}: yarn needs it above '
          f'model.rope.beta_slow {r.beta_slow}, and model.rope.theta '
          f'{r.theta} above 1')


def check_stack(c: ModelConfig, stacks: Mapping[str, str]) -> None:
  """Raises RequestError for what the stack of `c` has no use for.

  Args:
    c: the config.
    stacks: 'decoder', 'encoder' or 'encoder-decoder' of every model.arch.
  """
  stack = stacks[c.arch]
  archs = {kind: ', '.join(arch for arch in stacks if stacks[arch] == kind)
           for kind in stacks.values()}
  for field, rest, kind in (
      ('type_vocab_size', 0, 'encoder'),
      ('num_decoder_layers', c.num_layers, 'encoder-decoder')):
    require(_get(c, field) == rest or stack == kind,
            f'model.{field} {_get(c, field)!r} has no meaning with model.arch '
            f'{c.arch!r}, which does not read it: set it to {rest!r}, or '
            f'choose model.arch from {archs[kind]}')
  # training/optim/mup.py has rules for the parameters of these.
  require(c.parametrization != 'mup' or stack == 'decoder',
          "model.parametrization is 'mup', which has no rules for model.arch "
          f'{c.arch!r}: choose from {archs["decoder"]}')
  require((c.ffn, c.moe.router) != ('moe', 'expert_choice')
          or stack == 'encoder',
          'model.moe.router expert_choice has no meaning in the decoder of '
          f'model.arch {c.arch}: which tokens an expert takes depends on later '
          'ones, which a prediction must not see; choose another router, or '
          f'an encoder ({archs["encoder"]})')
  if c.position == 'relative':
    _check_relative(c, stack)


def _check_relative(c: ModelConfig, stack: str) -> None:
  """A quarter of an encoder's buckets, half of a decoder's, is exact; the
  others grow from there to max_distance."""
  least = 2 if stack == 'decoder' else 4
  exact = c.relative.buckets // (4 if stack == 'encoder' else 2)
  require(c.relative.buckets >= least and c.relative.buckets % 2 == 0,
          f'model.relative.buckets is {c.relative.buckets}: model.arch '
          f'{c.arch} needs an even number, {least} or more')
  require(c.relative.max_distance > exact,
          f'model.relative.max_distance is {c.relative.max_distance}: of '
          f'model.relative.buckets {c.relative.buckets}, {exact} are of one '
          'distance each, so it must be larger')


def _check_experts(c: ModelConfig) -> None:
  m = c.moe
  require(0 < m.top_k <= m.num_experts,
          f'model.moe.top_k is {m.top_k}: choose 1 to model.moe.num_experts '
          f'{m.num_experts}')
  if c.ffn != 'moe':
    return
  for router, number in (('switch', 1), ('gshard', 2)):
    require(m.router != router or m.top_k == number,
            f'model.moe.top_k is {m.top_k}, but model.moe.router {router} '
            f'chooses {number}: set it to {number}, or choose router topk')
  for name in ('capacity_factor', 'eval_capacity_factor'):
    require(m.dispatch != 'sorted' or m.router == 'expert_choice'
            or getattr(m, name) > 0,
            f'model.moe.{name} is 0, but model.moe.dispatch sorted pads every '
            'expert to its capacity: set it, or choose dispatch dropless')
