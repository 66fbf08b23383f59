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

KINDS_OF_COLLECTIVES = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
    'ragged-all-to-all', 'collective-permute', 'collective-broadcast', 'send')
_SENDS_WHOLE_OPERAND = ('collective-permute', 'collective-broadcast', 'send')


class Collective(NamedTuple):
  """One collective instruction of a compiled program.

  Attributes:
    kind: one of KINDS_OF_COLLECTIVES.
    axes: the mesh axes along which the devices of a group differ.
    size: the number of devices in a group.
    hosts: the number of slices (TPU) or hosts (GPU) that a group spans.
    dtype: the dtype of the largest array.
    elements: the number of elements of all arrays of the result, on one device.
    payload: the bytes of the result on one device; for a ragged collective, the
      bytes that are sent if all experts get equally many tokens.
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
    """The bytes that a device sends in one run, by the table of this module: n
    is the number of devices of a group."""
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
    """The bytes that a device must at least send to other slices or hosts in
    one run of the collective.

    Let n be the number of devices of a group and h that of its hosts. Most
    collectives pass their N bytes around a ring, which enters each host once
    and uses the network adapters of all n / h devices there. A device then
    sends N (h - 1) / h / (n / h) bytes. In an all-to-all, each device sends its
    own bytes to all devices on other hosts, N (n - n / h) / n.
    """
    h, n = self.hosts, self.size
    if h == 1:
      return 0.0
    if self.kind in _SENDS_WHOLE_OPERAND:
      return self.sent
    if self.kind in ('all-to-all', 'ragged-all-to-all'):
      return self.payload * (n - n // h) / n

    # The others are rings. The result of a reduce-scatter is 1 / n of the array
    # that goes around. An all-reduce is a reduce-scatter and an all-gather, so
    # that the array goes around twice.
    nbytes = self.payload
    rounds = 1
    if self.kind == 'reduce-scatter':
      nbytes *= n
    if self.kind == 'all-reduce':
      rounds = 2
    return rounds * nbytes * (h - 1) / h / (n // h)


def bytes_sent(collectives: list[Collective]) -> tuple[float, float]:
  """Sums the bytes that a device sends in a step.

  Args:
    collectives: all collectives of the step.

  Returns:
    The bytes that it sends within its slice (TPU) or host (GPU), and those that
    it sends to other slices or hosts.
  """
  total = outside = 0.0
  for collective in collectives:
    total += collective.sent * collective.runs
    outside += collective.sent_outside * collective.runs
  return total - outside, outside


def sum_by_kind(collectives: list[Collective]) -> list[dict]:
  """Sums the collectives of a step by kind, mesh axes and dtype.

  Args:
    collectives: all collectives of the step.

  Returns:
    A row for each kind, axes and dtype, those with most bytes first. Its
    `runs_per_step`, `bytes_sent_per_device` and `bytes_sent_outside_per_device`
    (to other slices or hosts) are sums, and `exact` says whether it is known
    how often each of the collectives runs.
  """
  # Add each collective to the row of its kind, axes and dtype. A collective of
  # n runs sends its bytes n times.
  rows: dict = {}
  for collective in collectives:
    kind, axes, dtype = collective.kind, collective.axes, collective.dtype
    empty_row = dict(
        kind=kind, axes=list(axes), devices=collective.size, dtype=dtype,
        runs_per_step=0, bytes_sent_per_device=0.0,
        bytes_sent_outside_per_device=0.0, exact=True)
    row = rows.setdefault((kind, axes, dtype), empty_row)
    runs = collective.runs
    row['runs_per_step'] += runs
    row['bytes_sent_per_device'] += collective.sent * runs
    row['bytes_sent_outside_per_device'] += collective.sent_outside * runs
    row['exact'] &= collective.known
  return sorted(rows.values(), key=lambda row: -row['bytes_sent_per_device'])


# Three syntaxes of the groups of a collective, and [4]<=[2,2]T(1,0), which is a
# range of numbers that is given a shape and then transposed.
_PATTERN_OF_IOTA = r'<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
_PATTERN_OF_SHAPED_GROUPS = re.compile(
    r'replica_groups=\[([\d,]+)\]' + _PATTERN_OF_IOTA)
_PATTERN_OF_MESH_GROUPS = re.compile(
    r'replica_groups=@?mesh\w*\[(.*?)\]\s*(.*?)\{([^}]*)\}')
_PATTERN_OF_LISTED_GROUPS = re.compile(
    r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}')


def parse_groups(arguments: str) -> np.ndarray | None:
  """Parses the groups of devices that take part in a collective.

  XLA writes them in three syntaxes: {{0,1},{2,3}}, [2,2]<=[4]T(...) and
  mesh['a'=2,...] {'a'}.

  Args:
    arguments: the text of the operands and attributes of the instruction.

  Returns:
    The devices of each group, int [groups, devices]; None if the instruction
    names no groups. Of a permute, whose pairs {{source,target},...} are written
    like groups, each pair is a row.
  """
  shaped = _PATTERN_OF_SHAPED_GROUPS.search(arguments)
  if shaped:
    shape, dims, order = shaped.groups()
    return _parse_iota(dims, order).reshape(_parse_integers(shape))
  on_mesh = _PATTERN_OF_MESH_GROUPS.search(arguments)
  if on_mesh:
    return _groups_of_mesh(*on_mesh.groups())
  listed = _PATTERN_OF_LISTED_GROUPS.search(arguments)
  if listed:
    members = re.findall(r'\{([\d,]+)\}', listed[1])
    return np.array([_parse_integers(group) for group in members])
  return None


def _groups_of_mesh(axes: str, order: str, along: str) -> np.ndarray:
  """Returns the devices of each group of a collective, [groups, devices], where
  XLA writes the groups as axes of a mesh.

  Args:
    axes: the text of the mesh's axes and their sizes, such as 'a'=2,'b'=4.
    order: the text of the order of the devices in the mesh,
      device_ids=([..]<=[..]T(..)); '': they are in the order of their numbers.
    along: the text of the axes along which the devices of a group differ, such
      as 'a'.
  """
  axes_with_sizes = re.findall(r"'([^']+)'=(\d+)", axes)
  size_of_axis = {name: int(size) for name, size in axes_with_sizes}

  # Lay the numbers of the devices out as an array with a dimension for each
  # axis of the mesh.
  given_order = re.search(_PATTERN_OF_IOTA, order)
  if given_order:
    dims, transposition = given_order.groups()
    devices = _parse_iota(dims, transposition)
  else:
    devices = np.arange(math.prod(size_of_axis.values()))
  devices = devices.reshape(list(size_of_axis.values()))

  # Move the axes of a group to the end, so that the reshape makes each group a
  # row.
  group_axes = re.findall(r"'([^']+)'", along)
  mesh_axes = list(size_of_axis)
  group_dimensions = [mesh_axes.index(name) for name in group_axes]
  last_dimensions = range(-len(group_axes), 0)
  group_size = math.prod(size_of_axis[name] for name in group_axes)
  devices = np.moveaxis(devices, group_dimensions, last_dimensions)
  return devices.reshape(-1, group_size)


def _parse_iota(dims: str, order: str | None) -> np.ndarray:
  """Returns the array that XLA writes as <=[dims]T(order): the numbers from 0
  on, in the shape `dims`, then transposed. For example, [2,3]T(1,0) is the
  array [[0, 3], [1, 4], [2, 5]].

  Args:
    dims: the text of the shape, such as '2,3'.
    order: the text of the order of the axes after the transposition, such as
      '1,0'; None, where XLA writes none: the axes keep their order.
  """
  shape = _parse_integers(dims)
  devices = np.arange(math.prod(shape)).reshape(shape)
  if order is None:
    return devices
  return devices.transpose(_parse_integers(order))


def _parse_integers(text: str) -> list[int]:
  """Returns integers that are written with commas between them."""
  return [int(number) for number in text.split(',')]


def axes_of_groups(members: np.ndarray, mesh_shape: Mapping[str, int]
                   ) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of a group differ.

  Args:
    members: the devices of each group, [groups, devices].
    mesh_shape: the number of devices along each mesh axis, in the order of the
      axes. Devices are numbered with the last axis running fastest.
  """
  # Turn the number of each device into its coordinate along each mesh axis. For
  # each axis, this gives an array of the shape of `members`.
  coordinates = np.unravel_index(members, tuple(mesh_shape.values()))

  # A group extends along an axis if any device has another coordinate there
  # than the first device of its group.
  axes = []
  for axis, coordinate_of_device in zip(mesh_shape, coordinates):
    coordinate_of_first = coordinate_of_device[:, :1]
    if (coordinate_of_device != coordinate_of_first).any():
      axes.append(axis)
  return tuple(axes)


