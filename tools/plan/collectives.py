"""What a compiled step sends: read from the text of the program.

Bytes a chip sends in each, n devices in a group, by the ring (Chan et al.
2007): all-gather (n - 1) / n of the result, reduce-scatter as much of the
operand, all-reduce both, all-to-all (n - 1) / n of the operand, and a permute
all of it.
"""

from collections.abc import Iterator, Mapping
import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
         'ragged-all-to-all', 'collective-permute', 'collective-broadcast',
         'send')


class Collective(NamedTuple):
  """One collective instruction.

  Attributes:
    kind: of KINDS.
    axes: the mesh axes along which the devices of a group differ.
    size: devices of a group.
    hosts: over how many slices (TPU) or hosts (GPU) a group goes.
    dtype: of the largest array.
    elements: of all arrays of the result, on one device.
    payload: bytes of the result on one device; of a ragged one, those that
      travel in even load.
    runs: how often a step runs it.
    known: whether `runs` is known; otherwise it is a lower bound.
  """
  kind: str
  axes: tuple[str, ...]
  size: int
  hosts: int
  dtype: str
  elements: int
  payload: int
  runs: int
  known: bool = True

  @property
  def sent(self) -> float:
    """Bytes that a chip sends in one run."""
    n = self.size
    factor = {'all-reduce': 2 * (n - 1) / n, 'reduce-scatter': n - 1,
              'collective-permute': 1, 'collective-broadcast': 1, 'send': 1}
    return factor.get(self.kind, (n - 1) / n) * self.payload

  @property
  def sent_outside(self) -> float:
    """Of these, bytes between slices or hosts, at best: rings that enter each
    host once and use all of its devices' adapters; an all-to-all cannot."""
    h, n = self.hosts, self.size
    if h == 1:
      return 0.0
    if self.kind in ('collective-permute', 'collective-broadcast', 'send'):
      return self.sent
    if self.kind in ('all-to-all', 'ragged-all-to-all'):
      return self.payload * (n - n // h) / n
    whole = self.payload * (n if self.kind == 'reduce-scatter' else 1)
    passes = 2 if self.kind == 'all-reduce' else 1
    return passes * whole * (h - 1) / h / (n // h)


def total(sent: list[Collective]) -> tuple[float, float]:
  """Returns the bytes that a device sends in a step within its slice or host,
  and those between them."""
  outside = sum(one.sent_outside * one.runs for one in sent)
  return sum(one.sent * one.runs for one in sent) - outside, outside


def table(sent: list[Collective]) -> list[dict]:
  """Sums them by kind, axes and dtype, most bytes first."""
  rows: dict = {}
  for one in sent:
    row = rows.setdefault((one.kind, one.axes, one.dtype), dict(
        kind=one.kind, axes=list(one.axes), devices=one.size, dtype=one.dtype,
        runs_per_step=0, bytes_sent_per_device=0.0,
        bytes_sent_outside_per_device=0.0, exact=True))
    row['runs_per_step'] += one.runs
    row['bytes_sent_per_device'] += one.sent * one.runs
    row['bytes_sent_outside_per_device'] += one.sent_outside * one.runs
    row['exact'] &= one.known
  return sorted(rows.values(), key=lambda r: -r['bytes_sent_per_device'])


def groups(rest: str) -> np.ndarray | None:
  """Returns the devices of each group, [groups, devices]; None: not told.

  Three syntaxes: {{0,1},{2,3}}, [2,2]<=[4]T(...), mesh['a'=2,...] {'a'}.
  """
  ints = lambda text: [int(i) for i in text.split(',')]
  iota = r'<=\[([\d,]+)\](?:T\(([\d,]+)\))?'

  def numbered(dims: str, turned: str | None) -> np.ndarray:
    ids = np.arange(math.prod(ints(dims))).reshape(ints(dims))
    return ids.transpose(ints(turned) if turned else None)

  if match := re.search(r'replica_groups=\[([\d,]+)\]' + iota, rest):
    return numbered(match[2], match[3]).reshape(ints(match[1]))
  if match := re.search(
      r'replica_groups=@?mesh\w*\[(.*?)\]\s*(.*?)\{([^}]*)\}', rest):
    sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", match[1])}
    order = re.search(iota, match[2])  # device_ids=([..]<=[..]T(..))
    ids = (numbered(*order.groups()) if order else np.arange(
        math.prod(sizes.values()))).reshape([*sizes.values()])
    names = re.findall(r"'([^']+)'", match[3])
    at = [[*sizes].index(name) for name in names]
    return np.moveaxis(ids, at, range(-len(at), 0)).reshape(
        -1, math.prod(sizes[name] for name in names))
  if match := re.search(
      r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}', rest):
    return np.array([ints(g) for g in re.findall(r'\{([\d,]+)\}', match[1])])
  return None


def axes_of(members: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of a group differ."""
  places = np.unravel_index(members, tuple(mesh.values()))
  return tuple(axis for axis, at in zip(mesh, places)
               if (at != at[:, :1]).any())


def read(text: str, mesh: Mapping[str, int], *, host_of: np.ndarray,
         ragged_rows: int = 0, passes: int | None = None
         ) -> list[Collective]:
  """Returns every collective of a compiled program.

  Args:
    text: of the program.
    mesh: the size of each axis; devices are numbered in its order.
    host_of: for each device in that order, its slice (TPU) or host (GPU).
    ragged_rows: rows that a device sends in a ragged all-to-all, in even
      load; the array has room for the worst. 0: count all of the array.
    passes: of a loop that depends on data, where they are known otherwise;
      None: they are not, and one is counted.
  """
  sent, fused = [], set()
  for place in _walk(text, passes):
    one = _collective(place, mesh, host_of, ragged_rows)
    if one is None or one.size == 1 or not one.runs:
      continue
    # A collective that runs beside products is printed by libtpu 0.0.45 in the
    # fusion of each of them, with the same channel.
    channel = re.search(r'channel_id=(\d+)', place.rest)
    if channel and 'fus' in place.computation:
      if (one.kind, channel[1]) in fused:
        continue
      fused.add((one.kind, channel[1]))
    sent.append(one)
  return sent


class _Place(NamedTuple):
  """An instruction, `name = shape op(rest`, and how often a step runs it;
  known: whether every loop around it has a known trip count."""
  computation: str
  name: str
  shape: str
  op: str
  rest: str  # operands and attributes
  runs: int = 1
  known: bool = True


_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*-> .*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) '
                          r'([a-z][\w\-]*)\((.*)$')
_CALLED = re.compile(r'\b(calls|to_apply|body|condition|true_computation|'
                     r'false_computation|async_execution_thread)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'(?:branch|called)_computations=\{([^}]*)\}')


def _walk(text: str, passes: int | None) -> Iterator[_Place]:
  """Yields each instruction that a step reaches. Of a conditional, every branch
  is walked: which of them runs is not known."""
  computations: dict[str, list[_Place]] = {}
  name = entry = ''
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      name = head[2]
      computations[name] = []
      entry = name if head[1] else entry
    elif name and (match := _INSTRUCTION.match(line)):
      computations[name].append(_Place(name, *match.groups()))

  def visit(name: str, runs: int, known: bool) -> Iterator[_Place]:
    for place in computations[name]:
      yield place._replace(runs=runs, known=known)
      times: int | None = 1
      if place.op == 'while':
        times = _trip_count(place, computations)
        times = passes if times is None else times
      names = [name for _, name in _CALLED.findall(place.rest)]
      for group in _BRANCHES.findall(place.rest):
        names += re.findall(r'[\w.\-]+', group)
      for callee in names:
        if callee in computations:
          yield from visit(callee, runs * (1 if times is None else times),
                           known and times is not None)

  yield from visit(entry, 1, True)


def _trip_count(place: _Place, computations: Mapping[str, list[_Place]]
                ) -> int | None:
  """Returns how often a while runs its body; None: it depends on data.

  XLA says so on CPU and GPU. libtpu leaves only the comparison of the counter
  with a constant, as jax writes a scan.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', place.rest):
    return int(known[1])
  condition = computations[dict(_CALLED.findall(place.rest))['condition']]
  constants = {i.name: int(i.rest.split(')')[0]) for i in condition
               if i.op == 'constant' and re.match(r'-?\d+\)', i.rest)}
  root = condition[-1]
  if root.op == 'compare' and 'direction=LT' in root.rest:
    bound = re.findall(r'%?([\w.\-]+)', root.rest.split(')')[0])[-1]
    return constants.get(bound)
  return None


def _arrays(shape: str) -> list[tuple[str, int, int]]:
  """Returns (dtype, elements, bytes) of each array of a shape's text."""
  arrays = []
  for dtype, dims in re.findall(r'\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]',
                                re.sub(r'\{[^{}]*\}', '', shape)):
    size = math.prod(int(dim) for dim in dims.split(',') if dim)
    bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
    arrays.append((dtype, size, size * bits // 8))
  return arrays


def _collective(place: _Place, mesh, host_of, ragged_rows) -> Collective | None:
  shape, rest = place.shape, place.rest
  kind, start = place.op.removesuffix('-start'), place.op.endswith('-start')
  if kind not in KINDS:
    return None
  parts = _arrays(shape)
  if start and shape.startswith('(('):  # (operands), results, u32[] contexts
    depth = np.cumsum([(a == '(') - (a == ')') for a in shape])
    shape = shape[next(i for i, a in enumerate(shape)
                       if a == ')' and depth[i] == 1) + 1:]
    parts = [part for part in _arrays(shape) if part[:2] != ('u32', 1)]
  elif start and kind == 'all-gather':
    parts = parts[len(parts) // 2:]
  elif start and kind == 'collective-permute':
    parts = parts[1:2]
  elif kind == 'send':
    parts = parts[:1]
  members = groups(rest)
  if members is None:
    members = np.arange(math.prod(mesh.values()))[None]
  payload = sum(part[2] for part in parts)
  # A fusion of this name holds an all-reduce and keeps a slice of it.
  if kind == 'all-reduce' and place.computation.startswith(
      'all-reduce-scatter'):
    kind, payload = 'reduce-scatter', payload // members.shape[1]
  if kind == 'ragged-all-to-all' and ragged_rows:
    rows = int(re.search(r'\[(\d+)', shape)[1])
    payload = payload * min(rows, ragged_rows) // rows
  size = (members.shape[1] if 'source_target_pairs' not in rest
          else int(members.max() > members.min()) + 1)
  return Collective(
      kind, axes_of(members, mesh), size,
      max(len(set(host_of[row])) for row in members),
      max(parts, key=lambda part: part[2])[0],
      sum(part[1] for part in parts), payload, place.runs, place.known)
