"""Timed comparisons, each run as python -m benchmarks.NAME."""

import common  # noqa: F401  its sentence comes before those of packages
