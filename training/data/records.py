"""Labelled records, kept in memory: which labels they have, and how they are
cut into the rows of batches.

A corpus of records is read anew in each process. Tokens of text are kept in a
cache because a corpus has millions of them; labelled data seldom have.

What is longer than a row is shown in several, neighbours of which share
data.stride tokens (Devlin et al. 2019's code, run_squad.py). A label of a word
counts in the one row in which the word's first token has the most context. In a
row that does not show all of an answer, as in one of a question without any,
what is to be predicted is the null token.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from common.errors import RequestError, check_choice, require, shorten
from training.data import labelled, sources, tokens
from training.data.tokenizers import Tokenizer

# A column with more different values than these may hold something else than
# labels.
MOST_LABELS_OF_TEXTS = 50
MOST_LABELS_OF_WORDS = 1000
NUM_SHOWN_LABELS = 20
NUM_SHOWN_RARE_LABELS = 5
NO_WORD = -1
# A row of a sentence has one special token before it and one after it.
SPECIAL_TOKENS_OF_SENTENCE = 2


def read_training_records(config: Any) -> list[Any]:
  """Reads the labelled examples (records) that a run trains on.

  Args:
    config: the config of the run; data.source names one source or several.

  Returns:
    The training records of all sources, in the order of the sources.

  Raises:
    RequestError: for a record that has no label.
  """
  data = config.data
  training_records = []
  # If the run has separate evaluation data, no record is held out.
  holdout_every = 0 if data.eval_source else data.holdout_every
  for _, source in sources.parse_sources(data.source):
    records = list(source.records())
    labelled.check_all_labelled(source.name, records)
    # Labels and class weights must not depend on the records that are held out
    # for evaluation. The selection follows from the number of a record in its
    # source, as it does for the rows of batches.
    is_of_training = tokens.select_documents(
        np.arange(len(records)), holdout_every=holdout_every, split='train')
    training_records += itertools.compress(records, is_of_training)
  return training_records


def find_labels(config: Any) -> tuple[str, ...]:
  """Returns the class labels of a run, in the order of their class numbers.

  Args:
    config: the config of the run. Where data.labels is empty, the labels are
      collected from the training data.

  Returns:
    data.labels as it is written; else the different labels of the training
    data, in numerical order if all are whole numbers, else alphabetically.

  Raises:
    RequestError: for one label alone, or so many that they may be texts.
  """
  if config.data.labels:
    return tuple(config.data.labels)
  records = read_training_records(config)

  # A wrong column in the place of the labels would make an absurdly large
  # output layer. Texts, or numbers of rows, are seldom the same twice, so that
  # a column with a label for every other record, or more, is taken for one.
  max_labels = max(MOST_LABELS_OF_TEXTS, len(records) / 2)
  labels: set[str] = set()
  for record in records:
    if isinstance(record, labelled.Sentence):
      # A sentence has a label for each word, such as a part of speech.
      labels.update(record.labels)
      max_labels = MOST_LABELS_OF_WORDS
    else:
      labels.add(record.label)
  require(1 < len(labels) <= max_labels,
          f'data source {config.data.source!r} has '
          f'{len(labels):,} label(s) in {len(records):,} training records: two '
          'or more are needed, and many may be another column')
  return sort_labels(labels)


def describe_labels(views: Sequence[Any]) -> list[str]:
  """Describes how often each class label occurs in the training data.

  Args:
    views: the rows of a run's training data, one sequence for each data source.

  Returns:
    Lines for the log: the number of rows of each label (of words, if each word
    has a label), and perhaps a warning about labels that occur at most once. []
    for data without labels.
  """
  # Count each label over all sources, and remember where it stands last. Rows
  # of other kinds, such as plain text, have no labels and are passed over.
  labels: tuple[str, ...] = ()
  counts: collections.Counter[str] = collections.Counter()
  place_of_label: dict[str, str] = {}
  for view in views:
    if not isinstance(view, Rows) or not view.labels:
      continue
    # All sources of a run have the same labels, so the first ones are enough.
    labels = labels or view.labels
    for label, place in view.labels_with_places():
      counts[label] += 1
      place_of_label[label] = place
  if not labels:
    return []

  # List the first labels with their counts: there may be a thousand.
  shown_counts = [f'{label} {counts[label]:,}'
                  for label in labels[:NUM_SHOWN_LABELS]]
  if len(labels) > NUM_SHOWN_LABELS:
    shown_counts.append('...')
  lines = [f'labels: {len(labels)}, in training {", ".join(shown_counts)}']

  # A label that occurs once cannot be learned; it may be a typing error or the
  # header of the file.
  rare = [label for label in labels if counts[label] <= 1]
  if rare:
    lines.append(_warn_of_rare_labels(rare, place_of_label))
  return lines


def _warn_of_rare_labels(rare: Sequence[str],
                         location_of_label: Mapping[str, str]) -> str:
  """Returns a warning about labels that occur once in the training data, or
  never.

  Args:
    rare: these labels, at least one.
    location_of_label: {label: the file and line where it occurs}. A label that
      never occurs is not a key.
  """
  shown_labels = []
  for label in rare[:NUM_SHOWN_RARE_LABELS]:
    shown_labels.append(f'{label!r} ({location_of_label.get(label, "none")})')

  # A label in the first line of a file may be the name of its column. Give
  # advice for the first such label; it is '' for any other place.
  advice = ''
  for label in rare:
    if label in location_of_label:
      location = location_of_label[label]
      advice = advice or labelled.advice_for_line_of_names(location)
  return ('warning: one record of training alone, or none, has the label '
          f'{", ".join(shown_labels)}{advice}')


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
  """Returns labels in order, numbers by their size and others by the alphabet.
  """
  labels = set(labels)
  if all(label.removeprefix('-').isdecimal() for label in labels):
    return tuple(sorted(labels, key=int))
  return tuple(sorted(labels))


def check_labels(labels: Sequence[str]) -> None:
  """Raises RequestError for a data.labels that does not name two labels or
  more."""
  are_texts = all(isinstance(label, str) and label for label in labels)
  if not are_texts or len({*labels}) != len(labels) or len(labels) == 1:
    raise RequestError(f'data.labels is {tuple(labels)}: write two labels or '
                       'more, as different strings')


def class_weights(config: Any, labels: Sequence[str]) -> np.ndarray:
  """Returns the weight of each class in the training loss.

  Args:
    config: the config of the run. Its data.class_weights is '' for weights of
      1, a text such as '0.5,2' with a number for each label, or 'balanced' for
      scikit-learn's class_weight of this name: the weight of a label that
      `count` of N records have is N / (number of labels * count).
    labels: the labels of the run, in the order of their class numbers.

  Returns:
    float64 [labels], how much a record of each label counts.

  Raises:
    RequestError: for a data.class_weights that is not one of these, and where
      training has no record of a label that is to be balanced.
  """
  written = config.data.class_weights
  if not written:
    return np.ones(len(labels))

  # Balanced weights make all labels count the same in sum, however many
  # records each has. A label without a record would divide by 0.
  if written == 'balanced':
    record_labels = [record.label for record in read_training_records(config)]
    counts = np.array([record_labels.count(label) for label in labels])
    require(counts.all(), f'data.class_weights is {written!r}, but no training '
            f'record has the label {labels[counts.argmin()]!r}')
    return len(record_labels) / (len(labels) * counts)

  # Otherwise there is one number for each label. A text that holds anything
  # else gives [], whose length is wrong, so that it is refused below.
  try:
    weights = [float(number) for number in written.split(',')]
  except ValueError:
    weights = []
  are_positive = all(0 < weight < math.inf for weight in weights)
  if len(weights) != len(labels) or not are_positive:
    raise RequestError(
        f"data.class_weights is {written!r}: write 'balanced', or with commas "
        'between a number above 0 for each of the labels '
        f'{", ".join(labels)}')
  return np.array(weights)


class Item(NamedTuple):
  """A record of one text or of two, tokenised for a row.

  Attributes:
    texts: the ids [T] of each text, cut so that they fit into a row.
    target: the number to predict: that of the label, or the label as a number.
    weight: how much it counts in the loss.
    between: the number of separators between two texts of a row.
  """
  texts: tuple[np.ndarray, ...]
  target: float
  weight: float
  between: int = 1

  @property
  def length(self) -> int:
    """The number of tokens of its row."""
    return sum(map(len, self.texts)) + count_special_tokens(len(self.texts),
                                                            self.between)


class Rows:
  """The rows of a split of labelled data, as a sequence of `items`.

  Attributes:
    items: one for each row.
    bare: whether its records have nothing to predict, as
      labelled.has_nothing_to_predict says: their targets are 0 and mean
      nothing.
    labels: the labels of the run, by number; (): its rows have none.
  """
  items: Sequence[Any]
  bare: bool
  labels: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, i: int) -> Any:
    return self.items[int(i)]

  def labels_with_places(self) -> Iterator[tuple[str, str]]:
    """Yields each label that the rows have, with the place where it stands."""
    return iter(())


class Texts(Rows):
  """Texts or pairs of texts with what is to be predicted of them, one a row.

  A row has one token before its texts and one after them, and `separators`
  between them. What does not fit into data.length is cut off at the end: of a
  pair, as transformers does it, from the longer text, until both are as long.

  Attributes:
    records: the record of each row.
    lengths: int32 [N], the tokens of each row.
    cut: how many rows had to be cut off.
  """

  def __init__(self, corpus: sources.Corpus):
    """Tokenises all records, and cuts each to the length of a row.

    Args:
      corpus: the records of one split, each of a text or a pair of texts.
    """
    # Encode the texts of all records in one call, which the tokenizer runs in
    # parallel. The flat list has one text of a record, or two, after another.
    self.records = list(corpus.records)
    self.bare = any(map(labelled.has_nothing_to_predict, self.records))
    texts: list[str] = []
    for record in self.records:
      texts += record.texts
    remaining_ids = iter(corpus.tokenizer.encode_batch(texts))

    # Make a row of each record, which takes as many encoded texts as it has.
    target_weights = self.weights(corpus)
    num_separators = separators_between_texts(corpus.config)
    self.items: list[Item] = []
    self.cut = 0
    for record in self.records:
      text_ids = [next(remaining_ids) for _ in record.texts]
      kept_ids = _cut_texts_to_row(record, rows=text_ids, corpus=corpus,
                                   between=num_separators)
      if sum(map(len, kept_ids)) < sum(map(len, text_ids)):
        self.cut += 1
      # A record without a label, which is to be predicted, has a target that
      # nothing reads.
      target = 0
      weight = 1.0
      if record.label:
        target = self.target(record)
      if target_weights is not None:
        weight = float(target_weights[target])
      self.items.append(Item(texts=tuple(kept_ids), target=target,
                             weight=weight, between=num_separators))

    # Count tokens as the rows hold them, and bytes of the texts before any was
    # cut.
    self.lengths = np.array([item.length for item in self.items], np.int32)
    self.num_tokens = int(self.lengths.sum())
    self.num_bytes = 0
    for text in texts:
      self.num_bytes += len(text.encode('utf-8'))

  def weights(self, corpus: sources.Corpus) -> np.ndarray | None:
    """Returns the weight of each target in the loss.

    Args:
      corpus: the labelled data of one split.

    Returns:
      float [targets], indexed by the target; None where all count alike.
    """
    return None

  def target(self, record: labelled.Record) -> float:
    """Returns the number that is to be predicted for a record: that of its
    class, or its label as a number."""
    raise NotImplementedError


def _cut_texts_to_row(record: labelled.Record, rows: Sequence[np.ndarray],
                      corpus: sources.Corpus, between: int) -> list[np.ndarray]:
  """Truncates the tokens of a text, or of a pair of texts, so that they fit
  into a row together with the special tokens.

  Args:
    record: the labelled example, for messages.
    rows: the token ids [T] of each of its texts, one or two.
    corpus: the data that it belongs to. The config in it has data.length, the
      length of a row.
    between: the number of separators between two texts.

  Returns:
    The first token ids of each text.

  Raises:
    RequestError: for a text without a token, and if a row has no room for a
      token of each text.
  """
  # A text without a token would have to be classified from nothing.
  for text_ids, column in zip(rows, record.names):
    require(len(text_ids) > 0,
            f'{record.where} column {column!r}, has no token that '
            f'the tokenizer {corpus.tokenizer.name!r} knows')

  # Compute how many tokens a row has room for beside the special ones.
  length = corpus.config.data.length
  num_special = count_special_tokens(len(rows), between)
  room = length - num_special
  require(room >= len(rows), f'data.length is {length}: a row of '
          f'{len(rows)} text(s) needs {num_special + len(rows)} or more')

  # Cut off the ends of the texts, that of the longer one first.
  kept_sizes = cut_sizes([len(text_ids) for text_ids in rows], room)
  return [text_ids[:size] for text_ids, size in zip(rows, kept_sizes)]


class Classes(Texts):
  """Texts with one of some labels."""

  def __init__(self, corpus: sources.Corpus):
    self.labels = find_labels(corpus.config)
    self._number = {label: i for i, label in enumerate(self.labels)}
    super().__init__(corpus)

  def weights(self, corpus: sources.Corpus) -> np.ndarray | None:
    if corpus.split != 'train':
      return None
    return class_weights(corpus.config, self.labels)

  def target(self, record: labelled.Record) -> int:
    """Returns the class number of a record's label.

    Args:
      record: a labelled text, or a pair of texts.

    Raises:
      RequestError: for a label that is none of the run's.
    """
    # record.where, the file and the line, ends with a comma.
    location = record.where.rstrip(',')
    try:
      check_choice(f'label in {location}:', value=record.label,
                   choices=self._number)
    except RequestError as error:
      raise RequestError(
          f'{error}{labelled.advice_for_line_of_names(location)}') from error
    return self._number[record.label]

  def labels_with_places(self) -> Iterator[tuple[str, str]]:
    for record in self.records:
      yield record.label, record.where.rstrip(',')


class Numbers(Texts):
  """Texts with a number."""

  def target(self, record: labelled.Record) -> float:
    """Returns a record's label as a number, for regression.

    Args:
      record: a labelled text, or a pair of texts.

    Raises:
      RequestError: for a label that is not a finite number.
    """
    # A label that is no number, such as 'good', is refused like NaN.
    try:
      number = float(record.label)
    except ValueError:
      number = math.nan
    require(math.isfinite(number), f'{record.where} has the label '
            f'{shorten(record.label)}, which is no number: objective '
            "'regression' learns numbers"
            + labelled.advice_for_line_of_names(record.where))
    return number


def cut_sizes(sizes: Sequence[int], room: int) -> list[int]:
  """Returns how many tokens of one text, or of each of two, fit into a row.

  The longer text is cut first, and then both alike, as the strategy
  longest_first of the package tokenizers does.

  Args:
    sizes: the number of tokens of each text, of one or two.
    room: the number of tokens that a row has room for, special tokens not
      counted.

  Returns:
    The number of tokens to keep of each text, from its start.
  """
  if sum(sizes) <= room:
    return [*sizes]
  if len(sizes) == 1:
    return [room]

  # The shorter text of a pair keeps all of its tokens up to half of the room,
  # and the longer one gets what is left.
  size_of_shorter = min(*sizes, room // 2)
  first, second = sizes
  if first <= second:
    return [size_of_shorter, room - size_of_shorter]
  return [room - size_of_shorter, size_of_shorter]


def separators_between_texts(config: Any) -> int:
  """Returns how many separators a system has between the two texts of a row."""
  import architectures  # here, for eval.py --help answers without JAX
  system = architectures.systems()[config.model.arch]
  return getattr(system, 'PAIR_SEPARATORS', 1)


def count_special_tokens(texts: int, between: int) -> int:
  """Returns how many special tokens a row has beside its texts.

  Args:
    texts: the number of texts of the row.
    between: the number of separators between two texts.
  """
  return 2 + between * (texts - 1)


def special_tokens(tokenizer: Tokenizer, stack: str) -> tuple[int, int]:
  """Returns the id before the texts of a row, and the id after each text.

  Args:
    tokenizer: the tokenizer of the run.
    stack: what the model stacks: an encoder has [CLS] and [SEP], and a decoder
      the separator of documents for both.
  """
  if stack == 'encoder':
    return tokenizer.cls_id, tokenizer.sep_id
  return tokenizer.separator_id, tokenizer.separator_id


class Words(NamedTuple):
  """The tokens of a sentence whose words are given.

  Attributes:
    ids: int32 [T].
    words_T: int32 [T], the word that each token begins in; NO_WORD: it is the
      space between two.
    first_T: bool [T], the first token of each word.
  """
  ids: np.ndarray
  words_T: np.ndarray
  first_T: np.ndarray


def tokenize_words(sentences: Sequence[Sequence[str]], tokenizer: Tokenizer
                   ) -> list[Words]:
  """Tokenises sentences that are given as lists of words, and finds out which
  word each token is a part of.

  Args:
    sentences: the words of each sentence.
    tokenizer: the tokenizer of the run.

  Returns:
    The `Words` of each sentence: its token ids and their words.
  """
  # A sentence is encoded as one text, as the tokenizer splits running text:
  # many begin a word with its space, which a lone word would lack. The spans
  # then tell where the words are.
  texts = [' '.join(words) for words in sentences]
  encoded = tokenizer.encode_spans(texts)
  tokenised = []
  for words, (ids, spans_T2) in zip(sentences, encoded):
    tokenised.append(_align_words(words, ids=ids, spans_T2=spans_T2))
  return tokenised


def _align_words(words: Sequence[str], ids: np.ndarray, spans_T2: np.ndarray
                 ) -> Words:
  """Finds the word that each token of a sentence belongs to.

  The suffixes name axes: W words and T tokens of the sentence.

  Args:
    words: the words of the sentence.
    ids: int32 [T], the token ids of the words, which were joined by spaces.
    spans_T2: int [T, 2], the first character that each token stands for, and
      the one after its last.

  Returns:
    The ids; the number of the word of each token, NO_WORD for a token of none;
    and whether each token begins a word.
  """
  # Find the end of each word: the index of the space that follows it.
  ends_W = np.cumsum([1 + len(word) for word in words]) - 1

  # A token belongs to the word in which it begins. If it begins with the space
  # between two words, as GPT-2's tokens do, it is taken to begin one character
  # later. The number of its word is the number of words that end at or before
  # its beginning, hence 'right'. A token that is only a space belongs to no
  # word.
  start_T = spans_T2[:, 0]
  end_T = spans_T2[:, 1]
  begin_T = start_T + np.isin(start_T, ends_W)
  words_T = np.searchsorted(ends_W, begin_T, 'right')
  words_T = np.where(begin_T < end_T, words_T, NO_WORD)

  # Mark the first token of each word. np.unique also gives that of NO_WORD,
  # which is removed again.
  first_T = np.zeros(len(ids), bool)
  _, first_places = np.unique(words_T, return_index=True)
  first_T[first_places] = True
  first_T &= words_T != NO_WORD
  return Words(ids=ids, words_T=words_T.astype(np.int32), first_T=first_T)


class Piece(NamedTuple):
  """The part of a sentence that a row shows.

  Attributes:
    ids: int32 [T], its tokens.
    targets: int32 [T], the number of the label that counts here, or 0.
    weights: float32 [T], how much that counts in the loss; 0: nothing.
    sentence: the number of the sentence.
    words: int32 [T], the word whose label that is; NO_WORD: none.
  """
  ids: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  sentence: int
  words: np.ndarray


class Sentences(Rows):
  """Sentences with a label for each word, cut into rows.

  Attributes:
    records: the sentences, by labelled.read_sentences.
    items: a Piece for each row.
    labels: the labels of the run, by number.
    num_tokens, num_bytes: the size of the text.
  """

  def __init__(self, corpus: sources.Corpus):
    """Tokenises all sentences, and cuts the long ones into several rows.

    Args:
      corpus: the sentences of one split, with a label for each word.
    """
    # Read the sentences, and check their labels before the slow part begins.
    # Labels of entities (B-PER, I-PER, ...) must have a valid order.
    config = corpus.config
    self.records = list(corpus.records)
    self.bare = any(map(labelled.has_nothing_to_predict, self.records))
    self.labels = find_labels(config)
    self._number = {label: i for i, label in enumerate(self.labels)}
    if labelled.marks_entities(self.labels) and not self.bare:
      for sentence in self.records:
        labelled.check_entities(sentence)
    room = config.data.length - SPECIAL_TOKENS_OF_SENTENCE
    require(room > 0, f'data.length is {config.data.length}: a row of a '
            f'sentence needs {SPECIAL_TOKENS_OF_SENTENCE + 1} or more')

    # Tokenise all sentences, and cut each into rows. The rows have the number
    # of their sentence, by which its predictions are joined again.
    tokenised = tokenize_words([sentence.words for sentence in self.records],
                               corpus.tokenizer)
    self.items: list[Piece] = []
    self.num_tokens = 0
    self.num_bytes = 0
    for number, (sentence, words) in enumerate(zip(self.records, tokenised)):
      class_numbers_W = self._numbers(sentence)
      shared = choose_stride(config, room=room, location=sentence.locations[0])
      self.items += _cut_sentence(number, words=words, numbers=class_numbers_W,
                                  shared=shared, room=room)
      self.num_tokens += len(words.ids)
      self.num_bytes += len(' '.join(sentence.words).encode('utf-8'))

  def _numbers(self, sentence: labelled.Sentence) -> np.ndarray:
    """Returns the number of the label of each word; 0 where it has none."""
    numbers_W = np.zeros(len(sentence.words), np.int32)
    labels = zip(sentence.labels, sentence.locations)
    for i, (label, location) in enumerate(labels):
      check_choice(f'label in {location}:', value=label, choices=self._number)
      numbers_W[i] = self._number[label]
    return numbers_W

  def labels_with_places(self) -> Iterator[tuple[str, str]]:
    for sentence in self.records:
      yield from zip(sentence.labels, sentence.locations)


def _cut_sentence(sentence: int, words: Words, numbers: np.ndarray,
                  shared: int, room: int) -> list[Piece]:
  """Cuts the tokens of a sentence into rows, which overlap if there are
  several.

  Args:
    sentence: the number of the sentence.
    words: its tokens, with the word of each.
    numbers: int [words], the class number of the label of each word.
    shared: the number of tokens that two neighbouring rows share.
    room: the largest number of tokens of a row, without special tokens.

  Returns:
    The rows, from the first to the last token. Each word is predicted in
    exactly one of them.
  """
  # The row that shows a token with the most context owns this token.
  num_tokens = len(words.ids)
  windows = cut_into_windows(num_tokens, room=room, stride=shared)
  owner_T = find_owners(windows, num_tokens)

  pieces = []
  for row_number, (first, end) in enumerate(windows):
    # A word is to be predicted once: at its first token, in the row that owns
    # this token. All other tokens have weight 0. NO_WORD is -1, so that
    # `numbers[words_T]` reads a wrong label there, which np.where replaces.
    is_owned_T = owner_T[first:end] == row_number
    counts_T = words.first_T[first:end] & is_owned_T
    words_T = np.where(counts_T, words.words_T[first:end], NO_WORD)
    targets_T = np.where(counts_T, numbers[words_T], 0)
    pieces.append(Piece(
        ids=words.ids[first:end], targets=targets_T.astype(np.int32),
        weights=counts_T.astype(np.float32), sentence=sentence, words=words_T))
  return pieces


class Window(NamedTuple):
  """A question and the part of its paragraph that a row shows.

  Attributes:
    question: int32 [T], all of it.
    context: int32 [T], a stretch of the paragraph.
    answer: the first and the last token of the answer in `context`; None: it
      does not show the answer.
    asked: the number of the question.
    first: the token of the paragraph that `context` begins with.
    between: the number of separators between the question and `context`.
  """
  question: np.ndarray
  context: np.ndarray
  answer: tuple[int, int] | None
  asked: int
  first: int
  between: int = 1


class Questions(Rows):
  """Questions on paragraphs, cut into rows.

  Attributes:
    questions: all of them, by labelled.read_questions.
    contexts: for each question its paragraph, and int32 [T, 2], the characters
      that each of its tokens stands for.
    items: a Window for each row.
    num_tokens, num_bytes: the size of the rows' text.
  """

  def __init__(self, corpus: sources.Corpus):
    """Tokenises all questions, and cuts long paragraphs into several rows.

    Args:
      corpus: the paragraphs of one split, with their questions.
    """
    # Encode all questions and all paragraphs, each in one call. Only paragraphs
    # need spans, by which an answer's characters are found among the tokens.
    paragraphs = corpus.records
    self.bare = any(map(labelled.has_nothing_to_predict, paragraphs))
    self.questions: list[labelled.Question] = []
    for paragraph in paragraphs:
      self.questions += paragraph.questions
    asked = corpus.tokenizer.encode_batch(
        [question.question for question in self.questions])
    encoded = corpus.tokenizer.encode_spans(
        [paragraph.context for paragraph in paragraphs])

    # Cut the rows of each question, of which a paragraph may have several. A
    # question's number is its place in `questions`, `asked` and `contexts`,
    # which are all in the same order.
    self.contexts: list[tuple[str, np.ndarray]] = []
    self.items: list[Window] = []
    self.num_bytes = 0
    for paragraph, (ids, spans_T2) in zip(paragraphs, encoded):
      for question in paragraph.questions:
        number = len(self.contexts)
        self.contexts.append((paragraph.context, spans_T2))
        self.items += _cut_paragraph(question, number=number,
                                     asked=asked[number], ids=ids,
                                     spans_T2=spans_T2, corpus=corpus)
        for text in (question.question, paragraph.context):
          self.num_bytes += len(text.encode('utf-8'))
    # A window counts as often as it is shown.
    self.num_tokens = 0
    for item in self.items:
      self.num_tokens += len(item.question) + len(item.context)


def _cut_paragraph(question: labelled.Question, number: int, asked: np.ndarray,
                   ids: np.ndarray, spans_T2: np.ndarray, corpus: sources.Corpus
                   ) -> list[Window]:
  """Cuts one question of extractive question answering into rows, each with
  the whole question and a part of its paragraph.

  Args:
    question: the question, with its answers as (text, first character).
    number: the number of the question in its data.
    asked: int32 [Q], the token ids of the question.
    ids: int32 [T], the token ids of its paragraph.
    spans_T2: int [T, 2], the first character that each token of the paragraph
      stands for, and the one after its last.
    corpus: the corpus that it is of; its data.length is the length of a row.

  Returns:
    The rows, whose parts of the paragraph overlap.

  Raises:
    RequestError: for a question that leaves no room for its paragraph, and for
      an answer without a token.
  """
  # The question and the special tokens take up a part of each row.
  location = question.where
  length = corpus.config.data.length
  between = separators_between_texts(corpus.config)
  room = length - count_special_tokens(2, between) - len(asked)
  require(room > 0, f'{location}, has {len(asked)} tokens, which leave no room '
          f'for its paragraph in data.length {length}: choose a larger one')

  # Training has one answer for each question, the first; the others are for
  # evaluation. The characters of the answer become its first and last token.
  answer = None
  if question.answers:
    text, start = question.answers[0]
    answer = find_tokens(spans_T2, start=start, end=start + len(text))
    require(answer is not None, f'{location}, has an answer without a token '
            f'that the tokenizer {corpus.tokenizer.name!r} knows')

  # Cut the paragraph. A row that shows only a part of the answer, or nothing of
  # it, counts as one without an answer: its target is the null token (BERT's
  # run_squad.py does this too). Tokens are counted from the row's own part on.
  shared = choose_stride(corpus.config, room=room,
                         location=f'the paragraph of {location}')
  windows = []
  for first, end in cut_into_windows(len(ids), room=room, stride=shared):
    answer_in_row = None
    if answer is not None:
      answer_first, answer_last = answer
      if first <= answer_first and answer_last < end:
        answer_in_row = (answer_first - first, answer_last - first)
    windows.append(Window(
        question=asked, context=ids[first:end], answer=answer_in_row,
        asked=number, first=first, between=between))
  return windows


def choose_stride(config: Any, room: int, location: str) -> int:
  """Returns how many tokens two neighbouring windows of a long text share.

  Args:
    config: the config of a run. If data.stride is 0, they share a third of
      data.length, as in BERT (128 of 384), but at most half a window.
    room: the largest number of tokens of a window.
    location: the text that is cut, for messages.

  Raises:
    RequestError: for a data.stride so large that a window has nothing new.
  """
  data = config.data
  if not data.stride:
    return min(data.length // 3, room // 2)
  require(data.stride < room, f'data.stride is {data.stride}, but in '
          f'data.length {data.length} there is room for {room} tokens of '
          f'{location}: choose a smaller stride, or a larger length')
  return data.stride


def cut_into_windows(size: int, room: int, stride: int) -> list[tuple[int,
                                                                      int]]:
  """Cuts a text into as few overlapping windows as show all of it.

  Args:
    size: the number of tokens of the text.
    room: the largest number of tokens of a window.
    stride: how many tokens two neighbouring windows share; less than `room`.

  Returns:
    (first token, end) of each window. All windows but the last have `room`
    tokens.
  """
  assert 0 <= stride < room, (stride, room)
  # The first window shows `room` tokens and each other one room - stride new
  # ones. -(-a // b) rounds the quotient up.
  num_windows = 1 + max(0, -(-(size - room) // (room - stride)))
  starts = [i * (room - stride) for i in range(num_windows)]
  return [(start, min(start + room, size)) for start in starts]


def find_owners(windows_W2: Sequence[tuple[int, int]], size: int) -> np.ndarray:
  """Finds the window of a text in which each token has the most context. That
  is the number of tokens on the side where it has fewer, as in BERT's code
  (run_squad.py, _check_is_max_context).

  Args:
    windows_W2: (first token, end) of each of W windows, which together show
      every token.
    size: the number of tokens of the text.

  Returns:
    int32 [size], the number of the window for each token; the first one if
    several are equal.
  """
  # Compute the context of each of T tokens in each of W windows: the smaller of
  # the numbers of tokens that the window shows before and after it.
  place_1T = np.arange(size)[None]
  bounds_W2 = np.array(windows_W2)
  first_W1 = bounds_W2[:, :1]
  end_W1 = bounds_W2[:, 1:]
  before_WT = place_1T - first_W1
  after_WT = end_W1 - 1 - place_1T
  context_WT = np.minimum(before_WT, after_WT)

  # BERT adds a hundredth of the window's length, so that of equal contexts the
  # one in the longer window wins: the last window may be shorter. In a window
  # that does not show a token, one side is negative; that must never win.
  score_WT = context_WT + 0.01 * (end_W1 - first_W1)
  score_WT = np.where(context_WT < 0, -np.inf, score_WT)
  return np.argmax(score_WT, 0).astype(np.int32)


def find_tokens(spans_T2: np.ndarray, start: int, end: int
                ) -> tuple[int, int] | None:
  """Finds the tokens that stand for some characters of a text.

  Args:
    spans_T2: int [T, 2], the first character that each of the T tokens of the
      text stands for, and the one after its last.
    start, end: the first of the characters, and the one after the last.

  Returns:
    The indices of the first and the last of these tokens; None if there are
    none.
  """
  # A token counts if it stands for at least one of the characters.
  spelt_T = (spans_T2[:, 0] < end) & (spans_T2[:, 1] > start)
  places = np.flatnonzero(spelt_T)
  if not len(places):
    return None
  return int(places[0]), int(places[-1])
