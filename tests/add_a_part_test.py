"""A part may stand in a file of one's own; nothing of the project is edited.

The tutorial's text is what a newcomer would write. The tests put it into a
folder outside the project, and there set its fields, train, resume, evaluate
and are refused by the programs themselves.
"""

import importlib
import json
import pathlib
import re

import pytest

from tests.helpers import forked, studies
from training import plugins

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
@pytest.mark.long
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
SOURCES = {'numbers': sources.SourceForm(numbers, 'numbers:COUNT')}


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


# A recurrence with fields, a state and a check of its own.
LEAKY = '''
import dataclasses

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts import layers, mixer
from architectures.parts.recurrent import features
from architectures.parts.context import Report
from common.errors import RequestError
from common.fields import field, FUNCTION, SHAPES
from configs import llama


@dataclasses.dataclass(frozen=True)
class LeakyConfig:
  """The fields of mixer leaky."""
  width: int = field(24, 'The number of features of the state.', above=0,
                     resume=SHAPES)
  shift: float = field(1.0, 'A number that is added to the logits of a.',
                       resume=FUNCTION)


@struct.dataclass
class State:
  state_BI: jax.Array


class Leaky(nn.Module):
  """h_t = a_t h_t-1 + (1 - a_t) W_v x_t, a = sigmoid(W_a x + 1), y = W_o h."""
  settings = LeakyConfig
  config: object
  kind: object

  @nn.compact
  def __call__(self, x_BLD, ctx, cache):
    c, sizes = self.config, self.config.part(LeakyConfig)
    mixer.check_context_of_recurrence(c.mixer, ctx)

    def dense(name, x_BLD, spec, shape, axes):
      return layers.dense(self, name, spec, x_BLD, shape, axes, with_bias=False,
                          deterministic=ctx.deterministic)

    inner = (c.d_model, sizes.width)
    axes = 'embed', 'mlp'
    v_BLI = dense('value', x_BLD, 'BLD,DI->BLI', inner, axes)
    a_BLI = dense('decay', x_BLD, 'BLD,DI->BLI', inner, axes)
    a_BLI = jax.nn.sigmoid(a_BLI.astype(jnp.float32) + sizes.shift)
    added_BLI = (1 - a_BLI) * v_BLI.astype(jnp.float32)

    # A document begins with a state of zero, and padding leaves it as it is.
    if ctx.segment_ids_BL is not None:
      begins_BL1 = features.begins_document(ctx.segment_ids_BL)[..., None]
      a_BLI = jnp.where(begins_BL1, 0, a_BLI)
    state_BI = jnp.zeros((len(x_BLD), sizes.width))
    if cache is not None:
      state_BI = cache.state_BI
      if ctx.valid_BL is not None:
        read_BL1 = ctx.valid_BL[..., None] != 0
        a_BLI = jnp.where(read_BL1, a_BLI, 1)
        added_BLI = jnp.where(read_BL1, added_BLI, 0)

    def step(state_BI, here):
      a_BI, added_BI = here
      state_BI = a_BI * state_BI + added_BI
      return state_BI, state_BI

    by_place = jnp.moveaxis(a_BLI, 1, 0), jnp.moveaxis(added_BLI, 1, 0)
    state_BI, h = jax.lax.scan(step, state_BI, by_place)
    h_BLI = jnp.moveaxis(h, 0, 1).astype(x_BLD.dtype)
    if cache is not None:
      cache = State(state_BI)
    y_BLD = dense('out', h_BLI, 'BLI,ID->BLD', inner[::-1], axes[::-1])
    return y_BLD, cache, Report()


class LeakyMixer(mixer.Mixer):
  module = Leaky

  def cache(self, config, shape):
    return State(jnp.zeros((*shape[:-1], config.part(LeakyConfig).width)))

  def check(self, config, stack):
    super().check(config, stack)
    if config.parametrization == 'mup':
      raise RequestError('muP has no rule for mixer leaky')


MIXERS = {'leaky': LeakyMixer()}


def get_config(size='tiny'):
  c = llama.get_config(size)
  c.model.mixer = 'leaky'
  return c
'''

WRITES = '''
import sys
sys.path.insert(0, sys.argv[1])
import jax.numpy as jnp
import archetype
model = archetype.load('run')
text = 'To be or'
written = model.generate(text, max_new_tokens=6, temperature=0.0)
tokens = model.encode(text)[0]
for _ in range(6):  # without a cache
  last = model(tokens[None])[0, -1].argmax()
  tokens = jnp.append(tokens, last)
assert model.decode(tokens) == text + written, (model.decode(tokens), written)
print('alike')
'''


