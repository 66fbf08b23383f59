"""What an evaluation task is: a record with its flags, its needs and its work.

eval.py reads the flags of every task before it knows which ones are asked for.
So a task's file imports JAX, and whatever imports it, inside of the functions
that need it, and `--help` answers at once.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

from etils import epath
import ml_collections

# Fields that no evaluation reads: `model` stands resolved beside them.
UNREAD = ('seed', 'init_', 'model.', 'optim.', 'checkpoint.', 'log.')


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A run's checkpoint and what was asked about it.

  Attributes:
    run: the run's config, model and mesh; its params are `params`.
    step: the checkpoint's step.
    tokenizer: the run's.
    options: eval.py's flags by name.
    workdir: the run's folder; pictures go there.
    programs: what was compiled, by what it is of; see `program`.
    what: which parameters these are, where the checkpoint has several, or
      where they are of several checkpoints; else ''.
  """
  run: Any
  params: Any
  step: int
  tokenizer: Any
  options: Any
  workdir: epath.Path
  programs: dict
  what: str = ''

  def held_out(self) -> list:
    """Returns the loaders of what is held out; see pipeline.held_out."""
    from training.objectives import pipeline
    from training.distributed import devices
    config = self.run.config
    return pipeline.held_out(
        config, self.tokenizer,
        *devices.batch_shard(self.run.place, config.data.batch_size))

  def program(self, make: Callable[[], Callable], *of):
    """Returns jax.jit of what `make` returns, or the same of an earlier run of
    this process that differs in nothing that an evaluation reads: so that the
    seeds of a sweep's point compile once.

    Args:
      make: makes the function.
      of: which of the run's functions it is: hashable.
    """
    import jax

    from training.workdir import run_config
    flat = run_config.flatten(self.run.config)
    key = (*of, self.run.model, *(
        (name, value) for name, value in flat.items()
        if not name.startswith(UNREAD)))
    if key not in self.programs:
      self.programs[key] = jax.jit(make())
    return self.programs[key]


class Flag(NamedTuple):
  """A flag of eval.py.

  Attributes:
    name: without the dashes.
    default: a bool, int, float or string, which is also the flag's type.
    help: a sentence for --help.
    least, most: of a number; None: no bound.
    asks: whether to set the flag asks for its task, too, unless a task that
      was named reads it.
  """
  name: str
  default: bool | int | float | str
  help: str
  least: float | None = None
  most: float | None = None
  asks: bool = False


class Task(NamedTuple):
  """Something that can be measured of a checkpoint.

  Attributes:
    help: what it reports, for --help.
    run: returns figures: a dict of numbers, lists and strings, which go into
      --json after they have been printed for a reader.
    unfit: config -> why such a run has nothing to measure; '': it has.
    check: options -> None; raises RequestError for options that cannot be
      honoured, and where this machine lacks something.
    fits: (config, options) -> None; raises RequestError for options that such
      a run cannot honour.
    flags: those that it reads.
    file: what it draws or writes into the workdir; '': nothing.
    figures: config -> the names of its numbers, as patterns of fnmatch; None:
      they are not known before it is done.
    argument: the flag, a text, that NAME:TEXT sets where a task is named; '':
      the task is named without one.
    held_out: whether it reads what is held out, which --text replaces.
    beside: of a task whose own figures may be called PART/FIGURE, the groups of
      figures that are not its own; None: no group's are.
  """
  help: str
  run: Callable[[Evaluation], dict[str, Any]]
  unfit: Callable[[ml_collections.ConfigDict], str] = lambda config: ''
  check: Callable[[Any], None] = lambda options: None
  fits: Callable[[ml_collections.ConfigDict, Any], None] = (
      lambda config, options: None)
  flags: tuple[Flag, ...] = ()
  file: str = ''
  figures: Callable[[ml_collections.ConfigDict], Sequence[str] | None] = (
      lambda config: None)
  argument: str = ''
  held_out: bool = True
  beside: tuple[str, ...] | None = None


def without(has: Callable[[Any], Any], words: str
            ) -> Callable[[ml_collections.ConfigDict], str]:
  """Returns an `unfit` for tasks that not every objective allows.

  Args:
    has: whether the record of a run's objective has what the task needs.
    words: what an objective without it does not do, or does not have.
  """
  def unfit(config: ml_collections.ConfigDict) -> str:
    from training import objectives
    return '' if has(objectives.of(config)) else (
        f'objective {config.objective!r} {words}')
  return unfit
