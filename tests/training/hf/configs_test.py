"""config.json as it is published, changed or malformed: which model it is, and
that it is written as it was read.

tests/data/published_configs.json has the config.json of the sizes that authors
have published, by system and size. What all sizes of a system have in common
stands under ''. The first part was compared with copies in public repositories;
the second was written from memory. Long lists of factors are shortened to one
value, and quantization_config is left out.
"""

import copy
import importlib
import itertools
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax

import architectures
from architectures.parts import blocks, flat
from architectures.parts.hf import layer_types
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.positions import LearnedConfig, RopeConfig
from architectures.parts.recurrent.mamba2 import Mamba2Config
from common import fields as declared, kinds
from common.errors import RequestError
from tests.helpers import models
from tests.parity import exports, readings, recording
from training import runs
from training.hf import config as hf_config, files as hf_files, weights



def published():
  """Returns the published config.json by 'system:size'."""
  file = pathlib.Path(__file__).parents[2] / 'data' / 'published_configs.json'
  trees = {}
  for part in json.loads(file.read_text()).values():
    for system, sizes in part.items():
      for size, fields in sizes.items():
        trees[f'{system}:{size}'] = sizes.get('', {}) | fields
      trees.pop(f'{system}:', None)
  return trees


PUBLISHED = published()
FIRST = {name.split(':')[0]: name for name in reversed(PUBLISHED)}.values()
PHI3_LONG, PHI4_MINI, OPUS, SWITCH, ROBERTA, MODERNBERT, GEMMA4 = map(
    PUBLISHED.get, (
        'phi3:long', 'phi3:4-mini', 'transformer:opus-mt-en-de',
        'switch:base-8', 'roberta:base', 'modernbert:base', 'gemma4:31b'))
MAMBA2, GEMMA2 = PUBLISHED['mamba2:130m'], PUBLISHED['gemma2:2b']
MISTRAL = dict(model_type='mistral', attention_bias=False, mlp_bias=False)


# What a size of ours has and a config.json does not tell: the length and the
# scaling with which a model is trained first, and the heads of a pre-training.
UNTOLD = {'max_len', 'rope.scaling', 'next_sentence', 'logits_bias', 'head',
          'pooling', 'classifier_bias', 'moe.group_size',
          'moe.capacity_factor', 'moe.eval_capacity_factor'}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_config_is_the_size_of_that_name(name):
  """What computes the same has the same parameters, whose published number
  tests/training/costs/count_test.py compares with each size of ours."""
  system, size = name.split(':')
  theirs = hf_config.model_of_config_json(PUBLISHED[name])
  assert theirs.arch == system
  sizes = importlib.import_module(f'configs.{system}')
  if size in sizes.SIZES:
    ours = runs.resolve_model_without_tokenizer(sizes.get_config(size))
    differing = {name for name in hf_config.describe_differences(ours, theirs)
                 if not name.startswith('generator.')}
    assert differing <= UNTOLD
    assert theirs.position != 'learned' or 'max_len' not in differing
  if name in FIRST:
    hf_config.config_json_of_model(theirs)  # which reads it again


# The systems without a published config.json, and the reason.
WITHOUT_PUBLISHED_CONFIG = {
    'axk2': 'its file is not at hand',
    'diffllama': 'its sizes are not published',
    'gshard': "NLLB-MoE's has a moe_token_dropout that is refused",
    'hrm_text': 'its file is not at hand',
    'qwen4_exp': 'its file is not at hand',
    'zaya': 'its file is not at hand',
}


def test_each_other_system_has_a_published_config():
  systems = {name.split(':')[0] for name in PUBLISHED}
  assert {system for system in architectures.systems()
          if hasattr(architectures.page(system), 'HF')} - systems == set(
              WITHOUT_PUBLISHED_CONFIG)


