r"""Which of the parts that boards and papers of 2026 contradict each other on
help a small LLaMA?

Lab note. The base is LLaMA's wiring (RMSNorm, RoPE, SwiGLU) with a norm of
queries and keys, at 4 layers of width 32, 48, 64 and then, predicted, of 96:
78, 157, 263 and 554 thousand parameters. Half of the text is prose and half is
source code, by bytes, in rows of 256; a byte needs no vocabulary, which at
this width would be most of the parameters. The two larger sizes see ten
tokens a parameter, the smaller ones eight and nine.

Exclusive self-attention, a gate of heads, gated norms and sinks are a
factorial design, each with and without each other, since boards say that they
do each other's work. The feed-forward networks are solved for, so that all
have the FLOPs of the base. The learning rate is tuned at the smallest size
with three seeds, and muP carries it to the others. It has no rule for tables of
n-grams, which are tuned at each size. With weights of a standard deviation of
0.02, runs so short differ more from start to start (configs/studies/parts.py).

prose.jsonl (67 MB: a dictionary of English, manuals of the kernel and of Perl)
and code.jsonl (108 MB of Python) are made in the folder where the study is run,
of packages that `python -m tools.package_text --help` says how to fetch:
  python -m tools.package_text --packages=FOLDER
  python -m tools.study plan configs/studies/contradictions.py --parallel=2
  python -m tools.study run configs/studies/contradictions.py \
      --workdir runs/contradictions --parallel=2 --group=12 --until=noise
"""

import itertools
import math

from configs import llama
from configs.sweeps import helpers

QUESTION = ('Which parts that are found better by some and worse by others '
            'help a small LLaMA at equal FLOPs?')
_ROWS, _LENGTH = 16, 256
_PROSE, _CODE = 'jsonl:prose.jsonl:text', 'jsonl:code.jsonl:text'


def _size(width, steps):
  """Returns what a size changes, whose heads have 16 features."""
  return {'model.d_model': width, 'model.num_heads': width // 16,
          'model.d_ff': 3 * width, 'train.steps': steps,
          'optim.warmup_steps': steps // 10,
          'eval.every_steps': steps // 5, 'checkpoint.every_steps': steps}


SIZES = {'d32': _size(width=32, steps=150), 'd48': _size(width=48, steps=325),
         'd64': _size(width=64, steps=650), 'd96': _size(width=96, steps=1360)}
SEEDS = {'noise': 6, 'tune': 3, 'screen': 3, 'confirm': 4, 'largest': 3}
TUNING = {'fields': {'optim.lr': (4e-3, 8e-3, 1.6e-2)}, 'rungs': 1, 'extend': 3}
EFFECT = 0.03  # nats a byte
Q = 0.99  # nearly all go on: the question is how effects change with the size
MATCH = 'flops_per_token'
_BITS_OF_GUESSING = math.log2(384)  # bytes and marks of the tokenizer
_PROBE = {'data.length': 32, 'data.batch_size': 32, 'train.steps': 300,
          'eval.every_steps': 300, 'checkpoint.every_steps': 300,
          'probe.examples': 50_000}
WORKLOADS = {
    'text': {},
    'mqar': {**_PROBE, 'probe.vocab': 64, 'probe.levels': (2, 4, 8)},
    'parity': {**_PROBE, 'probe.levels': tuple(range(1, 17))},
    'copy': {**_PROBE, 'probe.levels': tuple(range(1, 16))},
}
MEASURES = (
    {'figure': 'loss'},
    {'figure': f'loss/sources/{_PROSE}/bits_per_byte', 'name': 'prose',
     'chance': _BITS_OF_GUESSING},
    {'figure': f'loss/sources/{_CODE}/bits_per_byte', 'name': 'code',
     'chance': _BITS_OF_GUESSING},
    {'workload': 'mqar', 'figure': 'accuracy'},
    {'workload': 'parity', 'figure': 'accuracy'},
    {'workload': 'copy', 'figure': 'accuracy'},
)

# The parts of the factorial design, by their names in the study.
_FACTORS = {
    'exclusive': {'model.attention_exclusive': 'all'},
    'gate': {'model.attention_gate': 'headwise'},
    'gated_norm': {'model.norm': 'rmsnorm_gated', 'model.gated_norm.rank': 8},
    'sinks': {'model.attention_sinks': True},
}


def get_config():
  """Returns the config of the base at the smallest size, by muP."""
  config = helpers.small_run_config(
      llama.get_config('tiny'), steps=150, batch_size=_ROWS, length=_LENGTH,
      eval_every=30, lr=8e-3, d_model=32, num_layers=4, num_heads=2,
      num_kv_heads=0, head_dim=16, d_ff=96, init_stddev=0.1, qk_norm=True,
      parametrization='mup', mup_base_width=32, mup_base_head_dim=16)
  config.data.update(source=f'0.5*{_PROSE},0.5*{_CODE}', holdout_every=200)
  return config


def sweep(add):
  """Adds the base, each combination of the four factors, and each other part
  alone.

  Args:
    add: a function that adds a variant, given its name and the fields of the
      config that it changes.
  """
  add('base')

  # The factorial design: main effects, pairs, and all of higher order.
  for count in range(1, len(_FACTORS) + 1):
    for names in itertools.combinations(_FACTORS, count):
      changes = {}
      for name in names:
        changes.update(_FACTORS[name])
      add('-'.join(names), **changes)

  # Parts that all layers have.
  add('learned_scales', **{'model.residual': 'embedding'})
  add('dynamic_tanh', **{'model.norm': 'dynamic_tanh'})
  add('value_residual', **{'model.value_residual': True})

  # Hybrids, in which every fourth layer keeps full attention.
  add('deltanet', **three_of_four(mixer='deltanet'))
  add('deltanet-no_conv', **three_of_four(mixer='deltanet'),
      **{'model.deltanet.conv': 0})
  add('sliding_window', **three_of_four(window=64))

  # Tables that muP has no rule for.
  add('ngrams', **{
      'model.parametrization': 'standard', 'model.mup_base_width': 0,
      'model.mup_base_head_dim': 0, 'model.pattern': 'plain,reads,plain,plain',
      'model.kinds.plain.memory': 'none', 'model.kinds.reads.memory': 'engram',
      'model.ngrams.rows': 1021, 'optim.table_rate': 5.0})


def three_of_four(**fields):
  """Returns the changes of the config that give these fields of the model to
  three of every four layers; every fourth keeps full attention."""
  changes = {'model.pattern': 'other,other,other,full',
             'model.kinds.full.mixer': 'attention'}
  for name, value in fields.items():
    changes[f'model.kinds.other.{name}'] = value
  return changes
