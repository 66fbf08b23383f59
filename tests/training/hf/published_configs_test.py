"""config.json as the authors of a system published it is the size of that name.

tests/data/published_configs.json has these files, with long lists of factors
shortened to one value.
"""

import importlib
import json
import pathlib

import pytest

from training.costs import totals
from training.hf import config as hf_config

PUBLISHED = json.loads((pathlib.Path(__file__).parents[2] / 'data' /
                        'published_configs.json').read_text())
PHI3_LONG, PHI4_MINI = PUBLISHED.pop('phi3:long'), PUBLISHED.pop('phi4:mini')
MAMBA2, GEMMA2 = PUBLISHED['mamba2:130m'], PUBLISHED['gemma2:2b']


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_config_is_the_size_of_that_name(name):
  file, size = name.split(':')
  ours = totals.resolved(
      importlib.import_module(f'configs.{file}').get_config(size))
  theirs = hf_config.read(PUBLISHED[name])
  hf_config.check_same(ours, theirs, name)
  hf_config.check_same(ours, hf_config.read(hf_config.write(ours)), 'written')


def test_phi3_for_long_texts_has_the_factors_of_its_file():
  c = hf_config.read(PHI3_LONG)
  assert (c.rope.scaling, c.rope.factor, c.rope.original_len) == (
      'longrope', 32.0, 4096)
  assert c.rope.long_factor == (1, *[20.5] * 47) and c.max_len == 131072
  written = hf_config.write(c)
  assert written['original_max_position_embeddings'] == 4096
  hf_config.check_same(c, hf_config.read(written), 'written')


def test_phi4_mini_is_a_phi3_of_its_published_size():
  c = hf_config.read(PHI4_MINI)
  assert totals.parameters(c)[0] == 3_836_021_760
  assert (c.head_dim, c.rope.fraction, c.rope.factor) == (128, 0.75, 32.0)
  hf_config.check_same(c, hf_config.read(hf_config.write(c)), 'written')


@pytest.mark.parametrize('tree, words', [
    (PHI4_MINI | dict(full_attn_mod=2), 'full_attn_mod 2: only 1'),
    (PHI3_LONG | dict(rope_scaling=dict(type='linear', factor=2.0)),
     "'linear': choose from default, longrope"),
    (PHI3_LONG | dict(rope_scaling=dict(
        PHI3_LONG['rope_scaling'], short_factor=['x'])),
     'short_factor .*must be numbers'),
    (PHI3_LONG | dict(rope_scaling=dict(
        PHI3_LONG['rope_scaling'], attention_factor=0.0)), 'not > 0'),
    (PHI3_LONG | dict(max_position_embeddings=None), 'neither a factor'),
    (MAMBA2 | dict(expand=3), 'not expand 3 times hidden_size 768'),
    (MAMBA2 | dict(time_step_limit=[0.1]), 'must be two numbers'),
    (GEMMA2 | dict(final_logit_softcapping=0.0), '> 0, or null'),
])
def test_what_is_not_known_is_refused(tree, words):
  with pytest.raises(ValueError, match=words):
    hf_config.read(tree)


@pytest.mark.parametrize('bounds, found', [
    (None, (0, 0)), ([0.0, {'__float__': 'Infinity'}], (0, 0)),
    ([0.01, float('inf')], (0.01, 0))])
def test_mamba2_has_the_bounds_of_its_file(bounds, found):
  """In the words of transformers 4, of 5, and left out."""
  c = hf_config.read(MAMBA2 | dict(time_step_limit=bounds))
  assert (c.mamba2.least_step, c.mamba2.most_step) == found
  hf_config.check_same(c, hf_config.read(hf_config.write(c)), 'written')
