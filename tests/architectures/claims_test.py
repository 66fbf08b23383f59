"""What docs/architectures.md claims of attention, positions, norms and blocks,
each shown. claims_moe_test.py has the mixtures, architectures_doc_test.py the
tables."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import norms
from architectures.parts import positions
from architectures.parts import rotary
from architectures.parts.attention.xla import attend
from architectures.parts.blocks import BLOCKS
from architectures.parts.context import Context
from architectures.parts.ffn import FFN
from tests.helpers import models

POSITIONS = ('learned', 'sinusoidal', 'rope', 'alibi', 'relative', 'none')
normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def _made(system, changes):
  return models.make(system, **dict(changes))


def small(system='gpt', position=None):
  """(module, params), made once; `position` other than the system's own."""
  return _made(system, (('position', position),) if position else ())


def resolved(*args, **changes):
  return architectures.resolve(models.config(*args, **changes))


def size_of(params):
  return sum(x.size for x in jax.tree.leaves(params))


def changed_by_each(logits_BLV, base_LV):
  """[L, L]: whether row b, whose token b was changed, differs at l."""
  gap_BL = jnp.abs(logits_BLV - base_LV[None]).max(-1)
  return np.array(gap_BL > 1e-4 * jnp.abs(base_LV).max())


def each_changed(tokens_L):
  """[L + 1, L]: the tokens, then the same with token b changed."""
  other_LL = jnp.tile(tokens_L, (tokens_L.size, 1)) + jnp.eye(
      tokens_L.size, dtype=int)
  return jnp.concatenate([tokens_L[None], other_LL % models.VOCAB])


# GPT against BERT.

@pytest.mark.slow
@pytest.mark.parametrize('system', [
    pytest.param(system, marks=[pytest.mark.long] * (
        system in ('bloom', 'gpt4', 'gpt_neox', 'mixtral')))
    for system in models.DECODERS])
def test_a_decoder_sees_only_the_past(system):
  module, params = small(system)
  logits = models.logits(module, params, each_changed(models.tokens(1, 6)[0]))
  changed = changed_by_each(logits[1:], logits[0])
  np.testing.assert_array_equal(changed, np.triu(np.ones((6, 6), bool)))


