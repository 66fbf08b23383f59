"""How fast Archetype is on one GPU, and whether it is right there.

  python -m benchmarks.gpu --minutes=8 --json=gpu.json --page=gpu.html
  python -m benchmarks.gpu --minutes=8 --after=gpu.json --json=gpu2.json
  python -m benchmarks.gpu --toy

It needs a machine with one GPU and the extras `cuda13` and `verify`, and
nothing else: models have random weights. Each side runs in processes of its
own, one at a time, so that all of the card's memory is free for it.

Sections, ordered by worth: what is installed; the tests marked `gpu`; attention
and experts alone, each way that there is, of which the fastest is taken on;
training steps of GPT-2 1.5B, of as many layers of LLaMA-2-7B and of
Mixtral-8x7B as the memory has room for, and of transformers' models by
torch.compile at the same sizes; generation against the speed of the memory.

A section that would not end in --minutes, by a guess of its time, is skipped
and named. What fails is recorded with its error, and the next one goes on.
--json and --page are written after each figure, so that nothing is lost when
the program is ended. --after names the --json file of an earlier call, whose
sections are not run again.
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


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.gpu', description=__doc__,
      allow_abbrev=False, formatter_class=cli.HelpFormatter)
  parser.add_argument('--minutes', type=float, default=DEFAULT_MINUTES,
                      help='the budget')
  parser.add_argument('--sections', default='', help='some of them, with '
                      'commas between; default: all')
  parser.add_argument('--toy', action='store_true', help='tiny sizes, on a CPU '
                      'too: to try the benchmark itself')
  parser.add_argument('--torch_python', default='', help='the interpreter of '
                      "PyTorch's side, where it has an environment of its own; "
                      'default: this one')
  parser.add_argument('--after', default='', help='the --json file of an '
                      'earlier call on the same card')
  parser.add_argument('--json', default='', help='a file of all figures')
  parser.add_argument('--page', default='', help='a page of them, HTML')
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


TOY = 0.2  # of a section's guess


def _check_install(own: dict[str, Any], results: dict[str, Any],
                   earlier: dict[str, Any] | None) -> None:
  if own['status'] == 'failed':
    raise EnvironmentFailure(f'{own["why"]}. Nothing else was run; --toy tries '
                             'the benchmark on a CPU')
  if earlier and own['status'] == 'done':
    card, before = results['machine']['card'], earlier['machine']['card']
    require(card == before, f'--after names a file of {before}, and this is '
            f'{card}')


def _read(name: str, toy: bool) -> dict[str, Any]:
  from training import schema
  file = pathlib.Path(name)
  require(file.is_file(), f'--after names {name}, which is no file')
  tree = schema.parse(file.read_bytes(), name)
  require(isinstance(tree, dict) and {'sections', 'cases', 'chosen', 'machine',
                                      'toy'} <= tree.keys(),
          f'{name} is no file of this benchmark')
  require(tree['toy'] == toy, f'{name} is of {"toy" * tree["toy"] or "full"} '
          'sizes, and this call is not')
  require('card' in tree['machine'], f'{name} does not say which card it is '
          'of: its section install has failed')
  return tree


if __name__ == '__main__':
  cli.run(main)
