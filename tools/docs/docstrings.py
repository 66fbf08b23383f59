"""Docstrings as Markdown: what they indent becomes a block of code.

Equations, commands and small tables stand in docstrings as paragraphs that are
indented by two spaces. Markdown would join their lines.
"""

import griffe

from tools.docs import rewriting


class Blocks(griffe.Extension):
  """The extension of Griffe that mkdocs.yml names."""

  def on_object(self, *, obj: griffe.Object, **_) -> None:
    if obj.docstring:
      obj.docstring.value = rewriting.fenced(obj.docstring.value)
