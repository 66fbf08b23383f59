"""Beam search, against all texts that there are and against a plain loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import blocks
from tests.helpers import models
from training import generate

NEW = 5
# So many that texts do end, some of them early.
STOPS = tuple(range(1, models.VOCAB, 2))
STOP = 2  # of the smallest vocabulary
LENGTHS = (3, 6, 4)


@pytest.fixture(scope='module')
def gpt():
  """Logits so far apart that texts differ in more than rounding."""
  module, params = models.make_model('gpt', position='rope')
  return module, jax.tree.map(lambda x: 2 * x, params)


def search(model, prompts, new=NEW, stop=STOPS, lengths=LENGTHS, **options):
  return jax.device_get(generate.beam_search(
      *model, prompts, jnp.array(lengths), max_new_tokens=new,
      beams=generate.Beams(**options), stop_token=stop))


def _divisor(penalty, alpha):
  """The published formulas."""
  return {'gnmt': lambda n: (5 + n) ** alpha / (5 + 1) ** alpha,
          'power': lambda n: n ** alpha}[penalty]


@pytest.mark.parametrize('penalty, alpha', [
    ('gnmt', 0.6), pytest.param('power', 2.5, marks=pytest.mark.long)])
def test_with_enough_beams_the_texts_are_the_best_of_all(penalty, alpha):
  """Of a vocabulary of 4: 1 + 3 + 9 x 4 = 40 texts of up to 3 tokens."""
  module, params = models.make_model('gpt', vocab_size=4, num_layers=1)
  model = module, jax.tree.map(lambda x: 2 * x, params)
  prompt = np.array([[1, 3]])
  every = np.array(list(itertools.product(range(4), repeat=3)))
  rows = np.concatenate([np.repeat(prompt, len(every), 0), every], 1)
  log_p = np.asarray(jax.jit(lambda rows: jax.nn.log_softmax(
      models.logits(*model, rows)))(rows))[:, 1:-1]
  score = {}
  for row, p in zip(every, log_p):
    ends = np.flatnonzero(row == STOP)
    n = ends[0] + 1 if ends.size else 3
    text = (*row[:n], *[STOP] * (3 - n))
    score[text] = p[np.arange(n), row[:n]].sum() / _divisor(penalty, alpha)(n)
  best = sorted(score, key=score.get, reverse=True)
  assert len(best) == 40
  tokens, scores = search(model, prompt, 3, STOP, [2], num_beams=41,
                          penalty=penalty, length_penalty=alpha)
  assert [tuple(row) for row in tokens[0, :40]] == best
  np.testing.assert_allclose(scores[0, :40], [score[text] for text in best],
                             rtol=1e-5)
  assert (scores[0, 40:] <= generate.SCORE_OF_NO_TEXT / 10).all()


def by_the_book(log_p, count, divisor, stops=STOPS, new=NEW):
  """One row, by lists.

  Args:
    log_p: text -> the log-probabilities of the next token.
    count: of beams.
    divisor: length -> what a text's log-probability is divided by.
    stops: tokens that end a text.
    new: how many tokens a text has at most.

  Returns:
    (score, text) of the finished texts, the best first.
  """
  running, finished = [(0.0, ())], []
  for n in range(1, new + 1):
    grown = sorted(((score + p, (*text, token)) for score, text in running
                    for token, p in enumerate(log_p(text))), reverse=True)
    ends = [text[-1] in stops or n == new for _, text in grown]
    finished += [(score / divisor(n), text) for (score, text), end in zip(
        grown[:count], ends) if end]
    finished = sorted(finished, reverse=True)[:count]
    running = [row for row, end in zip(grown, ends) if not end][:count]
    if len(finished) == count and (
        not running or running[0][0] / divisor(n) <= finished[-1][0]):
      break
  return finished


def _log_p(model, prompt):
  """Returns `log_p` of one prompt, by whole passes without a cache."""
  run = jax.jit(lambda tokens_BL: jax.nn.log_softmax(
      models.logits(*model, tokens_BL), -1))
  memo = {}
  def log_p(text):
    if text not in memo:
      row = np.zeros((1, len(prompt) + NEW), np.int32)  # what follows is unseen
      row[0, :len(prompt) + len(text)] = (*prompt, *text)
      memo[text] = np.asarray(run(row))[0, len(prompt) + len(text) - 1]
    return memo[text]
  return log_p


@pytest.fixture(scope='module')
def rows(gpt):
  """Prompts, padded, and `log_p` of each."""
  tokens = models.random_tokens(len(LENGTHS), 6)
  padding = jnp.arange(6)[None] >= jnp.array(LENGTHS)[:, None]
  return jnp.where(padding, 60, tokens), [
      _log_p(gpt, np.asarray(row[:n])) for row, n in zip(tokens, LENGTHS)]


def expect(tokens, scores, expected, stops):
  """Asserts that the texts of a row, and their scores, are the expected."""
  texts = []
  for row in tokens:
    length = len(generate.tokens_before_stop(row, stops))
    texts.append(tuple(row[:length + 1]))
  assert texts[:len(expected)] == [text for _, text in expected]
  np.testing.assert_allclose(
      scores[:len(expected)], [score for score, _ in expected], atol=1e-4)


@pytest.mark.parametrize('count, unrolled_layers', [
    (3, generate.UNROLLED_LAYERS), (2, 0)])
def test_rows_are_searched_as_by_the_book(gpt, rows, monkeypatch, count,
                                          unrolled_layers):
  """With the caches of layers apart, and stacked, as those of a deep model."""
  monkeypatch.setattr(generate, 'UNROLLED_LAYERS', unrolled_layers)
  prompts, log_ps = rows
  tokens, scores = search(gpt, prompts, num_beams=count)
  for row, score, log_p in zip(tokens, scores, log_ps):
    expected = by_the_book(log_p, count, _divisor('gnmt', 0.6))
    assert len(expected) == count
    expect(row, score, expected, STOPS)


@pytest.mark.parametrize('penalty, alpha, stops, count', [
    ('gnmt', 4.0, (2,), 3), ('power', 1.0, (2,), 9),
    ('power', -2.0, (2, 5), 3), ('power', 3.0, (2, 5), 3),
    ('gnmt', 0.6, (2,), 1)])
def test_every_penalty_of_a_length_is_as_by_the_book(penalty, alpha, stops,
                                                     count):
  """Of twenty models whose next token hangs on the last one and its place:
  which texts are kept, how they are scored, and when a row is done. Of every
  other one texts like to end; and there may be more beams than tokens."""
  for seed in range(20):
    table = 2 * np.random.default_rng(seed).normal(size=(6, 7, 7))
    table[..., list(stops)] += 4 * (seed % 2)
    log_p = table - np.log(np.exp(table).sum(-1, keepdims=True))
    tokens, scores = search(
        models.make_bigram(table), np.zeros((1, 1), np.int32), 6, stops, [1],
        num_beams=count, penalty=penalty, length_penalty=alpha)
    expected = by_the_book(
        lambda text, log_p=log_p: log_p[len(text), (0, *text)[-1]], count,
        _divisor(penalty, alpha), stops, 6)
    expect(tokens[0], scores[0], expected, stops)


@pytest.mark.parametrize('mixer', blocks.MIXERS)
def test_a_text_takes_all_that_was_kept_of_the_text_that_it_extends(mixer):
  """Every array of every layer's cache, of three rows each of which has its own
  number in it."""
  chosen = dict(attention='indexed', indexer=dict(top_k=4, block=2))
  cache = architectures.init_cache(models.small_config(
      'llama', mixer=mixer, branch_conv=3, memory='engram', attention_conv=3,
      position='none', **chosen if mixer in ('attention', 'latent') else {}),
                                   3, 8)
  numbered = jax.tree.map(lambda x: np.broadcast_to(np.arange(3).reshape(
      1, 3, *[1] * (x.ndim - 2)), x.shape), cache)
  parents = jnp.array([2, 0, 0])
  for x in jax.tree.leaves(generate._reorder_cache(numbered, parents, 1)):
    rows = np.unique(np.moveaxis(np.asarray(x), 1, 0).reshape(3, -1), axis=1)
    assert rows.tolist() == [[2], [0], [0]]
