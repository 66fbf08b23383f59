"""Properties of every declared field of a config: what is out of its type,
range or choices is refused, any other value is taken from a flag, and what no
part of the model reads is refused too."""

from collections.abc import Mapping, Sequence
import contextlib
from typing import Annotated, Any, Optional
from unittest import mock

from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import ml_collections
import numpy as np
import pytest

import architectures
from architectures.parts import flat, tables
from common import fields
from common.errors import RequestError, format_count, shorten
from configs import base
from tests.helpers import data_files, forked, models
from training import cli, plugins, preflight
from training.data import tokenizers
from training.objectives import pipeline
from training.workdir import run_config

FIELDS = st.sampled_from(sorted(base.FIELDS))


def set_in(config: ml_collections.ConfigDict, name: str, value) -> None:
  """Sets a field to a value of any type."""
  *groups, last = name.split('.')
  for group in groups:
    config = config[group]
  with config.ignore_type(), config.unlocked():
    config[last] = value


def choices(name: str) -> list[str]:
  return sorted(tables.CHOICES.get(name.removeprefix('model.'), ())
                or base.FIELDS[name].rule.choices)


def another(name: str):
  """Returns a value that a field may have and that is not its default."""
  leaf = base.FIELDS[name]
  bounds = dict(leaf.rule.bounds)
  if leaf.type is bool:
    return not leaf.default
  if leaf.type is str:
    return next((x for x in choices(name) if x != leaf.default), 'other')
  if leaf.type is tuple:
    return (1.5,)
  more = leaf.default + 1
  if more <= bounds.get('<=', 1e9) and more < bounds.get('<', 1e9):
    return more
  return leaf.default / 2 or bounds.get('<=', bounds.get('<')) / 2


@st.composite
def wrong(draw):
  """A field, and a value that it may not have."""
  name = draw(FIELDS)
  leaf = base.FIELDS[name]
  bounds = dict(leaf.rule.bounds)
  kinds = [x for x in (None, True, 3, 2.5, 'x', (1,))
           if type(x) is not leaf.type
           and not (leaf.type is float and isinstance(x, int))]
  values = [st.sampled_from(kinds)]
  if leaf.type is float:
    values.append(st.sampled_from([float('nan'), float('inf')]))
  for sign, beyond in (('>=', -1), ('>', 0), ('<=', 1), ('<', 0)):
    if sign in bounds:
      values.append(st.just(leaf.type(bounds[sign] + beyond)))
  if leaf.type is str and choices(name):
    values.append(st.text('abcxyz', min_size=9, max_size=9))
  return name, draw(st.one_of(values))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(wrong())
def test_a_wrong_value_is_refused_by_name_and_value(case):
  name, value = case
  config = base.base()
  set_in(config, name, value)
  with pytest.raises(RequestError) as refusal:
    base.check_config(config.to_dict())
    flat.check_fields(config.model.to_dict())
  assert name in str(refusal.value) and shorten(value) in str(refusal.value)


@pytest.mark.parametrize('place', range(3))
def test_a_number_without_a_value_hides_no_wrong_one(place):
  """A rate that is traced, as where several runs train as one program."""
  leaf = base.FIELDS['optim.lr']
  values = [fields.FieldValue(leaf, jax.numpy.float32(-1.0), 'traced'),
            fields.FieldValue(leaf, 1e-3, 'right')]
  fields.check_values(values)
  values.insert(place, fields.FieldValue(leaf, -1.0, 'optim.lr'))
  with pytest.raises(RequestError, match='optim.lr is -1.0'):
    fields.check_values(values)


@pytest.mark.parametrize('annotation, right, wrong', [
    (Any, [None, 3], []),
    (int, [3, np.int64(3)], [True, 3.0, '3', None]),
    (float, [2.5, 3, np.float32(1.5)], [True, '2.5', None]),
    (str, ['a', ''], [b'a', 3, None]),
    (bool, [True], [1, 'True']),
    (Optional[int], [None, 3], ['3', 2.5]),
    (int | str, [3, '3'], [None, 2.5]),
    (Mapping[str, int], [{}, ml_collections.ConfigDict()],
     [3, 'a', [('a', 1)], None]),
    (Sequence[str], [['a'], ('a', 'b'), []], ['a', b'a', [1], ['a', 1], 3]),
    (Annotated[int, (('>=', 1), ('<=', 9))], [1, 9], [0, 10, True])])
def test_an_argument_is_of_the_type_of_its_annotation(annotation, right, wrong):
  def function(value, **more):
    return value, more
  function.__annotations__ = {'value': annotation}
  checked = fields.check_argument_types(function)
  for value in right:
    assert checked(value, other=object)[0] is value
  for value in wrong:
    with pytest.raises(RequestError, match='^value is '):
      checked(value)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(wrong())
def test_a_run_refuses_it_before_any_other_work(case):
  config = base.base()
  set_in(config, *case)
  with pytest.raises(RequestError, match=case[0]):
    preflight.check_config(config)


@pytest.mark.parametrize('selector', [
    'residual', *(pytest.param(name, marks=pytest.mark.long)
                  for name in tables.TABLES
                  if '.' not in name and name != 'residual')])
