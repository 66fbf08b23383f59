"""What a probe is: a small task whose answers are exact, in one record.

A probe has no text and no tokenizer: it draws rows of ids. A row asks for some
of its targets, those with weight 1, each of which follows from the tokens up to
its own place. Each row has one of the task's difficulties, its level.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Level = int | float


class Settings(NamedTuple):
  """What a probe draws its rows with: a run's config.probe, filled in.

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


def asking(tokens: np.ndarray, places: np.ndarray, answers: np.ndarray) -> Row:
  """Returns the row that asks for `answers` at `places` of its tokens."""
  targets = np.zeros(len(tokens), np.int32)
  asked = np.zeros(len(tokens), bool)
  targets[places], asked[places] = answers, True
  return Row(np.asarray(tokens, np.int32), targets, asked)


def writing(prompt: np.ndarray, answer: np.ndarray) -> Row:
  """Returns the row in which `answer` is to be written after `prompt`: each of
  its ids is asked for at the place before it."""
  tokens = np.concatenate([prompt, answer])
  return asking(tokens[:-1], np.arange(len(prompt) - 1, len(tokens) - 1),
                answer)


def trained(settings: Settings, level: Level) -> str:
  """A Probe.limit: rows of a level have letters or signs of their own, which a
  model knows up to the hardest one of training."""
  return '' if level <= settings.most else (
      f'training has at most {settings.most}')


class Probe(NamedTuple):
  """A task. The docstring of `draw` says which paper defines it, and in what it
  is not the published one.

  Attributes:
    draw: (rng, level, settings) -> a row of that level.
    level: what a level is, as a plural noun.
    levels: the published one or ones.
    size: (level, settings) -> how many tokens its rows have at least.
    vocab_size: settings -> how many ids there are: model.vocab_size.
    vocab: the published number of letters (probe.vocab); 0: it does not read
      the field, as its levels say it.
    length: data.length as published.
    examples, held_out: as published.
    least: the lowest level.
    limit: (settings, level) -> the reason why a level cannot be drawn; '': it
      can.
    grows: whether rows of a larger level are longer, so that length beyond
      training is a level beyond training.
    longer: whether it has rows longer than in training.
    hides: whether no answer stands among the tokens of its row, so that a model
      that sees the whole row has to find it too.
    objective: which trains on it.
    fills: whether it reads probe.random_non_queries.
  """
  draw: Callable[[np.random.Generator, Level, Settings], Row]
  level: str
  levels: tuple[Level, ...]
  size: Callable[[Level, Settings], int]
  vocab_size: Callable[[Settings], int]
  vocab: int = 0
  length: int = 128
  examples: int = 12_800
  held_out: int = 1_280
  least: Level = 1
  limit: Callable[[Settings, Level], str] = lambda settings, level: ''
  grows: bool = False
  longer: bool = True
  hides: bool = False
  objective: str = 'probe'
  fills: bool = False
