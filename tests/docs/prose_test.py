"""What the prose promises is there: commands, flags, config keys, links."""

import ast
import configparser
import importlib.util
import pathlib
import re
import shlex

import pytest

from configs import base, kinds
from training import evals

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([ROOT / 'README.md', *ROOT.glob('docs/**/*.md')])
ROOMS = ('configs', 'architectures', 'training', 'tools', 'benchmarks')
MODULES = sorted([
    *ROOT.glob('*.py'),
    *(p for room in ROOMS for p in ROOT.glob(f'{room}/**/*.py'))])
# A word in capitals, dots or braces stands for what the reader puts there.
PLACEHOLDER = re.compile(r'\.\.\.|…|[<>{}\[\]]|\b[A-Z][A-Z_]+\b')
PROGRAM = re.compile(r'^\$?\s*((?:[A-Z_]+=\S+\s+)*(?:python|make|pip)\s.*)')


def _name(path):
  return str(path.relative_to(ROOT))


def _fences(text):
  return re.findall(r'^ *```[a-z]*\n(.*?)^ *```', text, re.M | re.S)


def _commands(text):
  """Yields the commands among the lines of `text`, continuations joined."""
  for line in re.sub(r'\\\n\s*', ' ', text).splitlines():
    found = PROGRAM.match(line.strip())
    if found:
      yield found[1]


def _page_commands(path):
  text = path.read_text()
  for fence in _fences(text):
    yield from _commands(fence)
  prose = re.sub(r'^ *```.*?^ *```', '', text, flags=re.M | re.S)
  for span in re.findall(r'`([^`]+)`', prose):
    yield from _commands(' '.join(span.split()))


