"""Combinations of parts, drawn at random, through the laws of a decoder:
causality, scan = loop, decode = forward. PRODUCT_CASES draws more of them.

To compile each law would take minutes. So the model is compiled once, as a scan
over its layers; decoding through the cache is run operation by operation, whose
small programs all combinations share. There the layers are a loop, so that one
comparison is of two laws.
"""

import os
import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import ffn, mixers, norms
from architectures.parts.blocks import BLOCKS
from architectures.parts.moe import routing
from architectures.parts.positions import POSITIONS
from tests.helpers import models

CASES = int(os.environ.get('PRODUCT_CASES', 4))
FFNS = (*ffn.FFNS, 'moe')
ATTENTIONS = {
    'global': {},
    'grouped': dict(pattern='grouped,whole', kinds=dict(
        grouped=dict(num_kv_heads=2), whole={})),
    'banded': dict(attention='banded', sliding_window=3),
    'capped': dict(attention_softcap=5.0, value_residual=True,
                   value_embedding=True),
    'qk_norm': dict(qk_norm=True, attention_gate='headwise'),
    'sinks': dict(attention_sinks=True, qk_norm=True, num_kv_heads=2,
                  qk_norm_over='projection', attention_out_bias=False,
                  attention_gate='elementwise'),
    'latent': dict(mixer='latent', latent=dict(q_rank=6),
                   attention_gate='headwise'),
    # Each recurrence beside attention.
    **{name: dict(pattern='state,whole', kinds=dict(
        state=dict(mixer=name, position='none'), whole={}))
       for name, row in mixers.MIXERS.items() if row.state}}
# Experts that choose are refused in a decoder; and uniform deals tokens by
# their place in the batch, so to decode is to deal otherwise.
ROUTERS = [name for name, router in routing.ROUTERS.items()
           if not router.experts_choose and name != 'uniform']
LENGTH, CHANGED = 8, 5  # the token that a twin of each row has otherwise


def combination(seed):
  """Returns the fields of config.model of a combination of parts."""
  draw = random.Random(seed).choice
  router = draw(ROUTERS)
  return dict(
      d_model=16, d_ff=24, max_len=LENGTH, position=draw(list(POSITIONS)),
      block=draw(list(BLOCKS)), norm=draw(list(norms.NORMS)), ffn=draw(FFNS),
      moe=dict(num_experts=3, d_ff=12, ffn='swiglu', router=router,
               top_k=routing.ROUTERS[router].top_k or 2),
      **dict(attention='global') | ATTENTIONS[draw(list(ATTENTIONS))])


def drawn(module):
  """Returns parameters all off their tidy initial values."""
  with jax.disable_jit():
    shapes = nn.meta.unbox(jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(
      0.3 * rng.normal(size=x.shape), x.dtype), shapes['params'])


def _decode(module, params, tokens):
  """Logits by the cache: six tokens at once, then one and one."""
  cache = architectures.init_cache(module.config, len(tokens), LENGTH)
  logits = []
  for first, end in ((0, 6), (6, 7), (7, 8)):
    out = module.apply(
        {'params': params}, tokens[:, first:end], cache=cache,
        positions_BL=jnp.arange(first, end)[None])
    cache = out.cache
    logits.append(out.logits)
  return jnp.concatenate(logits, 1)


def check_laws_of(module, params):
  row = models.tokens(1, LENGTH)
  twin = row.at[:, CHANGED].set((row[:, CHANGED] + 1) % models.VOCAB)
  tokens = jnp.concatenate([row, twin])
  scan = jax.jit(lambda p: models.logits(module, p, tokens))(params)
  # Causality: a later token does not change an earlier prediction.
  scan = np.asarray(scan)
  np.testing.assert_allclose(scan[0, :CHANGED], scan[1, :CHANGED], atol=1e-5)
  assert not np.allclose(scan[0, CHANGED:], scan[1, CHANGED:], atol=1e-3)
  with jax.disable_jit():  # where lax.scan is a loop
    loop = np.asarray(_decode(module, params, tokens))
  np.testing.assert_allclose(scan, loop, atol=1e-5 * np.abs(scan).max())


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(CASES))
def test_laws_of_a_combination(seed):
  fields = combination(seed)
  print(fields)
  module = architectures.build(models.config('gpt', **fields))
  check_laws_of(module, drawn(module))
