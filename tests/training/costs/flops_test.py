"""Model FLOPs, counted in the traced program, against the sizes of weights and
by hand."""

import collections
import types

import jax
from jax.extend import core as jex
import jax.numpy as jnp
import pytest

import architectures
from architectures.parts import layers, paths
from architectures.parts.attention import kernels
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import LayerKind
from architectures.parts.moe.routing import MoEConfig
from configs import base, bert
from tests.helpers import models
from training import objectives, runs
from training.costs import flops, totals

LENGTH = 24


def model(**fields):
  config = base.base().model
  config.update(dict(d_model=32, num_layers=4, num_heads=4, vocab_size=96,
                     max_len=64))
  config.update(fields)
  return config


def weights_at_work(c) -> float:
  """Returns how many weights a token is multiplied with: of experts, those of
  its choice, and the profiles of a bias with each head."""
  module = architectures.build(c)
  roles = paths.flatten_by_path(runs.parameter_roles(module))
  chosen = 1.0
  if c.ffn == 'moe':
    moe = c.part(MoEConfig)
    chosen = moe.top_k / moe.all_experts
  return c.tie_embeddings * c.d_model * c.vocab_size + sum(
      x.size * (chosen if roles[path].axes[0] == 'experts' else 1)
      * (c.num_heads if path.endswith('profiles') else 1)
      for path, x in paths.flatten_by_path(
          runs.parameter_shapes(module)).items()
      if roles[path].is_matrix and roles[path].kind != 'embedding'
      or path.endswith('_conv'))


@pytest.mark.parametrize('fields', [
    dict(),
    dict(num_kv_heads=2, head_dim=16, ffn='swiglu', d_ff=40,
         attention_gate='elementwise', value_embedding=True,
         value_residual=True),
    dict(block='parallel', position='rope', ffn='geglu', remat='full',
         attention_gate='headwise', branch_conv=3),
    dict(tie_embeddings=False, **models.window_in_every_other_layer(5),
         position='alibi'),
    dict(position='relative_by_token', profiles=dict(rank=4, extent=7),
         attention_difference=0.5, num_kv_heads=2),
    dict(scan_layers=False, norm='rmsnorm', position='none', dtype='bfloat16',
         pattern='own,reads', kinds=dict(own={}, reads=dict(kv_sharing=True))),
    dict(ffn='moe', **models.DENSE_AND_MOE_LAYERS, moe=dict(
        num_experts=8, top_k=2, shared_experts=1, capacity_factor=1.25,
        zero_experts=4, latent_dim=24, router_dim=12)),
])
def test_a_weight_is_two_flops_and_a_pair_four_of_each_feature(fields):
  c = architectures.resolve(model(**fields))
  weights, rows = weights_at_work(c), flops.forward_flops(c, LENGTH)
  assert rows['weights'] == pytest.approx(2 * LENGTH * weights, rel=1e-12)
  token = flops.decode_flops(c, LENGTH)
  assert token['weights'] == pytest.approx(2 * weights, rel=1e-12)
  seen = [[min(at, c.layer_config(kind.name).sliding_window or at)
           for at in range(1, LENGTH + 1)]
          for kind in c.layer_kinds(c.num_layers)]
  # A pair of heads weighs the values of both.
  pairs = c.part(AttentionConfig).attention_difference
  size = (6 if pairs else 4) * c.num_heads * c.head_dim
  assert rows['attention'] == size * sum(map(sum, seen))
  assert token['attention'] == size * sum(layer[-1] for layer in seen)


