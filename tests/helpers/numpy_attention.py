"""Attention over x, or of x over a memory, in numpy and float64, to compare the
models with."""

import jax
import numpy as np


def float64(params):
  """Returns parameters as numpy arrays in float64."""
  return jax.tree.map(lambda a: np.asarray(a, np.float64), params)


def project(p, name, x):
  """Returns x W + b of every head, [B, L, H, K]; or [B, L, H], where each head
  has one number.

  Args:
    p: the parameters of the attention by name.
    name: the name of W; that of b, which may be missing, ends in _bias.
    x: [B, L, D].
  """
  y = np.tensordot(x, p[name], 1)
  return y + p.get(f'{name}_bias', 0)


def heads(q_BLHK, k_BMJK, v_BMJK, scale, causal=True, bias_BHLM=0.0):
  """Returns softmax(scale q k^T) v of each head, [B, L, H, K].

  Args:
    q_BLHK: the queries.
    k_BMJK, v_BMJK: the keys and values, of which each serves H / J heads.
    scale: the scale of the products.
    causal: whether a query sees no later key.
    bias_BHLM: a number to add to the scores.
  """
  R = q_BLHK.shape[2] // k_BMJK.shape[2]
  k_BMHK, v_BMHK = (np.repeat(a, R, 2) for a in (k_BMJK, v_BMJK))
  scores_BHLM = np.einsum('blhk,bmhk->bhlm', q_BLHK, k_BMHK) * scale
  w_BHLM = np.exp(scores_BHLM + bias_BHLM)
  if causal:
    w_BHLM = np.tril(w_BHLM)
  w_BHLM /= w_BHLM.sum(-1, keepdims=True)
  return np.einsum('bhlm,bmhk->blhk', w_BHLM, v_BMHK)


def out(p, o_BLHK):
  """Returns the output of the layer, [B, L, D], of that of the heads."""
  return np.einsum('blhk,hkd->bld', o_BLHK, p['out']) + p.get('out_bias', 0)
