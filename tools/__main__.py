"""Lists the programs of this folder, or runs one of them.

  python -m tools
  python -m tools count --all
  archetype count --all          where Archetype is installed
  archetype train --config gpt:tiny --workdir runs/a
"""

import argparse
import ast
import pathlib
import runpy
import sys

from common.errors import check_choice
from training import cli

FOLDER = pathlib.Path(__file__).parent


def main() -> int:
  """Lists the programs, or runs the one that the command line names, with the
  words that follow its name."""
  parser = cli.Parser(prog='archetype', description=__doc__)
  parser.add_argument('program', nargs='?', default='', help='a program of the '
                      'list, train or eval; default: list them')
  parser.add_argument('words', nargs=argparse.REMAINDER, help='its arguments')
  args = parser.parse_args()
  sentences = read_sentences_of_programs()
  if not args.program:
    for name, sentence in sentences.items():
      print(f'python -m tools.{name:18}{sentence}')
    return 0

  # `train` and `eval` are programs too, but lie beside the folder of tools.
  module_of_program = {'train': 'train', 'eval': 'eval'}
  for name in sentences:
    module_of_program[name] = f'tools.{name}'
  check_choice('program', args.program, module_of_program)

  # Run the module as `python -m` does: it finds its own arguments in sys.argv.
  sys.argv = [f'archetype {args.program}', *args.words]
  runpy.run_module(module_of_program[args.program], run_name='__main__',
                   alter_sys=True)
  return 0


def read_sentences_of_programs() -> dict[str, str]:
  """Returns the first sentence of the docstring of each program of this folder,
  by the name of the program, sorted.

  A program is a file, or a folder with a `__main__.py`, that runs its main
  function by `cli.run`; the other files are what programs import. They are read
  and not imported, since some take seconds to import.
  """
  path_of_module = {}
  for path in FOLDER.glob('[a-z]*.py'):
    path_of_module[path.stem] = path
  for path in FOLDER.glob('*/__main__.py'):
    path_of_module[path.parent.name] = path

  sentences = {}
  for name, path in sorted(path_of_module.items()):
    source = path.read_text()
    if 'cli.run(' not in source:
      continue
    docstring = ast.get_docstring(ast.parse(source)) or ''
    first_paragraph = docstring.split('\n\n')[0]
    sentences[name] = ' '.join(first_paragraph.split())
  return sentences


def run() -> None:
  """Runs the command `archetype` of an installed Archetype."""
  cli.run(main)


if __name__ == '__main__':
  cli.run(main)
