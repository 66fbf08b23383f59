"""The two kinds of failure that are no bug, how they are raised, and the
exception of a program that a signal has stopped.

A program that fails ends in one of three ways (training/cli.py):

* `RequestError`: what was asked for is wrong. One sentence, exit code 2, before
  any work; to run the same command again changes nothing.
* `EnvironmentFailure`: the request is right, and the machine could not do it: a
  full disk, a lost process, a damaged checkpoint. One sentence, exit code 1,
  and the same command may be run again.
* any other exception: a bug of ours. A traceback, exit code 1.
"""

from collections.abc import Collection, Iterable, Mapping
import difflib
import re
from typing import Any


class RequestError(ValueError):
  """The user's request is wrong; the message is a sentence for the user, with
  the name, the value and the choices."""


class EnvironmentFailure(RuntimeError):
  """The environment failed; the message is a sentence for the user, and says
  how to go on."""


STOPPED = 75  # the exit code where there is more to do


class Stopped(Exception):
  """A signal came before all was done. What was under way is saved, the same
  command goes on, and the exit code is STOPPED."""


def one_of(name: str, value: str, choices: Collection[str]) -> None:
  """Raises RequestError unless `value` is one of `choices`."""
  if value in choices:
    return
  question = ''
  near = difflib.get_close_matches(str(value), list(choices), n=1)
  if near:
    question = f' Did you mean {near[0]!r}?'
  raise RequestError(f'unknown {name} {short(value)}: choose from '
                     f'{listed(choices)}.{question}')


def suggest_name(name: str, choices: Collection[str], before: str = '') -> str:
  """Returns the question whether a choice was meant, or several: those whose
  last name is that of `name`; else the one whose sentence is closest to it, as
  'the highest learning rate' to learning_rate; else the one that is spelt most
  like it. '' where there is none.

  Args:
    name: a name that is none of the choices.
    choices: dotted names; a mapping has the sentence of each.
    before: the text that stands before each of them in the question.
  """
  last = name.rpartition('.')[2]
  near = [choice for choice in choices if choice.rpartition('.')[2] == last]
  if not near and '_' in last and isinstance(choices, Mapping):
    near = _choice_with_shortest_sentence(last, choices)
  if not near:
    near = difflib.get_close_matches(name, list(choices), n=1)
  if not near:
    return ''
  meant = [before + choice for choice in near]
  return f' Did you mean {" or ".join(meant)}?'


def _choice_with_shortest_sentence(name: str,
                                   sentences: Mapping[str, str]) -> list[str]:
  """Returns the choice with the shortest sentence that has the words of a name,
  as a list; [] where none has them."""
  pattern = re.escape(name).replace('_', '[ _]')
  words = re.compile(rf'\b{pattern}\b')
  shortest: list[str] = []
  for choice, sentence in sentences.items():
    if not words.search(sentence):
      continue
    if not shortest or len(sentence) < len(sentences[shortest[0]]):
      shortest = [choice]
  return shortest


def listed(choices: Iterable[str]) -> str:
  """Returns choices as a message lists them; an empty one as ''."""
  return ', '.join(choice or "''" for choice in choices)


def require(condition: bool, sentence: str) -> None:
  """Raises RequestError with `sentence` unless `condition` holds."""
  if not condition:
    raise RequestError(sentence)


def short(value: Any) -> str:
  """Returns a value as a message shows it, cut where it is long."""
  if type(value) is int and value.bit_length() > 80:
    # Python does not write out integers of thousands of digits.
    return f'a number of about {value.bit_length() * 3 // 10} digits'
  text = repr(value)
  if len(text) > 60:
    text = text[:57] + '...'
  return text


def cut_long_words(sentence: str) -> str:
  """Returns a sentence as it is printed: a word of more than 200 characters,
  such as a flag or a path, is cut in its middle."""

  def cut(match: re.Match) -> str:
    """Returns a long word without its middle."""
    word = match[0]
    return f'{word[:98]}...{word[-98:]}'

  return re.sub(r'\S{201,}', cut, sentence)