@pytest.mark.parametrize('name, unread', [
    ('starcoder2:15b', 'mlp_type'), ('deepseek_v3:kimi-k2', 'seq_aux'),
    ('nemotron_h:8b', 'rms_norm_eps'), ('nemotron_h:30b-a3b', 'norm_eps'),
    ('minimax_m2:230b-a10b', 'shared_moe_mode'),
    ('llama4:17b-16e', 'for_llm_compressor'), ('falcon:2-11b', 'ff_factor'),
    ('bart:large-cnn', 'force_bos_token_to_be_generated'),
    ('opt:galactica-6.7b', 'learned_embeddings'),
    ('llama:2-7b-yarn-64k', 'rope_scaling.finetuned')])
def test_what_transformers_does_not_read_is_named_and_changes_nothing(
    name, unread):
  tree = PUBLISHED[name]
  fields, _, notes = hf_config.read_config_json(tree)
  note, = (note for note in notes if hf_config.NOTE_OF_UNREAD_FIELDS in note)
  assert unread in note.split(', which')[0].removeprefix(
      'config.json has ').split(', ')
  section, _, field = unread.rpartition('.')
  bare = copy.deepcopy(tree)
  del (bare[section] if section else bare)[field]
  assert hf_config.read_config_json(bare).fields == fields


@pytest.mark.parametrize('system', recording.systems())
def test_what_transformers_knows_and_a_page_does_not_is_refused(system):
  """And a page names as unread only what transformers knows."""
  tree = recording.load_recording(recording.files(system)[0]).config
  page = architectures.hugging_face(system)
  known = hf_config.known_fields(page.model_type)
  assert {*page.fields_without_effect} <= known
  for name in known - readings.asked(tree):
    if not hf_config.FIELDS_WITHOUT_EFFECT.fullmatch(name):
      with pytest.raises(RequestError, match=f"knows and .*, {name} 'x'"):
        hf_config.Reader({name: 'x'}).refuse_unread_fields(known)
  with pytest.raises(RequestError, match='per_layer_config'):
    hf_config.model_of_config_json(
        tree | dict(per_layer_config={'0': dict(hidden_size=2)}))
  notes = hf_config.read_config_json(tree | dict(nobody_reads='x')).notes
  assert 'nobody_reads' in notes[-1]


def test_phi3_for_long_texts_has_the_factors_of_its_file():
  c = hf_config.model_of_config_json(PHI3_LONG)
  rope = c.part(RopeConfig)
  assert (rope.scaling, rope.factor, rope.original_len) == (
      'longrope', 32.0, 4096)
  assert rope.long_factor == (1, *[20.5] * 47) and c.max_len == 131072
  for word in 'su', 'yarn', 'longrope':  # in files of three ages
    assert c == hf_config.model_of_config_json(PHI3_LONG | dict(
        rope_scaling=PHI3_LONG['rope_scaling'] | dict(type=word)))
  written = hf_config.config_json_of_model(c)
  assert written['original_max_position_embeddings'] == 4096
  hf_config.check_same_function(c, hf_config.model_of_config_json(written),
                                'written')


def test_a_null_of_deepseek_says_no():
  c = hf_config.model_of_config_json(dict(
      model_type='deepseek_v3', rope_interleave=None, norm_topk_prob=None))
  assert not c.part(RopeConfig).interleaved
  assert not c.part(MoEConfig).normalize_gates


@pytest.mark.parametrize('name, theta', [
    ('gemma3:4b', 10000.0), ('olmo3:7b-64k', 500000.0)])
def test_a_model_of_windows_alone_has_the_positions_of_windows(name, theta):
  """And not those of layers that see all, which are stretched."""
  config = hf_config.model_of_config_json(PUBLISHED[name] | dict(
      num_hidden_layers=2, layer_types=[layer_types.SLIDING_ATTENTION] * 2))
  rope = config.part(RopeConfig)
  assert (config.attention, rope.scaling, rope.theta) == (
      'banded', 'none', theta)


