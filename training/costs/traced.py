"""FLOPs and bytes of a program's products, from its jaxpr: loops multiplied,
recomputation included, whatever XLA makes of it.

Only matrix products and convolutions count, and functions that say what they
count as (linear.counted). Splash attention is known by its name; another kernel
counts with the estimate that it carries.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from architectures.parts import linear


class Place(NamedTuple):
  """Where a program runs, as far as its work depends on that.

  Attributes:
    platform: whose branch runs, where the code has one for each.
    rows: of a grouped product on a device in even load, whose array has room
      for the worst; 0: count all of the array.
    passes: of a loop that depends on data, where they are known otherwise.
    dense: of GROUPED, those that the compiler makes of all rows and all
      groups, and masks.
    useful: whether products count as the shares that linear.useful declares,
      and functions as linear.counted says, instead of as they are computed.
    prompt: whether these are the shares of a prompt.
    loop_rows: `rows` in a pass of the loop that `passes` is of.
  """
  platform: str
  rows: int = 0
  passes: int | None = None
  dense: tuple[str, ...] = ()
  useful: bool = False
  prompt: bool = False
  loop_rows: int = 0


# Grouped products: rows by their group's matrix, by its transpose (as for the
# gradient of the rows), and the gradient of the matrices.
GROUPED = ('forward', 'transposed', 'weights')


class Work(NamedTuple):
  """Of all devices together.

  Attributes:
    flops: of the products; 2abc for [a, b] by [b, c].
    nbytes: of their operands and results, once each.
    loops: loops whose number of passes depends on data, counted as one.
    dense: the FLOPs of grouped products that are made of all groups.
    masked: the FLOPs of products of which a mask hides a part: attention's.
    kernels: kernels that carry no estimate, and count as nothing.
  """
  flops: float = 0.0
  nbytes: float = 0.0
  loops: int = 0
  dense: float = 0.0
  masked: float = 0.0
  kernels: int = 0

  def __add__(self, other: Any):
    return Work(*(a + b for a, b in zip(self, other)))

  def times(self, n: float):
    return Work(self.flops * n, self.nbytes * n, self.loops, self.dense * n,
                self.masked * n, self.kernels)


def count(jaxpr: Any, place: Place) -> Work:
  """Returns the work of a jaxpr, open or closed."""
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  total, live = Work(), {v for v in jaxpr.outvars if _is_var(v)}
  for eqn in reversed(jaxpr.eqns):
    if not any(v in live for v in eqn.outvars) and not eqn.effects:
      continue  # dead: XLA drops it
    live |= {v for v in eqn.invars if _is_var(v)}
    work = _equation(eqn, place)
    if place.useful and work.flops:
      for part, whole, prompt in _DECLARED.findall(
          str(eqn.source_info.name_stack)):
        part = prompt if place.prompt else part
        flops = work.flops * int(part) / int(whole)
        work = work._replace(flops=flops, masked=flops)
    total += work
  return total


_DECLARED = re.compile(linear.USEFUL.format(r'(\d+)', r'(\d+)', r'(\d+)'))
_COUNTED = re.compile(linear.COUNTED.format(r'(\d+)', r'(\d+)'))


def _is_var(v: Any) -> bool:
  return not isinstance(v, jex.Literal)


def _equation(eqn: jex.JaxprEqn, place: Place) -> Work:
  name = eqn.primitive.name
  inner = lambda jaxpr: count(jaxpr, place)
  counted = _COUNTED.fullmatch(str(eqn.params.get('name', '')))
  if place.useful and counted:
    part, whole = map(int, counted.groups())
    return Work(eqn.outvars[0].aval.size * part / whole, _nbytes(eqn))
  if name == 'dot_general':
    (contract, _), _ = eqn.params['dimension_numbers']
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return Work(2.0 * out.size * math.prod(lhs.shape[i] for i in contract),
                _nbytes(eqn))
  if name == 'conv_general_dilated':
    kernel, numbers = eqn.invars[1].aval, eqn.params['dimension_numbers']
    each = kernel.size / kernel.shape[numbers.rhs_spec[0]]  # of one output
    return Work(2.0 * eqn.outvars[0].aval.size * each, _nbytes(eqn))
  if name == 'ragged_dot_general':
    return _grouped(eqn, place)
  if eqn.params.get('name') in ('gmm', 'tgmm'):  # megablox
    return _megablox(eqn, place)
  if name == 'pallas_call':
    return _kernel(eqn)
  if name == 'scan':
    return inner(eqn.params['jaxpr']).times(eqn.params['length'])
  if name == 'while':
    if place.passes is not None:
      return count(eqn.params['body_jaxpr'], place._replace(
          rows=place.loop_rows)).times(place.passes)
    body = inner(eqn.params['body_jaxpr'])
    return body._replace(loops=body.loops + bool(body.flops))
  if name == 'cond':
    return _branch(eqn, place.platform, inner)
  if name == 'shard_map':
    return inner(eqn.params['jaxpr']).times(eqn.params['mesh'].size)
  total = Work()
  for jaxpr in jex.jaxprs_in_params(eqn.params):
    total += inner(jaxpr)
  return total


def _grouped(eqn: jex.JaxprEqn, place: Place) -> Work:
  lhs, rhs, counts = (v.aval for v in eqn.invars)
  dims = eqn.params['ragged_dot_dimension_numbers']
  flops = 2.0 * lhs.size * eqn.outvars[0].aval.shape[-1]
  (_, contracted), _ = dims.dot_dimension_numbers
  if not dims.rhs_group_dimensions:
    kind = 'weights'
  else:
    kind = 'transposed' if contracted == (rhs.ndim - 1,) else 'forward'
  if kind in place.dense:
    flops *= counts.shape[-1]
    return Work(flops, _nbytes(eqn), dense=flops)
  return _rows(eqn, place, flops, lhs.shape[dims.lhs_ragged_dimensions[0]])


def _megablox(eqn: jex.JaxprEqn, place: Place) -> Work:
  """gmm: [R, K] by [E, K, N] or [E, N, K]; tgmm: [K, R] by [R, N]."""
  arrays = [v.aval for v in eqn.invars
            if jax.numpy.issubdtype(v.aval.dtype, jax.numpy.floating)]
  if not arrays:
    return Work()  # which tiles there are, worked out ahead of the product
  lhs, rhs = arrays[:2]
  return _rows(eqn, place, 2.0 * lhs.size * eqn.outvars[0].aval.shape[-1],
               (rhs if eqn.params['name'] == 'tgmm' else lhs).shape[0])


def _rows(eqn: jex.JaxprEqn, place: Place, flops: float, there: int) -> Work:
  """Of the rows in even load, where the array has room for `there`. They are of
  as many groups as there are, or as they are: of no others is the matrix read.
  """
  share = min(1.0, place.rows / there) if place.rows else 1.0
  def part(shape: tuple[int, ...], read: bool):
    if len(shape) == 2:  # rows
      return share
    return min(1.0, share * there / shape[0]) if len(shape) == 3 and read else 1
  return Work(flops * share, sum(
      _size(v.aval) * part(v.aval.shape, read)
      for arrays, read in ((eqn.invars, True), (eqn.outvars, False))
      for v in arrays))


# Products of scores' size in a call: q k and p v; and in the backward passes
# the scores again, dv, dp, and dk or dq.
_SPLASH = {'splash_mha_fwd': 2, 'splash_mha_dkv': 4, 'splash_mha_dq': 3}


def _kernel(eqn: jex.JaxprEqn) -> Work:
  name = str(next(eqn.params[key] for key in ('name', 'name_and_src_info')
                  if key in eqn.params))
  products = [n for key, n in _SPLASH.items() if name.startswith(key)]
  cost = eqn.params['cost_estimate']
  if not products:
    if cost is None:
      return Work(kernels=1)
    return Work(cost.flops, cost.bytes_accessed)
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


def _branch(eqn: jex.JaxprEqn, platform: str, inner: Any) -> Work:
  branches = eqn.params['branches']
  platforms = eqn.params.get('branches_platforms')
  if platforms:
    chosen = next(i for i, names in enumerate(platforms)
                  if names is None or platform in names)
    return inner(branches[chosen])
  return max((inner(b) for b in branches), key=lambda work: work.flops)


def _nbytes(eqn: jex.JaxprEqn) -> float:
  return float(sum(_size(v.aval) for v in (*eqn.invars, *eqn.outvars)
                   if hasattr(v.aval, 'dtype')))


def _size(aval: Any) -> int:
  return aval.size * jax.numpy.dtype(aval.dtype).itemsize
