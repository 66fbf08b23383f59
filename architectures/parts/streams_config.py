"""The fields of residual streams (streams.py): config.model.streams."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
  """Of model.residual other than plain; configs/model.py says what each is."""
  count: int
  dynamic: bool
  iterations: int
  block_size: int
