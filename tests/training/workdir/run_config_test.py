"""config.json gives the config back; each field has its class of change."""

import dataclasses
import importlib
import json

from etils import epath
import ml_collections
import pytest

import architectures
from architectures.parts import blocks, flat
from common.errors import RequestError
from configs import base
from training import objectives, preflight, runs
from training.data import tokenizers
from training.workdir import run_config
from training.workdir.run_config import INCOMPATIBLE, OPTIMISATION, SAFE


def _config(**changes) -> ml_collections.ConfigDict:
  config = base.base()
  config.update_from_flattened_dict(
      {name.replace('__', '.'): value for name, value in changes.items()})
  return config.lock()


# What the start of a run fills in of these configs.
DERIVED = {'model.vocab_size': 384, 'model.max_len': 256}


def _changes(old, new) -> list[run_config.FieldChange]:
  return run_config.compare_fields(*(
      run_config.fields_that_run_reads(config, DERIVED) for config in (old,
                                                                       new)))


def test_round_trip_is_equal_tuples_and_floats_too(tmp_path):
  config = _config(optim__lr=0.1 + 0.2, data__source='0.7*a,0.3*b',
                   optim__decay_mask=(('.*norm.*', 0), ('.*', 1)))
  run_config.save_config(tmp_path / 'run', config)
  loaded = run_config.load_config(tmp_path / 'run')
  assert loaded == config
  assert isinstance(loaded.optim.decay_mask[0], tuple)
  assert loaded.optim.lr == 0.1 + 0.2
  with pytest.raises(AttributeError):  # locked: no misspelt field slips in
    loaded.optim.learning_rate = 1.0


@pytest.mark.parametrize('name, value, kind', [
    ('log__every_steps', 3, SAFE),
    ('mesh__tensor', 2, SAFE),
    ('seed', 1, OPTIMISATION),
    ('optim__lr', 1.0, OPTIMISATION),
    ('train__steps', 2000, OPTIMISATION),
    ('optim__name', 'lion', INCOMPATIBLE),
    ('model__d_model', 256, INCOMPATIBLE),
    ('data__tokenizer', 'gpt2.json', INCOMPATIBLE)])
def test_one_change_is_found_and_classed(name, value, kind):
  old, new = _config(), _config(**{name: value})
  change, = _changes(old, new)
  dotted = name.replace('__', '.')
  assert change.name == dotted
  assert (change.kind, change.new) == (kind, value)
  run_config.refuse_changes([change], allow_config_change=True)
  if kind == SAFE:
    run_config.refuse_changes([change], allow_config_change=False)
  else:
    with pytest.raises(ValueError, match='another --workdir') as error:
      run_config.refuse_changes([change], allow_config_change=False)
    assert f'{dotted} ' in str(error.value) and kind in str(error.value)
    # A sweep keeps the first line of why a run failed.
    assert f' in {dotted}. Take another' in str(error.value).splitlines()[0]
    # What the run could not go on with anyway is not offered.
    assert ('--allow_config_change' in str(error.value)) == (
        kind == OPTIMISATION)


@pytest.mark.parametrize('fields, kind', [
    (dict(optim__schedule='cosine'), OPTIMISATION),
    (dict(optim__schedule='constant'), SAFE),
    (dict(optim__decay_steps=500), SAFE)])
def test_more_steps_are_safe_where_the_schedule_does_not_see_them(fields, kind):
  change, = _changes(_config(**fields), _config(**fields, train__steps=5000))
  assert change.kind == kind


def test_a_derived_value_is_what_is_compared():
  zero, explicit = _config(), _config(model__d_ff=512)
  before = run_config.fields_that_run_reads(zero, DERIVED | {'model.d_ff': 512})
  assert not run_config.compare_fields(
      before, run_config.fields_that_run_reads(explicit, DERIVED))
  other, = run_config.compare_fields(before, run_config.fields_that_run_reads(
      explicit, DERIVED | {'model.vocab_size': 300}))
  assert (other.kind, other.old, other.new) == (INCOMPATIBLE, 384, 300)


