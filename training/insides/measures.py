"""Figures of attention maps and of the residual stream, in numpy.

The maps weights[..., l, m] are the weight that query l gives key m. A row sums
to 1, less the share of a learned sink, where the model has one.
"""

import numpy as np

# Dettmers et al. 2022 (LLM.int8(), section 3): a feature is an outlier where
# its magnitude reaches 6, in at least a quarter of the layers and for at least
# 6 % of all tokens of all layers.
MAGNITUDE, LAYERS, TOKENS = 6.0, 0.25, 0.06


def sink(weights_NBHLM: np.ndarray) -> np.ndarray:
  """Returns what a row leaves to a learned sink, [N, B, H, L]; else 0."""
  return np.maximum(1 - weights_NBHLM.sum(-1, dtype=np.float64), 0)


def entropy(weights_NBHLM: np.ndarray) -> np.ndarray:
  """Returns the entropy of each row in nats, [N, B, H, L]: log n where n keys
  weigh the same, 0 where one has all. A learned sink counts as a key."""
  p_NBHLM = np.concatenate(
      [weights_NBHLM, sink(weights_NBHLM)[..., None]], -1, dtype=np.float64)
  return -(p_NBHLM * np.log(np.where(p_NBHLM > 0, p_NBHLM, 1))).sum(-1)


def first(weights_NBHLM: np.ndarray) -> np.ndarray:
  """Returns the weight on the first token, [N, B, H, L], where models that
  have no sink of their own keep one (Xiao et al. 2023)."""
  return weights_NBHLM[..., 0]


def previous(weights_NBHLM: np.ndarray, real_BL: np.ndarray) -> np.ndarray:
  """Returns the mean weight on the token just before the query, [N, B, H];
  the first token, which has none, and padding do not count."""
  before_NBHL = np.diagonal(weights_NBHLM, offset=-1, axis1=-2, axis2=-1)
  return mean_of_queries(before_NBHL, real_BL[:, 1:])


def induction(weights_NBHLM: np.ndarray, tokens_BL: np.ndarray,
              real_BL: np.ndarray) -> np.ndarray:
  """Returns the prefix-matching score of each head, [N, B, H]: the weight on
  the tokens that followed the query's token where it stood before, as a mean
  over the queries that stood before; nan where none did.

  On random tokens that come twice it is that of Olsson et al. 2022, of whom a
  head that scores near 1 is called an induction head.
  """
  L = tokens_BL.shape[1]
  same_BLM = tokens_BL[:, :, None] == tokens_BL[:, None]
  follows_BLM = np.zeros_like(same_BLM)
  follows_BLM[..., 1:] = same_BLM[..., :-1]
  follows_BLM &= np.tri(L, k=-1, dtype=bool) & real_BL[:, :, None]
  matched_NBHL = (weights_NBHLM * follows_BLM[None, :, None]).sum(-1)
  return mean_of_queries(matched_NBHL, follows_BLM.any(-1))


def mean_of_queries(values_NBHL: np.ndarray, counted_BL: np.ndarray
                    ) -> np.ndarray:
  """Returns the mean over the queries that count, [N, B, H]; nan of none."""
  counted_BHL = np.broadcast_to(counted_BL[:, None], values_NBHL.shape[1:])
  with np.errstate(invalid='ignore'):
    return ((values_NBHL * counted_BHL).sum(-1, dtype=np.float64)
            / counted_BHL.sum(-1))


def outliers(states_NLD: np.ndarray) -> np.ndarray:
  """Returns which features are outliers by the criterion of Dettmers et al.
  2022, bool [D].

  Args:
    states_NLD: the residual stream of one row, without padding: what the first
      layer is given and what each layer returns.
  """
  large_NLD = np.abs(states_NLD) >= MAGNITUDE
  return ((large_NLD.any(1).mean(0) >= LAYERS)
          & (large_NLD.mean((0, 1)) >= TOKENS))
