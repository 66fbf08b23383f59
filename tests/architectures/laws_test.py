"""What holds of every decoder, whatever its parts: causality, scan = loop,
remat = plain, decode = forward, packed = apart, with gradients. product_test.py
draws combinations of parts."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import positions
from architectures.parts.attention.visibility import visible
from architectures.parts.attention.xla import attend
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import LayerKind
from architectures.parts.norms import NORMS
from architectures.parts.positions import POSITIONS
from tests.helpers import models

ATTENTIONS = {
    'global': {},
    'grouped': dict(num_kv_heads=2),
    'banded': dict(**models.banded(5)),
    'capped': dict(attention_softcap=5.0, num_kv_heads=2,
                   value_residual=True, value_embedding=True),
    # What adds nothing to another is tried beside it.
    'qk_norm': dict(qk_norm=True, attention_gate='headwise'),
    'sinks': dict(attention_sinks=True, qk_norm=True, num_kv_heads=2,
                  qk_norm_over='projection', attention_out_bias=False,
                  attention_gate='elementwise'),
    'latent': dict(mixer='latent', attention_gate='elementwise'),
    'deltanet': dict(pattern='delta,whole', kinds=dict(
        delta=dict(mixer='deltanet', position='none'), whole={})),
}
FFNS = ('gelu', 'swiglu', 'moe')
PARTS = dict(position=POSITIONS, block=BLOCKS, norm=NORMS, ffn=FFNS,
             attention=ATTENTIONS)
# Every value of every part but networks, one that is added too.
VARIANTS = [{part: tuple(values)[i % len(values)]
             for part, values in PARTS.items()}
            for i in range(max(map(len, PARTS.values())))]


def _name(parts):
  return '-'.join(parts.values())


@pytest.mark.slow
@pytest.mark.parametrize('parts', VARIANTS, ids=_name)
def test_laws_of_a_variant(parts):
  changes = dict(parts)
  changes |= dict(attention='global') | ATTENTIONS[changes.pop('attention')]
  module, params = models.make(**changes)
  tokens = models.tokens()
  apply = jax.jit(lambda t: models.logits(module, params, t))
  logits = apply(tokens)
  # Causality: a later token does not change an earlier prediction.
  changed = apply(tokens.at[:, 9].set((tokens[:, 9] + 1) % models.VOCAB))
  np.testing.assert_array_equal(logits[:, :9], changed[:, :9])
  assert not np.allclose(logits[:, 9:], changed[:, 9:])
  # Scan = loop, on the same parameters, gradients too.
  other, _ = models.make(**changes | dict(scan_layers=False))
  def loss(module, params):
    return jnp.square(models.logits(module, params, tokens)).mean()
  models.close(jax.jit(jax.value_and_grad(
      lambda p: loss(module, p)))(params), jax.jit(jax.value_and_grad(
          lambda p: loss(other, p)))(params), rtol=3e-5)
  # Decoding through the cache = the forward pass.
  @jax.jit
  def decode(params, tokens):
    cache = architectures.init_cache(module.config, 2, 16)
    out = module.apply({'params': params}, tokens[:, :8], cache=cache)
    def step(cache, i):
      token = jax.lax.dynamic_slice_in_dim(tokens, i, 1, 1)
      out = module.apply({'params': params}, token, cache=cache,
                         positions_BL=jnp.full((2, 1), i))
      return out.cache, out.logits[:, 0]
    _, rest = jax.lax.scan(step, out.cache, jnp.arange(8, 16))
    return jnp.concatenate([out.logits, jnp.swapaxes(rest, 0, 1)], 1)
  models.close(logits, decode(params, tokens), rtol=3e-5)


@pytest.mark.slow
def test_remat_equals_plain_and_computes_again_what_it_says():
  """In training, where dropout draws: the same loss and gradients; `full`
  takes every product of a layer again in the backward pass, `dots` none."""
  tokens, found, products = models.tokens(), {}, {}
  for remat in ('none', 'full', 'dots'):
    module, params = models.make(
        dropout=0.1, remat=remat, position='rope', block='sandwich', ffn='moe')
    def loss(p, module=module):
      rngs = {name: jax.random.key(3) for name in ('dropout', 'router')}
      return jnp.square(models.logits(module, p, tokens, deterministic=False,
                                      rngs=rngs)).mean()
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
    found[remat] = lowered.compile()(params)
    products[remat] = lowered.as_text().count('dot_general')
  for remat in ('full', 'dots'):
    models.close(found['none'], found[remat], rtol=3e-5)
  assert products['full'] > products['dots'], products


@pytest.mark.slow
def test_causality_by_gradient():
  module, params = models.make()
  x_BLD = jax.random.normal(jax.random.key(3), (1, 8, 32))
  def hidden(table):  # each token its own row: the gradient tells them apart
    p = params | {'embed': params['embed'] | {'tokens': table}}
    return module.apply({'params': p}, jnp.arange(8)[None]).hidden[0].sum(-1)
  table = jnp.zeros((models.VOCAB, 32)).at[:8].set(x_BLD[0])
  grads = jax.jit(jax.jacrev(hidden))(table)
  seen = np.abs(grads[:, :8]).sum(-1) > 0
  np.testing.assert_array_equal(seen, np.tril(np.ones((8, 8), bool)))


WINDOW = types.SimpleNamespace(sliding_window=2)  # of a config
PICTURES = {
    ('global', True): ['x....', 'xx...', 'xxx..', 'xxxx.', 'xxxxx'],
    ('global', False): None,
    ('banded', True): ['x....', 'xx...', '.xx..', '..xx.', '...xx'],
    ('banded', False): ['xx...', 'xxx..', '.xxx.', '..xxx', '...xx'],
}


@pytest.mark.parametrize('attention, causal', PICTURES)
def test_masks_as_pictures(attention, causal):
  positions = jnp.arange(5)[None]
  mask = visible(LayerKind(attention, 'gelu', causal), WINDOW, positions,
                 positions)
  assert _picture(mask) == PICTURES[attention, causal]


def test_masks_of_documents_and_prefixes():
  positions, segments = jnp.arange(5)[None], jnp.array([[1, 1, 2, 2, 2]])
  kind = LayerKind('global', 'gelu')
  assert _picture(visible(kind, WINDOW, positions, positions, segments,
                          segments)
                  ) == ['x....', 'xx...', '..x..', '..xx.', '..xxx']
  assert _picture(visible(kind, WINDOW, positions, positions,
                          prefix_B=jnp.array([3]))
                  ) == ['xxx..', 'xxx..', 'xxx..', 'xxxx.', 'xxxxx']


def _picture(mask):
  if mask is None:
    return None
  return [''.join('x' if seen else '.' for seen in row) for row in mask[0]]


@pytest.mark.slow
def test_packed_documents_do_not_see_each_other():
  module, params = models.make(position='rope')
  a, b = models.tokens(1, 7, seed=4), models.tokens(1, 9, seed=5)
  packed = models.logits(
      module, params, jnp.concatenate([a, b], 1),
      positions_BL=jnp.concatenate([jnp.arange(7), jnp.arange(9)])[None],
      segment_ids_BL=jnp.array([[1] * 7 + [2] * 9]))
  apart = jnp.concatenate([models.logits(module, params, a),
                           models.logits(module, params, b)], 1)
  models.close(apart, packed)


@pytest.mark.slow
def test_learned_positions_end_and_stretch():
  module = architectures.build(models.config(max_len=8))
  params = nn.meta.unbox(
      jax.jit(module.init)(jax.random.key(0), models.tokens(1, 8)))
  params = params['params']
  with pytest.raises(ValueError, match='16 tokens is longer than the 8'):
    models.logits(module, params, models.tokens())
  stretched = architectures.build(models.config(
      max_len=8, learned=dict(stretch=2.0)))
  tokens = models.tokens(1, 4)
  models.close(  # even positions of the stretched model are the old ones
      models.logits(module, params, tokens),
      models.logits(stretched, params, tokens,
                    positions_BL=2 * jnp.arange(4)[None]))
  assert np.isfinite(models.logits(stretched, params, models.tokens())).all()
  for most, length in ((100, 115), (57, 114), (7, 9)):  # quotients that round
    c = architectures.resolve(models.config(
        max_len=most, learned=dict(stretch=length / most)))
    assert positions.reach(c) == length


@pytest.mark.parametrize('field', [
    'dropout', 'attention_dropout', 'ffn_dropout'])
def test_dropout_draws_only_in_training(field):
  module, params = models.make(**{field: 0.5})
  tokens = models.tokens()
  plain = models.logits(module, params, tokens)
  a, b = [models.logits(module, params, tokens, deterministic=False,
                        rngs={'dropout': jax.random.key(i)}) for i in (0, 1)]
  assert not np.allclose(a, b) and not np.allclose(a, plain)


def test_a_dropped_weight_is_zero_and_the_others_make_up_for_it():
  """Queries of zero weigh M keys alike; values of one give the weights back."""
  B, M, H, rate = 4, 32, 4, 0.25
  q = jnp.zeros((B, M, H, M))
  v = jnp.broadcast_to(jnp.eye(M)[:, None], (B, M, H, M))
  weights = attend(q, q, v, scale=1.0, dropout=rate,
                   key=jax.random.key(0))
  models.close(jnp.unique(weights), jnp.array([0, 1 / M / (1 - rate)]))
  assert abs(jnp.mean(weights == 0) - rate) < 0.02  # sd 0.003
  models.close(attend(q, q, v, scale=1.0, dropout=rate),
               jnp.full(q.shape, 1 / M))
