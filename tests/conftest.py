"""What every test runs under: eight virtual CPU devices, and a compile cache.

Set as environment variables, before jax is imported, so that the processes
which tests start inherit them. A GPU's own run: ARCHETYPE_TEST_PLATFORM=gpu.
"""

import gc
import importlib.metadata
import os
import pathlib
import signal
import sys
import zlib

import pytest

_CACHE = pathlib.Path(__file__).parents[1] / '.cache'
_PYTHON = 'py{}{}'.format(*sys.version_info[:2])
_PLATFORM = os.environ.get('ARCHETYPE_TEST_PLATFORM', 'cpu')
# Eight devices on two busy cores may come late to a collective: on expiry XLA
# aborts the process.
_FLAGS = (
    '--xla_force_host_platform_device_count=8 '
    '--xla_cpu_collective_call_terminate_timeout_seconds=600 '
    # Tests compile much and run little: this halves the time of compiling.
    '--xla_backend_optimization_level=0')
# And these take two thirds of what is left. jaxlib 0.12 ends the process at
# the first of them, and so does libtpu.
_FLAGS_OF_0_10 = ('--xla_cpu_use_fusion_emitters=false '
                  '--xla_cpu_parallel_codegen_split_count=1')

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' ' + _FLAGS
if _PLATFORM == 'cpu':
  os.environ['JAX_PLATFORMS'] = 'cpu'
# Each Python has its own jax, and each jax its own executables.
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', str(_CACHE / 'jax' / _PYTHON))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.05')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
# Programs without the lines of Python that wrote them are lowered faster.
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')
# Threads for the collectives of eight devices, as training/distributed/cpu.py
# has them.
os.environ.setdefault('PJRT_NPROC', '32')
# Tracing makes many objects and little garbage.
gc.set_threshold(100_000, 20, 100)
# Tokenised text: kept from one run of the tests to the next.
os.environ.setdefault('ARCHETYPE_CACHE', str(_CACHE / 'archetype'))


@pytest.fixture(scope='module', autouse=True)
def _without_old_garbage():
  """Keeps what exists before a file's tests out of garbage collections, which
  with all that was imported would take as long as a test."""
  gc.collect()
  gc.freeze()


def pytest_addoption(parser):
  parser.addoption('--of', type=int, default=1, metavar='N', help=(
      'Divides the tests that were asked for into N parts, by their names.'))
  parser.addoption('--part', type=int, default=0, metavar='K', help=(
      'Which of the N parts runs, from 0 to N - 1.'))


def pytest_configure(config):
  """Checks --of and --part, and sets what has to be set before a test starts
  a process or imports jax."""
  num_parts = config.getoption('--of')
  part = config.getoption('--part')
  if not 0 <= part < num_parts:
    raise pytest.UsageError(f'--part is {part}: one of the {num_parts} parts '
                            'of --of, counted from 0')

  # What a shell starts in the background ignores Ctrl-C, and so would the
  # programs that tests start and interrupt.
  if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  # Under nohup, SIGHUP is ignored likewise. A program inherits that a signal is
  # ignored, and not that it has a handler.
  if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

  is_jaxlib_0_10 = importlib.metadata.version('jaxlib').startswith('0.10.')
  uses_libtpu = 'plan' in config.option.markexpr
  if is_jaxlib_0_10 and not uses_libtpu:
    os.environ['XLA_FLAGS'] += ' ' + _FLAGS_OF_0_10


def pytest_collection_modifyitems(config, items):
  """Leaves out tests that were not asked for, and those of other parts."""
  num_parts = config.getoption('--of')
  part = config.getoption('--part')
  kept = []
  left_out = []
  for item in items:
    # The part of a test follows from its name, so that it is the same anywhere.
    part_of_item = zlib.crc32(item.nodeid.encode()) % num_parts
    if part_of_item == part and _is_asked_for(item, config):
      kept.append(item)
    else:
      left_out.append(item)
  config.hook.pytest_deselected(items=left_out)
  items[:] = kept


def _is_asked_for(item, config):
  """Returns whether -m names all markers of a test without which it does not
  run: `long` (more of what other tests do), `fuzz` (likewise), `plan` (needs
  libtpu), `docs` (needs the built site), `slurm` and `verify`."""
  for marker in ('docs', 'fuzz', 'long', 'plan', 'slurm', 'verify'):
    if item.get_closest_marker(marker) and marker not in config.option.markexpr:
      return False
  return True
