"""What people do around a run: count, verify, convert, plan, sweep, report."""
