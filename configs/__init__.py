"""What to run: one file a system, and every default in base.py."""
