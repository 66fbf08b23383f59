"""The models that are compared for decoders with mixtures of experts; cases.py
has those of all other systems."""

from typing import NamedTuple


class System(NamedTuple):
  """Attributes:
    common: fields of the config.json.
    cases: further fields, by the name of the case.
  """
  common: dict
  cases: dict[str, dict]


NO_IDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
MSCALE = dict(rope_type='yarn', rope_theta=1e4, factor=4.0, mscale=0.7,
              original_max_position_embeddings=20)

MIXTURES = {
    'mixtral': System(
        dict(vocab_size=61, hidden_size=16, intermediate_size=20,
             num_attention_heads=4, num_key_value_heads=2,
             num_hidden_layers=2, num_local_experts=4,
             max_position_embeddings=80, output_router_logits=True,
             **NO_IDS),
        {
            'plain': {},
            'window': dict(sliding_window=5, num_local_experts=5,
                           num_attention_heads=3, num_key_value_heads=1,
                           head_dim=6,
                           num_experts_per_tok=3, num_hidden_layers=1,
                           tie_word_embeddings=True),
        }),
    'deepseek_v2': System(
        dict(vocab_size=61, hidden_size=16, intermediate_size=24,
             moe_intermediate_size=12, num_attention_heads=4,
             num_key_value_heads=4, num_hidden_layers=2,
             first_k_dense_replace=1, n_routed_experts=6, n_shared_experts=2,
             num_experts_per_tok=3, kv_lora_rank=8, q_lora_rank=None,
             qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
             max_position_embeddings=80, **NO_IDS),
        {
            'plain': dict(rope_parameters=dict(MSCALE, mscale_all_dim=0.5)),
            'groups': dict(
                q_lora_rank=12, topk_method='group_limited_greedy', n_group=3,
                topk_group=2, routed_scaling_factor=4.0, n_shared_experts=1,
                attention_bias=True, num_hidden_layers=1,
                first_k_dense_replace=0, tie_word_embeddings=True),
        }),
    'deepseek_v3': System(
        dict(vocab_size=61, hidden_size=16, intermediate_size=24,
             moe_intermediate_size=12, num_attention_heads=4,
             num_key_value_heads=4, num_hidden_layers=3,
             first_k_dense_replace=2, n_routed_experts=8, n_shared_experts=1,
             num_experts_per_tok=3, n_group=4, topk_group=2, kv_lora_rank=8,
             q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4,
             v_head_dim=5, max_position_embeddings=80, num_mtp_layers=0,
             **NO_IDS),
        {
            'plain': dict(rope_parameters=dict(MSCALE, mscale_all_dim=0.7)),
            'halves': dict(
                rope_interleave=False, q_lora_rank=None, n_group=1,
                topk_group=1, norm_topk_prob=False, n_shared_experts=2,
                attention_bias=True, num_hidden_layers=1,
                first_k_dense_replace=0, tie_word_embeddings=True),
        }),
    'qwen3_moe': System(
        dict(vocab_size=61, hidden_size=16, intermediate_size=20,
             moe_intermediate_size=12, num_attention_heads=4,
             num_key_value_heads=2, head_dim=6, num_hidden_layers=2,
             num_experts=5, num_experts_per_tok=3, norm_topk_prob=True,
             max_position_embeddings=80, output_router_logits=True, **NO_IDS),
        {
            'plain': {},
            # A dense layer below one with experts; gates that do not sum to 1.
            'sparse': dict(decoder_sparse_step=2, norm_topk_prob=False,
                           num_experts_per_tok=2, tie_word_embeddings=True),
        }),
    'qwen3_next': System(
        dict(vocab_size=31, hidden_size=12, intermediate_size=8,
             moe_intermediate_size=8, shared_expert_intermediate_size=8,
             num_attention_heads=2, num_key_value_heads=1, head_dim=8,
             num_hidden_layers=2, num_experts=5, num_experts_per_tok=3,
             linear_num_key_heads=2, linear_num_value_heads=4,
             linear_key_head_dim=4, linear_value_head_dim=3,
             layer_types=['linear_attention', 'full_attention'],
             max_position_embeddings=80, output_router_logits=True, **NO_IDS),
        {
            'plain': {},
            # Three layers, of which the first is dense, so that none repeats.
            'dense': dict(
                num_hidden_layers=3, layer_types=[
                    'linear_attention', 'linear_attention', 'full_attention'],
                mlp_only_layers=[0], norm_topk_prob=False, head_dim=6,
                attention_bias=True, tie_word_embeddings=True,
                shared_expert_intermediate_size=16, linear_num_value_heads=2,
                linear_conv_kernel_dim=3, rope_parameters=dict(
                    rope_type='default', rope_theta=1e3,
                    partial_rotary_factor=0.67)),
        }),
    'kimi_linear': System(
        dict(vocab_size=31, hidden_size=12, intermediate_size=8,
             moe_intermediate_size=8, num_attention_heads=2,
             num_key_value_heads=2, num_hidden_layers=3, num_experts=6,
             num_experts_per_tok=3, kv_lora_rank=6, qk_nope_head_dim=4,
             qk_rope_head_dim=2, v_head_dim=3, linear_num_heads=3,
             linear_head_dim=4, layer_types=[
                 'linear_attention', 'linear_attention', 'full_attention'],
             max_position_embeddings=80, **NO_IDS),
        {
            'plain': {},
            # A dense layer of attention above one with experts.
            'groups': dict(
                num_hidden_layers=2, layer_types=[
                    'linear_attention', 'full_attention'],
                mlp_layer_types=['sparse', 'dense'], q_lora_rank=5, n_group=3,
                topk_group=2, norm_topk_prob=False, n_shared_experts=2,
                attention_bias=True, rms_norm_eps=1e-3, num_attention_heads=3,
                num_key_value_heads=3, linear_num_heads=2,
                linear_conv_kernel_dim=3),
        }),
    'olmoe': System(
        dict(vocab_size=31, hidden_size=12, intermediate_size=8,
             num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=2,
             num_experts=5, num_experts_per_tok=3, max_position_embeddings=80,
             output_router_logits=True, **NO_IDS),
        {'grouped': {}}),
    'gpt_oss': System(
        dict(vocab_size=61, hidden_size=16, intermediate_size=12,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             num_hidden_layers=2, num_local_experts=5, num_experts_per_tok=3,
             sliding_window=5, swiglu_limit=0.5, max_position_embeddings=80,
             output_router_logits=True, **NO_IDS),
        {
            'plain': dict(rope_parameters=dict(
                rope_type='yarn', rope_theta=1e4, factor=4.0, truncate=False,
                original_max_position_embeddings=20)),
            'windows': dict(
                layer_types=['sliding_attention'] * 2, head_dim=6,
                tie_word_embeddings=True, rope_parameters=dict(
                    rope_type='default', rope_theta=1e4)),
        }),
}
