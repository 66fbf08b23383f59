"""The collectives of a compiled step, read from the text of the program.

A collective runs in a ring of n devices (Chan et al. 2007). In each run, a chip
sends:
  all-gather           (n - 1) / n of the bytes of the result
  reduce-scatter       (n - 1) / n of the bytes of the operand
  all-reduce           both of these
  all-to-all           (n - 1) / n of the bytes of the operand
  collective-permute   all of the operand
"""

from collections.abc import Iterator, Mapping
import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
         'ragged-all-to-all', 'collective-permute', 'collective-broadcast',
         'send')
_SENDS_WHOLE_OPERAND = ('collective-permute', 'collective-broadcast', 'send')


class Collective(NamedTuple):
  """One collective instruction.

  Attributes:
    kind: one of KINDS.
    axes: the mesh axes along which the devices of a group differ.
    size: the number of devices in a group.
    hosts: the number of slices (TPU) or hosts (GPU) that a group spans.
    dtype: the dtype of the largest array.
    elements: the elements of all arrays of the result, on one device.
    payload: the bytes of the result on one device; for a ragged collective,
      those that travel in even load.
    runs: how often a step runs it.
    known: whether `runs` is known; otherwise it is a lower bound.
  """
  kind: str
  axes: tuple[str, ...]
  size: int
  hosts: int
  dtype: str
  elements: int
  payload: float
  runs: int
  known: bool = True

  @property
  def sent(self) -> float:
    """The bytes that a chip sends in one run."""
    n = self.size
    if self.kind in _SENDS_WHOLE_OPERAND:
      return self.payload
    if self.kind == 'reduce-scatter':  # payload is 1 / n of the operand
      return (n - 1) * self.payload
    if self.kind == 'all-reduce':
      return 2 * (n - 1) / n * self.payload
    return (n - 1) / n * self.payload

  @property
  def sent_outside(self) -> float:
    """The bytes of `sent` that go between slices or hosts, at the least.

    Rings enter each host once and use the adapters of all of its devices. An
    all-to-all cannot do so.
    """
    h, n = self.hosts, self.size
    if h == 1:
      return 0.0
    if self.kind in _SENDS_WHOLE_OPERAND:
      return self.sent
    if self.kind in ('all-to-all', 'ragged-all-to-all'):
      return self.payload * (n - n // h) / n

    whole, passes = self.payload, 1
    if self.kind == 'reduce-scatter':
      whole *= n
    if self.kind == 'all-reduce':
      passes = 2
    return passes * whole * (h - 1) / h / (n // h)


def bytes_sent(sent: list[Collective]) -> tuple[float, float]:
  """Returns the bytes that a device sends in a step within its slice or host,
  and those that it sends to others."""
  everything = sum(one.sent * one.runs for one in sent)
  outside = sum(one.sent_outside * one.runs for one in sent)
  return everything - outside, outside


def sum_by_kind(sent: list[Collective]) -> list[dict]:
  """Sums the collectives of a step by kind, mesh axes and dtype.

  Args:
    sent: the collectives.

  Returns:
    A row for each kind, axes and dtype, those with most bytes first.
    runs_per_step, bytes_sent_per_device, bytes_sent_outside_per_device (between
    slices or hosts): sums. exact: whether it is known how often each runs.
  """
  rows: dict = {}
  for one in sent:
    key = one.kind, one.axes, one.dtype
    empty = dict(
        kind=one.kind, axes=list(one.axes), devices=one.size, dtype=one.dtype,
        runs_per_step=0, bytes_sent_per_device=0.0,
        bytes_sent_outside_per_device=0.0, exact=True)
    row = rows.setdefault(key, empty)
    row['runs_per_step'] += one.runs
    row['bytes_sent_per_device'] += one.sent * one.runs
    row['bytes_sent_outside_per_device'] += one.sent_outside * one.runs
    row['exact'] &= one.known
  return sorted(rows.values(), key=lambda row: -row['bytes_sent_per_device'])


# Three syntaxes of the groups of a collective, and [4]<=[2,2]T(1,0), which is a
# range of numbers that is given a shape and then transposed.
_IOTA = r'<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
_SHAPED_GROUPS = re.compile(r'replica_groups=\[([\d,]+)\]' + _IOTA)
_MESH_GROUPS = re.compile(
    r'replica_groups=@?mesh\w*\[(.*?)\]\s*(.*?)\{([^}]*)\}')
_LISTED_GROUPS = re.compile(
    r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}')


def parse_groups(rest: str) -> np.ndarray | None:
  """Returns the devices of each group, [groups, devices].

  It reads the three syntaxes {{0,1},{2,3}}, [2,2]<=[4]T(...) and
  mesh['a'=2,...] {'a'}.

  Args:
    rest: the operands and attributes of the instruction.

  Returns:
    None, where the instruction names no groups.
  """
  shaped = _SHAPED_GROUPS.search(rest)
  if shaped:
    shape, dims, order = shaped.groups()
    return _parse_iota(dims, order).reshape(_parse_integers(shape))
  on_mesh = _MESH_GROUPS.search(rest)
  if on_mesh:
    return _groups_of_mesh(*on_mesh.groups())
  listed = _LISTED_GROUPS.search(rest)
  if listed:
    members = re.findall(r'\{([\d,]+)\}', listed[1])
    return np.array([_parse_integers(group) for group in members])
  return None


def _groups_of_mesh(axes: str, order: str, along: str) -> np.ndarray:
  """Returns the devices of each group, [groups, devices], of a mesh.

  Args:
    axes: the axes of the mesh and their sizes: 'a'=2,'b'=4.
    order: device_ids=([..]<=[..]T(..)), the order of the devices in the mesh;
      without that, they are in the order of their numbers.
    along: the axes along which the devices of a group differ: 'a'.
  """
  pairs = re.findall(r"'([^']+)'=(\d+)", axes)
  sizes = {name: int(size) for name, size in pairs}

  # The devices, one axis of the mesh a dimension.
  turned = re.search(_IOTA, order)
  if turned:
    devices = _parse_iota(*turned.groups())
  else:
    devices = np.arange(math.prod(sizes.values()))
  devices = devices.reshape(list(sizes.values()))

  # The axes of a group come last, so that the reshape makes each group a row.
  names = re.findall(r"'([^']+)'", along)
  mesh_axes = list(sizes)
  places = [mesh_axes.index(name) for name in names]
  count = math.prod(sizes[name] for name in names)
  last = range(-len(places), 0)
  return np.moveaxis(devices, places, last).reshape(-1, count)


def _parse_iota(dims: str, order: str | None) -> np.ndarray:
  """Returns the array that XLA writes as <=[dims]T(order)."""
  shape = _parse_integers(dims)
  devices = np.arange(math.prod(shape)).reshape(shape)
  if order is None:
    return devices.transpose()
  return devices.transpose(_parse_integers(order))


def _parse_integers(text: str) -> list[int]:
  return [int(number) for number in text.split(',')]


def axes_of_groups(members: np.ndarray, mesh: Mapping[str, int]
                   ) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of a group differ.

  Args:
    members: the devices of each group, [groups, devices].
    mesh: the size of each axis; devices are numbered in its order.
  """
  # The coordinate of each device along each mesh axis, [groups, devices]. An
  # axis counts where a device's coordinate is not that of its group's first.
  coordinates = np.unravel_index(members, tuple(mesh.values()))
  axes = []
  for axis, positions in zip(mesh, coordinates):
    if (positions != positions[:, :1]).any():
      axes.append(axis)
  return tuple(axes)


def read_collectives(text: str, mesh: Mapping[str, int], *, host_of: np.ndarray,
                     ragged_rows: int = 0, passes: int | None = None
                     ) -> list[Collective]:
  """Returns every collective of a compiled program.

  Args:
    text: the text of the program.
    mesh: the size of each axis; devices are numbered in its order.
    host_of: for each device in that order, its slice (TPU) or host (GPU).
    ragged_rows: the rows that a device sends in a ragged all-to-all, in even
      load; the array has room for the worst. 0: count all of the array.
    passes: the passes of a loop that depends on data, where they are known
      otherwise; None: they are not, and one is counted.
  """
  sent, seen = [], set()
  for place in _walk_instructions(text, passes):
    one = _collective_of_instruction(place, mesh=mesh, host_of=host_of,
                                     ragged_rows=ragged_rows)
    if one is None or one.size == 1 or not one.runs:
      continue

    # A collective that runs beside products is printed by libtpu 0.0.45 in the
    # fusion of each of them, with the same channel.
    channel = re.search(r'channel_id=(\d+)', place.rest)
    if channel and 'fus' in place.computation:
      key = one.kind, channel[1]
      if key in seen:
        continue
      seen.add(key)
    sent.append(one)
  return sent


class _Instruction(NamedTuple):
  """An instruction, `name = shape op(rest`, and how often a step runs it.

  Attributes:
    computation: the name of the computation that it stands in.
    name: its name.
    shape: the text of its result's shape.
    op: its operation.
    rest: its operands and attributes.
    runs: how often a step runs it.
    known: whether every loop around it has a known trip count.
  """
  computation: str
  name: str
  shape: str
  op: str
  rest: str
  runs: int = 1
  known: bool = True


_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*-> .*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) '
                          r'([a-z][\w\-]*)\((.*)$')
_CALLED = re.compile(r'\b(calls|to_apply|body|condition|true_computation|'
                     r'false_computation|async_execution_thread)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'(?:branch|called)_computations=\{([^}]*)\}')


def _walk_instructions(text: str, passes: int | None) -> Iterator[_Instruction]:
  """Yields each instruction that a step reaches.

  Every branch of a conditional is walked, because it is not known which of them
  runs.
  """
  computations, entry = _parse_computations(text)

  def visit(name: str, runs: int, known: bool) -> Iterator[_Instruction]:
    for place in computations[name]:
      yield place._replace(runs=runs, known=known)
      times: int | None = 1
      if place.op == 'while':
        times = _trip_count(place, computations)
        if times is None:
          times = passes
      inner_known = known and times is not None
      if times is None:
        times = 1
      for callee in _called_computations(place):
        if callee in computations:
          yield from visit(callee, runs * times, inner_known)

  yield from visit(entry, 1, True)


def _parse_computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Parses the text of a compiled program (HLO) into its instructions.

  Returns:
    The instructions of each computation, by its name, in the order of the text;
    and the name of the computation at which the program begins (ENTRY).
  """
  computations: dict[str, list[_Instruction]] = {}
  current = entry = ''
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      current = head[2]
      computations[current] = []
      if head[1]:
        entry = current
      continue
    instruction = _INSTRUCTION.match(line)
    if current and instruction:
      name, shape, op, rest = instruction.groups()
      place = _Instruction(
          computation=current, name=name, shape=shape, op=op, rest=rest)
      computations[current].append(place)
  return computations, entry


def _called_computations(place: _Instruction) -> list[str]:
  """Returns the names of the computations that an instruction calls."""
  names = [name for _, name in _CALLED.findall(place.rest)]
  for branches in _BRANCHES.findall(place.rest):
    names += re.findall(r'[\w.\-]+', branches)
  return names


def _trip_count(place: _Instruction,
                computations: Mapping[str, list[_Instruction]]) -> int | None:
  """Returns how often a while loop runs its body; None: it depends on data.

  XLA says so on CPU and GPU. libtpu leaves only the comparison of the counter
  with a constant, as jax writes a scan.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', place.rest)
  if known:
    return int(known[1])

  # The last instruction of the condition compares with one of its constants.
  called = dict(_CALLED.findall(place.rest))
  condition = computations[called['condition']]
  root = condition[-1]
  if root.op != 'compare' or 'direction=LT' not in root.rest:
    return None
  constants = {}
  for instruction in condition:
    value = re.match(r'(-?\d+)\)', instruction.rest)
    if instruction.op == 'constant' and value:
      constants[instruction.name] = int(value[1])
  operands = root.rest.split(')')[0]
  bound = re.findall(r'%?([\w.\-]+)', operands)[-1]
  return constants.get(bound)


class _Array(NamedTuple):
  """An array of a shape's text."""
  dtype: str
  elements: int
  nbytes: int


def _parse_arrays(shape: str) -> list[_Array]:
  """Returns each array of a shape's text."""
  without_layouts = re.sub(r'\{[^{}]*\}', '', shape)
  arrays = []
  for dtype, bits, dims in re.findall(
      r'\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]', without_layouts):
    elements = math.prod(int(dim) for dim in dims.split(',') if dim)
    nbytes = elements * int(bits or 8) // 8  # pred has 8
    arrays.append(_Array(dtype=dtype, elements=elements, nbytes=nbytes))
  return arrays


def _collective_of_instruction(place: _Instruction, mesh: Mapping[str, int],
                               host_of: np.ndarray, ragged_rows: int
                               ) -> Collective | None:
  """Returns the collective that an instruction of a program is; None: it is
  none.

  Args:
    place: the instruction.
    mesh: the size of each axis; devices are numbered in its order.
    host_of: for each device in that order, its slice (TPU) or host (GPU).
    ragged_rows: the rows that a device sends in a ragged all-to-all; 0: count
      all of the array.
  """
  kind = place.op.removesuffix('-start')
  if kind not in KINDS:
    return None

  # The groups; without any, all devices are one.
  members = parse_groups(place.rest)
  if members is None:
    members = np.arange(math.prod(mesh.values()))[None]
  size = members.shape[1]
  # A permute lists pairs (source, target) in place of groups. The
  # size is 2, or 1 where a single device sends to itself.
  if 'source_target_pairs' in place.rest:
    size = 1
    if members.max() > members.min():
      size = 2

  # The bytes of the result.
  shape = _text_of_results(place)
  arrays = _arrays_of_result(kind, place, shape)
  payload = sum(array.nbytes for array in arrays)
  if kind == 'all-reduce' and place.computation.startswith(
      'all-reduce-scatter'):
    # A fusion of this name holds an all-reduce and keeps a slice of it.
    kind, payload = 'reduce-scatter', payload // members.shape[1]
  if kind == 'ragged-all-to-all' and ragged_rows:
    rows = int(re.findall(r'\[(\d+)', shape)[0])
    payload = payload * min(rows, ragged_rows) // rows

  return Collective(
      kind=kind, axes=axes_of_groups(members, mesh), size=size,
      hosts=max(len(set(host_of[group])) for group in members),
      dtype=max(arrays, key=lambda array: array.nbytes).dtype,
      elements=sum(array.elements for array in arrays), payload=payload,
      runs=place.runs, known=place.known)


def _text_of_results(place: _Instruction) -> str:
  """Returns the text of the results' shape: where an operation only starts,
  its text ((operands), results, contexts) holds more than these."""
  shape = place.shape
  if not (place.op.endswith('-start') and shape.startswith('((')):
    return shape
  # The operands are the first inner tuple: the text after its end is kept.
  depth = 0
  for i, letter in enumerate(shape):
    if letter == '(':
      depth += 1
    elif letter == ')':
      depth -= 1
      if depth == 1:  # the operands end here
        return shape[i + 1:]
  return shape


def _arrays_of_result(kind: str, place: _Instruction, shape: str
                      ) -> list[_Array]:
  """Returns the arrays of a collective's result, without operands and contexts
  that stand beside them.

  An asynchronous collective is printed in two halves, and the tuple of its
  -start half also holds the operands and, at times, contexts: u32 arrays of one
  element.

  Args:
    kind: the kind of the collective, without -start.
    place: the instruction.
    shape: the text of `_text_of_results`.
  """
  arrays = _parse_arrays(shape)
  if place.op.endswith('-start'):
    if place.shape.startswith('(('):
      context = 'u32', 1
      return [array for array in arrays
              if (array.dtype, array.elements) != context]
    if kind == 'all-gather':
      return arrays[len(arrays) // 2:]
    if kind == 'collective-permute':
      return arrays[1:2]
  if kind == 'send':
    return arrays[:1]
  return arrays
