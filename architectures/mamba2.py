"""Mamba-2: layers of a state space model, and nothing else: no attention, no
feed-forward networks, no positions (Dao and Gu 2024, section 7).

  x'     = x + Mamba2(RMSNorm(x))        parts/recurrent/mamba2.py
  logits = RMSNorm(x_N) E^T

A layer is about half as large as one of a transformer of the same width, so
there are twice as many. What a token leaves behind is a state of one size in
each layer.
"""

from architectures import mamba
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.recurrent.mamba2 import Mamba2Config
from architectures.parts.skeletons import Decoder
from common.errors import require, shorten


class Mamba2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = mamba.Mamba.PARTS | dict(mixer='mamba2')


# How transformers 5 writes a number that JSON lacks, and how others do.
INFINITY_IN_JSON = {'__float__': 'Infinity'}
INFINITE_VALUES = INFINITY_IN_JSON, float('inf')


def read_step_limits(reader: hf.Reader) -> dict[str, float]:
  """Reads the bounds of Mamba-2's step size, time_step_limit of a Hugging Face
  config.json.

  Args:
    reader: the reader of the config.json.

  Returns:
    The fields `least_step` and `most_step`; 0: there is no bound.

  Raises:
    RequestError: for anything but two numbers, of which the second alone may be
      infinite, and must not be 0.
  """
  # The file may have none.
  bounds = reader.read_list('time_step_limit')
  wrong = (
      f'config.json has time_step_limit {shorten(bounds)}: it must be two '
      'numbers, of which the second is above 0 and may be infinite')
  if not bounds:
    return dict(least_step=0.0, most_step=0.0)
  # Two numbers, of which the second is infinite where there is no bound.
  require(len(bounds) == 2, wrong)
  least, most = bounds
  require(least not in INFINITE_VALUES and most != 0, wrong)
  if most in INFINITE_VALUES:
    most = 0  # no bound
  are_numbers = type(least) in (int, float) and type(most) in (int, float)
  require(are_numbers, wrong)
  return dict(least_step=float(least), most_step=float(most))


def write_step_limits(config: ModelConfig) -> dict:
  """Returns the field of a config.json that `read_step_limits` reads, and no
  field where there are no bounds."""
  sizes = config.part(Mamba2Config)
  if not (sizes.least_step or sizes.most_step):
    return {}
  return dict(time_step_limit=[sizes.least_step,
                               sizes.most_step or INFINITY_IN_JSON])


CONVOLVED_INPUTS = 'value', 'key', 'query'  # x, B, C
# The rows of a layer's recurrence, which hybrid systems have too.
MIXER_ROWS = (
    ('|'.join(('output_gate', *CONVOLVED_INPUTS, 'step')), 'DHK|DHK|DJU|DJU|DH',
     'in_proj.weight', 'HK+HK+JU+JU+H D'),
    ('|'.join(f'{name}_conv' for name in CONVOLVED_INPUTS), 'WHK|WJU|WJU',
     'conv1d.weight', 'HK+JU+JU 1 W'),
    ('|'.join(f'{name}_conv_bias' for name in CONVOLVED_INPUTS), 'HK|JU|JU',
     'conv1d.bias', 'HK+JU+JU'),
    ('step_bias', 'H', 'dt_bias', 'H'), ('decay_scale', 'H', 'A_log', 'H'),
    ('skip', 'H', 'D', 'H'), ('out_norm_scale', 'HK', 'norm.weight', 'HK'),
    ('out', 'HKD', 'out_proj.weight', 'D HK'))


class HF(mamba.HF):
  model_type = 'mamba2'
  architecture = 'Mamba2ForCausalLM'
  names = mamba.decoder_rows(*MIXER_ROWS)
  fields = hf.fields_with_defaults(
      hidden_size=4096, num_hidden_layers=64, vocab_size=32768,
      max_position_embeddings=2048, layer_norm_epsilon=1e-5,
      tie_word_embeddings=False) | {
          'mamba2.heads': ('num_heads', 128),
          'mamba2.head_dim': ('head_dim', 64),
          'mamba2.groups': ('n_groups', 8),
          'mamba2.state': ('state_size', 128),
          'mamba2.conv': ('conv_kernel', 4),
          'mamba2.conv_bias': ('use_conv_bias', True)}
  # The last divides the weights of a folder as it is loaded.
  only = dict(use_bias=False, hidden_act='silu', rms_norm=True,
              rescale_prenorm_residual=False)
  # How it is computed, how its first weights are drawn, and fields that
  # published files have and transformers does not read.
  fields_without_effect = ('chunk_size', 'residual_in_fp32', *(
      f'time_step_{name}' for name in ('rank', 'min', 'max', 'floor')))

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    """Translates a Hugging Face config.json to fields of our config.model.
    Fields that only have another name there have been looked up before.

    Args:
      reader: the fields of the file. `reader(name, default)` returns a field's
        value, or the default if the file lacks it, and marks it as read. A file
        is refused if a field that may matter was never read; `ignore_fields`
        marks fields that do not matter.
      fields: the fields of config.model that have been looked up.

    Returns:
      Further fields of config.model, by name. Groups, such as rope, are dicts.
      They replace fields of the same name in `fields`.
    """
    num_heads = fields['mamba2.heads']
    head_dim = fields['mamba2.head_dim']
    expand = reader('expand', 2)
    require(num_heads * head_dim == expand * fields['d_model'],
            f'config.json has num_heads {num_heads} of head_dim {head_dim}, '
            f'which are not expand {expand} times hidden_size '
            f'{fields["d_model"]}')
    return dict(num_heads=max(1, num_heads // 2), head_dim=head_dim,
                mamba2=read_step_limits(reader))

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    sizes = config.part(Mamba2Config)
    expand = sizes.heads * sizes.head_dim // config.d_model
    return dict(expand=expand) | write_step_limits(config)
