"""The heads of tasks in Hugging Face's format: parity by recordings of
transformers, and what a config.json says of labels."""

import jax
import numpy as np
import pytest

import architectures
from configs.errors import RequestError
from tests.helpers import models
from tests.parity import compare, recording
from training.hf import config as hf_config, files as hf_files
from training.hf import heads as hf_heads, weights

LABELS = ('bad', 'good', 'neither')


@pytest.mark.parametrize('path', [
    pytest.param(path, id=path.stem)
    for path in sorted((recording.FOLDER / 'heads').iterdir())])
def test_scores_and_gradients_equal_transformers(path):
  found = recording.load_recording(path)
  findings = compare.findings_of(found)
  assert {f.what for f in findings} == {'logits', 'grads'}
  assert all(f.ok for f in findings), findings


@pytest.mark.parametrize('system, head, said', [
    ('bert', 'sequence', 'BertForSequenceClassification'),
    ('gpt', 'tokens', 'GPT2ForTokenClassification'),
    ('llama', 'span', 'LlamaForQuestionAnswering'),
    ('gpt_neox', 'sequence', 'GPTNeoXForSequenceClassification')])
def test_an_export_is_the_import(tmp_path, system, head, said):
  labels = () if head == 'span' else LABELS
  module, params = models.make(system, head=head, num_labels=len(labels))
  weights.to_hf(module, params, tmp_path, labels=labels)
  tree = hf_config.load_config_json(tmp_path)
  assert tree['architectures'] == [said]
  again, read = weights.from_hf(tmp_path)
  hf_config.check_same(module.config, again.config, 'read back')
  jax.tree.map(np.testing.assert_array_equal, params, read)
  if labels:
    assert tree['id2label'] == {'0': 'bad', '1': 'good', '2': 'neither'}
    assert tree['label2id'] == {'bad': 0, 'good': 1, 'neither': 2}
    assert hf_heads.labels(tree) == LABELS
  names = set(hf_files.Files(tmp_path))
  if system == 'llama':  # transformers calls the stack so in this class alone
    assert {name.split('.')[0] for name in names} == {'transformer',
                                                      'qa_outputs'}


@pytest.mark.parametrize('change, said', [
    (dict(id2label=['a', 'b']), 'id2label .* must be an object'),
    (dict(id2label={'0': 'a', '2': 'b'}), 'id2label .* 0, 1'),
    (dict(id2label={'0': 'a', '1': 'a'}), 'id2label .* twice'),
    (dict(id2label={'0': 'a', '1': 5}), 'id2label .* string'),
    (dict(problem_type='multi_label_classification'), 'problem_type')])
def test_labels_that_mean_nothing_are_refused(change, said):
  tree = hf_config.write(architectures.resolve(
      models.config('bert', head='sequence', num_labels=2)))
  with pytest.raises(RequestError, match=said):
    hf_heads.labels(tree | change)
    hf_config.read(tree | change)
