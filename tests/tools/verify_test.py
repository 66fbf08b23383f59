"""tools/verify leaves nothing out: what its variants change, and that it would
notice. transformers itself is only there in `make verify`."""

import dataclasses
import json

import numpy as np
import pytest

import architectures
from architectures.parts.config import ModelConfig
from configs.errors import RequestError
from tools.verify import cases, compare, exports, readings, reference
from tools.verify import report
from training.hf import config as hf_config


def _fields(kind=ModelConfig, prefix=''):
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(field.type):
      yield from _fields(field.type, f'{field.name}.')
    else:
      yield prefix + field.name


def _names(change, prefix=''):
  for name, value in change.items():
    if name == 'kinds':
      yield name  # of which a change makes its own
    elif isinstance(value, dict):
      yield from _names(value, f'{name}.')
    else:
      yield prefix + name


def test_every_field_of_a_model_is_varied():
  base = architectures.resolve(exports.config('mixtral'))
  varied = {name for change in exports.changes(base)
            for name in _names(change)}
  # The flags of what a system has not are flipped in the systems that have it.
  missing = {name for name in _fields()
             if not hf_config.RUN_ONLY.fullmatch(name)} - varied
  assert missing == {'arch'}
  assert {'moe.eval_capacity_factor', 'moe.group_size'} <= varied


@pytest.mark.parametrize('system', [
    pytest.param(system, marks=[pytest.mark.long] * (
        system not in ('gpt', 'llama', 'mixtral', 't5')))
    for system in cases.SYSTEMS])
def test_every_variant_is_said_by_its_config_json_or_refused(system):
  written = []
  for change in exports.changes(architectures.resolve(exports.config(system))):
    model = exports.config(system)
    for name, value in change.items():
      if isinstance(value, dict):
        model[name].update(value)
      else:
        model[name] = value
    try:
      tree = hf_config.write(architectures.resolve(model))
    except RequestError:
      continue
    json.dumps(tree)
    written.append(change)
  assert {} in written and dict(vocab_size=67) in written


def test_every_field_of_a_config_json_is_changed():
  tree = hf_config.write(architectures.resolve(exports.config('llama')))
  names = readings.asked(tree)
  assert {'hidden_act', 'head_dim', 'rms_norm_eps'} <= names
  changed = list(readings.changes(tree, names))
  for name in (names | set(tree)) - {'model_type'}:
    assert any(other.get(name) != tree.get(name) for _, other in changed), name
  assert any(other.get('rope_parameters', {}) and
             other['rope_parameters'].get('partial_rotary_factor') == 0.5
             for _, other in changed)


@pytest.mark.slow
def test_an_export_that_is_read_otherwise_is_noticed(monkeypatch, capsys):
  """Of a reference that turns all of a head, whatever its config.json says."""
  monkeypatch.setattr(exports, 'changes', lambda base: [
      dict(rope=dict(fraction=1.0)), dict(rope=dict(fraction=0.5))])

  def whole_heads(system, folder, inputs, head):
    del head
    from training import weights
    module, params = weights.from_hf(folder)
    c = module.config
    module = architectures.build(dataclasses.replace(
        c, rope=dataclasses.replace(c.rope, fraction=1.0)))
    return {k: np.asarray(v) for k, v in exports.logits(
        module, params, inputs).items()}

  monkeypatch.setattr(reference, 'logits', whole_heads)
  findings = list(exports.export_findings('gpt_neox'))
  assert [f.what for f in findings] == ['rope.fraction=1.0',
                                        'rope.fraction=0.5']
  rows = report.worst('gpt_neox', 'exports', iter(findings))
  assert [row['ok'] for row in rows] == [True, False]
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 1 and 'rope.fraction=0.5' in said[0]
  assert said[0].endswith('WRONG') and findings[1].error > 1e-2

  def refuses(system, folder, inputs, head):
    raise ValueError('no')

  monkeypatch.setattr(reference, 'logits', refuses)
  assert not any(f.ok for f in exports.export_findings('gpt_neox'))
  assert compare.worst(dict(a=np.ones(2)), {}, {}) == float('inf')
