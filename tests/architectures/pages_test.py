"""What a page says of its system: its parts are those that its config sets, and
its record of Hugging Face's format names what there is."""

import importlib
import re

import flax.linen as nn
import pytest

import architectures
from architectures.parts import mixers
from architectures.parts.hf import tensor_map
from configs import base
from tests.helpers import models
from training import paths
from training.step import abstract_params
from training.hf import config as hf_config
from training.workdir import run_config

# What every page says, and what it says where that is not the usual.
ALWAYS = {'position', 'norm', 'block', 'attention', 'ffn', 'tie_embeddings'}
OF_EXPERTS = {'moe.router', 'moe.top_k', 'moe.ffn'}
SCALES = {'attention_scale', 'embed_scale', 'logits_scale', 'rope.fraction'}
# The axes by which a sharding rule knows a parameter, and their letters.
LETTERS = {'vocab': 'V', 'embed': 'D', 'heads': 'HU', 'kv_heads': 'JHU',
           'joined': 'U', 'head': 'KU', 'latent': 'U', 'mlp': 'F',
           'experts': 'E', 'rows': 'V', 'groups': 'J',
           None: 'UDHELWJK'}
# Models of a system that together have every parameter of its names.
VARIANTS = (dict(), dict(tie_embeddings=False), dict(logits_bias=True),
            dict(attention_bias=True, ffn_bias=True), models.DENSE_MOE,
            dict(ffn='geglu_tanh'), dict(norm='layernorm'))


def config(system):
  return importlib.import_module(f'configs.{system}').get_config('tiny').model


@pytest.mark.every_system
@pytest.mark.parametrize('system', models.SYSTEMS)
def test_a_page_names_the_parts_that_its_config_has(system):
  model = run_config.flatten(config(system))
  usual = run_config.flatten(base.base().model)
  parts = run_config.flatten_dict(architectures.systems()[model['arch']].PARTS)
  assert parts == {name: model[name] for name in parts}
  changed = {
      name for name, value in model.items() if value != usual.get(name)
      and not hf_config.RUN_ONLY.fullmatch(name) and name != 'arch'
      and (isinstance(value, (str, bool)) or name in SCALES)}
  wanted = ALWAYS | changed | (OF_EXPERTS if model['ffn'] == 'moe' else set())
  assert not wanted - parts.keys()


@pytest.mark.every_system
@pytest.mark.parametrize('system', models.SYSTEMS)
def test_a_system_is_its_page_and_its_config(system):
  arch = config(system).arch
  assert architectures.file_name(arch) == system
  lines = architectures.page(arch).__doc__.count('\n') + 1
  assert lines > 5, (
      f'the docstring of architectures/{system}.py has {lines} lines: write 6 '
      'or more, on what the system is and its equations')


def _parameters(system):
  """Yields the config of each of VARIANTS, and the logical axes and the shapes
  of its parameters by path; of those in layers, the axes of one layer."""
  encoder = system in architectures.files('encoder')
  for changes in (*VARIANTS, *[dict(head='sequence', num_labels=2)] * encoder):
    module = architectures.build(models.config(system, **changes))
    boxes = abstract_params(module)
    axes = paths.flatten(nn.get_partition_spec(boxes))
    shapes = paths.flatten(nn.meta.unbox(boxes))
    yield module.config, {
        path: (*spec, *[None] * (len(shapes[path].shape) - len(spec)))[
            '/layers/' in path or '/prefix/' in path:]
        for path, spec in axes.items()}, {
            path: x.shape for path, x in shapes.items()}


@pytest.mark.parametrize('system', [
    pytest.param(system, marks=[pytest.mark.long] * (
        system in ('switch', 'gshard', 'transformer')))
    for system in models.PUBLISHED])
def test_names_are_of_parameters_and_axes_of_the_legend(system):
  record = architectures.hugging_face(config(system).arch)
  rows, used = set(), set()
  for c, axes, shapes in _parameters(system):
    table = record.rows(c)
    sizes = dict(V=c.vocab_size, D=c.d_model, H=c.num_heads, J=c.num_kv_heads,
                 K=c.head_dim, F=c.d_ff, E=c.moe.num_experts,
                 L=c.max_len + c.position_offset)
    if c.mixer == 'latent':  # whose heads have several sizes
      del sizes['K']
    if mixers.with_state(c):  # whose heads are of another number and size
      for letter in 'HJK':
        sizes.pop(letter, None)
    if c.moe.d_ff != c.d_ff or c.moe.shared_experts > 1:  # several widths
      del sizes['F']
    rows |= set(table)
    for row, found, *_ in tensor_map.places(table, shapes):
      used.add(row)
      _, ours, name, theirs = row
      expert = {'E'} if '{e}' in name else set()
      each = tensor_map.axes_of(ours, len(found))
      grouped = {'R', 'J'} if 'R' in theirs else set()  # J and R are our H
      assert {a for a in theirs if a.isalpha()} - grouped == set(
          ''.join(each)) - expert - ({'H', 'J'} if grouped else set()), row
      for path, own in zip(found, each):
        assert len(own) == len(axes[path]), row
        for letter, axis, size in zip(own, axes[path],
                                      shapes[path][-len(own):]):
          assert letter in LETTERS[axis], (row, axis)
          there = c.moe.d_ff if letter == 'F' and 'E' in ours else (
              sizes.get(letter, size))
          assert size == there, (row, letter)
  assert not rows - used


@pytest.mark.every_system
@pytest.mark.parametrize('system', models.PUBLISHED)
def test_a_record_names_nothing_that_is_not_there(system):
  module = architectures.build(models.config(system))
  c, page = module.config, architectures.hugging_face(config(system).arch)
  names = {name.format(n=0, e=0) for *_, name, _ in page.rows(c)}
  known = [name for names, *_ in page.fields.values()
           for name in names.split('|')]
  asked = [*known, *page.only, *page.unread]
  assert len(asked) == len(set(asked))
  fields = run_config.flatten(base.base().model)
  assert not page.fields.keys() - fields.keys()
  assert set(page.tied.values()) <= names
  assert all(any(part in name for name in names) for part, _ in page.spellings)
  assert not [name for name in names for pattern in page.ignored
              if re.fullmatch(pattern, name)]
  assert set(page.fixed) <= page.write(c).keys()
