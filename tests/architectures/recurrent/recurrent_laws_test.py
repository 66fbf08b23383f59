"""What every recurrence of architectures/parts/blocks.py promises, whatever its
equation: its state stands for all tokens before, has one size, begins anew with
each document, and ends where a text does.

A layer is looked at alone where that shows it; whole models are in
tests/architectures/laws_test.py, too. What a recurrence computes is compared
with its definition in the file of each.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.recurrent import mamba, recurrence
from configs import sharding as tables
from tests.helpers import models, recurrences
from tests.helpers.recurrences import apply_layer, make_empty_cache
from tests.helpers.recurrences import parametrize_mixers
from training import generate, preflight
from architectures.parts import paths
from training.costs import flops, totals
from training.distributed import devices
from training.runs import abstract_params, parameter_roles

GREEDY = generate.Sampling(temperature=0)
KDA = 'kda'  # it has all that one can have: rates, decays, convolutions, ranks
SHORT = 'short_conv'  # whose state is inputs of a convolution alone
PRODUCT = 'delta_product'  # a token takes several steps
S6 = 'mamba'  # a scan of another form
SHIFTED = 'rwkv7'  # a token is mixed with the one before it
COMBA = 'comba'  # reads its state before that decays
CURVED = 'preconditioned'  # a second recurrence of squares of keys
MESA = 'mesa'  # its state is read by conjugate gradients
TURNED = 'mamba3'  # keys turn by angles that add up, and wait for a token
# A test that takes no time.
USUAL = parametrize_mixers(*recurrences.MIXERS_WITHOUT_OWN_CALL)


@pytest.fixture
def short_pieces(monkeypatch):
  """A row is computed in pieces of 4 places at most."""
  monkeypatch.setattr(recurrence, 'run_recurrence', functools.partial(
      recurrence.run_recurrence, places=4))
  monkeypatch.setattr(mamba, 'PLACES', 4)
  monkeypatch.setattr(recurrence, 'default_places', lambda K: 4)


def stepwise(layer, params, x_BLD, first=0):
  """Returns y_BLD through the cache: `first` tokens at once, then one by
  one."""
  @jax.jit
  def run(params, x_BLD):
    cache, y_BLD = make_empty_cache(layer, len(x_BLD)), x_BLD[:, :0]
    if first:
      y_BLD, cache = apply_layer(layer, params, x_BLD[:, :first], cache)
    def step(cache, i):
      token = jax.lax.dynamic_slice_in_dim(x_BLD, i, 1, 1)
      y, cache = apply_layer(layer, params, token, cache, first=i)
      return cache, y[:, 0]
    _, rest = jax.lax.scan(step, cache, jnp.arange(first, x_BLD.shape[1]))
    return jnp.concatenate([y_BLD, jnp.swapaxes(rest, 0, 1)], 1)
  return run(params, x_BLD)


@parametrize_mixers(KDA, SHORT, PRODUCT, SHIFTED, TURNED, S6, COMBA,
                   CURVED, MESA, long=('gdn2',))
@pytest.mark.parametrize('first', [
    2, pytest.param(6, marks=pytest.mark.long)])
def test_decoding_token_by_token_is_the_forward_pass(mixer, first,
                                                     short_pieces):
  """The first prompt is shorter than the convolutions are wide."""
  layer, p = recurrences.make_layer(mixer)
  x_BLD = recurrences.random_inputs(2, 11)
  want = jax.jit(lambda p, x: apply_layer(layer, p, x)[0])(p, x_BLD)
  models.assert_trees_close(want, stepwise(layer, p, x_BLD, first), 2e-5)


@parametrize_mixers(KDA, SHORT, PRODUCT, SHIFTED, TURNED, S6, MESA,
                   long=(COMBA, CURVED))
def test_packed_documents_are_those_apart(mixer, short_pieces):
  """Neither the state nor the convolutions see the document before."""
  layer, p = recurrences.make_layer(mixer)
  x_BLD = recurrences.random_inputs(3, 5)
  apply = jax.jit(lambda x, **how: apply_layer(layer, p, x, **how)[0])
  x_BLD, at = np.asarray(x_BLD), np.arange(15)[None]
  packed = apply(x_BLD.reshape(1, 15, -1), positions_BL=at % 5,
                 segment_ids_BL=1 + at // 5)
  models.assert_trees_close(apply(x_BLD), packed.reshape(x_BLD.shape), 2e-5)


# With the delta rule and without it.
@parametrize_mixers(KDA, 'gla', SHORT, SHIFTED, TURNED, S6, CURVED, MESA,
                    long=(PRODUCT, 'gdn2'))
def test_padding_is_no_part_of_a_state(mixer, short_pieces):
  layer, p = recurrences.make_layer(mixer)
  x_BLD = recurrences.random_inputs(2, 7)
  apply = jax.jit(lambda x, **how: apply_layer(
      layer, p, x, make_empty_cache(layer, len(x)), **how))
  x_BLD = np.asarray(x_BLD)
  y, cache = jax.device_get(apply(x_BLD, valid_BL=jnp.array(
      [[1] * 3 + [0] * 4, [1] * 7])))
  models.assert_trees_close(apply(x_BLD[:1, :3]),
               (y[:1, :3], jax.tree.map(lambda x: x[:1], cache)), 2e-5)


# The bound is on the largest difference in a layer's output, over the largest
# value.
@parametrize_mixers(KDA, SHORT, SHIFTED, TURNED, S6)
def test_bfloat16_is_float32_within_a_bound(mixer):
  """The state and all products with it stay in float32."""
  x_BLD = recurrences.random_inputs(2, 40)
  forward = lambda layer, p, x: jax.jit(lambda p,
                                        x: apply_layer(layer, p, x)[0])(
      p, x)
  want = forward(*recurrences.make_layer(mixer), x_BLD)
  for way in (forward, stepwise):
    y_BLD = way(*recurrences.make_layer(mixer, 'bfloat16'),
                x_BLD.astype(jnp.bfloat16))
    assert y_BLD.dtype == jnp.bfloat16
    models.assert_trees_close(want, y_BLD.astype(jnp.float32), 4e-2)


@pytest.mark.slow
@parametrize_mixers(KDA, SHORT)
def test_prompts_of_several_lengths_go_on_as_each_would_alone(mixer):
  """Of the one that is padded. The model's other layer has attention."""
  module, params = models.make_model('llama',
                                     **recurrences.changes_with_mixer_and_attention(mixer))
  prompts, length = models.random_tokens(2, 7), 3
  new = generate.generate(
      module, params, prompts, jnp.array([length, 7]), jax.random.key(0),
      max_new_tokens=4, sampling=GREEDY)
  text = jnp.concatenate([prompts[0, :length], new[0]])[None]
  best = jax.jit(models.logits, static_argnums=0)(module, params, text)
  np.testing.assert_array_equal(best[0].argmax(-1)[length - 1:-1], new[0])


