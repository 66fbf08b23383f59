"""How rotary positions stand in a config.json of Hugging Face.

A page whose system has them calls `read` in its record's `read`, and `write`
in its `write` (parts/hf.py).
"""

from typing import Any

from architectures.parts import hf
from architectures.parts import rotary
from architectures.parts.config import ModelConfig
from configs.errors import RequestError, require

# rope_type: our scaling.
SCALINGS = {'default': 'none', 'linear': 'linear', 'llama3': 'llama3',
            'yarn': 'yarn'}


def read(reader: hf.Reader, *,
         theta: tuple[str, float] = ('rope_theta', 10000.0),
         fraction: tuple[str, float] | None = None,
         interleaved: bool = False, on_scores: bool = False) -> dict:
  """Returns model.rope, of a new config.json (rope_parameters) or an old one
  (rope_theta, rope_scaling).

  Their 'dynamic' scaling changes all frequencies with the length of the text,
  also of keys that a cache holds already: refused, `ntk` is its fixed form.

  Args:
    reader: of the config.json.
    theta: the name of theta outside of these objects, and its default.
    fraction: likewise of the share of a head that is turned. None: of a system
      that turns whole heads, whatever its config.json says: transformers does
      not read the share there, so that one is refused.
    interleaved: whether this system pairs neighbours.
    on_scores: whether it puts YaRN's mscale_all_dim on the scores.
  """
  new, old = reader.section('rope_parameters'), reader.section('rope_scaling')
  r = old if old else new
  kind = r('rope_type', r('type', 'default'))
  require(kind != 'dynamic', "config.json has rope_type 'dynamic', which "
          'changes the positions of cached keys as the text grows: take the '
          'fixed form, rope_theta times factor ** (dim / (dim - 2))')
  rope: dict[str, Any] = dict(
      theta=r('rope_theta', reader(*theta)),
      fraction=_fraction(reader, r, fraction), interleaved=interleaved,
      scaling=r.choose('rope_type', r('type', 'default'), SCALINGS))
  if rope['scaling'] == 'none':
    return rope
  rope['factor'] = r('factor', 1.0)
  if rope['scaling'] == 'llama3':
    rope.update(low_freq_factor=r('low_freq_factor', 1.0),
                high_freq_factor=r('high_freq_factor', 4.0))
  if rope['scaling'] == 'yarn':
    rope.update(beta_fast=r('beta_fast', 32.0), beta_slow=r('beta_slow', 1.0))
    rope.update(_mscale(r, on_scores))
    rope['truncate'] = r('truncate', True)
    r.must(attention_factor=rotary.yarn_factor(
        **{name: rope[name] for name in ('factor', 'mscale', 'mscale_all_dim')}
    ))
  if rope['scaling'] in ('llama3', 'yarn'):
    rope['original_len'] = r(
        'original_max_position_embeddings',
        reader('original_max_position_embeddings',
               reader('max_position_embeddings', 0)))
  return rope


def _mscale(r: hf.Reader, on_scores: bool) -> dict[str, float]:
  """Returns the parts of YaRN's temperature. Where one of theirs is 0,
  transformers reads neither on cos and sin."""
  mscale, all_dim = r('mscale', 0.0), r('mscale_all_dim', 0.0)
  both = bool(mscale and all_dim)
  require(on_scores or not both, f'config.json has mscale {mscale} and '
          f'mscale_all_dim {all_dim}: YaRN is only known here without, but in '
          'systems of DeepSeek')
  require(both or not (on_scores and all_dim), 'config.json has mscale_all_dim '
          f'{all_dim} without mscale: YaRN is only known here with both')
  return (dict(mscale=mscale, mscale_all_dim=all_dim) if both else
          dict(mscale=1.0, mscale_all_dim=0.0))


def _fraction(reader: hf.Reader, rope: hf.Reader,
              named: tuple[str, float] | None) -> float:
  if named:
    return rope('partial_rotary_factor', reader(*named))
  for where in (rope, reader):
    share = where('partial_rotary_factor', 1.0)
    require(share == 1, f'config.json has partial_rotary_factor {share}, which '
            f'transformers does not read in a {reader.model_type}: it turns '
            'whole heads. Set it to 1.0 to have the same')
  return 1.0


def write(c: ModelConfig, *, whole_heads: bool = True,
          interleaved: bool = False, on_scores: bool = False) -> dict:
  """Returns rope_parameters for the config `c`.

  Args:
    c: the config.
    whole_heads: whether transformers turns whole heads in this system, and
      does not read that it should turn a part.
    interleaved, on_scores: as of `read`.
  """
  r = c.rope
  require(r.interleaved == interleaved, 'model.rope.interleaved is '
          f'{r.interleaved}, which transformers has not in this architecture: '
          f'set it to {interleaved}')
  require(r.fraction == 1 or not whole_heads,
          f'model.rope.fraction is {r.fraction}, but transformers turns whole '
          'heads in this architecture, whatever its config.json says')
  require(c.position == 'rope', f'model.position is {c.position!r}: this '
          "config.json can only say 'rope'")
  if r.scaling == 'ntk':
    raise RequestError(
        "model.rope.scaling is 'ntk', which config.json has not: it is the "
        'same as scaling none with model.rope.theta '
        f'{rotary.ntk_theta(r, rotary.rotary_dim(c))!r}')
  rope = dict(rope_type=hf.theirs(SCALINGS, r.scaling, 'rope.scaling'),
              rope_theta=r.theta)
  if not whole_heads:
    rope['partial_rotary_factor'] = r.fraction
  if r.scaling != 'none':
    rope['factor'] = r.factor
  if r.scaling == 'llama3':
    rope.update(low_freq_factor=r.low_freq_factor,
                high_freq_factor=r.high_freq_factor)
  if r.scaling == 'yarn':
    rope.update(beta_fast=r.beta_fast, beta_slow=r.beta_slow)
    if not r.truncate:
      rope['truncate'] = False
    if (r.mscale, r.mscale_all_dim) != (1, 0):
      require(on_scores and r.mscale and r.mscale_all_dim, 'model.rope.mscale '
              f'is {r.mscale} and model.rope.mscale_all_dim '
              f'{r.mscale_all_dim}, which this config.json cannot say: set '
              'them to 1 and 0'
              + (', or both above 0' if on_scores else ''))
      rope.update(mscale=r.mscale, mscale_all_dim=r.mscale_all_dim)
  if r.scaling in ('llama3', 'yarn'):
    rope['original_max_position_embeddings'] = r.original_len
  return rope
