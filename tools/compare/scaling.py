"""The scaling law of a ladder: L(N, D) = (E + A / N^a + B / D^b) r^s.

Approach 3 of Hoffmann et al. 2022 ("Training compute-optimal large language
models"): N parameters and D tokens give the final loss; the five constants
minimise the Huber loss (delta 1e-3) of the residuals of log L, by L-BFGS from a
grid of starts, best of all. The sum is minimised, not the mean, and to a tight
tolerance: a loose one stops early and gives too narrow intervals (Besiroglu et
al. 2024, "Chinchilla scaling: a replication attempt").

r is the width of a model over its depth, divided by the ladder's geometric mean
of this ratio. Where a ladder varies both, s says what shape does at the same
parameters and tokens (Kaplan et al. 2020, figure 5, found little); elsewhere it
is 0, and the law is that of the paper.

Intervals are of a bootstrap over the residuals, spread by the freedom that the
fit took: it keeps the ladder's sizes, of which there are too few to leave any
out.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from configs.errors import RequestError

DELTA = 1e-3
CONSTANTS = ('E', 'A', 'B', 'a', 'b')
MIN_RUNS, MIN_SIZES, MIN_LENGTHS = 6, 3, 3
MAX_CORRELATION = 0.97
# The starts: exponents, log E, log A and log B, as in the paper.
EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)
LOG_E = (-1.0, -0.5, 0.0, 0.5, 1.0)
LOG_SCALES = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
POLISHED = 100  # of the starts: those with the least error
# Of log E, log A, log B, a, b, s: an exponent of 0 cannot be told from E.
BOUNDS = ((-12, 6), (-30, 90), (-30, 90), (0, 8), (0, 8), (-2, 2))


@dataclasses.dataclass(frozen=True)
class Law:
  """The five constants of L(N, D) = E + A / N^a + B / D^b, and the exponent of
  shape."""
  E: float
  A: float
  B: float
  a: float
  b: float
  s: float = 0.0

  def loss(self, params, tokens, shapes=None):
    """Returns the loss of models whose ratio of width to depth is `shapes`
    times the ladder's mean of it; None: of that mean."""
    loss = (self.E + self.A * np.asarray(params, float) ** -self.a
            + self.B * np.asarray(tokens, float) ** -self.b)
    return loss if shapes is None else loss * np.asarray(shapes) ** self.s


@dataclasses.dataclass(frozen=True)
class Cost:
  """FLOPs of a token as factor x N^power: 6 N in the paper."""
  factor: float = 6.0
  power: float = 1.0

  def per_token(self, params):
    return self.factor * np.asarray(params, float) ** self.power


def check_ladder(params: Sequence[float], tokens: Sequence[float],
                 shapes: Sequence[float] | None = None) -> None:
  """Raises ValueError where a ladder is too small to fix five constants, or
  with `shapes` six, and to leave residuals."""
  x, y = np.log(np.asarray(params, float)), np.log(np.asarray(tokens, float))
  points = np.stack([x, y], 1)
  counts = [(points, MIN_RUNS, 'pairs of parameters and tokens'),
            (x[:, None], MIN_SIZES, 'numbers of parameters'),
            (y[:, None], MIN_LENGTHS, 'numbers of tokens')]
  words = 'five constants of the law', ''
  if shapes is not None:
    counts.append((np.column_stack([points, np.log(shapes)]), MIN_RUNS + 1,
                   'points of parameters, tokens and shape'))
    words = 'six constants of a law with shape', (
        ', or keep model.d_model over model.num_layers as it is')
  for rows, least, what in counts:
    have = len(_distinct(rows))
    if have < least:
      raise RequestError(
          f'the ladder has {have} different {what}: the {words[0]} need '
          f'{least}; add points that vary the model\'s size and train.steps'
          + words[1])
  correlation = float(np.corrcoef(x, y)[0, 1])
  if abs(correlation) > MAX_CORRELATION:
    raise RequestError(
        f'tokens rise with parameters (correlation {correlation:.3f} of their '
        f'logarithms, at most {MAX_CORRELATION}): what each contributes cannot '
        'be told apart; add points that vary train.steps at one size')


def _distinct(x: np.ndarray) -> list[np.ndarray]:
  """Rows that differ by more than 1 % (x are logarithms)."""
  rows: list[np.ndarray] = []
  for row in x:
    if all(np.max(np.abs(row - other)) > 0.01 for other in rows):
      rows.append(row)
  return rows


def relative_shapes(widths: Sequence[float], depths: Sequence[float],
                    params: Sequence[float]) -> np.ndarray | None:
  """Returns each model's ratio of width to depth, over the geometric mean of
  all; None where a ladder cannot tell shape from size: it has one depth or one
  width, or the ratio rises or falls with the parameters."""
  ratio = np.log(np.asarray(widths, float) / np.asarray(depths, float))
  size = np.log(np.asarray(params, float))
  if min(len(set(widths)), len(set(depths))) < 2 or np.ptp(ratio) < 0.01:
    return None
  if np.ptp(size) and abs(np.corrcoef(ratio, size)[0, 1]) > MAX_CORRELATION:
    return None
  return np.exp(ratio - ratio.mean())