@pytest.mark.slow
@parametrize_mixers('gla')
def test_beams_are_those_of_a_model_that_reads_each_text_anew(mixer):
  """A beam takes the state of the beam that it continues, and the padding of
  its prompt is no part of the state."""
  module, params = models.make_model('llama',
                                     **recurrences.changes_with_mixer_and_attention(mixer))
  params = jax.tree.map(lambda x: jnp.asarray(2 * np.asarray(x)), params)
  prompts, lengths = np.asarray(models.random_tokens(2, 5)), (3, 5)
  texts, scores = jax.device_get(generate.beam_search(
      module, params, jnp.asarray(prompts), jnp.array(lengths),
      max_new_tokens=4, beams=generate.Beams(num_beams=3, length_penalty=0.0)))
  logits = jax.jit(lambda rows: jax.nn.log_softmax(
      models.logits(module, params, rows)))
  for row, length in enumerate(lengths):
    rows = np.concatenate([np.tile(prompts[row, :length], (3, 1)),
                           texts[row]], 1)
    log_p = np.asarray(logits(np.pad(rows, ((0, 0), (0, 5 - length)))))[
        :, length - 1:length + 3]
    np.testing.assert_allclose(np.take_along_axis(
        log_p, texts[row][..., None], -1).sum((1, 2)), scores[row], atol=1e-4)


