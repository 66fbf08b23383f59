"""config.json as the authors of a system published it is the size of that name.
(Long lists of factors are shortened to one value.)"""

import dataclasses
import importlib

import pytest

from training.costs import totals
from training.hf import config as hf_config

GEMMA2 = dict(
    architectures=['Gemma2ForCausalLM'], model_type='gemma2',
    attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=50.0,
    bos_token_id=2, cache_implementation='hybrid', eos_token_id=1,
    final_logit_softcapping=30.0, head_dim=256, hidden_act='gelu_pytorch_tanh',
    hidden_activation='gelu_pytorch_tanh', hidden_size=2304,
    initializer_range=0.02, intermediate_size=9216,
    max_position_embeddings=8192, num_attention_heads=8, num_hidden_layers=26,
    num_key_value_heads=4, pad_token_id=0, query_pre_attn_scalar=256,
    rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096,
    torch_dtype='float32', transformers_version='4.42.4', use_cache=True,
    vocab_size=256000)
GEMMA3 = dict(
    architectures=['Gemma3ForCausalLM'], model_type='gemma3_text',
    attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=None,
    bos_token_id=2, cache_implementation='hybrid', eos_token_id=1,
    final_logit_softcapping=None, head_dim=256,
    hidden_activation='gelu_pytorch_tanh', hidden_size=1152,
    initializer_range=0.02, intermediate_size=6912,
    max_position_embeddings=32768, num_attention_heads=4, num_hidden_layers=26,
    num_key_value_heads=1, pad_token_id=0, query_pre_attn_scalar=256,
    rms_norm_eps=1e-06, rope_local_base_freq=10000, rope_scaling=None,
    rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
    torch_dtype='bfloat16', transformers_version='4.50.0.dev0', use_cache=True,
    vocab_size=262144)
PHI3 = dict(
    architectures=['Phi3ForCausalLM'], model_type='phi3',
    attention_bias=False, attention_dropout=0.0,
    auto_map={'AutoConfig': 'configuration_phi3.Phi3Config'}, bos_token_id=1,
    embd_pdrop=0.0, eos_token_id=32000, hidden_act='silu', hidden_size=3072,
    initializer_range=0.02, intermediate_size=8192,
    max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32,
    num_key_value_heads=32, original_max_position_embeddings=4096,
    pad_token_id=32000, resid_pdrop=0.0, rms_norm_eps=1e-05, rope_scaling=None,
    rope_theta=10000.0, sliding_window=2047, tie_word_embeddings=False,
    torch_dtype='bfloat16', transformers_version='4.40.2', use_cache=True,
    vocab_size=32064)
LONG = dict(
    max_position_embeddings=131072, sliding_window=262144, rope_scaling=dict(
        type='su', short_factor=[1.05] * 48, long_factor=[1, *[20.5] * 47]))
PHI4_MINI = PHI3 | LONG | dict(
    bos_token_id=199999, eos_token_id=199999, full_attn_mod=1,
    interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
    num_attention_heads=24, num_key_value_heads=8, pad_token_id=199999,
    partial_rotary_factor=0.75, tie_word_embeddings=True, vocab_size=200064,
    rope_scaling=dict(type='longrope', short_factor=[1.0] * 48,
                      long_factor=[1, 1.118320672, *[32.13400] * 46]))
MAMBA2 = dict(
    model_type='mamba2', bos_token_id=0, chunk_size=256, conv_kernel=4,
    eos_token_id=0, expand=2, head_dim=64, hidden_act='silu', hidden_size=768,
    initializer_range=0.1, layer_norm_epsilon=1e-05, n_groups=1, num_heads=24,
    num_hidden_layers=24, pad_token_id=0, rescale_prenorm_residual=False,
    residual_in_fp32=True, rms_norm=True, state_size=128,
    tie_word_embeddings=True, time_step_floor=0.0001,
    time_step_limit=[0.0, float('inf')], time_step_max=0.1, time_step_min=0.001,
    time_step_rank=256, transformers_version='4.45.0.dev0', use_bias=False,
    use_cache=True, use_conv_bias=True, vocab_size=50288)
