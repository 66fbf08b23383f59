"""judge: whether a variant is better than its base, for loops that ask often.

BASE and VARIANT are folders beside each other, each with runs as seed-0,
seed-1, ... (of a sweep, W/points/NAME). Seed s of both is a pair. The folder
around them is the loop's, and its judged.json has every question of it.

Where the differences between seeds are about normal: however often and in
whatever order is asked, and whatever is looked at meanwhile, the probability
that any answer of all is wrongly better or worse is at most ALPHA, since each
possible answer has a share of ALPHA (alpha-spending), and the shares of all sum
to 1 or less:

- Question k has 1 / (k (k + 1)), and the questions of one time share alike.
  Each variant that lies in the folder is a question, be it asked or not: who
  asks of the best of twenty has looked at twenty.
- Of a question, the look at the first 3, 6, 12, ... seeds has 1/2, 1/4, 1/8,
  ... and seeds between two looks wait for the next: one who adds seeds until it
  is enough finds no other looks. A look is free again, since it says the same.
  Where it would not, its runs were trained anew, which is a new question.

Noise that is skewed or has outliers, by the differences from the base of all
that was looked at so far, makes a test more cautious, as in studies
(statistics.PooledDeviation). The first question has no others to tell by. It
errs in 9 % where the variant's noise alone has an exponential tail, and in over
half where one of ten of its runs alone ends on a plateau, which the first seeds
may miss. A first look at six seeds in place of three would mend neither.

The exit code is 0 for better, 3 where that is not shown, 4 for worse, and 5 for
better where the runs are unlike beyond the question; as elsewhere 2 for a wrong
request, such as too few seeds, and 1 for a failure.
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

from common.errors import format_count, require
from tools.compare import certificate, curves, decide, layout, page, statistics
from training.workdir import metrics, run_config, storage

ALPHA = 0.05  # the probability that any answer of a folder is wrong
# The seeds of the first look; each next one has twice as many.
SEEDS_OF_FIRST_LOOK = statistics.MIN_SEEDS
RECORD_FILE = 'judged.json'
EXIT_CODE_OF_VERDICT = {decide.BETTER: 0, decide.WORSE: 4}
EXIT_CODE_NOT_SHOWN = 3  # of any other verdict
EXIT_CODE_BETTER_BUT_UNLIKE = 5
# The difference of each seed, variant minus base; None: a run of it diverged.
DifferenceBySeed = Mapping[int, float | None]
RunBySeed = Mapping[int, curves.Run]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `python -m tools.compare judge` to its parser."""
  parser.add_argument('base', metavar='BASE', help='folder with seed-0, ...')
  parser.add_argument('variant', metavar='VARIANT', help='one beside it')
  parser.add_argument('--about', default='', metavar='FIELD,FIELD', help='the '
                      'fields of the config that the question is about, or '
                      'what is no field, as code or flops; all else that '
                      'differs is named (default: the fields of the model that '
                      'differ)')
  parser.add_argument('--json', action='store_true', help='print JSON')


def main(args) -> int:
  """Prints whether a variant is better than its base, and returns the exit code
  that says so.

  Args:
    args: the arguments of the command: base and variant (folders), about (what
      the question is about, with commas between) and json.
  """
  about = tuple(filter(None, args.about.split(',')))
  answer = judge_variant(pathlib.Path(args.base), pathlib.Path(args.variant),
                         about)
  if args.json:
    print(json.dumps(answer, indent=2))
  else:
    print(render_answer(answer))
  if answer['verdict'] == decide.BETTER and answer['unlike']:
    return EXIT_CODE_BETTER_BUT_UNLIKE
  return EXIT_CODE_OF_VERDICT.get(answer['verdict'], EXIT_CODE_NOT_SHOWN)


