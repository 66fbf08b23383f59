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

from common.errors import require
from tools.compare import curves, layout, outcomes, page, phases
from tools.compare import plan as plans
from tools.compare import results as results_lib

# What is compared of two verdicts on a variant, and by what share figures may
# differ that two machines have computed.
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
    """Returns the outcomes of the runs of a phase, in order.

    Args:
      folder: the name of the folder of the phase.
      runs: the runs.

    Raises:
      RunsAreMissing: where one of them has no outcome.
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
  """Returns what results.json has, with everything that follows from the runs
  computed from them.

  Args:
    workdir: the folder of the study.
    frozen: its plan.

  Returns:
    The results, and what they say beside the saved ones: in 'missing', why no
    later phase is known; in 'unlike_saved', a sentence for each verdict that
    results.json has otherwise.

  Raises:
    RequestError: where the figures of a run have changed since it ended.
  """
  _check_figures_unchanged(workdir)
  saved = results_lib.load(workdir)

  # The phases, as far as there are runs. A phase that lacks some has added the
  # outcomes of the others by then.
  trainer, missing = RunsOnDisk(workdir, frozen), ''
  state = phases.StudyState(trainer)
  try:
    for state_so_far in phases.run_phases(frozen, trainer, anyway=True):
      state = state_so_far
  except RunsAreMissing as error:
    missing = str(error)
  state.outcomes = [
      run for run in state.outcomes if run.phase in state.finished]

  # The code that trained the runs is known where they were trained.
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
  """Raises RequestError where the figures of a run are not those with which it
  ended, by the ledger of the study."""
  with layout.StudyLedger(workdir) as ledger:
    hash_of_run = ledger.hash_of_ended_runs()
  # A run that is taken up again has ended before, and is under way now.
  for folder in results_lib.folders(workdir):
    for run in _runs_of_ledger(folder):
      if run.state in (layout.PENDING, layout.RUNNING):
        hash_of_run.pop((folder.name, run.point, run.seed), None)
  changed = []
  for (folder, point, seed), hash_at_end in hash_of_run.items():
    path = layout.run_folder(
        pathlib.Path(workdir) / folder, point=point, seed=seed)
    # One that is gone, or trained anew now, has no figures yet.
    if path.is_dir() and layout.hash_figures(path) != hash_at_end:
      changed.append(f'{folder}/{point}, seed {seed}')
  require(not changed, f'{workdir}: the figures of {len(changed)} runs have '
          f'changed since these ended ({_name_some(changed)}): put back what '
          'they were, or move their folders away, and `run` trains them anew, '
          'which the report will tell')


def compare_verdicts(saved: Mapping[str, Any], computed: Mapping[str, Any]
                     ) -> list[str]:
  """Returns a sentence for each verdict of which two results of a study
  disagree.

  Args:
    saved: what results.json has.
    computed: the same, computed from the runs.
  """
  saved_rows, sentences = _verdicts_by_name(saved), []
  for name, row in _verdicts_by_name(computed).items():
    if name not in saved_rows:
      continue
    differences = _differing_figures(saved_rows[name], row)
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
  """Returns 'FIGURE SAVED and not COMPUTED' of each figure in which two
  verdicts on a variant differ."""
  differences = []
  if saved['verdict'] != computed['verdict']:
    differences.append(f'{saved["verdict"]} and not {computed["verdict"]}')
  for name in _FIGURES_OF_VERDICT:
    old, new = saved[name], computed[name]
    if old is None or new is None:
      is_same = old is new
    else:
      is_same = math.isclose(old, new, rel_tol=LARGEST_RELATIVE_ERROR,
                             abs_tol=1e-12)
    if not is_same:
      old_text, new_text = (page.number(x, '.4g').text for x in (old, new))
      differences.append(f'{name} {old_text} and not {new_text}')
  return differences


def _name_some(names: Sequence[str]) -> str:
  """Returns the first of some names, and how many more there are."""
  text = '; '.join(names[:MOST_RUNS_NAMED])
  if len(names) > MOST_RUNS_NAMED:
    text += f'; and {len(names) - MOST_RUNS_NAMED} more'
  return text