@pytest.mark.parametrize('published, wrong', [
    (OPUS, dict(activation_function='mish')), (OPUS, dict(num_hidden_layers=3)),
    (SWITCH, dict(feed_forward_proj='gated-gelu')),
    (SWITCH, dict(is_gated_act=True)), (SWITCH, dict(router_type='soft')),
    (SWITCH, dict(batch_prioritized_routing=True))])
def test_published_files_are_read_and_what_differs_is_refused(published,
                                                              wrong):
  config = hf_config.model_of_config_json(published)
  assert config.num_layers == published.get('num_layers', config.num_layers)
  assert config.ffn == ('silu' if published is OPUS else 'moe')
  with pytest.raises(ValueError, match=next(iter(wrong))):
    hf_config.model_of_config_json(published | wrong)


@pytest.mark.parametrize('tree, words', [
    (PHI4_MINI | dict(full_attn_mod=2), 'full_attn_mod 2: only 1'),
    (PHI3_LONG | dict(rope_scaling=dict(type='linear', factor=2.0)),
     "'linear': choose from default, longrope"),
    (PHI3_LONG | dict(rope_scaling=dict(
        PHI3_LONG['rope_scaling'], short_factor=['x'])),
     'short_factor .*numbers > 0'),
    (PHI3_LONG | dict(max_position_embeddings=None), 'neither a factor nor'),
    (PUBLISHED['qwen3_next:80b-a3b'] | dict(num_experts_per_tok=1),
     'num_experts_per_tok 1 and norm_topk_prob true'),
    (GEMMA2 | dict(layer_types=26 * ['x']), 'one for each of 26 layers'),
    (dict(model_type='lfm3', sliding_window=None), 'but no sliding_window'),
    (PUBLISHED['gemma4:e2b'] | dict(vocab_size_per_layer_input=128),
     'vocab_size_per_layer_input 128 and vocab_size 262144'),
    (PUBLISHED['gemma4:e2b'] | dict(num_kv_shared_layers=32),
     'no earlier layer of full_attention lends'),
    (GEMMA4 | dict(enable_moe_block=True), 'enable_moe_block True: only False'),
    (GEMMA4 | dict(per_layer_config={'5': {'head_dim': 8}}),
     'the same head_dim and num_key_value_heads for each'),
    (MAMBA2 | dict(expand=3), 'not expand 3 times hidden_size 768'),
    (GEMMA2 | dict(final_logit_softcapping=0.0), '> 0, or null'),
    # As a damaged bit of a GGUF file has it.
    (MISTRAL | dict(rms_norm_eps=3.4e12), 'norm_eps is 34.*<= 1'),
    (MISTRAL | dict(mlp_bias=True), 'mlp_bias True: only False is known'),
    (MISTRAL | dict(quantization_config=dict(quant_method='fp8')),
     r"quantised \('fp8'\).*=FineGrainedFP8Config.*take NEW$"),
    (MISTRAL | dict(quantization_config=dict(quant_method='awq', bits=4)),
     r"quantised \('awq'\).*Take the folder of the model that was quantised"),
    # Which no field of ours tells from a limit that is not there.
    (MAMBA2 | dict(time_step_limit=[0.0, 0.0]), 'the second is above 0'),
])
def test_what_is_not_known_is_refused(tree, words):
  assert not hf_config.model_of_config_json(MISTRAL).ffn_bias
  with pytest.raises(ValueError, match=words):
    hf_config.model_of_config_json(tree)


@pytest.mark.parametrize('bounds, steps', [
    (None, (0, 0)), ([0.0, {'__float__': 'Infinity'}], (0, 0)),
    ([0.01, float('inf')], (0.01, 0))])
def test_mamba2_has_the_bounds_of_its_file(bounds, steps):
  """In the words of transformers 4, of 5, and left out."""
  c = hf_config.model_of_config_json(MAMBA2 | dict(time_step_limit=bounds))
  mamba2 = c.part(Mamba2Config)
  assert (mamba2.least_step, mamba2.most_step) == steps
  hf_config.check_same_function(
      c, hf_config.model_of_config_json(hf_config.config_json_of_model(c)),
      'written')


