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


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
  """Raises RequestError unless `value` is one of `choices`. The message lists
  the choices, and asks whether the one that is spelt most like it was meant.

  Args:
    name: the words for what was chosen, as in 'unknown NAME'.
    value: the value that a user has given.
    choices: the allowed values.
  """
  if value in choices:
    return
  question = ''
  similar = difflib.get_close_matches(str(value), list(choices), n=1)
  if similar:
    question = f' Did you mean {similar[0]!r}?'
  raise RequestError(f'unknown {name} {shorten(value)}: choose from '
                     f'{join_choices(choices)}.{question}')


def suggest_name(name: str, choices: Collection[str], before: str = '') -> str:
  """Returns the question ' Did you mean ...?' about an unknown name, with the
  choice that the user probably meant, or '' if none is similar.

  Three rules are tried in turn. The first that suggests a choice wins:
  1. every choice whose last part is that of the name;
  2. a choice whose description has the words of the name, as 'the highest
     learning rate' for learning_rate;
  3. the choice that is spelt most like the name.

  Args:
    name: the unknown name.
    choices: the known names, with dots between their parts; or a mapping from
      these names to their descriptions, without which rule 2 is not tried.
    before: the text that stands before each choice in the question, such as
      '--config.'.
  """
  # Rule 1: the last part is the same.
  last_part = name.rpartition('.')[2]
  likely = [choice for choice in choices
            if choice.rpartition('.')[2] == last_part]
  # Rule 2: a single word would be in too many descriptions.
  if not likely and '_' in last_part and isinstance(choices, Mapping):
    likely = _choice_with_shortest_sentence(last_part, choices)
  # Rule 3: the spelling.
  if not likely:
    likely = difflib.get_close_matches(name, list(choices), n=1)
  if not likely:
    return ''
  suggestions = [before + choice for choice in likely]
  return f' Did you mean {" or ".join(suggestions)}?'


def _choice_with_shortest_sentence(name: str, sentences: Mapping[str, str]
                                   ) -> list[str]:
  """Finds the choice that a name describes: its sentence has the words of the
  name. If several have them, the shortest sentence is the most about them.

  Args:
    name: words with underscores between them, such as learning_rate.
    sentences: the sentence that describes each choice.

  Returns:
    A list with this one choice, or an empty list if no sentence has the words.
  """
  # The words stand side by side, with spaces or underscores between them.
  # (re.escape leaves an underscore as it is.)
  pattern = re.escape(name).replace('_', '[ _]')
  words = re.compile(rf'\b{pattern}\b')
  shortest: list[str] = []
  for choice, sentence in sentences.items():
    if not words.search(sentence):
      continue
    if not shortest or len(sentence) < len(sentences[shortest[0]]):
      shortest = [choice]
  return shortest


def format_count(number: int, noun: str, plural: str = '') -> str:
  """Returns a number with its noun, such as '1 run' or '1,200 runs'.

  Args:
    number: the number.
    noun: the noun of one.
    plural: that of several; '': `noun` and an s.
  """
  if number == 1:
    return f'1 {noun}'
  return f'{number:,} {plural or noun + "s"}'


def join_choices(choices: Iterable[str]) -> str:
  """Returns the text of choices in a message, with commas between; an empty
  choice is written ''."""
  return ', '.join(choice or "''" for choice in choices)


def require(condition: bool, sentence: str) -> None:
  """Raises RequestError with `sentence` unless `condition` holds."""
  if not condition:
    raise RequestError(sentence)


def shorten(value: Any) -> str:
  """Returns the text of a value for a message, cut off after 57 characters
  where it has more than 60."""
  if type(value) is int and value.bit_length() > 80:
    # Python does not write out integers of thousands of digits. A bit is about
    # 0.3 of a digit (log10 of 2).
    return f'a number of about {value.bit_length() * 3 // 10} digits'
  text = repr(value)
  if len(text) > 60:
    text = text[:57] + '...'
  return text


def cut_long_words(sentence: str) -> str:
  """Returns a sentence in which each word of more than 200 characters, such as
  a long flag or path, is cut in its middle, so that it can be read."""

  def cut_word(match: re.Match) -> str:
    word = match[0]
    return f'{word[:98]}...{word[-98:]}'

  return re.sub(r'\S{201,}', cut_word, sentence)
