"""referee: verdicts on runs that others made, from their logs alone.

Each SOURCE is a file or a folder with the runs of one entry: logs of
modded-nanogpt, trainer_state.json of the Hugging Face Trainer, event files of
TensorBoard, charts and histories of W&B and trackio as CSV, samples of lm-eval,
a CSV or JSON lines with entry, run, seed, step and loss, or the lines that a
loop of one's own prints. Of one SOURCE alone the entries are those that it
names. The others are compared with the first, or
each with the one before (--successive).

The test is Student's: paired by seed where both entries have 3 seeds or more
in common, and else of two samples, with the deviation of each (Welch), one that
is pooled over all entries (--pooled), or one that is known (--sd). Scores of
items, such as questions, are paired item by item. Every p is corrected over all
that is compared, by Holm. What the logs tell that runs were given stands beside
each verdict where it is not alike, and what neither they nor --given tell is
called unknown (certificate.py).
"""

import argparse
import collections
from collections.abc import Iterable, Mapping, Sequence
import csv
import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import numpy as np

from common.errors import RequestError, check_choice, format_count
from common.errors import join_choices, require
from common.fields import check_number
from tools.compare import certificate, decide, figures, foreign, items, page
from tools.compare import statistics
from tools.compare.statistics import GroupOfRuns, PooledDeviation

# The figure that is compared where none is named and there are several.
_HELD_OUT_LOSSES = ('val_loss', 'eval_loss', 'val/loss', 'eval/loss')
_REPORTED_LOSS = 'loss'  # the figure of a table of results
# The names of figures of which less is better.
_LESS_IS_BETTER = re.compile(
    'loss|perplexity|ppl|error|bits|bpb|nll|entropy', re.IGNORECASE)
_FORMATS = tuple(reader.name for reader in foreign.READERS)
_POWER = 0.8  # with which a difference is called one that the runs can find
# Logs of so many equal figures are two logs of one run.
_MIN_POINTS_OF_COPY = 3