@pytest.mark.long
@pytest.mark.parametrize('system', recording.systems())
def test_what_is_read_is_written_as_it_was_and_as_transformers_reads_it(system):
  """Whichever field of a config.json is another one."""
  classes = pytest.importorskip('transformers').CONFIG_MAPPING
  tree = recording.load_recording(recording.files(system)[0]).config
  seen = set()
  for words, changed in readings.changes(tree, readings.asked(tree)):
    try:
      c = hf_config.model_of_config_json(changed)
    except RequestError:
      continue
    if c in seen:
      continue
    seen.add(c)
    written = hf_config.config_json_of_model(c)  # which reads it again
    theirs = classes[written['model_type']].from_dict(copy.deepcopy(written))
    hf_config.check_same_function(c, hf_config.model_of_config_json(
        json.loads(theirs.to_json_string())), words)
  assert seen


# Fields of the recordings that others overrule, as layer_types does, or whose
# other values mean the same.
WITHOUT_EFFECT = frozenset((
    'architectures', 'attn_scale', 'attn_temperature_tuning',
    'block_ffn_dim_multiplier', 'compress_ratios', 'compress_rope_theta',
    'decoder_sparse_step', 'encoder_sparse_step', 'head_dim',
    'hybrid_override_pattern', 'index_skip_topk_offset', 'indexer_types',
    'initializer_range',
    'intermediate_size', 'max_window_layers', 'no_rope_layers',
    'normalize_router_prob_before_dropping', 'num_experts_per_tok',
    'num_hidden_layers', 'num_kv_heads', 'num_nextn_predict_layers',
    'partial_rotary_factor', 'qk_head_dim', 'rope_theta',
    'router_aux_loss_coef', 'tie_word_embeddings', 'use_sliding_window'))


def is_read(tree, name, others):
  """Returns whether some other value of a field is refused, or gives another
  model, which is written as it was read."""
  model = hf_config.model_of_config_json(tree)
  for other in others:
    try:
      changed = hf_config.model_of_config_json(tree | {name: other})
    except RequestError:
      return True
    if changed != model:
      hf_config.config_json_of_model(changed)  # which reads what it wrote
      return True
  return False


@pytest.mark.parametrize('system', recording.systems())
def test_a_field_that_a_page_asks_for_is_read_and_written_or_refused(system):
  """And each entry of those that are objects."""
  tree = recording.load_recording(recording.files(system)[0]).config
  page = architectures.hugging_face(system)
  hf_config.config_json_of_model(hf_config.model_of_config_json(tree))
  for name in readings.asked(tree) - {*page.fields_without_effect}:
    value = tree.get(name)
    ways = [readings.other_values(name, value) or readings.ANY]
    if isinstance(value, dict) and name != 'rope_parameters':
      ways = []
      for key, entry in value.items():
        ways.append([value | {key: other} for other in (
            readings.other_values(key, entry) or readings.ANY)])
    for others in ways:
      assert name in WITHOUT_EFFECT or is_read(tree, name, others), name


# Fields whose default in transformers fits no other size, or which say nothing
# of the function.
ALWAYS_GIVEN = {'architectures', 'model_type', 'num_key_value_heads',
                'split_ngram_parts'}


