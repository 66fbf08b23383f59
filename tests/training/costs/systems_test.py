"""Whether a model is the system that its name says, and how it becomes one."""

import importlib

import pytest

import architectures
from common.errors import RequestError
from configs import gpt, mixtral, qwen3
from tests.helpers import models
from tools.compare import spec
from training import preflight, runs
from training.costs import systems


def line_of(config, **fields):
  config.model.update(fields)
  model = runs.resolve_model_without_tokenizer(config)
  return systems.describe_differences(model)


@pytest.mark.parametrize('system', models.SYSTEMS)
def test_no_size_of_a_system_is_unlike_it(system):
  module = importlib.import_module(f'configs.{system}')
  for size in module.SIZES:
    assert line_of(module.get_config(size)) == '', size


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
  assert line_of(config.get_config('tiny'), **fields) == (
      f'not as published: {words}')


@pytest.mark.parametrize('base', [gpt, qwen3, mixtral],
                         ids=lambda module: module.__name__)
@pytest.mark.parametrize('arch', [
    arch for arch, page in architectures.systems().items()
    if page.STACK == 'decoder'])
def test_a_base_becomes_every_system_of_its_kind(base, arch):
  config = base.get_config('tiny')
  changes = systems.changes_to_system(config, arch)
  made = spec.apply_changes(config, changes, 'it')
  model = runs.resolve_model_without_tokenizer(made)
  preflight.refuse_unread_fields(changes, made, model)
  assert model.arch == arch and systems.differences_from_system(model) == []
  for name in 'd_model', 'num_layers', 'num_heads', 'num_kv_heads', 'd_ff':
    assert made.model[name] == config.model[name]
  assert all(name.startswith('model.') for name in changes)
  assert systems.changes_to_system(config, arch) == changes


@pytest.mark.parametrize('arch, size, words', [
    ('t5', 'tiny', "model.arch 't5' stacks an encoder-decoder and 'gpt', that "
     'of the base, a decoder, .* choose from axk2, bloom, '),
    ('lama', 'tiny', "unknown model.arch 'lama': choose"),
    ('llama', '8b', "unknown size of llama '8b': choose"),
    ('smollm3', 'tiny', "model.arch 'smollm3' cannot have the sizes of the "
     'base: model.num_layers')])
def test_what_cannot_become_a_system_is_refused(arch, size, words):
  config = gpt.get_config('tiny')
  config.model.num_layers = 2
  with pytest.raises(RequestError, match=words):
    systems.changes_to_system(config, arch, size)
