"""The hooks that MkDocs calls while it builds the site (see mkdocs.yml).

The site is docs/ and, beside it, pages that are generated here: the front page
from README.md, notebooks as pages, the reference, and the source of every file
that a page links to. Nothing is fetched from the network.
"""

import os
import pathlib

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from tools.docs import notebooks
from tools.docs import reference
from tools.docs import rewriting

ROOT = pathlib.Path(__file__).parents[2]
REFERENCE = 'Reference'  # the section of mkdocs.yml that gets the API's pages


def on_config(config):
  """Adds a page for each package to the navigation."""
  section = next(s[REFERENCE] for s in config.nav if REFERENCE in s)
  section.append({'Python API': [
      {name: f'reference/{name}.md'} for name in reference.packages(ROOT)]})
  return config


def on_files(files, config):
  """Adds the generated pages."""
  def add(uri: str, text: str) -> None:
    files.append(File.generated(config, uri, content=text))

  sources = {}  # repository path: text, of what people wrote
  for uri, path in rewriting.PAGES.items():
    sources[path] = (ROOT / path).read_text()
    add(uri, sources[path])
  for path in sorted(ROOT.glob('docs/**/*.ipynb')):
    page = path.relative_to(ROOT / 'docs').with_suffix('.md').as_posix()
    add(page, notebooks.markdown(path.read_text()))
    files.remove(files.get_file_from_path(
        path.relative_to(ROOT / 'docs').as_posix()))
  for path in ROOT.glob('docs/**/*.md'):
    sources[path.relative_to(ROOT).as_posix()] = path.read_text()
  linked = {target for path, text in sources.items()
            for target in rewriting.targets(text, os.path.dirname(path))}
  for target in sorted(linked):
    page = rewriting.page_of(target)
    if page.startswith('source/'):
      add(page, reference.source(ROOT, target))
  for name, modules in reference.packages(ROOT).items():
    add(f'reference/{name}.md', reference.api(name, modules))
  add('reference/config.md', reference.config_fields())
  add('reference/commands.md', reference.commands(ROOT))
  return files


def on_page_markdown(markdown: str, page, config, files) -> str:
  """Turns a file's Markdown, which is written to be read in the repository,
  into a page's."""
  uri = page.file.src_uri
  if uri.startswith(('source/', 'reference/')):
    return markdown
  folder = os.path.dirname(rewriting.PAGES.get(uri, f'docs/{uri}'))
  return rewriting.links(rewriting.without_comments(markdown), folder, uri)


def on_post_page(output: str, page, config) -> str:
  """Refuses a page that would fetch something from the network."""
  addresses = rewriting.fetched(output)
  if addresses:
    raise PluginError(
        f'{page.file.src_uri} fetches {", ".join(addresses)}: the site must '
        'work without a network')
  return output