def latest_look(num_seeds: int) -> tuple[int, float]:
  """Returns the newest look at the data that is due, and the share of the error
  rate that it may spend (alpha-spending in group-sequential testing).

  A question may be tested again as seeds are added. It is tested at the first
  3, 6, 12, ... seeds, and these looks may spend 1/2, 1/4, 1/8, ... of the error
  rate, so that all of them together spend no more than the whole.

  Args:
    num_seeds: the number of seeds that have ended, 3 or more.

  Returns:
    The number of seeds of that look, and its share.
  """
  # Count how often the seeds of the first look have doubled. Further seeds wait
  # for the next look.
  doublings = int(math.log2(num_seeds / SEEDS_OF_FIRST_LOOK))
  seeds_of_look = SEEDS_OF_FIRST_LOOK * 2 ** doublings
  share_of_error_rate = 0.5 ** (doublings + 1)
  return seeds_of_look, share_of_error_rate


def alpha_share_of_question(num_before: int, together: int) -> float:
  """Returns the share of the error rate ALPHA that each of some questions may
  spend (alpha-spending). The shares of all questions ever asked sum to 1 at
  most, however many there are.

  Question k has the share 1 / (k (k + 1)) = 1 / k - 1 / (k + 1), so that the
  sum from question i to question j is 1 / i - 1 / (j + 1). Questions that are
  asked together divide their sum equally.

  Args:
    num_before: the number of questions that were asked before.
    together: the number of questions that are asked now.
  """
  # Questions are numbered from 1 on. Now, first to after_last - 1 are asked.
  first = num_before + 1
  after_last = num_before + together + 1
  return (1 / first - 1 / after_last) / together


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
                pooled: statistics.PooledDeviation | None = None) -> PairedTest:
  """Tests paired differences by Student's t-test at the level ALPHA * share.

  Args:
    differences: the difference of each seed, variant minus base.
    share: the share of the error rate ALPHA that the test may spend. The
      corrected p-value is p / share (a weighted Bonferroni correction).
    pooled: a standard deviation over all that was compared, for noise that is
      not normal; None: there is none.

  Returns:
    The mean difference, its interval at that level (None: it is not known), and
    the p-value before and after correction.
  """
  p = statistics.student_p_value(differences, pooled)
  mean, low, high, _ = statistics.student_interval(
      differences, pooled, ALPHA * share)
  interval = None if low is None else (low, high)
  return PairedTest(effect=mean, interval=interval, p=p,
                    p_corrected=min(p / share, 1.0))


