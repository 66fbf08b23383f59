r"""Parity, whose answer changes with each one: which recurrences learn it.

  python -m tools.probes run configs/llama.py:tiny --workdir runs/eigenvalues \
      --suite=configs/probes/eigenvalues.py --config.model.num_layers=1 \
      --config.model.d_model=32 --config.model.num_heads=2 \
      --config.model.num_kv_heads=2 --config.model.d_ff=64

Lab note. Grazzi et al. 2024: a linear recurrence of finite precision whose
steps have no negative eigenvalue cannot compute the parity of rows of any
length, whereas DeltaNet with rates up to 2 can. The paper has 2 layers and rows
of 3 to 40 bits, evaluated on 40 to 256. Here rows have 1 to 16 bits, and 32 and
64 when evaluated. docs/mixers.md has the figures.
"""

LRS = (3e-3,)


def suite(add):
  """Adds the probe of parity for attention, and for DeltaNet without and with
  negative eigenvalues."""
  for name, fields in {
      'attention': {},
      'positive': {'model.mixer': 'deltanet'},
      'negative': {'model.mixer': 'deltanet', 'model.deltanet.negative': True},
  }.items():
    add('parity', label=f'parity_{name}', **{
        'data.length': 17, 'data.batch_size': 64,
        'probe.levels': tuple(range(1, 17)), 'train.steps': 1000, **fields})
