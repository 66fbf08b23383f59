"""Generation: equal to the plain forward pass, row by row, and its filters."""

import dataclasses
import re

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
  return models.make_model(position=request.param)


@pytest.fixture(scope='module')
def prompts():
  tokens = models.random_tokens(3, 7)
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


# A later layer, which sees what has turned, has a state.
STATE = dict(pattern='seen,state', kinds=dict(seen={}, state=dict(
    mixer='short_conv', attention='global')))


@pytest.mark.parametrize('system, scaling, changes', [
    ('phi3', LONGROPE, STATE), ('phi3', LONGROPE, dict(num_layers=4)),
    ('llama', dict(scaling='dynamic'), dict(
        memory='engram', ngrams=dict(rows=40, heads=2)))])
@pytest.mark.parametrize('write', [greedy, pytest.param(
    searched, marks=pytest.mark.long)])
def test_a_text_depends_neither_on_the_others_nor_on_its_room(
    system, scaling, changes, write, prompts, monkeypatch):
  """Where rows of more than 5 tokens turn otherwise. With the caches of layers
  apart, or stacked, as those of a deep model."""
  monkeypatch.setattr(generate, 'UNROLLED_LAYERS', 2)
  module, params = models.make_model(
      system, **dict(num_layers=2, head_dim=8, rope=dict(
          scaling, original_len=5, factor=4.0)) | changes)
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
  module, params = models.make_model(position='rope', tie_embeddings=False)
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


@pytest.mark.parametrize('text', ['', 'a', 'ab', 'cab', 'abab', 'b. a.', 'cc'])
def test_a_text_ends_before_the_first_of_its_stops(text):
  """Of strings and of tokens, wherever it is; without one it is whole."""
  for stops in (['a'], ['ab', 'b'], ['b', 'a'], ['.']):
    left = [text.split(stop)[0] for stop in stops]
    assert generate.text_before_stop(text, stops) == min(left, key=len)
  assert generate.text_before_stop(text, []) == text
  tokens = np.array([ord(letter) for letter in text], int)
  for stop, ends in ((ord('a'), '[a]'), ((ord('a'), ord('.')), '[a.]')):
    kept = generate.tokens_before_stop(tokens, stop)
    assert ''.join(chr(token) for token in kept) == re.split(ends, text)[0]


FILTERS = [
    dict(), dict(temperature=0.6), dict(top_k=1), dict(top_k=4), dict(top_k=50),
    dict(top_p=0.05), dict(top_p=0.5), dict(top_p=0.9), dict(min_p=0.3),
    dict(min_p=1.0), dict(repetition_penalty=1.3), dict(repetition_penalty=0.8),
    dict(temperature=2.0, top_k=6, top_p=0.7, min_p=0.2,
         repetition_penalty=1.3)]


def by_the_papers(logits, seen, settings):
  """Returns the probabilities of one draw, token by token.

  Args:
    logits, seen: of one row, [V].
    settings: as of generate.Sampling.
  """
  penalty = settings.get('repetition_penalty', 1.0)
  row = np.array(logits, np.float64)
  for token in np.flatnonzero(seen):
    row[token] *= penalty if row[token] < 0 else 1 / penalty
  weight = np.exp(row / settings.get('temperature', 1.0))
  order = np.argsort(-weight)
  if settings.get('top_k'):
    weight[order[settings['top_k']:]] = 0
  share, before = weight / weight.sum(), 0.0
  for token in order:
    if before >= settings.get('top_p', 1.0):
      weight[token] = 0
    before += share[token]
  weight[weight < settings.get('min_p', 0.0) * weight.max()] = 0
  return weight / weight.sum()


@pytest.mark.parametrize('settings', FILTERS, ids=str)
def test_the_sampler_against_its_definition(settings):
  """Each filter alone, and all together; with temperature 0, the likeliest."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(20, 11)).astype(np.float32) * 2
  seen = rng.random((20, 11)) < 0.4
  sampling = generate.Sampling(**settings)
  left = sampling.mask_unlikely(sampling.penalize(logits, seen))
  want = [by_the_papers(*row, settings) for row in zip(logits, seen)]
  np.testing.assert_allclose(jax.nn.softmax(left), want, rtol=2e-5, atol=1e-7)
  greedy = dataclasses.replace(sampling, temperature=0)
  np.testing.assert_array_equal(
      greedy(logits, jax.random.key(0), seen), np.argmax(want, -1))


def chance(tokens, p_V):
  """Asserts that tokens are drawn by their probabilities, each by itself: they
  are as often equal to those beside, below and otherwise apart as chance has
  it, within five standard deviations."""
  shares = np.bincount(tokens.ravel(), minlength=len(p_V)) / tokens.size
  spread = 5 * np.sqrt(p_V * (1 - p_V) / tokens.size)
  assert (np.abs(shares - p_V) <= spread).all(), (shares, p_V)
  alike(tokens[:, 1:], tokens[:, :-1], p_V)
  alike(tokens[1:], tokens[:-1], p_V)
  alike(tokens[1:, 1:], tokens[:-1, :-1], p_V)


def alike(a, b, p_V):
  """Asserts that two arrays are equal at as many places as chance has it."""
  both = (p_V ** 2).sum()
  assert abs((a == b).mean() - both) < 5 * (both * (1 - both) / a.size) ** 0.5


@pytest.mark.parametrize('settings', [
    dict(), dict(temperature=0.5, top_k=4), dict(top_p=0.6), dict(min_p=0.5)],
                         ids=str)
def test_each_token_of_each_text_is_a_draw_of_its_own(settings):
  """Of a model that says the same after every token. Another key is another
  text, and a key gives its text again."""
  logits_V = np.array([0.5, -1.0, 1.0, 0.0, 0.7, -0.3])
  module, params = models.make_bigram(np.tile(logits_V, (1, 6, 1)))
  sampling = generate.Sampling(**settings)

  def write(seed):
    return np.asarray(generate.generate(
        module, params, jnp.zeros((60, 2), jnp.int32), jnp.full(60, 2),
        jax.random.key(seed), max_new_tokens=50, sampling=sampling))

  p_V = by_the_papers(logits_V, np.zeros(6, bool), settings)
  text, other = write(0), write(1)
  chance(text, p_V)
  alike(text, other, p_V)
  np.testing.assert_array_equal(text, write(0))


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
