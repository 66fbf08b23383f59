"""recompute: what a study found, computed from its runs each time it is told.

results.json is what `run` saved of it. Reports, states and bundles believe none
of its effects: they go through the phases again, with the outcomes that lie on
disk, and take from it what the runs do not tell (the code, devices and versions
that trained them). The ledger of the study has a hash of the figures of each
run from when it ended: a run whose figures have changed since is refused.
"""

from collections.abc import Mapping, Sequence
import math
import pathlib
from typing import Any

from common.errors import format_count, require
from tools.compare import curves, layout, outcomes, page, phases
from tools.compare import plan as plans
from tools.compare import results as results_lib

# The figures of two verdicts on a variant that are compared, and the share by
# which they may differ where two machines have computed them.
_FIGURES_OF_VERDICT = ('effect', 'low', 'high', 'p', 'p_corrected')
LARGEST_RELATIVE_ERROR = 1e-6
MOST_RUNS_NAMED = 3  # of those that a message is about


class RunsAreMissing(Exception):
  """A phase asked for runs that have not ended, or that are gone."""


class RunsOnDisk:
  """A trainer that trains nothing: it returns the outcomes of the runs that a
  phase asks for as they lie on disk (phases.StudyState.trainer).

  Args:
    workdir: the folder of the study.
    frozen: its plan.
  """

  def __init__(self, workdir, frozen: plans.FrozenPlan):
    self._workdir = pathlib.Path(workdir)
    self._frozen = frozen

  def train(self, folder: str, runs: Sequence[phases.Run]
            ) -> list[plans.Outcome]:
    """Returns the outcomes of the runs that a phase asks for, in order. Nothing
    is trained: they are read from disk.

    Args:
      folder: the name of the folder of the phase.
      runs: the runs.

    Raises:
      RunsAreMissing: if one of them has no outcome.
    """
    path = self._workdir / folder
    if not (path / 'sweep.json').is_file():
      raise RunsAreMissing(f'{folder} was not begun')
    sweep = curves.read_sweep(
        path, layout.load_sweep_description(path),
        ledger_runs=_runs_of_ledger(path), reads_configs=False)
    outcomes_of_runs, missing = outcomes.read_outcomes(
        self._frozen, sweep, runs)
    if missing:
      raise RunsAreMissing(f'{folder}: {_name_some(missing)}')
    return outcomes_of_runs

  def predicted(self, phase: str, rows: Sequence) -> Mapping[str, Any]:
    """Returns what was predicted of a phase before it ran, which is never
    computed anew.

    Raises:
      RunsAreMissing: where nothing was, so that the phase has not begun.
    """
    for record in self._frozen.predictions:
      if record['plan'] == self._frozen.hash:
        return record
    raise RunsAreMissing(f'{phase} was not predicted')


def recompute_results(workdir, frozen: plans.FrozenPlan) -> dict[str, Any]:
  """Computes the results of a study again from its runs, so that a report does
  not depend on what results.json says.

  Args:
    workdir: the folder of the study.
    frozen: the plan of the study.

  Returns:
    The results in the form of results.json. In addition, 'missing' says why
    later phases are not known, or '', and 'unlike_saved' has a sentence for
    each verdict that differs in results.json.

  Raises:
    RequestError: if the figures of a run have changed since it ended.
  """
  _check_figures_unchanged(workdir)
  saved = results_lib.load(workdir)

  # Go through the phases, as far as there are runs. A phase that lacks some
  # has added the outcomes of its other runs by then, which are taken out again.
  trainer = RunsOnDisk(workdir, frozen)
  state = phases.StudyState(trainer)  # of a study that lacks its first phase
  missing = ''
  try:
    for state_so_far in phases.run_phases(frozen, trainer, anyway=True):
      state = state_so_far
  except RunsAreMissing as error:
    missing = str(error)
  state.outcomes = [
      run for run in state.outcomes if run.phase in state.finished]

  # The saved results know best which code trained the runs, since they were
  # written where that happened.
  provenance = saved['provenance']
  if not saved['study']:
    provenance = results_lib.describe_provenance(workdir)
  tree = results_lib.make_tree(
      workdir=workdir, frozen=frozen, state=state, provenance=provenance)
  return results_lib.NOTHING | tree | {
      'missing': missing, 'unlike_saved': compare_verdicts(saved, tree)}


