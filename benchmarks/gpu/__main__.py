"""How fast Archetype is on one GPU, and whether it is right there.

  python -m benchmarks.gpu --minutes=8 --json=gpu.json --page=gpu.html
  python -m benchmarks.gpu --minutes=8 --after=gpu.json --json=gpu2.json
  python -m benchmarks.gpu --toy

It needs a machine with one GPU, the extras `cuda13` and `verify`, and pytest;
models have random weights, so there is nothing to download. Each side runs in
processes of its own, one at a time, so that all of the card's memory is free
for it.

Sections, the most important first: what is installed; the tests marked `gpu`;
attention and experts alone, in every way that there is, of which the training
steps use the fastest; training steps of GPT-2 1.5B, of as many layers of
LLaMA-2-7B and of Mixtral-8x7B as the memory has room for, and of transformers'
models by torch.compile at the same sizes; generation, compared with the speed
of the memory.

A section that is not expected to end within --minutes is skipped, and the
report says so. A section that fails is recorded with its error, and the next
one runs. --json and --page are written after each figure, so that nothing is
lost if the program is stopped. --after names the --json file of an earlier
call, whose sections are not run again.
"""

import argparse
import json
import os
import pathlib
import shutil
from typing import Any

from configs.errors import EnvironmentFailure, one_of, require
from training import cli

DEFAULT_MINUTES = 20.0
TOY = 0.2  # the expected time of a section at toy sizes, over that at full ones


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.gpu', description=__doc__,
      allow_abbrev=False, formatter_class=cli.HelpFormatter)
  parser.add_argument('--minutes', type=float, default=DEFAULT_MINUTES,
                      help='the time that all sections may take together')
  parser.add_argument('--sections', default='', help='those to run, '
                      'separated by commas; default: all')
  parser.add_argument('--toy', action='store_true', help='tiny sizes, on a CPU '
                      'too: to try the benchmark itself')
  parser.add_argument('--torch_python', default='', help='the Python of '
                      "PyTorch's side, if it has an environment of its own; "
                      'default: this one')
  parser.add_argument('--after', default='', help='the --json file of an '
                      'earlier call on the same card')
  parser.add_argument('--json', default='', help='write all figures to this '
                      'file')
  parser.add_argument('--page', default='', help='write a page of them to this '
                      'file, as HTML')
  return parser


def main() -> int:
  args = _parser().parse_args()
  from benchmarks.gpu import report
  from benchmarks.gpu.bench import Bench
  from benchmarks.gpu.sections import SECTIONS
  from training.workdir import storage
  require(args.minutes > 0, f'--minutes is {args.minutes}: it must be above 0')
  chosen = list(filter(None, args.sections.split(','))) or [*SECTIONS]
  for name in chosen:
    one_of('--sections', name, SECTIONS)
  torch_python = args.torch_python and shutil.which(args.torch_python)
  require(torch_python is not None, f'--torch_python is {args.torch_python!r}, '
          'which is no program')
  torch_python = torch_python and os.path.abspath(torch_python)
  json_file = storage.output(args.json, '--json')
  page_file = storage.output(args.page, '--page')
  earlier = _read(args.after, args.toy) if args.after else None

  def write(results: dict[str, Any]) -> None:
    results['verdicts'] = report.verdicts(results)
    if json_file:
      storage.write(json_file, json.dumps(results, indent=1) + '\n')
    if page_file:
      storage.write(page_file, report.page(results))

  bench = Bench(args.minutes, args.toy, write, torch_python, earlier)
  names = [name for name in SECTIONS
           if name in ('install', *chosen)]  # which the others need
  for name in names:
    bench.plan(name, SECTIONS[name].title,
               SECTIONS[name].seconds * (TOY if args.toy else 1))
  for name in names:
    own = bench.run(name, SECTIONS[name].run)
    print(f'{own["title"]}: {own["status"]}, {own["seconds"]:.0f} s '
          f'{own["why"]}'.rstrip(), flush=True)
    if name == 'install':
      _check_install(own, bench.results, earlier)
  print('\n' + report.text(bench.results), flush=True)
  return 0


def _check_install(own: dict[str, Any], results: dict[str, Any],
                   earlier: dict[str, Any] | None) -> None:
  if own['status'] == 'failed':
    raise EnvironmentFailure(f'{own["why"]}. Nothing else was run; --toy tries '
                             'the benchmark on a CPU')
  if earlier and own['status'] == 'done':
    card, before = results['machine']['card'], earlier['machine']['card']
    require(card == before, f'--after names a file with figures of {before}, '
            f'and this card is {card}: run without --after')


def _read(name: str, toy: bool) -> dict[str, Any]:
  from training import schema
  file = pathlib.Path(name)
  require(file.is_file(), f'--after names {name}, which is no file')
  tree = schema.parse(file.read_bytes(), name)
  require(isinstance(tree, dict) and {'sections', 'cases', 'chosen', 'machine',
                                      'toy'} <= tree.keys(),
          f'--after names {name}, which this benchmark did not write')
  require(tree['toy'] == toy, f'--after names {name}, which has figures of '
          f'{"toy" if tree["toy"] else "full"} sizes, and this call is of '
          'the others')
  require('card' in tree['machine'], f'--after names {name}, which does not '
          'say what card its figures are of: its section install failed')
  return tree


if __name__ == '__main__':
  cli.run(main)
