"""GLM-4.5: grouped heads of which half turns, and DeepSeek-V3's experts (GLM
Team 2025, arXiv 2508.06471, section 2.1).

  q, k, v = W_q n + b_q, W_k n + b_k, W_v n + b_v,  n = RMSNorm(x)
  a   = x + W_o Attention(q, k, v)       the first half of each head turned
  x'  = a + shared(m) + gate_scale * sum over the 8 chosen of g_e SwiGLU_e(m)

The experts are chosen and weighed as in architectures/deepseek_v3.py, without
groups; the first layers are dense. The larger model has norms of each head of
queries and keys. The module that predicts a second token is model.mtp_depth=1;
the published one, the last layer of a folder, is not imported.
"""

from architectures import deepseek_v2, deepseek_v3, llama, qwen2
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder


class Glm4MoE(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = qwen2.Qwen2.PARTS | dict(
      rope=dict(fraction=0.5), ffn='moe', prefix='dense',
      kinds=dict(dense=dict(ffn='dense')), moe=dict(
          router='sigmoid', top_k=8, ffn='swiglu', shared_experts=1))


class HF(llama.Family):
  model_type = 'glm4_moe'
  architecture = 'Glm4MoeForCausalLM'
  names = (
      *(row for row in llama.ROWS if 'out_bias' not in row[0]),
      *llama.layer_rows(*llama.head_norm_rows(), *hf.prefix_rows(
          'ffn', 'mlp', *llama.FFN_ROWS, *llama.expert_rows(),
          *deepseek_v2.SHARED_EXPERT_ROWS,
          ('router_bias', 'E', 'gate.e_score_correction_bias', 'E'))))
  fields = hf.fields_with_defaults(
      hidden_size=4096, num_hidden_layers=46, num_attention_heads=96,
      num_key_value_heads=8, head_dim=hf.default_head_dim,
      intermediate_size=10944,
      vocab_size=151552, max_position_embeddings=131072, rms_norm_eps=1e-5,
      attention_bias=False, tie_word_embeddings=False,
      moe_intermediate_size=1408, num_experts_per_tok=8, topk_group=1,
      routed_scaling_factor=1.0, norm_topk_prob=True, n_routed_experts=128,
      n_shared_experts=1, n_group=1) | {
          'qk_norm': ('use_qk_norm', False), 'moe.ffn': hf.GATED_FFN_FIELD}
  ignored = (*llama.HF.ignored, r'model\.layers\.(46|92)\..*')

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
    deepseek_v3.note_multi_token_prediction(reader)
    hf.check_gates(fields)
    rope = rope_fields.read_rope(reader,
                                 fraction=('partial_rotary_factor', 0.5))
    dense_layers = deepseek_v2.read_dense_layers(reader, fields=fields, dense=1)
    return dense_layers | dict(rope=rope)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    return deepseek_v2.write_dense_layers(config) | dict(
        num_nextn_predict_layers=0,
        rope_parameters=rope_fields.write_rope(config, whole_heads=False))