def judge_variant(base: pathlib.Path, variant: pathlib.Path,
                  about: Sequence[str] = ()) -> dict[str, Any]:
  """Returns whether a variant is better than its base, and adds the answer to
  the record beside the runs.

  Args:
    base, variant: two folders beside each other, with runs as seed-0, ...
    about: the fields that the question is about; (): those of the model that
      differ (certificate.compare_certificates).

  Returns:
    The answer with its figures, as it is printed with --json.

  Raises:
    RequestError: where the folders cannot be compared.
  """
  base_folder, variant_folder = base.resolve(), variant.resolve()
  folder = base_folder.parent
  are_beside = variant_folder.parent == folder and variant_folder != base_folder
  require(are_beside, f'BASE is {base} and VARIANT {variant}: name two folders '
          'beside each other, since what was asked before stands beside them')
  base_name, variant_name = names = (base_folder.name, variant_folder.name)

  # The seeds of this look.
  runs = {name: _read_runs(folder / name) for name in names}
  ended_seeds, diverged = _ended_seeds(runs, names)
  num_looked_at, share_of_look = latest_look(len(ended_seeds))
  seeds = ended_seeds[:num_looked_at]

  # The differences between their configs and what else they were given, and
  # those of their losses.
  config_pairs = []
  for seed in seeds:
    config_pairs.append((runs[base_name][seed].config,
                         runs[variant_name][seed].config))
  changes = _changed_fields(config_pairs)
  not_asked = [name for name in about
               if name not in changes and name not in certificate.QUANTITIES]
  require(not not_asked, f'--about is {",".join(about)}, but '
          f'{", ".join(not_asked)} is alike on both sides: '
          f'{", ".join(changes) or "no field"} differs (or name what is no '
          f'field: {", ".join(certificate.QUANTITIES)})')
  differences = _find_differences(
      folder=folder, names=names, runs=runs, seeds=seeds, changes=changes,
      about=about)
  num_diverged = {
      name: len(diverged[name].intersection(seeds)) for name in names}
  loss_differences: dict[int, float | None] = {}
  for seed in seeds:
    if seed in diverged[base_name] | diverged[variant_name]:
      loss_differences[seed] = None
    else:
      loss_differences[seed] = (runs[variant_name][seed].final_loss
                                - runs[base_name][seed].final_loss)

  # Which question that is, of all that were asked here: one asker at a time.
  lock_file = folder / '.judging'
  with storage.explain_write_failures(folder), lock_file.open('w') as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    record = _load_record(folder)
    question_warnings, question, pooled = _register_look(
        record=record, folder=folder, names=names, differences=loss_differences)

    # The answer at the share that the look of the question has.
    test = None
    if None not in loss_differences.values():
      test = paired_test(differences=[*loss_differences.values()],
                         share=share_of_look * question['share'],
                         pooled=pooled)
    num_questions = sum(len(each['variants']) for each in record['questions'])
    verdict = _verdict(test=test, base_diverged=num_diverged[base_name],
                       variant_diverged=num_diverged[variant_name])
    answer = {
        'base': base_name, 'variant': variant_name, 'verdict': verdict,
        **_test_figures(test),
        'alpha': ALPHA, 'seeds': seeds, 'next_look': 2 * len(seeds),
        'diverged': num_diverged, 'questions': num_questions,
        'changes': changes, 'about': list(differences.asked),
        'unlike': differences.unlike,
        'warnings': certificate.name_differences({variant_name: differences})
                    + question_warnings}
    record['answers'].append({'time': time.time()} | answer)
    layout.save_with_checksum(folder / RECORD_FILE, record)
  return answer