# The projections whose outputs do not grow with the width: a number for each
# head, a vector of low rank, and B and C of Mamba-2.
FIXED = {'mamba2': {'step', 'query', 'key'}, SHORT: set(), TURNED: {
    'step', 'query', 'key', 'decay', 'share', 'angle'}}
OTHERS = {'rate', 'decay', 'decay_down', 'gate_down'}


@parametrize_mixers(KDA, 'mamba2', SHORT, TURNED)
def test_mup_divides_what_does_not_grow_with_the_width(mixer):
  """At the base, which is the standard form, it divides nothing."""
  layer, p = recurrences.make_layer(mixer)
  x_BLD = recurrences.random_inputs(1, 5)
  plain = jax.jit(lambda p: apply_layer(layer, p, x_BLD)[0])
  for wider in (1, 4):
    c = architectures.resolve(models.small_config(
        'llama', num_layers=1, parametrization='mup', mup_base_head_dim=8,
        mup_base_width=recurrences.WIDTH // wider,
        **recurrences.changes_with_mixer(mixer)))
    divided = {name: x / wider if name in FIXED.get(mixer, OTHERS) else x
               for name, x in p.items()}
    got = jax.jit(lambda p, layer=layer.clone(config=c): apply_layer(
        layer, p, x_BLD)[0])(p)
    models.assert_trees_close(plain(divided), got, 1e-6 if wider == 1 else 1e-5)


def kept(**fields):
  """A model in bfloat16, and what a layer keeps of 3 rows, whose arrays are as
  large however long the rows are."""
  c = architectures.resolve(models.small_config('llama', dtype='bfloat16',
                                                **fields))
  short, whole = (architectures.init_cache(c, 3, length)[0].mixer
                  for length in (7, 1000))
  assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, whole)
  return c, short


@USUAL
def test_a_state_has_one_size_and_is_float32(mixer):
  c, cache = kept(**recurrences.changes_with_mixer(mixer))
  d = recurrences.settings_of_mixer(c, mixer)
  # The mesa layer has a second matrix, and no convolution of values.
  width, convolved = (11, 0) if mixer == MESA else (5, 4 * 5)
  assert cache.state_BHKU.shape == (2, 3, 4, 6, width)
  assert cache.state_BHKU.dtype == jnp.float32
  if d.conv:  # it keeps 3 tokens
    assert cache.query_BWJK.shape == (2, 3, 3, d.key_heads, 6)
    assert cache.key_BWJK.shape == cache.query_BWJK.shape
    assert (cache.value_BWHU is None if mixer == MESA else
            cache.value_BWHU.shape == (2, 3, 3, 4, 5))
  config = models.small_config('llama', dtype='bfloat16', num_kv_heads=4,
                         **recurrences.changes_with_mixer_and_attention(mixer))
  state, whole = totals.describe_kinds_of_layer(architectures.resolve(config))
  conv = 2 * 3 * (2 * d.key_heads * 6 + convolved) if d.conv else 0
  assert (state['kv_cache_bytes_per_token'], state['state_bytes_per_row']) == (
      0, 4 * 4 * 6 * width + conv)
  assert (whole['kv_cache_bytes_per_token'], whole['state_bytes_per_row']) == (
      2 * 2 * 32, 0)


# With a decay of each feature and without, with the delta rule and without.
USUAL_FLOPS = (KDA, 'gla', 'mamba2', 'deltanet', PRODUCT, CURVED)


@parametrize_mixers(*USUAL_FLOPS, long=tuple(
    name for name in recurrences.MIXERS_WITHOUT_OWN_CALL
    if name not in (*USUAL_FLOPS, MESA)))
