"""Masked words: BERT's examples (Devlin et al. 2019, section 3.1 and appendix
A.1) and RoBERTa's (Liu et al. 2019, section 4).

  [CLS] first text [SEP] second text [SEP]     mlm_nsp, mlm_sop
  [CLS] text, over documents' ends [SEP]       mlm

With next sentences the second text is, half of the time, what follows the
first in its document; else it comes from another document. With the order of
sentences (ALBERT: Lan et al. 2020, arXiv 1909.11942, section 3.1) both texts
follow each other in a document, and half of the time they are swapped; the head
is that of next sentences. Without either a row
is full of text: documents one after the other, with a separator between them.
15 % of the tokens are prediction targets. Of these, 80 % are replaced by
[MASK], 10 % by a random token, and 10 % stay. Masks are drawn anew in each pass
over the text, as RoBERTa's are.

Masked diffusion over text (LLaDA: Nie et al. 2025, arXiv 2502.09992).

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

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import sharding
from architectures.parts.skeletons import Output
from common.errors import require
from training import objectives
from training.data import sources
from training.data.tokenizers import Tokenizer
from training.data.tokens import Documents
from training.objectives import Batch, Config, Figures, Mean, Objective, Row
from training.objectives import causal


class Passages(causal.Windows):
  """Windows of data.length - 2 tokens, which leave room for [CLS] and [SEP]."""

  AROUND = 2


def mlm(window: causal.Window, rng: np.random.Generator, config: Config,
        tokenizer: Tokenizer) -> Row:
  """Returns one masked row of text.

  Returns:
    tokens, segment_ids (0: padding), targets [L]; weights [L], 1 where a token
    is to be predicted. With data.document_mask a document is a segment, from
    its separator on, and positions [L] begin with it.
  """
  ids, special, apart = framed(window, config, tokenizer)
  return _masked(ids, special, rng, config, tokenizer) | apart


def framed(window: causal.Window, config: Config, tokenizer: Tokenizer
           ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """Returns [CLS], text and [SEP]; which of them are special; and segment_ids
  and, of documents apart, positions."""
  text = window.tokens[1:window.size]
  ids = np.concatenate([[tokenizer.cls_id], text, [tokenizer.sep_id]]
                       ).astype(np.int32)
  starts = ids == tokenizer.separator_id
  special = starts.copy()
  special[[0, -1]] = True
  apart = dict(segment_ids=np.ones(len(ids)))
  if config.data.document_mask:
    starts[-1] = False  # the end of the row begins no document
    apart = objectives.documents(starts)
  return ids, special, apart


class Stretch(NamedTuple):
  """Consecutive tokens of one document, and the way to other documents.

  Attributes:
    tokens: [T], at most data.length - 3.
    elsewhere: (rng, size) -> up to `size` tokens of another document.
  """

  tokens: np.ndarray
  elsewhere: Callable[[np.random.Generator, int], np.ndarray]


class Stretches:
  """Each document cut into stretches of data.length - 3 tokens.

  The three places are for [CLS] and two [SEP], for BERT's pairs of texts. A
  stretch of fewer than MIN tokens, too short to learn from, is left out.
  """

  MIN = 8
  READS = (sources.TEXT,)

  def __init__(self, corpus: sources.Corpus):
    corpus.check_plain()
    self.room = corpus.config.data.length - 3  # [CLS] and twice [SEP]
    require(self.room >= self.MIN, f'data.length={corpus.config.data.length}: '
            f'pairs of texts need at least {self.MIN + 3}.')
    self._documents = documents = Documents(corpus.tokens)
    first = documents.parts[documents.first]
    sizes = documents.parts[documents.end] - first
    enough = sizes >= self.MIN
    self._first, self._sizes = first[enough], sizes[enough]
    require(len(self._first) > 1, f'data source {corpus.name!r} has '
            f'{len(self._first)} document(s) of {self.MIN} tokens or more in '
            f'the split {corpus.split!r}: pairs need two, to take a second '
            'text from another document.')
    counts = (self._sizes + self.room - self.MIN) // self.room
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    self.num_tokens = int(self._sizes.sum())
    self.num_bytes = corpus.tokens.num_bytes

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, i: int) -> Stretch:
    document = int(np.searchsorted(self._starts, i, side='right')) - 1
    low = (int(i) - int(self._starts[document])) * self.room
    high = min(low + self.room, int(self._sizes[document]))
    first = int(self._first[document])
    return Stretch(self._documents.read(first + low, first + high),
                   functools.partial(self.other, document))

  def other(self, document: int, rng: np.random.Generator, size: int
            ) -> np.ndarray:
    """Returns up to `size` tokens from a random place of a random document
    other than `document`."""
    other = int(rng.integers(len(self._first) - 1))
    other += other >= document
    size = min(size, int(self._sizes[other]))
    low = int(self._first[other]) + int(
        rng.integers(int(self._sizes[other]) - size + 1))
    return self._documents.read(low, low + size)


def mlm_nsp(stretch: Stretch, rng: np.random.Generator, config: Config,
            tokenizer: Tokenizer) -> Row:
  """Returns one masked pair.

  Returns:
    tokens, types, segment_ids (0: padding), targets [L]; weights [L], 1 where a
    token is to be predicted; nsp_targets [], 1: the second text is from
    elsewhere.
  """
  cut = int(rng.integers(1, len(stretch.tokens)))
  first, second = np.split(stretch.tokens, [cut])
  from_elsewhere = rng.random() >= 0.5
  if from_elsewhere:
    second = stretch.elsewhere(rng, len(second))
  return _two_texts(first, second, from_elsewhere, rng, config, tokenizer)


def mlm_sop(stretch: Stretch, rng: np.random.Generator, config: Config,
            tokenizer: Tokenizer) -> Row:
  """Returns one masked pair as `mlm_nsp` does; nsp_targets is 1 where the
  second text stood before the first."""
  first, second = np.split(stretch.tokens,
                           [int(rng.integers(1, len(stretch.tokens)))])
  swapped = rng.random() < 0.5
  texts = (second, first) if swapped else (first, second)
  return _two_texts(*texts, swapped, rng, config, tokenizer)


def _two_texts(first: np.ndarray, second: np.ndarray, target: bool,
               rng: np.random.Generator, config: Config, tokenizer: Tokenizer
               ) -> Row:
  cls, sep = tokenizer.cls_id, tokenizer.sep_id
  ids = np.concatenate([[cls], first, [sep], second, [sep]]).astype(np.int32)
  special = np.zeros(len(ids), bool)
  special[[0, 1 + len(first), -1]] = True
  return _masked(ids, special, rng, config, tokenizer) | dict(
      types=np.arange(len(ids)) >= len(first) + 2,
      segment_ids=np.ones(len(ids)), nsp_targets=target)


def _masked(ids: np.ndarray, special: np.ndarray, rng: np.random.Generator,
            config: Config, tokenizer: Tokenizer) -> Row:
  """Returns tokens, targets and weights of a row."""
  masked, chosen = mask(
      ids, special, rng, tokenizer, rate=config.data.mask_rate,
      whole_words=config.data.whole_words, size=config.model.vocab_size)
  return dict(tokens=masked, targets=ids, weights=chosen)


def most(rate: float, length: int) -> int:
  """Returns how many tokens of `length` are chosen at most; where words are
  masked whole, the last word may exceed it."""
  return max(1, round(rate * length))


def mask(ids: np.ndarray, special: np.ndarray, rng: np.random.Generator,
         tokenizer: Tokenizer, *, rate: float, whole_words: bool, size: int = 0
         ) -> tuple[np.ndarray, np.ndarray]:
  """Returns (ids with some masked, which of them are to be predicted).

  Args:
    ids: int32 [L].
    special: bool [L], never masked.
    rng: of the draws.
    tokenizer: its mask token and vocabulary.
    rate: the share of tokens that are chosen, at least one of them.
    whole_words: whether all tokens of a word are chosen, or none.
    size: how many ids the model has; 0: as many as the tokenizer.
  """
  places = np.flatnonzero(~special)
  wanted = most(rate, len(places))
  word = np.cumsum(_starts(ids, tokenizer) if whole_words
                   else np.ones(len(ids), bool))
  order = rng.permutation(np.unique(word[places]))
  sizes = np.bincount(word[places], minlength=word[-1] + 1)
  taken = np.cumsum(sizes[order]) - sizes[order] < wanted
  chosen = np.isin(word, order[taken]) & ~special
  draw = rng.random(len(ids))
  masked = np.where(chosen & (draw < 0.8), tokenizer.mask_id, ids)
  known = min(tokenizer.vocab_size, size or tokenizer.vocab_size)
  other = rng.integers(0, known, len(ids))
  masked = np.where(chosen & (draw >= 0.8) & (draw < 0.9), other, masked)
  return masked.astype(np.int32), chosen


def _starts(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """Returns bool [L]: whether a word begins at a token."""
  begins, ends = _words(tokenizer)
  after = np.concatenate([[True], ends[ids[:-1]]])
  return begins[ids] | after


@functools.lru_cache(maxsize=4)
def _words(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """Returns bool [V] twice: which tokens begin a word, which end one."""
  special = set(tokenizer.special_ids.values())
  pieces = [b' ' if i in special else tokenizer.decode_bytes([i])
            for i in range(tokenizer.vocab_size)]
  if any(piece.startswith(b'##') and len(piece) > 2 for piece in pieces):
    begins = np.array([not piece.startswith(b'##') for piece in pieces])
    return begins, np.zeros(len(pieces), bool)
  begins = np.array([piece[:1].isspace() for piece in pieces])
  ends = np.array([piece[-1:].isspace() for piece in pieces])
  usual = [i not in special for i in range(len(pieces))]
  require(bool((begins | ends)[usual].any()), f'data.whole_words: tokenizer '
          f'{tokenizer.name!r} does not show where a word begins. Set it to '
          'False, or take WordPiece, bytes or a byte-level BPE.')
  return begins, ends


def rows(batch: Batch) -> jax.Array:
  """Returns how many rows are not padding."""
  return _real_B(batch).sum()


def _real_B(batch: Batch) -> jax.Array:
  return (batch['segment_ids'] != 0).any(1).astype(jnp.float32)


def unread(config: Config, length: int) -> int:
  """Returns how many places of a row `masked_words` leaves out."""
  M = most(config.data.mask_rate, length)
  return 0 if config.data.whole_words or config.mesh.context > 1 else max(
      length - M, 0)


def masked_words(output: Output, batch: Batch, config: Config) -> Figures:
  """Returns objectives.token_loss of the tokens to predict: the head reads no
  other places. `mask` chooses at most `most` tokens of a row; if a batch has
  more, the loss is nan. If words are masked whole, which may exceed that, or if
  a row is split over devices, the head reads every place."""
  weights_BL = batch['weights']
  L = weights_BL.shape[1]
  M = most(config.data.mask_rate, L)
  if config.data.whole_words or sharding.shards('length', L) > 1 or M >= L:
    return objectives.token_loss(output, batch, config)
  chosen_BL = weights_BL != 0
  places_BM = jnp.sort(jnp.where(chosen_BL, jnp.arange(L), L), 1)[:, :M]
  at = lambda x: jnp.take_along_axis(
      x, places_BM.reshape(*places_BM.shape, *(1,) * (x.ndim - 2)), 1,
      mode='clip')
  weights_BM = jnp.where(places_BM < L, at(weights_BL), 0)
  weights_BM = jnp.where(chosen_BL.sum() > (places_BM < L).sum(), jnp.nan,
                         weights_BM)
  return objectives.token_loss(
      output.replace(hidden=at(output.hidden)),
      dict(targets=at(batch['targets']), weights=weights_BM), config)


def mlm_and_nsp(output: Output, batch: Batch, config: Config) -> Figures:
  """Returns BERT's losses: of the masked words, and of whether the second text
  follows the first. One is a mean over these words, the other over rows."""
  figures = masked_words(output, batch, config)
  for name in ('loss', 'accuracy'):
    figures[f'mlm_{name}'] = figures.pop(name)
  real_B = _real_B(batch)
  logits_B2 = output.extra['nsp_logits']
  targets_B1 = batch['nsp_targets'][:, None]
  nsp_B = -jnp.take_along_axis(
      jax.nn.log_softmax(logits_B2, -1), targets_B1, 1)[:, 0]
  right_B = jnp.argmax(logits_B2, -1) == batch['nsp_targets']
  return figures | {
      'nsp_loss': Mean((real_B * nsp_B).sum(), real_B.sum()),
      'nsp_accuracy': Mean((real_B * right_B).sum(), real_B.sum())}


def _check_next_sentence(config: Config) -> None:
  model = config.model
  stack = getattr(architectures.systems().get(model.arch), 'STACK', '')
  require(model.next_sentence or stack != 'encoder',
          f'model.next_sentence is {model.next_sentence}, and objective '
          f'{config.objective!r} trains the head that it stands for: set it to '
          "True, or choose objective 'mlm'")


def masked_diffusion(window: causal.Window, rng: np.random.Generator,
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
    apart = objectives.documents(ids == tokenizer.separator_id)
  return dict(tokens=np.where(masked, tokenizer.mask_id, ids), targets=ids,
              weights=masked / t) | apart


def tokens(batch: Batch) -> jax.Array:
  """Returns how many tokens of a batch are text, masked or not."""
  return (batch['segment_ids'] != 0).astype(jnp.float32).sum()


def over_all_tokens(output: Output, batch: Batch, config: Config) -> Figures:
  """Returns the weighted losses of the masked tokens over the number of all
  tokens; the accuracy is a mean over the masked ones, by weight."""
  figures = objectives.token_loss(output, batch, config)
  return {name: mean if name == 'accuracy' else Mean(mean.total, tokens(batch))
          for name, mean in figures.items()}


_READS = ('data.mask_rate', 'data.whole_words')
_MLM_NSP = Objective(
    ('encoder',), Stretches, mlm_nsp,
    lambda config: objectives.text_arrays(
        config, 'types', 'segment_ids') | {'nsp_targets': ((), np.int32)},
    reads=_READS, figures=mlm_and_nsp, unread=unread,
    terms={'mlm_loss': objectives.targets, 'nsp_loss': rows},
    guess=lambda config, vocab: math.log(vocab) + math.log(2),
    check=_check_next_sentence)
OBJECTIVES = {
    'mlm': Objective(
        ('encoder',), Passages, mlm, objectives.document_arrays,
        reads=(*_READS, 'data.document_mask'), figures=masked_words,
        unread=unread),
    'mlm_nsp': _MLM_NSP,
    'mlm_sop': _MLM_NSP._replace(example=mlm_sop),
    'masked_diffusion': Objective(
        ('encoder',), causal.Windows, masked_diffusion,
        objectives.document_arrays, reads=('data.document_mask',),
        figures=over_all_tokens, terms={'loss': tokens}, bound=True),
}
