"""Qwen3-MoE: Qwen3 whose feed-forward networks are mixtures of many narrow
experts (Qwen Team 2025, arXiv 2505.09388, section 2).

  q, k = RMSNorm(x W_q), RMSNorm(x W_k)   each head by itself, before it turns
  y    = sum over the 8 best of 128 experts of g_e * SwiGLU_e(n)
  g    = softmax(W_r n) of the chosen, divided by their sum

No shared expert, no bias, no capacity; heads are wider than width / heads. The
report balances the experts over the whole batch (its section 2), which the
switch loss does here: its means are over all that goes through the model at
once. `moe.normalize_gates=False` is norm_topk_prob of config.json.
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.skeletons import Decoder
from common import kinds
from common.errors import require


class Qwen3MoE(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      qk_norm=True, ffn='moe', moe=dict(router='topk', top_k=8, ffn='swiglu'))


FFN_ROWS = llama.layer_rows(*hf.prefix_rows('ffn', 'mlp', *llama.FFN_ROWS,
                                            *llama.expert_rows()))


class HF(llama.Family):
  model_type = 'qwen3_moe'
  architecture = 'Qwen3MoeForCausalLM'
  names = llama.ROWS + llama.layer_rows(*llama.head_norm_rows()) + FFN_ROWS
  fields = hf.fields_with_defaults(
      hidden_size=2048, num_hidden_layers=24, num_attention_heads=32,
      num_key_value_heads=4, head_dim=hf.default_head_dim,
      intermediate_size=6144,
      vocab_size=151936, max_position_embeddings=32768, rms_norm_eps=1e-6,
      attention_bias=False, tie_word_embeddings=False,
      moe_intermediate_size=768, num_experts_per_tok=8, norm_topk_prob=False,
      router_aux_loss_coef=0.001) | {
          'moe.ffn': hf.GATED_FFN_FIELD,
          'moe.num_experts': ('num_local_experts|num_experts', 128)}
  only = dict(use_sliding_window=False)
  fields_without_effect = ('sliding_window',)
  heads = hf.task_heads('Qwen3Moe', tokens='score', span=llama.SPAN_PREFIXES)

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
    interval = reader('decoder_sparse_step', 1)
    num_layers = fields['num_layers']
    require(num_layers % interval == 0, 'config.json has decoder_sparse_step '
            f'{interval}, which does not divide num_hidden_layers {num_layers}')
    hf.check_gates(fields)
    reader.require_values(mlp_only_layers=[])
    model_fields = super().read(reader, fields)  # LLaMA's: rotary positions
    # Which layers have experts: the order of the layers, and their kinds.
    model_fields |= kinds.place_experts({}, interval)
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
    interval = layer_types.interval_of_expert_layers(config)
    config_json = super().write(config)  # LLaMA's: rotary positions
    config_json['mlp_only_layers'] = []
    config_json['decoder_sparse_step'] = interval
    return config_json
