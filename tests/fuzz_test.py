"""Random requests make no traceback: what a program or the Python API cannot do
is said in one sentence (common/errors.py)."""

from collections.abc import Callable
import contextlib
import functools
import inspect
import pathlib
import sys
import traceback
from typing import Any
from unittest import mock

from etils import epath
import flax.linen as nn
from hypothesis import given, HealthCheck, Phase, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

import archetype
import architectures
from architectures.parts import flat, tables
from common.errors import EnvironmentFailure, RequestError
from configs import base
from tests.helpers import models, programs, sweeps
from tools import convert
from training import objectives
from training.data import tokenizers
import training.weights

JUNK = st.sampled_from([None, True, 0, -1, 2.5, 1e300, float('nan'), '', 'x',
                        [], {}, [[1]], {'a': 1}])
CASES = settings(max_examples=12, deadline=None, derandomize=True,
                 database=None)


def runs_or_refuses(call) -> None:
  """Runs `call`, which may end with a sentence."""
  try:
    call()
  except (RequestError, EnvironmentFailure, OSError) as error:
    assert str(error).strip() and 'Traceback' not in str(error)


# Requests. Each surface below draws one, and makes it in this process, up to
# the work that a right one asks for.

TEXTS = st.sampled_from([
    '', 'x', '0', '1', '-1', '2', '8', '1e999', 'nan', '9' * 5000, 'x' * 3000,
    '(' * 9999, '-' * 9999 + '1', 'a b' * 900, '{1:2}', "{'a': 2}", '[[', '[]',
    "{'a': {1: 2}}", "{'a': {'ffn': 'x'}}", "{'a': {'rope': 3}}", "{'a': {}}",
    'a', 'a,b', 'a,,b', 'a b', 'ü', '\udcff', '..', '%s', '{}', 'all', "('a',)",
    'True', '.*', '[', 'text:', 'jsonl:x:', 'best', 'last:2', 'probe:mqar',
    'up', 'tokens:x', '0.5*sotu', 'bytes:9', 'jinja:{{', '=1+1', '--help'])
VALUES = st.one_of(JUNK, TEXTS, st.sampled_from([
    2**70, '\0', '\ud800', b'x', (1,), np.int64(3), np.zeros(3), [1.5], [['a']],
    'run', 'hf', base.base(), *tables.TABLES['mixer']]))
KINDS = [{'window': 4}, {'window': 0}, {'num_kv_heads': 1},
         {'kv_sharing': True}, {'position': 'none'},
         *({'ffn': x} for x in ('dense', 'none', 'moe')),
         *({'mixer': x} for x in tables.TABLES['mixer'])]


def program(name: str, stop: str, words: list[str]) -> None:
  """Runs a program's main, of which the function `stop` ends it. It ends with
  0, or with 2 or 1 and a sentence of which no word is long."""
  with mock.patch(stop, lambda *_: sys.exit()):
    code, text = programs.run(name, words)
  assert not code or code in (1, 2) and 'error: ' in text, (code, text)
  assert max(map(len, text.split()), default=0) <= 200, text


