"""Where experts are computed: the sums and the refusals, without a mesh."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts import sharding
from architectures.parts.moe import dispatch
from configs.errors import RequestError
from tests.architectures.moe.expert_parallel_test import config


def moe(**fields):
  return config(**fields).moe


@pytest.mark.parametrize('factor, tokens, groups, shards, slots', [
    (0.0, 10, 1, 4, 3),  # all of a device's tokens
    (1.0, 64, 4, 2, 8),  # two groups, of 16 x 2 / 8 slots each
    (1.0, 64, 4, 8, 4),  # a part of one
    (4.0, 64, 4, 8, 8)])  # no more than the tokens
def test_slots_of_an_expert(factor, tokens, groups, shards, slots):
  assert dispatch.slots(moe(), factor, tokens, groups, shards) == slots


@pytest.mark.parametrize('fields, factor, way', [
    (dict(), 1.0, 'sorted'),
    (dict(), 1.5, 'sorted'),  # 192 rows for 128 assignments
    (dict(), 2.5, 'dropless'),  # 320
    (dict(), 0.0, 'dropless'),
    (dict(num_experts=2), 0.0, 'dropless'),  # few, but no capacity
    (dict(router='expert_choice'), 0.0, 'sorted')])
def test_the_way_of_auto_pads_little(fields, factor, way):
  assert dispatch.way(moe(**fields), factor, 64, 4, 1) == way


@pytest.mark.parametrize('tokens, groups, shards, chooses, fits', [
    (64, 4, 2, True, True),
    (64, 1, 3, False, True),  # one group of all, whatever the shards
    (64, 2, 4, False, True),  # a group on two shards each
    (64, 2, 4, True, False),
    (64, 1, 3, True, False),
    (64, 3, 2, False, False),
    (64, 4, 3, False, False)])
def test_groups_that_fit_on_the_shards(tokens, groups, shards, chooses, fits):
  check = lambda: dispatch._check_groups(tokens, groups, shards, chooses)
  if fits:
    return check()
  with pytest.raises(RequestError) as error:
    check()
  assert ('expert_choice needs' in str(error.value)) == chooses
  assert f'a divisor of {tokens // shards}' in str(error.value)


@pytest.mark.parametrize('fields, d_model, axes, words', [
    (dict(), 16, {}, ''),
    (dict(num_experts=6), 16, {}, 'choose 4 or 8 experts, or mesh.expert among '
     '1, 2, 3, 6'),
    (dict(num_experts=2), 16, {}, 'choose 4 experts'),
    (dict(d_ff=33), 16, {}, 'model.moe.d_ff is 33, which mesh.tensor 2 does '
     'not divide: choose 32 or 34'),
    (dict(), 15, {}, 'model.d_model is 15, which mesh.fsdp 2 does not divide: '
     'choose 14 or 16'),
    (dict(), 16, dict(experts=('expert', 'fsdp'), tokens=('expert', 'fsdp')),
     'put them on one'),
    (dict(), 16, dict(tokens=('data',)), "split over the experts' axis too")])
def test_what_a_mesh_must_divide(fields, d_model, axes, words, monkeypatch):
  sizes = dict(data=1, fsdp=2, expert=4, tensor=2)
  monkeypatch.setattr(sharding, 'size', lambda names: math.prod(
      sizes[name] for name in names))
  monkeypatch.setattr(dispatch, 'mesh_axes', lambda: dispatch.Axes(**dict(
      tokens=('expert',), experts=('expert',), mlp=('tensor',),
      embed=('fsdp',)) | axes))
  check = lambda: dispatch.check_mesh(moe(**fields), d_model)
  if not words:
    return check()
  with pytest.raises(RequestError) as error:
    check()
  assert words in str(error.value)


def test_what_fills_the_shards_goes_nowhere():
  E, T, X = 8, 5, 2
  routed = dispatch.routing.Routing(
      expert_A=jnp.arange(T * X) % E, gate_A=jnp.ones(T * X),
      token_A=jnp.arange(T * X) // X, probs_TE=jnp.full((T, E), 1 / E),
      choices=X)
  x_TD, found = dispatch._pad(jnp.ones((T, 3)), routed, 3)
  assert x_TD.shape == (8, 3) and not x_TD[T:].any()
  np.testing.assert_array_equal(found.expert_A[:T * X], routed.expert_A)
  np.testing.assert_array_equal(found.expert_A[T * X:], [E] * 3 * X)
  assert not found.gate_A[T * X:].any() and len(found.gate_A) == 8 * X
  assert found.probs_TE.shape == (8, E)
  assert dispatch._pad(jnp.ones((T, 3)), routed, 0)[1] is routed
