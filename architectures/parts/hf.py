"""What several pages say alike of a Hugging Face config.json."""

from typing import Any

from architectures.parts import positions
from architectures.parts.config import ModelConfig, rotary_dim
from configs.errors import RequestError, require

# hidden_act: our ffn. Where two names mean one function, export takes the
# first. gelu_fast and gelu_new are the same tanh approximation.
FFNS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
        'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu', 'silu': 'silu',
        'swish': 'silu'}
GATED = {'silu': 'swiglu', 'gelu': 'geglu', 'gelu_new': 'geglu_tanh',
         'gelu_pytorch_tanh': 'geglu_tanh'}
SCALINGS = {'default': 'none', 'linear': 'linear', 'llama3': 'llama3',
            'yarn': 'yarn'}


def theirs(choices: dict[str, str], ours: str) -> str:
  """Returns the first of their names for `ours`.

  Raises:
    ValueError: naming `ours` where they have none.
  """
  names = [name for name, value in choices.items() if value == ours]
  require(names, f'{ours!r} has no counterpart in this config.json: choose '
          f'from {", ".join(dict.fromkeys(choices.values()))}')
  return names[0]


def read_rope(hf, *, theta: tuple[str, float] = ('rope_theta', 10000.0),
              fraction: tuple[str, float] | None = None) -> dict:
  """Returns model.rope, of a new config.json (rope_parameters) or an old one
  (rope_theta, rope_scaling).

  Their 'dynamic' scaling changes all frequencies with the length of the text,
  also of keys that a cache holds already: refused, `ntk` is its fixed form.

  Args:
    hf: the config.json.
    theta: the name of theta outside of these objects, and its default.
    fraction: likewise of the share of a head that is turned. None: of a system
      that turns whole heads, whatever its config.json says: transformers does
      not read the share there, so that one is refused.
  """
  new, old = hf.section('rope_parameters'), hf.section('rope_scaling')
  r = old if old else new
  kind = r('rope_type', r('type', 'default'))
  require(kind != 'dynamic', "config.json has rope_type 'dynamic', which "
          'changes the positions of cached keys as the text grows: take the '
          'fixed form, rope_theta times factor ** (dim / (dim - 2))')
  rope: dict[str, Any] = dict(
      theta=r('rope_theta', hf(*theta)), fraction=_fraction(hf, r, fraction),
      scaling=r.choose('rope_type', r('type', 'default'), SCALINGS))
  if rope['scaling'] == 'none':
    return rope
  rope['factor'] = r('factor', 1.0)
  if rope['scaling'] == 'llama3':
    rope.update(low_freq_factor=r('low_freq_factor', 1.0),
                high_freq_factor=r('high_freq_factor', 4.0))
  if rope['scaling'] == 'yarn':
    rope.update(beta_fast=r('beta_fast', 32.0), beta_slow=r('beta_slow', 1.0))
    r.must(truncate=True, attention_factor=positions.yarn_temperature(
        rope['factor']))
    mscale = r('mscale', 0.0), r('mscale_all_dim', 0.0)
    require(not all(mscale), f'config.json has mscale {mscale[0]} and '
            f'mscale_all_dim {mscale[1]}: YaRN is only known here without')
  if rope['scaling'] in ('llama3', 'yarn'):
    rope['original_len'] = r(
        'original_max_position_embeddings',
        hf('original_max_position_embeddings',
           hf('max_position_embeddings', 0)))
  return rope


def _fraction(hf, rope, named: tuple[str, float] | None) -> float:
  if named:
    return rope('partial_rotary_factor', hf(*named))
  for where in (rope, hf):
    share = where('partial_rotary_factor', 1.0)
    require(share == 1, f'config.json has partial_rotary_factor {share}, which '
            f'transformers does not read in a {hf.model_type}: it turns whole '
            'heads. Set it to 1.0 to have the same')
  return 1.0


def write_rope(c: ModelConfig, *, whole_heads: bool = True) -> dict:
  """Returns rope_parameters for the config `c`.

  Args:
    c: the config.
    whole_heads: whether transformers turns whole heads in this system, and
      does not read that it should turn a part.
  """
  r = c.rope
  require(r.fraction == 1 or not whole_heads,
          f'model.rope.fraction is {r.fraction}, but transformers turns whole '
          'heads in this architecture, whatever its config.json says')
  require(c.position == 'rope', f'model.position is {c.position!r}: this '
          "config.json can only say 'rope'")
  if r.scaling == 'ntk':
    raise RequestError(
        "model.rope.scaling is 'ntk', which config.json has not: it is the "
        'same as scaling none with model.rope.theta '
        f'{positions.ntk_theta(r, rotary_dim(c))!r}')
  rope = dict(rope_type=theirs(SCALINGS, r.scaling), rope_theta=r.theta)
  if not whole_heads:
    rope['partial_rotary_factor'] = r.fraction
  if r.scaling != 'none':
    rope['factor'] = r.factor
  if r.scaling == 'llama3':
    rope.update(low_freq_factor=r.low_freq_factor,
                high_freq_factor=r.high_freq_factor)
  if r.scaling == 'yarn':
    rope.update(beta_fast=r.beta_fast, beta_slow=r.beta_slow)
  if r.scaling in ('llama3', 'yarn'):
    rope['original_max_position_embeddings'] = r.original_len
  return rope


def read_window(hf, default: int = 0) -> dict:
  """Returns the fields for a sliding window on every layer, or on none."""
  window = hf('sliding_window', default)
  return dict(sliding_window=window,
              attention='banded' if window else 'global')


def write_window(c: ModelConfig) -> int | None:
  """Returns sliding_window, null where all layers see everything."""
  return c.sliding_window or None
