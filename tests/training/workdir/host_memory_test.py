"""What loading a checkpoint costs the host, beside the arrays themselves."""

import os
import subprocess
import sys

import jax
import pytest

from tests import train_test
from tests.helpers import toy_run
from training.workdir import restoring

COUNT, SIDE = 24, 4096  # 24 arrays of 64 MiB, each in two shards
ARRAYS, SHARD = COUNT * SIDE**2 * 4, SIDE**2 * 2


def _abstract():
  mesh = toy_run.make_mesh(2, 1)
  place = jax.NamedSharding(mesh, jax.P('fsdp'))
  return {f'w{i}': jax.ShapeDtypeStruct((SIDE, SIDE), 'float32', sharding=place)
          for i in range(COUNT)}


def _save(workdir):
  state = {name: jax.device_put(jax.numpy.full(x.shape, i, x.dtype), x.sharding)
           for i, (name, x) in enumerate(_abstract().items())}
  with toy_run.open_store(workdir) as store:
    toy_run.save(store, 1, state)


def _resident(name):
  """Bytes: VmRSS now, or VmHWM, the most so far."""
  with open('/proc/self/status') as file:
    return 1024 * int(next(line for line in file if line.startswith(name)
                           ).split()[1])


def _load(workdir):
  abstract = _abstract()
  before = _resident('VmRSS')
  state = restoring.restore(restoring.directory(workdir), abstract).state
  jax.block_until_ready(state)
  print(_resident('VmHWM') - before - ARRAYS)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'),
                    reason='Linux says what was resident')
@pytest.mark.long
def test_loading_takes_the_largest_read_and_a_gib(tmp_path):
  """Half as much again is loaded, so that a second copy is found out."""
  flags = '--xla_force_host_platform_device_count=2'
  for what in ('_save', '_load'):
    result = subprocess.run(
        [sys.executable, '-c', 'import sys; '
         'from tests.training.workdir import host_memory_test;'
         f'host_memory_test.{what}(sys.argv[1])', tmp_path], text=True,
        cwd=train_test.ROOT, env=os.environ | {'XLA_FLAGS': flags}, check=True,
        stdout=subprocess.PIPE)
  assert int(result.stdout.split()[-1]) <= SHARD + 2**30
