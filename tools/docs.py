"""The hooks that MkDocs calls while it builds the site: `make docs`.

The site is docs/ and, beside it, pages that are made here: README.md,
CONTRIBUTING.md and CHANGELOG.md, notebooks as pages, and a reference of the
Python API, of the fields of a config, and of the programs.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import griffe
from mkdocs.structure.files import File

from configs import base

ROOT = pathlib.Path(__file__).parents[1]
# Pages of the site that are files outside docs/.
PAGES = {'index.md': 'README.md', 'contributing.md': 'CONTRIBUTING.md',
         'changelog.md': 'CHANGELOG.md', 'agents.md': 'AGENTS.md'}
API = ('archetype', 'architectures', 'training.weights', 'training.generate',
       'architectures.parts.config')
PROGRAMS = ('train.py', 'eval.py', *(f'-m tools.{name}' for name in (
    'compare', 'probes', 'plan', 'explain_sharding', 'launch', 'convert',
    'count', 'curves', 'batches', 'chat', 'tokenize', 'tokenizer',
    'coord_check', 'lm_eval')))
# How much a page weighs in a search, by the beginning of its path.
BOOSTS = {'tutorials/': 4, 'howto/': 4, 'pods.md': 4, 'install.md': 4,
          'reference/': .2, 'contributing.md': .2, 'changelog.md': .2}
_FENCE = re.compile(r'(^ *```.*?^ *```)', re.M | re.S)
_LINK = re.compile(r'!?\[([^\]]*)\]\(([^)\s#:]+)((?:#[^)\s]*)?)\)')


class Blocks(griffe.Extension):
  """Makes code of a docstring's paragraphs that are indented by two spaces:
  equations, commands and small tables, whose lines Markdown would join."""

  def on_object(self, *, obj: griffe.Object, **_) -> None:
    if obj.docstring:
      obj.docstring.value = re.sub(
          r'(?<=\n\n)((?:  .*(?:\n|$)|\n(?=  ))+)',
          lambda match: '```text\n' + re.sub(
              '(?m)^  ', '', match[1]).rstrip() + '\n```\n',
          obj.docstring.value)

  def on_package(self, *, pkg: griffe.Module, **_) -> None:
    self.on_object(obj=pkg)  # which griffe leaves out


def on_files(files, config):
  """Adds the pages that are made here."""
  pages = {uri: (ROOT / path).read_text() for uri, path in PAGES.items()}
  for path in sorted(ROOT.glob('docs/**/*.ipynb')):
    uri = path.relative_to(ROOT / 'docs').as_posix()
    files.remove(files.get_file_from_path(uri))
    pages[uri.replace('.ipynb', '.md')] = notebook(path.read_text())
  pages['reference/api.md'] = '# Python API\n\n' + '\n'.join(
      f'::: {name}\n    options:\n      heading_level: 2\n' for name in API)
  pages['reference/config.md'] = config_fields()
  pages['reference/commands.md'] = '\n'.join([
      '# Command-line programs', *map(_help, PROGRAMS)])
  pages['llms.txt'] = llms(config)
  for uri, text in pages.items():
    files.append(File.generated(config, uri, content=text))
  return files


def on_page_markdown(markdown: str, page, config, files) -> str:
  """Turns links, which are of the repository, into links of the site. What is
  no page of it is named and not linked."""
  uri = page.file.src_uri
  page.meta['search'] = {'boost': next((
      boost for start, boost in BOOSTS.items() if uri.startswith(start)), 1)}
  folder = os.path.dirname(PAGES.get(uri, f'docs/{uri}'))
  page_of = {path: name for name, path in PAGES.items()}

  def link(match: re.Match) -> str:
    target = os.path.normpath(os.path.join(folder, match[2]))
    place = page_of.get(target) or (
        re.sub(r'\.ipynb$', '.md', target.removeprefix('docs/'))
        if target.startswith('docs/') else None)
    if place is None:
      return match[1]
    path = os.path.relpath(place, os.path.dirname(uri) or '.')
    return match[0].replace(f'({match[2]}', f'({path}')
  return ''.join(part if i % 2 else _LINK.sub(link, part)
                 for i, part in enumerate(_FENCE.split(markdown)))


def on_post_build(config) -> None:
  """Removes the page for what is missing, whose links hold at the root of a
  server alone."""
  pathlib.Path(config.site_dir, '404.html').unlink()


def llms(config) -> str:
  """Returns llms.txt: the navigation, for programs that read the site."""
  lines = [f'# {config.site_name}', '', f'> {config.site_description}', '']
  for entry in config.nav:
    for title, pages in entry.items():
      if not isinstance(pages, str):
        lines += ['', f'## {title}', '']
      for page in [entry] if isinstance(pages, str) else pages:
        lines += [f'- [{name}]({uri.replace(".md", ".html")})'
                  for name, uri in page.items()]
  return '\n'.join(lines) + '\n'


def notebook(text: str) -> str:
  """Returns the Markdown of a .ipynb file's text, with what its cells print."""
  parts = []
  for cell in json.loads(text)['cells']:
    source = ''.join(cell['source'])
    parts.append(source if cell['cell_type'] == 'markdown' else
                 f'```python\n{source}\n```')
    for output in cell.get('outputs', ()):
      data = output.get('data', {})
      printed = ''.join(output.get('text') or data['text/plain']).rstrip()
      # HTML in one line, so that nothing of it is taken for Markdown.
      parts.append(' '.join(''.join(data['text/html']).splitlines())
                   if 'text/html' in data else f'```text\n{printed}\n```')
  return '\n\n'.join(parts)


def config_fields() -> str:
  """Returns the page of the config's fields, as they are declared."""
  lines = ['# Fields of a config', '',
           'Each field is a flag: `--config.optim.lr=3e-4`.']
  before = None  # the group of the field before
  for name, leaf in base.FIELDS.items():
    group = name.rpartition('.')[0]
    if group != before:
      lines += ['', f'## {group or "The run"}', '', '| field | default | |',
                '|---|---|---|']
    before = group
    text = leaf.rule.doc
    if leaf.rule.choices:
      text += f' One of {", ".join(leaf.rule.choices)}.'
    description = re.sub(r'([|*_])', r'\\\1', text.replace('<', '&lt;'))
    lines.append(f'| `{name}` | `{leaf.default!r}` | {description} |')
  return '\n'.join(lines) + '\n'


def _help(words: str) -> str:
  """Returns what a program prints for --help, as a section."""
  text = subprocess.run([sys.executable, *words.split(), '--help'], cwd=ROOT,
                        capture_output=True, text=True, check=True).stdout
  return f'\n## python {words}\n\n```text\n{text.rstrip()}\n```'
