"""OLMoE: LLaMA whose feed-forward networks are mixtures of many narrow experts,
with norms of queries and keys (Muennighoff et al. 2024, section 2).

  q, k = RMSNorm(W_q n), RMSNorm(W_k n)   over all heads, then turned
  a    = x + W_o Attention(q, k, W_v n),  n = RMSNorm(x)
  x'   = a + sum over the 8 best of 64 experts of g_e * SwiGLU_e(m)
  g    = softmax(W_r m), not normalised again over the chosen; m = RMSNorm(a)

An expert is half as wide as the model. No expert has a capacity, no expert is
shared, and nothing has a bias. `moe.normalize_gates` is norm_topk_prob of
config.json. Its clip_qkv, a bound on queries, keys and values, is null in the
published models, and is not here.
"""

from architectures import llama, mixtral, phi3
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.skeletons import Decoder


class OLMoE(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = mixtral.Mixtral.PARTS | dict(
      qk_norm=True, qk_norm_over='projection', moe=dict(
          router='topk', top_k=8, ffn='swiglu', normalize_gates=False))


class HF(llama.Family):
  model_type = 'olmoe'
  architecture = 'OlmoeForCausalLM'
  names = llama.ROWS + llama.layer_rows(
      *llama.head_norm_rows('U'),
      *hf.prefix_rows('ffn', 'mlp', *llama.expert_rows()))
  fields = hf.fields_with_defaults(
      hidden_size=2048, num_hidden_layers=16, num_attention_heads=16,
      num_key_value_heads=hf.default_num_kv_heads, intermediate_size=2048,
      vocab_size=50304, max_position_embeddings=4096, rms_norm_eps=1e-5,
      attention_bias=False, tie_word_embeddings=False, num_experts_per_tok=8,
      norm_topk_prob=False, router_aux_loss_coef=0.01) | {
          'moe.ffn': hf.GATED_FFN_FIELD,
          'moe.num_experts': ('num_local_experts|num_experts', 64)}
  only = dict(clip_qkv=None)

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
    # transformers has no other: its norms are as wide as the model.
    reader.require_values(head_dim=hf.default_head_dim(fields))
    return super().read(reader, fields)

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
    # Without these nulls, a text ends at 50,279 and is padded with 1.
    config_json |= dict.fromkeys(phi3.TOKEN_ID_FIELDS)
    # Hugging Face calls the width of an expert as that of a dense network.
    config_json['intermediate_size'] = config.part(MoEConfig).d_ff
    return config_json
