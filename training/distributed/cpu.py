"""Settings of the CPU where it is the device: memory that stays, and threads.

XLA's CPU backend takes a step's temporaries from malloc and gives them back
after it, hundreds of MiB that the kernel has to clear again for the next one:
a fifth of the CPU time of a step. And a step that is dispatched while its
predecessor runs holds a second set of them. docs/performance.md has figures.

Several CPU devices share one pool of threads, as many as there are devices or
cores. Each collective that a device takes part in holds a thread until the
other devices come to it, so that a pool full of waiting ones waits forever.
"""

import ctypes
import os
import re

import jax

# The settings of glibc's malloc.h, by which memory that is freed stays in the
# process: nothing is mapped by its own, the heap is never trimmed, all threads
# share it, it grows in steps.
_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_MMAP_MAX = -4
_ARENA_MAX = -8
_SETTINGS = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1),
             (_TOP_PAD, 64 << 20))


# The threads for each device. With one, eval.py hung in 10 of 16 trials on 8
# devices beside other programs on 2 cores.
_THREADS = 4


def prepare() -> None:
  """Lets a CPU compute in the thread that calls it, this process keep what it
  frees, and several devices have threads enough ($PJRT_NPROC, unless it is
  set). Nothing changes where the device is another one; where the C library
  has no mallopt, memory is not kept. Call it once, after
  jax.distributed.initialize and before anything else touches a device."""
  give_threads()
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if jax.default_backend() == 'cpu' and mallopt is not None:
    for name, value in _SETTINGS:
      mallopt(name, value)


def give_threads() -> None:
  """Sets $PJRT_NPROC, the threads of XLA's pool, unless it is set: where there
  are several devices, those of four collectives for each, and no fewer than
  the cores that this process may use, which are XLA's own choice."""
  devices = _devices()
  if devices <= 1 and not jax.distributed.is_initialized():
    return
  num_cores = len(os.sched_getaffinity(0))
  threads = max(_THREADS * devices, num_cores)
  os.environ.setdefault('PJRT_NPROC', str(threads))


def _devices() -> int:
  """Returns how many CPU devices this process will have, before it has them."""
  flags = os.environ.get('XLA_FLAGS', '')
  counts = re.findall(
      r'--xla_force_host_platform_device_count=(\d+)', flags)
  forced = int(counts[-1]) if counts else 1
  return max(jax.config.jax_num_cpu_devices, forced)


def trim() -> None:
  """Gives the kernel back what is free: after making the state and after
  compiling, hundreds of MiB that prepare() would keep, in pieces that a step's
  large arrays don't fit into."""
  malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if jax.default_backend() == 'cpu' and malloc_trim is not None:
    malloc_trim(0)
