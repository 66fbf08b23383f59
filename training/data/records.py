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

from common.errors import RequestError, one_of, require, short
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
  """Returns the labelled records that a run trains on, of all its sources."""
  data = config.data
  training_records = []
  every = 0 if data.eval_source else data.holdout_every
  for _, source in sources.parse_sources(data.source):
    records = list(source.records())
    labelled.check_all_labelled(source.name, records)
    # Records that are held out for evaluation are left out.
    is_of_training = tokens.select_documents(np.arange(len(records)), every,
                                             'train')
    training_records += itertools.compress(records, is_of_training)
  return training_records


def find_labels(config: Any) -> tuple[str, ...]:
  """Returns the labels of a run: data.labels, or those of its training data,
  numbers by their size and others by the alphabet.

  Raises:
    RequestError: for one label alone, or so many that they may be texts.
  """
  if config.data.labels:
    return tuple(config.data.labels)
  records = read_training_records(config)
  # Texts, or numbers of rows, in the place of labels are seldom the same twice.
  most = max(MOST_LABELS_OF_TEXTS, len(records) / 2)
  labels: set[str] = set()
  for record in records:
    if isinstance(record, labelled.Sentence):
      labels.update(record.labels)
      most = MOST_LABELS_OF_WORDS
    else:
      labels.add(record.label)
  require(1 < len(labels) <= most, f'data source {config.data.source!r} has '
          f'{len(labels):,} label(s) in {len(records):,} training records: two '
          'or more are needed, and many may be another column')
  return sort_labels(labels)


def describe_labels(views: Sequence[Any]) -> list[str]:
  """Returns a line that says how many rows, or words, of training have each
  label, and a warning of labels that one alone has, or none; [] for data
  without labels.

  Args:
    views: the rows of a run's training data, one sequence for each source.
  """
  # How often each label stands there, and where it stands last.
  labels: tuple[str, ...] = ()
  counts: collections.Counter[str] = collections.Counter()
  places: dict[str, str] = {}
  for view in views:
    if not isinstance(view, Rows) or not view.labels:
      continue
    labels = labels or view.labels
    for label, place in view.labels_with_places():
      counts[label] += 1
      places[label] = place
  if not labels:
    return []

  # The first labels, and those that are too rare to be learned.
  listed = [f'{label} {counts[label]:,}' for label in labels[:NUM_SHOWN_LABELS]]
  if len(labels) > NUM_SHOWN_LABELS:
    listed.append('...')
  lines = [f'labels: {len(labels)}, in training {", ".join(listed)}']
  rare = [label for label in labels if counts[label] <= 1]
  if rare:
    lines.append(_warn_of_rare_labels(rare, places))
  return lines


