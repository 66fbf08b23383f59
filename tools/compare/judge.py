"""judge: whether a variant is better than its base, for loops that ask often.

BASE and VARIANT are folders beside each other, each with runs as seed-0,
seed-1, ... (of a sweep, W/points/NAME). Seed s of both is a pair. The folder
around them is the loop's, and its judged.json has every question of it.

However often and in whatever order is asked, and whatever is looked at
meanwhile, the probability that any answer of all is wrongly better or worse is
at most ALPHA, since each possible answer has a share of ALPHA (alpha-spending),
and the shares of all sum to 1 or less:

- Question k has 1 / (k (k + 1)), and the questions of one time share alike.
  Each variant that lies in the folder is a question, be it asked or not: who
  asks of the best of twenty has looked at twenty.
- Of a question, the look at the first 3, 6, 12, ... seeds has 1/2, 1/4, 1/8,
  ... and seeds between two looks wait for the next: one who adds seeds until it
  is enough finds no other looks. A look is free again, since it says the same.
  Where it would not, its runs were trained anew, which is a new question.

Noise that is skewed or has outliers, by the differences from the base of all
that was looked at so far, makes a test more cautious, as in studies
(statistics.Pooled).

The exit code is 0 for better, 3 where that is not shown, and 4 for worse; as
elsewhere 2 for a wrong request, such as too few seeds, and 1 for a failure.
"""

import argparse
from collections.abc import Mapping, Sequence
import fcntl
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from common.errors import require
from tools.compare import curves, decide, layout, page, spec, statistics
from training.workdir import metrics, run_config, storage

ALPHA = 0.05
LOOK = statistics.MIN_SEEDS  # seeds of the first; each next has twice as many
FILE = 'judged.json'
CODES = {decide.BETTER: 0, decide.WORSE: 4}  # any other verdict: 3
# Fields by which runs would be evaluated on other text.
HELD_OUT = ('objective', 'data.source', 'data.eval_source',
            'data.holdout_every', 'data.tokenizer', 'data.length',
            'data.target_length', 'eval.part', 'eval.batches')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('base', metavar='BASE', help='folder with seed-0, ...')
  parser.add_argument('variant', metavar='VARIANT', help='one beside it')
  parser.add_argument('--json', action='store_true', help='print JSON')


def main(args) -> int:
  answer = judged(pathlib.Path(args.base), pathlib.Path(args.variant))
  print(json.dumps(answer, indent=2) if args.json else text(answer))
  return CODES.get(answer['verdict'], 3)


def share_of_look(seeds: int) -> tuple[int, float]:
  """Returns how many of some seeds are looked at, and the look's share."""
  doublings = int(math.log2(seeds / LOOK))
  return LOOK * 2 ** doublings, 0.5 ** (doublings + 1)


def share_of_question(before: int, together: int) -> float:
  """Returns the share of each of `together` questions that come after
  `before`: of the sum of 1 / (k (k + 1))."""
  return (1 / (before + 1) - 1 / (before + together + 1)) / together


class PairedTest(NamedTuple):
  """A test at a share of ALPHA: the interval holds 0 where `p_corrected` is
  above ALPHA; it is None where all differences are alike, so that their spread
  is not known."""
  effect: float
  interval: tuple[float, float] | None
  p: float
  p_corrected: float


def paired_test(differences: Sequence[float], share: float,
                pooled: statistics.Pooled | None = None) -> PairedTest:
  """Returns Student's test of paired differences, variant minus base."""
  p = statistics.p_value(differences, pooled)
  mean, low, high, _ = statistics.interval(differences, pooled, ALPHA * share)
  return PairedTest(mean, None if low is None else (low, high), p,
                    min(p / share, 1.0))


def judged(base: pathlib.Path, variant: pathlib.Path) -> dict[str, Any]:
  """Returns the answer, and writes it beside the runs.

  Raises:
    RequestError: where the folders cannot be compared.
  """
  folder, names = base.resolve().parent, (
      base.resolve().name, variant.resolve().name)
  require(variant.resolve().parent == folder and names[0] != names[1],
          f'BASE is {base} and VARIANT {variant}: name two folders beside each '
          'other, since what was asked before stands beside them')
  runs = {name: _runs(folder / name) for name in names}
  seeds, diverged = _ended(runs, names)
  seeds, share = seeds[:(look := share_of_look(len(seeds)))[0]], look[1]
  changes, warnings = _changes([
      [runs[name][seed].config for name in names] for seed in seeds])
  lost = {name: sum(seed in diverged[name] for seed in seeds) for name in names}
  values = {seed: None if any(seed in diverged[name] for name in names) else
            runs[names[1]][seed].final - runs[names[0]][seed].final
            for seed in seeds}
  with storage.writing(folder), (folder / '.judging').open('w') as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    path = folder / FILE
    record = layout.load_checked(path) if path.is_file() else {
        'questions': [], 'looked': [], 'answers': []}
    again, question, pooled = _question(record, folder, names, values)
    share *= question['share']
    test = (None if None in values.values()
            else paired_test([*values.values()], share, pooled))
    verdict = (decide.UNSTABLE if lost[names[1]] > lost[names[0]] else
               decide.NONE_SHOWN if test is None or test.p_corrected > ALPHA
               else decide.BETTER if test.effect < 0 else decide.WORSE)
    answer = {
        'base': names[0], 'variant': names[1], 'verdict': verdict,
        'effect': test and test.effect,
        'interval': test and test.interval, 'p': test and test.p,
        'p_corrected': test and test.p_corrected, 'alpha': ALPHA,
        'seeds': seeds, 'next_look': 2 * len(seeds), 'diverged': lost,
        'questions': sum(len(x['variants']) for x in record['questions']),
        'changes': changes, 'warnings': warnings + again}
    record['answers'].append({'time': time.time()} | answer)
    layout.save_checked(path, record)
  return answer


