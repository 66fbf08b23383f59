"""Records with labels, kept in memory: which there are, which labels they
have, and how they are cut into rows.

A corpus of records is read anew in each process. Tokens of text are kept in a
cache because a corpus has millions of them; labelled data seldom have.
"""

import collections
from collections.abc import Iterable, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from configs.errors import RequestError, one_of, require, short
from training.data import holdout, labelled, packing, sources
from training.data.tokenizers import Tokenizer

MANY_LABELS = 50  # so many may be a column of something else than labels


def load(source: sources.Source) -> list[Any]:
  """Returns all records of a source, in order.

  Raises:
    RequestError: for a file without any, or a record that is none.
  """
  found: list[Any] = []
  for path in source.files or ('',):
    before = len(found)
    found.extend(source.read(path))
    require(len(found) > before, f'data source {source.name!r} is empty: '
            f'{path or "it"} holds no record')
  return found


def of_training(config: Any) -> list[Any]:
  """Returns the records that a run trains on, of all its sources."""
  data, found = config.data, []
  for _, source in sources.parse(data.source):
    records = load(source)
    every = 0 if data.eval_source else data.holdout_every
    held = holdout.held_out(np.arange(len(records)), every)
    found += [record for record, out in zip(records, held) if not out]
  return found


def labels_of(config: Any) -> tuple[str, ...]:
  """Returns the labels of a run: data.labels, or those of its training data,
  numbers by their size and others by the alphabet.

  Raises:
    RequestError: for fewer than two, or for what are no labels.
  """
  if config.data.labels:
    return tuple(config.data.labels)
  records = of_training(config)
  found = collections.Counter(record.label for record in records)
  _check_first_lines(records, found)
  require(len(found) > 1, f'data source {config.data.source!r} has one label, '
          f'{short("".join(found))}, in all {len(records):,} training records: '
          'a classification needs two or more')
  require(len(found) <= max(MANY_LABELS, len(records) / 2),
          f'data source {config.data.source!r} has {len(found):,} labels in '
          f'{len(records):,} records: is the last of its FIELDS the column of '
          'the labels?')
  return in_order(found)


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
  """Returns labels, numbers by their size and others by the alphabet."""
  labels = set(labels)
  if all(label.removeprefix('-').isdecimal() for label in labels):
    return tuple(sorted(labels, key=int))
  return tuple(sorted(labels))


def _check_first_lines(records: Sequence[Any],
                       found: collections.Counter) -> None:
  """Raises RequestError for a first line that seems to hold names."""
  once = [label for label, count in found.items() if count == 1]
  for record in records:
    require(record.where.split()[-2:] != ['line', '1,']
            or once != [record.label],
            f'{record.where} has the label {short(record.label)}, which no '
            'other line has. If the line holds names of columns, say which '
            'ones are read: labelled:GLOB:sentence+label. Else list the labels '
            'in data.labels')


def check_labels(labels: Sequence[str]) -> None:
  """Raises RequestError for a data.labels that is none."""
  for label in labels:
    require(isinstance(label, str) and bool(label), 'data.labels has '
            f'{label!r}, which is no label: write them as strings')
    require(list(labels).count(label) == 1,
            f'data.labels has {label!r} twice')
  require(len(labels) != 1, f'data.labels is {tuple(labels)}: a classification '
          'needs two labels or more')


def class_weights(config: Any, labels: Sequence[str]) -> np.ndarray:
  """Returns what a record of each label counts in the training loss, [U].

  `balanced` gives each label the same weight in all, as scikit-learn's
  class_weight does: n / (labels * n of the label).

  Raises:
    RequestError: for a data.class_weights that is not one of these, and where
      training has no record of a label that is to be balanced.
  """
  written = config.data.class_weights
  if not written:
    return np.ones(len(labels))
  if written == 'balanced':
    found = [record.label for record in of_training(config)]
    counts = np.array([found.count(label) for label in labels])
    for label, count in zip(labels, counts):
      require(count > 0, f'data.class_weights is {written!r}, but no training '
              f'record has the label {label!r}')
    return len(found) / (len(labels) * counts)
  try:
    weights = [float(number) for number in written.split(',')]
  except ValueError as error:
    raise RequestError(
        f"data.class_weights is {written!r}: write 'balanced', or a number for "
        'each label with commas between') from error
  require(len(weights) == len(labels), f'data.class_weights is {written!r}, '
          f'{len(weights)} numbers for the {len(labels)} labels '
          f'{", ".join(labels)}')
  require(all(0 < weight < math.inf for weight in weights),
          f'data.class_weights is {written!r}: each must be > 0 and finite')
  return np.array(weights)


