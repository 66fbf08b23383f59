"""no_rope_layers of SmolLM3's config.json, beside layer_types."""

import itertools

import pytest

from architectures.parts.hf import layer_types
from configs.errors import RequestError
from training.hf import config as hf_config

W, G = layer_types.WINDOW, layer_types.WHOLE
SMALL = dict(model_type='smollm3', vocab_size=31, hidden_size=12,
             intermediate_size=16, num_attention_heads=3,
             num_key_value_heads=1, num_hidden_layers=4)


def layers(c):
  """Returns (position, window) of each layer."""
  each = [c.of_kind(kind.name) for kind in c.layer_kinds(c.num_layers)]
  return [(x.position, x.sliding_window) for x in each]


def test_any_layers_are_written_as_they_were_read():
  for turned, types in itertools.product(
      itertools.product((0, 1), repeat=3), itertools.product((W, G), repeat=3)):
    tree = dict(SMALL, num_hidden_layers=3, no_rope_layers=list(turned),
                layer_types=list(types), use_sliding_window=True,
                sliding_window=7)
    c = hf_config.read(tree)
    assert layers(c) == [('rope' if x else 'none', 7 if t == W else 0)
                         for x, t in zip(turned, types)]
    written = hf_config.write(c)
    assert written['no_rope_layers'] == list(turned)
    assert written['layer_types'] == list(types)
    assert written['use_sliding_window'] == (W in types)


def test_what_is_left_out_is_every_fourth_layer_without_positions():
  usual = [('rope', 0)] * 3 + [('none', 0)]
  c = hf_config.read(SMALL)
  assert layers(c) == usual
  assert (c.prefix, c.pattern) == ('', 'rope,rope,rope,nope')
  assert layers(hf_config.read(SMALL | dict(no_rope_layer_interval=2))) == [
      ('rope', 0), ('none', 0)] * 2
  # A window, where there is one, is of the layers without positions.
  windows = dict(use_sliding_window=True, sliding_window=7)
  assert layers(hf_config.read(SMALL | windows)) == usual[:3] + [('none', 7)]
  assert layers(hf_config.read(SMALL | dict(sliding_window=7))) == usual


@pytest.mark.parametrize('change, words', [
    (dict(no_rope_layers=[1, 1, 1]), 'for each of 4 layers'),
    (dict(no_rope_layers=[1, 1, 1, 2]), 'no_rope_layers'),
    (dict(no_rope_layers=[1, 1, 1, True]), 'no_rope_layers'),
    (dict(layer_types=[W] * 4, sliding_window=7), 'no sliding_window')])
def test_what_no_layer_can_be_is_refused(change, words):
  with pytest.raises(RequestError, match=words):
    hf_config.read(SMALL | change)
