"""Parts through the laws in an encoder and in an encoder-decoder: each block
with each position encoding and with each kind of attention.

What both must show: scan = loop; in the encoder a token sees all others, or a
band of them on either side; in the decoder the source is seen whole and the
target backwards, and decoding through the cache is the forward pass.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from tests.architectures.product_test import ATTENTIONS, BLOCKS, CHANGED, FFNS
from tests.architectures.product_test import LENGTH, NORMS, POSITIONS, variant
from tests.helpers import models

ROWS = [dict(position=p, block=b,
             attention=tuple(ATTENTIONS)[(i + j) % len(ATTENTIONS)],
             norm=NORMS[(i + j) % len(NORMS)],
             ffn=FFNS[(i + 2 * j) % len(FFNS)])
        for j, b in enumerate(BLOCKS) for i, p in enumerate(
            (*POSITIONS, *POSITIONS)[:max(len(POSITIONS), len(ATTENTIONS))])]

ONE_STACK = ('latent',)  # refused with a memory to attend to


def _close(scan, loop):
  np.testing.assert_allclose(scan, loop, atol=1e-5 * np.abs(scan).max())


def _twin(row, place):
  return row.at[:, place].set((row[:, place] + 1) % models.VOCAB)


def check_encoder(parts, **moe):
  module, params = variant(parts, 'bert', **moe)
  row = models.tokens(1, LENGTH)
  tokens = jnp.concatenate([row, _twin(row, CHANGED)])
  # Before the head, whose activation may be 0 in all of so few features.
  run = lambda p: module.apply({'params': p}, tokens).extra['hidden']
  scan = np.asarray(jax.jit(run)(params))
  with jax.disable_jit():  # where lax.scan is a loop
    _close(scan, np.asarray(run(params)))
  reach = module.config.num_layers * (module.config.sliding_window - 1)
  near = np.abs(np.arange(LENGTH) - CHANGED) <= (
      reach if parts['attention'] == 'banded' else LENGTH)
  changed = np.abs(scan[0] - scan[1]).max(-1)
  assert (changed[near] > 1e-4).all()
  np.testing.assert_allclose(changed[~near], 0, atol=1e-5)


def check_encoder_decoder(parts):
  module, params = variant(parts | dict(head_dim=4), 't5')
  source, target = models.tokens(1, 6, seed=2), models.tokens(1, LENGTH)
  # A row, one with another token in the target, one with another in the source.
  targets = jnp.concatenate([target, _twin(target, CHANGED), target])
  sources = jnp.concatenate([source, source, _twin(source, 2)])
  scan = np.asarray(jax.jit(lambda p: module.apply(
      {'params': p}, sources, targets).logits)(params))
  changed, by_source = np.abs(scan[1:] - scan[0]).max(-1)
  np.testing.assert_allclose(changed[:CHANGED], 0, atol=1e-5)
  assert changed[CHANGED:].max() > 1e-3
  assert (by_source > 1e-4).all()
  with jax.disable_jit():
    memory, _ = module.apply({'params': params}, sources, method='encode')
    cache = architectures.init_cache(module.config, len(targets), LENGTH)
    logits = []
    for first, end in ((0, 6), (6, 7), (7, 8)):
      out = module.apply(  # the memory is given once
          {'params': params}, None, targets[:, first:end], cache=cache,
          memory=None if first else memory,
          decoder_positions_BL=jnp.arange(first, end)[None])
      cache = out.cache
      logits.append(out.logits)
  _close(scan, np.concatenate(logits, 1))


@pytest.mark.slow
@pytest.mark.parametrize('check, parts', [
    pytest.param(check, parts, id='-'.join((check.__name__, *parts.values())),
                 marks=[pytest.mark.long] * (
                     check is not check_encoder or i % 2 > 0
                     or parts['block'] != 'post_norm'))
    for check in (check_encoder, check_encoder_decoder)
    for i, parts in enumerate(ROWS)
    if check is check_encoder or (parts['attention'] not in ONE_STACK
                                  and BLOCKS[parts['block']].CROSS)])
def test_laws_of_positions_and_attentions(check, parts):
  check(parts)


@pytest.mark.long
@pytest.mark.slow
def test_laws_of_an_encoder_whose_experts_choose():
  check_encoder(dict(position='learned', block='post_norm', norm='layernorm',
                     attention='global', ffn='moe'), router='expert_choice')


def test_every_block_meets_every_position_attention_and_network():
  for part, values in (('position', POSITIONS), ('attention', ATTENTIONS),
                       ('norm', NORMS), ('ffn', FFNS)):
    for block in BLOCKS:
      assert {parts[part] for parts in ROWS
              if parts['block'] == block} == set(values), (block, part)


@pytest.mark.long
def test_the_laws_can_fail(monkeypatch):
  """An encoder that sees only backwards, a decoder whose cache forgets."""
  from architectures.parts.attention import cache, visibility
  parts, visible = ROWS[0], visibility.visible
  with monkeypatch.context() as patch:
    patch.setattr(visibility, 'visible',
                  lambda kind, *args, **kwargs: visible(
                      kind.__class__(kind.attention, kind.ffn), *args,
                      **kwargs))
    with pytest.raises(AssertionError):
      check_encoder(parts)
  monkeypatch.setattr(cache.Cache, 'write', lambda self, *args: self)
  with pytest.raises(AssertionError):
    check_encoder_decoder(parts)
