"""A conversation: messages, and the answer to each."""

from collections.abc import Callable, Iterator, Sequence
import json
from typing import Any

import numpy as np

from configs.errors import RequestError, require
from training.chat.engine import Engine
from training.chat.stream import Stream
from training.data.tokenizers import Tokenizer
from training.objectives.record import Talk


class Session:
  """A conversation with a model.

  For each answer the whole conversation is laid out again, as transformers does
  it, and the engine reads what its cache has not: the new message, or all from
  where the template writes something else than before.

  Attributes:
    messages: dicts with role and content, the system's not among them.
    system: the system text; '': none.
    ended: why the last answer ended: 'end', the model ended it; 'stop', at a
      stop string; 'length', at `most` tokens; 'context', no room is left;
      'interrupted'.
  """

  def __init__(self, engine: Engine, tokenizer: Tokenizer, talk: Talk, *,
               most: int, stops: Sequence[str] = (), system: str = ''):
    self._engine, self._tokenizer, self._talk = engine, tokenizer, talk
    self._most, self._stops = most, stops
    self.messages: list[dict[str, str]] = []
    self.system, self.ended = '', ''
    if system:
      self.instruct(system)

  def reset(self) -> None:
    """Begins a new conversation, with the same system text."""
    self.messages = []

  def instruct(self, system: str) -> None:
    """Sets the system text, also of the conversation so far; '': none.

    Raises:
      RequestError: where the model's template has no place for it.
    """
    require(not system or self._talk.system, 'a system text has no place: the '
            f'model {self._talk.words}')
    if system:  # a template may have no place for it, either
      self._talk.encode([dict(role='system', content=system),
                         dict(role='user', content='x')])
    self.system = system

  def ask(self, text: str, stopped: Callable[[], bool] = lambda: False
          ) -> Iterator[str]:
    """Yields the answer to a message in pieces, as it is written.

    Args:
      text: the message.
      stopped: whether to end the answer here; asked after each token.

    Raises:
      RequestError: where the conversation has become too long, or its template
        refuses it; it is as before, then.
    """
    asked = [*self.messages, dict(role='user', content=text)]
    ids = self._talk.encode(self._whole(asked))
    require(len(ids) > 0, 'the chat template makes nothing of the '
            f'conversation: the model {self._talk.words}')
    if len(ids) >= self._engine.context:
      raise RequestError(
          f'the conversation has {len(ids):,} tokens with this message, and '
          f'there is room for {self._engine.context:,}, with the answer: '
          'shorten it, begin another with /reset, or pass a larger --context, '
          'up to the max_len of the model')
    self.messages = asked
    stream = Stream(self._tokenizer, self._stops, self._talk.lead,
                    ids.tolist() if self._talk.plain else ())
    try:
      yield from self._written(ids, stream, stopped)
    finally:
      self.messages = [*asked, dict(role='assistant', content=stream.text)]

  def _written(self, ids: np.ndarray, stream: Stream,
               stopped: Callable[[], bool]) -> Iterator[str]:
    self.ended = 'length'
    for _ in range(self._most):
      token = self._engine.draw(ids)
      if token in self._talk.ends:
        self.ended = 'end'
        break
      ids = np.append(ids, np.int32(token))
      if piece := stream.add(token):
        yield piece
      if stream.stopped or stopped() or len(ids) > self._engine.context:
        self.ended = ('stop' if stream.stopped else
                      'interrupted' if stopped() else 'context')
        break
    if piece := stream.end():
      yield piece

  def line(self) -> str:
    """Returns the conversation as a line of a file that data.source reads as
    jsonl:FILE:messages."""
    return json.dumps({'messages': self._whole(self.messages)},
                      ensure_ascii=False) + '\n'

  def _whole(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    system: list[dict[str, Any]] = [dict(role='system', content=self.system)]
    return system * bool(self.system) + messages
