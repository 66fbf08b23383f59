"""A hook: something that is done at named moments of a training run.

Evaluating, saving, reporting, stopping, profiling and the panel of the experts
are hooks (training/hooks.py). `train.hooks` adds hooks of your own, each a
subclass of `Hook` in a Python file:

    # my_hooks.py
    import optax
    from training.hook import Hook

    class HeadGradient(Hook):

      def trace(self, params, grads):
        return {'head_gradient': optax.tree.norm(grads['head'])}

    python train.py ... --config.train.hooks=my_hooks.py:HeadGradient
"""

import inspect
import os
from typing import Any

import jax
import ml_collections

from common.errors import check_choice, require
from training import plugins, progress
from training.program import Program
from training.runs import TrainState
from training.steps import TrainingBatches, CompiledPerShape
from training.writer import RunWriter


class Hook:
  """Does nothing at any moment; override the methods of the moments you want.

  Every process calls every hook, in the order of the hooks.
  """

  def check(self, loop: 'Loop') -> None:
    """Is called before anything is compiled.

    Raises:
      RequestError: for a request that the hook cannot honour.
    """

  def compile(self, loop: 'Loop') -> None:
    """Is called when the training step has been compiled."""

  def begin(self, loop: 'Loop') -> None:
    """Is called before the first step."""

  def before_step(self, loop: 'Loop') -> None:
    """Is called before the step after loop.n is dispatched."""

  def after_step(self, loop: 'Loop', figures: Any) -> None:
    """Is called when step loop.n was dispatched.

    Args:
      loop: the loop, whose state is that after the step.
      figures: what the step returned: arrays that may not be computed yet, so
        that to read them waits for the step.
    """

  def on_figures(self, loop: 'Loop', writer: RunWriter, n: int,
                 figures: dict[str, Any]) -> None:
    """Is called for each run when its figures of step `n` have been read, which
    is when the next step was dispatched."""

  def more_figures(self, loop: 'Loop', writer: RunWriter) -> dict[str, Any]:
    """Returns figures for the next line of metrics of a run, which is due."""
    return {}

  def on_evaluation(self, loop: 'Loop', writer: RunWriter, n: int,
                    figures: dict[str, Any]) -> None:
    """Is called for each run with the figures of its evaluation after step `n`.
    """

  def end(self, loop: 'Loop') -> None:
    """Is called after the last step."""

  def trace(self, params: Any, grads: Any) -> dict[str, jax.Array]:
    """Returns further figures that the compiled training step computes. It is
    called while the step is traced, so it must be made of JAX operations.

    Args:
      params: the parameters before the step.
      grads: the gradients of the parameters that are trained, as the optimiser
        gets them.

    Returns:
      {name: a number or a vector}. A vector is written to metrics as a list.
    """
    return {}


class Loop:
  """A run, or a group of runs, as it trains: what hooks are given.

  Attributes:
    program: what is trained.
    writers: the runs: what each writes, and how it ended.
    hooks: all hooks, in the order in which they are called.
    batches: the training batches.
    n: how many steps are done.
    state: the state after these steps.
    bar: shows the progress: loop.bar.say(text) prints a line above it.
    stopped: set it to True to end the loop after this step, as a signal does.
    train_step, eval_step: the program's, compiled for each shape of a batch.
  """

  def __init__(self, program: Program, writers: list[RunWriter],
               batches: TrainingBatches, state: TrainState, start: int):
    """Prepares the loop to go on from step `start`; nothing is compiled yet.

    Args:
      program: what is trained: one run, or several runs as one program.
      writers: the writer of each run, which writes its figures and checkpoints.
      batches: the batches to train on.
      state: the training state after `start` steps.
      start: the number of steps that are done.
    """
    self.program = program
    self.writers = writers
    self.batches = batches
    self.state = state
    self.n = start
    self.hooks: list[Hook] = []
    self.bar: Any = None
    self.stopped = False
    self.train_step = CompiledPerShape(program.train_step, batches.meter)
    self.eval_step = CompiledPerShape(program.eval_step, batches.meter)

  @property
  def config(self) -> ml_collections.ConfigDict:
    """The config of the run, or of the first run of a group."""
    return self.program.run.config

  @property
  def steps(self) -> int:
    """The last step of the runs, train.steps."""
    return self.config.train.steps

  @property
  def meter(self) -> progress.StepTimer:
    """The times of the steps."""
    return self.batches.meter

  @property
  def running_writers(self) -> dict[int, RunWriter]:
    """The runs that have not ended, by their row in the joint arrays."""
    return {row: writer for row, writer in enumerate(self.writers)
            if not writer.code}

  @property
  def ends(self) -> bool:
    """Whether no run trains after the steps that are done."""
    return self.stopped or self.n == self.steps

  def say(self, writer: RunWriter, text: str) -> None:
    """Prints a line about one of the runs."""
    if writer.label:
      text = f'{writer.label}: {text}'
    self.bar.say(text)


def load_hooks(config: ml_collections.ConfigDict) -> list[Hook]:
  """Loads the hooks that train.hooks names: objects of the user's own classes,
  whose methods the training loop calls between steps.

  Args:
    config: the config of the run. train.hooks is 'FILE.py:CLASS', or several of
      these with commas between them.

  Raises:
    RequestError: for a file that is missing or fails, and for a class that is
      not in the file.
  """
  hooks = []
  for name in filter(None, config.train.hooks.split(',')):
    # Execute the file, and remember its text, which the run records.
    file, _, class_name = name.partition(':')
    require(class_name != '', f'train.hooks has {name!r}: write FILE.py:CLASS')
    require(os.path.isfile(file), f'train.hooks has {name!r}: there is no file '
            f'{file!r}')
    module = plugins.run_user_file(file)
    plugins.remember_file(file, plugins.read_python_file(file))
    # Find the class among the hooks that the file defines or imports.
    class_of_name = {}
    for name_in_file, value in vars(module).items():
      is_hook = inspect.isclass(value) and issubclass(value, Hook)
      if is_hook and value is not Hook:
        class_of_name[name_in_file] = value
    check_choice(f'train.hooks of {file}', value=class_name,
                 choices=class_of_name)
    hooks.append(plugins.call_user_function(file, class_of_name[class_name]))
  return hooks
