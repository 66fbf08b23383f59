"""What a study says in sentences: its answer, how far it is, how it was done.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tools.compare import findings, tuning, units
from tools.compare import plan as plans
from tools.compare.study_report import numbers
from tools.compare.study_report import settings
from tools.compare.study_report.costs import changed, value
from tools.compare.study_report.record import Record
from tools.compare.study_report.tables import OPEN, STOPPED, UNSTABLE, standing


def listed(words: Sequence[str], last: str = 'and') -> str:
  """'a', 'a and b', 'a, b and c'."""
  *most, end = words
  return f'{", ".join(most)} {last} {end}' if most else end


def answer(record: Record) -> str:
  """The answer to the question, as far as there is one, in a sentence."""
  variants = record.plan.variants
  by = {v: standing(record, v) for v in variants}
  groups: dict[str, list[str]] = {}
  for variant, word in by.items():
    groups.setdefault(word, []).append(variant)
  announced = record.results['announced']
  if record.finished == ('noise',) and announced and not announced['enough']:
    return ('The study has no answer, since it could hardly find one: '
            + announced['sentence'])
  if 'screen' not in record.finished:
    return 'The study has no answer yet: ' + progress(record)
  if 'confirm' not in record.finished and OPEN in groups:
    return ('The study has no answer yet: the confirmation of '
            f'{listed(groups[OPEN])} is not over.')
  told = []
  for word, says in (
      (findings.BETTER, '{} better than {base}'),
      (findings.WORSE, '{} worse than {base}'),
      (findings.DISAGREE, '{} better at some sizes and worse at others'),
      (findings.UNSTABLE, '{} unstable'),
      (findings.NONE_SHOWN, 'no difference from {base} is shown of {names}'),
      (UNSTABLE, 'the screen stopped {the} as unstable'),
      (STOPPED, 'the screen stopped {the}, since it showed no difference '
       'from {base}')):
    if word in groups:
      names = listed([_with_effect(record, v) for v in groups[word]])
      one = len(groups[word]) == 1
      # A variant may be called 'none'.
      told.append(says.format(
          f'{names} {"is" if one else "are"}', names=names,
          the=f'the variant{"" if one else "s"} {names}',
          base=record.plan.base))
  sentence, primary = '; '.join(told), record.plan.primary
  unit = units.said(record.frozen, primary, ' (', ')')
  return f'By {primary.name}{unit}, {sentence}.'


def _with_effect(record: Record, variant: str) -> str:
  row = record.verdict(variant)
  if row is None or not numbers.known(row['effect']):
    return variant
  effect = numbers.with_interval(row['effect'], row['low'], row['high'])
  if _excluded(record, row):
    effect += f': an effect of {record.plan.effect:g} is excluded'
  return f'{variant} ({effect})'


def _excluded(record: Record, row: Mapping[str, Any]) -> bool:
  """Whether a variant of which no difference is shown cannot have one of
  EFFECT: its interval lies within, and does so where it is as wide as makes
  the intervals of all confirmed variants hold at once (Bonferroni)."""
  if row['verdict'] != findings.NONE_SHOWN or not (
      numbers.known(row['low']) and numbers.known(row['high'])):
    return False
  from scipy.stats import t
  plan, df = record.plan, row['n'] - 1
  family = sum(own['primary'] for own in record.results['confirm'])
  wider = t.isf(plan.alpha / (2 * family), df) / t.isf(0.025, df)
  half = (row['high'] - row['low']) / 2 * max(wider, 1.0)
  return abs(row['effect']) + half < plan.effect


def progress(record: Record) -> str:
  """Which phases are over and which are not."""
  over = record.finished
  left = [name for name in plans.PHASES if name not in over]
  done = f'{listed(over)} {"is" if len(over) == 1 else "are"} over' if over \
      else 'the plan is frozen and no phase is over'
  return (f'{done}; {listed(left)} {"is" if len(left) == 1 else "are"} not.'
          if left else f'{done}.')


def warnings(record: Record) -> list[str]:
  """What a reader must know before the figures."""
  told = []
  if len(record.finished) < len(plans.PHASES):
    told.append(f'This study is not over: {progress(record)}')
  if not _as_planned(record):
    told.append('What ran is not what was planned at first: see "Planned and '
                'run".')
  announced = record.results['announced']
  if announced and not announced['enough']:
    told.append(announced['sentence'] + ' That no difference is shown does not '
                'mean that there is none.')
  edges = [row for row in record.results['tuned'] if row['at_edge']]
  if edges:
    names = list(dict.fromkeys(row['variant'] for row in edges))
    told.append(f'Tuning ended at the edge of what was tried for '
                f'{listed(names)}: a better value may lie beyond.')
  return told


def _as_planned(record: Record) -> bool:
  return (record.results['as_planned']['same']
          and not record.frozen.amendments
          and record.said == record.frozen.hash
          == record.results['study']['hash'])


def as_planned(record: Record) -> list[str]:
  """Whether what ran is what was planned, and what differs."""
  if _as_planned(record):
    return ['What ran is what was planned: the hashes are equal, and nothing '
            'was changed after the plan was frozen.']
  return list(record.results['as_planned']['differences']) or [
      'The hashes are not equal: a file was changed by hand.']


def methods(record: Record) -> list[str]:
  """The paragraphs that a paper needs to say how this was done."""
  return [_design(record), _models(record), _training(record),
          _tuning(record), _tests(record)]


def _design(record: Record) -> str:
  plan = record.plan
  measures = listed([
      f'{m.name} ({m.figure} on {m.workload}, '
      f'{units.said(record.frozen, m, "in ", ", ")}{m.better} is better)'
      for m in plan.measures])
  matched = (f'Each variant has the {_MATCHED.get(plan.match, plan.match)} of '
             'the base at each size, for '
             f'which {plan.match_field or "model.d_ff"} was solved.'
             if plan.match else 'Sizes were not matched.')
  return (
      f'We compared {listed(plan.variants)} with {plan.base} at '
      f'{numbers.some(len(plan.sizes), "size")} ({listed(plan.sizes)}) on '
      f'{listed(plan.workloads)}. {matched} We measured {measures}; '
      f'{plan.primary.name} was the primary measure. The plan was frozen '
      f'before any run and has the hash {record.frozen.hash}.')


_MATCHED = {'params': 'parameter count',
            'active_params': 'count of active parameters',
            'flops_per_token': 'FLOPs a token'}


def _models(record: Record) -> str:
  plan = record.plan
  row = lambda variant, size, workload=plans.TEXT: record.frozen.point(
      variant, size, workload)
  sizes = [
      f'{size} ({own["params"]:,} parameters, '
      f'{own["flops_per_token"]:.3g} FLOPs a token, {own["tokens"]:,.0f} tokens'
      f'{_beside(own["changes"])})'
      for size in plan.sizes for own in [row(plan.base, size)]]
  text = row(plan.base, plan.sizes[0])['changes']
  works = [
      f'{name} ({changed(_differing(own, text)) or "nothing"})'
      for name in plan.workloads if name != plans.TEXT
      for own in [row(plan.base, plan.sizes[0], name)['changes']]]
  variants = [
      f'{name} ({changed(settings.alone(record, row(name, plan.sizes[0])))})'
      for name in plan.variants]
  return (f'The base at each size, on text: {"; ".join(sizes)}. '
          + (f'What a workload changes, here at {plan.sizes[0]}: '
             f'{"; ".join(works)}. ' if works else '')
          + f'What each variant changes, here at {plan.sizes[0]}: '
          f'{"; ".join(variants)}.')


def _beside(changes: Mapping[str, Any]) -> str:
  return f', {changed(changes)}' if changes else ''


def _differing(own: Mapping[str, Any], other: Mapping[str, Any]
               ) -> dict[str, Any]:
  return {name: x for name, x in own.items()
          if name not in other or other[name] != x}


# What a paper says of a run; the rest of the config is in its own table.
_GROUPS = {'model.': 'Model', 'data.': 'Data', 'train.': 'Training',
           'optim.': 'Optimiser', 'eval.': 'Evaluation', '': 'Also'}


def _training(record: Record) -> str:
  """Every field that the base reads, where a variant does not change it."""
  told, left = [], settings.of_base(record)
  for prefix, word in _GROUPS.items():
    own = {name: left.pop(name) for name in [*left] if name.startswith(prefix)}
    words = [f'{name.removeprefix(prefix)} {value(x)}'
             for name, x in own.items() if x not in ('', [], (), None)]
    told += [f'{word}: {", ".join(words)}.'] if words else []
  return (f'The base at {record.plan.sizes[0]} on text, before tuning, with '
          'what its model derives; all that a size, a workload, a variant or '
          f'tuning does not change is the same in all runs. {" ".join(told)} '
          'Runs of the confirmation are evaluated every eval.every_steps steps '
          'and after the last one; those of all other phases after the last '
          'one alone.')


def _tuning(record: Record) -> str:
  plan, own = record.plan, record.plan.tuning
  grid = listed([f'{name} in {{{", ".join(map(value, values))}}}'
                 for name, values in own.fields.items()])
  groups: dict[str, list[str]] = {}
  for row in record.results['tuned']:
    edge = ', at the edge' if row['at_edge'] else ''
    what = (f'on {row["workload"]} at {row["size"]} {changed(row["changes"])}'
            f'{edge}')
    groups.setdefault(what, []).append(row['variant'])
  told = [f'{what} ({", ".join(names)})' for what, names in groups.items()]
  chosen = f' Chosen were: {"; ".join(told)}.' if told else ''
  return (
      f'The base and each variant had the same budget of tuning: {grid}, by '
      f'{tuning.kind(own)} with {numbers.some(plan.seeds.tune, "seed")}, at '
      f'{listed(plan.tuned_sizes or plan.sizes)}; {tuning.edges(own)}. '
      'Tuning used neither the seeds nor the held-out text of the '
      f'confirmation.{chosen}')


def _tests(record: Record) -> str:
  plan, seeds = record.plan, record.plan.seeds
  power = record.results['announced'] and record.results['announced']['power']
  announced = ('' if power is None else ', which both phases together were '
               f'announced to find with a power of {numbers.percent(power)}')
  return (
      'Seed by seed, all variants saw the same data in the same order. The '
      f'noise was measured on {numbers.some(seeds.noise, "pair")} of runs of '
      'the base that differ in their first parameters alone; an effect of '
      f'{units.amount(record.frozen, plan.effect)} on {plan.primary.name} was '
      f'wanted{announced}. '
      f'Variants were screened at {plan.sizes[0]} with '
      f"{numbers.some(seeds.screen, 'seed')} by Student's paired t-test, at a "
      f'false discovery rate of {plan.q:g} (Benjamini-Hochberg). Those that '
      'passed were confirmed at all sizes on '
      f'{numbers.some(seeds.confirm, "fresh seed")}: by the same test on each '
      "seed's mean over sizes, at a family-wise error of "
      f'{plan.alpha:g} (Holm), and with the same direction at all sizes. Runs '
      'that diverged are results: a variant of which more than '
      f'{numbers.percent(plan.unstable)} of the runs diverge, or that '
      "diverges more often than the base (McNemar's exact test), is called "
      'unstable. Secondary measures are corrected among themselves. Intervals '
      'are of 95 %; no phase shares a seed with another one.')