def _runs(folder: pathlib.Path) -> dict[int, curves.Run]:
  """Returns the runs that were begun, by seed."""
  runs = {}
  for path in folder.glob('seed-*/config.json'):
    name, file = path.parent.name.removeprefix('seed-'), path.with_name(
        'metrics.jsonl')
    if name.isdecimal():
      runs[int(name)] = curves.Run(
          int(name), layout.DONE, '', run_config.flatten(
              run_config.load_config(path.parent)),
          tuple(metrics.read(file)) if file.is_file() else (), {})
  require(runs, f'{folder} has no runs: train them as {folder}/seed-0, '
          f'{folder}/seed-1, ...')
  return dict(sorted(runs.items()))


def _ended(runs, names) -> tuple[list[int], dict[str, set[int]]]:
  """Returns the first seeds that have ended in both folders, and of each folder
  those that diverged."""
  diverged = {name: {seed for seed, run in runs[name].items()
                     if run.diverged} for name in names}
  seeds: list[int] = []
  for seed in sorted(runs[names[0]].keys() & runs[names[1]].keys()):
    open_ = [f'{name}/seed-{seed}' for name in names if seed not in (
        diverged[name]) and runs[name][seed].final is None]
    if open_:
      break
    seeds.append(seed)
  else:
    open_ = []
  require(len(seeds) >= LOOK, f'{len(seeds)} seeds have ended in both '
          f'{names[0]} and {names[1]}: a look takes {LOOK}'
          + f'; {" and ".join(open_)} has no held-out loss after its last step '
            '(eval.every_steps)' * bool(open_))
  return seeds, diverged


def _changes(configs: Sequence[Sequence[Mapping]]) -> tuple[dict, list[str]]:
  """Returns the fields that differ, [base's, variant's], and what to know of
  them; RequestError where the losses are of different text.

  Args:
    configs: of base and variant, by dotted name, for each seed.
  """
  changes = {name: [before.get(name), after.get(name)]
             for before, after in configs for name in {**before, **after}
             if before.get(name) != after.get(name)}
  other = [name for name in changes if name in HELD_OUT or (
      name == 'data.batch_size' and configs[0][0]['eval.batches'])]
  require(not other, f'{", ".join(other)} differ, so that the losses are of '
          'different text: evaluate both alike (eval.batches=0 is all of it, '
          'whatever the batch)')
  batches = [name for name in changes
             if name.startswith((*spec.BATCHES, 'seed'))]
  return changes, [f'{", ".join(batches)} differ, so that a seed does not give '
                   'both the same batches'] * bool(batches)


def _question(record: dict, folder: pathlib.Path, names: tuple[str, str],
              values: dict[int, float | None]
              ) -> tuple[list[str], dict, statistics.Pooled | None]:
  """Returns a warning, if any, the question that a pair has in a record, into
  which it is put if it is a new one, and the spread of the differences of all
  that was looked at from the base: a look that is free again has the same."""
  base, variant = names
  looked = next((x for x in record['looked'] if x['names'] == [*names]), None)
  now = [[seed, value] for seed, value in values.items()]
  same = looked is None or all(
      a == b for a, b in zip(looked['values'], now))
  asked = [x for x in record['questions']
           if x['base'] == base and variant in x['variants']]
  if not asked or not same:
    known = {base, *(name for x in record['questions']
                     for name in (x['base'], *x['variants']))}
    others = {path.parent.parent.name for path in folder.glob(
        '*/seed-*/config.json')} - known
    variants = sorted({variant, *others})
    before = sum(len(x['variants']) for x in record['questions'])
    asked.append({'base': base, 'variants': variants,
                  'share': share_of_question(before, len(variants))})
    record['questions'].append(asked[-1])
  if looked is None:
    record['looked'].append(looked := {'names': [*names], 'values': []})
  if not same or len(now) > len(looked['values']):
    looked['values'] = now
    noise = statistics.shape([np.array([
        [value] for _, value in x['values'] if value is not None])
                              for x in record['looked']
                              if x['names'][0] == base])
    looked['pooled'] = noise and noise.pooled(np.ravel)
  pooled = looked.get('pooled')
  return [] if same else [
      f'the runs of {base} or {variant} are others than those that were looked '
      'at before: this is a new question'], asked[-1], (
          pooled and statistics.Pooled(*pooled))


def text(answer: dict[str, Any]) -> str:
  """Renders an answer for a terminal."""
  if answer['p'] is None:
    figures = 'shows nothing, since runs diverged'
  else:
    ends = answer['interval'] or (None, None)
    figures = page.estimate(answer['effect'], *ends).text + (
        ', p {p:.2g}, corrected p {p_corrected:.2g}'.format(**answer))
  return '\n'.join([
      f'{answer["variant"]} beside {answer["base"]}: {answer["verdict"]}',
      f'held-out loss {figures}; {len(answer["seeds"])} seeds (next look: '
      f'{answer["next_look"]}), {answer["questions"]} questions so far',
      *(f'warning: {line}' for line in answer['warnings'])])
