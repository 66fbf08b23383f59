"""The commands, the Python and the notebooks of the pages can be run."""

import importlib
import io
import json
import pathlib
import posixpath
import re
import shlex
import sys
import types

import pytest

from configs import base
from tests.parity import recording
from training import progress

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / 'README.md', ROOT / 'AGENTS.md',
                *ROOT.glob('docs/**/*.md')])
NOTEBOOKS = sorted(ROOT.glob('docs/**/*.ipynb'))
# A word in capitals, dots or braces stands for what the reader puts there.
PLACEHOLDER = re.compile(r'\.\.\.|…|[<>{}\[\]]|\b[A-Z][A-Z_]+\b')
COMMAND = re.compile(r'\$?\s*(?:[A-Z_]+=\S+\s+)*((?:python|make)\s.*)')


def _name(path):
  return str(path.relative_to(ROOT))


def _commands(page):
  """Yields the words of the commands in the fences of a page."""
  for fence in re.findall(r'^ *```\w*\n(.*?)^ *```', page.read_text(),
                          re.M | re.S):
    for line in re.sub(r'\\\n\s*', ' ', fence).splitlines():
      if command := COMMAND.match(line.strip()):
        words = shlex.split(command[1], comments=True)
        ends = [i for i, word in enumerate(words)
                if word in ('|', '&&', ';', '>', '&')]
        yield words[:min(ends, default=len(words))]


def _check(words):
  """Raises what is wrong with a command: its program, config or a field."""
  if words[0] == 'make':
    for goal in words[1:]:
      if '=' not in goal and not goal.startswith('-'):
        assert f'\n{goal}:' in (ROOT / 'Makefile').read_text(), goal
    return
  if words[1] == '-m':
    if words[2].partition('.')[0] in ('tools', 'benchmarks'):
      assert importlib.util.find_spec(words[2]), words[2]
  elif not words[1].startswith('-'):
    assert (ROOT / words[1]).exists(), words[1]
  line = ' '.join(words).replace('--config configs', '--config=configs')
  words = line.split()
  config = base.base()
  for word in words:
    file, _, size = word.removeprefix('--config=').partition(':')
    if re.fullmatch(r'configs/[a-z]\w*\.py', file) and (
        not PLACEHOLDER.search(size)):
      module = importlib.import_module(f'configs.{pathlib.Path(file).stem}')
      config = module.get_config(*filter(None, [size]))
  for word in words:
    if word.startswith('--config.'):
      field = word.removeprefix('--config.').partition('=')[0]
      assert PLACEHOLDER.search(field) or _has(config, field), field


def _has(config, field):
  """Whether a config has a field, or may have: a new kind of layer's."""
  if field.startswith('model.kinds.'):
    return True
  for name in field.split('.'):
    if name not in config:
      return False
    config = config[name]
  return True


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_commands_of_a_page(page):
  wrong = []
  for words in _commands(page):
    try:
      _check(words)
    except (AssertionError, ValueError, ImportError) as error:
      wrong.append(f'{" ".join(words)}\n  {error}')
  assert not wrong, '\n'.join(wrong)


# What a command reads: a file of a source, or a folder that a flag names.
READS = re.compile(
    r"(?<![\w.])(?:text|labelled|jsonl|alpaca):([^:,\s']+)"
    r"|--(?:texts|folder|config\.init_from|config\.data\.tokenizer)[= ]"
    r"([^\s']+)")
# Made by README, by the tutorial that imports weights, or part of the package.
MADE = {'runs/tiny', 'runs/a', 'models/smollm2', 'bytes', 'sotu'}


@pytest.mark.parametrize('page', [page for page in PAGES if (
    page.stem == 'README' or page.parent.stem == 'howto')], ids=_name)
def test_what_commands_read_is_in_a_clone_or_made_before(page):
  text = '\n'.join(re.findall(r'^ *```sh\n(.*?)^ *```', page.read_text(),
                              re.M | re.S))
  for match in READS.finditer(text):
    name = match[1] or match[2]
    assert (name in MADE or name.startswith('hf://') or PLACEHOLDER.search(name)
            or any(ROOT.glob(name)) or re.search(
                rf'(--workdir|--out|>) {name}\s', text[:match.start()])), name


def test_no_two_pages_begin_other_runs_in_one_folder():
  """A page may go on with its own runs, and repeat what another begins."""
  begun = {}
  for page in PAGES:
    for words in _commands(page):
      line = ' '.join(words).replace('=', ' ')
      if match := re.search(r'(train\.py|(?:sweep|study|compare) run) .*'
                            r'--workdir (runs/\S+)', line):
        settings = {match[1], *re.findall(
            r'\S+\.py(?=\s|:)|--(?:config\.|match)\S+ \S+', line)}
        begun.setdefault(match[2], {}).setdefault(_name(page), settings)
  assert 'runs/a' in begun
  wrong = {folder: pages for folder, pages in begun.items()
           if len({frozenset(x) for x in pages.values()}) > 1}
  assert not wrong, wrong


def _shape(line):
  """Returns a line as it is printed on any machine: its figures are masked."""
  return re.sub(r'\d[\d,.]*', '#', ' '.join(line.split()))


