"""Counts what a model costs, from its shapes alone: nothing is computed.

  python -m tools.count --config configs/mixtral.py:8x7b
  python -m tools.count --all

Printed are the parts in which the model is not the system that model.arch
names, if there are any; the parameters by part, all of them and those that are
active for a token (with experts, the router and top_k experts); the FLOPs per
token of training, as a run counts them, of prefill and of decoding, with causal
attention counted exactly (of objective prefix, training counts as the mean over
its prefixes, prefill as a prompt whose tokens all see each other); the bytes of
the key-value cache for a token; with model.pattern, how many layers each
kind has, what its fields are and what its cache takes; and the bytes of the
optimiser and of a checkpoint. `--all` prints each size of each system beside
its published parameter count, and the difference.
"""

from collections.abc import Iterable, Iterator
import importlib
import json
import pathlib

from absl import flags

from configs.errors import RequestError, require
from training import cli

cli.define_config()
flags.DEFINE_bool('all', False, 'One table of every size of every system.')
flags.DEFINE_integer('length', 0, 'Tokens of a sequence; 0: data.length, or '
                     'as many as the model has positions for, if these are '
                     'fewer.',
                     lower_bound=0, upper_bound=2**24)
flags.DEFINE_bool('json', False, 'Print JSON.')


def main():
  cli.parse(__doc__)
  args = flags.FLAGS
  if args.all:
    for flag, given in ('config', args.config is not None), (
        'length', args.length):
      require(not given, f'--{flag} is beside --all, which counts every size '
              'of every system as it is: leave one of the two out')
    if args.json:
      print(json.dumps(list(everything()), indent=2))
    else:
      for line in _table(everything()):  # each row as it is counted
        print(line, flush=True)
    return 0
  if args.config is None:
    raise RequestError('pass --config FILE.py:SIZE, or --all')
  from training.costs import systems, totals
  figures = totals.count(args.config, args.length)
  model = totals.resolved(args.config)
  figures['not_as_published'] = [row._asdict() for row in systems.unlike(model)]
  print(json.dumps(figures, indent=2) if args.json
        else _text(figures, systems.line(model)))
  return 0


def everything() -> Iterator[dict]:
  """Yields a row for each size of each system in configs/."""
  from training.costs import totals
  for path in sorted(pathlib.Path('configs').glob('*.py')):
    module = importlib.import_module(f'configs.{path.stem}')
    for size, fields in getattr(module, 'SIZES', {}).items():
      figures = totals.brief(module.get_config(size))
      published = fields.get('parameters')
      uncounted = getattr(module, 'UNCOUNTED', {}).get(size, 0)
      counted = figures['parameters'] - uncounted
      yield {
          'size': f'{path.stem}:{size}' + (
              ' (rumoured)' if figures['rumoured'] else ''),
          'parameters': counted,
          'active_parameters': figures['active_parameters'] - uncounted,
          'published': published,
          'difference': counted / published - 1 if published else None,
          'training_flops_per_token': figures['training_flops_per_token'],
      }


def _text(f: dict, unlike: str) -> str:
  lines = [f'{f["model"]}{" (rumoured)" if f["rumoured"] else ""}',
           *filter(None, [unlike]),
           f'{"parameters":<28}{f["parameters"]:>20,}']
  if f['active_parameters'] != f['parameters']:
    lines.append(f'{"  active":<28}{f["active_parameters"]:>20,}')
  if f['trained_parameters'] != f['parameters']:
    lines.append(f'{"  trained":<28}{f["trained_parameters"]:>20,}')
  for part, size in f['by_part'].items():
    active = f['active_by_part'][part]
    lines.append(f'  {part:<26}{size:>20,}' + (
        f'{active:>20,} active' if active != size else ''))
  for row in f['kinds_of_layer']:
    said = ', '.join(f'{field}={value}' for field, value in
                     row['changes'].items()) or 'as the model'
    lines.append(f'{"layers of " + (row["kind"] or "no kind"):<28}'
                 f'{row["layers"]:>20,} {said}')
  lines.append(f'FLOPs per token at length {f["length"]:,}')
  for kind, value in f['flops_per_token'].items():
    if value is not None:
      sides = f['training_lengths'] if kind == 'training' else []
      lines.append(f'  {kind:<26}{value:>20,.0f}' + (
          ' ({:,} tokens of the source, {:,} of the target)'.format(*sides)
          if len(sides) == 2 else ''))
  if f['kv_cache_bytes_per_token'] is not None:
    lines.append(f'{"KV-cache bytes per token":<28}'
                 f'{f["kv_cache_bytes_per_token"]:>20,}')
    for row in f['kinds_of_layer']:
      lines.append(f'{"  of a layer of " + (row["kind"] or "no kind"):<28}'
                   f'{row["kv_cache_bytes_per_token"]:>20,}')
  if f['state_bytes_per_row']:
    lines.append(f'{"state bytes per row":<28}{f["state_bytes_per_row"]:>20,}')
  if f['memory_cache_bytes_per_token'] is not None:
    lines.append(f'{"  per token of the source":<28}'
                 f'{f["memory_cache_bytes_per_token"]:>20,}')
  for name in ('parameter', 'optimizer', 'average', 'checkpoint'):
    if not f[name + '_bytes']:  # no average is kept
      continue
    lines.append(f'{name + " bytes":<28}{f[name + "_bytes"]:>20,}')
  return '\n'.join(lines)


def _table(rows: Iterable[dict]) -> Iterator[str]:
  yield (f'{"system:size":<26}{"parameters":>20}{"active":>20}'
         f'{"published":>20}{"difference":>12}')
  for r in rows:
    published = f'{r["published"]:,.0f}' if r['published'] else ''
    difference = f'{r["difference"]:+.2%}' if r['published'] else ''
    yield (f'{r["size"]:<26}{r["parameters"]:>20,}'
           f'{r["active_parameters"]:>20,}{published:>20}{difference:>12}')


if __name__ == '__main__':
  cli.run(main)
