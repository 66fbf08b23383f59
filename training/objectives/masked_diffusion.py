"""Masked diffusion over text (LLaDA: Nie et al. 2025, arXiv 2502.09992).

Of each row a share t is drawn, uniformly from (0, 1], and each of its tokens is
replaced by [MASK] with probability t, by itself. An encoder, which sees the
whole row, predicts the masked tokens. The loss of a row of L tokens is (their
equation 3, divided by the length as in their algorithm 1)

  1 / (t L)  sum over masked i  of  -log p(x_i | the masked row)

whose mean over t and masks is an upper bound of -log p(x) / L, in nats a token:
that of a model which writes the tokens in a random order (their appendix A.2).
A mean over rows is a draw of it. `eval.py --tasks=diffusion_bound` draws many,
and `--tasks=diffusion_samples` writes text (training/generate.py).

Here a row is a stretch of the text, without [CLS] and [SEP]; separators of
documents are tokens like others, which tell where a text ends. The rows that
LLaDA cuts to random lengths, one in a hundred, are not.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts.skeletons import Output
from training.data import packing
from training.data.tokenizers import Tokenizer
from training.objectives import record
from training.objectives.record import Config, Mean, Objective, Row, Shape


def masked_diffusion(window: packing.Window, rng: np.random.Generator,
                     config: Config, tokenizer: Tokenizer) -> Row:
  """Returns one row with a random share of its tokens masked.

  Returns:
    tokens, targets, segment_ids (0: padding) [L]; weights [L]: 1 / t where a
    token is masked. With data.document_mask a document is a segment, from its
    separator on, and positions [L] begin with it.
  """
  ids = window.tokens[1:window.size]
  t = 1 - rng.random()
  masked = rng.random(len(ids)) < t
  apart = dict(segment_ids=np.ones(len(ids)))
  if config.data.document_mask:
    apart = packing.documents(ids == tokenizer.separator_id)
  return dict(tokens=np.where(masked, tokenizer.mask_id, ids), targets=ids,
              weights=masked / t) | apart


def _arrays(config: Config) -> dict[str, Shape]:
  apart = ('positions',) if config.data.document_mask else ()
  return record.text_arrays(config, 'segment_ids', *apart)


def tokens(batch: Mapping[str, jax.Array]) -> jax.Array:
  """Returns how many tokens of a batch are text, masked or not."""
  return (batch['segment_ids'] != 0).astype(jnp.float32).sum()


def over_all_tokens(output: Output, batch: Mapping[str, jax.Array],
                    config: Config) -> dict[str, Mean]:
  """Returns the weighted losses of the masked tokens over the number of all
  tokens; the accuracy is a mean over the masked ones, by weight."""
  figures = record.given_token(output, batch, config)
  return {name: mean if name == 'accuracy' else Mean(mean.total, tokens(batch))
          for name, mean in figures.items()}


OBJECTIVES = {
    'masked_diffusion': Objective(
        ('encoder',), packing.Windows, masked_diffusion, _arrays, ('tokens',),
        {'positions': 'positions_BL', 'segment_ids': 'segment_ids_BL'},
        ('segment_ids',), reads=('data.document_mask',),
        figures=over_all_tokens, terms={'loss': tokens}, bound=True),
}
