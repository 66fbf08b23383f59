"""FLOPs and bytes of a program's products, from its jaxpr: loops multiplied,
recomputation included, whatever XLA makes of it.

Splash attention is known by its name; another kernel counts with the estimate
that it carries.
"""

import math
from typing import NamedTuple

import jax
import jax.extend.core as jex


class Work(NamedTuple):
  """Of all devices together.

  Attributes:
    flops: of the products; 2abc for [a, b] by [b, c].
    nbytes: of their operands and results, once each.
    loops: loops whose number of passes depends on data, counted as one.
  """
  flops: float = 0.0
  nbytes: float = 0.0
  loops: int = 0

  def __add__(self, other):
    return Work(*(a + b for a, b in zip(self, other)))

  def times(self, n: float):
    return Work(self.flops * n, self.nbytes * n, self.loops)


def count(jaxpr, platform: str, ragged_rows: int = 0,
          passes: int | None = None) -> Work:
  """Returns the work of a jaxpr.

  Args:
    jaxpr: open or closed.
    platform: whose branch runs, where the code has one for each.
    ragged_rows: rows of a grouped product on a device in even load, whose
      array has room for the worst; 0: count all of the array.
    passes: of a loop that depends on data, where they are known otherwise.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  total, live = Work(), {v for v in jaxpr.outvars if _is_var(v)}
  for eqn in reversed(jaxpr.eqns):
    if not any(v in live for v in eqn.outvars) and not eqn.effects:
      continue  # dead: XLA drops it
    live |= {v for v in eqn.invars if _is_var(v)}
    total += _equation(eqn, platform, ragged_rows, passes)
  return total


def _is_var(v) -> bool:
  return not isinstance(v, jex.Literal)


def _equation(eqn, platform, rows, passes) -> Work:
  name = eqn.primitive.name
  inner = lambda jaxpr: count(jaxpr, platform, rows, passes)
  if name == 'dot_general':
    (contract, _), _ = eqn.params['dimension_numbers']
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return Work(2.0 * out.size * math.prod(lhs.shape[i] for i in contract),
                _nbytes(eqn))
  if name == 'ragged_dot_general':
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    dims = eqn.params['ragged_dot_dimension_numbers']
    there = lhs.shape[dims.lhs_ragged_dimensions[0]]
    share = min(1.0, rows / there) if rows else 1.0
    return Work(2.0 * lhs.size * out.shape[-1] * share, _nbytes(eqn) * share)
  if name == 'pallas_call':
    return _kernel(eqn)
  if name == 'scan':
    return inner(eqn.params['jaxpr']).times(eqn.params['length'])
  if name == 'while':
    body = inner(eqn.params['body_jaxpr'])
    if passes is not None:
      return body.times(passes)
    return body._replace(loops=body.loops + bool(body.flops))
  if name == 'cond':
    return _branch(eqn, platform, inner)
  if name == 'shard_map':
    return inner(eqn.params['jaxpr']).times(eqn.params['mesh'].size)
  total = Work()
  for jaxpr in jex.jaxprs_in_params(eqn.params):
    total += inner(jaxpr)
  return total


# Products of scores' size in a call: q k and p v; and in the backward passes
# the scores again, dv, dp, and dk or dq.
_SPLASH = {'splash_mha_fwd': 2, 'splash_mha_dkv': 4, 'splash_mha_dq': 3}


def _kernel(eqn) -> Work:
  name = str(next(eqn.params[key] for key in ('name', 'name_and_src_info')
                  if key in eqn.params))
  products = [n for key, n in _SPLASH.items() if name.startswith(key)]
  cost = eqn.params['cost_estimate']
  if not products:
    return Work() if cost is None else Work(cost.flops, cost.bytes_accessed)
  # [heads or 1, blocks of queries, blocks of keys]: what the mask hides of
  # all queries is not in the grid, and a causal kernel, which is given the
  # places of the queries, skips half of it.
  blocks = next(v.aval.shape for v in eqn.invars if v.aval.ndim >= 3)[-2:]
  side = max(blocks)
  share = math.prod(blocks) / side ** 2
  places = [v for v in eqn.invars if v.aval.ndim == 2
            and v.aval.dtype == jax.numpy.int32]
  if share == 1 and places:
    share = (side + 1) / (2 * side)
  q, k = [v.aval.shape for v in eqn.invars if v.aval.ndim >= 3
          and jax.numpy.issubdtype(v.aval.dtype, jax.numpy.floating)][:2]
  return Work(products[0] * 2.0 * math.prod(q) * k[-2] * share, _nbytes(eqn))


def _branch(eqn, platform, inner) -> Work:
  branches = eqn.params['branches']
  platforms = eqn.params.get('branches_platforms')
  if platforms:
    chosen = next(i for i, names in enumerate(platforms)
                  if names is None or platform in names)
    return inner(branches[chosen])
  return max((inner(b) for b in branches), key=lambda work: work.flops)


def _nbytes(eqn) -> float:
  arrays = [v.aval for v in (*eqn.invars, *eqn.outvars)]
  return float(sum(a.size * jax.numpy.dtype(a.dtype).itemsize
                   for a in arrays if hasattr(a, 'dtype')))
