"""Sequence to sequence: a source is read, and its target is predicted.

`parallel:GLOB` names files of such pairs. From plain text pairs are cut: a
stretch of data.length tokens, and as its target the data.target_length tokens
that follow it. So every model can be tried on the default corpus, where it
learns to continue a text.

`span` is span corruption (Raffel et al. 2020, section 3.1.4), T5's objective:

  text    Thank you for inviting me to your party last week
  source  Thank you <0> me to your party <1> week </s>
  target  <0> for inviting <1> last </s>

Of n tokens round(density n) are cut out, in max(1, round(cut / mean)) spans.
The cut tokens, and those that stay, are split into as many spans at random,
every split alike likely; they alternate, and a cut one comes last, as in the
paper's code (random_spans_noise_mask). So rows have one length, whatever is
drawn. The figure in the paper ends the target with one sentinel more; its
code, followed here, doesn't.

`denoising` is BART's (Lewis et al. 2020, section 2.2: text infilling, after
sentence permutation), whose target is the whole text:

  text    A fox ran off. It saw a hen in the yard.
  source  It saw [MASK] yard. A [MASK] fox ran off. </s>
  target  A fox ran off. It saw a hen in the yard. </s>

Of the sentences of a row the share span.permuted changes places. Then round(
density n) tokens are cut out in spans whose lengths are drawn from a Poisson
distribution with the mean span.mean_length, the last of them cut short; each
span, one of no tokens too, is shown as one mask. No two touch: they stand in
gaps of what stays, every choice alike likely. A sentence ends with a token that
ends in . ! or ?, or with the text's separator.
"""

from collections.abc import Sequence
import functools
import math
from typing import NamedTuple

import numpy as np

import architectures
from common.errors import require
from training import objectives
from training.data import labelled, sources
from training.data.tokenizers import Tokenizer
from training.data.tokens import Documents
from training.objectives import Config, Objective, Prompts, Row, Shape, causal


def start_id(config: Config, tokenizer: Tokenizer) -> int:
  """Returns the token that a target starts after: what fills rows up, as in T5
  and Marian, or what ends a text, as in BART."""
  system = architectures.system(config.model.arch)
  if getattr(system, 'STARTS_AFTER_END', False):
    return tokenizer.separator_id
  return objectives.padding_id(tokenizer)


class Pair(NamedTuple):
  """A source and its target.

  Attributes:
    source, target: token ids, of any length.
    whole: whether both end where a text ends, and not in the middle of it.
  """
  source: np.ndarray
  target: np.ndarray
  whole: bool


def pair_lengths(config: Config) -> tuple[int, int]:
  """Returns how many tokens a source and a target may have: M and L."""
  return config.data.length, config.data.target_length or config.data.length


class Pairs:
  """Pairs of a source and a target, as a file has them. Plain text is cut into
  stretches of M + L tokens, whose last L are the target."""

  READS = (sources.TEXT, sources.PAIRS)

  def __init__(self, corpus: sources.Corpus):
    """Reads pairs of texts, or cuts windows of text that become pairs."""
    self._lengths = pair_lengths(corpus.config)
    self._items: causal.Windows | Documents
    if not corpus.tokens.kinds & {*labelled.PAIR}:
      self._items = causal.Windows(corpus, sum(self._lengths))
      share = self._lengths[1] / sum(self._lengths)
      self.num_tokens = max(1, round(self._items.num_tokens * share))
      self.num_bytes = max(1, round(self._items.num_bytes * share))
      return
    require(corpus.tokens.kinds == {*labelled.PAIR},
            f'data source {corpus.name!r} holds more than pairs')
    self._items = documents = Documents(corpus.tokens)
    targets = documents.first + 1
    parts = documents.parts
    self.num_tokens = int(np.sum(parts[targets + 1] - parts[targets] + 1))
    self.num_bytes = int(np.sum(documents.num_bytes[targets]))

  def __len__(self) -> int:
    return len(self._items)

  def __getitem__(self, i: int) -> Pair:
    item = self._items[int(i)]
    if isinstance(item, causal.Window):
      M, L = self._lengths
      ids = item.tokens[:min(item.size, M + L)]
      return Pair(ids[:M], ids[M:], False)
    parts = dict(item)
    return Pair(parts['source'], parts['target'], True)


def lay_out(source: np.ndarray, target: np.ndarray, start: int) -> Row:
  """Returns one row for an encoder-decoder.

  tokens, segment_ids [up to M]: the source, and 1 for each of its tokens.
  decoder_tokens, decoder_segment_ids [up to L]: the start, then the target but
  its last token. targets, weights [up to L]: the target.
  """
  real = np.ones(len(target))
  shown = np.concatenate([[start], target])[:len(target)]
  return dict(tokens=source, segment_ids=np.ones(len(source)),
              decoder_tokens=shown, decoder_segment_ids=real,
              targets=target, weights=real)


