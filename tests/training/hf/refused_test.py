"""What is refused of a config.json, and of a model that is written as one: a
case for each sentence, which has the field and its value."""

import copy
import functools

import pytest

import architectures
from common.errors import RequestError
from tests.helpers import models
from tests.parity import recording
from training.hf import config as hf_config, files as hf_files, upcycling


@functools.cache
def recorded_config(system):
  """Returns the config.json of the first recording of a system."""
  return recording.load_recording(recording.files(system)[0]).config


def change(tree, changes):
  """Returns a config.json with other fields: those of an object are named
  'object.field', and one whose value is ... is left out."""
  tree = copy.deepcopy(tree)
  for name, value in changes.items():
    section, _, field = name.rpartition('.')
    part = tree
    if section:
      part = tree.setdefault(section, {})
    if value is ...:
      part.pop(field, None)
    else:
      part[field] = value
  return tree


READ = [
    ('deberta_v2', {'pos_att_type': ['c2p']}, "pos_att_type ['c2p']: only b"),
    ('deberta_v2', {'position_buckets': 3}, 'position_buckets 3: only'),
    ('deberta_v2', {'position_buckets': -1}, 'position_buckets -1: only'),
    ('deepseek_v2', {'first_k_dense_replace': 99},
     'first_k_dense_replace 99 of num_hidden_layers'),
    ('deepseek_v32', {'q_lora_rank': None}, 'q_lora_rank null'),
    ('falcon', {'new_decoder_architecture': True, 'parallel_attn': False},
     'new_decoder_architecture True, parallel_attn False'),
    ('falcon', {'new_decoder_architecture': False,
                'num_ln_in_parallel_attn': 2}, 'num_ln_in_parallel_attn 2'),
    ('falcon', {'new_decoder_architecture': True,
                'num_ln_in_parallel_attn': 3}, 'num_ln_in_parallel_attn 3'),
    ('gemma4', {'num_kv_shared_layers': 99},
     'num_kv_shared_layers 99, which must'),
    ('glm_moe_dsa', {'index_topk_freq': 2}, 'layers share a choice'),
    ('glm_moe_dsa', {'indexer_types': ['full', 'shared']}, 'share a choice'),
    ('glm_moe_dsa', {'indexer_types': ..., 'index_topk_pattern': 'FS'},
     'share a choice'),
    ('gpt_oss', {'rope_parameters': ..., 'rope_scaling': ...},
     'has no rope_parameters: transformers takes YaRN'),
    ('granitemoehybrid', {'mamba_d_head': 3}, 'of mamba_d_head 3, which'),
    ('granitemoehybrid', {'logits_scaling': 0.0}, 'logits_scaling 0.0: it'),
    ('gshard', {'moe_token_dropout': 0.1}, 'moe_token_dropout 0.1, which'),
    ('gshard', {'moe_eval_capacity_token_fraction': 1.5},
     'moe_eval_capacity_token_fraction 1.5: choose'),
    ('gshard', {'moe_eval_capacity_token_fraction': 0.0},
     'moe_eval_capacity_token_fraction 0.0: choose'),
    ('gshard', {'moe_eval_capacity_token_fraction': 0.5,
                'normalize_router_prob_before_dropping': False},
     'normalize_router_prob_before_dropping False and'),
    ('gshard', {'decoder_sparse_step': 7}, 'decoder_sparse_step 7: only'),
    ('hrm_text', {'num_layers_per_stack': 7}, 'num_layers_per_stack 7 in'),
    ('hrm_text', {'L_bp_cycles': []}, 'an L_bp_cycles that is no list'),
    ('kimi_linear', {'mlp_layer_types': ..., 'first_k_dense_replace': 99},
     'has no layer with experts'),
    ('lfm2', {'block_auto_adjust_ff_dim': True,
              'block_ffn_dim_multiplier': 0.0},
     'block_ffn_dim_multiplier 0.0, by which'),
    ('lfm3', {'sliding_window': None}, 'but no sliding_window'),
    ('llama4', {'attention_chunk_size': None}, 'no attention_chunk_size'),
    ('mamba2', {'time_step_limit': [0.1]}, 'time_step_limit [0.1]: it must'),
    ('mamba2', {'time_step_limit': [0.1, 1.0, 2.0]}, 'time_step_limit [0.1, 1'),
    ('mamba2', {'time_step_limit': ['Infinity', 1.0]}, "limit ['Infinity', 1"),
    ('mamba2', {'time_step_limit': [0.0, 0.0]}, 'time_step_limit [0.0, 0.0]'),
    ('mamba2', {'time_step_limit': [True, 1.0]}, 'time_step_limit [True, 1.0]'),
    ('mamba2', {'time_step_limit': [0.0, 'x']}, "time_step_limit [0.0, 'x']"),
    ('nemotron_h', {'layers_block_type': ..., 'hybrid_override_pattern': 'MX*'},
     "hybrid_override_pattern 'MX*': its letters"),
    ('nemotron_h', {'layers_block_type': ..., 'hybrid_override_pattern': ''},
     'has no layers: layers_block_type'),
    ('gemma3', {'sliding_window': 0}, 'sliding_window 0: it must be 1 or more'),
    ('qwen3_moe', {'decoder_sparse_step': 7}, 'decoder_sparse_step 7, which'),
    ('qwen4_exp', {'ple_layer_ids': [1, 2]}, 'ple_layer_ids [1, 2]: n-grams'),
    ('qwen4_exp', {'ple_layer_ids': [99]}, 'ple_layer_ids [99]: n-grams'),
    ('qwen4_exp', {'ple_layer_ids': []}, 'ple_layer_ids []: n-grams'),
    ('switch', {'num_layers': 2},
     "another share of the decoder's layers"),
    ('t5', {'scale_decoder_outputs': None}, 'scale_decoder_outputs null'),
    ('zaya', {'sliding_window': None}, 'but no sliding_window'),
    ('zaya', {'num_experts_per_tok': 2}, 'num_experts_per_tok 2'),
    ('llama', {'rope_parameters.partial_rotary_factor': 0.5},
     'partial_rotary_factor 0.5, which transformers does not read'),
    ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor 0.5'),
]


