r"""Weights from Hugging Face's format into a workdir, and back.

  python -m tools.convert import DIR_OR_FILE WORKDIR
  python -m tools.convert export WORKDIR DIR [--step=N] [--dtype=bfloat16]

What `import` makes, eval.py reads like any run's workdir, and a new run starts
from with --config.init_from=WORKDIR. What `export` writes, transformers loads.
A config.json that says something which no architecture here honours is
refused by name; --partial draws parameters that the files lack at random, and
lists them. Tokenizer files go along both ways.
"""

import argparse
import importlib
import pathlib
import shutil
import sys

from training import cli

TOKENIZER_FILES = (
    'tokenizer.json', 'tokenizer.model', 'spiece.model', 'vocab.json',
    'merges.txt', 'vocab.txt', 'tokenizer_config.json',
    'special_tokens_map.json', 'added_tokens.json')
LOADED = ('tokenizer.json', 'tokenizer.model', 'spiece.model', 'vocab.json')


def import_(source: pathlib.Path, workdir: pathlib.Path, *, partial: bool,
            seed: int) -> None:
  """Makes `workdir` of the weights in `source`, as a run at step 0."""
  import architectures
  from training import checkpoints, hf_config, hf_files, run_config, weights
  if run_config.exists(workdir):
    raise ValueError(f'{workdir} holds a run already: choose another WORKDIR')
  folder = source.parent if source.is_file() else source
  model = hf_config.fields(hf_config.load(folder))
  module = architectures.build(model)
  page, _ = architectures.ARCHITECTURES[model.arch]
  config = importlib.import_module(f'configs.{page}').get_config('tiny')
  config.model = model
  config.data.length = min(model.max_len, 1024)
  loaded = weights.load(module, hf_files.Files(source), partial=partial,
                        seed=seed)
  for line in loaded.skipped:
    print(f'skipped: {line}')
  workdir.mkdir(parents=True, exist_ok=True)
  copied = _copy_tokenizer(folder, workdir / 'tokenizer')
  if any(name in LOADED for name in copied):
    config.data.tokenizer = str((workdir / 'tokenizer').absolute())
  else:
    print(f'warning: {folder} has no tokenizer: data.tokenizer is '
          f'{config.data.tokenizer!r}', file=sys.stderr)
  run_config.save(workdir, config, {})
  with checkpoints.Checkpoints(workdir, every_steps=0, every_minutes=0.0,
                               keep=1, keep_every=0) as saved:
    saved.save(0, {'params': loaded.params}, next_batch=0, tokens=0,
               config=config)
  print(f'{workdir}: {_count(loaded.params):,} parameters of {model.arch}')


def export(workdir: pathlib.Path, folder: pathlib.Path, *, step: int | None,
           dtype: str, shard_bytes: int) -> None:
  """Writes a checkpoint of `workdir` to `folder` in Hugging Face's format."""
  from training import restoring, run_config, runs, tokenizers, weights
  config = runs.for_this_machine(
      runs.with_new_fields(run_config.load(workdir)))
  tokenizer = tokenizers.load(config.data.tokenizer)
  model, _ = runs.resolve(config, tokenizer)
  run = runs.start(config, model)
  restored = restoring.restore(
      restoring.directory(workdir), {'params': run.abstract.params}, step,
      partial=True)
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)
  weights.to_hf(run.module, restored.state['params'], folder, dtype=dtype,
                shard_bytes=shard_bytes)
  path = pathlib.Path(config.data.tokenizer)
  if path.is_dir():
    _copy_tokenizer(path, folder)
  elif path.is_file():
    shutil.copyfile(path, folder / ('tokenizer.json' if path.suffix == '.json'
                                    else path.name))
  print(f'{folder}: step {restored.step} of {workdir}, '
        f'{_count(restored.state["params"]):,} parameters')


def _copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> list[str]:
  found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
  if found:
    target.mkdir(parents=True, exist_ok=True)
  for name in found:
    shutil.copyfile(source / name, target / name)
  return found


def _count(params) -> int:
  import jax
  return sum(x.size for x in jax.tree.leaves(params))


def main():
  parser = argparse.ArgumentParser(
      prog='python -m tools.convert', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(dest='command', required=True)
  into = commands.add_parser('import', help='Hugging Face to a workdir')
  into.add_argument('source', type=pathlib.Path)
  into.add_argument('workdir', type=pathlib.Path)
  into.add_argument('--partial', action='store_true',
                    help='draw what the files lack, pass over what is extra')
  into.add_argument('--seed', type=int, default=0, help='of what is drawn')
  out = commands.add_parser('export', help='a workdir to Hugging Face')
  out.add_argument('workdir', type=pathlib.Path)
  out.add_argument('folder', type=pathlib.Path)
  out.add_argument('--step', type=int, help='of the checkpoint; the newest')
  out.add_argument('--dtype', default='', choices=(
      '', 'float32', 'bfloat16', 'float16'), help="the parameters' own")
  out.add_argument('--shard_bytes', type=int, default=5 * 10**9,
                   help='no file is larger, unless one tensor is')
  args = parser.parse_args()
  if args.command == 'import':
    import_(args.source, args.workdir, partial=args.partial, seed=args.seed)
  else:
    export(args.workdir, args.folder, step=args.step, dtype=args.dtype,
           shard_bytes=args.shard_bytes)


if __name__ == '__main__':
  cli.run(main)
