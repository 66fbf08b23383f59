"""What a report holds, whatever it is written as."""

from collections.abc import Sequence
from typing import NamedTuple

from tools.compare.pages.tables import Table


class Named(NamedTuple):
  """A table with its place: `name` is its anchor and its label."""
  name: str
  title: str
  table: Table


class Figure(NamedTuple):
  """A drawing that lies in two files, NAME.svg and NAME.png.

  Attributes:
    name: of its files.
    title: a short one.
    caption: what its marks are.
    alt: what there is to see, in a sentence, for who cannot see it.
    svg: the drawing, to stand within a page.
  """
  name: str
  title: str
  caption: str
  alt: str
  svg: str


class Section(NamedTuple):
  """A heading, then its paragraphs, figures, and tables."""
  name: str
  heading: str
  paragraphs: Sequence[str] = ()
  figures: Sequence[Figure] = ()
  tables: Sequence[Named] = ()


class Document(NamedTuple):
  """The whole report.

  Attributes:
    title: the study's name.
    question: that it asks.
    answer: as far as it has one, in a sentence.
    warnings: what a reader must know before the figures.
  """
  title: str
  question: str
  answer: str
  warnings: Sequence[str]
  sections: Sequence[Section]
