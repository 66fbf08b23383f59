"""A label for each word of a sentence: entities, parts of speech.

  encoder    [CLS] sentence [SEP]        decoder    <sep> sentence <sep>

The first token of a word carries its label, and the others count nothing, as in
BERT (Devlin et al. 2019, section 5.3). A decoder reads a label off the words up
to its own, an encoder off all.

  loss = -sum_k q_k log softmax(scores)_k,
  q = (1 - s) onehot(label) + s / K, s the label smoothing

It is a mean over the labels of a batch.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts.skeletons import Output
from training.data import conll, records, words
from training.data.tokenizers import Tokenizer
from training.measures import words as labels
from training.objectives import labelled
from training.objectives.record import Config, Mean, Objective, Row, Shape


def lay_out(item: words.Piece, rng: np.random.Generator | None, config: Config,
            tokenizer: Tokenizer) -> Row:
  """Returns one row.

  tokens, segment_ids (0: padding), labels, their numbers, and weights, 1 where
  a label counts [up to L].
  """
  del rng
  first, after = records.special_tokens(tokenizer, labelled.stack(config))
  around = (1, 1)
  return dict(tokens=np.concatenate([[first], item.ids, [after]]),
              segment_ids=np.ones(len(item.ids) + words.AROUND),
              labels=np.pad(item.targets, around),
              weights=np.pad(item.weights, around))


def _arrays(config: Config) -> dict[str, Shape]:
  L = (config.data.length,)
  return dict(tokens=(L, np.int32), segment_ids=(L, np.int32),
              labels=(L, np.int32), weights=(L, np.float32))


def labelled_words(output: Output, batch: Mapping[str, jax.Array],
                   config: Config) -> dict[str, Mean]:
  """Returns the cross-entropy of labels [B, L], and how many are likeliest."""
  scores_BLU = output.extra['scores']
  smooth, weights_BL = config.train.label_smoothing, batch['weights']
  log_p_BLU = jax.nn.log_softmax(scores_BLU)
  label_BL1 = batch['labels'][..., None]
  loss_BL = -((1 - smooth)
              * jnp.take_along_axis(log_p_BLU, label_BL1, -1)[..., 0]
              + smooth * log_p_BLU.mean(-1))
  right_BL = jnp.argmax(scores_BLU, -1) == batch['labels']
  weight = weights_BL.sum()
  return {'loss': Mean((weights_BL * loss_BL).sum(), weight),
          'accuracy': Mean((weights_BL * right_BL).sum(), weight)}


OBJECTIVES = {
    'token_classification': Objective(
        ('encoder', 'decoder'), words.Sentences, lay_out, _arrays, ('tokens',),
        {'segment_ids': 'segment_ids_BL'}, ('segment_ids',),
        reads=('data.labels', 'data.stride', 'data.length_buckets'),
        fill=labelled.fill, figures=labelled_words, head='tokens',
        num_labels=lambda config: len(config.data.labels), records=conll.KIND,
        labels=words.labels_of, measure=labels.measure,
        measured=labels.FIGURES,
        length=lambda item: len(item.ids) + words.AROUND,
        ignores=('train.z_loss', 'train.loss_chunk'), perplexity=False)}
