"""What a page says of its system: its parts name what its config sets, and its
record of Hugging Face's format names what there is."""

import importlib
import re

import pytest

import architectures
from architectures.parts import flat
from configs import base
from tests.helpers import models
from training.workdir import run_config

# What every page says, and what it says where that is not the usual.
ALWAYS = {'position', 'norm', 'block', 'attention', 'ffn', 'tie_embeddings'}
OF_EXPERTS = {'moe.router', 'moe.top_k', 'moe.ffn'}
SCALES = {'attention_scale', 'embed_scale', 'logits_scale', 'rope.fraction',
          'residual_scale'}


def config(system):
  return importlib.import_module(f'configs.{system}').get_config('tiny').model


@pytest.mark.parametrize('system', models.SYSTEMS)
def test_a_page_names_the_parts_that_its_config_has(system):
  model = run_config.flatten(config(system))
  usual = run_config.flatten(base.base().model)
  parts = run_config.flatten(architectures.systems()[model['arch']].PARTS)
  changed = {
      name for name, value in model.items() if value != usual.get(name)
      and name in flat.FIELDS and flat.FIELDS[name].rule.about not in (
          'run', 'recipe') and name != 'arch'
      and (isinstance(value, (str, bool)) or name in SCALES)}
  wanted = ALWAYS | changed | (OF_EXPERTS if model['ffn'] == 'moe' else set())
  assert not wanted - parts.keys()


@pytest.mark.parametrize('system', models.SYSTEMS)
def test_a_system_is_its_page_and_its_config(system):
  arch = config(system).arch
  assert architectures.file_name(arch) == system
  lines = architectures.page(arch).__doc__.count('\n') + 1
  assert lines > 5, (
      f'the docstring of architectures/{system}.py has {lines} lines: write 6 '
      'or more, on what the system is and its equations')


@pytest.mark.parametrize('system', models.PUBLISHED_SYSTEMS)
def test_a_record_names_nothing_that_is_not_there(system):
  module = architectures.build(models.small_config(system))
  c, page = module.config, architectures.hugging_face(config(system).arch)
  names = {name.format(n=0, m=0, e=0, h='L') for *_, name, _ in page.rows(c)}
  known = [name for names, *_ in page.fields.values()
           for name in names.split('|')]
  asked = [*known, *page.only, *page.fields_without_effect]
  assert len(asked) == len(set(asked))
  fields = run_config.flatten(base.base().model)
  assert not page.fields.keys() - fields.keys()
  assert set(page.tied.values()) <= names
  assert all(any(part in name for name in names) for part, _ in page.spellings)
  assert not [name for name in names for pattern in page.ignored
              if re.fullmatch(pattern, name)]
  assert set(page.fixed_token_ids) <= page.write(c).keys()
