"""Worked sweeps: a base config, and plain loops that call add(...)."""
