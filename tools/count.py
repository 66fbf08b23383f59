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

from absl import flags

from common.errors import require
import configs
from training import cli, preflight, runs
from training.costs import systems, totals

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
  require((args.config is None) == args.all and not (args.all and args.length),
          'pass --config FILE.py:SIZE, or --all, which counts every size of '
          'every system as it is, alone')
  if args.all and args.json:
    print(json.dumps(list(everything()), indent=2))
  elif args.all:
    for line in _table(everything()):  # each row as it is counted
      print(line, flush=True)
  else:
    model = runs.resolve_alone(args.config)
    preflight.refuse_unread_of(cli.overrides(), args.config, model)
    figures = totals.count(args.config, args.length)
    figures['not_as_published'] = [
        row._asdict() for row in systems.unlike(model)]
    print(json.dumps(figures, indent=2) if args.json
          else _text(figures, systems.line(model)))


def everything() -> Iterator[dict]:
  """Yields a row for each size of each system in configs/."""
  for path in sorted(configs.FOLDER.glob('*.py')):
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
           *filter(None, [unlike])]

  def add(name: str, value: float, more: str = '') -> None:
    lines.append(f'{name:<28}{value:>20,.0f}{more}')

  add('parameters', f['parameters'])
  for name in ('active', 'trained'):
    if f[f'{name}_parameters'] != f['parameters']:
      add(f'  {name}', f[f'{name}_parameters'])
  for part, size in f['by_part'].items():
    active = f['active_by_part'][part]
    add(f'  {part}', size, f'{active:>20,} active' if active != size else '')
  kinds = [(row['kind'] or 'no kind', row) for row in f['kinds_of_layer']]
  for kind, row in kinds:
    add(f'layers of {kind}', row['layers'], ' ' + (', '.join(
        f'{field}={value}' for field, value in row['changes'].items())
        or 'as the model'))
  lines.append(f'FLOPs per token at length {f["length"]:,}')
  for kind, value in f['flops_per_token'].items():
    sides = f['training_lengths'] if kind == 'training' else []
    if value is not None:
      add(f'  {kind}', value,
          ' ({:,} tokens of the source, {:,} of the target)'.format(*sides)
          if len(sides) == 2 else '')
  if f['kv_cache_bytes_per_token'] is not None:
    add('KV-cache bytes per token', f['kv_cache_bytes_per_token'])
    for kind, row in kinds:
      add(f'  of a layer of {kind}', row['kv_cache_bytes_per_token'])
  for name, key in (('state bytes per row', 'state_bytes_per_row'),
                    ('  per token of the source',
                     'memory_cache_bytes_per_token'),
                    *((f'{name} bytes', f'{name}_bytes') for name in (
                        'parameter', 'optimizer', 'average', 'checkpoint'))):
    if f[key]:
      add(name, f[key])
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