@dataclasses.dataclass(frozen=True)
class Sample:
  """An entry: what is compared, by the runs that repeat it.

  Attributes:
    name: the name.
    runs: the runs, each of which has a curve of the figure.
    step: the step at which it is read; None: the log has none.
    values: the figure of each run there.
    seeds: the seed of each of these runs; None where it is not known.
    group: the mean, the number of runs and their deviation, by the values or
      as it was reported.
    given: what the runs were given, by the names of certificate.QUANTITIES.
    notes: sentences about what was left out.
  """
  name: str
  runs: Sequence[foreign.ForeignRun]
  step: int | None
  values: Sequence[float]
  seeds: Sequence[int | None]
  group: GroupOfRuns
  given: Mapping[str, str]
  notes: Sequence[str] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `python -m tools.compare referee` to its parser."""
  parser.add_argument('sources', metavar='SOURCE', nargs='+',
                      help='a file or folder of runs')
  parser.add_argument('--entries', default='', help='of one SOURCE: the '
                      'entries in order, as A,B@STEP, or a CSV with columns '
                      'entry and steps; default: all, at their last step')
  parser.add_argument('--successive', action='store_true',
                      help='compare each entry with the one before it')
  parser.add_argument('--format', default='', help='the only format to read, '
                      f'of {", ".join(_FORMATS)}; default: any')
  parser.add_argument('--metric', default='', help='the figure to compare; '
                      'default: the held-out loss')
  parser.add_argument('--pooled', action='store_true', help='one standard '
                      'deviation for all entries, pooled over their runs')
  parser.add_argument('--sd', type=float, default=None,
                      help='the standard deviation of a run, where it is known')
  parser.add_argument('--loss_per_step', type=float, default=0.0, help='by how '
                      'much a step less raises the loss; charged where entries '
                      'end at different steps')
  parser.add_argument('--about', default='', metavar='QUANTITY,QUANTITY',
                      help='what the question is about, so that it is not '
                      'named where it differs, of '
                      f'{", ".join(certificate.QUANTITIES)}')
  parser.add_argument('--given', default='', metavar='FILE', help='a CSV with '
                      'the column entry, and others of the same quantities, '
                      'that tell what the runs of an entry were given')
  parser.add_argument('--target', type=float, help='instead: the first step at '
                      'which the mean of each entry is below this loss')
  parser.add_argument('--uncorrected', action='store_true', help='judge each '
                      'comparison by its own p, as if it were the only one')
  parser.add_argument('--alpha', type=float, default=0.05,
                      help='the probability of any wrong claim (%(default)s)')
  parser.add_argument('--figure', default='', help='draw into this file, of '
                      f'{", ".join(figures.FILE_FORMATS)}')
  parser.add_argument('--json', action='store_true', help='print JSON')


def main(args) -> int:
  """Compares runs that were trained by any code, as their logs tell, and prints
  the verdicts. Returns the exit code, 0.

  Args:
    args: the arguments that `add_arguments` defines.
  """
  # Check the arguments.
  check_number('--alpha', args.alpha, (('>', 0), ('<', 1)))
  if args.sd is not None:
    check_number('--sd', args.sd, (('>', 0),))
  require(args.target is None or not args.figure,
          '--figure draws comparisons, of which --target has none')
  require(args.target is None or not args.given,
          '--given is of comparisons, of which --target has none')
  if args.figure:
    check_choice('ending of --figure', pathlib.Path(args.figure).suffix[1:],
                 figures.FILE_FORMATS)
  if args.format:
    check_choice('--format', args.format, _FORMATS)

  # Read the runs, and judge them.
  sources = [pathlib.Path(source) for source in args.sources]
  groups = group_by_entry(sources, picks=args.entries, format_name=args.format)
  answer = judge_entries(groups, args)

  if args.figure:
    drawing = figures.draw_verdicts(
        answer['comparisons'], xlabel=f'{answer["metric"]} minus that of the '
        'entry it is compared with')
    drawing.savefig(args.figure, dpi=figures.DPI)
  if args.json:
    print(json.dumps(answer, indent=2))
  else:
    print(f'{render_table(answer)}\n\n{answer["summary"]}')
  return 0


# Entries and their figures.


def group_by_entry(sources: Sequence[pathlib.Path], picks: str,
                   format_name: str) -> dict[str, tuple[list, int | None]]:
  """Reads the sources, and groups their runs into entries, which are what is
  compared: the variants, with several runs each.

  Args:
    sources: the files or folders. Of several, each is an entry. A single one
      holds several entries.
    picks: the text of --entries, which picks entries of a single source; '':
      all of them.
    format_name: the text of --format; '': any format.

  Returns:
    {name: (runs or reported means, step at which they are read)}, in the order
    to compare. A step of None stands for the last one.

  Raises:
    RequestError: for an entry without runs, and for fewer than two entries.
  """
  groups: dict[str, tuple[list, int | None]] = {}
  if len(sources) > 1:
    require(not picks, '--entries picks entries of one SOURCE: name one')
    # Name the entries after their files, or by whole paths if names are equal.
    names = [source.stem for source in sources]
    if len(set(names)) < len(names):  # as a/runs and b/runs
      names = [source.as_posix() for source in sources]
    require(len(set(names)) == len(names), 'a SOURCE is named twice')
    for name, source in zip(names, sources):
      groups[name] = foreign.read_source(source, format_name), None
    return groups

  runs = foreign.read_source(sources[0], format_name)
  if picks:
    for name, step in _parse_picks(picks):
      below = [run for run in runs if foreign.is_of_entry(run.path, name)]
      paths = sorted({run.path.partition('/')[0] for run in runs})
      require(below, f'--entries: {sources[0]} has no runs of {name!r}. There '
              f'are {join_choices(paths)}')
      groups[name] = below, step
  else:
    for run in runs:
      name = foreign.without_seed(run.path.partition('#')[0])
      if isinstance(run, foreign.ForeignRun):
        name = name.partition('/')[0]
      groups.setdefault(name or sources[0].stem, ([], None))[0].append(run)
  require(len(groups) > 1, f'{sources[0]} has one entry alone: name another '
          'SOURCE to compare it with')
  return groups


def _parse_picks(text: str) -> list[tuple[str, int | None]]:
  """Parses --entries, and returns the names of entries with the step at which
  each is read (None: the last one).

  Args:
    text: the path of a CSV with columns entry and steps, or a list such as
      'A,B@STEP'.

  Raises:
    RequestError: for a CSV without the column entry, or a step in the list that
      is no whole number.
  """
  picks: list[tuple[str, int | None]] = []
  if pathlib.Path(text).is_file():
    with open(text, newline='') as file:
      for row in csv.DictReader(file):
        require('entry' in row, f'{text} has no column entry')
        step = row.get('steps') or row.get('step')
        picks.append((row['entry'], int(step) if step else None))
    return picks
  for pick in text.split(','):
    name, _, step = pick.partition('@')
    require(not step or step.isdecimal(), f'--entries: {step!r} is no step')
    picks.append((name, int(step) if step else None))
  return picks


def choose_metric(groups: Mapping[str, tuple[list, int | None]], asked: str
                  ) -> str:
  """Returns the name of the figure that is compared, such as 'eval/loss'. It is
  '' if the runs have only scores of single items.

  Args:
    groups: the runs of each entry, as `group_by_entry` returns them.
    asked: the text of --metric; '': the held-out loss is chosen.

  Raises:
    RequestError: if there is no figure of the name, or if it is not clear which
      one is the held-out loss.
  """
  # Collect the names of all figures, each once.
  has_reported_means = False
  all_figures: dict[str, None] = {}
  for runs, _ in groups.values():
    for run in runs:
      if isinstance(run, foreign.ForeignRun):
        all_figures |= dict.fromkeys(run.curves)
      elif isinstance(run, foreign.ReportedMean):
        has_reported_means = True
  if asked:
    check_choice('--metric', asked, all_figures)
    return asked

  # Leave out those that say what a run was given, such as its tokens.
  figures = [name for name in all_figures
             if not foreign.quantity_of_figure(name)]
  if not figures:
    return _REPORTED_LOSS if has_reported_means else ''
  return _find_held_out_loss(figures)


def _find_held_out_loss(figures: Sequence[str]) -> str:
  """Returns the one of these names of figures that is the held-out loss.

  Args:
    figures: the names of the figures that the runs have.

  Raises:
    RequestError: if none or several can be.
  """
  # The usual names, the surest first.
  for name in _HELD_OUT_LOSSES:
    if name in figures:
      return name
  # Otherwise the only one that may be a held-out loss, or the only figure.
  losses = [name for name in figures
            if 'loss' in name.lower() and 'train' not in name.lower()]
  for candidates in (losses, figures):
    if len(candidates) == 1:
      return candidates[0]
  raise RequestError('the runs have several figures: choose one with --metric, '
                     f'of {join_choices(figures)}')


def read_sample(name: str, runs: Sequence, step: int | None, metric: str
                ) -> Sample:
  """Returns an entry with the figure of each of its runs at a step.

  Args:
    name: the name of the entry.
    runs: its runs or its reported mean.
    step: the step; None: the last one that half of its runs have.
    metric: the name of the figure.

  Raises:
    RequestError: where no run has the figure there.
  """
  reported = [run for run in runs if isinstance(run, foreign.ReportedMean)]
  if reported:
    require(len(reported) == len(runs) == 1,
            f'{name} has {len(reported)} rows in the table of results')
    group = GroupOfRuns(mean=reported[0].mean, num_runs=reported[0].num_runs,
                        deviation=reported[0].deviation)
    return Sample(name=name, runs=(), step=reported[0].step, values=(),
                  seeds=(), group=group, given=reported[0].given)

  # A run that was logged into two files counts once.
  all_with_curve = [run for run in runs if run.curves.get(metric)]
  require(all_with_curve, f'{name} has no run with {metric}')
  with_curve = _drop_copies(all_with_curve, metric)
  num_copies = len(all_with_curve) - len(with_curve)

  # The runs that have a finite figure at the step. The others are told.
  if step is None:
    step = _last_common_step([run.curves[metric] for run in with_curve])
  at_step = [run for run in with_curve
             if math.isfinite(run.curves[metric].get(step, math.nan))]
  require(at_step, f'{name} has no {metric} at step {step}')
  notes = []
  if num_copies:
    notes.append(f'{name}: {num_copies} of its logs are copies')
  num_left_out = len(with_curve) - len(at_step)
  if num_left_out:
    notes.append(f'{name}: {num_left_out} of {len(with_curve)} runs are left '
                 f'out, which have no finite {metric} at step {step}')
  values = [run.curves[metric][step] for run in at_step]
  return Sample(
      name=name, runs=at_step, step=step, values=values,
      seeds=[run.seed for run in at_step],
      group=statistics.describe_group(values),
      given=_join_what_was_given(at_step, step), notes=notes)


def _read_given(file: str, entries: Iterable[str]) -> dict[str, dict[str, str]]:
  """Reads the CSV of --given.

  Args:
    file: its path; '': there is none.
    entries: the names of the entries.

  Returns:
    What the runs of each entry were given, by the name of the entry and by the
    names of certificate.QUANTITIES, as far as the CSV tells it.

  Raises:
    RequestError: for a column or an entry that is not known.
  """
  if not file:
    return {}
  require(pathlib.Path(file).is_file(), f'--given: there is no file {file}')
  given = {}
  with open(file, newline='') as opened:
    for row in csv.DictReader(opened):
      require('entry' in row, f'--given: {file} has no column entry')
      entry = row.pop('entry')
      check_choice(f'--given: the entry in {file}', entry, entries)
      for column in row:
        check_choice(f'--given: the column in {file}', column,
                     certificate.QUANTITIES)
      given[entry] = {column: cell for column, cell in row.items() if cell}
  return given


def _drop_copies(runs: Sequence[foreign.ForeignRun], metric: str
                 ) -> list[foreign.ForeignRun]:
  """Returns the runs without those whose curve of a figure, if it is long
  enough to tell, is the same as that of a run before them."""
  different_runs: list[foreign.ForeignRun] = []
  for run in runs:
    curve = run.curves[metric]
    earlier_curves = [other.curves[metric] for other in different_runs]
    if len(curve) < _MIN_POINTS_OF_COPY or curve not in earlier_curves:
      different_runs.append(run)
  return different_runs


def _join_what_was_given(runs: Sequence[foreign.ForeignRun], step: int
                         ) -> dict[str, str]:
  """Returns what some runs were given up to a step, such as tokens or a code,
  as one text for each of certificate.QUANTITIES: the mean of numbers, and all
  different words.

  Args:
    runs: the runs of one entry.
    step: the step.
  """
  values_of_quantity: dict[str, list] = {}
  for run in runs:
    for quantity, value in run.given_until(step).items():
      values_of_quantity.setdefault(quantity, []).append(value)
  joined = {}
  for quantity, values in values_of_quantity.items():
    if all(isinstance(value, float) for value in values):
      values = [float(np.mean(values))]
    texts = map(str, values)
    different_texts = dict.fromkeys(texts)  # each once, in order
    joined[quantity] = '; '.join(different_texts)
  return joined


def _last_common_step(curves: Sequence[foreign.Curve]) -> int:
  """Returns the last step that at least half of some runs have: neither a run
  that ended early nor one that was trained on decides it."""
  num_runs: collections.Counter[int] = collections.Counter()
  for curve in curves:
    num_runs.update(curve.keys())
  return max(step for step, num in num_runs.items() if 2 * num >= len(curves))


# Tests.


def judge_entries(groups: Mapping[str, tuple[list, int | None]], args
                  ) -> dict[str, Any]:
  """Returns the verdicts on some entries.

  Args:
    groups: the runs of each entry, as `group_by_entry` returns them.
    args: the arguments of the command.

  Returns:
    What --json prints: 'metric', 'comparisons', 'steps' (of --target), 'notes',
    'unlike', sentences on what was not given alike, 'alike', what was given
    alike to all entries, 'unknown', what nothing tells of any entry, and
    'summary', a paragraph.
  """
  metric = choose_metric(groups, args.metric)
  answer: dict[str, Any] = {
      'metric': metric or 'scores of items', 'alpha': args.alpha,
      'comparisons': [], 'steps': [], 'notes': [], 'unlike': [], 'alike': [],
      'unknown': [*certificate.QUANTITIES]}

  # Scores of items alone are paired item by item.
  pairs = _list_pairs([*groups], args.successive)
  given = _read_given(args.given, groups)
  if not metric:
    require(args.target is None, '--target is of curves, and there are none')
    for base, entry in pairs:
      answer['comparisons'] += _compare_items(
          base, groups[base][0], entry, groups[entry][0])
    seeds = {}
    for name, (runs, _) in groups.items():
      seeds[name] = [run.seed for run in runs]
    _add_what_is_unlike(answer, given=given, seeds=seeds, about=args.about)
    return _correct_and_summarize(answer, args)

  samples = {}
  for name, (runs, step) in groups.items():
    samples[name] = read_sample(name, runs, step, metric)
    answer['notes'] += samples[name].notes
  if args.target is not None:
    for sample in samples.values():
      answer['steps'].append(_find_first_step_below(sample, metric, args))
    answer['summary'] = _summarize_steps(answer, args.target)
    return answer

  pooled = _deviation_for_all(samples, args)
  # Holm's correction asks the smallest p for the level over the number of them.
  num_tests = 1 if args.uncorrected else len(pairs)
  for base, entry in pairs:
    answer['comparisons'].append(_compare_samples(
        samples[base], samples[entry], metric=metric, pooled=pooled, args=args,
        num_tests=num_tests))
  for name, sample in samples.items():
    given[name] = {**sample.given, **given.get(name, {})}
  seeds = {name: sample.seeds for name, sample in samples.items()}
  _add_what_is_unlike(answer, given=given, seeds=seeds, about=args.about)
  answer['notes'] += _note_assumptions(samples, metric, pooled, args)
  return _correct_and_summarize(answer, args)


def _note_assumptions(samples: Mapping[str, Sample], metric: str,
                      pooled: PooledDeviation | None, args) -> list[str]:
  """Returns notes on what the comparisons take for granted.

  Args:
    samples: the entries by name.
    metric: the name of the figure.
    pooled: the standard deviation that holds for all entries; None: each has
      its own.
    args: the arguments of the command.
  """
  notes = []
  # An entry without values is a mean that a table reports, and has no log.
  has_logs = any(sample.values for sample in samples.values())
  if metric.lower() == 'loss' and has_logs:
    notes.append('the logs do not say whether their loss is held out')
  if args.sd is not None:
    notes.append(f'the standard deviation of a run is said to be {args.sd:.3g}')
  elif pooled is not None:
    notes.append(
        f'the standard deviation of a run, pooled over all entries, is '
        f'{pooled.sd:.3g} ({pooled.df} degrees of freedom)')
  if len({sample.step for sample in samples.values()}) > 1:
    charged = 'not charged: pass --loss_per_step'
    if args.loss_per_step:
      charged = f'charged with {args.loss_per_step:g} a step'
    notes.append(f'entries are read at different steps, which is {charged}')
  return notes


def _add_what_is_unlike(answer: dict[str, Any],
                        given: Mapping[str, Mapping[str, str]],
                        seeds: Mapping[str, Sequence[int | None]], about: str
                        ) -> None:
  """Adds to an answer whether its comparisons are fair: what the entries of
  each comparison were given differently besides what the question is about, and
  what is not known about any entry.

  Args:
    answer: the answer, with its 'comparisons'.
    given: what each entry was given, by its name and by the names of
      certificate.QUANTITIES, as far as it is known.
    seeds: the seed of each run of an entry; None where it is not known.
    about: the text of --about.
  """
  asked = tuple(filter(None, about.split(',')))
  for quantity in asked:
    check_choice('--about', quantity, certificate.QUANTITIES)

  # Make the certificate of each entry: the list of what it was given. An entry
  # may refer to that of its base, so the base must come before it.
  certificates: dict[str, certificate.Certificate] = {}
  first_entry = answer['comparisons'][0]['base']
  pairs = [(first_entry, first_entry)]
  pairs += [(row['base'], row['entry']) for row in answer['comparisons']]
  for base, entry in pairs:
    certificates[entry] = certificate.certify_cells(
        entry, given.get(entry, {}), base=certificates.get(base, {}),
        seeds=[seed for seed in seeds[entry] if seed is not None])

  # Compare the certificates of the two entries of each comparison.
  differences_by_entry = {}
  for row in answer['comparisons']:
    base, entry = certificates[row['base']], certificates[row['entry']]
    differences = certificate.compare_certificates(base, entry, asked)
    row['unlike'] = differences.unlike
    row['unknown'] = [name for name in certificate.QUANTITIES
                      if name not in base or name not in entry]
    differences_by_entry[row['entry']] = differences
  answer['unlike'] = certificate.name_differences(differences_by_entry)

  # The quantities that are unknown of all entries, and those in which all
  # entries are alike.
  known = set().union(*certificates.values())
  answer['unknown'] = [name for name in answer['unknown'] if name not in known]
  first, *others = certificates.values()
  alike = []
  for name, value in first.items():
    if all(other.get(name) == value for other in others):
      alike.append(name)
  answer['alike'] = alike


def _correct_and_summarize(answer: dict[str, Any], args) -> dict[str, Any]:
  """Corrects the p-values of an answer's comparisons for their number by Holm's
  method, and adds the verdicts and a summary. The answer is changed and
  returned.

  Args:
    answer: the answer, with its 'comparisons' and 'alpha'.
    args: the arguments of the command. With --uncorrected, p-values stay.
  """
  comparisons = answer['comparisons']
  p_values = [comparison['p'] for comparison in comparisons]
  if not args.uncorrected:
    p_values = statistics.correct_p_values(p_values)
  for comparison, p_corrected in zip(comparisons, p_values):
    comparison['p_corrected'] = p_corrected
    # The verdict is by the corrected p-value, and so comes after it.
    comparison['verdict'] = _verdict(comparison, answer['alpha'])
  answer['summary'] = _summarize_comparisons(answer, args)
  return answer


def _list_pairs(names: Sequence[str], successive: bool
                ) -> list[tuple[str, str]]:
  """Returns the pairs (base, entry) that are compared."""
  if successive:
    return list(zip(names, names[1:]))
  return [(names[0], name) for name in names[1:]]


def _deviation_for_all(samples: Mapping[str, Sample], args
                       ) -> PooledDeviation | None:
  """Returns one standard deviation of a run for all entries: that of --sd, or
  with --pooled the one pooled over all of them. It is None if each entry has
  its own.

  Args:
    samples: the entries by name.
    args: the arguments of the command.

  Raises:
    RequestError: if no deviation is known.
  """
  if args.sd is not None:
    return PooledDeviation(sd=args.sd, df=math.inf)
  groups = [sample.group for sample in samples.values()]
  has_deviation = any(group.deviation is not None for group in groups)
  has_values = any(sample.values for sample in samples.values())
  require(has_deviation or has_values, 'the table has no column sd, the '
          'standard deviation of a run: pass it as --sd')
  if not args.pooled:
    return None
  pooled = statistics.pool_deviations(groups)
  require(pooled is not None, '--pooled: no entry has two runs that differ')
  return pooled


def _compare_samples(base: Sample, entry: Sample, *, metric: str,
                     pooled: PooledDeviation | None, args, num_tests: int
                     ) -> dict[str, Any]:
  """Returns the test of the difference of an entry from its base.

  Args:
    base, entry: the two.
    metric: the name of the figure.
    pooled: one deviation for all entries; None: that of these runs.
    args: the arguments of the command.
    num_tests: how many tests are corrected together.

  Returns:
    A row of 'comparisons', without its corrected p and its verdict.
  """
  # The loss that the steps which the entry saves are worth to its base.
  charge = 0.0
  if base.step is not None and entry.step is not None:
    charge = args.loss_per_step * (entry.step - base.step)
  values = [value + charge for value in entry.values]
  group = entry.group._replace(mean=entry.group.mean + charge)

  # The test that fits the runs.
  value_by_seed = _values_by_seed(base.seeds, base.values)
  differences = []
  for seed, value in _values_by_seed(entry.seeds, values).items():
    if seed in value_by_seed:
      differences.append(value - value_by_seed[seed])
  difference: statistics.MeanDifference | None
  if pooled is not None:
    test = 'known deviation' if math.isinf(pooled.df) else 'pooled deviation'
    difference = statistics.difference_with_deviation(
        group, base.group, pooled)
  elif len(differences) >= statistics.MIN_SEEDS:
    test = f'{len(differences)} pairs of seeds'
    difference = statistics.difference_of_pairs(differences)
  else:
    test = 'two samples (Welch)'
    difference = statistics.difference_of_groups(group, base.group)

  row = {'base': base.name, 'entry': entry.name, 'metric': metric,
         'base_mean': base.group.mean, 'mean': entry.group.mean,
         'base_step': base.step, 'step': entry.step,
         'base_runs': base.group.num_runs, 'runs': entry.group.num_runs,
         'charge': charge, 'test': test,
         'effect': group.mean - base.group.mean, 'differences': differences}
  if difference is None:
    row['test'] = 'none: too few runs'
    return row | {'low': None, 'high': None, 'p': None}
  level = args.alpha / num_tests
  low, high = difference.interval(args.alpha)
  return row | {
      'effect': difference.mean, 'low': low, 'high': high, 'p': difference.p,
      'detectable': difference.detectable(level, _POWER),
      'runs_needed': difference.runs_needed(level, _POWER)}


def _values_by_seed(seeds: Sequence[int | None], values: Sequence[float]
                    ) -> dict[int, float]:
  """Returns the value of each seed; {} where a seed is not known, or has two
  runs, so that runs cannot be paired."""
  known_seeds = [seed for seed in seeds if seed is not None]
  if len(set(known_seeds)) < len(seeds):
    return {}
  return dict(zip(known_seeds, values))


def _compare_items(base: str, base_runs: Sequence[foreign.ForeignRun],
                   entry: str, runs: Sequence[foreign.ForeignRun]
                   ) -> list[dict[str, Any]]:
  """Tests each figure of which two entries have the scores of single items,
  such as questions. If the items are the same, the test is paired.

  Args:
    base: the name of the entry that is compared with.
    base_runs: its runs.
    entry: the name of the other entry.
    runs: its runs.

  Returns:
    A row for each figure, in the form of those of `_compare_samples`.

  Raises:
    RequestError: if the entries have no figure in common.
  """
  base_records = {str(run.seed): run.items for run in base_runs}
  records = {str(run.seed): run.items for run in runs}
  rows = []
  for row in items.compare_records(base_records, records):
    rows.append({
        'base': base, 'entry': entry, 'metric': row['figure'],
        'base_mean': row['base'], 'mean': row['variant'],
        'base_runs': row['seeds'], 'runs': row['seeds'],
        'test': f'{row["test"]}, {row["items"]} items',
        'effect': row['effect'], 'low': row['low'], 'high': row['high'],
        'p': row['p']})

  # If the items are others, the scores of one run each are two independent
  # samples, which Welch's t-test compares.
  paired = {row['metric'] for row in rows}
  for figure in base_runs[0].items:
    if figure in paired or figure not in runs[0].items:
      continue
    base_group = statistics.describe_group(base_runs[0].items[figure]['scores'])
    group = statistics.describe_group(runs[0].items[figure]['scores'])
    difference = statistics.difference_of_groups(group, base_group)
    if difference is not None:
      low, high = difference.interval(0.05)
      rows.append({
          'base': base, 'entry': entry, 'metric': figure,
          'base_mean': base_group.mean, 'mean': group.mean, 'base_runs': 1,
          'runs': 1, 'test': f'two samples of {group.num_runs} and '
          f'{base_group.num_runs} items (Welch)', 'effect': difference.mean,
          'low': low, 'high': high, 'p': difference.p})
  require(rows, f'{base} and {entry} have no figure in common')
  return rows


def _verdict(row: Mapping[str, Any], alpha: float) -> str:
  """Returns the verdict of a row by its corrected p and the direction in which
  its figure is better."""
  if row['p_corrected'] is None:
    return decide.NO_NOISE
  if row['p_corrected'] > alpha:
    return decide.NONE_SHOWN
  is_less = row['effect'] < 0
  is_better = is_less == bool(_LESS_IS_BETTER.search(row['metric']))
  return decide.BETTER if is_better else decide.WORSE


def _find_first_step_below(sample: Sample, metric: str, args
                           ) -> dict[str, Any]:
  """Returns the first step at which the mean loss of an entry is below
  --target, by two tests: one that takes each evaluation as if it were the only
  one, and one that is corrected for looking at all of them
  (statistics.p_values_of_looks).

  The suffixes name axes: R runs, L looks at them (evaluations).

  Args:
    sample: the entry.
    metric: the name of the figure.
    args: the arguments of the command.

  Returns:
    The 'entry', its number of 'runs' and of 'looks'; the first such 'step' by
    the first test with its 'p', and the p-value there by the second test,
    'p_counted'; and the first such 'counted_step' by the second test. What is
    not known, or never comes, is None.
  """
  # The looks are the evaluations that all runs have.
  curves = [run.curves[metric] for run in sample.runs]
  shared_steps: list[int] = []
  if curves:
    steps_of_curves = [set(curve) for curve in curves]
    shared_steps = sorted(set.intersection(*steps_of_curves))
  row: dict[str, Any] = {
      'entry': sample.name, 'runs': sample.group.num_runs,
      'looks': len(shared_steps), 'step': None, 'p': None, 'p_counted': None,
      'counted_step': None}
  if not shared_steps:
    return row

  # Test the mean loss at each look. There is no test if the noise is unknown.
  losses_by_run = []
  for curve in curves:
    losses_by_run.append([curve[step] for step in shared_steps])
  losses_RL = np.array(losses_by_run)
  looks = statistics.p_values_of_looks(losses_RL, args.target, args.sd)
  if looks is None:
    return row

  # Find the first look that passes each test.
  for name, p_L in (('step', looks.p), ('counted_step', looks.p_counted)):
    passing = np.flatnonzero(p_L <= args.alpha)
    if len(passing):
      row[name] = shared_steps[passing[0]]
  if row['step'] is not None:
    index = shared_steps.index(row['step'])
    row |= {'p': float(looks.p[index]),
            'p_counted': float(looks.p_counted[index])}
  return row


# The printed answer.


def render_table(answer: Mapping[str, Any]) -> str:
  """Returns the answer of `judge_entries` as a table for a terminal: a row for
  each comparison, or with --target one for each entry."""
  cells = [_cells_of_steps(row) for row in answer['steps']]
  cells += [_cells_of_comparison(row, answer['metric'])
            for row in answer['comparisons']]
  return page.table('referee', '', cells).text()


def _cells_of_steps(row: Mapping[str, Any]) -> dict[str, page.Cell]:
  """Returns the cells, by column, of an entry's row of the table of --target:
  the first step at which the entry is shown to be below the target."""
  return {
      'entry': page.label(row['entry']), 'runs': page.count(row['runs']),
      'evaluations': page.count(row['looks']),
      'first below': page.count(row['step']),
      'p': page.p_value(row['p']),
      'p of all looks': page.p_value(row['p_counted']),
      'first below, looks counted': page.count(row['counted_step'])}


def _cells_of_comparison(row: Mapping[str, Any], common_metric: str
                         ) -> dict[str, page.Cell]:
  """Returns the cells, by column, of a comparison's row of the table.

  Args:
    row: the comparison, a row of the answer's 'comparisons'.
    common_metric: the figure by which the answer compares. A row names its
      figure only where it is another, since the paragraph names this one.
  """
  figure = steps = unlike = ''
  if row['metric'] != common_metric:
    figure = row['metric']
  if row.get('step') != row.get('base_step'):
    steps = f'{row["step"]} and {row["base_step"]}'
  if row.get('unlike'):
    unlike = 'yes'
  runs_to_decide = None
  if row['verdict'] == decide.NONE_SHOWN:
    runs_to_decide = row.get('runs_needed')
  return {
      'entry': page.label(row['entry']),
      'compared with': page.label(row['base']),
      'figure': page.label(figure), 'steps': page.label(steps),
      'verdict': page.label(row['verdict']), 'not alike': page.label(unlike),
      'difference': page.effect(row, '+.5f'), 'p': page.p_value(row['p']),
      'corrected p': page.p_value(row['p_corrected']),
      'runs': page.label(f'{row["runs"]} and {row["base_runs"]}'),
      'could show': page.number(row.get('detectable'), '.5f'),
      'runs to decide': page.count(runs_to_decide),
      'test': page.label(row['test'])}


def _summarize_comparisons(answer: Mapping[str, Any], args) -> str:
  """Returns a paragraph that sums the comparisons up, for a reader in a hurry.

  Args:
    answer: the answer of `judge_entries`.
    args: the arguments of the command.
  """
  # The comparisons, and how certain the verdicts are.
  rows = answer['comparisons']
  beside = f'with {rows[0]["base"]}'
  if args.successive:
    beside = 'of each entry with the one before it'
  chance = 'any of them is'
  if args.uncorrected:
    chance = 'a single one, were it the only one, is'
  sentences = [
      f'{format_count(len(rows), "comparison")} by {answer["metric"]}, '
      f'{beside}; the '
      f'probability that {chance} called better or worse by chance is at most '
      f'{answer["alpha"]:.3g}.']

  # Which entries are better or worse, and how many show no difference.
  for verdict in (decide.BETTER, decide.WORSE, decide.NONE_SHOWN,
                  decide.NO_NOISE):
    names = [row['entry'] for row in rows if row['verdict'] == verdict]
    listed = ''
    if verdict in (decide.BETTER, decide.WORSE):
      listed = f' ({", ".join(names)})'
    if names:
      sentences.append(f'{verdict.capitalize()}: {len(names)}{listed}.')

  sentences += _say_what_is_not_shown(rows)
  sentences += answer['unlike']
  if answer['alike']:
    titles = [certificate.QUANTITIES[name].title for name in answer['alike']]
    sentences.append(f'Alike of all entries: {", ".join(titles)}.')
  if answer['unknown']:
    sentences.append(
        'Unknown of every entry, and so not compared: '
        f'{certificate.list_with_columns(answer["unknown"])}.')
  is_any_unknown = any(row.get('unknown') for row in rows)
  if is_any_unknown:
    sentences.append('What is unknown can be told by the CSV of --given, in '
                     'columns of these names.')
  sentences += [f'Note: {note}.' for note in answer['notes']]
  return ' '.join(sentences)


def _say_what_is_not_shown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns sentences on the comparisons that found no difference: the
  differences that their runs could have shown, and noise that is not known.

  Args:
    rows: the answer's 'comparisons'.
  """
  sentences = []
  detectable = [row['detectable'] for row in rows
                if row['verdict'] == decide.NONE_SHOWN and 'detectable' in row]
  if detectable:
    sentences.append(
        'Where no difference is shown, the runs would have found one of '
        f'{min(detectable):.2g} to {max(detectable):.2g} with a probability '
        f'of {_POWER:.0%}; a smaller one may be there.')
  if any(row['verdict'] == decide.NO_NOISE for row in rows):
    sentences.append(
        'The noise is unknown where an entry has fewer than '
        f'{statistics.MIN_SEEDS} runs: --pooled takes that of all entries, and '
        '--sd one that is known.')
  return sentences