def test_two_parts_make_a_model_or_are_refused(selector):
  pairs = [{selector: part, name: other} for part in tables.TABLES[selector]
           for name, table in tables.TABLES.items() for other in table
           if name != selector]
  resolved = 0
  gpt = models.small_config('gpt')
  for pair in pairs:
    with contextlib.suppress(RequestError):
      model = gpt.copy_and_resolve_references()
      base.set_model_fields(model, pair)
      resolved += architectures.resolve(model) is not None
  assert resolved


def test_every_field_can_be_set_by_a_flag():
  changed = {name: another(name) for name in base.FIELDS}
  argv = ['train.py', '--config=configs/gpt.py',
          *(f'--config.{name}={value}' for name, value in changed.items())]
  try:
    cli.define_config()
    cli.parse('', argv)
    config = flags.FLAGS.config
    assert {name: config[name] for name in changed} == changed
    assert set(cli.overridden_fields()) == changed.keys()
    plugins.check_config(config, 'it')
    flat.check_fields(config.model.to_dict())
  finally:
    for name in list(flags.FLAGS):
      if name.startswith('config.'):
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize('objective, arch', [
    ('causal', 'gpt'), ('mlm', 'bert'), ('span', 't5')])
def test_no_field_that_changes_the_batches_is_safe_to_change(
    objective, arch, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # a field may name a folder that is written
  for i in range(40):
    (tmp_path / f'{i}.txt').write_text(f'What is said {i} times. ' * 9)
  config = data_files.make_run_config(f'text:{tmp_path}/*.txt', objective, 64,
                                      arch)
  config.data.cache_dir = str(tmp_path / 'cache')

  def read_batches(config):
    loader = pipeline.make_training_loader(config,
                                           tokenizers.load('bytes'))
    return [loader.batch(n) for n in range(2)]

  usual, changing = read_batches(config), set()
  for name in base.FIELDS:
    if name.partition('.')[0] not in ('seed', 'span', 'data'):
      continue
    changed = config.copy_and_resolve_references()
    with contextlib.suppress(RequestError):
      set_in(changed, name, another(name))
      batches = read_batches(changed)
      if jax.tree.structure(batches) == jax.tree.structure(usual) and all(
          map(np.array_equal, *map(jax.tree.leaves, (batches, usual)))):
        continue
      changing.add(name)
      effect = base.find_effect_of_change(name, *map(run_config.flatten, (
          config, changed)))
      assert effect[0] != run_config.SAFE, name
  assert changing >= {'seed', 'data.length', 'data.batch_size'} | {
      'causal': set(), 'mlm': {'data.mask_rate'},
      'span': {'span.noise_density', 'span.mean_length'}}[objective]


@pytest.mark.parametrize('system', [
    *(pytest.param(name, marks=pytest.mark.long) for name in (
        'gpt', 'mixtral', 'gemma3', 'kimi_linear', 'mamba2')),
    't5', 'deepseek_v3'])
def test_what_is_not_read_is_refused_by_hand_and_is_nowhere(system):
  """And what a file says of a part that was swapped away is left out."""
  config = base.base()
  config.model = models.small_config(system)
  c = architectures.resolve(config.model)
  unread = flat.fields_that_are_unread(c, config.model)
  assert ('head_dim' in unread) == (system in ('deepseek_v3', 'kimi_linear'))
  assert {name.split('.')[0] for name in unread} >= {'mamba2', 'streams'}
  for name in flat.FIELDS:
    was, value = config[f'model.{name}'], another(f'model.{name}')
    set_in(config, f'model.{name}', value)
    if name in unread:
      # The function takes long, and its result is known.
      with pytest.raises(RequestError) as refusal, mock.patch.object(
          flat, 'fields_that_are_unread', lambda *_: unread):
        preflight.refuse_unread_fields([f'model.{name}'], config, c)
      assert all(word in str(refusal.value) for word in (
          f'model.{name} is {value}', unread[name].where, 'Leave it at'))
    else:
      preflight.refuse_unread_fields([f'model.{name}'], config, c)
    set_in(config, f'model.{name}', was)
  read = flat.flatten_groups(run_config.without_unread_fields(config, c))
  unread = flat.fields_that_are_unread(c)
  assert not {f'model.{name}' for name in unread} & read.keys()
  assert flat.make_model(flat.to_dict(c)) == c
  for group, part in flat.GROUPS.items():
    gone = all(name in unread for name in flat.fields_of_group(group))
    assert (c.find_part(part) is None) == gone or group == flat.GROUP_OF_LORA


@pytest.mark.slow
def test_a_refusal_comes_before_any_device_work(tmp_path):
  """At the end of a refused run no backend of JAX has been started."""
  (tmp_path / 'it.py').write_text(
      'import atexit, train; from training import cli; from jax._src import '
      'xla_bridge; atexit.register(lambda: print("backends", len('
      'xla_bridge._backends))); cli.run(train.main)')
  result = forked.run(tmp_path / 'it.py', '--config', 'configs/gpt.py',
                      f'--workdir={tmp_path}/run',
                      '--config.model.norm=layernrom')
  assert result.returncode == 2, result.stderr
  assert "Did you mean 'layernorm'?" in result.stderr
  assert result.stdout == 'backends 0\n'
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('number, words', [
    (0, '0 runs'), (1, '1 run'), (1200, '1,200 runs')])
def test_a_number_has_its_noun(number, words):
  assert format_count(number, 'run') == words
  assert format_count(number, 'process', 'processes').endswith(
      'process' if number == 1 else ' processes')
