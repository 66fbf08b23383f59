"""Folders as they are published: configs, tokenizers, and real weights."""


import pytest

from tests.helpers import models
from tools import convert
from training.hf import config as hf_config, files as hf_files, weights
from training.workdir import run_config


@pytest.mark.slow
def test_a_workdir_is_exported_as_it_was_imported(tmp_path):
  module, params = models.make('llama', vocab_size=384)
  weights.to_hf(module, params, tmp_path / 'in')
  convert.import_(tmp_path / 'in', tmp_path / 'run', partial=False, seed=0)
  convert.export(tmp_path / 'run', tmp_path / 'out', step=None, dtype='',
                 shard_bytes=10**9)
  for name in ('config.json', hf_files.SAFE):
    assert (tmp_path / 'in' / name).read_bytes() == (
        tmp_path / 'out' / name).read_bytes()


@pytest.mark.slow
def test_a_tokenizer_that_is_not_read_goes_along(tmp_path, capsys):
  """Marian's numbers its pieces by vocab.json, without merges."""
  module, params = models.make('llama', vocab_size=384)
  weights.to_hf(module, params, tmp_path / 'in')
  kept = ('source.spm', 'target.spm', 'vocab.json')
  for name in kept:
    (tmp_path / 'in' / name).write_text(name)
  convert.import_(tmp_path / 'in', tmp_path / 'run', partial=False, seed=0)
  assert ('no tokenizer that is read here, though vocab.json, source.spm'
          in capsys.readouterr().err)
  assert run_config.load_config(tmp_path / 'run').data.tokenizer == 'bytes'
  convert.export(tmp_path / 'run', tmp_path / 'out', step=None, dtype='',
                 shard_bytes=10**9)
  for name in kept:
    assert (tmp_path / 'out' / name).read_text() == name


OPUS = dict(
    _name_or_path='/tmp/Helsinki-NLP/opus-mt-en-de', model_type='marian',
    activation_dropout=0.0, activation_function='swish', add_bias_logits=False,
    add_final_layer_norm=False, attention_dropout=0.0, bad_words_ids=[[58100]],
    d_model=512, decoder_attention_heads=8, decoder_ffn_dim=2048,
    decoder_layerdrop=0.0, decoder_layers=6, decoder_start_token_id=58100,
    decoder_vocab_size=58101, encoder_attention_heads=8, encoder_ffn_dim=2048,
    encoder_layerdrop=0.0, encoder_layers=6, extra_pos_embeddings=58101,
    is_encoder_decoder=True, max_position_embeddings=512,
    normalize_before=False, normalize_embedding=False, num_hidden_layers=6,
    scale_embedding=True, share_encoder_decoder_embeddings=True,
    static_position_embeddings=True, vocab_size=58101)
SWITCH = dict(
    model_type='switch_transformers', add_router_probs=False,
    batch_prioritized_routing=False, d_ff=3072, d_kv=64, d_model=768,
    decoder_sparse_step=2, dense_act_fn='relu', dropout_rate=0.1,
    encoder_sparse_step=2, expert_capacity=64, feed_forward_proj='relu',
    initializer_factor=1.0, is_encoder_decoder=True, is_gated_act=False,
    layer_norm_epsilon=1e-6, num_decoder_layers=12, num_experts=8,
    num_heads=12, num_layers=12, num_sparse_decoder_layers=6,
    num_sparse_encoder_layers=6, router_bias=False, router_dtype='float32',
    router_ignore_padding_tokens=False, router_jitter_noise=0.01,
    router_type='tokens_masked', vocab_size=32128)
NLLB = dict(
    model_type='nllb-moe', d_model=2048, encoder_layers=24, decoder_layers=24,
    num_hidden_layers=24, encoder_ffn_dim=8192, decoder_ffn_dim=8192,
    moe_token_dropout=0.0, normalize_router_prob_before_dropping=True)


@pytest.mark.parametrize('published, wrong', [
    (OPUS, dict(activation_function='mish')), (OPUS, dict(num_hidden_layers=3)),
    (SWITCH, dict(feed_forward_proj='gated-gelu')),
    (SWITCH, dict(is_gated_act=True)), (SWITCH, dict(router_type='soft')),
    (SWITCH, dict(batch_prioritized_routing=True)),
    (NLLB, dict(num_hidden_layers=12)), (NLLB, dict(moe_token_dropout=0.2))])
def test_published_files_are_read_and_what_differs_is_refused(published,
                                                              wrong):
  config = hf_config.read(published)
  assert config.num_layers == published.get('num_layers', config.num_layers)
  assert config.ffn == ('silu' if published is OPUS else 'moe')
  with pytest.raises(ValueError, match=next(iter(wrong))):
    hf_config.read(published | wrong)
