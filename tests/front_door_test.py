"""What a newcomer does, in the order of README and as the pages say it: a model
and its curve, own text, a comparison, a part and a PyTorch model of their own;
and what the how-tos do with text, labels, masks, vectors and conversations.

The commands and files are those of the pages, in a copy of the project. They
are made small by what the pages document: fields as flags, numbers of a file.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import adding

ROOT = pathlib.Path(__file__).parents[1]
SMALL = [f'--config.{flag}' for flag in (
    'model.d_model=16', 'train.steps=6', 'optim.warmup_steps=2',
    'eval.every_steps=2', 'eval.batches=1', 'log.every_steps=2')]
NUMBERS = {'steps = 300': 'steps = 6', 'warmup_steps=30': 'warmup_steps=2',
           'every_steps=25, batches=16': 'every_steps=3, batches=1',
           'd_model=64': 'd_model=16'}


def _copied(folder):
  """Returns a copy of the project whose `python` makes small what is trained.
  """
  tree = adding.copied(folder / 'tree')
  shutil.copytree(ROOT / 'docs', tree / 'docs')
  shutil.copy(ROOT / 'README.md', tree)  # which its own example trains on
  python = tree / '.bin/python'
  python.parent.mkdir()
  python.write_text(f"""#!{sys.executable}
import os, sys
small, words = {SMALL!r}, sys.argv[1:]
trains = not {{'--dry_run', '--print_config'}} & {{*words}}
if words[0] == 'train.py' and trains:  # a field may be given once
  names = tuple(word.partition('=')[0] + '=' for word in small)
  words = [word for word in words if not word.startswith(names)] + small