@pytest.mark.slow
def test_bert_sees_all():
  module, params = small('bert')
  logits = models.logits(module, params, each_changed(models.tokens(1, 6)[0]))
  assert changed_by_each(logits[1:], logits[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize('system', [
    pytest.param('transformer', marks=pytest.mark.long), 't5'])
def test_an_encoder_decoder_sees_all_of_the_source_and_the_past(system):
  module, params = small(system)
  tokens_BL = each_changed(models.tokens(1, 6)[0])
  same_BL = jnp.tile(tokens_BL[:1], (7, 1))
  logits = models.logits(  # first the source is changed, then the target
      module, params, jnp.concatenate([tokens_BL, same_BL]),
      decoder_tokens_BL=jnp.concatenate([same_BL, tokens_BL]))
  assert changed_by_each(logits[1:7], logits[0]).all()
  changed = changed_by_each(logits[8:], logits[7])
  np.testing.assert_array_equal(changed, np.triu(np.ones((6, 6), bool)))


@pytest.mark.slow
def test_bert_is_as_wide_at_one_end_as_gpt_at_the_other():
  """Both end in logits over the vocabulary; BERT has its pooled text too."""
  tokens = models.tokens(1, 6)
  module, params = small('bert')
  output = module.apply({'params': params}, tokens)
  assert output.logits.shape == (1, 6, models.VOCAB)
  assert output.extra['pooled'].shape == (1, 32)
  assert models.logits(*small(), tokens).shape == (1, 6, models.VOCAB)


# Positions.

@pytest.mark.slow
def test_without_positions_order_reaches_only_causal_attention():
  tokens, order = models.tokens(1, 8), jnp.array([3, 0, 7, 5, 1, 2, 6, 4])
  for system, equivariant in (('bert', True), ('gpt', False)):
    module, params = small(system, position='none')
    plain = models.logits(module, params, tokens)
    permuted = models.logits(module, params, tokens[:, order])
    assert np.allclose(plain[:, order], permuted, atol=1e-4) == equivariant
    assert not np.allclose(plain, permuted, atol=1e-4)  # not invariant


@pytest.mark.slow
@pytest.mark.parametrize('position, moved', [
    ('learned', True), ('sinusoidal', True), ('rope', False),
    ('alibi', False), ('relative', False), ('none', False)])
def test_which_encodings_know_distance_only(position, moved):
  module, params = small(position=position)
  tokens, at = models.tokens(1, 8), jnp.arange(8)[None]
  here = models.logits(module, params, tokens, positions_BL=at)
  there = models.logits(module, params, tokens, positions_BL=at + 11)
  assert np.allclose(here, there, atol=1e-3) != moved


@pytest.mark.parametrize('layout', ['interleaved', 'halves'])
def test_a_sinusoids_shift_is_one_rotation_per_frequency(layout):
  D, shift, at_L = 16, 5, jnp.arange(40)
  pe_LD = positions.sinusoid(at_L, D, layout)
  angle = shift * 10000.0 ** (-np.arange(D // 2) * 2 / D)
  matrix_DD = np.zeros((D, D))
  for i, a in enumerate(angle):
    s, c = (2 * i, 2 * i + 1) if layout == 'interleaved' else (i, i + D // 2)
    matrix_DD[np.ix_((s, c), (s, c))] = [[np.cos(a), np.sin(a)],
                                         [-np.sin(a), np.cos(a)]]
  np.testing.assert_allclose(pe_LD[shift:], pe_LD[:-shift] @ matrix_DD.T,
                             atol=1e-5)
  gram_LL = pe_LD @ pe_LD.T  # hence products tell distances
  np.testing.assert_allclose(gram_LL[shift:, shift:],
                             gram_LL[:-shift, :-shift], atol=1e-4)


def test_sinusoids_go_on_and_learned_positions_end():
  far = positions.sinusoid(jnp.array([10 ** 5]), 16)
  assert np.isfinite(far).all() and np.abs(far).max() <= 1
  module, params = small()
  assert params['embed']['positions'].shape == (32, 32)
  with pytest.raises(ValueError, match='33 tokens is longer than the 32'):
    models.logits(module, params, models.tokens(1, 33))


def rope_scores(rotate, q_K, k_K, at):
  """[L, M] of one query vector and one key vector put at every position."""
  put = lambda x_K: rotate(jnp.tile(x_K, (1, at.shape[1], 1, 1)), at)[0, :, 0]
  return put(q_K) @ put(k_K).T


def test_ropes_scores_depend_on_distance_only():
  c, at = resolved(position='rope'), jnp.arange(12)[None]
  rotate = lambda x, at: rotary.rotate(x, at, c)
  q_K, k_K = normal(0, 8), normal(1, 8)
  s_LM = rope_scores(rotate, q_K, k_K, at)
  np.testing.assert_allclose(s_LM[1:, 1:], s_LM[:-1, :-1], atol=1e-5)
  assert np.ptp(s_LM[0]) > 0.1  # and do depend on it
  turned = rotate(jnp.tile(q_K, (1, 12, 1, 1)), at)
  np.testing.assert_allclose(  # a rotation: lengths stay
      jnp.linalg.norm(turned, axis=-1), jnp.full((1, 12, 1),
                                                 jnp.linalg.norm(q_K)), 1e-5)


def test_pairs_of_neighbours_are_a_permutation_of_those_of_halves():
  c, at = resolved(position='rope', rope=dict(fraction=0.75)), jnp.arange(12)
  near = dataclasses.replace(c, rope=dataclasses.replace(
      c.rope, interleaved=True))
  x = normal(0, 1, 12, 2, 8)
  order = jnp.array([0, 2, 4, 1, 3, 5, 6, 7])
  np.testing.assert_array_equal(
      rotary.rotate(x, at[None], near)[..., order],
      rotary.rotate(x[..., order], at[None], c))


def test_rope_needs_its_cos_and_its_rotate_to_pair_alike():
  """x cos + rotate(x) sin with one table of cos has two readings that work,
  each with its own rotate; mixed, scores depend on where the pair stands."""
  at, w = jnp.arange(12)[None], 10000.0 ** (-jnp.arange(4) / 4)
  halves = lambda x: jnp.concatenate([-x[..., 4:], x[..., :4]], -1)
  neighbours = lambda x: jnp.stack([-x[..., 1::2], x[..., 0::2]], -1).reshape(
      x.shape)
  twice = lambda a: jnp.concatenate([a, a], -1)
  each_twice = lambda a: jnp.repeat(a, 2, -1)
  def rope(turn, widen):
    def rotate(x, at):
      angle = widen(at[..., None] * w[None, None])[:, :, None]
      return x * jnp.cos(angle) + turn(x) * jnp.sin(angle)
    return rotate
  def strays(turn, widen):
    s_LM = rope_scores(rope(turn, widen), normal(0, 8), normal(1, 8), at)
    return float(jnp.abs(s_LM[1:, 1:] - s_LM[:-1, :-1]).max())
  assert strays(halves, twice) < 1e-5
  assert strays(neighbours, each_twice) < 1e-5
  assert strays(halves, each_twice) > 0.1
  assert strays(neighbours, twice) > 0.1
  with pytest.raises(TypeError):  # [12] * [4]: no table at all
    jnp.arange(12) * w


def test_rope_turns_queries_and_keys_and_no_value():
  caches = {}
  for position in ('rope', 'none'):  # the same parameters
    module, params = small(position=position)
    empty = architectures.init_cache(module.config, 1, 8)
    cache, = module.apply({'params': params}, models.tokens(1, 8),
                          cache=empty).cache
    caches[position] = jax.tree.map(lambda x: x[0], cache)  # the first layer
  rope, none = caches['rope'], caches['none']
  np.testing.assert_array_equal(rope.value_BMJK, none.value_BMJK)
  turned = rotary.rotate(none.key_BMJK, jnp.arange(8)[None],
                            resolved(position='rope'))
  np.testing.assert_allclose(rope.key_BMJK, turned, atol=1e-5)
  assert not np.allclose(rope.key_BMJK[:, 1:], none.key_BMJK[:, 1:])


def test_alibis_bias_falls_linearly_and_its_weights_exponentially():
  at = jnp.arange(6)[None]
  bias_HLM = positions.alibi(at, at, 8)[0]
  for head in range(8):
    slope = 2.0 ** -(head + 1)
    np.testing.assert_allclose(bias_HLM[head, 5], -slope * np.arange(5, -1, -1))
  # Equal scores: the weight of a key is a constant times the next one's.
  v_BMJK = jnp.eye(6)[None, :, None].repeat(8, 2)
  o_BLHK = attend(jnp.zeros((1, 1, 8, 6)), jnp.zeros((1, 6, 8, 6)), v_BMJK,
                  scale=1.0, bias_BHLM=bias_HLM[None, :, 5:])
  ratio_HM = o_BLHK[0, 0, :, :-1] / o_BLHK[0, 0, :, 1:]
  np.testing.assert_allclose(
      ratio_HM, np.exp(-2.0 ** -np.arange(1, 9))[:, None].repeat(5, 1), 1e-4)


def test_alibi_rope_and_sinusoids_have_no_parameters():
  size = {p: size_of(small(position=p)[1]) for p in POSITIONS}
  assert size['alibi'] == size['rope'] == size['sinusoidal'] == size['none']
  assert size['learned'] - size['none'] == 32 * 32  # max_len * d_model
  assert size['relative'] - size['none'] == 32 * 4  # buckets * heads


def test_t5s_buckets_are_exact_near_by_and_widen_up_to_max_distance():
  def bucket(*distance):
    return positions.relative_bucket(
        -jnp.array(distance), bidirectional=False, buckets=32,
        max_distance=128).tolist()
  assert bucket(*range(16)) == list(range(16))
  assert bucket(16, 17) == [16, 16] and bucket(127, 10 ** 6) == [31, 31]
  assert bucket(-3) == [0]  # a later key, which a decoder masks
  both = positions.relative_bucket(jnp.array([-3, 3]), bidirectional=True,
                                   buckets=32, max_distance=128)
  assert both.tolist() == [3, 16 + 3]


# The other components.

def test_scores_of_unit_vectors_have_unit_variance_by_their_scale():
  for K in (16, 256):
    q, k = normal(0, 400, K), normal(1, 400, K)
    assert abs(float((q @ k.T * K ** -0.5).std()) - 1) < 0.05


def test_heads_cost_no_parameters():
  def size(heads):
    module = architectures.build(models.config(num_heads=heads))
    shapes = jax.eval_shape(module.init, jax.random.key(0), models.tokens())
    return size_of(shapes)
  assert size(1) == size(4) == size(16)


def test_layernorm_and_rmsnorm_agree_on_centred_input():
  x, one, zero = 3 * normal(0, 5, 16), jnp.ones(16), jnp.zeros(16)
  layer = lambda x: norms.layernorm(x, one, zero, 1e-6)
  rms = lambda x: norms.rmsnorm(x, one, 1e-6)
  centred = x - x.mean(-1, keepdims=True)
  np.testing.assert_allclose(layer(centred), rms(centred), atol=1e-5)
  np.testing.assert_allclose(layer(x + 2), layer(x), atol=1e-4)
  assert not np.allclose(rms(x + 2), rms(x), atol=0.1)
  np.testing.assert_allclose(rms(5 * x), rms(x), atol=1e-5)
  # The deviation is the population's (1/D), not the sample's.
  np.testing.assert_allclose(layer(x).std(-1, ddof=0), 1, atol=1e-5)
  sizes = [size_of(small(system)[1]['decoder']['final_norm'])
           for system in ('gpt', 'llama')]
  assert sizes == [64, 32]  # RMSNorm has no bias


def test_swiglus_gate():
  c = resolved('llama')
  layer, x = FFN(c, 'swiglu'), normal(0, 1, 3, 32)
  ctx = Context(jnp.arange(3)[None])
  params = nn.meta.unbox(layer.init(jax.random.key(1), x, ctx))['params']
  run = lambda p: layer.apply({'params': p}, x, ctx)[0]
  gate, up = x @ params['gate'], x @ params['up']
  np.testing.assert_allclose(
      run(params), (gate * jax.nn.sigmoid(gate) * up) @ params['down'],
      atol=1e-6)
  shut = params | {'gate': jnp.zeros_like(params['gate'])}
  np.testing.assert_array_equal(run(shut), jnp.zeros_like(x))
  # No gate in [0, 1]: silu goes below 0, and above 1.
  assert -0.28 < jax.nn.silu(jnp.linspace(-5, 5, 99)).min() < -0.27
  assert jax.nn.silu(5.0) > 1


@pytest.mark.slow
@pytest.mark.parametrize('block', [
    pytest.param(block, marks=[pytest.mark.long] * (
        block not in ('pre_norm', 'post_norm'))) for block in BLOCKS])
def test_what_a_block_does_whose_parts_return_nothing(block):
  """Pre-norm leaves x alone; post-norm stands in its way."""
  module = architectures.build(models.config(block=block))
  tokens = models.tokens(1, 6)
  params = nn.meta.unbox(
      jax.jit(module.init)(jax.random.key(0), tokens)['params'])
  params = jax.tree_util.tree_map_with_path(
      lambda path, x: x * 0 if {'out', 'down'} & {k.key for k in path} else x,
      params)
  x_BLD = (params['embed']['tokens'][tokens]
           + params['embed']['positions'][None, :6])
  layers_NBLD = module.apply({'params': params}, tokens,
                             keep_layers=True).aux['layers']
  np.testing.assert_allclose(layers_NBLD[0], x_BLD, atol=1e-6)
  for got_BLD in layers_NBLD[1:]:
    if block == 'post_norm':
      for _ in range(2):  # after attention, and after the feed-forward
        x_BLD = norms.layernorm(x_BLD, jnp.ones(32), jnp.zeros(32), 1e-5)
    np.testing.assert_allclose(got_BLD, x_BLD, atol=1e-6)
