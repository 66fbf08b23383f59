"""Writes the batches of runs as .npz, for models of other frameworks.

  python -m tools.batches runs/my_sweep/points/learned/seed-* --out=batches

Of each WORKDIR, of which only the config is read, FOLDER gets a folder of its
last name:

  train-0.npz, train-1000.npz, ...  the batches of 1,000 steps each, in order:
                  each array is [steps, rows, length], such as tokens, targets
                  and weights (what a target counts in the loss)
  held_out-0.npz  those of the held-out data on which a run is evaluated; of a
                  mixture one file a source
  about.json      vocab_size, steps, and the run's config
"""

import io
import json
import pathlib
from typing import Any

import numpy as np

from common.errors import require
from training import cli, runs
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
  for workdir in args.runs:
    folder = pathlib.Path(args.out, pathlib.Path(workdir).resolve().name)
    require(not folder.exists(), f'{folder} is there already: move it away')
    _write(storage.path(workdir), folder)
    print(folder)
  return 0


def _write(workdir: Any, folder: pathlib.Path) -> None:
  """Writes the files of one run.

  Raises:
    RequestError: where the batches of a file differ in shape.
  """
  config = runs.config_of(workdir)
  tokenizer = runs.tokenizer_of(workdir, config)
  train = pipeline.training_loader(config, tokenizer)
  steps = config.train.steps
  files = {f'train-{n}': train.iterate(n, min(n + STEPS, steps))
           for n in range(0, steps, STEPS)} | {
               f'held_out-{i}': loader.iterate(
                   0, loader.first(config.eval.batches))
               for i, loader in enumerate(pipeline.held_out(config, tokenizer))}
  for name, stream in files.items():
    batches, data = [*stream], io.BytesIO()
    require(len({str([x.shape for x in batch.values()])
                 for batch in batches}) == 1, f'{workdir}: batches differ in '
            'shape: take a run with data.length_buckets=1 and no batch_ramp')
    np.savez_compressed(data, **{
        key: np.stack([batch[key] for batch in batches]) for key in batches[0]})
    storage.write(storage.path(folder / f'{name}.npz'), data.getvalue())
  storage.write(storage.path(folder / 'about.json'), json.dumps({
      'vocab_size': runs.resolve(config, tokenizer)[0].vocab_size,
      'steps': steps, 'config': run_config.flatten(config)}, indent=2) + '\n')


if __name__ == '__main__':
  cli.run(main)
