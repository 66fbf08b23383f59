"""Chips by name: what vendors publish, and what the compilers enforce.

Every figure is of one jax device. TPUs: docs.cloud.google.com/tpu/docs, the
pages v4, v5e, v5p, v6e and tpu7x (tables 'key specifications' and
'configurations'); compute peaks are those of
training/costs/peaks.py, with its sources. `hbm` is what the TPU compiler lets a
program use, which is a little less than the chip has. `links` is the sum of a
device's links in one direction: half of the 'bidirectional' bandwidth. GPUs:
datasheets of A100, H100, H200 and HGX B200 at nvidia.com, NVLink likewise
halved; `outside` is the one 200 or 400 Gb/s adapter a GPU of a DGX A100, H100,
H200 or B200.
"""

from typing import NamedTuple, Optional

from configs.errors import one_of, require


GIB = 2 ** 30
_GB = 1e9


class Chip(NamedTuple):
  """One device, and the machine that it stands in.

  Attributes:
    platform: tpu or cuda.
    kind: its name in training/costs/peaks.py.
    cores: TensorCores of one device; TPUs only.
    devices: jax devices a chip.
    hbm: bytes that a program may use.
    hbm_rate: bytes a second between them and the device.
    links: bytes a second it can send within a slice, or a host of GPUs.
    outside: likewise between slices or hosts; None: not published.
    shapes: the small shapes of a slice; beyond, sides are multiples of 4.
    most: chips of the largest slice.
  """
  platform: str
  kind: str
  cores: int
  devices: int
  hbm: float
  hbm_rate: float
  links: float
  outside: Optional[float]
  shapes: tuple[str, ...]
  most: int


_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')
_PLANES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')

CHIPS = {
    'v4': Chip('tpu', 'TPU v4', 2, 1, 30.75 * GIB, 1228 * _GB, 300 * _GB,
               None, _CUBES, 4096),
    'v5e': Chip('tpu', 'TPU v5 lite', 1, 1, 15.75 * GIB, 819 * _GB, 200 * _GB,
                3.125 * _GB, _PLANES, 256),
    'v5p': Chip('tpu', 'TPU v5', 2, 1, 95.74 * GIB, 2765 * _GB, 600 * _GB,
                6.25 * _GB, _CUBES, 6144),
    'v6e': Chip('tpu', 'TPU v6 lite', 1, 1, 31.25 * GIB, 1638 * _GB, 400 * _GB,
                12.5 * _GB, _PLANES, 256),
    'tpu7x': Chip('tpu', 'TPU7x', 1, 2, 94.75 * GIB, 3690 * _GB, 300 * _GB,
                  6.25 * _GB, _CUBES, 9216),
    'a100': Chip('cuda', 'NVIDIA A100-SXM4-80GB', 1, 1, 85.1e9, 2039 * _GB,
                 300 * _GB, 25 * _GB, (), 0),
    'h100': Chip('cuda', 'NVIDIA H100 80GB HBM3', 1, 1, 84.9e9, 3350 * _GB,
                 450 * _GB, 50 * _GB, (), 0),
    'h200': Chip('cuda', 'NVIDIA H200', 1, 1, 150.7e9, 4800 * _GB, 450 * _GB,
                 50 * _GB, (), 0),
    'b200': Chip('cuda', 'NVIDIA B200', 1, 1, 191.5e9, 7700 * _GB, 900 * _GB,
                 50 * _GB, (), 0),
}


class Topology(NamedTuple):
  """Which devices a plan is for."""
  name: str  # as it was asked for
  chip: Chip
  shape: tuple[int, ...]
  slices: int

  @property
  def chips(self) -> int:
    count = self.slices
    for side in self.shape:
      count *= side
    return count

  @property
  def devices(self) -> int:
    return self.chips * self.chip.devices

  @property
  def together(self) -> int:
    """Devices that the fast network joins: a slice's, or a host's."""
    if self.chip.platform == 'tpu':
      return self.devices // self.slices
    return self.shape[2]


def parse(name: str, slices: int = 1) -> Topology:
  """Returns what a name such as v5p:4x4x8 or h100:1x8x8 stands for.

  Raises:
    ValueError: for a name of no chip, or a shape that no pod has.
  """
  kind, _, text = name.partition(':')
  one_of('chip in --topology', kind, CHIPS)
  chip = CHIPS[kind]
  dims = 2 if chip.shapes == _PLANES else 3
  example = {'cuda': '1x8x8 (slices x hosts x GPUs of a host)',
             'tpu': '4x8' if dims == 2 else '4x4x8'}[chip.platform]
  sides = text.split('x')
  require(len(sides) == dims and all(s.isdigit() and int(s) for s in sides),
          f'--topology is {name!r}: write the shape of a {kind} as '
          f'{kind}:{example}')
  shape = tuple(int(side) for side in sides)
  require(slices >= 1, f'--slices is {slices}: it must be >= 1')
  require(slices == 1 or chip.platform == 'tpu',
          f'--slices is {slices}, but {kind} is no TPU: write '
          f'{kind}:SLICESxHOSTSxGPUS')
  if chip.platform == 'tpu':
    _check_pod(name, kind, chip, text, shape)
  else:
    _check_hosts(name, kind, shape)
  return Topology(name, chip, shape, slices)


def _check_hosts(name, kind, shape) -> None:
  """The plugin accepts any shape; NVLink joins 8 GPUs of a machine at most."""
  slices, hosts, gpus = shape
  require(slices == 1, f'--topology is {name!r}: GPUs of several slices are '
          f'not planned for; write all hosts in one, {kind}:1x'
          f'{slices * hosts}x{gpus}')
  require(gpus in (1, 2, 4, 8), f'--topology is {name!r}, whose hosts would '
          f'have {gpus} GPUs: choose from 1, 2, 4, 8')


def _check_pod(name, kind, chip, text, shape) -> None:
  """The compiler accepts shapes that no pod has."""
  choices = ', '.join(chip.shapes)
  if chip.shapes == _PLANES:
    require(text in chip.shapes, f'--topology is {name!r}, a shape that no '
            f'{kind} slice has: choose from {choices}')
    return
  size = shape[0] * shape[1] * shape[2]
  whole = all(s % 4 == 0 for s in shape) and list(shape) == sorted(shape)
  require(text in chip.shapes or whole and size <= chip.most,
          f'--topology is {name!r}, a shape that no {kind} slice has: choose '
          f'from {choices}, or three multiples of 4 in rising order, such as '
          f'4x4x8, of {chip.most:,} chips at most')
