r"""Products of permutations of three: what one layer can track.

  python -m tools.probes run configs/llama.py:tiny --workdir runs/groups \
      --suite=configs/probes/groups.py --config.model.num_layers=1 \
      --config.model.d_model=32 --config.model.num_heads=2 \
      --config.model.num_kv_heads=2 --config.model.d_ff=64

Lab note. Siems et al. 2025: one layer of DeltaProduct whose tokens take n steps
of rates up to 2 can follow permutations of n + 1 things, where one step follows
parity at most; with rates up to 1 neither is followed past the lengths of
training. The paper trains on 128 tokens and evaluates on 512. Here rows have 1
to 16 permutations, and 32 and 64 when evaluated. docs/mixers.md has the
figures.
"""

LRS = (3e-3,)  # the learning rates that each task is trained with
# The fields of each model. `householders` is how many steps a token takes, and
# `negative` whether their rates reach 2.
MODELS = {
    'attention': {},
    'positive_2': {'model.mixer': 'deltanet', 'model.deltanet.householders': 2,
                   'model.deltanet.negative': False},
    'negative_1': {'model.mixer': 'deltanet', 'model.deltanet.householders': 1,
                   'model.deltanet.negative': True},
    'negative_2': {'model.mixer': 'deltanet', 'model.deltanet.householders': 2,
                   'model.deltanet.negative': True},
}


def suite(add):
  """Adds the task s3 for each model, by add(probe, label=name, **fields)."""
  for name, model_fields in MODELS.items():
    add('s3', label=f's3_{name}', **{
        'data.length': 17, 'data.batch_size': 64,
        'probe.levels': tuple(range(1, 17)), 'train.steps': 2000},
        **model_fields)
