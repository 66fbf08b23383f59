"""Qwen2 and Qwen2.5: LLaMA with grouped heads, and with biases of queries, keys
and values alone (Yang et al. 2024, section 2.2; Qwen Team 2024, section 2).

  q, k, v = W_q n + b_q, W_k n + b_k, W_v n + b_v,  n = RMSNorm(x)
  a   = x + W_o Attention(q, k, v)        q and k turned by their position
  x'  = a + W_down (silu(W_gate m) * W_up m),  m = RMSNorm(a)
  logits = RMSNorm(x_N) W                 W = E^T in the smaller sizes

A config.json may give the layers from max_window_layers on a window, or say it
layer by layer; no published one does.
"""

from architectures import llama, mistral
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.skeletons import Decoder


class Qwen2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(attention_bias=True,
                                   attention_out_bias=False)


FIELDS = mistral.FIELDS | hf.fields_with_defaults(
    num_key_value_heads=32, intermediate_size=22016, vocab_size=151936,
    max_position_embeddings=32768)


class HF(llama.Family):
  model_type = 'qwen2'
  architecture = 'Qwen2ForCausalLM'
  names = tuple(row for row in llama.HF.names
                if row[0] != 'decoder/layers/attention/out_bias')
  fields = FIELDS
  # Published files say so; transformers reads it in Qwen2-VL alone.
  only = dict(use_mrope=False)
  heads = hf.task_heads('Qwen2', tokens='score', span=llama.SPAN_PREFIXES)

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
    num_layers = fields['num_layers']
    # The first max_window_layers layers have no window, whatever it is called.
    num_full = reader.read_count('max_window_layers', 28)
    # The window is read even where it is not used: the field is a known one.
    window = layer_types.read_sliding_window(reader)
    if not reader('use_sliding_window', False):
      window = 0
    types = layer_types.read_attention_types(
        reader, layers=num_layers,
        has_window=lambda n: window and n >= num_full)
    # LLaMA's rotary positions (super), and which layers have the window.
    model_fields = super().read(reader, fields)
    model_fields |= layer_types.fields_of_attention_types(
        types, layers=num_layers, window=window)
    if reader.is_null('num_key_value_heads'):  # left out, there are 32
      model_fields['num_kv_heads'] = fields['num_heads']
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
    # The type of each layer, and the window where one of them has it.
    config_json = layer_types.write_attention_types(config)
    layers_with_window = []
    for n, layer_type in enumerate(config_json['layer_types']):
      if layer_type == layer_types.SLIDING_ATTENTION:
        layers_with_window.append(n)
    config_json |= super().write(config)  # LLaMA's: rotary positions

    # Two more fields say whether there is a window, and from which layer on.
    config_json['use_sliding_window'] = bool(layers_with_window)
    config_json['max_window_layers'] = min(layers_with_window,
                                           default=config.num_layers)
    return config_json
