"""The fields of low-rank adapters; layers.py has what they do."""

import dataclasses

from architectures.parts.sizes import Sizes
from common.fields import field, FUNCTION, REGULARISATION, RUN, ReadIf


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """The fields of low-rank adapters (Hu et al. 2021), beside which all other
  parameters are frozen."""
  rank: int = field(0, 'the rank of an adapter; 0: there is none', about=RUN)
  alpha: float = field(
      0.0, "An adapter's product is multiplied by alpha / rank; derived: rank.",
      least=0, resume=FUNCTION, about=RUN)
  targets: str = field(
      'query,value', 'The products that get one, with commas: query key value '
      'output_gate out up gate down, or all-linear. Those of experts get none.',
      about=RUN, several=True)
  dropout: float = field(
      0.0, 'the share of the input of an adapter that is dropped', least=0,
      below=1, resume=REGULARISATION, about=RUN)

  @property
  def scale(self) -> float:
    """The factor on an adapter's product."""
    return self.alpha / self.rank

  def derived(self, config: Sizes) -> 'LoraConfig':
    """Returns the fields with those that were left open."""
    del config
    return dataclasses.replace(self, alpha=self.alpha or self.rank)

  def conditions_of_reading(self, config: Sizes) -> dict[str, ReadIf]:
    """Returns the fields that nothing reads as long as another field has its
    value, each with that field and what it would have to be."""
    del config
    if self.rank:
      return {}
    without = ReadIf('lora.rank', 'is set')
    return dict(alpha=without, targets=without, dropout=without)
