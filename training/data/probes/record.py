"""The base class of a probe: a small task whose answers are exact.

A probe has no text and no tokenizer: it draws rows of ids. A row asks for some
of its targets, those with weight 1, each of which follows from the tokens up to
its own position. Each row has one of the task's difficulties, its level.
"""

from typing import NamedTuple

import numpy as np

Level = int | float


class Settings(NamedTuple):
  """The settings with which a probe draws its rows: config.probe of a run, with
  the published values in place of those that are not set.

  Attributes:
    length: the most tokens of a row.
    levels: the levels of difficulty. Each row of training has one of them.
    vocab: the number of different letters of the task; 0 if it does not read
      the field.
    examples: the number of rows in one pass of training.
    held_out: the number of rows of evaluation.
    test: whether rows are drawn for evaluation. Some papers evaluate on other
      rows than they train on.
    random_non_queries: whether the tokens between queries are drawn, too.
  """
  length: int
  levels: tuple[Level, ...]
  vocab: int
  examples: int
  held_out: int
  test: bool = False
  random_non_queries: bool = False

  @property
  def hardest_level(self) -> Level:
    """The hardest level of training."""
    return max(self.levels)


class Row(NamedTuple):
  """One example. Each array is [T], with T at most Settings.length.

  Attributes:
    tokens: int32, the ids that the model sees.
    targets: int32, the answer that each position asks for.
    asked: bool, whether a position asks for an answer.
  """
  tokens: np.ndarray
  targets: np.ndarray
  asked: np.ndarray


def ask_at_positions(tokens: np.ndarray, positions: np.ndarray,
                     answers: np.ndarray) -> Row:
  """Returns a row of tokens that asks for answers at some of its positions.

  Args:
    tokens: int [T], the ids that the model sees.
    positions: int [A], the positions of the row that ask.
    answers: int [A], the answer at each of these positions.
  """
  # The other positions do not ask, and their target of 0 is not read.
  targets = np.zeros(len(tokens), np.int32)
  asked = np.zeros(len(tokens), bool)
  targets[positions] = answers
  asked[positions] = True
  return Row(tokens=np.asarray(tokens, np.int32), targets=targets, asked=asked)


def ask_to_write(prompt: np.ndarray, answer: np.ndarray) -> Row:
  """Returns a row that asks a model to write an answer after a prompt.

  Args:
    prompt: int [P], the ids before the answer, at least one.
    answer: int [A], the ids to write.

  Returns:
    A row of P + A - 1 tokens. Each id of the answer is asked for at the
    position before it, because a decoder predicts the next token. The last id
    is only a target.
  """
  tokens = np.concatenate([prompt, answer])
  positions = np.arange(len(prompt) - 1, len(tokens) - 1)
  return ask_at_positions(tokens[:-1], positions=positions, answers=answer)


def reason_against_harder_level(settings: Settings, level: Level) -> str:
  """Returns the reason why a level that is harder than all levels of training
  cannot be drawn; '' for an easier one.

  This is the limit of a probe whose levels have letters or signs of their own,
  which a model must have seen in training.

  Args:
    settings: the settings of the probe.
    level: the level.
  """
  if level <= settings.hardest_level:
    return ''
  return f'training has at most {settings.hardest_level}'


class Probe:
  """A small task with exact answers. The docstring of its module says which
  paper defines it, and how it differs from the published task.

  A subclass has `draw`, `min_length`, `vocab_size`, `level` and `levels`, and
  others of these methods and attributes where it differs from this class.

  Attributes:
    level: what a level counts, as a plural noun.
    levels: the published levels.
    vocab: the published number of letters (probe.vocab); 0: the task does not
      read the field.
    length: the published data.length.
    examples, held_out: the published numbers of rows.
    least: the lowest level.
    grows: whether rows of a larger level are longer, so that length beyond
      training is a level beyond training.
    longer: whether rows can be longer than in training.
    hides: whether no answer is among the tokens of its row, so that even a
      model that sees the whole row has to work it out.
    objective: the objective that trains on the task.
    fills: whether the task reads probe.random_non_queries.
  """
  level: str
  levels: tuple[Level, ...]
  vocab: int = 0
  length: int = 128
  examples: int = 12_800
  held_out: int = 1_280
  least: Level = 1
  grows: bool = False
  longer: bool = True
  hides: bool = False
  objective: str = 'probe'
  fills: bool = False

  def draw(self, rng: np.random.Generator, level: Level, settings: Settings
           ) -> Row:
    """Draws a row of a level.

    Args:
      rng: the generator of the draws.
      level: the difficulty of the row.
      settings: the settings of the probe.
    """
    raise NotImplementedError

  def min_length(self, level: Level, settings: Settings) -> int:
    """Returns the number of tokens that the rows of a level have at least."""
    raise NotImplementedError

  def vocab_size(self, settings: Settings) -> int:
    """Returns the number of ids of the task, which is model.vocab_size."""
    raise NotImplementedError

  def reason_against(self, settings: Settings, level: Level) -> str:
    """Returns the reason why a level cannot be drawn with these settings; ''
    where it can."""
    return ''