@pytest.mark.parametrize('system', recording.systems())
def test_what_a_file_leaves_out_is_what_transformers_takes_for_it(system):
  """As its own class of the config.json fills it in: defaults, and what each
  layer is; and a null is what it takes a null for."""
  classes = pytest.importorskip('transformers').CONFIG_MAPPING
  text = json.dumps(recording.load_recording(recording.files(system)[0]).config)
  tree = json.loads(text.replace('{"__float__": "Infinity"}', 'Infinity'))
  trees = {name: x for name, x in PUBLISHED.items()
           if name.partition(':')[0] == system}
  trees['no field'] = dict(model_type=tree['model_type'])
  # And seven layers, of which nothing says what each is.
  trees['seven layers'] = dict(num_hidden_layers=7) | {
      key: x for key, x in tree.items() if not isinstance(x, list)
      and key not in ('num_hidden_layers', 'per_layer_config')}
  for name in (readings.asked(tree) & tree.keys()) - ALWAYS_GIVEN:
    trees[f'no {name}'] = {key: x for key, x in tree.items() if key != name}
    trees[f'{name} null'] = tree | {name: None}
  for words, changed in trees.items():
    try:
      ours = hf_config.model_of_config_json(copy.deepcopy(changed))
      theirs = classes[changed['model_type']].from_dict(copy.deepcopy(changed))
    except Exception:  # of any kind: what one of us refuses is not compared
      continue
    filled_in = hf_config.model_of_config_json(
        json.loads(theirs.to_json_string()))
    hf_config.check_same_function(ours, filled_in, words)


@pytest.mark.parametrize('tree, fields', [
    (PUBLISHED['qwen2:0.5b'] | dict(use_sliding_window=True),
     dict(max_window_layers=0)),
    (PUBLISHED['qwen2:0.5b'] | dict(
        use_sliding_window=True, sliding_window=8,
        layer_types=24 * [layer_types.SLIDING_ATTENTION]),
     dict(max_window_layers=0)),
    (dict(model_type='modernbert', num_hidden_layers=3),
     dict(local_attention=0))])
def test_a_zero_that_is_a_choice_is_read_and_written(tree, fields):
  written = hf_config.config_json_of_model(
      hf_config.model_of_config_json(tree | fields))
  assert written | fields == written


@pytest.mark.parametrize('system', ['deepseek_v3', 'kimi_linear'])
def test_how_a_model_is_trained_is_no_matter_of_its_export(system):
  hf_config.config_json_of_model(architectures.resolve(models.small_config(
      system, moe=dict(bias_rate=0.0), head_dim=8)))
  for name, leaf in flat.FIELDS.items():
    if leaf.rule.resume in (declared.REGULARISATION, declared.AT_START):
      assert leaf.rule.about in (declared.RUN, declared.RECIPE), name


# What a field may hold by mistake, of every type that JSON has.
WRONG = (
    '2', '', [], [1], {}, {'a': 1}, True, -1, 0, 1, 1.5, 10**9, 10**400,
    float('nan'), float('inf'), 'x' * 5000)


@pytest.mark.parametrize('system', models.REPRESENTATIVE_SYSTEMS)
def test_every_field_is_of_its_type_or_refused(system, monkeypatch):
  """A third of what is wrong for each field, of which systems share most."""
  tree = hf_config.config_json_of_model(
      architectures.resolve(models.small_config(
      system, d_ff=128, head_dim=8, moe=dict(eval_capacity_factor=0.0))))
  readers, make = [], hf_config.Reader.__init__
  def remember(self, *args):
    make(self, *args)
    readers.append(self)
  monkeypatch.setattr(hf_config.Reader, '__init__', remember)
  hf_config.model_of_config_json(tree)
  monkeypatch.undo()
  fields = [(r._name, name) for r in readers for name in sorted(r.names_read)]
  assert len(fields) > 8
  refused = 0
  for n, (section, name) in enumerate(fields):
    for value in WRONG[n % 3::3]:
      part = dict(tree.get(section) or {}) if section else dict(tree)
      part[name] = value
      try:
        hf_config.model_of_config_json(
            dict(tree, **{section: part}) if section else part)
      except RequestError as error:
        refused += 1
        message = str(error)
        assert '\n' not in message and len(message) < 900, message
  assert refused > 2 * len(fields)


@pytest.mark.parametrize('change, message', [
    (dict(id2label=['a', 'b']), 'id2label .* must be an object'),
    (dict(id2label={'0': 'a', '2': 'b'}), 'id2label .* 0, 1'),
    (dict(id2label={'0': 'a', '1': 'a'}), 'id2label .* twice'),
    (dict(id2label={'0': 'a', '1': 5}), 'id2label .* string'),
    (dict(problem_type='multi_label_classification'), 'problem_type')])