def test_flops_are_those_of_the_products(mixer):
  """FLOPs include the convolutions, each weight of which a token uses once."""
  c = architectures.resolve(models.small_config('llama',
                                          **recurrences.changes_with_mixer(mixer)))
  module = architectures.build(c)
  params = paths.flatten_by_path(nn.meta.unbox(abstract_params(module)))
  roles = paths.flatten_by_path(parameter_roles(module))
  weights = sum(params[path].size for path, role in roles.items() if (
      role.is_matrix and role.kind != 'embedding' or path.endswith('_conv')))
  d = recurrences.settings_of_mixer(c, c.mixer)
  n = getattr(d, 'householders', 1)
  N, L, H, K, U = c.num_layers, 16 // n, 4, 6, 5
  J, P = d.key_heads, L * n  # P places
  has = {path.split('/')[-1] for path in params}
  delta, by_feature = bool({'rate', 'erase'} & has), 'decay_up' in has
  counts = flops.forward_flops(c, L)
  assert counts['weights'] == 2 * weights * L
  # In a row of one piece these are the products of queries with keys, and with
  # what is written; with the delta rule the system without its diagonal, its
  # inverse by substitution, and the inverse times values and keys; then the
  # products with the state. If each feature has a decay, the product of a
  # place's query with its own key is computed apart.
  half, less, read = P * (P + 1) / 2, P * (P - 1) / 2, L * (P + n) / 2
  meet = (H * K * less * (1 + delta) + J * K * L if by_feature
          else J * K * (read + delta * less))
  solved = sum(i - j - 1 for i in range(P) for j in range(i))
  pieces = meet + H * (U * read + (U + K) * delta * half) + H * solved * delta
  # The preconditioner's recurrence has keys of one feature.
  curved = 'curvature_rate' in has
  curvature = curved * J * (half * (1 + K) + 2 * L * K)
  assert counts['attention'] == pytest.approx(
      2 * N * (pieces + curvature + ((1 + delta) * P + L) * H * K * U))
  counts = flops.decode_flops(c, L)
  assert counts['weights'] == 2 * weights
  assert counts['attention'] == 2 * N * (
      ((1 + delta) * n + 1) * H * K * U + curved * 2 * J * K)
  assert counts == flops.decode_flops(c, 30)  # whatever came before


@parametrize_mixers(*recurrences.MIXERS_WITH_STATE, PRODUCT, CURVED)
def test_places_that_fill_up_a_piece_count_no_flops(mixer):
  """A token of a row that ends within a piece counts as many as one of a row
  of whole pieces, which here are two of 9 or 16 places, or three of 12 or 16.
  """
  c = architectures.resolve(models.small_config(
      'llama', **recurrences.changes_with_mixer(mixer)))
  whole = dict(kda=32, gdn2=32, gla=32, rwkv7=24).get(mixer, 18)
  odd, even = (flops.forward_flops(c, length) for length in (17, whole))
  assert odd['attention'] > 0
  for part in odd:
    assert odd[part] / 17 == pytest.approx(even[part] / whole), part


