"""Mixtral: LLaMA whose feed-forward network is a mixture of experts (Jiang et
al. 2024, section 2.1).

  y = sum over the 2 chosen experts of softmax(top2(W_r x))_e * SwiGLU_e(x)

No expert has a capacity: no token is dropped (what is trained with one, and
evaluated without, is exported too). The gates are renormalised over
the two choices, which equals a softmax over their two logits alone. A sliding
window (Mistral 7B) is an option: `model.attention=banded`.
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.skeletons import Decoder


class Mixtral(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      ffn='moe', moe=dict(router='topk', top_k=2, ffn='swiglu'))


class HF(llama.Family):
  model_type = 'mixtral'
  architecture = 'MixtralForCausalLM'
  names = llama.ROWS + llama.layer_rows(*hf.prefix_rows(
      'ffn', 'block_sparse_moe', *llama.expert_rows('w1', 'w3', 'w2')))
  fields = hf.fields_with_defaults(
      hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
      num_key_value_heads=8, head_dim=hf.default_head_dim,
      intermediate_size=14336,
      vocab_size=32000, max_position_embeddings=131072, rms_norm_eps=1e-5,
      tie_word_embeddings=False, num_local_experts=8, num_experts_per_tok=2,
      router_jitter_noise=0.0, router_aux_loss_coef=0.001
  ) | {'moe.ffn': hf.GATED_FFN_FIELD}
  heads = hf.task_heads('Mixtral', tokens='score')

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
    hf.check_gates(fields)
    window = reader('sliding_window', 0)
    attention = 'banded' if window else 'global'
    rope = rope_fields.read_rope(reader, theta=('rope_theta', 1e6))
    return dict(rope=rope, attention=attention, sliding_window=window)

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
    # Hugging Face calls the width of an expert as that of a dense network.
    config_json['intermediate_size'] = config.part(MoEConfig).d_ff
    config_json['sliding_window'] = config.sliding_window or None
    return config_json
