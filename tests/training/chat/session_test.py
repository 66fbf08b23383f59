"""A conversation of several turns."""

import jax
import numpy as np
import pytest

from configs.errors import RequestError
from tests.helpers import models
from training import generate
from training import chat as chats
from training.data import conversations, tokenizers
from training.objectives import causal

BYTES = tokenizers.load('bytes')
TEMPLATE = conversations.make('a template', (
    "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}"
    '{% endfor %}{% if add_generation_prompt %}a{% endif %}'), BYTES)
CONTEXT = 64


@pytest.fixture(scope='module')
def model():
  return models.make('llama', max_len=CONTEXT, vocab_size=BYTES.vocab_size)


def make(model, talk, **settings):
  own = chats.Engine(*model, CONTEXT, generate.Sampling(temperature=0))
  return own, chats.Session(own, BYTES, talk, **dict(most=4) | settings)


def ask(own, text, **settings):
  return ''.join(own.ask(text, **settings))


def test_of_a_second_turn_only_what_is_new_is_read(model):
  talk = causal.templated(TEMPLATE)
  own, talking = make(model, talk)
  first = ask(talking, 'hé')
  asked = len(talk.encode(talking.messages[:1]))
  # The last token of an answer is drawn, and read with what follows.
  assert own.num_read == asked + 3 and talking.ended == 'length'
  second = ask(talking, 'xyz')
  assert [m['content'] for m in talking.messages] == ['hé', first, 'xyz',
                                                      second]
  whole = talk.encode(talking.messages[:3])
  if len(first.encode()) == 4:  # every byte was spelt: nothing reads otherwise
    assert own.num_read == len(whole) + 3
  # As from the beginning, in one pass.
  fresh = np.asarray(generate.generate(
      *model, whole[None], np.array([len(whole)]), jax.random.key(0),
      max_new_tokens=4, sampling=generate.Sampling(temperature=0)))[0]
  assert second == BYTES.decode(fresh)


class Scripted:
  """An engine that draws the bytes of a text, and then the separator."""
  context = CONTEXT

  def __init__(self, text):
    self.left = [*text.encode(), BYTES.eos_id]

  def draw(self, ids):
    return self.left.pop(0)


@pytest.mark.parametrize('written, settings, answer, ended', [
    ('Hi!', {}, 'Hi!', 'end'), ('Hi! U: x', dict(stops=[' U:']), 'Hi!', 'stop'),
    ('Hi!', dict(most=2), 'Hi', 'length'), ('Hé', dict(most=2), 'H\ufffd',
                                            'length')])
def test_an_answer_ends(written, settings, answer, ended):
  talking = chats.Session(Scripted(written), BYTES, causal.templated(TEMPLATE),
                            **dict(most=20) | settings)
  assert ask(talking, 'a') == answer
  assert talking.messages[-1]['content'] == answer and talking.ended == ended


def test_an_answer_can_be_interrupted_and_goes_on(model):
  _, talking = make(model, causal.templated(TEMPLATE), most=20)
  came = []
  answer = ask(talking, 'a', stopped=lambda: came.append(1) or len(came) > 4)
  assert talking.ended == 'interrupted' and len(came) < 8
  assert talking.messages[-1] == dict(role='assistant', content=answer)
  ask(talking, 'b')
  assert len(talking.messages) == 4


def test_a_conversation_that_is_too_long_is_refused_and_stays(model):
  _, talking = make(model, causal.templated(TEMPLATE))
  ask(talking, 'a')
  before = list(talking.messages)
  with pytest.raises(RequestError, match='has 80 tokens.*room for 64.*/res'):
    ask(talking, 'b' * 60)
  assert talking.messages == before
  ask(talking, 'b')
  # An answer for which there is no more room is cut off.
  _, talking = make(model, causal.templated(TEMPLATE), most=99)
  ask(talking, 'b' * 50)
  assert talking.ended == 'context'


def test_the_system_text_and_a_new_conversation(model):
  _, talking = make(model, causal.templated(TEMPLATE), system='be brief')
  alone = ask(talking, 'a')
  talking.reset()
  assert ask(talking, 'a') == alone
  assert talking.messages == [dict(role='user', content='a'),
                              dict(role='assistant', content=alone)]
  refuses = conversations.make('gemma', (
      "{% if messages[0].role == 'system' %}"
      "{{ raise_exception('no system') }}{% endif %}"), BYTES)
  with pytest.raises(RequestError, match='gemma fails: no system'):
    make(model, causal.templated(refuses), system='x')
  with pytest.raises(RequestError, match='goes on from the text'):
    make(model, causal.goes_on(BYTES), system='x')


def test_a_model_of_plain_text_goes_on_from_lines():
  talk = causal.goes_on(BYTES)
  ids = talk.encode([dict(role='user', content='To be'),
                     dict(role='assistant', content=', or'),
                     dict(role='user', content='That')])
  assert ids[0] == BYTES.eos_id and BYTES.decode(ids) == 'To be, or\nThat'
  assert causal.goes_on(BYTES, 7).encode([])[0] == 7
