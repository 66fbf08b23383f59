"""Which repeats of a test `make test` leaves to `make test-long`: those on the
systems that came after the first eleven, which stand on the same parts.

A test takes a system as its parameter `system` or `arch`, or a recording of one
as `path`. One that concerns every system and is cheap, such as one of pages, is
marked `every_system`, and so is a recording that holds a new part. No list of
the later systems is kept: they are the other pages of architectures/.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

PAGES = pathlib.Path(__file__).parents[2] / 'architectures'
FIRST = frozenset((
    'bert', 'bloom', 'gpt', 'gpt4', 'gpt_neox', 'gshard', 'llama', 'mixtral',
    'switch', 't5', 'transformer'))
PARAMETERS = ('system', 'arch', 'path')


def systems(pages: pathlib.Path = PAGES) -> frozenset[str]:
  """Returns the names of the later systems."""
  return frozenset(
      path.stem for path in pages.glob('[a-z]*.py')) - FIRST


def is_repeat(parameters: Mapping[str, Any],
              names: frozenset[str] | None = None) -> bool:
  """Whether a test with these parameters is of a later system.

  Args:
    parameters: of one run of the test, by name.
    names: of the later systems; None: `systems()`.
  """
  names = systems() if names is None else names
  values = (parameters[name] for name in PARAMETERS if name in parameters)
  return any(getattr(value, 'stem', str(value)).partition('-')[0] in names
             for value in values)
