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

The other optimisers have Adam's rates but for hidden matrices, whose rates
follow from the spectral condition (Yang, Simon and Bernstein 2023, arXiv
2310.17813, condition 1): a step of a matrix with n inputs and m outputs has a
spectral norm that is proportional to sqrt(m / n). Let n and m be multiples of
those of the base. The spectral norm of a step before the rate grows as

  sqrt(n m)      for Adam, Lion, AdEMAMix and SOAP, whose numbers do not depend
                 on the width and agree over the matrix (a rank that does not
                 grow; for SOAP in its own basis): the rate is * 1 / n
  sqrt(max(n, m))  for Muon and NorMuon, whose steps have 0.2 root mean square
                 and singular values that are about equal:
                 the rate is * sqrt(m / n / max(n, m)), which is 1 / sqrt(r)
  sqrt(m)        for Adafactor, whose step is Adam's times the root mean square
                 of the matrix, which is 1 / sqrt(n) at first:
                 the rate is * 1 / sqrt(n), as in table 1 of Everett et al.
                 2024, arXiv 2407.05872

With optim.hyperball, a step of the Frobenius norm 1 is multiplied by the norm
of the matrix, which grows as sqrt(m). Its spectral norm grows as sqrt(m) where
the rank does not grow, and the rate is * 1 / sqrt(n). That of Muon's is by
sqrt(min(n, m)) less, and the rate is * 1 in a model whose widths all grow.

Over depth (model.mup_base_depth), it is CompleteP (Dey et al. 2025, arXiv
2505.01618, table 1 with alpha = 1). With l = num_layers / mup_base_depth, what
a branch adds to the residual stream is divided by l, so that a layer's steps
change the sum as much as 1 of l layers of the base. Then no rate and no initial
variance depends on l, but for SGD: the gradient of a parameter of the layers is
divided by l, and its rate is * l. Adam's epsilon is divided as the gradients
are, by r everywhere and by l in the layers. Here the gradients are multiplied
instead, which is the same to Adam.

