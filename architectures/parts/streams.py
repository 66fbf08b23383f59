"""The fields of residual streams; blocks.py has what they do."""

import dataclasses

from common.fields import field, FUNCTION, SHAPES


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
  """Of a residual that is not plain."""
  GROUP = 'streams'
  count: int = field(4, 'number of streams, for hyper, mhc and gated', least=2,
                     resume=SHAPES)
  rank: int = field(320, "for gated: rank of the gates' product", least=1,
                    resume=SHAPES)
  dynamic: bool = field(
      True, 'for hyper: whether the mixture depends on the token',
      resume=SHAPES)
  iterations: int = field(20, "for mhc: rounds of Sinkhorn's algorithm",
                          least=1, resume=FUNCTION)
  learned_end: bool = field(
      False, 'for mhc: whether a mixture by the token ends the streams, and a '
      'new branch reads all of them alike', resume=SHAPES)
  block_size: int = field(
      1, 'For attention: how many attentions and networks are summed before '
      'they are attended to; 1: each stands for itself.', least=1,
      resume=FUNCTION)
