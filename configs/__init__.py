"""The configs of runs: one file a system, and every default in base.py.

Files of this package are found wherever a program runs: gpt, gpt.py and
configs/gpt.py name one of them, unless a file of that path is there.
"""

import difflib
import os
import pathlib
import re

from common.errors import RequestError, short

FOLDER = pathlib.Path(__file__).parent


def names(folders: tuple[str, ...], defines: str) -> list[str]:
  """Returns the files of folders of this package that define a function, as
  `gpt` or `sweeps/small`: their paths here without the suffix."""
  definition = re.compile(rf'^(def )?{defines}\b', re.MULTILINE)
  stems = []
  for folder in folders:
    for path in sorted((FOLDER / folder).glob('*.py')):
      if definition.search(path.read_text()):
        stems.append(path.relative_to(FOLDER).with_suffix('').as_posix())
  return stems


def file_of(name: str, asked_in: str, folders: tuple[str, ...] = ('',),
            defines: str = 'get_config') -> str:
  """Returns the path of a file that is named: `name` itself, where it is a
  path from here, else a file of this package.

  Args:
    name: the name as a user writes it.
    asked_in: the flag or argument that has the name.
    folders: the folders of this package in which such files lie.
    defines: the function that each of them has.

  Raises:
    RequestError: where there is no such file; it has the names nearest to it.
  """
  if os.path.isfile(name):  # which is False for a name that is too long
    return name
  known = names(folders, defines)
  asked = name.removeprefix('configs/').removesuffix('.py')
  stems = {one: pathlib.Path(one).name for one in known}
  named = [one for one, stem in stems.items() if asked in (one, stem)]
  if len(named) == 1:
    return str(FOLDER / f'{named[0]}.py')

  # The files of that name in several folders, or those that are spelt alike.
  near = []
  for stem in difflib.get_close_matches(
      pathlib.Path(asked).name, set(stems.values()), n=4):
    near += [one for one in known if stems[one] == stem]
  question = ''
  if near:
    question = f'. Did you mean {" or ".join(near)}?'
  places = ' or '.join(str(FOLDER / folder) for folder in folders)
  raise RequestError(f'unknown {asked_in} {short(name)}: write the path of a '
                     f'file, or the name of one in {places}{question}')
