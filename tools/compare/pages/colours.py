"""The colours of figures: one a variant, the same in every figure."""

from collections.abc import Sequence
from typing import Any

# Okabe and Ito's colours, which the colour-blind tell apart, as in report.css.
COLOURS = ('#0072b2', '#e69f00', '#009e73', '#d55e00', '#56b4e9', '#cc79a7')
# Of the first six variants, of the next six, and so on; as in report.css.
DASHES = ('-', (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def looks(base: str, others: Sequence[str], ink: str = 'black'
          ) -> dict[str, dict[str, Any]]:
  """Returns how matplotlib draws the line of each variant.

  Args:
    base: the variant that is drawn in ink, without dashes.
    others: those that take the colours in turn, and then the colours dashed.
    ink: a colour.
  """
  return {base: dict(color=ink, linestyle='-')} | {
      name: dict(color=COLOURS[i % len(COLOURS)],
                 linestyle=DASHES[i // len(COLOURS) % len(DASHES)])
      for i, name in enumerate(others)}
