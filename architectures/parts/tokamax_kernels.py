"""Kernels of tokamax for NVIDIA's GPUs, which its Mosaic compiler makes:
attention, and products of rows with the matrices of their experts.

They were compiled for an H100 and a B200 that were not there and never run. So
`auto` takes none of them, and the package, which is the extra `tokamax`, is
imported where one is asked for by name.

Tokamax chooses a kernel's form by the GPU that JAX computes on by default.
Where a program is compiled for a GPU that is not there, jax.default_device has
to name that one.
"""

import contextlib
from collections.abc import Iterator
import importlib.util

import jax
from jax.extend import backend
import jax.numpy as jnp

from common.errors import RequestError, require

SIDE_OF_TILE = 64


def reason_of_refusal(generations: tuple[int, ...]) -> str:
  """Returns why tokamax has no kernel with a gradient here: a clause 'which
  ...' for an error message, or '' if it has one.

  Args:
    generations: the major numbers of the compute capabilities of the GPUs that
      it has one for: 9 is Hopper, and 10 Blackwell.
  """
  if importlib.util.find_spec('tokamax') is None:
    return ('which is not installed here: install the extra `tokamax`, with '
            'Python 3.12 or later')
  device = backend.get_default_device()
  capability = getattr(device, 'compute_capability', None)
  if capability is not None and int(float(capability)) in generations:
    return ''
  listed = ' and '.join(f'{generation}.x' for generation in generations)
  return (f'which has gradients for GPUs of compute capability {listed}, and '
          f'JAX computes on {device.device_kind}')


def attention(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array, *,
              scale: float, softcap: float, mask: jax.Array | None,
              is_causal: bool, local_window_size: tuple[int, int] | None,
              implementation: str = 'mosaic_gpu') -> jax.Array:
  """Computes softmax(cap(scale * q k)) v by FlashAttention (Dao et al. 2022;
  for Hopper, Shah et al. 2024, arXiv 2407.08608).

  The suffixes name axes: B batch, L queries, M keys, H heads of queries, J
  heads of keys, K features of a head.

  Args:
    q_BLHK: queries.
    k_BMJK: keys.
    v_BMJK: values.
    scale: the factor of the scores.
    softcap: the scores' bound, softcap * tanh(score / softcap); 0: none.
    mask: bool [B, 1, L, M], the keys that a query sees; None: all.
    is_causal: whether a query sees no later key, by their places.
    local_window_size: how many keys before its own place a query sees, and how
      many after it; None: any.
    implementation: the name of tokamax's implementation. `xla` runs anywhere,
      for tests.

  Returns:
    The results of the heads, [B, L, H, K].
  """
  import tokamax
  with _refuse_as_request('model.attention_kernel'):
    return tokamax.dot_product_attention(
        q_BLHK, k_BMJK, v_BMJK, mask=mask, scale=scale, is_causal=is_causal,
        local_window_size=local_window_size, logits_soft_cap=softcap or None,
        implementation=implementation)


def grouped_product(x_PI: jax.Array, m_EIO: jax.Array, count_E: jax.Array,
                    implementation: str = 'mosaic_gpu') -> jax.Array:
  """Multiplies each row by the matrix of its expert: y_p = x_p m_e for each row
  p of expert e.

  Args:
    x_PI: P rows of I inputs, sorted by expert.
    m_EIO: the matrices of E experts, from I inputs to O outputs.
    count_E: the number of rows of each expert.
    implementation: as of `attention`.

  Returns:
    The products, [P, O], 0 for rows past the counts.

  Raises:
    RequestError: if tokamax has no kernel for these sizes.
  """
  import tokamax
  # The kernel and its gradient read rows and matrices in tiles.
  inputs, outputs = m_EIO.shape[1:]
  require(inputs % SIDE_OF_TILE == 0 and outputs % SIDE_OF_TILE == 0,
          'model.moe.grouped_kernel is tokamax, which takes matrices with '
          f'sides in multiples of {SIDE_OF_TILE}, and those of experts are '
          f'{inputs} x {outputs} on each device: choose auto or xla')
  num_rows = len(x_PI)
  padded_PI = jnp.pad(x_PI, ((0, -num_rows % SIDE_OF_TILE), (0, 0)))
  with _refuse_as_request('model.moe.grouped_kernel'):
    padded_PO = tokamax.ragged_dot(padded_PI, m_EIO, count_E,
                                   implementation=implementation)
  # The kernel leaves unwritten memory in rows past the counts.
  is_experts_row_P = jnp.arange(num_rows) < count_E.sum()
  return jnp.where(is_experts_row_P[:, None], padded_PO[:num_rows], 0)


@contextlib.contextmanager
def _refuse_as_request(field: str) -> Iterator[None]:
  """Raises tokamax's errors about dtypes and sizes as RequestError, with the
  name of the field that asked for its kernel."""
  try:
    yield
  except (NotImplementedError, ValueError) as error:
    reason = ' '.join(str(error).split())
    raise RequestError(
        f'{field} is tokamax, which refuses these arrays ({reason}): choose '
        'auto or xla') from error
