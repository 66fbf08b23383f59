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
  return (tokenizer.separator_id if getattr(system, 'STARTS_AFTER_END', False)
          else objectives.fill_id(tokenizer))


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


def seq2seq(pair: Pair, rng: np.random.Generator | None, config: Config,
            tokenizer: Tokenizer) -> Row:
  """Lays out one pair; what is longer than its row is cut off.

  Returns:
    as `lay_out`.
  """
  M, L = pair_lengths(config)
  source, target = pair.source, pair.target
  if pair.whole:
    source = np.append(source, tokenizer.separator_id)
    target = np.append(target, tokenizer.separator_id)
  return lay_out(source[:M], target[:L], start_id(config, tokenizer))


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
  source, target = ((M,), np.int32), ((L,), np.int32)
  return dict(tokens=source, segment_ids=source, decoder_tokens=target,
              decoder_segment_ids=target, targets=target,
              weights=((L,), np.float32))


def _arrays(config: Config) -> dict[str, Shape]:
  return two_rows(*pair_lengths(config))


def as_source(texts: Sequence[str], config: Config, tokenizer: Tokenizer
              ) -> Prompts:
  """Returns the start of a target for each text, which is the source; it ends
  with the separator, as the sources of training do."""
  sources, lengths = objectives.padded(
      [np.append(ids, tokenizer.separator_id)
       for ids in tokenizer.encode_batch(texts)])
  return Prompts(
      np.full((len(texts), 1), start_id(config, tokenizer), np.int32),
      np.ones(len(texts), np.int32),
      dict(source_BM=sources, source_lengths_B=lengths))


def sizes(n: int, density: float, mean: float) -> tuple[int, int]:
  """Returns how many of n tokens are cut out, and in how many spans."""
  cut = min(max(round(n * density), 1), n - 1)
  return cut, min(max(round(cut / mean), 1), cut, n - cut)


def draw(n: int, density: float, mean: float, rng: np.random.Generator
         ) -> np.ndarray:
  """Returns which of n tokens are cut out, bool [n]; n is at least 2."""
  cut, spans = sizes(n, density, mean)
  def split(total: int) -> np.ndarray:  # into `spans` parts of at least 1
    ends = rng.choice(total - 1, spans - 1, replace=False) + 1
    return np.diff(np.concatenate([[0], np.sort(ends), [total]]))
  runs = np.stack([split(n - cut), split(cut)], 1).reshape(-1)
  return np.repeat(np.tile([False, True], spans), runs)


def corrupt(ids: np.ndarray, cut: np.ndarray, sentinels: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray]:
  """Returns source and target: each span that the other has, a sentinel."""
  def side(gone: np.ndarray) -> np.ndarray:
    first = gone & ~np.concatenate([[False], gone[:-1]])
    shown = np.where(first, sentinels[np.maximum(np.cumsum(first) - 1, 0)], ids)
    return shown[~gone | first]
  return side(cut), side(~cut)


def span(window: causal.Window, rng: np.random.Generator, config: Config,
         tokenizer: Tokenizer) -> Row:
  """Corrupts the data.length tokens of a window.

  Returns:
    as `lay_out`; both rows end with the separator.
  """
  density, mean = config.span.noise_density, config.span.mean_length
  length = config.data.length
  _, most_spans = sizes(length, density, mean)
  sentinels = np.asarray(tokenizer.sentinel_ids, np.int32)
  require(most_spans <= len(sentinels), f"objective 'span' cuts {most_spans} "
          f'spans out of data.length={length}, but tokenizer '
          f'{tokenizer.name!r} has {len(sentinels)} sentinels (<extra_id_0>, '
          '...): choose another tokenizer, a shorter length or a larger '
          'span.mean_length')
  n = min(window.size, length)
  end = tokenizer.separator_id
  ids = window.tokens[:n]
  if n < 2:  # nothing to cut out: a row that does not count
    source, target = ids, ids[:0]
  else:
    source, target = corrupt(ids, draw(n, density, mean, rng), sentinels)
    source, target = np.append(source, end), np.append(target, end)
  return lay_out(source, target, start_id(config, tokenizer))


def infill(ids: np.ndarray, cut: int, mean: float, mask: int,
           rng: np.random.Generator) -> np.ndarray:
  """Returns ids of which `cut` are cut out in spans, with a mask for each: at
  most as many as there were."""
  stays = len(ids) - cut
  lengths = rng.poisson(mean, min(cut, stays + 1))
  count = int((np.cumsum(lengths) < cut)[:-1].sum()) + 1
  lengths = lengths[:count]
  lengths[-1] = cut - lengths[:-1].sum()
  gaps = np.sort(rng.choice(stays + 1, count, replace=False))
  runs = np.diff([0, *gaps, stays])
  pieces = np.stack([runs, [*lengths, 0]], 1).reshape(-1)
  shown = np.repeat(np.tile([True, False], count + 1), pieces)
  return np.insert(ids[shown], gaps, mask)


def permute(ids: np.ndarray, ends: np.ndarray, share: float,
            rng: np.random.Generator) -> np.ndarray:
  """Returns ids with a share of their sentences in another order.

  Args:
    ids: [n].
    ends: bool [n], which of them end a sentence.
    share: of the sentences, rounded up, that change places with one another.
    rng: of the draws.
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
  return np.array([
      i == tokenizer.separator_id or i not in special
      and tokenizer.decode_bytes([i]).rstrip().endswith((b'.', b'!', b'?'))
      for i in range(tokenizer.vocab_size)])


class Texts(causal.Windows):
  """Windows of data.length - 1 tokens, which leave room for the end."""

  AROUND = 1


def denoising(window: causal.Window, rng: np.random.Generator, config: Config,
              tokenizer: Tokenizer) -> Row:
  """Permutes the sentences of a window and fills spans with masks.

  Returns:
    as `lay_out`; both rows end with the separator.
  """
  settings, end = config.span, tokenizer.separator_id
  source = target = window.tokens[:min(window.size, config.data.length - 1)]
  if len(target) > 1:
    source = permute(target, _sentence_ends(tokenizer)[target],
                     settings.permuted, rng)
    cut, _ = sizes(len(source), settings.noise_density, settings.mean_length)
    source = infill(source, cut, settings.mean_length, tokenizer.mask_id, rng)
  return lay_out(np.append(source, end), np.append(target, end),
                 start_id(config, tokenizer))


def _span_arrays(config: Config) -> dict[str, Shape]:
  length, span_ = config.data.length, config.span
  cut, spans = sizes(length, span_.noise_density, span_.mean_length)
  return two_rows(length - cut + spans + 1, cut + spans + 1)


ENCODER_DECODER = Objective(
    ('encoder-decoder',), Pairs, seq2seq, _arrays,
    ('tokens', 'decoder_tokens'),
    {'segment_ids': 'segment_ids_BM',
     'decoder_segment_ids': 'decoder_segment_ids_BL'},
    ('segment_ids', 'decoder_segment_ids'), prompt=as_source)
OBJECTIVES = {
    'seq2seq': ENCODER_DECODER._replace(reads=('data.target_length',)),
    'span': ENCODER_DECODER._replace(
        view=causal.Windows, example=span, arrays=_span_arrays,
        reads=('span.noise_density', 'span.mean_length')),
    'denoising': ENCODER_DECODER._replace(
        view=Texts, example=denoising,
        arrays=lambda config: two_rows(*[config.data.length] * 2),
        reads=('span.noise_density', 'span.mean_length', 'span.permuted')),
}
