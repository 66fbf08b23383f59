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
_MALLOC_OPTIONS = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1),
                   (_TOP_PAD, 64 << 20))

# With one thread a device, eval.py hung in 10 of 16 trials on 8 devices beside
# other programs on 2 cores.
_THREADS_OF_A_DEVICE = 4


def configure_cpu() -> None:
  """Configures JAX and the memory allocator for computing on CPUs, where that
  is faster than the defaults: a CPU device computes in the thread that calls
  it, freed memory stays with the process, and there are enough threads for
  several devices.

  Nothing changes if the devices are not CPUs. Where the C library has no
  mallopt, freed memory is not kept. Call it once, after
  jax.distributed.initialize, and before anything else uses a device.
  """
  # Both must be set before JAX starts its CPU backend. default_backend() below
  # starts it.
  set_number_of_threads()
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if jax.default_backend() == 'cpu' and mallopt is not None:
    for option, value in _MALLOC_OPTIONS:
      mallopt(option, value)


def set_number_of_threads() -> None:
  """Sets the number of threads of XLA's CPU backend ($PJRT_NPROC) if there are
  several devices, unless the user has set it.

  A device that waits for others in a collective, such as an all-reduce, keeps a
  thread busy. With too few threads all devices would wait forever. So there are
  enough for four collectives of each device, and at least as many as cores,
  which is XLA's default.
  """
  # A single device never waits for others.
  num_devices = _number_of_devices()
  if num_devices <= 1 and not jax.distributed.is_initialized():
    return
  num_cores = len(os.sched_getaffinity(0))
  num_threads = max(_THREADS_OF_A_DEVICE * num_devices, num_cores)
  os.environ.setdefault('PJRT_NPROC', str(num_threads))


def _number_of_devices() -> int:
  """Returns how many CPU devices this process will have, before it has them."""
  flags = os.environ.get('XLA_FLAGS', '')
  counts = re.findall(
      r'--xla_force_host_platform_device_count=(\d+)', flags)
  num_forced = 1
  if counts:
    num_forced = int(counts[-1])
  return max(jax.config.jax_num_cpu_devices, num_forced)


def release_free_memory() -> None:
  """Gives the memory that this process has freed back to the kernel.

  After making the state and after compiling it is hundreds of MiB, which
  `configure_cpu` would keep, in pieces that a step's large arrays don't fit
  into.
  """
  malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if jax.default_backend() == 'cpu' and malloc_trim is not None:
    malloc_trim(0)
