"""Sequence to sequence: a source is read, and its target is predicted.

`parallel:GLOB` names files of such pairs. From plain text pairs are cut: a
stretch of data.length tokens, and as its target the data.target_length tokens
that follow it. So every model can be tried on the default corpus, where it
learns to continue a text.
"""

from collections.abc import Sequence

import numpy as np

from training.data import packing
from training.data.tokenizers import Tokenizer
from training.measures import classes
from training.objectives import record
from training.objectives.record import Config, Objective, Prompts, Row, Shape


def start_id(tokenizer: Tokenizer) -> int:
  """Returns the token that a target starts after, which also fills rows up:
  padding, as in T5 and Marian, or the separator where there is none."""
  return tokenizer.special_ids.get('pad', tokenizer.separator_id)


def seq2seq(pair: packing.Pair, rng: np.random.Generator | None, config: Config,
            tokenizer: Tokenizer) -> Row:
  """Lays out one pair; what is longer than its row is cut off.

  Returns:
    as `lay_out`.
  """
  del rng
  M, L = packing.pair_lengths(config)
  source, target = pair.source, pair.target
  if pair.whole:
    source = np.append(source, tokenizer.separator_id)
    target = np.append(target, tokenizer.separator_id)
  return lay_out(source[:M], target[:L], tokenizer)


def lay_out(source: np.ndarray, target: np.ndarray, tokenizer: Tokenizer
            ) -> Row:
  """Returns one row for an encoder-decoder.

  tokens, segment_ids [up to M]: the source, and 1 for each of its tokens.
  decoder_tokens, decoder_segment_ids [up to L]: the start, then the target but
  its last token. targets, weights [up to L]: the target.
  """
  real = np.ones(len(target))
  shown = np.concatenate([[start_id(tokenizer)], target])[:len(target)]
  return dict(tokens=source, segment_ids=np.ones(len(source)),
              decoder_tokens=shown, decoder_segment_ids=real,
              targets=target, weights=real)


def two_rows(M: int, L: int) -> dict[str, Shape]:
  """Returns the arrays of a row: a source of M tokens, a target of L."""
  source, target = ((M,), np.int32), ((L,), np.int32)
  return dict(tokens=source, segment_ids=source, decoder_tokens=target,
              decoder_segment_ids=target, targets=target,
              weights=((L,), np.float32))


def _arrays(config: Config) -> dict[str, Shape]:
  return two_rows(*packing.pair_lengths(config))


def as_source(texts: Sequence[str], config: Config, tokenizer: Tokenizer
              ) -> Prompts:
  """Returns the start of a target for each text, which is the source; it ends
  with the separator, as the sources of training do."""
  del config
  sources, lengths = record.padded(
      [np.append(ids, tokenizer.separator_id)
       for ids in tokenizer.encode_batch(texts)])
  return Prompts(
      np.full((len(texts), 1), start_id(tokenizer), np.int32),
      np.ones(len(texts), np.int32),
      dict(source_BM=sources, source_lengths_B=lengths))


# What span corruption shares with it.
ENCODER_DECODER = Objective(
    ('encoder-decoder',), packing.Pairs, seq2seq, _arrays,
    ('tokens', 'decoder_tokens'),
    {'segment_ids': 'segment_ids_BM',
     'decoder_segment_ids': 'decoder_segment_ids_BL'},
    ('segment_ids', 'decoder_segment_ids'), fill=start_id, prompt=as_source)
OBJECTIVES = {
    'seq2seq': ENCODER_DECODER._replace(
        reads=('data.target_length',), translates=True,
        measure=classes.of_texts, measured=classes.FIGURES),
}
