"""A part is one entry of one table, and its fields stand beside it: nothing
else is edited to add one.

The tutorial's text is what a newcomer would write into layers.py. The test
writes it into a copy of the project, and then sets its fields, trains, resumes
and is refused by the programs themselves.
"""

import json
import pathlib
import re

import pytest

from tests.helpers import adding

FILE = 'architectures/parts/layers.py'
PAGE = pathlib.Path(__file__).parents[1] / 'docs/tutorials/add_a_part.md'
SMALL = [f'--config.{x}' for x in (
    'model.d_model=16', 'model.num_layers=2', 'model.num_heads=2',
    'data.length=16', 'data.batch_size=8', 'eval.every_steps=0',
    'log.every_steps=1', 'optim.schedule=constant', 'mesh.fsdp=2',
    'mesh.tensor=2')]


@pytest.mark.slow
def test_a_norm_with_two_fields_is_written_into_one_file(tmp_path):
  tree = adding.copied(tmp_path / 'tree')
  text, = re.findall('```py\n(@dataclasses.*?)```', PAGE.read_text(),
                     re.S)
  (tree / FILE).write_text(f'{(tree / FILE).read_text()}\n\n{text}')

  def train(*words, code=0):
    return adding.run(tree, 'train.py', '--config', 'configs/gpt.py',
                      '--workdir', str(tmp_path / 'run'), *SMALL,
                      *(f'--config.{word}' for word in words), code=code)

  def refused(sentence, *words):
    result = train(*words, code=2)
    assert sentence in result.stderr, result.stderr

  sets = 'model.norm=dyt', 'model.dyt.alpha=0.75', 'model.dyt.eps=0.001'
  refused('model.dyt.eps is 2.0: it must be > 0 and < 1', sets[0],
          'model.dyt.eps=2')
  refused('model.dyt.alpha is 0.75, which this model does not read: it is read '
          'where model.norm is dyt. Leave it at 0.5, or set model.norm',
          sets[1])

  steps = 'train.steps=2'
  assert 'step 2/2' in train(*sets, steps).stdout
  saved = json.loads((tmp_path / 'run/config.json').read_text())['model']
  assert saved['dyt'] == dict(alpha=0.75, eps=0.001)
  assert 'norm_eps' not in saved and 'rope' not in saved
  assert 'step 4/4' in train(*sets, 'train.steps=4').stdout
  refused('the same parameters in another function', *sets[::2],
          'model.dyt.alpha=0.8', 'train.steps=6')
  refused('cannot go on with another model.dyt.eps', *sets[:2], 'train.steps=6')
