"""What a run would take, said before it is submitted: chips, the memory of a
device, chip-hours, and their price.

Only the reader knows the price of a chip for an hour: --price gives it.
"""

import json
import math
import subprocess
import sys
from typing import Any, NamedTuple

from configs.errors import EnvironmentFailure, RequestError, require
from tools.plan import chips, topology as topologies

# (kind, name, default, what it says), for places that know their devices.
FLAGS = (
    ('float', 'hours', 0.0, 'How long the run may take, for the cost that '
     '--dry_run prints.'),
    ('float', 'price', 0.0, 'Of one chip for an hour, in any currency, for '
     '--dry_run.'),
    ('bool', 'plan', True, 'Let --dry_run compile the training step with '
     'tools.plan, if its extra is installed; otherwise it estimates.'),
)


class Place(NamedTuple):
  """Where a run would be.

  Attributes:
    chips: in all.
    devices: of jax, in all.
    name: of a chip, as one reads it.
    chip: its figures; None: not known here.
    topology: as tools.plan names it; '': it does not know it.
    slices: of this topology.
  """
  chips: int
  devices: int
  name: str
  chip: chips.Chip | None = None
  topology: str = ''
  slices: int = 1


def check(args) -> None:
  """Raises RequestError for hours or a price that are none."""
  for name in ('hours', 'price'):
    value = args[name].value
    require(math.isfinite(value) and value >= 0,
            f'--{name} is {value}: choose 0 or more')
  require(not args.price or args.hours, f'--price is {args.price}: pass '
          '--hours too, for a cost is chips x hours x price')


def text(place: Place, config: Any, words: tuple[str, ...], args) -> str:
  """Returns what --dry_run prints of a run, in lines that begin with '# '.

  Args:
    place: where it would be.
    config: the run's; None: say nothing of memory.
    words: of its command line, of which tools.plan takes the config's.
    args: the flags.

  Raises:
    RequestError: where tools.plan finds that it does not fit.
  """
  lines = [f'{place.chips:,} chips ({place.name})'
           + (f', {place.devices:,} devices' * (place.devices != place.chips))]
  if config is not None:
    lines += _memory(place, config, words, 'plan' in args and args.plan)
  lines += cost(place.chips, args.hours, args.price)
  return '\n'.join(f'# {line}' for line in lines)


def cost(count: int, hours: float, price: float) -> list[str]:
  """Returns what a number of chips costs for so many hours."""
  if not hours:
    return [f'{count:,} chip-hours an hour; --hours and --price give the cost']
  spent = count * hours
  line = f'{count:,} chips x {hours:g} hours = {spent:,.6g} chip-hours'
  if not price:
    return [f'{line}; --price gives the cost']
  return [f'{line}, x {price:g} a chip-hour = {spent * price:,.2f}']


def _memory(place: Place, config, words, compiles: bool) -> list[str]:
  if place.topology and compiles:
    topology = chips.parse(place.topology, place.slices)
    compiler = topologies.compiler(topology)
    if compiler:
      print(f'compiling for {place.topology} with {compiler}, which may take '
            'minutes; --noplan only estimates', file=sys.stderr, flush=True)
      return _planned(_plan(place, words), config)
  peak = _analytic(place, config)
  has = '' if place.chip is None else f' of its {_gib(place.chip.hbm)}'
  why = ("with tools.plan's compilers (pip install -e '.[plan,plan-gpu]') it "
         'is compiled' if place.topology and compiles else
         'python -m tools.plan compiles it')
  return [f'a device needs about {_gib(peak)}{has} at its peak, by an '
          f'estimate; {why}']


def _plan(place: Place, words) -> dict:
  """Returns what tools.plan says, in a process of its own: it must set the
  compiler's environment before jax is imported."""
  result = subprocess.run(
      [sys.executable, '-m', 'tools.plan', '--json',
       f'--topology={place.topology}', f'--slices={place.slices}',
       *(word for word in words if word.startswith(('--config=', '--config.')))
       ], capture_output=True, text=True, check=False)
  if result.returncode:
    said = result.stderr.strip().splitlines() or ['it said nothing']
    kind = RequestError if result.returncode == 2 else EnvironmentFailure
    raise kind(f'tools.plan: {said[-1].removeprefix("error: ")}')
  return json.loads(result.stdout[result.stdout.index('{'):])


def _planned(plan: dict, config) -> list[str]:
  program, = plan['programs']
  memory = program['memory']
  lines = [f'a device needs {_gib(memory["peak"])} of its '
           f'{_gib(memory["hbm"])} at its peak, by {plan["compiler"]}']
  least = program['roofline']['step_seconds'] * config.train.steps / 3600
  if not config.data.batch_ramp:  # of smaller batches, steps are shorter
    lines.append(
        f'{config.train.steps:,} steps take {least:,.3g} hours at the least, '
        f'{least * plan["chips"]:,.4g} chip-hours: real steps take longer')
  return lines


def _analytic(place: Place, config) -> int:
  """Returns the peak of a device by training.costs.memory, without compiling;
  what the backward pass keeps is traced on one CPU device."""
  import jax
  from configs import sharding
  from training import runs
  from training.costs import memory
  from training.distributed import devices
  jax.config.update('jax_platforms', 'cpu')
  model = runs.resolve_alone(config)
  alone = devices.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1),
                            jax.devices()[:1])
  run = memory.described(config, model,
                         devices.mesh_shape(config.mesh, place.devices))
  return memory.analytic(
      run, memory.kept(runs.build(config, memory.traceable(model), alone)),
      place.chip.platform if place.chip else 'cuda')['peak']


def _gib(size: float) -> str:
  return f'{size / chips.GIB:,.1f} GiB'