def fit(params: Sequence[float], tokens: Sequence[float],
        losses: Sequence[float], shapes: Sequence[float] | None = None) -> Law:
  """Returns the law that fits best.

  Args:
    params, tokens, losses: of each run.
    shapes: of each, as relative_shapes has them; None: the law has none.

  Raises:
    ValueError: where the ladder is too small.
  """
  check_ladder(params, tokens, shapes)
  x, y, z = (np.log(np.asarray(v, float)) for v in (params, tokens, losses))
  starts = _starts(x, y, z)
  if shapes is None:
    return _law(_best(starts, x, y, z))
  return _law(_best([np.append(theta, 0.0) for theta in starts], x, y, z,
                    np.log(shapes)))


def bootstrap(law: Law, params, tokens, losses, draws: int, seed: int = 0,
              shapes: Sequence[float] | None = None) -> list[Law]:
  """Returns laws of `draws` ladders whose residuals are drawn anew.

  Two ladders of as many runs in the same order, drawn with the same seed, get
  the residuals of the same runs: what a size, a length and a seed do to both
  then cancels in the difference of their laws.
  """
  x, y, z = (np.log(np.asarray(v, float)) for v in (params, tokens, losses))
  fitted = np.log(law.loss(params, tokens, shapes))
  u = None if shapes is None else np.log(shapes)
  free = len(CONSTANTS) + (u is not None)
  residuals = (z - fitted) * math.sqrt(len(z) / (len(z) - free))
  starts = [_theta(law)[:free]]
  rng = np.random.default_rng(seed)
  return [_law(_best(starts, x, y, fitted + rng.choice(residuals, len(z)), u))
          for _ in range(draws)]


def optimum(law: Law, cost: Cost, budget: float) -> tuple[float, float]:
  """Returns the parameters and tokens that make the loss least for a budget.

  D = budget / (factor N^power); where dL/dN = 0,
  N^(a + power b) = a A / (power b B) (budget / factor)^b.
  """
  p = cost.power
  params = (law.a * law.A / (p * law.b * law.B)
            * (budget / cost.factor) ** law.b) ** (1 / (law.a + p * law.b))
  return params, budget / float(cost.per_token(params))


def cost_of(params: Sequence[float], flops_per_token: Sequence[float]) -> Cost:
  """Returns the FLOPs of a token as a power of N, through a ladder's own."""
  power, factor = np.polyfit(np.log(params), np.log(flops_per_token), 1)
  return Cost(float(np.exp(factor)), float(power))


def _starts(x, y, z) -> list[np.ndarray]:
  """The best of the paper's grid, least error first."""
  grid = np.stack(np.meshgrid(LOG_E, LOG_SCALES, LOG_SCALES, EXPONENTS,
                              EXPONENTS, indexing='ij'), -1).reshape(-1, 5)
  errors = np.array([objective(theta, x, y, z)[0] for theta in grid])
  return list(grid[np.argsort(errors, kind='stable')[:POLISHED]])


def _best(starts, x, y, z, u=None) -> np.ndarray:
  from scipy.optimize import minimize
  found = [minimize(objective, theta, args=(x, y, z, u), jac=True,
                    method='L-BFGS-B', bounds=BOUNDS[:len(theta)],
                    options=dict(maxiter=5000, ftol=1e-15, gtol=1e-10))
           for theta in starts]
  return min(found, key=lambda result: result.fun).x


def objective(theta, x, y, z, u=None) -> tuple[float, np.ndarray]:
  """Returns the summed Huber loss of log L, and its gradient.

  Args:
    theta: log E, log A, log B, a, b; and s, where there is `u`.
    x, y, z, u: logarithms of parameters, tokens, losses and shapes.
  """
  terms = np.stack([np.full_like(x, theta[0]), theta[1] - theta[3] * x,
                    theta[2] - theta[4] * y])
  top = terms.max(0)
  powers = np.exp(terms - top)
  total = powers.sum(0)
  r = top + np.log(total) - z
  if u is not None:
    r = r + theta[5] * u
  size = np.abs(r)
  value = np.where(size <= DELTA, r * r / 2, DELTA * (size - DELTA / 2)).sum()
  push = np.clip(r, -DELTA, DELTA)
  pull = push * powers / total
  gradient = np.array([pull[0].sum(), pull[1].sum(), pull[2].sum(),
                       -(pull[1] * x).sum(), -(pull[2] * y).sum(),
                       *([] if u is None else [(push * u).sum()])])
  scale = 1 / DELTA ** 2  # L-BFGS stops by absolute size of the gradient
  return value * scale, gradient * scale


def _law(theta) -> Law:
  return Law(*(float(v) for v in np.exp(theta[:3])), *map(float, theta[3:]))


def _theta(law: Law) -> np.ndarray:
  return np.array([math.log(law.E), math.log(law.A), math.log(law.B), law.a,
                   law.b, law.s])


def percentiles(values: Sequence[float], confidence: float = 0.95
                ) -> tuple[float, float]:
  """Returns the interval that holds this share of the values, tails alike."""
  tail = 50 * (1 - confidence)
  low, high = np.percentile(values, [tail, 100 - tail])
  return float(low), float(high)