def test_labels_that_mean_nothing_are_refused(change, message):
  tree = hf_config.config_json_of_model(architectures.resolve(
      models.small_config('bert', head='sequence', num_labels=2)))
  with pytest.raises(RequestError, match=message):
    hf_config.read_labels(tree | change)
    hf_config.model_of_config_json(tree | change)


@pytest.mark.parametrize('head, names, problem', [
    ('sequence', ('x',), 'regression'),
    ('sequence', ('no', 'yes'), 'single_label_classification'),
    ('tokens', ('O', 'B-x', 'I-x'), None)])
def test_a_head_says_its_labels_both_ways_and_its_problem(
    head, names, problem):
  """transformers trains one output of a sequence as a number by this."""
  tree = hf_config.config_json_of_model(architectures.resolve(
      models.small_config('bert', head=head, num_labels=len(names))), names)
  assert tree.get('problem_type') == problem
  assert tree['id2label'] == {str(i): name for i, name in enumerate(names)}
  assert tree['label2id'] == {name: i for i, name in enumerate(names)}
  assert hf_config.read_labels(tree) == names


def test_robertas_first_token_stands_after_the_row_of_padding(tmp_path):
  c = hf_config.model_of_config_json(ROBERTA)
  assert (c.max_len, c.part(LearnedConfig).offset) == (512, 2)
  c = hf_config.model_of_config_json(ROBERTA | dict(pad_token_id=0))
  assert (c.max_len, c.part(LearnedConfig).offset) == (513, 1)
  with pytest.raises(RequestError, match='pad_token_id -1: it must be'):
    hf_config.config_json_of_model(architectures.resolve(
        models.small_config('roberta', learned=dict(offset=0))))
  with pytest.raises(RequestError, match='max_position_embeddings 2, of which'):
    hf_config.model_of_config_json(ROBERTA | dict(max_position_embeddings=2))
  # As roberta-base, whose files have a pooler that nothing trained.
  module = architectures.build(models.small_config('roberta'))
  params = exports.random(module)
  weights.to_hf(module, params, tmp_path)
  file = tmp_path / hf_files.SAFE
  save_file(load_file(file) | {
      f'roberta.pooler.dense.{name}': np.ones(shape, np.float32)
      for name, shape in (('weight', (32, 32)), ('bias', 32))}, file)
  with pytest.warns(UserWarning, match='model has no pooler'):
    _, read = weights.from_hf(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, read)


def test_modernberts_layers_are_those_that_its_config_json_names():
  c = hf_config.model_of_config_json(MODERNBERT)
  layers = c.layers(22)
  assert [layer.block for layer in layers] == ['ffn_norm'] + 21 * ['pre_norm']
  assert [layer.sliding_window for layer in layers] == [
      65 if n % 3 else 0 for n in range(22)]
  assert [layer.part(RopeConfig).theta for layer in layers] == [
      1e4 if n % 3 else 1.6e5 for n in range(22)]
  assert (c.prefix, c.pattern) == ('first', 'local,local,global')
  local = ['full_attention', *5 * ['sliding_attention'], 'full_attention']
  other = hf_config.model_of_config_json(MODERNBERT | dict(
      num_hidden_layers=7, layer_types=local))
  assert [other.layer_config(kind.name).sliding_window > 0
          for kind in other.layer_kinds(7)] == [False, *5 * [True], False]
  with pytest.raises(RequestError, match='an entry for each of 22 layers'):
    hf_config.model_of_config_json(MODERNBERT | dict(layer_types=local))
  rows = MODERNBERT | dict(
      architectures=['ModernBertForSequenceClassification'])
  assert (c.pooling, hf_config.model_of_config_json(rows).pooling) == ('cls',
                                                                       'mean')
  with pytest.raises(RequestError, match="classifier_pooling 'max': choose"):
    hf_config.model_of_config_json(rows | dict(classifier_pooling='max'))

