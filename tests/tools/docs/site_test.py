"""The documentation site: its links, its generated pages, and the navigation.

`make docs` builds it, and fails on a warning."""

import json
import pathlib
import re

import pytest

from configs import base
from tools.docs import notebooks
from tools.docs import reference
from tools.docs import rewriting

ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.parametrize('text, folder, page, expected', [
    ('[a](docs/mup.md)', '', 'index.md', '[a](mup.md)'),
    ('[a](docs/mup.md#the-check)', '', 'index.md', '[a](mup.md#the-check)'),
    ('[a](../README.md)', 'docs', 'mup.md', '[a](index.md)'),
    ('[a](../sweeps.md)', 'docs/tutorials', 'tutorials/compare.md',
     '[a](../sweeps.md)'),
    ('[a](first.ipynb)', 'docs/tutorials', 'tutorials/train.md',
     '[a](first.md)'),
    ('[a](../../train.py)', 'docs/tutorials', 'tutorials/train.md',
     '[a](../source/train.py.md)'),
    ('![a](docs/small.png)', '', 'index.md', '![a](small.png)'),
    ('[a](#here)', 'docs', 'mup.md', '[a](#here)'),
    ('[a](https://arxiv.org/abs/1)', '', 'index.md',
     '[a](https://arxiv.org/abs/1)'),
])
def test_links_lead_to_pages_of_the_site(text, folder, page, expected):
  assert rewriting.links(text, folder, page) == expected


def test_code_is_left_alone():
  text = '```sh\n[a](docs/mup.md) <!-- b -->\n```\n'
  assert rewriting.links(text, '', 'index.md') == text
  assert rewriting.without_comments(text) == text


def test_comments_are_left_out():
  text = 'is 0.02<!-- = [a][b] -\n [c][d] -->.\n\n<!-- rows of x -->\n\n| a |\n'
  assert rewriting.without_comments(text) == (
      'is 0.02.\n\n\n\n| a |\n')


def test_what_a_page_fetches_is_found():
  html = ('<a href="https://example.org">x</a><img src="a.png">'
          '<script src="https://example.org/x.js"></script>'
          '<link rel=stylesheet href=//example.org/y.css>')
  assert rewriting.fetched(html) == [
      'https://example.org/x.js', '//example.org/y.css']


def _notebook(*cells):
  return {'cells': [
      {'cell_type': kind, 'source': source} | (
          {'outputs': []} if kind == 'code' else {})
      for kind, source in cells]}


class Shown:
  """A value that a notebook shows as HTML."""

  def _repr_html_(self):
    return '<b>\n\nshown</b>'


def test_a_notebook_is_run_and_is_a_page_with_its_outputs():
  notebook = _notebook(
      ('markdown', ['# Title\n', 'text']),
      ('code', 'x = 1\nprint("printed")\nx + 1'),
      ('code', ['x += 1\n', 'x']), ('code', 'x = 5'),
      ('code', 'from tests.tools.docs.site_test import Shown\nShown()'))
  notebooks.run(notebook)
  assert notebooks.markdown(json.dumps(notebook)) == '\n\n'.join([
      '# Title\ntext',
      '```python\nx = 1\nprint("printed")\nx + 1\n```',
      '```text\nprinted\n```', '```text\n2\n```',
      '```python\nx += 1\nx\n```', '```text\n2\n```',
      '```python\nx = 5\n```',
      '```python\nfrom tests.tools.docs.site_test import Shown\nShown()\n```',
      '<div class="output"><b>  shown</b></div>'])


def test_indented_paragraphs_of_a_docstring_are_code():
  text = ('Title.\n\n  y = x\n    + 1\n\n  z = y\n\nWords.\n\nArgs:\n  x: in.\n'
          '\n  more of it.\n\nEnd:\n\n  code')
  assert rewriting.fenced(text) == (
      'Title.\n\n```text\ny = x\n  + 1\n\nz = y\n```\n\nWords.\n\nArgs:\n'
      '  x: in.\n\n  more of it.\n\nEnd:\n\n```text\ncode\n```')


def _flat(config, prefix=''):
  for name, value in config.items():
    if hasattr(value, 'items') and value:
      yield from _flat(value, f'{prefix}{name}.')
    else:  # of model.kinds, which has no kind by itself: {}
      yield prefix + name, dict(value) if hasattr(value, 'items') else value


def test_the_table_of_fields_has_every_field_with_its_default():
  rows = dict(re.findall(r'^\| `(\S+)` \| `(.*?)` \|',
                         reference.config_fields(), re.M))
  defaults = dict(_flat(base.base()))
  assert set(rows) == set(defaults)
  for name, text in rows.items():
    assert eval(text) == defaults[name], name


def test_notes_of_fields_are_the_comments_above_and_beside():
  text = reference.config_fields()
  assert re.search(
      r'`model.num_kv_heads` \| `0` \| .*derived: num\\_heads \|', text)
  assert re.search(r'`init_from` .* whose weights the run starts from', text)


def test_the_programs_are_those_whose_docstring_shows_a_call():
  found = [' '.join(words) for words in reference.programs(ROOT)]
  assert found[:2] == ['python train.py', 'python eval.py']
  assert {'python -m tools.sweep', 'python -m tools.count',
          'python -m tools.plan'} < set(found)
  assert 'python -m tools.compare.worker' not in found


def test_subcommands_are_read_from_a_help():
  help_text = 'usage: x\n\npositional arguments:\n  {check,run}\n    check  a\n'
  assert reference.subcommands(help_text) == ['check', 'run']
  assert reference.subcommands('usage: x\n\nflags:\n  --a: {b}\n') == []


def test_packages_are_those_of_the_tree():
  found = reference.packages(ROOT)
  modules = {name for names in found.values() for name in names}
  assert {'architectures.gpt', 'architectures.parts.norms',
          'training.weights'} < modules
  assert all(package in found[package] for package in found)


def _navigation(text):
  return set(re.findall(r'[\w/]+\.md', text[text.index('\nnav:'):]))


def test_every_page_of_docs_is_in_the_navigation():
  pages = {path.relative_to(ROOT / 'docs').with_suffix('.md').as_posix()
           for kind in ('md', 'ipynb') for path in ROOT.glob(
               f'docs/**/*.{kind}')}
  assert pages <= _navigation((ROOT / 'mkdocs.yml').read_text())