@pytest.mark.parametrize('system', architectures.files())
def test_what_was_saved_is_no_change_whatever_is_learned(system, tmp_path):
  """A field that the model does not read is not saved, and cannot differ."""
  workdir, tokenizer = epath.Path(tmp_path), tokenizers.load('bytes')
  (workdir / 'checkpoints' / '1').mkdir(parents=True)
  config = importlib.import_module(f'configs.{system}').get_config('tiny')
  config.data.labels = ('no', 'yes')
  stack = architectures.stack(config.model)
  fitting = [name for name, objective in objectives.OBJECTIVES.items()
             if stack in objective.stacks]
  assert config.objective in fitting
  for config.objective in fitting:
    probing = config.objective in ('probe', 'compression')
    config.data.source = 'probe:recall' if probing else 'sotu'
    model, derived = runs.resolve_model(config, tokenizer)
    run_config.save_config(workdir, config, derived, model=model)
    assert not run_config.list_changes(workdir, config,
                                       derived), config.objective
    loaded = runs.load_run_config(workdir)  # without what it was derived from
    for name, value in derived.items():
      assert name.startswith('model.') or loaded[name] == value
  config.optim.lr *= 2
  change, = run_config.list_changes(workdir, config, derived)
  assert (change.name, change.old * 2) == ('optim.lr', change.new)


@pytest.mark.parametrize('system', architectures.files())
def test_what_print_config_prints_is_that_config(system):
  """The derived fields are filled in, and the model is the same."""
  config = importlib.import_module(f'configs.{system}').get_config('tiny')
  printed = json.loads(json.dumps(preflight.config_to_print(config)))
  model, _ = runs.resolve_model(config, tokenizers.load('bytes'))
  again = architectures.resolve(run_config.config_from_json(printed).model)
  left = dict.fromkeys(flat.fields_that_are_unread(model))
  assert {**flat.flatten_groups(flat.to_dict(again)), **left} == {
      **flat.flatten_groups(flat.to_dict(model)), **left}
  assert printed['model']['vocab_size'] == 384
  assert printed['model']['head_dim'] == (
      config.model.head_dim or config.model.d_model // config.model.num_heads)
  assert run_config.flatten(printed).keys() <= (
      run_config.flatten(config).keys())


@pytest.mark.parametrize('name, value, message', [
    ('model.max_len', 'long', 'model.max_len is'),
    ('model.max_length', 256, "'model.max_length' is no config field")])
def test_a_derived_value_that_is_damaged_is_refused(
    name, value, message, tmp_path):
  run_config.save_config(tmp_path, base.base(), DERIVED | {name: value})
  (tmp_path / 'checkpoints' / '1').mkdir(parents=True)
  with pytest.raises(RequestError, match=f'config.json is damaged: {message}'):
    run_config.list_changes(epath.Path(tmp_path), base.base(), DERIVED)


@pytest.mark.parametrize('name, value', [
    ('decay_mask', 'all'), ('lr', True), ('warmup_steps', 1.0),
    ('name', 3)])
def test_a_config_of_wrong_types_is_refused(name, value, tmp_path):
  run_config.save_config(tmp_path, base.base(), {'model.max_len': 256})
  file = tmp_path / 'config.json'
  tree = json.loads(file.read_text())
  tree['optim'][name] = value
  file.write_text(json.dumps(tree))
  with pytest.raises(RequestError, match=f'is damaged: optim.{name} is'):
    run_config.load_config(tmp_path)


@pytest.mark.parametrize('mixer', blocks.MIXERS)
def test_a_saved_config_stands_for_the_same_model(mixer):
  config = importlib.import_module('configs.llama').get_config('tiny')
  config.model.update(mixer=mixer, vocab_size=61, max_len=16)
  saved = run_config.without_unread_fields(config,
                                           architectures.resolve(config.model))
  again = run_config.config_from_json(saved)
  model = architectures.resolve(again.model)
  assert run_config.without_unread_fields(again, model) == saved
  lora = dataclasses.replace(model.lora, rank=2, alpha=3.0)
  model = dataclasses.replace(model, lora=lora)
  assert flat.make_model(flat.to_dict(model)) == model
