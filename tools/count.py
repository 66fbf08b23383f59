"""Counts what a model costs, from its shapes alone: nothing is computed.

  python -m tools.count --config configs/mixtral.py:8x7b
  python -m tools.count --all

It prints the parts in which the model is not the system that model.arch names,
if there are any; the parameters by part, all of them and those that are active
for a token (with experts, the router and top_k experts); the FLOPs per token of
training, as a run counts them, of prefill and of decoding, with causal
attention counted exactly (with objective prefix, training counts as the mean
over its prefixes, prefill as a prompt whose tokens all see each other); the
bytes of the key-value cache for a token; with model.pattern, how many layers
each kind has, what its fields are and what its cache takes; and the bytes of
the optimiser and of a checkpoint. `--all` prints each size of each system with
its published parameter count and the difference.
"""

from collections.abc import Iterable, Iterator
import importlib
import json

from absl import flags

from common.errors import RequestError
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


def main() -> None:
  cli.parse(__doc__)
  args = flags.FLAGS
  has_config = args.config is not None
  if has_config == args.all or (args.all and args.length):
    raise RequestError('pass --config FILE.py:SIZE, or --all, which counts '
                       'every size of every system as it is, alone')

  # Every size of every system.
  if args.all:
    if args.json:
      print(json.dumps(list(everything()), indent=2))
    else:
      for line in _table(everything()):  # each row as it is counted
        print(line, flush=True)
    return

  # One config.
  model = runs.resolve_model_without_tokenizer(args.config)
  preflight.refuse_unread_fields(cli.overridden_fields(), args.config, model)
  figures = totals.count_costs(args.config, args.length)
  differences = systems.fields_unlike_the_system(model)
  figures['not_as_published'] = [row._asdict() for row in differences]
  if args.json:
    print(json.dumps(figures, indent=2))
  else:
    print(_text(figures, systems.describe_differences(model)))


def everything() -> Iterator[dict]:
  """Counts every published model size in configs/, and yields a row for each.

  Yields:
    size: 'FILE:SIZE', marked where its figures are rumoured. parameters,
    active_parameters: those that the publication counts too (active: those that
    one token uses). published: its own figure, or None. difference: the
    counted over the published figure, minus 1, or None without one.
    training_flops_per_token: the FLOPs of both passes for a token.
  """
  for path in sorted(configs.FOLDER.glob('*.py')):
    module = importlib.import_module(f'configs.{path.stem}')
    # UNCOUNTED gives, by size, the parameters that our model has and that the
    # published figure leaves out. They are subtracted for a fair comparison.
    uncounted = getattr(module, 'UNCOUNTED', {})
    for size, fields in getattr(module, 'SIZES', {}).items():
      figures = totals.count_briefly(module.get_config(size))
      name = f'{path.stem}:{size}'
      if figures['rumoured']:
        name += ' (rumoured)'
      left_out = uncounted.get(size, 0)
      counted = figures['parameters'] - left_out

      # Not every publication states its number of parameters.
      published = fields.get('parameters')
      difference = None
      if published:
        difference = counted / published - 1
      yield {
          'size': name,
          'parameters': counted,
          'active_parameters': figures['active_parameters'] - left_out,
          'published': published,
          'difference': difference,
          'training_flops_per_token': figures['training_flops_per_token'],
      }


def _line(name: str, value: float, more: str = '') -> str:
  """Returns the line of a figure, and what is said after it."""
  return f'{name:<28}{value:>20,.0f}{more}'


def _text(figures: dict, unlike: str) -> str:
  """Renders the figures of a config for a terminal.

  Args:
    figures: the figures of totals.count.
    unlike: the line that says in which parts the model is not the system; '':
      in none.
  """
  name = figures['model']
  if figures['rumoured']:
    name += ' (rumoured)'
  lines = [name]
  if unlike:
    lines.append(unlike)
  lines += _parameters(figures)
  lines += _kinds(figures)
  lines += _flops(figures)
  lines += _bytes(figures)
  return '\n'.join(lines)


def _parameters(figures: dict) -> list[str]:
  """Returns the lines of the parameters: all, the active, and by part."""
  parameters = figures['parameters']
  lines = [_line('parameters', parameters)]
  for name in ('active', 'trained'):
    count = figures[f'{name}_parameters']
    if count != parameters:
      lines.append(_line(f'  {name}', count))
  for part, size in figures['by_part'].items():
    active, more = figures['active_by_part'][part], ''
    if active != size:
      more = f'{active:>20,} active'
    lines.append(_line(f'  {part}', size, more))
  return lines


def _kinds(figures: dict) -> list[str]:
  """Returns a line for each kind of layer."""
  lines = []
  for row in figures['kinds_of_layer']:
    changes = [f'{field}={value}' for field, value in row['changes'].items()]
    more = ', '.join(changes) or 'as the model'
    kind = row['kind'] or 'no kind'
    lines.append(_line(f'layers of {kind}', row['layers'], f' {more}'))
  return lines


def _flops(figures: dict) -> list[str]:
  """Returns the lines of the FLOPs for a token."""
  lines = [f'FLOPs per token at length {figures["length"]:,}']
  for kind, value in figures['flops_per_token'].items():
    if value is None:
      continue
    more = ''
    if kind == 'training' and len(figures['training_lengths']) == 2:
      source, target = figures['training_lengths']
      more = f' ({source:,} tokens of the source, {target:,} of the target)'
    lines.append(_line(f'  {kind}', value, more))
  return lines


def _bytes(figures: dict) -> list[str]:
  """Returns the lines of the bytes of caches, states and checkpoints."""
  lines = []
  if figures['kv_cache_bytes_per_token'] is not None:
    lines.append(_line('KV-cache bytes per token',
                       figures['kv_cache_bytes_per_token']))
    for row in figures['kinds_of_layer']:
      kind = row['kind'] or 'no kind'
      lines.append(_line(f'  of a layer of {kind}',
                         row['kv_cache_bytes_per_token']))
  for name, key in (
      ('state bytes per row', 'state_bytes_per_row'),
      ('  per token of the source', 'memory_cache_bytes_per_token'),
      ('parameter bytes', 'parameter_bytes'),
      ('optimizer bytes', 'optimizer_bytes'),
      ('average bytes', 'average_bytes'),
      ('checkpoint bytes', 'checkpoint_bytes')):
    if figures[key]:
      lines.append(_line(name, figures[key]))
  return lines


def _table(rows: Iterable[dict]) -> Iterator[str]:
  """Yields the lines of a table of sizes."""
  yield (f'{"system:size":<26}{"parameters":>20}{"active":>20}'
         f'{"published":>20}{"difference":>12}')
  for row in rows:
    published = difference = ''
    if row['published']:
      published = f'{row["published"]:,.0f}'
      difference = f'{row["difference"]:+.2%}'
    yield (f'{row["size"]:<26}{row["parameters"]:>20,}'
           f'{row["active_parameters"]:>20,}{published:>20}{difference:>12}')


if __name__ == '__main__':
  cli.run(main)