def test_the_line_of_a_step_is_as_printed():
  page = (ROOT / 'docs/tutorials/train.md').read_text()
  line, = re.findall(r'^step 10/2500.*', page, re.M)
  stream = io.StringIO()
  progress.make_run_progress(2500, stream=stream).update(10, dict(
      loss=6.7180, tokens_per_second=11938.0, step_seconds=0.0858))
  assert _shape(stream.getvalue()) == _shape(line)


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_links_lead_somewhere(page):
  text = re.sub(r'^ *```.*?^ *```', '', page.read_text(), flags=re.M | re.S)
  for link in re.findall(r'\]\(([^)\s#]+)', text):
    assert re.match(r'[a-z]+:', link) or (page.parent / link).exists(), link


@pytest.fixture(scope='module')
def site():
  """Returns the hooks that make the documentation site. They name MkDocs and
  griffe, which the tests do without."""
  stand_ins = {
      'griffe': types.SimpleNamespace(Extension=object, Object=None,
                                      Module=None),
      'mkdocs.structure.files': types.SimpleNamespace(File=None)}
  with pytest.MonkeyPatch.context() as patched:
    for name in stand_ins:
      patched.setitem(sys.modules, name, stand_ins[name])
    patched.delitem(sys.modules, 'tools.docs', raising=False)
    yield importlib.import_module('tools.docs')
    patched.delitem(sys.modules, 'tools.docs')


def _page_of_site(site, uri, text):
  """Returns a page of the site as the site shows it, and its weight."""
  page = types.SimpleNamespace(
      file=types.SimpleNamespace(src_uri=uri), meta={})
  shown = site.on_page_markdown(text, page=page, config=None, files=None)
  return shown, page.meta['search']['boost']


def test_links_of_the_site_lead_to_its_own_pages(site):
  file_of_page = {page: ROOT / file
                  for page, file in site.FILE_OF_PAGE.items()}
  for file in ROOT.glob('docs/**/*.md'):
    file_of_page[file.relative_to(ROOT / 'docs').as_posix()] = file
  targets = set(file_of_page)
  for file in ROOT.glob('docs/**/*.*'):
    name = file.relative_to(ROOT / 'docs').as_posix()
    targets.add(name.replace('.ipynb', '.md'))

  num_links = 0
  for uri, file in file_of_page.items():
    shown, _ = _page_of_site(site, uri, file.read_text())
    text = re.sub(r'^ *```.*?^ *```', '', shown, flags=re.M | re.S)
    for link in re.findall(r'\]\(([^)\s#:]+)[)#]', text):
      target = posixpath.normpath(
          posixpath.join(posixpath.dirname(uri), link))
      assert target in targets, (uri, link)
      num_links += 1
  assert num_links > 100


@pytest.mark.parametrize('uri, text, shown', [
    ('howto/resume.md', '[a](../pods.md#b)', '[a](../pods.md#b)'),
    ('howto/resume.md', '[a](../../README.md)', '[a](../index.md)'),
    ('index.md', '![a](docs/x/b.png) [c](train.py)', '![a](x/b.png) c'),
    ('index.md', '[a](docs/b.ipynb)\n```\n[a](docs/b.md)\n```\n',
     '[a](b.md)\n```\n[a](docs/b.md)\n```\n')])
def test_a_link_is_one_of_the_site(site, uri, text, shown):
  assert _page_of_site(site, uri, text)[0] == shown


def test_pages_to_read_come_first_in_a_search(site):
  uris = 'howto/resume.md', 'studies.md', 'reference/config.md'
  weights = [_page_of_site(site, uri, '')[1] for uri in uris]
  assert weights == sorted(set(weights), reverse=True)


def test_pages_that_are_made_say_what_there_is(site):
  fields = site.render_config_fields().splitlines()
  rows = [line for line in fields if line.startswith('| `')]
  assert len(rows) == len(base.FIELDS)
  for row, (name, leaf) in zip(rows, base.FIELDS.items(), strict=True):
    assert row.startswith(f'| `{name}` | `{leaf.default!r}` | '), row
  config = types.SimpleNamespace(
      site_name='N', site_description='D',
      nav=[{'A': 'a.md'}, {'B': [{'C': 'b/c.md'}]}])
  assert site.render_llms_txt(config) == (
      '# N\n\n> D\n\n- [A](a.html)\n\n## B\n\n- [C](b/c.html)\n')
  cells = [dict(cell_type='markdown', source=['# T\n', 'words']),
           dict(cell_type='code', source=['f()'], outputs=[
               dict(text=['out\n']),
               dict(data={'text/plain': ['p'], 'text/html': ['<b>\n', '</b>']}),
           ])]
  assert site.render_notebook(json.dumps(dict(cells=cells))) == (
      '# T\nwords\n\n```python\nf()\n```\n\n```text\nout\n```\n\n<b> </b>')


@pytest.mark.long
@pytest.mark.parametrize('page', [
    page for page in PAGES if '```python' in page.read_text()
    and page.stem != 'pytorch'],  # front_door_test.py makes its batches
                         ids=_name)
def test_python_on_a_page_runs(page):
  names = {'__name__': 'page'}  # a block goes on from those before it
  for code in re.findall(r'^```python\n(.*?)^```', page.read_text(),
                         re.M | re.S):
    exec(compile(code, _name(page), 'exec'), names)


@pytest.mark.long
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_the_cells_of_a_notebook_run(path):
  pytest.importorskip('treescope', reason='no treescope')
  names = {'__name__': 'notebook'}
  for cell in json.loads(path.read_text())['cells']:
    if cell['cell_type'] == 'code':
      exec(compile(''.join(cell['source']), path.name, 'exec'), names)


def test_as_many_families_are_compared_with_transformers_as_readme_says():
  claim = re.search(r'of over (\d+) families', (ROOT / 'README.md').read_text())
  assert len(recording.systems()) > int(claim[1])
