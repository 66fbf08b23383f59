"""The reference's pages: the Python API, the fields of a config, the programs'
--help, and the source of files that other pages link to."""

import ast
import io
import pathlib
import re
import subprocess
import sys
import tokenize
from typing import NamedTuple

from architectures.parts import checks
from configs import base
from configs import model

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
  """Returns the page of the config's fields: name, default, and what the
  comments of configs/base.py and configs/model.py say, with the choices of a
  part."""
  lines = ['# Fields of a config', '',
           'Each field is a flag: `--config.optim.lr=3e-4`. The defaults and '
           'the notes are those of '
           '[configs/base.py](../source/configs/base.py.md) and '
           '[configs/model.py](../source/configs/model.py.md).', '']
  group = None
  for field in _fields('\n'.join(
      pathlib.Path(module.__file__).read_text() for module in (base, model))):
    if field.group != group:
      group = field.group
      lines += ['', f'## {group or "The run"}', '',
                '| field | default | |', '|---|---|---|']
    choices = checks.names().get(field.name.removeprefix('model.'), ())
    said = '; '.join(filter(None, (
        field.note, choices and f'one of {", ".join(choices)}')))
    note = re.sub(r'([|*_])', r'\\\1', said.replace('<', '&lt;'))
    lines.append(f'| `{field.name}` | `{field.default}` | {note} |')
  return '\n'.join(lines) + '\n'


class Field(NamedTuple):
  """A field of the config, as the source has it."""
  group: str  # 'model.moe'
  name: str  # 'model.moe.top_k'
  default: str
  note: str


def _fields(text: str) -> list[Field]:
  """Returns the fields in the order of the source, those of a group together,
  each with the comments above and beside it."""
  beside, above = {}, {}
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.COMMENT:
      alone = not token.line[:token.start[1]].strip()
      (above if alone else beside)[token.start[0]] = (
          token.string.removeprefix('#').strip())
  groups = {}

  def visit(call: ast.Call, group: str) -> None:
    groups[group] = []
    for keyword in call.keywords:
      name = f'{group}.{keyword.arg}'.lstrip('.')
      if isinstance(keyword.value, ast.Call):
        function = ast.unparse(keyword.value.func).split('.')[-1]
        visit(functions.get(function, keyword.value), name)
        continue
      lines, line = [], keyword.lineno - 1
      while line in above:
        lines.insert(0, above[line])
        line -= 1
      end = keyword.value.end_lineno + 1
      lines += [beside[n] for n in range(keyword.lineno, end) if n in beside]
      groups[group].append(Field(
          group, name, ast.unparse(keyword.value), ' '.join(lines)))

  # The dict(...) that a function returns, by the function's name.
  functions = {
      node.name: next(call for call in ast.walk(node)
                      if isinstance(call, ast.Call)
                      and getattr(call.func, 'id', '') == 'dict')
      for node in ast.parse(text).body
      if isinstance(node, ast.FunctionDef) and 'dict(' in ast.unparse(node)}
  visit(functions['base'], '')
  return [field for fields in groups.values() for field in fields]


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
