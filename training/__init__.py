"""How a run goes: devices, data, objectives, optimiser, step, checkpoints."""

from training.distributed import backends

backends.settle()  # here, so that no program forgets it
