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
# Pages of the site that are files outside docs/: the file of each page.
FILE_OF_PAGE = {'index.md': 'README.md', 'contributing.md': 'CONTRIBUTING.md',
                'changelog.md': 'CHANGELOG.md', 'agents.md': 'AGENTS.md'}
# The modules whose docstrings make the reference of the Python API.
MODULES_OF_API = ('archetype', 'architectures', 'training.weights',
                  'training.generate', 'architectures.parts.config')
# The words after `python` that run each program.
PROGRAMS = (
    'train.py', 'eval.py', '-m tools.compare', '-m tools.probes',
    '-m tools.plan', '-m tools.explain_sharding', '-m tools.launch',
    '-m tools.convert', '-m tools.count', '-m tools.curves',
    '-m tools.batches', '-m tools.chat', '-m tools.tokenize',
    '-m tools.tokenizer', '-m tools.package_text', '-m tools.coord_check',
    '-m tools.lm_eval')
# How much a page weighs in a search, by the beginning of its path, of which the
# first that fits counts; the others weigh 1. A word in a title counts a
# thousand times as much as one in a text, and a reference has every word in its
# titles.
SEARCH_WEIGHT_OF_PATH = {
    'howto/change_': 1, 'howto/add_a_system.md': 8, 'howto/curves.md': 8,
    'howto/evaluate.md': 8, 'howto/finetune.md': 8, 'howto/own_data.md': 8,
    'howto/resume.md': 8, 'howto/': 4, 'tutorials/': 4, 'install.md': 4,
    'performance.md': 4, 'pods.md': 4, 'sweeps.md': 8,
    'reference/': .001, 'contributing.md': .001, 'changelog.md': .001}
_CODE_BLOCK = re.compile(r'(^ *```.*?^ *```)', re.M | re.S)
# A link of Markdown to a file: its text, its path, and its #anchor if any.
_LINK = re.compile(r'!?\[([^\]]*)\]\(([^)\s#:]+)((?:#[^)\s]*)?)\)')
# Lines after an empty one that are indented by two spaces, as in docstrings.
_INDENTED_LINES = re.compile(r'(?<=\n\n)((?:  .*(?:\n|$)|\n(?=  ))+)')


class Blocks(griffe.Extension):
  """An extension of griffe that turns indented paragraphs of docstrings into
  code blocks.

  Such paragraphs, indented by two spaces, are equations, commands and small
  tables, whose lines Markdown would join.
  """

  def on_object(self, *, obj: griffe.Object, **_) -> None:
    """Changes the docstring of an object; griffe calls it for each object."""
    if obj.docstring:
      obj.docstring.value = _INDENTED_LINES.sub(_make_code_block,
                                                obj.docstring.value)

  def on_package(self, *, pkg: griffe.Module, **_) -> None:
    """Changes the docstring of a package, for which griffe does not call
    `on_object`."""
    self.on_object(obj=pkg)


def _make_code_block(match: re.Match) -> str:
  """Returns a match of _INDENTED_LINES as a code block of Markdown."""
  lines = re.sub('(?m)^  ', '', match[1]).rstrip()
  return f'```text\n{lines}\n```\n'


def on_files(files, config):
  """Adds generated pages to the files of the documentation site: notebooks,
  references, and files that lie outside docs/. MkDocs calls this hook after it
  has listed docs/.

  Args:
    files: the files of docs/, as MkDocs has them.
    config: MkDocs' config.

  Returns:
    The files, with the pages.
  """
  # Files of the repository that are pages as they are, such as CONTRIBUTING.md.
  text_of_page = {page: (ROOT / path).read_text()
                  for page, path in FILE_OF_PAGE.items()}

  # Notebooks. The page of each takes the place of its file.
  for path in sorted(ROOT.glob('docs/**/*.ipynb')):
    notebook = path.relative_to(ROOT / 'docs').as_posix()
    files.remove(files.get_file_from_path(notebook))
    page = notebook.replace('.ipynb', '.md')
    text_of_page[page] = render_notebook(path.read_text())

  # The references: the Python API, the fields of a config, and the programs.
  # mkdocstrings replaces a line with ::: by the docstrings of a module.
  entries = [f'::: {name}\n    options:\n      heading_level: 2\n'
             for name in MODULES_OF_API]
  text_of_page['reference/api.md'] = '# Python API\n\n' + '\n'.join(entries)
  text_of_page['reference/config.md'] = render_config_fields()
  helps = [_render_help(program) for program in PROGRAMS]
  text_of_page['reference/commands.md'] = '\n'.join(
      ['# Command-line programs', *helps])
  text_of_page['llms.txt'] = render_llms_txt(config)

  # Hand the pages to MkDocs.
  for page, text in text_of_page.items():
    files.append(File.generated(config, page, content=text))
  return files


