"""Latent attention against its definition in numpy, and what it promises: the
cache is small, and decoding on latents equals decoding on heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.attention import latent
from architectures.parts.config import Context
from configs import base
from tests.helpers import models
from training.costs import totals

SIZES = dict(q_rank=12, kv_rank=10, nope_dim=6, rope_dim=4, v_dim=5)
LATENT = dict(mixer='latent', latent=SIZES)
LORA = dict(rank=2, targets='query_up,kv_up,kv_down,out')


def make(system='llama', dtype='float32', **changes):
  return models.make(system, dtype=dtype, **LATENT | changes)


def _numpy_layer(p, x_LD, *, theta=10000.0, eps=1e-5):
  """The definition, for one row and in float64, a head and a pair at a time."""
  norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps
                                      ) * scale
  def turn(x_LK):
    out = np.array(x_LK)
    half = x_LK.shape[1] // 2
    for pos in range(len(x_LK)):
      for i in range(half):
        angle = pos * theta ** (-i / half)
        a, b = x_LK[pos, i], x_LK[pos, i + half]
        out[pos, i] = a * np.cos(angle) - b * np.sin(angle)
        out[pos, i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out
  nope, rank = SIZES['nope_dim'], SIZES['kv_rank']
  down = x_LD @ p['kv_down']
  c = norm(down[:, :rank], p['kv_norm']['scale'])
  key = turn(down[:, rank:])
  q_in = norm(x_LD @ p['query_down'], p['query_norm']['scale'])
  y_LD = 0.0
  for h in range(p['out'].shape[0]):
    q = q_in @ p['query_up'][:, h]
    q = np.concatenate([q[:, :nope], turn(q[:, nope:])], 1)
    kv = c @ p['kv_up'][:, h]
    scores = q @ np.concatenate([kv[:, :nope], key], 1).T / np.sqrt(
        q.shape[1])
    scores[np.triu_indices(len(x_LD), 1)] = -np.inf
    w = np.exp(scores - scores.max(-1, keepdims=True))
    w /= w.sum(-1, keepdims=True)
    y_LD += w @ kv[:, nope:] @ p['out'][h]
  return y_LD


@pytest.mark.parametrize('eps', [0.0, 0.2])
def test_a_layer_equals_its_definition(eps):
  """With the eps of the model in the norms of latents, or one of their own.
  """
  module, params = make(num_layers=1, latent=SIZES | dict(norm_eps=eps))
  p = params['decoder']['layers']['block_0']['attention']
  p64 = jax.tree.map(lambda x: np.asarray(x[0], np.float64), p)
  layer = latent.LatentAttention(module.config,
                                 module.config.layer_pattern()[0])
  x_BLD = np.random.default_rng(3).normal(size=(2, 9, 32)).astype(np.float32)
  ctx = Context(jnp.arange(9)[None])
  y_BLD, _ = jax.jit(lambda p, x: layer.apply({'params': jax.tree.map(
      lambda x: x[0], p)}, x, ctx, None))(p, x_BLD)
  want = np.stack([_numpy_layer(p64, np.asarray(x, np.float64),
                                eps=eps or 1e-5) for x in x_BLD])
  np.testing.assert_allclose(y_BLD, want, atol=2e-6 * np.abs(want).max())


def test_absorbed_decoding_equals_expanded(monkeypatch):
  module, params = make(lora=LORA, attention='banded', sliding_window=5)
  tokens = models.tokens(2, 8)
  whole = jax.jit(lambda p: models.logits(module, p, tokens))(params)
  asked = []
  module.apply({'params': params}, tokens, keep_attention=True)
  monkeypatch.setattr(latent, 'is_absorbed', lambda *args: not asked.append(1))
  models.close(whole, models.decoded(module, params, tokens, 6), 1e-5)
  assert asked


def test_a_cache_has_the_latent_and_the_turned_key_alone():
  c = architectures.resolve(models.config('llama', **LATENT))
  cache = architectures.init_cache(c, 3, 7)
  assert [x.shape for x in jax.tree.leaves(cache)] == [(2, 3, 7, 1, 10 + 4)]
  config = base.base()
  config.model = models.config('llama', dtype='bfloat16', **LATENT)
  assert totals.count(config, 16)['kv_cache_bytes_per_token'] == 2 * 14 * 2



