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


def list_config_files(folders: tuple[str, ...], defines: str) -> list[str]:
  """Returns the files of folders of this package that define a function, as
  `gpt` or `sweeps/small`: their paths here without the suffix.

  Args:
    folders: the folders; '': that of the package itself.
    defines: the name of the function, or of a value.
  """
  definition = re.compile(rf'^(def )?{defines}\b', re.MULTILINE)
  names = []
  for folder in folders:
    for path in sorted((FOLDER / folder).glob('*.py')):
      if definition.search(path.read_text()):
        names.append(path.relative_to(FOLDER).with_suffix('').as_posix())
  return names


def find_config_file(name: str, asked_in: str, folders: tuple[str, ...] = ('',),
                     defines: str = 'get_config') -> str:
  """Returns the path of a config, sweep or study that a user names: `name`
  itself, where it is a path from here, else a file of this package.

  Args:
    name: the name as a user writes it.
    asked_in: the flag or argument that has the name, for the message.
    folders: the folders of this package in which such files lie.
    defines: the function that each of them has.

  Raises:
    RequestError: where there is no such file; it has the names nearest to it.
  """
  if os.path.isfile(name):  # which is False for a name that is too long
    return name

  # A file is named by its path in this package or by its last part.
  asked_name = name.removeprefix('configs/').removesuffix('.py')
  known_paths = list_config_files(folders, defines)
  stem_of_path = {path: pathlib.Path(path).name for path in known_paths}
  matches = [path for path, stem in stem_of_path.items()
             if asked_name in (path, stem)]
  if len(matches) == 1:
    return str(FOLDER / f'{matches[0]}.py')

  # The files of that name in several folders, or those that are spelt alike.
  similar_paths = []
  similar_stems = difflib.get_close_matches(
      pathlib.Path(asked_name).name, set(stem_of_path.values()), n=4)
  for similar_stem in similar_stems:
    for path, stem in stem_of_path.items():
      if stem == similar_stem:
        similar_paths.append(path)
  question = ''
  if similar_paths:
    question = f'. Did you mean {" or ".join(similar_paths)}?'
  places = ' or '.join(str(FOLDER / folder) for folder in folders)
  raise RequestError(f'unknown {asked_in} {short(name)}: write the path of a '
                     f'file, or the name of one in {places}{question}')
