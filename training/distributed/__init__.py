"""Devices and processes: the mesh, joining, signals, failing together."""
