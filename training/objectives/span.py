"""Span corruption (Raffel et al. 2020, section 3.1.4): T5's objective.

  text    Thank you for inviting me to your party last week
  source  Thank you <0> me to your party <1> week </s>
  target  <0> for inviting <1> last </s>

Of n tokens round(density n) are cut out, in max(1, round(cut / mean)) spans.
The cut tokens, and those that stay, are split into as many spans at random,
every split alike likely; they alternate, and a cut one comes last, as in the
paper's code (random_spans_noise_mask). So rows have one length, whatever is
drawn. The figure in the paper ends the target with one sentinel more; its
code, followed here, doesn't.
"""

import numpy as np

from configs.errors import RequestError
from training.data import packing
from training.data.tokenizers import Tokenizer
from training.objectives import seq2seq
from training.objectives.record import Config, Row, Shape


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
    shown = np.where(first, sentinels[np.maximum(np.cumsum(first) - 1, 0)],
                     ids)
    return shown[~gone | first]
  return side(cut), side(~cut)


def span(window: packing.Window, rng: np.random.Generator, config: Config,
         tokenizer: Tokenizer) -> Row:
  """Corrupts the data.length tokens of a window.

  Returns:
    as `seq2seq.lay_out`; both rows end with the separator.
  """
  density, mean = config.span.noise_density, config.span.mean_length
  length = config.data.length
  if length < 2:
    raise RequestError(f'data.length={length}: a span is cut out of 2 or more.')
  _, most_spans = sizes(length, density, mean)
  sentinels = np.asarray(tokenizer.sentinel_ids, np.int32)
  if most_spans > len(sentinels):
    raise RequestError(
        f"objective 'span' cuts {most_spans} spans out of "
        f'data.length={length}, but tokenizer {tokenizer.name!r} has '
        f'{len(sentinels)} sentinels (<extra_id_0>, ...): choose another '
        'tokenizer, a shorter length or a larger span.mean_length.')
  n = min(window.size, length)
  end = tokenizer.separator_id
  ids = window.tokens[:n]
  if n < 2:  # nothing to cut out: a row that does not count
    source, target = ids, ids[:0]
  else:
    source, target = corrupt(ids, draw(n, density, mean, rng), sentinels)
    source, target = np.append(source, end), np.append(target, end)
  return seq2seq.lay_out(source, target, tokenizer)


def _arrays(config: Config) -> dict[str, Shape]:
  length, span_ = config.data.length, config.span
  cut, spans = sizes(length, span_.noise_density, span_.mean_length)
  return seq2seq.two_rows(length - cut + spans + 1, cut + spans + 1)


OBJECTIVES = {
    'span': seq2seq.ENCODER_DECODER._replace(
        view=packing.Windows, example=span, arrays=_arrays,
        reads=('span.noise_density', 'span.mean_length')),
}
