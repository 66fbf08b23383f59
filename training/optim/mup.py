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
from common.errors import check_choice, require

# The arguments of each rule: how many times as wide as in the base model the
# inputs and the outputs of a parameter are, and what its product is divided by.
# Muon, NorMuon and Adafactor size their steps by the matrix, SOAP rotates them,
# and would need rules of their own.


def _factor_of_adam(inputs: float, outputs: float, divisor: float) -> float:
  """Returns what muP multiplies Adam's or Lion's learning rate by: their step
  does not depend on the size of the gradient."""
  del outputs
  return divisor / inputs


def _factor_of_sgd(inputs: float, outputs: float, divisor: float) -> float:
  """Returns what muP multiplies SGD's learning rate by: its step follows the
  gradient, which falls with the number of outputs and with the divisor of the
  product."""
  return divisor ** 2 * outputs / inputs


FACTOR_OF_OPTIMIZER = {'adamw': _factor_of_adam, 'lion': _factor_of_adam,
                       'sgd': _factor_of_sgd}


def check_optimizer(config: ModelConfig, optimizer: str,
                    is_hyperball: bool = False) -> None:
  """Raises RequestError where muP has no learning rates for the optimiser.

  Args:
    config: the model's config.
    optimizer: the name of the optimiser, optim.name.
    is_hyperball: whether matrices keep their norm, optim.hyperball.
  """
  if config.parametrization != 'mup':
    return
  check_choice("optim.name with model.parametrization 'mup'", optimizer,
               FACTOR_OF_OPTIMIZER)
  require(not is_hyperball, "optim.hyperball is True, for which model."
          "parametrization 'mup' has no rule: set one of them back")


def learning_rate_factors(config: ModelConfig, optimizer: str, roles: Any):
  """Returns what muP (maximal update parametrization) multiplies the learning
  rate of each parameter by, as a tree (table 8 of the paper).

  Args:
    config: the model's config.
    optimizer: the name of the optimiser, optim.name.
    roles: the Role of each parameter, as a tree. It says which axes of the
      parameter are inputs and outputs of its product, and names them.

  Returns:
    A factor for each parameter; None for a model in the standard
    parametrization.

  Raises:
    RequestError: for an optimiser that muP has no rule for.
  """
  if config.parametrization == 'standard':
    return None
  check_optimizer(config, optimizer)
  # How many times wider each axis is than in the base model, by the axis's
  # name. Axes that do not grow with the model's width, such as the vocabulary,
  # have 1.
  width = config.widening
  head_dim = config.head_widening
  num_heads = width / head_dim
  widening = {'embed': width, 'mlp': width, 'heads': num_heads,
              'kv_heads': num_heads, 'joined': width, 'head': head_dim,
              'vocab': 1.0, 'rows': 1.0, 'groups': 1.0, None: 1.0}
  optimizer_factor = FACTOR_OF_OPTIMIZER[optimizer]

  def factor_of_parameter(role: Role) -> float:
    """Returns what the learning rate of one parameter is multiplied by."""
    axes = role.split(len(role.axes))
    inputs = math.prod(widening[role.axes[i]] for i in axes.inputs)
    outputs = math.prod(widening[role.axes[i]] for i in axes.outputs)
    # Logits are divided by the width in the forward pass.
    divisor = 1.0
    if role.kind == 'logits':
      divisor = width
    return optimizer_factor(inputs=inputs, outputs=outputs, divisor=divisor)

  return jax.tree.map(factor_of_parameter, roles)
