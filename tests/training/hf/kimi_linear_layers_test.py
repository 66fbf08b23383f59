"""The layers of Kimi Linear's config.json in the words of its authors and of
transformers, and what else of it must fit."""

import itertools

import pytest

from architectures.parts.hf import layer_types
from configs.errors import RequestError
from training.hf import config as hf_config

D, A = layer_types.LINEAR, layer_types.WHOLE
SMALL = dict(model_type='kimi_linear', vocab_size=31, hidden_size=12,
             num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=6,
             qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3,
             num_hidden_layers=4, num_experts=4, num_experts_per_token=2,
             moe_intermediate_size=8, linear_num_heads=3, linear_head_dim=5)


def layers(c):
  """Returns (mixer, whether it has experts) of each layer."""
  each = [c.of_kind(kind.name) for kind in c.layer_kinds(c.num_layers)]
  return [(x.mixer, x.ffn == 'moe') for x in each]


def test_any_layers_are_written_as_they_were_read():
  for types, networks in itertools.product(
      itertools.product((D, A), repeat=3),
      itertools.product(('dense', 'sparse'), repeat=3)):
    if 'sparse' not in networks:
      continue
    c = hf_config.read(dict(
        SMALL, num_hidden_layers=3, layer_types=list(types),
        mlp_layer_types=list(networks)))
    assert layers(c) == [('kda' if t == D else 'latent', x == 'sparse')
                         for t, x in zip(types, networks)]
    if A not in types:
      with pytest.raises(RequestError, match='all layers are recurrences'):
        hf_config.write(c)
      continue
    written = hf_config.write(c)
    assert written['mlp_layer_types'] == list(networks)
    own = written['linear_attn_config']
    assert own['full_attn_layers'] == [
        n for n, t in enumerate(types, 1) if t == A]
    hf_config.check_same(c, hf_config.read(written), 'written')


def test_the_authors_words_go_before_those_of_transformers():
  """But for layer_types, which goes before their lists."""
  own = dict(full_attn_layers=[2, 4], kda_layers=[1, 3], num_heads=2,
             head_dim=8, short_conv_kernel_size=3)
  c = hf_config.read(SMALL | dict(linear_attn_config=own,
                                  first_k_dense_replace=2))
  assert layers(c) == [('kda', False), ('latent', False), ('kda', True),
                       ('latent', True)]
  k = c.kda
  assert (k.key_heads, k.value_heads, k.key_dim, k.value_dim, k.rank, k.conv
          ) == (2, 2, 8, 8, 8, 3)
  c = hf_config.read(SMALL | dict(linear_attn_config=own,
                                  layer_types=[D, D, D, A]))
  assert [mixer for mixer, _ in layers(c)] == ['kda', 'kda', 'kda', 'latent']


def test_what_is_left_out_is_as_in_transformers():
  """A dense layer first, and attention in layers 5, 9, ... from 1 on."""
  c = hf_config.read(SMALL | dict(num_hidden_layers=6))
  assert layers(c) == [('kda', False), *[('kda', True)] * 3, ('latent', True),
                       ('kda', True)]
  assert (c.kda.key_heads, c.kda.key_dim, c.kda.conv) == (3, 5, 4)
  assert (c.latent.norm_eps, c.norm_eps) == (1e-6, 1e-5)
  assert c.moe.normalize_gates and c.position == 'none'
  none = hf_config.read(SMALL | dict(moe_renormalize=None,
                                     first_k_dense_replace=0))
  assert not none.moe.normalize_gates and all(x for _, x in layers(none))


LISTS = dict(full_attn_layers=[4], kda_layers=[1, 2, 3])


@pytest.mark.parametrize('change, words', [
    (dict(layer_types=[D, A, D]), 'for each of 4 layers'),
    (dict(layer_types=[D, A, D, 'sliding_attention']), 'layer_types'),
    (dict(mlp_layer_types=['dense'] * 4), 'no layer with experts'),
    (dict(mlp_layer_types=['moe'] * 4), 'of dense, sparse'),
    (dict(first_k_dense_replace=4), 'no layer with experts'),
    (dict(num_hidden_layers=5000), 'at most 4096 layers'),
    (dict(linear_attn_config=LISTS | dict(kda_layers=[0, 1, 2])), '1 to 4'),
    (dict(linear_attn_config=LISTS | dict(kda_layers=[1, 2])), '1 to 4'),
    (dict(linear_attn_config=LISTS | dict(kda_layers=[1, 2, 3, 4])), 'once'),
    (dict(linear_attn_config=LISTS | dict(gate_lower_bound=-5.0)),
     'linear_attn_config.gate_lower_bound -5.0'),
    (dict(num_key_value_heads=1), 'num_key_value_heads 1'),
    (dict(num_experts_per_token=1), 'gives every expert the gate 1'),
    (dict(hidden_act='gelu'), "'gelu': choose from silu"),
    (dict(mla_use_nope=False), 'mla_use_nope False'),
    (dict(mla_use_output_gate=True), 'mla_use_output_gate'),
    (dict(moe_router_activation_func='softmax'), "only 'sigmoid' is known"),
    (dict(tie_word_embeddings=True), 'tie_word_embeddings True')])
def test_what_is_not_known_is_refused(change, words):
  with pytest.raises(RequestError, match=words):
    hf_config.read(SMALL | change)
