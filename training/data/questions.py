"""Questions on paragraphs, cut into the rows of batches.

A row shows a question and a window of its paragraph. Where the paragraph is
longer, there are several rows, neighbours of which share data.stride tokens
(Devlin et al. 2019's code, run_squad.py). In a row that does not show all of
the answer, as in one of a question without any, what is to be predicted is the
null token.
"""

from typing import NamedTuple

import numpy as np

from configs.errors import require
from training.data import offsets, packing, records, squad
from training.data.words import stride


class Window(NamedTuple):
  """What a row shows.

  Attributes:
    question: int32 [T], all of it.
    context: int32 [T], a stretch of the paragraph.
    answer: the first and the last token of the answer in `context`; None: it
      does not show the answer.
    asked: which question it is.
    first: which token of the paragraph `context` begins with.
    between: separators between the question and `context`.
  """
  question: np.ndarray
  context: np.ndarray
  answer: tuple[int, int] | None
  asked: int
  first: int
  between: int = 1


class Questions:
  """The rows of a split.

  Attributes:
    questions: all of them, by squad.read.
    contexts: of each question its paragraph, and int32 [T, 2], the characters
      that each of its tokens stands for.
    items: a Window for each row.
    num_tokens, num_bytes: of the rows' text.
  """
  RECORDS = squad.KIND

  def __init__(self, corpus: packing.Corpus):
    paragraphs = [corpus.cache[i] for i in corpus.document_ids]
    self.questions = [q for p in paragraphs for q in p.questions]
    asked = corpus.tokenizer.encode_batch([q.question for q in self.questions])
    found = corpus.tokenizer.encode_spans([p.context for p in paragraphs])
    self.contexts: list[tuple[str, np.ndarray]] = []
    self.items: list[Window] = []
    for paragraph, (ids, spans_T2) in zip(paragraphs, found):
      for question in paragraph.questions:
        number = len(self.contexts)
        self.contexts.append((paragraph.context, spans_T2))
        self.items += _windows(question, number, asked[number], ids, spans_T2,
                               corpus)
    self.num_tokens = sum(len(item.question) + len(item.context)
                          for item in self.items)
    self.num_bytes = sum(
        len(text.encode('utf-8')) for q, (context, _) in zip(
            self.questions, self.contexts) for text in (q.question, context))

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, i: int) -> Window:
    return self.items[int(i)]


def _windows(question: squad.Question, number: int, asked: np.ndarray,
             ids: np.ndarray, spans_T2: np.ndarray, corpus: packing.Corpus
             ) -> list[Window]:
  """Returns the rows of one question."""
  where, length = question.where, corpus.config.data.length
  between = records.separators(corpus.config)
  room = length - records.around(2, between) - len(asked)
  require(room > 0, f'{where}, has {len(asked)} tokens, which leave no room '
          f'for its paragraph in data.length {length}: choose a larger one')
  answer = None
  if question.answers:
    text, start = question.answers[0]
    answer = offsets.tokens_of(spans_T2, start, start + len(text))
    require(answer is not None, f'{where}, has an answer without a token that '
            f'the tokenizer {corpus.tokenizer.name!r} knows')
  shared = stride(corpus.config, room, f'the paragraph of {where}')
  rows = []
  for first, end in offsets.windows(len(ids), room, shared):
    shown = answer is not None and first <= answer[0] and answer[1] < end
    rows.append(Window(
        asked, ids[first:end],
        (answer[0] - first, answer[1] - first) if shown else None,
        number, first, between))
  return rows
