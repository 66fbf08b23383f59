"""A folder of a family that is not here is told which is nearest by its parts.

The config.json files are those that were published, less what any page takes
for neutral. Where one of the families has a page, it is passed over here."""

import re

import pytest

import architectures
from configs.errors import RequestError
from training.hf import config as hf_config

CAUSAL = dict(architectures=['XForCausalLM'])
COHERE = CAUSAL | dict(
    model_type='cohere', attention_bias=False, hidden_act='silu',
    hidden_size=8192, intermediate_size=22528, layer_norm_eps=1e-5,
    logit_scale=0.0625, max_position_embeddings=8192, num_attention_heads=64,
    num_hidden_layers=40, num_key_value_heads=64, rope_theta=8e6,
    use_qk_norm=False, vocab_size=256000)
FALCON = CAUSAL | dict(
    model_type='falcon', alibi=False, bias=False, hidden_size=4544,
    apply_residual_connection_post_layernorm=False, layer_norm_epsilon=1e-5,
    multi_query=True, new_decoder_architecture=False, num_attention_heads=71,
    num_hidden_layers=32, parallel_attn=True, vocab_size=65024)
STABLELM = CAUSAL | dict(
    model_type='stablelm', hidden_act='silu', hidden_size=2560,
    intermediate_size=6912, layer_norm_eps=1e-5, max_position_embeddings=4096,
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
    partial_rotary_factor=0.25, rope_theta=10000, tie_word_embeddings=False,
    use_qkv_bias=False, vocab_size=50304)
STARCODER2 = CAUSAL | dict(
    model_type='starcoder2', hidden_act='gelu_pytorch_tanh', hidden_size=3072,
    intermediate_size=12288, max_position_embeddings=16384, use_bias=True,
    mlp_type='default', norm_epsilon=1e-5, norm_type='layer_norm',
    num_attention_heads=24, num_hidden_layers=30, num_key_value_heads=2,
    rope_theta=999999.44, sliding_window=4096, vocab_size=49152)
GRANITE_MOE = CAUSAL | dict(
    model_type='granitemoe', attention_bias=False, attention_multiplier=0.0156,
    embedding_multiplier=12.0, hidden_act='silu', hidden_size=1536,
    intermediate_size=512, logits_scaling=6.0, max_position_embeddings=4096,
    num_attention_heads=24, num_experts_per_tok=8, num_hidden_layers=32,
    num_key_value_heads=8, num_local_experts=40, residual_multiplier=0.22,
    rms_norm_eps=1e-6, rope_theta=10000, router_aux_loss_coef=0.01,
    tie_word_embeddings=True, vocab_size=49155)
GPT_J = CAUSAL | dict(
    model_type='gptj', activation_function='gelu_new', n_embd=4096, n_head=16,
    layer_norm_epsilon=1e-5, n_layer=28, n_positions=2048, rotary_dim=64,
    tie_word_embeddings=False, vocab_size=50400)
ELECTRA = dict(
    architectures=['ElectraForPreTraining'], model_type='electra',
    embedding_size=768, hidden_act='gelu', hidden_size=768,
    intermediate_size=3072, layer_norm_eps=1e-12, max_position_embeddings=512,
    num_attention_heads=12, num_hidden_layers=12, type_vocab_size=2,
    vocab_size=30522)
XLM_ROBERTA = dict(
    architectures=['XLMRobertaForMaskedLM'], model_type='xlm-roberta',
    hidden_act='gelu', hidden_size=768, intermediate_size=3072,
    layer_norm_eps=1e-5, max_position_embeddings=514, num_attention_heads=12,
    num_hidden_layers=12, pad_token_id=1, type_vocab_size=1, vocab_size=250002)

UNKNOWN = {tree['model_type'] for tree in (
    COHERE, FALCON, STABLELM, STARCODER2, GRANITE_MOE, GPT_J, ELECTRA,
    XLM_ROBERTA)}


@pytest.fixture(autouse=True)
def _without_their_own_pages(monkeypatch):
  known = hf_config._families()
  monkeypatch.setattr(hf_config, '_families', lambda: {
      name: arch for name, arch in known.items() if name not in UNKNOWN})


def _near(tree):
  """Returns the class of the nearest system, and the whole sentence."""
  with pytest.raises(RequestError) as caught:
    hf_config.read(tree)
  said = str(caught.value)
  name = said.partition("nearest to '")[2].partition("'")[0]
  arch = next(arch for arch in architectures.systems()
              if hasattr(architectures.page(arch), 'HF')
              and architectures.hugging_face(arch).model_type == name)
  return architectures.systems()[arch], said


@pytest.mark.parametrize('tree, parts', [
    (COHERE, dict(position='rope')), (STABLELM, dict(position='rope')),
    (STARCODER2, dict(position='rope')), (FALCON, dict(position='alibi')),
    (GRANITE_MOE, dict(position='rope', ffn='moe', norm='rmsnorm')),
    (GPT_J, dict(position='learned', ffn='gelu_tanh'))],
    ids=lambda x: x.get('model_type'))
def test_a_decoder_is_near_one_that_shares_its_parts(tree, parts):
  near, said = _near(tree)
  assert near.STACK == 'decoder', said
  assert {name: near.PARTS[name] for name in parts} == parts, said


def test_an_encoder_is_near_an_encoder():
  near, said = _near(ELECTRA)
  assert near.STACK == 'encoder' and 'but not embedding_size' in said
  near, said = _near(XLM_ROBERTA)
  assert near.__name__ == 'RoBERTa' and 'knows 9 of its 9 fields' in said


def test_letters_do_not_count():
  """A decoder that calls itself as a system with experts does is near one
  without, and the other way round."""
  near, _ = _near(COHERE | dict(model_type='mixtral2'))
  assert near.PARTS['ffn'] != 'moe'
  near, _ = _near(GRANITE_MOE | dict(model_type='llamas'))
  assert near.PARTS['ffn'] == 'moe'


def test_fields_that_it_does_not_know_are_named():
  _, said = _near(STABLELM)
  assert 'use_qkv_bias' in said and '\n' not in said and len(said) < 900
  with pytest.raises(RequestError) as caught:
    hf_config.read(dict(model_type='not_a_family'))
  assert 'nearest' not in str(caught.value)
  assert re.search('choose from .*bert, .*bloom', str(caught.value))