@pytest.mark.parametrize('length', [1, 16, 100])
def test_convolved_and_reflected_keys_count_what_a_hand_counts(length):
  H, J, K, D, places = 4, 2, 8, 32, min(length, 64)
  def added(**fields):
    """The FLOPs of a layer beyond those without positions."""
    with_and_without = [flops.forward_flops(models.small_config(
        'llama', num_kv_heads=J, max_len=128, num_layers=1,
        **dict(position='none') | more), length) for more in (fields, {})]
    return {k: with_and_without[0][k] - v
            for k, v in with_and_without[1].items()}

  # Three taps of each feature, and two matrices of each head.
  assert added(cca=True, cca_taps=3) == dict(
      attention=0, weights=length * (H + J) * (2 * 3 * K + 2 * 2 * K * K))
  # Of keys and values: filters that a token makes, and as many taps.
  assert added(dynamic_conv=3) == dict(
      attention=0, weights=length * 2 * (2 * D * J * 3 + 2 * 3 * J * K))
  # Of a visible pair: two products of a query, and three of a key, of which one
  # each is with a triangle. Of tokens of a chunk: what lies below the diagonal
  # and its inverse by substitution, and the triangle of queries.
  upto, below = (places + 1) / 2, (places - 1) / 2
  pair = 2 * (K + upto) * H + 2 * (K + upto + K) * J
  solved = sum(i - j - 1 for i in range(places) for j in range(i)) / places
  in_chunks = 2 * length * (K * (below * J + upto * H) + solved * J)
  path = added(position='path')
  assert path['weights'] == length * 2 * (D * 32 + (32 + 3) * J * K + D * J)
  assert path['attention'] == pytest.approx(
      pair * length * (length + 1) // 2 + in_chunks)


def test_a_convolution_counts_its_window():
  """Depthwise, of 4 places: 8 products and sums for each feature."""
  def short(x_BLD, w_4D):
    return jax.lax.conv_general_dilated(
        x_BLD, w_4D[:, None], (1,), [(3, 0)], feature_group_count=16,
        dimension_numbers=('NWC', 'WIO', 'NWC'))
  args = jnp.ones((2, LENGTH, 16)), jnp.ones((4, 16))
  program = jax.make_jaxpr(short)(*args)
  work = flops.count_work(program, flops.CountOptions('gpu'))
  assert work.flops == 2 * 4 * 2 * LENGTH * 16


def test_a_kernel_of_splash_is_counted_by_the_products_in_it():
  q, k, v = [jnp.ones((1, 256, 2, 64))] * 3
  program = jax.make_jaxpr(jax.grad(lambda *x: kernels.splash_attention(
      *x, kernels.Mask(causal=True), scale=0.2, interpret=True).sum(),
                                    (0, 1, 2)))(q, k, v)
  products = collections.Counter()
  def visit(jaxpr, kernel=''):
    for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
      products[kernel] += eqn.primitive.name == 'dot_general'
      inside = kernel
      if eqn.primitive.name == 'pallas_call':
        inside = str(eqn.params.get('name', eqn.params.get(
            'name_and_src_info')))
      for inner in jex.jaxprs_in_params(eqn.params):
        visit(inner, inside)
  visit(program)
  for prefix, count in flops._PRODUCTS_OF_SPLASH_KERNEL.items():
    assert [products[name] for name in products if name.startswith(
        prefix)] == [count], prefix


def test_a_recurrence_without_matrices_counts_element_by_element():
  """h_t = a_t h_t-1 + x_t is 2 FLOPs for each number of h, and y_t = h_t^2 a
  third one; whole numbers and what a declaration counts are as they were."""
  def step(h_BD, here):
    a_BD, x_BD, at = here
    h_BD = a_BD * h_BD + x_BD
    return h_BD, (h_BD * h_BD, at + 1)

  def scanned(a_LBD, x_LBD):
    return jax.lax.scan(step, jnp.zeros(x_LBD.shape[1:]), (
        a_LBD, x_LBD, jnp.arange(LENGTH)))

  def after(first, then):
    return then[0] * first[0], then[0] * first[1] + then[1]

  def associative(a_LBD, x_LBD):
    return jax.lax.associative_scan(after, (a_LBD, x_LBD))[1] + 1.0

  args = [jnp.ones((LENGTH, 2, 5))] * 2
  options = flops.CountOptions('gpu', only_useful=True)
  work = lambda f: flops.count_work(jax.make_jaxpr(f)(*args), options).flops
  assert work(scanned) == 3 * LENGTH * 2 * 5
  # `after` has 3 FLOPs and is applied less than twice a place; further sums put
  # its results where they belong.
  assert LENGTH * 2 * 5 < work(associative) < 3 * 3 * LENGTH * 2 * 5
  counted = layers.count_flops_by_result(associative, 7)
  assert work(counted) == 7 * LENGTH * 2 * 5


@pytest.mark.parametrize('name, flops_of_number', [
    ('counted_7_of_2', 3.5), ('recounted_7_of_2', 6),
    ('counted_7_of_2_again', 6), ('counted_a_of_2', 6)])
def test_a_function_counts_as_its_whole_name_says(name, flops_of_number):
  def product(x_LD, w_DD):
    return x_LD @ w_DD
  product.__name__ = name
  jaxpr = jax.make_jaxpr(jax.jit(product))(
      jnp.ones((LENGTH, 3)), jnp.ones((3, 3)))
  work = flops.count_work(jaxpr, flops.CountOptions('gpu', only_useful=True))
  assert work.flops == flops_of_number * LENGTH * 3


def test_what_lies_between_the_products_of_a_scan_does_not_count():
  def layer(x_LD, w_DD):
    return jnp.tanh(x_LD @ w_DD) + x_LD, None
  work = flops.count_work(jax.make_jaxpr(lambda x_LD, w_NDD: jax.lax.scan(
      layer, x_LD, w_NDD))(jnp.ones((LENGTH, 4)), jnp.ones((3, 4, 4))),
                          flops.CountOptions('gpu', only_useful=True))
  assert work.flops == 3 * 2 * LENGTH * 4 * 4


@pytest.mark.parametrize('kind', [
    LayerKind('global', 'gelu', causal=True),
    LayerKind('global', 'gelu', causal=False),
    LayerKind('banded', 'gelu', causal=True),
    LayerKind('banded', 'gelu', causal=False),
    LayerKind('chunked', 'gelu', causal=True),
    LayerKind('chunked', 'gelu', causal=False),
])
@pytest.mark.parametrize('window', [1, 3, 24, 99])
def test_keys_are_counted_as_the_mask_has_them(kind, window):
  at = jnp.arange(LENGTH)[None]
  c = types.SimpleNamespace(diffusion_block=0, sliding_window=window,
                            attention_chunk=window)
  mask = kernels.visible_keys(kind, c, at, at)
  seen = LENGTH**2 if mask is None else int(mask.sum())
  assert kernels.count_visible_pairs(kind, c, LENGTH, LENGTH) == seen


@pytest.mark.parametrize('name', ['global', 'banded', 'chunked'])
def test_a_prefix_counts_as_the_mean_over_all_prefixes(name):
  at = jnp.arange(LENGTH)[None]
  c = types.SimpleNamespace(diffusion_block=0, sliding_window=5,
                            attention_chunk=5)
  kind = LayerKind(name, 'gelu', causal=True)
  seen = [int(kernels.visible_keys(kind, c, at, at, prefix_B=jnp.array([size])
                              ).sum()) for size in range(1, LENGTH)]
  part, whole, prompt = kernels.count_useful_pairs(
      kind, c, LENGTH, LENGTH, prefix=True)
  assert part / whole == pytest.approx(sum(seen) / len(seen) / LENGTH ** 2)
  all_of_it = kernels.visible_keys(
      kind, c, at, at, prefix_B=jnp.array([LENGTH]))
  assert prompt / whole == pytest.approx(all_of_it.sum() / LENGTH ** 2)
  # One token has no prefix, and a token with a cache sees all before it.
  assert kernels.count_useful_pairs(kind, c, 1, 1, prefix=True) == (1, 1, 1)
  with_prefix = kernels.count_useful_pairs(kind, c, 1, 9, prefix=True)
  assert with_prefix == kernels.count_useful_pairs(kind, c, 1, 9)


def test_decoding_a_sequence_is_its_forward_pass():
  """Token by token with a cache: the same products, in the sum."""
  config = model(pattern='dense,moe', kinds=dict(
      dense=dict(window=0, ffn='dense'), moe=dict(window=3)), ffn='moe',
                 moe=dict(num_experts=8, top_k=2, shared_experts=1))
  whole = flops.forward_flops(config, 4)
  for part in whole:
    assert sum(flops.decode_flops(config, keys)[part]
               for keys in range(1, 5)) == pytest.approx(whole[part])


def test_mixture_of_experts_by_hand():
  """d 8, d_ff 16: SwiGLU is 3 * 2 * 8 * 16 = 768 a token and expert."""
  config = model(d_model=8, num_heads=2, num_layers=2, d_ff=16, ffn='moe',
                 **models.DENSE_AND_MOE_LAYERS,
                 moe=dict(num_experts=4, top_k=2, ffn='swiglu'))
  parts = flops.forward_flops(config, 10)
  assert parts['attention'] == 2 * 4 * 8 * 55  # 1 + 2 + ... + 10 keys
  assert parts['weights'] == (
      10 * 768  # layer 0
      + 10 * 2 * 768  # layer 1: two of four
      + 10 * 2 * 8 * 4  # the router
      + 2 * 10 * 4 * 2 * 8 * 8  # projections
      + 10 * 2 * 8 * 96)  # the head


def test_an_encoder_decoder_by_hand():
  """Cross-attention projects its keys from the encoder's tokens."""
  config = model(arch='t5', d_model=8, num_heads=2, num_layers=1, d_ff=16,
                 ffn='relu', num_decoder_layers=2)
  parts = flops.forward_flops(config, 6, 3)
  assert parts['attention'] == 4 * 8 * (6 * 6 + 2 * 6 + 2 * 3 * 6)
  assert parts['weights'] == (
      2 * 64 * (4 * 6 + 2 * (4 * 3) + 2 * (2 * 3 + 2 * 6))  # projections
      + 2 * 2 * 8 * 16 * (6 + 2 * 3)  # feed-forwards
      + 2 * 3 * 8 * 96)  # the head
  token = flops.decode_flops(config, 3, memory_length=6)
  assert token['attention'] == 4 * 8 * 2 * (3 + 6)
  assert token['weights'] == (
      2 * 64 * 2 * (4 + 2) + 2 * 2 * 8 * 16 * 2 + 2 * 8 * 96)


@pytest.mark.parametrize('whole_words', [False, True])
def test_a_step_of_masked_words_is_what_its_program_multiplies(whole_words):
  """The head reads the masked places alone, unless words are masked whole."""
  config = bert.get_config('tiny')
  config.model.update(dropout=0.0, attention_dropout=0.0, remat='none',
                      vocab_size=5000)
  config.data.whole_words = whole_words
  c, L = runs.resolve_model_without_tokenizer(config), config.data.length
  module, objective = architectures.build(c), objectives.find_objective(config)
  loss = lambda params, batch: objective.loss(objective.apply(
      module, params, batch), batch, config)[0]
  program = jax.make_jaxpr(jax.grad(loss))(runs.parameter_shapes(module), {
      key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype)
      in objectives.shapes_of_batch(config).items()})
  options = flops.CountOptions('gpu', only_useful=True)
  multiplied = flops.count_work(program, options).flops
  unread = objective.num_unread_places(config, L)
  assert unread == (0 if whole_words else L - round(0.15 * L))
  per_token = sum(flops.training_flops(c, L, num_unread=unread).values()) / L
  assert per_token * L * config.data.batch_size == pytest.approx(multiplied,
                                                                 rel=0.02)
  assert per_token == totals.count_costs(config)['flops_per_token']['training']
  for name, value in (('data.mask_rate', 1.0), ('mesh.context', 2)):
    whole = config.copy_and_resolve_references()  # such rows are read whole
    whole.update_from_flattened_dict({name: value})
    assert objective.num_unread_places(whole, L) == 0


