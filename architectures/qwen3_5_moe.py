"""Qwen3.5 with experts, of text: Qwen3.5 whose networks are mixtures of narrow
experts beside one that every token goes through (Qwen Team 2026, "Qwen3.5:
Towards Native Multimodal Agents").

  x' = a + sum over the 8 or 10 best of 256 or 512 experts of g_e * SwiGLU_e(m)
         + sigmoid(w m) * SwiGLU(m),  m = n(a)
  g  = softmax(W_r m) of the chosen, divided by their sum

architectures/qwen3_5.py has what mixes the tokens, and says how a published
folder is read (here by Qwen3_5MoeForCausalLM).
"""

from architectures import qwen3_5, qwen3_next
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import Decoder


class Qwen35MoE(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  ARCH = 'qwen3_5_moe'
  PARTS = qwen3_next.Qwen3Next.PARTS | dict(moe=dict(
      qwen3_next.Qwen3Next.PARTS['moe'], top_k=8))


class HF(qwen3_5.HF):
  model_type = 'qwen3_5_moe_text'
  architecture = 'Qwen3_5MoeForCausalLM'
  fields = hf.drop_entries(qwen3_5.HF.fields, 'd_ff', 'ffn') | (
      hf.fields_with_defaults(
          hidden_size=2048, num_hidden_layers=40, num_key_value_heads=2,
          moe_intermediate_size=512, num_experts=256, num_experts_per_tok=8,
          router_aux_loss_coef=0.001)
  ) | {'moe.ffn': qwen3_next.SWIGLU_FIELD}
  fields_without_effect = ('intermediate_size',)
  heads = {}

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
    moe = qwen3_next.read_experts(reader, fields)
    model_fields = super().read(reader, fields)  # those of the dense model
    model_fields['moe'] = moe
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
    config_json = super().write(config)  # the fields of the dense model
    config_json |= qwen3_next.write_experts(config)
    return config_json
