"""Model FLOPs against what a traced forward pass multiplies, and by hand."""

import math

import jax
import jax.numpy as jnp
import pytest

import architectures
from architectures.parts import attention
from architectures.parts.config import LayerKind
from configs import base
from training import flops, peaks

LENGTH = 24


def model(**fields):
  config = base.base().model
  config.update(dict(d_model=32, num_layers=4, num_heads=4, vocab_size=96,
                     max_len=64))
  config.update(fields)
  return config


def products(jaxpr) -> float:
  """The FLOPs of every dot_general in a jaxpr, loops unrolled."""
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      left = eqn.invars[0].aval.shape
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(
          left[i] for i in contracted)
    times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
    for value in eqn.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        total += times * products(inner)
  return total


def traced(config, function) -> float:
  module = architectures.build(config)
  tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
  params = jax.eval_shape(module.init, jax.random.key(0), tokens)
  return products(jax.make_jaxpr(
      lambda p, t: function(module.apply(p, t)))(params, tokens).jaxpr)


@pytest.mark.parametrize('fields', [
    dict(),
    dict(num_kv_heads=2, head_dim=16, ffn='swiglu', d_ff=40),
    dict(block='parallel', position='rope', ffn='geglu'),
    dict(tie_embeddings=False, attention='global,banded', sliding_window=5,
         position='alibi'),
    dict(scan_layers=False, norm='rmsnorm', position='none'),
])
def test_the_formula_is_what_a_forward_pass_multiplies(fields, monkeypatch):
  """With every key counted, since a plain product computes them all."""
  monkeypatch.setattr(flops, 'mean_keys', lambda kind, window, length: length)
  config = model(**fields)
  parts = flops.forward_flops(config, LENGTH)
  assert traced(config, lambda out: out.logits) == sum(parts.values())
  assert traced(config, lambda out: out.hidden) == (
      sum(parts.values()) - parts['head'])


@pytest.mark.parametrize('arch', architectures.ARCHITECTURES)
def test_the_formula_of_every_architecture(arch, monkeypatch):
  monkeypatch.setattr(flops, 'mean_keys', lambda kind, window, length: length)
  config = model(arch=arch)
  both = flops.STACKS[arch] == 'encoder-decoder'
  parts = flops.forward_flops(config, LENGTH, LENGTH if both else 0)
  everything = lambda out: (out.logits, out.extra)
  assert traced(config, everything) == sum(parts.values())


@pytest.mark.parametrize('kind', [
    LayerKind('global', 'gelu', causal=True),
    LayerKind('global', 'gelu', causal=False),
    LayerKind('banded', 'gelu', causal=True),
    LayerKind('banded', 'gelu', causal=False),
])
@pytest.mark.parametrize('window', [1, 3, 24, 99])
def test_keys_are_counted_as_the_mask_has_them(kind, window):
  at = jnp.arange(LENGTH)[None]
  mask = attention.visible(kind, window, at, at)
  seen = LENGTH**2 if mask is None else int(mask.sum())
  assert flops.mean_keys(kind, window, LENGTH) == seen / LENGTH


def test_decoding_a_sequence_is_its_forward_pass():
  """Token by token with a cache: the same products, in the sum."""
  config = model(attention='global,banded', sliding_window=5, ffn='moe',
                 moe=dict(num_experts=8, top_k=2, every=2, shared_experts=1))
  whole = flops.forward_flops(config, LENGTH)
  for part in whole:
    assert sum(flops.decode_flops(config, keys)[part]
               for keys in range(1, LENGTH + 1)) == pytest.approx(whole[part])


def test_mixture_of_experts_by_hand():
  """d 8, d_ff 16: SwiGLU is 3 * 2 * 8 * 16 = 768 a token and expert."""
  config = model(d_model=8, num_heads=2, num_layers=2, d_ff=16, ffn='moe',
                 moe=dict(num_experts=4, top_k=2, ffn='swiglu', every=2))
  parts = flops.forward_flops(config, 10)
  assert parts['ffn'] == 10 * 768  # layer 0
  assert parts['experts'] == 10 * 2 * 768  # layer 1: two of four
  assert parts['router'] == 10 * 2 * 8 * 4
  assert parts['projections'] == 2 * 10 * 4 * 2 * 8 * 8
  assert parts['attention'] == 2 * 4 * 8 * 55  # 1 + 2 + ... + 10 keys
  assert parts['head'] == 10 * 2 * 8 * 96


