"""Mistral 7B: LLaMA with grouped heads, whose layers see a window (Jiang et al.
2023, section 2).

  a   = x + Attention(RMSNorm(x))         a query sees the last 4,096 keys
  x'  = a + W_down (silu(W_gate n) * W_up n),  n = RMSNorm(a)
  logits = RMSNorm(x_N) W                 a matrix of its own; no bias anywhere

What stands n windows back still reaches a token through n layers. From version
0.2 on there is no window: `model.attention=global`.
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.skeletons import Decoder


class Mistral(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(attention='banded')


# LLaMA's, but those of biases, which transformers does not read here.
FIELDS = hf.drop_entries(llama.HF.fields, 'attention_bias', 'ffn_bias')


class HF(llama.Family):
  model_type = 'mistral'
  architecture = 'MistralForCausalLM'
  names = llama.HF.names
  fields = FIELDS | hf.fields_with_defaults(
      num_key_value_heads=8, intermediate_size=14336,
      max_position_embeddings=131072)
  heads = hf.task_heads('Mistral', tokens='score')

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
    window = layer_types.read_sliding_window(reader)
    model_fields = super().read(reader, fields)  # LLaMA's: rotary positions
    model_fields['sliding_window'] = window
    model_fields['attention'] = 'global'
    if window:
      model_fields['attention'] = 'banded'
    return model_fields

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    config_json = super().write(config)  # LLaMA's: rotary positions
    config_json['sliding_window'] = None
    if config.attention == 'banded':
      config_json['sliding_window'] = config.sliding_window
    return config_json
