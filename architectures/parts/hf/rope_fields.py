"""How rotary positions stand in a config.json of Hugging Face.

A page whose system has them calls `read_rope` in its own `read`, and
`write_rope` in its own `write` (parts/hf).
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
_DEFAULTS_OF_SCALING = {
    'llama3': dict(low_freq_factor=1.0, high_freq_factor=4.0),
    'yarn': dict(beta_fast=32.0, beta_slow=1.0, truncate=True)}
# The scalings that go by the length for which the model was trained at first.
_SCALINGS_WITH_ORIGINAL_LENGTH = 'llama3', 'yarn', 'longrope'
# Our scaling by rope_type.
SCALING_OF_ROPE_TYPE = {
    'default': 'none', 'linear': 'linear', 'dynamic': 'dynamic',
    'llama3': 'llama3', 'yarn': 'yarn', 'longrope': 'longrope'}
# The rope_type of rope.proportional, which may be stretched. Only a system with
# positions by the kind of layer has it.
PROPORTIONAL = 'proportional'


def read_rope(reader: hf.Reader, *,
              theta: tuple[str, float] = ('rope_theta', 10000.0),
              fraction: tuple[str, float] | None = None,
              interleaved: bool = False, on_scores: bool = False,
              words: Mapping[str, str] = SCALING_OF_ROPE_TYPE,
              original: int = 0, unread: tuple[str, ...] = ()) -> dict:
  """Reads the rotary positions (RoPE) from a Hugging Face config.json. A new
  file has an object rope_parameters; an old one has rope_theta and an object
  rope_scaling.

  Args:
    reader: the fields of the config.json.
    theta: the name of theta outside of these objects, and its default.
    fraction: the name of the share of a head that is rotated, and its default.
      None: the system rotates whole heads, whatever its config.json says:
      transformers does not read the share there, so that one is refused.
    interleaved: whether this system pairs neighbours.
    on_scores: whether it puts YaRN's mscale_all_dim on the scores.
    words: our scaling, by each rope_type that transformers has in this system.
    original: the default of original_max_position_embeddings, in a system that
      has it outside of these objects and goes by that; 0: in others.
    unread: fields that say nothing of text.

  Returns:
    The fields of config.model.rope, by name.
  """
  new_section = reader.read_object('rope_parameters')
  old_section = reader.read_object('rope_scaling')
  for section in (new_section, old_section):
    section.ignore_fields(*unread)
  # If a file has both objects, the old one counts.
  section = old_section or new_section
  return _read_section(reader, section=section, theta=theta, fraction=fraction,
                       interleaved=interleaved, on_scores=on_scores,
                       words=words, original=original)


def read_rope_of_layer_kinds(reader: hf.Reader,
                             *kinds: tuple[str, tuple[str, float]],
                             **how: Any) -> list[dict]:
  """Reads the rotary positions (RoPE) of each kind of layer from a Hugging Face
  config.json, whose rope_parameters have an object for each kind.

  An old file has a single object rope_scaling. It belongs to the last kind.

  Args:
    reader: the fields of the config.json.
    *kinds: pairs: the name of a kind in rope_parameters; and its `theta`, as
      `read_rope` takes it.
    **how: further arguments of `read_rope`, and `temperature`: whether YaRN has
      a temperature.

  Returns:
    The fields of config.model.rope for each of `kinds`, in their order.
  """
  # Each kind reads its own object, and the last kind the old one if there is
  # one.
  sections = reader.read_object('rope_parameters')
  old_section = reader.read_object('rope_scaling')
  last_kind, _ = kinds[-1]
  ropes = []
  for name, theta in kinds:
    section = sections.read_object(name)
    if old_section and name == last_kind:
      section = old_section
    if section('rope_type', 'default') == PROPORTIONAL:
      rope = _read_proportional(reader, section, theta)
    else:
      rope = _read_section(reader, section=section, theta=theta, by_kind=True,
                           **how)
      rope['proportional'] = False
    ropes.append(rope)
  return ropes


def _read_proportional(reader: hf.Reader, section: hf.Reader,
                       theta: tuple[str, float]) -> dict:
  """Returns the fields of model.rope of an object of a config.json whose
  rope_type is 'proportional'."""
  factor, scaling = section('factor', 1.0), 'linear'
  if factor == 1:
    scaling = 'none'
  return dict(
      theta=section('rope_theta', reader(*theta)), proportional=True,
      fraction=section('partial_rotary_factor', 1.0), interleaved=False,
      scaling=scaling, factor=factor)


def _read_section(reader: hf.Reader, section: hf.Reader, *,
                  theta: tuple[str, float],
                  fraction: tuple[str, float] | None = None,
                  interleaved: bool = False,
                  on_scores: bool = False,
                  words: Mapping[str, str] = SCALING_OF_ROPE_TYPE,
                  original: int = 0, by_kind: bool = False,
                  temperature: bool = True) -> dict:
  """Returns the fields of model.rope by one object of a config.json.

  Args:
    reader: the reader of the config.json.
    section: the object that has the fields of these positions.
    theta, fraction, interleaved, on_scores, words, original: the arguments of
      `read_rope`.
    by_kind: whether the section is of one kind of layer among several.
    temperature: whether YaRN has one.
  """
  scaling = section.read_choice('rope_type', section('type', 'default'), words)
  rope: dict[str, Any] = dict(
      theta=section('rope_theta', reader(*theta)), interleaved=interleaved,
      fraction=_read_rotated_fraction(reader, section, fraction),
      scaling=scaling)
  if original:
    section.ignore_fields('original_max_position_embeddings')
    rope['original_len'] = reader('original_max_position_embeddings', original)
  if scaling == 'none':
    return rope

  # The factor, the length that it goes by, and the numbers of one scaling.
  rope['factor'] = section('factor', 1.0)
  if scaling in _SCALINGS_WITH_ORIGINAL_LENGTH and not original:
    length = section('original_max_position_embeddings',
                     reader('max_position_embeddings', 0))
    if not by_kind:  # The field outside of the object goes before.
      length = reader('original_max_position_embeddings', length)
    rope['original_len'] = length
  for name, default in _DEFAULTS_OF_SCALING.get(scaling, {}).items():
    rope[name] = section(name, default)

  # The fields that a scaling has alone.
  if scaling == 'yarn':
    rope |= _read_temperature(section, on_scores, temperature)
    section.require_values(attention_factor=positions.yarn_rotation_factor(
        factor=rope['factor'], mscale=rope['mscale'],
        mscale_all_dim=rope['mscale_all_dim']))
  if scaling == 'dynamic':
    rope['original_len'] = reader('max_position_embeddings', 0)
  if scaling == 'longrope':
    rope |= _read_longrope(reader, section, rope['original_len'])
  return rope


def _read_longrope(reader: hf.Reader, section: hf.Reader, original: int
                   ) -> dict[str, Any]:
  """Reads the fields of rotary positions that only LongRoPE has (Ding et al.
  2024, arXiv 2402.13753): a divisor for each frequency, in short and in long
  texts.

  If the config.json has no factor, it is the length of the model divided by the
  length for which the model was trained at first.

  Args:
    reader: the fields of the config.json.
    section: the fields of the object in it that describes positions.
    original: the length for which the model was trained at first.

  Returns:
    Fields of config.model.rope, by name.
  """
  require(section.has('factor') or reader.has('max_position_embeddings'),
          "config.json has rope_type 'longrope', but neither a factor nor "
          'max_position_embeddings, of which it follows')
  times = reader('max_position_embeddings', 0) / (original or 1)
  return dict(
      short_factor=tuple(section.read_list('short_factor')),
      long_factor=tuple(section.read_list('long_factor')),
      attention_factor=section('attention_factor', 0.0),
      factor=section('factor', max(1.0, times)))


def _read_temperature(section: hf.Reader, on_scores: bool, temperature: bool
                      ) -> dict[str, float]:
  """Reads the two fields for the temperature of YaRN from a Hugging Face
  config.json. The temperature is a factor on attention's scores, which makes
  them sharper where positions are stretched.

  Args:
    section: the fields of the object in the file that describes positions.
    on_scores: whether this system multiplies whole scores by a part of the
      temperature (mscale_all_dim), as DeepSeek's systems do.
    temperature: whether YaRN has a temperature in this system.

  Returns:
    mscale, for the part of the temperature on rotated features, and
    mscale_all_dim, for that on whole scores. Both are 0 without a temperature;
    1 and 0 are YaRN's own.

  Raises:
    RequestError: if the system cannot have the values of the file.
  """
  if not temperature:
    return dict(mscale=0.0, mscale_all_dim=0.0)
  # If one of the fields is 0, transformers reads neither.
  mscale, all_dim = section('mscale', 0.0), section('mscale_all_dim', 0.0)
  has_both = bool(mscale and all_dim)
  require(has_both == bool(on_scores and all_dim),
          f'config.json has mscale {mscale} and mscale_all_dim {all_dim}: YaRN '
          'is known here with both in systems of DeepSeek, and else without')
  if has_both:
    return dict(mscale=mscale, mscale_all_dim=all_dim)
  return dict(mscale=1.0, mscale_all_dim=0.0)


def _read_rotated_fraction(reader: hf.Reader, section: hf.Reader,
                           name_and_default: tuple[str, float] | None) -> float:
  """Reads which share of a head's features is rotated by positions.

  Args:
    reader: the fields of a Hugging Face config.json.
    section: the fields of the object in it that describes positions.
    name_and_default: the field that has the share outside of this object, and
      its default; None: the system always rotates whole heads, and another
      share is refused.
  """
  if name_and_default:
    return section('partial_rotary_factor', reader(*name_and_default))
  for where in (section, reader):
    share = where('partial_rotary_factor', 1.0)
    require(share == 1, f'config.json has partial_rotary_factor {share}, which '
            f'transformers does not read in a {reader.model_type}: it turns '
            'whole heads. Set it to 1.0 to have the same')
  return 1.0


def write_rope_of_layer_kinds(config: ModelConfig,
                              names: Mapping[str, str] | None = None,
                              **how: Any) -> dict:
  """Writes the rotary positions (RoPE) of each kind of layer, as the object
  rope_parameters of a Hugging Face config.json.

  Args:
    config: the model.
    names: {mixer of a layer: the name of its object}. None: there is an object
      for layers with a sliding window, and one for those that see all keys.
    **how: further arguments of `write_rope`.

  Returns:
    {name of the object: the fields of its positions}.
  """
  # Layers of the same kind write the same object. Layers without attention have
  # no positions.
  ropes: dict[str, dict] = {}
  for layer in config.layers(config.num_layers):
    if names:
      ropes[names[layer.mixer]] = write_rope(layer, **how)
    elif layer.mixer == 'attention':
      ropes[layer_types.attention_type(layer)] = write_rope(layer, **how)
  return ropes


def write_rope(config: ModelConfig, *, whole_heads: bool = True,
               on_scores: bool = False,
               words: Mapping[str, str] = SCALING_OF_ROPE_TYPE,
               temperature: bool = True) -> dict:
  """Returns rope_parameters of a Hugging Face config.json: the rotary positions
  (RoPE) of a model.

  A field that they cannot say is not refused here: an export reads its
  config.json again, and compares the models.

  Args:
    config: our config of the model, or of one kind of layer.
    whole_heads: whether transformers rotates whole heads in this system, and
      does not read that it should rotate a part.
    on_scores: as for `read_rope`.
    words: as for `read_rope`.
    temperature: as for `read_rope_of_layer_kinds`.
  """
  # A scaling that a config.json says by another theta.
  rope = config.part(RopeConfig)
  scaling = rope.scaling
  if scaling == 'ntk':
    theta = positions.ntk_theta(rope, positions.rotary_dim(config))
    raise RequestError(
        "model.rope.scaling is 'ntk', which config.json has not: it is the "
        f'same as scaling none with model.rope.theta {theta!r}')

  # Positions that are rotated in proportion have a rope_type of their own,
  # which may be stretched or not.
  if rope.proportional:
    known_scaling = 'none'
    if scaling == 'linear':
      known_scaling = scaling
    words = {PROPORTIONAL: known_scaling}

  # The fields of all scalings, and those that this one has alone.
  rope_parameters: dict[str, Any] = dict(
      rope_type=hf.find_hf_word(words, scaling, field='rope.scaling'),
      rope_theta=rope.theta)
  if not whole_heads or rope.proportional:
    rope_parameters['partial_rotary_factor'] = rope.fraction
  if scaling != 'none':
    rope_parameters['factor'] = rope.factor
  if scaling == 'yarn':
    rope_parameters |= _write_temperature(rope, on_scores, temperature)
  return rope_parameters | _write_scaling(rope)


def _write_scaling(rope: RopeConfig) -> dict[str, Any]:
  """Returns those fields of rope_parameters in a Hugging Face config.json that
  belong to the model's way of scaling rotary positions to longer texts.

  Args:
    rope: our fields of the positions. `scaling` names the way.
  """
  # transformers' default of `truncate` is true, so it is written if false.
  rope_parameters: dict[str, Any] = {}
  for name in _DEFAULTS_OF_SCALING.get(rope.scaling, ()):
    value = getattr(rope, name)
    if name != 'truncate' or not value:
      rope_parameters[name] = value
  if rope.scaling == 'longrope':
    rope_parameters['short_factor'] = list(rope.short_factor)
    rope_parameters['long_factor'] = list(rope.long_factor)
    if rope.attention_factor:
      rope_parameters['attention_factor'] = rope.attention_factor
  if rope.scaling in _SCALINGS_WITH_ORIGINAL_LENGTH:
    rope_parameters['original_max_position_embeddings'] = rope.original_len
  return rope_parameters


def _write_temperature(rope: RopeConfig, on_scores: bool, temperature: bool
                       ) -> dict[str, float]:
  """Returns the fields of rope_parameters by which YaRN has a temperature, as
  `_read_temperature` reads them."""
  if not temperature:
    return dict(attention_factor=1.0)
  if on_scores and rope.mscale_all_dim:
    return dict(mscale=rope.mscale, mscale_all_dim=rope.mscale_all_dim)
  return {}
