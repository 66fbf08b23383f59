"""muP: learning rates by parameter path, so that the best one is the best at
every width (Yang et al. 2022, Tensor Programs V).

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

Initial variances and multipliers are architectures/parts/linear.py,
skeletons.py and moe.py; the rates are here.
"""

from architectures.parts.config import ModelConfig
from configs.errors import one_of
from training import paths

# What a parameter is, by its path.
_KINDS = (
    ('embed/(tokens|positions|types)', 'vector'),
    ('head/kernel', 'vector'),
    ('head/bias', 'logits_bias'),
    ('.*/router', 'vector'),
    ('.*/router_bias', 'fixed'),  # moved by no gradient
    ('.*/relative_bias/table|.*/sink', 'heads'),
    ('.*/(query|key)_norm/(scale|bias)', 'head'),
    ('.*(_bias|/bias|/scale)', 'vector'),
    ('.*/attention/(query|key|value|out)', 'hidden'),
    ('.*/ffn/(shared/)?(up|gate|down)', 'hidden'),
)

# kind: its rate, of r and how many times as wide a head is. One number along
# the width is `vector`, along the heads `heads`, along a head `head`. The
# bias of the logits goes through the multiplier 1 / r: Adam's step is to be r
# times as large; SGD's gradient is 1 / r as well.
_ADAM = {
    'vector': lambda r, head: 1.0,
    'logits_bias': lambda r, head: r,
    'fixed': lambda r, head: 1.0,
    'heads': lambda r, head: 1.0,
    'head': lambda r, head: 1.0,
    'hidden': lambda r, head: 1 / r,
}
_SGD = {
    'vector': lambda r, head: r,
    'logits_bias': lambda r, head: r * r,
    'fixed': lambda r, head: 1.0,
    'heads': lambda r, head: r / head,
    'head': lambda r, head: head,
    'hidden': lambda r, head: 1.0,
}

# Lion's step, like Adam's, does not depend on the size of the gradient. Muon
# and Adafactor size theirs by the matrix, and would need rules of their own.
RATES = {'adamw': _ADAM, 'lion': _ADAM, 'sgd': _SGD}


def check(config: ModelConfig, optimizer: str) -> None:
  """Raises ValueError where there are no rules for the optimiser."""
  if config.parametrization == 'mup':
    one_of("optim.name with model.parametrization 'mup'", optimizer, RATES)


def rates(config: ModelConfig, optimizer: str, params):
  """Returns what each parameter's learning rate is multiplied by, as a tree;
  None in the standard form.

  Args:
    config: the model's.
    optimizer: optim.name.
    params: the parameters, or their shapes.

  Raises:
    ValueError: for an optimiser or a parameter without a rule.
  """
  if config.parametrization == 'standard':
    return None
  check(config, optimizer)
  numbers = {kind: rate(config.widening, config.head_widening)
             for kind, rate in RATES[optimizer].items()}
  return paths.match([(pattern, numbers[kind]) for pattern, kind in _KINDS],
                     params, 'mup._KINDS')