def test_below_what_is_trained_there_is_no_backward_pass():
  """The head alone: the gradient of its weights, at the places it reads."""
  config = model(tie_embeddings=False)
  forward = flops.forward_flops(config, LENGTH)
  trained = flops.training_flops(config, LENGTH, num_unread=5,
                                 freeze='embed/.*,decoder/.*')
  head = 2 * 32 * 96
  assert trained['attention'] == pytest.approx(forward['attention'])
  assert trained['weights'] == pytest.approx(
      forward['weights'] - 5 * head + (LENGTH - 5) * head)


class Device:

  def __init__(self, kind, platform='gpu', cores=1):
    self.device_kind, self.platform, self.num_cores = kind, platform, cores


def test_peaks():
  h100 = Device('NVIDIA H100 80GB HBM3')
  peak = flops.total_peak_flops
  assert peak([h100] * 2, 'bfloat16') == pytest.approx(2 * 989.4e12)
  assert peak([h100], 'float32') == pytest.approx(494.7e12)
  # A v4 device is the whole chip, unless its two cores are two devices.
  assert peak([Device('TPU v4', 'tpu', 2)], 'bfloat16') == 275e12
  assert peak([Device('TPU v4', 'tpu')] * 2, 'bfloat16') == 275e12
  assert peak([Device('TPU7x', 'tpu')] * 2, 'bfloat16') == 2307e12
