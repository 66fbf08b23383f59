r"""Recall by the number of pairs and by the size of a state, and by attention.

  python -m tools.probes run configs/llama.py:tiny --workdir runs/states \
      --suite=configs/probes/states.py --config.model.num_layers=2 \
      --config.model.d_model=64 --config.model.num_heads=1 \
      --config.model.num_kv_heads=1 --config.model.d_ff=64

Lab note. A state of DeltaNet holds key_dim keys that do not disturb each other
(Schlag et al. 2021, section 4.1); value_dim does not change, and all states
have convolutions before them. Zoology's rows have 64 tokens or more, of 8,192
letters. docs/probes.md has the figures.
"""

LRS = (3e-3,)


def suite(add):
  task = {'data.length': 32, 'data.batch_size': 64, 'probe.vocab': 32,
          'probe.levels': (2, 4, 8), 'train.steps': 1000}
  for keys in (2, 4, 8, 16):
    add('mqar', label=f'mqar_state_{keys}', **task, **{
        'model.mixer': 'deltanet', 'model.deltanet.key_dim': keys})
  add('mqar', label='mqar_attention', **task)
