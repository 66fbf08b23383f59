"""layer_types of Qwen3-Next's config.json, beside layers without experts, and
what else of it must fit."""

import itertools

import pytest

from architectures.parts.hf import layer_types
from configs.errors import RequestError
from training.hf import config as hf_config

D, A = layer_types.LINEAR, layer_types.WHOLE
SMALL = dict(model_type='qwen3_next', vocab_size=31, hidden_size=12,
             num_attention_heads=3, num_key_value_heads=1, head_dim=8,
             num_hidden_layers=4, num_experts=4, num_experts_per_tok=2,
             moe_intermediate_size=8, shared_expert_intermediate_size=8)


def layers(c):
  """Returns (mixer, whether it has experts) of each layer."""
  each = [c.of_kind(kind.name) for kind in c.layer_kinds(c.num_layers)]
  return [(x.mixer, x.ffn == 'moe') for x in each]


def test_any_layers_are_written_as_they_were_read():
  for types, moe in itertools.product(
      itertools.product((D, A), repeat=3),
      itertools.product((False, True), repeat=3)):
    if not any(moe):
      continue
    c = hf_config.read(dict(
        SMALL, num_hidden_layers=3, layer_types=list(types),
        mlp_only_layers=[n for n, x in enumerate(moe) if not x]))
    assert layers(c) == [('deltanet' if t == D else 'attention', x)
                         for t, x in zip(types, moe)]
    if A not in types:
      with pytest.raises(RequestError, match='all layers are recurrences'):
        hf_config.write(c)
      continue
    written = hf_config.write(c)
    assert written['layer_types'] == list(types)
    assert written['mlp_only_layers'] == [n for n in range(3) if not moe[n]]


def test_what_is_left_out_is_attention_in_every_fourth_layer():
  usual = [('deltanet', True)] * 3 + [('attention', True)]
  c = hf_config.read(SMALL)
  assert layers(c) == usual
  assert (c.prefix, c.pattern) == ('', 'linear,linear,linear,full')
  assert layers(hf_config.read(SMALL | dict(full_attention_interval=2))) == [
      ('deltanet', True), ('attention', True)] * 2
  sparse = hf_config.read(SMALL | dict(decoder_sparse_step=2))
  assert [moe for _, moe in layers(sparse)] == [False, True] * 2


def test_the_shared_expert_is_some_times_as_wide_as_one():
  tree = SMALL | dict(shared_expert_intermediate_size=24)
  c = hf_config.read(tree)
  assert c.moe.shared_gate and c.moe.shared_experts == 3
  assert hf_config.write(c)['shared_expert_intermediate_size'] == 24


@pytest.mark.parametrize('change, words', [
    (dict(layer_types=[D, A, D]), 'for each of 4 layers'),
    (dict(layer_types=[D, A, D, 'sliding_attention']), 'layer_types'),
    (dict(num_hidden_layers=5000), 'at most 4096 layers'),
    (dict(shared_expert_intermediate_size=12), 'no multiple of'),
    (dict(num_experts_per_tok=1), 'gives every expert the gate 1'),
    (dict(hidden_act='gelu'), "'gelu': choose from silu"),
    (dict(use_sliding_window=True), 'use_sliding_window')])
def test_what_is_not_known_is_refused(change, words):
  with pytest.raises(RequestError, match=words):
    hf_config.read(SMALL | change)
