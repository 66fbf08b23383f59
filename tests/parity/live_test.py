"""Every system beside its implementation in transformers, live: `make verify`.

Outputs are within 1e-5 and gradients within 1e-4 (relative, float32), 64 greedy
tokens are the same one for one, and an export is loaded by transformers without
a missing or unexpected key, computes the same logits, and begins, ends and pads
a text with the same tokens. So are the exports of every variant of a system
that is not refused (exports.py), and each config.json is read as transformers
reads it, whichever of its fields is changed (readings.py). The models are those
of the recordings, with their weights; parity_test.py of tests/training/hf
compares with what is recorded, and needs no PyTorch.
"""

import json

import pytest

import architectures
from tests.parity import compare, exports, generation, harness, known_fields
from tests.parity import lora, parts, readings, recording, reference
from training.hf import weights

pytestmark = [pytest.mark.verify, pytest.mark.slow]
SYSTEMS = recording.systems()
# Where a capacity counts the tokens of a batch, one by one is another batch;
# after a long text dynamic turns others as it; with a cache, the steps of
# mamba2's case have no bounds.
NO_GREEDY = ('switch-capacity', 'gshard-capacity', 'llama-dynamic',
             'mamba2-groups')
HEADS = [(system, head, left) for system in SYSTEMS
         for head in architectures.hugging_face(system).heads
         for left in (False, True)
         if not left or architectures.systems()[system].STACK == 'decoder']


def holds(findings):
  findings = list(findings)
  wrong = [finding for finding in findings if not finding.ok]
  assert not wrong, wrong
  print(f'{len(findings)} hold; the worst: '
        f'{max(findings, key=lambda finding: finding.error)}')


@pytest.mark.parametrize('path', [
    pytest.param(path, id=path.stem) for path in recording.files()])
def test_equals_transformers(path, tmp_path):
  system = path.stem.partition('-')[0]
  given = recording.load_recording(path)
  live = reference.run(given.config, system, given.weights,
                       greedy=path.stem not in NO_GREEDY)
  holds(compare.findings_of(live, compare.OUR_ROPE.get(path.stem)))
  module, params = compare.model_of(live)
  weights.to_hf(module, params, tmp_path)
  theirs = reference.logits(system, tmp_path, live.inputs)
  assert compare.error(theirs['logits'], live.outputs['logits']) <= (
      compare.LIMITS['export'])


@pytest.mark.parametrize('name', [
    'phi3-longrope', 'llama-longrope_short', 'llama-dynamic'])
def test_a_text_outgrows_the_original_length_as_in_transformers(name):
  given = recording.load_recording(
      recording.FOLDER / 'parity' / f'{name}.safetensors')
  field, config = 'original_max_position_embeddings', given.config
  if 'longrope' in name:
    config[field] = config['rope_parameters'][field] = 20
  live = reference.run(config, name.partition('-')[0], given.weights)
  holds(f for f in compare.findings_of(live) if f.what == 'greedy')


@pytest.mark.parametrize('system, head, left', HEADS)
def test_heads_equal_those_of_transformers(system, head, left, tmp_path):
  """Rows of decoders are padded on the left, too: a row is scored off its last
  token."""
  given = recording.load_recording(recording.files(system)[0])
  live = reference.run(given.config, system, head=head, left=left)
  holds(compare.findings_of(live))
  if not left:
    module, params = compare.model_of(live)
    weights.to_hf(module, params, tmp_path, labels=('no', 'yes', 'perhaps')[
        :module.config.num_labels])
    theirs = reference.logits(system, tmp_path, live.inputs, head)
    assert compare.worst(theirs, live.outputs, live.inputs) <= (
        compare.LIMITS['export'])


@pytest.mark.parametrize('system', SYSTEMS)
def test_every_export_is_read_as_it_was_meant(system):
  holds(exports.export_findings(system))


@pytest.mark.parametrize('system', SYSTEMS)
def test_every_config_json_is_read_as_transformers_reads_it(system):
  holds(readings.reading_findings(system))


def test_the_fields_that_transformers_knows_are_those_recorded():
  recorded = json.loads(known_fields.FILE.read_text())
  assert known_fields.record() == recorded


@pytest.mark.parametrize('system', SYSTEMS)
def test_fields_of_generation_come_back(system):
  assert not generation.lost(system)


@pytest.mark.parametrize('source', ['jsonl:x:messages', 'alpaca:x'])
def test_an_exported_template_lays_out_a_chat_as_it_was_taught(source):
  assert not generation.template_differs(source)


@pytest.mark.parametrize('settings', list(generation.SETTINGS))
def test_the_sampler_is_that_of_transformers(settings):
  assert generation.sampler_differs(settings) < 1e-5


@pytest.mark.parametrize('system', list(lora.MODULES))
def test_adapters_equal_those_of_peft(system):
  pytest.importorskip('peft')
  holds(lora.findings(system))


def test_a_mixture_with_zero_experts_is_that_of_transformers():
  holds(parts.experts())


def test_a_layer_of_attention_is_that_of_transformers():
  holds(parts.attention())


@pytest.mark.parametrize('findings', [
    parts.results_of_heads, parts.gated_norm, parts.router,
    parts.convolved_attention, parts.xielu],
                         ids=lambda x: x.__name__)
def test_newer_parts_are_those_of_transformers(findings):
  holds(findings())


def test_per_layer_embeddings_are_those_of_transformers():
  holds(parts.per_layer())


@pytest.mark.parametrize('system', harness.SYSTEMS)
def test_a_run_and_its_export_answer_lm_eval_alike(system):
  pytest.importorskip('lm_eval')
  holds(harness.findings(system))
