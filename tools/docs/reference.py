"""The reference's pages: the Python API, the fields of a config, the programs'
--help, and the source of files that other pages link to."""

import ast
import pathlib
import re
import subprocess
import sys

from architectures.parts import tables
from configs import base
from configs.errors import listed

ROOMS = ('architectures', 'training')  # whose docstrings are the API
# What mkdocstrings prints of a module.
_MODULE = '''::: {name}
    options:
      heading_level: 2
'''


def packages(root: pathlib.Path) -> dict[str, list[str]]:
  """Returns the modules of each package of ROOMS, by the packages' names."""
  found = {'archetype': ['archetype']}
  for room in ROOMS:
    for path in sorted(root.glob(f'{room}/**/*.py')):
      parts = path.relative_to(root).with_suffix('').parts
      package = '.'.join(parts[:-1])
      name = package if parts[-1] == '__init__' else '.'.join(parts)
      found.setdefault(package, []).append(name)
  return found


def api(package: str, modules: list[str]) -> str:
  """Returns the page of a package: all of its modules' docstrings."""
  return f'# {package}\n\n' + '\n'.join(
      _MODULE.format(name=name) for name in modules)


def source(root: pathlib.Path, path: str) -> str:
  """Returns the page of a source file, or of a folder's files."""
  head = f'---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n'
  file = root / path
  if file.is_dir():
    return head + '\n'.join(
        f'- `{p.relative_to(root)}`' for p in sorted(file.iterdir())
        if p.name != '__pycache__')
  language = {'.py': 'python', '.cfg': 'ini', '.yml': 'yaml'}.get(
      file.suffix, 'text')
  return f'{head}````{language}\n{file.read_text().rstrip()}\n````\n'


def config_fields() -> str:
  """Returns the page of the config's fields: name, default, and what their
  declarations say, with their choices."""
  lines = ['# Fields of a config', '',
           'Each field is a flag: `--config.optim.lr=3e-4`. Those of a group '
           'such as `model.rope` are there where the part that reads them is '
           'chosen.', '']
  group = None
  for name, leaf in base.FIELDS.items():
    above = name.rpartition('.')[0]
    if above != group:
      group = above
      lines += ['', f'## {group or "The run"}', '',
                '| field | default | |', '|---|---|---|']
    choices = leaf.rule.choices or tables.CHOICES.get(
        name.removeprefix('model.'), ())
    said = '; '.join(filter(None, (
        leaf.rule.doc, choices and f'one of {listed(choices)}')))
    note = re.sub(r'([|*_])', r'\\\1', said.replace('<', '&lt;'))
    lines.append(f'| `{name}` | `{leaf.default!r}` | {note} |')
  return '\n'.join(lines) + '\n'


def commands(root: pathlib.Path) -> str:
  """Returns the page of the programs: what each prints for --help."""
  lines = ['# Command-line programs', '',
           'What each program prints for `--help`.', '']
  for words in programs(root):
    text = _help(root, words)
    lines += [f'## {" ".join(words)}', '', '```text', text, '```', '']
    for name in subcommands(text):
      lines += [f'### {" ".join([*words, name])}', '', '```text',
                _help(root, [*words, name]), '```', '']
  return '\n'.join(lines)


def programs(root: pathlib.Path) -> list[list[str]]:
  """Returns the commands of the files whose docstring shows how to call
  them."""
  found = [['python', 'train.py'], ['python', 'eval.py']]
  for room in ('tools', 'benchmarks'):
    for path in sorted(root.glob(f'{room}/**/*.py')):
      module = '.'.join(path.relative_to(root).with_suffix('').parts)
      words = ['python', '-m', module.removesuffix('.__main__')]
      text = ast.get_docstring(ast.parse(path.read_text())) or ''
      called = rf'^ +{re.escape(" ".join(words))}( |$)'
      if re.search(called, text, re.M) and path.stem != 'worker':
        found.append(words)
  return found


def _help(root: pathlib.Path, words: list[str]) -> str:
  result = subprocess.run([sys.executable, *words[1:], '--help'], cwd=root,
                          capture_output=True, text=True, check=True)
  return result.stdout.rstrip()


def subcommands(text: str) -> list[str]:
  found = re.search(r'^ *\{([\w,]+)\}$', text, re.M)
  return found[1].split(',') if found else []
