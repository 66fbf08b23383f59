"""How a run goes: devices, data, objectives, optimiser, step, checkpoints."""

from training.distributed import backends

backends.hide_absent_devices()  # here, so that no program forgets it
