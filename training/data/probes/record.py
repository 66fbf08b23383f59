"""The base class of a probe: a small task whose answers are exact.

A probe has no text and no tokenizer: it draws rows of ids. A row asks for some
of its targets, those with weight 1, each of which follows from the tokens up to
its own place. Each row has one of the task's difficulties, its level.
"""

from typing import NamedTuple

import numpy as np

Level = int | float


class Settings(NamedTuple):
  """The settings that a probe draws its rows with: a run's config.probe, filled
  in.

  Attributes:
    length: tokens that a row has at most.
    levels: the difficulties that a row of training has one of.
    vocab: how many ids the task's letters have; 0 where it does not read it.
    examples: rows in one pass of training.
    held_out: rows to evaluate on.
    test: whether the row is one to evaluate on, where a paper tests on others
      than it trains on.
    random_non_queries: whether what stands between queries is drawn, too.
  """
  length: int
  levels: tuple[Level, ...]
  vocab: int
  examples: int
  held_out: int
  test: bool = False
  random_non_queries: bool = False

  @property
  def most(self) -> Level:
    """The hardest level of training."""
    return max(self.levels)


class Row(NamedTuple):
  """One example; each array is [T], with T at most Settings.length.

  Attributes:
    tokens: what the model sees.
    targets: the answer that each place asks for.
    asked: whether it asks for one.
  """
  tokens: np.ndarray
  targets: np.ndarray
  asked: np.ndarray


def ask_at_places(tokens: np.ndarray, places: np.ndarray,
                  answers: np.ndarray) -> Row:
  """Returns the row of a probe that asks for answers at some places of its
  tokens.

  Args:
    tokens: int [T], what the model sees.
    places: int [A], the places in the row that ask.
    answers: int [A], the target at each of these places.
  """
  # The target 0 of all other places means nothing: they do not ask.
  targets = np.zeros(len(tokens), np.int32)
  asked = np.zeros(len(tokens), bool)
  targets[places] = answers
  asked[places] = True
  return Row(tokens=np.asarray(tokens, np.int32), targets=targets, asked=asked)


def ask_to_write(prompt: np.ndarray, answer: np.ndarray) -> Row:
  """Returns the row of a probe in which an answer is to be written after a
  prompt.

  Args:
    prompt: int [P], the ids before the answer, at least one.
    answer: int [A], the ids to write.

  Returns:
    A row of P + A - 1 tokens. Each id of the answer is asked for at the place
    before it, as a decoder predicts the next token. The last id is a target
    alone.
  """
  tokens = np.concatenate([prompt, answer])
  places = np.arange(len(prompt) - 1, len(tokens) - 1)
  return ask_at_places(tokens[:-1], places, answer)


def limit_to_training_levels(settings: Settings, level: Level) -> str:
  """Returns the reason why a level cannot be drawn, where it is harder than all
  those of training; '' where it can. It is the limit of a probe whose levels
  have letters or signs of their own, which a model has to know."""
  if level <= settings.most:
    return ''
  return f'training has at most {settings.most}'


class Probe:
  """A task. The docstring of `draw` says which paper defines it, and in what it
  is not the published one.

  A subclass has `draw`, `size`, `vocab_size`, `level` and `levels`, and of all
  else what differs from here.

  Attributes:
    level: what a level is, as a plural noun.
    levels: the published one or ones.
    vocab: the published number of letters (probe.vocab); 0: it does not read
      the field, as its levels say it.
    length: the published data.length.
    examples, held_out: the published numbers of rows.
    least: the lowest level.
    grows: whether rows of a larger level are longer, so that length beyond
      training is a level beyond training.
    longer: whether it has rows longer than in training.
    hides: whether no answer stands among the tokens of its row, so that a model
      that sees the whole row has to find it too.
    objective: the objective that trains on it.
    fills: whether it reads probe.random_non_queries.
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

  def size(self, level: Level, settings: Settings) -> int:
    """Returns how many tokens the rows of a level have at least."""
    raise NotImplementedError

  def vocab_size(self, settings: Settings) -> int:
    """Returns how many ids the task has: model.vocab_size."""
    raise NotImplementedError

  def limit(self, settings: Settings, level: Level) -> str:
    """Returns the reason why a level cannot be drawn with these settings; ''
    where it can."""
    return ''
