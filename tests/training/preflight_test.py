"""What no run can be: a case for each sentence of the checks before a run."""

import pytest

from common.errors import RequestError
from configs import base
from tests.helpers import models
from training import preflight

ENCODER = {'model.arch': 'bert'}
PROBE = {'objective': 'probe', 'data.source': 'probe:mqar'}


def make_config(changes):
  """Returns the config of a small run, with other fields by dotted names."""
  config = base.base()
  config.model = models.small_config('gpt', vocab_size=0)
  config.data.update(source='text:none.txt', length=16, batch_size=4)
  config.eval.every_steps = 10
  config.update_from_flattened_dict(changes)
  return config


REFUSED = {
    'rows longer than positions': (
        {'data.length': 33}, 'model.max_len is 32, and rows of 33 tokens'),
    'a target longer than positions': (
        {'objective': 'seq2seq', 'model.arch': 't5', 'data.length': 16,
         'model.position': 'learned', 'data.target_length': 33},
        'model.max_len is 32, and rows of 33 tokens'),
    'an objective of another stack': (
        {'objective': 'mlm'}, "objective is 'mlm', which does not fit model."),
    'another head': (
        {'model.head': 'sequence', 'model.num_labels': 2},
        "model.head is 'sequence', and objective 'causal' trains 'lm'"),
    'a prefix of layers with a state': (
        {'objective': 'prefix', 'model.mixer': 'gla'},
        "objective is 'prefix', whose first tokens see each other"),
    'further tokens': (
        {'objective': 'classification', 'model.mtp_depth': 1},
        "model.mtp_depth is 1, which objective 'classification' does not"),
    'blocks of no size': (
        {'objective': 'block_diffusion'}, 'model.diffusion_block is 0, and'),
    'no head of pairs': (
        ENCODER | {'objective': 'mlm_nsp', 'model.next_sentence': False},
        'model.next_sentence is False, and objective'),
    'a rate of no tables': (
        {'optim.table_rate': 2.0}, 'optim.table_rate is 2.0, and the mod'),
    'nothing to train': (
        {'optim.freeze': '.*'}, "optim.freeze is '.*', which leaves no param"),
    'nothing frozen': (
        {'optim.freeze': 'nothing'}, "has the pattern 'nothing', which"),
    'no pattern': (
        {'optim.freeze': '['}, "optim.freeze is '[', of which a pattern is no"),
    'a mask that is no pair': (
        {'optim.decay_mask': (('.*', 2),)}, "decay_mask is (('.*', 2),)"),
    'a decay by depth of loops': (
        {'optim.layer_decay': 0.9, 'model.loop': 'plain',
         'model.loops.passes': 2}, 'optim.layer_decay is 0.9, and with model.'),
    'a probe of no name': (
        PROBE | {'data.source': 'text:none.txt'},
        "data.source is 'text:none.txt', and objective 'probe' reads a probe"),
    'a probe that there is not': (
        PROBE | {'data.source': 'probe:mqra'}, "Did you mean 'mqar'?"),
    'letters of a probe without': (
        PROBE | {'data.source': 'probe:parity', 'probe.vocab': 8},
        "probe.vocab is 8, which probe 'parity' does not read"),
    'too few letters': (
        PROBE | {'probe.vocab': 3}, "probe.vocab is 3: probe 'mqar' has at l"),
    'a probe of another objective': (
        PROBE | {'data.source': 'probe:compression', 'data.length': 32},
        "probe:compression is trained by objective 'compression', and"),
    'a probe whose answers an encoder sees': (
        PROBE | ENCODER | {'data.source': 'probe:copy', 'data.length': 32,
                           'probe.levels': (4,)},
        'probe:copy shows its answers to a model that sees the whole row, as '
        'model.arch bert does'),
    'the best of a task that is not evaluated': (
        {'eval.best': 'probe/accuracy'},
        "eval.best is 'probe/accuracy', and eval.tasks has no 'probe': it has "
        'none'),
    'the best of nothing': (
        {'eval.best': 'loss', 'eval.every_steps': 0},
        "eval.best is 'loss' and eval.patience 0, but eval.every_steps is 0"),
    'the best of what may be either': (
        {'eval.best': 'tokens'}, "eval.best is 'tokens', of which it is not"),
    'neither least nor largest': (
        {'eval.best': 'loss', 'eval.best_is': 'most'}, "unknown eval.best_is"),
    'patience without a best': (
        {'eval.patience': 2}, 'eval.patience is 2, which is not read while eval'
        '.best is not set: leave it at 0, or set eval.best'),
    'an unknown part of what is held out': (
        {'eval.part': 'third'}, "unknown eval.part 'third'"),
    'unknown rules': ({'mesh.rules': 'none'}, "unknown mesh.rules 'none'"),
    'a task that nothing evaluates': (
        {'eval.tasks_every_steps': 5}, 'eval.tasks_every_steps is 5, but '),
    'a task twice': (
        {'eval.tasks': 'loss,loss'}, "eval.tasks is 'loss,loss': name each"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_no_run_can_be_is_refused(case):
  changes, words = REFUSED[case]
  with pytest.raises(RequestError) as refusal:
    preflight.check_config(make_config(changes))
  assert words and words in str(refusal.value), str(refusal.value)
