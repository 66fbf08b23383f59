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
Values = Mapping[int, float | None]  # differences by seed; None: one diverged
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
  if args.json:
    print(json.dumps(answer, indent=2))
  else:
    print(text(answer))
  return CODES.get(answer['verdict'], 3)


def share_of_look(seeds: int) -> tuple[int, float]:
  """Returns how many of some seeds are looked at, and the look's share."""
  doublings = int(math.log2(seeds / LOOK))
  return LOOK * 2 ** doublings, 0.5 ** (doublings + 1)


def share_of_question(before: int, together: int) -> float:
  """Returns the share of each of `together` questions that come after `before`
  others. Question k has 1 / (k (k + 1)) = 1 / k - 1 / (k + 1), so the sum over
  consecutive questions telescopes."""
  first, after = before + 1, before + together + 1
  return (1 / first - 1 / after) / together


class PairedTest(NamedTuple):
  """A test at a share of ALPHA.

  Attributes:
    effect: the mean of the differences.
    interval: its interval, which holds 0 where `p_corrected` is above ALPHA;
      None where all differences are alike, so that their spread is not known.
    p: Student's p.
    p_corrected: the p over the share.
  """
  effect: float
  interval: tuple[float, float] | None
  p: float
  p_corrected: float


def paired_test(differences: Sequence[float], share: float,
                pooled: statistics.Pooled | None = None) -> PairedTest:
  """Returns Student's test of paired differences, variant minus base."""
  p = statistics.p_value(differences, pooled)
  mean, low, high, _ = statistics.interval(differences, pooled, ALPHA * share)
  interval = None if low is None else (low, high)
  return PairedTest(effect=mean, interval=interval, p=p,
                    p_corrected=min(p / share, 1.0))


def judged(base: pathlib.Path, variant: pathlib.Path) -> dict[str, Any]:
  """Returns the answer, and writes it beside the runs.

  Raises:
    RequestError: where the folders cannot be compared.
  """
  base_folder, variant_folder = base.resolve(), variant.resolve()
  folder = base_folder.parent
  are_beside = variant_folder.parent == folder and variant_folder != base_folder
  require(are_beside, f'BASE is {base} and VARIANT {variant}: name two folders '
          'beside each other, since what was asked before stands beside them')
  base_name, variant_name = names = (base_folder.name, variant_folder.name)

  # The seeds of this look, and what they say.
  runs = {name: _runs(folder / name) for name in names}
  ended, diverged = _ended(runs, names)
  look, share_of_this_look = share_of_look(len(ended))
  seeds = ended[:look]
  configs = []
  for seed in seeds:
    configs.append((runs[base_name][seed].config,
                    runs[variant_name][seed].config))
  changes, warnings = _changes(configs)
  lost = {name: len(diverged[name].intersection(seeds)) for name in names}
  values = {}
  for seed in seeds:
    if seed in diverged[base_name] | diverged[variant_name]:
      values[seed] = None
    else:
      values[seed] = (runs[variant_name][seed].final
                      - runs[base_name][seed].final)

  # Which question that is, of all that were asked here: one asker at a time.
  lock_file = folder / '.judging'
  with storage.explain_write_failures(folder), lock_file.open('w') as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    path = folder / FILE
    if path.is_file():
      record = layout.load_checked(path)
    else:
      record = {'questions': [], 'looked': [], 'answers': []}
    again, question, pooled = _question(record, folder, names, values)

    # The answer at the share that the look of the question has.
    test = None
    if None not in values.values():
      test = paired_test(differences=[*values.values()],
                         share=share_of_this_look * question['share'],
                         pooled=pooled)
    asked = sum(len(other['variants']) for other in record['questions'])
    answer = {
        'base': base_name, 'variant': variant_name,
        'verdict': _verdict(test, lost[base_name], lost[variant_name]),
        **_figures(test),
        'alpha': ALPHA, 'seeds': seeds, 'next_look': 2 * len(seeds),
        'diverged': lost, 'questions': asked, 'changes': changes,
        'warnings': warnings + again}
    record['answers'].append({'time': time.time()} | answer)
    layout.save_checked(path, record)
  return answer


