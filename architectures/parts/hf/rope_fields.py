"""How rotary positions stand in a config.json of Hugging Face.

A page whose system has them calls `read` in its record's `read`, and `write`
in its `write` (parts/hf).
"""

from collections.abc import Mapping
from typing import Any

from architectures.parts import hf
from architectures.parts import positions
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.positions import RopeConfig
from common.errors import RequestError, require

# The fields that a scaling alone has, with their defaults.
_OF = {'llama3': dict(low_freq_factor=1.0, high_freq_factor=4.0),
       'yarn': dict(beta_fast=32.0, beta_slow=1.0, truncate=True)}
_FROM_A_LENGTH = 'llama3', 'yarn', 'longrope'
# rope_type: our scaling.
SCALINGS = {'default': 'none', 'linear': 'linear', 'dynamic': 'dynamic',
            'llama3': 'llama3', 'yarn': 'yarn', 'longrope': 'longrope'}
# Of positions by the kind of layer: rope.proportional, which may be stretched.
PROPORTIONAL = 'proportional'


def read(reader: hf.Reader, *,
         theta: tuple[str, float] = ('rope_theta', 10000.0),
         fraction: tuple[str, float] | None = None,
         interleaved: bool = False, on_scores: bool = False,
         words: Mapping[str, str] = SCALINGS, original: int = 0,
         unread: tuple[str, ...] = ()) -> dict:
  """Returns model.rope, of a new config.json (rope_parameters) or an old one
  (rope_theta, rope_scaling).

  Args:
    reader: of the config.json.
    theta: the name of theta outside of these objects, and its default.
    fraction: likewise of the share of a head that is turned. None: of a system
      that turns whole heads, whatever its config.json says: transformers does
      not read the share there, so that one is refused.
    interleaved: whether this system pairs neighbours.
    on_scores: whether it puts YaRN's mscale_all_dim on the scores.
    words: our scaling, by each rope_type that transformers has in this system.
    original: what original_max_position_embeddings is where it is not there, in
      a system that has it outside of these objects and goes by that.
    unread: fields that say nothing of text.
  """
  new, old = reader.section('rope_parameters'), reader.section('rope_scaling')
  for part in (new, old):
    part.passes(*unread)
  return _read(reader, old if old else new, theta, fraction, interleaved,
               on_scores, words, original)


def read_by_kind(reader: hf.Reader, *kinds: tuple[str, tuple[str, float]],
                 **how: Any) -> list[dict]:
  """Returns model.rope of each kind of layer, of a rope_parameters that has an
  object for each. An old config.json has one rope_scaling, of the last kind.

  Args:
    reader: of the config.json.
    *kinds: (its name there, the `theta` of `read`).
    **how: further arguments of `read`, and `temperature`: whether YaRN has one.
  """
  parts, old = reader.section('rope_parameters'), reader.section('rope_scaling')
  ropes = []
  for name, theta in kinds:
    new = parts.section(name)
    last = old and name == kinds[-1][0]
    r = old if last else new
    if r('rope_type', 'default') == PROPORTIONAL:
      factor = r('factor', 1.0)
      ropes.append(dict(
          theta=r('rope_theta', reader(*theta)), proportional=True,
          fraction=r('partial_rotary_factor', 1.0), interleaved=False,
          scaling='none' if factor == 1 else 'linear', factor=factor))
    else:
      ropes.append(_read(reader, r, theta, by_kind=True, **how) | dict(
          proportional=False))
  return ropes


def _read(reader: hf.Reader, r: hf.Reader, theta: tuple[str, float],
          fraction: tuple[str, float] | None = None, interleaved: bool = False,
          on_scores: bool = False, words: Mapping[str, str] = SCALINGS,
          original: int = 0, by_kind: bool = False, temperature: bool = True
          ) -> dict:
  rope: dict[str, Any] = dict(
      theta=r('rope_theta', reader(*theta)),
      fraction=_fraction(reader, r, fraction), interleaved=interleaved,
      scaling=r.choose('rope_type', r('type', 'default'), words))
  if original:
    r.passes('original_max_position_embeddings')
    rope['original_len'] = reader('original_max_position_embeddings', original)
  if rope['scaling'] == 'none':
    return rope
  rope['factor'] = r('factor', 1.0)
  if rope['scaling'] in _FROM_A_LENGTH and not original:
    length = r('original_max_position_embeddings',
               reader('max_position_embeddings', 0))
    rope['original_len'] = length if by_kind else reader(
        'original_max_position_embeddings', length)  # which goes before
  rope |= {name: r(name, default)
           for name, default in _OF.get(rope['scaling'], {}).items()}
  if rope['scaling'] == 'yarn':
    rope |= (_mscale(r, on_scores) if temperature else
             dict(mscale=0.0, mscale_all_dim=0.0))
    r.must(attention_factor=positions.yarn_factor(
        **{name: rope[name] for name in ('factor', 'mscale', 'mscale_all_dim')}
    ))
  if rope['scaling'] == 'dynamic':
    rope['original_len'] = reader('max_position_embeddings', 0)
  if rope['scaling'] == 'longrope':
    rope |= _longrope(reader, r, rope['original_len'])
  return rope


