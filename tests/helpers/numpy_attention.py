"""Attention over x, or of x over a memory, in float64: an oracle."""

import jax
import numpy as np


def float64(params):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), params)


def project(p, name, x):
  """x W + b of every head, [B, L, H, K], or of one number a head."""
  y = np.tensordot(x, p[name], 1)
  return y + p.get(f'{name}_bias', 0)


def heads(q_BLHK, k_BMJK, v_BMJK, scale, causal=True):
  """Returns what each head makes of the values."""
  R = q_BLHK.shape[2] // k_BMJK.shape[2]
  k_BMHK, v_BMHK = (np.repeat(a, R, 2) for a in (k_BMJK, v_BMJK))
  w_BHLM = np.exp(np.einsum('blhk,bmhk->bhlm', q_BLHK, k_BMHK) * scale)
  if causal:
    w_BHLM = np.tril(w_BHLM)
  w_BHLM /= w_BHLM.sum(-1, keepdims=True)
  return np.einsum('bhlm,bmhk->blhk', w_BHLM, v_BMHK)


def out(p, o_BLHK):
  """Returns the product of the output."""
  return np.einsum('blhk,hkd->bld', o_BLHK, p['out']) + p.get('out_bias', 0)
