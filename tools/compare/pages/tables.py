"""Tables of a report: each cell a text and what it sorts by."""

from collections.abc import Sequence
import dataclasses


@dataclasses.dataclass(frozen=True)
class Cell:
  """`value` is what a column sorts by: a number or a text."""
  text: str
  value: float | str | None = None
  mark: str = ''  # better, worse or noise: how it is coloured


@dataclasses.dataclass(frozen=True)
class Table:
  """`columns` are (heading, explanation); `notes` stand below."""
  columns: Sequence[tuple[str, str]]
  rows: Sequence[Sequence[Cell]]
  notes: Sequence[str] = ()

  @property
  def explained(self) -> list[tuple[str, str]]:
    """The headings that have an explanation, with it."""
    return [(heading, why) for heading, why in self.columns if heading and why]

  def text(self) -> str:
    """Renders for a terminal."""
    rows = [[heading for heading, _ in self.columns]]
    rows += [[cell.text for cell in row] for row in self.rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(
        text.ljust(width) for text, width in zip(row, widths)).rstrip()
                     for row in rows)

  def plain(self) -> list[dict]:
    """Returns its rows as JSON takes them: what is shown, by heading."""
    return [{heading: cell.text for (heading, _), cell in zip(
        self.columns, row)} for row in self.rows]