Over experts (model.moe.mup_base_experts, mup_base_top_k, mup_base_d_ff), a
mixture whose gates sum to 1 is a network of top_k * d_ff hidden units whose
second matrix is divided by top_k. With e, k and f times the num_experts, top_k
and d_ff of the base:

  the rates are those over the width, with f for the hidden units of an expert:
    the steps of its second matrix agree for all experts of a token, whose mean
    they are in, and so do not depend on k;
  the initial variance of the second matrix is * k / f: outputs that do not
    agree would fall as 1 / sqrt(k) in the mean. A step that is a share of the
    matrix (Adafactor's, or with optim.hyperball) is * 1 / sqrt(k) for it;
  the gradient of an expert and of the router is * e, as the share of tokens
    that an expert sees, and its gate in them, make it 1 / e as large. SGD needs
    it; to the others it is only Adam's epsilon.

This is derived here, as over the width. It agrees with what is published:
Complete-muE (Peng et al. 2026, arXiv 2605.23893) takes muP over the active
width with normalised gates from a dense network to one of experts, and finds
that the rate and the decay need no correction, to first order, for the fewer
tokens that each of more experts sees. Its tables were not compared.

The rates follow from what a parameter declares: its Role, in
architectures/parts/sharding.py. Initial variances and multipliers are
architectures/parts/layers.py, skeletons.py and moe/layer.py.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax

from architectures.parts import paths
from architectures.parts.config import ModelConfig
from architectures.parts.sharding import Role
from common.errors import check_choice

# The arguments of each rule: how many times as wide as in the base model the
# inputs and the outputs of a parameter are, what its product is divided by, and
# how many times as large as by its width it is at first. The equations are at
# the head of this file.


def _factor_of_adam(inputs: float, outputs: float, divisor: float,
                    stddev: float) -> float:
  """Returns what muP multiplies Adam's or Lion's learning rate by: their step
  does not depend on the size of the gradient."""
  del outputs, stddev
  return divisor / inputs


def _factor_of_sgd(inputs: float, outputs: float, divisor: float,
                   stddev: float) -> float:
  """Returns what muP multiplies SGD's learning rate by: its step follows the
  gradient, which falls with the number of outputs and with the divisor of the
  product."""
  del stddev
  return divisor ** 2 * outputs / inputs


def _factor_of_muon(inputs: float, outputs: float, divisor: float,
                    stddev: float) -> float:
  """Returns what muP multiplies the learning rate of a hidden matrix by, whose
  step has equal singular values and a root mean square of 0.2."""
  del divisor, stddev
  return math.sqrt(outputs / inputs / max(inputs, outputs))


def _factor_of_relative_steps(inputs: float, outputs: float, divisor: float,
                              stddev: float) -> float:
  """Returns what muP multiplies the learning rate of a hidden matrix by, whose
  step is a share of the matrix and has a rank that does not grow."""
  del outputs, divisor
  return 1 / math.sqrt(inputs) / stddev


def _factor_of_relative_muon(inputs: float, outputs: float, divisor: float,
                             stddev: float) -> float:
  """Returns what muP multiplies the learning rate of a hidden matrix by, whose
  step is a share of the matrix and has equal singular values."""
  del divisor
  return math.sqrt(min(outputs / inputs, 1.0)) / stddev


class Rule(NamedTuple):
  """The factors by which muP multiplies the learning rates of an optimiser.

  Attributes:
    hidden: the function of hidden matrices.
    others: the function of all other parameters.
    hyperball: the function of hidden matrices that keep their norm
      (optim.hyperball).
  """
  hidden: Callable[..., float]
  others: Callable[..., float]
  hyperball: Callable[..., float] = _factor_of_relative_steps


_RULE_OF_ADAM = Rule(hidden=_factor_of_adam, others=_factor_of_adam)
_RULE_OF_MUON = Rule(hidden=_factor_of_muon, others=_factor_of_adam,
                     hyperball=_factor_of_relative_muon)
RULES = {
    'adamw': _RULE_OF_ADAM,
    'ademamix': _RULE_OF_ADAM,
    'adafactor': Rule(hidden=_factor_of_relative_steps, others=_factor_of_adam),
    'lion': _RULE_OF_ADAM,
    'muon': _RULE_OF_MUON,
    'normuon': _RULE_OF_MUON,
    'soap': _RULE_OF_ADAM,
    'sgd': Rule(hidden=_factor_of_sgd, others=_factor_of_sgd),
}


def check_optimizer(config: ModelConfig, optimizer: str) -> None:
  """Raises RequestError where muP has no learning rates for the optimiser.

  Args:
    config: the model's config.
    optimizer: the name of the optimiser, optim.name.
  """
  if config.parametrization == 'mup':
    check_choice("optim.name with model.parametrization 'mup'", optimizer,
                 RULES)


def learning_rate_factors(config: ModelConfig, optimizer: str, roles: Any,
                          is_hyperball: bool = False):
  """Returns what muP (maximal update parametrization) multiplies the learning
  rate of each parameter by, as a tree, by the rules at the head of this file.

  Args:
    config: the model's config.
    optimizer: the name of the optimiser, optim.name.
    roles: the Role of each parameter, as a tree. It says which axes of the
      parameter are inputs and outputs of its product, and names them.
    is_hyperball: whether matrices keep their norm, optim.hyperball.

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
              'kv_heads': num_heads, 'joined': width, 'features': width,
              'head': head_dim, 'vocab': 1.0, 'rows': 1.0, 'groups': 1.0,
              None: 1.0}
  rule = RULES[optimizer]
  factor_of_hidden = rule.hyperball if is_hyperball else rule.hidden

  def factor_of_parameter(role: Role) -> float:
    """Returns the factor by which the learning rate of a parameter with this
    role is multiplied."""
    # The parameter is wider than the base's by these factors along its inputs
    # and its outputs.
    axes = role.split(len(role.axes))
    of_axis = dict(widening)
    if role.scale.mlp is not None:
      of_axis['mlp'] = role.scale.mlp
    inputs = math.prod(of_axis[role.axes[i]] for i in axes.inputs)
    outputs = math.prod(of_axis[role.axes[i]] for i in axes.outputs)
    # Logits are divided by the width in the forward pass.
    divisor = 1.0
    if role.kind == 'logits':
      divisor = width
    factor = rule.others
    if role.is_hidden_matrix:
      factor = factor_of_hidden
    return factor(inputs=inputs, outputs=outputs, divisor=divisor,
                  stddev=role.scale.stddev)

  return jax.tree.map(factor_of_parameter, roles)


def gradient_factors(config: ModelConfig, optimizer: str, roles: Any):
  """Returns what the gradient of each parameter is multiplied by before the
  optimiser sees it, so that it is as large as at the base, and the epsilon of
  Adam has the same effect (Dey et al. 2025, arXiv 2505.01618, table 1), and
  that of an expert as large as where it sees more of the tokens.

  Args:
    config: the model's config.
    optimizer: the name of the optimiser, optim.name.
    roles: the Role of each parameter, as a tree.

  Returns:
    A factor for each parameter; None for a model without a base of its depth
    or of another number of experts.
  """
  has_other_experts = any(
      role.scale.gradient != 1 for role in jax.tree.leaves(roles))
  if not config.mup_base_depth and not has_other_experts:
    return None
  # The width counts where the depth does. The rates of SGD already hold how
  # gradients fall with the width.
  of_width = 1.0
  if config.mup_base_depth and optimizer != 'sgd':
    of_width = config.widening

  def factor_of_parameter(key: tuple, role: Role) -> float:
    """Returns the factor of the gradient of one parameter."""
    factor = of_width * role.scale.gradient
    if paths.Stacks.is_in_stack(paths.path_to_string(key)):
      factor *= config.deepening
    return factor

  return jax.tree_util.tree_map_with_path(factor_of_parameter, roles)
