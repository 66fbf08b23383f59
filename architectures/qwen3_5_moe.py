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
    moe = qwen3_next.read_experts(reader, fields)
    model_fields = super().read(reader, fields)  # those of the dense model
    model_fields['moe'] = moe
    return model_fields

  def write(self, config: ModelConfig) -> dict:
    """Returns the fields of a Hugging Face config.json that `read` reads, with
    the values that say what this model is.

    Args:
      config: our config of the model.
    """
    config_json = super().write(config)  # the fields of the dense model
    config_json |= qwen3_next.write_experts(config)
    return config_json
