"""Lists the programs of this folder.

  python -m tools
"""

import ast
import pathlib

from training import cli

FOLDER = pathlib.Path(__file__).parent


def main() -> int:
  cli.Parser(prog='python -m tools', description=__doc__).parse_args()
  files = {path.stem: path for path in FOLDER.glob('[a-z]*.py')} | {
      path.parent.name: path for path in FOLDER.glob('*/__main__.py')}
  for name, path in sorted(files.items()):
    text = path.read_text()
    if 'cli.run(' in text:  # else other programs call it
      sentence = ast.get_docstring(ast.parse(text)).split('\n\n')[0]
      print(f'python -m tools.{name:18}{" ".join(sentence.split())}')
  return 0


if __name__ == '__main__':
  cli.run(main)
