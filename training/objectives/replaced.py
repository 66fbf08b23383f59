"""Replaced-token detection (ELECTRA: Clark et al. 2020, arXiv 2003.10555,
section 2).

  text       [CLS] the chef cooked the meal [SEP]
  generator  [CLS] the chef [MASK] the [MASK] [SEP]     p(word) at each mask
  encoder    [CLS] the chef ate the meal [SEP]          is `ate` of the text?

A row is that of objective mlm, and data.mask_rate of its tokens are all
replaced by [MASK]. The generator, which stands in the model (architectures/
parts/heads.py), learns them as masked words. A word is drawn from it for each
mask; no gradient goes through the draw. The encoder scores every token, and one
that was drawn and is the text's own counts as the text's:

  loss = -mean log p_G(word) over masks
         + generator.loss_weight * mean BCE(score, replaced) over all tokens

The authors' program leaves 15 % of the chosen tokens as they are; as in the
paper, none is left here.
"""

import math

import jax.numpy as jnp
import numpy as np
import optax

from architectures.parts.skeletons import Output
from common.errors import require
from training import objectives
from training.data.tokenizers import Tokenizer
from training.objectives import Batch, causal, Config, Figures, Mean, mlm
from training.objectives import Objective, Row, Shape


def replaced_tokens(window: causal.Window, rng: np.random.Generator,
                    config: Config, tokenizer: Tokenizer) -> Row:
  """Returns one row.

  Returns:
    tokens, segment_ids [up to L] and, of documents apart, positions; of M masks
    places, which is L where there is none, targets and weights [up to M].
  """
  ids, special, apart = mlm.framed(window, config, tokenizer)
  usual = np.flatnonzero(~special)
  count = min(len(usual), mlm.most(config.data.mask_rate, len(usual)))
  chosen = np.sort(rng.permutation(usual)[:count])
  tokens, places = ids.copy(), np.full(_masks(config), config.data.length)
  tokens[chosen], places[:count] = tokenizer.mask_id, chosen
  return dict(tokens=tokens, places=places, targets=ids[chosen],
              weights=np.ones(count)) | apart


def _masks(config: Config) -> int:
  return mlm.most(config.data.mask_rate, config.data.length)


def _arrays(config: Config) -> dict[str, Shape]:
  M, of_text = (_masks(config),), objectives.document_arrays(config)
  return of_text | dict(places=(M, np.int32), targets=(M, np.int32),
                        weights=(M, np.float32))


def figures(output: Output, batch: Batch, config: Config) -> Figures:
  """Returns the losses of both, and the shares of masks that the generator
  fills as the text, and of tokens that the encoder tells aright."""
  both = {f'generator_{name}': mean for name, mean in objectives.token_loss(
      output, batch, config).items()}
  scores_BL = output.extra['scores'][..., 0]
  rows_B1 = jnp.arange(len(scores_BL))[:, None]
  replaced_BL = jnp.zeros(scores_BL.shape, bool).at[
      rows_B1, batch['places']].set(
          output.extra['drawn'] != batch['targets'], mode='drop')
  real_BL = batch['segment_ids'] != 0
  mean = lambda x_BL: Mean((real_BL * x_BL).sum(), mlm.tokens(batch))
  loss = mean(optax.sigmoid_binary_cross_entropy(
      scores_BL, replaced_BL.astype(jnp.float32)))
  weighted = Mean(config.model.generator.loss_weight * loss.total, loss.weight)
  return both | {
      'detection_loss': loss, 'weighted_detection_loss': weighted,
      'detection_accuracy': mean((scores_BL > 0) == replaced_BL),
      'replaced': mean(replaced_BL)}


def _check(config: Config) -> None:
  require(config.model.generator.num_layers > 0, 'model.generator.num_layers '
          "is 0, and objective 'replaced_tokens' needs a generator: set it to "
          '1 or more')
  require(config.mesh.context <= 1, f'mesh.context is {config.mesh.context}, '
          "and objective 'replaced_tokens' reads masks at any place of a row: "
          'set it to 1')


OBJECTIVES = {'replaced_tokens': Objective(
    ('encoder',), mlm.Passages, replaced_tokens, _arrays,
    options=Objective._field_defaults['options'] | {'places': 'places_BM'},
    reads=('data.mask_rate', 'data.document_mask'),
    figures=figures, head='replaced', check=_check,
    unread=lambda config, length: max(
        length - mlm.most(config.data.mask_rate, length), 0),
    terms={'generator_loss': objectives.targets,
           'weighted_detection_loss': mlm.tokens},
    guess=lambda config, vocab: math.log(vocab) + (
        config.model.generator.loss_weight * math.log(2)))}