def two_rows(M: int, L: int) -> dict[str, Shape]:
  """Returns the arrays of a row: a source of M tokens, a target of L."""
  source = ((M,), np.int32)
  target = ((L,), np.int32)
  return dict(tokens=source, segment_ids=source, decoder_tokens=target,
              decoder_segment_ids=target, targets=target,
              weights=((L,), np.float32))


def sizes(n: int, density: float, mean: float) -> tuple[int, int]:
  """Returns how many of n tokens are cut out, and in how many spans."""
  cut = min(max(round(n * density), 1), n - 1)
  return cut, min(max(round(cut / mean), 1), cut, n - cut)


def draw(n: int, density: float, mean: float, rng: np.random.Generator
         ) -> np.ndarray:
  """Returns which of n tokens are cut out, bool [n]; n is at least 2.

  Args:
    n: the number of tokens.
    density: the share of them that is cut out.
    mean: the mean length of a span that is cut out.
    rng: draws the spans.
  """
  cut, spans = sizes(n, density, mean)

  def split(total: int) -> np.ndarray:
    """Returns the lengths of `spans` parts of at least 1, drawn alike likely.
    """
    ends = rng.choice(total - 1, spans - 1, replace=False) + 1
    return np.diff(np.concatenate([[0], np.sort(ends), [total]]))

  # Stretches that stay and stretches that are cut take turns.
  stay_lengths = split(n - cut)
  cut_lengths = split(cut)
  lengths = np.stack([stay_lengths, cut_lengths], axis=1).reshape(-1)
  is_cut = np.tile([False, True], spans)
  return np.repeat(is_cut, lengths)


def corrupt(ids: np.ndarray, cut: np.ndarray, sentinels: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray]:
  """Returns source and target. Each shows a sentinel for every span that the
  other has.

  Args:
    ids: [n].
    cut: bool [n], which of them the target has.
    sentinels: the ids of the sentinels, in order.
  """
  def side(gone: np.ndarray) -> np.ndarray:
    gone_before = np.concatenate([[False], gone[:-1]])
    is_first = gone & ~gone_before  # of a span
    number = np.maximum(np.cumsum(is_first) - 1, 0)
    shown = np.where(is_first, sentinels[number], ids)
    return shown[~gone | is_first]

  return side(cut), side(~cut)


def infill(ids: np.ndarray, cut: int, mean: float, mask: int,
           rng: np.random.Generator) -> np.ndarray:
  """Returns ids of which `cut` are cut out in spans, with a mask for each: at
  most as many as there were.

  Args:
    ids: the tokens.
    cut: how many of them are cut out.
    mean: the mean length of a span.
    mask: the token that stands for a span.
    rng: draws the spans.
  """
  # Lengths of spans, until they add up to `cut`; the last is cut short.
  stays = len(ids) - cut
  lengths = rng.poisson(mean, min(cut, stays + 1))
  is_short = np.cumsum(lengths) < cut
  count = int(is_short[:-1].sum()) + 1
  lengths = lengths[:count]
  lengths[-1] = cut - lengths[:-1].sum()

  # The gaps in what stays at which the spans stand.
  gaps = np.sort(rng.choice(stays + 1, count, replace=False))
  runs = np.diff([0, *gaps, stays])
  pieces = np.stack([runs, [*lengths, 0]], axis=1).reshape(-1)
  is_shown = np.repeat(np.tile([True, False], count + 1), pieces)
  return np.insert(ids[is_shown], gaps, mask)


def permute(ids: np.ndarray, ends: np.ndarray, share: float,
            rng: np.random.Generator) -> np.ndarray:
  """Returns ids with a share of their sentences in another order.

  Args:
    ids: [n].
    ends: bool [n], which of them end a sentence.
    share: the share of the sentences, rounded up, that change places with one
      another.
    rng: draws which, and their places.
  """
  sentences = np.split(ids, np.flatnonzero(ends[:-1]) + 1)
  order = np.arange(len(sentences))
  chosen = rng.permutation(len(order))[:math.ceil(share * len(order))]
  order[chosen] = rng.permutation(chosen)
  return np.concatenate([sentences[i] for i in order])


@functools.lru_cache(maxsize=4)
def _sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
  """Returns bool [V]: which tokens end a sentence."""
  special = set(tokenizer.special_ids.values())

  def ends(i: int) -> bool:
    if i == tokenizer.separator_id:
      return True
    if i in special:
      return False
    # A token ends a sentence if its last character does.
    piece = tokenizer.decode_bytes([i]).rstrip()
    return piece.endswith((b'.', b'!', b'?'))

  return np.array([ends(i) for i in range(tokenizer.vocab_size)])


