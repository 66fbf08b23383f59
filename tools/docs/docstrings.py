"""Docstrings as Markdown: what they indent becomes a block of code.

Equations, commands and small tables stand in docstrings as paragraphs that are
indented by two spaces. Markdown would join their lines.
"""

import griffe


class Blocks(griffe.Extension):
  """The extension of Griffe that mkdocs.yml names."""

  def on_object(self, *, obj: griffe.Object, **_) -> None:
    if obj.docstring:
      obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
  """Returns a docstring whose indented paragraphs are fenced as code. The items
  of a section, which follow their title at once, stay as they are."""
  paragraphs = text.split('\n\n')
  result: list[str] = []
  section = False  # whether we are in Args, Returns, ...
  for i, paragraph in enumerate(paragraphs):
    lines = paragraph.splitlines()
    indented = bool(lines) and all(line.startswith('  ') for line in lines)
    if not indented:
      section = _is_section(lines)
    code = indented and not section and i > 0
    if code and result and result[-1].endswith('\n```'):
      result[-1] = result[-1].removesuffix('```') + f'\n{_flush(lines)}\n```'
    else:
      result.append(f'```text\n{_flush(lines)}\n```' if code else paragraph)
  return '\n\n'.join(result)


def _is_section(lines: list[str]) -> bool:
  return len(lines) > 1 and lines[0].rstrip().endswith(':') and all(
      line.startswith('  ') for line in lines[1:])


def _flush(lines: list[str]) -> str:
  return '\n'.join(line[2:] for line in lines)
