"""Whether a model is the system that its name says, and how it becomes one."""

import importlib

import pytest

import architectures
from configs import gpt, llama, mixtral, qwen3
from configs.errors import RequestError
from tests.helpers import models
from tools.compare import spec
from training import limits, runs
from training.costs import systems, totals


def said(config, **fields):
  config.model.update(fields)
  return systems.line(totals.resolved(config))


@pytest.mark.every_system
@pytest.mark.parametrize('system', models.SYSTEMS)
def test_no_size_of_a_system_is_unlike_it(system):
  module = importlib.import_module(f'configs.{system}')
  for size in module.SIZES:
    assert said(module.get_config(size)) == '', size


@pytest.mark.parametrize('config, fields, words', [
    (gpt, dict(arch='llama'), 'llama with norm=layernorm in place of rmsnorm, '
     'position=learned in place of rope, ffn=gelu_tanh in place of swiglu, '
     'attention_bias=True in place of False, ffn_bias=True in place of False'),
    # A part that the page of the base names, and that of the name does not.
    (qwen3, dict(arch='llama'), 'llama with qk_norm=True in place of False'),
    # What experts read is decided by the network that is there.
    (mixtral, dict(ffn='gelu'), 'mixtral with ffn=gelu in place of moe'),
    (gpt, dict(embed_scale=0.0),
     'gpt with embed_scale=11.3137 in place of 1'),
    (gpt, dict(pattern='a,b', kinds=dict(a=dict(window=8), b={})),
     "gpt with pattern=a,b in place of ''")])
def test_what_is_unlike_is_named(config, fields, words):
  assert said(config.get_config('tiny'), **fields) == (
      f'not as published: {words}')


def test_what_a_size_has_is_as_published_and_so_are_other_sizes():
  """SmolLM2, which LLaMA's file has, ties its embeddings; windows are sizes."""
  assert said(llama.get_config('tiny'), tie_embeddings=True) == ''
  assert said(gpt.get_config('tiny'), d_model=64, num_heads=2, dropout=0.1,
              parametrization='mup', mup_base_width=32) == ''
  gemma = importlib.import_module('configs.gemma3').get_config('tiny')
  gemma.model.kinds.local.window = 8
  assert said(gemma) == ''
  gemma.model.kinds['local'].rope.theta = 5e5
  assert said(gemma) == ('not as published: gemma3 with '
                         'kinds.local.rope.theta=500000 in place of 10000')


def test_a_system_without_a_file_of_sizes_is_what_its_page_says(monkeypatch):
  monkeypatch.setattr(systems.importlib.util, 'find_spec', lambda name: None)
  systems._sizes.cache_clear()
  try:
    assert said(llama.get_config('tiny')) == ''
    assert 'norm=layernorm' in said(gpt.get_config('tiny'), arch='llama')
  finally:
    systems._sizes.cache_clear()


@pytest.mark.parametrize('base', [gpt, qwen3, mixtral],
                         ids=lambda module: module.__name__)
@pytest.mark.parametrize('arch', [
    arch for arch, page in architectures.systems().items()
    if page.STACK == 'decoder'])
def test_a_base_becomes_every_system_of_its_kind(base, arch):
  config = base.get_config('tiny')
  changes = systems.changes(config, arch)
  made = spec.changed(config, changes, 'it')
  model = runs.resolve_alone(made)
  limits.refuse_unread_of(changes, made, model)
  assert model.arch == arch and systems.unlike(model) == []
  for name in 'd_model', 'num_layers', 'num_heads', 'num_kv_heads', 'd_ff':
    assert made.model[name] == config.model[name]
  assert all(name.startswith('model.') for name in changes)
  assert systems.changes(config, arch) == changes


def test_the_size_says_whose_parts_are_taken():
  changes = systems.changes(gpt.get_config('tiny'), 'llama', 'smollm2-135m')
  assert changes == {
      'model.arch': 'llama', 'model.attention_bias': False,
      'model.ffn': 'swiglu', 'model.ffn_bias': False, 'model.norm': 'rmsnorm',
      'model.position': 'rope', 'model.rope.theta': 1e5}


@pytest.mark.parametrize('arch, size, words', [
    ('t5', 'tiny', "model.arch 't5' stacks an encoder-decoder and 'gpt', that "
     'of the base, a decoder, .* choose from bloom, '),
    ('lama', 'tiny', "unknown model.arch 'lama': choose"),
    ('llama', '8b', "unknown size of llama '8b': choose"),
    ('smollm3', 'tiny', "model.arch 'smollm3' cannot have the sizes of the "
     'base: model.num_layers')])
def test_what_cannot_become_a_system_is_refused(arch, size, words):
  config = gpt.get_config('tiny')
  config.model.num_layers = 2
  with pytest.raises(RequestError, match=words):
    systems.changes(config, arch, size)
