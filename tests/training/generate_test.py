"""Generation: equal to the plain forward pass, row by row, and its filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import models
from training import generate

LENGTHS = (3, 7, 5)
NEW = 6
LONGROPE = dict(scaling='longrope', short_factor=(1.0, 1.1, 1.3, 1.8),
                long_factor=(1.0, 3.0, 8.0, 30.0))


@pytest.fixture(scope='module', params=['rope', pytest.param(
    'learned', marks=pytest.mark.long)])
def model(request):
  return models.make(position=request.param)


@pytest.fixture(scope='module')
def prompts():
  tokens = models.tokens(3, 7)
  padding = jnp.arange(7)[None] >= jnp.array(LENGTHS)[:, None]
  return jnp.where(padding, 60, tokens)


def greedy(model, prompts, lengths=LENGTHS, new=NEW, **kwargs):
  return np.asarray(generate.generate(
      *model, prompts, jnp.array(lengths), jax.random.key(0),
      max_new_tokens=new, sampling=generate.Sampling(temperature=0), **kwargs))


def searched(model, prompts, lengths=LENGTHS, new=NEW):
  return np.asarray(generate.beam_search(
      *model, prompts, jnp.array(lengths), max_new_tokens=new,
      beams=generate.Beams(2))[0][:, 0])


def test_greedy_equals_the_forward_pass_row_by_row(model, prompts):
  for row, length, new in zip(prompts, LENGTHS, greedy(model, prompts)):
    text = jnp.concatenate([row[:length], new])[None]
    best = models.logits(*model, text)[0].argmax(-1)
    np.testing.assert_array_equal(best[length - 1:-1], new)


@pytest.mark.parametrize('system, scaling', [
    ('phi3', LONGROPE), ('llama', dict(scaling='dynamic'))])
@pytest.mark.parametrize('write', [greedy, pytest.param(
    searched, marks=pytest.mark.long)])
def test_a_text_depends_neither_on_the_others_nor_on_its_room(
    system, scaling, write, prompts):
  """Where rows of more than 5 tokens turn otherwise."""
  module, params = models.make(system, num_layers=1, head_dim=8, rope=dict(
      scaling, original_len=5, factor=4.0))
  model = module, jax.tree.map(lambda x: 3 * x, params)
  written = write(model, prompts)
  # Which text is the likeliest of all depends on how long it is.
  more = 9 if write is greedy else 0
  alone = write(model, prompts[:1, :LENGTHS[0]], LENGTHS[:1], NEW + more)
  np.testing.assert_array_equal(alone[0, :NEW], written[0])
  if module.REREADS and write is greedy:
    rows, lengths = np.arange(len(LENGTHS)), np.array(LENGTHS)
    tokens = np.pad(prompts, ((0, 0), (0, NEW)))
    apply = jax.jit(lambda tokens, lengths: models.logits(
        *model, tokens, lengths_B=lengths))
    for t in range(NEW):
      logits = np.asarray(apply(tokens, lengths + t))[rows, lengths + t - 1]
      np.testing.assert_array_equal(logits.argmax(-1), written[:, t])
      tokens[rows, lengths + t] = written[:, t]


@pytest.mark.slow
def test_a_prefix_lm_reads_its_prompt_in_both_directions(prompts):
  module, params = models.make(position='rope', tie_embeddings=False)
  model = module, jax.tree.map(lambda x: 4 * x, params)  # attention counts
  lengths = jnp.array(LENGTHS)
  written = greedy(model, prompts, prefix_B=lengths)
  # What training computes, whose prefix is the prompt.
  apply = jax.jit(lambda t, n: models.logits(*model, t, prefix_B=n))
  tokens = np.pad(prompts, ((0, 0), (0, NEW)))
  for row, new in zip(range(len(LENGTHS)), written):
    tokens[row, LENGTHS[row]:LENGTHS[row] + NEW] = new
  best, causal = (np.asarray(apply(tokens, n)).argmax(-1)
                  for n in (lengths, 0 * lengths))
  for row, length in enumerate(LENGTHS):
    places = slice(length - 1, length + NEW - 1)
    np.testing.assert_array_equal(best[row, places], written[row])
    assert (causal[row, places] != written[row]).any()


def test_a_row_that_stops_stays_stopped(model, prompts):
  plain = greedy(model, prompts)
  stop = int(plain[1, 2])
  stopped = greedy(model, prompts, stop_token=stop)
  for row, free in zip(stopped, plain):
    ends = np.flatnonzero(free == stop)
    end = ends[0] if ends.size else NEW
    np.testing.assert_array_equal(row[:end + 1], free[:end + 1])
    assert (row[end:] == stop).all()


@pytest.mark.parametrize('settings', [
    dict(temperature=0.7, min_p=0.3), dict(min_p=0.1, top_k=5),
    dict(repetition_penalty=1.3, min_p=0.2), dict(repetition_penalty=0.8)])
def test_the_sampler_against_loops(settings):
  """Token by token, as the papers have it."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 11)).astype(np.float32) * 2
  seen = rng.random((3, 11)) < 0.4
  sampling = generate.Sampling(**settings)
  got = sampling.filter(sampling.penalize(jnp.array(logits), jnp.array(seen)))
  for row, before, out in zip(logits, seen, np.asarray(got)):
    row = [x if not s else x / sampling.repetition_penalty if x > 0
           else x * sampling.repetition_penalty for x, s in zip(row, before)]
    row = np.array(row) / sampling.temperature
    if sampling.top_k:
      row[np.argsort(-row)[sampling.top_k:]] = -np.inf
    p = np.exp(row) / np.exp(row).sum()
    row[p < sampling.min_p * p.max()] = -np.inf
    np.testing.assert_allclose(out, row, rtol=1e-5)


def test_a_penalty_counts_the_prompt_and_what_was_written(model, prompts):
  """So hard that no token comes twice. Padding does not count, here with the
  token that the first row, alone, would write."""
  def write(rows, lengths):
    return np.asarray(generate.generate(
        *model, jnp.array(rows), jnp.array(lengths), jax.random.key(0),
        max_new_tokens=NEW, sampling=generate.Sampling(
            temperature=0, repetition_penalty=1e6)))
  alone = write(prompts[:1, :LENGTHS[0]], LENGTHS[:1])
  padded = np.where(np.arange(7)[None] < np.array(LENGTHS)[:, None], prompts,
                    alone[0, 0])
  written = write(padded, LENGTHS)
  np.testing.assert_array_equal(written[:1], alone)
  for row, length, new in zip(padded, LENGTHS, written):
    assert len({*row[:length], *new}) == len({*row[:length]}) + NEW
