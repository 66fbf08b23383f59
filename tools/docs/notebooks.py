"""A notebook with its outputs as a page of Markdown."""

import json


def markdown(text: str) -> str:
  """Returns the Markdown of a .ipynb file's text."""
  return '\n\n'.join(
      part for cell in json.loads(text)['cells'] for part in _cell(cell))


def _cell(cell: dict) -> list[str]:
  source = _text(cell['source'])
  if cell['cell_type'] == 'markdown':
    return [source]
  return [_fence(source, 'python'), *map(_output, cell['outputs'])]


def _output(output: dict) -> str:
  if output['output_type'] == 'stream':
    return _fence(_text(output['text']), 'text')
  data = output['data']
  if 'image/png' in data:
    return f'![](data:image/png;base64,{_text(data["image/png"]).strip()})'
  if 'text/html' in data:
    return f'<div class="output">{_text(data["text/html"])}</div>'
  return _fence(_text(data['text/plain']), 'text')


def _text(lines: str | list[str]) -> str:
  return lines if isinstance(lines, str) else ''.join(lines)


def _fence(text: str, language: str) -> str:
  return f'```{language}\n{text.rstrip()}\n```'
