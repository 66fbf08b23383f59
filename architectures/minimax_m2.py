"""MiniMax-M2: grouped heads of which half turns, and 256 experts without a
shared one (MiniMax 2025, the released config.json).

  q, k = RMSNorm(x W_q), RMSNorm(x W_k)   over all heads at once
  a    = x + W_o Attention(q, k, W_v n)   the first half of each head turned
  y    = sum over the 8 chosen of g_e SwiGLU_e(m)

The experts are chosen and weighed as in architectures/deepseek_v3.py, without
groups, in every layer; gates sum to 1.
"""

from architectures import llama, mixtral
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.skeletons import Decoder


class MiniMaxM2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      rope=dict(fraction=0.5), qk_norm=True, qk_norm_over='projection',
      ffn='moe', moe=dict(router='sigmoid', top_k=8, ffn='swiglu'))


class HF(mixtral.HF):
  model_type = 'minimax_m2'
  architecture = 'MiniMaxM2ForCausalLM'
  names = llama.ROWS + llama.layer_rows(
      *llama.head_norm_rows('U'), *hf.prefix_rows(
          'ffn', 'block_sparse_moe', *llama.expert_rows('w1', 'w3', 'w2'),
          ('router_bias', 'E', 'e_score_correction_bias', 'E')))
  fields = mixtral.HF.fields | hf.fields_with_defaults(
      hidden_size=3072, num_hidden_layers=62, num_attention_heads=48,
      head_dim=128, intermediate_size=1536, vocab_size=200064,
      max_position_embeddings=196608, rms_norm_eps=1e-6,
      num_local_experts=256, num_experts_per_tok=8)
  only = dict(scoring_func='sigmoid', qk_norm_type='per_layer',
              use_qk_norm=True, use_routing_bias=True,
              shared_intermediate_size=0)
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
    if reader.has('attn_type_list'):  # 1: softmax attention
      reader.require_values(attn_type_list=[1] * fields['num_layers'])
    share = reader('rotary_dim', fields['head_dim']) / fields['head_dim']
    rope = rope_fields.read_rope(reader, theta=('rope_theta', 5e6),
                                 fraction=('partial_rotary_factor', share))
    return dict(rope=rope)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    rope = rope_fields.write_rope(config, whole_heads=False)
    return dict(intermediate_size=config.part(MoEConfig).d_ff,
                rope_parameters=rope)
