"""Names as figures have room for them."""

from collections.abc import Sequence


def shortened(names: Sequence[str], most: int = 22) -> dict[str, str]:
  """Returns the label of each name: of at most `most` characters, but for
  names that would then look alike.

  A longer name loses its middle: names of one sweep often differ at the end.
  """
  tail = (most - 1) // 2
  found = {name: name if len(name) <= most else
           f'{name[:most - 1 - tail]}…{name[len(name) - tail:]}'
           for name in names}
  labels = list(found.values())
  return {name: name if labels.count(label) > 1 else label
          for name, label in found.items()}