class Item(NamedTuple):
  """A record, tokenised.

  Attributes:
    texts: the ids [T] of each text, cut so that they fit into a row.
    target: what is to be predicted of it.
    weight: what it counts in the loss.
    between: separators between two texts of a row.
  """
  texts: tuple[np.ndarray, ...]
  target: float
  weight: float
  between: int = 1

  @property
  def length(self) -> int:
    """How many tokens its row has."""
    return sum(map(len, self.texts)) + around(len(self.texts), self.between)


class Texts:
  """Texts or pairs of texts with what is to be predicted of them, one a row.

  A row has one token before its texts and one after them, and `separators`
  between them. What does not fit into data.length is cut off at the end: of a
  pair, as transformers does it, from the longer text, until both are as long.

  Attributes:
    records: what each row is of.
    lengths: int32 [N], the tokens of each row.
    cut: how many rows had to be cut off.
  """
  RECORDS = labelled.KIND

  def __init__(self, corpus: packing.Corpus):
    self.records = [corpus.cache[i] for i in corpus.document_ids]
    length = corpus.config.data.length
    texts = [text for record in self.records for text in record.texts]
    ids = iter(corpus.tokenizer.encode_batch(texts))
    weights, between = self.weights(corpus), separators(corpus.config)
    self.items: list[Item] = []
    self.cut = 0
    for record in self.records:
      rows = [next(ids) for _ in record.texts]
      for row, name in zip(rows, record.names):
        require(len(row) > 0, f'{record.where} column {name!r}, has no token '
                f'that the tokenizer {corpus.tokenizer.name!r} knows')
      more = around(len(rows), between)
      room = length - more
      require(room >= len(rows), f'data.length is {length}: a row of '
              f'{len(rows)} text(s) needs {more + len(rows)} or more')
      sizes = fitting([len(row) for row in rows], room)
      self.cut += sum(sizes) < sum(map(len, rows))
      target = self.target(record)
      self.items.append(Item(
          tuple(row[:size] for row, size in zip(rows, sizes)), target,
          1.0 if weights is None else float(weights[target]), between))
    self.lengths = np.array([item.length for item in self.items], np.int32)
    self.num_tokens = int(self.lengths.sum())
    self.num_bytes = sum(len(text.encode('utf-8')) for text in texts)

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, i: int) -> Item:
    return self.items[int(i)]


class Classes(Texts):
  """Texts with one of some labels."""

  def __init__(self, corpus: packing.Corpus):
    self.labels = labels_of(corpus.config)
    self._number = {label: i for i, label in enumerate(self.labels)}
    super().__init__(corpus)

  def weights(self, corpus: packing.Corpus) -> np.ndarray | None:
    return (class_weights(corpus.config, self.labels)
            if corpus.split == 'train' else None)

  def target(self, record: labelled.Record) -> int:
    """Returns the number of a record's label."""
    one_of(f'label in {record.where.rstrip(",")}:', record.label, self._number)
    return self._number[record.label]


class Numbers(Texts):
  """Texts with a number."""

  def weights(self, corpus: packing.Corpus) -> None:
    return None

  def target(self, record: labelled.Record) -> float:
    """Returns a record's label as a number."""
    try:
      number = float(record.label)
    except ValueError:
      number = math.nan
    require(math.isfinite(number), f'{record.where} has the label '
            f'{short(record.label)}, which is no number: objective '
            "'regression' learns numbers")
    return number


def fitting(sizes: Sequence[int], room: int) -> list[int]:
  """Returns how many tokens of one text, or of each of two, are kept: as the
  strategy longest_first of the package tokenizers has it."""
  if sum(sizes) <= room:
    return [*sizes]
  if len(sizes) == 1:
    return [room]
  short_, long = sorted(sizes)
  if 2 * short_ <= room:
    kept = short_, room - short_
  else:
    kept = room // 2, room - room // 2
  return [*kept] if sizes[0] <= sizes[1] else [*kept[::-1]]


def separators(config: Any) -> int:
  """Returns how many separators stand between two texts of a row."""
  import architectures  # here, for eval.py --help answers without JAX
  system = architectures.systems()[config.model.arch]
  return config.data.pair_separators or getattr(system, 'PAIR_SEPARATORS', 1)


def around(texts: int, between: int) -> int:
  """Returns how many tokens a row has beside those of one text or of two:
  `between` these stand as many separators."""
  return 2 + between * (texts - 1)


def special_tokens(tokenizer: Tokenizer, stack: str) -> tuple[int, int]:
  """Returns the token before the texts of a row, and the one after each."""
  if stack == 'encoder':
    return tokenizer.cls_id, tokenizer.sep_id
  return tokenizer.separator_id, tokenizer.separator_id
