"""The house's rules that a program can check, on the source alone."""

import ast
import graphlib
import pathlib
import re

import pytest

from configs import base
from tests.helpers import adding, later

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = (
    'configs', 'architectures/parts', 'architectures', 'training', 'tools',
    'benchmarks')
OURS = {'configs', 'architectures', 'training', 'tools', 'benchmarks',
        'archetype', 'train', 'eval'}
# Imports run one way. Each room may import what stands here, and itself.
MAY_IMPORT = {
    'configs': set(),
    'architectures/parts': {'configs'},
    'architectures': {'configs', 'architectures/parts'},
    'training': {'configs', 'architectures/parts', 'architectures'},
    'tools': {'configs', 'architectures/parts', 'architectures', 'training'},
    'benchmarks': {
        'configs', 'architectures/parts', 'architectures', 'training', 'tools'},
}
SOURCES = sorted(
    [*ROOT.glob('*.py'),
     *(p for room in OURS | {'tests'} for p in ROOT.glob(f'{room}/**/*.py'))])


def _name(path):
  return str(path.relative_to(ROOT))


def _room(name):
  """Returns the room of a file's or a module's path: a/b/c.py or a/b/c."""
  return next((r for r in ROOMS if name == r or name.startswith(f'{r}/')), '')


def _imports(path):
  """Yields (module as a path, name imported from it or '')."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from ((a.name.replace('.', '/'), '') for a in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{_name(path)}: a relative import'
      for alias in node.names:
        yield node.module.replace('.', '/'), alias.name


def _room_of_import(module, name):
  return _room(f'{module}/{name}' if name else module)


@pytest.mark.parametrize('room', ROOMS)
def test_imports_run_one_way(room):
  wrong = []
  for path in SOURCES:
    if _room(_name(path)) != room:
      continue
    for module, name in _imports(path):
      top = module.split('/')[0]
      if top in ('archetype', 'train', 'eval', 'tests'):
        wrong.append(f'{_name(path)} imports {module}')
      elif top in OURS:
        found = _room_of_import(module, name)
        if found not in MAY_IMPORT[room] | {room}:
          wrong.append(f'{_name(path)} imports {module} {name}')
  assert not wrong, '\n'.join(wrong)


def test_no_module_imports_itself_round_a_circle():
  """Imports inside functions count too: they would only hide a circle."""
  modules = {_name(path).removesuffix('.py').removesuffix('/__init__'): path
             for path in SOURCES}
  graph = {
      module: {f'{found}/{name}' if f'{found}/{name}' in modules else found
               for found, name in _imports(path)} & modules.keys() - {module}
      for module, path in modules.items()}
  assert sum(map(len, graph.values())) > 500
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with it


def test_configs_are_data():
  allowed = {'ml_collections', 'configs', 'difflib', 'functools', 'itertools',
             'math', 're', 'typing', 'collections'}
  for path in SOURCES:
    if _room(_name(path)) == 'configs':
      for module, _ in _imports(path):
        assert module.split('/')[0] in allowed, f'{_name(path)}: {module}'


def test_no_module_takes_the_insides_of_another():
  for path in SOURCES:
    for module, name in _imports(path):
      if module.split('/')[0] in OURS and not _name(path).startswith('tests/'):
        assert not name.startswith('_'), f'{_name(path)}: {module}.{name}'


def test_rooms_are_told_apart():
  assert _room('architectures/parts/norms.py') == 'architectures/parts'
  assert _room('architectures/gpt.py') == 'architectures'
  assert _room_of_import('architectures', 'parts') == 'architectures/parts'
  assert _room('train.py') == ''


def _lines(pattern, skip=()):
  for path in SOURCES:
    if not _name(path).startswith(('tests/', *skip)):
      for number, line in enumerate(path.read_text().splitlines(), 1):
        if re.search(pattern, line):
          yield f'{_name(path)}:{number}: {line.strip()}'


def _fields(config, prefix=''):
  for name, value in config.items():
    if hasattr(value, 'items'):
      yield from _fields(value, f'{prefix}{name}.')
    else:
      yield prefix + name, name


def test_every_config_field_is_read():
  # run_config.py only compares fields.
  text = '\n'.join(
      p.read_text() for p in SOURCES
      if not _name(p).startswith(('tests/', 'configs/'))
      and p.name != 'run_config.py')
  read = set(re.findall(r'''(?:\.|['"]|\*\*config\.)(\w+)\b''', text))
  ignored = [path for path, name in _fields(base.base())
             if name not in read and not path.startswith('checkpoint.')]
  assert not ignored, ignored


def test_no_default_hides_in_code():
  hidden = list(_lines(r'(config|cfg|\bc)\.get\(', skip=('configs/',)))
  assert not hidden, '\n'.join(hidden)


def test_every_parameter_declares_its_role():
  """By the one function that makes parameters, which takes the role."""
  makes = [line for line in _lines(r'\.param\(')
           if line.startswith('architectures/')]
  assert [line.partition(':')[0] for line in makes] == [
      'architectures/parts/roles.py'], makes


def test_only_an_objectives_record_knows_its_name():
  named = list(_lines(r'\.objective\s*(==|!=|in\b)',
                      skip=('training/objectives/',)))
  assert not named, '\n'.join(named)


def test_no_error_is_swallowed():
  swallowed = list(_lines(r'except( Base| )?(Exception)?:\s*(pass)?$'))
  assert not swallowed, '\n'.join(swallowed)


def test_nothing_is_left_undone():
  undone = list(_lines(r'NotImplementedError|\b(TODO|FIXME|XXX)\b'))
  assert not undone, '\n'.join(undone)


def test_files_are_short():
  long = {_name(p): n for p in SOURCES
          if (n := p.read_text().count('\n')) > 400}
  assert not long, long


def test_every_module_says_what_it_is():
  bare = [_name(p) for p in SOURCES
          if p.stat().st_size
          and not ast.get_docstring(ast.parse(p.read_text()))]
  assert not bare, bare


def test_no_path_of_one_machine():
  files = [*SOURCES, *ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'),
           *ROOT.glob('.ci/*'), ROOT / 'Makefile', ROOT / 'setup.cfg']
  home = re.compile(r'(^|[^\w.$}{~])/(home|root|Users|work)/\w')
  wrong = [f'{_name(p)}: {line}' for p in files
           for line in p.read_text().splitlines() if home.search(line)]
  assert not wrong, '\n'.join(wrong)


def test_no_command_line_takes_the_beginning_of_a_flag():
  """--launch for --launcher would pass by who looks for the whole word."""
  for path in SOURCES:
    for node in ast.walk(ast.parse(path.read_text())):
      if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
          and node.func.attr in ('ArgumentParser', 'add_parser')
          and _room(_name(path))):
        given = {k.arg: getattr(k.value, 'value', None) for k in node.keywords}
        assert given.get('allow_abbrev') is False, f'{_name(path)}'


def test_most_arguments_are_annotated():
  """Of the functions of the programs and packages, tests apart."""
  bare, count = [], 0
  for path in SOURCES:
    if _name(path).startswith('tests/'):
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        given = [a for a in given if a.arg not in ('self', 'cls')]
        count += len(given)
        bare += [f'{_name(path)}:{a.lineno} {a.arg}' for a in given
                 if a.annotation is None]
  assert len(bare) <= 0.15 * count, '\n'.join(bare)


def test_the_legend_is_the_same_wherever_it_stands():
  """README's table has the letters of the model config's docstring, once."""
  page = (ROOT / 'README.md').read_text()
  table = page[page.index('| letter | axis |'):page.index('## Tests')]
  letters = re.findall(r'\| ([A-Z]) (?=\|)', table)
  path = ROOT / 'architectures/parts/config.py'
  legend = ast.get_docstring(ast.parse(path.read_text())).partition(
      'Axis legend')[2]
  defined = re.findall(r'(?:^|, |\n|and )([A-Z])(?= [a-zH]| =)', legend)
  assert sorted(letters) == sorted(defined)
  assert len(set(letters)) == len(letters) > 20


def test_names_of_arrays_use_the_letters_of_the_legend():
  letters = set(re.findall(
      r'\| ([A-Z]) (?=\|)', (ROOT / 'README.md').read_text()))
  wrong = [
      f'{_name(path)}: {name}' for path in SOURCES
      if _room(_name(path)) in ('architectures', 'architectures/parts',
                                'training')
      for name, suffix in re.findall(r'\b([a-z]\w*_([A-Z]{2,6}))\b',
                                     path.read_text())
      if not set(suffix) <= letters]
  assert not wrong, '\n'.join(wrong)


def test_readme_has_the_table_of_what_to_write():
  text = (ROOT / 'README.md').read_text()
  _, _, rest = text.partition('<!-- python -m tests.helpers.adding -->')
  assert rest.partition('<!-- end -->')[0].strip() == adding.table().strip()


def test_repeats_on_later_systems_are_told_from_the_first(tmp_path):
  for name in ('llama', 'stablelm', '__init__'):
    (tmp_path / f'{name}.py').touch()
  names = later.systems(tmp_path)
  assert names == {'stablelm'}
  long = lambda **parameters: later.is_repeat(parameters, names)
  assert long(system='stablelm') and long(changes={}, arch='stablelm')
  assert long(path=tmp_path / 'stablelm-plain.safetensors')
  assert not (long(system='llama') or long(arch='gpt4-rumoured')
              or long(path=tmp_path / 'llama-plain.safetensors')
              or long(title='stablelm') or long())
  assert later.FIRST <= {path.stem for path in later.PAGES.glob('*.py')}
