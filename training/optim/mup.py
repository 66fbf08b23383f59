"""muP: a learning rate for each parameter by its role, so that the best one is
the best at every width (Yang et al. 2022, Tensor Programs V).

Table 8 of the paper, in numbers relative to a base width, at which all are 1
and mup equals the standard form. With r = d_model / mup_base_width, every
width (d_ff, heads x head_dim) being r times that of the base:

               initial variance   multiplier   rate, Adam   rate, SGD
  embeddings   1                  1            1            r
  hidden       1 / r              1            1 / r        1
  logits       1                  1 / r        1            r
  vectors      -                  1            1            r

A tied embedding is in the first and the third row, which agree. Attention
scores are scaled by 1 / head_dim. Weight decay is not multiplied: it stays
lr * weight_decay at every width, as in the authors' package.

The rates follow from what a parameter declares: its Role, in
architectures/parts/sharding.py. Initial variances and multipliers are
architectures/parts/layers.py, skeletons.py and moe/layer.py.
"""

import math
from typing import Any

import jax

from architectures.parts.config import ModelConfig
from architectures.parts.sharding import Role
from common.errors import one_of

# The rate of a parameter, of how many times as wide as at the base its inputs
# and its outputs are, and of what its product is divided by. Muon, NorMuon and
# Adafactor size their steps by the matrix, SOAP turns them, and would need
# rules of their own.


def _adam(inputs: float, outputs: float, divisor: float) -> float:
  """Adam's step does not depend on the size of the gradient; nor does Lion's.
  """
  del outputs
  return divisor / inputs


def _sgd(inputs: float, outputs: float, divisor: float) -> float:
  """SGD's step follows the gradient: as many times as large as there are
  outputs, and divided as the product is."""
  return divisor ** 2 * outputs / inputs


RATES = {'adamw': _adam, 'lion': _adam, 'sgd': _sgd}


def check_optimizer(config: ModelConfig, optimizer: str) -> None:
  """Raises ValueError where there are no rules for the optimiser."""
  if config.parametrization == 'mup':
    one_of("optim.name with model.parametrization 'mup'", optimizer, RATES)


def rates(config: ModelConfig, optimizer: str, roles: Any):
  """Returns what each parameter's learning rate is multiplied by, as a tree;
  None in the standard form.

  Args:
    config: the model's config.
    optimizer: optim.name.
    roles: the Role of each parameter, as a tree (training/runs.py).

  Raises:
    ValueError: for an optimiser without a rule.
  """
  if config.parametrization == 'standard':
    return None
  check_optimizer(config, optimizer)
  # How many times wider than the base model each kind of axis is.
  r = config.widening
  head = config.head_widening
  wider = {'embed': r, 'mlp': r, 'heads': r / head, 'kv_heads': r / head,
           'joined': r, 'head': head, 'vocab': 1.0, 'rows': 1.0, 'table': 1.0,
           'experts': 1.0, 'groups': 1.0, None: 1.0}

  def rate(role: Role) -> float:
    """Returns what the learning rate of one parameter is multiplied by."""
    axes = role.split(len(role.axes))
    inputs = math.prod(wider[role.axes[i]] for i in axes.inputs)
    outputs = math.prod(wider[role.axes[i]] for i in axes.outputs)
    # Logits are divided by the width in the forward pass.
    divisor = 1.0
    if role.kind == 'logits':
      divisor = r
    return RATES[optimizer](inputs, outputs, divisor)

  return jax.tree.map(rate, roles)