os.execv({sys.executable!r}, [{sys.executable!r}, *words])
""")
  python.chmod(0o755)
  return tree


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  return _copied(tmp_path_factory.mktemp('front'))


def _block(page, holds):
  """Returns the fence of a page that holds a text."""
  return next(text for text in re.findall(
      r'^ *```\w*\n(.*?)^ *```', (ROOT / page).read_text(), re.M | re.S)
              if holds in text)


def _run(tree, text, code=0):
  """Runs the commands of a fence, made small, on as many devices as there are;
  returns what they print."""
  environment = os.environ | {'PATH': f'{tree}/.bin:{os.environ["PATH"]}'}
  environment.pop('XLA_FLAGS', None)
  result = subprocess.run(
      ['bash', '-euc', text], cwd=tree, env=environment,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  assert result.returncode == code, result.stdout
  return result.stdout


def _save(tree, page, name):
  """Writes the file that a page says to save under a name."""
  text = re.search(f'`{name}`.*?\n```python\n(.*?)^```',
                   (ROOT / page).read_text(), re.M | re.S)[1]
  for number, small in NUMBERS.items():
    text = text.replace(number, small)
  (tree / name).write_text(text)


@pytest.fixture(scope='module')
def tiny(tree):
  """What `make train` prints."""
  # A command goes on in the next line where a line ends in a backslash.
  commands = '\n'.join(re.findall(
      r'^\t(\$\(run\) (?:train|eval)\.py(?:.*\\\n)*.*)',
      (ROOT / 'Makefile').read_text(), re.M))
  return _run(tree, commands.replace('$(WORKDIR)', 'runs/tiny').replace(
      '$(run)', 'python'))


@pytest.mark.long
def test_a_model_their_own_text_and_the_curves_of_both(tree, tiny):
  assert 'step 6/6' in tiny and 'sample 1 of 1' in tiny
  printed = _run(tree, _block('README.md', '--workdir runs/a'))
  assert 'sample 1 of 1' in printed and 'Once upon' in printed
  _run(tree, _block('README.md', 'tools.curves'))
  assert (tree / 'curves.png').read_bytes().startswith(b'\x89PNG')


# A page of docs/howto, what its block holds, and what that prints.
BLOCKS = [('own_data', '--workdir runs/mine', 'held-out loss'),
          ('own_data', '0.7*text:docs', 'held-out loss'),
          ('finetune', '--workdir runs/sentences', '180 records'),
          ('finetune', '--workdir runs/from_bert', '180 records'),
          ('evaluate', '--tasks=fill_mask', 'mask 1 of 1:'),
          ('evaluate', '--tasks=embed', '900 texts'),
          ('chat', '--workdir runs/chat', 'primary colours'),
          ('chat', 'tools.convert export', 'models/chat: '),
          ('talk', 'printf', '\n')]


@pytest.mark.long
def test_blocks_of_how_tos(tree, tiny):
  """In this order: some go on from runs of those before them, or of README."""
  pytest.importorskip('sklearn')
  for page, holds, prints in BLOCKS:
    assert prints in _run(tree, _block(f'docs/howto/{page}.md', holds)), page
  assert (tree / 'models/chat/README.md').exists()


# A fence of a page, and the words before it.
FENCE = re.compile(r'^ *```(\w*)\n(.*?)^ *```', re.M | re.S)
# Commands that train, or that read what was trained.
TRAINS = re.compile(r'tools\.sweep (run|report)|eval\.py'
                    r'|train\.py(?!.*--(dry_run|print_config))', re.S)
NUMBER = re.compile(r'[~+-]?\d[\d,.]*[kM%]?')
# A time or a speed, which depends on the machine.
MACHINE = re.compile(r'[\d,.:]+(?= (s|tokens/s|GiB|left|in all)\b)'
                     r'|\d+:\d\d:\d\d')


def _is_near(figure, other):
  """Whether two figures have as many digits after the point, and are alike as
  those of two machines are. Counts and shares are the same on both."""
  digits, other_digits = (x.partition('.')[2] for x in (figure, other))
  if not digits.isdigit():
    return figure == other
  if len(digits) != len(other_digits):
    return False
  x, y = (float(text.strip('~').replace(',', '')) for text in (figure, other))
  return abs(x - y) <= max(0.1 * abs(x), 0.05)


def _agree(line, other, is_small):
  """Whether a line of a page says what a printed one says: in its words and,
  unless it is of a run that was made small, in its figures."""
  lines = [MACHINE.sub('#', ' '.join(text.split())) for text in (line, other)]
  words, other_words = (NUMBER.sub('#', text) for text in lines)
  figures, other_figures = (
      [figure.rstrip('.,') for figure in NUMBER.findall(text)]
      for text in lines)
  return words == other_words and (
      is_small or all(map(_is_near, figures, other_figures)))


def _without_times(text):
  """Returns printed text without the columns of its tables that have times,
  which depend on the machine."""
  lines, columns = [], []
  for line in text.splitlines():
    if headings := list(re.finditer(
        r'(?<=  )(?:\S+ )*time(?: \S+)*(?: +|$)', line)):
      columns = [heading.span() for heading in reversed(headings)]
    elif not line:
      columns = []
    for start, stop in columns:
      line = line[:start] + line[stop:]
    lines.append(line)
  return '\n'.join(lines)


def _not_printed(block, printed, is_small):
  """Returns the lines of a page's block that are not, in their order, among
  those that were printed. A text that a model wrote is any text."""
  missing, lines = [], _without_times(printed).splitlines()
  block = _without_times(block)
  block = re.sub(r'(?m)^(sample \d+ of \d+:)\n.*', r'\1', block)
  for line in block.splitlines():
    places = [place for place, other in enumerate(lines)
              if line.strip() and _agree(line, other, is_small)]
    if places:
      del lines[:places[0] + 1]
    elif line.strip() not in ('', '...'):
      missing.append(line)
  return missing


def _change(file, diff):
  """Makes a change that a page shows: lines of one place, with - or + before
  those that go and come."""
  before, after = ('\n'.join(line[1:] for line in diff.splitlines()
                             if line[0] != sign) for sign in '+-')
  assert file.read_text().count(before) == 1, file
  file.write_text(file.read_text().replace(before, after))


def _walk(tree, page, trains):
  """Goes through a tutorial as a reader does: saves its files, makes its
  changes, runs its commands, and compares what they print with its blocks.

  Args:
    tree: a copy of the project.
    page: the tutorial.
    trains: whether to run the commands that train. If not, they are passed
      over, and so are the blocks that show what they print.

  Returns:
    The lines of blocks that were not printed.
  """
  text, end = (ROOT / page).read_text(), 0
  missing, printed, command = [], None, ''
  for fence in FENCE.finditer(text):
    words, (kind, block) = text[end:fence.start()], fence.groups()
    end = fence.end()
    files = re.findall(r'`([\w/]+\.py)`', words)
    if kind in ('py', 'python'):
      (tree / files[-1]).write_text(block)
    elif kind == 'diff':
      _change(tree / files[-1], block)
    elif kind == 'sh':
      command, printed = block, None
      is_ours = command.startswith('python') and 'pytest' not in command
      if is_ours and (trains or not TRAINS.search(command)):
        printed = _run(tree, command)
    else:
      # What follows a command of its own is what that prints.
      for part in re.split(r'(?m)^(?=\$ )', block):
        if part.startswith('$ '):
          command, part = part.removeprefix('$ ').split('\n', 1)
          printed = _run(tree, command, 2 if part.startswith('error') else 0)
        if printed is not None:
          is_small = re.match(r'python (train|eval)', command) is not None
          is_small = is_small and TRAINS.search(command) is not None
          missing += _not_printed(part, printed, is_small)
  return missing


TUTORIALS = [f'docs/tutorials/{name}.md'
             for name in ('train', 'compare', 'add_a_part')]


@pytest.mark.slow
@pytest.mark.parametrize('page', [
    TUTORIALS[0], pytest.param(TUTORIALS[1], marks=pytest.mark.long),
    TUTORIALS[2]])
def test_a_tutorial_prints_what_it_says(page, tmp_path):
  assert _walk(_copied(tmp_path), page, trains=False) == []


@pytest.mark.long
@pytest.mark.parametrize('page', TUTORIALS)
def test_a_tutorial_prints_what_it_says_of_what_it_trains(page, tmp_path):
  assert _walk(_copied(tmp_path), page, trains=True) == []


@pytest.fixture(scope='module')
def swept(tree):
  page = 'docs/tutorials/compare.md'
  _save(tree, page, 'my_sweep.py')
  return _run(tree, _block(page, 'run my_sweep.py'))


@pytest.mark.verify
def test_their_own_pytorch_model(tree, swept):
  pytest.importorskip('torch')
  page = 'docs/howto/pytorch.md'
  batches = _block(page, 'tools.batches').splitlines()
  assert 'run my_sweep.py' in batches[0]  # which `swept` has done
  _run(tree, '\n'.join(batches[1:]))
  _save(tree, page, 'own_model.py')
  here = os.getcwd()
  os.chdir(tree)
  try:
    exec(compile((tree / 'own_model.py').read_text(), 'own_model.py', 'exec'),
         {'__name__': '__main__'})
  finally:
    os.chdir(here)
  printed = _run(tree, _block(page, '--rows=losses.csv'))
  assert re.search(r'^gru .*\] +(better|worse|no difference shown) ', printed,
                   re.M), printed
