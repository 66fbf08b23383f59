"""Mamba: layers of a selective state space model, and nothing else: no
attention, no feed-forward networks, no positions (Gu and Dao 2023, arXiv
2312.00752, section 3.4).

  x'     = x + Mamba(RMSNorm(x))         parts/recurrent/mamba.py
  logits = RMSNorm(x_N) E^T

A layer has twice as many features as the stream, each with a state of 16
numbers, where Mamba-2 has heads. As there, a model has twice as many layers as
a transformer of its width.
"""

import math

from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.recurrent.mamba import MambaConfig
from architectures.parts.skeletons import Decoder


class Mamba(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(mixer='mamba', position='none', norm='rmsnorm',
               block='pre_norm', attention='global', ffn='none',
               tie_embeddings=True)


def decoder_rows(*mixer: hf.Row) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of a
  model whose layers are a Mamba or a Mamba-2, with the rows `mixer`."""
  return (('embed/tokens', 'VD', 'backbone.embeddings.weight', 'V D'),
          *hf.prefix_rows(
              'decoder/layers', 'backbone.layers.{n}',
              ('attention_norm/scale', 'D', 'norm.weight', 'D'),
              *hf.prefix_rows('attention', 'mixer', *mixer)),
          ('decoder/final_norm/scale', 'D', 'backbone.norm_f.weight', 'D'),
          ('head/kernel', 'DV', 'lm_head.weight', 'V D'))


class HF(hf.HuggingFace):
  model_type = 'mamba'
  architecture = 'MambaForCausalLM'
  names = decoder_rows(
      ('value|output_gate', 'DF|DF', 'in_proj.weight', 'F+F D'),
      ('conv', 'WF', 'conv1d.weight', 'F 1 W'),
      ('conv_bias', 'F', 'conv1d.bias', 'F'),
      ('step_down|key|query', 'FU|FK|FK', 'x_proj.weight', 'U+K+K F'),
      ('step_up', 'UF', 'dt_proj.weight', 'F U'),
      ('step_bias', 'F', 'dt_proj.bias', 'F'),
      ('decay_scale', 'FK', 'A_log', 'F K'),
      ('skip', 'F', 'D', 'F'),
      ('out', 'FD', 'out_proj.weight', 'D F'))
  fields = hf.fields_with_defaults(
      hidden_size=768, num_hidden_layers=32, vocab_size=50280,
      max_position_embeddings=2048, layer_norm_epsilon=1e-5,
      tie_word_embeddings=True) | {
          'mamba.expand': ('expand', 2), 'mamba.state': ('state_size', 16),
          'mamba.conv': ('conv_kernel', 4),
          'mamba.conv_bias': ('use_conv_bias', True)}
  # The last divides the weights of a folder as it is loaded.
  only = dict(use_bias=False, hidden_act='silu',
              rescale_prenorm_residual=False)
  # How it is computed, how its first weights are drawn, and fields that
  # published files have and transformers does not read.
  fields_without_effect = (
      'residual_in_fp32', 'use_mambapy', 'use_associative_scan',
      'time_step_min', 'time_step_max', 'time_step_floor', 'time_step_scale',
      'time_step_init_scheme', 'intermediate_size')
  tied = {'lm_head.weight': 'backbone.embeddings.weight'}
  # The second spelling is that of the authors' own files.
  spellings = (('backbone.embeddings.', 'backbone.embedding.'),)

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
    # transformers' default, 'auto', is d_model / 16, rounded up.
    default_rank = math.ceil(fields['d_model'] / 16)
    return dict(mamba=dict(rank=reader('time_step_rank', default_rank)))

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    return dict(time_step_rank=config.part(MambaConfig).rank)
