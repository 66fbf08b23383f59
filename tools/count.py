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
from concurrent import futures
import importlib
import json
import multiprocessing

from absl import flags

from common.errors import RequestError
import configs
from tools.compare import cost
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
  """Counts the config that the flags name, or all sizes of all systems, and
  prints the figures."""
  cli.parse(__doc__)
  args = flags.FLAGS
  has_config = args.config is not None
  if has_config == args.all or (args.all and args.length):
    raise RequestError('pass --config FILE.py:SIZE, or --all, which counts '
                       'every size of every system as it is, alone')

  # Every size of every system. Each row is printed as soon as it is counted.
  if args.all:
    rows = count_all_sizes()
    if args.json:
      print(json.dumps(list(rows), indent=2))
    else:
      for line in _table_of_sizes(rows):
        print(line, flush=True)
    return

  # One config.
  model = runs.resolve_model_without_tokenizer(args.config)
  preflight.refuse_unread_fields(cli.overridden_fields(), args.config, model)
  figures = totals.count_costs(args.config, args.length)
  differences = systems.differences_from_system(model)
  figures['not_as_published'] = [row._asdict() for row in differences]
  if args.json:
    print(json.dumps(figures, indent=2))
  else:
    print(_format_figures(figures, systems.describe_differences(model)))


def list_all_sizes() -> list[tuple[str, str]]:
  """Returns every published model size as a pair: its file in configs/, such as
  'llama', and its name in that file, such as '7b'."""
  sizes = []
  for path in sorted(configs.FOLDER.glob('*.py')):
    module = importlib.import_module(f'configs.{path.stem}')
    sizes += [(path.stem, size) for size in getattr(module, 'SIZES', {})]
  return sizes


def count_all_sizes() -> Iterator[dict]:
  """Counts every published model size in configs/, with a process on each core,
  and yields the row of each (count_size) in order."""
  with futures.ProcessPoolExecutor(
      mp_context=multiprocessing.get_context('spawn'),
      initializer=cost.keep_off_accelerators) as processes:
    yield from processes.map(count_size, *zip(*list_all_sizes()))


def count_size(file: str, size: str) -> dict:
  """Counts a published model size.

  Args:
    file: the file in configs/, without its ending.
    size: the name of the size in this file.

  Returns:
    A row for JSON:
    size: 'FILE:SIZE', with a mark if its figures are rumoured.
    parameters: the parameters that the publication counts.
    active_parameters: those of them that one token uses.
    published: the number of parameters by the publication; None: it gives none.
    difference: the counted number over the published one, minus 1; None: there
      is none.
    training_flops_per_token: the FLOPs of both passes for a token.
  """
  # The file of a system gives in UNCOUNTED, by size, the number of parameters
  # that the published figure leaves out. They are subtracted here, so that the
  # same parameters are compared.
  module = importlib.import_module(f'configs.{file}')
  uncounted = getattr(module, 'UNCOUNTED', {})
  figures = totals.count_briefly(module.get_config(size))
  name = f'{file}:{size}'
  if figures['rumoured']:
    name += ' (rumoured)'
  left_out = uncounted.get(size, 0)
  counted = figures['parameters'] - left_out

  # Not every publication states its number of parameters.
  published = module.SIZES[size].get('parameters')
  difference = None
  if published:
    difference = counted / published - 1
  return {
      'size': name,
      'parameters': counted,
      'active_parameters': figures['active_parameters'] - left_out,
      'published': published,
      'difference': difference,
      'training_flops_per_token': figures['training_flops_per_token'],
  }


def _format_figure(name: str, value: float, note: str = '') -> str:
  """Returns a line with the name of a figure, its value, and a note."""
  return f'{name:<28}{value:>20,.0f}{note}'


