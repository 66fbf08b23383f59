"""Mamba: layers of a selective state space model, and nothing else: no
attention, no feed-forward networks, no positions (Gu and Dao 2023, arXiv
2312.00752, section 3.4).

  x'     = x + Mamba(RMSNorm(x))         parts/recurrent/mamba.py
  logits = RMSNorm(x_N) E^T

A layer has twice as many features as the stream, each with a state of 16
numbers, where Mamba-2 has heads. As there, a model has twice as many layers as
a transformer of its width.
"""

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
  """Returns the rows that give the Hugging Face names of a model whose layers
  are a Mamba or a Mamba-2, with the rows `mixer`."""
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
    """Returns the fields of our config.model that take more than looking up one
    field of a Hugging Face config.json.

    Args:
      reader: reads that file: `reader(name, default)` returns a field and marks
        it as read. The import refuses a file with fields that nothing has read
        and that may matter; `ignore_fields` marks those that do not.
      fields: the fields of ours that were looked up before, by flat name.

    Returns:
      Further fields of config.model, with a dict for each group, such as rope.
      They replace those of `fields`.
    """
    rank = -(-fields['d_model'] // 16)  # what 'auto' is
    return dict(mamba=dict(rank=reader('time_step_rank', rank)))

  def write(self, config: ModelConfig) -> dict:
    """Returns the fields of a Hugging Face config.json that `read` reads, with
    the values that say what this model is.

    Args:
      config: our config of the model.
    """
    return dict(time_step_rank=config.part(MambaConfig).rank)