def _docstring_commands(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
      text = ast.get_docstring(node) or ''
      yield from (c for c in _commands(text) if '`' not in c)
      for span in re.findall(r'`([^`]+)`', text):
        yield from _commands(' '.join(span.split()))


def _words(command):
  words = shlex.split(command, comments=True)
  while re.match(r'[A-Z_]+=', words[0]):
    words.pop(0)
  for end in ('|', '&&', ';', '>', '&'):
    if end in words:
      words = words[:words.index(end)]
  return words


def _source(target):
  """Returns the program's source: its own, and the flags it shares."""
  file = ROOT / target
  files = [file] if file.suffix == '.py' else sorted(file.glob('**/*.py'))
  text = ''.join(f.read_text() for f in [*files, ROOT / 'training/cli.py'])
  if target == 'eval.py':
    text += repr([flag.name for task in evals.TASKS.values()
                  for flag in task.flags])
  return text


def _program(words):
  """Returns (path of the program, its arguments), or (None, []) for others."""
  if words[0] != 'python' or len(words) == 1:
    return None, []
  if words[1] == '-m':
    if words[2].split('.')[0] not in ROOMS:
      return None, []
    path = words[2].replace('.', '/')
    if (ROOT / f'{path}.py').exists():
      return f'{path}.py', words[3:]
    assert (ROOT / path / '__main__.py').exists(), f'no module {words[2]}'
    return path, words[3:]
  if words[1].startswith('-'):
    return None, []
  assert (ROOT / words[1]).exists(), f'no file {words[1]}'
  return words[1], words[2:]


def _check_config(value):
  path, _, size = value.partition(':')
  if PLACEHOLDER.search(path):
    return
  assert (ROOT / path).exists(), f'no config {path}'
  if path.startswith(
          ('configs/sweeps/', 'configs/studies/')) or PLACEHOLDER.search(size):
    return
  spec = importlib.util.spec_from_file_location('a_config', ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  module.get_config(size)


def _check_key(key):
  node = base.base()
  if key.startswith('model.kinds.'):  # of a kind of layer that a page defines
    kinds.declare(node.model, *key.split('.', 3)[2:])
  for part in key.split('.'):
    assert part in node, f'no config key {key}'
    node = node[part]


def _check_flags(target, words):
  source = _source(target)
  for i, word in enumerate(words):
    if re.match(r'configs/.*\.py', word):
      _check_config(word)
    if not word.startswith('--') or PLACEHOLDER.match(word[2:]):
      continue
    flag, _, value = word[2:].partition('=')
    if flag.startswith('config.'):
      _check_key(flag.removeprefix('config.').split('=')[0])
      continue
    if flag == 'help':
      continue
    names = '|'.join(map(re.escape, {flag, flag.removeprefix('no')}))
    named = flag in ('config',) or re.search(
        rf'''['"](--)?(no)?({names})['"]''', source)
    assert named, f'{target} has no flag --{flag}'
    if flag == 'config':
      _check_config(value or words[i + 1])


def _check(command):
  words = _words(command)
  if words[0] == 'make':
    makefile = (ROOT / 'Makefile').read_text()
    goals = [w for w in words[1:] if '=' not in w and not w.startswith('-')]
    for goal in goals:
      assert re.search(rf'^{goal}:', makefile, re.M), f'no target {goal}'
  elif words[0] == 'pip':
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    for extra in re.findall(r'\.\[([\w,]+)\]', command):
      for name in extra.split(','):
        assert name in setup['options.extras_require'], f'no extra {name}'
  else:
    target, rest = _program(words)
    if target:
      _check_flags(target, rest)


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_commands_of_a_page(page):
  for command in _page_commands(page):
    try:
      _check(command)
    except (AssertionError, ValueError) as error:
      pytest.fail(f'{command}\n{error}')


@pytest.mark.parametrize('room', ROOMS + ('.',))
def test_commands_of_docstrings(room):
  wrong = []
  for path in MODULES:
    if _name(path).split('/')[0] == room or _name(path.parent) == room:
      for command in _docstring_commands(path):
        try:
          _check(command)
        except (AssertionError, ValueError) as error:
          wrong.append(f'{_name(path)}: {command}: {error}')
  assert not wrong, '\n'.join(wrong)


def _anchors(text):
  for title in re.findall(r'^#+ +(.*)$', text, re.M):
    yield re.sub(r'[^\w\- ]', '', title.lower()).strip().replace(' ', '-')


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_links_resolve(page):
  text = re.sub(r'^ *```.*?^ *```', '', page.read_text(), flags=re.M | re.S)
  for link in re.findall(r'\]\(([^)\s]+)\)', text):
    if re.match(r'[a-z]+:', link):
      continue
    path, _, anchor = link.partition('#')
    target = page.parent / path if path else page
    assert target.exists(), f'{link} leads nowhere'
    if anchor:
      assert anchor in set(_anchors(target.read_text())), f'no heading {link}'


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_files_named_are_there(page):
  for path in re.findall(r'`([\w./]+/[\w.]+\.\w+)`', page.read_text()):
    if not path.startswith(('checkpoints/', 'runs/')):
      assert PLACEHOLDER.search(path) or (ROOT / path).exists(), path


def test_the_reader_of_commands_sees_what_is_wrong():
  for command in (
      'python train.py --config configs/none.py',
      'python train.py --config configs/gpt.py --config.optim.rl=1',
      'python train.py --config configs/gpt.py:gpt3-176b',
      'python train.py --no_such_flag=1',
      'python -m tools.nothing',
      'make coffee',
      "pip install -e '.[coffee]'"):
    with pytest.raises((AssertionError, ValueError)):
      _check(command)
  _check('python train.py --config configs/gpt.py --config.optim.lr=1e-3')


@pytest.mark.parametrize('path', [
    pytest.param(path, id=_name(path), marks=[pytest.mark.long] * (
        _name(path) == 'docs/python.md')) for path in PAGES])  # it trains
def test_python_on_a_page_runs(path):
  names = {'__name__': 'page'}  # a block goes on from those before it
  for code in re.findall(r'^```python\n(.*?)^```', path.read_text(),
                         re.M | re.S):
    exec(compile(code, _name(path), 'exec'), names)