def on_page_markdown(markdown: str, page, config, files) -> str:
  """Turns the links of a page, which lead to files of the repository, into
  links of the site. MkDocs calls it for each page.

  A link to a file that is no page of the site becomes its text alone.

  Args:
    markdown: the text of the page.
    page: the page, as MkDocs has it. Its weight in searches is set.
    config: MkDocs' config, which is not used.
    files: the files of the site, which are not used.

  Returns:
    The text of the page with the new links.
  """
  # The weight of the page in searches, by the beginning of its path.
  uri = page.file.src_uri
  weight = 1
  for start, weight_of_start in SEARCH_WEIGHT_OF_PATH.items():
    if uri.startswith(start):
      weight = weight_of_start
      break
  page.meta['search'] = {'boost': weight}

  # The folder that links of the page start from, and the page of each file.
  folder = os.path.dirname(FILE_OF_PAGE.get(uri, f'docs/{uri}'))
  page_of_file = {file: name for name, file in FILE_OF_PAGE.items()}

  def link_within_site(match: re.Match) -> str:
    """Returns a link to a file as a link to its page, or as its text alone if
    the file has no page."""
    target = os.path.normpath(os.path.join(folder, match[2]))
    target_page = page_of_file.get(target)
    if not target_page and target.startswith('docs/'):
      target_page = re.sub(r'\.ipynb$', '.md', target.removeprefix('docs/'))
    if target_page is None:
      return match[1]
    path = os.path.relpath(target_page, os.path.dirname(uri) or '.')
    return match[0].replace(f'({match[2]}', f'({path}')

  # Every second part of the text is a code block, whose links stay.
  parts = _CODE_BLOCK.split(markdown)
  for i in range(0, len(parts), 2):
    parts[i] = _LINK.sub(link_within_site, parts[i])
  return ''.join(parts)


def on_post_build(config) -> None:
  """Removes the page for missing addresses (404.html). MkDocs calls it after
  the build. The links of that page work only if the site is at the root of its
  server."""
  pathlib.Path(config.site_dir, '404.html').unlink()


def render_llms_txt(config) -> str:
  """Returns the text of llms.txt (https://llmstxt.org): a list of the site's
  pages with their links, for language models that read the site.

  Args:
    config: MkDocs' config. An entry of its navigation is a page, or a group of
      pages with a title.
  """
  # MkDocs has an entry as a dict of one item: {title: file} for a page, and
  # {title: [{title: file}, ...]} for a group of pages.
  lines = [f'# {config.site_name}', '', f'> {config.site_description}', '']
  for entry in config.nav:
    for title, file_or_pages in entry.items():
      if isinstance(file_or_pages, str):
        pages = [entry]
      else:
        pages = file_or_pages
        lines += ['', f'## {title}', '']
      for page in pages:
        for name, file in page.items():
          lines.append(f'- [{name}]({file.replace(".md", ".html")})')
  return '\n'.join(lines) + '\n'


def render_notebook(text: str) -> str:
  """Returns a notebook as Markdown, with the output of its cells.

  Args:
    text: the text of its .ipynb file, which is JSON (nbformat 4): a list of
      cells, each with its source and, if it is code, its outputs.
  """
  parts = []
  for cell in json.loads(text)['cells']:
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
      parts.append(source)
    else:
      parts.append(f'```python\n{source}\n```')

    # An output is what was printed (`text`), or a value in several formats
    # (`data`). HTML is put on one line, so that nothing of it is taken for
    # Markdown.
    for output in cell.get('outputs', ()):
      data = output.get('data', {})
      plain_text = ''.join(output.get('text') or data['text/plain']).rstrip()
      if 'text/html' in data:
        html_lines = ''.join(data['text/html']).splitlines()
        parts.append(' '.join(html_lines))
      else:
        parts.append(f'```text\n{plain_text}\n```')
  return '\n\n'.join(parts)


def render_config_fields() -> str:
  """Returns the page of the fields of a config as Markdown: a table for each
  group of fields, with their defaults and meanings."""
  lines = ['# Fields of a config', '',
           'Each field is a flag: `--config.optim.lr=3e-4`.']
  # FIELDS has the fields of a group one after the other. A field without a
  # group, such as `seed`, is the run's own.
  group_before = None
  for name, field in base.FIELDS.items():
    group = name.rpartition('.')[0]
    if group != group_before:
      lines += ['', f'## {group or "The run"}', '', '| field | default | |',
                '|---|---|---|']
    group_before = group

    # Add the row of the field. Characters that Markdown or HTML would read as
    # markup are escaped.
    text = field.rule.doc
    if field.rule.choices:
      text += f' One of {", ".join(field.rule.choices)}.'
    without_html = text.replace('<', '&lt;')
    description = re.sub(r'([|*_])', r'\\\1', without_html)
    lines.append(f'| `{name}` | `{field.default!r}` | {description} |')
  return '\n'.join(lines) + '\n'


def _render_help(program: str) -> str:
  """Runs a program with --help, and returns what it prints as a section of
  Markdown.

  Args:
    program: the words after `python`, such as '-m tools.plan'.

  Raises:
    subprocess.CalledProcessError: where it fails, which ends the build.
  """
  command = [sys.executable, *program.split(), '--help']
  result = subprocess.run(
      command, cwd=ROOT, capture_output=True, text=True, check=True)
  return f'\n## python {program}\n\n```text\n{result.stdout.rstrip()}\n```'
