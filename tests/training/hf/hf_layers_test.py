"""How a config.json says which layers there are: whatever their order, it is
written as it was read."""

import itertools

import pytest

from architectures.parts.hf import layer_types
from configs import kinds
from configs.errors import RequestError
from training.hf import config as hf_config

D, A, W = layer_types.LINEAR, layer_types.WHOLE, layer_types.WINDOW
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
  c = hf_config.read(tree)
  return c, [c.of_kind(kind.name) for kind in c.layer_kinds(c.num_layers)]


@pytest.mark.parametrize('count, every, first, period, last', [
    (26, 6, 2, 6, 0),  # Gemma 3 1B: two layers more than four periods
    (34, 6, 4, 6, 0), (26, 2, 0, 2, 0), (4, 6, 0, 1, 0), (7, 6, 0, 7, 0)])
def test_layers_of_gemma(count, every, first, period, last):
  names = ['local' if (n + 1) % every else 'global' for n in range(count)]
  found = layer_types.shortest(names)
  assert [len(kinds.split(found[field])) for field in (
      'prefix', 'pattern', 'suffix')] == [first, period, last]


@pytest.mark.parametrize('tree, mixers, experts', [
    (KIMI, {D: 'kda', A: 'latent'}, lambda moe: dict(
        mlp_layer_types=['sparse' if x else 'dense' for x in moe])),
    (QWEN, {D: 'deltanet', A: 'attention'}, lambda moe: dict(
        mlp_only_layers=[n for n, x in enumerate(moe) if not x]))])
def test_recurrences_and_experts_in_any_layers(tree, mixers, experts):
  for types, moe in itertools.product(
      itertools.product((D, A), repeat=3),
      itertools.product((False, True), repeat=3)):
    if not any(moe):
      continue
    c, each = layers(tree | dict(layer_types=list(types)) | experts(moe))
    assert [(x.mixer, x.ffn == 'moe') for x in each] == [
        (mixers[t], x) for t, x in zip(types, moe)]
    if A not in types:
      with pytest.raises(RequestError, match='all layers are recurrences'):
        hf_config.write(c)
      continue
    written = hf_config.write(c)
    assert experts(moe).items() <= written.items()
    hf_config.check_same(c, hf_config.read(written), 'written')


def test_positions_and_windows_in_any_layers():
  for turned, types in itertools.product(
      itertools.product((0, 1), repeat=3), itertools.product((W, A), repeat=3)):
    c, each = layers(dict(
        SMOLLM, no_rope_layers=list(turned), layer_types=list(types),
        use_sliding_window=True, sliding_window=7))
    assert [(x.position, x.sliding_window) for x in each] == [
        ('rope' if x else 'none', 7 if t == W else 0)
        for x, t in zip(turned, types)]
    written = hf_config.write(c)
    assert written['no_rope_layers'] == list(turned)
    assert written['layer_types'] == list(types)


def test_what_is_left_out_is_as_in_transformers():
  c, each = layers(KIMI | dict(num_hidden_layers=6))
  assert [(x.mixer, x.ffn == 'moe') for x in each] == [
      ('kda', False), *[('kda', True)] * 3, ('latent', True), ('kda', True)]
  assert (c.latent.norm_eps, c.norm_eps) == (1e-6, 1e-5)
  c, each = layers(QWEN | dict(num_hidden_layers=4))
  assert [x.mixer for x in each] == ['deltanet'] * 3 + ['attention']
  assert (c.prefix, c.pattern) == ('', 'linear,linear,linear,full')
  c, each = layers(SMOLLM | dict(num_hidden_layers=4))
  assert [x.position for x in each] == ['rope'] * 3 + ['none']