@pytest.mark.parametrize('system, changes, words', READ)
def test_a_config_json_that_is_no_model_is_refused(system, changes, words):
  tree = recorded_config(system)
  hf_config.model_of_config_json(tree)  # it alone is one
  with pytest.raises(RequestError) as refusal:
    hf_config.model_of_config_json(change(tree, changes))
  assert words and words in str(refusal.value), str(refusal.value)


SHARING = dict(kv_sharing=True)
# A memory with which Gemma 4 may share keys.
PER_LAYER = dict(memory='per_layer', per_layer=dict(size=4), vocab_size=128)
LONGROPE = dict(scaling='longrope', original_len=16, short_factor=(1.0,) * 8,
                long_factor=(1.0,) * 8)
WRITTEN = [
    ('albert', dict(embed_dim=0), 'model.embed_dim is 0: transformers has'),
    ('deepseek_v2', dict(ffn='swiglu', pattern='a', kinds=dict(a={})),
     'no layer of this model has experts'),
    ('gemma4', dict(pattern='a,b', kinds=dict(a={}, b=dict(
        d_ff=50, **SHARING))) | PER_LAYER, 'model.d_ff is [50] in layers'),
    ('gemma4', dict(pattern='a,b', kinds=dict(a={}, b=SHARING)),
     'without model.memory'),
    ('gemma4', dict(num_layers=4, pattern='a,b', kinds=dict(
        a={}, b=SHARING)) | PER_LAYER, 'keys of their own after one with'),
    ('gemma4', dict(ffn='swiglu') | PER_LAYER, "is 'swiglu', whose activation"),
    ('gemma4', PER_LAYER | dict(vocab_size=127), 'model.vocab_size is 127: wi'),
    ('granitemoehybrid', dict(head_dim=7), 'model.head_dim is 7: transformers'),
    ('hrm_text', dict(num_kv_heads=2), 'model.num_kv_heads is 2: transformers'),
    ('hrm_text', dict(d_model=34, head_dim=8, num_kv_heads=4),
     'model.d_model is 34, which'),
    ('kimi_linear', dict(ffn='swiglu', pattern='a', kinds=dict(a={})),
     'a kimi_linear config.json is of a model with some'),
    ('llama4', dict(pattern='a', kinds=dict(a={}), position='none'),
     'no layer of this model has positions'),
    ('olmo_hybrid', dict(pattern='a', kinds=dict(a={}), mixer='attention'),
     'all layers attend: transformers runs'),
    ('phi3', dict(head_dim=16, rope=LONGROPE),
     '4 of 16 features, which are not model.d_model 32'),
    ('llama', dict(rope=dict(scaling='ntk', factor=2.0, original_len=16)),
     "model.rope.scaling is 'ntk', which config.json has not"),
    ('switch', dict(num_layers=4, num_decoder_layers=4,
                    pattern='dense,moe,moe,dense', kinds=dict(
                        dense=dict(ffn='dense'), moe={})), 'cannot name'),
    ('switch', dict(ffn='relu', pattern='a', kinds=dict(a={})), 'cannot name'),
]


