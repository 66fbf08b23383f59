"""What Orbax leaves in its event loops is not told twice; a bug is told."""

import asyncio
import gc

import pytest

from training.workdir import orbax_noise


@pytest.mark.parametrize('error, told', [
    (OSError(28, 'No space left on device'), False),
    (ValueError("OUT_OF_RANGE: [os_error_code='27']"), False),
    (KeyError('a bug'), True)])
def test_a_task_that_nobody_waits_for(error, told, caplog):
  async def fail():
    raise error
  async def main():
    asyncio.ensure_future(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
  loop = orbax_noise._Loop()
  loop.run_until_complete(main())
  loop.close()
  gc.collect()
  assert ('never retrieved' in caplog.text) == told


def test_a_closed_loop_hears_nothing_and_leaves_nothing_pending():
  ended = []
  async def wait():
    try:
      await asyncio.sleep(1000)
    finally:
      ended.append(True)
  async def main():
    asyncio.ensure_future(wait())
    await asyncio.sleep(0)
  loop = orbax_noise._Loop()
  loop.run_until_complete(main())
  loop.close()
  assert ended == [True]
  assert loop.call_soon_threadsafe(print) is None
  loop.close()