OLMOE = dict(
    architectures=['OlmoeForCausalLM'], model_type='olmoe',
    attention_bias=False, attention_dropout=0.0, clip_qkv=None,
    eos_token_id=50279, hidden_act='silu', hidden_size=2048,
    initializer_range=0.02, intermediate_size=1024,
    max_position_embeddings=4096, norm_topk_prob=False, num_attention_heads=16,
    num_experts=64, num_experts_per_tok=8, num_hidden_layers=16,
    num_key_value_heads=16, output_router_logits=False, pad_token_id=1,
    rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0,
    router_aux_loss_coef=0.01, tie_word_embeddings=False,
    torch_dtype='bfloat16', use_cache=True, vocab_size=50304)
SMOLLM3 = dict(
    architectures=['SmolLM3ForCausalLM'], model_type='smollm3',
    attention_bias=False, attention_dropout=0.0, eos_token_id=128012,
    hidden_act='silu', hidden_size=2048, initializer_range=0.02,
    intermediate_size=11008, layer_types=['full_attention'] * 36,
    max_position_embeddings=65536, max_window_layers=28, mlp_bias=False,
    no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9,
    num_attention_heads=16, num_hidden_layers=36, num_key_value_heads=4,
    pad_token_id=128004, pretraining_tp=2, rms_norm_eps=1e-06,
    rope_scaling=None, rope_theta=5000000.0, sliding_window=None,
    torch_dtype='bfloat16', use_cache=False, use_sliding_window=False,
    vocab_size=128256)
QWEN3_NEXT = dict(
    architectures=['Qwen3NextForCausalLM'], model_type='qwen3_next',
    attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
    decoder_sparse_step=1, eos_token_id=151645, full_attention_interval=4,
    head_dim=256, hidden_act='silu', hidden_size=2048, initializer_range=0.02,
    intermediate_size=5120, linear_conv_kernel_dim=4, linear_key_head_dim=128,
    linear_num_key_heads=16, linear_num_value_heads=32,
    linear_value_head_dim=128, max_position_embeddings=262144,
    mlp_only_layers=[], moe_intermediate_size=512, norm_topk_prob=True,
    num_attention_heads=16, num_experts=512, num_experts_per_tok=10,
    num_hidden_layers=48, num_key_value_heads=2, output_router_logits=False,
    partial_rotary_factor=0.25, rms_norm_eps=1e-06, rope_scaling=None,
    rope_theta=10000000, router_aux_loss_coef=0.001,
    shared_expert_intermediate_size=512, tie_word_embeddings=False,
    torch_dtype='bfloat16', use_cache=True, use_sliding_window=False,
    vocab_size=151936)
QWEN2 = dict(
    architectures=['Qwen2ForCausalLM'], model_type='qwen2',
    attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643,
    hidden_act='silu', hidden_size=896, initializer_range=0.02,
    intermediate_size=4864, max_position_embeddings=32768, max_window_layers=24,
    num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2,
    rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768,
    tie_word_embeddings=True, torch_dtype='bfloat16', use_cache=True,
    use_mrope=False, use_sliding_window=False, vocab_size=151936)
WHOLE = [4, 8, 12, 16, 20, 24, 27]
KIMI_LINEAR = dict(
    architectures=['KimiLinearForCausalLM'], model_type='kimi_linear',
    auto_map={'AutoConfig': 'configuration_kimi.KimiLinearConfig'},
    bos_token_id=163584, dtype='bfloat16', eos_token_id=163586,
    first_k_dense_replace=1, head_dim=72, hidden_act='silu', hidden_size=2304,
    initializer_range=0.02, intermediate_size=9216, kv_lora_rank=512,
    linear_attn_config=dict(
        full_attn_layers=WHOLE, head_dim=128,
        kda_layers=[n for n in range(1, 28) if n not in WHOLE], num_heads=32,
        short_conv_kernel_size=4),
    mla_use_nope=True, model_max_length=1048576, moe_intermediate_size=1024,
    moe_layer_freq=1, moe_renormalize=True,
    moe_router_activation_func='sigmoid', num_attention_heads=32,
    num_expert_group=1, num_experts=256, num_experts_per_token=8,
    num_hidden_layers=27, num_key_value_heads=32, num_nextn_predict_layers=0,
    num_shared_experts=1, pad_token_id=163839, q_lora_rank=None,
    qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-05,
    rope_scaling=None, rope_theta=10000.0, routed_scaling_factor=2.446,
    tie_word_embeddings=False, topk_group=1, transformers_version='4.56.2',
    use_cache=True, use_grouped_topk=True, v_head_dim=128, vocab_size=163840)
