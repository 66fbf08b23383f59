"""What makes steps faster where the CPU is the device.

XLA's CPU backend takes a step's temporaries from malloc and gives them back
after it, hundreds of MiB that the kernel has to clear again for the next one:
a fifth of the CPU time of a step. And a step that is dispatched while its
predecessor runs holds a second set of them. docs/performance.md has figures.
"""

import ctypes

import jax

# glibc's malloc.h. What is freed stays in the process: nothing is mapped by
# its own, the heap is never trimmed, all threads share it, it grows in steps.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1),
             (_TOP_PAD, 64 << 20))


def reuse() -> None:
  """Lets a CPU compute in the thread that calls it, and this process keep
  what it frees; nothing changes where the device is another one, or the C
  library has no mallopt. Call it once, after jax.distributed.initialize and
  before anything else touches a device."""
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if jax.default_backend() == 'cpu' and mallopt is not None:
    for name, value in _SETTINGS:
      mallopt(name, value)


def trim() -> None:
  """Gives the kernel back what is free: after making the state and after
  compiling, hundreds of MiB that reuse() would keep, in pieces that a step's
  large arrays don't fit into."""
  malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if jax.default_backend() == 'cpu' and malloc_trim is not None:
    malloc_trim(0)
