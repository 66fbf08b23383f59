"""Writes the batches of runs as .npz, for models of other frameworks.

  python -m tools.batches runs/my_sweep/points/learned/seed-* --out=batches

Of each WORKDIR, of which only the config is read, FOLDER gets a folder of its
last name:

  train-0.npz, train-1000.npz, ...  the batches of 1,000 steps each, in order:
                  each array is [steps, rows, length], such as tokens, targets
                  and weights (what a target counts in the loss)
  held_out-0.npz  those of the held-out data on which a run is evaluated; of a
                  mixture one file a source
  about.json      vocab_size, steps, the sources' shares, and the run's config
"""

from collections.abc import Sequence
import io
import json
import pathlib
from typing import Any

import numpy as np

from configs.errors import require
from training import cli, runs
from training.data import tokenizers
from training.objectives import pipeline
from training.workdir import run_config, storage

STEPS = 1000  # in a file


def main() -> int:
  parser = cli.Parser(prog='python -m tools.batches', description=__doc__)
  parser.add_argument('runs', nargs='+', metavar='WORKDIR', help='of a run')
  parser.add_argument('--out', required=True, metavar='FOLDER',
                      help='where to write')
  args = parser.parse_args()
  storage.try_folder(args.out, '--out')
  names = [pathlib.Path(folder).resolve().name for folder in args.runs]
  require(len({*names}) == len(names), f'two of the folders are called alike, '
          f'and would be written over each other: {", ".join(names)}')
  for workdir, name in zip(args.runs, names):
    _write(storage.path(workdir), pathlib.Path(args.out) / name)
    print(pathlib.Path(args.out) / name)
  return 0


def _write(workdir: Any, folder: pathlib.Path) -> None:
  """Writes the files of one run."""
  config = runs.config_of(workdir)
  tokenizer = tokenizers.load(config.data.tokenizer)
  train = pipeline.training_loader(config, tokenizer)
  held_out = pipeline.held_out(config, tokenizer)
  steps = config.train.steps
  for first in range(0, steps, STEPS):
    _save(folder / f'train-{first}.npz',
          [*train.iterate(first, min(first + STEPS, steps))])
  for i, loader in enumerate(held_out):
    _save(folder / f'held_out-{i}.npz',
          [*loader.iterate(0, loader.first(config.eval.batches))])
  about = {'vocab_size': runs.model_of(workdir, config).vocab_size,
           'steps': steps, 'shares': [loader.share for loader in held_out],
           'config': run_config.flatten(config)}
  storage.write(storage.path(folder / 'about.json'),
                json.dumps(about, indent=2) + '\n')


def _save(file: pathlib.Path, batches: Sequence[dict[str, np.ndarray]]) -> None:
  """Writes batches of one shape, stacked.

  Raises:
    RequestError: where their shapes differ.
  """
  shapes = {tuple(x.shape for x in batch.values()) for batch in batches}
  require(len(shapes) == 1, f'{file}: the batches differ in shape: take a run '
          'with --config.data.length_buckets=1 and without data.batch_ramp')
  data = io.BytesIO()
  np.savez_compressed(data, **{
      name: np.stack([batch[name] for batch in batches])
      for name in batches[0]})
  storage.write(storage.path(file), data.getvalue())


if __name__ == '__main__':
  cli.run(main)
