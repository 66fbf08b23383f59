"""Suites of probes, for python -m tools.probes."""
