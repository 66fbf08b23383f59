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

import jax
import jax.numpy as jnp
import numpy as np
import optax

from architectures.parts.skeletons import Output
from common.errors import require
from training import objectives
from training.data.tokenizers import Tokenizer
from training.objectives import Batch, causal, Config, Figures, Mean, mlm
from training.objectives import Objective, Row, Shape


class ReplacedTokens(Objective):
  """Replaced-token detection (ELECTRA): a small generator fills masks, and the
  encoder tells which tokens are not the text's own."""
  stacks = ('encoder',)
  view = mlm.Passages
  options = Objective.options | {'places': 'places_BM'}
  reads = ('data.mask_rate', 'data.document_mask',
           'model.generator.loss_weight')
  head = 'replaced'
  terms = ('generator_loss', 'weighted_detection_loss')
  loss_unit = 'nats'  # the sum of two losses

  def example(self, item: causal.Window, rng: np.random.Generator,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Masks some tokens of a window of text, for a generator to fill in and an
    encoder to tell the fillings from the text (ELECTRA: Clark et al. 2020).

    Args:
      item: a window of text: `tokens`, [L + 1], of which the first `size` are
        no padding.
      rng: the random generator that draws the masked tokens.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row: tokens and segment_ids [up to L], with
      data.document_mask also positions; and those of its M masks: places [M],
      which are L where there is no mask, targets and weights [up to M].
    """
    ids, is_special, segments = mlm.frame_text(item, config,
                                               tokenizer=tokenizer)
    # Choose which tokens to mask. Special tokens never are.
    word_places = np.flatnonzero(~is_special)
    num_words = len(word_places)
    num_masks = min(num_words,
                    mlm.most_targets(config.data.mask_rate, num_words))
    mask_places = np.sort(rng.permutation(word_places)[:num_masks])

    # The number of masks varies with the length of the text, and arrays of a
    # batch must have one size. `places` is padded with data.length, a place
    # past the end of the row, which stands for no mask. The caller pads targets
    # and weights.
    tokens = ids.copy()
    tokens[mask_places] = tokenizer.mask_id
    padded_places = np.full(most_masks(config), config.data.length)
    padded_places[:num_masks] = mask_places
    row = dict(tokens=tokens, places=padded_places, targets=ids[mask_places],
               weights=np.ones(num_masks))
    return row | segments

  def arrays(self, config: Config) -> dict[str, Shape]:
    shape = (most_masks(config),)
    row = objectives.arrays_of_documents(config)
    return row | dict(places=(shape, np.int32), targets=(shape, np.int32),
                      weights=(shape, np.float32))

  def check(self, config: Config) -> None:
    require(config.model.generator.num_layers > 0, 'model.generator.num_layers '
            "is 0, and objective 'replaced_tokens' needs a generator: set it "
            'to 1 or more')
    require(config.mesh.context <= 1, f'mesh.context is {config.mesh.context}, '
            "and objective 'replaced_tokens' reads masks at any place of a "
            'row: set it to 1')

  def figures(self, output: Output, batch: Batch, config: Config) -> Figures:
    """Computes the losses of the generator and of the encoder (ELECTRA: Clark
    et al. 2020, section 2), the share of masks that the generator fills as the
    text does, and the share of tokens that the encoder tells aright.

    Args:
      output: the output of the model: hidden states of the masks for the
        generator's loss, scores [B, L, 1] of the encoder, and the tokens drawn
        [B, M].
      batch: the batch; places, targets and weights are [B, M], of the M masks
        of each row, and the other arrays [B, L].
      config: the config of the run.

    Returns:
      {name: Mean}, each figure as a sum and its weight.
    """
    # The generator's loss is the cross-entropy at the masks.
    figures = {}
    for name, mean in objectives.token_loss_figures(output, batch=batch,
                                                    config=config).items():
      figures[f'generator_{name}'] = mean

    # Find the tokens that the generator has replaced by others than the text's,
    # which are what the encoder has to find. A mask that is filled as in the
    # text counts as not replaced. mode='drop' leaves out the places of no mask,
    # which are past the end of the row.
    scores_BL = output.extra['scores'][..., 0]
    rows_B1 = jnp.arange(len(scores_BL))[:, None]
    drawn_is_wrong_BM = output.extra['drawn'] != batch['targets']
    replaced_BL = jnp.zeros(scores_BL.shape, bool)
    replaced_BL = replaced_BL.at[rows_B1, batch['places']].set(
        drawn_is_wrong_BM, mode='drop')

    def mean_over_tokens(x_BL: jax.Array) -> Mean:
      """Returns the mean of an array [B, L] over all tokens that are not
      padding."""
      real_BL = batch['segment_ids'] != 0
      return Mean((real_BL * x_BL).sum(), mlm.count_tokens(batch))

    # Score what the encoder tells of each real token: a score above 0 says that
    # it was replaced. The loss is that of logistic regression.
    loss = mean_over_tokens(optax.sigmoid_binary_cross_entropy(
        scores_BL, replaced_BL.astype(jnp.float32)))
    weight = config.model.generator.loss_weight
    right_BL = (scores_BL > 0) == replaced_BL
    figures['detection_loss'] = loss
    figures['weighted_detection_loss'] = Mean(weight * loss.total, loss.weight)
    figures['detection_accuracy'] = mean_over_tokens(right_BL)
    figures['replaced'] = mean_over_tokens(replaced_BL)
    return figures

  def weights(self, batch: Batch) -> dict[str, jax.Array]:
    return {'generator_loss': objectives.count_targets(batch),
            'weighted_detection_loss': mlm.count_tokens(batch)}

  def num_unread_places(self, config: Config, length: int) -> int:
    return max(length - mlm.most_targets(config.data.mask_rate, length), 0)

  def loss_of_guessing(self, config: Config, vocab: int) -> float:
    weight = config.model.generator.loss_weight
    return math.log(vocab) + weight * math.log(2)


def most_masks(config: Config) -> int:
  """Returns how many masks a row has at most."""
  return mlm.most_targets(config.data.mask_rate, config.data.length)


OBJECTIVES = {'replaced_tokens': ReplacedTokens()}
