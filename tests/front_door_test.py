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


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  tree = adding.copied(tmp_path_factory.mktemp('front') / 'tree')
  shutil.copytree(ROOT / 'docs', tree / 'docs')
  python = tree / '.bin/python'  # which makes what is trained small
  python.parent.mkdir()
  python.write_text(f"""#!{sys.executable}
import os, sys
small, words = {SMALL!r}, sys.argv[1:]
if words[0] == 'train.py':  # a field may be given once
  names = tuple(word.partition('=')[0] + '=' for word in small)
  words = [word for word in words if not word.startswith(names)] + small
os.execv({sys.executable!r}, [{sys.executable!r}, *words])
""")
  python.chmod(0o755)
  return tree


def _block(page, holds):
  """Returns the fence of a page that holds a text."""
  return next(text for text in re.findall(
      r'^ *```\w*\n(.*?)^ *```', (ROOT / page).read_text(), re.M | re.S)
              if holds in text)


def _run(tree, text):
  """Runs the commands of a fence, made small; returns what they print."""
  result = subprocess.run(
      ['bash', '-euc', text], cwd=tree, capture_output=True, text=True,
      env=os.environ | {'PATH': f'{tree}/.bin:{os.environ["PATH"]}'})
  assert result.returncode == 0, result.stdout + result.stderr
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
  commands = '\n'.join(re.findall(r'^\t(\$\(run\) (?:train|eval)\.py.*)',
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
          ('own_data', 'labelled:docs/assets/sentences.tsv', '45 records'),
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


@pytest.fixture(scope='module')
def swept(tree):
  page = 'docs/tutorials/compare.md'
  _save(tree, page, 'my_sweep.py')
  assert '9 runs' in _run(tree, _block(page, 'check my_sweep.py'))
  _run(tree, _block(page, 'run my_sweep.py'))
  return _run(tree, _block(page, 'report --workdir runs/my_sweep'))


@pytest.mark.long
def test_a_comparison_with_a_verdict_and_a_picture(tree, swept):
  assert re.search(r'^rope .*\] +(better|worse|no difference shown) ', swept,
                   re.M), swept
  for name in ('index.html', 'outcome.png'):
    assert (tree / 'runs/my_sweep/report' / name).stat().st_size > 10_000


@pytest.mark.long
def test_their_own_part(tree):
  page, file = 'docs/tutorials/add_a_part.md', tree / (
      'architectures/parts/layers.py')
  diff = _block(page, "+    'bilinear'").splitlines()
  before, after = ('\n'.join(line[1:] for line in diff if line[0] != sign)
                   for sign in '+-')
  assert file.read_text().count(before) == 1
  file.write_text(file.read_text().replace(before, after))
  # The parameters and FLOPs are those of the page, to the last digit.
  command, counted = _block(page, '$ python -m tools.count').split('\n', 1)
  assert _run(tree, command.removeprefix('$ ')) == counted
  _save(tree, page, 'my_ffn.py')
  printed = _run(tree, _block(page, 'run my_ffn.py'))
  assert re.search(r'^bilinear .*\] ', printed, re.M), printed


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