class Texts(causal.Windows):
  """Windows of data.length - 1 tokens, which leave room for the end."""

  AROUND = 1


class SequenceToSequence(Objective):
  """A target, from its source."""
  stacks = ('encoder-decoder',)
  view = Pairs
  inputs = ('tokens', 'decoder_tokens')
  options = {'segment_ids': 'segment_ids_BM',
             'decoder_segment_ids': 'decoder_segment_ids_BL'}
  seen = ('segment_ids', 'decoder_segment_ids')
  reads = ('data.target_length',)
  writes = True

  def example(self, item: Pair, rng: np.random.Generator | None,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Lays out one pair as `lay_out` does; what is longer than its row is cut
    off."""
    M, L = pair_lengths(config)
    source = item.source
    target = item.target
    if item.whole:
      source = np.append(source, tokenizer.separator_id)
      target = np.append(target, tokenizer.separator_id)
    return lay_out(source[:M], target[:L], start_id(config, tokenizer))

  def arrays(self, config: Config) -> dict[str, Shape]:
    M, L = pair_lengths(config)
    return two_rows(M, L)

  def prompt(self, texts: Sequence[str], config: Config, tokenizer: Tokenizer
             ) -> Prompts:
    """Returns the start of a target for each text, which is the source; it ends
    with the separator, as the sources of training do."""
    # The sources.
    rows = []
    for ids in tokenizer.encode_batch(texts):
      rows.append(np.append(ids, tokenizer.separator_id))
    source_BM, lengths_B = objectives.pad_prompts(rows)

    # The targets, which have one token.
    start = start_id(config, tokenizer)
    start_B1 = np.full((len(texts), 1), start, np.int32)
    return Prompts(
        tokens=start_B1,
        lengths=np.ones(len(texts), np.int32),
        arguments=dict(source_BM=source_BM, source_lengths_B=lengths_B))


class SpanCorruption(SequenceToSequence):
  """The spans that are cut out of a text (T5)."""
  view = causal.Windows
  reads = ('span.noise_density', 'span.mean_length')

  def example(self, item: causal.Window, rng: np.random.Generator,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Corrupts the data.length tokens of a window, and lays them out as
    `lay_out` does; both rows end with the separator."""
    density = config.span.noise_density
    mean = config.span.mean_length
    length = config.data.length
    _, most_spans = sizes(length, density, mean)
    sentinels = np.asarray(tokenizer.sentinel_ids, np.int32)
    require(most_spans <= len(sentinels), f"objective 'span' cuts {most_spans} "
            f'spans out of data.length={length}, but tokenizer '
            f'{tokenizer.name!r} has {len(sentinels)} sentinels (<extra_id_0>, '
            '...): choose another tokenizer, a shorter length or a larger '
            'span.mean_length')

    ids = item.tokens[:min(item.size, length)]
    start = start_id(config, tokenizer)
    end = tokenizer.separator_id
    if len(ids) < 2:  # nothing to cut out: a row that does not count
      return lay_out(ids, ids[:0], start)
    # Spans go from the source to the target, a sentinel stays in their place.
    cut = draw(len(ids), density=density, mean=mean, rng=rng)
    source, target = corrupt(ids, cut, sentinels)
    return lay_out(np.append(source, end), np.append(target, end), start)

  def arrays(self, config: Config) -> dict[str, Shape]:
    length = config.data.length
    span = config.span
    cut, spans = sizes(length, span.noise_density, span.mean_length)
    end = 1
    return two_rows(length - cut + spans + end, cut + spans + end)


class Denoising(SequenceToSequence):
  """A text, from the text with its sentences permuted and spans masked (BART).
  """
  view = Texts
  reads = ('span.noise_density', 'span.mean_length', 'span.permuted')

  def example(self, item: causal.Window, rng: np.random.Generator,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Permutes the sentences of a window, fills spans with masks, and lays both
    out as `lay_out` does; both rows end with the separator."""
    span = config.span
    end = tokenizer.separator_id
    source = target = item.tokens[:min(item.size, config.data.length - 1)]
    # A single token has no order, and a span of it would be all of it.
    if len(target) > 1:
      ends_sentence = _sentence_ends(tokenizer)[target]
      source = permute(target, ends=ends_sentence, share=span.permuted, rng=rng)
      cut, _ = sizes(len(source), span.noise_density, span.mean_length)
      source = infill(source, cut=cut, mean=span.mean_length,
                      mask=tokenizer.mask_id, rng=rng)
    return lay_out(np.append(source, end), np.append(target, end),
                   start_id(config, tokenizer))

  def arrays(self, config: Config) -> dict[str, Shape]:
    return two_rows(config.data.length, config.data.length)


OBJECTIVES = {
    'seq2seq': SequenceToSequence(),
    'span': SpanCorruption(),
    'denoising': Denoising(),
}
