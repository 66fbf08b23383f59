"""Reads a compiled program's text: computations, calls, and how often each
runs in a step."""

import re
from typing import NamedTuple, Optional

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*-> .*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) '
                          r'([a-z][\w\-]*)\((.*)$')
_CALLED = re.compile(r'\b(calls|to_apply|body|condition|true_computation|'
                     r'false_computation|async_execution_thread)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'(?:branch|called)_computations=\{([^}]*)\}')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]')
_BITS = {'pred': 8, 'token': 0}


class Instruction(NamedTuple):
  """One line: `name = shape op(rest`."""
  name: str
  shape: str
  op: str
  rest: str  # operands and attributes


class Computation(NamedTuple):
  """A named block of instructions."""
  name: str
  entry: bool
  instructions: list[Instruction]


class Place(NamedTuple):
  """An instruction of the program, and how often a step runs it."""
  computation: str
  instruction: Instruction
  runs: int
  known: bool  # whether every loop around it has a known trip count


def arrays(shape: str) -> list[tuple[str, int, int]]:
  """Returns (dtype, elements, bytes) of each array of a shape's text."""
  found = []
  for dtype, dims in _ARRAY.findall(re.sub(r'\{[^{}]*\}', '', shape)):
    size = 1
    for dim in dims.split(','):
      size *= int(dim) if dim else 1
    bits = _BITS[dtype] if dtype in _BITS else int(
        re.search(r'\d+', dtype)[0])
    found.append((dtype, size, size * bits // 8))
  return found


def parse(text: str) -> dict[str, Computation]:
  """Returns the computations by name."""
  computations, current = {}, None
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      current = Computation(head[2], bool(head[1]), [])
      computations[current.name] = current
      continue
    found = _INSTRUCTION.match(line)
    if found and current is not None:
      current.instructions.append(Instruction(*found.groups()))
  return computations


def trip_count(instruction: Instruction,
               computations: dict[str, Computation]) -> Optional[int]:
  """Returns how often a while runs its body; None: it depends on data.

  XLA says so on CPU and GPU. libtpu leaves only the comparison of the counter
  with a constant, as jax writes a scan.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
  if known:
    return int(known[1])
  called = dict(_CALLED.findall(instruction.rest))
  condition = computations[called['condition']].instructions
  constants = {i.name: int(i.rest.split(')')[0]) for i in condition
               if i.op == 'constant' and re.match(r'-?\d+\)', i.rest)}
  root = condition[-1]
  if root.op == 'compare' and 'direction=LT' in root.rest:
    bound = re.findall(r'%?([\w.\-]+)', root.rest.split(')')[0])[-1]
    return constants.get(bound)
  return None


def walk(computations: dict[str, Computation], passes: Optional[int] = None):
  """Yields a Place for each instruction that a step reaches.

  Of a conditional, every branch is walked: which of them runs is not known.

  Args:
    computations: by name.
    passes: of a loop that depends on data, where they are known otherwise;
      None: they are not, and one is counted.
  """
  entry = next(c for c in computations.values() if c.entry)

  def visit(name, runs, known):
    for instruction in computations[name].instructions:
      yield Place(name, instruction, runs, known)
      times, sure = 1, True
      if instruction.op == 'while':
        trips = trip_count(instruction, computations)
        trips = passes if trips is None else trips
        times, sure = (1, False) if trips is None else (trips, True)
      for callee in called(instruction):
        if callee in computations:
          yield from visit(callee, runs * times, known and sure)

  yield from visit(entry.name, 1, True)


def called(instruction: Instruction) -> list[str]:
  """Returns the computations that an instruction calls."""
  names = [name for _, name in _CALLED.findall(instruction.rest)]
  for group in _BRANCHES.findall(instruction.rest):
    names += re.findall(r'[\w.\-]+', group)
  return names
