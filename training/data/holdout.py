"""What is held out of a source for evaluation, by data.holdout_every = n.

Of documents, the first of each n. A source that is a single file of text,
`text:one.txt`, is one document, of which nothing could be held out: it is cut
in two, and its last n-th part is held out. A run may be evaluated on one of
two halves of what is held out alone: eval.part.
"""

from collections.abc import Iterator
import dataclasses

from training.data import sources

# eval.part: which of the documents that are held out are evaluated on.
PARTS = {'': slice(None), 'first': slice(0, None, 2),
         'second': slice(1, None, 2)}


def held_out(number: int, every: int):
  """Tells whether a document is kept for evaluation.

  Args:
    number: its place in the source, or an array of such.
    every: data.holdout_every; 0: none is.
  """
  return number % every == 0 if every else number < 0


def split(source: sources.Source, every: int, part: str = ''
          ) -> sources.Source:
  """Returns the source, with documents that `held_out` tells apart.

  A single file of text becomes two documents: its last 1/every, in characters
  and rounded up, which is document 0 and so the one that is held out, and all
  that comes before it. Any other source is returned as it is.

  Args:
    source: as it was parsed.
    every: data.holdout_every.
    part: eval.part: of a single file, document 0 is this half of its tail.
  """
  if every < 2 or source.reader != 'text' or len(source.files) != 1:
    return source

  def read(path: str) -> Iterator[str]:
    for text in source.read(path):
      end = len(text) - -(-len(text) // every)
      middle = (end + len(text)) // 2
      tail = {'': slice(end, None), 'first': slice(end, middle),
              'second': slice(middle, None)}[part]
      yield from (text[tail], text[:end])

  # The reader is part of what names the tokens in the cache.
  return dataclasses.replace(
      source, reader=' '.join(filter(None, (
          f'{source.reader}, the last 1/{every} first', part))), read=read,
      tail=True)
