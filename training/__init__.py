"""How a run goes: devices, data, objectives, optimiser, step, checkpoints."""
