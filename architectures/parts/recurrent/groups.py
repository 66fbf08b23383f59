"""The groups of fields of all recurrences, by the mixer's name."""

from collections.abc import Mapping
from typing import Any

from architectures.parts.recurrent import deltanet_config
from architectures.parts.recurrent import gla_config
from architectures.parts.recurrent import kda_config
from architectures.parts.recurrent import mamba2_config
from architectures.parts.recurrent import retnet_config
from architectures.parts.recurrent.deltanet_config import DeltaNetConfig
from architectures.parts.recurrent.gla_config import GLAConfig
from architectures.parts.recurrent.kda_config import KDAConfig
from architectures.parts.recurrent.mamba2_config import Mamba2Config
from architectures.parts.recurrent.retnet_config import RetNetConfig

# The dataclass of each, and what fills in what is left open in it.
GROUPS = {
    'deltanet': (DeltaNetConfig, deltanet_config.derived),
    'mamba2': (Mamba2Config, mamba2_config.derived),
    'kda': (KDAConfig, kda_config.derived),
    'gla': (GLAConfig, gla_config.derived),
    'retnet': (RetNetConfig, retnet_config.derived),
}


def derived(fields: Mapping[str, Any], heads: int, head_dim: int
            ) -> dict[str, Any]:
  """Returns every group of config.model with what is left open filled in."""
  return {name: fill(fields[name], heads, head_dim)
          for name, (_, fill) in GROUPS.items()}