def _warn_of_rare_labels(rare: Sequence[str], places: Mapping[str, str]) -> str:
  """Returns a warning of labels that stand once in the training data, or
  nowhere.

  Args:
    rare: these labels.
    places: where each label stands, of those that stand anywhere.
  """
  shown = []
  for label in rare[:NUM_SHOWN_RARE_LABELS]:
    shown.append(f'{label!r} ({places.get(label, "none")})')
  hint = ''
  for label in rare:
    if label in places:
      hint = hint or labelled.advice_for_line_of_names(places[label])
  return ('warning: one record of training alone, or none, has the label '
          f'{", ".join(shown)}{hint}')


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
  """Returns how much a record of each label counts in the training loss, [U].

  `balanced` gives each label the same weight in all, as scikit-learn's
  class_weight does: n / (labels * n of the label).

  Args:
    config: the config of the run, with data.class_weights.
    labels: the U labels of the run.

  Raises:
    RequestError: for a data.class_weights that is not one of these, and where
      training has no record of a label that is to be balanced.
  """
  written = config.data.class_weights
  if not written:
    return np.ones(len(labels))
  if written == 'balanced':
    # A label counts the more, the fewer records have it.
    of_records = [record.label for record in read_training_records(config)]
    counts = np.array([of_records.count(label) for label in labels])
    require(counts.all(), f'data.class_weights is {written!r}, but no training '
            f'record has the label {labels[counts.argmin()]!r}')
    return len(of_records) / (len(labels) * counts)

  # A number for each label.
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
    """Tokenises all records, and cuts each to the length of a row."""
    # The tokens of all texts, encoded at once.
    self.records = list(corpus.records)
    self.bare = any(map(labelled.has_nothing_to_predict, self.records))
    texts: list[str] = []
    for record in self.records:
      texts += record.texts
    ids = iter(corpus.tokenizer.encode_batch(texts))

    # The row of each record. A record without a label has the target 0.
    weights = self.weights(corpus)
    between = separators_between_texts(corpus.config)
    self.items: list[Item] = []
    self.cut = 0
    for record in self.records:
      rows = [next(ids) for _ in record.texts]
      kept = _cut_texts_to_row(record, rows=rows, corpus=corpus,
                               between=between)
      if sum(map(len, kept)) < sum(map(len, rows)):
        self.cut += 1
      target = 0
      weight = 1.0
      if record.label:
        target = self.target(record)
      if weights is not None:
        weight = float(weights[target])
      self.items.append(Item(texts=tuple(kept), target=target, weight=weight,
                             between=between))

    # How much text there is.
    self.lengths = np.array([item.length for item in self.items], np.int32)
    self.num_tokens = int(self.lengths.sum())
    self.num_bytes = 0
    for text in texts:
      self.num_bytes += len(text.encode('utf-8'))

  def weights(self, corpus: sources.Corpus) -> np.ndarray | None:
    """Returns how much a record of each target counts in the loss; None: all
    count alike."""
    return None

  def target(self, record: labelled.Record) -> float:
    """Returns the number to predict of a record, which follows from its label.
    """
    raise NotImplementedError


def _cut_texts_to_row(record: labelled.Record, rows: Sequence[np.ndarray],
                      corpus: sources.Corpus, between: int) -> list[np.ndarray]:
  """Returns the tokens of a record's texts, as many as a row has room for.

  Args:
    record: the record, for messages.
    rows: the tokens of each of its texts.
    corpus: the corpus that it is of.
    between: the number of separators between two texts.

  Raises:
    RequestError: for a text without a token, or a row without room for a token.
  """
  for row, name in zip(rows, record.names):
    require(len(row) > 0, f'{record.where} column {name!r}, has no token that '
            f'the tokenizer {corpus.tokenizer.name!r} knows')
  length = corpus.config.data.length
  more = count_special_tokens(len(rows), between)
  room = length - more
  require(room >= len(rows), f'data.length is {length}: a row of '
          f'{len(rows)} text(s) needs {more + len(rows)} or more')
  sizes = cut_sizes([len(row) for row in rows], room)
  return [row[:size] for row, size in zip(rows, sizes)]


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
    """Returns the number of a record's label."""
    where = record.where.rstrip(',')
    try:
      one_of(f'label in {where}:', record.label, self._number)
    except RequestError as error:
      raise RequestError(
          f'{error}{labelled.advice_for_line_of_names(where)}') from error
    return self._number[record.label]

  def labels_with_places(self) -> Iterator[tuple[str, str]]:
    for record in self.records:
      yield record.label, record.where.rstrip(',')


class Numbers(Texts):
  """Texts with a number."""

  def target(self, record: labelled.Record) -> float:
    """Returns a record's label as a number.

    Raises:
      RequestError: for a label that is not a number.
    """
    try:
      number = float(record.label)
    except ValueError:
      number = math.nan
    require(math.isfinite(number), f'{record.where} has the label '
            f'{short(record.label)}, which is no number: objective '
            "'regression' learns numbers"
            + labelled.advice_for_line_of_names(record.where))
    return number


def cut_sizes(sizes: Sequence[int], room: int) -> list[int]:
  """Returns how many tokens of one text, or of each of two, fit into a row.

  The longer text is cut first, as the strategy longest_first of the package
  tokenizers does.

  Args:
    sizes: the tokens of each text.
    room: the tokens that a row has room for.
  """
  if sum(sizes) <= room:
    return [*sizes]
  if len(sizes) == 1:
    return [room]
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
    texts: how many texts the row has.
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
  """Returns the tokens of sentences whose words are given, each a list of
  words. The words are joined by a space."""
  texts = [' '.join(words) for words in sentences]
  encoded = tokenizer.encode_spans(texts)
  tokenised = []
  for words, (ids, spans_T2) in zip(sentences, encoded):
    tokenised.append(_align_words(words, ids, spans_T2))
  return tokenised