@st.composite
def words_of(draw, *fixed: str, names: str = '') -> list[str]:
  """The words `fixed`, of which CONFIG is one with fields of any kind, and
  flags with texts of any kind."""
  words, drawn = list(fixed), {}
  if 'CONFIG' in words:
    system = draw(st.sampled_from(models.SYSTEMS))
    words[words.index('CONFIG')] = f'--config=configs/{system}.py:tiny'
    for name in draw(st.sampled_from(['', '', 'a', 'ab', 'ab', 'b1'])):
      drawn |= {f'kinds.{name}.{x}': value for x, value in draw(
          st.sampled_from(KINDS)).items()} | {
              'pattern': draw(st.sampled_from(['a', 'a,b', 'b,a,b', 'c'])),
              draw(st.sampled_from(['prefix', 'suffix'])): draw(
                  st.sampled_from(['', '', 'a', 'a,b', 'a,'])),
              'num_layers': draw(st.sampled_from([2, 4, 6, 3, 7]))}
    drawn = {f'model.{x}': value for x, value in drawn.items()}
    if draw(st.integers(0, 3)) == 0:
      drawn['objective'] = draw(st.sampled_from([*objectives.OBJECTIVES]))
    names_ = sorted([*base.FIELDS, 'model.kinds', 'model', 'x' * 3000])
    for name in draw(st.lists(st.sampled_from(names_), max_size=3)):
      right = [*tables.CHOICES.get(name.removeprefix('model.'), ())] or {
          bool: ['True', 'False'], int: '124', float: ['0.5', '2']}.get(
              getattr(base.find_field(name), 'type', str), ['x'])
      drawn[name] = draw(st.one_of(TEXTS, *[st.sampled_from(right)] * 2))
  words += [f'--config.{name}={text}' for name, text in drawn.items()]
  return words + draw(st.lists(st.tuples(
      st.sampled_from([*(f'--{x}=' for x in names.split()), '', '--x' * 1500]),
      TEXTS).map(''.join), max_size=draw(st.sampled_from([0, 0, 0, 2]))))


POINTS = st.lists(st.builds(
    '  add({!r}, **{{{!r}: {!r}}})\n'.format, st.one_of(
        JUNK, st.sampled_from(['a', 'b', '=1+1', '--help'])), st.sampled_from([
            'model.norm', 'model.kinds', 'optim.lr', 'model.pattern', 'seed']),
    st.one_of(JUNK, TEXTS, st.just('rmsnorm'))), min_size=1, max_size=2)


def check_sweep(case: tuple[list[str], list[str]]) -> None:
  points = ''.join(case[0]).replace('nan', 'float("nan")')
  program('tools.compare.__main__', 'tools.compare.run.main', [
      'check', sweeps.write(pathlib.Path('.'), points), *case[1]])


def check_lm_eval(given: dict[str, Any]) -> None:
  harness = pytest.importorskip('training.evals.harness', exc_type=ImportError)
  runs_or_refuses(lambda: harness.Model.create_from_arg_obj(given))


def public() -> dict[str, Callable]:
  """The functions of the Python API that have arguments, by their names."""
  known = {f'Model.{name}': x for name, x in vars(archetype.Model).items()
           if inspect.isfunction(x) and (name == '__call__' or name[0] != '_')}
  for module in (archetype, architectures, training.weights):
    known |= {f'{module.__name__}.{name}': x for name, x in vars(module).items()
              if inspect.isfunction(x) and name[0] != '_' and x.__module__ in (
                  module.__name__, 'training.hf.weights')}
  return {name: x for name, x in known.items()
          if inspect.signature(x).parameters.keys() - {'self'}}


PUBLIC = public()


def needed(name: str, model: archetype.Model) -> dict[str, Any]:
  """The arguments without which a function cannot be called, as they may be."""
  usual = dict(
      self=model, module=model.module, params=model.params, arch='gpt',
      model=model.config, config=model.config, path='run', text='a', batch=1,
      folder='out', prompts='a', rows='a', tokens=[[1]], fields={}, length=4)
  return {x.name: usual[x.name]
          for x in inspect.signature(PUBLIC[name]).parameters.values()
          if x.default is x.empty and x.kind is not x.VAR_KEYWORD}


@pytest.mark.parametrize('name', PUBLIC)
def test_a_wrong_type_is_refused_by_the_arguments_name(name, model):
  for argument in inspect.signature(PUBLIC[name]).parameters.values():
    named = {'inputs': 'mask'}.get(argument.name, argument.name)
    for wrong in (object(), b'x', range):
      if argument.annotation not in (Any, argument.empty):
        with pytest.raises((RequestError, TypeError), match=rf'\b{named} '):
          PUBLIC[name](**needed(name, model) | {named: wrong})


