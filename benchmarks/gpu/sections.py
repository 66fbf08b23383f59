"""The sections, the most important first; each adds rows to the results.

The seconds of a section are a guess for one H100 or H200, made without one. A
section is skipped if its guess is more than what is left of the budget, or if
another side or section that it needs is missing.
"""

from collections.abc import Callable
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple
import xml.etree.ElementTree

from benchmarks.gpu import cases
from benchmarks.gpu import workers
from benchmarks.gpu.bench import Bench, Missing, Row
from tools import tether

TESTS = 'tests/gpu_test.py'


def install(bench: Bench) -> None:
  """Whether JAX and PyTorch see the GPU; sizes for this card."""
  machine = bench.results['machine']
  machine['torch'] = {}
  for row in bench.ask('ours', dict(job='check')):
    if 'case' in row:
      bench.results['cases'][row.pop('case')] = row
    elif 'error' in row:
      raise Missing(row['error'])
    else:
      machine.update(row)
  machine['torch'] = bench.ask('theirs', dict(job='check'))[-1]
  bench.save()
  if machine.get('platform') != 'gpu' and not bench.toy:
    raise Missing(f'JAX sees no GPU, but {machine.get("platform")}: '
                  f'{machine.get("backend")}')


def tests(bench: Bench) -> None:
  """The tests that are marked `gpu`, in a process of their own."""
  environment = workers.environment() | dict(
      ARCHETYPE_TEST_PLATFORM='cpu' if bench.toy else 'gpu')
  with tempfile.TemporaryDirectory() as folder:
    report = pathlib.Path(folder) / 'report.xml'
    try:
      ended = subprocess.run(
          tether.words([sys.executable, '-m', 'pytest', '-q', '-m', 'gpu',
                        '-p', 'no:cacheprovider', f'--junitxml={report}',
                        TESTS]),
          env=environment, cwd=workers.ROOT, capture_output=True, text=True,
          timeout=bench.limit())
      said = workers.last_line(ended.stdout + ended.stderr)
    except subprocess.TimeoutExpired as late:
      said = f'they were ended after {late.timeout:.0f} s'
    if not report.exists():
      bench.add(error=f'no test has run: {said}')
      return
    for row in read_tests(report.read_text()):
      bench.add(**row)


def read_tests(xml_text: str) -> list[Row]:
  """Returns a row for each test of pytest's JUnit file."""
  rows = []
  for test in xml.etree.ElementTree.fromstring(xml_text).iter('testcase'):
    row = dict(test=test.get('name'), outcome='passed', why='')
    for child in test:
      if child.tag in ('failure', 'error', 'skipped'):
        row |= dict(outcome=dict(failure='failed').get(child.tag, child.tag),
                    why=(child.get('message') or '').strip()[:400])
    rows.append(row)
  return rows


def kernels(bench: Bench) -> None:
  """Attention and experts alone; the fastest of each is taken for the steps."""
  found = bench.ask('ours', dict(job='kernels', seconds=bench.window / 4))
  for row in found:
    bench.add(**row)
  best: dict[tuple[str, str], Row] = {}
  for row in found:
    if 'step_s' in row and not row.get('drops'):
      key = row['part'], row['case']
      if key not in best or row['step_s'] < best[key]['step_s']:
        best[key] = row
  for (part, case), row in best.items():
    bench.results['chosen'].setdefault(part, {})[case] = row['way']
    bench.save()


def ours(bench: Bench, case: str, batch: int = 0, way: str = '',
         note: str = '') -> None:
  """A training step of this project's."""
  sizes = bench.sizes(case)
  chosen = bench.results['chosen']
  attention = chosen.get('attention', {}).get(case, 'auto')
  if case == 'mixtral':
    way = way or chosen.get('experts', {}).get(case, 'ragged_dot')
  for row in bench.ask('ours', dict(
      job='step', case=case, layers=sizes['layers'], batch=batch,
      attention=attention, way=cases.EXPERTS[way] if way else {},
      seconds=bench.window)):
    row.setdefault('notes', [])
    row['notes'] += [note] * bool(note)
    bench.add_step(case, side='ours', attention=attention, experts=way, **row)


def theirs(bench: Bench, case: str) -> None:
  """A training step of transformers' model by torch.compile; and ours once more
  if only another batch fits theirs."""
  bench.needs_torch()
  sizes, own = bench.sizes(case), bench.rows(case, 'ours')
  table, _ = cases.chosen(bench.toy)
  batch = own[0]['batch'] if own else table[case].batch
  rows = bench.ask('theirs', dict(
      job='step', case=case, model=sizes['model'], batch=batch,
      length=table[case].length, precision=table[case].precision,
      compiled=True, seconds=bench.window))
  for row in rows:
    bench.add_step(case, side='theirs', **row)
  if own and rows[-1].get('batch', batch) != batch and bench.left() > 60:
    ours(bench, case, batch=rows[-1]['batch'],
         note='at the batch of the other side')


def again(bench: Bench) -> None:
  """GPT-2 once more on both sides, in the other order, to see how much a figure
  changes by itself."""
  bench.needs_torch()
  for side in ('theirs', 'ours'):
    if not bench.rows('gpt2', side):
      raise Missing(f'gpt2 has no figure of {side}')
  theirs(bench, 'gpt2')
  ours(bench, 'gpt2', batch=bench.rows('gpt2', 'ours')[0]['batch'])


def padded(bench: Bench) -> None:
  """A step of experts that drop tokens: another function, and less work."""
  ours(bench, 'mixtral', way='padded to a capacity of 1.25')


def write(bench: Bench) -> None:
  """Generation, against the time that reading weights and cache takes."""
  for row in bench.ask('ours', dict(job='write', seconds=bench.window)):
    bench.add_writing(side='ours', **row)


def write_theirs(bench: Bench) -> None:
  """transformers' own loop, as it is and with its compiled step."""
  bench.needs_torch()
  _, case = cases.chosen(bench.toy)
  for row in bench.ask('theirs', dict(
      job='write', model=bench.sizes('write')['model'], prompt=case.prompt,
      new=case.new, batches=case.batches, seconds=bench.window)):
    bench.add_writing(side='theirs', **row)


class Section(NamedTuple):
  """What runs as one: `seconds` is how long, by a guess."""
  title: str
  seconds: float
  run: Callable[[Bench], None]


def _of(case: str, run: Callable[[Bench, str], None]
        ) -> Callable[[Bench], None]:
  return lambda bench: run(bench, case)


SECTIONS = {
    'install': Section('What is installed', 25, install),
    'tests': Section('Tests on the card', 75, tests),
    'kernels': Section('Attention and experts alone', 60, kernels),
    'gpt2': Section('GPT-2 1.5B', 50, _of('gpt2', ours)),
    'gpt2_torch': Section('GPT-2 1.5B by torch.compile', 120,
                          _of('gpt2', theirs)),
    'mixtral': Section("Mixtral-8x7B's layers", 60, _of('mixtral', ours)),
    'llama': Section("LLaMA-2-7B's layers", 60, _of('llama', ours)),
    'llama_torch': Section("LLaMA-2-7B's layers by torch.compile", 90,
                           _of('llama', theirs)),
    'write': Section('Generation, LLaMA-2-7B', 90, write),
    'mixtral_torch': Section("Mixtral-8x7B's layers by torch.compile", 110,
                             _of('mixtral', theirs)),
    'write_torch': Section('Generation by transformers', 90, write_theirs),
    'mixtral_padded': Section("Mixtral-8x7B's layers, experts with a capacity",
                              60, padded),
    'again': Section('GPT-2 1.5B again, both sides', 130, again),
}
