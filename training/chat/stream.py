"""The text of an answer while its tokens come, one by one.

What cannot be shown yet is held back: bytes that are no whole character, and
what may be the beginning of a stop string.
"""

import codecs
from collections.abc import Sequence

from training import generate
from training.data.tokenizers import Tokenizer

REPLACEMENT = '\ufffd'  # what decoders write for bytes that are no character


class Stream:
  """An answer that grows.

  Args:
    tokenizer: the model's.
    stops: strings before which the answer ends.
    lead: what the answer may begin with that is no part of it.
    prompt: the ids of a text that the answer goes on from; (): of none.

  Attributes:
    stopped: whether a stop string was found.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (),
               lead: str = '', prompt: Sequence[int] = ()):
    self._tokenizer, self._stops, self._lead = tokenizer, stops, lead
    self._prompt = prompt
    self._ids: list[int] = []
    self._shown = 0
    self.stopped = False

  def add(self, token: int) -> str:
    """Returns what can be shown more, now that this token has come."""
    self._ids.append(token)
    text = self._decoded(whole=False)
    cut = generate.before(text, self._stops)
    self.stopped = len(cut) < len(text)
    return self._show(cut if self.stopped else cut[:len(cut) - self._held(cut)])

  def end(self) -> str:
    """Returns what is left to show, now that no token follows."""
    return self._show(self.text)

  @property
  def text(self) -> str:
    """The whole answer so far."""
    return generate.before(self._decoded(whole=True), self._stops)

  def _show(self, text: str) -> str:
    new = text[self._shown:]
    self._shown = max(self._shown, len(text))
    return new

  def _decoded(self, whole: bool) -> str:
    """The text of all tokens, without its lead; of a last character that is
    not `whole` yet, nothing."""
    data = generate.spelt(self._tokenizer, self._ids, self._prompt)
    text = codecs.getincrementaldecoder('utf-8')('replace').decode(data, whole)
    if not whole:  # some tokenizers decode to text, and write it themselves
      text = text.rstrip(REPLACEMENT)
      if self._lead.startswith(text):
        return ''
    return text.removeprefix(self._lead)

  def _held(self, text: str) -> int:
    """How many of the last characters may begin a stop string."""
    return max((size for stop in self._stops for size in range(1, len(stop))
                if text.endswith(stop[:size])), default=0)
