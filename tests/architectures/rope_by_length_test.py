"""Rotary positions that turn otherwise in long rows: longrope and dynamic.

tools/verify compares both with transformers, in whole models.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import rotary
from tests.architectures import product_test
from tests.helpers import models

K, THETA, ORIGINAL = 8, 1e4, 6
SHORT, LONG = (1.0, 1.1, 1.3, 1.8), (1.0, 3.0, 8.0, 30.0)
LONGROPE = dict(scaling='longrope', theta=THETA, original_len=ORIGINAL,
                factor=4.0, short_factor=SHORT, long_factor=LONG)
DYNAMIC = dict(scaling='dynamic', theta=THETA, original_len=ORIGINAL,
               factor=4.0)
LAWS = dict(position='rope', block='pre_norm', attention='global',
            norm='rmsnorm', ffn='relu')


def frequencies(rope, length):
  c = architectures.resolve(models.config('llama', head_dim=K, rope=rope))
  return rotary.rope_frequencies(c, length)


@pytest.mark.parametrize('length', [1, ORIGINAL, ORIGINAL + 1, 5 * ORIGINAL])
def test_longrope_divides_by_the_factors_of_its_length(length):
  """Ding et al. 2024, equation 2, and the factor on attention of Phi-3."""
  got, factor = frequencies(LONGROPE, length)
  divided_by = LONG if length > ORIGINAL else SHORT
  np.testing.assert_allclose(
      got, THETA ** (-np.arange(0, K, 2) / K) / np.array(divided_by), rtol=1e-6)
  assert factor == pytest.approx(np.sqrt(1 + np.log(4) / np.log(ORIGINAL)))
  assert frequencies(LONGROPE | dict(attention_factor=1.5), length)[1] == 1.5
  assert frequencies(LONGROPE | dict(factor=1.0), length)[1] == 1.0


@pytest.mark.parametrize('length', [1, ORIGINAL, ORIGINAL + 1, 5 * ORIGINAL])
def test_dynamic_grows_theta_with_the_length(length):
  """NTK-aware scaling whose factor is 1 up to the original length."""
  got, factor = frequencies(DYNAMIC, length)
  stretch = 4.0 * max(length, ORIGINAL) / ORIGINAL - 3.0
  theta = THETA * stretch ** (K / (K - 2))
  np.testing.assert_allclose(got, theta ** (-np.arange(0, K, 2) / K), rtol=1e-6)
  assert factor == 1.0
  if length <= ORIGINAL:
    plain, _ = frequencies(dict(theta=THETA), length)
    np.testing.assert_allclose(got, plain, rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize('rope', [
    DYNAMIC, pytest.param(LONGROPE, marks=pytest.mark.long)],
    ids=lambda rope: rope['scaling'])
def test_the_laws_hold_and_the_room_of_a_row_decides(rope):
  """Scan = loop, cached = whole, in rows longer than the original length. A
  prompt in a cache that has room for them turns as they do, and in one that
  has not, as the prompt alone does."""
  rope = {name: value[-2:] if 'factor' in name and name != 'factor' else value
          for name, value in rope.items()}  # of heads of four features
  rope['theta'] = 5.0  # so that the slow wave turns, too
  module, params = product_test.variant(LAWS | dict(rope=rope))
  product_test.check_laws_of(module, params)
  tokens = models.tokens(1, product_test.LENGTH)
  whole = models.logits(module, params, tokens)
  alone = models.logits(module, params, tokens[:, :ORIGINAL])
  assert np.abs(whole[:, :ORIGINAL] - alone).max() > 1e-3
  for room, want in ((product_test.LENGTH, whole[:, :ORIGINAL]),
                     (ORIGINAL, alone)):
    out = module.apply({'params': params}, tokens[:, :ORIGINAL],
                       cache=architectures.init_cache(module.config, 1, room),
                       positions_BL=jnp.arange(ORIGINAL)[None])
    np.testing.assert_allclose(out.logits, want, atol=1e-5)


@pytest.mark.parametrize('rope, words', [
    (dict(LONGROPE, short_factor=(1.0,)), 'short_factor .*needs 4 numbers'),
    (dict(LONGROPE, long_factor=(1.0, 0.0, 1.0, 1.0)), 'long_factor .*> 0'),
    (dict(LONGROPE, long_factor=(1.0, 'x', 1.0, 1.0)), 'must hold numbers'),
    (dict(LONGROPE, long_factor=3.0), 'must be of type tuple'),
    (dict(LONGROPE, original_len=1), 'original_len is 1'),
    (dict(DYNAMIC, fraction=0.25), 'needs 4 or more')])
def test_what_cannot_be_is_refused(rope, words):
  model = models.config('llama', head_dim=K)
  with model.unlocked(), model.ignore_type():
    model.rope.update(rope)
  with pytest.raises(ValueError, match=words):
    architectures.resolve(model)
