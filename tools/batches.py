"""Writes the batches of runs as .npz, for models of other frameworks.

  python -m tools.batches runs/my_sweep/points/learned/seed-* --out=batches

Only the config of each WORKDIR is read, and FOLDER gets a folder of its last
name:

  train-0.npz, train-1000.npz, ...  the batches of 1,000 steps each, in order:
                  each array is [steps, rows, length], such as tokens, targets
                  and weights (what a target counts in the loss)
  held_out-0.npz  the batches of the held-out data on which a run is evaluated;
                  for a mixture, one file for each source
  about.json      vocab_size, steps, and the run's config
"""

from collections.abc import Mapping, Sequence
import io
import json
import pathlib
from typing import Any

import numpy as np

from common.errors import RequestError, require
from training import cli, runs
from training.objectives import pipeline
from training.workdir import run_config, storage

STEPS = 1000  # in a file


def main() -> int:
  """Writes the batches that the named runs train on to files, a folder for each
  run."""
  parser = cli.Parser(prog='python -m tools.batches', description=__doc__)
  parser.add_argument('runs', nargs='+', metavar='WORKDIR',
                      help='the folder of a run')
  parser.add_argument('--out', required=True, metavar='FOLDER',
                      help='where to write')
  args = parser.parse_args()

  # A folder that is there already is never overwritten.
  storage.check_folder_is_writable(args.out, '--out')
  for workdir in args.runs:
    folder = pathlib.Path(args.out, pathlib.Path(workdir).resolve().name)
    require(not folder.exists(), f'{folder} is there already: move it away')
    _write(storage.checked_path(workdir), folder)
    print(folder)
  return 0


def _write(workdir: Any, folder: pathlib.Path) -> None:
  """Writes the batches that a run trained and was evaluated on, as .npz files.

  Each file holds the batches of up to STEPS steps, or of one source of held-out
  data; about.json holds the vocabulary size, the steps and the config.

  Args:
    workdir: the folder of the run, which is only read.
    folder: the folder to write.

  Raises:
    RequestError: where the batches of a file differ in shape.
  """
  config = runs.load_run_config(workdir)
  tokenizer = runs.load_run_tokenizer(workdir, config)

  # The batches of each file, by the name of the file. They are iterators: a
  # file's batches are made only when it is written.
  batches_of_file = {}
  train_loader = pipeline.make_training_loader(config, tokenizer)
  steps = config.train.steps
  for start in range(0, steps, STEPS):
    end = min(start + STEPS, steps)
    batches_of_file[f'train-{start}'] = train_loader.iterate(start, end)
  eval_loaders = pipeline.make_evaluation_loaders(config, tokenizer)
  for i, loader in enumerate(eval_loaders):
    num_batches = loader.first(config.eval.batches)
    batches_of_file[f'held_out-{i}'] = loader.iterate(0, num_batches)

  for name, batches in batches_of_file.items():
    content = _pack_batches(list(batches), workdir)
    storage.write_file(storage.checked_path(folder / f'{name}.npz'), content)

  model, _ = runs.resolve_model(config, tokenizer)
  about = {'vocab_size': model.vocab_size, 'steps': steps,
           'config': run_config.flatten(config)}
  storage.write_file(storage.checked_path(folder / 'about.json'),
                     json.dumps(about, indent=2) + '\n')


def _pack_batches(batches: Sequence[Mapping[str, np.ndarray]], workdir: Any
                  ) -> bytes:
  """Returns the content of an .npz file with some batches: for each array of a
  batch, such as tokens, one array [batches, *shape of the array].

  Args:
    batches: the arrays of each batch, by name.
    workdir: the folder of the run, for the message.

  Raises:
    RequestError: where the batches differ in shape, or there is none.
  """
  # Only arrays of equal shapes can be stacked.
  shapes = [_shapes_of_arrays(batch) for batch in batches]
  if not batches or any(shape != shapes[0] for shape in shapes):
    raise RequestError(f'{workdir}: batches differ in shape: take a run with '
                       'data.length_buckets=1 and no batch_ramp')
  stacked = {}
  for name in batches[0]:
    stacked[name] = np.stack([batch[name] for batch in batches])
  file = io.BytesIO()
  np.savez_compressed(file, **stacked)
  return file.getvalue()


def _shapes_of_arrays(batch: Mapping[str, np.ndarray]
                      ) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each array of a batch, by its name."""
  return {name: array.shape for name, array in batch.items()}


if __name__ == '__main__':
  cli.run(main)