def read_collectives(text: str, mesh_shape: Mapping[str, int], *,
                     host_of_device: np.ndarray, ragged_rows: int = 0,
                     num_passes: int | None = None) -> list[Collective]:
  """Reads a compiled program, and returns the collectives (communication
  between devices) that one step of it runs.

  Args:
    text: the text of the program, in XLA's HLO.
    mesh_shape: the number of devices along each mesh axis. Devices are numbered
      with the last axis running fastest.
    host_of_device: int [devices], the number of the slice (TPU) or host (GPU)
      of each device.
    ragged_rows: the number of rows that a device sends in a ragged all-to-all
      if all experts get equally many tokens. Its array has room for the most
      uneven load, so its size says less. 0: count the whole array.
    num_passes: the number of passes of loops whose length depends on data;
      None: it is not known, and one pass is counted.

  Returns:
    The collectives in the order of the program, each once, with the number of
    its runs in a step. Those of a single device are left out.
  """
  collectives: list[Collective] = []
  counted_channels = set()
  for instruction in _walk_instructions(text, num_passes):
    collective = _collective_of_instruction(
        instruction, mesh_shape=mesh_shape, host_of_device=host_of_device,
        ragged_rows=ragged_rows)
    if collective is None or collective.size == 1 or not collective.runs:
      continue

    # Count each collective once. One that runs at the same time as products is
    # printed several times by libtpu 0.0.45: in the fusion of each of these
    # products, with the same channel.
    channel = re.search(r'channel_id=(\d+)', instruction.arguments)
    if channel and 'fus' in instruction.computation:
      key = collective.kind, channel[1]
      if key in counted_channels:
        continue
      counted_channels.add(key)
    collectives.append(collective)
  return collectives