@st.composite
def calls(draw, model: archetype.Model) -> tuple[str, dict[str, Any]]:
  """A public function and arguments for it, of any kind."""
  name = draw(st.sampled_from(sorted(PUBLIC)))
  names = [x.name for x in inspect.signature(PUBLIC[name]).parameters.values()
           if x.name not in ('self', 'inputs', 'fields')]
  takes_model = 'build' in name or 'with' in name
  names += flat.default_tree() if takes_model else ['mask']
  return name, needed(name, model) | draw(st.dictionaries(
      st.sampled_from(names), VALUES, max_size=2))


def check_call(case: tuple[str, dict[str, Any]]) -> None:
  """Calls a public function, up to what a model computes."""
  name, words = case
  shapes = lambda module, seed: nn.meta.unbox(jax.eval_shape(
      module.init, jax.random.key(0), np.zeros((1, 1), np.int32))['params'])
  with (mock.patch.multiple(archetype, _draw_parameters=shapes,
                            _as_numpy_float32=lambda x: x,
                            _compute_output=lambda *_: (None, None)),
        mock.patch('training.evals.inspection.inspect_model'),
        mock.patch('training.generate.generate', lambda *_, **__: [[1]])):
    try:
      runs_or_refuses(lambda: PUBLIC[name](**words))
    except TypeError as error:
      assert any(repr(x) in str(error) for x in words), error


@pytest.fixture(name='model', scope='module')
def _model():
  return archetype.Model(*models.make_model(), tokenizers.load('bytes:61'))


@pytest.fixture(name='place', scope='module')
def _place(tmp_path_factory, model):
  """A folder with configs/, a run and a Hugging Face folder, to be in."""
  place = tmp_path_factory.mktemp('place') / 'at'
  model.save(place / 'hf')
  (place / 'configs').symlink_to(pathlib.Path('configs').absolute())
  convert.import_model(place / 'hf', epath.Path(place / 'run'),
                  partial=False, seed=0)
  with contextlib.chdir(place):
    yield place


# By name: how many cases of 2,000, what is drawn, and what is made of it.
SURFACES = {
    'train': (1000, words_of('CONFIG', '--print_config', names='workdir cluster'
                             ' process_id profile_steps flagfile'),
              functools.partial(program, 'train', 'training.loop.train_run')),
    'compare': (100, st.tuples(POINTS, words_of(
        names='seeds match match_field parallel group')), check_sweep),
    'probes': (50, words_of('run', 'CONFIG', '--workdir=card', '--seeds=1',
                            names='suite only seeds'), functools.partial(
        program, 'tools.probes.__main__', 'tools.probes.suites.train_suite')),
    'chat': (100, words_of('--workdir=run', names='folder step template system '
                           'context temperature top_k stop'),
             functools.partial(program, 'tools.chat', 'tools.chat.converse')),
    'tokenize': (150, words_of('text:0.txt', '--out=shards', names='tokenizer '
                               'shard_mib jobs job'), functools.partial(
        program, 'tools.tokenize', 'training.loop.train_run')),
    'lm_eval': (50, st.dictionaries(st.sampled_from([
        'step', 'add_bos_token', 'prefix_token_id', 'max_length', 'other']),
        JUNK).map(lambda x: {'workdir': 'run', **x}), check_lm_eval),
    'python': (550, None, check_call)}


@pytest.mark.parametrize('seeded', [
    True, pytest.param(False, marks=pytest.mark.fuzz)])
@pytest.mark.parametrize('surface', SURFACES)
def test_no_request_ends_in_a_traceback(surface, seeded, place, model):
  cases, drawn, check = SURFACES[surface]
  failures = {}

  @settings(CASES, max_examples=cases // 50 if seeded else cases,
            derandomize=seeded, phases=[Phase.generate],
            suppress_health_check=[*HealthCheck])
  @given(calls(model) if drawn is None else drawn)
  def each(case):
    try:
      check(case)
    except Exception as error:
      last = traceback.extract_tb(error.__traceback__)[-1]
      failures[type(error), last.filename, last.lineno] = f'{case!r:.500}\n' + (
          ''.join(traceback.format_exception(error)[-6:]))

  each()
  assert not failures, '\n\n'.join(failures.values())