def _figures(test: PairedTest | None) -> dict[str, Any]:
  """Returns the figures of a test by name; None where there is no test."""
  if test is None:
    return dict.fromkeys(PairedTest._fields)
  return test._asdict()


def _verdict(test: PairedTest | None, base_lost: int, variant_lost: int) -> str:
  """Returns the word for a test, whose loss is better where it is lower.

  Args:
    test: the test; None where a run diverged.
    base_lost, variant_lost: how many of the runs diverged.
  """
  if variant_lost > base_lost:
    return decide.UNSTABLE
  if test is None or test.p_corrected > ALPHA:
    return decide.NONE_SHOWN
  return decide.BETTER if test.effect < 0 else decide.WORSE


def _runs(folder: pathlib.Path) -> dict[int, curves.Run]:
  """Returns the runs that were begun, by seed."""
  runs = {}
  for path in folder.glob('seed-*/config.json'):
    name = path.parent.name.removeprefix('seed-')
    if not name.isdecimal():
      continue
    config = run_config.flatten(run_config.load_config(path.parent))
    file = path.with_name('metrics.jsonl')
    lines = ()
    if file.is_file():
      lines = tuple(metrics.read_metrics(file))
    seed = int(name)
    runs[seed] = curves.Run(seed=seed, state=layout.DONE, error='',
                            config=config, rows=lines, evaluations={})
  require(runs, f'{folder} has no runs: train them as {folder}/seed-0, '
          f'{folder}/seed-1, ...')
  return dict(sorted(runs.items()))


def _ended(runs: Mapping[str, Mapping[int, curves.Run]], names: Sequence[str]
           ) -> tuple[list[int], dict[str, set[int]]]:
  """Returns the first seeds that have ended in both folders, and of each folder
  those that diverged.

  Raises:
    RequestError: where fewer than a look's have ended.
  """
  diverged = {}
  for name in names:
    diverged[name] = {seed for seed, run in runs[name].items() if run.diverged}
  base, variant = (runs[name].keys() for name in names)
  seeds: list[int] = []
  going: list[str] = []  # the runs that the next seed waits for
  for seed in sorted(base & variant):
    for name in names:
      if seed not in diverged[name] and runs[name][seed].final is None:
        going.append(f'{name}/seed-{seed}')
    if going:
      break
    seeds.append(seed)
  reason = ''
  if going:
    reason = (f'; {" and ".join(going)} has no held-out loss after its last '
              'step (eval.every_steps)')
  require(len(seeds) >= LOOK, f'{len(seeds)} seeds have ended in both '
          f'{names[0]} and {names[1]}: a look takes {LOOK}{reason}')
  return seeds, diverged


def _changes(configs: Sequence[Sequence[Mapping]]) -> tuple[dict, list[str]]:
  """Returns the fields that differ, [base's, variant's], and what to know of
  them.

  Args:
    configs: the configs of base and variant, by dotted name, for each seed.

  Raises:
    RequestError: where the losses are of different text.
  """
  changes = {}
  for before, after in configs:
    for name in before | after:
      if before.get(name) != after.get(name):
        changes[name] = [before.get(name), after.get(name)]
  fields_of_text = {*HELD_OUT}
  if configs[0][0]['eval.batches']:  # so many batches are a part of the text
    fields_of_text.add('data.batch_size')
  other_text = [name for name in changes if name in fields_of_text]
  require(not other_text, f'{", ".join(other_text)} differ, so that the losses '
          'are of different text: evaluate both alike (eval.batches=0 is all '
          'of it, whatever the batch)')
  batches = [name for name in changes
             if name.startswith((*spec.BATCHES, 'seed'))]
  warnings = []
  if batches:
    warnings.append(f'{", ".join(batches)} differ, so that a seed does not '
                    'give both the same batches')
  return changes, warnings


