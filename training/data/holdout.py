"""What is held out of a source for evaluation, by data.holdout_every = n.

Of documents, the first of each n. A source that is a single file of text,
`text:one.txt`, is one document, of which nothing could be held out: it is cut
in two, and its last n-th part is held out.
"""

from collections.abc import Iterator
import dataclasses

from training.data import sources

def held_out(number: int, every: int):
  """Tells whether a document is kept for evaluation.

  Args:
    number: its place in the source, or an array of such.
    every: data.holdout_every; 0: none is.
  """
  return number % every == 0 if every else number < 0


def split(source: sources.Source, every: int) -> sources.Source:
  """Returns the source, with documents that `held_out` tells apart.

  A single file of text becomes two documents: its last 1/every, in characters
  and rounded up, which is document 0 and so the one that is held out, and all
  that comes before it. Any other source is returned as it is.
  """
  if every < 2 or source.reader != 'text' or len(source.files) != 1:
    return source

  def read(path: str) -> Iterator[str]:
    for text in source.read(path):
      end = len(text) - -(-len(text) // every)
      yield from (text[end:], text[:end])

  # The reader is part of what names the tokens in the cache.
  return dataclasses.replace(
      source, reader=f'{source.reader}, the last 1/{every} first', read=read,
      tail=True)
