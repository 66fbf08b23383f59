"""Counts what a model costs, from its shapes alone: nothing is computed.

  python -m tools.count --config configs/mixtral.py:8x7b
  python -m tools.count --all

Parameters by part, total and active (a token's own: with experts, the router
and top_k of them); FLOPs per token of training, prefill and decoding, causal
attention counted exactly; bytes of the key-value cache a token; bytes of the
optimiser and of a checkpoint. `--all`: each size of each system beside the
published figure, and the difference.
"""

import importlib
import json
import pathlib

from absl import flags
from ml_collections import config_flags

from training import cli

config_flags.DEFINE_config_file(
    'config', help_string='A file of configs/ and its size, FILE.py:SIZE.')
flags.DEFINE_bool('all', False, 'One table of every size of every system.')
flags.DEFINE_integer('length', 0, 'Tokens of a sequence; 0: data.length.')
flags.DEFINE_bool('json', False, 'Print JSON.')

STAND_IN_VOCAB = 384  # of the byte tokenizer, where a size leaves it open


def main():
  cli.parse(__doc__)
  args = flags.FLAGS
  if args.all:
    rows = everything()
    print(json.dumps(rows, indent=2) if args.json else _table(rows))
    return 0
  if args.config is None:
    raise ValueError('pass --config FILE.py:SIZE, or --all')
  figures = count(args.config, args.length)
  print(json.dumps(figures, indent=2) if args.json else _text(figures))
  return 0


def count(config, length: int = 0) -> dict:
  """Returns every figure of one config, as a dict for JSON."""
  import flax.linen as nn
  import jax
  import numpy as np

  import architectures
  from training import flops, paths, state
  model = resolved(config)
  module = architectures.build(model)
  tx = state.optimizer(module, config.optim, config.train.steps)
  params = nn.meta.unbox(state.abstract_params(module))
  opt_state = jax.eval_shape(tx.init, params)
  sizes = {path: x.size for path, x in paths.flatten(params).items()}
  active = {path: size * _active_share(path, model)
            for path, size in sizes.items()}
  length = length or config.data.length
  both = flops.STACKS[model.arch] == 'encoder-decoder'
  other = length if both else 0
  nbytes = lambda tree: int(sum(
      x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)))
  decodes = flops.STACKS[model.arch] != 'encoder'
  return {
      'model': model.arch,
      'rumoured': model.arch.startswith('gpt4'),
      'parameters': sum(sizes.values()),
      'active_parameters': round(sum(active.values())),
      'by_part': _by_part(sizes),
      'active_by_part': {k: round(v) for k, v in _by_part(active).items()},
      'length': length,
      'flops_per_token': {
          'training': flops.training_flops_per_token(model, length, other),
          'prefill': flops.forward_flops_per_token(model, length, other),
          'decode': sum(flops.decode_flops(model, length, other).values())
                    if decodes else None,
      },
      'kv_cache_bytes_per_token': _cache_bytes(model) if decodes else None,
      'parameter_bytes': nbytes(params),
      'optimizer_bytes': nbytes(opt_state),
      'checkpoint_bytes': nbytes(params) + nbytes(opt_state),
  }


def resolved(config):
  """Returns the model config, open fields filled as a run would by default."""
  import architectures
  model = config.model.to_dict()
  model['vocab_size'] = model['vocab_size'] or STAND_IN_VOCAB
  model['max_len'] = model['max_len'] or config.data.length
  return architectures.resolve(model)


def everything() -> list[dict]:
  """Returns a row for each size of each system in configs/."""
  rows = []
  for path in sorted(pathlib.Path('configs').glob('*.py')):
    module = importlib.import_module(f'configs.{path.stem}')
    for size in getattr(module, 'SIZES', {}):
      figures = count(module.get_config(size))
      published = module.PUBLISHED.get(size)
      counted = figures['parameters'] - getattr(module, 'UNCOUNTED', {}).get(
          size, 0)
      rows.append({
          'size': f'{path.stem}:{size}' + (
              ' (rumoured)' if figures['rumoured'] else ''),
          'parameters': counted,
          'active_parameters': figures['active_parameters'],
          'published': published,
          'difference': counted / published - 1 if published else None,
          'training_flops_per_token': figures['flops_per_token']['training'],
      })
  return rows


def _active_share(path: str, model) -> float:
  """Which share of a parameter one token uses."""
  expert = '/ffn/' in path and model.ffn == 'moe' and path.rsplit('/', 1)[
      -1].split('_')[0] in ('up', 'gate', 'down')
  if not expert or not _in_moe_block(path, model):
    return 1.0
  return model.moe.top_k / model.moe.num_experts


def _in_moe_block(path: str, model) -> bool:
  block = int(path.split('block_')[1].split('/')[0])
  return model.layer_pattern()[block].ffn == 'moe'


def _by_part(sizes: dict) -> dict:
  """Sums by part: embed, attention, ffn, norms, head, ..."""
  parts: dict = {}
  for path, size in sizes.items():
    names = path.split('/')
    part = next((n for n in names if n in ('cross_attention', 'attention',
                                           'ffn')), None)
    if part is None:
      part = 'norms' if any('norm' in n for n in names) else names[0]
    if part == 'ffn' and names[-1].startswith('router'):
      part = 'router'
    parts[part] = parts.get(part, 0) + size
  return parts


def _cache_bytes(model) -> int:
  """Keys and values of every decoder layer, of one token."""
  return (2 * model.num_decoder_layers * model.num_kv_heads * model.head_dim
          * model.compute_dtype.itemsize)


def _text(f: dict) -> str:
  lines = [f'{f["model"]}{" (rumoured)" if f["rumoured"] else ""}',
           f'{"parameters":<28}{f["parameters"]:>20,}']
  if f['active_parameters'] != f['parameters']:
    lines.append(f'{"  active":<28}{f["active_parameters"]:>20,}')
  for part, size in f['by_part'].items():
    active = f['active_by_part'][part]
    lines.append(f'  {part:<26}{size:>20,}' + (
        f'{active:>20,} active' if active != size else ''))
  lines.append(f'FLOPs per token at length {f["length"]:,}')
  for kind, value in f['flops_per_token'].items():
    if value is not None:
      lines.append(f'  {kind:<26}{value:>20,.0f}')
  if f['kv_cache_bytes_per_token'] is not None:
    lines.append(f'{"KV-cache bytes per token":<28}'
                 f'{f["kv_cache_bytes_per_token"]:>20,}')
  for name in ('parameter', 'optimizer', 'checkpoint'):
    lines.append(f'{name + " bytes":<28}{f[name + "_bytes"]:>20,}')
  return '\n'.join(lines)


def _table(rows: list[dict]) -> str:
  lines = [f'{"system:size":<26}{"parameters":>20}{"active":>20}'
           f'{"published":>20}{"difference":>12}']
  for r in rows:
    published = f'{r["published"]:,.0f}' if r['published'] else ''
    difference = f'{r["difference"]:+.2%}' if r['published'] else ''
    lines.append(f'{r["size"]:<26}{r["parameters"]:>20,}'
                 f'{r["active_parameters"]:>20,}{published:>20}'
                 f'{difference:>12}')
  return '\n'.join(lines)


if __name__ == '__main__':
  cli.run(main)
