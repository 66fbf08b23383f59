"""What latent attention promises: the cache is small, and decoding on latents
equals decoding on heads. Recordings of DeepSeek-V2, V3 and Kimi Linear say what
it computes (tests/training/hf/parity_test.py)."""

import jax

import architectures
from architectures.parts.attention import latent
from configs import base
from tests.helpers import models
from training.costs import totals

LATENT = dict(mixer='latent', latent=dict(
    q_rank=12, kv_rank=10, nope_dim=6, rope_dim=4, v_dim=5))


def test_absorbed_decoding_equals_expanded(monkeypatch):
  module, params = models.make_model(
      'llama', **LATENT, attention='banded', sliding_window=5,
      lora=dict(rank=2, targets='query_up,kv_up,kv_down,out'))
  tokens = models.random_tokens(2, 8)
  whole = jax.jit(lambda p: models.logits(module, p, tokens))(params)
  asked = []
  module.apply({'params': params}, tokens, keep_attention=True)
  monkeypatch.setattr(latent, 'is_absorbed', lambda *args: not asked.append(1))
  models.assert_trees_close(whole,
                            models.decode_with_cache(module, params, tokens,
                                                     6), 1e-5)
  assert asked


def test_a_cache_has_the_latent_and_the_turned_key_alone():
  c = architectures.resolve(models.small_config('llama', **LATENT))
  cache = architectures.init_cache(c, 3, 7)
  assert [x.shape for x in jax.tree.leaves(cache)] == [(2, 3, 7, 1, 10 + 4)]
  config = base.base()
  config.model = models.small_config('llama', dtype='bfloat16', **LATENT)
  costs = totals.count_costs(config, 16)
  assert costs['kv_cache_bytes_per_token'] == 2 * 14 * 2