class _Instruction(NamedTuple):
  """An instruction of a program, `name = shape op(arguments`, and how often a
  step runs it.

  Attributes:
    computation: the name of the computation (XLA's function) that it is in.
    name: its name.
    shape: the text of the shape of its result.
    op: the name of its operation.
    arguments: the text of its operands and attributes.
    runs: how often a step runs it.
    known: whether every loop around it has a known number of passes.
  """
  computation: str
  name: str
  shape: str
  op: str
  arguments: str
  runs: int = 1
  known: bool = True


_PATTERN_OF_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*-> .*\{$')
_PATTERN_OF_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) '
                                     r'([a-z][\w\-]*)\((.*)$')
_PATTERN_OF_CALLED = re.compile(
    r'\b(calls|to_apply|body|condition|true_computation|'
    r'false_computation|async_execution_thread)=%?([\w.\-]+)')
_PATTERN_OF_BRANCHES = re.compile(r'(?:branch|called)_computations=\{([^}]*)\}')


def _walk_instructions(text: str, num_passes: int | None
                       ) -> Iterator[_Instruction]:
  """Yields each instruction that a step runs, with the number of its runs: an
  instruction in a loop runs once for each pass of the loop.

  All branches of a conditional are visited, because it is not known which of
  them runs.

  Args:
    text: the text of the program, in XLA's HLO.
    num_passes: the number of passes of loops whose length depends on data;
      None: it is not known, and one pass is counted.
  """
  computations, entry = _parse_computations(text)

  def visit(name: str, runs: int, known: bool) -> Iterator[_Instruction]:
    """Yields the instructions of a computation, and of those that it calls.

    Args:
      name: the name of the computation.
      runs: how often a step runs it.
      known: whether that is known, and not the least number.
    """
    for instruction in computations[name]:
      yield instruction._replace(runs=runs, known=known)

      # The body of a loop runs in each pass, and all other callees run once.
      passes: int | None = 1
      if instruction.op == 'while':
        passes = _trip_count(instruction, computations)
        if passes is None:
          passes = num_passes
      is_known_inside = known and passes is not None
      if passes is None:
        passes = 1
      # The name of an asynchronous call's thread is no computation.
      for callee in _called_computations(instruction):
        if callee in computations:
          yield from visit(callee, runs=runs * passes, known=is_known_inside)

  yield from visit(entry, runs=1, known=True)


