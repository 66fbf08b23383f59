"""Imports run one way, without circles, what is taken of a module is there, and
parameters declare their roles."""

import ast
import functools
import graphlib
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
# From the lowest room to the highest: each imports only those before it.
ROOMS = ('common', 'architectures/parts', 'architectures', 'configs',
         'training', 'tools', 'benchmarks')
MODULES = {
    str(path.relative_to(ROOT)).removesuffix('.py').removesuffix('/__init__'):
    path for room in (*ROOMS, '.') for path in ROOT.glob(f'{room}/**/*.py')
    if not set(path.relative_to(ROOT).parts[:-1]) & {'build', 'runs', 'site'}
    and not any(part.startswith('.') for part in path.relative_to(ROOT).parts)}


def _room(module: str) -> str:
  """Returns the room of a module's path; tests and programs have none."""
  return next((room for room in sorted(ROOMS, key=len, reverse=True)
               if f'{module}/'.startswith(f'{room}/')), '')


@functools.cache
def _nodes(path):
  """Returns the nodes of a file's syntax tree."""
  return list(ast.walk(ast.parse(path.read_text())))


def _imports(path):
  """Yields those of our modules that a file imports, by their paths."""
  for node in _nodes(path):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: a relative import'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    for name in (name.replace('.', '/') for name in names):
      module = name if name in MODULES else name.rpartition('/')[0]
      if module in MODULES:
        yield module


def test_imports_run_one_way():
  wrong = [
      f'{name} imports {module}' for name, path in MODULES.items()
      if _room(name) for module in _imports(path)
      if _room(module) not in ROOMS[:ROOMS.index(_room(name)) + 1]]
  assert not wrong, '\n'.join(wrong)


def test_no_module_imports_itself_round_a_circle():
  """Imports inside functions count too: they would only hide a circle."""
  graph = {name: set(_imports(path)) - {name} for name, path in MODULES.items()}
  assert sum(map(len, graph.values())) > 500
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with it


def test_every_parameter_declares_its_role():
  """By the one function that makes parameters, which takes the role."""
  makes = {name for name, path in MODULES.items()
           if _room(name).startswith('architectures')
           and re.search(r'\.param\(', path.read_text())}
  assert makes == {'architectures/parts/sharding'}


def _bound(nodes) -> set[str]:
  """Returns the names that a module binds anywhere."""
  names = {alias.asname or alias.name for node in nodes
           if isinstance(node, (ast.Import, ast.ImportFrom))
           for alias in node.names}
  return names | {getattr(node, 'name', None) or getattr(node, 'id', None)
                  for node in nodes if isinstance(node, (
                      ast.FunctionDef, ast.ClassDef, ast.Name))}


def test_what_a_module_takes_of_another_is_there():
  """As nothing else says before the line runs."""
  trees = {name.replace('/', '.'): _nodes(path)
           for name, path in MODULES.items()}
  bound = {name: _bound(nodes) for name, nodes in trees.items()}
  missing = []
  for name, nodes in trees.items():
    modules = {}  # what they are called here
    for node in nodes:
      if isinstance(node, ast.ImportFrom):
        for alias in node.names:
          full = f'{node.module}.{alias.name}'
          if full in trees:
            modules[alias.asname or alias.name] = full
          elif alias.name not in bound.get(node.module, {alias.name}):
            missing.append(f'{name}: {full}')
    for node in nodes:  # a variable may be called the same
      if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        modules.pop(node.id, None)
      if isinstance(node, ast.arg):
        modules.pop(node.arg, None)
    taken = {(modules[node.value.id], node.attr) for node in nodes
             if isinstance(node, ast.Attribute)
             and isinstance(node.value, ast.Name) and node.value.id in modules}
    missing += [f'{name}: {module}.{attribute}' for module, attribute in taken
                if attribute not in bound[module] | {'__name__', '__path__'}
                and f'{module}.{attribute}' not in trees]
  assert not missing, '\n'.join(missing)
