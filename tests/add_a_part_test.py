"""A part may stand in a file of one's own; nothing of the project is edited.

The tutorial's text is what a newcomer would write. The tests put it into a
folder outside the project, and there set its fields, train, resume, evaluate
and are refused by the programs themselves.
"""

import json
import pathlib
import re

import pytest

from tests.helpers import forked

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs/tutorials/add_a_part.md'
SMALL = [f'--config.{x}' for x in (
    'model.d_model=16', 'model.num_layers=2', 'model.num_heads=2',
    'data.length=16', 'data.batch_size=8', 'eval.every_steps=0',
    'log.every_steps=1', 'optim.schedule=constant')]


def run(program, *words, cwd, code=0):
  """Runs a program of the project in another folder; checks its exit code."""
  result = forked.run(ROOT / program, *words, cwd=cwd, timeout=600)
  assert result.returncode == code, result.stdout + result.stderr
  assert 'Traceback' not in result.stderr, result.stderr
  return result


@pytest.mark.slow
def test_a_norm_with_two_fields_in_a_file_of_ones_own(tmp_path):
  text, = re.findall('```py\n(import.*?)```', PAGE.read_text(), re.S)
  file = tmp_path / 'my_dyt.py'
  file.write_text(text)

  def train(*words, code=0, more=('mesh.fsdp=2', 'mesh.tensor=2')):
    return run('train.py', '--config', 'my_dyt.py', '--workdir', 'run', *SMALL,
               *(f'--config.{word}' for word in (*words, *more)), cwd=tmp_path,
               code=code)

  def refused(sentence, *words, **more):
    result = train(*words, code=2, **more)
    assert sentence in result.stderr, result.stderr

  sets = 'model.dyt.alpha=0.75', 'model.dyt.eps=0.001'
  refused('model.dyt.eps is 2.0: it must be > 0 and < 1', 'model.dyt.eps=2')
  refused('model.dyt.alpha is 0.75, which this model does not read: it is read '
          'where model.norm is dyt. Leave it at 0.5, or set model.norm',
          sets[0], 'model.norm=rmsnorm')

  assert 'step 2/2' in train(*sets, 'train.steps=2').stdout
  saved = json.loads((tmp_path / 'run/config.json').read_text())
  assert saved['model']['dyt'] == dict(alpha=0.75, eps=0.001)
  assert 'norm_eps' not in saved['model'] and 'rope' not in saved['model']
  assert saved['files'] == {'my_dyt.py': text}
  assert 'step 4/4' in train(*sets, 'train.steps=4').stdout
  refused('the same parameters in another function', sets[1],
          'model.dyt.alpha=0.8', 'train.steps=6')
  refused('cannot go on with another model.dyt.eps', sets[0], 'train.steps=6')

  # A changed file is noticed, and none is needed to use what was trained.
  file.write_text(text.replace('jnp.tanh', 'jnp.arctan'))
  refused("what 'my_dyt.py' holds is not the same", *sets, 'train.steps=6')
  file.unlink()
  assert 'loss' in run('eval.py', '--workdir', 'run', cwd=tmp_path).stdout


# A system of the parts that there are, a hook, a source of data and an
# objective, as one file: what four people would write.
OTHERS = '''
import numpy as np

from architectures.llama import LLaMA
from configs import base
from training.data import sources
from training.hook import Hook
from training.objectives import causal


class SeedOSS(LLaMA):
  """LLaMA whose queries, keys and values have biases."""
  PARTS = LLaMA.PARTS | dict(attention_bias=True, attention_out_bias=False)


def numbers(name, rest):
  def read(path):
    return [f'document {i} has the number {i}.' for i in range(int(rest))]
  return sources.Source(name=name, reader='numbers', read=read, content=rest)


class EveryOther(causal.Causal):
  """Every other token is predicted."""

  def example(self, item, rng, config, tokenizer):
    row = super().example(item, rng, config, tokenizer)
    row['weights'] = row['weights'] & (np.arange(len(row['tokens'])) % 2 == 0)
    return row


class Largest(Hook):

  def trace(self, params, grads):
    return {'largest': abs(grads['head']['kernel']).max()}


SYSTEMS = {'seed_oss': SeedOSS}
OBJECTIVES = {'every_other': EveryOther()}
SOURCES = {'numbers': sources.Form(numbers, 'numbers:COUNT')}


def get_config():
  c = base.base()
  c.model.update(SeedOSS.PARTS, arch='seed_oss', d_model=16, num_layers=1,
                 num_heads=2)
  c.objective = 'every_other'
  c.data.update(source='numbers:40', length=16, batch_size=8)
  c.train.update(steps=2, hooks=f'{__file__}:Largest')
  c.eval.every_steps = 2
  return c
'''


@pytest.mark.slow
def test_a_system_a_source_an_objective_and_a_hook_in_one_file(tmp_path):
  (tmp_path / 'ours.py').write_text(OTHERS)
  run('train.py', '--config', 'ours.py', '--workdir', 'run', cwd=tmp_path)
  lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  train, = [row for row in rows if row['split'] == 'train']
  assert 0 < train['largest'] < train['grad_norm']

  # Found again without the file: the system, the objective and the source.
  (tmp_path / 'ours.py').unlink()
  run('eval.py', '--workdir', 'run', '--json=figures.json', cwd=tmp_path)
  figures = json.loads((tmp_path / 'figures.json').read_text())
  held_out, = [row for row in rows if row['split'] == 'eval']
  assert figures['loss']['loss'] == pytest.approx(held_out['loss'], rel=1e-4)
  code = 'import archetype; print(archetype.load("run").config.arch)'
  loaded = forked.run('-c', f'import sys; sys.path.insert(0, {str(ROOT)!r}); '
                      + code, cwd=tmp_path)
  assert loaded.stdout.strip() == 'seed_oss', loaded.stderr


def test_an_entry_that_is_there_already_is_refused(tmp_path):
  (tmp_path / 'mine.py').write_text(
      'from architectures.parts.layers import RMSNorm\n'
      "NORMS = {'rmsnorm': RMSNorm}\n")
  result = run('train.py', '--config', 'mine.py', '--workdir', 'run',
               cwd=tmp_path, code=2)
  sentence = "NORMS has 'rmsnorm', which architectures.parts.layers has already"
  assert sentence in result.stderr
