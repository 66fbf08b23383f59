"""Probes: the answers that a row of a small task asks for, and nothing else.

The rows come from training/data/probes, as ids that no tokenizer makes. Of the
objective 'compression' the answers are the row itself, each told from the
vector of its last token (model.head 'vector').
"""

from typing import Any

import numpy as np

import architectures
from common.errors import require
from training import objectives
from training.data import probes, sources
from training.data.tokenizers import Tokenizer
from training.objectives import Config, Objective, Row


class Rows(probes.Rows):
  """The rows of a run's probe; see Objective.view."""

  def __init__(self, corpus: sources.Corpus):
    config = corpus.config
    require(corpus.name == config.data.source, 'a run on a probe is evaluated '
            f'on its own, {config.data.source!r}, and not on {corpus.name!r}')
    super().__init__(probes.of(config), probes.settings(config), corpus.split,
                     config.seed if corpus.split == 'train' else
                     probes.held_out_seed(config))


def probe(item: probes.Row, rng: np.random.Generator | None, config: Config,
          tokenizer: Tokenizer) -> Row:
  """Lays out one row.

  Returns:
    tokens, targets [up to L]; weights [up to L], 1 where a target is asked for;
    segment_ids [up to L], 1 for each token.
  """
  return dict(tokens=item.tokens, targets=item.targets, weights=item.asked,
              segment_ids=np.ones(len(item.tokens)))


def _check(config: Config) -> None:
  probes.check(config)
  objective = probes.of(config).objective
  require(config.objective == objective, f'{config.data.source} is trained by '
          f'objective {objective!r}, and objective is {config.objective!r}')
  system = architectures.systems().get(config.model.arch)
  sees_all = system is not None and system.STACK == 'encoder'
  readable = [name for name, row in probes.PROBES.items()
              if row.hides and row.objective == objective]
  require(not sees_all or probes.of(config).hides, f'{config.data.source} '
          'shows its answers to a model that sees the whole row, as model.arch '
          f'{config.model.arch} does: choose a probe of {", ".join(readable)}')


def _derived(config: Config) -> dict[str, Any]:
  settings = probes.settings(config)
  return {f'probe.{name}': getattr(settings, name) for name in probes.DERIVED}


_PROBE = Objective(
    ('decoder', 'encoder'), Rows, probe,
    lambda config: objectives.text_arrays(config, 'segment_ids'),
    reads=tuple(f'probe.{name}' for name in probes.FIELDS),
    fill=lambda tokenizer: 0, records=probes.KIND, check=_check,
    ignores=('data.tokenizer', 'data.eval_source', 'data.holdout_every'),
    vocab_size=lambda config, tokenizer: probes.of(config).vocab_size(
        probes.settings(config)), derived=_derived, mtp=True)
OBJECTIVES = {'probe': _PROBE, 'compression': _PROBE._replace(head='vector')}
