"""Equality with transformers, by recordings of it: no PyTorch is needed.

tests/parity/live_test.py compares live (`make verify`).
"""

import json

import jax
import numpy as np
import pytest

import architectures
from tests.helpers import models
from tests.parity import compare, recording
from training.hf import config as hf_config, files as hf_files, weights

FILES = recording.files()
FOLDER = recording.FOLDER / 'parity'
INSIDES = sorted((recording.FOLDER / 'insides').glob('*.safetensors'))


def _load(path):
  return recording.load_recording(path)


# The first case of each system is run every time: whole for those that stand
# for others, and for the others what the model returns.
# One without the experts of its system is the last.
FIRST = {system: sorted(recording.files(system),
                        key=lambda p: p.stem.endswith('-dense'))[0]
         for system in recording.systems()}
WHOLE = [FIRST[s] for s in 'bert gpt llama mamba2 mixtral t5'.split()]


@pytest.mark.parametrize('path', [
    pytest.param(p, id=p.stem, marks=[] if p in WHOLE
                 else pytest.mark.long) for p in FILES])
def test_equals_transformers(path):
  findings = compare.findings_of(
      _load(path), compare.OUR_ROPE.get(path.stem))
  assert {'logits', 'grads'} <= {f.what for f in findings}
  wrong = [f for f in findings if not f.ok]
  assert not wrong, wrong


@pytest.mark.parametrize('path', [
    *(p for p in FIRST.values() if p not in WHOLE),
    FOLDER / 'deepseek_v3-plain.safetensors'],  # YaRN, which scales scores too
                         ids=lambda p: p.stem)
def test_outputs_equal_transformers(path):
  findings = compare.findings_of(_load(path), whole=False)
  assert 'logits' in {f.what for f in findings}
  assert all(f.ok for f in findings), findings


@pytest.mark.parametrize('path', [
    pytest.param(p, id=p.stem, marks=[] if 'llama' in p.stem
                 else pytest.mark.long) for p in INSIDES])
def test_layers_and_attention_weights_equal_transformers(path):
  """Its output_hidden_states and output_attentions; padding apart."""
  recorded = recording.load_insides(_load(FOLDER / path.name), path)
  findings = [f for f in compare.findings_of(recorded)
              if 'layer' in f.what or 'attention' in f.what]
  assert len(findings) > 2
  wrong = [f for f in findings if not f.ok]
  assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.parametrize('path', [
    recording.files(system)[0] for system in recording.systems()],
                         ids=lambda p: p.stem)
def test_export_is_the_import(path, tmp_path):
  case = _load(path)
  module, params = compare.model_of(case)
  weights.to_hf(module, jax.device_get(params), tmp_path)
  files = hf_files.Files(tmp_path)
  assert set(files) == set(case.weights)
  for name, value in case.weights.items():
    np.testing.assert_array_equal(files[name], value, name)
  again, _ = weights.from_hf(tmp_path)
  hf_config.check_same_function(module.config, again.config, 'read back')
  written = json.loads((tmp_path / 'config.json').read_text())
  assert written['architectures'] == case.config['architectures']
  # The sizes that transformers wrote and we write are the same ones.
  differ = {key: (value, case.config[key]) for key, value in written.items()
            if type(case.config.get(key)) in (int, float)
            and not hf_config.FIELDS_WITHOUT_EFFECT.fullmatch(key)
            and key != 'expert_capacity'  # of a dropless model: more than all
            and not (key == 'max_window_layers'  # which nothing reads then
                     and not written['use_sliding_window'])
            and case.config[key] != value}
  assert not differ


def test_every_architecture_with_a_reference_is_compared():
  with_reference = {arch for arch in architectures.systems()
                    if hasattr(architectures.page(arch), 'HF')}
  assert with_reference == set(recording.systems())

LABELS = ('bad', 'good', 'neither')


@pytest.mark.parametrize('path', [
    pytest.param(path, id=path.stem)
    for path in sorted((recording.FOLDER / 'heads').iterdir())])
def test_scores_and_gradients_equal_transformers(path):
  recorded = recording.load_recording(path)
  findings = compare.findings_of(recorded)
  assert {f.what for f in findings} == {'logits', 'grads'}
  assert all(f.ok for f in findings), findings


@pytest.mark.parametrize('system, head, cls', [
    ('bert', 'sequence', 'BertForSequenceClassification'),
    ('gpt', 'tokens', 'GPT2ForTokenClassification'),
    ('llama', 'span', 'LlamaForQuestionAnswering'),
    ('gpt_neox', 'sequence', 'GPTNeoXForSequenceClassification')])
def test_an_export_with_a_head_is_the_import(tmp_path, system, head, cls):
  labels = () if head == 'span' else LABELS
  module, params = models.make_model(system, head=head, num_labels=len(labels))
  weights.to_hf(module, jax.device_get(params), tmp_path, labels=labels)
  tree = hf_config.load_config_json(tmp_path)
  assert tree['architectures'] == [cls]
  again, read = weights.from_hf(tmp_path)
  hf_config.check_same_function(module.config, again.config, 'read back')
  jax.tree.map(np.testing.assert_array_equal, params, read)
  if labels:
    assert tree['id2label'] == {'0': 'bad', '1': 'good', '2': 'neither'}
    assert tree['label2id'] == {'bad': 0, 'good': 1, 'neither': 2}
    assert hf_config.read_labels(tree) == LABELS
  names = set(hf_files.Files(tmp_path))
  if system == 'llama':  # transformers calls the stack so in this class alone
    assert {name.split('.')[0] for name in names} == {'transformer',
                                                      'qa_outputs'}