def _longrope(reader: hf.Reader, r: hf.Reader, original: int) -> dict[str, Any]:
  """Returns the fields of longrope alone. Without a factor, it is how many
  times as long the model is."""
  require(r.has('factor') or reader.has('max_position_embeddings'),
          "config.json has rope_type 'longrope', but neither a factor nor "
          'max_position_embeddings, of which it follows')
  return dict(
      short_factor=tuple(r.listed('short_factor')),
      long_factor=tuple(r.listed('long_factor')),
      attention_factor=r('attention_factor', 0.0),
      factor=r('factor', max(
          1.0, reader('max_position_embeddings', 0) / (original or 1))))


def _mscale(r: hf.Reader, on_scores: bool) -> dict[str, float]:
  """Returns the parts of YaRN's temperature. Where one of theirs is 0,
  transformers reads neither on cos and sin."""
  mscale, all_dim = r('mscale', 0.0), r('mscale_all_dim', 0.0)
  both = bool(mscale and all_dim)
  require(both == bool(on_scores and all_dim),
          f'config.json has mscale {mscale} and mscale_all_dim {all_dim}: YaRN '
          'is known here with both in systems of DeepSeek, and else without')
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


def write_by_kind(c: ModelConfig, names: Mapping[str, str] | None = None,
                  **how: Any) -> dict:
  """Returns rope_parameters with an object for each kind of layer: those with
  a window, and those that see all; or by their mixers, which `names` names.
  `how` is of `write`."""
  ropes: dict[str, dict] = {}
  for kind in c.layer_kinds(c.num_layers):
    config = c.of_kind(kind.name)
    if names or config.mixer == 'attention':
      name = names[config.mixer] if names else layer_types.type_of(config)
      ropes[name] = write(config, **how)
  return ropes


def write(c: ModelConfig, *, whole_heads: bool = True, on_scores: bool = False,
          words: Mapping[str, str] = SCALINGS, temperature: bool = True
          ) -> dict:
  """Returns rope_parameters for the config `c`. What they cannot say is told by
  what is read of them again.

  Args:
    c: the config.
    whole_heads: whether transformers turns whole heads in this system, and
      does not read that it should turn a part.
    on_scores, words: as of `read`.
    temperature: as of `read_by_kind`.
  """
  r = c.part(RopeConfig)
  if r.scaling == 'ntk':
    raise RequestError(
        "model.rope.scaling is 'ntk', which config.json has not: it is the "
        'same as scaling none with model.rope.theta '
        f'{positions.ntk_theta(r, positions.rotary_dim(c))!r}')
  if r.proportional:
    words = {PROPORTIONAL: r.scaling if r.scaling == 'linear' else 'none'}
  rope = dict(rope_type=hf.theirs(words, r.scaling, 'rope.scaling'),
              rope_theta=r.theta)
  if not whole_heads or r.proportional:
    rope['partial_rotary_factor'] = r.fraction
  if r.scaling != 'none':
    rope['factor'] = r.factor
  rope |= {name: getattr(r, name) for name in _OF.get(r.scaling, ())
           if name != 'truncate' or not r.truncate}
  if r.scaling == 'yarn' and not temperature:
    rope['attention_factor'] = 1.0
  elif r.scaling == 'yarn' and on_scores and r.mscale_all_dim:
    rope |= dict(mscale=r.mscale, mscale_all_dim=r.mscale_all_dim)
  if r.scaling == 'longrope':
    rope |= dict(short_factor=list(r.short_factor),
                 long_factor=list(r.long_factor))
    if r.attention_factor:
      rope['attention_factor'] = r.attention_factor
  if r.scaling in _FROM_A_LENGTH:
    rope['original_max_position_embeddings'] = r.original_len
  return rope