def _runs_of_ledger(path: pathlib.Path) -> list[layout.Run]:
  """Returns the runs of a phase with their states, by the ledger in its folder;
  [] in a bundle, which has none, as all of its runs have ended."""
  if not (path / layout.Ledger.file_name).is_file():
    return []
  return layout.load_ledger_runs(path)


def _check_figures_unchanged(workdir) -> None:
  """Checks that no figures of a study's runs have changed since the runs ended.
  When a run ends, a hash of its figures is written to the ledger, the database
  of the study.

  Args:
    workdir: the folder of the study.

  Raises:
    RequestError: if a hash is not that of the figures on disk.
  """
  with layout.StudyLedger(workdir) as ledger:
    hash_of_run = ledger.hash_of_ended_runs()

  # Leave out runs that have ended before, but are being trained again now.
  for folder in results_lib.folders(workdir):
    for run in _runs_of_ledger(folder):
      if run.state in (layout.PENDING, layout.RUNNING):
        hash_of_run.pop((folder.name, run.point, run.seed), None)
  changed = []
  for (folder, point, seed), hash_at_end in hash_of_run.items():
    path = layout.run_folder(
        pathlib.Path(workdir) / folder, point=point, seed=seed)
    # A run whose folder was removed has no figures.
    if path.is_dir() and layout.hash_figures(path) != hash_at_end:
      changed.append(f'{folder}/{point}, seed {seed}')
  runs = format_count(len(changed), 'run')
  require(not changed, f'{workdir}: the figures of {runs} have changed since '
          f'their end ({_name_some(changed)}): put back what they were, or '
          'move their folders away, and `run` trains them anew, which the '
          'report will tell')


def compare_verdicts(saved: Mapping[str, Any], computed: Mapping[str, Any]
                     ) -> list[str]:
  """Returns a sentence for each verdict on which the saved results of a study
  and those that follow from its runs disagree.

  Args:
    saved: the contents of results.json.
    computed: the results computed from the runs, in the same form.
  """
  # A verdict that only one of the two has is no disagreement.
  saved_verdicts = _verdicts_by_name(saved)
  sentences = []
  for name, verdict in _verdicts_by_name(computed).items():
    if name not in saved_verdicts:
      continue
    differences = _differing_figures(saved_verdicts[name], verdict)
    if differences:
      sentences.append(f'{", ".join(name)}: {", ".join(differences)}')
  return sentences


def _verdicts_by_name(results: Mapping[str, Any]
                      ) -> dict[tuple[str, str, str], Mapping[str, Any]]:
  """Returns the verdicts of all phases that compare variants, by the names of
  the phase, the variant and the measure."""
  verdicts = {}
  for phase in phases.PHASES:
    for row in results.get(phase, ()):
      # The phase `noise` compares no variants.
      if 'verdict' in row:
        verdicts[phase, row['variant'], row['measure']] = row
  return verdicts


def _differing_figures(saved: Mapping[str, Any], computed: Mapping[str, Any]
                       ) -> list[str]:
  """Returns a text 'FIGURE SAVED and not COMPUTED' for each figure in which two
  verdicts on a variant differ.

  Args:
    saved: the verdict in results.json, as decide.Verdict has it.
    computed: the verdict that follows from the runs.
  """
  differences = []
  if saved['verdict'] != computed['verdict']:
    differences.append(f'{saved["verdict"]} and not {computed["verdict"]}')
  for name in _FIGURES_OF_VERDICT:
    saved_value, computed_value = saved[name], computed[name]
    # None is a figure that is not known. Numbers may differ by rounding, as on
    # another machine.
    if saved_value is None or computed_value is None:
      is_same = saved_value is computed_value
    else:
      is_same = math.isclose(
          saved_value, computed_value, rel_tol=LARGEST_RELATIVE_ERROR,
          abs_tol=1e-12)
    if not is_same:
      saved_text = page.number(saved_value, '.4g').text
      computed_text = page.number(computed_value, '.4g').text
      differences.append(f'{name} {saved_text} and not {computed_text}')
  return differences


def _name_some(names: Sequence[str]) -> str:
  """Returns the first of some names, and how many more there are."""
  text = '; '.join(names[:MOST_RUNS_NAMED])
  if len(names) > MOST_RUNS_NAMED:
    text += f'; and {len(names) - MOST_RUNS_NAMED} more'
  return text
