"""The fields of layers that are run several times; passes.py has what they do.
"""

import dataclasses

from architectures.parts.sizes import Sizes
from common.fields import AT_START, field, FUNCTION, RECIPE, REGULARISATION
from common.fields import RUN, SHAPES, ReadIf
from common.kinds import split_kind_names


@dataclasses.dataclass(frozen=True)
class LoopsConfig:
  """The fields of a model with a loop."""
  GROUP = 'loops'
  passes: int = field(4, 'how many times the layers that loop are run', least=1,
                      resume=FUNCTION)
  gradient_passes: int = field(
      0, 'how many of the last passes have a gradient; 0: all. For turns, how '
      'many runs of the lower layers in the last pass, and one in each other',
      resume=FUNCTION)
  low_cycles: int = field(
      0, 'for turns: how many times the lower half of the layers that loop is '
      'run in each pass, before the upper half is', least=0, most=1024,
      resume=FUNCTION)
  boundary: str = field(
      'none', 'what a state goes through between two passes: nothing, or the '
      "stack's final norm", choices=('none', 'norm'), resume=FUNCTION)
  exit_gate: bool = field(
      False, 'whether a gate says after each pass which tokens leave; the loss '
      'is then that of all passes, by their probabilities', resume=SHAPES)
  exit_entropy: float = field(
      0.1, 'for exit_gate: the factor of the entropy of the passes after which '
      'a token may leave, which the loss rewards', least=0,
      resume=REGULARISATION, about=RECIPE)
  exit_threshold: float = field(
      1.0, 'for exit_gate: outside of training a token takes the result of the '
      'first pass by which it has left with this probability; 1: of the last',
      above=0, most=1, resume=FUNCTION)
  gate_rank: int = field(64, 'for gate: the features between its products',
                         least=1, resume=SHAPES)
  depth: int = field(
      0, 'the number of layers by which init scaled_normal divides; derived: '
      'of those that a token goes through', resume=AT_START, about=RUN)

  def derived(self, config: Sizes) -> 'LoopsConfig':
    """Returns the fields with what follows from those of the model: the depth,
    in which layers that are run several times count once for each pass."""
    if self.depth:
      return self
    outside = split_kind_names(config.prefix) + split_kind_names(config.suffix)
    num_outside = len(outside)
    num_looping = max(config.num_layers - num_outside, 0)
    depth = num_outside + self.count_rows_of_pass(num_looping) * self.passes
    return dataclasses.replace(self, depth=depth)

  def count_rows_of_pass(self, num_rows: int) -> int:
    """Returns how many layers, or periods of layers, a pass runs over so many
    that loop: more where the lower half takes turns with the upper one."""
    if not self.low_cycles:
      return num_rows
    return num_rows // 2 * (self.low_cycles + 1)

  def conditions_of_reading(self, config: Sizes) -> dict[str, ReadIf]:
    """Returns the fields that nothing reads as long as another field has its
    value, each with that field and what it would have to be."""
    conditions = {}
    if config.init != 'scaled_normal':
      conditions['depth'] = ReadIf('init', 'is scaled_normal')
    if not self.exit_gate:
      for name in ('exit_entropy', 'exit_threshold'):
        conditions[name] = ReadIf('loops.exit_gate', 'is True')
    return conditions
