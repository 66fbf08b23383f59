"""The models that are compared: small, random, of many shapes.

SYSTEMS[arch] has the fields of a config.json that are common to all cases, and
those of each case. To record a case is to keep it for the tests that have no
PyTorch.
"""

from tools.verify import mixture_cases
from tools.verify.mixture_cases import NO_IDS, System

# A head wide enough that its waves are some scaled, some kept.
ROPE = dict(num_hidden_layers=1, num_attention_heads=2, head_dim=16,
            num_key_value_heads=1)

LONGROPE = dict(
    rope_type='longrope', rope_theta=1e4,
    short_factor=[1.0, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0, 2.2],
    long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 9.0, 14.0, 20.0])

SYSTEMS = {
    'gpt': System(
        dict(vocab_size=61, n_embd=20, n_head=4, n_layer=2, n_positions=80,
             **NO_IDS),
        {
            'plain': {},
            'odd_heads': dict(n_head=5, n_layer=3, n_inner=24),
            'untied': dict(tie_word_embeddings=False, n_layer=1,
                           activation_function='gelu',
                           layer_norm_epsilon=1e-3),
        }),
    'llama': System(
        dict(vocab_size=61, hidden_size=16, intermediate_size=24,
             num_attention_heads=4, num_hidden_layers=2,
             max_position_embeddings=80, **NO_IDS),
        {
            'grouped': dict(num_key_value_heads=2),
            'odd_heads': dict(hidden_size=18, num_attention_heads=3,
                              num_key_value_heads=1, head_dim=8,
                              rms_norm_eps=1e-4),
            'biases': dict(attention_bias=True, mlp_bias=True,
                           tie_word_embeddings=True, num_hidden_layers=1),
            'linear': dict(ROPE, rope_parameters=dict(
                rope_type='linear', rope_theta=1e4, factor=2.5)),
            'llama3': dict(ROPE, rope_parameters=dict(
                rope_type='llama3', rope_theta=5e5, factor=8.0,
                low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=20)),
            'yarn': dict(ROPE, rope_parameters=dict(
                rope_type='yarn', rope_theta=1e4, factor=4.0,
                original_max_position_embeddings=20)),
            # Inputs are of 12 tokens, so by the factors of short and of long
            # texts; in the first all that are written are short, too.
            'longrope_short': dict(ROPE, rope_parameters=dict(
                LONGROPE, original_max_position_embeddings=80,
                factor=4.0)),
            'longrope_long': dict(ROPE, rope_parameters=dict(
                LONGROPE, original_max_position_embeddings=4,
                attention_factor=1.3)),
            'dynamic': dict(ROPE, max_position_embeddings=8,
                            rope_parameters=dict(
                                rope_type='dynamic', rope_theta=1e4,
                                factor=2.5)),
            # A config.json has no name for it: theta factor ** (K / (K - 2)).
            'ntk': dict(ROPE, rope_parameters=dict(
                rope_type='default', rope_theta=1e4 * 4 ** (16 / 14))),
        }),
    'mistral': System(
        dict(vocab_size=31, hidden_size=12, intermediate_size=16,
             num_attention_heads=3, num_key_value_heads=1, head_dim=6,
             num_hidden_layers=2, max_position_embeddings=80, **NO_IDS),
        {'window': dict(sliding_window=5)}),
    'olmo2': System(
        dict(vocab_size=31, hidden_size=12, intermediate_size=16,
             num_attention_heads=4, num_key_value_heads=2, head_dim=4,
             num_hidden_layers=2, max_position_embeddings=80, **NO_IDS),
        {'grouped': {}}),
    'olmo3': System(
        dict(vocab_size=31, hidden_size=12, intermediate_size=16,
             num_attention_heads=4, num_key_value_heads=2, head_dim=4,
             num_hidden_layers=4, max_position_embeddings=80,
             sliding_window=5, **NO_IDS),
        {'yarn': dict(rope_parameters=dict(
            sliding_attention=dict(rope_type='default', rope_theta=5e5),
            full_attention=dict(rope_type='yarn', rope_theta=5e5, factor=4.0,
                                original_max_position_embeddings=20)))}),
    'qwen2': System(
        dict(vocab_size=31, hidden_size=12, intermediate_size=16,
             num_attention_heads=3, num_key_value_heads=1, head_dim=4,
             num_hidden_layers=2, max_position_embeddings=80, **NO_IDS),
        {'window': dict(use_sliding_window=True, sliding_window=5,
                        max_window_layers=1)}),
    'qwen3': System(
        dict(vocab_size=31, hidden_size=12, intermediate_size=16,
             num_attention_heads=3, num_key_value_heads=1, head_dim=6,
             num_hidden_layers=1, max_position_embeddings=80, **NO_IDS),
        {'tied': dict(tie_word_embeddings=True)}),
    'smollm3': System(
        dict(vocab_size=31, hidden_size=12, intermediate_size=16,
             num_attention_heads=3, num_key_value_heads=1, head_dim=6,
             num_hidden_layers=4, max_position_embeddings=80, **NO_IDS),
        {'plain': {}}),
    'gpt_neox': System(
        dict(vocab_size=61, hidden_size=32, intermediate_size=24,
             num_attention_heads=4, num_hidden_layers=2,
             max_position_embeddings=80, **NO_IDS),
        {
            'quarter': {},
            'pre_norm': dict(use_parallel_residual=False, hidden_size=24,
                             num_attention_heads=3, hidden_act='gelu_fast',
                             num_hidden_layers=1, rope_parameters=dict(
                                 rope_type='default', rope_theta=1e3,
                                 partial_rotary_factor=1.0)),
        }),
    'bloom': System(
        dict(vocab_size=61, hidden_size=16, n_head=4, n_layer=2, **NO_IDS),
        {
            'plain': {},
            'odd_heads': dict(hidden_size=20, n_head=5, n_layer=1,
                              tie_word_embeddings=False),
        }),
    'gemma2': System(
        dict(vocab_size=61, hidden_size=16, intermediate_size=24,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             num_hidden_layers=2, max_position_embeddings=80,
             query_pre_attn_scalar=6, sliding_window=5, **NO_IDS),
        {
            'plain': {},
            'no_bounds': dict(attn_logit_softcapping=None,
                              final_logit_softcapping=None, rms_norm_eps=1e-4,
                              attention_bias=True, tie_word_embeddings=False,
                              num_hidden_layers=1),
        }),
    'gemma3': System(
        dict(vocab_size=61, hidden_size=16, intermediate_size=24,
             num_attention_heads=4, num_key_value_heads=1, head_dim=8,
             num_hidden_layers=2, max_position_embeddings=80,
             query_pre_attn_scalar=6, sliding_window=5,
             layer_types=['sliding_attention', 'full_attention'], **NO_IDS),
        {
            'plain': {},
            # Five layers of six have a window; the first is one too many.
            'seven_layers': dict(num_hidden_layers=7, layer_types=None),
            'linear': dict(
                attention_bias=True, final_logit_softcapping=9.0,
                rope_parameters=dict(
                    sliding_attention=dict(rope_type='default', rope_theta=1e3),
                    full_attention=dict(rope_type='linear', rope_theta=1e5,
                                        factor=8.0))),
        }),
    'phi3': System(
        dict(vocab_size=61, hidden_size=32, intermediate_size=24,
             num_attention_heads=2, num_key_value_heads=1,
             num_hidden_layers=1, max_position_embeddings=80, **NO_IDS),
        {
            'plain': dict(num_hidden_layers=2),
            'longrope': dict(original_max_position_embeddings=4,
                             rope_parameters=LONGROPE),
            'window': dict(sliding_window=5, num_key_value_heads=2,
                           tie_word_embeddings=True, rope_parameters=dict(
                               rope_type='default', rope_theta=1e3,
                               partial_rotary_factor=0.5)),
        }),
    'transformer': System(
        dict(vocab_size=61, d_model=12, encoder_ffn_dim=16, decoder_ffn_dim=16,
             encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_layers=2, decoder_layers=2, max_position_embeddings=80,
             activation_function='relu', scale_embedding=True,
             pad_token_id=0, decoder_start_token_id=3, eos_token_id=None,
             forced_eos_token_id=None),
        {
            'plain': {},
            'odd_heads': dict(d_model=18, encoder_attention_heads=3,
                              encoder_layers=2,
                              decoder_attention_heads=3, decoder_layers=1,
                              activation_function='gelu',
                              scale_embedding=False),
            # As the OPUS-MT models have it.
            'swish': dict(d_model=8, encoder_ffn_dim=12, decoder_ffn_dim=12,
                          encoder_attention_heads=2, encoder_layers=1,
                          decoder_attention_heads=2, decoder_layers=1,
                          activation_function='swish'),
        }),
    't5': System(
        dict(vocab_size=61, d_model=12, d_kv=4, d_ff=16, num_layers=2,
             num_decoder_layers=2, num_heads=4,
             relative_attention_num_buckets=8,
             relative_attention_max_distance=20, pad_token_id=0,
             decoder_start_token_id=3, eos_token_id=None),
        {
            'plain': {},
            'v1.1': dict(feed_forward_proj='gated-gelu', num_heads=3,
                         num_layers=2, num_decoder_layers=1,
                         layer_norm_epsilon=1e-4, tie_word_embeddings=False),
        }),
    'switch': System(
        dict(vocab_size=61, d_model=12, d_kv=4, d_ff=12, num_layers=2,
             num_decoder_layers=2, num_sparse_encoder_layers=1,
             num_sparse_decoder_layers=1, num_heads=2, num_experts=3,
             relative_attention_num_buckets=8,
             relative_attention_max_distance=20, pad_token_id=0,
             decoder_start_token_id=3, eos_token_id=None),
        {
            'plain': {},
            'all_layers': dict(num_layers=1, num_decoder_layers=1,
                               num_experts=4, num_heads=3,
                               dense_act_fn='gelu_new'),
            # Two tokens of a sequence of twelve go to an expert.
            'capacity': dict(expert_capacity=2, moe_group_size=12),
        }),
    'gshard': System(
        dict(vocab_size=61, d_model=12, encoder_ffn_dim=12, decoder_ffn_dim=12,
             encoder_attention_heads=2, decoder_attention_heads=2,
             encoder_layers=2, decoder_layers=2, encoder_sparse_step=2,
             decoder_sparse_step=2, num_experts=3, max_position_embeddings=80,
             moe_token_dropout=0.0, pad_token_id=1, decoder_start_token_id=3,
             eos_token_id=None),
        {
            'plain': {},
            'all_layers': dict(encoder_sparse_step=1, decoder_sparse_step=1,
                               encoder_layers=1, decoder_layers=1,
                               encoder_attention_heads=3,
                               decoder_attention_heads=3,
                               num_experts=5, scale_embedding=False),
            # A quarter of the tokens of the batch go to an expert.
            'capacity': dict(moe_eval_capacity_token_fraction=0.25,
                             normalize_router_prob_before_dropping=True),
        }),
    'mamba2': System(
        dict(vocab_size=31, hidden_size=12, num_heads=6, head_dim=4,
             state_size=5, n_groups=1, num_hidden_layers=2, **NO_IDS),
        {
            'plain': dict(tie_word_embeddings=True),
            # Some steps are above the bound, some below.
            'groups': dict(n_groups=2, conv_kernel=3, use_conv_bias=False,
                           num_hidden_layers=1, chunk_size=8,
                           layer_norm_epsilon=1e-3,
                           time_step_limit=[0.02, 0.05]),
        }),
    'bert': System(
        dict(vocab_size=61, hidden_size=20, intermediate_size=32,
             num_attention_heads=4, num_hidden_layers=2,
             max_position_embeddings=16, pad_token_id=None),
        {
            'plain': {},
            'odd_heads': dict(num_attention_heads=5, type_vocab_size=3,
                              hidden_act='relu', num_hidden_layers=3),
        }),
    'roberta': System(
        dict(vocab_size=61, hidden_size=16, intermediate_size=24,
             num_attention_heads=4, num_hidden_layers=2, type_vocab_size=1,
             max_position_embeddings=18, bos_token_id=None, eos_token_id=None),
        {
            'plain': {},
            # Its head of masked words has GELU all the same.
            'relu': dict(hidden_act='relu', num_attention_heads=2,
                         num_hidden_layers=1, pad_token_id=0),
        }),
    'modernbert': System(
        dict(vocab_size=61, hidden_size=16, intermediate_size=12,
             num_attention_heads=2, num_hidden_layers=4, local_attention=6,
             max_position_embeddings=80, bos_token_id=None, eos_token_id=None,
             cls_token_id=None, sep_token_id=None, pad_token_id=None),
        {
            'plain': {},
            'biases': dict(attention_bias=True, mlp_bias=True, norm_bias=True,
                           tie_word_embeddings=False, decoder_bias=False,
                           num_hidden_layers=2, layer_types=[
                               'sliding_attention', 'full_attention']),
        }),
    **mixture_cases.MIXTURES,
}


# What model.rope says in its own words, in place of the config.json's.
OUR_ROPE = {('llama', 'ntk'): dict(scaling='ntk', theta=1e4, factor=4.0)}
# Where a capacity counts the tokens of a batch, one by one is another batch.
NO_GREEDY = (('switch', 'capacity'), ('gshard', 'capacity'),
             # It turns new keys otherwise than those that its cache holds.
             ('llama', 'dynamic'),
             # With a cache, its steps have no bounds.
             ('mamba2', 'groups'))


def all_cases() -> list[tuple[str, str]]:
  """Returns every (system, case)."""
  return [(system, case) for system, row in SYSTEMS.items()
          for case in row.cases]
