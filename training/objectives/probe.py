"""Probes: the answers that a row of a small task asks for, and nothing else.

The rows come from training/data/probes, as ids that no tokenizer makes. Of the
objective 'compression' the answers are the row itself, each told from the
vector of its last token (model.head 'vector').
"""

from typing import Any

import numpy as np

import architectures
from common.errors import RequestError, require
from training import objectives
from training.data import probes, sources
from training.data.tokenizers import Tokenizer
from training.objectives import Config, Objective, Row, Shape


class Rows(probes.Rows):
  """The rows of a run's probe; see Objective.view."""

  def __init__(self, corpus: sources.Corpus):
    config = corpus.config
    require(corpus.name == config.data.source, 'a run on a probe is evaluated '
            f'on its own, {config.data.source!r}, and not on {corpus.name!r}')
    super().__init__(probes.find_probe(config), probes.read_settings(config),
                     corpus.split, config.seed if corpus.split == 'train'
                     else probes.held_out_seed(config))


class Probe(Objective):
  """The answers that the rows of a probe ask for."""
  stacks = ('decoder', 'encoder')
  view = Rows
  reads = tuple(f'probe.{name}' for name in probes.FIELDS)
  ignores = ('data.tokenizer', 'data.eval_source', 'data.holdout_every')
  record_kind = probes.KIND_OF_SOURCE
  mtp = True

  def example(self, item: probes.Row, rng: np.random.Generator | None,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Lays out one row.

    Returns:
      The arrays of the row, [up to L]: tokens; targets; weights, 1 where a
      target is asked for; and segment_ids, which are 1.
    """
    return dict(tokens=item.tokens, targets=item.targets, weights=item.asked,
                segment_ids=np.ones(len(item.tokens)))

  def arrays(self, config: Config) -> dict[str, Shape]:
    return objectives.arrays_of_text(config, 'segment_ids')

  def check(self, config: Config) -> None:
    """Checks the probe of a run, a small task with exact answers that is drawn
    at random: that its settings can be met, and that the model cannot see the
    answers in its input.

    Args:
      config: the config of the run.

    Raises:
      RequestError: where this is not so.
    """
    probes.check_probe(config)
    probe = probes.find_probe(config)
    require(config.objective == probe.objective, f'{config.data.source} is '
            f'trained by objective {probe.objective!r}, and objective is '
            f'{config.objective!r}')

    # A decoder predicts a token before it sees it. An encoder sees the whole
    # row at once, so only a probe that hides its answers is a task for it.
    system = architectures.systems().get(config.model.arch)
    if probe.hides or system is None or system.STACK != 'encoder':
      return
    readable = [name for name, row in probes.PROBES.items()
                if row.hides and row.objective == probe.objective]
    raise RequestError(
        f'{config.data.source} shows its answers to a model that sees the '
        f'whole row, as model.arch {config.model.arch} does: choose a probe of '
        f'{", ".join(readable)}')

  def fill(self, tokenizer: Tokenizer) -> int:
    return 0

  def vocab_size(self, config: Config, tokenizer: Tokenizer) -> int:
    return probes.find_probe(config).vocab_size(probes.read_settings(config))

  def derived(self, config: Config) -> dict[str, Any]:
    settings = probes.read_settings(config)
    return {f'probe.{name}': getattr(settings, name)
            for name in probes.DERIVED_FIELDS}


class Compression(Probe):
  """The row itself, from the vector of its last token."""
  head = 'vector'


OBJECTIVES = {'probe': Probe(), 'compression': Compression()}