def _load_record(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what was asked, looked at and answered in a folder so far."""
  path = folder / RECORD_FILE
  if path.is_file():
    return layout.load_with_checksum(path)
  return {'questions': [], 'looked': [], 'answers': []}


def _test_figures(test: PairedTest | None) -> dict[str, Any]:
  """Returns the figures of a test by name; None where there is no test."""
  if test is None:
    return dict.fromkeys(PairedTest._fields)
  return test._asdict()


def _verdict(test: PairedTest | None, base_diverged: int, variant_diverged: int
             ) -> str:
  """Returns the verdict on a variant by a test of its losses. Lower is better.

  Args:
    test: the test; None: there is none, because a run diverged.
    base_diverged: the number of the base's runs that diverged.
    variant_diverged: the number of the variant's runs that diverged.
  """
  # Runs that diverged have no loss, so they count before any test.
  if variant_diverged > base_diverged:
    return decide.UNSTABLE
  if test is None or test.p_corrected > ALPHA:
    return decide.NONE_SHOWN
  return decide.BETTER if test.effect < 0 else decide.WORSE


def _read_runs(folder: pathlib.Path) -> dict[int, curves.Run]:
  """Reads the runs in the folders seed-0, seed-1, ... of a base or a variant,
  and returns them by seed, in rising order.

  Args:
    folder: the folder of the base or of a variant.

  Raises:
    RequestError: if there is no run.
  """
  # A run has config.json from its beginning on, and metrics.jsonl once it has
  # trained a few steps.
  runs = {}
  for config_file in folder.glob('seed-*/config.json'):
    seed_text = config_file.parent.name.removeprefix('seed-')
    # A folder such as seed-0-old is no run.
    if not seed_text.isdecimal():
      continue
    config = run_config.flatten(run_config.load_config(config_file.parent))
    metrics_file = config_file.with_name('metrics.jsonl')
    metrics_rows = ()
    if metrics_file.is_file():
      metrics_rows = tuple(metrics.read_metrics(metrics_file))
    seed = int(seed_text)
    runs[seed] = curves.Run(seed=seed, state=layout.DONE, error='',
                            config=config, rows=metrics_rows, evaluations={})
  require(runs, f'{folder} has no runs: train them as {folder}/seed-0, '
          f'{folder}/seed-1, ...')
  return dict(sorted(runs.items()))


def _ended_seeds(runs: Mapping[str, RunBySeed], names: Sequence[str]
                 ) -> tuple[list[int], dict[str, set[int]]]:
  """Returns the seeds that may be compared: the first ones, up to the first of
  which a run has not ended. To choose among seeds by how soon they ended would
  bias the comparison.

  Args:
    runs: the runs by seed, of the folder of each name.
    names: the names of the folders of base and variant.

  Returns:
    The seeds that have ended in both folders, in order; and by the name of each
    folder, the seeds that diverged.

  Raises:
    RequestError: where fewer have ended than the first look takes.
  """
  # A run that diverged has ended, though it has no final loss.
  diverged = {}
  for name in names:
    diverged[name] = {seed for seed, run in runs[name].items() if run.diverged}

  # The seeds of both are 0, 1, ..., without a gap: who may choose among seeds
  # can choose those that are good for one side.
  base_name, variant_name = names
  shared_seeds = sorted(runs[base_name].keys() & runs[variant_name].keys())
  for number, seed in enumerate(shared_seeds):
    require(seed == number, f'{base_name} and {variant_name} both have seed '
            f'{seed}, but not seed {number}: seeds are 0 to n-1, so train it, '
            'too')
  for name in names:
    for seed in shared_seeds:
      seed_of_run = runs[name][seed].config['seed']
      require(seed_of_run == seed, f'{name}/seed-{seed} is of seed '
              f'{seed_of_run}: train it with --config.seed={seed}')

  # They are compared until one is still going on in either.
  ended_seeds: list[int] = []
  unfinished_runs: list[str] = []
  for seed in shared_seeds:
    for name in names:
      if seed not in diverged[name] and runs[name][seed].final_loss is None:
        unfinished_runs.append(f'{name}/seed-{seed}')
    if unfinished_runs:
      break
    ended_seeds.append(seed)

  # A look that is not complete is refused.
  reason = ''
  if unfinished_runs:
    reason = (f'; {" and ".join(unfinished_runs)} has no held-out loss after '
              'its last step (eval.every_steps)')
  require(len(ended_seeds) >= SEEDS_OF_FIRST_LOOK, f'{len(ended_seeds)} seeds '
          f'have ended in both {base_name} and {variant_name}: a look takes '
          f'{SEEDS_OF_FIRST_LOOK}{reason}')
  return ended_seeds, diverged


def _changed_fields(config_pairs: Sequence[tuple[Mapping, Mapping]]
                    ) -> dict[str, list]:
  """Returns the fields in which the configs of base and variant differ.

  Args:
    config_pairs: the configs of base and variant, by dotted name, for each
      seed.

  Returns:
    [value of the base, value of the variant] by the name of the field.

  Raises:
    RequestError: if the losses of both are measured on different text.
  """
  # A field counts if it differs at any seed. A field that only one config has
  # is None in the other.
  changes = {}
  for base_config, variant_config in config_pairs:
    for name in base_config | variant_config:
      if base_config.get(name) != variant_config.get(name):
        changes[name] = [base_config.get(name), variant_config.get(name)]

  # Losses of different text cannot be compared.
  fields_of_text = set()
  for base_config, variant_config in config_pairs:
    for config in (base_config, variant_config):
      fields_of_text |= {
          name for name in changes
          if certificate.is_of_held_out_text(name, config)}
  _refuse_other_text([name for name in changes if name in fields_of_text])
  return changes


def _refuse_other_text(names: Sequence[str]) -> None:
  """Raises RequestError where there are names of fields or of contents that
  decide what the held-out losses are of, and that differ."""
  require(not names, f'{", ".join(names)} differ, so that the losses are of '
          'different text: evaluate both alike (eval.batches=0 is all of it, '
          'whatever the batch)')


def _find_differences(
    folder: pathlib.Path, names: tuple[str, str],
    runs: Mapping[str, RunBySeed], seeds: Sequence[int],
    changes: Mapping[str, Sequence], about: Sequence[str]
    ) -> certificate.Differences:
  """Returns in what the runs of base and variant differ beyond the question.

  Args:
    folder: the folder of the loop, with a folder for each variant.
    names: the base and the variant.
    runs: the runs by seed, of the folder of each name.
    seeds: the seeds that are looked at.
    changes: the values of both in each field that differs at any seed.
    about: the fields that the question is about; (): see
      certificate.compare_certificates.

  Raises:
    RequestError: where the held-out text or the tokenizer hold something else.
  """
  # All that lies in the folder tells how many recipes each side was tried with.
  seeds_in_folder: dict[str, list[int]] = {}
  for config_file in folder.glob('*/seed-*/config.json'):
    seed = config_file.parent.name.removeprefix('seed-')
    if seed.isdecimal():
      variant = config_file.parent.parent.name
      seeds_in_folder.setdefault(variant, []).append(int(seed))
  configs = {}
  for name, seeds_of_variant in seeds_in_folder.items():
    first_run = folder / name / f'seed-{min(seeds_of_variant)}'
    configs[name] = run_config.flatten(run_config.load_config(first_run))
  tuning = certificate.count_recipes(
      configs, {name: len(each) for name, each in seeds_in_folder.items()})

  # A field that differs at one seed alone differs, too.
  sides = []
  for i, name in enumerate(names):
    changed_values = {field: pair[i] for field, pair in changes.items()}
    sides.append(certificate.certify_folders(
        config={**runs[name][seeds[0]].config, **changed_values},
        runs_by_seed={seed: runs[name][seed] for seed in seeds},
        folders=[folder / name / f'seed-{seed}' for seed in seeds],
        tuning=tuning[name]))
  base_side, variant_side = sides
  differences = certificate.compare_certificates(base_side, variant_side, about)
  for quantity in ('held_out_text', 'tokenizer'):
    _refuse_other_text(certificate.differing_names(
        base_side.get(quantity), variant_side.get(quantity)))
  return differences


def _register_look(record: dict, folder: pathlib.Path, names: tuple[str, str],
                   differences: DifferenceBySeed
                   ) -> tuple[list[str], dict,
                              statistics.PooledDeviation | None]:
  """Returns the question that a look at a pair answers; a new question and a
  new look are added to the record.

  More seeds of the same runs are another look of the same question. Runs that
  were trained anew are a new question.

  Args:
    record: what judged.json holds, which is changed.
    folder: the folder of the loop.
    names: the base and the variant.
    differences: the differences of the seeds that are looked at.

  Returns:
    warnings: one where the runs are others than those looked at before.
    question: the question, with the share of ALPHA that it may spend.
    pooled: the spread of the differences from the base of all that was looked
      at; None where their noise looks normal. A repeated look has the same.
  """
  base, variant = names
  # A list of lists, as JSON has it.
  values_now = [[seed, value] for seed, value in differences.items()]
  look = _earlier_look(record['looked'], names)
  are_same_runs = True
  if look is not None:
    are_same_runs = all(before == now
                        for before, now in zip(look['values'], values_now))

  # The last question about the pair, or else a new one.
  question = None
  for earlier_question in record['questions']:
    is_of_pair = (earlier_question['base'] == base
                  and variant in earlier_question['variants'])
    if is_of_pair:
      question = earlier_question
  if question is None or not are_same_runs:
    question = _new_question(questions=record['questions'], folder=folder,
                             base=base, variant=variant)
    record['questions'].append(question)

  # The differences that are looked at, which the record has from now on.
  if look is None:
    look = {'names': [*names], 'values': []}
    record['looked'].append(look)
  if not are_same_runs or len(values_now) > len(look['values']):
    look['values'] = values_now
    look['pooled'] = _pooled_spread_of_looks(record['looked'], base)
  pooled = None
  if look.get('pooled') is not None:
    pooled = statistics.PooledDeviation._make(look['pooled'])

  warnings = []
  if not are_same_runs:
    warnings.append(f'the runs of {base} or {variant} are others than those '
                    'that were looked at before: this is a new question')
  return warnings, question, pooled


def _earlier_look(looks: Sequence[dict], names: tuple[str, str]) -> dict | None:
  """Returns the look at a pair of folders; None where there was none."""
  for look in looks:
    if look['names'] == [*names]:
      return look
  return None


def _new_question(questions: Sequence[Mapping], folder: pathlib.Path,
                  base: str, variant: str) -> dict[str, Any]:
  """Returns the next question, which is whether a variant is better than a
  base, with its share of the error rate ALPHA.

  All other variants in the folder that were in no question before count as
  asked about too. Who asks about the best of twenty has looked at twenty.

  Args:
    questions: the questions that were asked before.
    folder: the folder of the loop, with a folder for each variant.
    base: the name of the base.
    variant: the name of the variant.

  Returns:
    The 'base', the 'variants' and the 'share' that each of them has.
  """
  # Collect the names that were in a question, as base or as variant, and count
  # the variants, each of which has spent a share.
  asked_before = {base}
  num_before = 0
  for question in questions:
    asked_before |= {question['base'], *question['variants']}
    num_before += len(question['variants'])

  # Find the variants in the folder, which are named like the folder of their
  # seeds, and divide the share of the new questions among them.
  names_in_folder = {config_file.parent.parent.name
                     for config_file in folder.glob('*/seed-*/config.json')}
  variants = sorted({variant} | (names_in_folder - asked_before))
  share = alpha_share_of_question(num_before, together=len(variants))
  return {'base': base, 'variants': variants, 'share': share}


def _pooled_spread_of_looks(looks: Sequence[Mapping], base: str
                            ) -> statistics.PooledDeviation | None:
  """Returns the standard deviation of the differences from a base, pooled over
  all variants that were tested against it.

  Args:
    looks: the tests so far. Each has the 'names' of base and variant, and in
      'values' pairs of a seed and its difference (None: a run diverged).
    base: the name of the base.

  Returns:
    The deviation, or None if the noise looks normal, and needs no pooling.
  """
  differences_of_variants = []
  for look in looks:
    if look['names'][0] == base:
      # [seeds, 1]: one size of model.
      differences = [value for _, value in look['values'] if value is not None]
      if differences:
        differences_of_variants.append(np.array(differences).reshape(-1, 1))
  shape = statistics.measure_noise_shape(differences_of_variants)
  if shape is None:
    return None
  return shape.pooled_deviation(np.ravel)


def render_answer(answer: Mapping[str, Any]) -> str:
  """Returns the answer of `judge_variant` as text for a terminal: the verdict
  first, then the figures that it rests on, and warnings last.

  Args:
    answer: the answer.
  """
  if answer['p'] is None:
    figures = 'shows nothing, since runs diverged'
  else:
    # There is no interval if all differences are equal.
    low, high = answer['interval'] or (None, None)
    estimate = page.estimate(answer['effect'], low, high).text
    figures = (f'{estimate}, p {answer["p"]:.2g}, corrected p '
               f'{answer["p_corrected"]:.2g}')
  num_seeds = len(answer['seeds'])
  question = ', '.join(answer['about']) or 'nothing that was given'
  verdict = answer['verdict']
  if answer['unlike']:
    titles = [certificate.QUANTITIES[name].title for name in answer['unlike']]
    verdict += f', but not alike in {", ".join(titles)}'
  lines = [
      f'{answer["variant"]} beside {answer["base"]}: {verdict}',
      f'about: {question}',
      f'held-out loss {figures}; {num_seeds} seeds (next look: '
      f'{answer["next_look"]}), '
      f'{format_count(answer["questions"], "question")} so far']
  lines += [f'warning: {line}' for line in answer['warnings']]
  return '\n'.join(lines)