def _align_words(words: Sequence[str], ids: np.ndarray, spans_T2: np.ndarray
                 ) -> Words:
  """Finds the word that each token of a sentence of W words belongs to.

  Args:
    words: the words.
    ids: int32 [T], the tokens of the words, joined by a space.
    spans_T2: the first character that each token stands for, and the one after
      its last.
  """
  # Where each word ends, and the space after it stands.
  ends_W = np.cumsum([1 + len(word) for word in words]) - 1

  # The word in which each token begins, after a space that it begins with.
  start_T = spans_T2[:, 0]
  end_T = spans_T2[:, 1]
  begin_T = start_T + np.isin(start_T, ends_W)
  words_T = np.searchsorted(ends_W, begin_T, 'right')
  words_T = np.where(begin_T < end_T, words_T, NO_WORD)

  first_T = np.zeros(len(ids), bool)
  _, places = np.unique(words_T, return_index=True)
  first_T[places] = True
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
    """Tokenises all sentences, and cuts the long ones into several rows."""
    # The sentences and their labels.
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

    # Their tokens, cut into rows.
    tokenised = tokenize_words([sentence.words for sentence in self.records],
                               corpus.tokenizer)
    self.items: list[Piece] = []
    self.num_tokens = 0
    self.num_bytes = 0
    for i, (sentence, words) in enumerate(zip(self.records, tokenised)):
      numbers_W = self._numbers(sentence)
      shared = choose_stride(config, room, sentence.lines[0])
      self.items += _cut_sentence(i, words=words, numbers=numbers_W,
                                  shared=shared, room=room)
      self.num_tokens += len(words.ids)
      self.num_bytes += len(' '.join(sentence.words).encode('utf-8'))

  def _numbers(self, sentence: labelled.Sentence) -> np.ndarray:
    """Returns the number of the label of each word; 0 where it has none."""
    numbers_W = np.zeros(len(sentence.words), np.int32)
    for i, (label, where) in enumerate(zip(sentence.labels, sentence.lines)):
      one_of(f'label in {where}:', label, self._number)
      numbers_W[i] = self._number[label]
    return numbers_W

  def labels_with_places(self) -> Iterator[tuple[str, str]]:
    for sentence in self.records:
      yield from zip(sentence.labels, sentence.lines)


def _cut_sentence(sentence: int, words: Words, numbers: np.ndarray,
                  shared: int, room: int) -> list[Piece]:
  """Cuts the tokens of one sentence into rows, neighbours of which share
  tokens.

  Args:
    sentence: the number of the sentence.
    words: its tokens.
    numbers: the number of the label of each of its words.
    shared: how many tokens two neighbouring rows share.
    room: the tokens of a row.
  """
  num_tokens = len(words.ids)
  windows = cut_into_windows(num_tokens, room, shared)
  owner_T = find_owners(windows, num_tokens)
  pieces = []
  for i, (first, end) in enumerate(windows):
    # A word counts in one row alone, at its first token.
    is_owned_T = owner_T[first:end] == i
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
    """Tokenises all questions, and cuts long paragraphs into several rows."""
    # The tokens of all questions, and of all paragraphs.
    paragraphs = corpus.records
    self.bare = any(map(labelled.has_nothing_to_predict, paragraphs))
    self.questions: list[labelled.Question] = []
    for paragraph in paragraphs:
      self.questions += paragraph.questions
    asked = corpus.tokenizer.encode_batch(
        [question.question for question in self.questions])
    encoded = corpus.tokenizer.encode_spans(
        [paragraph.context for paragraph in paragraphs])

    # The rows of each question.
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
  """Returns the rows of one question, each with a part of its paragraph.

  Args:
    question: the question.
    number: the number of the question.
    asked: its tokens.
    ids: the tokens of its paragraph.
    spans_T2: the characters that each of these stands for.
    corpus: the corpus that it is of.

  Raises:
    RequestError: for a question that leaves no room for its paragraph, and for
      an answer without a token.
  """
  where = question.where
  length = corpus.config.data.length
  between = separators_between_texts(corpus.config)
  room = length - count_special_tokens(2, between) - len(asked)
  require(room > 0, f'{where}, has {len(asked)} tokens, which leave no room '
          f'for its paragraph in data.length {length}: choose a larger one')

  # The tokens of the first answer.
  answer = None
  if question.answers:
    text, start = question.answers[0]
    answer = find_tokens(spans_T2, start, start + len(text))
    require(answer is not None, f'{where}, has an answer without a token that '
            f'the tokenizer {corpus.tokenizer.name!r} knows')

  # The parts of the paragraph, of which some show all of it.
  shared = choose_stride(corpus.config, room, f'the paragraph of {where}')
  rows = []
  for first, end in cut_into_windows(len(ids), room, shared):
    shown = None
    if answer is not None:
      begin, last = answer
      if first <= begin and last < end:
        shown = (begin - first, last - first)
    rows.append(Window(
        question=asked, context=ids[first:end], answer=shown, asked=number,
        first=first, between=between))
  return rows


