"""Attention to entries of several tokens: documents, decoding, and what counts.
Recordings of DeepSeek-V4 say what its layers compute
(tests/training/hf/parity_test.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import blocks
from architectures.parts import positions
from architectures.parts.attention import compressed
from architectures.parts.config import LayerKind
from common.errors import RequestError
from tests.helpers import models
from training import generate
from training.costs import flops

MIXERS = [name for name, row in blocks.MIXERS.items() if getattr(
    row.settings, 'GROUP', '') == 'compressed']
FIELDS = dict(
    num_layers=2, compressed=dict(window=5, csa_rate=2, hca_rate=3, q_rank=24,
                                  out_groups=2, out_rank=8),
    indexer=dict(top_k=2, head_dim=8), attention_sinks=True,
    rope=dict(fraction=0.5, interleaved=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    'mixer', models.mark_long_except(('hca', 'csa'), MIXERS))
def test_documents_and_prompts_of_a_batch_are_apart(mixer):
  """Windows begin with a document, whether or not positions do; and rows of
  other lengths, whose padding closes windows too, go on as they would alone."""
  module, params = models.make_model('llama', mixer=mixer, **FIELDS)
  logits = jax.jit(lambda *x, **ids: models.logits(module, params, *x, **ids))
  sizes = 15, 2, 10  # the first and the last as long as what is written below
  texts = [models.random_tokens(1, n, seed=n) for n in sizes]
  apart = jnp.concatenate([logits(text) for text in texts], 1)
  ids = dict(segment_ids_BL=np.repeat([1, 2, 3], sizes)[None])
  for places in {}, dict(positions_BL=np.concatenate(
      [np.arange(n) for n in sizes])[None]):
    models.assert_trees_close(logits(jnp.concatenate(texts, 1), **ids,
                                     **places), apart,
                              2e-5)
  prompts, lengths = models.random_tokens(2, 9, seed=5), (9, 4)
  new = generate.generate(
      module, params, prompts, jnp.array(lengths), jax.random.key(0),
      max_new_tokens=6, sampling=generate.Sampling(temperature=0))
  for prompt, n, row in zip(prompts, lengths, new):
    text = np.concatenate([prompt[:n], row])
    np.testing.assert_array_equal(
        logits(text[None])[0].argmax(-1)[n - 1:-1], row)


@pytest.mark.parametrize('mixer, entries, seen', [
    ('swa', 0, 0), ('hca', 5, sum((i + 1) // 3 for i in range(16))),
    ('csa', 8, sum(min(2, (i + 1) // 2) for i in range(16)))])
def test_what_is_seen_is_counted_and_kept(mixer, entries, seen):
  """Of 16 tokens by hand: pairs, FLOPs, and what a cache holds."""
  c = architectures.resolve(models.small_config('llama', mixer=mixer, **FIELDS))
  pairs = seen + sum(min(i + 1, 5) for i in range(16))
  layer = blocks.MIXERS[mixer].module(c, LayerKind('global', 'swiglu'))
  assert layer._count_pairs(16, 16) == pairs
  of_index = 2 * 4 * 8 * sum((i + 1) // 2 for i in range(16)) * (mixer == 'csa')
  weighed = sum((i + 1) // 2 for i in range(16)) * 2 * 4 * (mixer == 'csa')
  got = flops.forward_flops(c, 16)['attention']
  assert got == pytest.approx(2 * (
      2 * 2 * c.num_heads * c.head_dim * pairs + of_index + weighed))
  inputs = architectures.init_cache(c, 1, 16)[0].mixer.inputs
  assert {name: x.shape[2:] for name, x in inputs.items()} == ({
      'entry': (entries, 8), 'entry_open': (
          {'hca': 2, 'csa': 3}[mixer], {'hca': 16, 'csa': 32}[mixer])} | ({
              'index': (8, 8), 'index_open': (3, 32)} if mixer == 'csa' else {}
          ) if entries else {})


def test_the_last_features_are_turned_or_as_many_pairs_of_all():
  x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
  at = jnp.arange(3)[None]
  for proportional in (False, True):
    c = architectures.resolve(models.small_config('llama', mixer='hca',
                                                  rope=dict(
        fraction=0.5, proportional=proportional)))
    got = compressed.rotate_last_features(x, at, c, 3)
    whole = positions.rotate_heads(
        x, at, c, 3)
    if not proportional:
      rolled = positions.rotate_heads(jnp.roll(x, 4, -1), at, c, 3)
      whole = jnp.roll(rolled, 4, -1)
    np.testing.assert_array_equal(got, whole)


@pytest.mark.parametrize('changes, words', [
    (dict(attention='indexed'), "attention 'indexed' to global"),
    (dict(position='alibi'), "model.position 'alibi': choose rope"),
    (dict(compressed=dict(out_groups=3)), 'out_groups is 3'),
    (dict(indexer=dict(head_dim=2)), 'model.indexer.head_dim is 2')])
def test_what_it_cannot_be_is_refused(changes, words):
  with pytest.raises(RequestError, match=words):
    architectures.resolve(models.small_config('llama', **FIELDS | changes,
                                              mixer='csa'))
