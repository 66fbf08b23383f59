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


def start_of_target(config: Config, tokenizer: Tokenizer) -> int:
  """Returns the token that a decoder is given first, before any token of the
  target: the padding token, as in T5 and Marian, or the token that ends a text,
  as in BART.

  Args:
    config: the config of the run, whose model.arch names the architecture.
    tokenizer: the tokenizer of the run.
  """
  system = architectures.system(config.model.arch)
  if getattr(system, 'STARTS_AFTER_END', False):
    return tokenizer.separator_id
  return objectives.padding_id(tokenizer)


class Pair(NamedTuple):
  """The tokens of a source and of its target.

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
    """Reads pairs of texts, or cuts windows of text that become pairs.

    Args:
      corpus: pairs or plain text of one split.

    Raises:
      RequestError: for a source that holds pairs and other documents.
    """
    # Cut plain text into windows as long as a source and a target together.
    # Tokens and bytes are counted where the model predicts them, so here only
    # the share of the targets counts.
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

    # Count the tokens and the bytes of the targets. A pair is a document of two
    # parts, the source and after it the target; `parts` has the place at which
    # each begins. The separator that follows a target is predicted as well,
    # hence the + 1.
    self._items = documents = Documents(corpus.tokens)
    targets = documents.first + 1
    parts = documents.parts
    self.num_tokens = int(np.sum(parts[targets + 1] - parts[targets] + 1))
    self.num_bytes = int(np.sum(documents.num_bytes[targets]))

  def __len__(self) -> int:
    return len(self._items)

  def __getitem__(self, i: int) -> Pair:
    """Reads pair i: a text whose first part is the source and whose rest is the
    target, or a source and target that belong together."""
    item = self._items[int(i)]
    if isinstance(item, causal.Window):
      M, L = self._lengths
      ids = item.tokens[:min(item.size, M + L)]
      return Pair(source=ids[:M], target=ids[M:], whole=False)
    parts = dict(item)
    return Pair(source=parts['source'], target=parts['target'], whole=True)


def lay_out_pair(source: np.ndarray, target: np.ndarray, start: int) -> Row:
  """Lays out a source and its target as one row for an encoder-decoder.

  Args:
    source: the M tokens of the source, which the encoder reads.
    target: the L tokens of the target, which the decoder predicts.
    start: the token that the decoder is given before the target.

  Returns:
    tokens and segment_ids [M]: the source, and 1 for each of its tokens.
    decoder_tokens and decoder_segment_ids [L]: `start` and the target without
    its last token, and 1 for each. targets and weights [L]: the target, and 1
    for each of its tokens.
  """
  ones_L = np.ones(len(target))
  # The decoder sees the target one token later than it predicts it.
  decoder_tokens_L = np.concatenate([[start], target])[:len(target)]
  return dict(tokens=source, segment_ids=np.ones(len(source)),
              decoder_tokens=decoder_tokens_L, decoder_segment_ids=ones_L,
              targets=target, weights=ones_L)


def arrays_of_pair(M: int, L: int) -> dict[str, Shape]:
  """Returns {key: (shape, dtype)} of a row: a source of M tokens, a target of
  L."""
  source = ((M,), np.int32)
  target = ((L,), np.int32)
  return dict(tokens=source, segment_ids=source, decoder_tokens=target,
              decoder_segment_ids=target, targets=target,
              weights=((L,), np.float32))


def count_cut_tokens(num_tokens: int, density: float, mean: float
                     ) -> tuple[int, int]:
  """Computes how many tokens of a text are cut out in span corruption, and in
  how many spans.

  Args:
    num_tokens: the number of tokens of the text.
    density: the share of them that is cut out.
    mean: the mean number of tokens of a span.

  Returns:
    The number of tokens that are cut out, and the number of spans.
  """
  # At least one token is cut out, and at least one stays. Each span has a token
  # or more, and a token that stays before it. So there are no more spans than
  # tokens that are cut out, nor than tokens that stay.
  num_cut = min(max(round(num_tokens * density), 1), num_tokens - 1)
  num_staying = num_tokens - num_cut
  num_spans = max(round(num_cut / mean), 1)
  return num_cut, min(num_spans, num_cut, num_staying)


def draw_cut_tokens(num_tokens: int, density: float, mean: float,
                    rng: np.random.Generator) -> np.ndarray:
  """Draws which tokens of a text are cut out, in spans (Raffel et al. 2020,
  section 3.1.4).

  Args:
    num_tokens: the number of tokens of the text, at least 2.
    density: the share of them that is cut out.
    mean: the mean length of a span that is cut out.
    rng: the random generator that draws the spans.

  Returns:
    bool [num_tokens], whether a token is cut out.
  """
  num_cut, num_spans = count_cut_tokens(num_tokens, density=density, mean=mean)

  def draw_lengths(total: int) -> np.ndarray:
    """Splits `total` tokens into `num_spans` parts of at least one token, each
    split equally likely, and returns the lengths of the parts."""
    ends = rng.choice(total - 1, num_spans - 1, replace=False) + 1
    return np.diff(np.concatenate([[0], np.sort(ends), [total]]))

  # The text alternates between stretches that stay and spans that are cut out,
  # and begins with one that stays. Interleave their lengths, and repeat False
  # (stays) and True (cut out) as often as each is long.
  staying_lengths = draw_lengths(num_tokens - num_cut)
  cut_lengths = draw_lengths(num_cut)
  lengths = np.stack([staying_lengths, cut_lengths], axis=1).reshape(-1)
  is_cut = np.tile([False, True], num_spans)
  return np.repeat(is_cut, lengths)


def replace_by_sentinels(ids: np.ndarray, cut: np.ndarray, sentinels: np.ndarray
                         ) -> tuple[np.ndarray, np.ndarray]:
  """Makes the source and the target of span corruption from a text (T5: Raffel
  et al. 2020, section 3.1.4). The source is the text without the spans that are
  cut out, the target is these spans. In each, a sentinel (a special token)
  stands where the other has tokens: "a b c d" without "b c" becomes "a <0> d"
  and "<0> b c <1>".

  Args:
    ids: [n], the tokens of a text.
    cut: bool [n], which of them are cut out.
    sentinels: the ids of the sentinels in their order, at least as many as
      there are spans.

  Returns:
    The token ids of the source, and those of the target.
  """
  def replace_spans(is_replaced: np.ndarray) -> np.ndarray:
    """Returns the text with one sentinel in the place of each span."""
    # A span begins at a token that is replaced and follows one that is not. The
    # sentinel of the span is written over its first token, and the other tokens
    # of the span are dropped. number_of_span numbers the spans for this.
    follows_replaced = np.concatenate([[False], is_replaced[:-1]])
    begins_span = is_replaced & ~follows_replaced
    number_of_span = np.maximum(np.cumsum(begins_span) - 1, 0)
    shown = np.where(begins_span, sentinels[number_of_span], ids)
    return shown[~is_replaced | begins_span]

  return replace_spans(cut), replace_spans(~cut)


def replace_by_masks(ids: np.ndarray, cut: int, mean: float, mask: int,
                     rng: np.random.Generator) -> np.ndarray:
  """Cuts random spans out of a text, and leaves one mask for each (text
  infilling of BART: Lewis et al. 2020, section 2.2).

  The lengths of the spans are drawn from a Poisson distribution. A span may
  have no tokens: then a mask is inserted where nothing is missing.

  Args:
    ids: the tokens of the text.
    cut: the number of tokens to cut out.
    mean: the mean number of tokens of a span.
    mask: the id of the mask.
    rng: the random generator that draws the spans.

  Returns:
    The tokens of the text with masks, at most as many as there were.
  """
  # Draw lengths of spans until they add up to `cut`, and shorten the last one.
  # There can be no more spans than gaps between the tokens that stay.
  num_staying = len(ids) - cut
  lengths = rng.poisson(mean, min(cut, num_staying + 1))
  is_before_last = np.cumsum(lengths) < cut
  num_spans = int(is_before_last[:-1].sum()) + 1
  lengths = lengths[:num_spans]
  lengths[-1] = cut - lengths[:-1].sum()

  # Draw the gaps where the spans are, each gap at most once, so that no two
  # spans touch. The text then alternates between stretches that stay and spans;
  # it ends with a stretch, which the 0 makes a pair with an empty span. Keep
  # the stretches, and insert a mask at each gap.
  gaps = np.sort(rng.choice(num_staying + 1, num_spans, replace=False))
  staying_lengths = np.diff([0, *gaps, num_staying])
  run_lengths = np.stack([staying_lengths, [*lengths, 0]], axis=1).reshape(-1)
  is_shown = np.repeat(np.tile([True, False], num_spans + 1), run_lengths)
  return np.insert(ids[is_shown], gaps, mask)


def permute_sentences(ids: np.ndarray, ends: np.ndarray, share: float,
                      rng: np.random.Generator) -> np.ndarray:
  """Returns a text in which some sentences have changed places with one
  another.

  Args:
    ids: [n], the tokens of the text.
    ends: bool [n], which of them end a sentence.
    share: the share of the sentences that change places, rounded up.
    rng: the random generator that draws these sentences and their places.
  """
  # Cut the text after each token that ends a sentence, but not after its last
  # token. Then permute the chosen sentences among their places.
  sentences = np.split(ids, np.flatnonzero(ends[:-1]) + 1)
  order = np.arange(len(sentences))
  chosen = rng.permutation(len(order))[:math.ceil(share * len(order))]
  order[chosen] = rng.permutation(chosen)
  return np.concatenate([sentences[i] for i in order])


@functools.lru_cache(maxsize=4)
def _find_sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
  """Finds which tokens of a vocabulary end a sentence: the separator between
  documents, and those whose text ends with '.', '!' or '?'.

  Args:
    tokenizer: the tokenizer, whose vocabulary has V ids.

  Returns:
    bool [V], whether each token ends a sentence.
  """
  special_ids = set(tokenizer.special_ids.values())

  def ends_sentence(token: int) -> bool:
    """Returns whether a token ends a sentence. Special tokens do not, except
    for the separator."""
    if token == tokenizer.separator_id:
      return True
    if token in special_ids:
      return False
    text = tokenizer.decode_bytes([token]).rstrip()
    return text.endswith((b'.', b'!', b'?'))

  return np.array([ends_sentence(i) for i in range(tokenizer.vocab_size)])


class Texts(causal.Windows):
  """Windows of data.length - 1 tokens, which leave room for the separator at
  the end of a row."""

  AROUND = 1


class SequenceToSequence(Objective):
  """Prediction of a target from its source, by an encoder-decoder."""
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
    """Lays out a pair of texts as a row of an encoder-decoder, as
    `lay_out_pair` does. Tokens that do not fit into the row are cut off.

    Args:
      item: the token ids of a source and of its target, and whether both are
        `whole` texts.
      rng: not used, as nothing is drawn.
      config: the config of the run.
      tokenizer: the tokenizer of the run.
    """
    # A source has up to M tokens and a target up to L. The separator follows
    # whole texts, but not those that were cut out of a longer text.
    M, L = pair_lengths(config)
    source = item.source
    target = item.target
    if item.whole:
      source = np.append(source, tokenizer.separator_id)
      target = np.append(target, tokenizer.separator_id)
    return lay_out_pair(source[:M], target=target[:L],
                        start=start_of_target(config, tokenizer))

  def arrays(self, config: Config) -> dict[str, Shape]:
    M, L = pair_lengths(config)
    return arrays_of_pair(M, L)

  def prompt(self, texts: Sequence[str], config: Config, tokenizer: Tokenizer
             ) -> Prompts:
    """Prepares texts as the sources of an encoder-decoder, which is to write
    the targets.

    The suffixes name axes: B batch, M tokens of a source.

    Args:
      texts: the B sources.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The beginning of each target, a single token; and the encoded sources as
      further arguments of the model.
    """
    # A source ends with the separator, as those of training do.
    rows = []
    for ids in tokenizer.encode_batch(texts):
      rows.append(np.append(ids, tokenizer.separator_id))
    source_BM, lengths_B = objectives.pad_prompts(rows)

    # Each target has one token so far, after which the model writes.
    start = start_of_target(config, tokenizer)
    start_B1 = np.full((len(texts), 1), start, np.int32)
    return Prompts(
        tokens=start_B1,
        lengths=np.ones(len(texts), np.int32),
        arguments=dict(source_BM=source_BM, source_lengths_B=lengths_B))


class SpanCorruption(SequenceToSequence):
  """Prediction of the spans that are cut out of a text (T5)."""
  view = causal.Windows
  reads = ('span.noise_density', 'span.mean_length')

  def example(self, item: causal.Window, rng: np.random.Generator,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Cuts spans out of a window of text, for the model to write them (span
    corruption of T5). The row is that of `lay_out_pair`; source and target end
    with the separator.

    Args:
      item: a window of text: `tokens`, [L + 1], of which the first `size` are
        no padding.
      rng: the random generator that draws the spans.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Raises:
      RequestError: for a tokenizer with fewer sentinels than spans.
    """
    # Each span needs a sentinel of its own. Check it for a full window, which
    # has the most spans, so that all rows fail or none.
    density = config.span.noise_density
    mean = config.span.mean_length
    length = config.data.length
    _, most_spans = count_cut_tokens(length, density=density, mean=mean)
    sentinels = np.asarray(tokenizer.sentinel_ids, np.int32)
    require(most_spans <= len(sentinels), f"objective 'span' cuts {most_spans} "
            f'spans out of data.length={length}, but tokenizer '
            f'{tokenizer.name!r} has {len(sentinels)} sentinels (<extra_id_0>, '
            '...): choose another tokenizer, a shorter length or a larger '
            'span.mean_length')

    ids = item.tokens[:min(item.size, length)]
    start = start_of_target(config, tokenizer)
    end = tokenizer.separator_id
    # A single token leaves nothing to cut out. Without targets the row does not
    # count in the loss.
    if len(ids) < 2:
      return lay_out_pair(ids, target=ids[:0], start=start)
    # Spans go from the source to the target, a sentinel stays in their place.
    cut = draw_cut_tokens(len(ids), density=density, mean=mean, rng=rng)
    source, target = replace_by_sentinels(ids, cut=cut, sentinels=sentinels)
    return lay_out_pair(np.append(source, end), target=np.append(target, end),
                        start=start)

  def arrays(self, config: Config) -> dict[str, Shape]:
    length = config.data.length
    span = config.span
    cut, spans = count_cut_tokens(length, density=span.noise_density,
                                  mean=span.mean_length)
    end = 1
    return arrays_of_pair(length - cut + spans + end, cut + spans + end)