def choose_stride(config: Any, room: int, where: str) -> int:
  """Returns how many tokens two neighbouring windows share.

  Args:
    config: the config of a run: its data.stride, or where that is 0 a third of
      data.length, as in BERT's 128 of 384, but at most half a window.
    room: the tokens of a window.
    where: the text that it shows, for messages.

  Raises:
    RequestError: where nothing of a window would be new.
  """
  data = config.data
  if not data.stride:
    return min(data.length // 3, room // 2)
  require(data.stride < room, f'data.stride is {data.stride}, but in '
          f'data.length {data.length} there is room for {room} tokens of '
          f'{where}: choose a smaller stride, or a larger length')
  return data.stride


def cut_into_windows(size: int, room: int, stride: int) -> list[tuple[int,
                                                                      int]]:
  """Returns the (first token, end) of the windows that show a text.

  Args:
    size: the tokens of the text.
    room: the most tokens of a window.
    stride: the tokens that two neighbours share; it must be less than room.
  """
  assert 0 <= stride < room, (stride, room)
  count = 1 + max(0, -(-(size - room) // (room - stride)))
  starts = [i * (room - stride) for i in range(count)]
  return [(start, min(start + room, size)) for start in starts]


def find_owners(windows_W2: Sequence[tuple[int, int]], size: int) -> np.ndarray:
  """Returns int32 [size], the window in which each token has the most context.

  The context of a token is the number of tokens on the side where it has fewer,
  as in BERT's code (run_squad.py, _check_is_max_context). The first of several
  windows wins.

  Args:
    windows_W2: the (first token, end) of each window.
    size: the tokens of the text.
  """
  # The context of each token T in each window W.
  place_1T = np.arange(size)[None]
  bounds_W2 = np.array(windows_W2)
  first_W1 = bounds_W2[:, :1]
  end_W1 = bounds_W2[:, 1:]
  before_WT = place_1T - first_W1
  after_WT = end_W1 - 1 - place_1T
  context_WT = np.minimum(before_WT, after_WT)

  # BERT adds a hundredth of the window's length, which parts equals. A window
  # that does not show a token has a context below 0 and is none of its.
  score_WT = context_WT + 0.01 * (end_W1 - first_W1)
  score_WT = np.where(context_WT < 0, -np.inf, score_WT)
  return np.argmax(score_WT, 0).astype(np.int32)


def find_tokens(spans_T2: np.ndarray, start: int, end: int
                ) -> tuple[int, int] | None:
  """Returns the first and the last token of a part of a text; None where no
  token stands for any of its characters.

  Args:
    spans_T2: the spans of Tokenizer.encode_spans.
    start, end: the part's first character, and the one after its last.
  """
  spelt_T = (spans_T2[:, 0] < end) & (spans_T2[:, 1] > start)
  places = np.flatnonzero(spelt_T)
  if not len(places):
    return None
  return int(places[0]), int(places[-1])