def _parse_computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Parses the text of a compiled program (HLO) into its instructions.

  Args:
    text: the text of the program.

  Returns:
    The instructions of each computation, by its name, in the order of the text;
    and the name of the computation at which the program begins (ENTRY).
  """
  computations: dict[str, list[_Instruction]] = {}
  current = entry = ''
  for line in text.splitlines():
    # A line either opens a computation or has an instruction of the open one.
    opening = _PATTERN_OF_COMPUTATION.match(line)
    if opening:
      entry_mark, current = opening.groups()
      computations[current] = []
      if entry_mark:
        entry = current
      continue
    match = _PATTERN_OF_INSTRUCTION.match(line)
    if current and match:
      name, shape, op, arguments = match.groups()
      instruction = _Instruction(
          computation=current, name=name, shape=shape, op=op,
          arguments=arguments)
      computations[current].append(instruction)
  return computations, entry


def _called_computations(instruction: _Instruction) -> list[str]:
  """Returns the names of the computations that an instruction calls, such as
  the body of a loop or the branches of a conditional."""
  called = _PATTERN_OF_CALLED.findall(instruction.arguments)
  names = [name for _, name in called]
  for branches in _PATTERN_OF_BRANCHES.findall(instruction.arguments):
    names += re.findall(r'[\w.\-]+', branches)
  return names


def _trip_count(loop: _Instruction,
                computations: Mapping[str, list[_Instruction]]) -> int | None:
  """Returns the number of passes of a while loop, or None if that depends on
  data.

  Args:
    loop: the instruction of the loop.
    computations: the instructions of each computation of the program, by name.
  """
  # On CPU and GPU, XLA writes the count as an attribute of the loop.
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.arguments)
  if known:
    return int(known[1])

  # On TPU it does not. A scan counts up to a constant n, and the last
  # instruction of the loop's condition is the comparison counter < n.
  called = dict(_PATTERN_OF_CALLED.findall(loop.arguments))
  condition = computations[called['condition']]
  root = condition[-1]
  if root.op != 'compare' or 'direction=LT' not in root.arguments:
    return None

  # Look up the constant by its name, the second operand of the comparison.
  value_of_constant = {}
  for instruction in condition:
    value = re.match(r'(-?\d+)\)', instruction.arguments)
    if instruction.op == 'constant' and value:
      value_of_constant[instruction.name] = int(value[1])
  operands = root.arguments.split(')')[0]
  name_of_bound = re.findall(r'%?([\w.\-]+)', operands)[-1]
  return value_of_constant.get(name_of_bound)


class _Array(NamedTuple):
  """The type and size of an array that is a result of an instruction.

  Attributes:
    dtype: the type of its elements, as XLA writes it: f32, pred, ...
    elements: the number of its elements.
    nbytes: their bytes.
  """
  dtype: str
  elements: int
  nbytes: int


def _parse_arrays(shape: str) -> list[_Array]:
  """Parses the text of a shape, or of a tuple of shapes, into its arrays.

  Args:
    shape: the text as XLA writes it, such as (f32[8,16]{1,0}, pred[]), where
      the braces have the layout in memory.
  """
  without_layouts = re.sub(r'\{[^{}]*\}', '', shape)
  arrays = []
  for dtype, bits, dims in re.findall(
      r'\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]', without_layouts):
    elements = math.prod(int(dim) for dim in dims.split(',') if dim)
    # The bits are a part of a type's name, but for pred, which has 8.
    nbytes = elements * int(bits or 8) // 8
    arrays.append(_Array(dtype=dtype, elements=elements, nbytes=nbytes))
  return arrays


def _collective_of_instruction(instruction: _Instruction,
                               mesh_shape: Mapping[str, int],
                               host_of_device: np.ndarray, ragged_rows: int
                               ) -> Collective | None:
  """Returns an instruction of a program as a Collective; None if it is no
  collective.

  Args:
    instruction: the instruction.
    mesh_shape: the number of devices along each mesh axis. Devices are numbered
      with the last axis running fastest.
    host_of_device: int [devices], the number of the slice (TPU) or host (GPU)
      of each device.
    ragged_rows: the number of rows that a device sends in a ragged all-to-all;
      0: count the whole array.
  """
  kind = instruction.op.removesuffix('-start')
  if kind not in KINDS_OF_COLLECTIVES:
    return None

  # Read the groups of devices. If none are written, all devices are one group.
  members = parse_groups(instruction.arguments)
  if members is None:
    members = np.arange(math.prod(mesh_shape.values()))[None]
  size = members.shape[1]
  # A permute lists pairs (source, target) in place of groups. The size of a
  # pair is 2, or 1 if a single device sends to itself.
  if 'source_target_pairs' in instruction.arguments:
    size = 1
    if members.max() > members.min():
      size = 2

  # Sum the bytes of the result.
  shape = _text_of_results(instruction)
  arrays = _arrays_of_result(kind, instruction=instruction, shape=shape)
  payload = sum(array.nbytes for array in arrays)
  # A fusion of this name holds an all-reduce, of which each device keeps its
  # slice.
  if kind == 'all-reduce' and instruction.computation.startswith(
      'all-reduce-scatter'):
    kind = 'reduce-scatter'
    payload = payload // members.shape[1]
  # The array of a ragged collective has room for the most uneven load. Count
  # the share of its rows that is sent if all experts get equally many.
  if kind == 'ragged-all-to-all' and ragged_rows:
    rows_of_array = int(re.findall(r'\[(\d+)', shape)[0])
    payload = payload * min(rows_of_array, ragged_rows) // rows_of_array

  # The group that spans the most hosts counts for all groups.
  num_hosts = max(len(set(host_of_device[group])) for group in members)
  largest_array = max(arrays, key=lambda array: array.nbytes)
  return Collective(
      kind=kind, axes=axes_of_groups(members, mesh_shape), size=size,
      hosts=num_hosts, dtype=largest_array.dtype,
      elements=sum(array.elements for array in arrays), payload=payload,
      runs=instruction.runs, known=instruction.known)


def _text_of_results(instruction: _Instruction) -> str:
  """Returns the text of the shape of an instruction's results, without its
  operands.

  An instruction that only starts an asynchronous operation has a shape of the
  form ((operands), results, contexts).

  Args:
    instruction: an instruction of a compiled program (HLO).
  """
  shape = instruction.shape
  if not (instruction.op.endswith('-start') and shape.startswith('((')):
    return shape

  # The operands are the first inner tuple. Find its closing bracket by
  # counting, as tuples may be nested in it, and keep the text after that.
  depth = 0
  for i, letter in enumerate(shape):
    if letter == '(':
      depth += 1
    elif letter == ')':
      depth -= 1
      if depth == 1:
        return shape[i + 1:]
  return shape


def _arrays_of_result(kind: str, instruction: _Instruction, shape: str
                      ) -> list[_Array]:
  """Returns the arrays of a collective's result.

  XLA prints an asynchronous collective as two instructions, -start and -done.
  The result of the -start is a tuple that also holds the operands, and on some
  devices contexts, which are u32 arrays of one element. These are left out.

  Args:
    kind: the kind of the collective, without -start.
    instruction: the instruction.
    shape: the text of the results' shape, as `_text_of_results` returns it.
      Where the operands are a tuple of their own, they are not in it.
  """
  arrays = _parse_arrays(shape)
  if instruction.op.endswith('-start'):
    # The operands were a tuple of their own, so only contexts are to drop.
    if instruction.shape.startswith('(('):
      context = 'u32', 1
      return [array for array in arrays
              if (array.dtype, array.elements) != context]
    # The tuple of an all-gather is operands and results, as many of each, and
    # that of a permute is the operand, the result and contexts.
    if kind == 'all-gather':
      return arrays[len(arrays) // 2:]
    if kind == 'collective-permute':
      return arrays[1:2]
  if kind == 'send':
    return arrays[:1]
  return arrays
