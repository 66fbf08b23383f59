r"""Notebooks: runs one and keeps its outputs, or makes a page of it.

  python -m tools.docs.notebooks docs/tutorials/first_model.ipynb

runs the cells in order and writes their outputs into the file. Jupyter is not
needed, and neither is it to read the file: what a cell prints and what its last
line is worth are kept as text, and as HTML where that value has any.
"""

import argparse
import ast
import contextlib
import io
import json
import pathlib
from typing import Any

Cell = dict[str, Any]  # of a notebook's JSON


def markdown(text: str) -> str:
  """Returns the Markdown of a .ipynb file's text."""
  return '\n\n'.join(
      part for cell in json.loads(text)['cells'] for part in _parts(cell))


def run(notebook: dict[str, Any]) -> None:
  """Runs the cells in order and replaces their outputs."""
  names: dict[str, Any] = {'__name__': '__main__'}
  count = 0
  for cell in notebook['cells']:
    if cell['cell_type'] == 'code':
      count += 1
      cell['execution_count'] = count
      cell['outputs'] = _run(_text(cell['source']), names, count)


def _run(source: str, names: dict[str, Any], count: int) -> list[Cell]:
  """Returns the outputs of a cell that is run with these names."""
  tree = ast.parse(source)
  last = None
  if tree.body and isinstance(tree.body[-1], ast.Expr):
    last = ast.Expression(tree.body.pop().value)
  printed = io.StringIO()
  value = None
  with contextlib.redirect_stdout(printed):
    exec(compile(tree, f'cell {count}', 'exec'), names)
    if last is not None:
      value = eval(compile(last, f'cell {count}', 'eval'), names)
  outputs: list[Cell] = []
  if printed.getvalue():
    outputs.append(dict(output_type='stream', name='stdout',
                        text=_lines(printed.getvalue())))
  if value is not None:
    data = {'text/plain': _lines(repr(value))}
    if hasattr(value, '_repr_html_'):  # whose text would be long
      data = {'text/plain': [f'<{type(value).__name__}>'],
              'text/html': _lines(value._repr_html_())}
    outputs.append(dict(output_type='execute_result', execution_count=count,
                        data=data, metadata={}))
  return outputs


def _parts(cell: Cell) -> list[str]:
  source = _text(cell['source'])
  if cell['cell_type'] == 'markdown':
    return [source]
  return [_fence(source, 'python'), *map(_output, cell['outputs'])]


def _output(output: Cell) -> str:
  if output['output_type'] == 'stream':
    return _fence(_text(output['text']), 'text')
  data = output['data']
  if 'text/html' in data:
    # In one line, so that nothing of it is taken for Markdown.
    html = ' '.join(_text(data['text/html']).splitlines())
    return f'<div class="output">{html}</div>'
  return _fence(_text(data['text/plain']), 'text')


def _text(lines: str | list[str]) -> str:
  return lines if isinstance(lines, str) else ''.join(lines)


def _lines(text: str) -> list[str]:
  return text.splitlines(keepends=True)


def _fence(text: str, language: str) -> str:
  return f'```{language}\n{text.rstrip()}\n```'


def main() -> None:
  parser = argparse.ArgumentParser(
      prog='python -m tools.docs.notebooks', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  parser.add_argument('file', type=pathlib.Path, help='the notebook (.ipynb)')
  file = parser.parse_args().file
  notebook = json.loads(file.read_text())
  run(notebook)
  file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
  main()
