"""Products of rows sorted by expert, each with its expert's matrix.

xla       jax.lax.ragged_dot, as the compiler makes of it; anywhere
megablox  Pallas' gmm and tgmm on TPU (MegaBlocks: Gale et al. 2022): a grid
          over the tiles of rows that an expert has, so the work follows them

`auto` takes megablox on TPU and xla elsewhere. XLA's own is at times every
expert for every row: on GPU, and on a TPU by the compiler's release. As in
parts/attention/kernels.py the platform is that of the mesh.
"""

import functools
from typing import Callable

import jax
import jax.numpy as jnp

from architectures.parts import sharding
from architectures.parts.moe.config import MoEConfig
from configs.errors import require

GROUPED_KERNELS = ('auto', 'xla', 'megablox')
PLATFORMS = {'megablox': 'tpu'}
# Of megablox, in order of choice. A tile that two experts share is computed
# for both, so an expert should fill two: fewer rows a tile waste less of the
# matrix units, more read the weights less often.
ROWS = (512, 256, 128)
SIDE = {'bfloat16': 1024, 'float32': 512}  # of a matrix' tile, by what VMEM has


def choose(m: MoEConfig) -> str:
  """Returns xla or megablox.

  Raises:
    ValueError: where config.moe.grouped_kernel names one that cannot do it.
  """
  device = sharding.platform()
  if m.grouped_kernel == 'auto':
    return next((name for name in PLATFORMS if not _elsewhere(name, device)),
                'xla')
  check_grouped_kernel(m, device)
  return m.grouped_kernel


def check_grouped_kernel(m: MoEConfig, device: str) -> None:
  """Raises ValueError where a named kernel does not run on the platform."""
  name = m.grouped_kernel
  others = ', '.join(k for k in GROUPED_KERNELS if k != name)
  require(not _elsewhere(name, device), f'model.moe.grouped_kernel is {name}, '
          f'which runs on {PLATFORMS.get(name)}, and this program is for '
          f'{device}: choose from {others}')


def _elsewhere(name: str, device: str) -> bool:
  return PLATFORMS.get(name, device) != device


def product(name: str, even: int) -> Callable:
  """(rows_PI, m_EIO, count_E) -> [P, O], with gradients of the first two; rows
  past the counts are unspecified, but finite. `even`: an expert's rows."""
  if name == 'xla':
    return jax.lax.ragged_dot
  return functools.partial(megablox, even, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def megablox(even: int, interpret: bool, x_PI: jax.Array, m_EIO: jax.Array,
             count_E: jax.Array) -> jax.Array:
  """Pallas' product; `interpret`: on CPU."""
  return _gmm(even, x_PI, m_EIO, count_E, interpret)


def _megablox_fwd(even: int, interpret: bool, x_PI: jax.Array, m_EIO: jax.Array,
                  count_E: jax.Array):
  return _gmm(even, x_PI, m_EIO, count_E, interpret), (x_PI, m_EIO, count_E)


def _megablox_bwd(even: int, interpret: bool, saved: tuple, dy_PO: jax.Array):
  """Not megablox' own: it tiles both of these as it did the product, though
  their sides are others."""
  x_PI, m_EIO, count_E = saved
  dx_PI = _gmm(even, dy_PO, m_EIO, count_E, interpret, transpose=True)
  return dx_PI, _tgmm(even, x_PI, dy_PO, m_EIO.dtype, count_E, interpret), None


megablox.defvjp(_megablox_fwd, _megablox_bwd)


def _gmm(even: int, x_PI: jax.Array, m_EIO: jax.Array, count_E: jax.Array,
         interpret: bool, transpose: bool = False):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
  (P, inputs), outputs = x_PI.shape, m_EIO.shape[1 if transpose else 2]
  tiles = _tiles(even, P, inputs, outputs, x_PI.dtype)
  y_PO = gmm(_fill(x_PI, tiles[0]), m_EIO, count_E, x_PI.dtype, tiles,
             transpose_rhs=transpose, interpret=interpret)[:P]
  # Rows that no expert has are not written: whatever the memory held.
  inside_P = jnp.arange(P) < count_E.sum()
  return jnp.where(inside_P[:, None], y_PO, 0)


def _tgmm(even: int, x_PI: jax.Array, dy_PO: jax.Array,
          dtype: jax.typing.DTypeLike, count_E: jax.Array, interpret: bool):
  """x^T dy of each expert's rows; zero where it has none."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
  tiles = _tiles(even, *x_PI.shape, dy_PO.shape[1], x_PI.dtype)
  x_PI, dy_PO = _fill(x_PI, tiles[0]), _fill(dy_PO, tiles[0])
  return tgmm(x_PI.swapaxes(0, 1), dy_PO, count_E, dtype, tiles,
              interpret=interpret)


def _tiles(even: int, P: int, inputs: int, outputs: int,
           dtype: jax.typing.DTypeLike) -> tuple[int, int, int]:
  """Sides of the tiles of rows, inputs and outputs."""
  rows = next((t for t in ROWS if 2 * t <= even and P % t == 0), ROWS[-1])
  most = SIDE[jnp.dtype(dtype).name]
  return rows, _side(inputs, most), _side(outputs, most)


def _side(size: int, most: int) -> int:
  """As few tiles as `most` allows, all alike, of whole lanes."""
  if size <= most:
    return size
  return -(-size // -(-size // most) // 128) * 128


def _fill(x_P: jax.Array, rows: int):
  """Adds rows, to whole tiles."""
  return jnp.pad(x_P, ((0, -x_P.shape[0] % rows), (0, 0)))
