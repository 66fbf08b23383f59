"""The product of all parts through the laws: causality, scan = loop, decode =
forward; every wiring with every position encoding and kind of attention, and
on request all of it with every norm and feed-forward network too:

  make product

These are decoders; product_encoders_test.py has the other skeletons.

To compile each law of each variant would take hours. So the model is compiled
once a variant, as a scan over its layers. Decoding through the cache is run
operation by operation, whose small programs all variants share; there the
layers are a loop, so that one comparison is of two laws.
"""

import itertools

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

NORMS = tuple(norms.NORMS)
# But those that differ from another one by what they make of each unit alone.
FFNS = tuple(kind for kind in (*ffn.FFNS, 'moe')
             if kind not in ('gelu_tanh', 'silu', 'geglu_tanh', 'relu2',
                             'reglu', 'swiglu_clamped'))
ATTENTIONS = {
    'global': {},
    'grouped': dict(pattern='grouped,whole', kinds=dict(
        grouped=dict(num_kv_heads=2), whole={})),
    'banded': dict(attention='banded', sliding_window=3),
    'capped': dict(attention_softcap=5.0, value_residual=True,
                   value_embedding=True),
    # What adds nothing to another is tried beside it.
    'qk_norm': dict(qk_norm=True, attention_gate='headwise'),
    'sinks': dict(attention_sinks=True, qk_norm=True, num_kv_heads=2,
                  qk_norm_over='projection', attention_out_bias=False,
                  attention_gate='elementwise'),
    'latent': dict(mixer='latent', latent=dict(q_rank=6),
                   attention_gate='headwise'),
}
PARTS = dict(position=tuple(POSITIONS), block=tuple(BLOCKS),
             attention=tuple(ATTENTIONS), norm=NORMS, ffn=FFNS)
WHOLE = [dict(zip(PARTS, values))
         for values in itertools.product(*PARTS.values())]
# Each position with each block and each attention; norms and networks turn
# round them.
TRIPLES = [
    dict(position=p, block=b, attention=a, norm=NORMS[(i + j + k) % len(NORMS)],
         ffn=FFNS[(i + 2 * j + 3 * k + i // 5) % len(FFNS)])
    for (i, p), (j, b), (k, a) in itertools.product(
        enumerate(POSITIONS), enumerate(BLOCKS), enumerate(ATTENTIONS))]
# Each recurrence alone, with each block, and beside attention, with each
# position; the rest turns round them.
RECURRENCES = tuple(name for name, row in mixers.MIXERS.items() if row.state)
ALONE = tuple(name for name, row in POSITIONS.items() if row.embed or (
    name == 'none'))  # those that are not read by a layer
MIXED = {name: dict(mixer=name) for name in RECURRENCES} | {
    f'{name},attention': dict(pattern='state,whole', kinds=dict(
        state=dict(mixer=name, position='none'), whole={}))
    for name in RECURRENCES}
MIXTURES = [
    dict(position=p, block=b, attention=a, norm=NORMS[i % len(NORMS)],
         ffn=FFNS[-1 - (i + j) % len(FFNS)])
    for j, name in enumerate(RECURRENCES)
    for i, (p, b, a) in enumerate((
        *((ALONE[k % len(ALONE)], b, name) for k, b in enumerate(BLOCKS)),
        *((p, tuple(BLOCKS)[k % len(BLOCKS)], f'{name},attention')
          for k, p in enumerate(POSITIONS))))]
LENGTH, CHANGED = 8, 5  # the token that a twin of each row has otherwise


# Experts that choose are refused in a decoder; and uniform deals tokens by
# their place in the batch, so to decode is to deal otherwise.
ROUTERS = [name for name, router in routing.ROUTERS.items()
           if not router.experts_choose and name != 'uniform']


def _rows(product):
  """Returns {position and block: its variants}."""
  rows = {}
  for parts in product:
    rows.setdefault(f'{parts["position"]}-{parts["block"]}', []).append(parts)
  return rows


def variant(parts, system='gpt', **moe):
  """Returns (module, parameters all off their tidy initial values)."""
  changes = dict(d_model=16, d_ff=24, max_len=LENGTH) | parts
  changes |= dict(attention='global') | (ATTENTIONS | MIXED)[
      changes.pop('attention')]
  if parts['ffn'] == 'moe':
    changes['moe'] = dict(num_experts=3, top_k=2, d_ff=12, ffn='swiglu') | moe
  module = architectures.build(models.config(system, **changes))
  return module, drawn(module)


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


def check_laws(parts, **moe):
  check_laws_of(*variant(parts, **moe))


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


def _some(product, kept):
  """Each of some variants; those not among the first `kept` are `long`."""
  return [pytest.param(parts, id='-'.join(parts.values()), marks=[
      pytest.mark.slow, *[pytest.mark.long] * (i >= kept)])
          for i, parts in enumerate(product)]


@pytest.mark.parametrize('parts', _some(TRIPLES, 2))
def test_laws_of_positions_blocks_and_attentions(parts):
  check_laws(parts)


@pytest.mark.slow
@pytest.mark.parametrize('parts', [
    pytest.param(parts, id='-'.join(parts.values()), marks=[
        pytest.mark.long] * (i != 8))
    for i, parts in enumerate(MIXTURES)])
def test_laws_of_recurrences(parts):
  check_laws(parts)


@pytest.mark.slow
@pytest.mark.parametrize('router', [
    pytest.param(router, marks=[pytest.mark.long] * (i > 0))
    for i, router in enumerate(ROUTERS)])
def test_laws_of_routers(router):
  check_laws(dict(position='rope', block='pre_norm', attention='global',
                  norm='rmsnorm', ffn='moe'), router=router,
             top_k=routing.ROUTERS[router].top_k or 2)


@pytest.mark.product
@pytest.mark.parametrize('row', _rows(WHOLE))
def test_laws_of_the_whole_product(row):
  for parts in _rows(WHOLE)[row]:
    try:
      check_laws(parts)
    except Exception as error:
      raise AssertionError(f'{parts}: {error}') from error


def test_every_pair_of_parts_meets():
  for a, b in itertools.combinations(PARTS, 2):
    met = {(parts[a], parts[b]) for parts in TRIPLES}
    assert met == set(itertools.product(PARTS[a], PARTS[b])), (a, b)
  for name in RECURRENCES:
    own = [parts for parts in MIXTURES if name in parts['attention'].split(',')]
    for field, choices in (('position', POSITIONS), ('block', BLOCKS),
                           ('norm', NORMS), ('ffn', FFNS)):
      assert {parts[field] for parts in own} == set(choices), (name, field)


@pytest.mark.slow
def test_the_laws_can_fail(monkeypatch):
  """A model that sees what comes later, and one whose cache forgets."""
  from architectures.parts.attention import cache, visibility
  parts = TRIPLES[0]
  with monkeypatch.context() as patch:
    patch.setattr(visibility, 'visible', lambda *args: None)
    with pytest.raises(AssertionError):
      check_laws(parts)
  with monkeypatch.context() as patch:
    patch.setattr(cache.Cache, 'write', lambda self, *args: self)
    with pytest.raises(AssertionError):
      check_laws(parts)
  from architectures.parts.recurrent import recurrence
  run = recurrence.run
  monkeypatch.setattr(recurrence, 'run', lambda x, state=None: run(x))
  with pytest.raises(AssertionError):
    check_laws(MIXTURES[0])
