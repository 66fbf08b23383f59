"""A new probe is one file: training and evaluation find it, with no other
edit."""

import json

import pytest

from tests.helpers import adding

FILES = {'training/data/probes/majority.py': '''
"""Are most bits so far ones?"""

import numpy as np

from training.data.probes import record


def draw(rng, count, settings):
  bits = rng.integers(0, 2, count)
  ones, all_so_far = np.cumsum(bits), np.arange(1, count + 1)
  return record.asking(bits, np.arange(count), 2 * ones > all_so_far)


PROBES = {'majority': record.Probe(
    asks='whether most bits so far are ones', source='a test of 2026',
    differs='', level='bits', levels=(8,), draw=draw,
    size=lambda count, settings: count, vocab_size=lambda settings: 2,
    grows=True, hides=True, length=8)}
'''}
SEEN = '''
import json
from configs import gpt
from training import runs
from training.data import pipeline, probes, tokenizers

config = gpt.get_config()
config.objective, config.data.source = 'probe', 'probe:majority'
config.data.update(length=8, batch_size=2)
runs.check_config(config)
tokenizer = tokenizers.load('bytes')
model, derived = runs.resolve(config, tokenizer)
batch = pipeline.training_loader(config, tokenizer).batch(0)
print(json.dumps(dict(vocab=model.vocab_size, levels=derived['probe.levels'],
                      tokens=batch['tokens'].tolist(),
                      targets=batch['targets'].tolist())))
'''


@pytest.mark.slow  # it starts a process
def test_a_probe_is_one_file(tmp_path):
  tree = adding.copy_with(tmp_path / 'tree', FILES)
  seen = json.loads(adding.run(tree, '-c', SEEN).stdout.splitlines()[-1])
  assert seen['vocab'] == 2 and seen['levels'] == [8]
  for tokens, targets in zip(seen['tokens'], seen['targets']):
    assert targets == [2 * sum(tokens[:i + 1]) > i + 1 for i in range(8)]