@pytest.mark.slow
@pytest.mark.long
def test_a_mixer_with_a_state_in_a_file_of_ones_own(tmp_path):
  file = tmp_path / 'leaky.py'
  file.write_text(LEAKY)

  def train(*words, code=0):
    words = [f'--config.{word}' for word in words]
    return run('train.py', '--config', 'leaky.py', '--workdir', 'run', *SMALL,
               *words, cwd=tmp_path, code=code)

  # What a state cannot have is refused without a word of the mixer about it,
  # and so is a mesh that does not divide its parameters.
  for sentence, *words in (
      ('muP has no rule for mixer leaky', 'model.parametrization=mup',
       'model.mup_base_width=16'),
      ('which keeps no keys and has no window', 'model.attention=banded',
       'model.sliding_window=4'),
      ('mesh.context is 2, and some layers keep each row', 'mesh.context=2'),
      ('mesh.tensor is 2, which does not divide the 7 of the parameter',
       'model.leaky.width=7', 'mesh.tensor=2'),
      ('choose from value, out, up', 'model.lora.rank=2',
       'model.lora.targets=query'),
      ('model.position is rope, which this model does not read',
       'model.position=rope')):
    result = train(*words, code=2)
    assert sentence in result.stderr, result.stderr

  sizes = 'model.leaky.width=16', 'mesh.fsdp=2', 'mesh.tensor=2'
  assert 'step 2/2' in train(*sizes, 'train.steps=2').stdout
  saved = json.loads((tmp_path / 'run/config.json').read_text())
  assert saved['model']['leaky'] == dict(width=16, shift=1.0)
  assert 'num_kv_heads' not in saved['model']
  assert saved['model']['position'] == 'none'
  assert 'step 4/4' in train(*sizes, 'train.steps=4').stdout
  result = train(*sizes, 'model.leaky.shift=2', 'train.steps=6', code=2)
  assert 'the same parameters in another function' in result.stderr

  file.unlink()
  wrote = forked.run('-c', WRITES, str(ROOT), cwd=tmp_path)
  assert wrote.stdout.strip() == 'alike', wrote.stderr


# A phase of a study, which stands in the file of the study.
PHASE = '''
from tools.compare import decide, phases


class Again(phases.Phase):
  """The variants that were confirmed as better, on seeds that are fresh."""

  def choose_variants(self, plan, records):
    return [row.variant for row in records['confirm']
            if row.verdict == decide.BETTER]


PHASES = {'again': Again(
    name='again', block=6, seeds=4,
    methods='What was better was seen again on {plan.seeds[again]} seeds.')}
'''

# Goes through the phases of the plan in the folder `w`; nothing is trained.
PHASES_WITHOUT_TRAINING = f'''
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.helpers import studies
from tools.compare import comparison, plan, report, study


def loss(config):
  noise = config.seed % 7 / 100
  missed = 0.0
  if config.optim.lr != 4e-3:  # the best rate is no edge of those tried
    missed = 0.5
  if config.model.position == 'none':
    return 1.0 + noise + missed
  if config.init_seed:
    return 2.0 + noise ** 2 + missed
  return 2.0 - noise + missed


frozen = plan.load_frozen_plan('w')
trainer = studies.Written('w', frozen, loss=loss)
study.run_and_report_phases(
    'w', frozen, trainer, studies.arguments(until='again', anyway=True))
print(report.render_page(comparison.load_comparison('w'), ()))
'''


@pytest.mark.slow
@pytest.mark.long
def test_a_phase_of_a_study_in_the_file_of_the_study(tmp_path):
  file, workdir = pathlib.Path(studies.write(tmp_path, PHASE)), tmp_path / 'w'

  frozen = forked.run('-m', 'tools.compare', 'run', file, '--workdir', workdir,
                      '--until=freeze', timeout=600)
  assert 'was seen again on 4 seeds' in frozen.stdout, frozen.stderr
  plan = json.loads((workdir / 'study.json').read_text())
  assert str(file) in plan['sources'], 'a file that changes is not noticed'

  # The phase is that of the plan, whatever becomes of the file.
  file.unlink()
  went = forked.run('-c', PHASES_WITHOUT_TRAINING, cwd=tmp_path,
                    timeout=600)
  assert 'again: 24 runs' in went.stdout, went.stdout + went.stderr
  assert 'id="again"' in went.stdout
  results = json.loads((workdir / 'results.json').read_text())
  row, = results['again']
  assert (row['variant'], row['n'], row['verdict']) == ('none', 4, 'better')
  seeds = {phase: {run['seed'] for run in results['outcomes']
                   if run['phase'] == phase} for phase in results['phases']}
  assert len(seeds['again']) == 4
  assert not seeds['again'] & seeds['confirm'], 'they are not fresh'


def test_an_entry_that_is_there_already_is_refused(tmp_path):
  (tmp_path / 'mine.py').write_text(
      'from architectures.parts.layers import RMSNorm\n'
      "NORMS = {'rmsnorm': RMSNorm}\n")
  result = run('train.py', '--config', 'mine.py', '--workdir', 'run',
               cwd=tmp_path, code=2)
  sentence = "NORMS has 'rmsnorm', which architectures.parts.layers has already"
  assert sentence in result.stderr


@pytest.mark.parametrize('table', plugins.MODULE_OF_TABLE)
def test_a_table_that_a_file_may_add_to_is_where_it_is_looked_for(table):
  module = importlib.import_module(plugins.MODULE_OF_TABLE[table])
  assert hasattr(module, table)
