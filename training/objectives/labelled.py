"""A text, or a pair of texts, to one of some labels or to a number.

  encoder    [CLS] text [SEP]            [CLS] first [SEP] second [SEP]
  roberta    <s> text </s>               <s> first </s></s> second </s>
  decoder    <sep> text <sep>            <sep> first <sep> second <sep>

As in BERT (Devlin et al. 2019, section 4.1), whose types tell the second text
from the first, and in GPT (Radford et al. 2018, section 3.3), where <sep> is
the separator of documents, with which texts begin in training. A head reads
the row off [CLS], or off its last token (architectures/parts/heads.py).

  classification   -sum_k q_k log softmax(scores)_k,
                   q = (1 - s) onehot(label) + s / K, s the label smoothing
  regression       (score - number)^2

The loss is a mean over the rows of a batch; with data.class_weights one in
which a row counts as its label says, as torch's CrossEntropyLoss takes it; but
with label smoothing torch weighs the smoothed share of each label by that
label's own weight, and here all of a row's loss has the row's.
Evaluations weigh all rows alike.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts.skeletons import Output
from training.data import labelled, records
from training.data.tokenizers import Tokenizer
from training.measures import classes
from training.objectives import record
from training.objectives.record import Config, Mean, Objective, Row, Shape


def stack(config: Config) -> str:
  """Returns what the model of a run stacks, however far it is resolved."""
  return architectures.systems()[config.model.arch].STACK


def lay_out(item: records.Item, rng: np.random.Generator | None, config: Config,
            tokenizer: Tokenizer) -> Row:
  """Returns one row.

  tokens, segment_ids (0: padding) [up to L]; of an encoder types [up to L], 1:
  of the second text; targets [], weights [].
  """
  del rng
  first, after = records.special_tokens(tokenizer, stack(config))
  pieces, types = [[first]], [0]
  ends = [item.between] * (len(item.texts) - 1) + [1]
  for number, (ids, end) in enumerate(zip(item.texts, ends)):
    pieces += [ids, [after] * end]
    types += [number] * (len(ids) + end)
  row = dict(tokens=np.concatenate(pieces).astype(np.int32),
             segment_ids=np.ones(len(types)), targets=item.target,
             weights=item.weight)
  return row | (dict(types=types) if stack(config) == 'encoder' else {})


def _arrays(config: Config, target: type) -> dict[str, Shape]:
  L = ((config.data.length,), np.int32)
  row = dict(tokens=L, segment_ids=L, targets=((), target),
             weights=((), np.float32))
  return row | (dict(types=L) if stack(config) == 'encoder' else {})


def fill(tokenizer: Tokenizer) -> int:
  """Returns the token that fills a row up."""
  return tokenizer.special_ids.get('pad', record.separator(tokenizer))


def classified(output: Output, batch: Mapping[str, jax.Array], config: Config
               ) -> dict[str, Mean]:
  """Returns the cross-entropy of targets [B], and how many are likeliest."""
  scores_BU = output.extra['scores']
  smooth, weights_B = config.train.label_smoothing, batch['weights']
  log_p_BU = jax.nn.log_softmax(scores_BU)
  target_B1 = batch['targets'][:, None]
  loss_B = -((1 - smooth) * jnp.take_along_axis(log_p_BU, target_B1, 1)[:, 0]
             + smooth * log_p_BU.mean(-1))
  right_B = jnp.argmax(scores_BU, -1) == batch['targets']
  counts_B = (weights_B > 0).astype(jnp.float32)
  return {'loss': Mean((weights_B * loss_B).sum(), weights_B.sum()),
          'accuracy': Mean((counts_B * right_B).sum(), counts_B.sum())}


def estimated(output: Output, batch: Mapping[str, jax.Array], config: Config
              ) -> dict[str, Mean]:
  """Returns the squared error of targets [B], in what they are measured in."""
  del config
  weights_B = batch['weights']
  error_B = output.extra['scores'][:, 0] - batch['targets']
  return {'loss': Mean((weights_B * error_B ** 2).sum(), weights_B.sum()),
          'mean_absolute_error': Mean((weights_B * jnp.abs(error_B)).sum(),
                                      weights_B.sum())}


def _objective(view: type, target: type, **fields: Any) -> Objective:
  return Objective(
      ('encoder', 'decoder'), view, lay_out,
      lambda config: _arrays(config, target), ('tokens',),
      {'types': 'type_ids_BL', 'segment_ids': 'segment_ids_BL'},
      ('segment_ids',), fill=fill, head='sequence', records=labelled.KIND,
      length=lambda item: item.length, perplexity=False, **fields)


OBJECTIVES = {
    'classification': _objective(
        records.Classes, np.int32, figures=classified,
        labels=records.labels_of, measure=classes.of_scores,
        measured=classes.FIGURES,
        num_labels=lambda config: len(config.data.labels),
        reads=('data.labels', 'data.class_weights', 'data.length_buckets',
               'data.pair_separators'),
        ignores=('train.z_loss', 'train.loss_chunk')),
    'regression': _objective(
        records.Numbers, np.float32, figures=estimated,
        measure=classes.of_numbers, measured=classes.FIGURES_OF_NUMBERS,
        num_labels=lambda config: 1,
        reads=('data.length_buckets', 'data.pair_separators'),
        ignores=('train.z_loss', 'train.loss_chunk', 'train.label_smoothing')),
}