def test_an_encoder_decoder_by_hand():
  """Cross-attention projects its keys from the encoder's tokens."""
  config = model(arch='t5', d_model=8, num_heads=2, num_layers=1, d_ff=16,
                 ffn='relu', num_decoder_layers=2)
  parts = flops.forward_flops(config, 6, 3)
  assert parts['projections'] == 2 * 64 * (
      4 * 6 + 2 * (4 * 3) + 2 * (2 * 3 + 2 * 6))
  assert parts['attention'] == 4 * 8 * (6 * 6 + 2 * 6 + 2 * 3 * 6)
  assert parts['ffn'] == 2 * 2 * 8 * 16 * (6 + 2 * 3)
  assert parts['head'] == 2 * 3 * 8 * 96
  per_token = flops.forward_flops_per_token(config, 6, 3)
  assert per_token == pytest.approx(sum(parts.values()) / 9)
  token = flops.decode_flops(config, 3, memory=6)
  assert token['attention'] == 4 * 8 * 2 * (3 + 6)
  assert token['projections'] == 2 * 64 * 2 * (4 + 2)


def test_gpt3_as_published():
  """3.14e23 FLOPs for 300B tokens (Brown et al. 2020, table D.1), which
  leaves attention and the head out."""
  config = model(d_model=12288, num_layers=96, num_heads=96, vocab_size=50257,
                 max_len=2048)
  parts = flops.forward_flops(config, 2048)
  mine = 3 * (parts['projections'] + parts['ffn']) / 2048 * 300e9
  assert mine == pytest.approx(3.14e23, rel=0.01)
  assert flops.training_flops_per_token(config, 2048) * 2048 == pytest.approx(
      3 * sum(parts.values()))


@pytest.mark.parametrize('call, words', [
    (lambda: flops.forward_flops(model(), 8, 4), 'decoder_length is 4'),
    (lambda: flops.forward_flops(model(arch='t5'), 8), 'decoder_length is 0'),
    (lambda: flops.forward_flops(model(arch='gtp'), 8), 'unknown model.arch'),
    (lambda: flops.decode_flops(model(arch='bert'), 8), 'no decoder'),
    (lambda: flops.decode_flops(model(arch='t5'), 8), 'memory is 0'),
])
def test_what_has_no_meaning_is_refused(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def test_routers_by_hand():
  """A hash has no weight; expert choice takes by capacity, not by top_k."""
  moe = dict(num_experts=4, top_k=2, d_ff=16)
  of = lambda **fields: flops.forward_flops(
      model(arch='bert', ffn='moe', moe=moe | fields), 10)
  plain = of()
  assert of(router='hash')['router'] == 0 < plain['router']
  assert of(router='expert_choice')['experts'] == plain['experts']
  assert of(router='expert_choice', capacity_factor=1.5)['experts'] == (
      1.5 * plain['experts'])


class Device:

  def __init__(self, kind, platform='gpu', cores=1):
    self.device_kind, self.platform, self.num_cores = kind, platform, cores


def test_peaks():
  h100 = Device('NVIDIA H100 80GB HBM3')
  assert peaks.total([h100] * 2, 'bfloat16') == pytest.approx(2 * 989.4e12)
  assert peaks.total([h100], 'float32') == pytest.approx(494.7e12)
  # A v4 device is the whole chip, unless its two cores are two devices.
  assert peaks.total([Device('TPU v4', 'tpu', 2)], 'bfloat16') == 275e12
  assert peaks.total([Device('TPU v4', 'tpu')] * 2, 'bfloat16') == 275e12
  assert peaks.total([Device('TPU7x', 'tpu')] * 2, 'bfloat16') == 2307e12


def test_an_unknown_peak_is_none_and_no_guess():
  for kind in ('cpu', 'NVIDIA H100', 'NVIDIA A100', 'TPU v99', ''):
    assert peaks.flops(kind, 'bfloat16') is None
  assert peaks.total(jax.devices(), 'float32') is None
  mixed = [Device('NVIDIA H200'), Device('NVIDIA H999')]
  assert peaks.total(mixed, 'bfloat16') is None
  assert peaks.flops('NVIDIA H200', 'float64') is None
  with jax.default_matmul_precision('highest'):
    assert peaks.flops('NVIDIA H200', 'float32') is None
    assert peaks.flops('NVIDIA H200', 'bfloat16') is not None