def _format_figures(figures: dict, differences: str) -> str:
  """Returns the sizes and costs of a model as text for a terminal.

  Args:
    figures: the figures, as totals.count_costs returns them.
    differences: a line that says how the model differs from the published
      system that it is named after; '' if it does not.
  """
  name = figures['model']
  if figures['rumoured']:
    name += ' (rumoured)'
  lines = [name]
  if differences:
    lines.append(differences)
  lines += _lines_of_parameters(figures)
  lines += _lines_of_layer_kinds(figures)
  lines += _lines_of_flops(figures)
  lines += _lines_of_bytes(figures)
  return '\n'.join(lines)


def _lines_of_parameters(figures: dict) -> list[str]:
  """Returns lines with the numbers of parameters: all of them, those that a
  token uses, those that are trained, and those of each part.

  Args:
    figures: the figures, as totals.count_costs returns them.
  """
  parameters = figures['parameters']
  lines = [_format_figure('parameters', parameters)]
  for name in ('active', 'trained'):
    count = figures[f'{name}_parameters']
    if count != parameters:
      lines.append(_format_figure(f'  {name}', count))
  for part, size in figures['by_part'].items():
    active = figures['active_by_part'][part]
    note = ''
    if active != size:
      note = f'{active:>20,} active'
    lines.append(_format_figure(f'  {part}', size, note))
  return lines


def _lines_of_layer_kinds(figures: dict) -> list[str]:
  """Returns a line for each kind of layer, which is a named set of fields that
  some layers have in place of the model's: the number of these layers, and the
  fields that they change.

  Args:
    figures: the figures, as totals.count_costs returns them.
  """
  lines = []
  for layers in figures['kinds_of_layer']:
    changes = [f'{field}={value}' for field, value in layers['changes'].items()]
    note = ', '.join(changes) or 'as the model'
    name = layers['kind'] or 'no kind'
    lines.append(
        _format_figure(f'layers of {name}', layers['layers'], f' {note}'))
  return lines


def _lines_of_flops(figures: dict) -> list[str]:
  """Returns lines with the FLOPs of a token in training and in inference.

  Args:
    figures: the figures, as totals.count_costs returns them.
  """
  lines = [f'FLOPs per token at length {figures["length"]:,}']
  for phase, value in figures['flops_per_token'].items():
    # The figure is None in a phase that the model does not have.
    if value is None:
      continue
    # An encoder-decoder trains on rows with two lengths.
    note = ''
    if phase == 'training' and len(figures['training_lengths']) == 2:
      source, target = figures['training_lengths']
      note = f' ({source:,} tokens of the source, {target:,} of the target)'
    lines.append(_format_figure(f'  {phase}', value, note))
  return lines


def _lines_of_bytes(figures: dict) -> list[str]:
  """Returns lines with the bytes of memory and of disk that a model needs: its
  key-value cache, recurrent states, parameters, optimizer and checkpoints.

  Args:
    figures: the figures, as totals.count_costs returns them.
  """
  # The key-value cache of one token, then the part of it that each layer of a
  # kind has. A model without attention has no such cache.
  lines = []
  if figures['kv_cache_bytes_per_token'] is not None:
    lines.append(_format_figure('KV-cache bytes per token',
                                figures['kv_cache_bytes_per_token']))
    for layers in figures['kinds_of_layer']:
      name = layers['kind'] or 'no kind'
      lines.append(_format_figure(f'  of a layer of {name}',
                                  layers['kv_cache_bytes_per_token']))

  # The other figures, except those that are 0 or do not apply to the model.
  key_of_name = {
      'state bytes per row': 'state_bytes_per_row',
      '  per token of the source': 'memory_cache_bytes_per_token',
      'parameter bytes': 'parameter_bytes',
      'optimizer bytes': 'optimizer_bytes',
      'average bytes': 'average_bytes',
      'checkpoint bytes': 'checkpoint_bytes',
  }
  for name, key in key_of_name.items():
    if figures[key]:
      lines.append(_format_figure(name, figures[key]))
  return lines


def _table_of_sizes(rows: Iterable[dict]) -> Iterator[str]:
  """Yields the lines of a table of model sizes, each as soon as its row has
  been counted: the numbers of parameters, all and active, the published number,
  and by which share the counted one differs from it.

  Args:
    rows: a dict for each size, as `count_size` returns it.
  """
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