class Denoising(SequenceToSequence):
  """Prediction of a text, from the text with its sentences permuted and spans
  of it masked (BART)."""
  view = Texts
  reads = ('span.noise_density', 'span.mean_length', 'span.permuted')

  def example(self, item: causal.Window, rng: np.random.Generator,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Permutes the sentences of a window of text and replaces spans by masks,
    for the model to write the text as it was (BART: Lewis et al. 2020). The row
    is that of `lay_out_pair`; source and target end with the separator.

    Args:
      item: a window of text: `tokens`, [L + 1], of which the first `size` are
        no padding.
      rng: the random generator that draws the order and the spans.
      config: the config of the run.
      tokenizer: the tokenizer of the run.
    """
    # The 1 leaves room for the separator.
    span = config.span
    end = tokenizer.separator_id
    source = target = item.tokens[:min(item.size, config.data.length - 1)]
    # A single token has no order, and a span of it would be all of it.
    if len(target) > 1:
      ends_sentence = _find_sentence_ends(tokenizer)[target]
      source = permute_sentences(target, ends=ends_sentence,
                                 share=span.permuted, rng=rng)
      cut, _ = count_cut_tokens(len(source), density=span.noise_density,
                                mean=span.mean_length)
      source = replace_by_masks(source, cut=cut, mean=span.mean_length,
                                mask=tokenizer.mask_id, rng=rng)
    return lay_out_pair(np.append(source, end), target=np.append(target, end),
                        start=start_of_target(config, tokenizer))

  def arrays(self, config: Config) -> dict[str, Shape]:
    return arrays_of_pair(config.data.length, config.data.length)


OBJECTIVES = {
    'seq2seq': SequenceToSequence(),
    'span': SpanCorruption(),
    'denoising': Denoising(),
}
