"""What is drawn is what the whole text says, and only new tokens are read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import models
from training import generate
from training import chat

GREEDY = generate.Sampling(temperature=0)
CONTEXT = 24


@pytest.fixture(scope='module', params=['rope', *(pytest.param(
    name, marks=pytest.mark.slow) for name in ('learned', 'scanned'))])
def model(request):
  return models.make('llama', max_len=CONTEXT,
                     position=request.param.replace('scanned', 'rope'))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch, request):
  monkeypatch.setattr(chat, 'PIECES', (1, 4, 8))
  if 'scanned' in request.node.name:
    monkeypatch.setattr(generate, 'UNROLLED_LAYERS', 0)


@functools.partial(jax.jit, static_argnums=0)
def _logits(module, params, tokens):
  return models.logits(module, params, tokens)


def _next(model, ids):
  tokens = np.zeros((1, CONTEXT), np.int32)
  tokens[0, :len(ids)] = ids
  return int(_logits(*model, jnp.array(tokens))[0, len(ids) - 1].argmax())


def test_two_turns_are_what_a_forward_pass_says_up_to_the_last_slot(model):
  own = chat.Engine(*model, CONTEXT, GREEDY)
  ids = [5, 17, 3, 44, 9, 12, 13, 2, 7, 30, 41]
  read = 0
  for new in ([], [8, 8, 1], [6] * 5):
    ids += new
    for _ in range(2 if len(ids) < 20 else CONTEXT - len(ids)):
      token = own.draw(ids)
      assert token == _next(model, ids), len(ids)
      read = len(ids)  # of these, each once
      assert own.num_read == read
      ids.append(token)
  assert own.draw(ids) == _next(model, ids) and len(ids) == CONTEXT


def test_what_changes_is_read_again_from_there(model):
  own = chat.Engine(*model, CONTEXT, GREEDY)
  first = [5, 17, 3, 44, 9, 12]
  own.draw([*first, 50, 51, 52])
  assert own.draw([*first, 50, 9]) == _next(model, [*first, 50, 9])
  assert own.num_read == 9 + 1
  assert own.draw(first) == _next(model, first)  # the last one, for its logits
  assert own.num_read == 9 + 1 + 1
  other = [1, *first]
  assert own.draw(other) == _next(model, other)
  assert own.num_read == 9 + 1 + 1 + 7


def test_draws_follow_the_seed_and_go_on(model):
  sampling = generate.Sampling(temperature=5.0)
  def draws(seed):
    own = chat.Engine(*model, CONTEXT, sampling, seed)
    return [own.draw([1, 2, 3]) for _ in range(8)]
  assert draws(0) == draws(0) != draws(1)
  assert len(set(draws(0))) > 1


def test_a_penalty_counts_the_whole_conversation(model):
  own = chat.Engine(*model, CONTEXT, generate.Sampling(
      temperature=0, repetition_penalty=1e6))
  ids = [5, 17, 3]
  for _ in range(6):
    ids.append(own.draw(ids))
  assert len(set(ids)) == len(ids)