PUBLISHED = {
    'kimi_linear:48b-a3b': KIMI_LINEAR,
    'qwen2:0.5b': QWEN2,
    'qwen2:7b': QWEN2 | dict(
        hidden_size=3584, intermediate_size=18944, max_window_layers=28,
        max_position_embeddings=131072, num_attention_heads=28,
        num_hidden_layers=28, num_key_value_heads=4, sliding_window=131072,
        tie_word_embeddings=False, vocab_size=152064),
    'qwen3_next:80b-a3b': QWEN3_NEXT,
    'olmoe:1b-7b': OLMOE,
    'mamba2:130m': MAMBA2,
    'mamba2:codestral-7b': MAMBA2 | dict(
        hidden_size=4096, n_groups=8, norm_before_gate=True, num_heads=128,
        num_hidden_layers=64, intermediate_size=8192,
        tie_word_embeddings=False, time_step_init_scheme='random',
        time_step_scale=1.0, vocab_size=32768),
    'smollm3:3b-64k': SMOLLM3,
    'gemma2:2b': GEMMA2,
    'gemma2:9b': GEMMA2 | dict(
        hidden_size=3584, intermediate_size=14336, num_attention_heads=16,
        num_hidden_layers=42, num_key_value_heads=8),
    'gemma2:27b': GEMMA2 | dict(
        hidden_size=4608, intermediate_size=36864, num_attention_heads=32,
        num_hidden_layers=46, num_key_value_heads=16, head_dim=128,
        query_pre_attn_scalar=144),
    'gemma3:1b': GEMMA3,
    'gemma3:4b': GEMMA3 | dict(
        hidden_size=2560, intermediate_size=10240, num_attention_heads=8,
        num_hidden_layers=34, num_key_value_heads=4, sliding_window=1024,
        rope_scaling=dict(factor=8.0, rope_type='linear'), vocab_size=262208,
        max_position_embeddings=131072),
    'phi3:mini': PHI3,
    'phi3:medium': PHI3 | dict(
        hidden_size=5120, intermediate_size=17920, num_attention_heads=40,
        num_hidden_layers=40, num_key_value_heads=10),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_config_is_the_size_of_that_name(name):
  file, size = name.split(':')
  ours = totals.resolved(
      importlib.import_module(f'configs.{file}').get_config(size))
  theirs = hf_config.read(PUBLISHED[name])
  hf_config.check_same(ours, theirs, name)
  hf_config.check_same(ours, hf_config.read(hf_config.write(ours)), 'written')


def test_phi3_for_long_texts_has_the_factors_of_its_file():
  c = hf_config.read(PHI3 | LONG)
  assert (c.rope.scaling, c.rope.factor, c.rope.original_len) == (
      'longrope', 32.0, 4096)
  assert c.rope.long_factor == (1, *[20.5] * 47) and c.max_len == 131072
  written = hf_config.write(c)
  assert written['rope_parameters']['rope_type'] == 'longrope'
  assert written['original_max_position_embeddings'] == 4096
  hf_config.check_same(c, hf_config.read(written), 'written')


def test_phi4_mini_is_a_phi3_of_its_published_size():
  c = hf_config.read(PHI4_MINI)
  assert totals.parameters(c)[0] == 3_836_021_760
  assert (c.head_dim, c.rope.fraction, c.rope.factor) == (128, 0.75, 32.0)
  assert len(c.rope.long_factor) == 48 and c.tie_embeddings
  # No row is as long as the window, which so leaves nothing out.
  assert (c.max_len, c.sliding_window) == (131072, 262144)
  hf_config.check_same(c, hf_config.read(hf_config.write(c)), 'written')


@pytest.mark.parametrize('tree, words', [
    (QWEN2 | dict(use_mrope=True), 'use_mrope True: only False'),
    (PHI4_MINI | dict(full_attn_mod=2), 'full_attn_mod 2: only 1'),
    (PHI4_MINI | dict(interpolate_factor=4), 'interpolate_factor 4: only 1'),
    (PHI4_MINI | dict(lm_head_bias=True), 'lm_head_bias True: only False'),
    (PHI4_MINI | dict(mlp_bias=True), 'mlp_bias True: only False'),
    (PHI3 | dict(rope_scaling=dict(type='linear', factor=2.0)),
     "'linear': choose from default, longrope"),
    (PHI3 | dict(rope_scaling=dict(LONG['rope_scaling'], short_factor=['x'])),
     'short_factor .*must be numbers'),
    (PHI3 | dict(LONG, rope_scaling=dict(
        LONG['rope_scaling'], attention_factor=0.0)), 'not > 0'),
    ({name: value for name, value in (PHI3 | LONG).items()
      if name != 'max_position_embeddings'}, 'neither a factor'),
    (MAMBA2 | dict(rescale_prenorm_residual=True), 'only False is known'),
    (MAMBA2 | dict(expand=3), 'not expand 3 times hidden_size 768'),
    (MAMBA2 | dict(time_step_limit=[0.1]), 'must be two numbers'),
    (MAMBA2 | dict(time_step_limit=[float('inf'), 1.0]), 'must be two numbers'),
    (GEMMA2 | dict(final_logit_softcapping=0.0), '> 0, or null'),
    (GEMMA2 | dict(use_bidirectional_attention=True), 'bidirectional'),
    (GEMMA3 | dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping'),
    (GEMMA3 | dict(rope_parameters=dict(rope_theta=1e5)), 'rope_parameters'),
])
def test_what_is_not_known_is_refused(tree, words):
  with pytest.raises(ValueError, match=words):
    hf_config.read(tree)


def test_an_import_says_that_dynamic_texts_which_grow_may_differ():
  tree = dict(
      model_type='llama', hidden_size=32, num_attention_heads=4,
      max_position_embeddings=64, rope_scaling=dict(type='dynamic', factor=2.0))
  fields, notes = hf_config.fields_and_notes(tree)
  assert (fields.rope.scaling, fields.rope.original_len) == ('dynamic', 64)
  assert len(notes) == 1 and 'may write other ones' in notes[0]


@pytest.mark.parametrize('system', ['deepseek_v2', 'deepseek_v3'])
def test_the_norms_of_latents_have_an_eps_of_their_own(system):
  """Which no config.json says."""
  c = hf_config.read(dict(model_type=system, rms_norm_eps=1e-3,
                          num_key_value_heads=128, num_attention_heads=128))
  assert (c.norm_eps, c.latent.norm_eps) == (1e-3, 1e-6)
  assert hf_config.write(c)['rms_norm_eps'] == 1e-3
  other = dataclasses.replace(c, latent=dataclasses.replace(
      c.latent, norm_eps=1e-3))
  with pytest.raises(ValueError, match='model.latent.norm_eps is 0.001'):
    hf_config.write(other)


@pytest.mark.parametrize('bounds, found', [
    (None, (0, 0)), ([0.0, {'__float__': 'Infinity'}], (0, 0)),
    ([0.01, float('inf')], (0.01, 0)), ([0.01, 0.1], (0.01, 0.1))])
def test_mamba2_has_the_bounds_of_its_file(bounds, found):
  """In the words of transformers 4, of 5, and left out."""
  c = hf_config.read(MAMBA2 | dict(time_step_limit=bounds))
  assert (c.mamba2.least_step, c.mamba2.most_step) == found
  hf_config.check_same(c, hf_config.read(hf_config.write(c)), 'written')


@pytest.mark.parametrize('tree', [GEMMA2, PHI3, dict(model_type='bert')])
def test_what_is_no_encoder_decoder_may_say_so(tree):
  assert hf_config.read(tree | dict(is_encoder_decoder=False)) == (
      hf_config.read(tree))
  for value in True, 0:
    with pytest.raises(ValueError, match='is_encoder_decoder .*only False'):
      hf_config.read(tree | dict(is_encoder_decoder=value))
  with pytest.raises(ValueError, match='is_encoder_decoder False: only True'):
    hf_config.read(dict(model_type='t5', is_encoder_decoder=False))


def test_what_a_file_says_to_javascript_changes_nothing():
  tree = dict(model_type='llama')
  assert hf_config.read(tree) == hf_config.read(tree | {
      'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}}})


def test_what_a_switch_file_leaves_out_is_as_in_transformers():
  """SwitchTransformersConfig() has other sizes than T5Config()."""
  few = dict(model_type='switch_transformers', num_sparse_encoder_layers=6,
             num_sparse_decoder_layers=6)
  c = hf_config.read(few)
  assert (c.d_model, c.num_heads, c.num_layers, c.num_decoder_layers) == (
      768, 12, 12, 12)
  few |= dict(num_layers=6, num_sparse_encoder_layers=3)
  assert hf_config.read(few).num_decoder_layers == 12
  few |= dict(num_decoder_layers=None, num_sparse_decoder_layers=3)
  assert hf_config.read(few).num_decoder_layers == 6
