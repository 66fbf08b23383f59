"""How a run begins, in the order in which it happens; the same for one run, for
a group of runs that train as one program, and for a dry run.

  1. `check_request`: everything wrong in it is said before any device work.
  2. `build_on_devices`: the run on its mesh.
  3. `check_data`: the data are those that the run was trained on so far.
  4. `find_starting_point`: the state and the step that it goes on from, or that
     it has ended.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from etils import epath
from jax.sharding import Mesh
import ml_collections

from common.errors import RequestError, require
from training import objectives, parameters, preflight, runs, writer
from training.data import tokenizers
from training.distributed import devices
from training.objectives import pipeline
from training.runs import ModelConfig, TrainState
from training.workdir import checkpoints, provenance, run_config


class RunRequest(NamedTuple):
  """A run that was asked for, once it is known that it can be trained.

  Attributes:
    given_config: the config of the run, as it was given.
    config: the config with what follows from the training data filled in.
    workdir: the folder of the run.
    tokenizer: its tokenizer.
    model: its resolved config.model.
    derived: the fields that were derived, by dotted name.
    changes: the fields in which the config differs from that of the run in the
      workdir.
    allow_config_change: whether the run may go on all the same.
  """
  given_config: ml_collections.ConfigDict
  config: ml_collections.ConfigDict
  workdir: epath.Path
  tokenizer: tokenizers.Tokenizer
  model: ModelConfig
  derived: dict
  changes: Sequence[run_config.FieldChange]
  allow_config_change: bool

  def describe_changes(self) -> list[str]:
    """Returns lines that say what differs from the last start of the run: the
    fields of the config, and the code."""
    starts = run_config.load_starts(self.workdir)
    lines = provenance.list_code_changes(starts)
    if self.changes:
      lines.insert(0, run_config.format_changes(self.changes))
    return lines


def check_request(config: ml_collections.ConfigDict, workdir: epath.Path,
                  by_hand: Iterable[str] = (), allow_config_change: bool = False
                  ) -> RunRequest:
  """Checks everything that can be wrong in the request for a run before any
  device is used, and completes the request.

  Args:
    config: the config of the run.
    workdir: the folder of the run.
    by_hand: the names of the fields that were set on the command line. Such a
      field is refused if the model does not read it.
    allow_config_change: whether a run may be resumed with another config.

  Returns:
    The request with all that follows from it, such as the complete model
    config.

  Raises:
    RequestError: for anything that the run could not honour.
  """
  # Find faults in the config and in the files that it names. The cheap checks
  # are first.
  preflight.check_workdir_is_writable(workdir)
  preflight.check_config(config, by_hand)
  pipeline.check_sources(config)
  parameters.check_init_from(config.init_from)

  # Complete the config: the labels, the tokenizer and the sizes of the model.
  config_with_labels = objectives.fill_in_labels(config)
  tokenizer = tokenizers.load(config_with_labels.data.tokenizer)
  parameters.check_tokenizer_of_weights(config_with_labels, tokenizer)
  model, derived = runs.resolve_model(config_with_labels, tokenizer)

  # A run that is resumed must have the same config, unless it may change.
  changes = run_config.list_changes(workdir, config_with_labels,
                                    derived=derived)
  run_config.refuse_changes(changes, allow_config_change)
  return RunRequest(
      given_config=config, config=config_with_labels, workdir=workdir,
      tokenizer=tokenizer, model=model, derived=derived, changes=changes,
      allow_config_change=allow_config_change)


def build_on_devices(request: RunRequest, mesh: Mesh | None = None) -> runs.Run:
  """Builds the mesh, the module and the optimiser of a run, and checks that its
  training state fits into memory. Nothing is computed yet.

  Args:
    request: the checked request, with the config of the run and its model.
    mesh: the mesh of devices; None: that of config.mesh, over all devices.

  Raises:
    RequestError: where the mesh does not fit the run, or the training state
      does not fit into the memory of the devices.
  """
  run = runs.build(request.config, model=request.model, mesh=mesh)
  runs.check_state_fits(run.abstract_state, run.mesh)
  return run


def check_data(request: RunRequest, contents: dict[str, str]) -> list[str]:
  """Checks that the data of a run are the same as when it was started.

  Args:
    request: the checked request for the run.
    contents: a hash of what each data source holds now, by its name, as
      pipeline.digest_contents returns them.

  Returns:
    A line for the user about each source that has changed.

  Raises:
    RequestError: where a source has changed and that is not allowed.
  """
  starts = run_config.load_starts(request.workdir)
  return provenance.check_data(starts, data=contents,
                               allowed=request.allow_config_change)


class StartingPoint(NamedTuple):
  """The state and the step from which a run goes on, or how it has ended.
  Attributes:
    state: the state of the newest good checkpoint; None where the run begins.
    step: the index of the next batch.
    code: writer.DIVERGED or writer.ENDED_EARLY of a run that has ended; 0.
    sentence: why the run does not go on; '' where it does.
  """
  state: TrainState | None
  step: int
  code: int = 0
  sentence: str = ''


def find_starting_point(request: RunRequest, run: runs.Run,
                        saved: checkpoints.Checkpoints, label: str = ''
                        ) -> StartingPoint:
  """Restores the newest good checkpoint of a run, and returns the step from
  which the run goes on, or how it has ended.

  Args:
    request: the request of the run.
    run: the run, alone on its devices.
    saved: its checkpoints.
    label: the text before each line that is printed; '' for a run that trains
      alone.

  Raises:
    RequestError: where the checkpoint is not of such a model, or of a later
      step than the last that was asked for.
  """
  try:
    restored = parameters.restore_run(run, saved)
  except checkpoints.CheckpointMismatch as error:  # which lists the shapes
    advice = run_config.advise_on_incompatible(request.changes)
    raise RequestError(advice or str(error)) from error
  if restored is None:
    return StartingPoint(state=None, step=0)

  state = restored.state
  step = restored.record['next_batch']
  last_step = request.config.train.steps
  require(step <= last_step, f'train.steps is {last_step}, and the run in '
          f'{request.workdir} has trained {step} steps: ask for more, or take '
          'another --workdir')

  # A run that diverged does not go on, unless its config has changed; nor does
  # one that was stopped early.
  divergence = writer.explain_if_diverged(state, request.config)
  if divergence and not request.changes:
    return StartingPoint(state=state, step=step, code=writer.DIVERGED,
                         sentence=divergence)
  early_end = writer.explain_if_ended_early(request.config, record=saved.best,
                                            step=step)
  if early_end:
    return StartingPoint(state=state, step=step, code=writer.ENDED_EARLY,
                         sentence=early_end)

  # Any other goes on from its step.
  if devices.is_primary_process() and 0 < step < last_step:
    print(f'{label}going on from step {step}')
    for change in checkpoints.list_environment_changes(restored.record):
      print(f'{label}not bit for bit, since this has changed: {change}')
  return StartingPoint(state=state, step=step)


def create_first_state(run: runs.Run) -> TrainState:
  """Makes the training state of a run before its first step, and prints where
  the parameters come from: they are read from init_from, or drawn at random.

  Args:
    run: the run, built on its devices.
  """
  config = run.config
  state = parameters.create_state(run, config.init_from)
  if not devices.is_primary_process():
    return state
  if config.init_from:
    print(f'starting from the parameters in {config.init_from} (init_from)')
    return state
  # The parameters may be drawn from another seed than the order of the data.
  seed = f'seed {config.seed}'
  if config.init_seed:
    seed = f'init_seed {config.init_seed} and {seed}'
  print(f'starting from random parameters, drawn from {seed}')
  return state
