"""Programs around a run: they count, verify, convert, plan, sweep, report."""

import common  # noqa: F401  its sentence comes before those of packages