def _question(record: dict, folder: pathlib.Path, names: tuple[str, str],
              values: Values
              ) -> tuple[list[str], dict, statistics.Pooled | None]:
  """Returns a warning, if any, the question that a pair has in a record, into
  which it is put if it is a new one, and the spread of the differences of all
  that was looked at from the base: a look that is free again has the same.

  Args:
    record: what judged.json holds, which is changed.
    folder: the folder of the loop.
    names: the base and the variant.
    values: the differences of the seeds that are looked at.
  """
  base, variant = names
  now = [[seed, value] for seed, value in values.items()]
  looked = _look_at(record['looked'], names)
  # More seeds are another look at the same runs.
  is_same = True
  if looked is not None:
    is_same = all(before == after
                  for before, after in zip(looked['values'], now))

  # The last question about the pair, or else a new one.
  question = None
  for other in record['questions']:
    if other['base'] == base and variant in other['variants']:
      question = other
  if question is None or not is_same:
    question = _new_question(record['questions'], folder, base, variant)
    record['questions'].append(question)

  # The differences that are looked at, which the record has from now on.
  if looked is None:
    looked = {'names': [*names], 'values': []}
    record['looked'].append(looked)
  if not is_same or len(now) > len(looked['values']):
    looked['values'] = now
    looked['pooled'] = _spread_of_all(record['looked'], base)
  pooled = None
  if looked.get('pooled') is not None:
    pooled = statistics.Pooled(*looked['pooled'])

  warnings = []
  if not is_same:
    warnings.append(f'the runs of {base} or {variant} are others than those '
                    'that were looked at before: this is a new question')
  return warnings, question, pooled


def _look_at(looks: Sequence[dict], names: tuple[str, str]) -> dict | None:
  """Returns the look at a pair; None where there was none."""
  for look in looks:
    if look['names'] == [*names]:
      return look
  return None


def _new_question(questions: Sequence[Mapping], folder: pathlib.Path,
                  base: str, variant: str) -> dict[str, Any]:
  """Returns the next question: of the variant, and of all others that lie in
  the folder and were in no question before."""
  known = {base}
  before = 0
  for question in questions:
    known |= {question['base'], *question['variants']}
    before += len(question['variants'])
  lying = {path.parent.parent.name
           for path in folder.glob('*/seed-*/config.json')}
  variants = sorted({variant} | (lying - known))
  return {'base': base, 'variants': variants,
          'share': share_of_question(before, together=len(variants))}


def _spread_of_all(looks: Sequence[Mapping], base: str
                   ) -> statistics.Pooled | None:
  """Returns the spread of the differences from a base of all that was looked
  at, where their noise does not look normal."""
  groups = []  # of each variant [seeds, 1]
  for look in looks:
    if look['names'][0] == base:
      ended = [value for _, value in look['values'] if value is not None]
      if ended:
        groups.append(np.array(ended).reshape(-1, 1))
  noise = statistics.shape(groups)
  if noise is None:
    return None
  return noise.pooled(np.ravel)


def text(answer: Mapping[str, Any]) -> str:
  """Renders an answer for a terminal."""
  if answer['p'] is None:
    figures = 'shows nothing, since runs diverged'
  else:
    low, high = answer['interval'] or (None, None)
    estimate = page.estimate(answer['effect'], low, high).text
    figures = (f'{estimate}, p {answer["p"]:.2g}, corrected p '
               f'{answer["p_corrected"]:.2g}')
  lines = [
      f'{answer["variant"]} beside {answer["base"]}: {answer["verdict"]}',
      f'held-out loss {figures}; {len(answer["seeds"])} seeds (next look: '
      f'{answer["next_look"]}), {answer["questions"]} questions so far']
  lines += [f'warning: {line}' for line in answer['warnings']]
  return '\n'.join(lines)