@pytest.mark.parametrize('system, changes, words', WRITTEN)
def test_a_model_that_transformers_does_not_have_is_not_written(
    system, changes, words):
  model = models.small_config(system, **changes)
  with pytest.raises(RequestError) as refusal:
    hf_config.config_json_of_model(architectures.resolve(model))
  assert words in str(refusal.value), str(refusal.value)


# The files of a folder, and what is asked of its weights.

INDEX = 'model.safetensors.index.json'


@pytest.mark.parametrize('files, asked, words', [
    ({'model.txt': ''}, 'model.txt', 'is neither .safetensors nor .bin'),
    ({}, '', 'has no weights: looked for model.safetensors, pytorch_model.bin'),
    ({INDEX: '{}'}, '', "is damaged: it has no 'weight_map'"),
    ({INDEX: '{"weight_map": {"a": "../b"}}'}, '',
     "names the file '../b': it must lie in that folder"),
    ({INDEX: '{"weight_map": {"a": 3}}'}, '', 'names the file 3: it must lie'),
    ({INDEX: '{"weight_map": {"a": "b.safetensors"}}'}, '',
     'b.safetensors is missing, though the index names it'),
    ({'model.safetensors': 'x'}, '', 'is no whole safetensors file')])
def test_files_that_hold_no_weights_are_refused(files, asked, words, tmp_path):
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  with pytest.raises(RequestError) as refusal:
    list(hf_files.Files(tmp_path / asked))
  assert words in str(refusal.value), str(refusal.value)


@pytest.mark.parametrize('system, fields, moe, words', [
    ('mixtral', {}, {}, 'model.ffn is moe: this model has experts already'),
    ('gpt', dict(ffn='none'), {}, "model.ffn is 'none' of some layers"),
    ('gpt', {}, dict(every=0), 'every is 0: it must be > 0')])
def test_a_model_that_cannot_get_experts_is_refused(
    system, fields, moe, words):
  model = models.small_config(system, **fields)
  with pytest.raises(RequestError) as refusal:
    upcycling.upcycle_config(model, moe)
  assert words in str(refusal.value), str(refusal.value)


def test_as_many_labels_are_written_as_the_model_has():
  model = architectures.resolve(
      models.small_config('bert', head='sequence', num_labels=2))
  with pytest.raises(RequestError, match='3 labels are of another model than o'
                     'ne of model.num_labels 2'):
    hf_config.config_json_of_model(model, ('a', 'b', 'c'))
