"""Questions, whose answers are stretches of a paragraph, or that it does not
answer.

  encoder    [CLS] question [SEP] paragraph [SEP]
  roberta    <s> question </s></s> paragraph </s>
  decoder    <sep> question <sep> paragraph <sep>

Each token has the score of being the answer's first one, and that of being its
last (Devlin et al. 2019, section 4.2):

  loss = -(log softmax(starts)_first + log softmax(ends)_last) / 2,

over the tokens of a row, as a mean over the rows of a batch. Where a row does
not show the answer, both stand at the null token (section 4.3): at [CLS], and
in a decoder at the last token, the only one that has seen all, as in XLNet
(Yang et al. 2019), whose [CLS] stands last.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts.skeletons import Output
from training.data import questions, records, squad
from training.data.tokenizers import Tokenizer
from training.measures import Measured
from training.measures import questions as answers
from training.objectives import labelled
from training.objectives.record import Config, Mean, Objective, Row, Shape

NEVER = -1e30  # the score of padding


def lay_out(item: questions.Window, rng: np.random.Generator | None,
            config: Config, tokenizer: Tokenizer) -> Row:
  """Returns one row.

  tokens, segment_ids (0: padding), of an encoder types (1: of the paragraph)
  [up to L]; starts, ends [], the places of the answer's ends; weights [], 1.
  """
  del rng
  stack = labelled.stack(config)
  first, after = records.special_tokens(tokenizer, stack)
  tokens = np.concatenate([[first], item.question, [after] * item.between,
                           item.context, [after]])
  places = (null_place(item, stack),) * 2
  if item.answer is not None:
    places = tuple(begin(item) + place for place in item.answer)
  row = dict(tokens=tokens, segment_ids=np.ones(len(tokens)),
             starts=places[0], ends=places[1], weights=1.0)
  return row | (dict(types=np.arange(len(tokens)) >= begin(item))
                if stack == 'encoder' else {})


def begin(item: questions.Window) -> int:
  """Returns where the paragraph begins in a row."""
  return 1 + len(item.question) + item.between


def length(item: questions.Window) -> int:
  """Returns how many tokens a row has."""
  return (len(item.question) + len(item.context)
          + records.around(2, item.between))


def null_place(item: questions.Window, stack: str) -> int:
  """Returns where the token stands whose scores are those of no answer."""
  return 0 if stack == 'encoder' else length(item) - 1


def _arrays(config: Config) -> dict[str, Shape]:
  L = ((config.data.length,), np.int32)
  row = dict(tokens=L, segment_ids=L, starts=((), np.int32),
             ends=((), np.int32), weights=((), np.float32))
  return row | (dict(types=L) if labelled.stack(config) == 'encoder' else {})


def answered(output: Output, batch: Mapping[str, jax.Array], config: Config
             ) -> dict[str, Mean]:
  """Returns the cross-entropy of starts [B] and ends [B], and of how many rows
  both are likeliest."""
  del config
  real_BL1 = batch['segment_ids'][..., None] != 0
  # Of the two axes without a letter, one stands for start and end.
  scores_BLU = jnp.where(real_BL1, output.extra['scores'], NEVER)
  places_BU = jnp.stack([batch['starts'], batch['ends']], 1)
  loss_BU = -jnp.take_along_axis(
      jax.nn.log_softmax(scores_BLU, axis=1), places_BU[:, None], 1)[:, 0]
  right_B = (jnp.argmax(scores_BLU, 1) == places_BU).all(1)
  weights_B = batch['weights']
  return {'loss': Mean((weights_B * loss_BU.mean(1)).sum(), weights_B.sum()),
          'accuracy': Mean((weights_B * right_B).sum(), weights_B.sum())}


def measure(view: questions.Questions, scores: Sequence[np.ndarray],
            config: Config, options: Any) -> Measured:
  """Returns what is found of the questions of a view; see
  training/measures/questions.py."""
  stack = labelled.stack(config)
  return answers.measure(view, scores,
                         [null_place(item, stack) for item in view.items],
                         [begin(item) for item in view.items], options)


OBJECTIVES = {
    'question_answering': Objective(
        ('encoder', 'decoder'), questions.Questions, lay_out, _arrays,
        ('tokens',), {'types': 'type_ids_BL', 'segment_ids': 'segment_ids_BL'},
        ('segment_ids',), reads=(
            'data.stride', 'data.length_buckets', 'data.pair_separators'),
        fill=labelled.fill, figures=answered, head='span',
        records=squad.KIND, length=length, measure=measure,
        measured=answers.FIGURES,
        ignores=('train.z_loss', 'train.loss_chunk', 'train.label_smoothing'),
        perplexity=False,
        guess=lambda config, vocab: math.log(config.data.length))}
