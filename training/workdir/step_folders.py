"""The names of step folders, read alike by us and by Orbax.

A step's folder is its number as Python writes it. Anything else in the folder
of the checkpoints, such as 0020 or a superscript 2, is somebody else's: it is
neither read nor deleted.
"""

from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from configs.errors import require

BEST = 'best'  # a name for the step whose evaluation was the best
MOST = 2**31 - 1  # what the counter of a state can hold


class Mean(NamedTuple):
  """Several steps, for the mean of their parameters.

  Attributes:
    steps: these, in any order; or none,
    last: and so many of the newest.
  """
  steps: tuple[int, ...] = ()
  last: int = 0


def number(name: str) -> int | None:
  """Returns the step that a folder of this name holds; None: it holds none."""
  if not (name.isascii() and name.isdecimal()) or len(name) > len(str(MOST)):
    return None
  step = int(name)
  return step if name == str(step) and step <= MOST else None


def named(text: str | None) -> int | str | Mean | None:
  """Returns what --step names: a step, BEST, several steps whose mean is
  meant, as `100,200` or `last:2`, or None for the newest.

  Raises:
    RequestError: for a text that is none of these.
  """
  if text is None or text == BEST:
    return text
  if text.startswith('last:'):
    count = number(text.removeprefix('last:'))
    require(count is not None and count > 1, f'--step is {text!r}: write how '
            'many checkpoints the mean is of, from 2 on, such as last:5')
    return Mean(last=count)
  if ',' in text:
    steps = tuple(map(number, text.split(',')))
    require(None not in steps and len(set(steps)) == len(steps),
            f'--step is {text!r}: write the numbers of different steps, with '
            'commas between, for the mean of their parameters')
    return Mean(steps)
  step = number(text)
  require(step is not None, f'--step is {text!r}: write the number of a step, '
          f'or {BEST} for the best of a run with eval.best, or last:5 for the '
          'mean of the last 5 checkpoints')
  return step


def finished(folder: epath.Path) -> list[int]:
  """Returns the steps in `folder` that were saved whole, ascending."""
  import orbax.checkpoint as ocp
  if not folder.is_dir():
    return []
  return sorted(
      number(path.name) for path in folder.iterdir()
      if number(path.name) is not None
      and ocp.utils.is_checkpoint_finalized(path))


def strangers(folder: epath.Path) -> list[str]:
  """Returns a sentence for each name that looks like a step's and is none."""
  names = sorted(path.name for path in folder.iterdir()
                 if path.name.isdigit() and number(path.name) is None)
  return [f'{name!r} in {folder} is not how the folder of a step is named, as '
          '20 is; it is left alone' for name in names]


class Names:
  """These names as Orbax asks for them (its NameFormat)."""

  def build_name(self, step: int) -> str:
    return str(step)

  def find_all(self, base_path: epath.Path) -> Iterator:
    import orbax.checkpoint as ocp
    for step in finished(base_path):
      yield ocp.path.step.Metadata(step=step, path=base_path / str(step))

  def find_step(self, base_path: epath.Path, step: int):
    for found in self.find_all(base_path):
      if found.step == step:
        return found
    raise ValueError(f'no step {step} in {base_path}')
