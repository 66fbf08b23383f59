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
  files = {path.stem: path for path in FOLDER.glob('[a-z]*.py')} | {
      path.parent.name: path for path in FOLDER.glob('*/__main__.py')}
  sentence_of_program = {}
  for name, path in sorted(files.items()):
    text = path.read_text()
    if 'cli.run(' in text:  # else other programs call it
      sentence = ast.get_docstring(ast.parse(text)).split('\n\n')[0]
      sentence_of_program[name] = ' '.join(sentence.split())

  if not args.program:
    for name, sentence in sentence_of_program.items():
      print(f'python -m tools.{name:18}{sentence}')
    return 0

  # Run the module as `python -m` does.
  module_of_program = {name: f'tools.{name}' for name in sentence_of_program}
  module_of_program |= {'train': 'train', 'eval': 'eval'}
  check_choice('program', args.program, module_of_program)
  sys.argv = [f'archetype {args.program}', *args.words]
  runpy.run_module(module_of_program[args.program], run_name='__main__',
                   alter_sys=True)
  return 0


def run() -> None:
  """Runs the command `archetype` of an installed Archetype."""
  cli.run(main)


if __name__ == '__main__':
  cli.run(main)
