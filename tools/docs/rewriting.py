"""Markdown and docstrings of the repository as Markdown of the site."""

from collections.abc import Callable, Iterator
import os
import pathlib
import re

# Pages of the site that are files outside docs/.
PAGES = {
    'index.md': 'README.md',
    'contributing.md': 'CONTRIBUTING.md',
    'changelog.md': 'CHANGELOG.md',
}
_FENCE = re.compile(r'(^ *```.*?^ *```)', re.M | re.S)
_LINK = re.compile(r'(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))')
_HTML_LINK = re.compile(r'( src=")([^"#:]+)(")')


def page_of(target: str) -> str:
  """Returns the site's path of a file of the repository."""
  for page, path in PAGES.items():
    if path == target:
      return page
  if target.startswith('docs/'):
    page = target.removeprefix('docs/')
    return re.sub(r'\.ipynb$', '.md', page)
  return f'source/{target}.md'


def targets(markdown: str, folder: str) -> Iterator[str]:
  """Yields the repository's path of each file that a page links to.

  Args:
    markdown: the page.
    folder: the folder that it lies in, '' for the root.
  """
  for text in _outside_fences(markdown):
    for match in _LINK.finditer(text):
      yield os.path.normpath(os.path.join(folder, match[2]))


def links(markdown: str, folder: str, page: str) -> str:
  """Returns the page with links that lead to pages of the site.

  Args:
    markdown: the page as it is in the repository.
    folder: the folder that it lies in there.
    page: its path on the site.
  """
  def rewritten(match: re.Match) -> str:
    target = page_of(os.path.normpath(os.path.join(folder, match[2])))
    path = os.path.relpath(target, os.path.dirname(page) or '.')
    return match[1] + pathlib.PurePath(path).as_posix() + match[3]

  return _map_prose(markdown, lambda text: _HTML_LINK.sub(
      rewritten, _LINK.sub(rewritten, text)))


def without_comments(markdown: str) -> str:
  """Returns the page without HTML comments, which say to the tests where a
  figure comes from (tests/docs/prose_figures_test.py)."""
  return _map_prose(
      markdown, lambda text: re.sub(r'<!--.*?-->', '', text, flags=re.S))


def fetched(html: str) -> list[str]:
  """Returns the addresses from which a page would fetch scripts, styles, fonts
  or images; those of links that a reader may follow are not among them."""
  tags = re.findall(r'<(?:script|link|img|iframe|source|video)\b[^>]*>', html)
  return [address for tag in tags if 'rel="canonical"' not in tag
          for address in re.findall(
              r'(?:src|href)=["\']?((?:https?:)?//[^"\'\s>]+)', tag)]


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


def _outside_fences(markdown: str) -> list[str]:
  return _FENCE.split(markdown)[::2]


def _map_prose(markdown: str, change: Callable[[str], str]) -> str:
  parts = _FENCE.split(markdown)
  return ''.join(part if i % 2 else change(part)
                 for i, part in enumerate(parts))
