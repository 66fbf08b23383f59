"""The program that the training loop trains: one run, or several runs at once.
"""

from collections.abc import Sequence
import contextlib
from typing import Any

import jax

from training import runs
from training.runs import TrainState


class Program:
  """One run on its mesh.

  A group of runs (vectorised.RunGroup) is a subclass: its arrays have a leading
  axis of runs, which `split_by_run` and `figures_of_run` take apart, and
  `join_runs` puts together.

  Attributes:
    run: the run; in a group, one of its runs alone.
    hooks: hooks of the user's own, which the loop calls after the usual ones.
    train_step: jitted step(state, batch) -> (state, figures), to which the
      state is donated.
    eval_step: jitted step(params, batch) -> {figure: objectives.Mean}.
    title: what is printed before the description of the run.
    figures: what each line of metrics says beside the figures of the step.
  """

  def __init__(self, run: runs.Run, hooks: Sequence[Any] = ()):
    self.run = run
    self.hooks = list(hooks)
    self.title = ''
    self.figures: dict[str, Any] = {}
    self.train_step = self.make_train_step()
    self.eval_step = self.make_eval_step()

  def make_train_step(self) -> jax.stages.Wrapped:
    return self.run.train_step([hook.trace for hook in self.hooks])

  def make_eval_step(self) -> jax.stages.Wrapped:
    return self.run.eval_step()

  @property
  def devices(self) -> Sequence[jax.Device]:
    """The devices that the program uses."""
    return list(self.run.mesh.devices.flat)

  def context(self) -> contextlib.AbstractContextManager:
    """Returns the context in which everything is traced."""
    return self.run.context()

  def new_state(self) -> TrainState:
    """Returns the state before the first step."""
    return self.run.new_state()

  def put(self, *batches: Any) -> Any:
    """Returns a batch on the devices.

    Args:
      *batches: the batch of each data seed; one run has one.
    """
    batch, = batches
    return self.run.put(batch)

  def split_by_run(self, tree: Any) -> Sequence[Any]:
    """Returns the part of each run in a tree of arrays, such as a state."""
    return [tree]

  def join_runs(self, trees: Sequence[Any]) -> Any:
    """Returns the tree that `split_by_run` would take apart into `trees`."""
    tree, = trees
    return tree

  def figures_of_run(self, figures: Any, row: int) -> Any:
    """Returns what one run has of figures, or of sums, on the host."""
    del row  # there is one run
    return figures