@pytest.mark.parametrize('length, places', [(13, [13]), (30, [15, 15])])
def test_flops_of_the_mesa_layer(length, places):
  """Products of the triangle of each piece, with the states, and of two vectors
  in each step of conjugate gradients."""
  c = architectures.resolve(models.small_config(
      'llama', **recurrences.changes_with_mixer(MESA, cg_steps=3)))
  N, H, K, U, steps = c.num_layers, 4, 6, 5, 3

  def products(pairs, tokens):
    step = 2 * K * pairs + (K * K + 2 * K) * tokens
    read = (K + U) * pairs + K * U * tokens
    return 2 * N * H * (steps * step + read + K * (K + U + 1) * tokens)

  pairs = sum(P * (P + 1) // 2 for P in places)
  assert flops.forward_flops(c, length)['attention'] == pytest.approx(
      products(pairs, length))
  assert flops.decode_flops(c, 9)['attention'] == products(1, 1)


def test_a_short_convolution_keeps_a_few_inputs_and_counts_its_weights():
  c, cache = kept(mixer=SHORT, short_conv=dict(kernel=4))
  assert cache.input_BWI.shape == (2, 3, 3, recurrences.WIDTH)
  assert totals.cache_bytes(c) == (0, 2 * 2 * 3 * recurrences.WIDTH)
  D, L = recurrences.WIDTH, 16
  weights = 2 * (4 * D * D + 4 * D + 3 * D * c.d_ff) + D * c.vocab_size
  assert flops.forward_flops(c, L) == dict(attention=0, weights=2 * weights * L)
  assert flops.decode_flops(c, L) == dict(attention=0, weights=2 * weights)


def test_mamba_keeps_a_state_of_each_feature():
  c, cache = kept(mixer=S6, mamba=dict(state=6))
  inner, L, N = 2 * recurrences.WIDTH, 20, 6
  assert cache.state_BIN.shape == (2, 3, inner, N)
  assert cache.input_BWI.shape == (2, 3, 3, inner)
  assert totals.cache_bytes(c) == (0, 2 * (4 * inner * N + 2 * 3 * inner))
  D, R = recurrences.WIDTH, 2
  weights = 2 * (3 * D * inner + inner * (2 * R + 2 * N + 4)
                 + 3 * D * c.d_ff) + D * c.vocab_size
  assert flops.decode_flops(c, L) == dict(
      attention=0, weights=2 * weights + 2 * 4 * inner * N)
  assert sum(flops.forward_flops(c, L).values()) == L * (
      2 * weights + 2 * 4 * inner * N)


def test_rwkv7_keeps_an_input_and_takes_two_steps_a_token():
  c, cache = kept(**recurrences.changes_with_mixer(SHIFTED))
  assert cache.state_BHKU.shape == (2, 3, 4, 6, 5)
  assert cache.input_B1D.shape == (2, 3, 1, recurrences.WIDTH)
  assert totals.cache_bytes(c) == (
      0, 2 * (4 * 4 * 6 * 5 + 2 * recurrences.WIDTH))
  # Two steps find and write; one read follows. A share is a weight of two.
  assert flops.decode_flops(c, 9)['attention'] == 2 * 2 * (4 + 1) * 4 * 6 * 5


def test_mamba3_keeps_a_token_and_its_angles():
  c, cache = kept(**recurrences.changes_with_mixer(TURNED, turned=1.0))
  assert cache.state_BHKU.shape == (2, 3, 4, 6, 5)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(cache))
  assert totals.cache_bytes(c) == (0, 2 * 4 * 4 * (6 * 5 + 6 + 5 + 3 + 1))
  # The token before is written, and the state is read.
  assert flops.decode_flops(c, 9)['attention'] == 2 * 2 * 2 * 4 * 6 * 5


@parametrize_mixers(*recurrences.MIXERS_WITH_STATE, SHORT, S6)
@pytest.mark.parametrize('system, changes, sentence', [
    ('bert', {}, 'is an encoder: choose attention'),
    ('llama', dict(attention='banded', sliding_window=4), 'has no window'),
    ('llama', dict(position='relative'), 'has no scores for the bias'),
])
def test_what_cannot_be_is_refused(mixer, system, changes, sentence):
  with pytest.raises(ValueError, match=sentence):
    architectures.resolve(models.small_config(
        system, **recurrences.changes_with_mixer(mixer) | changes))


@parametrize_mixers(*recurrences.MIXERS_WITH_STATE, SHORT, S6)
def test_what_a_run_of_it_cannot_be_is_refused(mixer):
  module = architectures.build(models.small_config(
      'llama', num_kv_heads=8, num_heads=8,
      **recurrences.changes_with_mixer(mixer)))
  shape = dict.fromkeys(tables.MESH_AXES, 1)
  with pytest.raises(ValueError, match='keep each row on one device'):
    devices.check_mesh(module.config, shape | dict(context=2))
  with pytest.raises(ValueError, match='not divide model.d_model' if (
      mixer in (SHORT, S6)) else f'not divide model.{mixer}.*heads'):
    devices.check_mesh(module.config, shape | dict(tensor=64))
  with pytest.raises(ValueError, match='read a row in one direction'):
    preflight._check_objective_fits_model('prefix', module)
  preflight._check_objective_fits_model('causal', module)
  with pytest.raises(ValueError, match='no attention weights to show'):
    jax.eval_shape(lambda key: module.init(
        key, models.random_tokens(), keep_attention=True), jax.random.key(0))
