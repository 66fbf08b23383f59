r"""The six tasks of MAD as published (Poli et al. 2024, section 3).

  python -m tools.probes run configs/llama.py:tiny --workdir runs/mad \
      --suite=configs/probes/mad.py --config.model.num_layers=2

Lab note. Baselines of the published code: batches of 128, 200 passes, AdamW
with a cosine; learning rates 1e-4, 5e-4 and 1e-3, without weight decay, where
the paper takes the better of 0 and 0.1. What is harder in the paper is a field
here: probe.levels, probe.vocab, data.length, probe.examples. For a GPU.
"""

LRS = (1e-4, 5e-4, 1e-3)


def suite(add):
  """Adds the six tasks, each with the length of its rows and the number of rows
  that it is trained on."""
  for task, length, rows in (
      ('recall', 128, 12_800), ('noisy_recall', 128, 12_800),
      ('fuzzy_recall', 128, 12_800), ('selective_copying', 256, 12_800),
      ('compression', 32, 12_800), ('memorisation', 32, 256)):
    add(task, **{
        'data.length': length, 'data.batch_size': 128, 'probe.examples': rows,
        'train.steps': 200 * rows // 128, 'optim.weight_decay': 0.0,
        'optim.schedule': 'cosine'})