def _summarize_steps(answer: Mapping[str, Any], target: float) -> str:
  """Returns a paragraph on the first steps below a target.

  Args:
    answer: the answer of `judge_entries`.
    target: the loss that is to be reached.
  """
  # Each of these entries is below by the test that takes an evaluation as if it
  # were the only one. The test that counts all looks finds a step that is the
  # same or later (by so many steps of training), or none.
  below = [row for row in answer['steps'] if row['p'] is not None]
  lost = [row['entry'] for row in below if row['counted_step'] is None]
  delays = [row['counted_step'] - row['step'] for row in below
            if row['counted_step'] is not None]
  later = [delay for delay in delays if delay]
  sentences = [
      f'{len(below)} of {len(answer["steps"])} entries have an evaluation '
      f'whose mean {answer["metric"]} is below {target:g} at a level of '
      f'{answer["alpha"]:g}. With all looks at the runs counted, '
      f'{len(delays) - len(later)} are below from the same step on, '
      f'{len(later)} later, and {len(lost)} at none.']
  if later:
    sentences.append(f'Those that are later are so by {min(later)} to '
                     f'{max(later)} steps.')
  if lost:
    sentences.append(f'At none: {join_choices(lost)}.')
  sentences += [f'Note: {note}.' for note in answer['notes']]
  return ' '.join(sentences)
