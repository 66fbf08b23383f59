"""What labelled data say of a model: by libraries and published rules."""

from typing import Any, NamedTuple


class Measured(NamedTuple):
  """What is found of some records.

  Attributes:
    figures: by name; a dict holds those of a part.
    lines: for a reader.
    files: the texts of files of predictions, by what is put before the suffix
      of their name.
  """
  figures: dict[str, Any]
  lines: list[str]
  files: dict[str, str]
