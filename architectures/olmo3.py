"""OLMo 3: OLMo 2 whose layers see a window, but every fourth (OLMo Team 2025b,
section 3.2).

  q, k = RMSNorm(W_q x), RMSNorm(W_k x)   over all heads, then turned
  a    = x + RMSNorm(Attention(x))        three layers of four: the last 4,096
  x'   = a + RMSNorm(W_down (silu(W_gate a) * W_up a))
  logits = RMSNorm(x_N) W                 a matrix of its own; no bias anywhere

For 65,536 tokens, YaRN stretches the positions of the layers that see all
alone.
"""

from architectures import olmo2
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder


class OLMo3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = olmo2.OLMo2.PARTS | dict(
      pattern='local,local,local,global',
      kinds={'local': dict(window=64), 'global': dict(window=0)})


class HF(olmo2.HF):
  model_type = 'olmo3'
  architecture = 'Olmo3ForCausalLM'
  heads = hf.task_heads('Olmo3', only=('sequence',))

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
    # Outside of rope_parameters, transformers takes it for one kind alone.
    reader.require_values(rope_theta=5e5)
    local_rope, global_rope = rope_fields.read_rope_of_layer_kinds(
        reader, (layer_types.SLIDING_ATTENTION, ('rope_theta', 5e5)),
        (layer_types.FULL_ATTENTION, ('rope_theta', 5e5)))
    kind_fields = {}
    if local_rope != global_rope:
      kind_fields[layer_types.SLIDING_ATTENTION] = dict(rope=local_rope)
    num_layers = fields['num_layers']
    types = layer_types.read_attention_types(
        reader, layers=num_layers, has_window=lambda n: (n + 1) % 4)
    window = layer_types.read_sliding_window(reader)
    # Where all layers have a window, theirs are the positions of the model.
    model_fields = layer_types.fields_of_attention_types(
        types, layers=num_layers, window=window, kind_fields=kind_fields)
    return dict(rope=global_rope) | model_fields

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    return layer_types.write_attention_types(config) | dict(
        rope_parameters=rope_fields.write_rope_of_layer_kinds(config))
