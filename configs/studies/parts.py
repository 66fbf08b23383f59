"""Which of the parts that are argued about today help a small LLaMA?

Lab note. Eleven parts, each alone in LLaMA's wiring (RMSNorm, RoPE, SwiGLU, no
bias), at 4 layers of width 24, 32 and 48 and then, predicted, of 64, on the
bytes of a text of 40 MB, in rows of 128: the GNU Collaborative International
Dictionary of English, of Debian's package dict-gcide 0.48.5. An entry is a
document:
  python -c "import gzip, json, re
  text = gzip.open('/usr/share/dictd/gcide.dict.dz', 'rt',
                   encoding='latin-1').read()
  for entry in re.split(r'\\n\\n(?=\\S)', text):
    print(json.dumps({'text': entry}))" > gcide.jsonl
The feed-forward networks are solved for, so that all have the FLOPs of the
base. The learning rate is tuned for each part and size. With weights of a
standard deviation of 0.02, the losses of so narrow models after so few steps
differ twice as much from start to start.
  python -m tools.study run configs/studies/parts.py --workdir runs/parts \\
      --parallel=2 --group=12 --anyway
"""

from configs import llama
from configs.sweeps import helpers

QUESTION = ('Which of the parts that are argued about today help a small '
            'LLaMA at equal FLOPs?')
SIZES = {f'd{width}': {'model.d_model': width} for width in (24, 32, 48, 64)}
# The run that docs/parts.md tells of had one seed of tuning and extend of 0.
SEEDS = {'noise': 6, 'tune': 3, 'screen': 12, 'confirm': 8, 'largest': 4}
TUNING = {'fields': {'optim.lr': (5e-3, 1e-2, 2e-2)}, 'rungs': 1, 'extend': 3}
EFFECT = 0.06  # nats a byte
Q = 0.2  # of the screening, after which the confirmation is at 0.05
MATCH = 'flops_per_token'


def get_config():
  config = helpers.small_run_config(
      llama.get_config('tiny'), steps=150, batch_size=16, length=128,
      eval_every=30, lr=1e-2, d_model=24, num_layers=4, num_heads=2,
      num_kv_heads=0, d_ff=0, init_stddev=0.1)
  config.data.update(source='jsonl:gcide.jsonl:text', holdout_every=200)
  return config


def sweep(add):
  """Adds LLaMA as it is, the base, and then each variant, which has one part
  that LLaMA does not have.

  Args:
    add: a function that adds a variant, given its name and the fields of the
      config that it changes.
  """
  def three_of_four(**fields):
    """Returns the changes of the config that give these fields of the model to
    three of every four layers; every fourth keeps full attention."""
    changes = {'model.pattern': 'other,other,other,full',
               'model.kinds.full.mixer': 'attention'}
    for name, value in fields.items():
      changes[f'model.kinds.other.{name}'] = value
    return changes

  add('llama')

  # Parts that all layers have.
  add('qk-norm', **{'model.qk_norm': True})
  add('value-residual', **{'model.value_residual': True})
  add('output-gate', **{'model.attention_gate': 'elementwise'})
  add('relu2', **{'model.ffn': 'relu2'})
  add('sandwich-norm', **{'model.block': 'sandwich'})
  add('biases', **{'model.attention_bias': True, 'model.ffn_bias': True})
  add('gqa', **{'model.num_kv_heads': 1})

  # Hybrids, in which every fourth layer keeps full attention.
  add('sliding-3-to-1', **three_of_four(window=32))
  add('deltanet-3-to-1', **three_of_four(mixer='deltanet'))

  # Several streams beside the layers, and a second token to predict.
  add('hyper-connections', **{'model.residual': 'hyper'})
  add('multi-token', **{'model.mtp_depth': 1})
