"""What a compiled step sends: read from the text of the program.

Bytes a chip sends in each, n devices in a group, by the ring (Chan et al.
2007): all-gather (n - 1) / n of the result, reduce-scatter as much of the
operand, all-reduce both, all-to-all (n - 1) / n of the operand, and a permute
all of it.
"""

from collections.abc import Mapping
import math
import re
from typing import NamedTuple

import numpy as np

from tools.plan import hlo

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
    source: the operation in the model's code.
  """
  kind: str
  axes: tuple[str, ...]
  size: int
  hosts: int
  dtype: str
  elements: int
  payload: int
  runs: int
  known: bool
  source: str

  @property
  def sent(self) -> float:
    """Bytes that a chip sends in one run."""
    n = self.size
    factor = {
        'all-gather': (n - 1) / n, 'all-reduce': 2 * (n - 1) / n,
        'reduce-scatter': n - 1, 'all-to-all': (n - 1) / n,
        'ragged-all-to-all': (n - 1) / n, 'collective-permute': 1,
        'collective-broadcast': 1, 'send': 1}[self.kind]
    return factor * self.payload

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


def groups(rest: str) -> np.ndarray | None:
  """Returns the devices of each group, [groups, devices]; None: not told.

  Three syntaxes: {{0,1},{2,3}}, [2,2]<=[4]T(...), mesh['a'=2,...] {'a'}.
  """
  ints = lambda text: [int(i) for i in text.split(',')]
  iota = re.search(
      r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest)
  if iota:
    ids = np.arange(math.prod(ints(iota[2]))).reshape(ints(iota[2]))
    return ids.transpose(ints(iota[3]) if iota[3] else None).reshape(
        ints(iota[1]))
  named = re.search(r'replica_groups=@?mesh\w*\[(.*?)\]\s*(.*?)\{([^}]*)\}',
                    rest)
  if named:
    return _named_groups(*named.groups())
  text = re.search(r'replica_groups=\{(\{.*?\})\}', rest)
  if text:
    return np.array([ints(g) for g in re.findall(r'\{([\d,]+)\}', text[1])])
  pairs = re.search(r'source_target_pairs=\{(\{.*?\})\}', rest)
  if pairs:
    return np.array([ints(g) for g in re.findall(r'\{([\d,]+)\}', pairs[1])])
  return None


def _named_groups(axes: str, order: str, over: str) -> np.ndarray:
  """Groups over named axes; `order` may hold device_ids=([..]<=[..]T(..))."""
  sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", axes)}
  ids = np.arange(math.prod(sizes.values()))
  iota = re.search(r'<=\[([\d,]+)\](?:T\(([\d,]+)\))?', order)
  if iota:
    dims = [int(i) for i in iota[1].split(',')]
    ids = ids.reshape(dims)
    if iota[2]:
      ids = ids.transpose([int(i) for i in iota[2].split(',')])
  ids = ids.reshape(list(sizes.values()))
  names = re.findall(r"'([^']+)'", over)
  moved = [list(sizes).index(name) for name in names]
  ids = np.moveaxis(ids, moved, range(-len(moved), 0))
  return ids.reshape(-1, math.prod(sizes[name] for name in names))


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
    passes: as of hlo.walk.
  """
  computations = hlo.parse(text)
  found, fused = [], set()
  for place in hlo.walk(computations, passes):
    one = _collective(place, mesh, host_of, ragged_rows)
    if one is None or one.size == 1 or not one.runs:
      continue
    # A collective that runs beside products is printed by libtpu 0.0.45 in the
    # fusion of each of them, with the same channel.
    channel = re.search(r'channel_id=(\d+)', place.instruction.rest)
    if channel and 'fus' in place.computation:
      if (one.kind, channel[1]) in fused:
        continue
      fused.add((one.kind, channel[1]))
    found.append(one)
  return found


def _collective(place: hlo.Place, mesh, host_of, ragged_rows):
  _, shape, op, rest = place.instruction
  kind, start = op.removesuffix('-start'), op.endswith('-start')
  if kind not in KINDS:
    return None
  # A fusion of this name holds an all-reduce and keeps a slice of it.
  scattered = kind == 'all-reduce' and place.computation.startswith(
      'all-reduce-scatter')
  parts = hlo.arrays(shape)
  if start and shape.startswith('(('):  # (operands), results, u32[] contexts
    shape = _after_operands(shape)
    parts = [p for p in hlo.arrays(shape) if p[:2] != ('u32', 1)]
  elif start and kind in ('all-gather', 'collective-permute'):
    parts = parts[len(parts) // 2:] if kind == 'all-gather' else parts[1:2]
  if kind == 'send':
    parts = parts[:1]
  members = groups(rest)
  if members is None:
    members = np.arange(math.prod(mesh.values()))[None]
  dtype, _, _ = max(parts, key=lambda part: part[2])
  payload = sum(part[2] for part in parts)
  if scattered:
    kind, payload = 'reduce-scatter', payload // members.shape[1]
  if kind == 'ragged-all-to-all' and ragged_rows:
    rows = int(re.search(r'\[(\d+)', shape)[1])
    payload = payload * min(rows, ragged_rows) // rows
  source = re.search(r'op_name="([^"]*)"', rest)
  hosts = max(len(set(host_of[row])) for row in members)
  size = (members.shape[1] if 'source_target_pairs' not in rest
          else int(members.max() > members.min()) + 1)
  return Collective(kind, axes_of(members, mesh), size, hosts, dtype,
                    sum(part[1] for part in parts), payload, place.runs,
                    place.known, source[1] if source else '')


def _after_operands(shape: str) -> str:
  """Returns what follows the first tuple within a tuple."""
  depth = np.cumsum([(a == '(') - (a == ')') for a in shape])
  closed = next(i for i, a in enumerate(shape) if a == ')' and depth[i] == 1)
  return shape[closed + 1:]


def table(found: list[Collective]) -> list[dict]:
  """Sums them by kind, axes and dtype, most bytes first."""
  rows: dict = {}
  for one in found:
    row = rows.setdefault((one.kind, one.axes, one.dtype), dict(
        kind=one.kind, axes=list(one.axes), devices=one.size, dtype=one.dtype,
        runs_per_step=0, bytes_sent_per_device=0.0,
        bytes_sent_outside_per_device=0.0, exact=True, largest='', _most=0.0))
    row['runs_per_step'] += one.runs
    row['bytes_sent_per_device'] += one.sent * one.runs
    row['bytes_sent_outside_per_device'] += one.sent_outside * one.runs
    row['exact'] &= one.known
    if one.sent * one.runs > row['_most']:
      row['_most'], row['largest'] = one.sent * one.runs, one.source
  ordered = sorted(rows.values(), key=lambda r: -r['bytes_sent_per_device'])
  return [{k: v for k, v in row.items() if k != '_most'} for row in ordered]
