"""Masked words: BERT's examples (Devlin et al. 2019, section 3.1 and appendix
A.1) and RoBERTa's (Liu et al. 2019, section 4).

  [CLS] first text [SEP] second text [SEP]     mlm_nsp
  [CLS] text, over documents' ends [SEP]       mlm

With next sentences the second text is, half of the time, what follows the
first in its document; else it comes from another document. Without them a row
is full of text, documents with their separator between one after the other.
15 % of the tokens are to be told: of these 80 % are replaced by [MASK], 10 %
by a random token, 10 % stay. Each draw of a row is a new one: masks change
from one pass over the text to the next, as RoBERTa's do.
"""

import functools

import numpy as np

from configs.errors import RequestError
from training.data import packing


def mlm(window: packing.Window, rng: np.random.Generator, config,
        tokenizer) -> dict[str, np.ndarray]:
  """Returns one masked row of text.

  Returns:
    tokens, segment_ids (0: padding), targets [L] int32; weights [L] float32,
    1 where a token is to be told. With data.document_mask a document is a
    segment, from its separator on, and positions [L] int32 begin with it.
  """
  text = window.tokens[1:window.size]
  ids = np.concatenate([[tokenizer.cls_id], text, [tokenizer.sep_id]]
                       ).astype(np.int32)
  starts = ids == tokenizer.separator_id
  special = starts.copy()
  special[[0, -1]] = True
  apart = dict(segment_ids=np.ones(len(ids), np.int32))
  if config.data.document_mask:
    starts[-1] = False  # the end of the row begins no document
    apart = documents(starts)
  return _masked(ids, special, rng, config, tokenizer) | {
      key: _padded(x, config) for key, x in apart.items()}


def documents(starts_L: np.ndarray) -> dict[str, np.ndarray]:
  """Returns segment_ids and positions [L] int32 of packed documents, each of
  which begins where starts_L says, and one at the beginning of the row."""
  index_L = np.arange(len(starts_L), dtype=np.int32)
  first_L = np.maximum.accumulate(np.where(starts_L, index_L, 0))
  return dict(segment_ids=1 + np.cumsum(starts_L, dtype=np.int32),
              positions=index_L - first_L)


def mlm_nsp(stretch: packing.Stretch, rng: np.random.Generator, config,
            tokenizer) -> dict[str, np.ndarray]:
  """Returns one masked pair.

  Returns:
    tokens, types, segment_ids (0: padding), targets [L] int32; weights [L]
    float32, 1 where a token is to be told; nsp_targets [] int32, 1: the second
    text is from elsewhere.
  """
  first, second, random = _pair(stretch, rng)
  cls, sep = tokenizer.cls_id, tokenizer.sep_id
  ids = np.concatenate([[cls], first, [sep], second, [sep]]).astype(np.int32)
  special = np.zeros(len(ids), bool)
  special[[0, 1 + len(first), -1]] = True
  types = np.arange(len(ids)) >= len(first) + 2
  return _masked(ids, special, rng, config, tokenizer) | dict(
      types=_padded(types.astype(np.int32), config),
      segment_ids=_padded(np.ones(len(ids), np.int32), config),
      nsp_targets=np.int32(random))


def _masked(ids, special, rng, config, tokenizer) -> dict[str, np.ndarray]:
  """Returns tokens, targets and weights of a row, padded to data.length."""
  masked, chosen = mask(ids, special, rng, tokenizer,
                        rate=config.data.mask_rate,
                        whole_words=config.data.whole_words)
  pad = tokenizer.special_ids.get('pad', tokenizer.sep_id)
  return dict(tokens=_padded(masked, config, pad),
              targets=_padded(ids, config, pad),
              weights=_padded(chosen.astype(np.float32), config))


def _padded(x, config, value=0):
  return np.pad(x, (0, config.data.length - len(x)), constant_values=value)


def _pair(stretch: packing.Stretch, rng):
  """Returns (first text, second text, whether that is from elsewhere)."""
  tokens = stretch.tokens
  cut = int(rng.integers(1, len(tokens)))
  if rng.random() < 0.5:
    return tokens[:cut], tokens[cut:], False
  return tokens[:cut], stretch.elsewhere(rng, len(tokens) - cut), True


def mask(ids: np.ndarray, special: np.ndarray, rng: np.random.Generator,
         tokenizer, *, rate: float, whole_words: bool):
  """Returns (ids with some masked, which of them are to be told).

  Args:
    ids: int32 [L].
    special: bool [L], never masked.
    rng: of the draws.
    tokenizer: its mask token and vocabulary.
    rate: the share of tokens that are chosen, at least one of them.
    whole_words: whether all tokens of a word are chosen, or none.
  """
  places = np.flatnonzero(~special)
  wanted = max(1, round(rate * len(places)))
  word = np.cumsum(_starts(ids, tokenizer) if whole_words
                   else np.ones(len(ids), bool))
  order = rng.permutation(np.unique(word[places]))
  sizes = np.bincount(word[places], minlength=word[-1] + 1)
  taken = np.cumsum(sizes[order]) - sizes[order] < wanted
  chosen = np.isin(word, order[taken]) & ~special
  draw = rng.random(len(ids))
  masked = np.where(chosen & (draw < 0.8), tokenizer.mask_id, ids)
  other = rng.integers(0, tokenizer.vocab_size, len(ids))
  masked = np.where(chosen & (draw >= 0.8) & (draw < 0.9), other, masked)
  return masked.astype(np.int32), chosen


def _starts(ids: np.ndarray, tokenizer) -> np.ndarray:
  """Returns bool [L]: whether a word begins at a token."""
  begins, ends = _words(tokenizer)
  after = np.concatenate([[True], ends[ids[:-1]]])
  return begins[ids] | after


@functools.lru_cache(maxsize=4)
def _words(tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """Returns bool [V] twice: which tokens begin a word, which end one."""
  special = set(tokenizer.special_ids.values())
  pieces = [b' ' if i in special else tokenizer.decode_bytes([i])
            for i in range(tokenizer.vocab_size)]
  if any(piece.startswith(b'##') and len(piece) > 2 for piece in pieces):
    begins = np.array([not piece.startswith(b'##') for piece in pieces])
    return begins, np.zeros(len(pieces), bool)
  begins = np.array([piece[:1].isspace() for piece in pieces])
  ends = np.array([piece[-1:].isspace() for piece in pieces])
  if not (begins | ends)[[i not in special for i in range(len(pieces))]].any():
    raise RequestError(
        f'data.whole_words: tokenizer {tokenizer.name!r} does not show where a '
        'word begins. Set it to False, or take WordPiece, bytes or a '
        'byte-level BPE.')
  return begins, ends