D = layer_types.LINEAR_ATTENTION
A = layer_types.FULL_ATTENTION
W = layer_types.SLIDING_ATTENTION

EXPERTS = dict(vocab_size=31, hidden_size=12, num_hidden_layers=3,
               num_experts=4, moe_intermediate_size=8)

KIMI = EXPERTS | dict(
    model_type='kimi_linear', num_attention_heads=2, num_key_value_heads=2,
    kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3,
    num_experts_per_token=2, linear_num_heads=3, linear_head_dim=5)

QWEN = EXPERTS | dict(
    model_type='qwen3_next', num_attention_heads=3, num_key_value_heads=1,
    head_dim=8, num_experts_per_tok=2, shared_expert_intermediate_size=8)

SMOLLM = dict(model_type='smollm3', vocab_size=31, hidden_size=12,
              intermediate_size=16, num_attention_heads=3,
              num_key_value_heads=1, num_hidden_layers=3)


def layers(tree):
  """Returns the model of a config.json, and the config of each layer."""
  c = hf_config.model_of_config_json(tree)
  return c, c.layers(c.num_layers)


def layered(*choices):
  """Yields what three layers choose, each way of one choice with some ways of
  the other."""
  return itertools.islice(itertools.product(*(
      itertools.product(choice, repeat=3) for choice in choices)), 0, None, 3)


@pytest.mark.parametrize('count, every, first, period, last', [
    (26, 6, 2, 6, 0),  # Gemma 3 1B: two layers more than four periods
    (34, 6, 4, 6, 0), (26, 2, 0, 2, 0), (4, 6, 0, 1, 0), (7, 6, 0, 7, 0)])
def test_layers_of_gemma(count, every, first, period, last):
  names = ['local' if (n + 1) % every else 'global' for n in range(count)]
  fields = layer_types.shortest_pattern(names)
  assert [len(kinds.split_kind_names(fields[field])) for field in (
      'prefix', 'pattern', 'suffix')] == [first, period, last]


@pytest.mark.parametrize('tree, mixers, experts', [
    (KIMI, {D: 'kda', A: 'latent'}, lambda moe: dict(
        mlp_layer_types=['sparse' if x else 'dense' for x in moe])),
    (QWEN, {D: 'deltanet', A: 'attention'}, lambda moe: dict(
        mlp_only_layers=[n for n, x in enumerate(moe) if not x]))])
def test_recurrences_and_experts_in_any_layers(tree, mixers, experts):
  for types, moe in layered((D, A), (False, True)):
    if not any(moe):
      continue
    changed = tree | dict(layer_types=list(types)) | experts(moe)
    if A not in types:
      with pytest.raises(RequestError, match='all layers are recurrences'):
        hf_config.model_of_config_json(changed)
      continue
    c, each = layers(changed)
    assert [(x.mixer, x.ffn == 'moe') for x in each] == [
        (mixers[t], x) for t, x in zip(types, moe)]
    written = hf_config.config_json_of_model(c)
    assert experts(moe).items() <= written.items()
    hf_config.check_same_function(c, hf_config.model_of_config_json(written),
                                  'written')
    if D in types:
      settings = blocks.MIXERS[mixers[D]].settings
      with pytest.raises(RequestError, match=r'\.conv is 0, and a'):
        hf_config.config_json_of_model(c.with_part(settings, conv=0))


def test_positions_and_windows_in_any_layers():
  for turned, types in layered((0, 1), (W, A)):
    c, each = layers(dict(
        SMOLLM, no_rope_layers=list(turned), layer_types=list(types),
        use_sliding_window=True, sliding_window=7))
    assert [(x.position, x.sliding_window) for x in each] == [
        ('rope' if x else 'none', 7 if t == W else 0)
        for x, t in zip(turned, types)]
    written = hf_config.config_json_of_model(c)
    assert written['no_rope_layers'] == list(turned)
    assert written['layer_types'] == list(types)
